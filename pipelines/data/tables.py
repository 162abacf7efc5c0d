"""Tables: the named columns of a csv, tsv, json, jsonl or parquet file as a data set, their cells as they are written."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import charset_normalizer
import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet
from datasets.exceptions import DatasetGenerationError
from fsspec.compression import compr
from fsspec.utils import infer_compression

from pipelines.core.config import DataConfig
from pipelines.core.disk import digest, no_room
from pipelines.core.errors import InputError
from pipelines.data.remembered import VERSION, folder, state_of

PACKED = ("", ".gz", ".bz2", ".xz", ".zip")
JSON_SUFFIXES = tuple(suffix + packed for packed in PACKED for suffix in (".json", ".jsonl", ".ndjson"))
TSV_SUFFIXES = tuple(".tsv" + packed for packed in PACKED)
TABLE_SUFFIXES = (*(".csv" + packed for packed in PACKED), *TSV_SUFFIXES, *JSON_SUFFIXES, ".parquet")

ROWS_AT_A_TIME = 10_000
READ_AS = b"read as"  # in an Arrow file's metadata
# How a file may quote: marks are doubled, or stand after a backslash, or there is no quoting and a mark is a character.
DOUBLED: dict[str, Any] = {}
ESCAPED: dict[str, Any] = {"escapechar": "\\", "doublequote": False}
UNQUOTED: dict[str, Any] = {"quoting": csv.QUOTE_NONE}
# What is in use besides UTF-8. Left alone, charset-normalizer also finds code pages of 1985 in the texts of today.
ENCODINGS = (
    "cp1252 cp1250 cp1251 cp1253 cp1254 cp1255 cp1256 koi8_r cp932 euc_jp gb18030 big5 cp949 utf_16_le utf_16_be"
).split()


def read_table(path: Path, config: DataConfig) -> datasets.Dataset:
    """The columns of a table that the flags name. The others have nothing but their names, so they can be in nobody's way.

    Cells of csv, tsv and json files are text. The table is kept in the cache of `datasets`, so it takes no memory; its `description`
    names the encoding and the separator of the file, where they are not the usual ones.
    """
    named = {config.text_column, config.text_pair_column, config.image_column, config.label_column} - {None}
    key = [VERSION, state_of(str(path)), sorted(map(str, named)), config.separator, config.encoding]
    kept = folder() / f"table-{digest(key)}.arrow"
    if not kept.is_file():
        temporary = kept.with_suffix(f".{os.getpid()}")
        try:
            _write(temporary, _readings(path, named, config))
            temporary.replace(kept)
        except InputError:
            raise
        except Exception as error:  # parsers raise errors of their own kinds
            if full := no_room(error):
                raise InputError(
                    f"expected room on the disk for a copy of {path} in {datasets.config.HF_DATASETS_CACHE}, found none ({full}); make "
                    "room, or set HF_DATASETS_CACHE to a folder on another disk"
                ) from error
            raise InputError(
                f"expected a well-formed {path.suffix.lower()[1:]} file, found that {path} cannot be read ({reason(error)}); repair the file "
                "or save it again, or say how it is written with --separator and --encoding"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
    with pa.OSFile(str(kept)) as file:
        notes = pa.ipc.open_stream(file).schema.metadata or {}
    return datasets.Dataset.from_file(str(kept), datasets.DatasetInfo(description=notes.get(READ_AS, b"").decode()))


def reason(error: BaseException) -> str:
    """What went wrong while a file was read, out of the "an error occurred" of `datasets`."""
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _write(target: Path, readings: Iterator[tuple[str, Iterator[pa.Table]]]) -> None:
    """Write the first of several readings of a table that ends well; raises the error of the last where none does."""
    last_error: Exception = ValueError("it holds no table")
    for note, tables in readings:
        try:
            if (first := next(tables, None)) is None:
                continue
            schema = first.schema.with_metadata({READ_AS: note}) if note else first.schema
            with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                for table in chain([first], tables):
                    writer.write_table(table)
            return
        except (csv.Error, pandas.errors.ParserError, pandas.errors.ParserWarning) as error:
            last_error = error
    raise last_error


def _readings(path: Path, named: set[str | None], config: DataConfig) -> Iterator[tuple[str, Iterator[pa.Table]]]:
    """The ways in which a file can be read, the most likely one first, each with what is unusual in it."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield "", _from_parquet(path, named)
        return
    with closing(compr[infer_compression(name)](path.open("rb"), mode="rb")) as file:
        encoding = config.encoding or encoding_of(file, path)
        text = io.TextIOWrapper(file, encoding, newline="")
        text.seek(0)
        note = "" if encoding == "utf-8-sig" else f"encoding {encoding}"
        if name.endswith(JSON_SUFFIXES):
            yield note, _from_objects(text, path, named)
            return
        usual = "\t" if name.endswith(TSV_SUFFIXES) else ","
        start = text.read(1 << 16)
        hints = start.lower().startswith("sep=")  # a line of Excel's own
        separator = config.separator or (start[4:5] if hints else _separator(start, usual, named))
        start = start.partition("\n")[2] if hints else start
        note = ", ".join(filter(None, (note, "" if separator == usual else f"separator {separator!r}")))
        header, row = _first_rows(start, separator)
        # R leaves the name of its first column out, which counts the rows.
        names = [""] * (len(row) == len(header) + 1 and row[0].isdecimal()) + _names(header)
        if "\0" in "".join(names):
            raise ValueError("bytes that are no text")
        if twice := [name for name in named if names.count(str(name)) > 1]:
            raise InputError(
                f"expected one column {twice[0]!r} in {path}, found several; give every column a name of its own"
            )
        # "text, label": a space after each separator belongs to it.
        spaced = len(header) > 1 and all(name.startswith(" ") for name in header[1:])
        unquoted = separator == "\t" and not start.lstrip().startswith('"')
        ways = [DOUBLED, *([ESCAPED] if '\\"' in start else []), UNQUOTED][:: -1 if unquoted else 1]
        # Rows may be short only where nothing else explains them.
        for way, whole in [*((way, True) for way in ways), (ways[0], False)]:
            dialect = {"delimiter": separator, "skipinitialspace": spaced, **way}
            yield note, _from_cells(text, names, named, int(hints), whole, dialect)


def _first_rows(start: str, separator: str) -> list[list[str]]:
    """The first two rows that are not empty."""
    rows = (row for row in csv.reader(start.splitlines(keepends=True), delimiter=separator) if row)
    return [next(rows, []), next(rows, [])]


def _names(header: list[str]) -> list[str]:
    return [name.strip().strip("\"'").strip() for name in header]


def _separator(start: str, usual: str, named: set[str | None]) -> str:
    """The separator that finds the named columns in the first line, or else the one that csv.Sniffer finds."""
    found = {
        separator: len(named.intersection(_names(_first_rows(start, separator)[0]))) for separator in usual + ",;\t|"
    }
    best = max(found, key=lambda separator: found[separator])
    with contextlib.suppress(csv.Error):
        return best if found[best] else csv.Sniffer().sniff(start[:4096], ",;\t|").delimiter
    return usual


def _from_cells(
    text: TextIO, names: list[str], named: set[str | None], skipped: int, whole: bool, dialect: dict[str, Any]
) -> Iterator[pa.Table]:
    """The rows of a csv file, by pandas. Raises an error where they are longer than the header, or (`whole`) shorter.

    pandas takes marks that do not pair for cells over many lines, so those are read again by the strict reader of `csv`.
    """
    text.seek(0)
    rows = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # a first row that is too long
        for frame in pandas.read_csv(
            text,
            header=0,
            names=range(len(names)),
            skiprows=skipped,
            index_col=False,
            dtype=pandas.ArrowDtype(pa.string()),  # twice as fast as str
            keep_default_na=False,
            na_values=[""],
            chunksize=ROWS_AT_A_TIME,
            **dialect,
        ):
            rows += len(frame)
            yield pa.table(
                {
                    name: pa.array(frame[number], pa.string()) if name in named else pa.nulls(len(frame))
                    for number, name in enumerate(names)
                }
            )
    text.buffer.seek(0)
    if "quoting" in dialect or rows != sum(not line.isspace() for line in text.buffer) - 1 - skipped:
        csv.field_size_limit(sys.maxsize)
        text.seek(0)
        for row in csv.reader(islice(text, skipped, None), strict=True, **dialect):
            if any(row[len(names) :]) or (whole and any(row) and len(row) < len(names)):
                raise csv.Error(f"{row!r:.100} has {len(row)} cells for {len(names)} columns")


def _from_objects(text: TextIO, path: Path, named: set[str | None]) -> Iterator[pa.Table]:
    """The objects of a json or jsonl file; not all need to have the same keys."""
    objects = _objects(text)
    tables = []
    while rows := list(islice(objects, ROWS_AT_A_TIME)):
        columns = {
            name.strip(): pa.array([_text(row.get(name), name, path) for row in rows], pa.string())
            if name.strip() in named
            else pa.nulls(len(rows))
            for name in dict.fromkeys(chain.from_iterable(rows))
        }
        tables.append(pa.table(columns))
    if tables:
        yield pa.concat_tables(tables, promote_options="default")


def _objects(text: TextIO) -> Iterator[dict[str, Any]]:
    """One object a line, a list of them, a list under a name ({"data": [...]}), or a list for each column."""
    by_line = text.readline().rstrip().endswith("}") and any(line.strip() for line in text)
    text.seek(0)
    rows = (json.loads(line) for line in text if line.strip()) if by_line else json.load(text)
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        is_row = not any(isinstance(value, (list, dict)) for value in rows.values())
        rows = [rows] if is_row else lists[0] if len(lists) == 1 else pandas.DataFrame(rows).to_dict("records")
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"an object for every row has its columns by their names, {row!r:.100} does not")
        yield row


def _text(value: Any, name: str, path: Path) -> str | None:
    if isinstance(value, (dict, list)):
        raise InputError(
            f"expected a text, a number or a truth value in the column {name!r} of {path}, found a {type(value).__name__}; name another "
            "column (--text_column, --label_column), or write its parts into columns of their own"
        )
    return None if value is None or value != value else str(value)


def _from_parquet(path: Path, named: set[str | None]) -> Iterator[pa.Table]:
    with pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        for batch in file.iter_batches(
            ROWS_AT_A_TIME, columns=[name for name in schema.names if name.strip() in named]
        ):
            batch.validate(full=True)  # nobody has looked at the bytes of its texts yet
            columns = {
                name.strip(): _plain(batch.column(name)) if name.strip() in named else pa.nulls(len(batch))
                for name in schema.names
            }
            yield pa.table(columns, metadata=schema.metadata)


def _plain(column: pa.Array) -> pa.Array:
    """The values of a column of categories."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


# ---- Encodings


def encoding_of(file: BinaryIO, path: Path) -> str:
    """The encoding of a file of text: what its first bytes say, else UTF-8, else what its lines look like."""
    head = file.read(4096)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    zeros = head[::2].count(0), head[1::2].count(0)
    if max(zeros) > len(head) / 8 and not min(zeros):  # every other byte of Latin letters
        return "utf_16_be" if zeros[0] else "utf_16_le"
    file.seek(0)
    decoder = codecs.getincrementaldecoder("utf-8")(
        "surrogatepass"
    )  # half of a pair is not UTF-8, but nothing else either
    with contextlib.suppress(UnicodeDecodeError):
        for chunk in iter(partial(file.read, 1 << 20), b""):
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
        return "utf-8-sig"
    file.seek(0)
    counts: Counter[str] = Counter()
    other = b""
    for line in file:
        if not line.isascii():
            try:
                line.decode()
                counts["UTF-8"] += 1
            except UnicodeDecodeError:
                counts["other"] += 1
                other += line[:4096] if len(other) < 1 << 16 else b""
    if counts["UTF-8"] < counts["other"] and (encoding := _guess(other)):
        return encoding
    raise InputError(
        f"expected one encoding in {path}, UTF-8 or another, found bytes in {counts['other']} lines that are not UTF-8, such as "
        f"{other[:60]!r}, beside {counts['UTF-8']} lines that are; repair the file, or name its encoding with --encoding"
    )


def _guess(content: bytes) -> str | None:
    """The encoding in which bytes make the likeliest text, Western European where another is hardly more likely."""
    guesses = {
        "cp1252" if "cp1252" in match.could_be_from_charset else match.encoding: (match.chaos, -match.coherence)
        for match in charset_normalizer.from_bytes(content, cp_isolation=ENCODINGS)
    }
    ranks = {name: (round(chaos, 2), order - 0.05 * (name == "cp1252")) for name, (chaos, order) in guesses.items()}
    return min(ranks, key=lambda name: ranks[name], default=None)
