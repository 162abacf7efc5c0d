"""One ONNX file, or, above what a file can hold, one with its weights beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

OLDER = "onnx/model_quantized.onnx"  # in a quantized stage: its model for ONNX Runtime from 1.20 on
LARGEST_FILE = 2**31 - 2**24  # what a protobuf message, and so an ONNX file, can hold, less some room for the graph


def data_beside(path: Path) -> Path:
    """Where the weights are that the file itself cannot hold."""
    return path.with_name(f"{path.name}.data")


def size_of(path: Path) -> int:
    """Bytes of a graph and the weights beside it."""
    return sum(part.stat().st_size for part in (path, data_beside(path)) if part.exists())


def save(model: ir.Model, target: Path) -> None:
    """Write `model` and let go of its weights: onnxscript's rules remember the last graph that they matched.

    Protobuf reads messages that follow one another as one, so each weight is appended as a model that has nothing else. With
    onnx_ir.save, which makes two more copies of all weights, the export of a BERT-base took 4.9 times its fp32 bytes instead of 3.4.
    """
    initializers = model.graph.initializers.items()
    weights: dict[str, Any] = {name: value for name, value in initializers if value.const_value is not None}
    if sum(value.const_value.nbytes for value in weights.values()) > LARGEST_FILE:
        ir.save(model, target, external_data=data_beside(target).name)
    else:
        for name in weights:
            del model.graph.initializers[name]
        with target.open("wb") as file:
            file.write(ir.serde.serialize_model(model).SerializeToString())
            for name, value in weights.items():
                one = onnx.ModelProto()
                tensor = one.graph.initializer.add()
                ir.serde.serialize_tensor_into(tensor, value.const_value)
                tensor.name = name
                file.write(one.SerializeToString())
        model.graph.initializers.update(weights)
    for value in weights.values():
        value.const_value = None
