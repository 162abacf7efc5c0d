"""Tables: the named columns of a csv, tsv, json, jsonl or parquet file as a data set, their cells as they are written."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet
from fsspec.compression import compr
from fsspec.utils import infer_compression

from pipelines.core.config import DataConfig
from pipelines.core.disk import digest, no_room
from pipelines.core.errors import InputError, reason
from pipelines.data.encodings import encoding_of
from pipelines.data.objects import ROWS_AT_A_TIME, from_objects
from pipelines.data.remembered import VERSION, folder, state_of

logger = logging.getLogger(__name__)

PACKED = ("", ".gz", ".bz2", ".xz", ".zip")
JSON_SUFFIXES = tuple(suffix + packed for packed in PACKED for suffix in (".json", ".jsonl", ".ndjson"))
CSV_SUFFIXES = tuple(".csv" + packed for packed in PACKED)
TSV_SUFFIXES = tuple(".tsv" + packed for packed in PACKED)
TABLE_SUFFIXES = (*CSV_SUFFIXES, *TSV_SUFFIXES, *JSON_SUFFIXES, ".parquet")

READ_AS = b"read as"  # in an Arrow file's metadata
UNNAMED = "the names of its rows in the first column, which has no name itself"
CHARACTERS = "quotation marks as characters, for they are not in pairs"
# How a file may quote: marks are doubled, or stand after a backslash, or there is no quoting and a mark is a character.
DOUBLED: dict[str, Any] = {}
ESCAPED: dict[str, Any] = {"escapechar": "\\", "doublequote": False}
UNQUOTED: dict[str, Any] = {"quoting": csv.QUOTE_NONE}


def read_table(path: Path, config: DataConfig, lists: bool = False, nested: bool = False) -> datasets.Dataset:
    """The columns of a table that the flags name. The others have nothing but their names, so they can be in nobody's way.

    Cells of csv, tsv and json files are text; with `lists` the label column of a json file may have lists, which are text in its notation. With `nested` json and parquet files may have lists
    and objects in the named columns, or such columns in objects (passages.text): they stay what they are. The table is kept in the cache of
    `datasets`, so it takes no memory; its `description` names the encoding and the separator of the file, where they are not the usual ones.
    """
    labels = {config.label_column, *config.more_label_columns}
    named = {config.text_column, config.text_pair_column, config.image_column, *labels} - {None}
    named |= {str(name).partition(".")[0] for name in named if nested}
    key = [VERSION, state_of(str(path)), sorted(map(str, named)), config.separator, config.encoding]
    key += ([sorted(labels)] if lists else []) + ["nested"] * nested
    kept = folder() / f"table-{digest(key)}.arrow"
    if not kept.is_file():
        temporary = kept.with_suffix(f".{os.getpid()}")
        try:
            _write(temporary, path, _readings(path, named, config, labels if lists else set(), nested))
            temporary.replace(kept)
        except InputError:
            raise
        except Exception as error:  # parsers raise errors of their own kinds
            if full := no_room(error):
                raise InputError(
                    f"expected room on the disk for a copy of {path} in {datasets.config.HF_DATASETS_CACHE}, found none ({full}); make "
                    "room, or set HF_DATASETS_CACHE to a folder on another disk"
                ) from error
            remedy = "repair the file or save it again, or say how it is written with --separator and --encoding"
            if path.name.lower().endswith(".parquet"):
                remedy = "it is damaged or no parquet file: copy or save it again, or rename it to what it is"
            raise InputError(
                f"expected a well-formed {path.suffix.lower()[1:]} file, found that {path} cannot be read ({reason(error)}); {remedy}"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
    with pa.OSFile(str(kept)) as file:
        notes = pa.ipc.open_stream(file).schema.metadata or {}
    return datasets.Dataset.from_file(str(kept), datasets.DatasetInfo(description=notes.get(READ_AS, b"").decode()))


def _write(target: Path, path: Path, readings: Iterator[tuple[str, Iterator[pa.Table]]]) -> None:
    """Write the first of several readings of a table that ends well; raises the error of the last where none does."""
    last_error: Exception = InputError(
        f"expected rows in {path}, found none; write the data set again, or remove the file"
    )
    for note, tables in readings:
        try:
            if (first := next(tables, None)) is None:
                continue
            schema = first.schema.with_metadata({READ_AS: note}) if note else first.schema
            with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                for table in chain([first], tables):
                    writer.write_table(table)
            return
        except pandas.errors.ParserWarning:  # whose text is about pandas' arguments
            last_error = csv.Error("the first row has more cells than the header has columns")
        except (csv.Error, pandas.errors.ParserError) as error:
            last_error = error
    raise last_error


def _readings(
    path: Path, named: set[str | None], config: DataConfig, lists: set[str], nested: bool
) -> Iterator[tuple[str, Iterator[pa.Table]]]:
    """The ways in which a file can be read, the most likely one first, each with what is unusual in it; columns of `lists` may hold some."""
    if path.name.lower().endswith(".parquet"):
        yield "", _from_parquet(path, named)
        return
    with closing(open_text(path, config)) as text:
        note = "" if text.encoding == "utf-8-sig" else f"encoding {text.encoding}"
        if path.name.lower().endswith(JSON_SUFFIXES):
            yield note, from_objects(text, path, named, lists, nested)
            return
        for told, tables in _readings_of_cells(text, path, named, config):
            yield ", ".join(filter(None, (note, *told))), tables


def _readings_of_cells(
    text: TextIO, path: Path, named: set[str | None], config: DataConfig
) -> Iterator[tuple[list[str], Iterator[pa.Table]]]:
    """The ways in which a csv or tsv file can be read: how it quotes, and whether its rows begin with their names."""
    usual = "\t" if path.name.lower().endswith(TSV_SUFFIXES) else ","
    start = text.read(1 << 16)
    hints = start.lower().startswith("sep=")  # a line of Excel's own
    separator = config.separator or (start[4:5] if hints else _separator(start, usual, named))
    start = start.partition("\n")[2] if hints else start
    header, row = _first_rows(start, separator)
    names = _names(header)
    if "\0" in "".join(names):
        raise ValueError("bytes that are no text")
    if twice := [name for name in named if names.count(str(name)) > 1]:
        raise InputError(
            f"expected one column {twice[0]!r} in {path}, found several; give every column a name of its own"
        )
    # "text, label": a space after each separator belongs to it.
    spaced = len(header) > 1 and all(name.startswith(" ") for name in header[1:])
    unquoted = separator == "\t" and not start.lstrip().startswith('"') and not _is_of_excel(start)
    ways = [DOUBLED, *([ESCAPED] if '\\"' in start else []), UNQUOTED][:: -1 if unquoted else 1]
    # R leaves the name of its first column out, which counts the rows.
    shifted = ["", *names] if len(row) == len(header) + 1 and row[0].isdecimal() else names
    unsure = shifted != names and not _counts_rows(start, separator)
    short = named - {config.text_column, config.text_pair_column}
    # Rows may be short only where nothing else explains them.
    for columns, way, whole in [
        *((names, way, True) for way in ways),
        *((shifted, way, True) for way in ways if shifted != names),
        (shifted, ways[0], False),
    ]:
        dialect = {"delimiter": separator, "skipinitialspace": spaced, **way}
        told = [
            "" if separator == usual else f"separator {separator!r}",
            UNNAMED if unsure and columns != names else "",
            CHARACTERS if way is UNQUOTED and not unquoted else "",
        ]
        yield told, _from_cells(text, columns, named, short, int(hints), whole, dialect)


def open_text(path: Path, config: DataConfig) -> TextIO:
    """A file that may be packed, in its encoding, with its own line ends."""
    file = _unpacked(path)
    encoding = config.encoding or encoding_of(file, path, is_table=True)
    file.seek(0)
    return io.TextIOWrapper(file, encoding, newline="")


def _unpacked(path: Path) -> Any:
    """The bytes of a file that may be packed; of a zip archive those of its one file."""
    if not path.name.lower().endswith(".zip"):
        return compr[infer_compression(path.name.lower())](path.open("rb"), mode="rb")
    archive = zipfile.ZipFile(path)
    # Beside a file, macOS packs what only a Mac reads.
    held = [name for name in archive.namelist() if not re.search(r"(^|/)(\.|__)|/$", name)]
    if len(held) != 1:
        raise InputError(
            f"expected one file in {path}, found {', '.join(held[:5]) or 'none'}; unpack it and give the folder, or the file that is meant"
        )
    return archive.open(held[0])


def _first_rows(start: str, separator: str) -> list[list[str]]:
    """The first two rows that are not empty."""
    rows = (row for row in csv.reader(start.splitlines(keepends=True), delimiter=separator) if row)
    return [next(rows, []), next(rows, [])]


def _counts_rows(start: str, separator: str) -> bool:
    """Whether the first cells are surely R's names of rows: in quotation marks, or 1, 2, 3 and so on."""
    lines = [line for line in io.StringIO(start, newline="") if not line.isspace()][1:]
    cells = [row[0] for row in csv.reader(lines, delimiter=separator) if row]
    cells = cells[:-1] or cells  # the last one may be cut off
    return any(line.lstrip().startswith('"') for line in lines[:1]) or cells == [
        str(number) for number in range(1, len(cells) + 1)
    ]


def _is_of_excel(start: str) -> bool:
    """Whether cells between tabs are quoted where they must be: each that begins with a mark is whole, and marks in it are doubled."""
    cells = [cell for line in start.split("\n")[:-1] for cell in line.rstrip("\r").split("\t") if cell.startswith('"')]
    return any('""' in cell[1:-1] for cell in cells) and all(re.fullmatch('"([^"]|"")+"', cell) for cell in cells)


def _names(header: list[str]) -> list[str]:
    return [name.strip().strip("\"'").strip() for name in header]


def _separator(start: str, usual: str, named: set[str | None]) -> str:
    """The separator that finds the named columns in the first line, or else the one that csv.Sniffer finds."""
    found = {
        separator: len(named.intersection(_names(_first_rows(start, separator)[0])))
        for separator in usual + ",;\t|~^\x01 "
    }
    found |= {separator: 0 for separator in "~^\x01 " if found[separator] < 2}  # one may be a word of a sentence
    best = max(found, key=lambda separator: found[separator])
    with contextlib.suppress(csv.Error):
        return best if found[best] else csv.Sniffer().sniff(start[:4096], ",;\t|").delimiter
    return usual


def _from_cells(
    text: TextIO,
    names: list[str],
    named: set[str | None],
    short: set[str | None],
    skipped: int,
    whole: bool,
    dialect: dict[str, Any],
) -> Iterator[pa.Table]:
    """The rows of a csv file, by pandas. Raises an error where they are longer than the header, or (`whole`) shorter.

    pandas takes marks that do not pair for cells over many lines, so those are read again by the strict reader of `csv`, and looked through
    for rows, which the columns `short` tell from lines of a text.
    """
    text.seek(0)
    rows = 0
    source: TextIO = text
    if "escapechar" in dialect:
        source = io.StringIO(_with_doubled_backslashes(text.read(), re.escape(dialect["delimiter"])))
    for frame in _frames(source, len(names), skipped, dialect):
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
        source.seek(0)
        places = [place for place, name in enumerate(names) if name in short]
        reader = csv.reader(islice(source, skipped, None), strict=True, **dialect)
        _check_rows(reader, skipped, len(names), whole, places)


def _frames(source: TextIO, width: int, skipped: int, dialect: dict[str, Any]) -> Iterator[pandas.DataFrame]:
    """Some rows after the header at a time, with numbers for the columns and texts in the cells."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # a first row that is too long
        yield from pandas.read_csv(
            source,
            header=0,
            names=range(width),
            skiprows=skipped,
            index_col=False,
            dtype=pandas.ArrowDtype(pa.string()),  # twice as fast as str
            keep_default_na=False,
            na_values=["", r"\N"],  # what MySQL and PostgreSQL write where there is nothing
            chunksize=ROWS_AT_A_TIME,
            **dialect,
        )


def _check_rows(reader: Any, skipped: int, width: int, whole: bool, places: list[int]) -> None:
    """Raise csv.Error for a row of another width. Say which quoted cell seems to hold rows: each of its lines is as wide as the table, and has at
    the `places` what other rows have there."""
    separator = reader.dialect.delimiter + " " * reader.dialect.skipinitialspace
    held, known = [], set[tuple[int, str]]()
    line = 1 + skipped
    for row in reader:
        if any(row[width:]) or (whole and any(row) and len(row) < width):
            raise csv.Error(f"{row!r:.100} has {len(row)} cells for {width} columns")
        known.update((place, row[place]) for place in places if place < len(row))
        for place, cell in enumerate(row[:width]):
            is_long = "\n" in cell or "\r" in cell
            if places and is_long and (rows := _rows_within(cell, place, width, separator)):
                held.append((rows, line, cell[:60]))
        line = 1 + skipped + reader.line_num
    known = {(place, _without_fraction(cell)) for place, cell in known} if held else known
    for rows, line, cell in held:
        told = [(place, _without_fraction(found)) for row in rows for place in places if (found := row[place])]
        if len(told) > len(places) and known.issuperset(told):  # of one line it may be chance
            logger.warning(
                "a quoted cell that begins in line %d seems to hold whole rows (%r …); where its quotation mark is a stray one, repair the file",
                line,
                cell,
            )


def _rows_within(cell: str, place: int, width: int, separator: str) -> list[list[str | None]]:
    """The lines of a cell as rows of a table, with None for what is outside of it; none where they are not as wide as the table."""
    rows: list[list[str | None]] = [[*line.split(separator)] for line in re.split(r"\r\n?|\n", cell)]
    rows[0][:0] = [None] * place
    rows[-1] += [None] * (width - 1 - place)
    rows = [row for row in rows if any(row)]
    return rows if len(rows) > 1 and all(len(row) == width for row in rows) else []


def _without_fraction(cell: str) -> str:
    """A cell, where it is a score without what tells it from others."""
    return re.sub(r"[+-]?\d*\.\d+", "0.5", cell)


def _with_doubled_backslashes(content: str, mark: str) -> str:
    """The text of a csv file whose quotation marks have backslashes, with every other backslash doubled, since parsers take away a single one.

    MySQL and Python double them all. Spark does so before a quotation mark only: there is one before another character, such as \\d.
    """
    content = re.sub(rf"(^|(?<={mark}))\\N(?={mark}|\r?$)", "", content, flags=re.MULTILINE)  # nothing, by MySQL
    if re.search(rf"(?<!\\)\\(\\\\)*(?=[^\\\"\r\n{mark}])", content):
        return re.sub(r"\\+(?![\\\"])", r"\g<0>\g<0>", content)
    return content


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
    """The values of a column of categories, and those of types that `datasets` does not know as text."""
    if pa.types.is_dictionary(column.type):
        return column.cast(column.type.value_type)
    is_text = pa.types.is_string_view(column.type) or pa.types.is_decimal(column.type)
    return column.cast(pa.string()) if is_text else column
