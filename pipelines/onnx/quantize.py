"""Make an ONNX graph smaller and faster: operators fused, weights and embeddings in int8 or int4; verified, chosen by quality and speed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from pipelines.core.config import QuantizeConfig
from pipelines.core.disk import write_json
from pipelines.core.memory import give_memory_back
from pipelines.core.quality import gate_metric, problem_of, quality_lost
from pipelines.core.records import Outcome, copy_beside, read_record, stage_written_in
from pipelines.core.task import Arrays, Task
from pipelines.onnx.blocks import quantize_blocks
from pipelines.onnx.calibrate import calibration_feeds, quantize_static_int8
from pipelines.onnx.dynamic import quantize_dynamic_int8, quantize_mixed_int8
from pipelines.onnx.export import ONNX_FILE
from pipelines.onnx.file import OLDER, save, size_of
from pipelines.onnx.fuse import fuse_for_onnxruntime
from pipelines.onnx.measure import Subject, measure
from pipelines.onnx.predict import score_beside
from pipelines.onnx.runtimes import OLDER_RUNTIME, oldest_runtime
from pipelines.onnx.verify import verify_quality, verify_same_graph
from pipelines.runtime.infer import version_key

CANDIDATES = ".candidates"  # one folder for each scheme that was tried, until one is chosen
SAME_TIME = 1.05  # times this close to the fastest count as equal
Feeds = Callable[[], list[Arrays]]


def _fp32(source: Path, target: Path, quantize: QuantizeConfig, feeds: Feeds) -> None:
    save(ir.load(source), target)


def _dynamic_int8(source: Path, target: Path, quantize: QuantizeConfig, feeds: Feeds, table_bits: int = 8) -> None:
    quantize_dynamic_int8(source, target, quantize.reduce_range, quantize.block_size, table_bits)


def _mixed_int8(source: Path, target: Path, quantize: QuantizeConfig, feeds: Feeds) -> None:
    quantize_mixed_int8(source, target, feeds(), quantize.reduce_range, quantize.block_size)


def _static_int8(source: Path, target: Path, quantize: QuantizeConfig, feeds: Feeds, calibration: str) -> None:
    quantize_static_int8(source, target, feeds(), calibration, quantize.reduce_range)


def _blocks(
    source: Path, target: Path, quantize: QuantizeConfig, feeds: Feeds, table_bits: int, weight_bits: int
) -> None:
    quantize_blocks(source, target, table_bits, weight_bits, quantize.block_size)


# How a fused graph becomes a quantized one, by the names that tasks, records and --quantization use.
SCHEMES: dict[str, Callable[[Path, Path, QuantizeConfig, Feeds], None]] = {
    "fp32": _fp32,
    "dynamic_int8": _dynamic_int8,
    "int8_int4_embeddings": partial(_dynamic_int8, table_bits=4),
    "mixed_int8": _mixed_int8,
    "static_int8_minmax": partial(_static_int8, calibration="minmax"),
    "static_int8_entropy": partial(_static_int8, calibration="entropy"),
    "static_int8_percentile": partial(_static_int8, calibration="percentile"),
    "int8_blocks": partial(_blocks, table_bits=8, weight_bits=8),
    "int4_blocks": partial(_blocks, table_bits=4, weight_bits=4),
    "int4_blocks_int8_embeddings": partial(_blocks, table_bits=8, weight_bits=4),
}


def schemes_to_try(task: Task, quantize: QuantizeConfig) -> list[str]:
    """The names of SCHEMES that the settings ask for."""
    asked = quantize.quantization or task.default_quantization
    if asked == "auto":
        return list(task.quantization_schemes)
    return [f"static_int8_{quantize.calibration}" if asked == "static_int8" else asked]


def quantize_onnx(
    source: str, directory: Path, task: Task, quantize: QuantizeConfig, scheme: str | None = None, gated: bool = True
) -> Outcome:
    """Make the shipped model: the fp32 file in `source`, fused for ONNX Runtime and quantized; verified on validation examples.

    A `scheme` is the one that is taken, whatever the settings ask for. Not `gated`, it is kept whatever it loses, for comparison.
    """
    task.check_graph(source)
    original, candidates = Path(source) / ONNX_FILE, directory / CANDIDATES
    processor = task.load_processor(source)
    candidates.mkdir()
    fused, says = candidates / "fused.onnx", stage_written_in(directory)
    fusion = _fuse(original, fused, task, processor, says)
    before, score = score_beside(original, task, processor)
    feeds = cache(partial(calibration_feeds, task, processor, quantize.calibration_samples))
    tried = {}
    for name in [scheme] if scheme else schemes_to_try(task, quantize):
        folder = candidates / name
        folder.mkdir()
        copy_beside(Path(source), folder)
        SCHEMES[name](fused, folder / ONNX_FILE, quantize, feeds)
        give_memory_back()
        after = score(folder / ONNX_FILE, name)
        tried[name] = _describe(folder / ONNX_FILE, before, after, task, quantize)
    chosen = choose(tried, candidates, task)
    metrics = tried[chosen]["metrics"]
    name = chosen if len(tried) == 1 else f"{chosen}, the one to ship of {', '.join(tried)}"
    gate = quantize if gated else replace(quantize, max_quality_drop=1.0)
    verification = verify_quality(before, metrics, task, gate, name)
    for path in (candidates / chosen).iterdir():
        path.rename(directory / path.name)
    if entries := task.config_entries(metrics):
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        write_json(directory / "config.json", config | entries)
    older = None
    needed = oldest_runtime(onnx.load(directory / ONNX_FILE, load_external_data=False))
    if chosen != "fp32" and version_key(needed) > version_key(OLDER_RUNTIME):
        quantize_for_older_runtimes(original, directory / OLDER, chosen, quantize, feeds)
        after = score(directory / OLDER, "the form for older runtimes")
        problem = problem_of(before, after, task, quantize)
        older = {"metrics": after, "kept": problem is None}
        if problem is not None:
            print(f"{says}: no file for ONNX Runtime before {needed}, found {problem}", flush=True)
            shutil.rmtree((directory / OLDER).parent)
    shutil.rmtree(candidates)
    details = {
        **fusion,
        "scheme": chosen,
        "source_metrics": before,
        "candidates": tried,
        "older_runtimes": older,
        "verification": verification | {"examples": len(task.features(processor)["validation"])},
    }
    return Outcome("onnx", {"validation": metrics}, (read_record(Path(source)) or {}).get("parameters"), details)


def _fuse(source: Path, target: Path, task: Task, processor: Any, says: str) -> dict[str, Any]:
    """Fuse a graph for ONNX Runtime, and verify that it is the same; what is worth recording of it."""
    nodes = fuse_for_onnxruntime(source, target)
    if nodes["attention"] < nodes["attention_blocks"]:
        found = f"{nodes['attention']} of {nodes['attention_blocks']} attention blocks"
        print(f"{says}: {found} fused; the rest is right but slower", flush=True)
    verification = verify_same_graph(target, source, task, processor)
    give_memory_back()
    return {"fused_nodes": nodes, "fused_equals_source": verification}


def _describe(
    path: Path, before: dict[str, Any], after: dict[str, Any], task: Task, quantize: QuantizeConfig
) -> dict[str, Any]:
    """What is worth recording of a quantized file with the scores `after`."""
    metric, nodes = gate_metric(task, quantize), onnx.load(path, load_external_data=False).graph.node
    return {
        "operators": dict(sorted(Counter(node.op_type for node in nodes).items())),
        "bytes": size_of(path),
        "metrics": after,
        "quality_lost": quality_lost(before[metric], after[metric], task.metrics[metric]),
        "within_limit": problem_of(before, after, task, quantize) is None,
    }


def quantize_for_older_runtimes(
    source: Path, target: Path, scheme: str, quantize: QuantizeConfig, feeds: Feeds
) -> None:
    """Quantize a graph of standard operators as it is, for ONNX Runtime from 1.20 on.

    Embeddings in blocks need 1.23, too, so what would have them is dynamic int8, with the embeddings twice where the head is tied to them.
    """
    target.parent.mkdir()
    if scheme.startswith("static"):
        SCHEMES[scheme](source, target, quantize, feeds)
    elif scheme == "mixed_int8":
        quantize_mixed_int8(source, target, feeds(), quantize.reduce_range, None)
    else:
        quantize_dynamic_int8(source, target, quantize.reduce_range, None)


def choose(tried: dict[str, dict[str, Any]], candidates: Path, task: Task) -> str:
    """The fastest scheme of those that lose little enough; of those that are as fast as it the best; where all lose too much the best.

    Where there is a choice, each candidate's "p50_ms" is noted in `tried`.
    """
    allowed = [name for name in tried if tried[name]["within_limit"]]
    if len(allowed) > 1:
        subjects = [
            Subject(name, candidates / name, "onnx", task.workload(candidates / name, "validation")) for name in allowed
        ]
        for name, timing in measure(subjects, seconds=0.5).items():
            tried[name]["p50_ms"] = timing["latency_ms"]["p50"]
        fastest = min(tried[name]["p50_ms"] for name in allowed)
        allowed = [name for name in allowed if tried[name]["p50_ms"] <= SAME_TIME * fastest]
    return min(allowed or tried, key=lambda name: tried[name]["quality_lost"])
