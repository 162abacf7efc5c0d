"""What a user would try before a transformer, of scikit-learn.

Each function gives, from the training inputs and labels, features and the estimators to choose from, the smallest first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_union
from sklearn.preprocessing import FunctionTransformer

STRENGTHS = (1.0, 10.0, 100.0)  # inverse regularization
NEIGHBOURS = (1, 3, 5)
# So that a fit takes minutes and a gigabyte at most: weights of words, and of characters; texts with more characters than this go without
# features of characters, which are many more than words and say little beside a long text's words.
MOST_FEATURES, MOST_WEIGHTS = 100_000, 2_000_000
MOST_CHARACTERS = 3_000_000
ITERATIONS = 300

Choices = Iterator[tuple[Any, Sequence[Any]]]


def majority_class(inputs: Any, labels: np.ndarray) -> Choices:
    yield FunctionTransformer(), [DummyClassifier()]


def label_frequency(inputs: Any, labels: np.ndarray) -> Choices:
    """Of each of several labels (examples, labels) how often it fits."""
    yield FunctionTransformer(), [OneVsRestClassifier(DummyClassifier())]


def mean_score(inputs: Any, labels: np.ndarray) -> Choices:
    yield FunctionTransformer(), [DummyRegressor()]


def tfidf_logistic_regression(texts: list[str], labels: np.ndarray, balanced: bool) -> Choices:
    """`balanced` weighs every class the same."""
    for features in _tfidf(texts, MOST_WEIGHTS // len(np.unique(labels))):
        yield features, _logistic_regressions(STRENGTHS, balanced)


def tfidf_one_vs_rest(texts: list[str], labels: np.ndarray, balanced: bool) -> Choices:
    """A logistic regression for each of several labels (examples, labels)."""
    for features in _tfidf(texts, MOST_WEIGHTS // labels.shape[1]):
        yield features, [OneVsRestClassifier(one) for one in _logistic_regressions(STRENGTHS, balanced)]


def tfidf_ridge(texts: list[str], labels: np.ndarray) -> Choices:
    for features in _tfidf(texts, MOST_WEIGHTS):
        yield features, [Ridge(1 / strength) for strength in (0.1, *STRENGTHS)]


def nearest_neighbours(pixels: np.ndarray, labels: np.ndarray) -> Choices:
    yield FunctionTransformer(), [KNeighborsClassifier(count) for count in NEIGHBOURS if count <= len(pixels)]


def pixel_logistic_regression(pixels: np.ndarray, labels: np.ndarray, balanced: bool) -> Choices:
    yield FunctionTransformer(), _logistic_regressions((0.1, 1.0), balanced)


def _logistic_regressions(strengths: Sequence[float], balanced: bool) -> list[Any]:
    weights = "balanced" if balanced else None
    return [LogisticRegression(C=strength, max_iter=ITERATIONS, class_weight=weights) for strength in strengths]


def _tfidf(texts: list[str], most: int) -> Iterator[Any]:
    """Weighted words; and words beside the parts of words, of 2 to 5 characters."""

    def vectorizer(**settings: Any) -> Any:
        return TfidfVectorizer(sublinear_tf=True, max_features=min(most, MOST_FEATURES), dtype=np.float32, **settings)

    yield vectorizer()
    if sum(map(len, texts)) <= MOST_CHARACTERS:
        yield make_union(vectorizer(), vectorizer(analyzer="char_wb", ngram_range=(2, 5)))
