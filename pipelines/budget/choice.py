"""Which rows of a search are inside the budget, which of them is the answer, and how far the others are from it.

A row is what was trained or what needs no training: its bytes, ms and validation score, and which bounds it breaks by what share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipelines.budget.words import Budget

Row = dict[str, Any]


def rank(score: float, greater_is_better: bool) -> float:
    """More is better, whatever the metric; a score that is no number is worst."""
    if score is None or math.isnan(score):
        return -math.inf
    return score if greater_is_better else -score


def sought(budget: Budget) -> str:
    """What a budget asks for: the `best` model inside a bound on size or time, with --within alone the `fastest`, without any the `knee`."""
    if budget.bytes is not None or budget.ms is not None:
        return "best"
    return "knee" if budget.within is None else "fastest"


def choose(rows: Sequence[Row], budget: Budget, greater_is_better: bool) -> dict[str, Row | None]:
    """The `answer` of the rows inside the budget (see sought), and which of them are the `best`, the `smallest` and the `fastest`."""
    inside = [row for row in rows if not row["breaks"] and rank(row["score"], greater_is_better) > -math.inf]
    if not inside:
        return dict.fromkeys(("answer", "best", "smallest", "fastest"))

    def better(row: Row) -> tuple[float, float]:
        return -rank(row["score"], greater_is_better), row["bytes"]

    found = {
        "best": min(inside, key=better),
        "smallest": min(inside, key=lambda row: (row["bytes"], *better(row))),
        "fastest": min(inside, key=lambda row: (row["ms"], *better(row))),
    }
    asked = sought(budget)
    answer = knee(front(inside, greater_is_better), greater_is_better) if asked == "knee" else found[asked]
    return {"answer": answer, **found}


def front(rows: Sequence[Row], greater_is_better: bool) -> list[Row]:
    """The rows that no other one is at least as good, as small and as fast as, and different from."""

    def goods(row: Row) -> tuple[float, float, float]:
        return rank(row["score"], greater_is_better), -row["bytes"], -row["ms"]

    def beats(other: Row, row: Row) -> bool:
        pairs = list(zip(goods(other), goods(row), strict=True))
        return all(more >= less for more, less in pairs) and any(more > less for more, less in pairs)

    return [row for row in rows if not any(beats(other, row) for other in rows)]


def knee(rows: Sequence[Row], greater_is_better: bool) -> Row:
    """The row farthest above the line from the cheapest to the best, cost and score each scaled to [0, 1] (Satopää et al., 2011).

    The cost is the logarithm of bytes times milliseconds: ten times smaller counts as much as ten times faster.
    """
    costs = [math.log(row["bytes"] * row["ms"]) for row in rows]
    scores = [rank(row["score"], greater_is_better) for row in rows]

    def scaled(values: list[float]) -> list[float]:
        least, spread = min(values), (max(values) - min(values)) or 1.0
        return [(value - least) / spread for value in values]

    gains = [score - cost for score, cost in zip(scaled(scores), scaled(costs), strict=True)]
    return rows[gains.index(max(gains))]


def nearest(rows: Sequence[Row], count: int = 3) -> list[Row]:
    """The rows that break the bounds least, by the sum of their shares."""
    return sorted(rows, key=lambda row: sum(row["breaks"].values()))[:count]


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """So many of the items, or all, from the first to the last."""
    count = min(count, len(items))
    return [items[round(step * (len(items) - 1) / max(1, count - 1))] for step in range(count)]


def rounds_of(
    seconds: Sequence[float], fixed: float, time: float | None, asked: str = "best"
) -> list[tuple[int, float]]:
    """The number of trainings in each round, and the share of the whole training that each gets, to end within `time`.

    `seconds` are those of the candidates' whole trainings, the slowest candidate first; `fixed` what each costs besides. There is one round,
    but for the `best` of candidates whose trainings take longer than there is: then half of them, rounded up, go on from round to round, with
    twice the training (successive halving; Jamieson and Talwalkar, 2016). For the `fastest` that is good enough the interval is halved
    instead, which takes as few trainings as the number of candidates has bits. Where a training would get less than a quarter of the whole,
    there are fewer. The last one is trained however little time there is.
    """
    if asked == "fastest":  # at worst the slowest ones are tried
        seconds = [seconds[2**step - 1] for step in range(len(seconds).bit_length())]
    if time is None or sum(seconds) + fixed * len(seconds) <= time:
        return [(len(seconds), 1.0)]
    for count in range(len(seconds), 0, -1):
        counts = [count]
        while asked == "best" and counts[-1] > 1:
            counts.append((counts[-1] + 1) // 2)
        shares = [2.0 ** (place + 1 - len(counts)) for place in range(len(counts))]
        mean = sum(seconds[:count]) / count
        left = time - fixed * sum(counts)
        last = min(1.0, left / (mean * sum(one * share for one, share in zip(counts, shares, strict=True))))
        if last >= 0.25 or count == 1:
            break
    last = max(last, 0.05)
    return [(one, round(last * share, 3)) for one, share in zip(counts, shares, strict=True)]
