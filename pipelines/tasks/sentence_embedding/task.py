"""A text becomes a vector whose cosine with another's says how alike the two are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.preprocessing import FunctionTransformer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModel, DataCollatorWithPadding, PreTrainedTokenizerFast

from pipelines.core.config import DataConfig, DistillConfig
from pipelines.core.errors import InputError
from pipelines.core.task import (
    IGNORED,
    TRANSFER,
    Arrays,
    Candidates,
    Collate,
    Comparison,
    Head,
    Presentation,
    StageResult,
    Tensors,
)
from pipelines.data.examples import Examples
from pipelines.data.text import length_of, map_kept
from pipelines.edge.bundle import text_probes, verify_predictor
from pipelines.models.embedder import SETTINGS, StaticVectorsConfig, embedder_config, load_embedder, width_of
from pipelines.models.predict import predict_torch
from pipelines.tasks.base import changed_settings
from pipelines.tasks.baselines import Choices
from pipelines.tasks.ranking import METRICS, Bm25, Retriever, Tfidf, means, metrics_of_ranks
from pipelines.tasks.sentence_embedding import losses, scores
from pipelines.tasks.sentence_embedding.data import (
    CORPUS,
    EmbeddingConfig,
    is_paired,
    load_pairs,
    queries_and_corpus,
    single_texts,
)
from pipelines.tasks.sentence_embedding.report import EmbedderPresentation, compare_embedders
from pipelines.tasks.text_regression import regression_metrics
from pipelines.tasks.texts import TextTask
from pipelines.training.losses import ClassifierLoss

OUTPUT = "sentence_embedding"
TOKENS = ("input_ids", "attention_mask", "token_type_ids")
PCA_TEXTS = 2_000


class SentenceEmbedding(ClassifierLoss, TextTask):
    """A text becomes a vector. It is learnt from the teacher's vectors, and where there are pairs from these."""

    name = "sentence-embedding"
    presentation: Presentation = EmbedderPresentation()
    settings = (DataConfig, EmbeddingConfig)
    defaults: Mapping[str, Any] = {"teacher_epochs": 0.0}  # an embedder that is trained already
    demo = "minilm_bbc_retrieval"
    auto_class = AutoModel
    lora_settings: dict[str, Any] = {"task_type": "FEATURE_EXTRACTION", "target_modules": "all-linear"}
    student_kinds = {"static": StaticVectorsConfig}
    label_names: list[str] = []
    graph_outputs = ["token_embeddings", OUTPUT]
    has_distributions = False
    better_teacher = (
        "Use an embedder that is trained, the pooling that it was trained with, or pairs that belong together."
    )
    # Of texts alone; see __init__ for pairs.
    primary_metric = "overlap_at_10"
    metrics: Mapping[str, bool] = dict.fromkeys(("overlap_at_10", "similarity_spearman"), True)
    _reads_pairs = False

    def __init__(self, config: DataConfig, embedding: EmbeddingConfig | None = None) -> None:
        super().__init__(config)
        self.embedding = embedding or EmbeddingConfig()
        self._references: dict[str, np.ndarray] = {}  # the vectors of --reference_model, by split
        if self.embedding.score_column is not None:
            self.primary_metric, self.metrics = "spearman", dict.fromkeys(("spearman", "pearson"), True)
        elif self.searches:
            self.primary_metric, self.metrics = "mrr_at_10", dict.fromkeys(METRICS, True)

    @classmethod
    def recognizes(cls, config: dict[str, Any]) -> bool:
        return SETTINGS in config

    @property
    def searches(self) -> bool:
        """Whether queries are to find their positives."""
        has_pairs = self.config.text_pair_column is not None or self.embedding.title_pairs is not None
        return has_pairs and self.embedding.score_column is None

    @property
    def learns_pairs(self) -> bool:
        return self.embedding.learn_from == "pairs"

    # ---- Data

    @property
    def read_as(self) -> str:
        return f"{self.name} {self.embedding.title_pairs} {self.embedding.score_column}"

    def describe(self) -> dict[str, Any]:
        return super().describe() | changed_settings(self.embedding)

    def load_data(self) -> Examples:
        examples = load_pairs(self.config, self.embedding)
        if self.learns_pairs and not is_paired(examples):
            raise InputError(
                "expected pairs with --learn_from pairs, found single texts. Name --text_pair_column, or pass --title_pairs."
            )
        if not (is_paired(examples) or self.embedding.reference_model):
            raise InputError(
                "expected pairs (--text_pair_column, --title_pairs), or for single texts the embedder by whose neighbours models are scored, "
                "found neither. Pass --reference_model, as a rule the teacher."
            )
        return examples

    @cached_property
    def rows(self) -> Examples:
        """The splits as rows of one text each."""
        return single_texts(self.data, self.embedding)

    def features(self, processor: Any, data: Examples | None = None) -> Any:
        """The tokens of each text; with --learn_from pairs a training example has those of two, in lists. Two neighbours of a transfer set
        are one, of which only the teacher's vectors are learnt."""
        rows = self.rows if data is None else data
        if data is not None and is_paired(data):  # of a transfer set, which else stays on disk
            rows = single_texts(data, self.embedding)
        found = super().features(processor, rows)
        learnt = "train" if data is None else TRANSFER
        return {**found, learnt: _in_pairs(found[learnt])} if self.learns_pairs else found

    def collate(self, processor: Any) -> Collate:
        """One text after the other, so that a batch has two rows of tokens for each pair."""
        left_out = {"length", "token_type_ids"} - {*processor.model_input_names}
        return partial(_collate, DataCollatorWithPadding(processor), left_out)

    def texts_of(self, split: str = "test") -> list[str]:
        return list(self.rows.splits[split]["text"])

    # ---- Models

    def load_processor(self, source: str) -> Any:
        """The tokenizer, for a static embedder without special tokens, as sentence-transformers reads it."""
        tokenizer = super().load_processor(source)
        if not isinstance(self.load_config(source), StaticVectorsConfig):
            return tokenizer
        backend = tokenizer.backend_tokenizer
        backend.post_processor = TemplateProcessing(single="$A", pair="$A $B")
        # Not the teacher's class, which would put them back.
        settings = {
            name: getattr(tokenizer, name) for name in ("pad_token", "unk_token", "padding_side", "truncation_side")
        }
        names = ["input_ids", "attention_mask"]
        return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **settings)

    def input_sizes(self, source: str) -> dict[str, Any]:
        tokenizer = self.load_processor(source)
        special = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
        return super().input_sizes(source) | special

    def load_config(self, source: str) -> Any:
        return embedder_config(source, self.embedding.pooling, trust_remote_code=self.trust_remote_code)

    def load_model(self, source: str, head: Head = "required", from_scratch: bool = False) -> Any:
        """The embedder in `source`; what follows an encoder is no head, so that none is ever new."""
        if head == "new if other" and not (self.learns_pairs or from_scratch):
            raise InputError(
                "expected --learn_from pairs to train a teacher by (--teacher_epochs above 0), found texts, which say nothing of their "
                "vectors. Pass it, or take an embedder that is trained already with --teacher_epochs 0."
            )
        config = self.checked_config(source, from_scratch)
        getattr(config, SETTINGS)["max_length"] = self.config.max_length
        return load_embedder(source, config, from_scratch, trust_remote_code=self.trust_remote_code)

    def fit_outputs(self, student: Any, teacher_source: str) -> None:
        """Append a Dense module where the student's vectors have another size than they shall have: a smaller one of the teacher's width
        begins as the principal components of the teacher's vectors."""
        teacher = width_of(self.load_config(teacher_source))
        size, width = self.embedding.vector_size or teacher, width_of(student.config)
        if size != width:
            weight = None
            if size < width == teacher:
                vectors = self._vectors(teacher_source, "validation", PCA_TEXTS)
                weight = np.linalg.svd(vectors, full_matrices=False)[2][:size]
            # What is drawn is the same whatever was drawn before.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                student.append_dense(size, weight if weight is not None and len(weight) == size else None)

    def _vectors(self, source: str, split: str, most: int | None = None) -> np.ndarray:
        """The vectors (rows, size) that the embedder in `source` makes of a split."""
        processor = self.load_processor(source)
        features = self.features(processor)[split]
        features = features.select(range(min(most or len(features), len(features))))
        return predict_torch(self.load_model(source), features, self.collate(processor), self, name="reference")

    def align_labels(self, model: Any, source: str) -> None:
        """Nothing: there are no labels."""

    def guess(self, config: Any) -> float:
        """Of a search 1 / place, of any place as likely as another."""
        if not self.searches:
            return 0.0
        corpus = (np.asarray(self.rows.splits["validation"]["label"][:]) == CORPUS).sum()
        return float((1 / np.arange(1, min(10, corpus) + 1)).sum() / corpus)

    # ---- Losses

    def outputs(self, model_output: Any) -> Tensors:
        return {OUTPUT: model_output.sentence_embedding}

    def predictions(self, outputs: Tensors, labels: Tensor) -> Tensor:
        return outputs[OUTPUT]

    def label_loss(self, outputs: Tensors, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Of pairs multiple negatives, or the squared error of their cosine; of single texts there is nothing to learn but the teacher."""
        vectors, counted = outputs[OUTPUT].float(), labels.ne(IGNORED)
        if len(vectors) == len(labels):
            return vectors.sum() * 0, counted.sum()
        pairs = vectors.unflatten(0, (-1, 2))[counted]
        if self.embedding.score_column is None:
            return losses.multiple_negatives(pairs), counted.sum()
        least, most = self._score_range
        wanted = (labels[counted] - least) / (most - least)
        return (torch.cosine_similarity(pairs[:, 0], pairs[:, 1]) - wanted).pow(2).sum(), counted.sum()

    @cached_property
    def _score_range(self) -> tuple[float, float]:
        found = np.asarray(self.data.splits["train"]["label"][:])
        return float(found.min()), float(found.max())

    divergences = ("forward_kl",)  # the default, which does nothing
    unlike_classes = "vectors are no distributions, and have --vector_loss and --similarity_weight"

    def check_soft_loss(self, distill: DistillConfig, teachers: int = 1) -> None:
        """Raise InputError for settings of distributions over classes, and where there is nothing to learn."""
        super().check_soft_loss(distill, teachers)
        if distill.soft_target_weight == 0 and not self.learns_pairs and not distill.needs_teacher:
            raise InputError(
                "expected --learn_from pairs with --soft_target_weight 0, found texts: there is nothing to learn."
            )

    def soft_targets(self, outputs: Tensors, distill: DistillConfig) -> Tensors:
        vectors = outputs[OUTPUT].float()
        return {f"teacher_{OUTPUT}": vectors.unflatten(0, (-1, 2)) if self.learns_pairs else vectors}

    def soft_loss(self, outputs: Tensors, teacher: Tensors, labels: Tensor, distill: DistillConfig) -> Tensor:
        settings, vectors = self.embedding, outputs[OUTPUT].float()
        each = len(vectors) // len(labels)
        counted = labels.ne(IGNORED).repeat_interleave(each)
        wanted = teacher[f"teacher_{OUTPUT}"].float().reshape(len(vectors), -1)[counted]
        found = vectors[counted]
        if found.shape[1] == wanted.shape[1]:
            loss = losses.vector_loss(found, wanted, settings.vector_loss)
        else:
            loss = losses.similarity_error(found, wanted)
        for size in settings.sizes:
            loss = loss + losses.similarity_error(found[:, :size], wanted)
        if settings.similarity_weight > 0:
            divergence = losses.similarity_divergence(found, wanted, settings.similarity_temperature)
            loss = loss + settings.similarity_weight * divergence
        loss = loss / each
        if settings.margin_weight > 0:
            pairs = (one.unflatten(0, (-1, 2)) for one in (found, wanted))
            loss = loss + settings.margin_weight * losses.margin_error(*pairs)
        return loss

    def token_weights(self, inputs: Tensors, labels: Tensor, tokens: int) -> Tensor:
        each = len(inputs["input_ids"]) // len(labels)
        return super().token_weights(inputs, labels.repeat_interleave(each), tokens) / each

    # ---- Scores

    def scores(self, predictions: np.ndarray, references: Any, split: str | None = None) -> dict[str, Any]:
        """Of vectors (rows, size) against the labels of single_texts(); of a baseline that searches, of ranks (queries,)."""
        labels = np.asarray(references)
        if self.searches:
            return means(metrics_of_ranks(scores.ranks_of(predictions, labels)))
        if self.embedding.score_column is not None:
            found = scores.cosines_of(predictions)
            metrics = regression_metrics(found, labels[: len(found)])
            return {name: metrics[name] for name in self.metrics}
        own, wanted = (
            scores.likeness(one, labels, False) for one in (predictions, self._reference(split or "validation"))
        )
        near = float(scores.overlap(own, wanted).mean())
        return {"overlap_at_10": near, "similarity_spearman": scores.rank_correlation(own, wanted)}

    def _reference(self, split: str) -> np.ndarray:
        if split not in self._references:
            self._references[split] = self._vectors(str(self.embedding.reference_model), split)
        return self._references[split]

    # An index that was made in fp32 is searched with int8 vectors, too.
    least: Mapping[str, float] = {"cosine_to_fp32": 0.9}

    def nearness(self, predictions: np.ndarray, exact: np.ndarray) -> dict[str, float]:
        """The mean cosine of each text's two vectors."""
        return {"cosine_to_fp32": float(scores.cosines(predictions, exact).mean())}

    # ---- Baselines

    @property
    def baselines(self) -> Mapping[str, Candidates]:
        if not self.searches:
            return {}
        return {"bm25": partial(_retriever, Bm25), "tfidf": partial(_retriever, Tfidf)}

    def baseline_inputs(self, examples: Dataset) -> list[str]:
        """Queries and corpus as text, each with what queries_and_corpus() says of it and a tab before it, as Retriever
        reads them."""
        most = self.embedding.corpus_size if examples is self.splits["test"] else 0
        texts, labels = queries_and_corpus(self.data, examples, most)
        return [f"{label}\t{text}" for text, label in zip(texts, labels.tolist(), strict=True)]

    def baseline_predictions(self, estimator: Any, inputs: Any) -> np.ndarray:
        """The rank of each query's positive (queries,)."""
        retriever = estimator[-1] if hasattr(estimator, "steps") else estimator
        return np.asarray(retriever.ranks(inputs))

    # ---- ONNX

    def lengths_alone(self, split: str) -> list[float]:
        """A search asks one query at a time, of a corpus that was read before."""
        rows = self.rows.splits[split]
        alone = (np.asarray(rows["label"][:]) != CORPUS).sum() if self.searches else len(rows)
        return [length_of(text) for text in rows["text"][:alone]]

    def run_model(self, model: Any, feed: Arrays) -> Arrays:
        with torch.inference_mode():
            found = model(**{name: torch.from_numpy(array) for name, array in feed.items()})
        return self.without_padding({name: found[name].numpy() for name in self.graph_outputs}, feed)

    def without_padding(self, outputs: Arrays, feed: Arrays) -> Arrays:
        outputs["token_embeddings"] = outputs["token_embeddings"] * feed["attention_mask"][..., None]
        return outputs

    # ---- Report

    def compare(self, stages: list[StageResult], processor: Any, shipped: str, split: str = "test") -> Comparison:
        labels = np.asarray(self.rows.splits[split]["label"][:])
        score = partial(self.scores, references=labels, split=split)
        sample = partial(self._sample, labels=labels, split=split)
        sizes = self.embedding.sizes
        return compare_embedders(stages, labels, self.texts_of(split), self.searches, sizes, score, sample, shipped)

    def _sample(self, predictions: np.ndarray, labels: np.ndarray, split: str) -> tuple[np.ndarray, ...]:
        """What the primary metric of a stage is computed from: see core.task.Comparison."""
        if self.searches:
            return (metrics_of_ranks(scores.ranks_of(predictions, labels))[self.primary_metric],)
        if self.embedding.score_column is not None:
            found = scores.cosines_of(predictions)
            return found, labels[: len(found)]
        wanted = scores.likeness(self._reference(split), labels, False)
        return (scores.overlap(scores.likeness(predictions, labels, False), wanted),)

    # ---- Bundle

    def verify_bundle(self, directory: Path, processor: Any) -> dict[str, Any]:
        probes = text_probes(processor, False, self.config.max_length)
        return verify_predictor(directory, self, processor, probes, self.rows.splits["validation"])


def _retriever(kind: Any, inputs: Any, labels: np.ndarray) -> Choices:
    yield FunctionTransformer(), [Retriever(kind)]


def _in_pairs(rows: Dataset) -> Dataset:
    """Every two rows as one: their tokens in lists, the label of the first, the larger length. An odd last row is left out."""

    def join(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = {name: [values[at : at + 2] for at in range(0, len(values), 2)] for name, values in batch.items()}
        return joined | {"labels": batch["labels"][::2], "length": [max(both) for both in joined["length"]]}

    even = rows.select(range(len(rows) // 2 * 2))
    return map_kept(even, join, "pairs", [rows._fingerprint], remove_columns=rows.column_names)


def _collate(pad: Any, left_out: set[str], rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    # At module level, so that the workers of a DataLoader can receive it pickled.
    names = [name for name in TOKENS if name in rows[0] and name not in left_out]
    tokens = []
    for row in rows:
        texts = zip(*(row[name] for name in names), strict=True)
        if isinstance(row[names[0]][0], list):
            tokens += [dict(zip(names, text, strict=True)) for text in texts]
        else:
            tokens.append({name: row[name] for name in names})
    # Scores are float64 for Python, and nothing else is.
    others = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name not in (*TOKENS, *left_out)}
    return dict(pad(tokens)) | {
        name: torch.from_numpy(values.astype(np.float32) if values.dtype == np.float64 else values)
        for name, values in others.items()
    }
