"""Rewrite an exported encoder into a graph that ONNX Runtime runs faster on a CPU: the same function, less work.

The exporter writes attention as a dozen operators, in forms that change with the opset, the versions and the model.
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

from pipelines.onnx.file import save
from pipelines.onnx.predict import PAST

# onnx_ir.Graph, Node and Value: their types call nearly everything optional, for graphs that are still being built.
Graph: TypeAlias = Any
Node: TypeAlias = Any
Value: TypeAlias = Any

# The first opset with the Attention operator, and the file format that goes with it. Up to 128 tokens, ONNX Runtime's
# kernel for it was 1.5 to 2.1 times faster than its own MultiHeadAttention; it takes any number of heads and any mask.
ATTENTION_OPSET, IR_VERSION = 23, 11
MICROSOFT = "com.microsoft"
PADDING_MASK = "attention_mask"
SIMPLE_MASK = "padding_mask"  # what is computed from it, by name: a graph that was rewritten before has it
HIDDEN = np.finfo(np.float32).min  # what is added to the score of a token that must not be seen
# Batch and tokens of the random inputs; the second is longer than the windows of local attention, which looks like full
# attention on short texts.
PROBES = ((3, 7), (2, 300))
# Operators that treat each token by itself, as long as their other inputs are constants that do.
TOKENWISE = {"Add", "Sum", "Sub", "Mul", "Div", "Gelu", "Relu", "Sigmoid", "Tanh", "LayerNormalization", "MatMul"}


def simplify(model: ir.Model) -> dict[str, int]:
    """Bring a standard fp32 graph to fewer standard operators, all of its own opset, that compute the same.

    Returns what was done: "padding_mask", masks now computed straight from `attention_mask`, or dropped because they hide nothing;
    "residual", additions kept from ONNX Runtime's slow SkipLayerNormalization; "first_token", operators that now see only the [CLS]
    token that the classifier reads. Rows whose mask hides every token are the one exception to equality: they mean nothing in
    either graph.
    """
    counts = _rewrite(model, [add for node in model.graph if (add := _masking(node)) is not None])
    for gelu in [node for node in model.graph if node.op_type == "Gelu" and node.domain == MICROSOFT]:
        _write_out_gelu(gelu)
    model.graph.opset_imports.pop(MICROSOFT, None)
    _tidy(model)
    return counts


def fuse_for_onnxruntime(source: Path, target: Path) -> dict[str, int]:
    """Read the standard fp32 graph `source`, write it to the one file `target` with one operator for each attention block and GELU.

    Returns "attention_blocks" (every softmax inside the graph, fused or not) and what simplify() returns, of what was still to do. A
    graph with a KV cache has other masks, and matmuls of flattened tokens: then "matmuls" counts those that are no longer
    flattened, and "causal_mask" the masks now computed in ten steps. Its attention operators update the cache, too.
    """
    model = _load(source)
    blocks = sum(node.op_type == "Softmax" for node in model.graph)
    if has_cache(model.graph):
        counts = {"matmuls": _unflatten_matmuls(model.graph)}
        passes.RemoveUnusedNodesPass()(model)
        attentions = _fuse_attentions(model)
        counts |= {"attention": len(attentions), "causal_mask": _simplify_causal_masks(model.graph, attentions)}
    else:
        attentions = _fuse_attentions(model)
        counts = {"attention": len(attentions), **_rewrite(model, [(node, 3) for node in attentions if _mask(node)])}
    _tidy(model)
    save(model, target)
    return {"attention_blocks": blocks, **counts}


def has_cache(graph: Graph) -> bool:
    """Whether a graph takes the keys and values of earlier tokens."""
    return any(value.name.startswith(PAST) for value in graph.inputs)


def _load(source: Path) -> ir.Model:
    model = ir.load(source)
    if model.graph.opset_imports[""] < ATTENTION_OPSET:
        ConvertVersionPass(ATTENTION_OPSET)(model)
        model.ir_version = max(model.ir_version, IR_VERSION)
    return model


def _rewrite(model: ir.Model, masked: list[tuple[Node, int]]) -> dict[str, int]:
    counts = {"padding_mask": _simplify_masks(model.graph, masked)}
    fuse_erfgelu(model)
    counts["residual"] = _keep_residuals_apart(model.graph)
    counts["first_token"] = _select_first_token_early(model.graph)
    return counts


def _tidy(model: ir.Model) -> None:
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    passes.NameFixPass()(model)


# Attention


def _fuse_attentions(model: ir.Model) -> list[Node]:
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    attentions = [attention for attention in map(_fuse_attention, softmaxes) if attention is not None]
    passes.RemoveUnusedNodesPass()(model)
    return attentions


def _mask(attention: Node) -> Value | None:
    """What Attention adds to its scores; a node that was made without it may end before it."""
    return attention.inputs[3] if len(attention.inputs) > 3 else None


def _masking(softmax: Node) -> tuple[Node, int] | None:
    """What adds a mask to the scores that a Softmax reads, and which of its inputs is the mask."""
    scores, mask = _scores_and_mask(softmax.inputs[0]) if softmax.op_type == "Softmax" else (None, None)
    if scores is None or mask is None:
        return None
    add = softmax.inputs[0].producer()
    return add, list(add.inputs).index(mask)


def _fuse_attention(softmax: Node) -> Node | None:
    """Replace the block around a Softmax by one Attention, if it is the same.

    Query, key, value and output are (batch, tokens, heads x head size); the mask, which may be missing, is added to the
    scores, (batch, heads, query tokens, key tokens). Past and present keys and values, which only a model with a KV cache
    has, are (batch, heads, tokens, head size).
    """
    scores, mask = _scores_and_mask(softmax.inputs[0])
    weighted = _only_reader(softmax.outputs[0])
    if scores is None or weighted is None or weighted.op_type != "MatMul":
        return None
    split_heads = [scores.inputs[0], scores.inputs[1], weighted.inputs[1]]
    context = weighted.outputs[0]
    heads = context.shape[1] if _rank(context) == 4 else None
    output = context
    while (reader := _only_reader(output)) is not None and reader.op_type in ("Reshape", "Transpose"):
        output = reader.outputs[0]
    inputs = [_before_splitting_heads(value) for value in split_heads]
    caches = [value.producer() for value in inputs[1:] if value is not None and _joins_cache(value.producer())]
    if caches:
        if len(caches) != 2:
            return None
        inputs[1:] = [_before_splitting_heads(cache.inputs[1]) for cache in caches]
    pasts, outputs = [cache.inputs[0] for cache in caches], [output, *(cache.outputs[0] for cache in caches)]
    values = [*inputs, output] if mask is None else [*inputs, output, mask]
    ranks = [3, 3, 3, 3, 4][: len(values)]
    if not isinstance(heads, int) or [_rank(value) for value in values] != ranks or len(set(values)) != len(values):
        return None
    if any(value.dtype != ir.DataType.FLOAT for value in values):
        return None
    if not all(isinstance(value.shape[2], int) for value in inputs):
        return None

    attributes = {"q_num_heads": heads, "kv_num_heads": heads}
    if not _is_attention([*inputs, mask, *pasts], outputs, attributes):
        return None
    attention = ir.node("Attention", [*inputs, mask, *pasts], attributes, num_outputs=len(outputs))
    for old, new in zip(outputs, attention.outputs, strict=True):
        _take_place(old, new)
    output.graph.insert_after(output.producer(), attention)
    return attention


def _joins_cache(node: Node | None) -> bool:
    """Whether `node` puts the keys or values of new tokens behind those that the graph was given."""
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or _rank(node.outputs[0]) != 4:
        return False
    return node.inputs[0].is_graph_input() and node.attributes.get_int("axis") in (-2, 2)


def _scores_and_mask(value: Value) -> tuple[Node | None, Value | None]:
    """The MatMul of query and key, and what is added to it."""
    node = value.producer()
    added = [(value, None)]
    if node is not None and node.op_type == "Add":
        added = [(node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])]
    for scores, mask in added:
        matmul = _before_scaling(scores).producer()
        if matmul is not None and matmul.op_type == "MatMul":
            return matmul, mask
    return None, None


def _before_scaling(value: Value) -> Value:
    while (node := value.producer()) is not None and node.op_type in ("Mul", "Div"):
        if not _is_scalar_constant(node.inputs[1]):
            break
        value = node.inputs[0]
    return value


def _before_splitting_heads(value: Value) -> Value:
    """Walk up through what only moves or scales the numbers to the projection that they come from."""
    while (node := _before_scaling(value).producer()) is not None and node.op_type in ("Reshape", "Transpose"):
        value = node.inputs[0]
    return _before_scaling(value)


def _is_attention(inputs: list[Value | None], outputs: list[Value], attributes: dict[str, int]) -> bool:
    """Whether Attention gives what the block between `inputs` and `outputs` gives, whatever the mask."""
    values = [value for value in inputs if value is not None]
    stand_ins = {value: ir.val(value.name, value.dtype, value.shape) for value in values}
    node = ir.node(
        "Attention",
        [None if value is None else stand_ins[value] for value in inputs],
        attributes,
        num_outputs=len(outputs),
    )
    for position, output in enumerate(outputs):
        node.outputs[position].name, node.outputs[position].dtype = f"output_{position}", output.dtype
    attention = ir.Graph(
        [*stand_ins.values()], node.outputs, nodes=[node], opset_imports={"": ATTENTION_OPSET}, name="attention"
    )
    graph_inputs = [value for value in outputs[0].graph.inputs if value not in values]
    mask = inputs[3]
    for feeds in _probe_feeds([*values, *graph_inputs]):
        if len(inputs) > 4 and mask is not None:  # as many tokens in the past as there are new ones
            feeds[mask.name] = np.concatenate([feeds[mask.name], feeds[mask.name][..., ::-1]], axis=-1)
        found = _run(attention, {value.name: feeds[value.name] for value in values})
        expected = [_evaluate(output, values, feeds) for output in outputs]
        if found is None or not all(map(_is_same, found, expected)):
            return False
    return True


def _is_same(found: np.ndarray, expected: np.ndarray | None) -> bool:
    if expected is None or found.shape != expected.shape:
        return False
    return np.allclose(found, expected, rtol=0, atol=1e-5)


def _write_out_gelu(gelu: Node) -> None:
    """Put the basic operators in its place that ONNX Runtime fuses again when it loads them, as it does not with the exporter's."""
    graph, [value] = gelu.graph, gelu.inputs
    root, one, half = (
        _constant(graph, name, np.float32(number))
        for name, number in (("gelu_root_of_2", 2**0.5), ("gelu_one", 1), ("gelu_half", 0.5))
    )
    scaled = ir.node("Div", [value, root])
    error = ir.node("Erf", scaled.outputs)
    above = ir.node("Add", [error.outputs[0], one])
    double = ir.node("Mul", [value, above.outputs[0]])
    for node in (scaled, error, above, double):
        node.outputs[0].dtype, node.outputs[0].shape = value.dtype, value.shape
    graph.insert_before(gelu, [scaled, error, above, double])
    _replace(gelu.outputs[0], ir.node("Mul", [half, double.outputs[0]]))
    graph.remove(gelu, safe=True)


# Masks


def _simplify_masks(graph: Graph, masked: list[tuple[Node, int]]) -> int:
    """Compute masks that hide just the padding in six steps instead of some twenty; drop masks that hide nothing.

    `masked` are the nodes that read a mask, each an Add of the scores or an Attention, with the position of that input.
    """
    padding = next((value for value in graph.inputs if value.name == PADDING_MASK), None)
    simple = None
    simplified = 0
    for mask in dict.fromkeys(node.inputs[position] for node, position in masked):
        if mask.name == SIMPLE_MASK:
            continue
        hides_nothing = hides_padding = True
        for feeds in _probe_feeds(graph.inputs):
            found = _evaluate(mask, [], feeds)
            hides_nothing &= found is not None and not found.any()
            hides_padding &= found is not None and padding is not None and _hides_padding(found, feeds[PADDING_MASK])
        if not hides_nothing and not hides_padding:
            continue
        if hides_padding and simple is None:
            simple = _add_padding_mask(graph, padding)
        for node, position in masked:
            if node.inputs[position] is not mask:
                continue
            if hides_nothing and node.op_type == "Add":
                _take_place(node.outputs[0], node.inputs[1 - position])
            else:
                node.replace_input_with(position, None if hides_nothing else simple)
        simplified += 1
    return simplified


def _hides_padding(mask: np.ndarray, padding: np.ndarray) -> bool:
    batch, tokens = padding.shape
    per_key = np.where(padding[:, None, None, :] == 0, HIDDEN, np.float32(0))
    return np.array_equal(mask, np.broadcast_to(per_key, (batch, 1, tokens, tokens)))


def _add_padding_mask(graph: Graph, padding: Value) -> Value:
    """Turn (batch, tokens), 0 for padding, into the (batch, 1, tokens, tokens) that is added to the scores."""

    def constant(name: str, numbers: Any) -> Value:
        return _constant(graph, f"padding_mask_{name}", numbers)

    is_padding = ir.node("Equal", [padding, constant("zero", np.zeros((), padding.dtype.numpy()))])
    score = ir.node("Where", [is_padding.outputs[0], constant("hidden", HIDDEN), constant("seen", np.float32(0))])
    per_key = ir.node("Unsqueeze", [score.outputs[0], constant("axes", np.array([1, 2]))])
    tokens = ir.node("Shape", [padding], {"start": 1})
    ones, one = constant("ones", np.array([1, 1])), constant("one", np.array([1]))
    shape = ir.node("Concat", [ones, tokens.outputs[0], one], {"axis": 0})
    mask = ir.node("Expand", [per_key.outputs[0], shape.outputs[0]])
    mask.outputs[0].name, mask.outputs[0].dtype = SIMPLE_MASK, ir.DataType.FLOAT
    mask.outputs[0].shape = ir.Shape([padding.shape[0], 1, padding.shape[1], padding.shape[1]])
    graph.insert_before(graph[0], [is_padding, score, per_key, tokens, shape, mask])
    return mask.outputs[0]


def _simplify_causal_masks(graph: Graph, attentions: list[Node]) -> int:
    """Compute masks that hide just the padding and what comes later in ten steps instead of some forty."""
    inputs = {value.name: value for value in graph.inputs}
    padding, ids = inputs.get(PADDING_MASK), inputs.get("input_ids")
    simple = None
    simplified = 0
    for mask in {mask: None for mask in map(_mask, attentions) if mask is not None}:
        hides = padding is not None and ids is not None
        for feeds in _probe_feeds(graph.inputs) if hides else ():
            new, seen = feeds["input_ids"].shape[1], feeds[PADDING_MASK]
            # As many tokens in the past as there are new ones, if there is a past.
            seen = feeds[PADDING_MASK] = np.concatenate([seen, np.ones_like(seen)], axis=1)
            later = np.arange(2 * new) > np.arange(new, 2 * new)[:, None]
            expected = np.where((seen[:, None, None, :] == 0) | later, HIDDEN, np.float32(0))
            found = _evaluate(mask, [], feeds)
            hides = hides and found is not None and np.array_equal(found, expected)
        if not hides:
            continue
        simple = simple or _add_causal_mask(graph, padding, ids)
        for attention in attentions:
            if _mask(attention) is mask:
                attention.replace_input_with(3, simple)
        simplified += 1
    return simplified


def _add_causal_mask(graph: Graph, padding: Value, ids: Value) -> Value:
    """Turn (batch, total), 0 for padding, and (batch, tokens) into the (batch, 1, tokens, total) that is added to the scores."""

    def constant(name: str, numbers: Any) -> Value:
        return _constant(graph, f"causal_mask_{name}", numbers)

    zero, one, first, second = (constant(*each) for each in (("zero", 0), ("one", 1), ("first", [0]), ("second", [1])))
    total = ir.node("Shape", [padding], {"start": 1})
    tokens = ir.node("Shape", [ids], {"start": 1})
    past = ir.node("Sub", [total.outputs[0], tokens.outputs[0]])
    end = ir.node("Squeeze", [total.outputs[0]])
    keys = ir.node("Range", [zero, end.outputs[0], one])
    queries = ir.node("Slice", [keys.outputs[0], past.outputs[0], total.outputs[0], first])
    column = ir.node("Unsqueeze", [queries.outputs[0], second])
    visible = ir.node("LessOrEqual", [keys.outputs[0], column.outputs[0]])
    is_text = ir.node("Cast", [padding], {"to": ir.DataType.BOOL})
    per_key = ir.node("Unsqueeze", [is_text.outputs[0], constant("axes", [1, 2])])
    seen = ir.node("And", [visible.outputs[0], per_key.outputs[0]])
    score = ir.node("Where", [seen.outputs[0], constant("seen", np.float32(0)), constant("hidden", HIDDEN)])
    score.outputs[0].dtype = ir.DataType.FLOAT
    score.outputs[0].shape = ir.Shape([padding.shape[0], 1, ids.shape[1], padding.shape[1]])
    steps = [total, tokens, past, end, keys, queries, column, visible, is_text, per_key, seen, score]
    graph.insert_before(graph[0], steps)
    return score.outputs[0]


# Around attention


def _unflatten_matmuls(graph: Graph) -> int:
    """Write Reshape, Gemm, Reshape as MatMul and Add on (batch, tokens, width); return how many."""
    changed = 0
    for gemm in [node for node in graph if node.op_type == "Gemm"]:
        flatten, restore = gemm.inputs[0].producer(), _only_reader(gemm.outputs[0])
        plain = not any(gemm.attributes.get_int(name, 0) for name in ("transA", "transB"))
        plain &= all(gemm.attributes.get_float(name, 1.0) == 1 for name in ("alpha", "beta"))
        if flatten is None or flatten.op_type != "Reshape" or restore is None or restore.op_type != "Reshape":
            continue
        before, after = flatten.inputs[0], restore.outputs[0]
        if not plain or len(gemm.inputs) != 3 or gemm.inputs[1].const_value is None or _rank(after) != 3:
            continue
        if _rank(before) not in (3, 4) or before.shape[:2] != after.shape[:2]:
            continue
        tokens = before
        if _rank(before) == 4:
            merge = ir.node("Reshape", [before, _constant(graph, "merge_heads", np.array([0, 0, -1]))])
            merge.outputs[0].dtype = before.dtype
            merge.outputs[0].shape = ir.Shape([*before.shape[:2], gemm.inputs[1].shape[0]])
            graph.insert_before(flatten, merge)
            tokens = merge.outputs[0]
        matmul = ir.node("MatMul", [tokens, gemm.inputs[1]])
        matmul.outputs[0].dtype, matmul.outputs[0].shape = after.dtype, after.shape
        graph.insert_before(gemm, matmul)
        _replace(after, ir.node("Add", [matmul.outputs[0], gemm.inputs[2]]))
        graph.remove([restore, gemm], safe=True)
        changed += 1
    return changed


def _keep_residuals_apart(graph: Graph) -> int:
    """Write a residual addition as a subtraction, so that ONNX Runtime does not fuse it with the LayerNormalization behind it.

    Its SkipLayerNormalization is a scalar loop on the CPU, 3 to 5 times slower than the two by themselves (in 1.31). What is
    subtracted is a matmul whose weights changed their sign, which changes no digit. Where no matmul is added, Sum does
    the same on one thread.
    """
    changed = 0
    for norm in [node for node in graph if node.op_type == "LayerNormalization"]:
        add = norm.inputs[0].producer()
        if add is None or add.op_type != "Add" or _only_reader(add.outputs[0]) is not norm:
            continue
        if any(value.const_value is not None for value in add.inputs):
            continue
        left, right = add.inputs
        if _negate(right):
            apart = ir.node("Sub", [left, right])
        elif _negate(left):
            apart = ir.node("Sub", [right, left])
        else:
            apart = ir.node("Sum", [left, right])
        _replace(add.outputs[0], apart)
        graph.remove(add, safe=True)
        changed += 1
    return changed


def _negate(value: Value) -> bool:
    """Change the sign of `value` by that of the weights behind it, if it is a matmul (and a bias) that nothing else reads."""
    weights = []
    while _only_reader(value) is not None:
        node = value.producer()
        constants = (
            [position for position, one in enumerate(node.inputs) if one.const_value is not None] if node else []
        )
        if node is None or node.op_type not in ("Add", "MatMul") or len(constants) != 1:
            return False
        weights.append((node, constants[0]))
        if len(node.inputs[constants[0]].uses()) != 1:
            return False
        if node.op_type == "MatMul":
            break
        value = node.inputs[1 - constants[0]]
    else:
        return False
    for node, position in weights:
        old = node.inputs[position]
        node.replace_input_with(position, _constant(node.graph, f"{old.name}_negated", -old.const_value.numpy()))
    return True


def _select_first_token_early(graph: Graph) -> int:
    """Where only the [CLS] token of the last layer is read, compute only this one behind the last attention, and its query.

    Going up from the Gathers that select the token (there are two in a graph that was rewritten before its attention was fused), an
    operator moves behind the selection if it treats each token by itself and if all its readers have moved. Where that ends, the
    values are cut to (batch, 1, width). Returns how many operators moved.
    """
    selections = [node for node in graph if _selects_first_token(node)]
    moved: dict[Node, list[int]] = {
        node: [0] for node in selections
    }  # with the positions of the inputs that hold tokens
    for node in reversed(list(graph)):
        output = node.outputs[0]
        readers = list(output.uses())
        behind = readers and all(reader in moved and position in moved[reader] for reader, position in readers)
        positions = _token_inputs(node) if behind and not output.is_graph_output() else []
        if positions:
            moved[node] = positions

    first = _constant(graph, "first_token", np.array([0]))
    kept = [node for node in selections if _rank(node.inputs[1]) == 1]
    cut: dict[tuple[Value, int], Value] = {(node.inputs[0], 1): node.outputs[0] for node in kept}

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
        if node in selections:
            if node in kept and node.inputs[0].producer() in moved:
                node.outputs[0].replace_all_uses_with(node.inputs[0])
            continue
        for position in positions:
            if node.inputs[position].producer() not in moved:
                cut_input(node, position, axis=1)
        if node.op_type == "Attention" and _mask(node) is not None:
            cut_input(node, 3, axis=2)
        batch, _, width = node.outputs[0].shape
        node.outputs[0].shape = ir.Shape([batch, 1, width])
    return len(moved) - len(selections)


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
    """Whether `value` is (batch, tokens, width), with more tokens than one."""
    return value.const_value is None and _rank(value) == 3 and value.shape[1] != 1


def _only_reader(value: Value) -> Node | None:
    return value.consumers()[0] if len(value.uses()) == 1 and not value.is_graph_output() else None


def _replace(old: Value, node: Node) -> None:
    """Let every reader of `old` read the output of the new `node`."""
    old.graph.insert_after(old.producer(), node)
    _take_place(old, node.outputs[0])


def _take_place(old: Value, new: Value) -> None:
    new.dtype, new.shape = old.dtype, old.shape
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}_before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _constant(graph: Graph, name: str, numbers: Any) -> Value:
    """The initializer `name`, which its name describes: a graph that was rewritten before has it."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(np.asarray(numbers), name=name)))
    return graph.initializers[name]


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
    found = _run(part, {value.name: feeds[value.name] for value in inputs})
    return None if found is None else found[0]


def _run(graph: Graph, feeds: dict[str, np.ndarray]) -> list[np.ndarray] | None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=IR_VERSION))
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        outputs: list[np.ndarray] = session.run(None, feeds)
        return outputs
    except Exception:  # ONNX Runtime has many: what cannot be run like this is not what was looked for
        return None
