"""Extractive question answering: windows of a context, the logits of where an answer begins and ends, and the answers that they give."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForQuestionAnswering

from pipelines.core.config import DataConfig, DistillConfig
from pipelines.core.disk import digest
from pipelines.core.divergences import DIVERGENCES
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.task import (
    IGNORED,
    Arrays,
    Candidates,
    Comparison,
    Head,
    Presentation,
    StageResult,
    Tensors,
)
from pipelines.data.examples import Examples
from pipelines.data.text import map_kept
from pipelines.edge.bundle import PROBE_TEXTS, VERIFIED_EXAMPLES, page_probe
from pipelines.edge.settings import ANSWERS, head_outputs, text_settings
from pipelines.models.loading import has_tokenizer, name_labels
from pipelines.onnx.predict import run_session
from pipelines.runtime.answers import likeliest_spans
from pipelines.runtime.infer import Answerer
from pipelines.tasks.question_answering import baselines
from pipelines.tasks.question_answering.data import AnswerConfig, load_questions
from pipelines.tasks.question_answering.report import QUESTION, AnswerPresentation, compare_answers
from pipelines.tasks.question_answering.scores import NO_SPAN, answers_of, best_spans, score_answers
from pipelines.tasks.texts import TextTask, of_decoder
from pipelines.training.losses import ClassifierLoss

MASKED = (
    -1e4
)  # the logit of what can be no answer: finite, so that a divergence is, too, whose probability is exactly 0
STARTS, ENDS = "start_logits", "end_logits"
TOKENS = ["input_ids", "attention_mask", "token_type_ids"]
GUESSED_F1 = 0.05  # of a span that was drawn at random


@dataclass
class Windows:
    """What a label stands for: the windows of a split, in their order.

    `places` (windows, 5) are the question's row, the first and last token of the context, and the first and last of the answer, both 0
    (the first token of all) where the window has none. `offsets` has for each window the characters (tokens, 2) of its tokens.
    """

    places: np.ndarray
    offsets: Any


class QuestionAnswering(ClassifierLoss, TextTask):
    """A question and a context, and the part of the context that answers it.

    A label is the number of a window in the task's own tables, from which losses and predictions take what of it is context.
    """

    name = "question-answering"
    presentation: Presentation = AnswerPresentation()
    settings = (DataConfig, AnswerConfig)
    demo = "bert_bbc_speakers"
    auto_class = AutoModelForQuestionAnswering
    architectures = ("ForQuestionAnswering",)
    lora_settings: dict[str, Any] = {"task_type": "QUESTION_ANS", "target_modules": "all-linear"}
    student_kinds = {}
    reads_parts = False
    no_transfer = "Its examples are questions, which plain texts are not: leave it out."
    reads_windows = True
    primary_metric = "f1"
    metrics: Mapping[str, bool] = {"f1": True, "exact_match": True}
    label_names = [STARTS, ENDS]
    graph_outputs = [STARTS, ENDS]

    def __init__(self, config: DataConfig, answer: AnswerConfig) -> None:
        super().__init__(config)
        self.answer = answer
        self.overlap = config.max_length // 4 if answer.overlap is None else answer.overlap
        self._windows: dict[int, Windows] = {}

    # ---- Data

    def load_data(self) -> Examples:
        return load_questions(self.config, self.answer)

    @property
    def read_as(self) -> str:
        settings = {
            name: value for name, value in asdict(self.answer).items() if name not in ("overlap", "max_answer_tokens")
        }
        return f"{self.name} {sorted(settings.items())}"

    @property
    def _reading(self) -> dict[str, int]:
        return {"overlap": self.overlap, "max_answer_tokens": self.answer.max_answer_tokens}

    def describe(self) -> dict[str, Any]:
        return super().describe() | self._reading

    @property
    def unanswerable(self) -> bool:
        """Whether a model may say that there is no answer: some training questions have none."""
        return bool(self.data.details["unanswerable"]["train"])

    def tokenized(self, data: Examples, processor: Any, key: str) -> Any:
        return datasets.DatasetDict(
            {name: self._cut(split, name, processor, key) for name, split in data.splits.items()}
        )

    def _cut(self, split: datasets.Dataset, name: str, tokenizer: Any, key: str) -> datasets.Dataset:
        limit, overlap = self.config.max_length, self.overlap
        room = limit - tokenizer.num_special_tokens_to_add(pair=True) - overlap - 1
        # The call leaves its truncation in the tokenizer.
        tokenizer = copy.deepcopy(tokenizer)

        def cut(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            asked = tokenizer(batch["question"], add_special_tokens=False, truncation=False)["input_ids"]
            longest = max(range(len(asked)), key=lambda row: len(asked[row]))
            if len(asked[longest]) > room:
                raise InputError(
                    f"expected questions of at most {room} tokens, which leave room for the context, found {len(asked[longest])} in "
                    f"{batch['question'][longest]!r:.60}. Raise --max_length or lower --overlap."
                )
            tokens = tokenizer(
                batch["question"],
                batch["context"],
                truncation="only_second",
                max_length=limit,
                stride=overlap,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_token_type_ids=True,
                return_attention_mask=True,
            )
            found: dict[str, list[Any]] = {column: tokens[column] for column in TOKENS}
            found |= {"offsets": tokens["offset_mapping"], "length": list(map(len, tokens["input_ids"])), "places": []}
            for window, row in enumerate(tokens["overflow_to_sample_mapping"]):
                sequences = np.array([-1 if one is None else one for one in tokens.sequence_ids(window)])
                context = np.flatnonzero(sequences == 1)
                first, last = (int(context[0]), int(context[-1])) if len(context) else (1, 0)
                offsets = np.array(tokens["offset_mapping"][window][first : last + 1]).reshape(-1, 2)
                answers = list(zip(batch["answers"][row], batch["starts"][row], strict=True))[:1]
                spans = [answer_tokens(offsets, start, start + len(answer)) for answer, start in answers]
                begin, end = (first + place for place in spans[0]) if spans and spans[0] is not None else (0, 0)
                found["places"].append([batch["label"][row], first, last, begin, end])
            return found

        named = [key, limit, overlap, name]
        windows = map_kept(split, cut, "windows", named, remove_columns=split.column_names)
        table = int(digest(named)[:7], 16)
        self._windows[table] = Windows(np.array(windows["places"][:], np.int64), windows.select_columns(["offsets"]))
        labels = (table << 32) + np.arange(len(windows))
        return windows.remove_columns(["offsets", "places"]).add_column("labels", labels)

    def _places(self, labels: Tensor) -> np.ndarray:
        """The places (windows, 5) of labels, see Windows."""
        return np.array([self._windows[label >> 32].places[label & 0xFFFFFFFF] for label in labels.tolist()], np.int64)

    # ---- Models

    def load_config(self, source: str) -> Any:
        """The config of a model, whose two labels, whatever they are called, are the start and the end."""
        config = super().load_config(source)
        if config.num_labels == len(self.label_names):
            name_labels(config, self.label_names)
        return config

    def check_config(self, config: Any, source: str) -> None:
        """Raise InputError for a decoder, too: its tokens do not see what follows them, and it has no [CLS] token for "no answer"."""
        if has_tokenizer(source) and of_decoder(self.load_processor(source)):
            raise InputError(
                f"expected an encoder, whose span head (question answering) reads the text on both sides of a token, found {config.model_type!r} in "
                f"{source}, a decoder. Use an encoder, such as a BERT, RoBERTa or ModernBERT."
            )
        super().check_config(config, source)

    def load_model(self, source: str, head: Head = "required", from_scratch: bool = False) -> Any:
        model = super().load_model(source, head, from_scratch)
        setattr(model.config, ANSWERS, {"unanswerable": self.unanswerable, **self._reading})
        return model

    def align_labels(self, model: Any, source: str) -> None:
        """Nothing: a head's two outputs are always the start and the end."""

    def check_teacher_fits(self, teacher_source: str, student: Any, processor: Any, online: bool) -> None:
        """Raise InputError unless the teacher's tokenizer makes the student's windows: the distributions are over their tokens."""
        teachers = self.features(self.load_processor(teacher_source))["validation"].select_columns(["input_ids"])[:32]
        if self.features(processor)["validation"].select_columns(["input_ids"])[:32] != teachers:
            raise InputError(
                "expected teacher and student to read the same tokens, over which the distributions of starts and ends are, found that their "
                "tokenizers differ. Take a student with the teacher's tokenizer (leave --student_model out)."
            )

    def guess(self, config: Any) -> float:
        rows = self.data.splits["validation"]["answers"]
        return max(GUESSED_F1, sum(not one for one in rows) / len(rows) if self.unanswerable else 0.0)

    # ---- Losses: the mean of that of the start and that of the end, over the tokens of the context and the first of all

    def outputs(self, model_output: Any) -> Tensors:
        return {STARTS: model_output.start_logits, ENDS: model_output.end_logits}

    def _masked(self, outputs: Tensors, labels: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Of the examples that count, in float32: the logits (examples, tokens) of start and end, without those of what is no context;
        the tokens (examples,) that are right; and which tokens could be."""
        counted = labels.ne(IGNORED)
        device, tokens = outputs[STARTS].device, outputs[STARTS].shape[1]
        places = torch.from_numpy(self._places(labels[counted]).reshape(-1, 5)).to(device)
        _, first, last, *right = places.unbind(dim=1)
        place = torch.arange(tokens, device=device)
        possible = ((place >= first[:, None]) & (place <= last[:, None])) | (place == 0)
        logits = [
            outputs[name][counted.to(device)][:, :tokens].float().masked_fill(~possible, MASKED)
            for name in (STARTS, ENDS)
        ]
        return logits, right, possible

    def label_loss(self, outputs: Tensors, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        logits, right, possible = self._masked(outputs, labels)
        loss = torch.zeros((), device=possible.device)
        for one, target in zip(logits, right, strict=True):
            losses = -F.log_softmax(one, dim=-1)
            smooth = losses.masked_fill(~possible, 0.0).sum(dim=-1) / possible.sum(dim=-1)
            hard = losses.gather(-1, target[:, None])[:, 0]
            loss = loss + ((1 - label_smoothing) * hard + label_smoothing * smooth).sum() / 2
        return loss, labels.ne(IGNORED).sum()

    def soft_targets(self, outputs: Tensors, distill: DistillConfig) -> Tensors:
        """The logits of all tokens, filled up to the length of the longest window, so that all examples have as many."""
        missing = self.config.max_length - outputs[STARTS].shape[1]
        return {f"teacher_{name}": F.pad(outputs[name].float(), (0, missing)) for name in (STARTS, ENDS)}

    divergences = tuple(name for name in DIVERGENCES if name != "squared_error")
    unlike_classes = "it depends on the tokens that can be no answer, too"

    def soft_loss(self, outputs: Tensors, teacher: Tensors, labels: Tensor, distill: DistillConfig) -> Tensor:
        tokens = outputs[STARTS].shape[1]
        logits, right, _ = self._masked(outputs, labels)
        stored = {name: teacher[f"teacher_{name}"][:, :tokens] for name in (STARTS, ENDS)}
        targets, _, _ = self._masked(stored, labels)
        halves = [
            super(QuestionAnswering, self).soft_loss({"logits": student}, {"teacher_logits": one}, target, distill)
            for student, one, target in zip(logits, targets, right, strict=True)
        ]
        return torch.stack(halves).sum() / 2

    # ---- Scores

    def predictions(self, outputs: Tensors, labels: Tensor) -> Tensor:
        """The likeliest span of each window (windows, 5), see scores.py."""
        starts, ends = (outputs[name].float().cpu().numpy() for name in (STARTS, ENDS))
        found = np.zeros((len(starts), 5), np.float32)
        for row, label in enumerate(labels.tolist()):
            if label == IGNORED:
                continue
            windows, window = self._windows[label >> 32], label & 0xFFFFFFFF
            question, first, last, *_ = windows.places[window].tolist()
            longest = self.answer.max_answer_tokens
            begin, end, scores, none = likeliest_spans(starts[row], ends[row], first, last, longest, count=1)
            span = [NO_SPAN, 0, 0]
            if len(scores):
                offsets = windows.offsets[window]["offsets"]
                span = [scores[0], offsets[begin[0]][0], offsets[end[0]][1]]
            found[row] = [question, *span, none]
        return torch.from_numpy(found).to(outputs[STARTS].device)

    def scores(self, predictions: np.ndarray, references: Any, split: str | None = None) -> dict[str, Any]:
        """F1 and exact match of predictions for a whole split, that of validation where none is named."""
        rows = self.data.splits[split or "validation"]
        best = best_spans(predictions, len(rows), self.unanswerable)
        answers = answers_of(best, list(rows["context"]))
        exact, partly = score_answers(answers, list(rows["answers"]))
        return {"f1": float(partly.mean()), "exact_match": float(exact.mean())}

    # ---- Baselines

    @property
    def baselines(self) -> Mapping[str, Candidates]:
        return {"tfidf_sentence": baselines.tfidf_sentence, "tfidf_span": baselines.tfidf_span}

    def baseline_inputs(self, examples: datasets.Dataset) -> list[str]:
        return baselines.written(examples)

    # ---- ONNX

    def without_padding(self, outputs: Arrays, feed: Arrays) -> Arrays:
        return {name: values * feed["attention_mask"] for name, values in outputs.items()}

    # ---- Report

    def compare(self, stages: list[StageResult], processor: Any, shipped: str, split: str = "test") -> Comparison:
        return compare_answers(stages, self.data.splits[split], self.unanswerable, shipped)

    # ---- Bundle

    def bundle_settings(self, directory: Path, processor: Any) -> dict[str, Any]:
        """As of any pair of texts, with windows; probes for the page are pairs that are no longer than one."""
        inputs = text_settings(directory, "right", True, self.config.max_length) | {"overlap": self.overlap}
        pairs = [(QUESTION, text[: self.config.max_length // 2]) for text in PROBE_TEXTS if text]
        probes = [page_probe(pair, processor(*pair)["input_ids"]) for pair in pairs]
        fitting = [one for one in probes if len(one["ids"].split()) <= self.config.max_length]
        return {"inputs": {**inputs, "probes": fitting}, "outputs": head_outputs(directory)}

    def verify_bundle(self, directory: Path, processor: Any) -> dict[str, Any]:
        """Compare the bundle's windows and answers with the pipeline's, on validation questions and probes; raises VerificationError."""
        model = Answerer(directory).model
        features, rows = self.features(processor)["validation"], self.data.splits["validation"]
        count = min(VERIFIED_EXAMPLES, len(rows))
        collate, rows_of_windows = self.collate(processor), self._places(torch.tensor(features["labels"][:]))[:, 0]
        for row in range(count):
            question, context = rows[row]["question"], rows[row]["context"]
            batches = [collate([features[int(window)]]) for window in np.flatnonzero(rows_of_windows == row)]
            read = [model.feed(window) for window in model.windows(question, context)]
            feeds = [{name: batch[name].numpy() for name in read[0]} for batch in batches]
            same = len(read) == len(feeds) and all(
                np.array_equal(own[name], feed[name]) for own, feed in zip(read, feeds, strict=True) for name in own
            )
            logits = [run_session(model.session, feed) for feed in feeds]
            parts = [
                self.predictions({name: torch.from_numpy(values) for name, values in one.items()}, batch["labels"])
                for one, batch in zip(logits, batches, strict=True)
            ]
            predictions = torch.cat(parts).numpy()
            predictions[:, 0] = 0
            [expected] = answers_of(best_spans(predictions, 1, model.outputs["unanswerable"]), [context])
            answer = model.answer(question, context)["answer"]
            if not same or answer != expected:
                raise VerificationError(
                    f"expected the bundle to read and answer {question[:40]!r} exactly as the pipeline does, found {answer[:40]!r} or other "
                    f"tokens. The runtime does not support this tokenizer; ship the ONNX directory instead."
                )
        for text in filter(None, PROBE_TEXTS):
            model.answer(QUESTION, text)  # without an error
        return {"examples": count, "probes": len(PROBE_TEXTS) - 1}


def answer_tokens(offsets: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """The first and last of tokens with these characters (tokens, 2) that hold the characters `start` to `end`; None where some are outside."""
    if not len(offsets) or offsets[0, 0] > start or offsets[-1, 1] < end:
        return None
    first = int(np.searchsorted(offsets[:, 0], start, side="right")) - 1
    last = int(np.searchsorted(offsets[:, 1], end, side="left"))
    return first, max(first, last)
