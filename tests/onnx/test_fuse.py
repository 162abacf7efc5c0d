"""Fusing must change the speed of a graph and nothing else: for every family, any number of heads, any mask, any padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from torch import nn

from pipelines.core.task import Graph
from pipelines.onnx.export import trace
from pipelines.onnx.fuse import NOT_FUSED, fuse_for_onnxruntime, simplify

Exported = Callable[[str], tuple[nn.Module, Path]]
HEADS, HEAD_SIZE, WIDTH = 4, 8, 32
SIZES = {"vocab_size": 60, "hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 48}
DISTILBERT_SIZES = {"vocab_size": 60, "dim": WIDTH, "n_heads": HEADS, "hidden_dim": 48}
# How many heads each layer keeps: the graph knows them only by its shapes.
KEPT_HEADS = (3, 1)
# Class, config and opset: an export takes seconds, so few layers, and the opsets are tried along with the families.
FAMILIES: dict[str, tuple[Any, Any, int]] = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig(num_hidden_layers=2, **SIZES), 18),
    "distilbert": (
        transformers.DistilBertForSequenceClassification,
        transformers.DistilBertConfig(n_layers=1, **DISTILBERT_SIZES),
        19,
    ),
    "roberta": (
        transformers.RobertaForSequenceClassification,
        transformers.RobertaConfig(num_hidden_layers=1, **SIZES),
        20,
    ),
    "electra": (
        transformers.ElectraForSequenceClassification,
        transformers.ElectraConfig(num_hidden_layers=1, **SIZES),
        23,
    ),
    "vit": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(num_hidden_layers=1, image_size=32, patch_size=8, **SIZES),
        18,
    ),
}

IMAGE = {"image_size": 32, "hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 48}
# Attention behind rotary positions or under a bias of positions; windows of tokens and of patches; and the one that is left as it was.
OTHERS: dict[str, tuple[Any, Any, int]] = {
    "modernbert": (
        transformers.ModernBertForSequenceClassification,
        # A token sees 16 others on each side, more than the traced texts have.
        transformers.ModernBertConfig(
            num_hidden_layers=2,
            global_attn_every_n_layers=2,
            local_attention=32,
            classifier_pooling="mean",
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
            **SIZES,
        ),
        2,
    ),
    "mpnet": (
        transformers.MPNetForSequenceClassification,
        transformers.MPNetConfig(num_hidden_layers=1, pad_token_id=0, **SIZES),
        1,
    ),
    # A decoder that reads the last token that is no padding.
    "llama": (
        transformers.LlamaForSequenceClassification,
        transformers.LlamaConfig(num_hidden_layers=1, num_key_value_heads=2, pad_token_id=0, **SIZES),
        1,
    ),
    "beit": (
        transformers.BeitForImageClassification,
        transformers.BeitConfig(num_hidden_layers=1, patch_size=8, use_relative_position_bias=True, **IMAGE),
        1,
    ),
    "swin": (
        transformers.SwinForImageClassification,
        transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4),
        2,
    ),
    "deberta-v2": (
        transformers.DebertaV2ForSequenceClassification,
        transformers.DebertaV2Config(
            num_hidden_layers=1, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], **SIZES
        ),
        0,
    ),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    directory = tmp_path_factory.mktemp("exported")

    @cache
    def export_family(family: str) -> tuple[nn.Module, Path]:
        architecture, config, opset = FAMILIES[family]
        model = tiny_model(architecture, config)
        if family == "bert":
            cut_heads(model, KEPT_HEADS)
        return model, export(model, directory / f"{family}.onnx", opset)

    return export_family


def tiny_model(architecture: Any, config: Any) -> nn.Module:
    """A real model whose every parameter is random: fresh ones are zero or one in places, where a mistake could hide."""
    torch.manual_seed(0)
    model = architecture(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def cut_heads(model: nn.Module, heads: tuple[int, ...]) -> nn.Module:
    """Keep the first few heads of each layer, a different number in each."""
    for layer, count in zip(model.bert.encoder.layer, heads, strict=True):
        attention, width = layer.attention, count * HEAD_SIZE
        for linear in (attention.self.query, attention.self.key, attention.self.value):
            linear.weight = nn.Parameter(linear.weight[:width])
            linear.bias = nn.Parameter(linear.bias[:width])
        attention.output.dense.weight = nn.Parameter(attention.output.dense.weight[:, :width])
    return model


def batch(model: nn.Module, size: int, tokens: int) -> dict[str, torch.Tensor]:
    """Texts of several lengths, padded on the right in the even rows and on the left in the odd ones; or images."""
    generator = torch.Generator().manual_seed(tokens)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(size, 3, 32, 32, generator=generator)}
    lengths = torch.randint(1, tokens + 1, (size, 1), generator=generator)
    lengths[0] = tokens
    position = torch.arange(tokens).expand(size, tokens)
    mask = (position < lengths).long()
    mask[1::2] = mask[1::2].flip(1)
    inputs = {"input_ids": torch.randint(2, 60, (size, tokens), generator=generator), "attention_mask": mask}
    if model.config.model_type == "llama":
        inputs["input_ids"] *= mask
    if model.config.model_type in ("bert", "electra"):
        inputs["token_type_ids"] = (position > tokens // 2).long()
    return inputs


def export(model: nn.Module, path: Path, opset: int) -> Path:
    """As pipelines/onnx/export.py does, but nothing simplified."""
    sample = batch(model, 2, 9)
    axes = {0: "batch_size"} | ({1: "sequence"} if "input_ids" in sample else {})
    ir.save(trace(Graph(model, sample, dict.fromkeys(sample, axes), ["logits"]), opset), path)
    return path


def run(path: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


def assert_same_as_torch(model: nn.Module, path: Path) -> None:
    onnx.checker.check_model(path, full_check=True)
    for size, tokens in ((1, 1), (1, 5), (2, 9), (3, 17), (5, 64)):
        inputs = batch(model, size, tokens)
        with torch.no_grad():
            expected = model(**inputs).logits.numpy()
        np.testing.assert_allclose(run(path, inputs), expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def assert_same(path: Path, expected: Path, inputs: dict[str, torch.Tensor]) -> None:
    np.testing.assert_allclose(run(path, inputs), run(expected, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fuses_completely_and_stays_equal(family: str, exported: Exported, tmp_path: Path) -> None:
    model, source = exported(family)
    counts = fuse_for_onnxruntime(source, tmp_path / "fused.onnx")
    layers = model.config.num_hidden_layers
    assert counts["attention"] == layers
    assert counts["first_token"] == 14
    graph = ir.load(tmp_path / "fused.onnx").graph
    heads = [node.attributes.get_int("q_num_heads") for node in graph if node.op_type == "Attention"]
    assert heads == (list(KEPT_HEADS) if family == "bert" else [HEADS])
    found = operators(tmp_path / "fused.onnx")
    assert found["Gelu"] >= layers
    assert found["Softmax"] == found["GatherND"] == found["Erf"] == 0
    assert_same_as_torch(model, tmp_path / "fused.onnx")


@pytest.mark.parametrize("family", OTHERS)
def test_attention_with_positions_of_its_own_is_fused_and_stays_equal(family: str, tmp_path: Path) -> None:
    architecture, config, blocks = OTHERS[family]
    model = tiny_model(architecture, config)
    source = export(model, tmp_path / "source.onnx", 18)
    counts = fuse_for_onnxruntime(source, tmp_path / "fused.onnx")
    assert counts["attention"] == blocks
    assert counts["attention_blocks"] == (blocks or 1)
    assert (config.model_type not in NOT_FUSED) == (blocks > 0)
    found = operators(tmp_path / "fused.onnx")
    assert found["Attention"] == blocks
    assert found["RotaryEmbedding"] == {"modernbert": 4, "llama": 2}.get(family, 0)
    assert_same_as_torch(model, tmp_path / "fused.onnx")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_exported_is_simple_and_standard_and_fuses_to_the_same(
    family: str, exported: Exported, tmp_path: Path
) -> None:
    model, source = exported(family)
    counts = fuse_for_onnxruntime(source, tmp_path / "fused.onnx")
    simple = ir.load(source)
    # All but the last layer's attention and its query, which only one operator for all of attention allows; a GELU is five operators.
    assert simplify(simple) == {"residual": counts["residual"], "first_token": 14 - 3 + 4}
    ir.save(simple, tmp_path / "simple.onnx")
    layers = model.config.num_hidden_layers
    assert simple.graph.opset_imports == {"": FAMILIES[family][2]}
    assert {node.domain for node in simple.graph} == {""}
    found = operators(tmp_path / "simple.onnx")
    assert found["Attention"] == found["GatherND"] == 0
    assert found["Softmax"] == layers
    # Query, key, value and what they give; and the patches of an image.
    assert found["Transpose"] == 4 * layers + (family == "vit")
    assert_same_as_torch(model, tmp_path / "simple.onnx")
    again = fuse_for_onnxruntime(tmp_path / "simple.onnx", tmp_path / "again.onnx")
    assert again == {
        "attention_blocks": layers,
        "attention": layers,
        "residual": 0,
        "first_token": 3,
    }
    assert operators(tmp_path / "again.onnx") == operators(tmp_path / "fused.onnx")
    assert_same(tmp_path / "again.onnx", tmp_path / "fused.onnx", batch(model, 3, 17))


def test_a_block_that_is_not_attention_is_left_alone(exported: Exported, tmp_path: Path) -> None:
    model, source = exported("bert")
    odd = ir.load(source)
    [_, last] = [node for node in odd.graph if node.op_type == "Softmax"]
    last.attributes["axis"] = ir.AttrInt64("axis", 2)
    ir.save(odd, tmp_path / "odd.onnx")
    counts = fuse_for_onnxruntime(tmp_path / "odd.onnx", tmp_path / "fused.onnx")
    assert (counts["attention"], counts["attention_blocks"]) == (1, 2)
    assert operators(tmp_path / "fused.onnx")["Softmax"] == 1
    # A full text: softmax over the queries makes the numbers of padded rows meaningless.
    inputs = {name: value[:1] for name, value in batch(model, 3, 12).items()}
    assert_same(tmp_path / "fused.onnx", tmp_path / "odd.onnx", inputs)
    assert not np.allclose(run(tmp_path / "odd.onnx", inputs), run(source, inputs), rtol=0, atol=1e-3)


def test_a_mask_that_hides_more_than_padding_is_kept(exported: Exported, tmp_path: Path) -> None:
    model, source = exported("bert")
    causal = ir.load(source)
    mask = next(
        node.inputs[1]
        for node in causal.graph
        if node.op_type == "Add" and node.outputs[0].consumers()[0].op_type == "Softmax"
    )
    readers = list(mask.uses())
    low = ir.val("low", const_value=ir.tensor(np.float32(np.finfo(np.float32).min), name="low"))
    causal.graph.register_initializer(low)
    zeros = ir.node("Sub", [mask, mask])
    future = ir.node(
        "Trilu", [ir.node("Add", [zeros.outputs[0], low]).outputs[0], low_diagonal(causal.graph)], {"upper": 1}
    )
    both = ir.node("Min", [mask, future.outputs[0]])
    both.outputs[0].dtype, both.outputs[0].shape = mask.dtype, mask.shape
    causal.graph.insert_after(mask.producer(), [zeros, future.inputs[0].producer(), future, both])
    for node, position in readers:
        node.replace_input_with(position, both.outputs[0])
    ir.save(causal, tmp_path / "causal.onnx")
    counts = fuse_for_onnxruntime(tmp_path / "causal.onnx", tmp_path / "fused.onnx")
    assert counts["attention"] == 2
    # Padding on the right only: a first token that sees nothing but padding means nothing.
    inputs = {name: value[::2] for name, value in batch(model, 5, 17).items()}
    assert_same(tmp_path / "fused.onnx", tmp_path / "causal.onnx", inputs)
    assert not np.allclose(run(tmp_path / "causal.onnx", inputs), run(source, inputs), rtol=0, atol=1e-3)


def low_diagonal(graph: ir.Graph) -> ir.Value:
    """Where Trilu starts: the diagonal above the main one, so that a token still sees itself."""
    value = ir.val("diagonal", const_value=ir.tensor(np.array(1), name="diagonal"))
    graph.register_initializer(value)
    return value


def test_a_graph_that_gives_every_token_computes_every_token(exported: Exported, tmp_path: Path) -> None:
    model, source = exported("roberta")
    every_token = ir.load(source)
    [*_, last] = [node.outputs[0] for node in every_token.graph if node.op_type == "LayerNormalization"]
    every_token.graph.outputs.insert(0, last)
    ir.save(every_token, tmp_path / "every_token.onnx")
    counts = fuse_for_onnxruntime(tmp_path / "every_token.onnx", tmp_path / "fused.onnx")
    assert counts["attention"] == 1
    assert counts["first_token"] == 0
    inputs = batch(model, 3, 12)
    assert run(tmp_path / "fused.onnx", inputs).shape == (3, 12, WIDTH)
    assert_same(tmp_path / "fused.onnx", tmp_path / "every_token.onnx", inputs)


def test_onnxruntime_does_not_bring_back_its_slow_layer_normalization(exported: Exported, tmp_path: Path) -> None:
    _, source = exported("bert")
    counts = fuse_for_onnxruntime(source, tmp_path / "fused.onnx")
    assert counts["residual"] == 5
    # The embeddings are no matmul whose sign could change.
    assert operators(tmp_path / "fused.onnx")["Sub"] == 4
    assert operators(tmp_path / "fused.onnx")["Sum"] == 1
    simple = ir.load(source)
    simplify(simple)
    ir.save(simple, tmp_path / "simple.onnx")
    found = []
    for path in (source, tmp_path / "fused.onnx", tmp_path / "simple.onnx"):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        optimized = operators(tmp_path / "optimized.onnx")
        found.append((optimized["SkipLayerNormalization"], optimized["Erf"]))
    assert found[0][0] == 4
    assert found[1:] == [(0, 0), (0, 0)]


def test_weights_that_others_read_keep_their_sign(exported: Exported, tmp_path: Path) -> None:
    model, source = exported("bert")
    shared = ir.load(source)
    initializers = shared.graph.initializers
    biases = [value for name, value in initializers.items() if name.endswith("output.dense.bias")]
    biases[0].replace_all_uses_with(biases[2])  # of attention, in both layers
    ir.save(shared, tmp_path / "shared.onnx")
    assert fuse_for_onnxruntime(tmp_path / "shared.onnx", tmp_path / "fused.onnx")["residual"] == 5
    assert operators(tmp_path / "fused.onnx")["Sub"] == 4
    inputs = batch(model, 3, 12)
    assert_same(tmp_path / "fused.onnx", tmp_path / "shared.onnx", inputs)
    assert not np.allclose(run(tmp_path / "shared.onnx", inputs), run(source, inputs), rtol=0, atol=1e-3)
