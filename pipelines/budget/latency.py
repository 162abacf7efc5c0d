"""Milliseconds of shapes that do not exist yet: a few untrained graphs are timed, and a line is laid through them.

A call takes what the embeddings and the head take, and for each layer what it takes anyhow, and what each head and each neuron takes.
Weights change nothing in this, so the graphs need no training.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.budget.shapes import Forecast, Shape, cut_to, grid, untrained
from pipelines.core.config import QuantizeConfig, ReportConfig
from pipelines.core.disk import digest, write_json
from pipelines.core.errors import InputError
from pipelines.core.records import Outcome
from pipelines.core.sources import resolve
from pipelines.core.task import Task
from pipelines.data.remembered import remembered
from pipelines.onnx.calibrate import calibration_feeds
from pipelines.onnx.export import ONNX_FILE, export_graph
from pipelines.onnx.fuse import fuse_for_onnxruntime
from pipelines.onnx.quantize import SCHEMES
from pipelines.report.report import describe_environment
from pipelines.report.results import time_stages
from pipelines.runtime import generate, infer

ORDERS = "shapes.json"  # what infer.py --profile reads, and gives back beside the times
# What of a config changes no time: names, and what training alone reads.
NOT_TIMED = ("id2label", "label2id", "architectures", "dtype", "transformers_version", "_name_or_path", "num_labels")


def graphs_of(config: Any, schemes: Sequence[str]) -> list[Shape]:
    """The shapes whose graphs are timed: at most five of each scheme, in which layers, heads and neurons change apart."""
    shapes = grid(config, schemes[:1])
    depths = sorted({one.layers for one in shapes if one.layers <= 4} or {one.layers for one in shapes})
    heads, neurons = min(one.heads for one in shapes), min(one.neurons for one in shapes)
    few, middle, many = depths[0], depths[len(depths) // 2], depths[-1]
    wanted = [(few, 1.0, 1.0), (many, 1.0, 1.0), (middle, heads, 1.0), (middle, 1.0, neurons), (many, heads, neurons)]
    return [Shape(*one, scheme) for scheme in schemes for one in dict.fromkeys(wanted)]


def identity(source: str, shapes: Sequence[Shape], task: Task, quantize: QuantizeConfig) -> str:
    """What the times depend on besides the machine: the architecture, its sizes, the shape of the inputs, and how it is quantized."""
    config = {name: value for name, value in task.load_config(source).to_dict().items() if name not in NOT_TIMED}
    workload = task.workload(Path(resolve(source)), "validation")
    settings = [workload.settings, workload.shape, quantize.block_size, quantize.reduce_range]
    return digest(json.loads(json.dumps([config, settings, [asdict(one) for one in shapes]], default=str)))


def write_graphs(source: str, directory: Path, task: Task, shapes: list[Shape], quantize: QuantizeConfig) -> Outcome:
    """An untrained graph of each shape of the teacher in `source`, in a folder of its name; with what a device needs to time them."""
    wholes: dict[tuple[int, str | None], Path] = {}
    fused: dict[tuple[int, float, float, str | None], Path] = {}
    processors = {one: task.load_processor(one or source) for one in {shape.student for shape in shapes}}
    feeds = {
        one: cache(partial(calibration_feeds, task, processor, quantize.calibration_samples))
        for one, processor in processors.items()
    }
    with tempfile.TemporaryDirectory(dir=directory, prefix=".untrained-") as scratch:
        for shape in shapes:
            units = (shape.layers, shape.heads, shape.neurons, shape.student)
            own = shape.student or source
            if units not in fused:
                folder = wholes.setdefault((shape.layers, shape.student), Path(scratch) / f"whole_{len(wholes)}")
                torch.manual_seed(0)
                model = cut_to(untrained(own, shape.layers, task, folder), shape)
                # Biases of zero are left out of a graph, and so would their time be.
                for parameter in model.parameters():
                    torch.nn.init.normal_(parameter, std=0.02)
                plain, fused[units] = (Path(scratch) / f"{len(fused)}{name}.onnx" for name in ("", "-fused"))
                export_graph(task.graph(model, processors[shape.student]), plain)
                fuse_for_onnxruntime(plain, fused[units])
            target = directory / shape.name
            shutil.copytree(wholes[shape.layers, shape.student], target)
            if shape.student is not None and "single" in (feed := task.workload(target, "validation").feeds):
                np.savez(target / "feed.npz", allow_pickle=False, **feed["single"])  # its tokenizer may be another
            SCHEMES[shape.scheme](fused[units], target / ONNX_FILE, quantize, feeds[shape.student])
    workload = task.workload(directory / shapes[0].name, "validation")
    if "single" in workload.feeds:
        np.savez(directory / "feed.npz", allow_pickle=False, **workload.feeds["single"])
    modules = [infer] if workload.feeds else [infer, generate]
    for module in modules:
        shutil.copy2(str(module.__file__), directory)
    orders = {
        "of": identity(source, shapes, task, quantize),
        "input": workload.shape,
        **workload.settings,
        "shapes": {shape.name: asdict(shape) for shape in shapes},
    }
    write_json(directory / ORDERS, orders)
    return Outcome("untrained graphs", details={"input": workload.shape})


def time_graphs(
    source: str, directory: Path, task: Task, shapes: list[Shape], quantize: QuantizeConfig, report: ReportConfig
) -> Outcome:
    """The median milliseconds of an untrained graph of each shape on this machine, from the cache where they were timed before."""

    brief = replace(report, benchmark_rounds=3, benchmark_seconds=0.3)

    def timed() -> np.ndarray:
        return np.array(_medians([], source, task, shapes, quantize, brief))

    machine = describe_environment(0)
    key = ["latency", identity(source, shapes, task, quantize), report.benchmark_threads]
    return Outcome("latencies", details={"ms": remembered(machine, key, timed).tolist(), "machine": machine})


def time_rows(
    source: str,
    directory: Path,
    task: Task,
    directories: list[Path],
    shapes: list[Shape],
    quantize: QuantizeConfig,
    report: ReportConfig,
) -> Outcome:
    """The median milliseconds of directories, and beside them of untrained graphs that were timed before the search (`graphs`): a machine is
    not as fast in one hour as in another."""
    ms = _medians(directories, source, task, shapes, quantize, report)
    return Outcome("timings", details={"ms": ms[: len(directories)], "graphs": ms[len(directories) :]})


def _medians(
    directories: list[Path],
    source: str,
    task: Task,
    shapes: list[Shape],
    quantize: QuantizeConfig,
    report: ReportConfig,
) -> list[float]:
    """The median milliseconds of directories, then of an untrained graph of each shape of the teacher in `source`: timed together, on examples
    of the validation split."""
    with tempfile.TemporaryDirectory() as folder:
        if shapes:
            write_graphs(source, Path(folder), task, shapes, quantize)
        places = [*directories, *(Path(folder) / shape.name for shape in shapes)]
        named = {f"{place} {'/'.join(path.parts[-3:])}": path for place, path in enumerate(places)}
        timings = time_stages(named, task, "validation", report)
    return [timings[name]["latency_ms"]["p50"] for name in named]


def read_profile(path: str, of: str) -> tuple[list[float], dict[str, Any]]:
    """The milliseconds of the graphs in the order of their shapes, and the machine, from what infer.py --profile wrote on a device."""
    try:
        profile = json.loads(Path(path).read_text(encoding="utf-8"))
        times, known = [profile["p50_ms"][name] for name in profile["orders"]["shapes"]], profile["orders"]["of"]
        machine = {name: profile[name] for name in ("cpu", "threads", "onnxruntime", "slowed")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"expected the times of a device in {path} (--on), found: {error}. Write the graphs with --forecast, copy the folder 'untrained' "
            "to the device, and there run: python untrained/infer.py --profile untrained > pi.json"
        ) from error
    if known != of:
        raise InputError(
            f"expected the times of this teacher, data, --max_length and --quantization in {path} (--on), found those of others. Write the "
            "graphs again with --forecast and the same flags, and time them on the device."
        )
    return times, machine


def solve(rows: Sequence[Forecast], ms: Sequence[float]) -> Callable[[Forecast], float]:
    """The milliseconds of any shape, from those of a few: a part for the rest, each layer, head and neuron, none below 0, whose sums come
    closest to `ms` by their shares.

    A classifier that reads the first token alone computes little in its last layer, so the layers but the last may fit better.
    """
    from scipy.optimize import nnls

    times, fits = np.asarray(ms), []
    for cheap in (0, 1):
        terms = np.array([_terms(row, cheap) for row in rows])
        scale = np.maximum(terms.max(axis=0), 1.0)  # neurons are thousands
        found, residual = nnls(terms / scale / times[:, None], np.ones(len(times)))
        fits.append((residual, cheap, found / scale))
    _, cheap, parts = min(fits, key=lambda fit: fit[:2])
    return lambda one: float(np.dot(_terms(one, cheap), parts))


def _terms(one: Forecast, cheap: int) -> list[float]:
    # Another vocabulary is another time only where a head gives a number for each token of it.
    whole = one.layers - cheap
    return [1.0, whole, one.heads * whole / one.layers, one.neurons * whole / one.layers]
