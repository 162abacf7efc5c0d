"""Weights in blocks of int8 or int4, each block with a scale of its own: MatMulNBits for matmuls, GatherBlockQuantized for embeddings.

A head that is tied to the embeddings reads the very bytes that they are stored in, since the two operators lay out a table (vocabulary,
width) alike. ONNX Runtime's own quantizer of Gather knows int4 only, and stores such a table twice.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.quantization.onnx_model import ONNXModel

from pipelines.onnx.file import save

DOMAIN = "com.microsoft"
ACCURACY_LEVEL = 4  # int8 matmuls inside MatMulNBits: activations are quantized in blocks on every call


def quantize_blocks(source: Path, target: Path, table_bits: int, weight_bits: int | None, block_size: int) -> None:
    """Quantize embeddings (and the heads that are tied to them) and the weights of all other matmuls, unless `weight_bits` is None.

    Every block of `block_size` weights has a scale of its own; tables whose width it does not divide stay as they are.
    """
    model = onnx.load(source)
    graph = model.graph
    del graph.value_info[:]
    ONNXModel(model).replace_gemm_with_matmul()  # the quantizer knows MatMul only
    heads = untie(graph)

    def quantize_matmuls(bits: int, only: set[str]) -> None:
        _library().MatMulNBitsQuantizer(
            model,
            bits=bits,
            block_size=block_size,
            is_symmetric=True,
            accuracy_level=ACCURACY_LEVEL,
            nodes_to_exclude=[node.name for node in graph.node if node.name not in only],
        ).process()

    quantize_matmuls(table_bits, set(heads.values()))
    _quantize_tables(graph, heads, table_bits, block_size)
    if weight_bits is not None:
        quantize_matmuls(weight_bits, {node.name for node in graph.node if node.op_type == "MatMul"})
    if not any(opset.domain == DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    quantized = ir.from_proto(model)
    RemoveUnusedNodesPass()(quantized)
    save(quantized, target)


def tied_tables(graph: onnx.GraphProto) -> dict[str, str]:
    """By the name of their result, the transposed constants that a matmul multiplies with: heads that are tied to embeddings."""
    constants = {tensor.name for tensor in graph.initializer}
    transposed = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"}
    multiplied = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    return {name: table for name, table in transposed.items() if table in constants and name in multiplied}


def untie(graph: onnx.GraphProto) -> dict[str, str]:
    """Give every head that is a transposed table a constant of its own; return {table: name of the head's MatMul}."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    tied, heads = tied_tables(graph), {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tied:
            table = constants[tied[node.input[1]]]
            name = f"{table.name}_transposed"
            graph.initializer.append(
                numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(table).T), name)
            )
            node.input[1] = name
            heads[table.name] = node.name
    return heads


def _library() -> Any:
    """ONNX Runtime's module of quantizers by blocks, which sets the root logger up on import: every library would print its information."""
    with patch.object(logging, "basicConfig"):
        from onnxruntime.quantization import matmul_nbits_quantizer
    return matmul_nbits_quantizer


def _quantize_tables(graph: onnx.GraphProto, heads: dict[str, str], bits: int, block_size: int) -> None:
    """Read embeddings from blocks: those of the head they are tied to, or of their own."""
    library = _library()
    config = library.DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, bits=bits)
    quantizer = library.DefaultWeightOnlyQuantizer(config)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    settings: dict[str, Any] = {"bits": bits, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1}
    nodes = []
    for node in graph.node:
        table = constants.get(node.input[0]) if node.op_type == "Gather" else None
        on_rows = all(attribute.name != "axis" or attribute.i == 0 for attribute in node.attribute)
        is_table = table is not None and table.data_type == onnx.TensorProto.FLOAT and len(table.dims) == 2
        if table is None or not is_table or not on_rows or table.dims[1] % block_size:
            nodes.append(node)
            continue
        stored = f"{table.name}_transposed" if table.name in heads else table.name
        blocks, scales, flat = f"{stored}_Q{bits}", f"{stored}_scales", f"{table.name}_flat"
        if table.name not in heads:
            packed, scale, _ = quantizer.qbits_block_quant(np.ascontiguousarray(numpy_helper.to_array(table).T))
            graph.initializer.extend([numpy_helper.from_array(packed, blocks), numpy_helper.from_array(scale, scales)])
        # MatMulNBits has the blocks of a row apart, GatherBlockQuantized side by side; the bytes are the same.
        graph.initializer.append(numpy_helper.from_array(np.array([table.dims[0], -1]), flat))
        rows, name = f"{flat}_blocks", f"{node.name}_Q{bits}"
        inputs = [rows, node.input[1], scales]
        nodes.append(helper.make_node("Reshape", [blocks, flat], [rows], name=f"{node.name}_blocks"))
        nodes.append(
            helper.make_node("GatherBlockQuantized", inputs, list(node.output), name=name, domain=DOMAIN, **settings)
        )
    del graph.node[:]
    graph.node.extend(nodes)
