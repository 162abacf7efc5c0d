"""Places, metrics of ranking and BM25 against formulas written one query at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from pipelines.tasks.ranking import METRICS, Bm25, metrics_of_groups, metrics_of_ranks, ranks


def test_places_count_equal_scores_against_the_relevant_text():
    scores = np.array([[0.9, 0.5, 0.1], [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]])
    assert ranks(scores, np.array([0, 1, 1])).tolist() == [1, 3, 2]


def test_metrics_of_ranks():
    found = metrics_of_ranks(np.array([1, 4, 11]))
    assert found["recall_at_1"].tolist() == [1, 0, 0]
    assert found["recall_at_10"].tolist() == [1, 1, 0]
    assert found["mrr_at_10"].tolist() == [1, 0.25, 0]
    assert found["ndcg_at_10"] == pytest.approx([1, 1 / math.log2(5), 0])


def test_metrics_of_groups_equal_those_of_each_query_alone():
    generator = np.random.default_rng(0)
    sizes = [3, 15, 12, 1, 30]
    groups = np.repeat([7, 2, 9, 4, 5], sizes)
    scores, relevance = generator.normal(size=len(groups)), generator.integers(0, 3, len(groups))
    relevance[groups == 4] = 0
    mixed = generator.permutation(len(groups))
    found = metrics_of_groups(scores[mixed], relevance[mixed], groups[mixed])
    assert set(found) == set(METRICS)
    for row, query in enumerate(sorted({*groups.tolist()})):
        own = groups == query
        ranked = relevance[own][np.argsort(-scores[own])]
        relevant = np.flatnonzero(ranked)
        expected = dict.fromkeys(METRICS, 0.0)
        if len(relevant):
            expected["recall_at_1"] = float(ranked[0] > 0) / len(relevant)
            expected["recall_at_10"] = (ranked[:10] > 0).sum() / len(relevant)
            expected["mrr_at_10"] = 1 / (1 + relevant[0]) if relevant[0] < 10 else 0.0
            expected["ndcg_at_10"] = ndcg_score([relevance[own]], [scores[own]], k=10) if own.sum() > 1 else 1.0
        assert {name: values[row] for name, values in found.items()} == pytest.approx(expected)
    constant = metrics_of_groups(np.zeros(5), np.array([1, 0, 0, 0, 0]), np.zeros(5))
    assert constant["mrr_at_10"].tolist() == [0.2]


def test_bm25_equals_its_formula():
    corpus = ["the cat sat on the mat", "a dog and a cat", "birds fly", "the dog sat"]
    queries = ["the cat", "dog dog", "nothing here"]
    found = Bm25().fit(corpus).scores(queries)
    words = [text.split() for text in corpus]
    words = [[word for word in text if len(word) > 1] for text in words]
    mean = np.mean([len(text) for text in words])
    for row, query in enumerate(queries):
        for column, text in enumerate(words):
            expected = 0.0
            for word in query.split():
                has, count = sum(word in other for other in words), text.count(word)
                rarity = math.log(1 + (len(words) - has + 0.5) / (has + 0.5))
                expected += rarity * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(text) / mean))
            assert found[row, column] == pytest.approx(expected)
