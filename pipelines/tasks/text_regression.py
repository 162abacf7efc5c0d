"""One text, or a pair of texts, and a score: a number whose size means something."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import rankdata
from torch import Tensor

from pipelines.core.config import DistillConfig
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, UNLABELLED, Candidates, Comparison, Head, Presentation, StageResult, Tensors
from pipelines.data.examples import Examples, load_examples
from pipelines.data.references import read_scores
from pipelines.data.text import TEXTS
from pipelines.report.markdown import number
from pipelines.report.pages import TEACHER
from pipelines.tasks import baselines
from pipelines.tasks.base import LEARNED_FROM, check_predictions, examples_section, worse_examples
from pipelines.tasks.texts import (
    TextPresentation,
    TextTask,
    is_pair,
    javascript_code,
    onnx_code,
    python_text,
    token_limit,
)
from pipelines.training.losses import ClassifierLoss

CLOSE = 0.1  # two scores this share of the labels' standard deviation apart count as the same


def pearson(scores: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Pearson's correlation over the last axis; 0 where one of the two is constant."""
    varied = (np.ptp(scores, axis=-1) > 0) & (np.ptp(references, axis=-1) > 0)  # the mean is rounded
    scores, references = (values - values.mean(axis=-1, keepdims=True) for values in (scores, references))
    scale = np.sqrt((scores**2).sum(axis=-1) * (references**2).sum(axis=-1))
    return np.where(varied, (scores * references).sum(axis=-1) / np.where(varied, scale, 1), 0.0)


def spearman(scores: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the ranks over the last axis."""
    return pearson(rankdata(scores, axis=-1), rankdata(references, axis=-1))


def regression_metrics(scores: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Pearson's correlation, Spearman's, and the root of the mean squared error, in the labels' unit."""
    scores, references = np.asarray(scores, np.float64), np.asarray(references, np.float64)
    return {
        "pearson": float(pearson(scores, references)),
        "spearman": float(spearman(scores, references)),
        "root_mean_squared_error": float(np.sqrt(np.mean((scores - references) ** 2))),
    }


def check_scores(scores: np.ndarray, split: str, column: str) -> None:
    """Raise InputError for scores of a split that a loss would leave out, or from which nothing can be learnt."""
    if np.isin(scores, (IGNORED, UNLABELLED)).any():
        raise InputError(
            f"expected scores other than {IGNORED} and {UNLABELLED} in the column {column!r}, found some: the losses leave these "
            "numbers out. Shift or rescale the scores."
        )
    if split != "test" and np.ptp(scores) == 0:
        raise InputError(
            f"expected scores that differ in the column {column!r}, found {scores[0]:g} in every row of the {split} split: there "
            "is nothing to learn. Name the column with --label_column, or use other rows."
        )


class RegressionPresentation(TextPresentation):
    """What a report says of a model that scores texts, or pairs of texts."""

    hub_task: str | None = "text-classification"
    shown: Mapping[str, str] = {"spearman": "spearman", "root_mean_squared_error": "RMSE"}
    hub_metrics: Mapping[str, str] = {"pearson": "pearsonr", "spearman": "spearmanr"}
    limitations: Sequence[str] = (
        "The score has the unit and the range of the training labels. Nothing keeps it within that range.",
        "A correlation says how well texts are ordered. How far a single score is off is the root mean squared error.",
        LEARNED_FROM,
    )

    def kind(self, report: dict[str, Any]) -> str:
        return f"scoring {'pairs of texts' if is_pair(report) else 'texts'}"

    def how_scored(self, report: dict[str, Any]) -> str:
        return (
            "*pearson*, *spearman*: correlation with the labels, of the scores and of their ranks. *RMSE*: root mean squared error, in the "
            "labels' unit. *retained*: the correlation divided by the teacher's. *agreement*: the share of examples whose score is at most "
            f"{CLOSE:g} standard deviations of the labels away from the teacher's."
        )

    def what_was_lost(self, report: dict[str, Any], shipped: dict[str, Any], listed: int) -> str:
        worse, name = report["worse_examples"], shipped["name"]
        section = examples_section(
            f"Test examples whose score from {name} is further from the label than the teacher's: {worse['total']:,} of "
            f"{report['test_examples']:,}.",
            "whose error grew most",
            worse["examples"][:listed],
            ["example", "text", "label", "teacher's score", f"{name}'s score"],
            lambda one: [
                str(one["index"]),
                one["text"],
                *(number(one[key], ".2f") for key in ("label", "teacher", "shipped")),
            ],
        )
        return "\n\n".join(section)

    def in_python(self, report: dict[str, Any], model: str) -> str:
        return f"""
            from transformers import pipeline
            score = pipeline("text-classification", model={json.dumps(model)}, function_to_apply="none")
            print(score({python_text(report)}, truncation=True, max_length={token_limit(report)}))
        """

    def in_onnx_runtime(self, report: dict[str, Any], directory: str) -> str:
        return onnx_code(report, directory, "print(logits)")

    def in_javascript(self, report: dict[str, Any], repo_id: str, dtype: str) -> str:
        # A pipeline would make probabilities of scores.
        return javascript_code(report, repo_id, dtype)


class TextRegression(ClassifierLoss, TextTask):
    """One text, or a pair of texts, and a score. Scores have the labels' own unit, from the teacher to the bundle."""

    name = "text-regression"
    presentation: Presentation = RegressionPresentation()
    demo = "bert_stsb"
    primary_metric = "pearson"
    metrics: Mapping[str, bool] = {"pearson": True, "spearman": True, "root_mean_squared_error": False}
    has_distributions = False
    label_names = ["score"]

    @classmethod
    def recognizes(cls, config: dict[str, Any]) -> bool:
        return super().recognizes(config) and config.get("problem_type") == "regression"

    def load_data(self) -> Examples:
        examples = load_examples(self.config, TEXTS, read_scores)
        for name, split in examples.splits.items():
            check_scores(np.asarray(split["label"][:]), name, self.config.label_column)
        return examples

    def load_model(self, source: str, head: Head = "required", from_scratch: bool = False) -> Any:
        """The model with one output, in the labels' unit: a fresh head starts at their mean, with outputs of their spread."""
        import torch

        from pipelines.models.families import head_output

        model = super().load_model(source, head, from_scratch)
        config = self.load_config(source)
        has_head = any("ForSequenceClassification" in name for name in config.architectures or [])
        if from_scratch or not has_head or config.num_labels != 1:
            output = head_output(model)
            with torch.no_grad():
                output.weight.mul_(float(self._labels.std()))
                if output.bias is not None:  # a decoder's head has none
                    output.bias.fill_(float(self._labels.mean()))
        model.config.problem_type = "regression"
        return model

    def align_labels(self, model: Any, source: str) -> None:
        """Say that the one output is a score, as a published cross-encoder's config does not; raises InputError where there are more."""
        if model.config.num_labels != 1:
            raise InputError(
                f"expected a model with one output, a score, found {model.config.num_labels} in {source}. Fine-tune it on this data set."
            )
        model.config.problem_type = "regression"

    # ---- Losses: as a classifier with one label has them, but squared errors over the labels' variance, so that learning rates and weights
    # do not depend on their unit

    @cached_property
    def _labels(self) -> np.ndarray:
        return np.asarray(self.splits["train"]["label"][:], np.float64)

    @cached_property
    def _variance(self) -> float:
        return float(self._labels.var())

    def label_loss(self, outputs: Tensors, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        counted = labels.ne(IGNORED)
        errors = outputs["logits"][:, 0].float() - labels
        return errors[counted].pow(2).sum() / self._variance, counted.sum()

    divergences = ("forward_kl", "squared_error")  # the first, the default, does nothing
    unlike_classes = "it is for distributions, and scores are distilled by their squared error"

    def soft_loss(self, outputs: Tensors, teacher: Tensors, labels: Tensor, distill: DistillConfig) -> Tensor:
        """The squared distance of the teacher's score: a score has no distribution, so temperature and divergence say nothing."""
        errors = outputs["logits"][:, 0].float() - teacher["teacher_logits"][:, 0].float()
        return errors[labels.ne(IGNORED)].pow(2).sum() / self._variance

    # ---- Scores

    def predictions(self, outputs: Tensors, labels: Tensor) -> Tensor:
        return outputs["logits"][:, 0]

    def scores(self, predictions: np.ndarray, references: Any, split: str | None = None) -> dict[str, Any]:
        return regression_metrics(predictions, np.asarray(references))

    # ---- Baselines

    @property
    def baselines(self) -> Mapping[str, Candidates]:
        return {"mean_score": baselines.mean_score, "tfidf_ridge": baselines.tfidf_ridge}

    # ---- Report

    def compare(self, stages: list[StageResult], processor: Any, shipped: str, split: str = "test") -> Comparison:
        references = np.asarray(self.features(processor)[split]["labels"], np.float64)
        check_predictions(stages, references.shape, "examples")
        found = {stage.name: stage.predictions.astype(np.float64) for stage in stages}
        tolerance = CLOSE * float(references.std())
        compared = {
            name: {
                "metrics": regression_metrics(scores, references),
                "agreement": float(np.mean(np.abs(scores - found[TEACHER]) <= tolerance)),
            }
            for name, scores in found.items()
        }
        growth = np.abs(found[shipped] - references) - np.abs(found[TEACHER] - references)
        columns = {"label": references, "teacher": found[TEACHER], "shipped": found[shipped]}
        report = {
            "test_examples": len(references),
            "label_mean": float(references.mean()),
            "label_standard_deviation": float(references.std()),
            "worse_examples": worse_examples(growth, self.texts_of(split), **columns),
        }
        return Comparison(compared, report, {name: (scores, references) for name, scores in found.items()}, pearson)
