"""What a user would try before a transformer: the sentence that shares most with the question, and the likeliest words in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from pipelines.data.text import SENTENCE_END
from pipelines.tasks.baselines import Choices
from pipelines.tasks.question_answering.scores import NO_SPAN

WORDS = 5  # of a span, at most
WORD = re.compile(r"[\w'-]+")


def written(examples: Any) -> list[str]:
    """Examples of a split as the baselines read them: each a line of JSON, [number of the row, question, context, answer, start]."""
    rows = zip(*(examples[name] for name in ("label", "question", "context", "answers", "starts")), strict=True)
    return [json.dumps([*row[:3], *(one[0] if one else None for one in row[3:])]) for row in rows]


class BestSentence(BaseEstimator):
    """The sentence of the context whose TF-IDF weighted words are nearest to the question's, by their cosine."""

    def fit(self, lines: Sequence[str], labels: Any = None) -> BestSentence:
        self.vectorizer_ = TfidfVectorizer(sublinear_tf=True)
        self.vectorizer_.fit([text for line in lines for text in json.loads(line)[1:3]])
        return self

    def sentence(self, question: str, context: str) -> tuple[int, int, float]:
        ends = [match.span() for match in SENTENCE_END.finditer(context)]
        bounds = [0, *(place for span in ends for place in span), len(context)]
        spans = list(zip(bounds[::2], bounds[1::2], strict=True))
        texts = [question, *(context[start:end] for start, end in spans)]
        vectors = self.vectorizer_.transform(texts)
        cosines = (vectors[1:] @ vectors[0].T).toarray().ravel()
        best = int(cosines.argmax())
        return *spans[best], float(cosines[best])

    def predict(self, lines: Sequence[str]) -> np.ndarray:
        """Predictions (questions, 5), see scores.py; the score is the logarithm of the cosine."""
        rows = [json.loads(line) for line in lines]
        found = [(row[0], *self.sentence(row[1], row[2])) for row in rows]
        return np.array(
            [[number, np.log(max(cosine, 1e-9)), start, end, NO_SPAN] for number, start, end, cosine in found]
        )


class SpanOfSentence(BestSentence):
    """The likeliest words of that sentence, by a logistic regression of what a span is made of and what stands around it."""

    def fit(self, lines: Sequence[str], labels: Any = None) -> SpanOfSentence:
        super().fit(lines)
        features, right = [], []
        for _, question, context, answer, start in map(json.loads, lines):
            for first, last, described in self.spans(question, context):
                features.append(described)
                right.append(answer is not None and (first, last) == (start, start + len(answer)))
        self.model_ = make_pipeline(DictVectorizer(), LogisticRegression(max_iter=300))
        self.model_.fit(features, right)
        return self

    def spans(self, question: str, context: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
        begin, end, _ = self.sentence(question, context)
        words = [(match.start(), match.end(), match[0]) for match in WORD.finditer(context, begin, end)]
        asked = {word.lower() for word in WORD.findall(question)}
        texts = ["^", *(word for _, _, word in words), "$"]
        for first in range(len(words)):
            for last in range(first, min(first + WORDS, len(words))):
                inside = texts[first + 1 : last + 2]
                yield (
                    words[first][0],
                    words[last][1],
                    {
                        "words": str(len(inside)),
                        "capitals": sum(word[0].isupper() for word in inside) / len(inside),
                        "asked": sum(word.lower() in asked for word in inside) / len(inside),
                        "before": texts[first].lower(),
                        "after": texts[last + 2].lower(),
                        "first": inside[0].lower(),
                        "apart": any(one in context[words[first][0] : words[last][1]] for one in ',."'),
                    },
                )

    def predict(self, lines: Sequence[str]) -> np.ndarray:
        found = []
        for number, question, context, *_ in map(json.loads, lines):
            spans = list(self.spans(question, context))
            if not spans:
                found.append([number, NO_SPAN, 0, 0, NO_SPAN])
                continue
            likely = self.model_.predict_log_proba([described for *_, described in spans])[:, -1]
            first, last, _ = spans[int(likely.argmax())]
            found.append([number, likely.max(), first, last, NO_SPAN])
        return np.array(found, np.float64)


def tfidf_sentence(lines: list[str], labels: np.ndarray) -> Choices:
    yield FunctionTransformer(), [BestSentence()]


def tfidf_span(lines: list[str], labels: np.ndarray) -> Choices:
    yield FunctionTransformer(), [SpanOfSentence()]
