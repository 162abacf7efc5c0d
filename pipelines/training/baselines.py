"""Baselines: what a user would try before a transformer, fitted on the training split and chosen on the validation split.

They are estimators of scikit-learn. The task names them and gives them their inputs; here they become stages like any other.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import make_pipeline
from threadpoolctl import threadpool_limits

from pipelines.core.records import Outcome
from pipelines.core.task import Candidates, Task
from pipelines.models.predict import sample_of

BASELINE_FILE = "model.joblib"
MOST_EXAMPLES = 50_000  # of a split: what has more is fitted in minutes, not hours


def fit_baseline(source: None, directory: Path, task: Task, baseline: str) -> Outcome:
    """Fit the candidates of one of the task's baselines and keep the one with the best primary metric on the validation split.

    There is no `source`: a baseline learns from the data alone, of a large split from a part drawn at random.
    """
    parts = {split: sample_of(task.splits[split], MOST_EXAMPLES) for split in ("train", "validation")}
    data = {split: (task.baseline_inputs(part), np.asarray(part["label"])) for split, part in parts.items()}
    # Examples of one class alone, as a part of a split may have, are for the first baseline, which fits any data. Threads that share a sum
    # end it in another order on a busy machine, and the file would have other bytes.
    candidates = (task.baselines[baseline], next(iter(task.baselines.values())))
    with threadpool_limits(1):
        chosen = next(filter(None, (_choose(one, data, task) for one in candidates)), None)
    assert chosen is not None
    estimator, metrics = chosen
    # The address of an object, by which a vectorizer knows that it has checked it: another one in every process.
    for part in (estimator[0], *dict(getattr(estimator[0], "transformer_list", ())).values()):
        vars(part).pop("_stop_words_id", None)
    joblib.dump(estimator, directory / BASELINE_FILE, compress=3)
    examples = {split: {"read": len(part), "of": len(task.splits[split])} for split, part in parts.items()}
    details = {"estimator": " ".join(str(estimator).split()), "examples": examples}
    return Outcome("sklearn", {"validation": metrics}, details=details)


def load_baseline(directory: Path) -> Any:
    """The estimator that `fit_baseline` wrote. It is a pickle: open only what you wrote yourself."""
    return joblib.load(directory / BASELINE_FILE)


def _choose(candidates: Candidates, data: dict[str, tuple[Any, np.ndarray]], task: Task) -> tuple[Any, Any] | None:
    """The best estimator and its scores on the validation split; the first of equals, which is the smallest; None where none can be
    fitted."""
    (inputs, labels), (validation_inputs, references) = data["train"], data["validation"]
    sign = 1 if task.greater_is_better else -1
    best = None
    for features, estimators in candidates(inputs, labels):
        try:
            numbers, validation_numbers = features.fit_transform(inputs), features.transform(validation_inputs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                fitted = [estimator.fit(numbers, labels) for estimator in estimators]
        except ValueError:  # one class alone, texts without a word
            continue
        for estimator in fitted:
            metrics = task.scores(task.baseline_predictions(estimator, validation_numbers), references)
            if best is None or sign * metrics[task.primary_metric] > sign * best[1][task.primary_metric]:
                best = make_pipeline(features, estimator), metrics
    return best
