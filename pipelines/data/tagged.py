"""Texts with a tag for every word: columns of tokens and tags, CoNLL files, and texts with spans of characters.

All become a text, the places of its words in it, and a tag for each word. Tags of spans are written as IOB2, however they were written
(IOB1, IOB2, BIOES, BILOU, IO): B- at the first word of a span, I- at the others, O at all words outside.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from pipelines.core.config import DataConfig
from pipelines.core.disk import digest
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, UNLABELLED
from pipelines.data.examples import Examples, Given, hash_of, hash_rows, prepared, split_examples, usable_rows
from pipelines.data.folders import load_source
from pipelines.data.kinds import Kind, Source
from pipelines.data.references import declared_names
from pipelines.data.splits import choose_splits
from pipelines.data.tables import CSV_SUFFIXES, JSON_SUFFIXES
from pipelines.data.tagged_files import CONLL_SUFFIXES, read_tagged, usual_span
from pipelines.data.tags import names_and_tags
from pipelines.data.text import content, map_kept, tokenizer_content
from pipelines.runtime.spans import OUTSIDE, kept_range

logger = logging.getLogger(__name__)

# Of a token its label, the number of its word, and where it begins.
TokenLabel = tuple[int, int, int]
NO_LABEL = (IGNORED, IGNORED, IGNORED)


@dataclass
class Tagged:
    """A text, its words as places in it, and their tags; None where a row has none."""

    text: str
    words: list[tuple[int, int]]
    tags: list[str] | None


# ---- Reading


def _no_files(folder: Path, files: Any, config: DataConfig) -> datasets.Dataset:
    raise InputError(
        f"expected files of tagged texts in {folder}, found folders of other files; give json, jsonl, parquet, csv or CoNLL files"
    )


TAGGED = Kind(
    noun="texts",
    usable="words",
    columns={"text_column": "text"},
    suffixes=(*JSON_SUFFIXES, ".parquet", *CSV_SUFFIXES, *CONLL_SUFFIXES),
    read_file=read_tagged,
    read_files=_no_files,
    prepare=lambda split, column, config: split,
    content=content,
)


def load_tagged(config: DataConfig, source: Source | None = None) -> Examples:
    """Load and check a data set of tagged texts, and give it a train, validation and test split, as load_examples does.

    The splits have the columns `text`, `starts` and `ends` (of each word, in characters) and `label`: the ids of its tags, as text with
    spaces between them. `label_names` are the tags; those of spans are O and B- and I- of every type.
    """
    source = source or load_source(config, TAGGED)
    roles = choose_splits(source.splits, config, partial(_has_tags, config=config))
    named = {role: name for role, name in roles.items() if name is not None}
    rows = {
        name: _checked(list(_rows(prepared(source.splits[name], name, config, TAGGED), name, config)), name, config)
        for name in named.values()
    }
    written = {name: [row.tags or [] for row in split] for name, split in rows.items()}
    declared = declared_names(source.splits[named["train"]], config)
    names, by_split = names_and_tags(written, declared, config.label_column)
    number = {tag: index for index, tag in enumerate(names)}
    given = {}
    for role, name in named.items():
        labels = [" ".join(str(number[tag]) for tag in tags) for tags in by_split[name]]
        starts = [[start for start, _ in row.words] for row in rows[name]]
        ends = [[end for _, end in row.words] for row in rows[name]]
        columns = {"text": [row.text for row in rows[name]], "starts": starts, "ends": ends, "label": labels}
        inputs = datasets.Dataset.from_dict(columns)
        hashes = hash_rows(inputs.select_columns("text"), name, TAGGED)
        tagged = [hash_of(f"{begins} {label}".encode()) for begins, label in zip(starts, labels, strict=True)]
        given[role] = Given(name, inputs, hashes, np.array(tagged, np.uint64).view(np.int64))
    examples = split_examples(given, config, TAGGED.noun, source.details)
    examples.label_names, examples.fingerprint = names, digest([examples.fingerprint, names])
    return examples


def _checked(rows: list[Tagged], name: str, config: DataConfig) -> list[Tagged]:
    good = np.array([row.tags is not None and bool(row.text.strip()) for row in rows], bool)
    return [rows[number] for number in usable_rows(good, "words and their tags", name, config)]


def _has_tags(split: datasets.Dataset, config: DataConfig) -> bool:
    """Whether a split that no flag names can be scored: hidden tags are empty, or -1."""
    rows = split[config.label_column][:] if config.label_column in split.column_names else []
    rows = [any(row.values()) if isinstance(row, dict) else row for row in rows]
    return any(row and (not isinstance(row, list) or row[0] not in (None, "", -1)) for row in rows)


def _rows(split: datasets.Dataset, name: str, config: DataConfig) -> Iterator[Tagged]:
    declared = declared_names(split, config)
    for number, (given, labels) in enumerate(
        zip(split[config.text_column][:], split[config.label_column][:], strict=True)
    ):
        where = f"row {number} of the split {name!r}"
        if given is None:
            yield Tagged("", [], None)
        elif isinstance(given, str):
            yield _of_spans(given, labels, where, config)
        elif isinstance(given, list) and isinstance(labels, list | None):
            yield _of_tokens(given, labels, declared, where)
        else:
            raise InputError(
                f"expected lists of tokens and of tags, or a text and a list of spans, in the columns {config.text_column!r} and "
                f"{config.label_column!r}, found {type(given).__name__} and {type(labels).__name__} in {where}; name the right ones with "
                "--text_column and --label_column"
            )


def _of_tokens(tokens: list[Any], labels: list[Any] | None, declared: list[str] | None, where: str) -> Tagged:
    if any(isinstance(one, list | dict) for one in [*tokens, *(labels or ())]):
        raise InputError(
            f"expected a list of words and a list of their tags, found lists or objects in one of these in {where}; give every word as a text "
            "and one tag for it"
        )
    words = ["" if token is None else str(token) for token in tokens]
    starts = accumulate((len(word) + 1 for word in words), initial=0)
    found = Tagged(
        " ".join(words), [(start, start + len(word)) for word, start in zip(words, starts, strict=False)], None
    )
    if labels is None or any(label is None or (isinstance(label, str) and not label.strip()) for label in labels):
        return found
    if len(labels) != len(words):
        raise InputError(
            f"expected a tag for every token, found {len(words)} tokens and {len(labels)} tags in {where}; correct the row"
        )
    if declared is None and any(isinstance(label, int | float) for label in labels):
        raise InputError(
            f"expected the names of tags, found numbers without names in {where}; give names, or a column of datasets' ClassLabel, which has "
            "them, for the numbers alone do not say which are spans"
        )
    if declared is None:
        found.tags = [str(label) for label in labels]
    elif all(0 <= label < len(declared) for label in labels):  # else hidden: -1
        found.tags = [declared[label] for label in labels]
    return found


def _of_spans(text: str, spans: Any, where: str, config: DataConfig) -> Tagged:
    """The words of a text, which are cut where a span begins or ends inside one."""
    found = _checked_spans(text, spans, where, config)
    words = list(words_of(text, [place for start, end, _ in found for place in (start, end)]))
    begins = [start for start, _, _ in found]
    tags = [OUTSIDE] * len(words)
    for word, (start, _) in enumerate(words):
        first, end, label = found[bisect_right(begins, start) - 1] if found else (0, 0, "")
        if first <= start < end:
            tags[word] = f"{'I' if text[first:start].strip() else 'B'}-{label}"
    return Tagged(text, words, None if spans is None else tags)


def _checked_spans(text: str, spans: Any, where: str, config: DataConfig) -> list[tuple[int, int, str]]:
    """Start, end and label of each span, in the order of the text; raises InputError where one is not in it, or overlaps another."""
    given = [] if spans is None else spans
    if isinstance(given, dict):  # as `datasets` gives lists of the same keys
        with contextlib.suppress(TypeError, ValueError):  # others are refused below
            given = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        given = [usual_span(one) for one in given]
    if not isinstance(given, list) or not all(
        isinstance(one, dict) and {"start", "end", "label"} <= one.keys() for one in given
    ):
        raise InputError(
            f"expected spans [{{start, end, label}}, …] in the column {config.label_column!r}, found {spans!r:.80} in {where}; name the "
            "column with --label_column, or give lists of tokens and of tags"
        )
    for one in given:
        numbers = all(isinstance(one[edge], int | float) and one[edge] == one[edge] // 1 for edge in ("start", "end"))
        if not numbers or one["label"] is None or not str(one["label"]).strip():
            raise InputError(
                f"expected whole numbers as the start and end of a span, and its label, found {one!r:.80} in {where}; correct the row"
            )
    found = sorted((int(one["start"]), int(one["end"]), str(one["label"])) for one in given)
    for place, (start, end, label) in enumerate(found):
        if not 0 <= start < end <= len(text) or not text[start:end].strip() or (place and start < found[place - 1][1]):
            raise InputError(
                f"expected spans of characters within the text that do not overlap, found {label!r} from {start} to {end} in {where}, of "
                f"{len(text)} characters; count in characters (code points), not in bytes, and the end behind the last one"
            )
    return found


@lru_cache(maxsize=1 << 16)
def _kind_of(character: str) -> str:
    if character.isspace():
        return " "
    return character if unicodedata.category(character)[0] in "PS" else "w"


def words_of(text: str, cuts: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """Where each word begins and ends: what white space and punctuation part, and each mark of punctuation; cut at the places `cuts`."""
    edges = {0, len(text), *cuts}
    kinds = [_kind_of(character) for character in text]
    for place in range(1, len(text)):
        if kinds[place] != kinds[place - 1] or kinds[place] != "w":
            edges.add(place)
    ordered = sorted(edges)
    yield from ((start, end) for start, end in zip(ordered, ordered[1:], strict=False) if kinds[start] != " ")


# ---- Tokens


def tag_windows(
    data: Examples, tokenizer: Any, max_length: int, overlap: int, all_subtokens: bool
) -> datasets.DatasetDict:
    """The windows of every text: so many tokens each, of which `overlap` are those of the window before.

    The columns are those of tokenize(), with a label for each token: the tag of a word at its first token, where that token counts (see
    kept_range), and IGNORED anywhere else. In training, with `all_subtokens`, the other tokens of a word have labels, too: that of the
    inside of its span. Of a data set without tags every first token is UNLABELLED. `words` has at each token with a label the number of
    its word, `token_starts` its first character, and `text_number` is the row of the data set.
    """
    names = data.label_names
    inside = [
        names.index(f"I-{name[2:]}") if name.startswith("B-") and f"I-{name[2:]}" in names else index
        for index, name in enumerate(names)
    ]

    def encode(batch: dict[str, list[Any]], rows: list[int], goes_on: bool) -> dict[str, list[Any]]:
        tokens = tokenizer(
            batch["text"],
            truncation=True,
            max_length=max_length,
            stride=overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_token_type_ids=True,
            return_length=True,
        )
        origins = tokens.pop("overflow_to_sample_mapping")
        windows = list(zip(tokens.pop("offset_mapping"), tokens.pop("special_tokens_mask"), strict=True))
        labelled: list[list[TokenLabel]] = []
        lost = 0
        for row, numbers in groupby(range(len(origins)), lambda window: origins[window]):
            text = batch["text"][row]
            if "starts" in batch:
                places = list(zip(batch["starts"][row], batch["ends"][row], strict=True))
                tags = [int(tag) for tag in batch["label"][row].split()]
            else:
                places = list(words_of(text))
                tags = [UNLABELLED] * len(places)
            found = _label_tokens(
                text, places, tags, [windows[number] for number in numbers], overlap, inside if goes_on else None
            )
            lost += len({*range(len(tags))} - {word for window in found for _, word, _ in window})
            labelled += found
        if lost:
            logger.warning(
                "%d words have no token of their own (the tokenizer leaves them out or joins them to others): they are not read",
                lost,
            )
        columns = {
            name: [[label[place] for label in window] for window in labelled]
            for place, name in enumerate(("labels", "words", "token_starts"))
        }
        return {**tokens, **columns, "text_number": [rows[origin] for origin in origins]}

    key = [data.fingerprint, *tokenizer_content(tokenizer), max_length, overlap, all_subtokens]
    tokenizer = copy.deepcopy(tokenizer)  # the call leaves its truncation in it
    return datasets.DatasetDict(
        {
            name: map_kept(
                split,
                partial(encode, goes_on=all_subtokens and name == "train"),
                "windows",
                [*key, name],
                remove_columns=split.column_names,
                with_indices=True,
            )
            for name, split in data.splits.items()
        }
    )


def _label_tokens(
    text: str,
    places: list[tuple[int, int]],
    tags: list[int],
    windows: list[tuple[list[tuple[int, int]], list[int]]],
    overlap: int,
    inside: list[int] | None,
) -> list[list[TokenLabel]]:
    """The labels of all tokens in the windows of a text, each the places of its tokens and which are special ones; `places` are those of its
    words. With `inside`, by the number of a tag that of the inside of its span, also tokens in a word have one."""
    starts = [start for start, _ in places]
    last, found = -1, []  # the last word that a token began
    for number, (offsets, special) in enumerate(windows):
        labels = [NO_LABEL] * len(offsets)
        plain = [token for token, is_special in enumerate(special) if not is_special]
        first, after = kept_range(number, number == len(windows) - 1, len(plain), overlap)
        for token in plain[first:after]:
            start, end = offsets[token]
            while start < end and text[start].isspace():
                start += 1
            word = bisect_right(starts, start) - 1
            if word < 0 or not start < min(end, places[word][1]):
                continue
            if word > last:
                labels[token], last = (tags[word], word, start), word
            elif inside is not None and tags[word] >= 0:
                labels[token] = (inside[tags[word]], word, start)
        found.append(labels)
    return found
