"""Examples for classification: load, check, de-duplicate and split them; tokenize and collate texts."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError
from pipelines.core.run import no_room
from pipelines.data.sources import resolve

if TYPE_CHECKING:
    import datasets
    import torch

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")

# Characters of a table's longest field: a hundred novels. A quotation mark that is never closed makes a field of the rest of a file.
LONGEST_FIELD = 2**24
MOST_COLUMNS = 2**18
MOST_UNPACKED = 2**31  # characters that a compressed table may become

# The builder of `datasets` and its arguments for each kind of file. Only an empty cell of a table is a missing value:
# pandas would read the words "NA", "None" and "null" as missing too, which are texts and class names like any other.
_TABLE = {"keep_default_na": False, "na_values": [""]}
# Named "utf-8", the json builder passes bytes on undecoded, and bad ones surface only when a text is read.
_JSON = {"encoding": "utf-8-sig"}
FILE_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", _TABLE),
    ".tsv": ("csv", {"sep": "\t", **_TABLE}),
    ".json": ("json", _JSON),
    ".jsonl": ("json", _JSON),
    ".parquet": ("parquet", {}),
}

# How files and folders of a data set name the splits.
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)

DROP_ROWS = (
    "remove these rows first (for a Hub data set: datasets.load_dataset(…).filter(…).save_to_disk(folder), then pass "
    "that folder)"
)

# Part of the key of cached tokens: raise it when tokenize() changes what it writes.
_TOKENS_VERSION = 1


@dataclass
class ClassificationData:
    """A data set ready for training: its three splits, the names of its classes, and how it came about.

    The splits have the columns `text`, `text_pair` (sentence pairs only) and `label` (a class id, int64).
    `details` is ready for JSON; `fingerprint` is a sha256 of the splits' content and the label names.
    """

    splits: datasets.DatasetDict
    label_names: list[str]
    details: dict[str, Any]
    fingerprint: str


@dataclass
class Source:
    """A data set as it was found: its own splits and columns."""

    splits: dict[str, datasets.Dataset]
    row_name_column: str | None = None  # the column that names a row better than its number does
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Rows:
    """What the checks need to know of each row of a split, in 16 bytes instead of its texts or images."""

    keys: np.ndarray  # (rows,) uint64, equal where the content is: texts after whitespace folding, images by pixel
    labels: np.ndarray  # (rows,) int64 class ids


@dataclass(frozen=True)
class Kind:
    """What a data set of texts and one of images do differently; everything else here is the same for both."""

    noun: str  # "texts"
    usable: str  # what every row must have: "a text"
    columns: dict[str, str]  # the flags that name columns of the source, and what these are called in the splits
    suffixes: tuple[str, ...]  # of the files that `read_file` reads
    read_file: Callable[[Path, DataConfig], datasets.Dataset]
    read_files: Callable[[Path, list[tuple[Path, str]]], datasets.Dataset]  # of a folder: each file with its class
    prepare: Callable[[datasets.Dataset, str], datasets.Dataset | None]  # None where a column has no such values
    content: Callable[[list[tuple[Any, ...]]], list[bytes | None]]  # equal for equal rows; None for an unusable one
    content_is_all: (
        bool  # whether rows of equal content are the same row, so that hashes of it tell two data sets apart
    )

    def columns_of(self, config: DataConfig) -> dict[str, str]:
        """The flags that name a column of the source, and that column."""
        columns = {flag: getattr(config, flag) for flag in self.columns}
        return {flag: column for flag, column in columns.items() if column is not None}


def load_classification(config: DataConfig, kind: Kind | None = None) -> ClassificationData:
    """Load, check and de-duplicate a classification data set (of texts) and give it a train, validation and test split.

    Splits. Those the flags name are used as they are, and must have labels. Unnamed, 'test' and 'validation' are used
    where they exist and have labels. A data set that then has a validation but no test split (GLUE, whose test labels
    are hidden) gives its 'validation' as the test split, unless --validation_split claimed it for validation. What is
    missing is cut from the training split: seeded, stratified, every class staying represented in training. Only a
    given test split keeps its order; the others are shuffled, so that their first examples are of all classes.

    Duplicates. An example is in one split only: a split that is given as test stays untouched, validation loses what is
    in test, training what is in either. Within training and validation, the first of equal texts (or images) stays.

    Raises InputError where the data cannot be read, or cannot be used as it is.
    """
    kind = TEXTS if kind is None else kind
    source = load_source(config, kind)
    roles = choose_splits(source, config, partial(_has_labels, config=config))
    given = {role: source.splits[name] for role, name in roles.items() if name is not None}
    for role, split in given.items():
        given[role] = _checked_columns(split, roles[role] or role, config, kind)
    label_names = _label_names(given, config)

    rows = {role: _scan(split, roles[role] or role, source, config, kind, label_names) for role, split in given.items()}
    kept, details = drop_duplicates(rows, kind.noun)
    cut_missing_splits(kept, rows["train"].labels, roles, config, kind.noun)
    origin = {role: role if role in given else "train" for role in SPLITS}
    for role in SPLITS:
        limit = config.max_train_samples if role == "train" else config.max_eval_samples
        if limit is not None and limit < len(kept[role]):
            rest, _ = cut_stratified(rows[origin[role]].labels[kept[role]], len(kept[role]) - limit, config.split_seed)
            kept[role] = kept[role][rest]
        if role != "test" or role not in given:
            kept[role] = np.random.default_rng(config.split_seed).permutation(kept[role])

    counts = {role: np.bincount(rows[origin[role]].labels[kept[role]], minlength=len(label_names)) for role in SPLITS}
    _check_classes(counts, label_names, config)
    splits = {
        role: _select(given[name], rows[name].labels, kept[role], config, kind, label_names)
        for role, name in origin.items()
    }
    details = {
        "dataset": config.dataset,
        "dataset_config": config.dataset_config,
        **source.details,
        "examples": {role: len(kept[role]) for role in SPLITS},
        "classes": {
            role: {name: int(count) for name, count in zip(label_names, counts[role], strict=True)} for role in SPLITS
        },
        "came_from": {
            role: f"split {roles[role]!r}" if roles[role] else f"cut from split {roles['train']!r}" for role in SPLITS
        },
        **details,
        "split_seed": config.split_seed,
    }
    import datasets

    if kind.content_is_all:
        keys = {role: rows[name].keys[kept[role]] for role, name in origin.items()}
        fingerprint = _fingerprint_of_keys(splits, keys, label_names)
    else:
        fingerprint = content_fingerprint(splits, label_names)
    return ClassificationData(datasets.DatasetDict(splits), label_names, details, fingerprint)


# ---- Loading


def load_source(config: DataConfig, kind: Kind | None = None) -> Source:
    """The data set that the flags name, of texts unless another kind is given."""
    kind = TEXTS if kind is None else kind
    formats = ", ".join(suffix[1:] for suffix in kind.suffixes)
    if config.dataset is None:
        raise InputError(
            f"expected a data set, found none; pass --dataset with a Hub id, a file ({formats}), a folder "
            "of such files, or a folder with one sub-folder per class"
        )
    resolved = resolve(config.dataset)
    if not os.path.isabs(resolved):
        return _load_from_hub(resolved, config.dataset_config)
    path = Path(resolved)
    if path.is_file():
        return Source({"train": _load_file(path, config, kind)})
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _load_saved(path)
    entries = visible(path)
    tables = [entry for entry in entries if entry.is_file() and entry.name.lower().endswith(kind.suffixes)]
    if tables:
        return _load_folder_of_files(path, tables, config, kind)
    if folders := _folders(path):
        return _load_class_folders(path, folders, kind)
    raise InputError(
        f"expected {kind.noun} in {path}: files ({formats}), one sub-folder per class, or a saved DatasetDict; "
        f"found {', '.join(entry.name for entry in entries[:10]) or 'an empty folder'}; give another "
        "folder or convert the files"
    )


def _load_from_hub(name: str, configuration: str | None) -> Source:
    import datasets

    try:
        return Source(dict(datasets.load_dataset(name, configuration)))
    except Exception as error:  # the network, the Hub and a broken data set fail in many ways, with the same remedies
        raise InputError(
            f"expected the Hub data set {name!r} (configuration {configuration!r}), found that it cannot be loaded "
            f"({reason(error)}); check the spelling, --dataset_config and the network, set HF_TOKEN for a private or "
            "gated data set, or give a local copy (a file, a folder, or what save_to_disk wrote)"
        ) from error


def _load_saved(path: Path) -> Source:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
        for split in saved.values() if isinstance(saved, datasets.DatasetDict) else [saved]:
            split.data.validate(full=True)
    except Exception as error:
        raise InputError(
            f"expected a data set written by save_to_disk in {path}, found one that cannot be read ({reason(error)}); "
            "save or copy it again"
        ) from error
    splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    # A format such as "torch" is saved with the data; everything here expects plain Python values.
    return Source({name: split.with_format(None) for name, split in splits.items()})


def _load_file(path: Path, config: DataConfig, kind: Kind) -> datasets.Dataset:
    if not path.name.lower().endswith(kind.suffixes):
        raise InputError(
            f"expected a file of labelled {kind.noun} ({', '.join(kind.suffixes)}), found {path}; convert it, or put the "
            f"{kind.noun} into one sub-folder per class and give the folder"
        )
    if path.stat().st_size == 0:
        raise InputError(f"expected labelled {kind.noun} in {path}, found an empty file; write the data set again")
    return kind.read_file(path, config)


def read_table(path: Path, config: DataConfig) -> datasets.Dataset:
    """A csv, tsv, json, jsonl or parquet file as it is."""
    import datasets

    builder, arguments = FILE_BUILDERS[path.suffix.lower()]
    if builder == "csv":
        check_fields(path, arguments.get("sep", ","))
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it is about to raise
    try:
        # Data files are patterns: unescaped, the brackets of "texts [1].csv" would match another file or none.
        table = datasets.load_dataset(builder, data_files=glob.escape(str(path)), split="train", **arguments)
        if builder == "parquet":
            table.data.validate(full=True)  # nobody has looked at the bytes of its texts yet
        return table
    except Exception as error:  # parsers raise errors of their own kinds, and `datasets` wraps some of them
        if full := no_room(error):
            raise InputError(
                f"expected room on the disk for a copy of {path} in {datasets.config.HF_DATASETS_CACHE}, found none ({full}); make room, or "
                "set HF_DATASETS_CACHE to a folder on another disk"
            ) from error
        raise InputError(
            f"expected a well-formed {path.suffix.lower()[1:]} file in UTF-8, found that {path} cannot be read "
            f"({reason(error)}); repair the file or save it again"
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def check_fields(path: Path, separator: str) -> None:
    """Raise InputError, in little memory, for a table with a field longer than LONGEST_FIELD, more than MOST_COLUMNS, or, where it is
    compressed (.gz), more than MOST_UNPACKED characters: the parser would read all of it first."""
    limit, line, longest, unpacked = csv.field_size_limit(LONGEST_FIELD), 0, 0, 0
    packed = path.suffix.lower() == ".gz"
    open_file: Any = gzip.open if packed else open
    try:
        with open_file(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
            # A line without an end comes in pieces, each a row to the reader; what quotation marks enclose, it joins.
            rows = csv.reader(iter(lambda: file.readline(LONGEST_FIELD), ""), delimiter=separator)
            for row in rows:
                longest = max(map(len, row), default=0)
                unpacked += sum(map(len, row)) + len(row) if packed else 0
                if len(row) > MOST_COLUMNS or unpacked > MOST_UNPACKED:
                    raise InputError(
                        f"expected at most {MOST_COLUMNS:,} columns in {path} and, of a compressed table, {MOST_UNPACKED:,} characters, found "
                        f"more by line {rows.line_num}; give it as parquet, or in parts"
                    )
                if longest >= LONGEST_FIELD:
                    break
                line = rows.line_num
    except csv.Error as error:
        longest = LONGEST_FIELD if "field limit" in str(error) else 0  # all else is the parser's to say
    finally:
        csv.field_size_limit(limit)
    if longest >= LONGEST_FIELD:
        raise InputError(
            f"expected fields of less than {LONGEST_FIELD:,} characters in {path}, found a longer one in the record that begins in "
            f"line {line + 1}; close its quotation mark, or cut the text"
        )


def _load_folder_of_files(path: Path, files: list[Path], config: DataConfig, kind: Kind) -> Source:
    if len(files) == 1:
        return Source({"train": _load_file(files[0], config, kind)})
    import datasets

    return Source(
        {
            split: datasets.concatenate_datasets([_load_file(file, config, kind) for file in split_files])
            for split, split_files in files_by_split(path, files).items()
        }
    )


def split_named_by(file: Path) -> str | None:
    """The split that a file is named after: "train.csv", or a shard such as "train-00000-of-00002.parquet"."""
    return SPLIT_NAMES.get(re.split(r"[-_.]", file.name.lower())[0])


def files_by_split(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The files of each split in the folder `path`; raises InputError where some are not named after one."""
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_named_by(file), []).append(file)
    unnamed = by_split.pop(None, [])
    if unnamed:
        names = ", ".join(f"{split}.{files[-1].name.partition('.')[2]}" for split in SPLITS)
        raise InputError(
            f"expected files named after their split ({names}) in {path}, found {', '.join(file.name for file in unnamed[:10])}; "
            "rename the files, remove them, or pass one file as --dataset"
        )
    return {str(split): split_files for split, split_files in by_split.items()}


def _load_class_folders(path: Path, folders: list[Path], kind: Kind) -> Source:
    """Files in one sub-folder per class, or in one folder per split that holds the sub-folders."""
    per_split = {SPLIT_NAMES[folder.name.lower()]: folder for folder in folders if folder.name.lower() in SPLIT_NAMES}
    if len(per_split) == len(folders):
        splits = {split: _read_class_folders(folder, _folders(folder), kind) for split, folder in per_split.items()}
    else:
        splits = {"train": _read_class_folders(path, folders, kind)}
    details = _count_guessed_encodings(path, splits) if kind is TEXTS else {}
    return Source(splits, row_name_column="file", details=details)


def _count_guessed_encodings(path: Path, splits: dict[str, datasets.Dataset]) -> dict[str, Any]:
    guessed = [
        f"{label}/{file}"
        for split in splits.values()
        for label, file, encoding in zip(split["label"][:], split["file"][:], split["encoding"][:], strict=True)
        if encoding != "utf-8"
    ]
    return note_guessed_encodings(path, guessed)


def note_guessed_encodings(path: Path, guessed: list[str]) -> dict[str, Any]:
    """Warn of the files whose encoding was guessed; what the details of the data say of them."""
    if guessed:
        logger.warning(
            "%d of the text files in %s are not UTF-8 and were read as cp1252, such as %s",
            len(guessed),
            path,
            guessed[0],
        )
    return {"read_as_cp1252": len(guessed)}


def visible(folder: Path) -> list[Path]:
    """The entries of a folder by name, without hidden ones and what tools leave behind (__pycache__, __MACOSX)."""
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith((".", "__")))
    return sorted(entries, key=lambda entry: entry.name)


def _folders(path: Path) -> list[Path]:
    return [entry for entry in visible(path) if entry.is_dir()]


def _read_class_folders(path: Path, folders: list[Path], kind: Kind) -> datasets.Dataset:
    files: list[tuple[Path, str]] = []
    for folder in folders:
        held = [entry for entry in visible(folder) if entry.is_file()]
        if not held:
            raise InputError(
                f"expected one sub-folder of {kind.noun} per class in {path}, found no file in {folder.name}; add its "
                f"{kind.noun} or remove it"
            )
        files += [(file, folder.name) for file in held]
    return kind.read_files(path, files)


def _read_text_files(path: Path, files: list[tuple[Path, str]]) -> datasets.Dataset:
    import datasets

    features = datasets.Features({name: datasets.Value("string") for name in ("text", "label", "file", "encoding")})
    # Size and time are part of the arguments so that the cache of `datasets` notices a changed file.
    statuses = [(str(file), label, file.stat()) for file, label in files]
    arguments = {"files": [(file, label, status.st_size, status.st_mtime_ns) for file, label, status in statuses]}
    try:
        return datasets.Dataset.from_generator(read_texts, features=features, gen_kwargs=arguments)
    except Exception as error:
        if isinstance(cause := _cause(error), InputError):
            raise cause from None
        raise InputError(
            f"expected readable text files in the sub-folders of {path}, found that they cannot be read "
            f"({reason(error)}); check the files and their permissions"
        ) from error


def read_texts(files: list[tuple[str, str, int, int]]) -> Iterator[dict[str, str]]:
    for path, label, _, _ in files:
        content = Path(path).read_bytes()
        try:
            text, encoding = content.decode("utf-8-sig"), "utf-8"
        except UnicodeDecodeError:
            try:
                text, encoding = content.decode("cp1252"), "cp1252"
            except UnicodeDecodeError:
                text = "\0"
        if "\0" in text:
            raise InputError(
                "expected text files (UTF-8, or at least cp1252) in one sub-folder per class, found other bytes in "
                f"{path}; convert or remove the file"
            )
        yield {"text": text, "label": label, "file": Path(path).name, "encoding": encoding}


def _cause(error: BaseException) -> BaseException:
    """What went wrong while `datasets` generated a data set, out of its "an error occurred"."""
    from datasets.exceptions import DatasetGenerationError

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def reason(error: BaseException) -> str:
    cause = _cause(error)
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:300]


# ---- Splits and labels


def choose_splits(
    source: Source, config: DataConfig, has_references: Callable[[datasets.Dataset], bool]
) -> dict[str, str | None]:
    """Which of the data set's splits plays which role; None where one must be cut (see load_classification).

    `has_references` tells whether a split that no flag names can be scored: hidden test labels cannot.
    """
    splits = source.splits
    for flag in ("validation_split", "test_split"):
        name = getattr(config, flag)
        if name is not None and name not in splits:
            raise InputError(
                f"expected the split {name!r} that --{flag} names, found the splits {', '.join(splits)}; pass one of "
                "them, or leave the flag out"
            )
    train = config.train_split if config.train_split in splits or len(splits) > 1 else next(iter(splits))
    if train not in splits:
        raise InputError(
            f"expected a training split {train!r}, found the splits {', '.join(splits)}; name one with --train_split"
        )

    def usable(name: str, taken: set[str | None]) -> str | None:
        return name if name in splits and name not in taken and has_references(splits[name]) else None

    test = config.test_split or usable("test", {train, config.validation_split})
    validation = config.validation_split or usable("validation", {train, test})
    if test is None and config.validation_split is None:
        test, validation = validation, None
    if len({train, validation, test} - {None}) < 3 - (validation is None) - (test is None):
        raise InputError(
            f"expected three different splits, found train {train!r}, validation {validation!r} and test {test!r}; "
            "leave --validation_split or --test_split out to have it cut from the training split"
        )
    return {"train": train, "validation": validation, "test": test}


def _class_name(value: Any, names: list[str] | None) -> Any:
    """The class a label cell names, or None for a cell without label; `names` are those of a ClassLabel column."""
    if value is None or value == -1 or (isinstance(value, float) and math.isnan(value)):
        return None
    if names is not None:
        return names[value]
    if isinstance(value, str):
        return value if value.strip() else None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _declared_names(split: datasets.Dataset, config: DataConfig) -> list[str] | None:
    return getattr(split.features[config.label_column], "names", None)


def _label_values(split: datasets.Dataset, config: DataConfig) -> dict[Any, Any]:
    """Every different cell of the label column and the class it names."""
    names = _declared_names(split, config)
    return {value: _class_name(value, names) for value in split.unique(config.label_column)}


def _has_labels(split: datasets.Dataset, config: DataConfig) -> bool:
    if config.label_column not in split.column_names:
        return False
    if not _holds_classes(split, config):
        return True  # for _check_columns to refuse
    return any(name is not None for name in _label_values(split, config).values())


def _dtype(split: datasets.Dataset, column: str) -> str:
    return str(getattr(split.features[column], "dtype", type(split.features[column]).__name__))


def _holds_classes(split: datasets.Dataset, config: DataConfig) -> bool:
    dtypes = ("string", "large_string", "bool", "null", "int", "uint", "float")
    return _dtype(split, config.label_column).startswith(dtypes)


def _checked_columns(split: datasets.Dataset, name: str, config: DataConfig, kind: Kind) -> datasets.Dataset:
    """The split, ready to read; raises InputError unless the columns are there and hold such values and classes."""
    if len(split) == 0:
        raise InputError(
            f"expected examples in the split {name!r}, found none; give a data set with rows in every split"
        )
    columns = kind.columns_of(config) | {"label_column": config.label_column}
    prepared = split
    for flag, column in columns.items():
        if column not in split.column_names:
            raise InputError(
                f"expected a column {column!r} in the split {name!r}, found the columns "
                f"{', '.join(split.column_names)}; name the right one with --{flag}"
            )
        ready = prepared if flag == "label_column" else kind.prepare(prepared, column)
        if ready is None:
            raise InputError(
                f"expected {kind.noun} in the column {column!r} of the split {name!r}, found values of type "
                f"{_dtype(split, column)}; name a column of {kind.noun} with --{flag} (columns: "
                f"{', '.join(split.column_names)})"
            )
        prepared = ready
    if len(set(columns.values())) < len(columns):
        raise InputError(
            f"expected different columns for {', '.join(columns)}, found {', '.join(columns.values())}; the split "
            f"{name!r} has the columns {', '.join(split.column_names)}"
        )
    if not _holds_classes(split, config):
        raise InputError(
            f"expected one class name or number per row in the column {config.label_column!r} of the split {name!r}, "
            f"found values of type {_dtype(split, config.label_column)}; name a column of classes with --label_column "
            f"(columns: {', '.join(split.column_names)})"
        )
    return prepared


def _label_names(given: dict[str, datasets.Dataset], config: DataConfig) -> list[str]:
    """The class names: in a ClassLabel's own order, numbers and truth values by size, anything else by alphabet."""
    found = {name for split in given.values() for name in _label_values(split, config).values() if name is not None}
    declared = _declared_names(given["train"], config)
    if declared is not None:
        unknown = sorted({str(name) for name in found} - set(declared))
        if unknown:
            raise InputError(
                f"expected the classes of the training split ({', '.join(declared)}) in every split, found also "
                f"{', '.join(unknown[:5])}; add training examples of it, or remove it from the other splits"
            )
        return list(declared)
    fractions = [name for name in found if isinstance(name, float)]
    if fractions:
        raise InputError(
            f"expected classes in the column {config.label_column!r}, found fractions such as {fractions[0]}; name a "
            "column of classes with --label_column (regression is not supported)"
        )
    numbers = all(isinstance(name, int) for name in found)
    names = [str(name) for name in sorted(found, key=lambda name: name if numbers else str(name))]
    if len(names) < 2:
        raise InputError(
            f"expected at least two classes in the column {config.label_column!r}, found {len(names)} "
            f"({', '.join(names) or 'no label at all'}); name the column of classes with --label_column, or add "
            "examples of another class"
        )
    return list(dict.fromkeys(names))


def _scan(
    split: datasets.Dataset, name: str, source: Source, config: DataConfig, kind: Kind, label_names: list[str]
) -> Rows:
    """Read a split once: check every row, and keep a hash of its content and its class id."""
    from datasets.utils import tqdm

    columns = list(kind.columns_of(config).values())
    class_ids = {label: class_id for class_id, label in enumerate(label_names)}
    values_to_names = _label_values(split, config)
    label_ids = {value: class_ids[str(label)] for value, label in values_to_names.items() if label is not None}
    keys = np.empty(len(split), np.uint64)
    labels = np.empty(len(split), np.int64)
    unusable: list[int] = []
    start = 0
    batches = split.select_columns([*columns, config.label_column]).with_format("arrow").iter(batch_size=1000)
    for batch in tqdm(batches, total=math.ceil(len(split) / 1000), desc=f"Checking {name}", unit="batch"):
        rows = list(zip(*(batch[column].to_pylist() for column in columns), strict=True))
        for offset, content in enumerate(kind.content(rows)):
            if content is None:
                unusable.append(start + offset)
            keys[start + offset] = content_key(content or b"")
        values = batch[config.label_column].to_pylist()
        labels[start : start + len(values)] = [label_ids.get(value, -1) for value in values]
        start += len(values)
    if unusable:
        raise InputError(
            f"expected {kind.usable} in every row of the split {name!r}, found {len(unusable)} without one "
            f"({_row_names(split, unusable, source)}); {DROP_ROWS}"
        )
    unlabelled = np.flatnonzero(labels == -1)
    if len(unlabelled):
        raise InputError(
            f"expected a label in every row of the split {name!r}, found {len(unlabelled)} of {len(labels)} rows "
            f"without one (empty, or -1; {_row_names(split, unlabelled.tolist(), source)}); {DROP_ROWS}, or, if -1 is "
            "a class, name it"
        )
    return Rows(keys, labels)


def _row_names(split: datasets.Dataset, rows: list[int], source: Source) -> str:
    shown = rows[:10]
    column = source.row_name_column
    names = [str(row) if column is None else split[row][column] for row in shown]
    unit = "rows, counted from 0:" if column is None else "files"
    return f"{unit} {', '.join(names)}" + (" …" if len(rows) > len(shown) else "")


def _text_or_none(split: datasets.Dataset, column: str) -> datasets.Dataset | None:
    return split if _dtype(split, column) in ("string", "large_string") else None


def _text_content(rows: list[tuple[Any, ...]]) -> list[bytes | None]:
    folded = [[" ".join((text or "").split()) for text in row] for row in rows]
    return ["\0".join(texts).encode() if all(texts) else None for texts in folded]


def content_key(content: bytes) -> int:
    """A hash to find equal examples by."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def text_key(folded: list[str]) -> int:
    """A hash of texts whose whitespace is folded, to find equal ones by."""
    return content_key("\0".join(folded).encode())


TEXTS = Kind(
    noun="texts",
    usable="a text",
    columns={"text_column": "text", "text_pair_column": "text_pair"},
    suffixes=tuple(FILE_BUILDERS),
    read_file=read_table,
    read_files=_read_text_files,
    prepare=_text_or_none,
    content=_text_content,
    content_is_all=False,  # whitespace is folded
)


def drop_duplicates(rows: dict[str, Rows], noun: str = "texts") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The row numbers that stay in each given split, and how many went."""
    kept: dict[str, np.ndarray] = {}
    removed: dict[str, int] = {}
    conflicting = 0
    # (key, label) of what is already taken; test goes first, so it stays whole.
    taken_keys, taken_labels = np.empty(0, np.uint64), np.empty(0, np.int64)
    for role in ("test", "validation", "train"):
        if role not in rows:
            continue
        keys = np.concatenate([taken_keys, rows[role].keys])
        labels = np.concatenate([taken_labels, rows[role].labels])
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        stays = first[inverse] == np.arange(len(keys))
        if role == "test":
            stays[:] = True
        conflicts = ~stays & (labels != labels[first[inverse]])
        kept[role] = np.flatnonzero(stays[len(taken_keys) :])
        conflicting += int(conflicts[len(taken_keys) :].sum())
        removed[role] = len(rows[role].keys) - len(kept[role])
        if len(kept[role]) == 0:
            raise InputError(
                f"expected {noun} in the {role} split that no other split holds, found that all {removed[role]} are "
                "also in the validation or test split; give splits that differ, or let them be cut (leave the flags "
                "out)"
            )
        taken_keys, taken_labels = keys, labels
    return kept, {
        "duplicates_removed": {role: removed[role] for role in SPLITS if role in removed},
        "conflicting_labels": conflicting,
    }


def cut_missing_splits(
    kept: dict[str, np.ndarray],
    labels: np.ndarray,
    roles: dict[str, str | None],
    config: DataConfig,
    noun: str = "texts",
) -> None:
    """Cut the test and validation split that the data set does not have from the training rows, in place."""
    total = len(kept["train"])
    if np.bincount(labels[kept["train"]]).max() < 2 < total:
        raise InputError(
            f"expected classes that several examples share in the column {config.label_column!r}, found {total} "
            f"different values in {total} examples; name the column of classes with --label_column"
        )
    shares = {"test": config.test_size, "validation": config.validation_size}
    sizes = {role: max(1, round(share * total)) for role, share in shares.items() if role not in kept}
    if sizes and total - sum(sizes.values()) < 2:
        raise InputError(
            f"expected enough different {noun} in the split {roles['train']!r} to cut {' and '.join(sizes)} from it, "
            f"found {total}; add examples, or lower --test_size and --validation_size"
        )
    for role, size in sizes.items():
        rest, cut = cut_stratified(labels[kept["train"]], size, config.split_seed)
        kept["train"], kept[role] = kept["train"][rest], kept["train"][cut]


def cut_stratified(labels: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rest and of a seeded, stratified cut of `size` rows, both in ascending order.

    The rest keeps a row of every class where it has room for that; `size` is less than the number of rows.
    """
    # The split of `datasets` reads the strata one row at a time: two minutes for 400,000.
    from sklearn.model_selection import train_test_split

    order = np.random.default_rng(seed).permutation(len(labels))
    reserved = order[np.unique(labels[order], return_index=True)[1]]
    if len(reserved) > len(labels) - size:
        reserved = reserved[:0]
    pool = np.setdiff1d(np.arange(len(labels)), reserved)
    if len(pool) == size:
        return np.sort(reserved), pool
    # A stratum needs two rows, so a class with a single one left joins the largest class.
    strata = labels[pool].copy()
    counts = np.bincount(strata)
    strata[counts[strata] < 2] = counts.argmax()
    enough = min(size, len(pool) - size) >= len(np.unique(strata)) and counts.max() > 1
    rest, cut = train_test_split(pool, test_size=size, random_state=seed, stratify=strata if enough else None)
    return np.sort(np.concatenate([reserved, rest])), np.sort(cut)


def _check_classes(counts: dict[str, np.ndarray], label_names: list[str], config: DataConfig) -> None:
    present = np.flatnonzero(sum(counts.values()))
    if len(present) < 2:
        raise InputError(
            f"expected at least two classes in the column {config.label_column!r}, found examples of {len(present)} "
            f"({label_names[present[0]]}); add examples of another class, or name another column with --label_column"
        )
    missing = [name for name, count in zip(label_names, counts["train"], strict=True) if count == 0]
    if missing:
        raise InputError(
            f"expected training examples of all {len(label_names)} classes, found none of "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''} among {counts['train'].sum()}; add examples, "
            "remove the class from the data set, or raise --max_train_samples"
        )


def _select(
    split: datasets.Dataset,
    labels: np.ndarray,
    kept: np.ndarray,
    config: DataConfig,
    kind: Kind,
    label_names: list[str],
) -> datasets.Dataset:
    """The kept rows with the columns of `kind` and label; only row numbers and labels take memory."""
    import datasets

    columns = {column: kind.columns[flag] for flag, column in kind.columns_of(config).items()}
    inputs = split.select_columns(list(columns))
    # Through unique names, since a source's own "text" column may be the second of the pair.
    inputs = inputs.rename_columns({column: f"{column} {name}" for column, name in columns.items()})
    inputs = inputs.rename_columns({f"{column} {name}": name for column, name in columns.items()})
    labelled = inputs.add_column("label", labels, feature=datasets.ClassLabel(names=label_names))
    return labelled.select(kept, keep_in_memory=True)


def _fingerprint_of_keys(
    splits: dict[str, datasets.Dataset], keys: dict[str, np.ndarray], label_names: list[str]
) -> str:
    digest = hashlib.sha256(json.dumps(label_names).encode())
    for role, split in splits.items():
        digest.update(f"\n{role} {len(split)}\n".encode())
        digest.update(keys[role].astype("<u8").tobytes() + np.asarray(split["label"][:], "<i8").tobytes())
    return digest.hexdigest()


def content_fingerprint(splits: dict[str, datasets.Dataset], label_names: list[str]) -> str:
    digest = hashlib.sha256(json.dumps(label_names).encode())
    for role, split in splits.items():
        digest.update(f"\n{role} {len(split)}\n".encode())
        for batch in split.with_format("arrow").iter(batch_size=1000):
            for row in zip(*(batch[column].to_pylist() for column in sorted(batch.column_names)), strict=True):
                digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


# ---- Tokens


def tokenize(data: ClassificationData, tokenizer: Any, max_length: int) -> datasets.DatasetDict:
    """Token ids of every split, cut to `max_length` tokens, not padded, in the order of the examples.

    The columns are input_ids, attention_mask, token_type_ids (if the tokenizer gives them), labels and length. Tokens
    are kept in the cache of `datasets`, keyed by the data's content, the tokenizer and the length.
    """
    import datasets

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        tokens = tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length)
        return {
            **tokens,
            "labels": batch["label"],
            "length": [len(input_ids) for input_ids in tokens["input_ids"]],
        }

    key = json.dumps([_TOKENS_VERSION, data.fingerprint, tokenizer_content(tokenizer), max_length])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "pocketformers"
    folder.mkdir(parents=True, exist_ok=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation = None if backend is None else backend.truncation
    tokens = datasets.DatasetDict(
        {
            name: split.map(
                encode,
                batched=True,
                remove_columns=split.column_names,
                # Beside the source's own cache files would be inside the user's folder where the data is one.
                cache_file_name=str(folder / f"tokens-{fingerprint}-{name}.arrow"),
                new_fingerprint=f"{fingerprint}-{name}",
                desc=f"Tokenizing {name}",
            )
            for name, split in data.splits.items()
        }
    )
    if backend is not None:
        # Or the tokenizer.json that is saved later would tell whether the tokens came from the cache.
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
    return tokens


def tokenizer_content(tokenizer: Any) -> list[str]:
    """What decides the tokens, apart from the truncation and padding that the last call left in the tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {"vocabulary": tokenizer.get_vocab(), "settings": tokenizer.init_kwargs}
    else:
        content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    sides = [tokenizer.truncation_side, *tokenizer.model_input_names]
    return [type(tokenizer).__name__, *sides, json.dumps(content, sort_keys=True, default=str)]


def collate(tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """A collator that pads a batch of tokenize()'s rows to its own longest, and leaves out `length`.

    Token columns come out as (batch, longest) int64, `labels` as (batch,) int64, and any other column of equally long
    number lists, such as `teacher_logits`, as (batch, …) in float32 or int64.
    """
    from transformers import DataCollatorWithPadding

    return partial(_collate_batch, DataCollatorWithPadding(tokenizer))


def _collate_batch(pad: Callable[[list[dict[str, Any]]], Any], rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    # At module level, so that the workers of a DataLoader can receive it pickled.
    return dict(pad([{name: value for name, value in row.items() if name != "length"} for row in rows]))
