"""How good vectors are: by what is found with them, by given scores, or by the neighbours that another embedder finds."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.runtime.vectors import convert, unit
from pipelines.tasks.ranking import ranks
from pipelines.tasks.sentence_embedding.data import CORPUS
from pipelines.tasks.text_regression import spearman

NEAREST = 10
MOST_QUERIES, MOST_TEXTS = 500, 5_000  # whose likeness is compared, so that it takes a second


def ranks_of(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The rank (queries,) of each query's positive in the corpus, of vectors in the rows of queries_and_corpus().

    A baseline finds ranks, which stay what they are.
    """
    if vectors.ndim == 1:
        return vectors
    is_query = labels != CORPUS
    vectors = unit(vectors)
    return ranks(vectors[is_query] @ vectors[~is_query].T, labels[is_query] - is_query.sum())


def cosines_of(vectors: np.ndarray) -> np.ndarray:
    """The cosine (pairs,) of each pair, whose first texts are the first half of the rows."""
    return cosines(*np.split(vectors, 2))


def cosines(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The cosine (texts,) of each vector with the other one in its row."""
    return np.asarray((unit(vectors) * unit(others)).sum(axis=1))


def likeness(vectors: np.ndarray, labels: np.ndarray, searched: bool) -> np.ndarray:
    """Cosines (texts, others) of queries with the corpus where one is `searched`, else of texts with all texts, themselves left out."""
    vectors = unit(vectors)
    if searched:
        return vectors[labels != CORPUS][:MOST_QUERIES] @ vectors[labels == CORPUS][:MOST_TEXTS].T
    found = vectors[:MOST_QUERIES] @ vectors[:MOST_TEXTS].T
    found[np.arange(len(found)), np.arange(len(found))] = -np.inf
    return found


def overlap(found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The share (texts,) of the nearest of each text that are among the nearest in the reference, too; both are likeness()."""
    count = min(NEAREST, found.shape[1] - 1)
    near, wanted = (np.argpartition(-one, count - 1, axis=1)[:, :count] for one in (found, reference))
    return np.asarray((near[:, :, None] == wanted[:, None, :]).any(axis=2).mean(axis=1))


def rank_correlation(found: np.ndarray, reference: np.ndarray) -> float:
    """Spearman's correlation of all cosines of likeness()."""
    counted = np.isfinite(found)
    return float(spearman(found[counted], reference[counted]))


def options(vectors: np.ndarray, sizes: list[int], score: Any) -> list[dict[str, Any]]:
    """What `score` says of the vectors in fewer bytes: as int8, as bits, cut to each size."""
    forms = [("float32", vectors.shape[1]), ("int8", vectors.shape[1]), ("binary", vectors.shape[1])]
    forms += [(kind, size) for size in sizes for kind in ("float32", "int8")]
    rows = []
    for kind, size in forms:
        stored = convert(vectors[:, :size], kind)
        rows.append({"kind": kind, "size": size, "bytes": int(stored[0].nbytes), "score": score(unit(stored))})
    return rows
