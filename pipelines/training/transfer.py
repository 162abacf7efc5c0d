"""Which examples an epoch has: labelled and unlabelled ones, or a view of each; and what of a batch has labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from pipelines.core.config import DistillConfig
from pipelines.core.errors import InputError
from pipelines.core.processes import wait_for_all
from pipelines.core.task import IGNORED, UNLABELLED, TransferSet

RowsOf = Callable[[int, int], Sequence[int]]  # of a seed and an epoch


def check_transfer(transfer: TransferSet | None, distill: DistillConfig) -> None:
    """Raise InputError, before anything is trained, for a transfer set that cannot be read, or that nothing would be learnt from."""
    if transfer is None:
        return
    if distill.soft_target_weight == 0 and not distill.needs_teacher:
        raise InputError(
            "expected a --soft_target_weight above 0 with --transfer_dataset, whose examples have no other labels than the teacher's, found "
            "0. Raise it, or leave --transfer_dataset out (a --config other than the demo's)."
        )
    if distill.augmented_views:
        raise InputError("expected no --augmented_views with --transfer_dataset, found both. Leave one of them out.")
    if PartialState().is_main_process:
        transfer.identity()
    wait_for_all()  # the main process may have read the data alone


def own_labels(labels: Tensor) -> Tensor:
    """The labels of a batch for the loss against them, in which the transfer set takes no part."""
    return labels.masked_fill(labels == UNLABELLED, IGNORED)


class WithTransfer(torch.utils.data.Dataset):
    """Labelled examples, and after them those of a transfer set.

    An epoch has all labelled ones, and all others or, with a `ratio`, that many for each labelled one: the next ones of an order that is
    shuffled once, so that all come equally often. They depend on the seed and the epoch alone.
    """

    def __init__(self, labelled: Any, unlabelled: Any, ratio: float | None) -> None:
        self.labelled, self.unlabelled, self.column_names = labelled, unlabelled, labelled.column_names
        drawn = len(unlabelled) if ratio is None else max(1, round(ratio * len(labelled)))
        self.drawn = min(drawn, len(unlabelled))
        self.in_epoch = len(labelled) + self.drawn

    def __len__(self) -> int:
        return len(self.labelled) + len(self.unlabelled)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return [*self.labelled[index], *self.unlabelled[index]]
        first = len(self.labelled)
        return self.labelled[int(index)] if index < first else self.unlabelled[int(index) - first]

    def rows_of_epoch(self, seed: int, epoch: int) -> np.ndarray:
        order = np.random.default_rng(seed).permutation(len(self.unlabelled))
        drawn = order[(epoch * self.drawn + np.arange(self.drawn)) % len(order)]
        return np.concatenate([np.arange(len(self.labelled)), len(self.labelled) + drawn])


class OneViewAnEpoch(torch.utils.data.Dataset):
    """Examples that are there `views` times over, one after the other: epoch e has those of view e, and begins again after the last."""

    def __init__(self, of_all_views: Any, views: int) -> None:
        self.of_all_views, self.views, self.column_names = of_all_views, views, of_all_views.column_names
        self.in_epoch = len(of_all_views) // views

    def __len__(self) -> int:
        return len(self.of_all_views)

    def __getitem__(self, index: int) -> Any:
        return self.of_all_views[index]

    def rows_of_epoch(self, seed: int, epoch: int) -> np.ndarray:
        return epoch % self.views * self.in_epoch + np.arange(self.in_epoch)
