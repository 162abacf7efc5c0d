"""Texts with a tag for every word: columns of tokens and tags, CoNLL files, and texts with spans of characters.

All become a text, the places of its words in it, and a tag for each word. Tags of spans are written as IOB2, however they were written
(IOB1, IOB2, BIOES, BILOU, IO): B- at the first word of a span, I- at the others, O at all words outside.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from pipelines.core.config import DataConfig
from pipelines.core.disk import digest
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, UNLABELLED
from pipelines.data.annotated import read_lists, read_words, usual_span
from pipelines.data.examples import Examples, Given, hash_of, hash_rows, prepared, split_examples, usable_rows
from pipelines.data.folders import load_source
from pipelines.data.kinds import Kind, Source
from pipelines.data.references import declared_names, tell_of_alike
from pipelines.data.splits import choose_splits
from pipelines.data.tables import CSV_SUFFIXES, JSON_SUFFIXES
from pipelines.data.text import content, map_kept, read_text, tokenizer_content
from pipelines.runtime.spans import OUTSIDE, kept_range

logger = logging.getLogger(__name__)

CONLL_SUFFIXES = (".conll", ".conllu", ".iob", ".iob2", ".bio", ".txt", ".tsv")
PREFIXES = "BIESLUM"
PREFIXED = re.compile(rf"(?P<prefix>[{PREFIXES}])-(?P<kind>.+)", re.DOTALL)
UNTYPED = "span"  # the type of spans whose tags are prefixes alone
# B-PER, B_PER, PER-B and B: how all tags of a data set may be written.
FORMS = (
    PREFIXED,
    re.compile(rf"(?P<prefix>[{PREFIXES}])[_:./|](?P<kind>.+)", re.DOTALL),
    re.compile(rf"(?P<kind>.+)[-_:./|](?P<prefix>[{PREFIXES}])", re.DOTALL),
    re.compile(rf"(?P<prefix>[{PREFIXES}])(?P<kind>)"),
)


@dataclass
class Tagged:
    """A text, its words as places in it, and their tags; None where a row has none."""

    text: str
    starts: list[int]
    ends: list[int]
    tags: list[str] | None


# ---- Reading


def read_tagged(path: Path, config: DataConfig) -> datasets.Dataset:
    """Words and tags, or texts and spans, in the columns that the flags name, a row for each text."""
    name = path.name.lower()
    if name.endswith(CSV_SUFFIXES):
        return read_words(path, config)
    return read_conll(path, config) if name.endswith(CONLL_SUFFIXES) else read_lists(path, config)


def read_conll(path: Path, config: DataConfig) -> datasets.Dataset:
    """The columns of words and of tags, a row for each sentence."""
    text, encoding = read_text(path, config.encoding)
    sentences = list(_sentences(text, path, config))
    if len(sentences) == 1:
        logger.warning(
            "%s has no blank lines, so its %d words are one text; part sentences by blank lines",
            path,
            len(sentences[0][0]),
        )
    counted = [words == [str(number) for number in range(1, len(words) + 1)] for words, _ in sentences]
    if all(counted) and any(len(words) > 1 for words, _ in sentences):
        raise InputError(
            f"expected words in the column {config.text_column!r} of {path}, found their numbers in each sentence; name the column of words with "
            "--text_column and its number from 0, such as 1"
        )
    columns = {config.text_column: [words for words, _ in sentences]}
    columns[config.label_column] = [tags for _, tags in sentences]
    note = "" if encoding == "utf-8" else f"encoding {encoding}"
    return datasets.Dataset.from_dict(columns, info=datasets.DatasetInfo(description=note))


def _sentences(text: str, path: Path, config: DataConfig) -> Iterator[tuple[list[str], list[str]]]:
    """The sentences of a CoNLL file, which blank lines part. Words are in its first column and tags in the last one (of CoNLL-U in FORM and
    UPOS), unless --text_column and --label_column are the numbers of others, counted from 0. Columns stand between white space where all
    lines have then as many; else between tabs, where there are any."""
    lines = re.split(r"\r\n?|\n", text)
    split = [re.split(r"[ \t]+", line.strip(" \t")) for line in lines]
    others = ("#", "-DOCSTART-")
    told = [number for number, line in enumerate(lines) if line.strip() and not line.startswith(others)]
    if len({len(split[number]) for number in told}) > 1 or any("\t\t" in lines[number].strip() for number in told):
        split = [
            [cell.strip() for cell in line.split("\t")] if "\t" in line.strip() else row
            for line, row in zip(lines, split, strict=True)
        ]
    words = [split[number] for number in told]
    width = Counter(map(len, words)).most_common(1)[0][0] if words else 2
    tags = {row[-1] for row in words}
    usual = (1, 3) if path.name.lower().endswith(".conllu") else (0, -1)
    text_place, tag_place = (
        int(name) if name.isdecimal() else place
        for name, place in zip((config.text_column, config.label_column), usual, strict=True)
    )
    if words and _is_header(words, text_place, tag_place):
        header = " ".join(words[0])
        logger.warning("line %d of %s is left out: it holds the names of columns, %r", told[0] + 1, path, header)
        lines[told[0]] = ""
    for is_blank, block in groupby(range(len(lines)), lambda number: not lines[number].strip()):
        rows = []
        for number in block if not is_blank else ():
            line, row = lines[number], split[number]
            # A comment begins with #, as the word # does. CoNLL-U has ranges of words and empty ones, CoNLL-2003 marks of documents.
            comment = line.startswith("#") and (len(row) != width or row[-1] not in tags)
            if comment or re.fullmatch(r"\d+[-.]\d+", row[0]) or row[0] == "-DOCSTART-":
                continue
            if len(row) < max(2, text_place + 1, tag_place + 1) or not row[tag_place]:
                raise InputError(
                    f"expected a word and its tag in line {number + 1} of {path}, found {line!r:.80}; give every word a tag, and part sentences "
                    "by blank lines (other columns: --text_column and --label_column with their numbers from 0)"
                )
            rows.append(row)
        if rows:
            yield [row[text_place] for row in rows], [row[tag_place] for row in rows]


def _is_header(rows: list[list[str]], text_place: int, tag_place: int) -> bool:
    """Whether the first row of a CoNLL file names its columns: its tag looks like none of a span, and no other row has it, nor what the first
    has in any column but that of the words, which may be about words and tokens. Where this is wrong, little is lost: nobody learns a tag
    from one example."""
    columns = [*zip(*(row for row in rows if len(row) == len(rows[0])), strict=True)]
    if len(columns) <= max(1, text_place, tag_place) or 2 * len(columns[0]) <= len(rows) or len(rows) < 2:
        return False
    return not _is_of_span(columns[tag_place][0]) and all(
        column[0] not in column[1:] for place, column in enumerate(columns) if place != text_place
    )


def _is_of_span(tag: str) -> bool:
    tag = tag.upper()
    return tag == OUTSIDE or any(form.fullmatch(tag) for form in FORMS)


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
    names, by_split = _tags(rows, declared_names(source.splits[named["train"]], config), config)
    given = {}
    for role, name in named.items():
        number = {tag: index for index, tag in enumerate(names)}
        labels = [" ".join(str(number[tag]) for tag in tags) for tags in by_split[name]]
        inputs = datasets.Dataset.from_dict(
            {
                "text": [row.text for row in rows[name]],
                "starts": [row.starts for row in rows[name]],
                "ends": [row.ends for row in rows[name]],
                "label": labels,
            }
        )
        hashes = hash_rows(inputs.select_columns("text"), name, TAGGED)
        tagged = [hash_of(f"{row.starts} {label}".encode()) for row, label in zip(rows[name], labels, strict=True)]
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
            yield Tagged("", [], [], None)
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
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    starts = ends - [len(word) for word in words]
    if labels is None or any(label is None or (isinstance(label, str) and not label.strip()) for label in labels):
        return Tagged(" ".join(words), starts.tolist(), ends.tolist(), None)
    if len(labels) != len(words):
        raise InputError(
            f"expected a tag for every token, found {len(words)} tokens and {len(labels)} tags in {where}; correct the row"
        )
    if declared is None and any(isinstance(label, int | float) for label in labels):
        raise InputError(
            f"expected the names of tags, found numbers without names in {where}; give names, or a column of datasets' ClassLabel, which has "
            "them, for the numbers alone do not say which are spans"
        )
    if declared is not None and not all(0 <= label < len(declared) for label in labels):
        return Tagged(" ".join(words), starts.tolist(), ends.tolist(), None)  # hidden: -1
    tags = [str(label) if declared is None else declared[label] for label in labels]
    return Tagged(" ".join(words), starts.tolist(), ends.tolist(), tags)


def _of_spans(text: str, spans: Any, where: str, config: DataConfig) -> Tagged:
    """The words of a text, which are cut where a span begins or ends inside one."""
    if isinstance(spans, dict):  # as `datasets` gives lists of the same keys
        with contextlib.suppress(TypeError, ValueError):  # others are refused below
            spans = [dict(zip(spans, values, strict=True)) for values in zip(*spans.values(), strict=True)]
    spans = [usual_span(one) if isinstance(one, dict) else one for one in spans] if isinstance(spans, list) else spans
    if not isinstance(spans, list | None) or not all(
        isinstance(one, dict) and {"start", "end", "label"} <= one.keys() for one in spans or ()
    ):
        raise InputError(
            f"expected spans [{{start, end, label}}, …] in the column {config.label_column!r}, found {spans!r:.80} in {where}; name the "
            "column with --label_column, or give lists of tokens and of tags"
        )
    for one in spans or ():
        numbers = all(isinstance(one[edge], int | float) and one[edge] == one[edge] // 1 for edge in ("start", "end"))
        if not numbers or one["label"] is None or not str(one["label"]).strip():
            raise InputError(
                f"expected whole numbers as the start and end of a span, and its label, found {one!r:.80} in {where}; correct the row"
            )
    found = sorted((int(one["start"]), int(one["end"]), str(one["label"])) for one in spans or ())
    for place, (start, end, label) in enumerate(found):
        if not 0 <= start < end <= len(text) or not text[start:end].strip() or (place and start < found[place - 1][1]):
            raise InputError(
                f"expected spans of characters within the text that do not overlap, found {label!r} from {start} to {end} in {where}, of "
                f"{len(text)} characters; count in characters (code points), not in bytes, and the end behind the last one"
            )
    cuts = [place for start, end, _ in found for place in (start, end)]
    words = list(words_of(text, cuts))
    tags, place = [], 0
    for start, _ in words:
        while place < len(found) and found[place][1] <= start:
            place += 1
        inside = place < len(found) and found[place][0] <= start
        first = inside and not text[found[place][0] : start].strip()
        tags.append(f"{'B' if first else 'I'}-{found[place][2]}" if inside else OUTSIDE)
    return Tagged(text, [start for start, _ in words], [end for _, end in words], None if spans is None else tags)


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


# ---- Tags


def to_iob2(tags: Sequence[str]) -> list[str]:
    """Tags of spans as IOB2. A span ends before O, before another type, behind E-, L-, S- and U-, and before B-, S- and U-; of tags without
    prefixes (IO) neighbours of one type are one span."""
    found: list[str] = []
    before, ended = "", True
    for tag in tags:
        match = PREFIXED.fullmatch(tag)
        prefix, kind = match.groups() if match else ("I", "" if tag == OUTSIDE else tag)
        begins = ended or prefix in "BSU" or kind != before
        found.append(f"{'B' if begins else 'I'}-{kind}" if kind else OUTSIDE)
        before, ended = kind, not kind or prefix in "ESLU"
    return found


def _tags(
    rows: dict[str, list[Tagged]], declared: list[str] | None, config: DataConfig
) -> tuple[list[str], dict[str, list[list[str]]]]:
    """The names of all tags, those of the training split (the first) or those that it declares, and every row's; tags of spans as IOB2."""
    by_split = {name: [row.tags or [] for row in split] for name, split in rows.items()}
    known = set(declared or chain.from_iterable(next(iter(by_split.values()))))
    usual = _usual_form(known)
    declared, known = declared and [*map(usual, declared)], {*map(usual, known)}
    by_split = {name: [[*map(usual, tags)] for tags in split] for name, split in by_split.items()}
    if OUTSIDE in known:  # else every word has a tag of its own, such as its part of speech
        by_split = {name: [to_iob2(tags) for tags in split] for name, split in by_split.items()}
        kinds = sorted({kind for tag in known for kind in [_type_of(tag)] if kind})
        known = {OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")}
        names = [OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]
    else:
        names = kinds = sorted(known)
        _tell_of_no_outside(Counter(chain.from_iterable(next(iter(by_split.values())))))
    tell_of_alike(kinds, "tags")
    if declared is not None and {*declared} == known:
        names = declared
    if len(names) < 2:
        raise InputError(
            f"expected tags of at least two kinds in the column {config.label_column!r}, found {', '.join(names) or 'none'}; name the column of "
            "tags with --label_column"
        )
    for name, split in by_split.items():
        if unknown := sorted({*chain.from_iterable(split)} - known):
            raise InputError(
                f"expected the tags of the training split ({', '.join(names[:20])}) in every split, found also {', '.join(unknown[:5])} in "
                f"{name!r}; add training examples of it, or correct the tags"
            )
    return names, by_split


def _usual_form(tags: set[str]) -> Callable[[str], str]:
    """From a tag to the same as B-PER or O, where O and all other `tags` are written in another of FORMS, or their prefixes and O in lower
    case. Else they stay, and so do types that only look like it (vitamin_B, e-mail, or E among other letters), which have no beginnings
    and insides: B and I, or one of them where prefixes stand alone, since long spans may be rare."""
    for case in (str.upper, str.lower):
        outside = case(OUTSIDE)
        for pattern in FORMS if outside in tags else ():
            form = re.compile(pattern.pattern.replace(PREFIXES, case(PREFIXES)), re.DOTALL)
            is_usual = form.pattern == PREFIXED.pattern
            found = [form.fullmatch(tag) for tag in tags - {outside}]
            begun = {*case("BI")} & {match["prefix"] for match in found if match}
            if all(found) and len(begun) >= (0 if is_usual else 1 if pattern == FORMS[-1] else 2):
                usual = partial(_as_usual, form, outside)
                if not is_usual:
                    example = min(tags - {outside})
                    logger.warning("the tags are read as spans: %s is %s", example, usual(example))
                return usual
    return lambda tag: tag


def _as_usual(form: re.Pattern[str], outside: str, tag: str) -> str:
    match = form.fullmatch(tag)
    if match:
        return f"{match['prefix'].upper()}-{match['kind'] or UNTYPED}"
    return OUTSIDE if tag == outside else tag


def _tell_of_no_outside(counts: Counter[str]) -> None:
    """Say which tag seems to stand for O, where there are beginnings and insides of spans, but none is O."""
    plain = [tag for tag, _ in counts.most_common() if not PREFIXED.fullmatch(tag)]
    if plain and {"B-", "I-"} <= {tag[:2] for tag in counts}:
        logger.warning(
            "expected the tag O at words outside of spans, found none: every tag is one of its own, not of spans; write O in place of %r if "
            "that stands for it",
            plain[0],
        )


def _type_of(tag: str) -> str:
    match = PREFIXED.fullmatch(tag)
    return match[2] if match else "" if tag == OUTSIDE else tag


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
        every_offset, every_special = tokens.pop("offset_mapping"), tokens.pop("special_tokens_mask")
        labels: list[list[int]] = []
        words: list[list[int]] = []
        token_starts: list[list[int]] = []
        lost = 0
        for row, windows in groupby(range(len(origins)), lambda window: origins[window]):
            text, numbers = batch["text"][row], list(windows)
            if "starts" in batch:
                starts, ends = batch["starts"][row], batch["ends"][row]
                tags = [int(tag) for tag in batch["label"][row].split()]
            else:
                starts, ends = map(list, zip(*words_of(text), strict=True))
                tags = [UNLABELLED] * len(starts)
            word, found = -1, 0  # the last word that a token began
            for number in numbers:
                offsets = every_offset[number]
                places = [place for place, special in enumerate(every_special[number]) if not special]
                first, after = kept_range(number - numbers[0], number == numbers[-1], len(places), overlap)
                labels.append([IGNORED] * len(offsets))
                words.append([IGNORED] * len(offsets))
                token_starts.append([IGNORED] * len(offsets))
                for place in places[first:after]:
                    start, end = offsets[place]
                    while start < end and text[start].isspace():
                        start += 1
                    own = bisect_right(starts, start) - 1
                    if own < 0 or not start < min(end, ends[own]):
                        continue
                    if own > word:
                        label, word, found = tags[own], own, found + 1
                    elif goes_on and tags[own] >= 0:
                        label = inside[tags[own]]
                    else:
                        continue
                    labels[-1][place], words[-1][place], token_starts[-1][place] = label, own, start
            lost += len(tags) - found
        if lost:
            logger.warning(
                "%d words have no token of their own (the tokenizer leaves them out or joins them to others): they are not read",
                lost,
            )
        numbers = [rows[origin] for origin in origins]
        return {**tokens, "labels": labels, "words": words, "token_starts": token_starts, "text_number": numbers}

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
