"""Recovery without training: a factor for each head and neuron that pruning left, by least squares (Kwon et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from pipelines.core.errors import InputError
from pipelines.models.families import depths_of, groups_of, input_axis, layers_of, unit_count, unit_width

DAMPING = 0.01  # of the mean curvature: what hardly changes the output stays near 1
LARGEST = 10.0  # factors above it would be of these examples alone, and are damped more


def tune_masks(model: Any, whole: Any, batches: Sequence[dict[str, Tensor]]) -> dict[str, list[list[float]]]:
    """Scale, in place, the units of the cut `model`, so that the maps that read them come closest to the outputs of those in the `whole` one.

    Layer by layer, heads before neurons, each by what the maps read once all before them are scaled; padding does not count. The factors
    go into the weights of the map. Returns the share of the squared output that each map of each kind is off, before and after.
    """
    groups = groups_of(model.config)
    if len(layers_of(model)) < sum(depths_of(model.config)):
        PartialState().print(
            f"pruned: what is left is not scaled, since a {model.config.model_type} uses a layer several times",
            flush=True,
        )
        return {}
    errors: dict[str, list[list[float]]] = {kind: [] for kind in groups}
    with _Passes(model, batches) as own, _Passes(whole, batches) as wanted:
        for layer, whole_layer in zip(layers_of(model), layers_of(whole), strict=True):
            for kind, group in groups.items():
                linear, whole_linear = (one.get_submodule(group.input) for one in (layer, whole_layer))
                units, width = unit_count(layer, group), unit_width(layer, group)
                reads = zip(own.read_by(linear), wanted.read_by(whole_linear), strict=True)
                errors[kind].append(_scale(linear, whole_linear, units, width, reads))
            own.end(layer)
            wanted.end(whole_layer)
    return errors


def _scale(linear: Any, whole: Any, units: int, width: int, reads: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    # A bias is the same in both, and so left out.
    weight, whole_weight = (one.weight.detach().movedim(input_axis(one), 1) for one in (linear, whole))
    gram, cross, size = weight.new_zeros(()).double(), weight.new_zeros(()).double(), 0.0
    for read, whole_read in reads:
        wanted = whole_read @ whole_weight.T
        gram, cross = gram + (read.T @ read).double(), cross + (wanted.T @ read).double()
        size += float(wanted.double().square().sum())
    matrix = (gram * (weight.T @ weight)).reshape(units, width, units, width).sum(dim=(1, 3)).cpu().numpy()
    vector = (cross * weight).sum(dim=0).reshape(units, width).sum(dim=1).cpu().numpy()

    if not np.isfinite(matrix).all() or not np.isfinite(vector).all():
        raise InputError(
            "expected finite activations of the model to prune, found others. Train it again, at a lower rate."
        )

    def error(factors: np.ndarray) -> float:
        return float((size - 2 * factors @ vector + factors @ matrix @ factors) / max(size, np.finfo(float).tiny))

    ones = np.ones(units)
    damping = DAMPING * np.trace(matrix) / units + np.finfo(float).tiny
    solve = partial(np.linalg.solve, b=vector - matrix @ ones)
    while np.abs(factors := ones + solve(matrix + damping * np.eye(units))).max() > LARGEST:
        damping *= 10
    weight *= torch.as_tensor(factors.repeat(width)).to(weight)
    return [error(ones), error(factors)]


class _Reached(Exception):
    """Ends a forward pass."""


class _Passes:
    """Forward passes over batches that stop at a module, and begin, but for the embeddings, after the layers that ended."""

    def __init__(self, model: Any, batches: Sequence[dict[str, Tensor]]) -> None:
        self.model, self.batches = model.eval(), batches
        self.ended: list[Any] = []
        self.given: list[Any] = []  # by the layer that ended last, for each batch
        self.place = 0  # of the batch at hand

    def __enter__(self) -> _Passes:
        return self

    def __exit__(self, *raised: object) -> None:
        for layer in self.ended:
            del layer.forward

    def read_by(self, linear: nn.Module) -> Iterator[Tensor]:
        """What a map reads (rows, inputs) of each batch, without padding."""
        for batch, (inputs, _) in zip(self.batches, self._reach(linear.register_forward_pre_hook), strict=True):
            rows, mask = inputs[0].flatten(0, -2), batch.get("attention_mask")
            # Some have left the padding out already; images have none.
            yield rows if mask is None or mask.numel() != len(rows) else rows[mask.flatten().bool()]

    def end(self, layer: Any) -> None:
        """From now on the layer gives what it gives now, and those before it what they are given."""
        self.given, before = [given for _, given in self._reach(layer.register_forward_hook)], self.ended[-1:]
        rest = self.given[0][1:] if isinstance(self.given[0], tuple) else None
        for one in before:
            one.forward = lambda hidden, *_, **__: hidden if rest is None else (hidden, *rest)
        layer.forward = lambda *_, **__: self.given[self.place]
        self.ended.append(layer)

    def _reach(self, register: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        """Inputs and, of a hook after it, the output of a module for each batch."""
        found: list[Any] = []

        def reach(module: nn.Module, inputs: Any, output: Any = None) -> None:
            found.append((inputs, output))
            raise _Reached

        hook = register(reach)
        try:
            for place, batch in enumerate(self.batches):
                self.place = place
                with torch.no_grad(), suppress(_Reached):
                    self.model(**batch)
                yield found.pop()
        finally:
            hook.remove()
