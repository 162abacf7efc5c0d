"""Model directory -> ONNX directory: one fp32 file of standard operators, verified against the model it came from."""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from pipelines.core.memory import give_memory_back
from pipelines.core.run import Outcome
from pipelines.models.removal import load_model
from pipelines.onnx.file import drop_weights, save
from pipelines.onnx.fuse import simplify
from pipelines.onnx.predict import open_session
from pipelines.onnx.verify import verify_against_torch
from pipelines.training.trainer import count_parameters

ONNX_FILE = "model.onnx"
OPSET = 18  # old enough for every runtime that reads dynamic shapes; the standard Attention operator (23) is not


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silence the exporters' progress and advice; what matters of them is checked on the file they write."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


def export_graph(
    model: Any, inputs: dict[str, Any], dynamic_axes: dict[str, dict[int, str]], path: Path
) -> tuple[dict[str, int], dict[str, int]]:
    """Write `model` as one simplified ONNX file at `path`; return how many nodes of each operator it has, and what was simplified.

    `inputs` is a sample of at least 2 along every dynamic axis (sizes 0 and 1 would be specialised), `dynamic_axes` names them.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from torch.export import Dim
    from transformers.exporters import OnnxConfig, OnnxExporter

    dims = {name: Dim.DYNAMIC for axes in dynamic_axes.values() for name in axes.values()}
    shapes = {name: {axis: dims[label] for axis, label in axes.items()} for name, axes in dynamic_axes.items()}
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=OPSET)
    with quiet_exporters():
        program = OnnxExporter().export(model, inputs, config=config).program
    name_axes(program.graph, dynamic_axes)
    # The exporter notes for every node the lines of Python it came from: half a megabyte that names this machine's folders.
    ClearMetadataAndDocStringPass()(program)
    simplified = simplify(program)
    save(program, path)
    drop_weights(program)
    operators = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in program.graph.all_nodes()
    )
    return dict(sorted(operators.items())), simplified


def name_axes(graph: Any, dynamic_axes: dict[str, dict[int, str]]) -> None:
    """Give the dynamic axes of the inputs, and of every value that shares them, readable names."""
    import onnx_ir

    renamed = {
        str(value.shape[axis]): label
        for value in graph.inputs
        for axis, label in dynamic_axes.get(value.name, {}).items()
    }
    for node in graph.all_nodes():
        for value in node.outputs:
            _rename_axes(value, renamed, onnx_ir)
    for value in (*graph.inputs, *graph.outputs):
        _rename_axes(value, renamed, onnx_ir)


def _rename_axes(value: Any, renamed: dict[str, str], onnx_ir: Any) -> None:
    if value.shape is not None and any(str(axis) in renamed for axis in value.shape):
        value.shape = onnx_ir.Shape(
            [axis if isinstance(axis, int) else renamed.get(str(axis), str(axis)) for axis in value.shape]
        )


def export_onnx(source: str, directory: Path, task: Any) -> Outcome:
    """Export the model in `source`, without the zeros of pruning and in the data's order of labels; verify the file on validation batches."""
    processor = task.load_processor(source)
    model = load_model(source, task.trust_remote_code)
    task.check_config(model.config, source)
    task.order_labels(model, source)
    sample = task.export_sample(processor)
    operators, simplified = export_graph(model, sample, task.dynamic_axes(sample), directory / ONNX_FILE)
    processor.save_pretrained(directory)
    model.config.save_pretrained(directory)
    give_memory_back()
    verification = verify_against_torch(directory / ONNX_FILE, model, task, processor)
    inputs = [value.name for value in open_session(directory / ONNX_FILE).get_inputs()]
    return Outcome(
        "onnx",
        parameters=count_parameters(model),
        details={
            "opset": OPSET,
            "inputs": inputs,
            "operators": operators,
            "simplified": simplified,
            "verification": verification,
        },
    )
