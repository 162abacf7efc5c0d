"""What the reference column becomes, as the task says: classes, sets of labels, or scores. A language model has none."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

import datasets
import numpy as np

from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError

logger = logging.getLogger(__name__)

NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)
THOUSANDS = re.compile(r"\s*[+-]?[1-9]\d{0,2}(,\d{3})+\s*")
NO_SCORE = ("na", "n/a", "none", "null", "-")

# What a cell of a column that is called after a label says of it: -1 where nobody has looked.
FITS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0, "-1": -1, "-1.0": -1, "": -1}

# By the name of a split its references, -1 (a class, or throughout a row of labels) or NaN (a score) where a row has none; the type of the
# column `label`, as `datasets` has it; and the names of the classes or labels, if there are any.
References = tuple[dict[str, np.ndarray], Any, list[str]]
# Of the splits that are used, by their own names; the first is the training split.
ReadReferences = Callable[[dict[str, datasets.Dataset], DataConfig], References]


def missing(values: np.ndarray) -> np.ndarray:
    """Which rows have no reference."""
    absent = np.isnan(values) if values.dtype.kind == "f" else values < 0
    return np.asarray(absent if values.ndim == 1 else absent.any(axis=1))


def has_references(split: datasets.Dataset, config: DataConfig) -> bool:
    """Whether a split that no flag names can be scored: hidden labels (all empty, or all -1) cannot."""
    if config.label_column not in split.column_names:
        return False
    if not _is_plain(split, config):
        return any(split[config.label_column])  # lists; all else is for the readers to refuse
    hidden = ("-1", "-1.0", "[]")
    return any(not _is_empty(value) and str(value) not in hidden for value in split.unique(config.label_column))


def dtype(split: datasets.Dataset, column: str) -> str:
    """The type of a column's values, in the words of `datasets`."""
    return str(getattr(split.features[column], "dtype", type(split.features[column]).__name__))


def _is_plain(split: datasets.Dataset, config: DataConfig) -> bool:
    return dtype(split, config.label_column).startswith(
        ("string", "large_string", "bool", "null", "int", "uint", "float")
    )


def _is_empty(value: Any) -> bool:
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or (isinstance(value, str) and not value.strip())


def _check_plain(split: datasets.Dataset, name: str, what: str, config: DataConfig) -> None:
    if config.more_label_columns:
        raise InputError(
            f"expected one --label_column for this task, found {1 + len(config.more_label_columns)}; name one, or let a text have several "
            "labels with --task multi-label-classification"
        )
    if not _is_plain(split, config):
        raise InputError(
            f"expected one {what} per row in the column {config.label_column!r} of the split {name!r}, found values of type "
            f"{dtype(split, config.label_column)}; name a column of them with --label_column (columns: {', '.join(split.column_names)})"
        )


# ---- Classes


def read_classes(splits: dict[str, datasets.Dataset], config: DataConfig) -> References:
    """The classes' ids: in a ClassLabel's own order (where -1 is no class), numbers by size, anything else by alphabet.

    A class is called what stands in its cells: 01 is 01. Only the ".0" goes that pandas gives the whole numbers of a column with gaps. A folder
    is called what it is called.
    """
    column = config.label_column
    cells, classes = {}, {}
    for name, split in splits.items():
        _check_plain(split, name, "class name or number", config)
        declared = getattr(split.features[column], "names", None)
        cells[name] = split[column][:]
        _check_one_header(split, cells[name], name, config)
        classes[name] = {cell: _class_of(cell, declared, config) for cell in set(cells[name])}
    found = {label for labels in classes.values() for label in labels.values() if label is not None}
    names = getattr(next(iter(splits.values())).features[column], "names", None)
    written = {label: label for label in found}
    if names is None:
        has_fractions = any(NUMBER.fullmatch(label) and "." in label for label in found)
        in_folders = has_fractions and all(_are_folders(split, column) for split in splits.values())
        numbers = all(map(NUMBER.fullmatch, found))
        whole = {label: re.sub(r"\.0*$", "", label) for label in found if NUMBER.fullmatch(label) and not in_folders}
        written |= {label: short for label, short in whole.items() if numbers or short in found}
        names = _label_names(set(written.values()), config, in_folders)
    _check_known(set(written.values()), names)
    values = {}
    for name, labels in classes.items():
        ids = {cell: -1 if label is None else names.index(written[label]) for cell, label in labels.items()}
        values[name] = np.array([ids[cell] for cell in cells[name]], np.int64)
    return values, datasets.ClassLabel(names=names), names


def _check_one_header(split: datasets.Dataset, cells: list[Any], name: str, config: DataConfig) -> None:
    """Raise InputError where a row repeats the header; only rows whose label is the column's name are looked at."""
    named = [row for row, cell in enumerate(cells) if cell == config.label_column]
    if again := [row for row in named if split[row].get(config.text_column) == config.text_column]:
        raise InputError(
            f"expected one row with the names of the columns, found them again in {len(again)} rows of the split {name!r} (counted from 0: "
            f"{', '.join(map(str, again[:5]))}), as where tables were joined with their first lines; remove these rows"
        )


def _are_folders(split: datasets.Dataset, column: str) -> bool:
    """Whether each row is a file in the folder that its label names."""
    return "file" in split.column_names and all(
        str(file).startswith(f"{label}{os.sep}") for file, label in zip(split["file"][:], split[column][:], strict=True)
    )


def _check_known(found: set[str], names: list[str]) -> None:
    if unknown := sorted(found - set(names)):
        raise InputError(
            f"expected the classes of the training split ({', '.join(names)}) in every split, found also "
            f"{', '.join(unknown[:5])}; add training examples of it, or remove it from the other splits"
        )


def _class_of(value: Any, declared: list[str] | None, config: DataConfig) -> str | None:
    """The class that a cell names, None for a cell without; `declared` are the names of a ClassLabel column."""
    if _is_empty(value) or (declared is not None and value < 0):
        return None
    if declared is not None and value >= len(declared):
        raise InputError(
            f"expected numbers of the {len(declared)} classes that the column {config.label_column!r} names ({', '.join(declared[:5])}), counted "
            f"from 0, found {value}; correct the number, or add its name to the column's ClassLabel"
        )
    return str(value) if declared is None else declared[value]


def _label_names(found: set[str], config: DataConfig, in_folders: bool = False) -> list[str]:
    numbers = all(NUMBER.fullmatch(label) for label in found)
    # Not as floats, of which two that are alike may be two whole numbers.
    values = {label: Decimal(label) for label in found} if numbers else {}
    fractions = [label for label, value in values.items() if value != value.to_integral_value()]
    if fractions and not in_folders:
        raise InputError(
            f"expected classes in the column {config.label_column!r}, found fractions such as {min(fractions)}; name a column of classes with "
            "--label_column, learn them as scores with --task text-regression, or, where they are names, such as version numbers, write a letter "
            f"before each, such as v{min(fractions)}"
        )
    names = sorted(found, key=lambda label: (values[label] if numbers else 0, label))
    if len(names) < 2:
        raise InputError(
            f"expected at least two classes in the column {config.label_column!r}, found {len(names)} "
            f"({', '.join(names) or 'no label at all'}); name the column of classes with --label_column, or add "
            "examples of another class"
        )
    if unlabelled := [name for name in names if name.strip().lower() in (*NO_SCORE, "nan")]:
        logger.warning(
            "the class %s is called like a missing label, and stays a class; empty these cells if they have none",
            ", ".join(map(repr, unlabelled)),
        )
    if all(name.startswith("[") and name.endswith("]") for name in names):
        logger.warning(
            "the classes are called like lists, such as %s; where a text has several labels, take --task multi-label-classification",
            names[0],
        )
    if not in_folders:
        tell_of_alike(names, "classes")
    return names


def tell_of_alike(names: Iterable[str], what: str) -> None:
    """Say which names differ in nothing that a reader would mean."""
    alike: dict[Any, list[str]] = {}
    for name in names:
        folded = "".join(unicodedata.normalize("NFC", name).casefold().split())
        alike.setdefault(Decimal(name) if NUMBER.fullmatch(name) else folded, []).append(name)
    for group in alike.values():
        if len(group) > 1:
            logger.warning(
                "the %s %s differ in case, spaces, zeros or Unicode form (é as one character or as two) only, and stay %s of their own; correct "
                "the labels if they are one",
                what,
                ", ".join(map(repr, group)),
                what,
            )


# ---- Sets of labels


def read_label_sets(
    splits: dict[str, datasets.Dataset], config: DataConfig, separator: str | None = None
) -> References:
    """For each row (labels,) int8: 1 where a label fits, 0 where it does not; -1 throughout where the row has no labels at all.

    There is a column for each label, or one column of lists (of a ClassLabel's ids or of names; in text as JSON or Python writes them), or
    of text that the `separator` parts. A list may be empty: no label fits. So may a cell with a separator, for which an empty one is no
    missing one.
    """
    if config.more_label_columns:
        names = [config.label_column, *config.more_label_columns]
        values = {name: _columns_of_labels(split, name, names) for name, split in splits.items()}
    else:
        sets = {name: _label_sets(split, name, config, separator) for name, split in splits.items()}
        found = {label for rows in sets.values() for row in rows if row for label in row}
        names = declared_names(next(iter(splits.values())), config) or _label_names(found, config)
        if {*names} == {"0", "1"} and all(len(row) == 2 for rows in sets.values() for row in rows if row):
            raise _vectors_found(config)
        _check_known(found, names)
        place = {name: index for index, name in enumerate(names)}
        values = {}
        for name, rows in sets.items():
            values[name] = np.zeros((len(rows), len(names)), np.int8)
            for number, row in enumerate(rows):
                values[name][number, [place[label] for label in row or ()]] = 1
            values[name][[row is None for row in rows]] = -1
    return values, datasets.List(datasets.Value("int8")), names


def _columns_of_labels(split: datasets.Dataset, name: str, columns: list[str]) -> np.ndarray:
    found = []
    for column in columns:
        cells = ["" if _is_empty(cell) else str(cell).strip().lower() for cell in split[column][:]]
        if unknown := sorted({*cells} - FITS.keys()):
            raise InputError(
                f"expected 1 or 0 in every row of the column {column!r}, which --label_column names beside others, found {unknown[0]!r:.80} in "
                f"the split {name!r}; name columns that each say whether one label fits, or a single column of lists"
            )
        found.append([FITS[cell] for cell in cells])
    values = np.array(found, np.int8).T
    values[(values < 0).any(axis=1)] = -1
    return values


def declared_names(split: datasets.Dataset, config: DataConfig) -> list[str] | None:
    """The names of a column of lists of a ClassLabel."""
    return getattr(getattr(split.features[config.label_column], "feature", None), "names", None)


def _label_sets(split: datasets.Dataset, name: str, config: DataConfig, separator: str | None) -> list[set[str] | None]:
    """The names of each row's labels, None for a row that has no list."""
    cells, declared = split[config.label_column][:], declared_names(split, config)
    if not _is_plain(split, config):
        return [_names_of(cell, declared, cell, name, config) for cell in cells]
    if separator is not None and not any(separator in str(cell) for cell in cells):
        logger.warning(
            "no cell of the column %r in the split %r has the --label_separator %r, so each is one label",
            config.label_column,
            name,
            separator,
        )
    texts = {cell: "" if _is_empty(cell) else str(cell) for cell in set(cells)}
    parsed = {cell: parse_cell(text) if separator is None else text.split(separator) for cell, text in texts.items()}
    sets = {cell: _names_of(items, None, cell, name, config) for cell, items in parsed.items()}
    return [sets[cell] for cell in cells]


def parse_cell(text: str) -> Any:
    """What a cell of text is in JSON or Python, None for an empty one; the text itself where it is neither."""
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(
            ValueError, TypeError, SyntaxError, RecursionError, MemoryError
        ):  # whatever a cell may hold
            # ['a' 'b'], as numpy writes a list, is one text to Python.
            return text if parse is ast.literal_eval and re.search(r"""['"]\s+['"]""", text) else parse(text)
    return text or None


def _names_of(items: Any, declared: list[str] | None, cell: Any, split: str, config: DataConfig) -> set[str] | None:
    if items is None:
        return None
    if (
        not isinstance(items, Iterable)
        or isinstance(items, (str, dict))
        or any(isinstance(one, (list, dict)) for one in items)
    ):
        raise InputError(
            f"expected a list of labels in every row of the column {config.label_column!r}, found {cell!r:.80} in the split {split!r}; say what "
            "parts the labels of a cell with --label_separator, name a column for each label (--label_column a b c), or take --task "
            "text-classification where every text has one label"
        )
    if declared is not None:
        return {one for one in (_class_of(item, declared, config) for item in items) if one is not None}
    items = list(items)
    if len({*map(str, items)}) < len(items) and FITS.keys() - {""} >= {str(one).strip().lower() for one in items}:
        raise _vectors_found(config)
    return {str(one).strip() for one in items if not _is_empty(one)}


def _vectors_found(config: DataConfig) -> InputError:
    return InputError(
        f"expected the names of the labels of each text in the column {config.label_column!r}, found 1 and 0 for every label; write the names of "
        "those that fit, or give a column for each label (--label_column a b c)"
    )


# ---- Scores


def read_scores(splits: dict[str, datasets.Dataset], config: DataConfig) -> References:
    """The column as float32; text that spells a number counts as one."""
    column = config.label_column
    for name, split in splits.items():
        _check_plain(split, name, "number", config)
    cells = {name: split[column][:] for name, split in splits.items()}
    texts = [cell for column in cells.values() for cell in column if isinstance(cell, str)]
    commas = [text for text in texts if "," in text]
    # 3,5 as in much of Europe; 1,234 may be another number.
    if commas and not any("." in text for text in texts) and not all(THOUSANDS.fullmatch(text) for text in commas):
        logger.warning("the scores have decimal commas: %s is %s", commas[0], commas[0].replace(",", "."))
        cells = {
            name: [cell.replace(",", ".") if isinstance(cell, str) else cell for cell in column]
            for name, column in cells.items()
        }
    values = {
        name: np.array([_score_of(cell, name, config) for cell in column], np.float32) for name, column in cells.items()
    }
    if len(np.unique(np.concatenate([column[~missing(column)] for column in values.values()]))) < 2:
        raise InputError(
            f"expected scores that differ in the column {column!r}, found one value at most; name the column of scores with --label_column"
        )
    return values, datasets.Value("float32"), []


def _score_of(value: Any, split: str, config: DataConfig) -> float:
    if _is_empty(value) or str(value).strip().lower() in NO_SCORE:
        return math.nan
    try:
        score = math.inf if "_" in str(value) else float(value)  # 1_000 is a number to Python alone
    except ValueError:
        score = math.inf
    if abs(score) > float(np.finfo(np.float32).max):
        raise InputError(
            f"expected a number in every row of the column {config.label_column!r}, found {value!r:.80} in the split {split!r}; name the "
            "column of scores with --label_column, or correct the row (a fraction has a point: 3.5)"
        )
    return score
