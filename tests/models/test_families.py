"""Every family: what is cut is what was meant, in memory, on disk, with padding and with a cache."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import IMAGE_FAMILIES, example_inputs, tiny_language_model, tiny_model
from pipelines.core.errors import InputError
from pipelines.models import families
from pipelines.models.families import (
    FAMILIES,
    Family,
    Group,
    Outputs,
    family_of,
    groups_of,
    layers_of,
    prunable,
    select_layers,
)
from pipelines.models.removal import cut, load_model, remove_zeros, shape_of, with_stock_shapes
from pipelines.models.students import student_from_layers

HEADS = [np.array([0, 3]), np.array([1]), np.array([0, 1, 2, 3]), np.array([2, 3])]
NEURONS = [np.arange(10), np.arange(5, 64), np.array([1, 4, 9, 63]), np.arange(64)]
DECODERS = {
    "gpt2": {"n_inner": 64, "n_layer": 4},
    # Two query heads for each of four keys, and heads that are wider than hidden size over heads.
    **{
        name: {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4, "head_dim": 6}
        for name in ("llama", "mistral", "qwen3")
    },
    "qwen2": {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4},
}
assert {"gpt2", "llama", "mistral", "qwen2", "qwen3"} == {*DECODERS} < {*FAMILIES}


def make(model_type: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of 4 layers with 4 units of heads and 64 neurons each, and a batch of inputs, padded where it is text."""
    if model_type not in DECODERS:
        return tiny_model(model_type), example_inputs(model_type)
    inputs = example_inputs()
    # Decoders are padded on the left.
    return tiny_language_model(model_type, **DECODERS[model_type]), {
        name: values.flip(1) for name, values in inputs.items()
    }


def silence(model: Any, kind: str, kept: list[np.ndarray]) -> None:
    """Set to zero, by hand and in stock shapes, what reads the units that are not kept."""
    for layer, units in zip(layers_of(model), kept, strict=True):
        linear = layer.get_submodule(groups_of(model.config)[kind].input)
        weight = linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data
        count = {"heads": 4, "neurons": 64}[kind]
        width = weight.shape[1] // count
        for unit in set(range(count)) - set(units.tolist()):
            weight[:, unit * width : (unit + 1) * width] = 0


def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits where there is no padding."""
    with torch.inference_mode():
        logits = model(**inputs).logits
    return logits[inputs["attention_mask"].bool()] if logits.dim() == 3 else logits


def check_cut(model: Any, inputs: dict[str, torch.Tensor], tmp_path: Any) -> Any:
    """Cut `model` unevenly and check it against one that is silenced, in memory and from disk; return both."""
    kinds = groups_of(model.config)
    kept = {kind: {"heads": HEADS, "neurons": NEURONS}[kind][: len(layers_of(model))] for kind in kinds}
    before = logits_of(model, inputs)
    silenced = copy.deepcopy(model)
    for kind in kinds:
        silence(silenced, kind, kept[kind])
    expected = logits_of(silenced, inputs)
    assert (before - expected).abs().max() > 1e-2  # what was removed did matter
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cut(model, **kept)
    assert shape_of(model) == {kind: [len(units) for units in kept[kind]] for kind in kinds}
    assert sum(parameter.numel() for parameter in model.parameters()) < parameters
    torch.testing.assert_close(logits_of(model, inputs), expected, atol=1e-5, rtol=1e-5)
    for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
        assert (linear.out_features, linear.in_features) == linear.weight.shape

    with_stock_shapes(model).save_pretrained(tmp_path)
    stock, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits_of(stock.eval(), inputs), expected, atol=1e-5, rtol=1e-5)
    small = load_model(tmp_path)
    assert shape_of(small) == shape_of(model)
    torch.testing.assert_close(logits_of(small, inputs), expected, atol=1e-5, rtol=1e-5)
    return silenced


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_cut_model_equals_the_silenced_one_in_memory_and_from_disk(model_type, tmp_path):
    model, inputs = make(model_type)
    assert prunable(model.config) == {"heads": True, "neurons": True}
    silenced = check_cut(model, inputs, tmp_path)
    if model_type not in IMAGE_FAMILIES:
        assert inputs["attention_mask"].min() == 0
    if model_type in DECODERS:
        options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        for generated in (model, load_model(tmp_path)):
            found, expected = (each.generate(**inputs, **options) for each in (generated, silenced))
            assert found.sequences.tolist() == expected.sequences.tolist()
            torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
        # As an export does: the implementation of attention is set after the cut.
        model.set_attn_implementation("eager")
        silenced.set_attn_implementation("eager")
        torch.testing.assert_close(logits_of(model, inputs), logits_of(silenced, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_heads_and_neurons_are_cut_apart_from_one_another(model_type):
    for kind, kept in (("heads", HEADS), ("neurons", NEURONS)):
        model, inputs = make(model_type)
        silenced, whole = copy.deepcopy(model), shape_of(model)
        silence(silenced, kind, kept)
        cut(model, **{kind: kept})
        assert shape_of(model) == whole | {kind: [len(units) for units in kept]}
        torch.testing.assert_close(logits_of(model, inputs), logits_of(silenced, inputs), atol=1e-5, rtol=1e-5)


def test_a_model_is_cut_again():
    model, inputs = make("qwen3")
    silenced = copy.deepcopy(model)
    silence(silenced, "heads", [np.array([3])] * 4)
    cut(model, heads=[np.array([0, 3])] * 4)
    cut(model, heads=[np.array([1])] * 4)
    assert shape_of(model)["heads"] == [1] * 4
    torch.testing.assert_close(logits_of(model, inputs), logits_of(silenced, inputs), atol=1e-5, rtol=1e-5)


def test_a_dense_model_has_nothing_to_remove():
    model, inputs = make("bert")
    expected = logits_of(model, inputs)
    assert shape_of(remove_zeros(model)) == {"heads": [4] * 4, "neurons": [64] * 4}
    torch.testing.assert_close(logits_of(model, inputs), expected)


def test_a_layer_keeps_one_unit_though_all_are_zero():
    model, inputs = make("bert")
    silence(model, "heads", [np.array([], dtype=int), *[np.arange(4)] * 3])
    expected = logits_of(model, inputs)
    assert shape_of(remove_zeros(model))["heads"] == [1, 4, 4, 4]
    torch.testing.assert_close(logits_of(model, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_is_loaded_in_float32(dtype, tmp_path):
    model, inputs = make("llama")
    cut(model, HEADS, NEURONS)
    with_stock_shapes(model).to(dtype).save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).dtype == dtype
    small = load_model(tmp_path)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}
    assert shape_of(small) == shape_of(model)
    assert logits_of(small, inputs).numpy().dtype == np.float32
    with_stock_shapes(small).save_pretrained(tmp_path / "again")
    assert type(model).from_pretrained(tmp_path / "again").dtype == torch.float32


def test_what_a_family_does_not_allow(monkeypatch):
    model = tiny_model("resnet")
    assert prunable(model.config) == {"heads": False, "neurons": False}
    assert remove_zeros(model) is model
    with pytest.raises(InputError, match="found 'resnet'"):
        family_of(model.config)
    bert, _ = make("bert")
    monkeypatch.setitem(families.FAMILIES, "bert", Family(lambda base: list(base.encoder.layer)))
    assert prunable(bert.config) == {"heads": False, "neurons": False}
    assert shape_of(bert) == {}
    with pytest.raises(InputError, match="--student_model"):
        select_layers(bert.config, bert.state_dict(), [0, 1])


# ---- Families to come: what an entry can say is enough for them


def separate(*paths: str) -> tuple[Outputs, ...]:
    return tuple(Outputs(path) for path in paths)


LATER = {
    # Packed query, key and value in an nn.Linear; a packed gate.
    "modernbert": Family(
        layers="layers",
        heads=Group((Outputs("attn.Wqkv", parts=(1, 1, 1)),), "attn.Wo", width=("attn.head_dim",)),
        neurons=Group((Outputs("mlp.Wi", parts=(1, 1)),), "mlp.Wo"),
    ),
    # Packed parts of unequal widths, and sizes that the forward pass reads from the config.
    "phi3": Family(
        layers="layers",
        heads=Group(
            (Outputs("self_attn.qkv_proj", parts=("self_attn.num_key_value_groups", 1, 1)),),
            "self_attn.o_proj",
            width=("self_attn.head_dim", "self_attn.num_key_value_groups"),
            counts=("self_attn.num_key_value_heads", "self_attn.config.num_attention_heads"),
        ),
        neurons=Group((Outputs("mlp.gate_up_proj", parts=(1, 1)),), "mlp.down_proj"),
    ),
    # Query, key and value side by side within each head.
    "gpt_neox": Family(
        layers="layers",
        heads=Group(separate("attention.query_key_value"), "attention.dense", width=("attention.head_size",)),
        neurons=Group(separate("mlp.dense_h_to_4h"), "mlp.dense_4h_to_h"),
    ),
    # Projections of positions, which a model that shares them with its keys lacks.
    "deberta-v2": Family(
        layers="encoder.layer",
        heads=Group(
            (
                *separate("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
                Outputs("attention.self.pos_key_proj", optional=True),
                Outputs("attention.self.pos_query_proj", optional=True),
            ),
            "attention.output.dense",
            width=("attention.self.attention_head_size",),
            counts=("attention.self.num_attention_heads", "attention.self.all_head_size"),
        ),
        neurons=Group(separate("intermediate.dense"), "output.dense"),
    ),
    # One layer, used several times.
    "albert": Family(
        layers="encoder.albert_layer_groups",
        heads=Group(
            separate(*(f"albert_layers.0.attention.{name}" for name in ("query", "key", "value"))),
            "albert_layers.0.attention.dense",
            width=("albert_layers.0.attention.attention_head_size",),
        ),
        neurons=Group(separate("albert_layers.0.ffn"), "albert_layers.0.ffn_output"),
    ),
    # A bias of positions for each head, which all layers share: neurons only.
    "mpnet": Family(layers="encoder.layer", neurons=Group(separate("intermediate.dense"), "output.dense")),
    "opt": Family(
        layers="decoder.layers",
        heads=Group(
            separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn.out_proj",
            width=("self_attn.head_dim",),
            counts=("self_attn.num_heads",),
        ),
        neurons=Group(separate("fc1"), "fc2"),
    ),
    # Blocks in stages of growing width, with a table of position biases for every head.
    "swin": Family(
        layers=lambda base: [block for stage in base.encoder.layers for block in stage.blocks],
        heads=Group(
            separate("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "attention.o_proj",
            width=("attention.head_dim",),
            tables=("attention.relative_position_bias.relative_position_bias_table",),
        ),
        neurons=Group(separate("mlp.fc1"), "mlp.fc2"),
    ),
}


def make_later(model_type: str, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    if model_type in ("phi3", "gpt_neox", "opt"):
        sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6}
        if model_type != "phi3":
            sizes = {"num_hidden_layers": 4, "ffn_dim": 64, "word_embed_proj_dim": 32}
        model = tiny_language_model(model_type, **{**sizes, **changes})
        return model, {name: values.flip(1) for name, values in example_inputs().items()}
    sizes = {
        "modernbert": {"pad_token_id": 0, "local_attention": 4, "classifier_pooling": "mean"},
        "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    }
    if model_type == "swin":
        from transformers import AutoConfig, AutoModelForImageClassification

        torch.manual_seed(0)
        stages = {"depths": [2, 2], "num_heads": [4, 4], "embed_dim": 16, "window_size": 2}
        config = AutoConfig.for_model("swin", image_size=8, patch_size=1, **stages)
        model = AutoModelForImageClassification.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model, example_inputs("vit")
    return tiny_model(model_type, **{**sizes.get(model_type, {}), **changes}), example_inputs()


@pytest.mark.parametrize("model_type", sorted(LATER))
def test_an_entry_is_all_that_another_family_needs(model_type, tmp_path, monkeypatch):
    monkeypatch.setitem(families.FAMILIES, model_type, LATER[model_type])
    model, inputs = make_later(model_type)
    if model_type == "swin":
        # As many neurons in every layer as the helpers above count on.
        monkeypatch.setitem(families.FAMILIES, "swin", Family(LATER["swin"].layers, heads=LATER["swin"].heads))
    check_cut(model, inputs, tmp_path)
    if model_type == "phi3":
        model.set_attn_implementation("eager")
        assert layers_of(model)[0].self_attn.config._attn_implementation == "eager"
        assert model.config.num_attention_heads == 8
        torch.testing.assert_close(logits_of(copy.deepcopy(model), inputs), logits_of(model, inputs))


def test_a_student_of_a_model_whose_layers_are_one(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "albert", LATER["albert"])
    teacher, inputs = make_later("albert")
    student = student_from_layers(teacher, [1, 3]).eval()
    assert student.config.num_hidden_layers == 2
    expected = make_later("albert", num_hidden_layers=2)[0]
    torch.testing.assert_close(logits_of(student, inputs), logits_of(expected, inputs))
