"""Where each family of models keeps its layers, attention heads and feed-forward neurons. No other file knows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipelines.core.errors import InputError


@dataclass(frozen=True)
class Family:
    """Paths below the base model (`layers`) and below one layer (the rest), and the config's names for the sizes."""

    layers: str
    query: str
    key: str
    value: str
    attention_output: str
    ffn_input: str
    ffn_output: str
    layer_count: str = "num_hidden_layers"
    packed: bool = False  # query, key and value are one map, side by side in its outputs
    prunable: bool = True  # each query head has a key and a value head of its own, and one map leads into the neurons


_BERT = Family(
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    ffn_input="intermediate.dense",
    ffn_output="output.dense",
)
_DISTILBERT = Family(
    layers="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    ffn_input="ffn.lin1",
    ffn_output="ffn.lin2",
    layer_count="n_layers",
)
_GPT2 = Family(
    layers="h",
    query="attn.c_attn",
    key="attn.c_attn",
    value="attn.c_attn",
    attention_output="attn.c_proj",
    ffn_input="mlp.c_fc",
    ffn_output="mlp.c_proj",
    layer_count="n_layer",
    packed=True,
)
_LLAMA = Family(
    layers="layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    ffn_input="mlp.up_proj",
    ffn_output="mlp.down_proj",
    prunable=False,
)
_VIT = Family(
    layers="layers",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    attention_output="attention.o_proj",
    ffn_input="mlp.fc1",
    ffn_output="mlp.fc2",
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


def layers_of(model: Any) -> Any:
    """The list of transformer layers (a ModuleList) of a model with a head."""
    return model.base_model.get_submodule(family_of(model.config).layers)


def layer_count(config: Any) -> int:
    return int(getattr(config, family_of(config).layer_count))


def head_size(config: Any) -> int:
    """Width of one attention head."""
    return int(config.hidden_size // config.num_attention_heads)


def select_layers(config: Any, state: dict[str, Any], layers: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config changes and the renumbered weights of the model that keeps only `layers` of another, in that order."""
    family = family_of(config)
    pattern = re.compile(rf"^(.*?\b{re.escape(family.layers)})\.(\d+)\.(.+)$")
    kept: dict[str, Any] = {}
    for name, tensor in state.items():
        match = pattern.match(name)
        if match is None:
            kept[name] = tensor
        else:
            for position, layer in enumerate(layers):
                if int(match[2]) == layer:
                    kept[f"{match[1]}.{position}.{match[3]}"] = tensor
    changes: dict[str, Any] = {family.layer_count: len(layers)}
    if getattr(config, "layer_types", None):  # what kind of attention each layer has
        changes["layer_types"] = [config.layer_types[layer] for layer in layers]
    return changes, kept


def input_size(linear: nn.Module) -> int:
    """Inputs of a linear map, an nn.Linear or GPT-2's Conv1D."""
    return int(weight_matrix(linear).shape[1])


def weight_matrix(linear: Any) -> Tensor:
    """A linear map's weight as (outputs, inputs): Conv1D, which is no convolution, keeps it transposed."""
    weight: Tensor = linear.weight.detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def replace_weights(linear: Any, matrix: Tensor, bias: Tensor | None) -> None:
    """Give a linear map another weight (outputs, inputs) and bias (outputs), and the sizes that go with them."""
    transposed = isinstance(linear, Conv1D)
    linear.weight = nn.Parameter((matrix.T if transposed else matrix).contiguous().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    outputs, inputs = matrix.shape
    names = ("nf", "nx") if transposed else ("out_features", "in_features")
    for name, size in zip(names, (outputs, inputs), strict=True):
        setattr(linear, name, size)


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
