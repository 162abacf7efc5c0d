"""Texts: read from files, compared without their white space, tokenized and padded."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from pipelines.core.config import DataConfig
from pipelines.core.disk import digest
from pipelines.core.errors import InputError
from pipelines.core.task import Collate
from pipelines.data.encodings import encoding_of
from pipelines.data.examples import Examples
from pipelines.data.kinds import Kind
from pipelines.data.references import dtype
from pipelines.data.remembered import folder
from pipelines.data.tables import TABLE_SUFFIXES, read_table

logger = logging.getLogger(__name__)

# Part of the key of cached tokens, lines and sentences: raise it when what is written changes.
_KEPT_VERSION = 4


def read_text(path: Path, encoding: str | None = None) -> tuple[str, str]:
    """The text of a file and its encoding: the one that is given, UTF-8, or else a guess."""
    content = path.read_bytes()
    try:
        encoding = encoding or encoding_of(io.BytesIO(content), path, path.name.lower().endswith(TABLE_SUFFIXES))
        text = content.decode(encoding).removeprefix("\ufeff")
        if "\0" not in text:
            return text, encoding.removesuffix("-sig")
    except UnicodeDecodeError:
        pass
    raise InputError(
        f"expected text files in UTF-8 or another encoding, found other bytes in {path}; convert or remove the file, or name its encoding "
        "with --encoding"
    )


def read_text_files(folder: Path, files: list[tuple[Path, str | None]], config: DataConfig) -> datasets.Dataset:
    """Each file as a row; a warning names those that are not UTF-8."""
    texts = [read_text(path, config.encoding) for path, _ in files]
    others = [(path, encoding) for (path, _), (_, encoding) in zip(files, texts, strict=True) if encoding != "utf-8"]
    if others:
        logger.warning(
            "%d of the text files in %s are not UTF-8; %s is read as %s (say otherwise with --encoding)",
            len(others),
            folder,
            others[0][0].relative_to(folder),
            others[0][1],
        )
    rows = {
        "text": [text for text, _ in texts],
        "label": [label for _, label in files],
        "file": [os.path.relpath(path, folder) for path, _ in files],
        "encoding": [encoding for _, encoding in texts],
    }
    return datasets.Dataset.from_dict(rows, datasets.Features(dict.fromkeys(rows, datasets.Value("string"))))


def _prepare(split: datasets.Dataset, column: str, config: DataConfig) -> datasets.Dataset | None:
    found = dtype(split, column)
    if found.startswith(("int", "uint", "float", "bool", "null")):
        split = split.cast_column(column, datasets.Value("string"))
    elif found not in ("string", "large_string"):
        return None
    return first_lines(split, column) if config.text_part == "first_line" else split


# ---- Parts of texts

# An end of a sentence: its mark, perhaps a quotation mark or bracket, and white space that no small letter follows. "Mr. Smith" is cut, too,
# which does no harm where a teacher labels what it is given.
SENTENCE_END = re.compile(r"(?<=[.!?…])\s+(?![a-z])|(?<=[.!?…][\"'”’»)\]])\s+(?![a-z])|(?<=[。！？])")
SENTENCE_CHARACTERS = 20  # of the shortest sentence that is an example


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def length_of(text: str) -> float:
    """Words and marks, and of as many the characters: near the number of tokens, whatever the tokenizer."""
    return len(re.findall(r"\w+|[^\w\s]", text)) + len(text) / 1e9


def title_and_passages(text: str, characters: int) -> tuple[str, list[str]]:
    """The first line of a text, and its other lines in passages of so many characters, from the last one back; what is left over at their
    beginning is none, unless it is all there is."""
    title, *others = lines_of(text) or [""]
    body = "\n".join(others)
    ends = range(len(body), min(len(body), characters) - 1, -characters) if body else []
    return title, [body[max(0, end - characters) : end] for end in ends]


def sentences_of(text: str) -> list[str]:
    """The sentences of a text; none reaches over the end of a line."""
    return [part.strip() for line in lines_of(text) for part in SENTENCE_END.split(line) if part.strip()]


def first_lines(split: datasets.Dataset, column: str) -> datasets.Dataset:
    """The split with the first line of each text that is not blank in place of the text."""

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {column: [(lines_of(text or "") or [text])[0] for text in batch[column]]}

    return map_kept(split, cut, "lines", [split._fingerprint, column], features=split.features)


def first_sentences(rows: datasets.Dataset, most: int) -> datasets.Dataset:
    """The first sentences of each text in the column `text`, at most so many of it, very short ones left out."""

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        long = ([one for one in sentences_of(text or "") if len(one) >= SENTENCE_CHARACTERS] for text in batch["text"])
        return {"text": [sentence for sentences in long for sentence in sentences[:most]]}

    return map_kept(rows, cut, "sentences", [rows._fingerprint, most], features=rows.features)


def map_kept(
    split: datasets.Dataset,
    function: Callable[[dict[str, list[Any]]], Any],
    name: str,
    key: list[Any],
    **arguments: Any,
) -> datasets.Dataset:
    """The split through a function of batches, kept in the cache of `datasets`; `key` is all that the result depends on.

    Beside the source's own cache files would be inside the user's folder where the data is one.
    """
    fingerprint = digest([_KEPT_VERSION, *key])[:32]
    return split.map(
        function,
        batched=True,
        cache_file_name=str(folder() / f"{name}-{fingerprint}.arrow"),
        new_fingerprint=f"{name}-{fingerprint}",
        desc=name.capitalize(),
        **arguments,
    )


def content(rows: list[tuple[Any, ...]]) -> list[tuple[bytes, bytes] | None]:
    """Of each row its texts, and the texts with white space folded: what differs in white space only is a duplicate."""
    folded = [[" ".join((text or "").split()) for text in row] for row in rows]
    return [
        (json.dumps(row).encode(), "\0".join(texts).encode()) if all(texts) else None
        for row, texts in zip(rows, folded, strict=True)
    ]


TEXTS = Kind(
    noun="texts",
    usable="a text",
    columns={"text_column": "text", "text_pair_column": "text_pair"},
    suffixes=TABLE_SUFFIXES,
    read_file=read_table,
    read_files=read_text_files,
    prepare=_prepare,
    content=content,
)


# ---- Tokens


def tokenize(data: Examples, tokenizer: Any, max_length: int) -> datasets.DatasetDict:
    """Token ids of every split, cut to `max_length` tokens, not padded, in the order of the examples.

    The columns are input_ids, attention_mask, token_type_ids (also where the tokenizer's own model takes none), labels and length. Tokens
    are kept in the cache of `datasets`, keyed by the data's content, the tokenizer and the length.
    """

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = batch["text"], batch.get("text_pair")
        tokens = tokenizer(
            *texts, truncation=True, max_length=max_length, return_length=True, return_token_type_ids=True
        )
        return {**tokens, "labels": batch["label"]}

    key = [data.fingerprint, tokenizer_content(tokenizer), max_length]
    # The call leaves its truncation in the tokenizer, so that one saved later would tell whether the tokens came from the cache.
    tokenizer = copy.deepcopy(tokenizer)
    return datasets.DatasetDict(
        {
            name: map_kept(split, encode, "tokens", [*key, name], remove_columns=split.column_names)
            for name, split in data.splits.items()
        }
    )


def tokenizer_content(tokenizer: Any) -> list[str]:
    """What decides the tokens, apart from the truncation and padding that the last call left in the tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {"vocabulary": tokenizer.get_vocab(), "settings": tokenizer.init_kwargs}
    else:
        content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    sides = [tokenizer.truncation_side, *tokenizer.model_input_names]
    return [type(tokenizer).__name__, *sides, json.dumps(content, sort_keys=True, default=str)]


def collate(tokenizer: Any) -> Collate:
    """A collator that pads a batch of tokenize()'s rows to its own longest, and leaves out `length`, `group`, and token types that the
    tokenizer's model does not take.

    Token columns come out as (batch, longest) int64, `labels` as (batch,) int64, and any other column of equally long
    number lists, such as `teacher_logits`, as (batch, …) in float32 or int64.
    """
    from transformers import DataCollatorWithPadding

    left_out = {"length", "group", "token_type_ids"} - {*tokenizer.model_input_names}
    return partial(_collate_batch, DataCollatorWithPadding(tokenizer), left_out)


def _collate_batch(
    pad: Callable[[list[dict[str, Any]]], Any], left_out: set[str], rows: list[dict[str, Any]]
) -> dict[str, Tensor]:
    # At module level, so that the workers of a DataLoader can receive it pickled.
    return dict(pad([{name: value for name, value in row.items() if name not in left_out} for row in rows]))
