"""Latency, throughput and memory of stages, each timed in a fresh process, the processes in turn.

Live ONNX Runtime sessions spin and slow each other, and a shared machine is faster in one minute than in the next. So
no two models ever live in one process, and every round times every model once: noise that lasts longer than a round
hits all of them, and ratios are taken within a round. The worker for an ONNX model imports NumPy and ONNX Runtime only,
that for an estimator scikit-learn; a worker for torch is forked from a process that has made the imports, which take seconds, and nothing else.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core.errors import InputError
from pipelines.core.machine import is_busy, load_beside
from pipelines.core.task import Arrays, Collate, Workload
from pipelines.models.predict import batches_by_length, lengths_of
from pipelines.onnx.predict import complete_feed, feed_of
from pipelines.runtime import infer
from pipelines.runtime.infer import available_cores, open_session

# A 95th percentile of fewer calls than this says nothing, so a slow model is called this often, too.
MINIMUM_REPETITIONS = 20
THROUGHPUT_BATCH, THROUGHPUT_EXAMPLES = 16, 128
# Brings what the module of any other model imports.
TORCH_IMPORTS = ["transformers.models.bert.modeling_bert", "pipelines.models.removal"]
STDERR = "stderr.txt"  # of a fork


@dataclass
class Subject:
    """A model directory to time: `format` is "onnx" or "transformers"; or the file of an estimator: "sklearn"."""

    name: str
    path: Path
    format: str
    workload: Workload
    trust_remote_code: bool = False


def measure(
    subjects: list[Subject], *, rounds: int = 3, threads: int | None = None, seconds: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Let the worker of every subject's workload time it once a round, for about `seconds`; return one result per name.

    A result has `latency_ms` (p50, p95, and the batch size and shape of one call), `peak_memory_bytes` (the largest resident set of the
    whole worker, Python and the runtime included), `threads`, the `rounds`, how many cores others used meanwhile and just before
    (`load`), whether that left too few (`busy`), and whatever else the worker timed, such as `samples_per_second`. All but memory are
    medians over the rounds. Raises InputError for a subject whose worker fails.
    """
    from tqdm import tqdm

    threads = available_cores() if threads is None else threads
    _, before = load_beside(partial(time.sleep, min(1, seconds)))
    if is_busy(before, threads):
        print(
            f"benchmark: the machine is busy, others use {before:.1f} cores; the times will say little", file=sys.stderr
        )
    measured: dict[str, list[dict[str, float]]] = {subject.name: [] for subject in subjects}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        specs = [write_spec(Path(folder) / str(i), subject, threads, seconds) for i, subject in enumerate(subjects)]
        with tqdm(total=rounds * len(subjects), desc="benchmark", unit="run") as progress:
            for _ in range(rounds):
                for subject, spec in zip(subjects, specs, strict=True):
                    progress.set_postfix_str(subject.name)
                    in_torch = subject.format == "transformers"
                    work = partial(run_worker, subject.workload.module, spec, subject.name, fork=in_torch)
                    result, load = load_beside(work)
                    measured[subject.name].append(result | {"load": load})
                    progress.update()
    return {subject.name: _summarize(subject.workload, measured[subject.name], threads, before) for subject in subjects}


def paired_ratios(results: dict[str, dict[str, Any]], slow: str, fast: str) -> dict[str, float]:
    """How many times faster `fast` is than `slow`: the ratio of their p50 per round: median, least, largest."""
    pairs = zip(results[slow]["rounds"], results[fast]["rounds"], strict=True)
    ratios = [slow_round["p50"] / fast_round["p50"] for slow_round, fast_round in pairs]
    return {"median": float(np.median(ratios)), "low": min(ratios), "high": max(ratios)}


def carries(ratio: dict[str, float]) -> bool:
    """Whether the rounds agree on a ratio within a factor of two; else something beside the models decided their times."""
    return ratio["high"] <= 2 * ratio["low"]


def timing_feeds(
    features: Any, collate: Collate, batch_size: int = THROUGHPUT_BATCH, alone: Sequence[float] | None = None
) -> tuple[Arrays, list[Arrays]]:
    """The longest example by itself, for the latency, by the lengths `alone` where they are given (see Task.lengths_alone), and a fixed sample
    in batches of like length, for the throughput."""
    longest, batches = _timed_examples(lengths_of(features), batch_size, alone)
    return feed_of(features, longest, collate), [feed_of(features, batch, collate) for batch in batches]


def estimator_workload(inputs: Any, alone: Sequence[float] | None = None) -> Workload:
    """The same for an estimator of scikit-learn, whose time on texts includes their features: it reads them as they are."""
    longest, batches = _timed_examples([len(one) for one in inputs], alone=alone)
    single, *several = ({"inputs": np.asarray([inputs[index] for index in batch])} for batch in (longest, *batches))
    return encoder_workload(single, several)


def _timed_examples(
    lengths: Sequence[int], batch_size: int = THROUGHPUT_BATCH, alone: Sequence[float] | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    sample = np.sort(np.random.default_rng(0).permutation(len(lengths))[:THROUGHPUT_EXAMPLES])
    batches = batches_by_length(np.asarray(lengths)[sample], batch_size)
    return np.array([np.argmax(lengths if alone is None else alone)]), [sample[batch] for batch in batches]


def encoder_workload(single: Arrays, batches: list[Arrays], larger: dict[int, list[Arrays]] | None = None) -> Workload:
    """Calls of a model as a function of one feed: `single` for the latency, `batches` for the throughput, and `larger` ones by their size for
    `samples_per_second_128` and the like."""
    groups = {"": batches} | {f"_{size}": each for size, each in (larger or {}).items()}
    feeds = {f"batch{name}_{index}": feed for name, each in groups.items() for index, feed in enumerate(each)}
    settings = {"batches": len(batches), "larger": {size: len(each) for size, each in (larger or {}).items()}}
    return Workload(__name__, settings, {"single": single, **feeds}, list(next(iter(single.values())).shape))


def write_spec(folder: Path, subject: Subject, threads: int, seconds: float) -> Path:
    """Write the feeds as .npz files and the worker's orders as JSON beside them."""
    folder.mkdir()
    for name, feed in subject.workload.feeds.items():
        np.savez(folder / f"{name}.npz", allow_pickle=False, **feed)
    spec = {
        "format": subject.format,
        # The worker runs in the temporary folder, where a relative path would lead nowhere.
        "path": str(subject.path.resolve()),
        "threads": threads,
        "seconds": seconds,
        "trust_remote_code": subject.trust_remote_code,
        **subject.workload.settings,
    }
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder / "spec.json"


def run_worker(module: str, spec: Path, name: str, *, fork: bool, python: str = sys.executable) -> dict[str, float]:
    """The result.json that `python -m module` writes beside `spec`, on as many threads as the spec says.

    With `fork` it is not a new process but, where that is safe, a fork of one that has torch and transformers in it.
    """
    orders = json.loads(spec.read_text(encoding="utf-8"))
    if fork and sys.platform == "linux":
        status, errors = _run_fork(module, spec)
    else:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # `-m` puts the working directory first on the module path: in a folder of our own nothing can shadow a library.
        worker = subprocess.run(
            [python, "-m", module, spec.name],
            cwd=spec.parent,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(orders["threads"])},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        status, errors = worker.returncode, worker.stderr
    if status != 0:
        error, _, message = errors.strip().rpartition("\n")[2].partition(": ")
        if error == f"{InputError.__module__}.InputError":
            raise InputError(message)
        tail = "\n".join(errors.strip().splitlines()[-15:])
        raise InputError(
            f"expected {orders['path']} to run, found that the process timing {name} ended with status {status} (-9 usually means that "
            f"memory ran out):\n{tail}\nVerify the stage, or benchmark it without the others."
        )
    return json.loads((spec.parent / "result.json").read_text(encoding="utf-8"))


def _run_fork(module: str, spec: Path) -> tuple[int, str]:
    """The exit status of a fork that does what `spec` says, and what it wrote to standard error."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(TORCH_IMPORTS)
    worker = context.Process(target=_work_in_fork, args=(module, str(spec)))
    worker.start()
    worker.join()
    assert worker.exitcode is not None
    said = spec.parent / STDERR
    return worker.exitcode, said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""


def _work_in_fork(module: str, spec: str) -> None:
    file = Path(spec)
    for stream, target in ((1, os.devnull), (2, file.parent / STDERR)):
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT, 0o600), stream)
    importlib.import_module(module).work(file)


def _summarize(workload: Workload, rounds: list[dict[str, float]], threads: int, before: float) -> dict[str, Any]:
    # A short round has too few calls for a p95.
    known = [key for key in rounds[0] if key != "repetitions" and all(key in one for one in rounds)]
    medians = {key: float(np.median([one[key] for one in rounds])) for key in known}
    latency = {"p50": medians.pop("p50"), "p95": medians.pop("p95", None)}
    load = medians.pop("load")
    return {
        "load": {"before": round(before, 2), "during": round(load, 2)},
        "busy": is_busy(load, threads),
        "latency_ms": latency | {"batch_size": workload.shape[0], "shape": workload.shape},
        **medians,
        "peak_memory_bytes": int(max(one["peak_memory_bytes"] for one in rounds)),
        "threads": threads,
        "rounds": rounds,
    }


def work(spec_file: Path) -> None:
    """The worker of encoders and estimators: load one model, time it, write result.json beside the spec."""
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    folder = spec_file.parent
    # The conversion of the feeds is not part of the model's time, so `prepare` is called before the clock starts.
    prepare: Callable[[Arrays], Any]
    run: Callable[[Any], Any]
    if spec["format"] == "onnx":
        session = open_session(Path(spec["path"]) / "model.onnx", spec["threads"])
        prepare, run = partial(complete_feed, session), partial(session.run, None)
    elif spec["format"] == "sklearn":
        prepare, run = _load_estimator(Path(spec["path"]))
    else:
        prepare, run = _load_torch(Path(spec["path"]), spec["threads"], spec["trust_remote_code"])
    result = time_calls(run, prepare(_read_feed(folder / "single.npz")), spec["seconds"])
    for name, count in {"": spec["batches"], **{f"_{size}": count for size, count in spec["larger"].items()}}.items():
        feeds = [_read_feed(folder / f"batch{name}_{index}.npz") for index in range(count)]
        sizes = [len(next(iter(feed.values()))) for feed in feeds]
        prepared = [prepare(feed) for feed in feeds]
        result[f"samples_per_second{name}"] = time_batches(run, prepared, sizes, spec["seconds"])
    result["peak_memory_bytes"] = peak_memory_bytes()
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _read_feed(file: Path) -> Arrays:
    with np.load(file) as arrays:
        return dict(arrays)


def _load_estimator(path: Path) -> tuple[Callable[[Arrays], Any], Callable[[Any], Any]]:
    import joblib

    estimator = joblib.load(path)
    return lambda feed: feed, lambda feed: estimator.predict(feed["inputs"])


def _load_torch(
    path: Path, threads: int, trust_remote_code: bool
) -> tuple[Callable[[Arrays], Any], Callable[[Any], Any]]:
    import torch

    from pipelines.models.removal import load_model

    torch.set_num_threads(threads)
    model = load_model(path, trust_remote_code).eval()

    def run(feed: dict[str, torch.Tensor]) -> Any:
        with torch.inference_mode():
            return model(**feed)

    return lambda feed: {name: torch.from_numpy(value) for name, value in feed.items()}, run


def percentiles(milliseconds: np.ndarray) -> dict[str, float]:
    """The median, and the 95th percentile of numbers that are enough for one."""
    found = {"p50": float(np.median(milliseconds))}
    if len(milliseconds) >= MINIMUM_REPETITIONS:
        found["p95"] = float(np.percentile(milliseconds, 95))
    return found


def time_calls(
    run: Callable[[Any], Any], feed: Any, seconds: float, minimum: int = MINIMUM_REPETITIONS
) -> dict[str, float]:
    """Percentiles of `minimum` calls or more in milliseconds, after a warm-up of a fifth of the time."""
    infer.time_calls(lambda _: run(feed), seconds / 5, min(3, minimum))
    times = 1000 * np.array(infer.time_calls(lambda _: run(feed), seconds, minimum))
    return percentiles(times) | {"repetitions": len(times)}


def time_batches(run: Callable[[Any], Any], feeds: list[Any], sizes: list[int], seconds: float) -> float:
    """Samples per second over whole passes of `feeds`: part of a pass would be another mix of lengths."""
    # The largest feed makes the runtime allocate all the memory it will need.
    run(max(feeds, key=lambda feed: sum(math.prod(value.shape) for value in feed.values())))
    passes, start = 0, time.perf_counter()
    while passes == 0 or time.perf_counter() - start < seconds:
        for feed in feeds:
            run(feed)
        passes += 1
    return passes * sum(sizes) / (time.perf_counter() - start)


def peak_memory_bytes() -> int:
    """The largest resident set this process has had, in bytes.

    Linux's `ru_maxrss` survives exec, so in a fresh child it starts at the size of the parent that spawned it; the
    kernel's VmHWM belongs to the new program alone.
    """
    if sys.platform == "linux":
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    work(Path(sys.argv[1]))
