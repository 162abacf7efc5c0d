"""Records: what a stage was, what made it, and the checksums by which its files are known."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pipelines
from pipelines.core.disk import as_json, digest
from pipelines.core.errors import InputError
from pipelines.core.sources import WEIGHT_SUFFIXES
from pipelines.runtime.infer import file_checksum

RECORD = "record.json"
ATTEMPT = ".made_by.json"  # what an unfinished stage is to become
CHECKPOINTS = "checkpoints"  # the folder in it of what an attempt goes on from
PARTIAL = ".partial"  # how the name of the hidden directory ends in which a stage is written
PACKAGES = "torch transformers accelerate tokenizers huggingface_hub datasets scikit-learn peft onnx onnxscript onnxruntime numpy"
CHECKSUM = "sha256"


@dataclass
class Outcome:
    """What a stage function tells of the directory it wrote: quality per split, parameters, and whatever else is worth recording."""

    format: str
    metrics: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a finished stage directory, or None where there is none. Raises InputError for one that does not parse."""
    path = directory / RECORD
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record[CHECKSUM] == checksum(record):
            return record
        found = "its checksum is of another content"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:  # whatever else it holds
        found = f"{type(error).__name__}: {error}"
    raise InputError(
        f"expected the record of a stage in {path}, found a file that cannot be used, or was changed after it was written ({found:.200}). "
        "Delete that stage's directory to have it rebuilt."
    )


def checksum(record: dict[str, Any]) -> str:
    """The sha256 of a record's content, without the checksum in it."""
    return digest({key: value for key, value in record.items() if key != CHECKSUM})


def with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """The record as plain JSON, with its checksum."""
    plain: dict[str, Any] = as_json(record)
    return plain | {CHECKSUM: checksum(plain)}


def fingerprint(record: dict[str, Any]) -> str:
    """Identity of a finished stage: the content of its files."""
    return digest(record["files"])


def damaged_files(directory: Path, record: dict[str, Any]) -> list[str]:
    """Files of a finished stage that are missing or no longer what the record says."""
    return [
        name
        for name, digest in record["files"].items()
        if not (directory / name).is_file() or file_checksum(directory / name) != digest
    ]


def check_files(directory: Path, record: dict[str, Any]) -> None:
    """Raise InputError where the files of a finished stage are not what its record says, by which others know what they were made of."""
    damaged = damaged_files(directory, record)
    if damaged:
        raise InputError(
            f"expected the files of {directory} to be those that its {RECORD} names, found {', '.join(damaged)} changed or missing. Make that "
            f"stage again with the command that made it. As the source of a verb (--model) it is taken as it is once its {RECORD} is deleted."
        )


def stage_written_in(directory: Path) -> str:
    """The name of the stage whose files are written in a directory, which is called after it until all are there."""
    return directory.name.removeprefix(".").removesuffix(PARTIAL)


def shipped_files(directory: Path) -> list[Path]:
    """The files that must be shipped to use a stage: its top level without the record. Adapters and the like live in sub-folders."""
    return sorted(path for path in directory.iterdir() if path.is_file() and path.name not in (RECORD, ATTEMPT))


def copy_beside(source: Path, directory: Path) -> None:
    """Copy what belongs to the ONNX model in `source` except its graph: config, and tokenizer or image processor."""
    for path in shipped_files(source):
        # The graph, or weights beside it: model.onnx.data, and what a foreign directory may hold for torch.
        if ".onnx" not in path.suffixes and path.suffix not in WEIGHT_SUFFIXES:
            shutil.copy2(path, directory / path.name)


def versions() -> dict[str, str]:
    found = {"pocketformers": pipelines.__version__, "python": sys.version.split()[0]}
    for package in PACKAGES.split():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def summary_line(record: dict[str, Any]) -> str:
    """One line that tells how a stage ended."""
    parts = [f"{record['bytes'] / 1e6:.1f} MB"]
    if record["parameters"]:
        parts.insert(0, f"{record['parameters'] / 1e6:.2f} M parameters")
    for split, metrics in record["metrics"].items():
        parts += [f"{split} {name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)][:1]
    return f"{record['stage']}: done in {record['seconds']:.0f} s, " + ", ".join(parts)
