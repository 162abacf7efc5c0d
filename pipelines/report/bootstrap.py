"""The difference of two models, from the same examples drawn again and again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ResampledMetric = Callable[[np.ndarray, np.ndarray], np.ndarray]


def accuracy(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Accuracy over the last axis, so that many resamples are scored in one call."""
    return np.mean(predictions == references, axis=-1)


# Written over the last axis, unlike the metrics above, which score one set of answers.
RESAMPLED_METRICS: dict[str, ResampledMetric] = {"accuracy": accuracy}


def perplexity(losses: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Perplexity of documents, by the summed loss and the number of tokens of each, over the last axis."""
    return np.exp(np.sum(losses, axis=-1) / np.sum(tokens, axis=-1))


def paired_bootstrap(
    predictions: np.ndarray,
    teacher_predictions: np.ndarray,
    references: np.ndarray,
    metric: ResampledMetric = accuracy,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """The difference of two models' scores on the same examples, with a 95 % percentile interval.

    All arrays have shape (examples,); `metric` maps two arrays (…, examples) to scores (…). Each resample draws
    examples with replacement and scores both models on them, so what is hard for both cancels (Koehn, 2004).
    """
    generator = np.random.default_rng(seed)
    count = len(references)
    at_once = max(1, 4_000_000 // count)  # bounds the memory to some 100 MB whatever the size of the split
    differences = []
    for start in range(0, resamples, at_once):
        drawn = generator.integers(0, count, (min(at_once, resamples - start), count))
        resampled = references[drawn]
        differences.append(metric(predictions[drawn], resampled) - metric(teacher_predictions[drawn], resampled))
    low, high = np.percentile(np.concatenate(differences), [2.5, 97.5])
    value = metric(predictions, references) - metric(teacher_predictions, references)
    return {"value": float(value), "low": float(low), "high": float(high)}
