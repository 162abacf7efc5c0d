"""The same examples through an ONNX file: predictions in the order of the examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core.errors import InputError
from pipelines.core.task import Arrays, Collate, Task
from pipelines.models.predict import predict_batches
from pipelines.runtime.infer import available_cores, open_session

PAST, PRESENT = "past_key_values.", "present."  # how the names of a KV cache begin, among inputs and outputs


def feed_of(features: Any, indices: Iterable[int], collate: Collate) -> Arrays:
    """Some examples as a batch for a graph: without their labels."""
    batch = collate([features[int(index)] for index in indices])
    return {name: np.asarray(value) for name, value in batch.items() if name != "labels"}


def empty_cache(session: Any, batch_size: int) -> Arrays:
    """The keys and values of no tokens at all (batch, heads, 0, head size), for each input of a graph with a KV cache."""
    return {
        value.name: np.zeros((batch_size, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith(PAST)
    }


def complete_feed(session: Any, batch: dict[str, Any]) -> Arrays:
    """What of a batch the graph takes, with what it takes besides: a mask that hides nothing, an empty cache.

    A tokenizer may give more than that, such as the token types of a model that has none.
    """
    names = [value.name for value in session.get_inputs()]
    feed = {name: np.asarray(batch[name]) for name in names if name in batch}
    if "attention_mask" in names and "attention_mask" not in feed:
        feed["attention_mask"] = np.ones_like(feed["input_ids"])
    missing = [name for name in names if name not in feed and not name.startswith(PAST)]
    if missing:
        raise InputError(f"expected feeds for the inputs {names}, found none for {missing}. Add them to the feeds.")
    return feed | empty_cache(session, len(next(iter(feed.values()))))


def run_session(session: Any, batch: dict[str, Any]) -> Arrays:
    """The outputs of a graph for a batch, by name, without the cache."""
    names = [value.name for value in session.get_outputs() if not value.name.startswith(PRESENT)]
    return dict(zip(names, session.run(names, complete_feed(session, batch)), strict=True))


def predict_onnx(path: Path, features: Any, collate: Collate, task: Task, name: str = "predict") -> np.ndarray:
    """The predictions of an ONNX file for `features`, in their order.

    One example on each core: dynamic quantization takes one scale for a whole batch, so only a batch of one gives the predictions that a
    device gives.
    """
    session = open_session(path, threads=1)
    return predict_batches(partial(run_session, session), features, collate, task, 1, name, available_cores())


def score_beside(
    original: Path, task: Task, processor: Any
) -> tuple[dict[str, Any], Callable[[Path, str], dict[str, Any]]]:
    """The scores of an fp32 file on the validation split, and what scores there a file that was made of it, given its path and a name: its
    own scores, and how near its predictions are to the fp32 ones."""
    features: Any = task.features(processor)["validation"]
    collate = task.collate(processor)
    exact = predict_onnx(original, features, collate, task, name="score fp32")

    def score(path: Path, name: str) -> dict[str, Any]:
        found = predict_onnx(path, features, collate, task, name=f"score {name}")
        return task.scores(found, features["labels"], "validation") | task.nearness(found, exact)

    return task.scores(exact, features["labels"], "validation"), score
