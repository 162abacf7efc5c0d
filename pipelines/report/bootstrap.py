"""The delta of two models, from the same test examples drawn again and again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Sample = tuple[np.ndarray, ...]
MINIMUM_UNITS = 20  # an interval over fewer says nothing


def paired_bootstrap(
    metric: Callable[..., np.ndarray], sample: Sample, other: Sample, *, level: float = 0.95, resamples: int = 2000
) -> dict[str, float | None]:
    """The metric of `sample` minus that of `other`, with a percentile interval of this level where there are enough units for one. Each end
    of one at 0.9 is a one-sided 95 % bound.

    Samples and metric are those of core.task.Comparison. Each resample draws units with replacement and scores both models on them, so
    what is hard for both cancels (Koehn, 2004).
    """
    from scipy.stats import bootstrap

    def delta(*arrays: np.ndarray, axis: int = -1) -> np.ndarray:
        return metric(*arrays[: len(sample)]) - metric(*arrays[len(sample) :])

    arrays, units = (*sample, *other), len(sample[0])
    value = float(delta(*arrays))
    if units < MINIMUM_UNITS:
        return {"value": value, "low": None, "high": None}
    # The batch bounds the memory whatever the size of the split.
    settings = {"n_resamples": resamples, "batch": max(1, 1_000_000 // units), "rng": np.random.default_rng(0)}
    low, high = bootstrap(
        arrays, delta, paired=True, vectorized=True, method="percentile", confidence_level=level, **settings
    ).confidence_interval
    return {"value": value, "low": float(low), "high": float(high)}
