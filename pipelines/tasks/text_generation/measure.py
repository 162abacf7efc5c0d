"""How fast models write: time to the first token, tokens a second and memory, each model in a fresh process, in turn."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.onnx.measure import be_a_worker, peak_memory_bytes, run_worker, torch_workers
from pipelines.runtime.infer import available_cores


@dataclass
class Decoding:
    """A model directory to time: `format` is "onnx" or "transformers"."""

    name: str
    path: Path
    format: str
    trust_remote_code: bool = False


def measure_decoding(
    subjects: list[Decoding], *, prompt_tokens: int = 16, new_tokens: int = 64, rounds: int = 3, threads: int | None = None,
    seconds: float = 1.0,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Let every subject continue one prompt greedily, batch 1, for `seconds`, once a round; return one result per name.

    A result has `first_token_ms` (the prompt read and one token chosen), `latency_ms` (of one token when `new_tokens` are generated:
    p50 and p95 over repetitions), `tokens_per_second` (prompt included), `peak_memory_bytes` (of the whole process) and the `rounds`.
    """
    threads = threads or available_cores()
    measured: dict[str, list[dict[str, float]]] = {subject.name: [] for subject in subjects}
    with torch_workers(
        "pipelines.tasks.text_generation.measure",
        any(subject.format == "transformers" for subject in subjects),
        threads,
    ) as forks:
        for _ in range(rounds):
            for subject in subjects:
                spec = {
                    "path": str(subject.path.resolve()), "format": subject.format, "prompt_tokens": prompt_tokens,
                    "new_tokens": new_tokens, "threads": threads, "seconds": seconds,
                    "trust_remote_code": subject.trust_remote_code,
                }  # fmt: skip
                in_torch = subject.format == "transformers"
                measured[subject.name].append(_run_worker(subject.name, spec, forks if in_torch else None))
    return {name: _summarize(results, prompt_tokens, threads) for name, results in measured.items()}


def memory_bandwidth(megabytes: int = 256, repetitions: int = 5) -> float:
    """Bytes a second that one core reads from memory: what bounds decoding, which reads every weight for every token."""
    array = np.ones(megabytes * 1024 * 128, np.float64)
    best = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - start)
    return array.nbytes / best


def _run_worker(name: str, spec: dict[str, Any], forks: subprocess.Popen[str] | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="decoding_") as folder:
        file = Path(folder) / "spec.json"
        file.write_text(json.dumps(spec), encoding="utf-8")
        return run_worker("pipelines.tasks.text_generation.measure", file, name, "generate text", forks=forks)


def _summarize(rounds: list[dict[str, float]], prompt_tokens: int, threads: int) -> dict[str, Any]:
    def median(key: str) -> float:
        return float(np.median([one[key] for one in rounds]))

    return {
        "first_token_ms": median("first_token_ms"),
        "latency_ms": {"p50": median("p50"), "p95": median("p95"), "batch_size": 1, "shape": [1, prompt_tokens]},
        "tokens_per_second": median("tokens_per_second"),
        "samples_per_second": median("tokens_per_second"),  # a sample is a token, as in `latency_ms`
        "peak_memory_bytes": int(max(one["peak_memory_bytes"] for one in rounds)),
        "threads": threads,
        "rounds": rounds,
    }


def _work(spec_file: Path) -> None:
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    path, threads = Path(spec["path"]), spec["threads"]
    if spec["format"] == "onnx":
        write = _load_onnx(path, threads)
    else:
        write = _load_torch(path, threads, spec["trust_remote_code"])
    result = time_writing(write, spec["prompt_tokens"], spec["new_tokens"], spec["seconds"])
    result["peak_memory_bytes"] = peak_memory_bytes()
    (spec_file.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


def time_writing(
    write: Callable[[list[int], int], Any], prompt_tokens: int, new_tokens: int, seconds: float
) -> dict[str, float]:
    """How fast `write(prompt, new)` continues a prompt by `new` tokens, for `seconds` after a warm-up."""
    prompt = list(range(1, prompt_tokens + 1))

    def times(tokens: int, minimum: int, seconds: float) -> np.ndarray:
        found: list[float] = []
        while len(found) < minimum or sum(found) < seconds:
            start = time.perf_counter()
            write(prompt, tokens)
            found.append(time.perf_counter() - start)
        return np.array(found)

    times(new_tokens, 1, seconds / 5)  # warm-up
    first, whole = times(1, 5, seconds / 5), times(new_tokens, 3, seconds)
    p50, p95 = np.percentile(whole / new_tokens * 1000, [50, 95])
    return {
        "first_token_ms": float(np.median(first) * 1000), "p50": float(p50), "p95": float(p95),
        "tokens_per_second": float(1000 / p50),
    }  # fmt: skip


def _load_onnx(path: Path, threads: int) -> Callable[[list[int], int], Any]:
    from pipelines.runtime.generate import LanguageModel, Sampling

    model = LanguageModel(path, threads)
    model.end_tokens = []  # every model writes as many tokens as it is told to
    return lambda prompt, new: model.generate_tokens([prompt], Sampling(max_new_tokens=new))


def _load_torch(path: Path, threads: int, trust_remote_code: bool) -> Callable[[list[int], int], Any]:
    import torch

    from pipelines.models.removal import load_model

    torch.set_num_threads(threads)
    model = load_model(path, trust_remote_code)
    # Every model writes as many tokens as it is told to. No token is this end; min_new_tokens would cost time in each step.
    model.generation_config.eos_token_id = model.config.vocab_size

    def write(prompt: list[int], new: int) -> Any:
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            return model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
            )

    return write


if __name__ == "__main__":
    be_a_worker(_work, sys.argv[1])
