"""Rewrite an exported model into a graph that ONNX Runtime runs faster on a CPU: the same function, less work.

The exporter writes attention as a dozen operators, in forms that change with the opset, the versions and the model.
So an attention block is found by its Softmax and by the shapes around it, and believed only when the operator that
replaces it gives the same numbers on random inputs; a block that does not is left as it was.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter.ort_fusions.erfgelu import fuse_erfgelu
from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.rules.fusion._rotary_embedding import fuse_partial_rotary_embedding, fuse_rotary_embedding
from onnxscript.version_converter import ConvertVersionPass

from pipelines.onnx.file import save

# onnx_ir.Graph, Node and Value: their types call nearly everything optional, for graphs that are still being built.
Graph: TypeAlias = Any
Node: TypeAlias = Any
Value: TypeAlias = Any

# The first opset with the operators Attention, RotaryEmbedding and RMSNormalization, and the file format that goes with it. Up to 128
# tokens, ONNX Runtime's kernel for Attention was 1.5 to 2.1 times faster than its own MultiHeadAttention; it takes any number of heads,
# fewer of them for key and value, and any mask. docs/results.md has what the operators gain.
ATTENTION_OPSET, IR_VERSION = 23, 11
BATCH, TOKENS = 3, 7  # of the random inputs
# Why a family's attention is exported and quantized in single steps.
NOT_FUSED = dict.fromkeys(
    ("deberta", "deberta-v2"), "its scores are sums of three matmuls, of which the Attention operator knows one"
) | {"gemma2": "its scores are capped by a tanh before they are masked"}
# Operators that move or repeat numbers and change none.
MOVES = set("Reshape Transpose Unsqueeze Squeeze Expand".split())
# Operators that treat each token by itself, as long as their other inputs are constants that do.
TOKENWISE = set("Add Sum Sub Mul Div Erf Gelu Relu Sigmoid Tanh LayerNormalization MatMul".split())


def simplify(model: ir.Model) -> dict[str, int]:
    """Bring a standard fp32 graph to fewer standard operators, all of its own opset, that compute the same.

    Returns what was done: "residual", additions kept from ONNX Runtime's slow SkipLayerNormalization; "first_token", operators that now
    see only the [CLS] token that the classifier reads.
    """
    if any(node.op_type == "LSTM" for node in model.graph):
        # Its gates have another order than torch's; the weights are put in it here, not on every start.
        fold_constants(model, should_fold=lambda node: True)
    counts = {"residual": _keep_residuals_apart(model.graph), "first_token": _select_first_token_early(model.graph)}
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    passes.NameFixPass()(model)
    return counts


def fuse_for_onnxruntime(source: Path, target: Path) -> dict[str, int]:
    """Read the standard fp32 graph `source`, write it to `target` with one operator for each attention block, GELU, RMS norm and rotation.

    Attention operators update a KV cache, too. Returns "attention_blocks" (every softmax inside the graph), "attention" (those that were
    fused), and what simplify() returns, of what was still to do. A graph without attention keeps its opset.
    """
    model = ir.load(source)
    if model.graph.opset_imports[""] < ATTENTION_OPSET:
        ConvertVersionPass(ATTENTION_OPSET)(model)
        model.ir_version = max(model.ir_version, IR_VERSION)
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    attention = sum(map(_fuse_attention, softmaxes))
    if attention:
        passes.RemoveUnusedNodesPass()(model)
        fuse_rms_normalization(model)
        fuse_rotary_embedding(model)
        fuse_partial_rotary_embedding(model)
        _repeat_positions(model.graph)
        passes.CommonSubexpressionEliminationPass()(model)
    else:
        model = ir.load(source)  # in its own opset, which older runtimes open
    fuse_erfgelu(model)
    counts = simplify(model)
    save(model, target)
    return {"attention_blocks": len(softmaxes), "attention": attention, **counts}


# Attention


def _fuse_attention(softmax: Node) -> bool:
    """Replace the block around a Softmax by one Attention, if it is the same; return whether it was.

    Query, key, value and output are (batch, tokens, heads x head size). Where something stands between a projection and the scores,
    such as rotary positions, all four are (batch, heads, tokens, head size). Past and present keys and values, which only a model with
    a KV cache has, always are. A mask, a bias of positions, or both are added to the scores (batch, heads, query tokens, key tokens).
    Key and value may have fewer heads than the query, which then share them.
    """
    found, weighted = _scores(softmax.inputs[0]), _only_reader(softmax.outputs[0])
    if found is None or weighted is None or weighted.op_type != "MatMul":
        return False
    scores, added, scale = found
    output = weighted.outputs[0]
    paths = [_origins(value) for value in (*scores.inputs, weighted.inputs[1])]
    scale *= math.prod(factor for _, factor in paths)
    caches = [path[-1].producer() for path, _ in paths[1:] if _joins_cache(path[-1].producer())]
    if len(caches) == 2:
        paths[1:] = [_origins(cache.inputs[1]) for cache in caches]
        scale *= math.prod(factor for _, factor in paths[1:])
    elif caches or _rank(output) != 4:
        return False
    heads, size = output.shape[1], output.shape[3]
    inputs, attributes = [path[-1] for path, _ in paths], {"scale": scale}
    if all(_rank(value) == 3 and isinstance(value.shape[2], int) for value in inputs):
        attributes |= {"q_num_heads": heads, "kv_num_heads": inputs[1].shape[2] // size}
        while (reader := _only_reader(output)) is not None and reader.op_type in ("Reshape", "Transpose"):
            output = reader.outputs[0]
    else:
        inputs = [_by_heads(path, size) for path, _ in paths]
    pasts, outputs = [cache.inputs[0] for cache in caches], [output, *(cache.outputs[0] for cache in caches)]
    read = [*inputs, *added, *pasts]
    if not isinstance(heads, int) or len({*read, *outputs}) != len(read) + len(outputs):
        return False
    if any(value is None or _rank(value) < 2 or value.dtype != ir.DataType.FLOAT for value in read):
        return False
    if len({_rank(value) for value in added}) > 1:
        return False
    if not _is_attention(read, len(added), outputs, attributes):
        return False
    nodes = _attention(read, len(added), len(outputs), attributes)
    for old, new in zip(outputs, nodes[-1].outputs, strict=True):
        _take_place(old, new)
    output.graph.insert_after(output.producer(), nodes)
    return True


def _attention(read: list[Value], added: int, outputs: int, attributes: dict[str, Any]) -> list[Node]:
    """The nodes that take the place of a block: all that is `added` as one mask, then Attention."""
    inputs, masks, pasts = read[:3], read[3 : 3 + added], read[3 + added :]
    sums = [ir.node("Add", masks)] if added == 2 else []
    for value in (node.outputs[0] for node in sums):
        value.dtype = ir.DataType.FLOAT
        value.shape = ir.Shape([b if a == 1 else a for a, b in zip(*(mask.shape for mask in masks), strict=True)])
    mask = sums[0].outputs[0] if sums else masks[0] if masks else None
    return [*sums, ir.node("Attention", [*inputs, mask, *pasts], attributes, num_outputs=outputs)]


def _joins_cache(node: Node | None) -> bool:
    """Whether `node` puts the keys or values of new tokens behind those that the graph was given."""
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or _rank(node.outputs[0]) != 4:
        return False
    return node.inputs[0].is_graph_input() and node.attributes.get_int("axis") in (-2, 2)


def _scores(value: Value) -> tuple[Node, list[Value], float] | None:
    """The MatMul of query and key, the one or two values that are added to it, and the number it is multiplied by."""
    value, factor = _before_scaling(value)
    node = value.producer()
    if node is not None and node.op_type == "MatMul":
        return node, [], factor
    if node is not None and node.op_type == "Add":
        for one, other in (node.inputs, reversed(node.inputs)):
            found = _scores(one)
            if found is not None and len(found[1]) < 2:
                return found[0], [*found[1], other], factor * found[2]
    return None


def _before_scaling(value: Value) -> tuple[Value, float]:
    factor = 1.0
    while (node := value.producer()) is not None and node.op_type in ("Mul", "Div"):
        if not _is_scalar_constant(node.inputs[1]):
            break
        number = node.inputs[1].const_value.numpy().item()
        value, factor = node.inputs[0], factor * (number if node.op_type == "Mul" else 1 / number)
    return value, factor


def _origins(value: Value) -> tuple[list[Value], float]:
    """`value` and what it comes from, up through all that only moves, repeats or scales the numbers; and the scale."""
    value, factor = _before_scaling(value)
    path = [value]
    while (node := value.producer()) is not None and node.op_type in MOVES:
        value, scale = _before_scaling(node.inputs[0])
        path, factor = [*path, value], factor * scale
    return path, factor


def _by_heads(path: list[Value], size: int) -> Value | None:
    """The first of what a value comes from that is (batch, heads, tokens, head size): before heads are repeated and a key is transposed."""
    found = None
    for value in path:
        if _rank(value) == 4 and value.shape[3] == size and isinstance(value.shape[1], int):
            found = value
        node = value.producer()
        if node is not None and node.op_type == "Transpose" and list(node.attributes.get_ints("perm")) != [0, 1, 3, 2]:
            break
    return found


def _is_attention(read: list[Value], added: int, outputs: list[Value], attributes: dict[str, Any]) -> bool:
    """Whether Attention gives what the block between `read` and `outputs` gives, whatever the mask."""
    stand_ins = [ir.val(value.name, value.dtype, value.shape) for value in read]
    nodes = _attention(stand_ins, added, len(outputs), attributes)
    for position, output in enumerate(outputs):
        value = nodes[-1].outputs[position]
        value.name, value.dtype = f"output_{position}", output.dtype
    attention = ir.Graph(
        stand_ins, nodes[-1].outputs, nodes=nodes, opset_imports={"": ATTENTION_OPSET}, name="attention"
    )
    graph = outputs[0].graph
    known = list(dict.fromkeys([*read, *graph.inputs]))
    try:
        block = ir.convenience.extract(graph, known, outputs)
    except ValueError:  # it reads other values, too
        return False
    feeds = _random_feeds(known)
    for mask in read[3 : 3 + added]:  # as many tokens in the past as there are new ones
        if len(outputs) > 1 and not isinstance(mask.shape[-1], int):
            feeds[mask.name] = np.concatenate([feeds[mask.name], feeds[mask.name][..., ::-1]], axis=-1)
    found, expected = _run(attention, {value.name: feeds[value.name] for value in read}), _run(block, feeds)
    if found is None or expected is None or [one.shape for one in found] != [one.shape for one in expected]:
        return False
    return all(np.allclose(one, other, rtol=0, atol=1e-5) for one, other in zip(found, expected, strict=True))


def _repeat_positions(graph: Graph) -> None:
    """Give RotaryEmbedding a row of cosines and sines for every sequence of a batch: the operator does not broadcast them."""
    one = _constant(graph, "one", np.array([1]))
    for node in [node for node in graph if node.op_type == "RotaryEmbedding"]:
        for position, table in enumerate(node.inputs[1:3], start=1):
            if table.producer().inputs[0].shape[0] != 1:  # of the angles
                continue
            batch = ir.node("Shape", [node.inputs[0]], {"start": 0, "end": 1})
            shape = ir.node("Concat", [batch.outputs[0], one, one], {"axis": 0})
            repeated = ir.node("Expand", [table, shape.outputs[0]])
            graph.insert_before(node, [batch, shape, repeated])
            node.replace_input_with(position, repeated.outputs[0])


# Around attention


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
        ir.convenience.replace_nodes_and_values(graph, add, [add], [apart], add.outputs, apart.outputs)
        changed += 1
    return changed


def _negate(value: Value) -> bool:
    """Change the sign of `value` by that of the weights behind it, if it is a matmul (and a bias) that nothing else reads."""
    node = value.producer()
    if node is None or node.op_type not in ("Add", "MatMul") or _only_reader(value) is None:
        return False
    constants = [position for position, one in enumerate(node.inputs) if one.const_value is not None]
    if len(constants) != 1 or (node.op_type == "Add" and not _negate(node.inputs[1 - constants[0]])):
        return False
    old = node.inputs[constants[0]]
    node.replace_input_with(constants[0], _constant(node.graph, f"{old.name}_negated", -old.const_value.numpy()))
    return True


def _select_first_token_early(graph: Graph) -> int:
    """Where only the [CLS] token of the last layer is read, compute only this one behind the last attention, and its query.

    Going up from the Gather that selects the token, an operator moves behind the selection if it treats each token by itself and all
    its readers select. Returns how many operators moved.
    """
    moved = 0
    for node in reversed(list(graph)):
        output = node.outputs[0]
        readers = output.consumers()
        if not readers or output.is_graph_output() or not all(map(_selects_first_token, readers)):
            continue
        positions = _token_inputs(node)
        for position in positions:
            _cut_to_first(node, position, axis=1)
        if not positions:
            continue
        if node.op_type == "Attention" and len(node.inputs) > 3 and node.inputs[3] is not None:
            _cut_to_first(node, 3, axis=2)
        batch, _, width = output.shape
        output.shape = ir.Shape([batch, 1, width])
        for reader in readers:
            if _rank(reader.outputs[0]) == 3:  # one of _cut_to_first: there is one token only now
                reader.outputs[0].replace_all_uses_with(output)
        moved += 1
    return moved


def _cut_to_first(node: Node, position: int, axis: int) -> None:
    """Let `node` read the first entry of an input's `axis` only; one Gather serves all that read it."""
    value = node.inputs[position]
    first = _constant(node.graph, "first_token", np.array([0]))
    gather = next((one for one in value.consumers() if one.op_type == "Gather" and one.inputs[1] is first), None)
    if gather is None:
        gather = ir.node("Gather", [value, first], {"axis": axis})
        gather.outputs[0].dtype = value.dtype
        gather.outputs[0].shape = ir.Shape([1 if i == axis else size for i, size in enumerate(value.shape)])
        node.graph.insert_before(node, gather)
    node.replace_input_with(position, gather.outputs[0])


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


def _random_feeds(values: list[Value]) -> dict[str, np.ndarray]:
    """Random numbers for `values`, zeros for integers."""
    random = np.random.default_rng(0)
    feeds = {}
    for value in values:
        shape = [size if isinstance(size, int) else TOKENS if axis else BATCH for axis, size in enumerate(value.shape)]
        feeds[value.name] = np.zeros(shape, value.dtype.numpy())
        if value.dtype == ir.DataType.FLOAT:
            feeds[value.name] = random.standard_normal(shape, np.float32)
    return feeds


def _run(graph: Graph, feeds: dict[str, np.ndarray]) -> list[np.ndarray] | None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=IR_VERSION))
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        return session.run(None, feeds)
    except Exception:  # ONNX Runtime has many: what cannot be run like this is not what was looked for
        return None
