"""How fast models generate text: the worker that times one, which pipelines/onnx/measure.py starts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.onnx.measure import peak_memory_bytes, percentiles

# Continues a prompt by some tokens, and reads the clock after each of them.
Generate = Callable[[list[int], int], list[float]]
MINIMUM_RUNS = 5


def work(spec_file: Path) -> None:
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    path, threads = Path(spec["path"]), spec["threads"]
    if spec["format"] == "onnx":
        generate = _load_onnx(path, threads)
    else:
        generate = _load_torch(path, threads, spec["trust_remote_code"])
    result = time_generation(generate, spec["prompt_tokens"], spec["new_tokens"], spec["seconds"])
    result["peak_memory_bytes"] = peak_memory_bytes()
    (spec_file.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


def time_generation(generate: Generate, prompt_tokens: int, new_tokens: int, seconds: float) -> dict[str, float]:
    """Time continuations of one prompt for `seconds`, after a warm-up.

    `p50` and `p95` are of all tokens, in milliseconds; `time_to_first_token_ms` is of the first of each continuation, for which the
    prompt is read; `tokens_per_second` of whole continuations, prompt included. A sample is a token.
    """
    prompt = list(range(1, prompt_tokens + 1))

    def run(minimum: int, seconds: float) -> np.ndarray:
        found: list[np.ndarray] = []
        end = time.perf_counter() + seconds
        while len(found) < minimum or time.perf_counter() < end:
            start = time.perf_counter()
            found.append(np.diff([start, *generate(prompt, new_tokens)]))
        return np.array(found) * 1000

    run(1, seconds / 5)
    times = run(MINIMUM_RUNS, seconds)
    tokens_per_second = float(1000 * times.shape[1] / np.median(times.sum(axis=1)))
    return {
        **percentiles(times.ravel()),
        "time_to_first_token_ms": float(np.median(times[:, 0])),
        "tokens_per_second": tokens_per_second,
        "samples_per_second": tokens_per_second,
    }


def _load_onnx(path: Path, threads: int) -> Generate:
    from pipelines.runtime.generate import LanguageModel, Sampling
    from pipelines.runtime.infer import open_session

    model = LanguageModel(path, open_session(path / "model.onnx", threads))
    model.end_tokens = []  # every model generates as many tokens as it is told to
    return lambda prompt, new: [time.perf_counter() for _ in model.steps([prompt], Sampling(max_new_tokens=new))]


def _load_torch(path: Path, threads: int, trust_remote_code: bool) -> Generate:
    import torch
    from transformers.generation.streamers import BaseStreamer

    from pipelines.models.removal import load_model

    torch.set_num_threads(threads)
    model = load_model(path, trust_remote_code)
    # Every model generates as many tokens as it is told to. No token is this end; min_new_tokens would cost time in each step.
    model.generation_config.eos_token_id = model.config.vocab_size

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    def generate(prompt: list[int], new: int) -> list[float]:
        clock, ids = Clock(), torch.tensor([prompt])
        settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "streamer": clock}
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return clock.times[1:]  # the first is the prompt

    return generate


if __name__ == "__main__":
    work(Path(sys.argv[1]))
