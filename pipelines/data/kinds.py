"""What a data set of texts and one of images do differently; everything else in this room is the same for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from pipelines.core.config import DataConfig

SPLITS = ("train", "validation", "test")


@dataclass
class Source:
    """A data set as it was found: its own splits and columns."""

    splits: dict[str, datasets.Dataset]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """How examples of one kind are read, checked and compared: see TEXTS in text.py and IMAGES in images.py."""

    noun: str  # "texts"
    usable: str  # what every row must have: "a text"
    columns: dict[str, str]  # the flags that name columns of the source, and what these are called in the splits
    suffixes: tuple[str, ...]  # of the files that `read_file` reads
    read_file: Callable[[Path, DataConfig], datasets.Dataset]
    # Of class folders: the folder, and each file with its class; columns `file` and `label` beside the inputs.
    read_files: Callable[[Path, list[tuple[Path, str | None]], DataConfig], datasets.Dataset]
    # The split with a column ready to read; None where that has no such values.
    prepare: Callable[[datasets.Dataset, str, DataConfig], datasets.Dataset | None]
    # Of each row what tells it from all others, and what it shares with its duplicates; None for an unusable one.
    content: Callable[[list[tuple[Any, ...]]], list[tuple[bytes, bytes] | None]]
    why_unusable: Callable[[tuple[Any, ...]], str] = lambda row: ""  # what more a message says of an unusable row

    def columns_of(self, config: DataConfig) -> dict[str, str]:
        """The flags that name a column of the source, and that column."""
        columns = {flag: getattr(config, flag) for flag in self.columns}
        return {flag: column for flag, column in columns.items() if column is not None}
