"""One label out of several, whatever the example is."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.core.errors import InputError
from pipelines.models.loading import label_order, reorder_labels
from pipelines.tasks.base import Task
from pipelines.tasks.metrics import PRIMARY_METRIC, classification_metrics
from pipelines.training.losses import ClassifierLoss


class Classification(Task, ClassifierLoss):
    """One label out of several, whatever the example is."""

    primary_metric = PRIMARY_METRIC

    @property
    def label_names(self) -> list[str]:
        return self.data.label_names

    def scores(self, predictions: np.ndarray, references: Any, split: str | None = None) -> dict[str, Any]:
        """The scores of logits (examples, labels) against label ids (examples)."""
        return classification_metrics(np.argmax(predictions, axis=-1), np.asarray(references), self.label_names)

    def check_teacher_fits(self, teacher_source: str, student: Any, processor: Any, online: bool) -> None:
        """Student and teacher are loaded with the data's labels in its order, so any two fit that read the same inputs."""

    def check_teacher(self, metrics: dict[str, Any], config: Any) -> None:
        """Raise InputError for a teacher that does no better than guessing on the validation split, or always predicts one label.

        Its recall counts for the classes that the split holds; of another it says nothing.
        """
        present = {self.label_names[index] for index in self.data.splits["validation"]["label"]}
        recalls = {name: recall for name, recall in metrics["recall_per_class"].items() if name in present}
        mean = sum(recalls.values()) / len(recalls)
        always = [name for name, recall in recalls.items() if recall == 1]
        constant = f" (it predicts {always[0]!r} for everything)" if sorted(recalls.values())[-2:] == [0, 1] else ""
        if constant or mean <= 1 / len(self.label_names):
            raise InputError(
                f"expected a teacher that knows the task, found one whose mean recall on the validation split is {mean:.3f}{constant}, "
                f"no better than guessing among {len(self.label_names)} labels. Train it longer or slower (--teacher_epochs, "
                "--teacher_learning_rate), or check that its labels mean what the data set's do."
            )

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
