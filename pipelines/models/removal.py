"""Remove heads and neurons from a model in memory, write what is left in stock shapes, and load it without the zeros.

A stock config cannot express a model whose layers differ in heads or neurons. On disk a pruned model therefore keeps stock shapes with
zeros, which any `from_pretrained` opens; `load_model` removes the zeros physically, to train, time or export it. This module imports
little, since a fresh process loads a model through it to be timed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from pipelines.core.errors import InputError
from pipelines.data.sources import check_model, resolve
from pipelines.models.families import (
    FAMILIES,
    family_of,
    head_size,
    input_size,
    layers_of,
    replace_weights,
    weight_matrix,
)


def cut(model: Any, kept_heads: list[np.ndarray], kept_neurons: list[np.ndarray]) -> None:
    """Remove, in place, every head and neuron that is not kept: fewer rows and columns in the linear maps."""
    family, size = family_of(model.config), head_size(model.config)
    for layer, heads, neurons in zip(layers_of(model), kept_heads, kept_neurons, strict=True):
        columns = torch.tensor((heads[:, None] * size + np.arange(size)).reshape(-1), dtype=torch.long)
        if family.packed:
            attention = part(layer, family.query.rpartition(".")[0])
            _keep_outputs(part(layer, family.query), torch.cat([columns + i * attention.split_size for i in range(3)]))
            attention.split_size, attention.num_heads = len(columns), len(heads)
        else:
            for path in (family.query, family.key, family.value):
                _keep_outputs(part(layer, path), columns)
        _keep_inputs(part(layer, family.attention_output), columns)
        _keep_outputs(part(layer, family.ffn_input), torch.tensor(neurons, dtype=torch.long))
        _keep_inputs(part(layer, family.ffn_output), torch.tensor(neurons, dtype=torch.long))


def _keep_outputs(linear: Any, rows: Tensor) -> None:
    replace_weights(linear, weight_matrix(linear)[rows], None if linear.bias is None else linear.bias.detach()[rows])


def _keep_inputs(linear: Any, columns: Tensor) -> None:
    replace_weights(linear, weight_matrix(linear)[:, columns], None)


def part(layer: Any, path: str) -> Any:
    """The linear map at `path` below a layer."""
    return layer.get_submodule(path)


def with_stock_shapes(model: Any) -> Any:
    """A copy of a cut model in the shapes of its config, zeros where something was removed: the same function."""
    stock = type(model)(model.config)
    state = stock.state_dict()
    for name, tensor in model.state_dict().items():
        # What is left comes first and zeros after it: neither heads nor neurons have an order that matters.
        padded = torch.zeros_like(state[name])
        packed = family_of(model.config).packed and f".{family_of(model.config).query}." in name
        # Query, key and value are filled up each for itself.
        pieces = zip(padded.chunk(3, dim=-1), tensor.chunk(3, dim=-1), strict=True) if packed else [(padded, tensor)]
        for target, left in pieces:
            target[tuple(slice(length) for length in left.shape)] = left
        state[name] = padded
    stock.load_state_dict(state, strict=True)
    if model.can_generate():
        stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()


def remove_zeros(model: Any) -> Any:
    """Remove, in place, heads and neurons that contribute nothing because their output weights are all zero."""
    if model.config.model_type not in FAMILIES or not family_of(model.config).prunable:
        return model
    family, size = family_of(model.config), head_size(model.config)
    kept_heads, kept_neurons = [], []
    for layer in layers_of(model):
        used = weight_matrix(part(layer, family.attention_output)).abs().sum(dim=0).reshape(-1, size).sum(dim=1)
        kept_heads.append(np.flatnonzero(used.numpy()))
        kept_neurons.append(np.flatnonzero(weight_matrix(part(layer, family.ffn_output)).abs().sum(dim=0).numpy()))
    if any(len(kept) == 0 for kept in (*kept_heads, *kept_neurons)):
        return model  # a layer without any head or neuron has no shape of its own; zeros say the same
    cut(model, kept_heads, kept_neurons)
    return model


def load_model(directory: str | Path, trust_remote_code: bool = False) -> Any:
    """The model in a stage's directory, of the class its config names, in eval mode, without the zeros of pruning.

    Raises InputError where the weights are not whole safetensors, the class is not transformers' own and not trusted, or has no head.
    """
    located = resolve(str(directory))
    check_model(located)
    try:
        config = transformers.AutoConfig.from_pretrained(located, trust_remote_code=trust_remote_code)
        name = config.architectures[0]
        if hasattr(transformers, name):
            model_class = getattr(transformers, name)
        else:
            own = next(path for path in config.auto_map.values() if path.endswith(f".{name}"))
            model_class = get_class_from_dynamic_module(own, located)
    except (AttributeError, StopIteration, TypeError, ValueError) as error:
        raise InputError(
            f"expected a model of one of transformers' own classes in {directory}, found another ({' '.join(str(error).split()):.200}). "
            "Where it brings code of its own that you trust, pass --trust_remote_code true."
        ) from error
    model = model_class.from_pretrained(located, use_safetensors=True).eval()
    if model.base_model_prefix and model.base_model is model:
        raise InputError(
            f"expected a model with a head for its task in {directory}, found {name}, which has none. Fine-tune it first."
        )
    return remove_zeros(model)


def shape_of(model: Any) -> dict[str, list[int]]:
    """Heads and feed-forward neurons left in each layer."""
    family, size = family_of(model.config), head_size(model.config)
    return {
        "heads": [input_size(part(layer, family.attention_output)) // size for layer in layers_of(model)],
        "neurons": [input_size(part(layer, family.ffn_output)) for layer in layers_of(model)],
    }
