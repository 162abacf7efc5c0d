"""Remove heads and neurons from a model in memory (physical pruning), write what is left in stock shapes, load it without the zeros.

A stock config cannot express a model whose layers differ in heads or neurons. On disk a pruned model therefore keeps stock shapes with
zeros, which any `from_pretrained` opens; `load_model` removes the zeros physically, to train, time or export it. This module imports
little, since a fresh process loads a model through it to be timed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from pipelines.core.errors import InputError
from pipelines.core.sources import resolve
from pipelines.data.sources import check_model
from pipelines.models import small
from pipelines.models.embedder import is_embedder, load_embedder
from pipelines.models.families import Group, groups_of, input_axis, layers_of, slices, unit_count, unit_width
from pipelines.models.loading import load_config, load_weights

WITH_HEAD = re.compile(r"For[A-Z]|LMHead")  # in the name of a class
Kept = Sequence[np.ndarray] | None  # of each layer the units to keep, in rising order; None keeps all


def cut(model: Any, heads: Kept = None, neurons: Kept = None) -> None:
    """Remove, in place, every head and neuron that is not kept: fewer rows and columns in the linear maps."""
    groups = groups_of(model.config)
    for kind, kept in (("heads", heads), ("neurons", neurons)):
        if kept is not None:
            for layer, units in zip(layers_of(model), kept, strict=True):
                _keep_units(layer, groups[kind], torch.as_tensor(units))


def _keep_units(layer: nn.Module, group: Group, kept: Tensor) -> None:
    before = unit_count(layer, group)
    for name, axis, indices in list(slices(layer, group)):
        # Sorted, the indices of a packed map are again those of one part after the other.
        left = indices[kept].flatten().sort().values
        values = layer.get_parameter(name).detach()
        _replace(layer, name, values.index_select(axis, left.to(values.device)))
    for path in group.counts:
        _set_attribute(layer, path, attrgetter(path)(layer) * len(kept) // before)


def _replace(layer: nn.Module, name: str, values: Tensor) -> None:
    """Give a module below `layer` another parameter, and a linear map the sizes that go with it."""
    path, _, attribute = name.rpartition(".")
    module: Any = layer.get_submodule(path)
    setattr(module, attribute, nn.Parameter(values))
    if attribute == "weight":
        names = ("out_features", "in_features") if isinstance(module, nn.Linear) else ("nx", "nf")
        for size_name, size in zip(names, values.shape, strict=True):
            setattr(module, size_name, size)


def _set_attribute(layer: nn.Module, path: str, value: Any) -> None:
    parent, _, name = path.rpartition(".")
    owner: Any = attrgetter(parent)(layer)
    if not isinstance(owner, nn.Module):  # a config, which all layers share
        owner = owner if isinstance(owner, _OwnConfig) else _OwnConfig(owner)
        _set_attribute(layer, parent, owner)
    setattr(owner, name, value)


def with_stock_shapes(model: Any) -> Any:
    """A copy of a cut model in the shapes of its config, zeros where something was removed: the same function."""
    stock = type(model)(model.config)
    names = {id(parameter): name for name, parameter in stock.named_parameters()}
    state = model.state_dict()
    for group in groups_of(model.config).values():
        for layer, stock_layer in zip(layers_of(model), layers_of(stock), strict=True):
            left = unit_count(layer, group)
            for name, axis, indices in slices(stock_layer, group):
                # What is left comes first and zeros after it: neither heads nor neurons have an order that matters.
                parameter, places = stock_layer.get_parameter(name), indices[:left].flatten().sort().values
                values = layer.get_parameter(name).detach().to(parameter)
                state[names[id(parameter)]] = torch.zeros_like(parameter).index_copy(axis, places, values)
    stock.load_state_dict(state, strict=True)
    if model.can_generate():
        stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()


def remove_zeros(model: Any) -> Any:
    """Remove, in place, heads and neurons that contribute nothing because their output weights are all zero."""
    groups = groups_of(model.config)
    cut(model, **{kind: [_used(layer, groups[kind]) for layer in layers_of(model)] for kind in groups})
    return model


def _used(layer: nn.Module, group: Group) -> np.ndarray:
    """The units whose output weights are not all zero; the first one where all are, since no layer can do without any."""
    linear: Any = layer.get_submodule(group.input)
    nonzero = linear.weight.detach().ne(0).any(dim=1 - input_axis(linear)).reshape(-1, unit_width(layer, group))
    used = np.flatnonzero(nonzero.any(dim=1).cpu().numpy())
    return used if len(used) else np.array([0])


def load_model(directory: str | Path, trust_remote_code: bool = False) -> Any:
    """The model in a stage's directory, of the class that its config names, in float32, in eval mode, without the zeros of pruning.

    Raises InputError where the weights are not whole safetensors, the class is not transformers' own and not trusted, or has no head: an embedder has
    modules in place of one.
    """
    located = resolve(str(directory))
    check_model(located)
    if is_embedder(located):
        return remove_zeros(load_embedder(str(directory), trust_remote_code=trust_remote_code).eval())
    config = load_config(str(directory), trust_remote_code=trust_remote_code)
    try:
        [name, *_] = config.architectures or [""]
        model_class = getattr(transformers, name, getattr(small, name, None))
        own = [path for path in getattr(config, "auto_map", {}).values() if path.endswith(f".{name}")]
        if model_class is None and own:
            model_class = get_class_from_dynamic_module(own[0], located)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"expected a model of one of transformers' own classes in {directory}, found another ({' '.join(str(error).split()):.200}). "
            "Where it brings code of its own that you trust, pass --trust_remote_code true."
        ) from error
    if model_class is None:
        raise InputError(
            f"expected a class of transformers in 'architectures' of config.json in {directory}, found {repr(name) if name else 'none'}. Write its "
            'name there, such as ["BertForSequenceClassification"], or pip install -U transformers.'
        )
    model = load_weights(model_class, str(directory), config).eval()
    if model.base_model is model and not WITH_HEAD.search(name):
        raise InputError(
            f"expected a model with a head for its task in {directory}, found {name}, which has none. Fine-tune it first; an embedder needs the "
            "modules.json of sentence-transformers."
        )
    return remove_zeros(model)


def shape_of(model: Any) -> dict[str, list[int]]:
    """Heads (of grouped queries: key/value heads) and feed-forward neurons left in each layer, those that can be removed."""
    return {
        kind: [unit_count(layer, group) for layer in layers_of(model)]
        for kind, group in groups_of(model.config).items()
    }


class _OwnConfig:
    """A config as one layer sees it: its own sizes, and all other settings, also those that change later, from the config that all share."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_shared":  # while a copy of this is made
            raise AttributeError(name)
        return getattr(self._shared, name)
