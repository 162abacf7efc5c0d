"""Scores of a classifier: scikit-learn's functions, to which `evaluate.Metric` adds a copy through Arrow and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    matthews_corrcoef,
    precision_recall_curve,
    recall_score,
)

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


def best_thresholds(logits: np.ndarray, references: np.ndarray) -> np.ndarray:
    """For each label the probability (labels,) from which on it is predicted so that its F1 is highest; 0.5 for one that does not occur.

    `logits` and `references`, which are 1 or 0, are (examples, labels). A threshold stands halfway between two probabilities that were
    found, so that rounding decides nothing; of several as good ones it is the closest to 0.5.
    """
    thresholds = np.full(logits.shape[1], 0.5)
    for label, probabilities in enumerate(expit(logits.astype(np.float64)).T):
        if references[:, label].any():
            precision, recall, found = precision_recall_curve(references[:, label], probabilities)
            scores = (2 * precision * recall / np.maximum(precision + recall, 1e-12))[:-1]
            halfway = (found + np.concatenate([[0.0], found[:-1]])) / 2
            best = halfway[scores >= scores.max() - 1e-12]
            thresholds[label] = best[np.abs(best - 0.5).argmin()]
    return thresholds


def multi_label_metrics(
    logits: np.ndarray, references: np.ndarray, label_names: list[str], thresholds: np.ndarray
) -> dict[str, Any]:
    """All scores of one set of predictions for labels of which several may fit, ready for JSON.

    `logits` and `references`, which are 1 or 0, are (examples, labels). Micro F1 is of all labels together. Macro F1 is the mean over the
    labels that occur or are predicted, average precision, which no threshold enters, over those that occur.
    """
    found = expit(logits.astype(np.float64)) >= thresholds
    seen, occur = (found | (references > 0)).any(axis=0), references.any(axis=0)
    per_label = f1_score(references, found, average=None, zero_division=0.0)
    recall = recall_score(references, found, average=None, zero_division=0.0)
    precisions = [average_precision_score(references[:, label], logits[:, label]) for label in np.flatnonzero(occur)]
    return {
        "micro_f1": float(f1_score(references, found, average="micro", zero_division=0.0)),
        "macro_f1": float(per_label[seen].mean()) if seen.any() else 0.0,
        "average_precision": float(np.mean(precisions)) if precisions else 0.0,
        "recall_per_class": dict(zip(label_names, map(float, recall), strict=True)),
        "examples_per_class": dict(zip(label_names, references.sum(axis=0).tolist(), strict=True)),
        "thresholds": dict(zip(label_names, thresholds.tolist(), strict=True)),
    }
