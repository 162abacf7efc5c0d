"""Retrieval and ranking: the rank of the relevant text for each query, what that is worth; BM25 and TF-IDF. NumPy and SciPy alone.

What is relevant is counted after all others of the same score, so that a model that tells nothing apart has the worst rank, not the best.
All functions give one number a query, whose mean is the metric: a paired bootstrap draws queries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

METRICS = ("mrr_at_10", "ndcg_at_10", "recall_at_1", "recall_at_10")
K1, B = 1.2, 0.75  # of BM25, as Lucene has them


def ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """The rank, from 1 on, of the text `relevant` (queries,) among `scores` (queries, texts), for each query."""
    own = np.take_along_axis(scores, relevant[:, None], axis=1)
    return np.asarray((scores >= own).sum(axis=1))


def metrics_of_ranks(found: np.ndarray) -> dict[str, np.ndarray]:
    """METRICS of queries with one relevant text each, whose ranks (queries,) these are."""
    seen = found <= 10
    return {
        "mrr_at_10": np.where(seen, 1 / found, 0.0),
        "ndcg_at_10": np.where(seen, 1 / np.log2(1 + found), 0.0),
        "recall_at_1": (found <= 1).astype(float),
        "recall_at_10": seen.astype(float),
    }


def metrics_of_groups(scores: np.ndarray, relevance: np.ndarray, groups: np.ndarray) -> dict[str, np.ndarray]:
    """METRICS of queries with several candidates, any number of them relevant, in the rising order of the queries' numbers.

    All three are (candidates,): the model's scores, how relevant a candidate is (0: not at all), and the number of its query. The gain of a
    candidate is its relevance (Järvelin & Kekäläinen, 2002). A query without a relevant candidate has 0 everywhere.
    """
    queries, query = np.unique(groups, return_inverse=True)
    found = _in_order(query, relevance, scores)
    best = _in_order(query, -relevance, relevance)
    counts = np.bincount(query)
    place = 1 + np.arange(len(scores)) - np.repeat(np.cumsum(counts) - counts, counts)  # in the list of its own query
    of = np.sort(query)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(of, weights=values, minlength=len(queries))

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros(len(queries)), where=whole > 0)

    is_relevant, discount = found > 0, np.where(place <= 10, 1 / np.log2(1 + place), 0.0)
    first = np.full(len(queries), np.inf)
    np.minimum.at(first, of[is_relevant], place[is_relevant])
    return {
        "mrr_at_10": np.where(first <= 10, 1 / first, 0.0),
        "ndcg_at_10": share(total(found * discount), total(best * discount)),
        "recall_at_1": share(total(is_relevant & (place <= 1)), total(is_relevant)),
        "recall_at_10": share(total(is_relevant & (place <= 10)), total(is_relevant)),
    }


def means(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """The metrics of all queries together."""
    return {name: float(values.mean()) for name, values in metrics.items()}


def _in_order(query: np.ndarray, relevance: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """How relevant the candidates are, query after query, the best score first; of equal scores the least relevant first."""
    order = np.lexsort((relevance, -scores, query))
    return np.abs(relevance[order])


class Bm25(BaseEstimator):
    """BM25 (Robertson & Zaragoza, 2009) over the words of scikit-learn's CountVectorizer: fitted on a corpus, it scores queries."""

    def fit(self, texts: Any, labels: Any = None) -> Bm25:
        self.words_ = CountVectorizer()
        counts = self.words_.fit_transform(texts).tocsr().astype(np.float64)
        has = np.bincount(counts.indices, minlength=counts.shape[1])
        rarity = np.log(1 + (len(texts) - has + 0.5) / (has + 0.5))
        lengths = np.asarray(counts.sum(axis=1)).ravel()
        norm = np.repeat(1 - B + B * lengths / max(lengths.mean(), 1e-9), np.diff(counts.indptr))
        counts.data = rarity[counts.indices] * counts.data * (K1 + 1) / (counts.data + K1 * norm)
        self.weights_ = counts  # (texts, words)
        return self

    def scores(self, queries: Any) -> np.ndarray:
        """(queries, texts): how well each text of the corpus fits each query."""
        return np.asarray((self.words_.transform(queries) @ self.weights_.T).toarray())


class Tfidf(BaseEstimator):
    """Cosines of weighted words, with the methods of Bm25."""

    def fit(self, texts: Any, labels: Any = None) -> Tfidf:
        self.words_ = TfidfVectorizer(sublinear_tf=True, dtype=np.float32)
        self.weights_ = self.words_.fit_transform(texts)
        return self

    def scores(self, queries: Any) -> np.ndarray:
        return np.asarray((self.words_.transform(queries) @ self.weights_.T).toarray())


class Retriever(BaseEstimator):
    """An estimator of scikit-learn that searches by Bm25 or Tfidf in what it was fitted on: see split_inputs() for its inputs."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def fit(self, inputs: Any, labels: Any = None) -> Retriever:
        self.index_ = self.kind().fit(split_inputs(inputs)[2])
        vars(self.index_.words_).pop("_stop_words_id", None)  # an address, which is another one in every process
        return self

    def predict(self, inputs: Any) -> np.ndarray:
        """The nearest text of its own corpus for each input: what is timed."""
        queries, _, others = split_inputs(inputs)
        return np.asarray(self.index_.scores([*queries, *others]).argmax(axis=1))

    def ranks(self, inputs: Any) -> np.ndarray:
        """The rank of the positive of each query in the corpus that comes with it."""
        queries, labels, corpus = split_inputs(inputs)
        return ranks(self.kind().fit(corpus).scores(queries), labels - len(queries))


def split_inputs(inputs: Any) -> tuple[list[str], np.ndarray, list[str]]:
    """Queries (text), the row of each one's positive (in queries and corpus, one after the other), and corpus, of texts that have that row, or
    -1 for a text of the corpus, and a tab before them."""
    rows = [str(one).partition("\t") for one in inputs]
    queries = [(text, int(label)) for label, _, text in rows if label != "-1"]
    corpus = [text for label, _, text in rows if label == "-1"]
    return [text for text, _ in queries], np.array([label for _, label in queries], np.int64), corpus
