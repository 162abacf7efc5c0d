"""Documents for language models: found in files and tables, and split before they are joined."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import datasets
import numpy as np

from pipelines.core.config import DataConfig, LanguageConfig
from pipelines.core.errors import InputError
from pipelines.core.sources import resolve
from pipelines.data.examples import Examples, Given, hash_rows, prepared, split_examples
from pipelines.data.folders import (
    SPLIT_NAMES,
    begins_with_split,
    files_by_split,
    how_read,
    load_source,
    say_left_out,
    split_named_by,
)
from pipelines.data.kinds import Source
from pipelines.data.remembered import visible
from pipelines.data.splits import choose_splits
from pipelines.data.text import TEXTS, read_text_files

logger = logging.getLogger(__name__)

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
    source = load_texts(config, language.document_start)
    roles = choose_splits(source.splits, config, lambda split: config.text_column in split.column_names)
    given: dict[str, Given] = {}
    empty = 0
    for role, name in roles.items():
        if name is None:
            continue
        documents = rows_of("text", documents_of(source.splits[name], name, config, language.document_start))
        hashes = hash_rows(documents, name, TEXTS)
        usable = np.flatnonzero(hashes[:, 0])
        empty += len(documents) - len(usable)
        if not len(usable):
            raise InputError(
                f"expected text in the split {name!r}, found {len(documents)} rows and not a word in them. Check the file, or name "
                f"another column with --text_column (columns: {', '.join(source.splits[name].column_names)})."
            )
        # Documents have no classes: all are of one.
        given[role] = Given(name, documents.select(usable), hashes[usable], np.zeros(len(usable), np.int64))
    examples = split_examples(given, config, "texts", source.details)
    text_bytes = {role: sum(len(text.encode()) for text in split["text"]) for role, split in examples.splits.items()}
    details = examples.details | {"bytes": text_bytes, "empty_removed": empty}
    details["documents"] = details.pop("examples")
    del details["conflicting_labels"]
    return TextData(examples.splits, details, examples.fingerprint, hashes=examples.hashes, text_bytes=text_bytes)


def rows_of(column: str, texts: Iterable[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({column: list(texts)}, datasets.Features({column: datasets.Value("string")}))


def load_texts(config: DataConfig, document_start: str | None = None) -> Source:
    """Texts without labels: files and folders of plain text; everything else as for classification."""
    path = Path(resolve(config.dataset)) if config.dataset is not None else Path()
    is_folder = path.is_absolute() and path.is_dir()
    entries = [entry for entry in visible(path) if entry.is_file()] if is_folder else [path]
    # A file on its own is text unless it is a table; among others, its name says so.
    texts = [entry for entry in entries if entry.suffix.lower() in TEXT_SUFFIXES or not is_folder]
    tables = any(entry.name.lower().endswith(TEXTS.suffixes) for entry in entries)
    # One text among others may be about a test.
    found = [*map(split_named_by, texts)]
    named = any(map(begins_with_split, texts)) or ("train" in found and None not in found)
    folders = [entry.name.lower() for entry in visible(path) if entry.is_dir()] if is_folder else []
    in_splits = not named and any(SPLIT_NAMES.get(name) == "train" for name in folders)  # beside a README
    if not path.is_absolute() or not texts or tables or in_splits:
        return load_source(config, TEXTS)
    say_left_out(path, [entry for entry in visible(path) if entry not in texts] if is_folder else [])
    by_split = files_by_split(path, texts) if is_folder and named else {"train": texts}
    read = {
        split: read_text_files(path if is_folder else path.parent, [(file, "") for file in files], config)
        for split, files in by_split.items()
    }
    splits = {}
    for split, table in read.items():
        whole = is_folder and not named  # one document a file
        parts = ([row["text"]] if whole else _parts(row, document_start) for row in table)
        splits[split] = rows_of(config.text_column, chain.from_iterable(parts))
    return Source(splits, how_read(read.values()))


def _parts(file: dict[str, str], document_start: str | None) -> list[str]:
    """The documents of one text file: what blank lines part, or else its lines; with a pattern its lines, of which that makes documents."""
    text = file["text"].replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise InputError(f"expected text in {file['file']}, found an empty file. Write it again, or give another file.")
    if document_start:
        return list(io.StringIO(text))  # splitlines() would also part lines at a form feed
    documents = re.split(r"\n[ \t]*\n\s*", text.strip())
    if len(documents) == 1 and len(lines := text.strip().split("\n")) > 1:
        logger.warning(
            "%s has no blank lines, so each of its %d lines is a document; --document_start names the first line of one",
            file["file"],
            len(lines),
        )
        return lines
    return documents


def documents_of(split: datasets.Dataset, name: str, config: DataConfig, document_start: str | None) -> Iterator[str]:
    """The documents of a split: its rows, or runs of rows of which the first matches `document_start`."""
    column = prepared(split, name, config, TEXTS, labelled=False)[config.text_column]
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
