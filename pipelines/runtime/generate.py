"""Continue text with an ONNX language model that has a KV cache. Needs NumPy, ONNX Runtime and tokenizers, nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def setting(default: Any, help: str) -> Any:
    """A setting whose help is a flag's, too."""
    return field(default=default, metadata={"help": help})


@dataclass
class Sampling:
    """How the next token is chosen; left as it is, greedily."""

    max_new_tokens: int = setting(64, "the most tokens to add (64)")
    sampling_temperature: float = setting(0.0, "draw tokens, the likeliest less often the higher this is; 0 draws none")
    top_k: int = setting(0, "draw from this many of the likeliest tokens; 0 keeps all")
    top_p: float = setting(1.0, "draw from the likeliest tokens that have this probability together")
    # Keskar et al., 2019; negative logits are multiplied.
    repetition_penalty: float = setting(1.0, "divide the logits of tokens that were there by this")
    stop_tokens: Sequence[int] = setting((), "token ids to end at, besides the model's own")
    seed: int = setting(0, "seed of the draws")

    def __post_init__(self) -> None:
        for name, holds in {
            "max_new_tokens": self.max_new_tokens >= 1,
            "sampling_temperature": self.sampling_temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "seed": self.seed >= 0,
        }.items():
            if not holds:
                raise ValueError(f"{name} cannot be {getattr(self, name)}")


def beginning(whole: list[int], plain: list[int], ends: list[int]) -> list[int]:
    """What stands before a text: `whole` are its tokens with special ones, `plain` those without. Where the text has no tokens, what is no end."""
    if not plain:
        return [token for token in whole if token not in ends]
    return whole[: next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)]


class LanguageModel:
    """The `session` of a graph with a KV cache, and the tokenizer.json and config.json in its `directory`: ready to continue text."""

    def __init__(self, directory: Path, session: Any) -> None:
        self.session = session
        if (file := directory / "tokenizer.json").is_file():  # tokens can be continued without it
            self.tokenizer = Tokenizer.from_file(str(file))
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        end = config.get("eos_token_id")
        self.end_tokens = [] if end is None else end if isinstance(end, list) else [end]
        # GPT-2's own name for it is n_positions.
        self.context: int | None = config.get("max_position_embeddings") or config.get("n_positions")
        # Phi-3 turns all tokens otherwise once there are more than this many, so that a cache from before is not that of the text.
        rotary = config.get("rope_parameters") or {}
        is_phi3 = config.get("model_type") in ("phi3", "phimoe")
        self.cache_until: int | None = rotary.get("original_max_position_embeddings") if is_phi3 else None
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.cache_shapes = {
            value.name: (value.shape[1], value.shape[3])
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def generate(self, prompts: list[str], sampling: Sampling | None = None) -> list[str]:
        """A continuation of each prompt."""
        sequences = [self.encode(prompt) for prompt in prompts]
        return list(map(self.continuation, sequences, self.generate_tokens(sequences, sampling)))

    def continuation(self, prompt: list[int], tokens: list[int]) -> str:
        """What tokens add to the text of a prompt: alone, those of SentencePiece would lose their first space."""
        return self.tokenizer.decode(prompt + tokens)[len(self.tokenizer.decode(prompt)) :]

    def stream(self, prompt: str, sampling: Sampling | None = None) -> Iterator[str]:
        """The continuation of one prompt in pieces, as soon as each is there; together they are what generate() gives."""
        given, shown = self.encode(prompt), ""
        tokens: list[int] = []
        for step in self.steps([given], sampling):
            tokens += [token for token in step if token is not None]
            text = self.continuation(given, tokens)
            # A character of several bytes may take several tokens; until the last of them it cannot be shown.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        yield self.continuation(given, tokens)[len(shown) :]

    def encode(self, prompt: str) -> list[int]:
        """The prompt's tokens after what the tokenizer puts before every text; an empty one begins a new document."""
        whole, plain = (self.tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
        return [
            *beginning(whole, plain, self.end_tokens),
            *self.tokenizer.encode(prompt, add_special_tokens=False).ids,
        ] or self.end_tokens[:1]

    def generate_tokens(self, sequences: list[list[int]], sampling: Sampling | None = None) -> list[list[int]]:
        """The new tokens of each sequence, without the end token."""
        found: list[list[int]] = [[] for _ in sequences]
        for step in self.steps(sequences, sampling):
            for tokens, token in zip(found, step, strict=True):
                if token is not None:
                    tokens.append(token)
        return found

    def steps(self, sequences: list[list[int]], sampling: Sampling | None = None) -> Iterator[list[int | None]]:
        """One token for each sequence at a time, None for those that have ended; ends when all have, or no position is left."""
        sampling = sampling or Sampling()
        longest = max(len(tokens) for tokens in sequences)
        if min(len(tokens) for tokens in sequences) == 0:
            raise ValueError("expected at least one token in every prompt, found none. Give it a text.")
        if self.context is not None and longest >= self.context:
            raise ValueError(
                f"expected prompts of fewer than {self.context} tokens, the positions the model has, found {longest}. Shorten the text."
            )
        batch, (ids, mask) = len(sequences), padded(sequences, longest)
        seen = [set(tokens) for tokens in sequences]
        ends = {*self.end_tokens, *sampling.stop_tokens}
        ended = [False] * batch
        generator = np.random.default_rng(sampling.seed)
        empty: dict[str, Any] = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, 0, size), np.float32))
            for name, (heads, size) in self.cache_shapes.items()
        }
        cache, whole = empty, ids
        for _ in range(sampling.max_new_tokens):
            feed = {
                "input_ids": onnxruntime.OrtValue.ortvalue_from_numpy(ids),
                "attention_mask": onnxruntime.OrtValue.ortvalue_from_numpy(mask),
            }
            # The cache goes from one call to the next as it is, without a copy.
            logits, *present = self.session.run_with_ort_values(self.outputs, feed | cache)
            cache = dict(zip(self.cache_shapes, present, strict=True))
            last = logits.numpy()[:, -1]
            step: list[int | None] = []
            for row in range(batch):
                token = None if ended[row] else choose(last[row], seen[row], sampling, generator)
                if token in ends:
                    token, ended[row] = None, True
                step.append(token)
                if token is not None:
                    seen[row].add(token)
            if all(ended):
                return
            yield step
            if self.context is not None and mask.shape[1] + 1 > self.context:
                return
            ids = np.array([[0 if token is None else token] for token in step], np.int64)
            whole = np.concatenate([whole, ids], axis=1)
            if whole.shape[1] - 1 == self.cache_until:  # as transformers does
                ids, cache = whole, empty
            mask = np.concatenate([mask, np.ones((batch, 1), np.int64)], axis=1)


def padded(sequences: list[list[int]], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences as token ids and a mask (sequences, longest), padded on the left, so that all continue at the same place."""
    missing = [[0] * (longest - len(tokens)) for tokens in sequences]
    ids = [[*padding, *tokens] for padding, tokens in zip(missing, sequences, strict=True)]
    mask = [[*padding, *[1] * len(tokens)] for padding, tokens in zip(missing, sequences, strict=True)]
    return np.array(ids, np.int64), np.array(mask, np.int64)


def choose(logits: np.ndarray, seen: set[int], sampling: Sampling, generator: np.random.Generator) -> int:
    """The next token for logits (vocabulary,): the penalty first, then temperature, top k and top p, as in transformers."""
    if sampling.repetition_penalty != 1:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.sampling_temperature == 0:
        return int(logits.argmax())
    kept = keep_likely(logits / sampling.sampling_temperature, sampling.top_k, sampling.top_p)
    weights = np.exp((kept - kept.max()).astype(np.float64))
    return int(generator.choice(len(weights), p=weights / weights.sum()))


def penalize(logits: np.ndarray, seen: set[int], penalty: float) -> np.ndarray:
    """Logits (vocabulary,) in which tokens that were seen are less likely."""
    logits = logits.copy()
    tokens = np.fromiter(seen, np.int64, len(seen))
    logits[tokens] = np.where(logits[tokens] > 0, logits[tokens] / penalty, logits[tokens] * penalty)
    return logits


def keep_likely(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Logits (vocabulary,) with -inf for all but the `top_k` likeliest tokens, and of these but the first that make up `top_p`."""
    if 0 < top_k < len(logits):
        least = np.partition(logits, -top_k)[-top_k]
        logits = np.where(logits < least, -np.inf, logits)
    if top_p < 1:
        order = np.argsort(-logits, kind="stable")
        weights = np.exp((logits[order] - logits[order[0]]).astype(np.float64))
        before = np.cumsum(weights / weights.sum()) - weights / weights.sum()
        kept = np.full(logits.shape, -np.inf, logits.dtype)
        chosen = order[before < top_p]
        kept[chosen] = logits[chosen]
        logits = kept
    return logits
