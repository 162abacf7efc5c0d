"""Answers questions with parts of texts, with ONNX Runtime. Needs numpy and tokenizers; stands alone in a bundle, beside infer.py."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np

ANSWERS = 3  # that are kept of each question, the likeliest first


def likeliest_spans(
    start_logits: Any, end_logits: Any, first: int, last: int, longest: int, count: int = ANSWERS
) -> tuple[Any, Any, Any, float]:
    """The likeliest spans of a window whose context is the tokens `first` to `last`: their first and last tokens and log probabilities,
    (spans,) each, the likeliest first; and the log probability that there is no answer.

    A probability is that of the start times that of the end, both among the tokens of the context and the first token of all, which
    means that there is none. No span ends before it begins or has more than `longest` tokens.
    """
    places = np.r_[0, first : last + 1]

    def log_probabilities(logits: Any) -> Any:
        exact = np.asarray(logits, np.float64)[places]
        return exact - np.logaddexp.reduce(exact)

    start, end = log_probabilities(start_logits), log_probabilities(end_logits)
    none = float(start[0] + end[0])
    padded = np.r_[end[1:], np.full(longest - 1, -np.inf)]
    if len(start) == 1:  # no context at all
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), none
    # (starts, lengths)
    both = start[1:, None] + np.lib.stride_tricks.sliding_window_view(padded, longest)
    order = np.argsort(-both, axis=None, kind="stable")[:count]
    order = order[np.isfinite(both.reshape(-1)[order])]
    starts, lengths = np.divmod(order, longest)
    return first + starts, first + starts + lengths, both.reshape(-1)[order], none


def trimmed(context: str, start: int, end: int) -> tuple[int, int]:
    """A span of characters without the white space at its ends, and with the combining marks that belong to its last character."""
    part = context[start:end]
    start, end = start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
    if start >= end:
        return start, start
    while end < len(context) and unicodedata.category(context[end]).startswith("M"):
        end += 1
    return start, end


class AnswerModel:
    """A model that finds the answer to a question in a context; `tokenizer` is one of the tokenizers library, `session` of ONNX Runtime,
    and `feed` makes inputs of the graph from an Encoding."""

    def __init__(
        self,
        tokenizer: Any,
        feed: Callable[[Any], dict[str, Any]],
        session: Any,
        inputs: dict[str, Any],
        outputs: dict[str, Any],
    ) -> None:
        self.tokenizer, self.feed, self.session, self.inputs, self.outputs = tokenizer, feed, session, inputs, outputs
        # A longer context is read in windows that share tokens.
        tokenizer.enable_truncation(inputs["max_length"], stride=inputs["overlap"], strategy="only_second")
        self.room = inputs["max_length"] - tokenizer.num_special_tokens_to_add(True) - inputs["overlap"] - 1

    def windows(self, question: str, context: str) -> list[Any]:
        """The windows of a context, each an Encoding of tokenizers. Raises ValueError for a question that leaves no room for the context."""
        try:
            tokens = len(self.tokenizer.encode(question, add_special_tokens=False))
        except Exception:  # the library's own, of a question alone that is longer than a window
            tokens = self.inputs["max_length"]
        if tokens > self.room:
            raise ValueError(
                f"expected a question of at most {self.room} tokens, found {tokens} or more in {question[:40]!r}. Shorten it."
            )
        encoding = self.tokenizer.encode(question, context)
        return [encoding, *encoding.overflowing]

    def logits(self, window: Any) -> tuple[Any, Any]:
        """The logits of the first and the last token of the answer, (tokens,) each."""
        start, end = self.session.run(["start_logits", "end_logits"], self.feed(window))
        return start[0], end[0]

    def answer(self, question: str, context: str) -> dict[str, Any]:
        """The likeliest answer, its probability and its place: answer is context[start:end], empty where there is none.

        `answers` are the likeliest ones, each once, without the one that there is none.
        """
        found: dict[tuple[int, int], float] = {}
        none = math.inf
        for window in self.windows(question, context):
            sequences = window.sequence_ids
            if 1 not in sequences:  # no token of the context
                continue
            first, last = sequences.index(1), len(sequences) - 1 - sequences[::-1].index(1)
            longest = self.outputs["max_answer_tokens"]
            starts, ends, scores, without = likeliest_spans(*self.logits(window), first, last, longest)
            none = min(none, without)
            for begin, end, score in zip(starts.tolist(), ends.tolist(), scores.tolist(), strict=True):
                span = trimmed(context, window.offsets[begin][0], window.offsets[end][1])
                found[span] = max(score, found.get(span, -math.inf))
        order = sorted(found, key=lambda span: -found[span])[:ANSWERS]
        answers = [
            {"answer": context[start:end], "score": math.exp(found[start, end]), "start": start, "end": end}
            for start, end in order
        ]
        nothing = {"answer": "", "score": math.exp(min(none, 0.0)), "start": 0, "end": 0}
        has_none = self.outputs["unanswerable"] and (not order or none > found[order[0]])
        return {**(nothing if has_none or not answers else answers[0]), "answers": answers}
