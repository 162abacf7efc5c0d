"""What is the same for every kind of task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.task import Presentation, StageResult
from pipelines.data.sources import resolve
from pipelines.models.loading import load
from pipelines.models.predict import Answers


def check_predictions(stages: list[StageResult], shape: tuple[int, ...], meaning: str, teacher: str) -> None:
    """Refuse stages without a teacher to compare with, with predictions of another shape, or with such as are not finite."""
    names = [stage.name for stage in stages]
    if names.count(teacher) != 1 or len(set(names)) < len(names):
        raise InputError(
            f"expected different stages, one of them the teacher that the others are compared with, found {names}. "
            "Run the missing stages first."
        )
    for stage in stages:
        if stage.predictions.shape != shape:
            raise InputError(
                f"expected predictions of shape {shape} ({meaning}) from {stage.name}, found {stage.predictions.shape}. Run it over the "
                "whole test split of the data that the teacher was trained on; it must have the teacher's labels or vocabulary."
            )
        infinite = ~np.isfinite(stage.predictions).reshape(len(stage.predictions), -1).all(axis=1)
        if infinite.any():
            raise VerificationError(
                f"expected finite predictions from {stage.name}, found NaN or infinity in {infinite.sum()} of {len(infinite)} rows of the "
                "test split. Do not use this model; export or quantize it again, in fp32 if need be."
            )


class Task(ABC):
    """What is the same for every kind of task."""

    name: str
    primary_metric: str
    greater_is_better = True
    causal = False  # whether logits at one token are about the next, so that losses shift labels by one
    answers: Answers = None  # what is kept of a batch's logits, where all of them would fill the memory
    config: DataConfig
    presentation: Presentation

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
