"""Text for language models: documents, their split, a tokenizer of their own, and windows of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from pipelines.core.config import DataConfig, LanguageConfig
from pipelines.core.disk import digest
from pipelines.core.errors import InputError
from pipelines.core.sources import resolve
from pipelines.core.task import IGNORED
from pipelines.data.examples import Examples, Given, check_column, hash_of, split_examples
from pipelines.data.folders import files_by_split, guessed_encodings, load_source, split_named_by, visible
from pipelines.data.kinds import Source
from pipelines.data.splits import choose_splits
from pipelines.data.tables import FILE_BUILDERS
from pipelines.data.text import TEXTS, content, read_text_files

END_TOKEN = "<|endoftext|>"  # GPT-2's own name for what parts documents
TEXT_SUFFIXES = (".txt", ".text", ".md")


@dataclass
class TextData(Examples):
    """Documents in three splits (column `text`); `text_bytes` are the UTF-8 bytes of each split."""

    text_bytes: dict[str, int] = field(default_factory=dict)


def load_documents(config: DataConfig, language: LanguageConfig) -> TextData:
    """Load documents and give them a train, validation and test split, no document being in two of them.

    Documents are split before they are joined, so that no text of the test was trained on. As in load_examples, splits the data
    set has are used, missing ones are cut from the training split (seeded), and of equal documents the one in test stays, then the one
    in validation. Empty documents are dropped. --max_train_samples and --max_eval_samples count documents.

    Raises InputError where the data cannot be read or leaves a split without text.
    """
    source = _load(config, language)
    roles = choose_splits(source.splits, config, lambda split: config.text_column in split.column_names)
    given: dict[str, Given] = {}
    empty = 0
    for role, name in roles.items():
        if name is None:
            continue
        documents = list(_documents(source.splits[name], name, config, language.document_start))
        contents = content([(document,) for document in documents])
        texts = [document for document, found in zip(documents, contents, strict=True) if found is not None]
        empty += len(documents) - len(texts)
        if not texts:
            raise InputError(
                f"expected text in the split {name!r}, found {len(documents)} rows and not a word in them. Check the file, or name "
                f"another column with --text_column (columns: {', '.join(source.splits[name].column_names)})."
            )
        hashes = np.array([[hash_of(part) for part in found] for found in contents if found is not None], np.uint64)
        # Documents have no classes: all are of one.
        given[role] = Given(name, _rows("text", texts), hashes, np.zeros(len(texts), np.int64))
    examples = split_examples(given, config, "texts", source.details)
    text_bytes = {role: sum(len(text.encode()) for text in split["text"]) for role, split in examples.splits.items()}
    details = examples.details | {"bytes": text_bytes, "empty_removed": empty}
    details["documents"] = details.pop("examples")
    del details["conflicting_labels"]
    return TextData(examples.splits, details, examples.fingerprint, text_bytes=text_bytes)


def _rows(column: str, texts: Iterable[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({column: list(texts)}, datasets.Features({column: datasets.Value("string")}))


def _load(config: DataConfig, language: LanguageConfig) -> Source:
    """Files and folders of plain text; everything else as for classification."""
    path = Path(resolve(config.dataset)) if config.dataset is not None else Path()
    column, start = config.text_column, language.document_start
    if path.is_absolute() and path.is_file() and path.suffix.lower() not in FILE_BUILDERS:
        return Source({"train": _rows(column, _read_text_file(path, start))})
    entries = [entry for entry in visible(path) if entry.is_file()] if path.is_absolute() and path.is_dir() else []
    texts = [entry for entry in entries if entry.suffix.lower() in TEXT_SUFFIXES]
    if not texts or any(entry.suffix.lower() in FILE_BUILDERS for entry in entries):
        return load_source(config, TEXTS)
    if any(map(split_named_by, texts)):
        by_split = files_by_split(path, texts)
        return Source(
            {
                split: _rows(column, chain.from_iterable(_read_text_file(file, start) for file in files))
                for split, files in by_split.items()
            }
        )
    # One document a file, in the encodings that class folders may have.
    read = read_text_files(path, [(entry, "") for entry in texts])
    return Source({"train": _rows(column, read["text"])}, details=guessed_encodings({"train": read}))


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
    check_column(split, name, config.text_column, "text_column")
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
    return digest(sorted(tokenizer.get_vocab().items()))
