"""A budget in words: how much worse, how large and how slow a model may be, and which of these bounds one breaks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.core.config import Checked, flag
from pipelines.core.errors import InputError
from pipelines.core.task import Task

BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass
class FitConfig(Checked):
    within: float | None = flag(
        None,
        "Points of the primary metric that the model may be below its teacher on the validation split: 1 allows an accuracy of 0.89 after 0.90. "
        "Per cent where smaller is better, as with perplexity.",
    )
    under: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What the model may take: bytes of its files, such as 10MB, and milliseconds of one example, such as 5ms (median, as the "
            "report measures it). Once for each. With neither --within nor --under the knee of the front is taken.",
            "action": "extend",
        },
    )
    on: str | None = flag(
        None,
        "The times of the device that the model is for: what 'python infer.py --profile untrained > pi.json' wrote there. Left out: the times "
        "are measured on this machine.",
    )
    students: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Other checkpoints to try as students, as they are, beside the teacher's own layers.",
            "nargs": "+",
        },
    )
    time: str | None = flag(
        None,
        "Time for the search, such as 30m: fewer and shorter trainings where it is short. Left out: no training is shortened.",
    )
    fine_tune: bool | None = flag(
        None,
        "Fine-tune the teacher first, for --teacher_epochs. Left out: unless it has a head for the labels of the data.",
    )
    train: bool = flag(
        True,
        "Train the candidates. With false they are the teacher itself, with all its layers: with fewer tokens, or cut by importance and what is "
        "left scaled to make up for it; and quantized. The teacher must know the task.",
    )
    forecast: bool = flag(
        False,
        "Make no candidates: say which shapes meet the budget, and write the graphs to time on a device into <output_dir>/untrained.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.budget, self.seconds  # which refuse words that they cannot read

    @property
    def budget(self) -> Budget:
        return Budget.parse(self.within, self.under)

    @property
    def seconds(self) -> float | None:
        seconds = None if self.time is None else quantity(self.time, SECONDS)
        if self.time is not None and seconds is None:
            raise InputError(f"expected --time with a unit, such as 90s, 30m or 2h, found {self.time!r}.")
        return seconds


def quantity(text: str, units: Mapping[str, float]) -> float | None:
    """The number in "10MB", in the unit whose factor is 1; None where it is not positive, or in none of these units."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zµ]+)\s*", text, re.IGNORECASE)
    factor = units.get(found[2].lower()) if found else None
    return float(found[1]) * factor or None if found and factor else None


@dataclass(frozen=True)
class Budget:
    """What a model may cost; None is no bound."""

    within: float | None = None  # see drop_of
    bytes: float | None = None
    ms: float | None = None

    @classmethod
    def parse(cls, within: float | None, under: Sequence[str]) -> Budget:
        """The budget of --within and --under; of two sizes or two times the last counts, so that a flag overrides a file."""
        bounds: dict[str, float] = {}
        for text in under:
            size, time = quantity(text, BYTES), quantity(text, MILLISECONDS)
            if size is None and time is None:
                raise InputError(
                    f"expected --under with a size or a time, such as 10MB or 5ms, found {text!r}. Units: kB, MB, GB; ms, s."
                )
            bounds["ms" if size is None else "bytes"] = size or time or 0.0
        return cls(within, **bounds)

    def broken(self, drop: float | None = None, **costs: float | None) -> dict[str, float]:
        """The bounds that a model breaks, and by what share of each: {"bytes": 0.2} where it takes 12 MB of 10. What is None is not known."""
        found = {}
        for name, value in (*costs.items(), ("within", drop)):
            bound = getattr(self, name)
            if bound is not None and value is not None and value > bound + 1e-9:
                found[name] = (value - bound) / (bound or 1.0)
        return found

    def words(self, name: str, value: float | None = None) -> str:
        """A bound, or another value of its kind: "10 MB", "5 ms", "1 point"."""
        value = getattr(self, name) if value is None else value
        if name == "bytes":
            return f"{value / 1e6:.3g} MB"
        return f"{value:.3g} ms" if name == "ms" else f"{value:.3g} below the teacher"


def drop_of(task: Task, teacher: float, score: float) -> float:
    """How far a score is below the teacher's: in points (hundredths), or in per cent where smaller is better; less than 0 where it is above."""
    return 100 * (teacher - score) if task.greater_is_better else 100 * (score / teacher - 1)


def exclusions(costs: Sequence[Mapping[str, float | None]], budget: Budget, tried: int) -> str:
    """What rules out what: "10 MB excludes 17 of 24 shapes; 5 ms 3 more; 4 to try". `costs` are the bytes and ms of every shape."""
    left, parts = list(costs), list[str]()
    for name in ("bytes", "ms"):
        if getattr(budget, name) is not None:
            kept = [one for one in left if name not in budget.broken(**one)]
            count = len(left) - len(kept)
            parts.append(
                f"{budget.words(name)} {f'{count} more' if parts else f'excludes {count} of {len(costs)} shapes'}"
            )
            left = kept
    return "; ".join([*(parts or [f"no bound on size or time for {len(costs)} shapes"]), f"{tried} to try"])


def impossible(costs: Mapping[str, Mapping[str, float | None]], budget: Budget) -> str:
    """What a budget that no shape can meet fails by, and what would relax it; `costs` are the bytes and ms of every shape by its name."""
    sentences, bounds = [], [name for name in ("bytes", "ms") if getattr(budget, name) is not None]
    for name in bounds:
        others = [other for other in bounds if other != name]
        meets_others = [
            one for one, cost in costs.items() if not any(other in budget.broken(**cost) for other in others)
        ]
        best = min(meets_others or costs, key=lambda one: costs[one][name] or 0.0)
        least, bound = costs[best][name] or 0.0, getattr(budget, name)
        if least <= bound:
            continue  # it is the other bound that is out of reach
        kind = {"bytes": "smallest", "ms": "fastest"}[name]
        among = f" within {budget.words(others[0])}" if others and meets_others else ""
        # Rounded up, so that what is proposed is enough.
        relaxed = f"{least / 1e6 * 1.006:.3g}MB" if name == "bytes" else f"{least * 1.006:.3g}ms"
        sentences.append(
            f"the {kind}{among} ({best}) takes {budget.words(name, least)}, {budget.words(name, least - bound)} more than "
            f"--under {budget.words(name).replace(' ', '')} (--under {relaxed} would do)"
        )
    return (
        f"expected a budget that one of {len(costs)} shapes of this teacher can meet, found none: {'; '.join(sentences)}. Allow more, use a "
        "teacher with smaller embeddings or fewer layers, another --quantization, or a shorter --max_length."
    )
