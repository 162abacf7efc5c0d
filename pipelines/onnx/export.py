"""Model directory -> ONNX directory: one fp32 file of standard operators, verified against the model it came from."""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipelines.core.errors import InputError
from pipelines.core.memory import give_memory_back
from pipelines.core.records import Outcome, read_record
from pipelines.core.task import Graph, Task
from pipelines.models.families import FAMILIES
from pipelines.models.loading import has_unnamed_labels
from pipelines.models.predict import predict_torch
from pipelines.models.removal import load_model
from pipelines.onnx.file import save
from pipelines.onnx.fuse import simplify
from pipelines.onnx.verify import verify_against_torch

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
def simple_operators(module: Any) -> Iterator[None]:
    """Let `module` compute in operators that make a small graph.

    Attention is in single steps, which can be fused and has no rows of NaN where all is padding; sdpa's graph has both faults. Its mask is
    computed without indices. GPT-2's matmuls keep their tokens apart, which its own layer flattens and restores. A decoder that is a
    classifier gives no cache, unless it is asked for one.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.pytorch_utils import Conv1D

    model: Any = next(part for part in module.modules() if hasattr(part, "set_attn_implementation"))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = eager_mask
    try:
        with (
            patch.object(Conv1D, "forward", lambda layer, inputs: inputs @ layer.weight + layer.bias),
            patch.object(model.config, "use_cache", False, create=True),
        ):
            yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["eager"]  # what stands there without ours
        if before != "eager":  # convolutional networks have no other
            model.set_attn_implementation(before)


def eager_mask(
    *, mask_function: Any, attention_mask: Any, kv_length: int, kv_offset: int, dtype: Any, **settings: Any
) -> Any:
    """What is added to the scores (batch, 1, query tokens, key tokens) as transformers' own function gives it; none where it hides nothing."""
    import torch
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if attention_mask is None and mask_function is bidirectional_mask_function:
        return None
    settings |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    seen: Any = sdpa_mask(mask_function=mask_function, kv_length=kv_length, kv_offset=kv_offset, **settings)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, kv_offset : kv_offset + kv_length].bool()
    return torch.where(seen, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def gelu(inputs: Any, approximate: str = "none") -> Any:
    """GELU in the one order of operators that ONNX Runtime fuses again when it loads them, as it does not fuse the exporter's."""
    from onnxscript import opset18 as op
    from onnxscript.function_libs.torch_lib.ops.nn import aten_gelu

    if approximate == "tanh":
        return aten_gelu(inputs, approximate)
    return op.Mul(0.5, op.Mul(inputs, op.Add(op.Erf(op.Div(inputs, 2**0.5)), 1.0)))


def trace(graph: Graph, opset: int = OPSET) -> Any:
    """`graph` as an onnx_ir.Model in the operators of an opset."""
    import torch
    from torch.utils import _pytree

    shapes = _pytree.tree_unflatten(graph.dynamic_axes.values(), _pytree.tree_structure(graph.inputs))
    with simple_operators(graph.module), quiet_exporters():
        try:
            program: Any = torch.onnx.export(
                graph.module.eval(),
                kwargs=graph.inputs,
                dynamic_shapes=shapes,
                input_names=list(graph.dynamic_axes),
                output_names=graph.outputs,
                opset_version=opset,
                custom_translation_table={torch.ops.aten.gelu.default: gelu},
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # the exporter's own, around whatever the model's code raises
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise InputError(
                f"expected a model that PyTorch can export to ONNX, found one that it cannot: {' '.join(str(cause).split()):.300}. Use a "
                "model of another family."
            ) from error
    return program.model


def export_graph(graph: Graph, path: Path) -> dict[str, dict[str, int]]:
    """Write `graph` as one ONNX file; return how many nodes of each operator it has ("operators"), and what was "simplified"."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    model = trace(graph)
    # The exporter notes for every node the lines of Python it came from: half a megabyte that names this machine's folders.
    ClearMetadataAndDocStringPass()(model)
    simplified = simplify(model)
    operators = Counter(node.op_type for node in model.graph.all_nodes())
    save(model, path)
    return {"operators": dict(sorted(operators.items())), "simplified": simplified}


def check_export(source: str, task: Task, from_scratch: bool) -> None:
    """Raise InputError where the model in `source` is of a family that nobody has tried, and cannot be exported."""
    if task.load_config(source).model_type not in FAMILIES:
        model = task.load_model(source, "new if other", from_scratch)
        trace(task.graph(model, task.load_processor(source)))


def export_onnx(source: str, directory: Path, task: Task) -> Outcome:
    """Export the model in `source`, without the zeros of pruning and in the data's order of labels; verify the file on validation examples."""
    processor = task.load_processor(source)
    model = load_model(source, task.config.trust_remote_code)
    task.check_config(model.config, source)
    has_unnamed = has_unnamed_labels(model.config)
    task.align_labels(model, source)
    if has_unnamed and read_record(Path(source)) is None:  # nobody has scored it
        task.check_label_order(processor, partial(predict_torch, model, name="labels"))
    exported = export_graph(task.graph(model, processor), directory / ONNX_FILE)
    processor.save_pretrained(directory)
    model.config.save_pretrained(directory)
    give_memory_back()
    verification = verify_against_torch(directory / ONNX_FILE, model, task, processor)
    verification |= task.verify_behaviour(directory, model, processor)
    return Outcome(
        "onnx",
        parameters=model.num_parameters(),
        details={"opset": OPSET, **exported, "verification": verification},
    )
