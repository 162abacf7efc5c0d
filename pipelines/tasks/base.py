"""What is the same for every kind of task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from pipelines.core.config import DataConfig
from pipelines.data.sources import resolve
from pipelines.models.loading import load
from pipelines.models.predict import Answers


class Task(ABC):
    """What is the same for every kind of task."""

    name: str
    settings: tuple[type, ...] = (DataConfig,)  # the dataclasses that it is made of
    architectures: tuple[str, ...]  # how the names of its models' classes end
    demo: str  # the YAML file of its offline demo
    primary_metric: str
    greater_is_better = True
    causal = False  # whether logits at one token are about the next, so that losses shift labels by one
    answers: Answers = None  # what is kept of a batch's logits, where all of them would fill the memory
    config: DataConfig

    @classmethod
    def recognizes(cls, config: dict[str, Any]) -> bool:
        """Whether a model with this content of config.json was made for the task."""
        return str((config.get("architectures") or [""])[0]).endswith(cls.architectures)

    @property
    def trust_remote_code(self) -> bool:
        return self.config.trust_remote_code

    def permissions(self) -> dict[str, Any]:
        """What of describe() says that code from elsewhere was let in."""
        return {"trust_remote_code": True} if self.trust_remote_code else {}

    def load_config(self, source: str) -> Any:
        """The config of a model."""
        from transformers import AutoConfig

        return load(
            AutoConfig.from_pretrained,
            resolve(source),
            "a model's config.json",
            trust_remote_code=self.trust_remote_code,
        )

    @abstractmethod
    def check_config(self, config: Any, source: str) -> None:
        """Raise InputError unless a model with the config that `source` has takes this task's inputs."""

    @abstractmethod
    def features(self, processor: Any) -> Any:
        """The splits as a model of this processor reads them."""

    @abstractmethod
    def collate(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What makes a batch of rows of the features."""

    @abstractmethod
    def metrics(self, answers: np.ndarray, references: Any) -> dict[str, Any]:
        """Scores of a model's answers against the references."""

    def numbers(self, answers: np.ndarray, references: Any) -> dict[str, float]:
        """The scores that are single numbers, for the Trainer's log."""
        return {name: value for name, value in self.metrics(answers, references).items() if isinstance(value, float)}

    def score(self, predict: Callable[..., np.ndarray], processor: Any, split: str) -> dict[str, Any]:
        """The scores on a split of `predict(features, collate, answers=…)`, a torch model or an ONNX file."""
        features = self.features(processor)[split]
        return self.metrics(predict(features, self.collate(processor), answers=self.answers), features["labels"])
