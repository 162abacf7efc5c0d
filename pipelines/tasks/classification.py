"""One label out of several, whatever the example is."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.core.errors import InputError
from pipelines.data import examples as data_module
from pipelines.models.loading import label_order, reorder_labels
from pipelines.tasks.base import Task
from pipelines.tasks.metrics import PRIMARY_METRIC, classification_metrics


class Classification(Task):
    """One label out of several, whatever the example is: how answers are scored."""

    primary_metric = PRIMARY_METRIC
    data: data_module.ClassificationData

    @property
    def label_names(self) -> list[str]:
        return self.data.label_names

    def metrics(self, logits: np.ndarray, references: Any) -> dict[str, Any]:
        """Scores of logits (examples, labels) against label ids (examples)."""
        return classification_metrics(np.argmax(logits, axis=-1), np.asarray(references), self.label_names)

    def align_labels(self, model: Any, source: str) -> None:
        """Put the head of the model that was loaded from `source` in the data's order; raises InputError for other labels."""
        order = label_order(model.config, self.label_names)
        if order is None:
            raise InputError(
                f"expected a model for the labels {self.label_names}, found {list(model.config.id2label.values())} in {source}. Fine-tune "
                "it on this data set, or use the data set it was fine-tuned on."
            )
        reorder_labels(model, order, self.label_names)

    def check_graph(self, source: str) -> None:
        """Raise InputError unless the ONNX model in `source` takes this task's inputs and predicts in the data's order.

        A graph keeps the order of its export.
        """
        super().check_graph(source)
        config = self.load_config(source)
        if label_order(config, self.label_names) != list(range(len(self.label_names))):
            raise InputError(
                f"expected an ONNX model for the labels {self.label_names}, in this order, found {list(config.id2label.values())} in "
                f"{source}. Export its model again with this data set (python -m pipelines export)."
            )

    def agreement(self, logits: np.ndarray, reference_logits: np.ndarray) -> float:
        """Share of examples that two models answer alike."""
        return float(np.mean(np.argmax(logits, axis=-1) == np.argmax(reference_logits, axis=-1)))
