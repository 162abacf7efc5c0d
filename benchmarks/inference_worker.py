"""One row of `inference.py` in a fresh process of the environment it belongs to: `python -m benchmarks.inference_worker SPEC`.

The spec says what to load ("format", "path", "threads") and what to do with its feeds ("job"): time them, predict them, or profile them.
Nothing is imported that the row does not need: other libraries' threads would be in its way.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core.task import Arrays
from pipelines.onnx.measure import peak_memory_bytes, time_batches, time_calls
from pipelines.runtime.infer import open_session

# Fewer than the report's: the largest batches take a second a call, and rounds tell the spread.
MINIMUM_REPETITIONS = 3
Loaded = tuple[Callable[[Arrays], Any], Callable[[Any], np.ndarray]]


def write_feeds(file: Path, feeds: list[Arrays]) -> None:
    """Several feeds in one .npz file."""
    arrays = {f"{index}/{name}": array for index, feed in enumerate(feeds) for name, array in feed.items()}
    np.savez(file, allow_pickle=False, **arrays)


def read_feeds(file: Path) -> list[Arrays]:
    feeds: dict[int, Arrays] = {}
    with np.load(file) as arrays:
        for name in arrays.files:
            index, _, key = name.partition("/")
            feeds.setdefault(int(index), {})[key] = arrays[name]
    return [feeds[index] for index in sorted(feeds)]


def load_onnx(path: Path, threads: int) -> Loaded:
    session = open_session(path / "model.onnx", threads)
    names = [node.name for node in session.get_inputs()]
    return lambda feed: {name: feed[name] for name in names}, lambda feed: session.run(["logits"], feed)[0]


def load_torch(path: Path, threads: int, compiled: bool = False) -> Loaded:
    """The model as transformers opens it: zeros of pruning stay zeros."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    config = transformers.AutoConfig.from_pretrained(path)
    model = getattr(transformers, config.architectures[0]).from_pretrained(path).eval()
    call = torch.compile(model) if compiled else model

    def run(feed: dict[str, Any]) -> np.ndarray:
        with torch.inference_mode():
            return call(**feed).logits.numpy()

    return lambda feed: {name: torch.from_numpy(array) for name, array in feed.items()}, run


def load_openvino(path: Path, threads: int, precision: str | None = None) -> Loaded:
    """As it comes, which is bfloat16 arithmetic where the processor has it, unless `precision` says otherwise."""
    import openvino

    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        hints["INFERENCE_PRECISION_HINT"] = precision
    model = openvino.Core().compile_model(path / "model.xml", "CPU", hints)
    request = model.create_infer_request()
    names = {name: value for value in model.inputs for name in value.names}
    output = model.output("logits")

    def run(feed: Arrays) -> np.ndarray:
        return request.infer(feed, share_inputs=True)[output]

    return lambda feed: {name: array for name, array in feed.items() if name in names}, run


def load(spec: dict[str, Any]) -> Loaded:
    path, threads = Path(spec["path"]), spec["threads"]
    if spec["format"] == "onnx":
        return load_onnx(path, threads)
    if spec["format"].startswith("openvino"):
        return load_openvino(path, threads, "f32" if spec["format"] == "openvino_fp32" else None)
    return load_torch(path, threads, compiled=spec["format"] == "torch_compile")


def profile(path: Path, threads: int, feeds: list[Arrays], folder: Path, repetitions: int = 20) -> dict[str, Any]:
    """Milliseconds a call that each type of operator takes, by ONNX Runtime's own profiler."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    for _ in range(repetitions):
        for feed in feeds:
            session.run(["logits"], {name: feed[name] for name in names})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: Counter[str] = Counter()
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    runs = sorted(event["dur"] for event in events if event["name"] == "model_run")
    # The first calls allocate; their nodes are few among many.
    calls = repetitions * len(feeds)
    return {
        "operators": {name: microseconds / calls / 1000 for name, microseconds in spent.most_common()},
        "call": sum(runs) / len(runs) / 1000,
    }


def work(spec_file: Path) -> None:
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    folder = spec_file.parent
    feeds = read_feeds(Path(spec["feeds"]))
    if spec["job"] == "profile":
        result = profile(Path(spec["path"]), spec["threads"], feeds, folder)
    else:
        prepare, run = load(spec)
        prepared = [prepare(feed) for feed in feeds]
        if spec["job"] == "predict":
            np.save(folder / "logits.npy", np.concatenate([run(feed) for feed in prepared]))
            result = {}
        elif len(prepared) == 1:
            result = time_calls(run, prepared[0], spec["seconds"], MINIMUM_REPETITIONS)
        else:
            for feed in prepared:
                run(feed)
            result = {"p50": 1000 / time_batches(run, prepared, [1] * len(prepared), spec["seconds"])}
        result["peak_memory_bytes"] = peak_memory_bytes()
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
