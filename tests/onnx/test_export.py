"""The ONNX file is the model: standard operators, dynamic axes, cut shapes; and a broken one is caught."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
import torch

from conftest import IMAGE_FAMILIES, tiny_model
from pipelines.core.config import BundleConfig, DataConfig, GateConfig, QuantizeConfig
from pipelines.core.errors import InputError, VerificationError
from pipelines.edge.bundle import build_bundle
from pipelines.models.predict import predict_torch
from pipelines.models.removal import cut, load_model, with_stock_shapes
from pipelines.onnx.export import check_export, export_onnx
from pipelines.onnx.predict import predict_onnx
from pipelines.onnx.quantize import quantize_onnx
from pipelines.onnx.verify import verify_against_torch, verify_directory, verify_quality
from pipelines.runtime.infer import open_session
from pipelines.tasks.text_classification import TextClassification

HEADS = [np.array([0, 3]), np.array([1]), np.array([0, 1, 2, 3]), np.array([2])]
NEURONS = [np.arange(10), np.arange(5, 64), np.array([1, 4, 9, 63]), np.arange(64)]


@pytest.fixture(scope="module", params=["bert", "distilbert", "vit"])
def exported(request, tmp_path_factory):
    """An unevenly pruned model directory and its export."""
    of_images = request.param in IMAGE_FAMILIES
    task = request.getfixturevalue("image_task" if of_images else "task")
    processor = request.getfixturevalue("image_processor" if of_images else "tokenizer")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("onnx")
    model = tiny_model(request.param)
    cut(model, HEADS, NEURONS)
    with_stock_shapes(model).save_pretrained(source)
    processor.save_pretrained(source)
    return source, target, export_onnx(str(source), target, task), task


def test_the_file_has_standard_operators_and_dynamic_axes(exported):
    _, target, outcome, task = exported
    model = onnx.load(target / "model.onnx")
    onnx.checker.check_model(model)
    assert {domain.domain for domain in model.opset_import} <= {"", "ai.onnx"}
    assert {node.domain for node in model.graph.node} == {""}
    assert not (target / "model.onnx.data").exists()
    of_images = task.name == "image-classification"
    for value in model.graph.input:
        axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        assert axes == (["batch", 3, 8, 8] if of_images else ["batch", "sequence"])
    assert [value.name for value in model.graph.output] == ["logits"]
    assert outcome.details["verification"]["largest_difference"] < 1e-4
    assert (outcome.details["verification"]["padded_tokens"] > 0) != of_images
    assert b"site-packages" not in (target / "model.onnx").read_bytes()


def test_removal_is_physical(exported):
    """Fewer columns in the matmuls, not zeros: the file is as small as the cut model."""
    source, target, outcome, _ = exported
    small = load_model(source)
    model = onnx.load(target / "model.onnx")
    stored = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    counted = sum(parameter.numel() for parameter in small.parameters())
    assert outcome.parameters == counted
    assert stored == pytest.approx(counted, rel=0.05)


def test_logits_equal_torch_at_any_batch_and_length(exported):
    source, target, _, task = exported
    model, session = load_model(source), open_session(target / "model.onnx")
    names = [value.name for value in session.get_inputs()]
    generator = torch.Generator().manual_seed(0)
    for batch, length in [(1, 2), (1, 40), (3, 7), (9, 31)]:
        tokens = torch.randint(5, 50, (batch, length), generator=generator)
        mask = torch.ones_like(tokens)
        for row in range(1, batch):
            mask[row, max(1, length - row) :] = 0
        inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": torch.zeros_like(tokens)}
        inputs["pixel_values"] = torch.randn(batch, 3, 8, 8, generator=generator)
        inputs = {name: inputs[name] for name in names}
        with torch.no_grad():
            expected = model(**inputs).logits.numpy()
        found = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_predictions_come_in_the_order_of_the_examples(exported):
    source, target, _, task = exported
    processor = task.load_processor(str(source))
    features, collate = task.features(processor)["test"], task.collate(processor)
    found = predict_onnx(target / "model.onnx", features, collate, task)
    from_torch = predict_torch(load_model(source), features, collate, task, batch_size=5)
    np.testing.assert_allclose(found, from_torch, atol=1e-4)
    assert np.abs(found - np.roll(found, 1, axis=0)).max() > 1e-3


def test_padding_is_verified_even_where_every_text_has_the_same_length(tokenizer):
    import datasets

    from pipelines.data.text import collate
    from pipelines.onnx.verify import verification_batches

    examples = {"input_ids": [[5] * 16] * 9, "attention_mask": [[1] * 16] * 9, "labels": [0] * 9, "length": [16] * 9}
    batches = list(verification_batches(datasets.Dataset.from_dict(examples), collate(tokenizer)))
    assert {len(batch["input_ids"]) for batch in batches} >= {1, 2, 7, 8}
    assert any((batch["attention_mask"] == 0).any() for batch in batches)


@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_labels_in_another_order_are_exported_in_the_datas_and_a_graph_in_another_is_refused(
    model_type, task_and_processor, tmp_path
):
    task, processor = task_and_processor
    source, target = tmp_path / "model", tmp_path / "onnx"
    target.mkdir()
    turned, others = {0: "TRADE", 1: "sport", 2: "tech"}, {0: "LABEL_0", 1: "LABEL_1"}
    tiny_model(model_type, id2label=turned, num_hidden_layers=1).save_pretrained(source)
    processor.save_pretrained(source)
    export_onnx(str(source), target, task)
    config = task.load_config(str(target))
    assert list(config.id2label.values()) == task.label_names
    features, collate = task.features(processor)["validation"], task.collate(processor)
    expected = predict_torch(task.load_model(str(source)), features, collate, task)
    np.testing.assert_allclose(predict_onnx(target / "model.onnx", features, collate, task), expected, atol=1e-4)
    verify_directory(target, source, task, GateConfig())

    for names in (turned, others):
        config.id2label = names
        config.save_pretrained(target)
        message = rf"sport.*found .*{names[0]}.* in {target}\. Export"
        with pytest.raises(InputError, match=message):
            quantize_onnx(str(target), tmp_path, task, QuantizeConfig())
        with pytest.raises(InputError, match=message):
            verify_directory(target, source, task, GateConfig())
    tiny_model(model_type, id2label=others).save_pretrained(source)
    with pytest.raises(InputError, match=r"sport.*found .*LABEL_0.*Fine-tune"):
        export_onnx(str(source), target, task)


def test_a_model_without_a_head_is_refused(tokenizer, task, tmp_path):
    """Its config names as many labels as the data has, which is all that a config says of a head."""
    tiny_model("bert").base_model.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    with pytest.raises(InputError, match="found BertModel, which has none. Fine-tune"):
        export_onnx(str(tmp_path / "body"), tmp_path, task)


def test_a_length_beyond_the_models_positions_is_refused_before_anything_is_made(
    csv_file, teacher, text_onnx, tmp_path
):
    task = TextClassification(DataConfig(dataset=str(csv_file), max_length=65))
    onnx_directory = str(text_onnx / "onnx")
    stages = {
        "export": lambda: export_onnx(str(teacher), tmp_path, task),
        "quantize": lambda: quantize_onnx(onnx_directory, tmp_path, task, QuantizeConfig()),
        "verify": lambda: verify_directory(text_onnx / "onnx", teacher, task, GateConfig()),
        "bundle": lambda: build_bundle(onnx_directory, tmp_path, task, BundleConfig(web=False)),
    }
    for stage in stages.values():
        with pytest.raises(InputError, match="--max_length of at most 64"):
            stage()
    assert not (tmp_path / "model.onnx").exists()


def test_a_damaged_graph_is_one_message(teacher, text_onnx, task, tmp_path):
    source = shutil.copytree(text_onnx / "onnx", tmp_path / "onnx")
    whole = (source / "model.onnx").read_bytes()
    stages = {
        "quantize": lambda: quantize_onnx(str(source), tmp_path, task, QuantizeConfig()),
        "verify": lambda: verify_directory(source, teacher, task, GateConfig()),
        "bundle": lambda: build_bundle(str(source), tmp_path, task, BundleConfig(web=False)),
    }
    for content in (whole[: len(whole) // 2], b"no graph at all", b""):
        (source / "model.onnx").write_bytes(content)
        for stage in stages.values():
            with pytest.raises(InputError, match=r"expected an ONNX graph in .*model\.onnx, .*found a damaged file"):
                stage()


def break_weights(model: onnx.ModelProto) -> None:
    tensor = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
    values = onnx.numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(onnx.numpy_helper.from_array(values * 1.05, tensor.name))


def ignore_the_mask(model: onnx.ModelProto) -> None:
    """A graph that takes every token for real is right on full batches and wrong on padded ones."""
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[index] = "mask_of_ones"
    ones = onnx.helper.make_node("Shape", ["attention_mask"], ["mask_shape"])
    value = onnx.helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1])
    filled = onnx.helper.make_node("ConstantOfShape", ["mask_shape"], ["mask_of_ones"], value=value)
    model.graph.node.insert(0, filled)
    model.graph.node.insert(0, ones)


def make_nan(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tuple(tensor.dims), np.nan, np.float32), tensor.name))


@pytest.mark.parametrize("damage", [break_weights, ignore_the_mask, make_nan])
def test_a_broken_graph_raises(exported, tmp_path, damage):
    source, target, _, task = exported
    if damage is ignore_the_mask and task.name == "image-classification":
        pytest.skip("images have no mask")
    processor, model = task.load_processor(str(source)), load_model(source)
    verify_against_torch(target / "model.onnx", model, task, processor)
    proto = onnx.load(target / "model.onnx")
    damage(proto)
    onnx.save(proto, tmp_path / "broken.onnx")
    with pytest.raises(VerificationError, match="must not be used"):
        verify_against_torch(tmp_path / "broken.onnx", model, task, processor)


def test_a_quantized_model_that_lost_too_much_raises_and_names_the_remedies(trained_teacher, task, tmp_path):
    target = tmp_path / "onnx"
    target.mkdir()
    export_onnx(str(trained_teacher), target, task)
    proto = onnx.load(target / "model.onnx")
    for tensor in proto.graph.initializer:  # one bit a weight
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            values = onnx.numpy_helper.to_array(tensor)
            coarse = (np.sign(values) * np.abs(values).max()).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(coarse, tensor.name))
    shutil.copytree(target, tmp_path / "coarse")
    onnx.save(proto, tmp_path / "coarse" / "model.onnx")
    with pytest.raises(VerificationError, match=r"max_quality_drop.*target_cpu.*quantization fp32"):
        verify_directory(tmp_path / "coarse", target, task, GateConfig())
    kept = verify_directory(target, target, task, GateConfig(max_quality_drop=0))
    assert kept["quality_lost"] == 0
    assert kept["metrics"]["accuracy"] == kept["fp32"]


def test_a_score_that_is_not_a_number_is_lost(task):
    with pytest.raises(VerificationError, match="nan after"):
        verify_quality(
            {"accuracy": 0.5}, {"accuracy": float("nan")}, task, GateConfig(max_quality_drop=1), "dynamic_int8"
        )


def test_what_cannot_be_exported_is_refused_before_it_is_trained(task, tokenizer, tmp_path):
    from transformers import FunnelConfig, FunnelForSequenceClassification

    sizes = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "num_decoder_layers": 1}
    funnel = FunnelForSequenceClassification(FunnelConfig(vocab_size=80, block_sizes=[1, 1], **sizes))
    for name, model in (("squeezebert", tiny_model("squeezebert", num_hidden_layers=1)), ("funnel", funnel)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    check_export(str(tmp_path / "squeezebert"), task, from_scratch=False)
    with pytest.raises(InputError, match="expected a model that PyTorch can export to ONNX, found one that it cannot"):
        check_export(str(tmp_path / "funnel"), task, from_scratch=False)


def test_a_cache_that_is_not_of_keys_and_values_is_named():
    from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

    from pipelines.tasks.text_generation.export import graph_with_cache

    sizes = {"vocab_size": 80, "hidden_size": 16, "num_hidden_layers": 2}
    mixed = {**sizes, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    for model in (
        MambaForCausalLM(MambaConfig(**sizes, state_size=4)),
        Lfm2ForCausalLM(Lfm2Config(**mixed, layer_types=["conv", "full_attention"])),
    ):
        with pytest.raises(InputError, match=f"found that {type(model).__name__} has another"):
            graph_with_cache(model)
