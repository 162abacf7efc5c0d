"""The orders that a reranker must beat, as estimators of scikit-learn, which need no torch.

Their inputs are triples of text: query, passage, and the passage's place among the candidates of its query.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin, TransformerMixin

from pipelines.tasks.baselines import Choices
from pipelines.tasks.ranking import Bm25


class Place(TransformerMixin, BaseEstimator):
    """The place of each candidate, the first one highest."""

    def fit(self, inputs: Any, labels: Any = None) -> Place:
        return self

    def transform(self, inputs: Any) -> np.ndarray:
        return -np.array([[float(place)] for _, _, place in inputs])


class PairBm25(TransformerMixin, BaseEstimator):
    """BM25 of each pair, by the words of the passages that are ranked together: it learns nothing."""

    def fit(self, inputs: Any, labels: Any = None) -> PairBm25:
        return self

    def transform(self, inputs: Any) -> np.ndarray:
        (queries, asked), (passages, ranked) = (
            np.unique([one[column] for one in inputs], return_inverse=True) for column in (0, 1)
        )
        fitted = Bm25().fit(passages)
        words = fitted.words_.transform(queries)
        return np.asarray(words[asked].multiply(fitted.weights_[ranked]).sum(axis=1)).reshape(-1, 1)


class AsItIs(RegressorMixin, BaseEstimator):
    """The score that is its only feature."""

    def fit(self, features: Any, labels: Any = None) -> AsItIs:
        self.is_fitted_ = True
        return self

    def predict(self, features: Any) -> np.ndarray:
        return np.asarray(features)[:, 0]


def first_stage(inputs: Any, labels: np.ndarray) -> Choices:
    yield Place(), [AsItIs()]


def bm25(inputs: Any, labels: np.ndarray) -> Choices:
    yield PairBm25(), [AsItIs()]
