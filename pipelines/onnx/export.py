"""Model directory -> ONNX directory: one fp32 file of standard operators, verified against the model it came from."""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.memory import give_memory_back
from pipelines.core.records import Outcome
from pipelines.models.removal import load_model
from pipelines.onnx.file import save
from pipelines.onnx.fuse import has_cache, simplify
from pipelines.onnx.predict import open_session
from pipelines.onnx.verify import verify_against_torch

if TYPE_CHECKING:
    from pipelines.core.task import Graph, Task

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


@contextmanager
def eager_attention(module: Any) -> Iterator[None]:
    """Attention in single steps, which can be fused and has no rows of NaN where all is padding; sdpa's graph has both faults."""
    model: Any = next(part for part in module.modules() if hasattr(part, "set_attn_implementation"))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if before != "eager":  # convolutional networks have no other
            model.set_attn_implementation(before)


def export_graph(graph: Graph, path: Path) -> dict[str, dict[str, int]]:
    """Write `graph` as one ONNX file; return how many nodes of each operator it has ("operators"), and what was "simplified"."""
    import torch
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from torch.export import Dim
    from torch.utils import _pytree

    axes = [dict.fromkeys(named, Dim.DYNAMIC) for named in graph.dynamic_axes.values()]
    shapes = _pytree.tree_unflatten(axes, _pytree.tree_structure(graph.inputs))
    with eager_attention(graph.module), quiet_exporters():
        program: Any = torch.onnx.export(
            graph.module.eval(),
            kwargs=graph.inputs,
            dynamic_shapes=shapes,
            input_names=list(graph.dynamic_axes),
            output_names=graph.outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    model = program.model
    name_axes(model.graph, graph.dynamic_axes)
    # The exporter notes for every node the lines of Python it came from: half a megabyte that names this machine's folders.
    ClearMetadataAndDocStringPass()(model)
    simplified = {} if has_cache(model.graph) else simplify(model)
    operators = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.all_nodes()
    )
    save(model, path)
    return {"operators": dict(sorted(operators.items())), "simplified": simplified}


def name_axes(graph: Any, dynamic_axes: dict[str, dict[int, str]]) -> None:
    """Give the dynamic axes of the inputs, and of every value that shares them, readable names."""
    import onnx_ir

    renamed = {
        str(value.shape[axis]): label
        for value in graph.inputs
        for axis, label in dynamic_axes.get(value.name, {}).items()
    }
    computed = [value for node in graph.all_nodes() for value in node.outputs]
    for value in (*computed, *graph.inputs, *graph.outputs):
        if value.shape is not None and any(str(axis) in renamed for axis in value.shape):
            value.shape = onnx_ir.Shape(
                [axis if isinstance(axis, int) else renamed.get(str(axis), str(axis)) for axis in value.shape]
            )


def export_onnx(source: str, directory: Path, task: Task) -> Outcome:
    """Export the model in `source`, without the zeros of pruning and in the data's order of labels; verify the file on validation examples."""
    processor = task.load_processor(source)
    model = load_model(source, task.config.trust_remote_code)
    task.check_config(model.config, source)
    task.align_labels(model, source)
    exported = export_graph(task.graph(model, processor), directory / ONNX_FILE)
    processor.save_pretrained(directory)
    model.config.save_pretrained(directory)
    give_memory_back()
    verification = verify_against_torch(directory / ONNX_FILE, model, task, processor)
    verification |= task.verify_behaviour(directory, model, processor)
    inputs = [value.name for value in open_session(directory / ONNX_FILE).get_inputs()]
    return Outcome(
        "onnx",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        details={"opset": OPSET, "inputs": inputs, **exported, "verification": verification},
    )
