"""Make an ONNX graph smaller and faster: operators fused; weights and embeddings in int8, activations quantized as they come."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from pipelines.core.config import QuantizeConfig
from pipelines.core.memory import give_memory_back
from pipelines.core.run import Outcome, copy_beside, read_record
from pipelines.onnx.export import ONNX_FILE
from pipelines.onnx.file import drop_weights, save
from pipelines.onnx.fuse import fuse_for_onnxruntime
from pipelines.onnx.measure import Subject, measure
from pipelines.onnx.predict import predict_onnx
from pipelines.onnx.verify import verify_quality, verify_same_graph
from pipelines.report.results import timing_feeds

# Products with weights, and embeddings (Gather), whose tables stay bytes: only the rows that are read are dequantized.
# Not Attention, which would become an invalid QAttention, nor Conv, whose ConvInteger is slower than the float kernel.
_QUANTIZED_TYPES = ["MatMul", "Gather"]
CANDIDATES = ".candidates"  # one folder for each scheme that was tried, until one is chosen


def quantize_onnx(source: str, directory: Path, task: Any, quantize: QuantizeConfig) -> Outcome:
    """Make the shipped model: the fp32 file in `source` fused for ONNX Runtime, then int8 where asked for; verified on validation examples."""
    task.check_graph(source)
    original, fused = Path(source) / ONNX_FILE, directory / "fused.onnx"
    copy_beside(Path(source), directory)
    processor = task.load_processor(source)
    fused_nodes = fuse_for_onnxruntime(original, fused)
    layers = getattr(task.load_config(source), "num_hidden_layers", None)
    if layers is not None and fused_nodes["attention"] < layers:
        print(
            f"quantized: {fused_nodes['attention']} of {layers} attention blocks fused; the rest is right but slower",
            flush=True,
        )
    fusion = verify_same_graph(fused, original, task, processor)
    give_memory_back()
    quantized = make_candidates(fused, directory, task, processor, quantize)
    fused.unlink()
    _data_beside(fused).unlink(missing_ok=True)
    give_memory_back()
    chosen, measured = choose(quantized, directory, original, task, processor, quantize.max_quality_drop)
    for path in (directory / CANDIDATES / chosen).iterdir():
        path.rename(directory / path.name)
    shutil.rmtree(directory / CANDIDATES)
    verification = verify_quality(directory / ONNX_FILE, original, task, processor, quantize.max_quality_drop)
    metrics = {"validation": verification.pop("metrics")}
    details = {
        "fused_nodes": fused_nodes,
        "fused_equals_source": fusion,
        "scheme": chosen,
        "quantized": quantized[chosen],
        "candidates": measured,
        "verification": verification,
    }
    return Outcome("onnx", metrics, (read_record(Path(source)) or {}).get("parameters"), details)


def make_candidates(
    fused: Path, directory: Path, task: Any, processor: Any, quantize: QuantizeConfig
) -> dict[str, dict[str, Any]]:
    """Write a quantized model for each scheme that the flags ask for, in a folder of its own; return what was done, by scheme."""
    from pipelines.onnx.calibrate import CALIBRATIONS, calibration_feeds, quantize_static_int8

    schemes = {
        "dynamic_int8": ["dynamic_int8"],
        "static_int8": [quantize.calibration],
        "auto": ["dynamic_int8", *CALIBRATIONS],
        "fp32": ["fp32"],
    }
    feeds = None
    made = {}
    for scheme in schemes[quantize.quantization]:
        name = f"static_int8_{scheme}" if scheme in CALIBRATIONS else scheme
        target = directory / CANDIDATES / name / ONNX_FILE
        target.parent.mkdir(parents=True)
        if scheme == "dynamic_int8":
            made[name] = quantize_dynamic_int8(fused, target, quantize.reduce_range)
        elif scheme == "fp32":
            made[name] = keep_fp32(fused, target)
        else:
            feeds = feeds or calibration_feeds(task, processor, quantize.calibration_samples)
            made[name] = quantize_static_int8(fused, target, feeds, scheme, quantize.reduce_range)
    return made


def choose(
    schemes: Iterable[str], directory: Path, original: Path, task: Any, processor: Any, max_quality_drop: float
) -> tuple[str, dict[str, dict[str, float]]]:
    """The fastest scheme of those that lose little enough on the validation split, and what was measured of each.

    Times within a twentieth of the fastest are the same, and then the higher score wins; where all lose too much, too.
    """
    names = list(schemes)
    if len(names) == 1:
        return names[0], {}
    features, collate = task.features(processor)["validation"], task.collate(processor)
    sign = 1 if task.greater_is_better else -1

    def score(path: Path, name: str) -> float:
        logits = predict_onnx(path, features, collate, name=f"score {name}")
        return float(task.metrics(logits, features["labels"])[task.primary_metric])

    before = score(original, "fp32")
    single, batches = timing_feeds(features, collate)
    folders = {name: directory / CANDIDATES / name for name in names}
    timings = measure(
        [Subject(name, folder, "onnx", single, batches[:1]) for name, folder in folders.items()], seconds=0.5
    )
    measured = {}
    for name, folder in folders.items():
        after = score(folder / ONNX_FILE, name)
        measured[name] = {
            task.primary_metric: after,
            "drop": (before - after) * sign,
            "p50_ms": timings[name]["latency_ms"]["p50"],
            "bytes": (folder / ONNX_FILE).stat().st_size,
        }
    allowed = [name for name in names if measured[name]["drop"] <= max_quality_drop]
    if allowed:
        fastest = min(measured[name]["p50_ms"] for name in allowed)
        allowed = [name for name in allowed if measured[name]["p50_ms"] <= 1.05 * fastest]
    return min(allowed or names, key=lambda name: measured[name]["drop"]), measured


def quantize_dynamic_int8(source: Path, target: Path, reduce_range: bool) -> dict[str, Any]:
    """Quantize the products (a scale for each output column) and embeddings of `source` into the one file `target`.

    `reduce_range` keeps the weights of products within 7 bits, as x86 processors without VNNI need: their kernels add
    pairs of 8-bit products in 16 bits, which saturate. Returns "quantized" (counts: "MatMul", with Gemm among them, and
    "Gather"), "operators_before" and "operators_after" (counts by type), "bytes_before" and "bytes_after". On loading,
    ONNX Runtime merges each MatMulInteger with what converts around it.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".quantize-") as scratch:
        prepared = Path(scratch) / "model.onnx"
        operators_before = _prepare(source, prepared)
        quantize_dynamic(
            prepared,
            target,
            op_types_to_quantize=_QUANTIZED_TYPES,
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    graph = onnx.load(target).graph
    operators_after = Counter(node.op_type for node in graph.node)
    tables = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    }
    embeddings = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]
    return {
        "quantized": {"MatMul": operators_after["MatMulInteger"], "Gather": len(embeddings)},
        "operators_before": dict(operators_before),
        "operators_after": dict(operators_after),
        "bytes_before": source.stat().st_size,
        "bytes_after": target.stat().st_size,
    }


def keep_fp32(source: Path, target: Path) -> dict[str, Any]:
    """Write the fused graph `source` as it is to `target`; return what quantize_dynamic_int8() returns, nothing of it quantized."""
    model = ir.load(source)
    save(model, target)
    operators = dict(Counter(node.op_type for node in model.graph))
    drop_weights(model)
    return {
        "quantized": {},
        "operators_before": operators,
        "operators_after": operators,
        "bytes_before": source.stat().st_size,
        "bytes_after": target.stat().st_size,
    }


def _data_beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _prepare(source: Path, prepared: Path) -> Counter[str]:
    """Copy the model without its inner shapes: the quantizer transposes weights and then finds their shapes wrong."""
    model = onnx.load(source)
    del model.graph.value_info[:]
    add_pre_process_metadata(model)
    # The weights of a model above 2 GB are beside it, and so must those of the copy be.
    onnx.save(model, prepared, save_as_external_data=_data_beside(source).exists())
    return Counter(node.op_type for node in model.graph.node)
