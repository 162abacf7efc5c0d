"""The same examples through a model: its predictions in the order of the examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pipelines.core.errors import InputError
from pipelines.core.task import Arrays, Collate, Task
from pipelines.runtime.infer import in_order


def lengths_of(examples: Any) -> list[int]:
    """How many tokens each example has; where they are of one length, 1."""
    return list(examples["length"]) if "length" in getattr(examples, "column_names", []) else [1] * len(examples)


def sample_of(rows: Any, samples: int, seed: int = 0) -> Any:
    """So many rows drawn at random, in their order; of fewer rows all."""
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:samples]))


def longest_first(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Indices in an order in which little of a batch is padding, the same every time."""
    return np.argsort(-np.asarray(lengths), kind="stable")


def batches_by_length(lengths: Sequence[int] | np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Indices in batches of like length, the longest first."""
    order = longest_first(lengths)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def map_batches(
    function: Callable[[dict[str, Any]], Mapping[str, Any]],
    features: Any,
    collate: Collate,
    batch_size: int,
    name: str,
    at_once: int = 1,
) -> Arrays:
    """What `function` makes of collated batches of all `features`, by name, its first axis in the order of the features.

    Batches are of like length; `at_once` of them are worked on by so many threads.
    """
    batches = batches_by_length(lengths_of(features), batch_size)

    def collated() -> Iterator[dict[str, Any]]:
        for indices in tqdm(batches, desc=name, leave=False, disable=len(features) < 64):
            yield collate([features[int(index)] for index in indices])

    found: Arrays = {}
    for indices, results in zip(batches, in_order(function, collated(), at_once), strict=True):
        for column, values in results.items():
            array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
            if column not in found:
                found[column] = np.empty((len(features), *array.shape[1:]), dtype=array.dtype)
            found[column][indices] = array
    assert found, "no examples"
    return found


def predict_batches(
    run: Callable[[dict[str, Any]], Mapping[str, Any]],
    features: Any,
    collate: Collate,
    task: Task,
    batch_size: int,
    name: str,
    at_once: int = 1,
) -> np.ndarray:
    """`task.predictions` for all `features`; `run` makes outputs by name, as tensors or arrays, of a batch without its labels."""
    import torch

    def predict(batch: dict[str, Any]) -> dict[str, Any]:
        labels = batch.pop("labels", None)
        outputs = {output: torch.as_tensor(values) for output, values in run(batch).items()}
        return {"predictions": task.predictions(outputs, labels)}

    return map_batches(predict, features, collate, batch_size, name, at_once)["predictions"]


def try_model(model: Any, features: Any, collate: Collate) -> None:
    """Raise InputError unless the model takes the shortest and the longest of the examples, padded to one batch."""
    import torch

    lengths = lengths_of(features)
    batch = collate([features[int(index)] for index in (np.argmin(lengths), np.argmax(lengths))])
    try:
        with torch.no_grad():  # what a model may keep of this must not hinder its training
            model.eval()(**{name: value.to(model.device) for name, value in batch.items() if name != "labels"})
    except Exception as error:  # whatever somebody's model may raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"expected a model that takes the examples of the data set as its own tokenizer or image processor makes them, found that "
            f"{type(model).__name__} does not: {reason:.300}. Check that both were saved together, and that no example is longer than the "
            "model reads (--max_length)."
        ) from error


def predict_torch(
    model: Any, features: Any, collate: Collate, task: Task, batch_size: int = 32, name: str = "predict"
) -> np.ndarray:
    """The predictions of a torch model, on its own device, for `features`, in their order; it is left in eval mode.

    Raises InputError for a model that does not take them.
    """
    import torch

    try_model(model, features, collate)
    device = next(model.parameters()).device

    def run(batch: dict[str, Any]) -> Mapping[str, Any]:
        with torch.inference_mode():
            return task.outputs(model(**{key: value.to(device) for key, value in batch.items()}))

    return predict_batches(run, features, collate, task, batch_size, name)
