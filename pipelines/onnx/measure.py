"""Latency, throughput and memory of stages, each timed in a fresh process, the processes in turn.

Live ONNX Runtime sessions spin and slow each other, and a shared machine is faster in one minute than in the next. So
no two models ever live in one process, and every round times every model once: noise that lasts longer than a round
hits all of them, and ratios are taken within a round. The worker for an ONNX model imports NumPy and ONNX Runtime only;
a worker for torch is forked from a process that has made the imports, which take seconds, and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core.errors import InputError
from pipelines.onnx.predict import open_session
from pipelines.runtime.infer import available_cores

# A percentile of fewer calls than this says nothing, however slow the model is.
MINIMUM_REPETITIONS = 10
# The argument that makes a worker fork others, and the file of a fork's standard error.
FORKS, STDERR = "--forks", "stderr.txt"

Feed = dict[str, np.ndarray]


@dataclass
class Subject:
    """A stage to time: `single` is a feed of batch size 1, `batches` have the test split's own mix of lengths."""

    name: str
    path: Path
    format: str
    single: Feed
    batches: list[Feed]
    trust_remote_code: bool = False


def measure(
    subjects: list[Subject], *, rounds: int = 3, threads: int | None = None, seconds: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Time every subject once a round and return one result per name.

    Each worker repeats the single feed for `seconds` and at least 10 times, then goes through all batches, whole passes
    only, until another `seconds` are over. A result has `latency_ms` (p50 and p95: medians over the rounds, in
    milliseconds per call of batch 1; with batch size and shape), `samples_per_second` (median over the rounds),
    `peak_memory_bytes` (the largest resident set of the whole worker, Python and the runtime included), `threads` and
    the `rounds` they come from. Raises InputError for a subject that cannot be timed as given or whose worker fails.
    """
    from tqdm import tqdm

    _check_subjects(subjects)
    threads = available_cores() if threads is None else threads
    measured: dict[str, list[dict[str, float]]] = {subject.name: [] for subject in subjects}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        specs = [_write_spec(Path(folder) / str(i), subject, threads, seconds) for i, subject in enumerate(subjects)]
        progress = tqdm(total=rounds * len(subjects), desc="benchmark", unit="run")
        with (
            progress,
            torch_workers(
                "pipelines.onnx.measure", any(s.format == "transformers" for s in subjects), threads
            ) as forks,
        ):
            for _ in range(rounds):
                for subject, spec in zip(subjects, specs, strict=True):
                    progress.set_postfix_str(subject.name)
                    in_torch = subject.format == "transformers"
                    result = run_worker(
                        "pipelines.onnx.measure", spec, subject.name, "run on feeds of its own tokenizer",
                        forks=forks if in_torch else None,
                    )  # fmt: skip
                    measured[subject.name].append(result)
                    progress.update()
    return {subject.name: _summarize(subject, measured[subject.name], threads) for subject in subjects}


def paired_ratios(results: dict[str, dict[str, Any]], slow: str, fast: str) -> dict[str, float]:
    """How many times faster `fast` answers than `slow`: the ratio of their p50 per round: median, least, largest."""
    pairs = zip(results[slow]["rounds"], results[fast]["rounds"], strict=True)
    ratios = [slow_round["p50"] / fast_round["p50"] for slow_round, fast_round in pairs]
    return {"median": float(np.median(ratios)), "low": min(ratios), "high": max(ratios)}


def _check_subjects(subjects: list[Subject]) -> None:
    names = [subject.name for subject in subjects]
    if not names or len(set(names)) < len(names):
        raise InputError(f"expected one or more subjects with different names, found {names}. Name every stage once.")
    for subject in subjects:
        needed = {"onnx": "model.onnx", "transformers": "config.json"}.get(subject.format)
        if needed is None:
            raise InputError(
                f"expected the format of {subject.name} to be 'transformers' or 'onnx', found {subject.format!r}. "
                "Export the model first if it is something else."
            )
        if not (subject.path / needed).is_file():
            raise InputError(
                f"expected {needed} in {subject.path}, found none. Run the stage {subject.name} again, or give the "
                "directory that holds its model."
            )
        if not subject.batches or any(len(value) != 1 for value in subject.single.values()):
            sizes = {key: len(value) for key, value in subject.single.items()}
            raise InputError(
                f"expected a single feed of batch size 1 and at least one batch for {subject.name}, found batch sizes "
                f"{sizes} and {len(subject.batches)} batches. Tokenize one example, and a sample of the test split."
            )


def _write_spec(folder: Path, subject: Subject, threads: int, seconds: float) -> Path:
    """Write the feeds as .npz files and the worker's orders as JSON beside them."""
    folder.mkdir()
    feeds = {"single.npz": subject.single} | {f"batch_{i}.npz": feed for i, feed in enumerate(subject.batches)}
    for name, feed in feeds.items():
        np.savez(folder / name, allow_pickle=False, **feed)
    spec = {
        "format": subject.format,
        # The worker runs in the temporary folder, where a relative path would lead nowhere.
        "path": str(subject.path.resolve()),
        "batches": len(subject.batches),
        "threads": threads,
        "seconds": seconds,
        "trust_remote_code": subject.trust_remote_code,
    }
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder / "spec.json"


@contextmanager
def torch_workers(module: str, needed: bool, threads: int) -> Iterator[subprocess.Popen[str] | None]:
    """What `run_worker` forks workers for torch from. None where it is not needed, or a fork after imports is not safe (not on Linux)."""
    if not needed or sys.platform != "linux":
        yield None
        return
    command = [sys.executable, "-m", module, FORKS]
    with (
        tempfile.TemporaryDirectory(prefix="benchmark_") as folder,
        subprocess.Popen(
            command, cwd=folder, env=_environment(threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process,
    ):
        yield process


def run_worker(
    module: str, spec: Path, name: str, to_do: str, *, python: str = sys.executable,
    forks: subprocess.Popen[str] | None = None,
) -> dict[str, float]:  # fmt: skip
    """The result.json that `python -m module` writes beside `spec`, on as many threads as the spec says; `to_do` is for the message.

    The worker is a fork of `forks`, for a model in torch, or else a new process.
    """
    orders = json.loads(spec.read_text(encoding="utf-8"))
    if forks is not None:
        status, errors = _run_fork(forks, spec)
    else:
        # `-m` puts the working directory first on the module path: in a folder of our own nothing can shadow a library.
        worker = subprocess.run(
            [python, "-m", module, spec.name],
            cwd=spec.parent,
            env=_environment(orders["threads"]),
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
            f"expected {orders['path']} to {to_do}, found that the worker timing {name} ended with status {status} (-9 usually "
            f"means that memory ran out):\n{tail}\nVerify the stage, or benchmark it without the others."
        )
    result: dict[str, float] = json.loads((spec.parent / "result.json").read_text(encoding="utf-8"))
    return result


def _environment(threads: int) -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(threads),
    }


def _run_fork(forks: subprocess.Popen[str], spec: Path) -> tuple[int, str]:
    """The exit status of a fork of `forks` that does what `spec` says, and what it wrote to standard error."""
    assert forks.stdin
    assert forks.stdout
    try:
        print(spec, file=forks.stdin, flush=True)
        status = int(forks.stdout.readline())
    except (OSError, ValueError):
        # It has ended without an answer, and said why on the standard error that it shares with this process.
        return forks.wait(), ""
    return status, (spec.parent / STDERR).read_text(encoding="utf-8", errors="replace")


def be_a_worker(work: Callable[[Path], None], argument: str) -> None:
    """`work` on the spec that the argument names; or on every spec that a line of standard input names, each in a fork of its own."""
    if argument != FORKS:
        work(Path(argument))
        return
    import transformers.models.bert.modeling_bert  # noqa: F401  # brings what the module of any other model imports

    import pipelines.models.removal  # noqa: F401

    for line in sys.stdin:
        worker = os.fork()
        if worker == 0:
            _work_and_exit(work, Path(line.rstrip("\n")))
        print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), flush=True)


def _work_and_exit(work: Callable[[Path], None], spec: Path) -> None:
    status = 1
    try:
        for stream, file in ((1, os.devnull), (2, spec.parent / STDERR)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), stream)
        work(spec)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # Not through the handlers and buffers that belong to the process this one was forked from.
        os._exit(status)


def _summarize(subject: Subject, rounds: list[dict[str, float]], threads: int) -> dict[str, Any]:
    def median(key: str) -> float:
        return float(np.median([one[key] for one in rounds]))

    shape = list(next(iter(subject.single.values())).shape)
    return {
        "latency_ms": {"p50": median("p50"), "p95": median("p95"), "batch_size": shape[0], "shape": shape},
        "samples_per_second": median("samples_per_second"),
        "peak_memory_bytes": int(max(one["peak_memory_bytes"] for one in rounds)),
        "threads": threads,
        "rounds": rounds,
    }


def _work(spec_file: Path) -> None:
    """The worker: load one model, time it, write result.json beside the spec."""
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    folder = spec_file.parent
    single = _read_feed(folder / "single.npz")
    batches = [_read_feed(folder / f"batch_{i}.npz") for i in range(spec["batches"])]
    if spec["format"] == "onnx":
        load = partial(_load_onnx, threads=spec["threads"])
    else:
        load = partial(_load_torch, threads=spec["threads"], trust_remote_code=spec["trust_remote_code"])
    # The conversion of the feeds is not part of the model's time, so `prepare` is called before the clock starts.
    prepare, run = load(Path(spec["path"]))
    result = time_calls(run, prepare(single), spec["seconds"])
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    result["samples_per_second"] = time_batches(run, [prepare(batch) for batch in batches], sizes, spec["seconds"])
    result["peak_memory_bytes"] = peak_memory_bytes()
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _read_feed(file: Path) -> Feed:
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _load_onnx(path: Path, threads: int) -> tuple[Callable[[Feed], Any], Callable[[Any], Any]]:
    session = open_session(path / "model.onnx", threads)
    names = [node.name for node in session.get_inputs()]

    def prepare(feed: Feed) -> Feed:
        missing = [name for name in names if name not in feed]
        if missing:
            raise InputError(f"expected feeds for the inputs {names}, found none for {missing}. Add them to the feeds.")
        # A tokenizer may give more than the graph takes, such as the token types of a model that has none.
        return {name: feed[name] for name in names}

    return prepare, lambda feed: session.run(None, feed)


def _load_torch(
    path: Path, threads: int, trust_remote_code: bool
) -> tuple[Callable[[Feed], Any], Callable[[Any], Any]]:
    import torch

    from pipelines.models.removal import load_model

    torch.set_num_threads(threads)
    model = load_model(path, trust_remote_code).eval()

    def run(feed: dict[str, torch.Tensor]) -> Any:
        with torch.inference_mode():
            return model(**feed)

    return lambda feed: {name: torch.from_numpy(value) for name, value in feed.items()}, run


def time_calls(
    run: Callable[[Any], Any], feed: Any, seconds: float, minimum: int = MINIMUM_REPETITIONS
) -> dict[str, float]:
    """Median and 95th percentile of `minimum` calls or more in milliseconds, after a warm-up of a fifth of the time."""
    _repeat(run, feed, seconds / 5, min(3, minimum))
    times = np.array(_repeat(run, feed, seconds, minimum)) * 1000
    p50, p95 = np.percentile(times, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "repetitions": len(times)}


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


def _repeat(run: Callable[[Any], Any], feed: Any, seconds: float, minimum: int) -> list[float]:
    """Seconds of each call, for at least `seconds` in all and at least `minimum` calls."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < minimum or time.perf_counter() < end:
        start = time.perf_counter()
        run(feed)
        times.append(time.perf_counter() - start)
    return times


def peak_memory_bytes() -> int:
    """The largest resident set this process has had, in bytes.

    Linux's `ru_maxrss` survives exec, so in a fresh child it starts at the size of the parent that spawned it; the
    kernel's VmHWM belongs to the new program alone.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    be_a_worker(_work, sys.argv[1])
