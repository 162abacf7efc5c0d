"""Files of tagged texts as columns of words and tags, or of texts and spans: CoNLL, a word a row, what annotation tools export."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError
from pipelines.data.objects import json_objects, nested_column
from pipelines.data.tables import CSV_SUFFIXES, open_text, read_table
from pipelines.data.tags import is_of_span
from pipelines.data.text import read_text

logger = logging.getLogger(__name__)

CONLL_SUFFIXES = (".conll", ".conllu", ".iob", ".iob2", ".bio", ".txt", ".tsv")
# What columns are called where no flag names them.
SENTENCE_COLUMNS = ("Sentence #", "sentence_id", "sentence_idx", "sentence")
WORD_COLUMNS = ("Word", "word", "words", "text")  # beside words a text is the whole sentence
TAG_COLUMNS = ("label", "Tag", "tag", "labels")
SPAN_COLUMNS = ("labels", "entities", "spans")
ANSWER = "answer"  # of Prodigy's annotators
SPAN_KEYS = {"start_offset": "start", "end_offset": "end"}  # of doccano


def read_tagged(path: Path, config: DataConfig) -> datasets.Dataset:
    """Words and tags, or texts and spans, in the columns that the flags name, a row for each text."""
    name = path.name.lower()
    if name.endswith(CSV_SUFFIXES) or (name.endswith(".tsv") and _names_sentences(path, config)):
        return read_words(path, config)
    return read_conll(path, config) if name.endswith(CONLL_SUFFIXES) else read_lists(path, config)


# ---- CoNLL: a word and its tag on every line, blank lines between sentences


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
    UPOS), unless --text_column and --label_column are the numbers of others, counted from 0."""
    lines = re.split(r"\r\n?|\n", text)
    others = ("#", "-DOCSTART-")
    told = [number for number, line in enumerate(lines) if line.strip() and not line.startswith(others)]
    split = _cells(lines, told)
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


def _cells(lines: list[str], told: list[int]) -> list[list[str]]:
    """The cells of each line: between white space where all the lines `told` have then as many; else between tabs, where there are any."""
    split = [re.split(r"[ \t]+", line.strip(" \t")) for line in lines]
    if len({len(split[number]) for number in told}) < 2 and not any("\t\t" in lines[number].strip() for number in told):
        return split
    return [
        [cell.strip() for cell in line.split("\t")] if "\t" in line.strip() else row
        for line, row in zip(lines, split, strict=True)
    ]


def _is_header(rows: list[list[str]], text_place: int, tag_place: int) -> bool:
    """Whether the first row of a CoNLL file names its columns: its tag looks like none of a span, and no other row has it, nor what the first
    has in any column but that of the words, which may be about words and tokens. Where this is wrong, little is lost: nobody learns a tag
    from one example."""
    columns = [*zip(*(row for row in rows if len(row) == len(rows[0])), strict=True)]
    if len(columns) <= max(1, text_place, tag_place) or 2 * len(columns[0]) <= len(rows) or len(rows) < 2:
        return False
    return not is_of_span(columns[tag_place][0]) and all(
        column[0] not in column[1:] for place, column in enumerate(columns) if place != text_place
    )


# ---- Tables of words, and what annotation tools export


def _names_sentences(path: Path, config: DataConfig) -> bool:
    """Whether the first line of a tsv file names columns of words and of the numbers of sentences, so that it is no CoNLL file."""
    text, _ = read_text(path, config.encoding)
    names = {cell.strip(' "') for cell in re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0].split("\t")}
    return not (names.isdisjoint(SENTENCE_COLUMNS) or names.isdisjoint({*WORD_COLUMNS, config.text_column}))


def read_words(path: Path, config: DataConfig) -> datasets.Dataset:
    """A csv or tsv file with a word in each row, as a row for each sentence, whose number stands in all of its rows or in the first."""
    words = WORD_COLUMNS if config.text_column == DataConfig.text_column else (config.text_column,)
    tags = TAG_COLUMNS if config.label_column == DataConfig.label_column else (config.label_column,)
    named: Any = [*tags, *words, *SENTENCE_COLUMNS]
    table = read_table(path, replace(config, label_column=named))
    found = [[name for name in names if name in table.column_names] for names in (SENTENCE_COLUMNS, words, tags)]
    numbers = [(number or "").strip() for number in table[found[0][0]][:]] if found[0] and found[1] else []
    if not any(numbers[:1]):
        raise InputError(
            f"expected a word in every row of {path}, with the columns {SENTENCE_COLUMNS[0]!r} (filled at least at the first word of each "
            f"sentence), {WORD_COLUMNS[0]!r} and {TAG_COLUMNS[1]!r}, found the columns {', '.join(map(repr, table.column_names[:10]))}; "
            "rename the first, and name words and tags with --text_column and --label_column"
        )
    # Also behind an empty cell a number begins a sentence, even where it is that of the sentence before.
    begins = [row for row, (before, number) in enumerate(pairwise(["", *numbers])) if number and number != before]
    _check_order([(row, numbers[row]) for row in begins], path)
    cells = {config.text_column: table[found[1][0]][:]}
    cells |= {config.label_column: table[found[2][0]][:]} if found[2] else {}
    # A row of nothing but separators may part sentences.
    told = [any(cell is not None for cell in row) for row in zip(*cells.values(), strict=True)]
    places = [[row for row in range(*edges) if told[row]] for edges in pairwise([*begins, len(numbers)])]
    rows = {
        name: [[column[row] for row in sentence] for sentence in places if sentence] for name, column in cells.items()
    }
    return datasets.Dataset.from_dict(rows, info=datasets.DatasetInfo(description=table.info.description))


def _check_order(sentences: list[tuple[int, str]], path: Path) -> None:
    """Raise InputError where the rows of a sentence do not stand together. `sentences` are the first rows of all with their numbers. These may
    begin anew, as in each document: then they go back to the first, and from there on have the order in which they came first."""
    order: dict[str, int] = {}
    ranks = [order.setdefault(number, len(order)) for _, number in sentences]
    back = [place for place, (before, rank) in enumerate(pairwise(ranks), 1) if rank <= before]
    if parted := [sentences[place] for place in back if ranks[place]]:
        row, number = parted[0]
        raise InputError(
            f"expected the rows of each sentence one after another in {path}, found {number!r} again in row {row} (counted from 0); sort the "
            "rows by sentence, write its number into each of them, or give every sentence a number of its own"
        )
    if back:
        logger.warning(
            "the sentences of %s are numbered from %r anew %d times: a number that comes back is that of another sentence",
            path,
            sentences[0][1],
            len(back),
        )


def read_lists(path: Path, config: DataConfig) -> datasets.Dataset:
    """A json, jsonl or parquet file with lists of tags or of spans, or an export of Label Studio."""
    table = read_table(path, config, nested=True)
    if {"data", "annotations"} <= {*table.column_names} and config.text_column not in table.column_names:
        return _read_tasks(path, config, table.info)
    found = [name for name in SPAN_COLUMNS if name in table.column_names]
    is_usual = config.label_column == DataConfig.label_column and config.label_column not in table.column_names
    if is_usual and len(found) == 1:
        logger.warning(
            "the labels of %s are those of its column %r (--label_column names another)", path.name, found[0]
        )
        table = read_table(path, replace(config, label_column=found[0]), nested=True)
        table = table.rename_column(found[0], config.label_column)
    return _accepted(table, path, config) if ANSWER in table.column_names else table


def _accepted(table: datasets.Dataset, path: Path, config: DataConfig) -> datasets.Dataset:
    """The rows that no annotator of Prodigy rejected or ignored; all of them where the column has answers of another kind."""
    answers = read_table(path, replace(config, text_column=ANSWER, label_column=ANSWER), nested=True)[ANSWER][:]
    kept = [row for row, answer in enumerate(answers) if answer in ("accept", None)]
    if len(kept) == len(answers) or any(answer not in ("accept", "reject", "ignore", None) for answer in answers):
        return table
    logger.warning(
        "%d of %d rows of %s are left out: their %s is 'reject' or 'ignore'",
        len(answers) - len(kept),
        len(answers),
        path.name,
        ANSWER,
    )
    return table.select(kept)


def _read_tasks(path: Path, config: DataConfig, info: datasets.DatasetInfo) -> datasets.Dataset:
    """The tasks of Label Studio with the spans of their first annotation that nobody cancelled; None of a task without one."""
    columns: dict[str, list[Any]] = {config.text_column: [], config.label_column: []}
    with closing(open_text(path, config)) as file:
        for number, task in enumerate(json_objects(file, may_be_one=False)):
            data = task["data"] if isinstance(task.get("data"), dict) else {}
            text = data.get(config.text_column)
            if not isinstance(text, str):
                raise InputError(
                    f"expected a text {config.text_column!r} in the data of every task of {path}, found {', '.join(data) or 'none'} in row {number}; "
                    "name the right one with --text_column"
                )
            made = [one for one in task.get("annotations") or () if not one.get("was_cancelled")]
            done = [one["result"] for one in made if "result" in one]
            values = [result.get("value") or {} for result in (done or [[]])[0]]
            if others := {key for value in values for key in value if key.endswith("labels")} - {"labels"}:
                raise InputError(
                    f"expected spans of plain text in {path}, as a <Labels> of Label Studio makes them, found {', '.join(sorted(others))} in row "
                    f"{number}; give each span a start and an end in the text, and its labels"
                )
            spans = [_span_of(value, label, text, number) for value in values for label in value.get("labels") or ()]
            columns[config.text_column].append(text)
            columns[config.label_column].append(spans if done else None)
    arrays = {name: nested_column(cells, name, path) for name, cells in columns.items()}
    return datasets.Dataset(pa.table(arrays), datasets.DatasetInfo(description=info.description))


def _span_of(value: dict[str, Any], label: str, text: str, number: int) -> dict[str, Any]:
    start, end, marked = value.get("start"), value.get("end"), value.get("text")
    if isinstance(start, int) and isinstance(end, int) and isinstance(marked, str) and marked:
        wanted, found = (re.sub(r"\s|\\n", "", part) for part in (marked, text[start:end]))
        if wanted != found:
            raise InputError(
                f"expected {wanted!r:.80} from {start} to {end} of the text in row {number}, as Label Studio says, found {found!r:.80}; export "
                "it with a newer version, since old ones count an emoji as two characters, or correct the row"
            )
    return {"start": start, "end": end, "label": label}


def usual_span(span: dict[str, Any]) -> dict[str, Any]:
    """A span with the keys start, end and label, where it has those of doccano, or Label Studio's list of one label."""
    labels = span.get("labels")
    only = {"label": labels[0]} if isinstance(labels, list) and len(labels) == 1 else {}
    return only | {SPAN_KEYS.get(key, key): value for key, value in span.items()}
