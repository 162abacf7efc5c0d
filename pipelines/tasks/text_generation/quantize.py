"""Smaller language models: blocks of int4 or int8 weights, or int8 products, chosen by measured perplexity and speed.

The embeddings are blocks of int8 or int4 in all of them, and a head tied to them reads the same bytes: ONNX Runtime's MatMulNBits and
GatherBlockQuantized lay out a table (vocabulary, width) alike.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from pipelines.core.config import LanguageQuantizeConfig
from pipelines.core.errors import VerificationError
from pipelines.core.run import Outcome, copy_beside, read_record
from pipelines.data.sources import check_onnx_directory
from pipelines.models.removal import load_model
from pipelines.onnx.export import ONNX_FILE
from pipelines.onnx.fuse import fuse_language_model
from pipelines.onnx.predict import predict_onnx
from pipelines.onnx.quantize import keep_fp32
from pipelines.tasks.text_generation.export import verify_generation, verify_logits, verify_same_logits
from pipelines.tasks.text_generation.measure import Decoding, measure_decoding

DOMAIN = "com.microsoft"
# int8 products inside MatMulNBits: activations are quantized in blocks as they come.
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Scheme:
    """Bits of the embeddings (and of a head tied to them) and of the weights of all other products; None: dynamic int8."""

    embedding_bits: int
    weight_bits: int | None


SCHEMES = {
    "dynamic_int8": Scheme(8, None),
    "int8_blocks": Scheme(8, 8),
    "int4_blocks": Scheme(4, 4),
    "int4_blocks_int8_embeddings": Scheme(8, 4),
}


def quantize_weights(
    source: Path, target: Path, scheme: Scheme, block_size: int, reduce_range: bool = False
) -> dict[str, Any]:
    """Quantize the weights of `source` into the one file `target`; return how many nodes of each operator it has, and its bytes.

    Every block of `block_size` weights has a scale of its own; tables whose width it does not divide stay as they are.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    graph = model.graph
    del graph.value_info[:]
    split_gemm(graph)
    name_nodes(graph)
    heads = untie(graph)

    def blocks(bits: int, only: set[str]) -> None:
        excluded = [node.name for node in graph.node if node.name not in only]
        quantizer = block_quantizers().MatMulNBitsQuantizer(
            model,
            bits=bits,
            block_size=block_size,
            is_symmetric=True,
            accuracy_level=ACCURACY_LEVEL,
            nodes_to_exclude=excluded,
        )
        quantizer.process()

    blocks(scheme.embedding_bits, set(heads.values()))
    quantize_tables(graph, heads, scheme.embedding_bits, block_size)
    if scheme.weight_bits is not None:
        blocks(scheme.weight_bits, {node.name for node in graph.node if node.op_type == "MatMul"})
    drop_unused(graph)
    if not any(opset.domain == DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    if scheme.weight_bits is None:
        prepared = target.with_name(f".{target.name}.prepared")
        onnx.save(model, prepared)
        quantize_dynamic(
            prepared, target, op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=reduce_range,
            weight_type=QuantType.QInt8, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT, "MatMulConstBOnly": True},
        )  # fmt: skip
        prepared.unlink()
    else:
        onnx.save(model, target)
    operators = Counter(node.op_type for node in onnx.load(target, load_external_data=False).graph.node)
    return {
        "operators": dict(sorted(operators.items())),
        "bytes_before": source.stat().st_size,
        "bytes_after": target.stat().st_size,
    }


def split_gemm(graph: onnx.GraphProto) -> None:
    """Write every Gemm with a constant weight as MatMul and Add: the quantizers know MatMul only."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
        if node.op_type != "Gemm" or node.input[1] not in constants or not plain:
            nodes.append(node)
            continue
        weight = node.input[1]
        if attributes.get("transB", 0):
            weight = add_transposed(graph, constants[weight])
        has_bias = len(node.input) > 2
        product = f"{node.output[0]}_product" if has_bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], weight], [product], name=f"{node.name}_MatMul"))
        if has_bias:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]], name=f"{node.name}_Add"))
    del graph.node[:]
    graph.node.extend(nodes)


def name_nodes(graph: onnx.GraphProto) -> None:
    for index, node in enumerate(graph.node):
        node.name = f"{index}_{node.op_type}"


def add_transposed(graph: onnx.GraphProto, tensor: onnx.TensorProto) -> str:
    name = f"{tensor.name}_transposed"
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(tensor).T), name))
    return name


def untie(graph: onnx.GraphProto) -> dict[str, str]:
    """Give every head that is a transposed table a constant of its own; return {table: name of the head's MatMul}."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    transposed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in constants
    }
    heads = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in transposed:
            table = transposed[node.input[1]]
            node.input[1] = add_transposed(graph, constants[table])
            heads[table] = node.name
    return heads


def block_quantizers() -> Any:
    """ONNX Runtime's module of quantizers by blocks, which sets the root logger up on import: every library would print its information."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    from onnxruntime.quantization import matmul_nbits_quantizer

    root.handlers[:] = handlers
    root.setLevel(level)
    return matmul_nbits_quantizer


def quantize_tables(graph: onnx.GraphProto, heads: dict[str, str], bits: int, block_size: int) -> None:
    """Read embeddings from blocks: those of the head they are tied to, or of their own."""
    library = block_quantizers()
    quantizer = library.DefaultWeightOnlyQuantizer(
        library.DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, bits=bits)
    )
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        table = constants.get(node.input[0]) if node.op_type == "Gather" and axis == 0 else None
        is_table = table is not None and table.data_type == onnx.TensorProto.FLOAT and len(table.dims) == 2
        if table is None or not is_table or table.dims[1] % block_size:
            nodes.append(node)
            continue
        if table.name in heads:
            blocks, scales = f"{table.name}_transposed_Q{bits}", f"{table.name}_transposed_scales"
        else:
            packed, scale, _ = quantizer.qbits_block_quant(np.ascontiguousarray(numpy_helper.to_array(table).T))
            blocks, scales = f"{table.name}_Q{bits}", f"{table.name}_scales"
            graph.initializer.extend([numpy_helper.from_array(packed, blocks), numpy_helper.from_array(scale, scales)])
        # MatMulNBits has the blocks of a row apart, GatherBlockQuantized side by side; the bytes are the same.
        shape = f"{table.name}_flat"
        graph.initializer.append(numpy_helper.from_array(np.array([table.dims[0], -1]), shape))
        nodes.append(helper.make_node("Reshape", [blocks, shape], [f"{shape}_blocks"], name=f"{node.name}_blocks"))
        nodes.append(
            helper.make_node(
                "GatherBlockQuantized",
                [f"{shape}_blocks", node.input[1], scales],
                list(node.output),
                name=f"{node.name}_Q{bits}",
                domain=DOMAIN,
                bits=bits,
                block_size=block_size,
                gather_axis=0,
                quantize_axis=1,
            )  # fmt: skip
        )
    del graph.node[:]
    graph.node.extend(nodes)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and constants that nothing reads any more."""
    outputs = {value.name for value in graph.output}
    while True:
        read = outputs | {name for node in graph.node for name in node.input}
        kept = [node for node in graph.node if read.intersection(node.output)]
        if len(kept) == len(graph.node):
            break
        del graph.node[:]
        graph.node.extend(kept)
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def quantize_language_model(source: str, directory: Path, task: Any, quantize: LanguageQuantizeConfig) -> Outcome:
    """Make the shipped model: of the schemes that keep the validation perplexity within the limit, the one that decodes fastest."""
    check_onnx_directory(Path(source))
    processor = task.load_processor(source)
    origin, trials = Path(source), directory / "trials"
    trials.mkdir(parents=True)
    fused = trials / "fused.onnx"
    fused_nodes = fuse_language_model(origin / ONNX_FILE, fused)
    fusion = verify_same_logits(fused, origin / ONNX_FILE, task, processor)
    fp32 = task.score(partial(predict_onnx, origin / ONNX_FILE, name="score fp32"), processor, "validation")
    names = list(SCHEMES) if quantize.quantization == "auto" else [quantize.quantization]
    limit = fp32["perplexity"] * (1 + quantize.max_quality_drop)
    tried: dict[str, dict[str, Any]] = {}
    for name in names:
        trial = trials / name
        trial.mkdir(parents=True)
        copy_beside(origin, trial)
        if name == "fp32":
            made = keep_fp32(fused, trial / ONNX_FILE)
        else:
            made = quantize_weights(fused, trial / ONNX_FILE, SCHEMES[name], quantize.block_size, quantize.reduce_range)
        metrics = task.score(partial(predict_onnx, trial / ONNX_FILE, name=f"score {name}"), processor, "validation")
        tried[name] = {**made, "metrics": metrics, "kept": bool(metrics["perplexity"] <= limit)}
    kept = [name for name in names if tried[name]["kept"]]
    if not kept:
        found = ", ".join(f"{tried[name]['metrics']['perplexity']:.3f} ({name})" for name in names)
        raise lost_too_much(fp32["perplexity"], quantize.max_quality_drop, found)
    decoding = (
        measure_decoding([Decoding(name, trials / name, "onnx") for name in kept], rounds=3) if len(kept) > 1 else {}
    )
    for name, speed in decoding.items():
        tried[name]["tokens_per_second"] = speed["tokens_per_second"]
    chosen = max(kept, key=lambda name: tried[name].get("tokens_per_second", 0.0))
    for path in (trials / chosen).iterdir():
        path.rename(directory / path.name)
    shutil.rmtree(trials)
    verification = {
        "perplexity": tried[chosen]["metrics"]["perplexity"],
        "perplexity_of_source": fp32["perplexity"],
        "allowed": limit,
    }
    details = {
        "fused_nodes": fused_nodes,
        "fused_equals_source": fusion,
        "scheme": chosen,
        "block_size": quantize.block_size,
        "tried": tried,
        "verification": verification,
    }
    parameters = (read_record(origin) or {}).get("parameters")
    return Outcome("onnx", {"validation": tried[chosen]["metrics"]}, parameters, details)


def lost_too_much(fp32: float, allowed: float, found: str) -> VerificationError:
    return VerificationError(
        f"expected quantization to raise the validation perplexity of {fp32:.3f} by at most {allowed:.1%}, found {found}. Allow more with "
        "--max_quality_drop, take smaller blocks with --block_size, or ship fp32 with --quantization fp32."
    )


def verify_language_directory(directory: Path, reference: Path, task: Any, max_quality_drop: float) -> dict[str, Any]:
    """Verify the ONNX model in `directory` against the model directory it was exported from, or the ONNX directory it was quantized from.

    Raises VerificationError where it computes or generates something else, or where its perplexity is too high.
    """
    check_onnx_directory(directory)
    processor = task.load_processor(str(directory))
    if not (reference / ONNX_FILE).is_file():
        model = load_model(reference, task.trust_remote_code)
        return {
            "logits": verify_logits(directory / ONNX_FILE, model, task, processor),
            "generation": verify_generation(directory, model, task, processor),
        }
    before, after = (
        task.score(partial(predict_onnx, folder / ONNX_FILE, name=f"score {folder.name}"), processor, "validation")
        for folder in (reference, directory)
    )
    if not after["perplexity"] <= before["perplexity"] * (1 + max_quality_drop):
        raise lost_too_much(before["perplexity"], max_quality_drop, f"{after['perplexity']:.3f}")
    return {"fp32": before["perplexity"], "metrics": after}
