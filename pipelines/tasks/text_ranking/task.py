"""The task: a cross-encoder reads a query and a passage together and gives one score, by which candidates are ranked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from pipelines.core.config import DataConfig, DistillConfig
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, Candidates, Comparison, Head, StageResult, Tensors, Workload
from pipelines.data.examples import Examples
from pipelines.onnx.measure import encoder_workload, timing_feeds
from pipelines.report.pages import TEACHER
from pipelines.tasks import baselines
from pipelines.tasks.base import changed_settings, check_predictions, mean, worse_examples
from pipelines.tasks.ranking import METRICS, means, metrics_of_groups
from pipelines.tasks.text_ranking import baselines as orders
from pipelines.tasks.text_ranking.candidates import PASSAGE, RankingConfig, load_rankings
from pipelines.tasks.text_ranking.report import BATCH, LARGE_BATCH, RankingPresentation
from pipelines.tasks.text_regression import TextRegression, check_scores

# The numbers of a reference: the label of a pair, and which query it belongs to. The trainer divides by all of them.
REFERENCE = 2
# CrossEncoder of sentence-transformers then gives the logits, as the bundle does.
LOGITS = {"activation_fn": "torch.nn.modules.linear.Identity"}


def margin_loss(errors: Tensor, same_query: Tensor) -> Tensor:
    """The mean squared difference between the error of each candidate (pairs,) and those of the other candidates of its query: MarginMSE
    (Hofstätter et al., 2020), of all pairs of candidates. A candidate that is alone has its squared error."""
    others = same_query.sum(dim=-1) - 1
    squares = ((errors[:, None] - errors[None]).pow(2) * same_query).sum(dim=-1) / others.clamp(min=1)
    return torch.where(others > 0, squares, errors.pow(2))


def listwise_loss(logits: Tensor, relevance: Tensor, same_query: Tensor) -> Tensor:
    """The cross entropy of a softmax over the candidates of each query (ListNet; Cao et al., 2007), a part for each of them (pairs,) whose
    mean over the query's candidates it is. A candidate that is alone has its binary cross entropy."""
    rest = logits[None].masked_fill(~same_query, -torch.inf).logsumexp(dim=-1)
    count, total = same_query.sum(dim=-1), (same_query * relevance[None]).sum(dim=-1)
    share = relevance / total.clamp(min=1e-9)
    alone = F.binary_cross_entropy_with_logits(logits, (relevance > 0).float(), reduction="none")
    return torch.where(count > 1, count * share * (rest - logits), alone)


class TextRanking(TextRegression):
    """A query and a passage, and how well the one answers the other. Labels are pairs (label, number of the query)."""

    name = "text-ranking"
    presentation = RankingPresentation()
    settings = (DataConfig, RankingConfig)
    demo = "minilm_bbc_reranking"
    primary_metric = "mrr_at_10"
    metrics: Mapping[str, bool] = dict.fromkeys(METRICS, True)
    no_transfer = (
        "Put the pairs into the training split, with the scores of another model as their labels (--relevance graded)."
    )

    def __init__(self, config: DataConfig, ranking: RankingConfig | None = None) -> None:
        ranking = ranking or RankingConfig()
        if ranking.title_pairs is not None:
            config = replace(config, text_pair_column=PASSAGE)
        super().__init__(config)
        self.ranking = ranking
        if ranking.relevance == "graded":
            self.primary_metric, self.presentation = "ndcg_at_10", RankingPresentation(other_metric="mrr_at_10")

    @classmethod
    def recognizes(cls, config: dict[str, Any]) -> bool:
        """A cross-encoder of sentence-transformers with one output."""
        marks = {"sentence_transformers", "sbert_ce_default_activation_function"} & config.keys()
        has_one = len(config.get("id2label") or range(2)) == 1
        return super(TextRegression, cls).recognizes(config) and bool(marks) and has_one

    def describe(self) -> dict[str, Any]:
        return super().describe() | changed_settings(self.ranking)

    # ---- Data

    @property
    def read_as(self) -> str:
        return f"{self.name} {self.ranking.read_as}"

    def load_data(self) -> Examples:
        if self.config.text_pair_column is None:
            raise InputError(
                "expected a column of passages for --task text-ranking, found none. Name it with --text_pair_column, and that of the queries with "
                "--text_column; or pass --tfidf_candidates and --title_pairs for single texts."
            )
        examples = load_rankings(self.config, self.ranking)
        loss, column = self.ranking.label_loss, self.config.label_column
        most = {"binary_cross_entropy": 1.0, "listwise": np.inf}.get(loss)
        for name, split in examples.splits.items():
            labels = np.asarray(split["label"][:])[:, 0]
            check_scores(labels, name, column)
            others = labels[~np.isin(labels, (0, 1))]
            if self.ranking.relevance == "binary" and len(others):
                raise InputError(
                    f"expected labels 0 and 1 in the column {column!r}, found {others[0]:g} in the {name} split. For scores pass "
                    "--relevance graded."
                )
            if most is not None and not 0 <= labels.min() <= labels.max() <= most:
                raise InputError(
                    f"expected labels from 0 to {most:g} for --ranking_loss {loss}, found {labels.min():g} to {labels.max():g} in the {name} "
                    "split. Pass --ranking_loss squared_error or margin."
                )
        return examples

    def features(self, processor: Any, data: Examples | None = None) -> Any:
        """The tokenized splits, with the number of the query as `group`."""
        features = super().features(processor, data)
        if "group" not in features["train"].column_names:
            for name, split in features.items():
                groups = np.asarray(split["labels"][:])[:, 1].astype(np.int64)
                features[name] = split.add_column("group", groups)
        return features

    # ---- Models

    def load_model(self, source: str, head: Head = "required", from_scratch: bool = False) -> Any:
        model = super().load_model(source, head, from_scratch)
        model.config.sentence_transformers = LOGITS
        return model

    def guess(self, config: Any) -> float:
        """What an order at random scores."""
        references = np.asarray(self.splits["validation"]["label"][:])
        scores = self.scores(np.random.default_rng(0).random(len(references)), references)
        return float(scores[self.primary_metric])

    # ---- Losses: of pairs, or of the candidates of a query that are in one batch. The trainer divides by all numbers of the references

    @cached_property
    def _labels(self) -> np.ndarray:
        return np.asarray(self.splits["train"]["label"][:], np.float64)[:, 0]

    def label_loss(self, outputs: Tensors, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        logits, targets, same_query = _of_pairs(outputs["logits"][:, 0], labels[:, 0], labels)
        losses = {
            "binary_cross_entropy": lambda: F.binary_cross_entropy_with_logits(logits, targets, reduction="none"),
            "listwise": lambda: listwise_loss(logits, targets, same_query),
            "squared_error": lambda: (logits - targets).pow(2),
            "margin": lambda: margin_loss(logits - targets, same_query),
        }
        return REFERENCE * losses[self.ranking.label_loss]().sum(), labels.ne(IGNORED).sum()

    def soft_loss(self, outputs: Tensors, teacher: Tensors, labels: Tensor, distill: DistillConfig) -> Tensor:
        logits, targets, same_query = _of_pairs(outputs["logits"][:, 0], teacher["teacher_logits"][:, 0], labels)
        errors = logits - targets
        is_margin = self.ranking.soft_ranking_loss == "margin"
        return REFERENCE * (margin_loss(errors, same_query) if is_margin else errors.pow(2)).sum()

    def token_weights(self, inputs: Tensors, labels: Tensor, tokens: int) -> Tensor:
        return REFERENCE * super().token_weights(inputs, labels[:, 0], tokens)

    # ---- Scores, one number a query

    def scores(self, predictions: np.ndarray, references: Any, split: str | None = None) -> dict[str, Any]:
        return means(ranking_metrics(predictions, references))

    # ---- Baselines

    @property
    def baselines(self) -> Mapping[str, Candidates]:
        has_order = self.ranking.first_stage or self.ranking.tfidf_candidates is not None
        first: dict[str, Candidates] = (
            {"first_stage": orders.first_stage} if has_order else {"mean_score": baselines.mean_score}
        )
        return {**first, "bm25": orders.bm25}

    def baseline_inputs(self, examples: Dataset) -> Any:
        """Triples: the query, the passage, and its place among the candidates."""
        queries = pandas.Series(np.asarray(examples["label"][:])[:, 1])
        place = map(str, queries.groupby(queries).cumcount())
        return list(zip(examples["text"], examples["text_pair"], place, strict=True))

    def baseline_predictions(self, estimator: Any, inputs: Any) -> np.ndarray:
        found = super().baseline_predictions(estimator, inputs)
        return found.reshape(len(found), -1)[:, 0]

    # ---- ONNX, bundle and report

    def workload(self, directory: Path, split: str) -> Workload:
        """Throughput in batches of two sizes, as candidates come."""
        processor = self.load_processor(str(directory))
        features, collate = self.features(processor)[split], self.collate(processor)
        larger = {LARGE_BATCH: timing_feeds(features, collate, LARGE_BATCH)[1]}
        return encoder_workload(*timing_feeds(features, collate, BATCH, self.lengths_alone(split)), larger)

    def bundle_settings(self, directory: Path, processor: Any) -> dict[str, Any]:
        settings = super().bundle_settings(directory, processor)
        settings["outputs"]["ranks"] = True
        return settings

    def compare(self, stages: list[StageResult], processor: Any, shipped: str, split: str = "test") -> Comparison:
        examples = self.splits[split]
        references = np.asarray(examples["label"][:])
        check_predictions(stages, (len(references),), "pairs")
        found = {stage.name: ranking_metrics(stage.predictions, references) for stage in stages}
        first = {stage.name: first_candidates(stage.predictions, references) for stage in stages}
        compared = {
            name: {
                "metrics": means(metrics),
                "agreement": float(np.mean(first[name] == first[TEACHER])),
            }
            for name, metrics in found.items()
        }
        of_query = {name: metrics[self.primary_metric] for name, metrics in found.items()}
        loss = of_query[TEACHER] - of_query[shipped]
        passages = np.asarray(examples["text_pair"][:], object)
        report: dict[str, Any] = {
            "test_examples": len(loss),
            "test_pairs": len(references),
            "without_relevant": int(np.sum(pandas.Series(_relevance(references)).groupby(references[:, 1]).max() == 0)),
            "worse_examples": worse_examples(
                loss,
                [examples[int(row)]["text"] for row in first[TEACHER]],
                teacher=of_query[TEACHER],
                shipped=of_query[shipped],
            ),
        }
        for one in report["worse_examples"]["examples"]:
            one["passage"] = passages[first[shipped][one["index"]]]
        samples = {name: (values,) for name, values in of_query.items()}
        return Comparison(compared, report, samples, mean)


def _of_pairs(logits: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What counts of logits and targets (pairs,), in float32, and which of these pairs (pairs, pairs) have the same query."""
    counted = labels[:, 0].ne(IGNORED)
    query = labels[counted, 1]
    return logits[counted].float(), targets[counted].float(), query[:, None] == query[None]


def _relevance(references: np.ndarray) -> np.ndarray:
    """How relevant each candidate is, from 0 on: labels of a query that go below 0 are counted from its lowest."""
    labels = pandas.Series(np.asarray(references[:, 0], np.float64))
    return np.asarray(labels - labels.groupby(references[:, 1]).transform("min").clip(upper=0))


def ranking_metrics(scores: np.ndarray, references: Any) -> dict[str, np.ndarray]:
    """The metrics of each query, in the order of their numbers; references are (pairs, 2): label and query."""
    references = np.asarray(references)
    return metrics_of_groups(np.asarray(scores, np.float64), _relevance(references), references[:, 1])


def first_candidates(scores: np.ndarray, references: np.ndarray) -> np.ndarray:
    """The row of the candidate with the highest score, for each query in the order of their numbers."""
    order = np.lexsort((-np.asarray(scores, np.float64), references[:, 1]))
    return order[np.unique(references[order, 1], return_index=True)[1]]
