"""The delta of two models, from the same test examples drawn again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Sample = tuple[np.ndarray, ...]
MINIMUM_UNITS = 20  # an interval over fewer says nothing
RESAMPLES = 2000


def resample(arrays: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], level: float = 0.95) -> Any:
    """SciPy's bootstrap of a statistic of arrays (units,): each resample draws units with replacement, the same of all arrays."""
    from scipy.stats import bootstrap

    # The batch bounds the memory whatever the size of the split.
    batch, random = max(1, 2_000_000 // sum(map(len, arrays))), np.random.default_rng(0)
    settings = {"confidence_level": level, "n_resamples": RESAMPLES, "batch": batch, "rng": random}
    return bootstrap(arrays, statistic, paired=True, vectorized=True, method="percentile", **settings)


def paired_bootstrap(
    metric: Callable[..., np.ndarray], sample: Sample, other: Sample, level: float = 0.95
) -> dict[str, float | None]:
    """The metric of `sample` minus that of `other`, with a percentile interval of this level where there are enough units for one. Each end
    of one at 0.9 is a one-sided 95 % bound.

    Samples and metric are those of core.task.Comparison. Each resample scores both models on the same units, so what is hard for both
    cancels (Koehn, 2004).
    """

    def delta(*arrays: np.ndarray, axis: int = -1) -> np.ndarray:
        return metric(*arrays[: len(sample)]) - metric(*arrays[len(sample) :])

    arrays = (*sample, *other)
    value = float(delta(*arrays))
    if len(sample[0]) < MINIMUM_UNITS:
        return {"value": value, "low": None, "high": None}
    low, high = resample(arrays, delta, level).confidence_interval
    return {"value": value, "low": float(low), "high": float(high)}
