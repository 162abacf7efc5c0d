"""Rewrite an exported encoder into the graph that ONNX Runtime runs fastest on a CPU: the same function, less work.

The exporter writes attention as some twenty operators, in forms that change with the opset, the versions and the model.
So an attention block is found by its Softmax and by the shapes around it, and believed only when the operator that
replaces it gives the same numbers on random inputs; a block that does not is left as it was. So are masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes import common as passes
from onnxscript.rewriter.ort_fusions.erfgelu import fuse_erfgelu
from onnxscript.version_converter import ConvertVersionPass

from pipelines.onnx_file import save

# onnx_ir.Graph, Node and Value: their types call nearly everything optional, for graphs that are still being built.
Graph: TypeAlias = Any
Node: TypeAlias = Any
Value: TypeAlias = Any

# The first opset with the Attention operator, and the file format that goes with it. Up to 128 tokens, ONNX Runtime's
# kernel for it was 1.5 to 2.1 times faster than its own MultiHeadAttention; it takes any number of heads and any mask.
ATTENTION_OPSET, IR_VERSION = 23, 11
PADDING_MASK = "attention_mask"
HIDDEN = np.finfo(np.float32).min  # what is added to the score of a token that must not be seen
# Batch and tokens of the random inputs; the second is longer than the windows of local attention, which looks like full
# attention on short texts.
PROBES = ((3, 7), (2, 300))
# Operators that treat each token by itself, as long as their other inputs are constants that do.
TOKENWISE = {"Add", "Sum", "Sub", "Mul", "Div", "Gelu", "Relu", "Sigmoid", "Tanh", "LayerNormalization", "MatMul"}


def fuse_for_onnxruntime(source: Path, target: Path) -> dict[str, int]:
    """Read the standard fp32 graph `source`, write its fused form to the one file `target`, and count what was done.

    "attention": blocks that became one operator, each with its own number of heads; "padding_mask": masks now computed
    straight from `attention_mask`, or dropped because they hide nothing; "residual_sum": residual additions kept from
    ONNX Runtime's slow SkipLayerNormalization; "first_token": operators that now see only the token that the classifier
    reads. Rows whose mask hides every token are the one exception to equality: they mean nothing in either graph.
    """
    model = ir.load(source)
    if model.graph.opset_imports[""] < ATTENTION_OPSET:
        ConvertVersionPass(ATTENTION_OPSET)(model)
        model.ir_version = max(model.ir_version, IR_VERSION)
    cores = [node for node in model.graph if node.op_type in ("Softmax", "Attention")]
    attentions = [attention for attention in map(_fuse_attention, cores) if attention is not None]
    passes.RemoveUnusedNodesPass()(model)
    counts = {"attention": len(attentions), "padding_mask": _simplify_masks(model.graph, attentions)}
    fuse_erfgelu(model)
    counts["residual_sum"] = _sum_residuals(model.graph)
    counts["first_token"] = _select_first_token_early(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    passes.NameFixPass()(model)
    save(model, target)
    # onnxscript's rules remember the last graph that they matched, and that graph its weights, until they match another.
    for value in model.graph.initializers.values():
        value.const_value = None
    return counts


# Attention


def _fuse_attention(core: Node) -> Node | None:
    """Replace the block around a Softmax (or around an Attention with split heads) by one Attention, if it is the same.

    Query, key, value and output are (batch, tokens, heads x head size); the mask, which may be missing, is added to the
    scores, (batch, heads, query tokens, key tokens).
    """
    if core.op_type == "Attention":
        product, split_heads, mask = core, core.inputs[:3], core.inputs[3] if len(core.inputs) > 3 else None
    else:
        scores, mask = _scores_and_mask(core.inputs[0])
        product = _only_reader(core.outputs[0])
        if scores is None or product is None or product.op_type != "MatMul":
            return None
        split_heads = [scores.inputs[0], scores.inputs[1], product.inputs[1]]
    context = product.outputs[0]
    heads = context.shape[1] if _rank(context) == 4 else None
    output = context
    while (reader := _only_reader(output)) is not None and reader.op_type in ("Reshape", "Transpose", "Where"):
        output = reader.outputs[0]
    inputs = [_before_splitting_heads(value) for value in split_heads]
    values = [*inputs, output] if mask is None else [*inputs, output, mask]
    ranks = [3, 3, 3, 3, 4][: len(values)]
    if not isinstance(heads, int) or [_rank(value) for value in values] != ranks or len(set(values)) != len(values):
        return None
    if any(value.dtype != ir.DataType.FLOAT for value in values):
        return None

    attributes = {"q_num_heads": heads, "kv_num_heads": heads}
    if not _is_attention([*inputs, mask], output, attributes):
        return None
    attention = ir.node("Attention", [*inputs, mask], attributes)
    _replace(output, attention)
    return attention


def _scores_and_mask(value: Value) -> tuple[Node | None, Value | None]:
    """The MatMul of query and key, and what is added to it."""
    node = value.producer()
    if node is not None and node.op_type == "MatMul":
        return node, None
    if node is not None and node.op_type == "Add":
        for scores, mask in (node.inputs, node.inputs[::-1]):
            if scores.producer() is not None and scores.producer().op_type == "MatMul":
                return scores.producer(), mask
    return None, None


def _before_splitting_heads(value: Value) -> Value:
    """Walk up through what only moves or scales the numbers to the projection that they come from."""
    while (node := value.producer()) is not None:
        scales = node.op_type in ("Mul", "Div") and _is_scalar_constant(node.inputs[1])
        if node.op_type not in ("Reshape", "Transpose") and not scales:
            break
        value = node.inputs[0]
    return value


def _is_attention(inputs: list[Value | None], output: Value, attributes: dict[str, int]) -> bool:
    """Whether Attention gives what the block between `inputs` and `output` gives, whatever the mask."""
    values = [value for value in inputs if value is not None]
    stand_ins = [ir.val(value.name, value.dtype, value.shape) for value in values]
    node = ir.node("Attention", stand_ins, attributes)
    node.outputs[0].name, node.outputs[0].dtype = "output", output.dtype
    attention = ir.Graph(stand_ins, node.outputs, nodes=[node], opset_imports={"": ATTENTION_OPSET}, name="attention")
    for feeds in _probe_feeds([*values, *output.graph.inputs]):
        expected = _evaluate(output, values, feeds)
        found = _run(attention, {value.name: feeds[value.name] for value in values})
        if (
            expected is None
            or found is None
            or found.shape != expected.shape
            or not np.allclose(found, expected, rtol=0, atol=1e-5)
        ):
            return False
    return True


# Masks


def _simplify_masks(graph: Graph, attentions: list[Node]) -> int:
    """Compute masks that hide just the padding in six steps instead of some twenty; drop masks that hide nothing."""
    padding = next((value for value in graph.inputs if value.name == PADDING_MASK), None)
    simple = None
    simplified = 0
    for mask in {attention.inputs[3]: None for attention in attentions if attention.inputs[3] is not None}:
        hides_nothing = hides_padding = True
        for feeds in _probe_feeds(graph.inputs):
            found = _evaluate(mask, [], feeds)
            hides_nothing &= found is not None and not found.any()
            hides_padding &= found is not None and padding is not None and _hides_padding(found, feeds[PADDING_MASK])
        if not hides_nothing and not hides_padding:
            continue
        if hides_padding and simple is None:
            simple = _add_padding_mask(graph, padding)
        for attention in attentions:
            if attention.inputs[3] is mask:
                attention.replace_input_with(3, None if hides_nothing else simple)
        simplified += 1
    return simplified


def _hides_padding(mask: np.ndarray, padding: np.ndarray) -> bool:
    batch, tokens = padding.shape
    per_key = np.where(padding[:, None, None, :] == 0, HIDDEN, np.float32(0))
    return np.array_equal(mask, np.broadcast_to(per_key, (batch, 1, tokens, tokens)))


def _add_padding_mask(graph: Graph, padding: Value) -> Value:
    """Turn (batch, tokens), 0 for padding, into the (batch, 1, tokens, tokens) that is added to the scores."""

    def constant(name: str, numbers: Any) -> Value:
        return _add_initializer(graph, f"padding_mask_{name}", numbers)

    is_padding = ir.node("Equal", [padding, constant("zero", np.zeros((), padding.dtype.numpy()))])
    score = ir.node("Where", [is_padding.outputs[0], constant("hidden", HIDDEN), constant("seen", np.float32(0))])
    per_key = ir.node("Unsqueeze", [score.outputs[0], constant("axes", np.array([1, 2]))])
    tokens = ir.node("Shape", [padding], {"start": 1})
    ones, one = constant("ones", np.array([1, 1])), constant("one", np.array([1]))
    shape = ir.node("Concat", [ones, tokens.outputs[0], one], {"axis": 0})
    mask = ir.node("Expand", [per_key.outputs[0], shape.outputs[0]])
    mask.outputs[0].dtype = ir.DataType.FLOAT
    mask.outputs[0].shape = ir.Shape([padding.shape[0], 1, padding.shape[1], padding.shape[1]])
    graph.insert_before(graph[0], [is_padding, score, per_key, tokens, shape, mask])
    return mask.outputs[0]


# Around attention


def _sum_residuals(graph: Graph) -> int:
    """Add residuals with Sum, so that ONNX Runtime does not fuse Add and LayerNormalization.

    Its SkipLayerNormalization is a scalar loop on the CPU, 3 to 5 times slower than the two by themselves (in 1.31).
    """
    changed = 0
    for norm in [node for node in graph if node.op_type == "LayerNormalization"]:
        add = norm.inputs[0].producer()
        if add is None or add.op_type != "Add" or _only_reader(add.outputs[0]) is not norm:
            continue
        if any(value.const_value is not None for value in add.inputs):
            continue
        _replace(add.outputs[0], ir.node("Sum", add.inputs))
        graph.remove(add, safe=True)
        changed += 1
    return changed


def _select_first_token_early(graph: Graph) -> int:
    """Where only token 0 of the last layer is read, compute only token 0 behind the last attention, and its query.

    Going up from the Gather that selects the token, an operator moves behind the selection if it treats each token by
    itself and if all its readers have moved. Where that ends, the values are cut to (batch, 1, width). Returns how many
    operators moved.
    """
    select = next((node for node in reversed(graph) if _selects_first_token(node)), None)
    if select is None:
        return 0
    moved: dict[Node, list[int]] = {select: [0]}  # with the positions of the inputs that hold tokens
    for node in reversed(list(graph)):
        output = node.outputs[0]
        readers = list(output.uses())
        behind = readers and all(reader in moved and position in moved[reader] for reader, position in readers)
        positions = _token_inputs(node) if behind and not output.is_graph_output() else []
        if positions:
            moved[node] = positions
    if len(moved) == 1:
        return 0

    first = _add_initializer(graph, "first_token", np.array([0]))
    cut: dict[tuple[Value, int], Value] = {}

    def cut_input(node: Node, position: int, axis: int) -> None:
        value = node.inputs[position]
        if (value, axis) not in cut:
            gather = ir.node("Gather", [value, first], {"axis": axis})
            gather.outputs[0].dtype = value.dtype
            gather.outputs[0].shape = ir.Shape([1 if i == axis else size for i, size in enumerate(value.shape)])
            graph.insert_before(node, gather)
            cut[value, axis] = gather.outputs[0]
        node.replace_input_with(position, cut[value, axis])

    for node, positions in moved.items():
        for position in positions:
            if node.inputs[position].producer() not in moved:
                cut_input(node, position, axis=1)
        if node.op_type == "Attention" and node.inputs[3] is not None:
            cut_input(node, 3, axis=2)
        if node is not select:
            batch, _, width = node.outputs[0].shape
            node.outputs[0].shape = ir.Shape([batch, 1, width])
    return len(moved) - 1


def _selects_first_token(node: Node) -> bool:
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 1 or not _is_tokens(node.inputs[0]):
        return False
    index = node.inputs[1]
    return _is_scalar_constant(index) and index.const_value.numpy().item() == 0


def _token_inputs(node: Node) -> list[int]:
    """The positions of the inputs that are (batch, tokens, width), if each token is treated by itself; else none."""
    if len(node.outputs) != 1 or not _is_tokens(node.outputs[0]):
        return []
    if node.op_type == "Attention":
        return [0]
    if node.op_type not in TOKENWISE or node.attributes.get_int("axis", -1) not in (-1, 2):
        return []
    tokens = [position for position, value in enumerate(node.inputs) if _is_tokens(value)]
    others = [value for position, value in enumerate(node.inputs) if position not in tokens]
    if node.op_type == "MatMul":
        return tokens if tokens == [0] and others[0].const_value is not None and _rank(others[0]) == 2 else []
    return tokens if all(value.const_value is not None and _rank(value) <= 1 for value in others) else []


# Reading and changing a graph


def _rank(value: Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def _is_scalar_constant(value: Value) -> bool:
    return value.const_value is not None and value.const_value.size == 1


def _is_tokens(value: Value) -> bool:
    return value.const_value is None and _rank(value) == 3


def _only_reader(value: Value) -> Node | None:
    return value.consumers()[0] if len(value.uses()) == 1 and not value.is_graph_output() else None


def _replace(old: Value, node: Node) -> None:
    """Let every reader of `old` read the output of the new `node`."""
    new = node.outputs[0]
    new.dtype, new.shape = old.dtype, old.shape
    old.graph.insert_after(old.producer(), node)
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _add_initializer(graph: Graph, name: str, numbers: Any) -> Value:
    value = ir.val(name, const_value=ir.tensor(np.asarray(numbers), name=name))
    graph.register_initializer(value)
    return value


# Running parts of a graph


def _probe_feeds(values: list[Value]) -> Iterator[dict[str, np.ndarray]]:
    """Random numbers for `values`; for the padding mask ragged texts with gaps, for other integers zeros."""
    for batch, tokens in PROBES:
        random = np.random.default_rng(tokens)
        feeds = {}
        for value in values:
            shape = [
                size if isinstance(size, int) else tokens if axis else batch for axis, size in enumerate(value.shape)
            ]
            feeds[value.name] = np.zeros(shape, value.dtype.numpy())
            if value.name == PADDING_MASK:
                first, last = random.integers(0, tokens, (2, batch, 1))
                feeds[value.name] |= (np.arange(tokens) <= first) | (np.arange(tokens) > last)
            elif value.dtype == ir.DataType.FLOAT:
                feeds[value.name] = random.standard_normal(shape, np.float32)
        yield feeds


def _evaluate(output: Value, known: list[Value], feeds: dict[str, np.ndarray]) -> np.ndarray | None:
    """`output` as its graph computes it from its own inputs and from the values that are `known`."""
    inputs = list(dict.fromkeys([*known, *output.graph.inputs]))
    try:
        part = ir.convenience.extract(output.graph, inputs, [output])
    except ValueError:
        return None
    return _run(part, {value.name: feeds[value.name] for value in inputs})


def _run(graph: Graph, feeds: dict[str, np.ndarray]) -> np.ndarray | None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=IR_VERSION))
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        return session.run(None, feeds)[0]
    except Exception:  # ONNX Runtime has many: what cannot be run like this is not what was looked for
        return None
