"""What can be done with a model, before anything is trained: `pocketformers doctor MODEL`. It needs no data and no weights."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from pipelines.core.errors import InputError
from pipelines.core.task import Graph
from pipelines.models.families import (
    FAMILIES,
    Group,
    depths_of,
    family_of,
    layer_lists,
    layers_of,
    removable,
    unit_count,
)
from pipelines.models.loading import check_encoder, load, load_config, load_tokenizer
from pipelines.models.students import config_of_student, parse_layers
from pipelines.onnx.export import ONNX_FILE, export_graph
from pipelines.onnx.fuse import NOT_FUSED, fuse_for_onnxruntime
from pipelines.tasks import TASKS, task_class
from pipelines.tasks.text_generation.export import graph_with_cache

LARGEST = 300_000_000  # parameters of a part of the model that is exported within seconds


def diagnose(source: str) -> str:
    """A line each: family, layers, heads, neurons, students, pruning, export, fused attention, quantization and bundle."""
    config = load_config(source)
    check_encoder(config, source)
    name = _task_of(config)
    with torch.device("meta"):
        model = task_class(name).auto_class.from_config(config)
    known = config.model_type in FAMILIES
    lines = {
        "task": name,
        "family": config.model_type if known else f"{config.model_type}, which is not in the table of families",
    }
    lines["parameters"] = f"{model.num_parameters():,}"
    found = removable(config)
    if known:
        depths = depths_of(config)
        lines["layers"] = " + ".join(map(str, depths))
        for kind, group in found.items():
            counts = (
                sorted({unit_count(layer, group) for layer in layers_of(model)}) if isinstance(group, Group) else []
            )
            lines[kind] = ", ".join(map(str, counts)) + " in a layer" if counts else f"not counted: {group}"
        lines["students"] = f"yes: --student_layers 1 to {max(depths)}{' of each stage' if len(depths) > 1 else ''}"
    else:
        lines["students"] = (
            "no: its layers are not known, a student has all of them; --student_model names a smaller one"
        )
    lines["pruning"] = "; ".join(
        f"{kind} yes" if isinstance(one, Group) else f"{kind} no: {one}" for kind, one in found.items()
    )
    return "\n".join(
        f"{label:<16} {text}" for label, text in (lines | _exported(model, config) | _bundled(source, model)).items()
    )


def _task_of(config: Any) -> str:
    """The task whose head the checkpoint has; of one without such a head the first whose head transformers has for it."""
    said = {"architectures": config.architectures, "problem_type": config.problem_type}
    by_head = (name for name in reversed(TASKS) if task_class(name).recognizes(said))
    # AutoModel, which an embedder is, takes models of sounds, too.
    with_heads = (name for name in TASKS if task_class(name).auto_class is not transformers.AutoModel)
    by_class = (name for name in with_heads if type(config) in task_class(name).auto_class._model_mapping)
    found = next(by_head, next(by_class, None))
    if found is None:
        raise InputError(
            f"expected a model with a head for {', '.join(TASKS)} in transformers, found {config.model_type!r}. Use another model."
        )
    return found


def _exported(model: Any, config: Any) -> dict[str, str]:
    try:
        nodes = _export_part(model, config)
    except InputError as error:
        return {"export": f"no: {error}"}
    if nodes is None:
        return {"export": f"not tried: a part of the model has more than {LARGEST:,} parameters"}
    blocks, fused = nodes["attention_blocks"], nodes["attention"]
    attention = (
        "yes"
        if fused == blocks > 0
        else f"{fused} of {blocks} blocks: {NOT_FUSED.get(config.model_type, 'the others are right but slower')}"
        if blocks
        else "it has none"
    )
    return {
        "export": "yes",
        "fused attention": attention,
        "quantization": "yes, if it keeps the quality: that is checked",
    }


def _export_part(model: Any, config: Any) -> dict[str, int] | None:
    """Export a part of the model with random weights, a layer of each kind, or of an unknown family all; return what was fused.

    None where the part is too large. Raises InputError where it cannot be exported.
    """
    part = _small(config)
    with torch.device("meta"):
        size = type(model)(part).num_parameters()
    if size > LARGEST:
        return None
    sample = _sample(type(model)(part).eval())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / ONNX_FILE
        export_graph(sample, path)
        return fuse_for_onnxruntime(path, path.with_name("fused.onnx"))


def _small(config: Any) -> Any:
    if config.model_type in FAMILIES:
        depths, lists = depths_of(config), layer_lists(config).values()
        first = {kind: layer for layer, kind in reversed(list(enumerate(zip(*lists, strict=True))))}
        spread = parse_layers(str(min(2, max(depths))), depths, family_of(config).kind)
        part = config_of_student(config, sorted(first.values()) or spread)
    else:
        part = copy.deepcopy(config)
    # Few tokens: a vocabulary is no part of what is asked here.
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(part, name, None) is not None:
            setattr(part, name, 0)
    if hasattr(part, "vocab_size"):
        part.vocab_size = min(part.vocab_size, 1000)
    return part


def _sample(model: Any) -> Graph:
    if model.can_generate():
        return graph_with_cache(model)
    if model.main_input_name == "pixel_values":
        vision = getattr(model.config, "vision_config", model.config)
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.zeros(2, getattr(vision, "num_channels", 3), height, width)
        return Graph(model, {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}, ["logits"])
    tokens = torch.ones(2, 8, dtype=torch.long)
    mask = tokens.clone()
    mask[0, 5:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    return Graph(model, inputs, {name: {0: "batch", 1: "sequence"} for name in inputs}, ["logits"])


def _bundled(source: str, model: Any) -> dict[str, str]:
    try:
        if model.main_input_name == "pixel_values":
            load(transformers.AutoImageProcessor.from_pretrained, source, "an image processor", backend="pil")
            return {"bundle": "yes, if its runtime prepares images as the image processor does: that is checked"}
        if load_tokenizer(source).is_fast:
            return {"bundle": "yes, if its runtime tokenizes as the tokenizer does: that is checked"}
    except InputError as error:  # all else is known without it
        return {"bundle": f"not yet: {error}"}
    return {"bundle": "no: it has only a slow tokenizer, and a bundle needs a tokenizer.json"}
