"""What is the same for every kind of task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from pipelines.core.config import DataConfig
from pipelines.core.sources import resolve
from pipelines.data.examples import Examples
from pipelines.data.remembered import remembered_fingerprint
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

    # ---- Data

    @abstractmethod
    def load_data(self) -> Examples:
        """The examples: read, checked and split."""

    @cached_property
    def data(self) -> Examples:
        """The examples, read when somebody first asks for them: a finished run never does."""
        return self.load_data()

    @property
    def read_as(self) -> str:
        """What the examples depend on besides the flags of the data."""
        return self.name

    def describe(self) -> dict[str, Any]:
        """What of the data a stage's result depends on."""
        if "data" in vars(self):
            fingerprint = self.data.fingerprint
        else:
            fingerprint = remembered_fingerprint(self.config, self.read_as, lambda: self.data.fingerprint)
        permissions = {"trust_remote_code": True} if self.trust_remote_code else {}
        return {"name": self.name, "data": fingerprint, **permissions}

    @property
    def splits(self) -> Mapping[str, Any]:
        """The data sets train, validation and test, as a person reads them."""
        return self.data.splits

    @property
    def details(self) -> dict[str, Any]:
        """How the splits came about, for the report, ready for JSON."""
        return self.data.details

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
