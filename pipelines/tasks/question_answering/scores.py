"""Exact match and F1 of answers, by the published rules of SQuAD (Rajpurkar et al., 2016, 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipelines.runtime.answers import trimmed

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

# Columns of predictions (rows, 5): the row of the question in its split, the log probability of the likeliest span of a window, where it
# begins and ends in the context (characters), and the log probability that the window has no answer.
QUESTION, SCORE, START, END, NONE = range(5)
NO_SPAN = -1e4  # the log probability of a span that is none


def normalized(answer: str) -> str:
    """An answer in lower case, without punctuation (of ASCII) and articles, its words parted by single spaces."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(WITHOUT_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    return float(normalized(answer) == normalized(reference))


def f1(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall of the answer's words; where either has none, whether both have none."""
    words, wanted = normalized(answer).split(), normalized(reference).split()
    if not words or not wanted:
        return float(words == wanted)
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted))


def score_answers(answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1 of each answer (questions,): the largest over its references. A question without any has the empty answer."""
    pairs = [
        (answer, [one for one in wanted if normalized(one)] or [""])
        for answer, wanted in zip(answers, references, strict=True)
    ]
    exact, partly = (
        np.array([max(metric(answer, one) for one in wanted) for answer, wanted in pairs])
        for metric in (exact_match, f1)
    )
    return exact, partly


def best_spans(predictions: np.ndarray, questions: int, unanswerable: bool) -> np.ndarray:
    """Of the predictions of all windows, (rows, 5), the answer to each question (questions, 3): its log probability, start and end.

    It is the likeliest span of all windows; with `unanswerable` the empty one, 0 to 0, where that is likelier even in the window in which
    it is least likely.
    """
    predictions = predictions.astype(np.float64)
    rows = predictions[:, QUESTION].astype(np.int64)
    best = np.tile([NO_SPAN, 0.0, 0.0], (questions, 1))
    order = np.argsort(predictions[:, SCORE], kind="stable")  # the likeliest is written last
    best[rows[order]] = predictions[order][:, [SCORE, START, END]]
    if unanswerable:
        none = np.full(questions, np.inf)
        np.minimum.at(none, rows, predictions[:, NONE])
        is_none = none > best[:, 0]
        best[is_none] = 0.0
        best[is_none, 0] = none[is_none]
    return best


def answers_of(best: np.ndarray, contexts: Sequence[str]) -> list[str]:
    """The texts of the answers (questions, 3) that `best_spans` gives, as a bundle gives them."""
    spans = (trimmed(context, int(start), int(end)) for context, (_, start, end) in zip(contexts, best, strict=True))
    return [context[start:end] for context, (start, end) in zip(contexts, spans, strict=True)]
