"""Text for language models: documents, their split, a tokenizer of their own, and windows of tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.core.config import DataConfig, LanguageConfig
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED
from pipelines.data.examples import (
    FILE_BUILDERS,
    SPLITS,
    Rows,
    Source,
    choose_splits,
    content_fingerprint,
    cut_missing_splits,
    drop_duplicates,
    files_by_split,
    load_source,
    note_guessed_encodings,
    read_texts,
    split_named_by,
    text_key,
    visible,
)
from pipelines.data.sources import resolve

if TYPE_CHECKING:
    import datasets

END_TOKEN = "<|endoftext|>"  # GPT-2's own name for what parts documents
TEXT_SUFFIXES = (".txt", ".text", ".md")


@dataclass
class TextData:
    """Documents in three splits (column `text`); `text_bytes` are the UTF-8 bytes of each split, `details` is ready for JSON."""

    splits: datasets.DatasetDict
    text_bytes: dict[str, int]
    details: dict[str, Any]
    fingerprint: str


def load_documents(config: DataConfig, language: LanguageConfig) -> TextData:
    """Load documents and give them a train, validation and test split, no document being in two of them.

    Documents are split before they are joined, so that no text of the test was trained on. As in load_classification, splits the data
    set has are used, missing ones are cut from the training split (seeded), and of equal documents the one in test stays, then the one
    in validation. Empty documents are dropped. --max_train_samples and --max_eval_samples count documents.

    Raises InputError where the data cannot be read or leaves a split without text.
    """
    import datasets

    source = _load(config, language)
    roles = choose_splits(source, config, lambda split: config.text_column in split.column_names)
    documents: dict[str, list[str]] = {}
    empty = 0
    for role, name in roles.items():
        if name is not None:
            texts = list(_documents(source.splits[name], name, config, language.document_start))
            documents[role] = [text for text in texts if text.strip()]
            empty += len(texts) - len(documents[role])
            if not documents[role]:
                raise InputError(
                    f"expected text in the split {name!r}, found {len(texts)} rows and not a word in them. Check the file, or name "
                    f"another column with --text_column (columns: {', '.join(source.splits[name].column_names)})."
                )
    # The same rules as for classification; documents have no classes, so all are of one.
    rows = {
        role: Rows(
            np.array([text_key([" ".join(text.split())]) for text in texts], np.uint64), np.zeros(len(texts), np.int64)
        )
        for role, texts in documents.items()
    }
    kept, found = drop_duplicates(rows)
    cut_missing_splits(kept, rows["train"].labels, roles, config)
    splits = {}
    for role in SPLITS:
        origin = documents[role if role in documents else "train"]
        chosen = kept[role]
        limit = config.max_train_samples if role == "train" else config.max_eval_samples
        if role != "test" or role not in documents:
            chosen = np.random.default_rng(config.split_seed).permutation(chosen)
        splits[role] = datasets.Dataset.from_dict({"text": [origin[index] for index in chosen[:limit]]})
    text_bytes = {role: sum(len(text.encode()) for text in split["text"]) for role, split in splits.items()}
    details = {
        "dataset": config.dataset,
        "dataset_config": config.dataset_config,
        **source.details,
        "documents": {role: len(split) for role, split in splits.items()},
        "bytes": text_bytes,
        "came_from": {
            role: f"split {roles[role]!r}" if roles[role] else f"cut from split {roles['train']!r}" for role in SPLITS
        },
        "duplicates_removed": found["duplicates_removed"],
        "empty_removed": empty,
        "split_seed": config.split_seed,
    }
    return TextData(datasets.DatasetDict(splits), text_bytes, details, content_fingerprint(splits, []))


def _load(config: DataConfig, language: LanguageConfig) -> Source:
    """Files and folders of plain text; everything else as for classification."""
    import datasets

    path = Path(resolve(config.dataset)) if config.dataset is not None else Path()
    if config.dataset is None or not path.is_absolute():
        return load_source(config)

    def rows(texts: Iterable[str]) -> datasets.Dataset:
        return datasets.Dataset.from_dict(
            {config.text_column: list(texts)}, datasets.Features({config.text_column: datasets.Value("string")})
        )

    if path.is_file():
        is_text = path.suffix.lower() not in FILE_BUILDERS
        return (
            Source({"train": rows(_read_text_file(path, language.document_start))}) if is_text else load_source(config)
        )
    entries = [entry for entry in visible(path) if entry.is_file()]
    texts = [entry for entry in entries if entry.suffix.lower() in TEXT_SUFFIXES]
    if not texts or any(entry.suffix.lower() in FILE_BUILDERS for entry in entries):
        return load_source(config)
    if any(map(split_named_by, texts)):
        return Source(
            {
                split: rows(chain.from_iterable(_read_text_file(file, language.document_start) for file in files))
                for split, files in files_by_split(path, texts).items()
            }
        )
    # One document a file, in the encodings that class folders may have.
    read = list(read_texts([(str(entry), "", 0, 0) for entry in texts]))
    guessed = [row["file"] for row in read if row["encoding"] != "utf-8"]
    return Source({"train": rows(row["text"] for row in read)}, details=note_guessed_encodings(path, guessed))


def _read_text_file(path: Path, document_start: str | None) -> list[str]:
    """The documents of one text file, or its lines where a pattern will make documents of them."""
    content = path.read_bytes()
    if not content.strip():
        raise InputError(f"expected text in {path}, found an empty file. Write it again, or give another file.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"expected text in UTF-8 in {path}, found the byte 0x{content[error.start]:02x} at position {error.start:,}, which is not. "
            "Convert the file (iconv -f CP1252 -t UTF-8), or check that it is text."
        ) from error
    if "\0" in text:
        raise InputError(f"expected text in {path}, found NUL bytes. Give a text file.")
    text = text.replace("\r\n", "\n")
    return text.splitlines(keepends=True) if document_start else re.split(r"\n[ \t]*\n\s*", text.strip())


def _documents(split: datasets.Dataset, name: str, config: DataConfig, document_start: str | None) -> Iterator[str]:
    """The documents of a split: its rows, or runs of rows of which the first matches `document_start`."""
    if config.text_column not in split.column_names:
        raise InputError(
            f"expected a column {config.text_column!r} in the split {name!r}, found the columns {', '.join(split.column_names)}; name "
            "the right one with --text_column"
        )
    column = split[config.text_column]
    if any(not isinstance(value, (str, type(None))) for value in column[:100]):
        raise InputError(
            f"expected texts in the column {config.text_column!r} of the split {name!r}, found values such as {column[0]!r:.80}; name a "
            f"column of texts with --text_column (columns: {', '.join(split.column_names)})"
        )
    texts = (value or "" for value in column)
    if document_start is None:
        yield from texts
        return
    pattern = re.compile(document_start)
    document: list[str] = []
    for text in texts:
        if pattern.search(text) and document:
            yield "".join(document)
            document = []
        document.append(text if text.endswith("\n") else text + "\n")
    yield "".join(document)


# ---- Tokens


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


def token_stream(texts: Iterable[str], tokenizer: Any) -> np.ndarray:
    """All documents as one array of token ids, with the end token before the first and after each."""
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError(
            "expected a tokenizer with an end token (eos_token) to join documents with, found none. Set one and save it."
        )
    texts = list(texts)
    pieces = [np.array([end], np.int32)]
    for start in range(0, len(texts), 1000):  # Python's own integers take ten times the memory of the array's
        # A text that spells the end token out is text.
        encoded = tokenizer(texts[start : start + 1000], add_special_tokens=False, split_special_tokens=True)
        pieces += [np.array([*tokens, end], np.int32) for tokens in encoded["input_ids"]]
    return np.concatenate(pieces)


def cut_windows(stream: np.ndarray, size: int, stride: int) -> dict[str, Any]:
    """Windows of `size` tokens that begin `stride` (less than `size`) apart, as columns input_ids and labels (windows, size).

    Every token but the stream's first is the label of exactly one window: labels of tokens an earlier window had are -100, and so is the
    first of each, which nothing predicts. All windows are full, the last one by reaching further back; a stream shorter than `size`
    makes one short window.
    """
    size = min(size, len(stream))
    starts = [*range(0, len(stream) - size, stride), len(stream) - size]
    ids = np.stack([stream[start : start + size] for start in starts])
    labels = ids.copy()
    done = 1
    for row, start in enumerate(starts):
        labels[row, : max(done - start, 1)] = IGNORED
        done = start + size
    return {"input_ids": ids, "labels": labels}


def tokenize_windows(data: TextData, tokenizer: Any, size: int, stride: int) -> datasets.DatasetDict:
    """Windows of every split: for training they overlap by one token, so each is learnt once; for scoring they begin `stride` apart."""
    import datasets

    splits = {}
    for role, split in data.splits.items():
        windows = cut_windows(token_stream(split["text"], tokenizer), size, size - 1 if role == "train" else stride)
        if windows["input_ids"].shape[1] < 2:
            raise InputError(f"expected text of more than one token in the {role} split, found less. Add documents.")
        length = [windows["input_ids"].shape[1]] * len(windows["input_ids"])
        splits[role] = datasets.Dataset.from_dict({**windows, "length": length})
    return datasets.DatasetDict(splits)


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Identity of a vocabulary: every token with its id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
