"""One text, or a pair of texts, and any number of labels: each is predicted where its probability reaches a threshold of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import logit
from torch import Tensor

from pipelines.core.config import DataConfig, DistillConfig, LabelConfig
from pipelines.core.divergences import DIVERGENCES
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, Arrays, Candidates, Comparison, Head, Presentation, StageResult, Tensors
from pipelines.data.examples import Examples, load_examples
from pipelines.data.references import read_classes, read_label_sets
from pipelines.data.tables import read_table
from pipelines.data.text import TEXTS
from pipelines.onnx.verify import verification_batches
from pipelines.tasks import baselines
from pipelines.tasks.base import BaseTask
from pipelines.tasks.classification import LEAST_PROBABILITY, Classification
from pipelines.tasks.metrics import best_thresholds, multi_label_metrics
from pipelines.tasks.multi_label_classification.data import LabelSetConfig, join_texts
from pipelines.tasks.multi_label_classification.report import THRESHOLDS, MultiLabelPresentation, compare_label_sets
from pipelines.tasks.texts import TextTask
from pipelines.training.losses import soft_target_loss

MULTI_LABEL = "multi_label_classification"  # the problem_type in config.json, by which pipeline() takes a sigmoid


class MultiLabelClassification(TextTask, Classification):
    """One text, or a pair of texts, and any number of labels. Labels are 1 or 0 (examples, labels); each counts by itself in the losses."""

    name = "multi-label-classification"
    presentation: Presentation = MultiLabelPresentation()
    settings = (DataConfig, LabelConfig, LabelSetConfig)
    demo = "bert_bbc_topics"
    primary_metric = "micro_f1"
    balanced_metric = "macro_f1"
    teacher_metric = "average_precision"
    metrics: Mapping[str, bool] = dict.fromkeys(("micro_f1", "macro_f1", "average_precision"), True)

    def __init__(
        self, config: DataConfig, label: LabelConfig | None = None, sets: LabelSetConfig | None = None
    ) -> None:
        super().__init__(config)
        self.weigh_classes(label)
        self.sets = sets or LabelSetConfig()
        ways = {
            f"--label_column with {1 + len(config.more_label_columns)} columns": bool(config.more_label_columns),
            "--label_separator": self.sets.label_separator is not None,
            "--joined_texts": self.sets.joined_texts > 1,
        }
        if sum(ways.values()) > 1:
            found = " and ".join(way for way, is_used in ways.items() if is_used)
            raise InputError(
                f"expected one way in which texts have several labels, found {found}. Leave all but one out."
            )

    @classmethod
    def recognizes(cls, config: dict[str, Any]) -> bool:
        return super().recognizes(config) and config.get("problem_type") == MULTI_LABEL

    # ---- Data

    @property
    def read_as(self) -> str:
        return f"{self.name} {self.sets}"

    def load_data(self) -> Examples:
        if self.sets.joined_texts > 1:
            return join_texts(
                load_examples(self.config, TEXTS, read_classes), self.sets.joined_texts, self.config.split_seed
            )
        kind = replace(TEXTS, read_file=partial(read_table, lists=True))
        return load_examples(self.config, kind, partial(read_label_sets, separator=self.sets.label_separator))

    def verification_feeds(self, processor: Any) -> list[Arrays]:
        """Without the labels, which are no tokens to be shortened."""
        features = self.features(processor)["validation"].remove_columns("labels")
        return list(verification_batches(features, self.collate(processor)))

    # ---- Models

    def load_model(self, source: str, head: Head = "required", from_scratch: bool = False) -> Any:
        model = super().load_model(source, head, from_scratch)
        model.config.problem_type = MULTI_LABEL
        return model

    def align_labels(self, model: Any, source: str) -> None:
        super().align_labels(model, source)
        model.config.problem_type = MULTI_LABEL

    def config_entries(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return {THRESHOLDS: metrics[THRESHOLDS]}

    check_teacher = BaseTask.check_teacher

    def guess(self, config: Any) -> float:
        """The average precision of an order by chance: the share of the texts that have a label."""
        shares = np.mean(self.data.splits["validation"]["label"][:], axis=0)
        return float(shares[shares > 0].mean()) + 1e-9  # for what rounding adds

    def shares_found(self, references: Any, predictions: Any) -> np.ndarray:
        """The F1 of predicting each label where another one is likely."""
        references, found = np.asarray(references), predictions > 0
        return np.asarray(2 * references.T @ found / np.maximum(references.sum(axis=0)[:, None] + found.sum(axis=0), 1))

    # ---- Losses: a sum over all labels of all examples

    @cached_property
    def class_weights(self) -> Tensor | None:  # type: ignore[override]
        """Of each label (2, labels) the weights of the texts without and with it."""
        if not self.balanced:
            return None
        share = np.mean(self.splits["train"]["label"][:], axis=0)
        # A label that all have needs no other weight for those that do not.
        return torch.from_numpy(0.5 / np.maximum([1 - share, share], 1 / len(self.splits["train"])))

    @property
    def loss_details(self) -> dict[str, Any]:
        weights = self.class_weights
        return (
            {} if weights is None else {"class_weights": dict(zip(self.label_names, weights.T.tolist(), strict=True))}
        )

    def label_loss(self, outputs: Tensors, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Binary cross entropy."""
        counted = labels.ne(IGNORED)
        targets = labels.clamp(min=0).to(outputs["logits"].device, torch.float32)
        smoothed = targets * (1 - label_smoothing) + label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(outputs["logits"].float(), smoothed, reduction="none")
        if self.class_weights is not None:
            without, fits = self.class_weights.to(losses)
            losses = losses * torch.where(targets > 0, fits, without)
        return losses[counted].sum(), counted.sum()

    divergences = tuple(name for name in DIVERGENCES if name != "decoupled")
    unlike_classes = "it compares labels with one another where each is predicted by itself"

    def soft_loss(self, outputs: Tensors, teacher: Tensors, labels: Tensor, distill: DistillConfig) -> Tensor:
        """The divergence between two distributions for each label: whether it fits or not."""

        def of_each_label(logits: Tensor) -> Tensor:
            # softmax([z, 0]) is the sigmoid of z and its complement.
            others = () if distill.divergence == "squared_error" else (torch.zeros_like(logits),)
            return torch.stack([logits, *others], dim=-1)

        settings = (distill.temperature, labels.ne(IGNORED), distill.divergence, distill.beta)
        student, from_teacher = of_each_label(outputs["logits"]), of_each_label(teacher["teacher_logits"])
        return soft_target_loss(student, from_teacher, *settings)

    def token_weights(self, inputs: Tensors, labels: Tensor, tokens: int) -> Tensor:
        """As those of a classifier, times the labels, by whose number the sums of all losses are divided."""
        return super().token_weights(inputs, labels[:, 0], tokens) * labels.shape[1]

    # ---- Scores

    def scores(self, predictions: np.ndarray, references: Any, split: str | None = None) -> dict[str, Any]:
        """The scores of logits (examples, labels), with the thresholds that are best on these very examples, which are those of the
        validation split."""
        references = np.asarray(references)
        return multi_label_metrics(predictions, references, self.label_names, best_thresholds(predictions, references))

    # ---- Baselines

    @property
    def baselines(self) -> Mapping[str, Candidates]:
        return {
            "label_frequency": baselines.label_frequency,
            "tfidf_logistic_regression": partial(baselines.tfidf_one_vs_rest, balanced=self.balanced),
        }

    def baseline_predictions(self, estimator: Any, inputs: Any) -> np.ndarray:
        """Logits (examples, labels)."""
        found = np.float64(estimator.predict_proba(inputs))  # in float32 the most probability would be 1
        return np.asarray(logit(np.clip(found, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)))

    # ---- Report

    def compare(self, stages: list[StageResult], processor: Any, shipped: str, split: str = "test") -> Comparison:
        references = np.asarray(self.features(processor)[split]["labels"])
        return compare_label_sets(stages, references, self.texts_of(split), self.label_names, shipped, self.balanced)
