"""One ONNX file, or, above what a file can hold, one with its weights beside it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

LARGEST_FILE = 2**31 - 2**24  # what a protobuf message, and so an ONNX file, can hold, less some room for the graph


def data_beside(path: Path) -> Path:
    """Where the weights are that the file itself cannot hold."""
    return path.with_name(f"{path.name}.data")


def size_of(path: Path) -> int:
    """Bytes of a graph and the weights beside it."""
    return sum(part.stat().st_size for part in (path, data_beside(path)) if part.exists())


def save(model: ir.Model, target: Path) -> None:
    """Write `model` and let go of its weights: onnxscript's rules remember the last graph that they matched."""
    weights = [value for value in model.graph.initializers.values() if value.const_value is not None]
    large = sum(value.const_value.nbytes for value in weights if value.const_value is not None) > LARGEST_FILE
    ir.save(model, target, external_data=data_beside(target).name if large else None)
    for value in weights:
        value.const_value = None
