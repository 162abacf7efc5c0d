"""Numbers that stop a training: a loss, a gradient or weights that are not finite, or a gradient that explodes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# A gradient this many times as long as the median of the steps before it (and as 1) has left the region where a step helps. Those
# of a training that goes well differ by a factor of ten, those of one outlying batch by a hundred.
EXPLOSION = 1000.0
REMEMBERED_NORMS = 100
# The scale of fp16 is halved at every overflow, so that it is found after 16 steps at most; none of these updates the weights.
HARMLESS_OVERFLOWS = 20


def has_exploded(norm: float, norms: Sequence[float]) -> bool:
    """Whether a gradient's norm is out of all proportion to those of the steps before."""
    return bool(norms) and norm > EXPLOSION * max(1.0, statistics.median(norms))


def weights_are_finite(model: torch.nn.Module) -> bool:
    """Whether every weight, of a sharded model every one that this process holds, is a finite number."""
    for parameter in model.parameters():
        held: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if not torch.isfinite(held.detach()).all():
            return False
    return True


def unfinite_inputs(batch: dict[str, Any]) -> dict[str, list[int]]:
    """The columns of a batch with values that are not finite, and the rows of the batch that these are in."""
    found = {}
    for name, column in batch.items():
        if isinstance(column, Tensor) and column.is_floating_point():
            whole = torch.isfinite(column).reshape(len(column), -1).all(dim=1)
            if not whole.all():
                found[name] = torch.nonzero(~whole).flatten().tolist()
    return found


def shapes(batches: list[dict[str, Any]]) -> str:
    """The shapes of the batches of one step in a few words: input_ids (16, 40), labels (16,)."""
    columns = {
        f"{name} {tuple(column.shape)}"
        for batch in batches
        for name, column in batch.items()
        if hasattr(column, "shape")
    }
    return ", ".join(sorted(columns))


def likely_cause(
    bad_inputs: list[str], weights_finite: bool, first_step: bool, fp16: bool, learning_rate: float
) -> str:
    """What probably made a number infinite, and the remedy."""
    if bad_inputs:
        return (
            f"values that are not finite in {'; '.join(bad_inputs)}: correct or remove these examples, or, for the "
            "teacher's logits, take another teacher"
        )
    if not weights_finite and first_step:
        return "the model's weights, which were not finite before this training: take another checkpoint"
    rate = f"a learning rate too high ({learning_rate:.3g} at this step): lower --learning_rate"
    rate += " (of a teacher --teacher_learning_rate, after pruning --prune_learning_rate) or lengthen --warmup_steps"
    if fp16:
        return f"fp16, which overflows above 65,504: take --bf16 or full precision; or {rate}"
    return rate


def name_rows(rows: list[int]) -> str:
    """Row numbers, of which at most 16 are shown."""
    return ", ".join(map(str, rows[:16])) + (f" … ({len(rows)} in all)" if len(rows) > 16 else "")


def in_words(value: float | None) -> str:
    """A number for a message: nan, inf, 1.23e+09."""
    return "unknown size" if value is None else f"{value:.3g}" if math.isfinite(value) else str(value)
