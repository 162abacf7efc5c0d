"""A label for every word of a text, which may be part of a span: named entities, personal data, parts of speech."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor
from transformers import AutoModelForTokenClassification, AutoTokenizer

from pipelines.core.config import Checked, DataConfig, DistillConfig, flag
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.task import IGNORED, Candidates, Collate, Comparison, Presentation, StageResult, Tensors
from pipelines.data.examples import Examples
from pipelines.data.kinds import Source
from pipelines.data.tagged import load_tagged, tag_windows
from pipelines.data.text import TEXTS
from pipelines.edge.bundle import VERIFIED_EXAMPLES, text_inputs, text_probes, verify_predictor
from pipelines.edge.settings import head_outputs
from pipelines.runtime import infer
from pipelines.runtime.spans import OUTSIDE, OVERLAP
from pipelines.tasks.base import BaseTask, check_predictions
from pipelines.tasks.classification import Classification
from pipelines.tasks.texts import TextTask
from pipelines.tasks.token_classification import baselines
from pipelines.tasks.token_classification.alignment import AlignedSoftTargets
from pipelines.tasks.token_classification.entities import entities, entity_metrics
from pipelines.tasks.token_classification.made import made_texts
from pipelines.tasks.token_classification.report import TokenPresentation, compare_entities
from pipelines.training.soft_targets import WithSoftTargets

ORDER_WORDS = 10  # of a tag; fewer may be predicted as another by chance


@dataclass
class TokenConfig(Checked):
    OF_DATA: ClassVar = ("made_texts",)  # for parse_config()

    subtokens: str = flag(
        "all",
        "Which tokens of a word have a label in training: its first one, or all, the others that of the inside of the word's span. "
        "transformers' pipeline and the bundle read all; scores are those of first tokens either way.",
        choices=["all", "first"],
    )
    made_texts: Annotated[int | None, "at least 100"] = flag(
        None,
        "Make so many texts with invented personal data (with the package faker) in place of a --dataset: the demo.",
    )


class TokenClassification(TextTask, Classification):
    """A label for every word of a text; texts longer than --max_length are read in windows that overlap."""

    name = "token-classification"
    presentation: Presentation = TokenPresentation()
    settings = (DataConfig, TokenConfig)
    examples_of = TEXTS
    auto_class: Any = AutoModelForTokenClassification
    architectures = ("ForTokenClassification",)
    demo = "bert_pii"
    lora_settings: dict[str, Any] = {"task_type": "TOKEN_CLS", "target_modules": "all-linear"}
    student_kinds: dict[str, Any] = {}  # those read a text as a whole
    reads_parts = False
    reads_windows = True
    primary_metric = "f1"
    metrics: Mapping[str, bool] = dict.fromkeys(("f1", "precision", "recall", "accuracy"), True)

    def __init__(self, config: DataConfig, token: TokenConfig | None = None) -> None:
        super().__init__(config)
        self.token = token or TokenConfig()
        self.overlap = config.max_length // OVERLAP
        if config.dataset is not None and self.token.made_texts:
            raise InputError("expected a --dataset or --made_texts, found both. Leave one out.")
        if config.text_pair_column is not None:
            raise InputError(
                "expected single texts, found --text_pair_column. Leave it out: a tag belongs to a word of one text."
            )

    def load_data(self) -> Examples:
        made = self.token.made_texts
        return load_tagged(self.config, Source(made_texts(made)) if made else None)

    @property
    def read_as(self) -> str:
        return f"{self.name} {self.token.made_texts}"

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"subtokens": self.token.subtokens}

    @property
    def kinds(self) -> list[str]:
        """What is found: types of spans, or the tags themselves where each word has one of its own."""
        return list(
            dict.fromkeys(name.removeprefix("B-") for name in self.label_names if name != OUTSIDE and name[:2] != "I-")
        )

    # ---- Models

    def tokenized(self, data: Examples, processor: Any, key: str) -> Any:
        return tag_windows(data, processor, self.config.max_length, self.overlap, self.token.subtokens == "all")

    def collate(self, processor: Any) -> Collate:
        """A collator that pads a batch to its longest window, labels with IGNORED; stored soft targets are cut to it."""
        return partial(_collate_tokens, super().collate(processor))

    def shares_found(self, references: Any, predictions: Any) -> np.ndarray:
        """Which share of the words of each tag are predicted as which tag (tags, tags); 0 of a tag of few words, which says nothing."""
        found, expected, _ = self.words(predictions, references)
        counts = confusion_matrix(expected, np.nan_to_num(found), labels=range(len(self.label_names)))
        words = counts.sum(axis=1, keepdims=True)
        return np.where(words >= ORDER_WORDS, counts / np.maximum(words, 1), 0)

    def check_teacher(self, metrics: dict[str, Any], config: Any) -> None:
        """Raise InputError for a teacher that finds nothing on the validation split, or gives every word one tag."""
        recalls = [one for kind, one in metrics["recall_per_class"].items() if metrics["examples_per_class"][kind]]
        if sum(recall > 0 for recall in recalls) < (1 if OUTSIDE in self.label_names else min(2, len(recalls))):
            raise InputError(
                f"expected a teacher that knows the task, found one with an F1 of {metrics['f1']:.3f} on the validation split, no better than "
                "guessing. Train it longer or slower (--teacher_epochs, --teacher_learning_rate), or check that its tags mean what the data "
                "set's do."
            )

    # ---- Losses: a classifier's, of every token that has a label

    def with_soft_targets(self, read: Callable[[Any], Any], features: Any, directory: Path, suffix: str) -> Any:
        """The stored soft targets of the same tokens, or, of a teacher with others, of the tokens at the same characters."""
        of_teacher = read(AutoTokenizer.from_pretrained(directory))
        if of_teacher["input_ids"][:] == features["input_ids"][:]:
            return super().with_soft_targets(read, features, directory, suffix)
        return AlignedSoftTargets(features, WithSoftTargets(of_teacher, directory, suffix=suffix))

    def soft_targets(self, outputs: Tensors, distill: DistillConfig) -> Tensors:
        """The logits, filled up to --max_length with zeros, so that all windows have one shape."""
        logits = outputs["logits"].float()
        return {"teacher_logits": torch.nn.functional.pad(logits, (0, 0, 0, self.config.max_length - logits.shape[1]))}

    # ---- Scores

    def predictions(self, outputs: Tensors, labels: Tensor) -> Tensor:
        """The likeliest label of each token, (windows, --max_length) float32: NaN where the logits are not finite, 0 behind the end."""
        logits = outputs["logits"].float()
        found = logits.argmax(dim=-1).float().masked_fill(~logits.isfinite().all(dim=-1), torch.nan)
        return torch.nn.functional.pad(found, (0, self.config.max_length - found.shape[1]))

    def scores(self, predictions: np.ndarray, references: Any, split: str | None = None) -> dict[str, Any]:
        """The scores of `predictions` for windows against their labels; or of a tag for every word, as baselines give, against the column
        `label` of a split."""
        found, expected, documents = self.words(predictions, references)
        tags = [self.tags(numbers) for numbers in (found, expected)]
        predicted, gold = (entities(one, documents) for one in tags)
        return entity_metrics(predicted, gold, self.kinds) | {
            "accuracy": float(np.mean(found == expected)),
            "words": len(expected),
        }

    def tags(self, numbers: np.ndarray) -> list[str]:
        names = [*self.label_names, OUTSIDE]  # -1: no number
        return [names[int(number)] for number in np.nan_to_num(numbers, nan=-1)]

    def words(self, predictions: np.ndarray, references: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every word of all texts, in their order, its predicted tag, its tag, and the number of its document; all (words,)."""
        if predictions.ndim == 1:
            rows = [np.array(label.split(), int) for label in references]
            return predictions, np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        labels = np.full((len(predictions), self.config.max_length), IGNORED)
        for row, own in enumerate(references):
            labels[row, : len(own)] = own[: self.config.max_length]
        counted = labels >= 0
        # A window that goes on with a text begins with tokens that count in the one before, beside the special tokens of all windows.
        leading = np.where(counted.any(axis=1), counted.argmax(axis=1), self.config.max_length)
        begins = leading < leading.min() + max(1, self.overlap // 2)
        documents = np.broadcast_to(np.cumsum(begins)[:, None], labels.shape)
        return predictions[counted], labels[counted], documents[counted] - 1

    # ---- Baselines

    @property
    def baselines(self) -> Mapping[str, Candidates]:
        # Their names are known before the data is read.
        return {
            "usual_tag": lambda texts, labels: baselines.usual_tag(self.label_names),
            "patterns_and_names": lambda texts, labels: baselines.patterns_and_names(self.label_names),
        }

    def baseline_inputs(self, examples: Any) -> list[str]:
        return [
            baselines.marked(text, starts) for text, starts in zip(examples["text"], examples["starts"], strict=True)
        ]

    baseline_predictions = BaseTask.baseline_predictions

    # ---- Report

    def compare(self, stages: list[StageResult], processor: Any, shipped: str, split: str = "test") -> Comparison:
        examples, features = self.data.splits[split], self.features(processor)[split]
        found = [
            (text, word)
            for text, words in zip(features["text_number"], features["words"], strict=True)
            for word in words
        ]
        texts, words = np.array([(text, word) for text, word in found if word != IGNORED]).T
        lengths = [len(starts) for starts in examples["starts"]]
        among_all = (np.cumsum(lengths) - lengths)[texts] + words  # baselines have a tag for words without a token, too
        references = features["labels"][:]

        def by_word(predictions: np.ndarray) -> np.ndarray:
            return predictions[among_all] if predictions.ndim == 1 else self.words(predictions, references)[0]

        stages = [replace(stage, predictions=by_word(stage.predictions)) for stage in stages]
        check_predictions(stages, texts.shape, "words")
        tags = {stage.name: self.tags(stage.predictions) for stage in stages}
        expected = self.tags(self.words(np.zeros((len(references), self.config.max_length)), references)[1])
        return compare_entities(stages, tags, expected, (texts, words), examples, self.kinds, shipped)

    # ---- Bundle

    def bundle_settings(self, directory: Path, processor: Any) -> dict[str, Any]:
        """Texts in windows; the page, whose library says nothing of where tokens are, has the places of the probes' tokens to try its own."""
        inputs = text_inputs(directory, processor, False, self.config.max_length)
        for probe in inputs["probes"]:
            tokens = processor(
                probe["texts"][0],
                truncation=True,
                max_length=self.config.max_length,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
            )
            places = zip(tokens["offset_mapping"], tokens["special_tokens_mask"], strict=True)
            probe["offsets"] = " ".join(f"{start}-{end}" for (start, end), special in places if not special)
        return {"inputs": inputs, "outputs": head_outputs(directory)}

    def verify_bundle(self, directory: Path, processor: Any) -> dict[str, Any]:
        """Compare the runtime's windows and logits with the pipeline's own, of first validation texts; raises VerificationError."""
        rows = self.data.splits["validation"]
        probes = text_probes(processor, False, self.config.max_length)
        found = verify_predictor(directory, self, processor, probes, rows.select([]))
        model = infer.SpanFinder(directory)
        count = min(VERIFIED_EXAMPLES, len(rows))
        features, collate = self.features(processor)["validation"], self.collate(processor)
        names = [value.name for value in model.session.get_inputs()]
        window = 0
        for row in rows.select(range(count)):
            for feed, kept, _ in model.model.windows(row["text"]):
                batch = {name: np.asarray(value) for name, value in collate([features[window]]).items()}
                counted = np.flatnonzero(batch["labels"][0] >= 0)
                if not {*counted} <= {*kept} or any(not np.array_equal(feed[name], batch[name]) for name in names):
                    raise VerificationError(
                        f"expected the bundle's runtime to cut {row['text'][:30]!r} into the windows of {type(processor).__name__}, found others. "
                        "The runtime does not support this tokenizer; ship the ONNX directory instead."
                    )
                window += 1
        return found | {"examples": count, "windows": window}


def _collate_tokens(collate: Collate, rows: list[dict[str, Any]]) -> dict[str, Any]:
    labels = [row["labels"] for row in rows]
    left_out = ("labels", "words", "token_starts", "text_number")
    batch = collate([{name: value for name, value in row.items() if name not in left_out} for row in rows])
    tokens = batch["input_ids"].shape[1]
    padded = [[*own, *[IGNORED] * (tokens - len(own))] for own in labels]
    return {
        **{name: value[:, :tokens] if name.startswith("teacher_logits") else value for name, value in batch.items()},
        "labels": torch.tensor(padded),
    }
