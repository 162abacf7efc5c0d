"""Causal language modelling: what the task needs that classification does not, and a model made from nothing but a config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config import DataConfig, LanguageConfig
from pipelines.errors import InputError
from pipelines.losses import IGNORED
from pipelines.run import Outcome
from pipelines.sources import check_model_directory, resolve
from pipelines.tasks import check_only_head_is_new, load
from pipelines.text_data import load_documents, tokenize_windows, train_tokenizer, vocabulary_fingerprint


class LanguageModeling:
    """Text, of which every token is to be predicted from those before it."""

    name = "text-generation"
    peft_type = "CAUSAL_LM"
    primary_metric = "perplexity"
    greater_is_better = False
    causal = True  # logits at one token are about the next: losses shift labels by one
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

    def describe(self) -> dict[str, Any]:
        """What of the data a stage's result depends on."""
        return {
            "name": self.name,
            "data": self.data.fingerprint,
            "max_length": self.config.max_length,
            "stride": self.stride,
        }

    def load_processor(self, source: str) -> Any:
        """The tokenizer of a model, padding on the left, where a continuation does not follow."""
        from transformers import AutoTokenizer

        tokenizer = load(AutoTokenizer.from_pretrained, resolve(source), "a tokenizer")
        if tokenizer.eos_token is None:
            raise InputError(
                f"expected a tokenizer with an end token (eos_token) at {source}, found none. Set one and save it."
            )
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer

    def load_model(self, source: str, head: str = "required") -> Any:
        """The causal model in `source`; a language model has one kind of head, so `head` asks for nothing."""
        from transformers import AutoConfig, AutoModelForCausalLM

        located = resolve(source)
        if Path(located).is_dir():
            check_model_directory(Path(located))
        config = load(AutoConfig.from_pretrained, located, "a model's config.json")
        limit = getattr(config, "max_position_embeddings", None)
        if limit and self.config.max_length > limit:
            raise InputError(
                f"expected --max_length of at most {limit}, the positions that {source} has, found {self.config.max_length}. Pass a "
                "smaller --max_length."
            )
        model, info = load(
            AutoModelForCausalLM.from_pretrained, located, "a causal language model", output_loading_info=True
        )
        check_only_head_is_new(model, info, source, head_may_be_new=False)
        return model

    def features(self, processor: Any) -> Any:
        """Windows of tokens of every split; the same vocabulary tokenizes once in a process."""
        key = vocabulary_fingerprint(processor)
        if key not in self._features:
            self._features[key] = tokenize_windows(self.data, processor, self.config.max_length, self.stride)
        return self._features[key]

    def collate(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return collate_windows

    def answers(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """What is kept of logits (batch, tokens, vocabulary): `token_answers`, a thousandth of their size."""
        return token_answers(logits, labels)

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

    def numbers(self, answers: np.ndarray, references: Any) -> dict[str, float]:
        """The scores that are single numbers, for the Trainer's log."""
        return {name: value for name, value in self.metrics(answers, references).items() if isinstance(value, float)}

    def score(self, predict: Callable[..., np.ndarray], processor: Any, split: str) -> dict[str, Any]:
        """The scores on a split of `predict(features, collate, answers=…)`, a torch model or an ONNX file."""
        features = self.features(processor)[split]
        answers = predict(features, self.collate(processor), answers=self.answers)
        return self.metrics(answers, features["labels"], self.data.text_bytes[split])

    def agreement(self, answers: np.ndarray, reference_answers: np.ndarray) -> float:
        """Share of tokens for which two models find the same one most likely."""
        counted = answers[..., 1] >= 0
        return float(np.mean(answers[..., 1][counted] == reference_answers[..., 1][counted]))

    def test_texts(self) -> list[str]:
        """The test documents as a person reads them."""
        return list(self.data.splits["test"]["text"])


def collate_windows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Windows of one length as a batch (batch, tokens); nothing is padded, so nothing needs a mask."""
    import torch

    columns = {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "length"}
    return {
        name: torch.as_tensor(column if column.dtype == np.float32 else column.astype(np.int64))
        for name, column in columns.items()
    }


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


def check_same_vocabulary(teacher_processor: Any, student_processor: Any, teacher_size: int, student_size: int) -> None:
    """Refuse a teacher whose logits are about other tokens than the student's; the sizes are those of the models."""
    ours, theirs = student_processor.get_vocab(), teacher_processor.get_vocab()
    if ours != theirs:
        different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise InputError(
            f"expected teacher and student with the same vocabulary, found {len(theirs):,} and {len(ours):,} tokens, of which "
            f"{len(different):,} are missing in one or have another id, such as {different[0]!r}. Distillation over tokens needs one "
            "vocabulary: take a student made from the teacher (leave --student_model out), or another teacher."
        )
    if teacher_size != student_size:
        raise InputError(
            f"expected teacher and student with logits for as many tokens, found {teacher_size:,} and {student_size:,}. Call "
            f"resize_token_embeddings({teacher_size}) on the student and save it."
        )


def new_language_model(source: None, directory: Path, task: LanguageModeling, language: LanguageConfig) -> Outcome:
    """Write an untrained model of the kind and sizes that the flags give, and a tokenizer trained on the training split."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from pipelines.training import count_parameters

    tokenizer = train_tokenizer(task.data.splits["train"]["text"], language.vocabulary_size)
    end = tokenizer.eos_token_id
    settings = {
        # Positions beyond the block are never trained, so there are none unless the sizes ask for them.
        "max_position_embeddings": task.config.max_length,
        **language.sizes,
        "vocab_size": len(tokenizer),
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    try:
        config = AutoConfig.for_model(str(language.new_model), **settings)
        model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a wrong kind, an unknown size and sizes that do not fit fail in different ways
        raise InputError(
            f"expected a kind of causal language model and sizes that fit it, found {language.new_model!r} with "
            f"{language.new_model_sizes}: {' '.join(str(error).split())[:300]}. Correct --new_model or --new_model_sizes."
        ) from error
    tokenizer.model_max_length = int(getattr(config, "max_position_embeddings", task.config.max_length))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    details = {"tokenizer": "byte-level BPE, trained on the training split", "vocabulary": len(tokenizer)}
    return Outcome("transformers", parameters=count_parameters(model), details=details)
