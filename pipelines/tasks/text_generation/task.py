"""Causal language modelling: what the task needs that classification does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core.config import DataConfig, LanguageConfig
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, Head
from pipelines.data.documents import load_documents, tokenize_windows, train_tokenizer, vocabulary_fingerprint
from pipelines.data.sources import check_model, resolve
from pipelines.models.loading import check_only_head_is_new, load, load_tokenizer
from pipelines.models.predict import predict_torch
from pipelines.tasks.base import Task


def token_answers(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For every token its loss, -log p(token | those before it), and the token that was most likely: (batch, tokens, 2) float32.

    `logits` (batch, tokens, vocabulary) at one position are about the next; `labels` (batch, tokens). Where the label is -100, and at
    the first position, the loss is 0 and the most likely token -1.
    """
    logits = np.asarray(logits, np.float32)[:, :-1]
    targets = np.asarray(labels)[:, 1:]
    counted = targets != IGNORED
    peak = logits.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(logits - peak).sum(axis=-1)) + peak[..., 0]
    chosen = np.take_along_axis(logits, np.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    found = np.zeros((*np.shape(labels), 2), np.float32)
    found[..., 1] = -1
    found[:, 1:, 0] = np.where(counted, normalizer - chosen, 0)
    found[:, 1:, 1] = np.where(counted, logits.argmax(axis=-1), -1)
    return found


def collate_windows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Windows of one length as a batch (batch, tokens); nothing is padded, so nothing needs a mask."""
    import torch

    columns = {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "length"}
    return {
        name: torch.as_tensor(column if column.dtype == np.float32 else column.astype(np.int64))
        for name, column in columns.items()
    }


# How the names of a tokenizer's files begin.
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken")


class LanguageModeling(Task):
    """Text, of which every token is to be predicted from those before it."""

    name = "text-generation"
    settings = (DataConfig, LanguageConfig)
    architectures = ("ForCausalLM", "LMHeadModel")
    demo = "gpt2_bbc_news"
    example = '"The beginning of a text"'
    lora_settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    student_head: Head = "required"
    primary_metric = "perplexity"
    greater_is_better = False
    causal = True
    answers = staticmethod(token_answers)  # a thousandth of the logits
    label_names: list[str] = []

    def __init__(self, config: DataConfig, language: LanguageConfig) -> None:
        self.config, self.language = config, language
        self.stride = language.stride or max(1, config.max_length // 2)
        if self.stride >= config.max_length:
            raise InputError(
                f"expected a --stride below --max_length ({config.max_length}), found {self.stride}. Pass a smaller one."
            )
        self.data = load_documents(config, language)
        self._features: dict[str, Any] = {}
        self._tokenizer: Any = None

    def describe(self) -> dict[str, Any]:
        """What of the data a stage's result depends on."""
        return {
            "name": self.name,
            "data": self.data.fingerprint,
            "max_length": self.config.max_length,
            "stride": self.stride,
            "vocabulary_size": self.language.vocabulary_size,
            **self.permissions(),
        }

    def load_processor(self, source: str) -> Any:
        """The tokenizer of a model, padding on the left, where a continuation does not follow.

        For a directory that only gives a model's shape it is a byte-level BPE, trained on the training split.
        """
        directory = Path(resolve(source))
        files = [file.name for file in directory.iterdir()] if directory.is_dir() else None
        if files is not None and not any(
            name.startswith(TOKENIZER_FILES) or name.endswith(".safetensors") for name in files
        ):
            return self._new_tokenizer(source)
        tokenizer = load_tokenizer(source, self.trust_remote_code)
        if tokenizer.eos_token is None:
            raise InputError(
                f"expected a tokenizer with an end token (eos_token) at {source}, found none. Set one and save it."
            )
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer

    def _new_tokenizer(self, source: str) -> Any:
        if self._tokenizer is None:
            self._tokenizer = train_tokenizer(self.data.splits["train"]["text"], self.language.vocabulary_size)
        positions = getattr(self.load_config(source), "max_position_embeddings", None)
        self._tokenizer.model_max_length = int(positions or self.config.max_length)
        return self._tokenizer

    def load_model(self, source: str, head: Head = "required", from_scratch: bool = False) -> Any:
        """The causal model in `source`; a language model has one kind of head, so `head` asks for nothing.

        With `from_scratch` all weights are random, in the shape of `source`, for the tokens of its tokenizer.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        located = resolve(source)
        if not from_scratch:
            check_model(located)
        code = {"trust_remote_code": self.trust_remote_code}
        self.check_config(self.load_config(source), source)
        if from_scratch:
            tokenizer = self.load_processor(source)
            end = tokenizer.eos_token_id
            tokens = {
                "vocab_size": len(tokenizer),
                "bos_token_id": end if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
                "eos_token_id": end,
                "pad_token_id": tokenizer.pad_token_id,
            }
            shape = load(AutoConfig.from_pretrained, located, "a model's config.json", **tokens, **code)
            return load(
                lambda _: AutoModelForCausalLM.from_config(shape, **code),
                located,
                "the shape of a causal language model",
            )
        model, info = load(
            AutoModelForCausalLM.from_pretrained,
            located,
            "a causal language model",
            output_loading_info=True,
            use_safetensors=True,  # a pickle runs whatever code is in it
            **code,
        )
        check_only_head_is_new(model, info, source, head_may_be_new=False)
        return model

    def check_config(self, config: Any, source: str) -> None:
        """Raise InputError unless the model has a position for every token of a window."""
        limit = getattr(config, "max_position_embeddings", None)
        if limit and self.config.max_length > limit:
            raise InputError(
                f"expected --max_length of at most {limit}, the positions that {source} has, found {self.config.max_length}. Pass a "
                "smaller --max_length."
            )

    def features(self, processor: Any) -> Any:
        """Windows of tokens of every split; the same vocabulary tokenizes once in a process."""
        key = vocabulary_fingerprint(processor)
        if key not in self._features:
            self._features[key] = tokenize_windows(self.data, processor, self.config.max_length, self.stride)
        return self._features[key]

    def collate(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return collate_windows

    def training_collate(
        self, processor: Any, teacher_processor: Any = None, augment: bool = False
    ) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """The collator for training, where a teacher in the loop reads the student's own tokens. Texts are not augmented."""
        return collate_windows

    def metrics(self, answers: np.ndarray, references: Any, text_bytes: int | None = None) -> dict[str, Any]:
        """Scores of token_answers(…) (windows, tokens, 2) for the labels `references` (windows, tokens).

        Perplexity is e to the mean loss of a token. Bits per byte divide the loss of the whole text by its UTF-8 bytes, so that models
        with other vocabularies compare; they need `text_bytes`.
        """
        counted = np.asarray(references) != IGNORED
        losses = answers[..., 0][counted].astype(np.float64)
        scores: dict[str, Any] = {"perplexity": float(np.exp(losses.mean())), "loss": float(losses.mean())}
        if text_bytes is not None:
            scores["bits_per_byte"] = float(losses.sum() / np.log(2) / text_bytes)
        accuracy = answers[..., 1][counted] == np.asarray(references)[counted]
        return scores | {"next_token_accuracy": float(accuracy.mean()), "tokens": int(counted.sum())}

    def score(self, predict: Callable[..., np.ndarray], processor: Any, split: str) -> dict[str, Any]:
        """The scores on a split of `predict(features, collate, answers=…)`, a torch model or an ONNX file."""
        features = self.features(processor)[split]
        answers = predict(features, self.collate(processor), answers=self.answers)
        return self.metrics(answers, features["labels"], self.data.text_bytes[split])


def check_knows_language(teacher: Any, task: Any, processor: Any) -> None:
    """Refuse a teacher that does no better than guessing all tokens alike: its answers teach nothing."""
    features = task.features(processor)["validation"]
    few = features.select(range(min(8, len(features))))
    answers = predict_torch(teacher, few, task.collate(processor), answers=task.answers)
    check_perplexity(task.metrics(answers, few["labels"])["perplexity"], teacher.config.vocab_size)


def check_perplexity(perplexity: float, vocabulary_size: int) -> None:
    """Refuse the perplexity of a teacher that guesses, also one that is no number."""
    if not perplexity < vocabulary_size:
        raise InputError(
            f"expected a teacher that knows the language, found a perplexity of {perplexity:,.0f} on validation text, no better than "
            f"guessing among its {vocabulary_size:,} tokens. Train it longer or slower (--teacher_epochs, --teacher_learning_rate)."
        )


def check_same_vocabulary(teacher_processor: Any, student_processor: Any, teacher_size: int, student_size: int) -> None:
    """Refuse a teacher whose logits are about other tokens than the student's; the sizes are those of the models."""
    ours, theirs = student_processor.get_vocab(), teacher_processor.get_vocab()
    if ours != theirs:
        different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise InputError(
            f"expected teacher and student with the same vocabulary, found {len(theirs):,} and {len(ours):,} tokens, of which "
            f"{len(different):,} are missing in one or have another id, such as {different[0]!r}. Distillation over tokens needs one "
            "vocabulary: take a student made from the teacher (leave --student_model out), or give both one tokenizer."
        )
    if teacher_size != student_size:
        raise InputError(
            f"expected teacher and student with logits for as many tokens, found {teacher_size:,} and {student_size:,}. Call "
            f"resize_token_embeddings({teacher_size}) on the student and save it."
        )
