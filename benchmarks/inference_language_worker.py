"""One row of `inference.py` for a language model in a fresh process: `python -m benchmarks.inference_language_worker SPEC`.

Every row continues a prompt greedily with the generation loop that comes with it: `generate` for torch and optimum, the bundle's for ours;
transformers.exporters has none for plain sessions, so its graph gets the bundle's loop, without a copy of the cache.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inference_worker import MINIMUM_REPETITIONS, read_feeds
from pipelines.onnx.measure import peak_memory_bytes, time_calls
from pipelines.onnx.predict import empty_cache
from pipelines.runtime.infer import open_session

# What continues a prompt by some tokens, and the logits (batch, tokens, vocabulary) of windows of tokens.
Loaded = tuple[Callable[[list[int], int], list[int]], Callable[[np.ndarray], np.ndarray]]


def load_generate(model: Any) -> Loaded:
    """Anything with transformers' generate."""
    import torch
    from transformers import GenerationConfig

    def write(prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt])
        # An end that no token is: min_new_tokens would forbid the token that ends a text, and so write another text.
        end = model.config.vocab_size
        how = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=end)
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


def load_exporters(path: Path, threads: int) -> Loaded:
    """The decode graph that takes one or more tokens (`multi_token_decode`), so that it reads the prompt, too."""
    import onnxruntime

    session = open_session(path / "decode.onnx", threads)
    # Keys and values of each layer, the past's and the present's in one order.
    pasts = [value for value in session.get_inputs() if len(value.shape) == 4]
    names = [value.name for value in session.get_outputs()]
    presents = [value.name for value in session.get_outputs() if len(value.shape) == 4 and value.name != "logits"]

    # The graph leaves heads and their size open.
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    query_heads = config.get("num_attention_heads") or config["n_head"]
    heads = config.get("num_key_value_heads") or query_heads
    size = config.get("head_dim") or (config.get("hidden_size") or config["n_embd"]) // query_heads

    def begin(batch: int) -> dict[str, Any]:
        empty = np.zeros((batch, heads, 0, size), np.float32)
        return {value.name: onnxruntime.OrtValue.ortvalue_from_numpy(empty) for value in pasts}

    def call(ids: np.ndarray, total: int, cache: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        positions = np.broadcast_to(np.arange(total - ids.shape[1], total), ids.shape)
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((len(ids), total), np.int64),
            "position_ids": positions.copy(),
        }
        taken = {value.name for value in session.get_inputs()}
        given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items() if name in taken}
        found = dict(zip(names, session.run_with_ort_values(names, given | cache), strict=True))
        return found["logits"].numpy(), {value.name: found[name] for value, name in zip(pasts, presents, strict=True)}

    def write(prompt: list[int], new: int) -> list[int]:
        cache, ids, tokens = begin(1), np.array([prompt]), []
        for _ in range(new):
            logits, cache = call(ids, len(prompt) + len(tokens), cache)
            tokens.append(int(logits[0, -1].argmax()))
            ids = np.array([tokens[-1:]])
        return tokens

    return write, lambda windows: call(windows, windows.shape[1], begin(len(windows)))[0]


def load_ours(path: Path, threads: int) -> Loaded:
    from pipelines.runtime.generate import LanguageModel, Sampling

    model = LanguageModel(path, open_session(path / "model.onnx", threads))
    model.end_tokens = []  # every row writes as many tokens as it is told to

    def logits(windows: np.ndarray) -> np.ndarray:
        feed = {"input_ids": windows, "attention_mask": np.ones_like(windows)}
        return model.session.run(["logits"], feed | empty_cache(model.session, len(windows)))[0]

    return lambda prompt, new: model.generate_tokens([prompt], Sampling(max_new_tokens=new))[0], logits


LOADERS = {"torch": load_torch, "optimum": load_optimum, "exporters": load_exporters, "ours": load_ours}


def work(spec_file: Path) -> None:
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    write, logits = LOADERS[spec["format"]](Path(spec["path"]), spec["threads"])
    if spec["job"] == "predict":
        (feed,) = read_feeds(Path(spec["feeds"]))
        # One window at a time: dynamic quantization takes one scale for a whole batch.
        found = [logits(feed["input_ids"][index : index + 1]) for index in range(len(feed["input_ids"]))]
        np.save(spec_file.parent / "logits.npy", np.concatenate(found))
        result: dict[str, Any] = {"tokens": write(feed["input_ids"][0, :8].tolist(), 32)}
    else:
        prompt, new = list(range(1, spec["prompt_tokens"] + 1)), spec["new_tokens"]
        timed = time_calls(lambda tokens: write(prompt, tokens), new, spec["seconds"], MINIMUM_REPETITIONS)
        result = {"p50": timed["p50"] / new}
    result["peak_memory_bytes"] = peak_memory_bytes()
    (spec_file.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
