"""One label out of several, whatever the example is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import softmax
from sklearn.metrics import confusion_matrix
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from pipelines.core.config import LabelConfig
from pipelines.core.errors import InputError
from pipelines.core.task import Comparison, Predict, StageResult
from pipelines.models.loading import label_order, reorder_labels
from pipelines.report.markdown import escape, markdown_table, number
from pipelines.report.pages import BASELINES, TEACHER, stage_of
from pipelines.tasks.base import (
    LEARNED_FROM,
    BasePresentation,
    BaseTask,
    check_predictions,
    examples_section,
    listed_examples,
)
from pipelines.tasks.metrics import BALANCED_METRIC, PRIMARY_METRIC, classification_metrics
from pipelines.training.losses import ClassifierLoss

LEAST_PROBABILITY = 1e-9  # neighbours give a label none at all, whose logarithm would not be finite
ORDER_EXAMPLES = 512  # whose predictions tell in what order a model's labels are


class Classification(ClassifierLoss, BaseTask):
    """One label out of several, whatever the example is."""

    primary_metric = PRIMARY_METRIC
    metrics: Mapping[str, bool] = dict.fromkeys(
        ("accuracy", "macro_f1", "matthews_correlation", "balanced_accuracy"), True
    )
    balanced = False  # whether every class weighs the same, see LabelConfig
    balanced_metric = BALANCED_METRIC

    def weigh_classes(self, label: LabelConfig | None) -> None:
        """Weigh the classes as the settings say: in the loss, and so in pruning; and in the score that checkpoints and quantized models
        are chosen by."""
        if label is not None and label.class_weights == "balanced":
            self.balanced, self.primary_metric = True, self.balanced_metric

    def describe(self) -> dict[str, Any]:
        return super().describe() | ({"class_weights": "balanced"} if self.balanced else {})

    @cached_property
    def class_weights(self) -> Tensor | None:  # type: ignore[override]  # computed once the data is read
        if not self.balanced:
            return None
        labels = np.asarray(self.splits["train"]["label"][:])
        classes = np.arange(len(self.label_names))
        return torch.from_numpy(compute_class_weight("balanced", classes=classes, y=labels))

    @property
    def loss_details(self) -> dict[str, Any]:
        weights = self.class_weights
        return {} if weights is None else {"class_weights": dict(zip(self.label_names, weights.tolist(), strict=True))}

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

    def check_label_order(self, processor: Any, predict: Predict) -> None:
        """Raise InputError where a head is right on the training split once its labels are put in another order."""
        train = self.features(processor)["train"]
        sample = train.select(
            range(0, len(train), -(-len(train) // ORDER_EXAMPLES))
        )  # from all of it, however it is sorted
        shares = self.shares_found(sample["labels"][:], predict(sample, self.collate(processor), self))
        labels, likely = linear_sum_assignment(shares, maximize=True)
        moved = np.flatnonzero((labels != likely) & (shares.sum(axis=1) > 0))
        before, after = shares[moved, moved], shares[moved, likely[moved]]
        if len(moved) > 1 and after.mean() > max(0.5, 2 * before.mean()):
            names = self.label_names
            pairs = ", ".join(
                f"{names[i]!r} is predicted as {names[likely[i]]!r} ({shares[i, likely[i]]:.0%})" for i in moved[:5]
            )
            raise InputError(
                f"expected a model whose labels are in the order of the data, {names[:20]}, found another order: of {len(sample)} training "
                f"examples {pairs}. Put the labels' names in their true order into id2label and label2id of its config.json, or fine-tune "
                "it (--teacher_epochs above 0)."
            )

    def shares_found(self, references: Any, predictions: Any) -> np.ndarray:
        """Which share of the examples of each label are predicted as which label (labels, labels)."""
        counts = confusion_matrix(references, np.argmax(predictions, axis=-1), labels=range(len(self.label_names)))
        return np.asarray(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))

    def align_labels(self, model: Any, source: str) -> None:
        """Put the head of the model that was loaded from `source` in the data's order; raises InputError for other labels."""
        order = label_order(model.config, self.label_names)
        if order is None:
            raise InputError(
                f"expected a model for the labels {self.label_names}, found id2label {model.config.id2label} and label2id "
                f"{model.config.label2id} in {source}. Fine-tune "
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
                f"{source}. Export its model again with this data set (pocketformers export)."
            )

    # ---- Baselines

    def baseline_predictions(self, estimator: Any, inputs: Any) -> np.ndarray:
        """Log probabilities (examples, labels), also of labels that the estimator has not seen."""
        probabilities = estimator.predict_proba(inputs)
        found = np.zeros((len(probabilities), len(self.label_names)))
        found[:, estimator.classes_] = probabilities
        return np.log(np.maximum(found, LEAST_PROBABILITY))

    # ---- Report

    @abstractmethod
    def texts_of(self, split: str = "test") -> list[str]:
        """The examples of a split as a person reads them."""

    def compare(self, stages: list[StageResult], processor: Any, shipped: str, split: str = "test") -> Comparison:
        references = np.asarray(self.features(processor)[split]["labels"])
        return compare_classifiers(stages, references, self.texts_of(split), self.label_names, shipped, self.balanced)


def compare_classifiers(
    stages: list[StageResult],
    references: np.ndarray,
    texts: list[str],
    label_names: list[str],
    shipped: str,
    balanced: bool = False,
) -> Comparison:
    """What a report says of classifiers: `references` are class ids (examples,), `texts` the same examples for people to read."""
    check_predictions(stages, (len(references), len(label_names)), "examples, labels")
    predictions = {stage.name: np.argmax(stage.predictions, axis=-1) for stage in stages}
    scores = {name: classification_metrics(found, references, label_names) for name, found in predictions.items()}
    names = np.array(label_names)
    likeliest = {stage.name: softmax(stage.predictions, axis=-1).max(axis=-1) for stage in stages}
    columns = {
        "reference": names[references],
        "teacher_probability": likeliest[TEACHER],
        "shipped_prediction": names[predictions[shipped]],
        "shipped_probability": likeliest[shipped],
    }
    right = {name: found == references for name, found in predictions.items()}
    counts = np.bincount(references, minlength=len(label_names))
    report = class_report(stages, label_names, counts, len(references)) | {
        "broken_examples": broken_examples(right[TEACHER], right[shipped], texts, columns)
    }
    weights = 1 / counts[references] if balanced else np.ones(len(references))
    samples = {name: (found.astype(float), weights) for name, found in right.items()}
    agreement = {name: float(np.mean(found == predictions[TEACHER])) for name, found in predictions.items()}
    return Comparison(compared_classes(scores, agreement), report, samples, metric=weighted_accuracy)


def compared_classes(scores: dict[str, dict[str, Any]], agreement: dict[str, float]) -> dict[str, dict[str, Any]]:
    """What a report says of each stage by its scores on the test split."""
    before = scores[TEACHER]["recall_per_class"]
    return {
        name: {
            "metrics": metrics,
            "agreement": agreement[name],
            "recall_change_per_class": {
                label: recall - before[label] for label, recall in metrics["recall_per_class"].items()
            },
        }
        for name, metrics in scores.items()
    }


def class_report(
    stages: list[StageResult], label_names: list[str], counts: np.ndarray, examples: int
) -> dict[str, Any]:
    return {
        "label_names": label_names,
        "test_examples": examples,
        "test_examples_per_class": dict(zip(label_names, counts.tolist(), strict=True)),
        "lost_most": [lost_most(stage) for stage in stages if "source_metrics" in stage.record["details"]],
    }


def weighted_accuracy(correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Over the last axis; the balanced accuracy where the weights of each class have the same sum."""
    return np.asarray((correct * weights).sum(axis=-1) / weights.sum(axis=-1))


def lost_most(stage: StageResult) -> dict[str, Any]:
    """The class whose recall on the validation split fell most from the model that a stage was made from."""
    before, after = stage.record["details"]["source_metrics"], stage.record["metrics"]["validation"]
    old, new, counts = before["recall_per_class"], after["recall_per_class"], after["examples_per_class"]
    label = min(counts, key=lambda name: new[name] - old[name])
    return {"stage": stage.name, "class": label, "examples": counts[label], "before": old[label], "after": new[label]}


def broken_examples(
    before: np.ndarray, after: np.ndarray, texts: list[str], columns: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The examples that only the teacher got right, the shipped model's most confident mistakes first; `before` and `after` say where the two
    were right, `columns` what is listed of them."""
    broken = np.flatnonzero(before & ~after)
    ordered = broken[np.argsort(-columns["shipped_probability"][broken], kind="stable")]
    return {
        "total": len(broken),
        "repaired_total": int((after & ~before).sum()),
        "examples": listed_examples(ordered, texts, **columns),
    }


def recall_tables(report: dict[str, Any], shipped: dict[str, Any], unit: str) -> list[str]:
    """What every class lost, and what each stage took most from."""
    teacher, name = stage_of(report, TEACHER), shipped["name"]
    changes = shipped["recall_change_per_class"]
    classes = sorted(changes, key=lambda label: changes[label])
    rows = [
        [
            label,
            str(report["test_examples_per_class"][label]),
            number(teacher["metrics"]["recall_per_class"][label], ".3f"),
            number(shipped["metrics"]["recall_per_class"][label], ".3f"),
            f"{changes[label]:+.3f}",
        ]
        for label in classes[:20]
    ]
    header = ["class", f"test {unit}", "teacher's recall", f"{name}'s recall", "delta"]
    parts = ["Recall per class, the largest loss first:", markdown_table(header, rows)]
    if len(classes) > 20:
        parts.append(f"The other {len(classes) - 20} classes are in report.json.")
    lost = [one for one in report["lost_most"] if one["after"] < one["before"] and one["stage"] not in BASELINES]
    if lost:
        header = ["stage", "class", f"validation {unit}", "recall before", "recall after"]
        rows = [
            [one["stage"], one["class"], str(one["examples"]), f"{one['before']:.3f}", f"{one['after']:.3f}"]
            for one in lost
        ]
        parts.append("The class that each stage took most from, on the validation split:")
        parts.append(markdown_table(header, rows, text_columns=2))
    return parts


class ClassifierPresentation(BasePresentation):
    """What a report says of any classifier; its code is that of the example's kind."""

    hub_metrics: Mapping[str, str] = {
        "accuracy": "accuracy",
        "macro_f1": "f1",
        "matthews_correlation": "matthews_correlation",
    }
    limitations: Sequence[str] = (
        "The model always predicts one of its labels, also where none fits. Its probabilities are not calibrated, and compression "
        "changes them.",
        f"{LEARNED_FROM} Compression can make them worse for rare classes (see the recall per class).",
    )
    example = "text"  # the column of the examples in a table
    javascript = ("classify", '"A text."')

    def kind(self, report: dict[str, Any]) -> str:
        names = report["label_names"]
        shown = ", ".join(escape(name, 40) for name in names[:20])
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        return f"{report['task']} with {len(names)} labels ({shown}{more})"

    def how_scored(self, report: dict[str, Any]) -> str:
        return (
            "*retained*: the score divided by the teacher's. *agreement*: the share of examples that are predicted as the teacher "
            "predicts them."
        )

    def what_was_lost(self, report: dict[str, Any], shipped: dict[str, Any], listed: int) -> str:
        broken, name = report["broken_examples"], shipped["name"]
        section = examples_section(
            f"Test examples that the teacher predicts right and {name} wrong: {broken['total']:,} of {report['test_examples']:,}. The other "
            f"way round: {broken['repaired_total']:,}.",
            "most confident mistakes",
            broken["examples"][:listed],
            ["example", self.example, "label (teacher's probability)", f"{name}'s prediction"],
            lambda one: [
                str(one["index"]),
                one["text"],
                f"{one['reference']} ({one['teacher_probability']:.2f})",
                f"{one['shipped_prediction']} ({one['shipped_probability']:.2f})",
            ],
            text_columns=4,
        )
        return "\n\n".join([*recall_tables(report, shipped, "examples"), *section])
