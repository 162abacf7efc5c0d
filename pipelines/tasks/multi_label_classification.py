"""One text, or a pair of texts, and any number of labels: each is predicted where its probability reaches a threshold of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, logit
from torch import Tensor

from pipelines.core.config import Checked, DataConfig, DistillConfig, LabelConfig, flag
from pipelines.core.disk import digest
from pipelines.core.divergences import DIVERGENCES
from pipelines.core.errors import InputError
from pipelines.core.records import fingerprint
from pipelines.core.task import IGNORED, Arrays, Candidates, Comparison, Head, Presentation, StageResult, Tensors
from pipelines.data.examples import Examples, load_examples
from pipelines.data.references import read_classes, read_label_sets
from pipelines.data.tables import read_table
from pipelines.data.text import TEXTS
from pipelines.onnx.verify import verification_batches
from pipelines.report.markdown import escape
from pipelines.report.pages import TEACHER, stage_of
from pipelines.tasks import baselines
from pipelines.tasks.base import BaseTask, check_predictions
from pipelines.tasks.classification import (
    LEAST_PROBABILITY,
    Classification,
    broken_examples,
    class_report,
    compared_classes,
)
from pipelines.tasks.metrics import best_thresholds, multi_label_metrics
from pipelines.tasks.text_classification import TextClassifierPresentation
from pipelines.tasks.texts import TextTask, is_pair, onnx_code, python_text, token_limit
from pipelines.training.losses import soft_target_loss

MULTI_LABEL = "multi_label_classification"  # the problem_type in config.json, by which pipeline() takes a sigmoid
THRESHOLDS = "thresholds"  # our own key there, and in the scores
SHOWN_LABELS = 50


@dataclass
class LabelSetConfig(Checked):
    label_separator: str | None = flag(
        None,
        "What parts the labels in a cell of the label column, such as ';'; an empty cell then is a text that no label fits. Left out: the "
        "column holds lists, or there is a column for each label.",
    )
    joined_texts: Annotated[int, "at least 1"] = flag(
        1,
        "Make examples of several labels from texts that have one class each: up to this many random texts of a split are joined, with the "
        "labels of all. Of no use but to try things out, as the demo does.",
    )

    OF_DATA: ClassVar = ("label_separator", "joined_texts")  # for parse_config()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.label_separator = "\t" if self.label_separator in ("\\t", "tab") else self.label_separator
        if self.label_separator == "":
            raise InputError(
                "expected a text that parts labels as --label_separator, found an empty one. Leave it out, or name it."
            )


class MultiLabelPresentation(TextClassifierPresentation):
    """What a report says of a model that gives a text any number of labels."""

    hub_task: str | None = "text-classification"
    shown: Mapping[str, str] = {"macro_f1": "macro F1", "average_precision": "average precision"}
    hub_metrics: Mapping[str, str] = {"micro_f1": "f1"}
    limitations: Sequence[str] = (
        "Each label is predicted by itself, where its probability reaches its threshold; a text may get none. The thresholds were chosen on the "
        "validation split, that of a rare label by few examples, and hold for texts of which as many have the label.",
        *TextClassifierPresentation.limitations[1:],
    )

    def how_scored(self, report: dict[str, Any]) -> str:
        thresholds = stage_of(report, report["shipped"])["metrics"][THRESHOLDS]
        shown = ", ".join(f"{escape(name, 40)} {value:.3f}" for name, value in [*thresholds.items()][:SHOWN_LABELS])
        more = (
            f" and {len(thresholds) - SHOWN_LABELS} more in its config.json" if len(thresholds) > SHOWN_LABELS else ""
        )
        return (
            "*micro F1*: of all labels together. *macro F1*: the mean of the labels' F1. *average precision*: the mean of the labels', whatever the "
            "thresholds. *retained*: the score divided by the teacher's. *agreement*: the share of examples that get the labels that the teacher "
            "gives them. A label is predicted from its threshold on, which each stage has by the F1 of the label on the validation split; the shipped "
            f"model's: {shown}{more}."
        )

    def in_python(self, report: dict[str, Any], model: str) -> str:
        return f"""
            from transformers import pipeline
            classify = pipeline("text-classification", model={json.dumps(model)})
            found = classify({python_text(report)}, top_k=None, truncation=True, max_length={token_limit(report)})
            print([one for one in found if one["score"] >= classify.model.config.thresholds[one["label"]]])
        """

    def in_onnx_runtime(self, report: dict[str, Any], directory: str) -> str:
        then = [
            "probabilities = 1 / (1 + numpy.exp(-logits[0]))",
            'labels = [config["id2label"][str(number)] for number in range(len(probabilities))]',
            'print([label for label, one in zip(labels, probabilities) if one >= config["thresholds"][label]])',
        ]
        return onnx_code(report, directory, *then, imports=["numpy"], reads_config=True)

    def in_javascript(self, report: dict[str, Any], repo_id: str, dtype: str) -> str:
        if is_pair(report):
            return super().in_javascript(report, repo_id, dtype)
        return f"""
            import {{ pipeline }} from "@huggingface/transformers";
            const classify = await pipeline("text-classification", {json.dumps(repo_id)}, {{ dtype: "{dtype}" }});
            const found = await classify("A text.", {{ top_k: null }}), {{ thresholds }} = classify.model.config;
            console.log(found.filter(({{ label, score }}) => score >= thresholds[label]));
        """


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
        check_predictions(stages, references.shape, "examples, labels")
        names, fits = self.label_names, references > 0
        thresholds = thresholds_of(stages, names)
        probabilities = {stage.name: expit(stage.predictions.astype(np.float64)) for stage in stages}
        found = {name: values >= thresholds[name] for name, values in probabilities.items()}
        scores = {
            stage.name: multi_label_metrics(stage.predictions, references, names, thresholds[stage.name])
            for stage in stages
        }
        agreement = {name: float(np.mean((one == found[TEACHER]).all(axis=1))) for name, one in found.items()}
        right = {name: (one == fits).all(axis=1) for name, one in found.items()}
        columns = {
            "reference": _joined_names(fits, names),
            "teacher_probability": _probability(probabilities[TEACHER], fits),
            "shipped_prediction": _joined_names(found[shipped], names),
            "shipped_probability": _probability(probabilities[shipped], found[shipped]),
        }
        report = class_report(stages, names, references.sum(axis=0), len(references)) | {
            "broken_examples": broken_examples(right[TEACHER], right[shipped], self.texts_of(split), columns)
        }
        samples = {}
        for name, one in found.items():
            hits, errors = (one & fits).astype(float), (one != fits).astype(float)
            samples[name] = (*hits.T, *errors.T) if self.balanced else (hits.sum(axis=1), errors.sum(axis=1))
        return Comparison(compared_classes(scores, agreement), report, samples, metric=mean_f1)


def join_texts(data: Examples, most: int, seed: int) -> Examples:
    """Examples of several labels out of such of one class: each text, and with it up to `most` - 1 others of its split, in any order.

    No text is in two splits, since the splits were there before. The hashes stay those of the texts.
    """
    if "text_pair" in data.splits["train"].column_names:
        raise InputError(
            "expected single texts for --joined_texts, found pairs. Leave --text_pair_column or --joined_texts out."
        )
    splits = {}
    for number_of_split, (name, split) in enumerate(data.splits.items()):
        random = np.random.default_rng([seed, number_of_split])
        texts, classes = split["text"][:], np.asarray(split["label"][:])
        rows: dict[str, list[Any]] = {"text": [], "label": []}
        for index, others in enumerate(random.integers(0, most, len(split))):
            parts = random.permutation([index, *random.integers(0, len(split), others)])
            rows["text"].append(" / ".join(texts[part].strip() for part in parts))
            rows["label"].append(np.isin(np.arange(len(data.label_names)), classes[parts]).astype(int).tolist())
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.List(datasets.Value("int8"))})
        splits[name] = datasets.Dataset.from_dict(rows, features)
    counts = {
        name: dict(zip(data.label_names, np.sum(split["label"][:], axis=0).tolist(), strict=True))
        for name, split in splits.items()
    }
    details = data.details | {"classes": counts, "joined_texts": most}
    fingerprint = digest([data.fingerprint, "joined", most, seed])
    return replace(data, splits=datasets.DatasetDict(splits), details=details, fingerprint=fingerprint)


def thresholds_of(stages: list[StageResult], label_names: list[str]) -> dict[str, np.ndarray]:
    """By the name of each stage the thresholds (labels,) that were chosen for it on the validation split, or for the model that
    it is the exported form of; 0.5 where neither was scored there."""
    made = {fingerprint(stage.record): stage.record for stage in stages}
    found = {}
    for stage in stages:
        record = (
            stage.record if stage.record["metrics"] else made.get(stage.record["made_by"]["source_fingerprint"], {})
        )
        chosen = record.get("metrics", {}).get("validation", {}).get(THRESHOLDS, {})
        found[stage.name] = np.array([chosen.get(label, 0.5) for label in label_names])
    return found


def mean_f1(*counts: np.ndarray) -> np.ndarray:
    """Over the last axis, of hits and then of errors, of all labels together or of each: the mean of the labels that occur or are predicted."""
    half = len(counts) // 2
    hits, errors = (np.stack(part).sum(axis=-1) for part in (counts[:half], counts[half:]))
    seen = hits + errors > 0
    scores = 2 * hits / np.where(seen, 2 * hits + errors, 1)
    return np.asarray((scores * seen).sum(axis=0) / np.maximum(seen.sum(axis=0), 1))


def _joined_names(fits: np.ndarray, label_names: list[str]) -> np.ndarray:
    names = np.array(label_names, dtype=object)
    return np.array([", ".join(names[row]) or "none" for row in fits])


def _probability(probabilities: np.ndarray, fits: np.ndarray) -> np.ndarray:
    """That of all labels of each example being as they are in `fits`, were each independent of the others."""
    return np.where(fits, probabilities, 1 - probabilities).prod(axis=1)
