"""Scores of a classifier: `evaluate.Metric` classes over scikit-learn; no network, one code for torch and ONNX."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, recall_score

PRIMARY_METRIC = "accuracy"


class _ClassificationMetric(evaluate.Metric):
    """What the metrics below share: class ids in, everything kept in memory, nothing fetched from the Hub."""

    description: str
    citation: str = ""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        class_id = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description="predictions, references: class ids, one per example.",
            features=datasets.Features({"predictions": class_id, "references": class_id}),
        )


class Accuracy(_ClassificationMetric):
    """The share of examples whose predicted class is the reference."""

    description = "The share of examples whose predicted class is the reference."

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(_ClassificationMetric):
    """The mean F1 of the classes, each counting the same however rare it is.

    The mean is over the classes that occur among the references or the predictions, as in scikit-learn: a class
    that a small split does not hold must not pull the score down.
    """

    description = "The unweighted mean of the F1 of the classes that occur."

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0))}


class MatthewsCorrelation(_ClassificationMetric):
    """The correlation of predictions and references in [-1, 1]; 0 where either is constant (Gorodkin, 2004)."""

    description = "The correlation of predictions and references, fair to unbalanced classes."
    citation = "J. Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004"

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        if len({*predictions, *references}) < 2:
            return {"matthews_correlation": 0.0}  # scikit-learn's value too, but with a warning
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class RecallPerClass(_ClassificationMetric):
    """The share of each class's examples that were found; 0 for a class that the references do not hold."""

    description = "For each class, the share of its examples that were predicted as this class."

    def _compute(self, predictions: list[int], references: list[int], label_names: list[str]) -> dict[str, Any]:
        class_ids = range(len(label_names))
        recall = recall_score(references, predictions, labels=list(class_ids), average=None, zero_division=0.0)
        return {"recall_per_class": {name: float(recall[class_id]) for class_id, name in enumerate(label_names)}}


def classification_metrics(predictions: np.ndarray, references: np.ndarray, label_names: list[str]) -> dict[str, Any]:
    """All scores of one set of predictions, ready for JSON.

    `predictions` and `references` are class ids of shape (examples,); raises ValueError where their shapes differ or
    there is no example.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    if predictions.shape != references.shape or predictions.ndim != 1 or predictions.size == 0:
        raise ValueError(
            f"expected one predicted and one reference class id per example, found the shapes {predictions.shape} and "
            f"{references.shape}; reduce logits with argmax(-1) first"
        )
    answers = {"predictions": predictions, "references": references}
    scores: dict[str, Any] = {}
    for metric in (Accuracy(), MacroF1(), MatthewsCorrelation()):
        scores |= metric.compute(**answers)
    return scores | RecallPerClass().compute(**answers, label_names=label_names)


# ---- The difference of two models, from the same examples drawn again and again
