"""Dynamic quantization: weights in int8, the ranges of activations measured on every call; all of it, or but for what hurts."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from pipelines.core.task import Arrays
from pipelines.onnx.blocks import quantize_blocks, tied_tables, untie
from pipelines.onnx.export import ONNX_FILE, quiet_exporters
from pipelines.onnx.file import save
from pipelines.onnx.predict import complete_feed
from pipelines.runtime.infer import open_session

SENSITIVE_SHARE = 0.1  # of the weights of all matmuls, which mixed_int8 leaves in fp32: a quarter more bytes for them
FEEDS = 4  # batches of training examples that sensitivity is measured on


def quantize_dynamic_int8(
    source: Path,
    target: Path,
    reduce_range: bool,
    block_size: int | None = 32,
    table_bits: int = 8,
    **nodes: list[str],
) -> None:
    """Quantize the matmuls (a scale for each output column) and embeddings of `source` into the one file `target`.

    `reduce_range` keeps the weights of matmuls within 7 bits, as x86 processors without VNNI need: their kernels add pairs of 8-bit
    products in 16 bits, which saturate. Embeddings stay bytes, of which only the rows that are read are dequantized; those with a tied
    head are blocks of int8, which both read, or without a `block_size` are stored twice. With `table_bits` of 4 all embeddings are blocks of int4. `nodes` are the quantizer's nodes_to_quantize or
    nodes_to_exclude. On loading, ONNX Runtime merges each MatMulInteger with what converts around it.
    """
    from onnxruntime.quantization import QuantType
    from transformers.exporters.configs import ExportFormat
    from transformers.exporters.quantizers import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    config = OnnxRuntimeDynamicConfig(
        # Not Attention, which would become an invalid QAttention, nor Conv, whose ConvInteger is slower than the float kernel.
        op_types_to_quantize=["MatMul", "Gather", "LSTM"],
        per_channel=True,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        **nodes,
    )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".quantize-") as scratch, quiet_exporters():
        prepared = source
        tied = bool(tied_tables(onnx.load(source, load_external_data=False).graph))
        if tied or table_bits < 8:
            prepared = Path(scratch) / ONNX_FILE
            if block_size is not None:
                quantize_blocks(source, prepared, table_bits, None, block_size)
            else:
                whole = onnx.load(source)
                untie(whole.graph)
                save(ir.from_proto(whole), prepared)
        model = ir.load(prepared)
        for value in (value for node in model.graph for value in node.outputs if not value.is_graph_output()):
            value.shape = None  # the quantizer transposes weights, and then finds the shapes behind them wrong
        quantized = OnnxRuntimeQuantizer(config).quantize(model, {}, ExportFormat.ONNX)
    save(quantized, target)


def quantize_mixed_int8(
    source: Path, target: Path, feeds: list[Arrays], reduce_range: bool, block_size: int | None = 32
) -> None:
    """quantize_dynamic_int8, but the matmuls that change the outputs most for their weights stay in fp32: SENSITIVE_SHARE of all weights."""
    weights = weights_of_matmuls(source)
    changes = sensitivities(source, [*weights], feeds[:FEEDS], target.parent, reduce_range)
    left, kept = SENSITIVE_SHARE * sum(weights.values()), []
    for name in sorted(weights, key=lambda name: -changes[name] / weights[name]):
        if weights[name] <= left:
            kept.append(name)
            left -= weights[name]
    quantize_dynamic_int8(source, target, reduce_range, block_size, nodes_to_exclude=kept)


def weights_of_matmuls(source: Path) -> dict[str, int]:
    """How many weights each matmul of a graph has, by the name of its node."""
    graph = onnx.load(source, load_external_data=False).graph
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    return {
        node.name: sizes[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.input[1] in sizes
    }


def sensitivities(
    source: Path, nodes: list[str], feeds: list[Arrays], folder: Path, reduce_range: bool
) -> dict[str, float]:
    """How much int8 in each of the `nodes` alone changes the outputs: the squared error over the squared outputs, summed over outputs."""

    def outputs(path: Path) -> list[np.ndarray]:
        session = open_session(path)
        runs = [session.run(None, complete_feed(session, feed)) for feed in feeds]
        return [np.concatenate([np.ravel(run[place]) for run in runs]) for place in range(len(runs[0]))]

    expected, found = outputs(source), {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".sensitivity-") as scratch:
        for name in nodes:
            alone = Path(scratch) / ONNX_FILE
            quantize_dynamic_int8(source, alone, reduce_range, None, nodes_to_quantize=[name])
            found[name] = sum(
                float(np.square(one - wanted).sum() / max(np.square(wanted).sum(), 1e-12))
                for one, wanted in zip(outputs(alone), expected, strict=True)
            )
    return found
