"""What several seeds say: mean and deviation of every stage's score, and deltas whose intervals account for seeds and test examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.core.task import Comparison, Presentation
from pipelines.report.bootstrap import MINIMUM_UNITS, Sample, resample
from pipelines.report.markdown import describe_delta, escape, markdown_table, number

FEW_SEEDS = 5  # of fewer the deviation is hardly known


def over_seeds(comparisons: Mapping[int, Comparison], metric: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The section `seeds` of report.json, from what a task says of the same stages for every seed: the scores of each stage by the
    `metric`, and the delta of each pair of stages that there is."""
    every = list(comparisons.values())
    names = [name for name in every[0].stages if all(name in one.stages for one in every)]
    scores = {name: [float(one.stages[name]["metrics"][metric]) for one in every] for name in names}
    deltas = [
        {"stage": stage, "other": other}
        | delta_over_seeds(every[0].metric, [(one.samples[stage], one.samples[other]) for one in every])
        for stage, other in pairs
        if {stage, other} <= {*names} and stage != other
    ]
    return {
        "seeds": list(comparisons),
        "stages": {
            name: {"values": values, "mean": np.mean(values), "standard_deviation": np.std(values, ddof=1)}
            for name, values in scores.items()
        },
        "deltas": deltas,
    }


def delta_over_seeds(metric: Any, samples: Sequence[tuple[Sample, Sample]]) -> dict[str, Any]:
    """The mean over seeds of the metric of one model minus that of another, with a 95 % interval for other seeds and other examples.

    `samples` are those of both models for every seed (see core.task.Comparison), of the same units throughout. The variance of the mean
    is that of the seeds' deltas divided by their number, plus that of the mean delta over resampled units (a paired bootstrap); what
    only one seed meets at one unit is in both, so the interval is rather too wide. Its quantile is Student's t, the degrees of freedom
    by Satterthwaite (1946).
    """
    from scipy.stats import t

    def mean_delta(*arrays: np.ndarray, axis: int = -1) -> np.ndarray:
        rest, found = list(arrays), []
        for one, other in samples:
            first, second = (metric(*[rest.pop(0) for _ in sample]) for sample in (one, other))
            found.append(first - second)
        return np.mean(found, axis=0)

    values = [float(metric(*one) - metric(*other)) for one, other in samples]
    delta: dict[str, Any] = {"value": float(np.mean(values)), "low": None, "high": None, "values": values}
    units = len(samples[0][0][0])
    if units >= MINIMUM_UNITS:
        found = resample([array for pair in samples for sample in pair for array in sample], mean_delta)
        of_seeds, of_units = np.var(values, ddof=1) / len(values), found.standard_error**2
        variance = of_seeds + of_units
        half = 0.0
        if variance > 0:
            freedom = variance**2 / (of_seeds**2 / (len(values) - 1) + of_units**2 / (units - 1))
            half = float(t.ppf(0.975, freedom) * np.sqrt(variance))
        delta |= {"low": delta["value"] - half, "high": delta["value"] + half}
    return delta | {"standard_deviation": float(np.std(values, ddof=1))}


def seeds_section(report: dict[str, Any], presentation: Presentation) -> list[str]:
    """The parts of the section "Over N seeds"; none for a report of one seed."""
    if not report.get("seeds"):
        return []
    seeds, digits = report["seeds"], presentation.digits
    name = str(report["primary_metric"]).replace("_", " ")
    rows = [
        [stage, *(number(found[key], f".{digits}f") for key in ("mean", "standard_deviation"))]
        + [", ".join(number(value, f".{digits}f") for value in found["values"])]
        for stage, found in seeds["stages"].items()
    ]
    count = len(seeds["seeds"])
    few = f" With {count} seeds only, deviations and intervals are rough." if count < FEW_SEEDS else ""
    return [
        f"## Over {count} seeds",
        markdown_table(["stage", f"mean {name}", "standard deviation", "each seed"], rows),
        f"Seeds {', '.join(map(str, seeds['seeds']))}, on the same splits. The table of results and the shipped files are those of the first.",
        "\n".join(f"- {escape(sentence, None)}" for sentence in _deltas(report, presentation)),
        "*The interval* is for other seeds and other test examples: its variance is that of the seeds' deltas divided by their number, plus "
        f"that of the mean delta over resampled test {presentation.unit} (paired bootstrap), with Student's t.{few}",
    ]


def seeds_sentences(report: dict[str, Any], presentation: Presentation) -> list[str]:
    """The same for the summary, in plain text."""
    seeds, digits = report["seeds"], presentation.digits
    found = seeds["stages"][report["shipped"]]
    mean, deviation = (number(found[key], f".{digits}f") for key in ("mean", "standard_deviation"))
    return [
        f"Over {len(seeds['seeds'])} seeds the mean of {report['shipped']} is {mean}, the standard deviation {deviation}.",
        *_deltas(report, presentation),
    ]


def _deltas(report: dict[str, Any], presentation: Presentation) -> list[str]:
    return [
        f"{delta['stage']} minus {delta['other']}, mean of the seeds: {describe_delta(delta, report, presentation)}."
        for delta in report["seeds"]["deltas"]
    ]
