"""What a kind of task needs that another does not: how its data is loaded, prepared, batched and scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError
from pipelines.core.task import Head
from pipelines.data import examples as data_module
from pipelines.models.loading import load_classifier, load_tokenizer
from pipelines.tasks.classification import Classification


class TextClassification(Classification):
    """One text, or a pair of texts, and one label out of several."""

    name = "text-classification"
    architectures = ("ForSequenceClassification",)
    demo = "bert_bbc_news"
    # The adapter's task type trains a new head along with it.
    lora_settings: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": "all-linear"}
    student_head: Head = "new if none"

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.data = data_module.load_classification(config)
        self._features: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """What of the data a stage's result depends on."""
        return {
            "name": self.name,
            "data": self.data.fingerprint,
            "max_length": self.config.max_length,
            **self.permissions(),
        }

    @property
    def example(self) -> str:
        return '--pair "A first text." "A second text."' if self.config.text_pair_column else '"A text."'

    def load_processor(self, source: str) -> Any:
        """The tokenizer of a model."""
        return load_tokenizer(source, self.trust_remote_code)

    def load_model(self, source: str, head: Head = "required", from_scratch: bool = False) -> Any:
        """The model with a head for this task's labels; see load_classifier."""
        from transformers import AutoModelForSequenceClassification

        return load_classifier(
            AutoModelForSequenceClassification,
            "ForSequenceClassification",
            source,
            self.label_names,
            head,
            from_scratch,
            check_config=lambda config: self.check_config(config, source),
            trust_remote_code=self.trust_remote_code,
        )

    def features(self, processor: Any) -> Any:
        """The tokenized splits; the same tokenizer tokenizes once in a process."""
        key = _tokenizer_key(processor)
        if key not in self._features:
            self._features[key] = data_module.tokenize(self.data, processor, self.config.max_length)
        return self._features[key]

    def collate(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return data_module.collate(processor)

    def training_collate(
        self, processor: Any, teacher_processor: Any = None, augment: bool = False
    ) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """The collator for training, where a teacher in the loop, if there is one, reads the student's own tokens.

        Raises InputError where the teacher's tokenizer would have made others of the same text. Texts are not augmented.
        """
        if teacher_processor is not None:
            teacher = self.features(teacher_processor)["validation"][:32]
            if teacher != self.features(processor)["validation"][:32]:
                raise InputError(
                    "expected teacher and student to read the same tokens, found that their tokenizers differ; a teacher in the loop "
                    "then reads nonsense. Use stored soft targets (--soft_targets stored, --hidden_state_weight 0)."
                )
        return self.collate(processor)

    def test_texts(self) -> list[str]:
        """The test examples as a person reads them."""
        test = self.data.splits["test"]
        if "text_pair" in test.column_names:
            return [f"{text} ‖ {pair}" for text, pair in zip(test["text"], test["text_pair"], strict=True)]
        return list(test["text"])

    def export_sample(self, processor: Any) -> dict[str, Any]:
        """Two real examples of different length as a batch, so that the export sees padding and no axis of size 1."""
        features = self.features(processor)["train"]
        lengths = np.asarray(features["length"])
        batch = self.collate(processor)([features[int(np.argmin(lengths))], features[int(np.argmax(lengths))]])
        batch.pop("labels")
        return dict(batch)

    def dynamic_axes(self, sample: dict[str, Any]) -> dict[str, dict[int, str]]:
        """The axes of the inputs that vary from call to call."""
        return {name: {0: "batch", 1: "sequence"} for name in sample}

    def check_config(self, config: Any, source: str) -> None:
        """Raise InputError unless the model has a position for every token."""
        limit = getattr(config, "max_position_embeddings", None)
        # RoBERTa and its kin number positions from the padding index on, so two positions are not for tokens.
        offset = 2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        if limit and self.config.max_length > limit - offset:
            raise InputError(
                f"expected --max_length of at most {limit - offset}, the positions that {source} has, found {self.config.max_length}. "
                "Pass a smaller --max_length."
            )


def _tokenizer_key(processor: Any) -> str:
    return processor.backend_tokenizer.to_str() if hasattr(processor, "backend_tokenizer") else repr(processor)
