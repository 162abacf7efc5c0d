"""Metrics against values counted by hand."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from pipelines.tasks.metrics import PRIMARY_METRIC, classification_metrics


def test_scores_counted_by_hand() -> None:
    # Confusion: cat 2 of 3 found, dog 1 of 2 found; one dog taken for a cat and one cat for a dog.
    references = np.array([0, 0, 0, 1, 1])
    predictions = np.array([0, 0, 1, 1, 0])
    scores = classification_metrics(predictions, references, ["cat", "dog"])
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["matthews_correlation"] == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert scores["recall_per_class"] == {"cat": pytest.approx(2 / 3), "dog": pytest.approx(1 / 2)}
    assert scores["examples_per_class"] == {"cat": 3, "dog": 2}
    assert PRIMARY_METRIC in scores
    assert json.loads(json.dumps(scores)) == scores


@pytest.mark.parametrize(
    ("predictions", "references"),
    [([0, 0], [0, 0]), ([2, 2], [0, 1]), ([0, 1], [1, 0]), ([1], [1]), ([0], [2])],
)
def test_absent_classes_neither_crash_nor_warn(predictions: list[int], references: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = classification_metrics(np.array(predictions), np.array(references), ["a", "b", "c"])
    assert set(scores["recall_per_class"]) == {"a", "b", "c"}
    values = [*scores["recall_per_class"].values(), *(scores[name] for name in scores if "_per_" not in name)]
    assert np.isfinite(values).all()


def test_a_class_that_does_not_occur_does_not_lower_macro_f1() -> None:
    scores = classification_metrics(np.array([0, 1]), np.array([0, 1]), ["a", "b", "c"])
    assert scores["macro_f1"] == 1.0
    assert scores["recall_per_class"] == {"a": 1.0, "b": 1.0, "c": 0.0}
