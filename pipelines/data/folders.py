"""Where examples come from: the Hub, a saved data set, a file, files named after their splits, or one folder per class."""

from __future__ import annotations

import os
import re
from pathlib import Path

import datasets

from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError
from pipelines.core.sources import resolve
from pipelines.data.kinds import SPLITS, Kind, Source
from pipelines.data.tables import reason

# How files and folders of a data set name the splits.
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)


def load_source(config: DataConfig, kind: Kind) -> Source:
    """The data set that the flags name, as it is."""
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
        by_split = {"train": tables} if len(tables) == 1 else files_by_split(path, tables)
        read = {split: [_load_file(file, config, kind) for file in files] for split, files in by_split.items()}
        return Source({split: datasets.concatenate_datasets(shards) for split, shards in read.items()})
    if _folders(path):
        return _load_class_folders(path, kind)
    raise InputError(
        f"expected {kind.noun} in {path}: files ({formats}), one sub-folder per class, or a saved DatasetDict; "
        f"found {', '.join(entry.name for entry in entries[:10]) or 'an empty folder'}; give another "
        "folder or convert the files"
    )


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
            f"expected a file of labelled {kind.noun} ({', '.join(kind.suffixes)}), found {path}; convert it, or put the "
            f"{kind.noun} into one sub-folder per class and give the folder"
        )
    if path.stat().st_size == 0:
        raise InputError(f"expected labelled {kind.noun} in {path}, found an empty file; write the data set again")
    return kind.read_file(path, config)


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


def _load_class_folders(path: Path, kind: Kind) -> Source:
    """Files in one sub-folder per class, or in one folder per split that holds the sub-folders."""
    folders = _folders(path)
    per_split = {SPLIT_NAMES[folder.name.lower()]: folder for folder in folders if folder.name.lower() in SPLIT_NAMES}
    by_split = per_split if len(per_split) == len(folders) else {"train": path}
    splits = {split: _read_class_folders(folder, kind) for split, folder in by_split.items()}
    return Source(splits, row_name_column="file", details=guessed_encodings(splits))


def guessed_encodings(splits: dict[str, datasets.Dataset]) -> dict[str, int]:
    """What the details of the data say of text files whose encoding was guessed; images have none."""
    encodings = [name for split in splits.values() if "encoding" in split.column_names for name in split["encoding"][:]]
    return {"read_as_cp1252": sum(name != "utf-8" for name in encodings)} if encodings else {}


def visible(folder: Path) -> list[Path]:
    """The entries of a folder by name, without hidden ones and what tools leave behind (__pycache__, __MACOSX)."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "__")))


def _folders(path: Path) -> list[Path]:
    return [entry for entry in visible(path) if entry.is_dir()]


def _read_class_folders(path: Path, kind: Kind) -> datasets.Dataset:
    files: list[tuple[Path, str]] = []
    for folder in _folders(path):
        held = [entry for entry in visible(folder) if entry.is_file()]
        if not held:
            raise InputError(
                f"expected one sub-folder of {kind.noun} per class in {path}, found no file in {folder.name}; add its "
                f"{kind.noun} or remove it"
            )
        files += [(file, folder.name) for file in held]
    return kind.read_files(path, files)
