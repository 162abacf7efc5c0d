"""An ONNX file written weight by weight, so that writing takes the memory of the largest weight and not of a second model."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

LARGEST_FILE = 2**31 - 2**24  # what a protobuf message, and so an ONNX file, can hold, less some room for the graph


def save(model: ir.Model, target: Path) -> None:
    """Write one file; above the 2 GB that an ONNX file can hold, the weights go beside it.

    Protobuf reads messages that follow one another in a file as one, their repeated fields joined: so each weight is appended as a
    model that has nothing else.
    """
    weights = {name: value for name, value in model.graph.initializers.items() if value.const_value is not None}
    if sum(value.const_value.nbytes for value in weights.values() if value.const_value is not None) > LARGEST_FILE:
        ir.save(model, target, external_data=f"{target.name}.data")
        return
    for name in weights:
        del model.graph.initializers[name]
    try:
        rest = ir.serde.serialize_model(model).SerializeToString()
    finally:
        model.graph.initializers.update(weights)
    with target.open("wb") as file:
        file.write(rest)
        for name, value in weights.items():
            one = onnx.ModelProto()
            tensor = one.graph.initializer.add()
            assert value.const_value is not None
            ir.serde.serialize_tensor_into(tensor, value.const_value)
            tensor.name = name
            file.write(one.SerializeToString())


def drop_weights(model: ir.Model) -> None:
    """Let go of the weights of a model that was saved: onnxscript's rules remember the last graph that they matched, until they match another."""
    for value in model.graph.initializers.values():
        value.const_value = None
