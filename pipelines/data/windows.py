"""Tokens of documents: a tokenizer of their own, one stream of all, and windows of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import numpy as np

from pipelines.core.disk import digest
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, TRANSFER, UNLABELLED
from pipelines.data.examples import Examples
from pipelines.data.text import map_kept
from pipelines.runtime.generate import beginning

END_TOKEN = "<|endoftext|>"  # GPT-2's own name for what parts documents


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Any:
    """A byte-level BPE tokenizer (as GPT-2's) learnt from `texts`; token 0 ends a document. Nothing is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_TOKEN, eos_token=END_TOKEN, pad_token=END_TOKEN, padding_side="left"
    )


def begin_tokens(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before every text: the <s> of Llama, nothing for GPT-2."""
    whole, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return beginning(whole, plain, [tokenizer.eos_token_id])


def unlearnt_tokens(tokenizer: Any) -> list[int]:
    """What begins a document and is not its end token, as OPT's is, which the document before has already."""
    return [token for token in begin_tokens(tokenizer) if token != tokenizer.eos_token_id]


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that is to be continued."""
    return [*begin_tokens(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]


def token_stream(texts: Iterable[str], tokenizer: Any) -> np.ndarray:
    """All documents as one array of token ids, with the end token before the first and after each, and what else begins a text before each."""
    begin, end = unlearnt_tokens(tokenizer), tokenizer.eos_token_id
    texts = list(texts)
    pieces = [np.array([end], np.int32)]
    for start in range(0, len(texts), 1000):  # Python's own integers take ten times the memory of the array's
        # A text that spells the end token out is text.
        encoded = tokenizer(texts[start : start + 1000], add_special_tokens=False, split_special_tokens=True)
        pieces += [np.array([*begin, *tokens, end], np.int32) for tokens in encoded["input_ids"]]
    return np.concatenate(pieces)


def cut_windows(stream: np.ndarray, size: int, stride: int, begin: Sequence[int] = ()) -> dict[str, Any]:
    """Windows of `size` tokens that begin `stride` (less than `size`) apart, as columns input_ids and labels (windows, size).

    Every token but the stream's first and those that `begin` a text is the label of exactly one window: labels of tokens an earlier window
    had are -100, and so is the first of each, which nothing predicts. All windows are full, the last one by reaching further back; a stream
    shorter than `size` makes one short window.
    """
    size = min(size, len(stream))
    starts = [*range(0, len(stream) - size, stride), len(stream) - size]
    ids = np.stack([stream[start : start + size] for start in starts])
    labels = ids.copy()
    done = 1
    for row, start in enumerate(starts):
        labels[row, : max(done - start, 1)] = IGNORED
        done = start + size
    labels[np.isin(ids, begin)] = IGNORED  # special tokens, which are in no text: one that spells them out is split
    return {"input_ids": ids, "labels": labels}


def tokenize_windows(data: Examples, tokenizer: Any, size: int, stride: int) -> datasets.DatasetDict:
    """Windows of every split: for training they overlap by one token, so each is learnt once; for scoring they begin `stride` apart."""
    splits, begin = {}, unlearnt_tokens(tokenizer)
    for role, split in data.splits.items():
        if role == TRANSFER:
            splits[role] = unlabelled_windows(split, tokenizer, size, data.fingerprint)
            continue
        stream = token_stream(split["text"], tokenizer)
        windows = cut_windows(stream, size, size - 1 if role == "train" else stride, begin)
        length = [windows["input_ids"].shape[1]] * len(windows["input_ids"])
        splits[role] = datasets.Dataset.from_dict({**windows, "length": length})
    return datasets.DatasetDict(splits)


def unlabelled_windows(split: datasets.Dataset, tokenizer: Any, size: int, fingerprint: str) -> datasets.Dataset:
    """Whole windows of a transfer set, each of a thousand documents at a time: they stay on disk, since they may be larger than memory."""

    def cut(batch: dict[str, list[Any]]) -> dict[str, Any]:
        windows = cut_windows(token_stream(batch["text"], tokenizer), size, size - 1, unlearnt_tokens(tokenizer))
        ids, labels = windows["input_ids"], windows["labels"]
        whole = len(ids) if ids.shape[1] == size else 0
        labels = np.where(labels == IGNORED, IGNORED, UNLABELLED)
        return {"input_ids": ids[:whole], "labels": labels[:whole], "length": np.full(whole, size)}

    numbers = datasets.List(datasets.Value("int32"))
    features = datasets.Features(input_ids=numbers, labels=numbers, length=datasets.Value("int32"))
    key = [fingerprint, vocabulary_fingerprint(tokenizer), size]
    windows = map_kept(split, cut, "windows", key, features=features, remove_columns=split.column_names)
    if len(windows) == 0:
        raise InputError(
            f"expected text of at least --max_length ({size}) tokens in --transfer_dataset, found less. Give more text."
        )
    return windows


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Identity of a vocabulary, every token with its id, and of what begins a text."""
    return digest([sorted(tokenizer.get_vocab().items()), begin_tokens(tokenizer)])
