"""Entities of tagged words, and how many of them are found. A page of our own instead of seqeval, whose last release is of 2020."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Entity = tuple[int, int, int, str]  # its document, its first word, the word behind its last, its type


def entities(tags: Iterable[str], documents: Iterable[int]) -> set[Entity]:
    """The entities of words with these tags, strictly by IOB2 (as seqeval's mode "strict"): one begins with B- and goes on with I- of its
    type in the same document; an I- without such a beginning is none. A word whose tag is neither O nor has a prefix is one by itself."""
    found: set[Entity] = set()
    start, kind, of = 0, "", -1
    place = -1
    for place, (tag, document) in enumerate(zip(tags, documents, strict=True)):
        prefix, dash, name = tag.partition("-")
        if prefix == "I" and dash and name == kind and document == of:
            continue
        if kind:
            found.add((of, start, place, kind))
        start, kind, of = place, "", document
        if prefix == "B" and dash:
            kind = name
        elif tag != "O" and not (prefix == "I" and dash):
            found.add((document, place, place + 1, tag))
    if kind:
        found.add((of, start, place + 1, kind))
    return found


def f1_of(found: ArrayLike, predicted: ArrayLike, expected: ArrayLike) -> np.ndarray:
    """F1 over the last axis of how many entities of each document were found, predicted and expected; 0 where there are none."""
    right, ours, theirs = (np.asarray(counts).sum(axis=-1) for counts in (found, predicted, expected))
    return np.where(ours + theirs > 0, 2 * right / np.maximum(ours + theirs, 1), 0.0)


def entity_metrics(predicted: set[Entity], expected: set[Entity], kinds: Iterable[str]) -> dict[str, Any]:
    """Precision, recall and F1 of entities that have the right words and the right type: of all together (micro), and of each type."""

    def scores(kind: str | None = None) -> dict[str, float]:
        ours, theirs = ({one for one in some if kind in (None, one[3])} for some in (predicted, expected))
        right = len(ours & theirs)
        return {
            "f1": float(f1_of(*np.array([[right], [len(ours)], [len(theirs)]]))),
            "precision": right / max(len(ours), 1),
            "recall": right / max(len(theirs), 1),
        }

    counts = Counter(kind for *_, kind in expected)
    per_type = {kind: scores(kind) for kind in kinds}
    return {
        **scores(),
        "per_type": per_type,
        "recall_per_class": {kind: one["recall"] for kind, one in per_type.items()},
        "examples_per_class": {kind: counts[kind] for kind in per_type},
    }
