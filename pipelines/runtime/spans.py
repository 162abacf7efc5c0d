"""Finds spans in texts with the token classifier of a bundle. Needs numpy and tokenizers, nothing else of ours: it is copied into bundles.

A long text is read in windows that overlap, and every token counts in the window that shows more of what is around it. Tokens become
spans as transformers' pipeline makes them with aggregation_strategy "simple".
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

OUTSIDE = "O"
OVERLAP = 4  # two neighbours of windows share this part of --max_length


def kept_range(number: int, last: bool, tokens: int, overlap: int) -> tuple[int, int]:
    """Which of the `tokens` of a window (without special ones) count: from the middle of the overlap with the window before to the middle
    of that with the next."""
    return overlap // 2 if number else 0, tokens if last else tokens - (overlap - overlap // 2)


def find_spans(
    text: str, offsets: Sequence[tuple[int, int]], logits: Any, labels: Sequence[str]
) -> list[dict[str, Any]]:
    """The spans of a text by the logits (tokens, labels) of its tokens, which stand at `offsets`: `text`, `label`, `score` (the mean
    probability of its tokens' labels), and `start` and `end` in characters (code points).

    A B- begins a span, and so does a label of another type than the one before; O is outside. White space around a span is none of it,
    and a combining mark behind its last character is.
    """
    exact = np.asarray(logits, np.float64).reshape(len(offsets), len(labels))
    weights = np.exp(exact - exact.max(axis=-1, keepdims=True))
    best, scores = exact.argmax(axis=-1), weights.max(axis=-1) / weights.sum(axis=-1)
    groups: list[tuple[str, list[int]]] = []
    for token, number in enumerate(best):
        prefix, dash, kind = labels[number].partition("-")
        prefix, kind = (prefix, kind) if dash and prefix in ("B", "I") else ("I", labels[number])
        if groups and groups[-1][0] == kind and prefix == "I":
            groups[-1][1].append(token)
        else:
            groups.append((kind, [token]))
    found = []
    for kind, tokens in groups:
        start, end = whole_characters(text, offsets[tokens[0]][0], offsets[tokens[-1]][1])
        if kind != OUTSIDE and start < end:
            score = float(scores[tokens].mean())
            found.append({"text": text[start:end], "label": kind, "score": score, "start": start, "end": end})
    return found


def whole_characters(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    while start < end < len(text) and unicodedata.category(text[end])[0] == "M":
        end += 1
    return start, end


def redact(text: str, spans: Sequence[dict[str, Any]]) -> str:
    """The text with [LABEL] in place of each span."""
    for span in reversed(spans):
        text = f"{text[: span['start']]}[{span['label']}]{text[span['end'] :]}"
    return text


class Windows:
    """The windows of a text as what `feed` makes of an Encoding; the `tokenizer`, of the library tokenizers, pads nothing."""

    def __init__(self, tokenizer: Any, feed: Callable[[Any], dict[str, Any]], max_length: int) -> None:
        self.tokenizer, self.feed, self.overlap = tokenizer, feed, max_length // OVERLAP
        self.tokenizer.enable_truncation(max_length, stride=self.overlap)

    def __call__(self, text: str) -> Iterator[tuple[dict[str, Any], list[int], list[tuple[int, int]]]]:
        """Of each window its inputs, int64 (1, tokens); the places in it of the tokens that count, and where these are in the text."""
        encoding = self.tokenizer.encode(text)
        windows = [encoding, *encoding.overflowing]
        for number, window in enumerate(windows):
            places = [place for place, special in enumerate(window.special_tokens_mask) if not special]
            first, after = kept_range(number, number == len(windows) - 1, len(places), self.overlap)
            kept = places[first:after]
            yield self.feed(window), kept, [window.offsets[place] for place in kept]


class SpanModel:
    """A token classifier: its `labels`, its windows, and `run`, a function from inputs to logits (1, tokens, labels)."""

    def __init__(self, windows: Windows, labels: Sequence[str], run: Callable[[dict[str, Any]], Any]) -> None:
        self.windows, self.labels, self.run = windows, labels, run

    def tokens(self, text: str) -> tuple[list[tuple[int, int]], Any]:
        """Where the tokens of a text are in it, and their logits (tokens, labels)."""
        offsets: list[tuple[int, int]] = []
        logits = []
        for feed, kept, places in self.windows(text):
            logits.append(self.run(feed)[0][kept])
            offsets += places
        return offsets, np.concatenate(logits)

    def spans(self, text: str) -> list[dict[str, Any]]:
        return find_spans(text, *self.tokens(text), self.labels)
