"""Where each family of models keeps its layers, attention heads and feed-forward neurons. No other file knows.

A family is one entry of FAMILIES. What it does not allow has its reason there, which is said before anything is trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipelines.core.errors import InputError


@dataclass(frozen=True)
class Outputs:
    """A linear map whose outputs are cut; some models of a family may lack it.

    A packed map has several parts side by side, such as query, key and value; each part has its share of every unit. `parts` are their
    relative widths, as numbers or attributes of a layer.
    """

    path: str
    parts: tuple[int | str, ...] = (1,)


@dataclass(frozen=True)
class Group:
    """Units of a layer that can be removed: heads, key/value heads with the query heads that share them, neurons.

    All paths are below one layer. A unit is a slice of the outputs of every map in `outputs`, and of the inputs of the map in `input`.
    """

    outputs: tuple[Outputs, ...]  # of heads: first query, then key, then value
    input: str
    width: tuple[str, ...] = ()  # attributes whose product is the number of inputs of a unit; a neuron is one input
    counts: tuple[str, ...] = ()  # attributes in proportion to the number of units, which the forward pass reads
    # Parameters, which some models lack, whose last axis the units share, such as a bias of relative positions.
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Where the layers are, and what can be removed from one: heads and neurons, or the reason why not.

    `layers` is the path of the layers below the base model, with a * where a model has several stages of them. `kind` says what
    transformers makes of a layer by its position in its stage, where no config says it: a layer can only move to a position of its kind.
    `moved` makes the weight `name` of a layer what it has to be at another position, where the layer computes with that.
    `mixed` is the part of a layer behind which no token reads another, of those families that cpu.py was tried with.
    """

    layers: str
    heads: Group | str
    neurons: Group | str
    kind: Callable[[int], int] = lambda position: 0
    moved: Callable[[str, Tensor, int, int], Tensor] = lambda name, values, before, after: values
    mixed: str = ""


def _heads(attention: str, maps: str, output: str, width: str, counts: str = "", tables: str = "") -> Group:
    """Heads whose maps, attributes and tables, named apart by spaces, are below the path `attention`."""
    queries, *rest = ([f"{attention}.{name}" for name in names.split()] for names in (maps, width, counts, tables))
    return Group(tuple(map(Outputs, queries)), output, *map(tuple, rest))


def _neurons(maps: str, output: str) -> Group:
    return Group(tuple(map(Outputs, maps.split())), output)


def _bert_heads(maps: str, tables: str = "") -> Group:
    counts = "num_attention_heads all_head_size"
    return _heads("attention.self", maps, "attention.output.dense", "attention_head_size", counts, tables)


_BERT = Family(
    layers="encoder.layer",
    heads=_bert_heads("query key value"),
    neurons=_neurons("intermediate.dense", "output.dense"),
)
_DISTILBERT = Family(
    layers="transformer.layer",
    heads=_heads("attention", "q_lin k_lin v_lin", "attention.out_lin", width="attention_head_size", counts="n_heads"),
    neurons=_neurons("ffn.lin1", "ffn.lin2"),
    mixed="sa_layer_norm",
)
_MPNET = replace(_BERT, heads="all layers share a bias of relative positions, with a column for each head")
# Query, key and value are side by side within each head.
_DEBERTA = replace(_BERT, heads=_bert_heads("in_proj pos_proj pos_q_proj", tables="q_bias v_bias"))
# Without share_att_key, there are projections of positions, too.
_DEBERTA_V2 = replace(_BERT, heads=_bert_heads("query_proj key_proj value_proj pos_key_proj pos_query_proj"))
# One layer, used several times.
_ALBERT = Family(
    layers="encoder.albert_layer_groups.*.albert_layers",
    heads=_heads("attention", "query key value", "attention.dense", width="attention_head_size"),
    neurons=_neurons("ffn", "ffn_output"),
)
# Query, key and value are packed one after the other, as are the two halves of the gated neurons; layer 0 has no normalization.
_MODERNBERT = Family(
    layers="layers",
    heads=Group((Outputs("attn.Wqkv", parts=(1, 1, 1)),), "attn.Wo", width=("attn.head_dim",)),
    neurons=Group((Outputs("mlp.Wi", parts=(1, 1)),), "mlp.Wo"),
    kind=lambda position: int(position == 0),
)
_GPT2 = Family(
    layers="h",
    heads=Group(
        outputs=(Outputs("attn.c_attn", parts=(1, 1, 1)),),
        input="attn.c_proj",
        width=("attn.head_dim",),
        counts=("attn.num_heads", "attn.split_size"),
    ),
    neurons=_neurons("mlp.c_fc", "mlp.c_proj"),
)
_GPTJ = Family(
    layers="h",
    heads=_heads("attn", "q_proj k_proj v_proj", "attn.out_proj", width="head_dim", counts="num_attention_heads"),
    neurons=_neurons("mlp.fc_in", "mlp.fc_out"),
)
_GPT_NEOX = Family(
    layers="layers",
    heads=_heads("attention", "query_key_value", "attention.dense", width="head_size"),
    neurons=_neurons("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)
_OPT = Family(
    layers="decoder.layers",
    heads=_heads("self_attn", "q_proj k_proj v_proj", "self_attn.out_proj", width="head_dim", counts="num_heads"),
    neurons=_neurons("fc1", "fc2"),
)
# The query heads that share a key and a value are one unit, so every key keeps as many queries as the config says.
_LLAMA = Family(
    layers="layers",
    heads=_heads("self_attn", "q_proj k_proj v_proj", "self_attn.o_proj", width="head_dim num_key_value_groups"),
    neurons=_neurons("mlp.gate_proj mlp.up_proj", "mlp.down_proj"),
)
_PHI = replace(
    _LLAMA,
    heads=_heads("self_attn", "q_proj k_proj v_proj", "self_attn.dense", width="head_dim num_key_value_groups"),
    neurons=_neurons("mlp.fc1", "mlp.fc2"),
)
_PHI3 = Family(
    layers="layers",
    heads=Group(
        (Outputs("self_attn.qkv_proj", parts=("self_attn.num_key_value_groups", 1, 1)),),
        "self_attn.o_proj",
        width=("self_attn.head_dim", "self_attn.num_key_value_groups"),
        counts=("self_attn.num_key_value_heads", "self_attn.config.num_attention_heads"),
    ),
    neurons=Group((Outputs("mlp.gate_up_proj", parts=(1, 1)),), "mlp.down_proj"),
)
_VIT = Family(
    layers="layers",
    heads=_heads(
        "attention", "q_proj k_proj v_proj", "attention.o_proj", width="head_dim", counts="num_attention_heads"
    ),
    neurons=_neurons("mlp.fc1", "mlp.fc2"),
)
# Every other window is shifted.
_SWIN = Family(
    layers="encoder.layers.*.blocks",
    heads=_heads(
        "attention",
        "q_proj k_proj v_proj",
        "attention.o_proj",
        width="head_dim",
        tables="relative_position_bias.relative_position_bias_table",
    ),
    neurons=_neurons("mlp.fc1", "mlp.fc2"),
    kind=lambda position: position % 2,
)
_NO_HEADS = "it has no attention"
_CONVNEXT = Family(layers="encoder.stages.*.layers", heads=_NO_HEADS, neurons=_neurons("pwconv1", "pwconv2"))
_CONVNEXTV2 = replace(_CONVNEXT, neurons="a normalization in each layer reads all neurons together")
# The first layer of a stage changes the size of the image.
_RESNET = replace(
    _CONVNEXT, neurons="its layers are convolutions without dense neurons", kind=lambda position: int(position == 0)
)


def _beit(config: Any) -> Family:
    if config.use_shared_relative_position_bias:
        return replace(_VIT, heads=_MPNET.heads)
    heads = _heads("attention", "q_proj k_proj v_proj", "attention.o_proj", width="head_dim")
    return replace(_VIT, heads=replace(heads, tables=("relative_position_bias.relative_position_bias_table",)))


def _deberta(config: Any) -> Family:
    if getattr(config, "talking_head", False):
        return replace(_DEBERTA, heads="each layer mixes the scores of all heads with one another (talking_head)")
    return _DEBERTA


def _dinov2(config: Any) -> Family:
    return replace(_VIT, layers="encoder.layer", neurons=_LLAMA.neurons if config.use_swiglu_ffn else _VIT.neurons)


def _gpt2(config: Any) -> Family:
    if not config.scale_attn_by_inverse_layer_idx:
        return _GPT2

    def moved(name: str, values: Tensor, before: int, after: int) -> Tensor:
        """The scores of a layer are divided by its number, which changes: the queries make up for it."""
        if ".c_attn." in name:
            values = values.clone()
            values[..., : config.hidden_size] *= (after + 1) / (before + 1)
        return values

    return replace(_GPT2, moved=moved)


# Each family, or a function of a config where it depends on that.
FAMILIES: dict[str, Family | Callable[[Any], Family]] = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra"), replace(_BERT, mixed="attention.output")
    ),
    "distilbert": _DISTILBERT,
    "mpnet": _MPNET,
    "deberta": _deberta,
    "deberta-v2": _DEBERTA_V2,
    "albert": _ALBERT,
    "modernbert": _MODERNBERT,
    "gpt2": _gpt2,
    "gptj": _GPTJ,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite"), _LLAMA
    ),
    "phi": _PHI,
    "phi3": _PHI3,
    **dict.fromkeys(("vit", "deit"), replace(_VIT, mixed="layernorm_after")),
    "beit": _beit,
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _dinov2),
    "swin": _SWIN,
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXTV2,
    "resnet": _RESNET,
}

OF_ANOTHER_KIND = "pocketformers_"  # how the types of the models in small.py begin


def family_of(config: Any) -> Family:
    if config.model_type not in FAMILIES:
        raise InputError(
            f"expected a model of the families {', '.join(sorted(FAMILIES))}, whose layers and heads can be told apart, found "
            f"{config.model_type!r}. Use one of them, or leave pruning (--prune_heads 0 --prune_ffn 0) and what is inside the teacher "
            "(--hidden_state_weight 0 --attention_weight 0 --relation_weight 0) out."
        )
    family = FAMILIES[config.model_type]
    return family if isinstance(family, Family) else family(config)


def groups_of(config: Any) -> dict[str, Group]:
    """The groups that can be removed, by the names "heads" and "neurons"; of an unknown family none."""
    return {kind: found for kind, found in removable(config).items() if isinstance(found, Group)}


def removable(config: Any) -> dict[str, Group | str]:
    """Of "heads" and "neurons" what can be removed from a model with this config, or the reason why not."""
    if config.model_type not in FAMILIES:
        reason = "where they are is not known of this family"
        if config.model_type.startswith(OF_ANOTHER_KIND):
            reason = "it is no transformer, and as small as --student_width and --student_hidden make it"
        return dict.fromkeys(("heads", "neurons"), reason)
    family = family_of(config)
    return {"heads": family.heads, "neurons": family.neurons}


def layers_of(model: Any) -> Any:
    """The layers of a model with a head, of all stages one after the other."""
    stages, _, path = family_of(model.config).layers.rpartition(".*.")
    if not stages:
        return model.base_model.get_submodule(path)
    return [layer for stage in model.base_model.get_submodule(stages) for layer in stage.get_submodule(path)]


def depths_of(config: Any) -> list[int]:
    """How many layers each stage of a model has: one number, where a model has no stages."""
    family_of(config)  # of an unknown family the config may count something else
    return list(getattr(config, "depths", None) or [config.num_hidden_layers])


def layer_count(config: Any) -> int:
    """The number of layers whose hidden states have one width."""
    depths = depths_of(config)
    if len(depths) > 1:
        raise InputError(
            f"expected a model with hidden states of one width, found {config.model_type!r}, whose stages have their own. Leave hidden "
            "states, attention and relations out (--hidden_state_weight 0 --attention_weight 0 --relation_weight 0)."
        )
    return depths[0]


def config_changes(config: Any, layers: list[int]) -> dict[str, Any]:
    """What changes in a config for a model that keeps only `layers`."""
    places = _places(config)
    stages = [places[layer][0] for layer in layers]
    depths = [stages.count(stage) for stage in range(len(depths_of(config)))]
    changes: dict[str, Any] = {"depths": depths} if hasattr(config, "depths") else {"num_hidden_layers": len(layers)}
    return changes | {name: [values[layer] for layer in layers] for name, values in layer_lists(config).items()}


def layer_lists(config: Any) -> dict[str, list[Any]]:
    """The lists of a config that have an entry for each layer: what attention it has, and whether it has rotary positions."""
    if hasattr(config, "depths"):  # of models with stages the same name is something else
        return {}
    return {name: getattr(config, name) for name in ("layer_types", "no_rope_layers") if getattr(config, name, None)}


def select_layers(config: Any, state: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    """The renumbered weights of the model that keeps only `layers` of another, in that order."""
    family = family_of(config)
    stages, _, path = family.layers.rpartition(".*.")
    if stages and not hasattr(config, "depths"):
        return state  # ALBERT uses its layers several times
    places = _places(config)
    kept = [places[layer] for layer in layers]
    positions = {place: index - [stage for stage, _ in kept].index(place[0]) for index, place in enumerate(kept)}
    stage_pattern = rf"{re.escape(stages)}\.(\d+)\." if stages else "()"
    pattern = re.compile(rf"^(?:.*?\.)?{stage_pattern}{re.escape(path)}\.(\d+)\.")
    selected = {}
    for name, values in state.items():
        match = pattern.match(name)
        if match is None:
            selected[name] = values
        elif (place := (int(match[1] or 0), int(match[2]))) in positions:
            after = positions[place]
            renamed = f"{name[: match.start(2)]}{after}{name[match.end(2) :]}"
            selected[renamed] = family.moved(name, values, place[1], after)
    return selected


def _places(config: Any) -> list[tuple[int, int]]:
    """The stage of each layer, and its position there."""
    return [(stage, position) for stage, depth in enumerate(depths_of(config)) for position in range(depth)]


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
            continue
        axis = 1 - input_axis(linear)
        widths = part_widths(layer, outputs, linear.weight.shape[axis] // units)
        starts = [units * sum(widths[:part]) for part in range(len(widths))]
        parts = [_consecutive(start, units, width) for start, width in zip(starts, widths, strict=True)]
        indices = torch.cat(parts, dim=1)
        yield f"{outputs.path}.weight", axis, indices
        if linear.bias is not None:
            yield f"{outputs.path}.bias", 0, indices
    inputs = _consecutive(0, units, unit_width(layer, group))
    yield f"{group.input}.weight", input_axis(layer.get_submodule(group.input)), inputs
    for table in group.tables:
        with suppress(AttributeError):
            shape = layer.get_parameter(table).shape
            yield table, len(shape) - 1, _consecutive(0, units, shape[-1] // units)


def part_widths(layer: nn.Module, outputs: Outputs, width: int) -> list[int]:
    """How many of the `width` outputs that a unit has are of each part."""
    shares = [attrgetter(part)(layer) if isinstance(part, str) else part for part in outputs.parts]
    return [width * share // sum(shares) for share in shares]


@contextmanager
def queries_keys_values(model: Any, layer: int) -> Iterator[list[Tensor]]:
    """A list that has the queries, keys and values (batch, tokens, width) of one layer once the model ran while this lasts and it is over.

    They are the outputs of the linear maps, the heads side by side, before rotary positions. Of families whose heads can be removed.
    """
    group = family_of(model.config).heads
    assert isinstance(group, Group)
    layers = layers_of(model)
    own, call = layers[layer % len(layers)], layer // len(layers)  # ALBERT uses its layer several times
    units, attended = unit_count(own, group), unit_count(own, group) * unit_width(own, group)
    calls: list[list[Tensor]] = []
    hooks = []
    for outputs in group.outputs[:3]:
        with suppress(AttributeError):  # a map of positions, which some DeBERTas lack
            module = own.get_submodule(outputs.path)
            calls.append([])
            hooks.append(module.register_forward_hook(lambda _, inputs, output, to=calls[-1]: to.append(output)))
    found: list[Tensor] = []
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    first = calls[0][call]
    if len(group.outputs[0].parts) > 1:  # packed one after the other
        widths = part_widths(own, group.outputs[0], first.shape[-1] // units)
        found += first.split([units * width for width in widths], dim=-1)
    elif first.shape[-1] == 3 * attended:  # packed within each head
        found += [part.flatten(-2) for part in first.unflatten(-1, (units, -1)).chunk(3, dim=-1)]
    else:
        found += [outputs[call] for outputs in calls]


def _consecutive(start: int, units: int, width: int) -> Tensor:
    return torch.arange(start, start + units * width).reshape(units, width)


def head_output(model: Any) -> nn.Linear:
    """The last linear map of a classifier, whose rows are the labels."""
    if type(model).__name__.endswith("WithTeacher"):
        raise InputError(
            f"expected a model with one classification head, found {type(model).__name__}, which has two; its labels cannot be put in "
            "the data's order. Fine-tune it on this data set (--teacher_epochs above 0)."
        )
    # A few, such as CLIP's, have no base model.
    inside_base = {id(module) for module in model.base_model.modules()} if model.base_model is not model else set()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside_base]
    if not linears or linears[-1].out_features != model.config.num_labels:
        raise InputError(
            f"expected {type(model).__name__} to end in a linear map to {model.config.num_labels} labels, found none. Use a model "
            "fine-tuned with transformers' own classification head."
        )
    return linears[-1]
