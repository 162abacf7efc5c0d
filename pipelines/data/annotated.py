"""Tagged texts as Kaggle and annotation tools have them: a word a row, spans of doccano, spaCy and Prodigy, tasks of Label Studio."""

from __future__ import annotations

import logging
import re
from contextlib import closing
from dataclasses import replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError
from pipelines.data.objects import json_objects, nested_column
from pipelines.data.tables import open_text, read_table

logger = logging.getLogger(__name__)

# What columns are called where no flag names them.
SENTENCE_COLUMNS = ("Sentence #", "sentence_id", "sentence")
WORD_COLUMNS = ("text", "Word", "word", "words")
TAG_COLUMNS = ("label", "Tag", "tag", "labels")
SPAN_COLUMNS = ("labels", "entities", "spans")
SPAN_KEYS = {"start_offset": "start", "end_offset": "end"}  # of doccano


def read_words(path: Path, config: DataConfig) -> datasets.Dataset:
    """A csv file with a word in each row, as a row for each sentence, whose number stands in all of its rows or in the first."""
    words = WORD_COLUMNS if config.text_column == DataConfig.text_column else (config.text_column,)
    tags = TAG_COLUMNS if config.label_column == DataConfig.label_column else (config.label_column,)
    table = read_table(path, replace(config, label_column=[*tags, *words, *SENTENCE_COLUMNS]))
    found = [[name for name in names if name in table.column_names] for names in (SENTENCE_COLUMNS, words, tags)]
    numbers = table[found[0][0]][:] if found[0] and found[1] else [""]
    if not (numbers[0] or "").strip():
        raise InputError(
            f"expected a word in every row of {path}, with the columns {SENTENCE_COLUMNS[0]!r} (filled at least at the first word of each "
            f"sentence), {WORD_COLUMNS[1]!r} and {TAG_COLUMNS[1]!r}, found the columns {', '.join(map(repr, table.column_names[:10]))}; "
            "rename the first, and name words and tags with --text_column and --label_column"
        )
    known = accumulate(numbers, lambda before, number: number if (number or "").strip() else before)
    sentences = [[row for row, _ in rows] for _, rows in groupby(enumerate(known), key=lambda row: row[1])]
    cells = {config.text_column: table[found[1][0]][:]}
    cells |= {config.label_column: table[found[2][0]][:]} if found[2] else {}
    rows = {name: [[column[row] for row in sentence] for sentence in sentences] for name, column in cells.items()}
    return datasets.Dataset.from_dict(rows, info=datasets.DatasetInfo(description=table.info.description))


def read_lists(path: Path, config: DataConfig) -> datasets.Dataset:
    """A json, jsonl or parquet file with lists of tags or of spans, or an export of Label Studio."""
    table = read_table(path, config, nested=True)
    if {"data", "annotations"} <= {*table.column_names} and config.text_column not in table.column_names:
        return _read_tasks(path, config, table.info)
    found = [name for name in SPAN_COLUMNS if name in table.column_names]
    if config.label_column in table.column_names or config.label_column != DataConfig.label_column or len(found) != 1:
        return table
    logger.warning("the labels of %s are those of its column %r (--label_column names another)", path.name, found[0])
    table = read_table(path, replace(config, label_column=found[0]), nested=True)
    return table.rename_column(found[0], config.label_column)


def _read_tasks(path: Path, config: DataConfig, info: datasets.DatasetInfo) -> datasets.Dataset:
    """The tasks of Label Studio with the spans of their first annotation that nobody cancelled; None of a task without one."""
    columns: dict[str, list[Any]] = {config.text_column: [], config.label_column: []}
    with closing(open_text(path, config)) as file:
        for number, task in enumerate(json_objects(file, may_be_one=False)):
            text = (task.get("data") or {}).get(config.text_column)
            if not isinstance(text, str):
                raise InputError(
                    f"expected a text {config.text_column!r} in the data of every task of {path}, found {', '.join(task.get('data') or [])} "
                    f"in row {number}; name the right one with --text_column"
                )
            done = [one["result"] for one in task.get("annotations") or () if not one.get("was_cancelled")]
            values = [result.get("value") or {} for result in (done or [[]])[0]]
            spans = [_span_of(value, label, text, number) for value in values for label in value.get("labels") or ()]
            columns[config.text_column].append(text)
            columns[config.label_column].append(spans if done else None)
    arrays = {name: nested_column(cells, name, path) for name, cells in columns.items()}
    return datasets.Dataset(pa.table(arrays), datasets.DatasetInfo(description=info.description))


def _span_of(value: dict[str, Any], label: str, text: str, number: int) -> dict[str, Any]:
    start, end, marked = value.get("start"), value.get("end"), value.get("text")
    if isinstance(start, int) and isinstance(end, int) and marked:
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
