"""Int8 files must hold each table once, as bytes, within the range asked for, and run in fused integer kernels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, ConvNextConfig, ConvNextForImageClassification

from conftest import tiny_model
from pipelines.core.config import QuantizeConfig
from pipelines.core.task import Graph
from pipelines.models.removal import cut, with_stock_shapes
from pipelines.onnx.dynamic import quantize_dynamic_int8, quantize_mixed_int8, sensitivities, weights_of_matmuls
from pipelines.onnx.export import export_graph, export_onnx
from pipelines.onnx.fuse import fuse_for_onnxruntime
from pipelines.onnx.predict import predict_onnx
from pipelines.onnx.quantize import quantize_onnx

LAYERS = 1


def random_bert(layers: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 128}
    return BertForSequenceClassification(BertConfig(vocab_size=300, **sizes)).eval()


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fused_file(random_bert(LAYERS), tmp_path_factory.mktemp("fused"))


def fused_file(model: BertForSequenceClassification, directory: Path) -> Path:
    sample = {name: torch.ones(2, 9, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    sample["attention_mask"][0, 5:] = 0
    axes = {name: {0: "batch", 1: "sequence"} for name in sample}
    export_graph(Graph(model, sample, axes, ["logits"]), directory / "source.onnx")
    layers = model.config.num_hidden_layers
    assert fuse_for_onnxruntime(directory / "source.onnx", directory / "model.onnx")["attention"] == layers
    return directory / "model.onnx"


def integer_weights(path: Path) -> dict[str, np.ndarray]:
    """The weights of the matmuls, by name."""
    graph = onnx.load(path).graph
    names = {node.input[1] for node in graph.node if node.op_type == "MatMulInteger"}
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in names}


def make_feed() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 33, (16, 1))
    mask = (np.arange(32) < lengths).astype(np.int64)
    return {"input_ids": random.integers(2, 300, (16, 32)), "attention_mask": mask}


def run(path: Path) -> np.ndarray:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, make_feed())[0]


@pytest.mark.parametrize("reduce_range", [False, True])
def test_close_to_the_source_and_counted(fused: Path, tmp_path: Path, reduce_range: bool) -> None:
    source = fused.read_bytes()
    quantize_dynamic_int8(fused, tmp_path / "model.onnx", reduce_range)
    graph = onnx.load(tmp_path / "model.onnx").graph
    types = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    int8 = {tensor.name for tensor in graph.initializer if tensor.data_type in types}
    found = Counter(node.op_type for node in graph.node if int8 & {*node.input})
    # Six matmuls in a layer, the pooler and the classifier; three embeddings, of which the token types are an initializer.
    assert (found["MatMulInteger"], found["Gather"]) == (6 * LAYERS + 2, 3)
    assert sum(node.op_type == "Attention" for node in graph.node) == LAYERS
    assert (tmp_path / "model.onnx").stat().st_size < 0.4 * len(source)
    expected, found = run(fused), run(tmp_path / "model.onnx")
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert fused.read_bytes() == source
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_reduced_range_leaves_no_sum_that_saturates(fused: Path, tmp_path: Path) -> None:
    largest = {}
    for reduce_range in (False, True):
        quantize_dynamic_int8(fused, tmp_path / "model.onnx", reduce_range)
        weights = integer_weights(tmp_path / "model.onnx")
        assert len(weights) == 6 * LAYERS + 2
        assert all(weight.dtype == np.int8 for weight in weights.values())
        largest[reduce_range] = [int(np.abs(weight.astype(int)).max()) for weight in weights.values()]
    # Kernels without VNNI add two products of an activation (at most 255) and a weight in a signed 16-bit number.
    assert max(largest[True]) * 255 * 2 <= 2**15 - 1 < min(largest[False]) * 255 * 2


def test_onnxruntime_runs_it_in_integer_kernels_and_keeps_embeddings_as_bytes(fused: Path, tmp_path: Path) -> None:
    quantize_dynamic_int8(fused, tmp_path / "model.onnx", reduce_range=False)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    found = Counter(node.op_type for node in graph.node)
    assert found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"] == 6 * LAYERS + 2
    assert found["MatMulInteger"] == found["Mul"] == 0
    assert found["Cast"] == 1  # of the padding mask
    # Query, key and value share one quantized input.
    assert found["DynamicQuantizeLinear"] == LAYERS
    producers = {output: node.op_type for node in graph.node for output in node.output}
    assert [producers[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear"] == ["Gather"] * 3
    table = 300 * 64
    assert [t.data_type for t in graph.initializer if np.prod(t.dims) == table] == [onnx.TensorProto.UINT8]


def test_embeddings_in_int4_take_half_of_their_bytes(fused: Path, tmp_path: Path) -> None:
    quantize_dynamic_int8(fused, tmp_path / "int8.onnx", False, 16)
    quantize_dynamic_int8(fused, tmp_path / "int4.onnx", False, 16, table_bits=4)
    tables = (300 + 512) * 64  # words and positions
    saved = (tmp_path / "int8.onnx").stat().st_size - (tmp_path / "int4.onnx").stat().st_size
    assert saved == pytest.approx(tables * (1 - 4 / 8 - 4 / 16), rel=0.1)  # a scale of four bytes for every 16 numbers
    graph = onnx.load(tmp_path / "int4.onnx").graph
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == 6 * LAYERS + 2
    expected, found = run(fused), run(tmp_path / "int4.onnx")
    assert 0 < np.abs(found - expected).max() < 0.3 * np.abs(expected).max()


def test_the_matmul_that_int8_hurts_stays_in_fp32(tmp_path: Path) -> None:
    """A neuron that is always 1000, and that nothing reads, takes the whole range of the second layer's, as outliers of large models do."""
    model = random_bert(3)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight.mul_(10)
            layer.output.dense.weight.mul_(10)
        model.bert.encoder.layer[1].intermediate.dense.bias[0] = 1000
        model.bert.encoder.layer[1].output.dense.weight[:, 0] = 0
    fused = fused_file(model, tmp_path)
    weights = weights_of_matmuls(fused)
    assert sorted(weights.values()) == 12 * [64 * 64] + 6 * [64 * 128]
    hurts = max(weights, key=sensitivities(fused, [*weights], [make_feed()], tmp_path, False).__getitem__)
    quantize_dynamic_int8(fused, tmp_path / "int8.onnx", False)
    quantize_mixed_int8(fused, tmp_path / "mixed.onnx", [make_feed()], False)
    in_fp32 = weights_of_matmuls(tmp_path / "mixed.onnx")
    assert hurts in in_fp32
    assert sum(in_fp32.values()) <= 0.1 * sum(weights.values())
    expected = run(fused)
    lost = {name: np.square(run(tmp_path / f"{name}.onnx") - expected).sum() for name in ("int8", "mixed")}
    assert lost["mixed"] < 0.2 * lost["int8"]


def test_what_is_said_of_a_stage_has_its_name(text_onnx: Path, task, tmp_path: Path, monkeypatch, capsys) -> None:
    """Also of one that is written for comparison, in a directory that is not yet called so."""
    real = fuse_for_onnxruntime
    monkeypatch.setattr(
        "pipelines.onnx.quantize.fuse_for_onnxruntime",
        lambda *paths: real(*paths) | {"attention": 1, "attention_blocks": 4},
    )
    directory = tmp_path / ".teacher_quantized.partial"
    directory.mkdir()
    quantize_onnx(str(text_onnx / "onnx"), directory, task, QuantizeConfig(quantization="fp32"))
    assert "teacher_quantized: 1 of 4 attention blocks fused" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.slow
def test_fp32_has_one_attention_operator_a_layer_whatever_heads_it_kept(task, tokenizer, tmp_path: Path) -> None:
    model = tiny_model()
    heads = [np.array([0, 2]), np.array([1]), np.arange(4), np.array([0, 1, 3])]
    cut(model, heads, [np.arange(10), np.arange(59), np.arange(4), np.arange(64)])
    with_stock_shapes(model).save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    for name in ("onnx", "quantized"):
        (tmp_path / name).mkdir()
    export_onnx(str(tmp_path / "pruned"), tmp_path / "onnx", task)
    outcome = quantize_onnx(str(tmp_path / "onnx"), tmp_path / "quantized", task, QuantizeConfig(quantization="fp32"))
    source, target = (tmp_path / name / "model.onnx" for name in ("onnx", "quantized"))
    assert outcome.details["scheme"] == "fp32"
    found = onnx.load(target).graph
    assert sum(node.op_type == "Attention" for node in found.node) == 4
    operators = {node.op_type for node in found.node}
    assert not operators & {"MatMulInteger", "DynamicQuantizeLinear", "DequantizeLinear", "QuantizeLinear", "Softmax"}
    before = sorted(
        np.prod(t.dims) for t in onnx.load(source).graph.initializer if t.data_type == onnx.TensorProto.FLOAT
    )
    after = sorted(np.prod(t.dims) for t in found.initializer if t.data_type == onnx.TensorProto.FLOAT)
    assert sum(after) == pytest.approx(sum(before), rel=0.01)
    features, collate = task.features(tokenizer)["validation"], task.collate(tokenizer)
    expected = predict_onnx(source, features, collate, task)
    np.testing.assert_allclose(predict_onnx(target, features, collate, task), expected, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "quantized").iterdir()) == sorted(
        path.name for path in (tmp_path / "onnx").iterdir()
    )


def test_a_convolutional_network_has_no_attention_to_fuse(image_task, image_processor, tmp_path: Path, capsys) -> None:
    """Its config's num_hidden_layers is its number of stages."""
    config = ConvNextConfig(hidden_sizes=[16, 16], depths=[1, 1], num_stages=2, image_size=8, patch_size=2)
    config.id2label = dict(enumerate(image_task.label_names))
    config.label2id = {name: index for index, name in config.id2label.items()}
    ConvNextForImageClassification(config).save_pretrained(tmp_path / "model")
    image_processor.save_pretrained(tmp_path / "model")
    for name in ("onnx", "quantized"):
        (tmp_path / name).mkdir()
    export_onnx(str(tmp_path / "model"), tmp_path / "onnx", image_task)
    quantize = QuantizeConfig(quantization="int8_blocks", block_size=16, max_quality_drop=1.0)
    outcome = quantize_onnx(str(tmp_path / "onnx"), tmp_path / "quantized", image_task, quantize)
    assert outcome.details["fused_nodes"]["attention_blocks"] == outcome.details["fused_nodes"]["attention"] == 0
    assert "attention" not in capsys.readouterr().out
    # Schemes are for graphs, not for tasks: two matmuls in a block, and the classifier.
    assert outcome.details["candidates"]["int8_blocks"]["operators"]["MatMulNBits"] == 2 * 2 + 1
