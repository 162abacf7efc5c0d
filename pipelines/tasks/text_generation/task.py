"""Causal language modelling: what the task needs that classification does not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipelines.core.config import DataConfig, LanguageConfig
from pipelines.core.errors import InputError
from pipelines.core.sources import resolve
from pipelines.core.task import (
    IGNORED,
    Arrays,
    Collate,
    Comparison,
    Graph,
    Head,
    Presentation,
    StageResult,
    Tensors,
    Workload,
)
from pipelines.data.documents import TextData, load_documents
from pipelines.data.examples import Examples
from pipelines.data.windows import tokenize_windows, train_tokenizer, vocabulary_fingerprint
from pipelines.edge.bundle import prompt_inputs, verify_generator
from pipelines.edge.settings import generation_outputs
from pipelines.models.loading import has_tokenizer, load_tokenizer, load_weights, new_model
from pipelines.runtime.generate import LanguageModel
from pipelines.runtime.infer import open_session
from pipelines.tasks.base import BaseTask
from pipelines.tasks.text_generation import export
from pipelines.tasks.text_generation.report import GenerationPresentation, compare_language_models
from pipelines.training.losses import NextTokenLoss

BUNDLE_PROMPTS = 8  # that a bundle is verified with


def collate_windows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Windows of one length as a batch (batch, tokens); nothing is padded, so nothing needs a mask."""
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "length"}
    return {
        name: torch.as_tensor(column if column.dtype == np.float32 else column.astype(np.int64))
        for name, column in columns.items()
    }


def check_direction(model: Any, source: str) -> None:
    """Raise InputError for an encoder, of which transformers makes a language model that sees the tokens it is to predict."""
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4]])
    with torch.no_grad():
        first, second = model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :2]
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3):
        raise InputError(
            f"expected a language model, whose logits depend on the tokens so far alone, found that those of {source} change with the next "
            f"token: {model.config.model_type!r} reads texts in both directions. Use a decoder, such as a GPT-2."
        )


PROMPT_TOKENS, NEW_TOKENS = 16, 64  # what a language model is timed on, at most


class LanguageModeling(NextTokenLoss, BaseTask):
    """Text, of which every token is to be predicted from those before it."""

    name = "text-generation"
    presentation: Presentation = GenerationPresentation()
    settings = (DataConfig, LanguageConfig)
    auto_class = AutoModelForCausalLM
    architectures = ("ForCausalLM", "LMHeadModel")
    demo = "gpt2_bbc_news"
    lora_settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    student_head: Head = "required"
    primary_metric = "perplexity"
    metrics: Mapping[str, bool] = {"perplexity": False, "next_token_accuracy": True}
    greater_is_better = False

    def __init__(self, config: DataConfig, language: LanguageConfig) -> None:
        self.config, self.language, self.document_start = config, language, language.document_start
        self.stride = language.stride or max(1, config.max_length // 2)
        if self.stride >= config.max_length:
            raise InputError(
                f"expected a --stride below --max_length ({config.max_length}), found {self.stride}. Pass a smaller one."
            )
        self._features: dict[str, Any] = {}
        self._tokenizer: Any = None

    data: TextData

    def load_data(self) -> TextData:
        return load_documents(self.config, self.language)

    @property
    def read_as(self) -> str:
        return f"{self.name} {self.language.document_start}"

    def describe(self) -> dict[str, Any]:
        """What of the data a stage's result depends on."""
        settings = {"stride": self.stride, "vocabulary_size": self.language.vocabulary_size}
        return super().describe() | {"max_length": self.config.max_length, **settings}

    def load_processor(self, source: str) -> Any:
        """The tokenizer of a model, padding on the left, where a continuation does not follow.

        For a directory that only gives a model's shape it is a byte-level BPE, trained on the training split.
        """
        if not has_tokenizer(source) and not any(Path(resolve(source)).glob("*.safetensors")):
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

    def check_config(self, config: Any, source: str) -> None:
        """Raise InputError for a model of more than text, and unless it has a position for every token of a window."""
        if not hasattr(config, "vocab_size"):
            raise InputError(
                f"expected a language model of texts alone, found {config.model_type!r} in {source}, which reads images or sounds, too. Use a model "
                f"of the type {config.get_text_config().model_type!r}, or of another family."
            )
        super().check_config(config, source)

    def load_model(self, source: str, head: Head = "required", from_scratch: bool = False) -> Any:
        """The causal model in `source`; a language model has one kind of head, so `head` asks for nothing.

        With `from_scratch` all weights are random, in the shape of `source`, for the tokens of its tokenizer.
        """
        code = {"trust_remote_code": self.trust_remote_code}
        config = self.checked_config(source, from_scratch)
        if not from_scratch:
            if has_tokenizer(source):
                self.check_tokens(self.load_processor(source), "input_ids", config.vocab_size, source)
            model = load_weights(self.auto_class, source, config, **code)
            check_direction(model, source)
            return model
        tokenizer = self.load_processor(source)
        end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
        return new_model(
            self.auto_class,
            source,
            vocab_size=len(tokenizer),
            bos_token_id=end if begin is None else begin,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
            **code,
        )

    def features(self, processor: Any, data: Examples | None = None) -> Any:
        """Windows of tokens of every split; the same vocabulary tokenizes once in a process."""
        data = data or self.data
        key = data.fingerprint + vocabulary_fingerprint(processor)
        if key not in self._features:
            self._features[key] = tokenize_windows(data, processor, self.config.max_length, self.stride)
        return self._features[key]

    def collate(self, processor: Any) -> Collate:
        return collate_windows

    def check_teacher_fits(self, teacher_source: str, student: Any, processor: Any, online: bool) -> None:
        """Raise InputError for a teacher whose logits are about other tokens than the student's."""
        ours, theirs = processor.get_vocab(), self.load_processor(teacher_source).get_vocab()
        if ours != theirs:
            different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
            raise InputError(
                f"expected teacher and student with the same vocabulary, found {len(theirs):,} and {len(ours):,} tokens, of which "
                f"{len(different):,} are missing in one or have another id, such as {different[0]!r}. Distillation over tokens needs one "
                "vocabulary: take a student made from the teacher (leave --student_model out), or give both one tokenizer."
            )
        sizes = self.load_config(teacher_source).vocab_size, student.config.vocab_size
        if sizes[0] != sizes[1]:
            raise InputError(
                f"expected teacher and student with logits for as many tokens, found {sizes[0]:,} and {sizes[1]:,}. Call "
                f"resize_token_embeddings({sizes[0]}) on the student and save it."
            )

    def guess(self, config: Any) -> float:
        """The perplexity where all tokens are alike."""
        return float(config.vocab_size)

    def predictions(self, outputs: Tensors, labels: Tensor) -> Tensor:
        """For every token its loss, -log p(token | those before it), and the token that was most likely: (batch, tokens, 2) float32.

        The logits themselves are thousands of numbers for every token. Where the label is -100, and at the first position, the loss is 0
        and the most likely token -1.
        """
        logits = outputs["logits"].float()
        # Each position's target is the next token; the last has none. Labels are shifted, since logits would be copied.
        targets = torch.nn.functional.pad(labels.to(logits.device)[:, 1:], (0, 1), value=IGNORED)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        likeliest = logits.argmax(dim=-1).masked_fill(targets == IGNORED, -1)
        found = torch.stack([losses.view(targets.shape), likeliest.float()], dim=-1).roll(1, dims=1)
        found[:, 0] = torch.tensor([0.0, -1.0])
        return found

    def scores(self, predictions: np.ndarray, references: Any, split: str | None = None) -> dict[str, Any]:
        """The scores of predictions (windows, tokens, 2) for the labels `references` (windows, tokens).

        Perplexity is e to the mean loss of a token. Bits per byte divide the loss of a whole split by its UTF-8 bytes, so that models
        with other vocabularies compare.
        """
        counted = np.asarray(references) != IGNORED
        losses = predictions[..., 0][counted].astype(np.float64)
        scores: dict[str, Any] = {"perplexity": float(np.exp(losses.mean())), "loss": float(losses.mean())}
        if split is not None:
            scores["bits_per_byte"] = float(losses.sum() / np.log(2) / self.data.text_bytes[split])
        accuracy = predictions[..., 1][counted] == np.asarray(references)[counted]
        return scores | {"next_token_accuracy": float(accuracy.mean()), "tokens": int(counted.sum())}

    def align_labels(self, model: Any, source: str) -> None:
        """Nothing: tokens are those of the model's own tokenizer."""

    # ---- Bundle

    def bundle_settings(self, directory: Path, processor: Any) -> dict[str, Any]:
        return {
            "inputs": prompt_inputs(directory, processor),
            "outputs": generation_outputs(LanguageModel(directory, open_session(directory / "model.onnx"))),
        }

    def verify_bundle(self, directory: Path, processor: Any) -> dict[str, Any]:
        """Of beginnings of validation windows, and of probes."""
        prompts = export.prompts_for(self.features(processor)["validation"], BUNDLE_PROMPTS)
        return verify_generator(directory, processor, processor.batch_decode(prompts))

    # ---- Report

    def compare(self, stages: list[StageResult], processor: Any, shipped: str, split: str = "test") -> Comparison:
        references = np.asarray(self.features(processor)[split]["labels"])
        texts = [processor.decode(labels[labels != IGNORED]) for labels in references]
        score = partial(self.scores, references=references, split=split)
        return compare_language_models(stages, references, score, texts, processor.eos_token_id, shipped)

    # ---- ONNX.

    quantization_schemes = ("dynamic_int8", "int8_blocks", "int4_blocks", "int4_blocks_int8_embeddings")
    default_quantization = "auto"

    def graph(self, model: Any, processor: Any) -> Graph:
        return export.graph_with_cache(model)

    def verification_feeds(self, processor: Any) -> list[Arrays]:
        """Windows of validation text, whole and in two parts joined by the cache, with and without padding on the left."""
        return export.verification_feeds(self.features(processor)["validation"])

    run_model = staticmethod(export.run_model)
    run_graph = staticmethod(export.run_graph)

    def verify_behaviour(self, directory: Path, model: Any, processor: Any) -> dict[str, Any]:
        """Compare the text that the exported directory generates with what torch generates."""
        return {"generation": export.verify_generation(directory, model, self, processor)}

    def workload(self, directory: Path, split: str) -> Workload:
        """A continuation of a prompt, whatever the split."""
        prompt, new = min(PROMPT_TOKENS, self.config.max_length // 4), min(NEW_TOKENS, self.config.max_length // 2)
        settings = {"prompt_tokens": prompt, "new_tokens": new}
        return Workload("pipelines.tasks.text_generation.measure", settings, shape=[1, prompt])
