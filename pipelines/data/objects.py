"""The objects of json and jsonl files as columns, their cells as text or nested."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import pandas
import pyarrow as pa

from pipelines.core.errors import InputError, reason

ROWS_AT_A_TIME = 10_000


def from_objects(text: TextIO, path: Path, named: set[str | None], lists: set[str], nested: bool) -> Iterator[pa.Table]:
    """The objects of a json or jsonl file; not all need to have the same keys."""
    objects = json_objects(text, nested and bool(re.search(r"\.(jsonl|ndjson)", path.name.lower())))
    tables: list[pa.Table] = []
    while rows := list(islice(objects, ROWS_AT_A_TIME)):
        if not tables:  # a flat file is text
            nested = nested and any(
                isinstance(cell, list | dict) for row in rows for name, cell in row.items() if name in named
            )
        columns = {}
        for name in dict.fromkeys(chain.from_iterable(rows)):
            cells = [row.get(name) for row in rows]
            if name.strip() not in named:
                columns[name.strip()] = pa.nulls(len(rows))
            elif nested and not any(isinstance(cell, str) for cell in cells):
                columns[name.strip()] = nested_column(cells, name, path)
            else:
                columns[name.strip()] = pa.array([_text(cell, name, path, lists) for cell in cells], pa.string())
        tables.append(pa.table(columns))
    if tables:
        yield pa.concat_tables(tables, promote_options="permissive")


def nested_column(cells: list[Any], name: str, path: Path) -> pa.Array:
    try:
        return pa.array(whole_characters([_with_named_edges(cell) for cell in cells]))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"expected values of one kind in the column {name!r} of {path}, such as lists of texts or lists of objects, found several "
            f"({reason(error)}); write all rows of it in one way"
        ) from error


def _with_named_edges(cell: Any) -> Any:
    """A list of spans [start, end, label], as doccano and spaCy write them, as objects: no column has numbers and texts in one list."""
    if isinstance(cell, list) and all(isinstance(one, list) and [*map(type, one)] == [int, int, str] for one in cell):
        return [dict(zip(("start", "end", "label"), one, strict=True)) for one in cell]
    return cell


def json_objects(text: TextIO, may_be_one: bool) -> Iterator[dict[str, Any]]:
    """One object a line (`may_be_one`: also of a single line), a list of them, one under a name ({"data": [...]}), or a list or an object for
    each column."""
    first = list(islice((line.strip() for line in text if not line.isspace()), 2))
    # A list, or an object, may be written with a comma before each further line.
    by_line = (
        len(first) >= (1 if may_be_one else 2)
        and first[0].endswith("}")
        and all(line.startswith("{") for line in first)
    )
    text.seek(0)
    rows = json_lines(text) if by_line else json.load(text)
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        is_row = not any(isinstance(value, (list, dict)) for value in rows.values())
        if len(lists) > 1:
            raise ValueError(f"several tables ({', '.join(rows)}), each of which needs a file of its own")
        rows = [rows] if is_row else lists[0] if lists else rows_of_columns(rows)
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"an object for every row has its columns by their names, {row!r:.100} does not")
        yield row


def rows_of_columns(columns: dict[str, Any]) -> list[dict[Any, Any]]:
    """The rows of lists, or of objects with the same keys. As objects of Python, since no float has every large integer."""
    cells = {name: pandas.Series(one, dtype=object) if isinstance(one, dict) else one for name, one in columns.items()}
    return pandas.DataFrame(cells, dtype=object).to_dict("records")


def json_lines(lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield json.loads(line)
        except json.JSONDecodeError as error:  # whose own line is always the first
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error


def _text(value: Any, name: str, path: Path, lists: set[str]) -> str | None:
    if isinstance(value, list) and name.strip() in lists:
        return str(whole_characters(json.dumps(value, ensure_ascii=False)))
    if isinstance(value, list) and len(value) < 2:  # ["sport"], as doccano writes one class
        value = value[0] if value else None
    if isinstance(value, (dict, list)):
        raise InputError(
            f"expected a text, a number or a truth value in the column {name!r} of {path}, found a {type(value).__name__}; name another "
            "column (--text_column, --label_column), or write its parts into columns of their own"
        )
    return None if value is None or value != value else str(whole_characters(str(value)))


def whole_characters(found: Any) -> Any:
    """What a json file holds without halves of pairs, which are no characters; they are left where a text was cut within an emoji."""
    if isinstance(found, str):
        return found.encode(errors="replace").decode()
    if isinstance(found, list):
        return [whole_characters(one) for one in found]
    return (
        {whole_characters(name): whole_characters(one) for name, one in found.items()}
        if isinstance(found, dict)
        else found
    )
