"""One row of `inference.py` for a language model in a fresh process: `python -m benchmarks.inference_language_worker SPEC`.

Every row continues a prompt greedily with the generation loop that comes with it: `generate` for torch and optimum, the bundle's for ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inference_worker import read_feeds
from pipelines.benchmark import peak_memory_bytes
from pipelines.benchmark_language import time_writing
from pipelines.predict import empty_cache

# What continues a prompt by some tokens, and the logits (batch, tokens, vocabulary) of windows of tokens.
Loaded = tuple[Callable[[list[int], int], list[int]], Callable[[np.ndarray], np.ndarray]]


def load_generate(model: Any) -> Loaded:
    """Anything with transformers' generate."""
    import torch
    from transformers import GenerationConfig

    def write(prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt])
        how = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)[
                0, len(prompt) :
            ].tolist()

    def logits(windows: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(windows)
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()

    return write, logits


def load_torch(path: Path, threads: int) -> Loaded:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    return load_generate(AutoModelForCausalLM.from_pretrained(path).eval())


def load_optimum(path: Path, threads: int) -> Loaded:
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    torch.set_num_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return load_generate(ORTModelForCausalLM.from_pretrained(path, session_options=options))


def load_ours(path: Path, threads: int) -> Loaded:
    from pipelines.edge.generate import LanguageModel, Sampling

    model = LanguageModel(path, threads)
    model.end_tokens = []  # every row writes as many tokens as it is told to

    def logits(windows: np.ndarray) -> np.ndarray:
        feed = {"input_ids": windows, "attention_mask": np.ones_like(windows)}
        return model.session.run(["logits"], feed | empty_cache(model.session, len(windows)))[0]

    return lambda prompt, new: model.generate_tokens([prompt], Sampling(max_new_tokens=new))[0], logits


LOADERS = {"torch": load_torch, "optimum": load_optimum, "ours": load_ours}


def work(spec_file: Path) -> None:
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    write, logits = LOADERS[spec["format"]](Path(spec["path"]), spec["threads"])
    if spec["job"] == "answer":
        (feed,) = read_feeds(Path(spec["feeds"]))
        # One window at a time: dynamic quantization takes one scale for a whole batch.
        answers = [logits(feed["input_ids"][index : index + 1]) for index in range(len(feed["input_ids"]))]
        np.save(spec_file.parent / "answers.npy", np.concatenate(answers))
        result: dict[str, Any] = {"tokens": write(feed["input_ids"][0, :8].tolist(), 32)}
    else:
        result = time_writing(write, spec["prompt_tokens"], spec["new_tokens"], spec["seconds"])
    result["peak_memory_bytes"] = peak_memory_bytes()
    (spec_file.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
