"""Where each family of models keeps its layers, attention heads and feed-forward neurons. No other file knows.

A family is one entry of FAMILIES. What it does not allow is None there, and `prunable` says so before anything is trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipelines.core.errors import InputError


@dataclass(frozen=True)
class Outputs:
    """A linear map whose outputs are cut.

    A packed map has several parts side by side, such as query, key and value; each part has its share of every unit. `parts` are their
    relative widths, as numbers or attributes of a layer. An `optional` map is missing in some models of the family.
    """

    path: str
    parts: tuple[int | str, ...] = (1,)
    optional: bool = False


@dataclass(frozen=True)
class Group:
    """Units of a layer that can be removed: heads, key/value heads with the query heads that share them, neurons.

    All paths are below one layer. A unit is a slice of the outputs of every map in `outputs`, and of the inputs of the map in `input`.
    """

    outputs: tuple[Outputs, ...]  # of heads: first query, then key, then value
    input: str
    width: tuple[str, ...] = ()  # attributes whose product is the number of inputs of a unit; a neuron is one input
    counts: tuple[str, ...] = ()  # attributes in proportion to the number of units, which the forward pass reads
    tables: tuple[
        str, ...
    ] = ()  # parameters whose last axis has one entry for each unit, such as a bias of relative positions


@dataclass(frozen=True)
class Family:
    """The path of the layers below the base model (or a function from the base model to a list of them), and what can be removed."""

    layers: str | Callable[[Any], list[nn.Module]]
    heads: Group | None = None
    neurons: Group | None = None


def _separate(*paths: str) -> tuple[Outputs, ...]:
    return tuple(Outputs(path) for path in paths)


_BERT = Family(
    layers="encoder.layer",
    heads=Group(
        outputs=_separate("attention.self.query", "attention.self.key", "attention.self.value"),
        input="attention.output.dense",
        width=("attention.self.attention_head_size",),
        counts=("attention.self.num_attention_heads", "attention.self.all_head_size"),
    ),
    neurons=Group(outputs=_separate("intermediate.dense"), input="output.dense"),
)
_DISTILBERT = Family(
    layers="transformer.layer",
    heads=Group(
        outputs=_separate("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        input="attention.out_lin",
        width=("attention.attention_head_size",),
        counts=("attention.n_heads",),
    ),
    neurons=Group(outputs=_separate("ffn.lin1"), input="ffn.lin2"),
)
_GPT2 = Family(
    layers="h",
    heads=Group(
        outputs=(Outputs("attn.c_attn", parts=(1, 1, 1)),),
        input="attn.c_proj",
        width=("attn.head_dim",),
        counts=("attn.num_heads", "attn.split_size"),
    ),
    neurons=Group(outputs=_separate("mlp.c_fc"), input="mlp.c_proj"),
)
# The query heads that share a key and a value are one unit, so every key keeps as many queries as the config says.
_LLAMA = Family(
    layers="layers",
    heads=Group(
        outputs=_separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        input="self_attn.o_proj",
        width=("self_attn.head_dim", "self_attn.num_key_value_groups"),
    ),
    neurons=Group(outputs=_separate("mlp.gate_proj", "mlp.up_proj"), input="mlp.down_proj"),
)
_VIT = Family(
    layers="layers",
    heads=Group(
        outputs=_separate("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        input="attention.o_proj",
        width=("attention.head_dim",),
        counts=("attention.num_attention_heads",),
    ),
    neurons=Group(outputs=_separate("mlp.fc1"), input="mlp.fc2"),
)
FAMILIES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "vit": _VIT,
    "deit": _VIT,
}


def family_of(config: Any) -> Family:
    if config.model_type not in FAMILIES:
        raise InputError(
            f"expected a model of the families {', '.join(sorted(FAMILIES))}, whose layers and heads can be told apart, found "
            f"{config.model_type!r}. Use one of them, or give the student by --student_model and leave pruning out (--prune_heads 0 "
            "--prune_ffn 0) and hidden states, too (--hidden_state_weight 0)."
        )
    return FAMILIES[config.model_type]


def prunable(config: Any) -> dict[str, bool]:
    """Whether heads, and whether neurons, of a model with this config can be removed; of an unknown family neither can."""
    family = FAMILIES.get(config.model_type)
    return {kind: getattr(family, kind, None) is not None for kind in ("heads", "neurons")}


def groups_of(config: Any) -> dict[str, Group]:
    """The groups that can be removed, by the names "heads" and "neurons"."""
    family = family_of(config)
    return {kind: getattr(family, kind) for kind, possible in prunable(config).items() if possible}


def layers_of(model: Any) -> Any:
    """The transformer layers of a model with a head."""
    layers = family_of(model.config).layers
    return model.base_model.get_submodule(layers) if isinstance(layers, str) else layers(model.base_model)


def layer_count(config: Any) -> int:
    family_of(config)  # of an unknown family the config may count something else
    return int(config.num_hidden_layers)


def select_layers(config: Any, state: dict[str, Any], layers: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config changes and the renumbered weights of the model that keeps only `layers` of another, in that order."""
    path = family_of(config).layers
    if not isinstance(path, str):
        raise InputError(
            f"expected a teacher whose layers are all alike to build a student of some of them, found {config.model_type!r}. Give the "
            "student by --student_model."
        )
    pattern = re.compile(rf"^(.*?\b{re.escape(path)})\.(\d+)\.(.+)$")
    matches = {name: pattern.match(name) for name in state}
    changes: dict[str, Any] = {"num_hidden_layers": len(layers)}
    if getattr(config, "layer_types", None):  # what kind of attention each layer has
        changes["layer_types"] = [config.layer_types[layer] for layer in layers]
    if len({match[2] for match in matches.values() if match}) < layer_count(config):
        return changes, state  # all layers share their weights, as ALBERT's do
    kept: dict[str, Any] = {}
    for name, match in matches.items():
        if match is None:
            kept[name] = state[name]
        elif int(match[2]) in layers:
            kept[f"{match[1]}.{layers.index(int(match[2]))}.{match[3]}"] = state[name]
    return changes, kept


# ---- Units of one layer


def unit_width(layer: nn.Module, group: Group) -> int:
    """Inputs of `group.input` that belong to one unit."""
    return math.prod(attrgetter(path)(layer) for path in group.width)


def unit_count(layer: nn.Module, group: Group) -> int:
    linear: Any = layer.get_submodule(group.input)
    return int(linear.weight.shape[input_axis(linear)]) // unit_width(layer, group)


def input_axis(linear: Any) -> int:
    """The axis of a linear map's weight that its inputs are on: GPT-2's Conv1D, which is no convolution, keeps it transposed."""
    return 0 if isinstance(linear, Conv1D) else 1


def slices(layer: nn.Module, group: Group) -> Iterator[tuple[str, int, Tensor]]:
    """Every parameter that the group's units have a part of: its name, the axis, and the indices (units, …) of each unit along it."""
    units = unit_count(layer, group)
    for outputs in group.outputs:
        try:
            linear: Any = layer.get_submodule(outputs.path)
        except AttributeError:
            if outputs.optional:
                continue
            raise
        axis = 1 - input_axis(linear)
        shares = [attrgetter(part)(layer) if isinstance(part, str) else part for part in outputs.parts]
        widths = [linear.weight.shape[axis] // units * share // sum(shares) for share in shares]
        starts = [units * sum(widths[:part]) for part in range(len(widths))]
        parts = [_consecutive(start, units, width) for start, width in zip(starts, widths, strict=True)]
        indices = torch.cat(parts, dim=1)
        yield f"{outputs.path}.weight", axis, indices
        if linear.bias is not None:
            yield f"{outputs.path}.bias", 0, indices
    inputs = _consecutive(0, units, unit_width(layer, group))
    yield f"{group.input}.weight", input_axis(layer.get_submodule(group.input)), inputs
    for table in group.tables:
        yield table, layer.get_parameter(table).dim() - 1, _consecutive(0, units, 1)


def _consecutive(start: int, units: int, width: int) -> Tensor:
    return torch.arange(start, start + units * width).reshape(units, width)


def head_output(model: Any) -> nn.Linear:
    """The last linear map of a classifier, whose rows are the labels."""
    if type(model).__name__.endswith("WithTeacher"):
        raise InputError(
            f"expected a model with one classification head, found {type(model).__name__}, which has two; its labels cannot be put in "
            "the data's order. Fine-tune it on this data set (--teacher_epochs above 0)."
        )
    inside_base = {id(module) for module in model.base_model.modules()}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside_base]
    if not linears or linears[-1].out_features != model.config.num_labels:
        raise InputError(
            f"expected {type(model).__name__} to end in a linear map to {model.config.num_labels} labels, found none. Use a model "
            "fine-tuned with transformers' own classification head."
        )
    return linears[-1]
