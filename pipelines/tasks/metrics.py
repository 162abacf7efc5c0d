"""Scores of a classifier: scikit-learn's functions, to which `evaluate.Metric` adds a copy through Arrow and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import f1_score, matthews_corrcoef, recall_score

PRIMARY_METRIC = "accuracy"
BALANCED_METRIC = "balanced_accuracy"


def classification_metrics(predictions: np.ndarray, references: np.ndarray, label_names: list[str]) -> dict[str, Any]:
    """All scores of one set of predictions, ready for JSON.

    `predictions` and `references` are class ids of shape (examples,). Macro F1 is the mean over the classes that occur, so that a class that a small split does not hold does not lower it.
    """
    # 0 is scikit-learn's value, too, where there is one class only, but with a warning.
    varied = len({*predictions.tolist(), *references.tolist()}) > 1
    recall = recall_score(references, predictions, labels=range(len(label_names)), average=None, zero_division=0.0)
    counts = np.bincount(references, minlength=len(label_names))
    return {
        "accuracy": float(np.mean(predictions == references)),
        "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0)),
        "matthews_correlation": float(matthews_corrcoef(references, predictions)) if varied else 0.0,
        # Of the classes that occur, as scikit-learn's balanced_accuracy_score.
        "balanced_accuracy": float(recall[np.unique(references)].mean()),
        "recall_per_class": dict(zip(label_names, map(float, recall), strict=True)),
        "examples_per_class": dict(zip(label_names, counts.tolist(), strict=True)),
    }
