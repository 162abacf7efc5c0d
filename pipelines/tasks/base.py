"""What is the same for every kind of task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from pipelines.core.config import DataConfig
from pipelines.data.sources import resolve
from pipelines.models.loading import load


class Task(ABC):
    """What is the same for every kind of task."""

    name: str
    primary_metric: str
    greater_is_better = True
    config: DataConfig

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
    def scores(self, predictions: np.ndarray, references: Any, split: str | None = None) -> dict[str, Any]:
        """The scores of predictions against references; of a whole `split` also those that need its text."""
