"""What the report of a model that gives any number of labels has of its own: what is compared, and how its pages say it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from pipelines.core.records import fingerprint
from pipelines.core.task import Comparison, StageResult
from pipelines.report.markdown import escape
from pipelines.report.pages import TEACHER, stage_of
from pipelines.tasks.base import check_predictions
from pipelines.tasks.classification import broken_examples, class_report, compared_classes
from pipelines.tasks.metrics import multi_label_metrics
from pipelines.tasks.text_classification import TextClassifierPresentation
from pipelines.tasks.texts import is_pair, onnx_code, python_text, token_limit

THRESHOLDS = "thresholds"  # our own key in config.json, and in the scores
SHOWN_LABELS = 50


def compare_label_sets(
    stages: list[StageResult],
    references: np.ndarray,
    texts: list[str],
    label_names: list[str],
    shipped: str,
    balanced: bool,
) -> Comparison:
    """What a report says of models that give `texts` any number of labels; `references` are 1 or 0 (examples, labels)."""
    check_predictions(stages, references.shape, "examples, labels")
    fits = references > 0
    thresholds = thresholds_of(stages, label_names)
    probabilities = {stage.name: expit(stage.predictions.astype(np.float64)) for stage in stages}
    found = {name: values >= thresholds[name] for name, values in probabilities.items()}
    scores = {
        stage.name: multi_label_metrics(stage.predictions, references, label_names, thresholds[stage.name])
        for stage in stages
    }
    agreement = {name: float(np.mean((one == found[TEACHER]).all(axis=1))) for name, one in found.items()}
    right = {name: (one == fits).all(axis=1) for name, one in found.items()}
    columns = {
        "reference": _joined_names(fits, label_names),
        "teacher_probability": _probability(probabilities[TEACHER], fits),
        "shipped_prediction": _joined_names(found[shipped], label_names),
        "shipped_probability": _probability(probabilities[shipped], found[shipped]),
    }
    report = class_report(stages, label_names, references.sum(axis=0), len(references)) | {
        "broken_examples": broken_examples(right[TEACHER], right[shipped], texts, columns)
    }
    samples = {}
    for name, one in found.items():
        hits, errors = (one & fits).astype(float), (one != fits).astype(float)
        samples[name] = (*hits.T, *errors.T) if balanced else (hits.sum(axis=1), errors.sum(axis=1))
    return Comparison(compared_classes(scores, agreement), report, samples, metric=mean_f1)


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
