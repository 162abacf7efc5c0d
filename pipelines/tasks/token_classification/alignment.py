"""Soft targets of a teacher whose tokens are others: each token of the student learns from the teacher's token at the same character."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipelines.core.task import IGNORED
from pipelines.training.soft_targets import WithSoftTargets


class AlignedSoftTargets(torch.utils.data.Dataset):
    """The student's windows, each with the soft targets of the teacher's windows of the same text.

    A token that counts has those of the teacher's token, of the same word, in which its first character lies; where there is none its label
    becomes IGNORED. Two tokenizers agree on characters alone: on neither tokens nor windows.
    """

    def __init__(self, features: Any, stored: WithSoftTargets) -> None:
        self.features, self.stored = features, stored
        self.columns = [name + stored.suffix for name in stored.columns]
        self.column_names = [*features.column_names, *self.columns]
        windows, places, self.words, self.keys = tokens_that_count(stored.features)
        self.at = np.stack([windows, places], axis=1)
        self.blank = {name: np.zeros_like(stored[0][name]) for name in self.columns}

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.features[index]
        own = self.features[int(index)]
        _, places, words, keys = tokens_that_count({name: [value] for name, value in own.items()})
        found = np.searchsorted(self.keys, keys, side="right") - 1
        known = (found >= 0) & (self.words[found] == words) & (self.keys[found] >> 32 == keys >> 32)
        labels = list(own["labels"])
        for place in places[~known]:
            labels[place] = IGNORED
        windows, at = self.at[found[known]].T
        targets = {name: values.copy() for name, values in self.blank.items()}
        for window in np.unique(windows):
            row = self.stored[int(window)]
            here = windows == window
            for name, target in targets.items():
                target[places[known][here]] = row[name][at[here]]
        return own | {"labels": labels} | targets

    def select(self, indices: Any) -> AlignedSoftTargets:
        """The examples at these places, as the method of a data set is."""
        return AlignedSoftTargets(self.features.select(indices), self.stored)


def tokens_that_count(features: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of all tokens with a label of windows (a data set, or lists by column), in the order of the texts: window, place in it, number of the word, and a key that orders them by text
    and first character; all (tokens,) int64."""
    every_word = features["words"][:]
    windows = np.repeat(np.arange(len(every_word)), [len(own) for own in every_word])
    places = np.concatenate([np.arange(len(own)) for own in every_word])
    words, starts = (np.concatenate(features[name][:]).astype(np.int64) for name in ("words", "token_starts"))
    keys = (np.asarray(features["text_number"][:], np.int64)[windows] << 32) + starts
    counted = words != IGNORED
    return windows[counted], places[counted], words[counted], keys[counted]
