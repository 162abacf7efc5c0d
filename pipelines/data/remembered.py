"""What was found out about a data set, kept between runs: a second run of a finished one does not read its data again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np

import pipelines
from pipelines.core.config import DataConfig
from pipelines.core.disk import digest
from pipelines.core.records import RECORD
from pipelines.core.run import MARKER
from pipelines.core.sources import resolve

# Part of the key of all that is remembered: raise it when the same files give other examples.
VERSION = 12
# What Windows, macOS, network disks and file systems leave in folders, beside hidden files.
NOT_DATA = {"thumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
NOT_DATA |= {"__macosx", "__pycache__"}
# Settings that change nothing in the examples.
NOT_IN_DATA = {"max_length", "trust_remote_code"}


def folder() -> Path:
    """Where we keep things in the cache of `datasets`."""
    path = Path(datasets.config.HF_DATASETS_CACHE) / "pocketformers"
    path.mkdir(parents=True, exist_ok=True)
    return path


def state_of(dataset: str | None) -> Any:
    """What changes when the data set does: the names, sizes and times of its files, or its commit on the Hub. None where neither is to be had."""
    if dataset is None:
        return None
    resolved = resolve(dataset)
    if not os.path.isabs(resolved):
        try:
            return huggingface_hub.dataset_info(resolved).sha
        except Exception:  # no network, or no such data set: whoever loads it says so
            return None
    found = []
    for file in files_below(Path(resolved)):
        with contextlib.suppress(OSError):  # gone, or a link that leads nowhere
            status = file.stat()
            found.append([str(file), status.st_size, status.st_mtime_ns])
    return found


def visible(folder: Path) -> list[Path]:
    """The entries of a folder by name, without hidden ones, what desktops and tools leave behind, and the results of our own runs."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith((".", "~$"))
        and not (entry.name.startswith("__") and entry.is_file())  # a folder may be a class: __unknown__
        and entry.name.lower() not in NOT_DATA
        and not (entry.is_dir() and any((entry / name).exists() for name in (MARKER, RECORD)))
    )


def files_below(path: Path) -> Iterator[Path]:
    """A file, or the visible ones in a folder and the folders in it."""
    if path.is_dir():
        for entry in visible(path):
            yield from files_below(entry)
    else:
        yield path


def remembered_fingerprint(config: DataConfig, read_as: str, load: Callable[[], str]) -> str:
    """The fingerprint of the examples, from `load()` where these very files were not read with these settings before.

    `read_as` names what else the examples depend on: the task, and settings of its own.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_IN_DATA}
    return str(remembered(state_of(config.dataset), [settings, read_as], lambda: np.array(load())))


def remembered(state: Any, key: list[Any], compute: Callable[[], np.ndarray]) -> np.ndarray:
    """What `compute()` gives, or gave before for the same `key` and data in the same `state`."""
    if state is None:
        return compute()
    name = f"known-{digest([VERSION, pipelines.__version__, state, key])}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or damaged
        return np.load(folder() / name)
    value = compute()
    with contextlib.suppress(OSError):  # a full disk: it will be found out again
        temporary = folder() / f"{name}.{os.getpid()}"
        with temporary.open("wb") as file:
            np.save(file, value)
        temporary.replace(folder() / name)
    return value
