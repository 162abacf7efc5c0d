"""Causal model -> ONNX with a KV cache: one graph for the prompt and for every token after it, verified by generating text.

Inputs are input_ids (batch, sequence), attention_mask (batch, past and sequence) and, for each layer, past_key_values.N.key and .value
(batch, heads, past, head size); outputs are logits (batch, sequence, vocabulary) and present.N.key and .value, the next call's past.
The past may be empty. Positions follow from the mask, so padding stands on the left. (The names are those of optimum and
transformers.js, which makes its empty past from the graph's shapes and knows their first axis only as batch_size.)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.core.errors import InputError, VerificationError
from pipelines.core.task import Arrays, Graph, Task
from pipelines.onnx.predict import PAST, PRESENT, empty_cache
from pipelines.onnx.verify import TOLERANCE
from pipelines.runtime.generate import LanguageModel, Sampling
from pipelines.runtime.infer import open_session

VERIFIED_PROMPTS, LARGEST_BATCH = 20, 5


class WithCache(nn.Module):
    """A causal model as a function of tensors only: token ids, mask and past in; logits and the longer past out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        from transformers import DynamicCache

        # As in generate(): positions count the tokens that are not padding.
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=DynamicCache(past),
            use_cache=True,
        )
        present = [tensor for layer in outputs.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return outputs.logits, present


def cache_names(layers: int) -> list[str]:
    return [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def graph_with_cache(model: Any) -> Graph:
    """Two sequences, one of them padded, that continue a past of five tokens by three; the past has each layer's own heads."""
    ids, mask = torch.arange(16).reshape(2, 8), torch.ones((2, 8), dtype=torch.long)
    mask[0, :2] = 0
    try:
        with torch.inference_mode():
            _, present = WithCache(model)(ids[:, :5], mask[:, :5], [])
    except Exception as error:  # whatever a cache of its own may lead to
        raise InputError(
            f"expected a language model with a cache of keys and values in every layer, found that {type(model).__name__} has another: "
            f"{type(error).__name__}: {error}. Use a model of another family."
        ) from error
    past = [(keys.clone(), values.clone()) for keys, values in zip(present[::2], present[1::2], strict=True)]
    caches = cache_names(len(past))
    axes = {"input_ids": {0: "batch_size", 1: "sequence"}, "attention_mask": {0: "batch_size", 1: "total"}}
    return Graph(
        WithCache(model),
        {"input_ids": ids[:, 5:], "attention_mask": mask, "past": past},
        axes | {f"{PAST}{name}": {0: "batch_size", 2: "past"} for name in caches},
        ["logits", *(f"{PRESENT}{name}" for name in caches)],
    )


# ---- Verification


def verification_feeds(windows: Any) -> list[Arrays]:
    """Windows of tokens, whole and to be run in two parts joined by the cache ("split"), with and without padding on the left."""
    feeds = []
    for batch, padding, split in ((1, 0, 0), (3, 0, 1), (2, 5, 0), (3, 4, 7)):
        whole = np.array(windows[: min(batch, len(windows))]["input_ids"])
        ids, mask = whole.copy(), np.ones_like(whole)
        # The first of the batch is a shorter sequence: padding, then only its beginning.
        ids[0, padding:] = whole[0, : ids.shape[1] - padding]
        mask[0, :padding] = 0
        feeds.append({"input_ids": ids, "attention_mask": mask, "split": np.array(split)})
    return feeds


def run_model(model: Any, feed: Arrays) -> Arrays:
    """The logits and the cache of a torch model for a feed, those of padding left out."""
    ids, mask = (torch.from_numpy(feed[name]) for name in ("input_ids", "attention_mask"))
    with torch.inference_mode():
        logits, present = WithCache(model)(ids, mask, [])
    names = cache_names(len(present) // 2)
    caches = {f"{PRESENT}{name}": tensor.numpy() for name, tensor in zip(names, present, strict=True)}
    return _without_padding({"logits": logits.numpy()} | caches, feed["attention_mask"])


def run_graph(session: Any, feed: Arrays) -> Arrays:
    """The same of an ONNX Runtime session, in two calls where the feed is split."""
    ids, mask, split = feed["input_ids"], feed["attention_mask"], int(feed["split"])
    cache, logits = empty_cache(session, len(ids)), []
    names = [value.name for value in session.get_outputs()]
    for part in [slice(0, split), slice(split, None)] if split else [slice(None)]:
        inputs = {"input_ids": ids[:, part], "attention_mask": mask[:, : part.stop]}
        outputs = dict(zip(names, session.run(names, inputs | cache), strict=True))
        logits.append(outputs["logits"])
        cache = {name: outputs[name.replace(PAST, PRESENT)] for name in cache}
    return _without_padding(outputs | {"logits": np.concatenate(logits, axis=1)}, mask)


def _without_padding(outputs: Arrays, mask: np.ndarray) -> Arrays:
    tokens = mask.astype(bool)
    # A cache is (batch, heads, tokens, head size).
    return {name: (one if name == "logits" else one.swapaxes(1, 2))[tokens] for name, one in outputs.items()}


def prompts_for(windows: Any, count: int) -> list[list[int]]:
    """Beginnings of windows of different lengths, from 1 token to half a window."""
    half = len(windows[0]["input_ids"]) // 2
    return [windows[i * len(windows) // count]["input_ids"][: 1 + i * half // count] for i in range(count)]


def verify_generation(directory: Path, model: Any, task: Task, processor: Any) -> dict[str, Any]:
    """Continue prompts greedily with the ONNX loop and with torch's generate, one by one and in batches padded on the left.

    Neither stops at the end token, so that every continuation is compared in full. Raises VerificationError at the first token that
    differs, unless torch itself finds the two equally likely within rounding.
    """
    edge = LanguageModel(directory, open_session(directory / "model.onnx"))
    edge.end_tokens = []
    windows = task.features(processor)["validation"]
    prompts, new = prompts_for(windows, VERIFIED_PROMPTS), max(2, len(windows[0]["input_ids"]) // 2)
    batches = [prompts[start : start + LARGEST_BATCH] for start in range(0, VERIFIED_PROMPTS, LARGEST_BATCH)]
    tokens = ties = 0
    for group in [[prompt] for prompt in prompts] + batches:
        expected = torch_greedy(model, processor, group, new)
        found = edge.generate_tokens(group, Sampling(max_new_tokens=new))
        for prompt, theirs, ours in zip(group, expected, found, strict=True):
            tokens += len(theirs)
            if theirs == ours:
                continue
            at = len(os.path.commonprefix([theirs, ours]))
            if is_tie(model, [*prompt, *theirs[:at]]):
                ties += 1
                continue
            raise VerificationError(
                f"expected the model in {directory} to generate what torch generates, found another token at position {at} after the "
                f"prompt {processor.decode(prompt)!r:.80} in a batch of {len(group)}: {processor.decode(ours[at : at + 1])!r} instead of "
                f"{processor.decode(theirs[at : at + 1])!r}. The graph is not that model and must not be used; export it again."
            )
    return {"prompts": len(prompts), "largest_batch": LARGEST_BATCH, "tokens": tokens, "ties": ties}


def torch_greedy(model: Any, tokenizer: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The `new` tokens after each prompt by torch's generate, which goes on after an end token."""
    from transformers import GenerationConfig

    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    # The checkpoint's own settings may sample, penalize or stop.
    before = model.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    try:
        with torch.inference_mode():
            generated: list[list[int]] = model.generate(**batch)[:, batch["input_ids"].shape[1] :].tolist()
    finally:
        model.generation_config = before
    return generated


def is_tie(model: Any, tokens: list[int]) -> bool:
    """Whether the two likeliest next tokens are equally likely within rounding."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    return first - second < TOLERANCE * max(1.0, logits.abs().max().item())
