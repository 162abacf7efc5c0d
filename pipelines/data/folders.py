"""Where examples come from: the Hub, a saved data set, a file, files named after their splits, or one folder per class."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, dropwhile, islice, takewhile
from pathlib import Path
from typing import Any

import datasets

from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError, reason
from pipelines.core.sources import resolve
from pipelines.data.kinds import SPLITS, Kind, Source
from pipelines.data.references import dtype
from pipelines.data.remembered import files_below, visible
from pipelines.data.tables import read_table

logger = logging.getLogger(__name__)

# How files and folders of a data set name the splits.
SPLIT_NAMES = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing"), "test")
SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")

SPLIT_WORD = re.compile(r"[-_. ]+")  # between the words of a name
SUFFIX = re.compile(r"\.\w+(\.(gz|bz2|xz|zip))?$")
METADATA = re.compile(r"metadata\.(csv|jsonl|parquet)", re.IGNORECASE)  # a table of the files beside it
FILE_NAME = "file_name"  # the column of a metadata table that `datasets` gives this meaning, too


def load_source(config: DataConfig, kind: Kind, in_split: bool = False) -> Source:
    """The data set that the flags name, as it is; with `in_split` a folder is what one of a split may be: also files without classes."""
    if config.dataset is None:
        raise InputError(
            f"expected a data set, found none; pass --dataset with a Hub id, a file ({_formats(kind)}), a folder "
            "of such files, or a folder with one sub-folder per class ('pocketformers compress --demo' runs the task's offline demo)"
        )
    resolved = resolve(config.dataset)
    if not os.path.isabs(resolved):
        return _load_from_hub(resolved, config.dataset_config)
    path = Path(resolved)
    if not (path.is_file() or path.is_dir()):  # it is read several times
        raise InputError(
            f"expected a file or a folder as --dataset, found a pipe or a device: {path}; save what it holds to a file and give that"
        )
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _load_saved(path)
    parts = (
        [("train", _load_file(path, config, kind))] if path.is_file() else list(_parts(path, config, kind, in_split))
    )
    by_split: dict[str, list[datasets.Dataset]] = {}
    for split, part in parts:
        by_split.setdefault(split, []).append(part)
    columns = {*kind.columns_of(config).values(), config.label_column, *config.more_label_columns}
    splits = {split: _joined(shards, columns) for split, shards in by_split.items()}
    return Source(splits, how_read(part for _, part in parts))


def _formats(kind: Kind) -> str:
    return ", ".join(suffix[1:] for suffix in kind.suffixes if suffix.count(".") == 1)


def _parts(
    path: Path, config: DataConfig, kind: Kind, in_split: bool = False
) -> Iterator[tuple[str, datasets.Dataset]]:
    """What a folder holds, each part with the split that it belongs to; `in_split` where the folder is one."""
    entries = visible(path)
    folders = [entry for entry in entries if entry.is_dir()]
    listed = [entry for entry in entries if METADATA.fullmatch(entry.name)]
    if listed and (names := _names_of_files(listed[0], config)) is not None:
        read = _read_listed(path, listed[0], names, config, kind)
        yield from ((split, read.select(rows)) for split, rows in _rows_by_split(names[FILE_NAME]).items())
        return
    tables = [file for file in entries if file.is_file() and _is_table(file, kind) and file not in listed]
    if data := _tables_of_data(tables, folders, config, kind, in_split):
        by_split = {"train": data} if in_split or len(data) == 1 else files_by_split(path, data)
        say_left_out(path, [entry for entry in entries if entry not in data])
        parts = [part for split, files in by_split.items() for part in _told_apart(split, files)]
        yield from ((split, _load_file(file, config, kind)) for split, file in parts)
    elif splits := _folders_of_splits(folders, kind):
        say_left_out(path, [entry for entry in entries if entry not in splits])
        for folder, split in splits.items():
            yield from ((split, part) for _, part in _parts(folder, config, kind, in_split=True))
    elif len(folders) == 1 and _holds_data(folders[0], kind):  # an archive's own folder
        yield from _parts(folders[0], config, kind)
    elif folders:
        hidden = [entry for entry in path.iterdir() if entry.is_dir() and entry.name.startswith(".")]
        say_left_out(path, [entry for entry in entries if entry.is_file()] + sorted(hidden))
        yield "train", kind.read_files(path, _labelled_files(path, folders, kind), config)
    elif in_split and (unlabelled := [entry for entry in entries if entry not in tables]):
        say_left_out(path, tables)
        yield "train", kind.read_files(path, [(file, None) for file in unlabelled], config).remove_columns("label")
    else:
        raise InputError(
            f"expected {kind.noun} in {path}: files ({_formats(kind)}), one sub-folder per class, or a saved DatasetDict; "
            f"found {', '.join(entry.name for entry in entries[:10]) or 'an empty folder'}; give another "
            "folder or convert the files"
        )


def _is_table(entry: Path, kind: Kind) -> bool:
    return entry.name.lower().endswith(kind.suffixes)


def _holds_data(folder: Path, kind: Kind) -> bool:
    """Whether a folder has more than the files of a class."""
    return any(
        entry.is_dir() or _is_table(entry, kind) or METADATA.fullmatch(entry.name) is not None
        for entry in visible(folder)
    )


def _tables_of_data(
    tables: list[Path], folders: list[Path], config: DataConfig, kind: Kind, in_split: bool
) -> list[Path]:
    """The tables that are the data set: beside others of their split, beside tables of splits, and beside class folders those with its
    columns. Where none of a split has them they stay, so that a message names the columns."""
    are_classes = len(folders) > 1 and all(map(_has_files, folders))
    if len(tables) < 2 and not are_classes:
        return tables
    split_of = dict.fromkeys(tables, "train") if in_split else {table: split_named_by(table) for table in tables}
    complete = [table for table in tables if _is_data(table, config, kind)]
    in_splits = any(map(split_named_by, tables))
    found = []
    for table in tables:
        is_named = begins_with_split(table) if are_classes else split_named_by(table) or not in_splits
        others = split_of[table] and any(split_of[other] == split_of[table] for other in complete)
        if table in complete or (is_named and not others):
            found.append(table)
    return found


def _folders_of_splits(folders: list[Path], kind: Kind) -> dict[Path, str]:
    """The folders that are named after splits, where these are splits and no classes."""
    named = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES and visible(folder)]
    splits = {folder: SPLIT_NAMES[folder.name.lower()] for folder in named}
    # Beside folders with other names, one of files alone is a class, even one that is called train.
    if "train" not in splits.values() or len(splits) == 1 < len(folders):
        splits = {folder: split for folder, split in splits.items() if _holds_data(folder, kind)}
    return splits if "train" in splits.values() or len(splits) == len(folders) else {}


def _names_of_files(table: Path, config: DataConfig) -> datasets.Dataset | None:
    """A metadata table, where it names the examples; None, with a line that says why, where it does not."""
    names = read_table(table, replace(config, image_column=FILE_NAME))
    if FILE_NAME not in names.column_names:
        found = ", ".join(names.column_names[:10])
        logger.warning("%s has no column %r and is left out (its columns: %s)", table, FILE_NAME, found)
        return None
    if _in_class_folders(names, config):
        logger.warning("the classes in %s are its folders; %s has no labels and is left out", table.parent, table.name)
        return None
    return names


def _rows_by_split(names: Iterable[Any]) -> dict[str, list[int]]:
    """The rows of a metadata table by the split whose folder begins their names ("train/1.png"); of "train" unless all have one."""
    by_split: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        by_split.setdefault(SPLIT_NAMES.get(re.split(r"[/\\]", str(name).lower())[0], ""), []).append(row)
    return by_split if "train" in by_split and "" not in by_split else {"train": sorted(chain(*by_split.values()))}


def _in_class_folders(names: datasets.Dataset, config: DataConfig) -> bool:
    """Whether a metadata table gives no labels, and the folders of the files that it lists do."""
    folders = {re.split(r"[/\\]", f"/{name}")[-2].lower() for name in names[FILE_NAME]}
    return config.label_column not in names.column_names and "" not in folders and len(folders - SPLIT_NAMES.keys()) > 1


def _has_files(folder: Path) -> bool:
    return any(entry.is_file() for entry in visible(folder))


def _is_data(table: Path, config: DataConfig, kind: Kind) -> bool:
    try:
        return set(kind.columns_of(config).values()) <= set(_load_file(table, config, kind).column_names)
    except InputError:
        return False


def say_left_out(path: Path, entries: list[Path]) -> None:
    if entries:
        more = f" and {len(entries) - 10} more" if len(entries) > 10 else ""
        logger.warning(
            "left out of the data set in %s: %s%s",
            path,
            ", ".join(str(entry.relative_to(path)) for entry in entries[:10]),
            more,
        )


def _labelled_files(path: Path, folders: list[Path], kind: Kind) -> list[tuple[Path, str | None]]:
    """The files in class folders, and in the folders of those, each with its class."""
    files: list[tuple[Path, str | None]] = []
    tables: list[Path] = []
    for folder in folders:
        if not _has_files(folder):
            held = ", ".join(entry.name for entry in visible(folder)[:5])
            raise InputError(
                f"expected one sub-folder of {kind.noun} per class in {path}, found no file in {folder.name} "
                f"({f'only the folders {held}' if held else 'it is empty'}); add its {kind.noun}, remove it, or give the folder whose "
                "sub-folders are the classes (those of splits are called train, validation and test)"
            )
        below = list(files_below(folder))
        examples = [file for file in below if not file.name.lower().endswith(kind.suffixes)]
        if not examples:
            raise InputError(
                f"expected one sub-folder of {kind.noun} per class in {path}, found nothing but tables in {folder.name} ({below[0].name} …); "
                "give one file, or name folders or files after their splits: train, validation and test"
            )
        files += [(file, folder.name) for file in examples]
        tables += [file for file in below if file not in examples]
    say_left_out(path, tables)
    return files


def _read_listed(path: Path, table: Path, names: datasets.Dataset, config: DataConfig, kind: Kind) -> datasets.Dataset:
    """The files that a metadata table lists, with the labels that it gives them, if any. A line names the others."""
    listed = [path / str(name).replace("\\", "/") for name in names[FILE_NAME]]
    if absent := [file.name for file in listed if not file.is_file()]:
        raise InputError(
            f"expected the {len(listed)} files of the metadata table in {path}, found {len(absent)} of them missing, such as {absent[0]}; "
            f"correct the column {FILE_NAME!r}, or add the files"
        )
    known = {table, *(Path(os.path.normpath(file)) for file in listed)}
    say_left_out(path, [file for file in files_below(path) if file not in known])
    if config.label_column not in names.column_names:
        return kind.read_files(path, [(file, None) for file in listed], config).remove_columns("label")
    read = kind.read_files(path, list(zip(listed, names[config.label_column], strict=True)), config)
    return read if config.label_column == "label" else read.rename_column("label", config.label_column)


def _joined(shards: list[datasets.Dataset], columns: set[str]) -> datasets.Dataset:
    """The files of one split, one after another; where they are of other types, the named columns as text."""
    if any(shard.features != shards[0].features for shard in shards):
        shards = [shard.select_columns([name for name in shard.column_names if name in columns]) for shard in shards]
        for name in columns:
            if len({str(shard.features[name]) for shard in shards if name in shard.column_names}) > 1:
                text = datasets.Value("string")
                shards = [shard.cast_column(name, text) if name in shard.column_names else shard for shard in shards]
    return datasets.concatenate_datasets(shards)


def how_read(parts: Iterable[datasets.Dataset]) -> dict[str, Any]:
    """What the details of the data say of files with another encoding or separator than the usual ones: how many have which."""
    found: Counter[str] = Counter()
    for part in parts:
        is_text = "encoding" in part.column_names and dtype(part, "encoding") == "string"
        found.update([f"encoding {name}" for name in part["encoding"][:]] if is_text else [part.info.description])
    counts = {name: count for name, count in found.items() if name not in ("", "encoding utf-8")}
    return {"read_as": counts} if counts else {}


def _load_from_hub(name: str, configuration: str | None) -> Source:
    try:
        return Source(dict(datasets.load_dataset(name, configuration)))
    except Exception as error:  # the network, the Hub and a broken data set fail in many ways, with the same remedies
        raise InputError(
            f"expected the Hub data set {name!r} (configuration {configuration!r}), found that it cannot be loaded "
            f"({reason(error)}); check the spelling, --dataset_config and the network, set HF_TOKEN for a private or "
            "gated data set, or give a local copy (a file, a folder, or what save_to_disk wrote)"
        ) from error


def _load_saved(path: Path) -> Source:
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
            f"expected a file of labelled {kind.noun} ({_formats(kind)}), found {path}; convert it, rename it where it is one of these, "
            f"unpack an archive, or put the {kind.noun} into one sub-folder per class and give the folder"
        )
    if path.stat().st_size == 0:
        raise InputError(f"expected labelled {kind.noun} in {path}, found an empty file; write the data set again")
    with path.open("rb") as file:
        if file.read(20).startswith(b"version https://git-"):
            raise InputError(f"expected labelled {kind.noun} in {path}, found a pointer of Git LFS; run git lfs pull")
    read = kind.read_file(path, config)
    if read.info.description:
        logger.warning("%s is read with %s (others: --separator, --encoding)", path.name, read.info.description)
    return read


def begins_with_split(file: Path) -> bool:
    """Whether a name begins with a split: "train.csv", or a shard such as "train-00000-of-00002.parquet"; no title ("Train to Busan.txt")."""
    return re.split(r"[-_.]", file.name.lower())[0] in SPLIT_NAMES


def split_named_by(file: Path) -> str | None:
    """The split that a file is named after: what its name begins with, or else the only one among its words ("news_test.csv", "my val2.csv")."""
    found = [split for word in SPLIT_WORD.split(file.name.lower()) if (split := _split_of(word))]
    return found[0] if begins_with_split(file) or len({*found}) == 1 else None


def _split_of(word: str) -> str | None:
    return SPLIT_NAMES.get(word.rstrip("0123456789"))


def _before_split(file: Path) -> str:
    """What stands before the split in a name: "news 2" of "news-2_train.csv"; nothing where that begins the name."""
    return " ".join(takewhile(lambda word: not _split_of(word), SPLIT_WORD.split(file.name.lower())))


def _told_apart(split: str, files: list[Path]) -> list[tuple[str, Path]]:
    """The files of a split with its name; where words behind it in their names differ, as of dev_matched.csv and dev_mismatched.csv, each has
    a split of its own. Shards have numbers there, and numbers within words (train-0-of-2-b42a.csv)."""
    names = []
    for file in files:
        words = SPLIT_WORD.split(SUFFIX.sub("", file.name.lower()))
        behind = dropwhile(lambda word: not _split_of(word), words)
        names.append("_".join([split, *(word for word in islice(behind, 1, None) if word.isalpha() and word != "of")]))
    return [*zip(names if len({*names}) > 1 else [split] * len(files), files, strict=True)]


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
    for split, found in by_split.items():
        if len({_before_split(file) for file in found}) > 1:  # amazon_train.csv and yelp_train.csv may be two data sets
            raise InputError(
                f"expected one data set in {path}, found files of several for its {split} split: {', '.join(file.name for file in found[:10])}; "
                f"give a folder for each, or call them {split}-0, {split}-1, … where they are parts of one"
            )
    return {str(split): found for split, found in by_split.items()}
