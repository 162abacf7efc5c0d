"""What a user would try before a transformer: the usual tag of a word; regular expressions and lists of names.

Their inputs are texts with a MARK before every word, so that their tags are those of the data's own words. Estimators of scikit-learn.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.preprocessing import FunctionTransformer

from pipelines.runtime.spans import OUTSIDE
from pipelines.tasks.baselines import Choices
from pipelines.tasks.token_classification.entities import entities

MARK = "\x1f"

# Personal data that has a form: what the pattern finds whole, each with a word that its type's name has.
PATTERNS = {
    "mail": re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]*\w"),
    "iban": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
    "date": re.compile(
        r"\b(?:\d{4}-\d\d?-\d\d?|\d\d?[./]\d\d?[./]\d{2,4}|\d\d? [A-Z][a-z]{2,8} \d{4}|[A-Z][a-z]{2,8} \d\d?, \d{4})\b"
    ),
    "phone": re.compile(r"(?<!\w)(?:\+|\(|0)[\d(][\d ()./x-]{6,}\d(?!\w)"),
}


def marked(text: str, starts: Sequence[int]) -> str:
    """A text with a MARK before every word; marks of its own become spaces."""
    edges = [0, *starts, len(text)]
    return MARK.join(text[start:end].replace(MARK, " ") for start, end in zip(edges, edges[1:], strict=False))


def words_in(text: str) -> list[str]:
    return [word.strip() for word in text.split(MARK)[1:]]


class UsualTag(BaseEstimator):
    """The tag that a word has most often in training; O, or the tag that is most frequent of all, for a word that is new."""

    def __init__(self, outside: int | None = None) -> None:
        self.outside = outside

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> UsualTag:
        counts: dict[str, Counter[int]] = defaultdict(Counter)
        for text, label in zip(texts, labels, strict=True):
            for word, tag in zip(words_in(text), label.split(), strict=True):
                counts[word][int(tag)] += 1
        self.tags_ = {word: of_word.most_common(1)[0][0] for word, of_word in counts.items()}
        usual = sum(counts.values(), Counter()).most_common(1)
        self.other_ = usual[0][0] if self.outside is None else self.outside
        return self

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """The tag of every word of all texts, one after another."""
        found = [self.tags_.get(word, self.other_) for text in texts for word in words_in(text)]
        return np.array(found, np.float32)


class PatternsAndNames(BaseEstimator):
    """Spans that a pattern of their type finds, and those whose words are an entity in training (a gazetteer), the longest first."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = names  # of the tags

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> PatternsAndNames:
        number = {name: index for index, name in enumerate(self.names)}
        types = {name[2:] for name in self.names if name.startswith("B-")}
        self.patterns_ = [
            (number[f"B-{one}"], number[f"I-{one}"], PATTERNS[key])
            for key in PATTERNS
            for one in types
            if key in one.lower()
        ]
        with_pattern = {begin for begin, _, _ in self.patterns_}
        found: dict[tuple[str, ...], Counter[tuple[int, int]]] = defaultdict(Counter)
        for text, label in zip(texts, labels, strict=True):
            words, tags = words_in(text), [self.names[int(tag)] for tag in label.split()]
            for _, start, end, kind in sorted(entities(tags, [0] * len(tags))):
                if tags[start] == f"B-{kind}" and number[tags[start]] not in with_pattern:
                    found[tuple(words[start:end])][number[tags[start]], number[f"I-{kind}"]] += 1
        self.gazetteer_ = {words: counts.most_common(1)[0][0] for words, counts in found.items()}
        self.longest_ = max(map(len, self.gazetteer_), default=0)
        self.other_ = number[OUTSIDE]
        return self

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """The tag of every word of all texts, one after another."""
        return np.array([tag for text in texts for tag in self._tags(text)], np.float32)

    def _tags(self, text: str) -> Iterator[int]:
        words, plain = words_in(text), text.replace(MARK, "")
        ends = np.cumsum([len(part) for part in text.split(MARK)])
        starts = ends[:-1]  # of each word, in the text without marks
        tags = [self.other_] * len(words)
        for begin, inside, pattern in self.patterns_:
            for match in pattern.finditer(plain):
                own = np.flatnonzero((starts >= match.start()) & (starts < match.end()))
                if len(own) and all(tags[word] == self.other_ for word in own):
                    for word in own:
                        tags[word] = begin if word == own[0] else inside
        start = 0
        while start < len(words):
            step = 1
            for length in range(min(self.longest_, len(words) - start), 0, -1):
                one = self.gazetteer_.get(tuple(words[start : start + length]))
                if one and all(tag == self.other_ for tag in tags[start : start + length]):
                    tags[start : start + length] = [one[0], *[one[1]] * (length - 1)]
                    step = length
                    break
            start += step
        yield from tags


def usual_tag(names: list[str]) -> Choices:
    yield FunctionTransformer(), [UsualTag(names.index(OUTSIDE) if OUTSIDE in names else None)]


def patterns_and_names(names: list[str]) -> Choices:
    if OUTSIDE in names:
        yield FunctionTransformer(), [PatternsAndNames(names)]
