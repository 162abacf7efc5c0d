"""The same examples through a model: logits in the order of the examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pipelines.runtime.infer import in_order


def batches_by_length(lengths: Sequence[int] | np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Indices in batches of like length, the longest first, so that little of a batch is padding."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


# What is kept of a batch's logits, given its labels; all of them where there is none.
Answers = Callable[[np.ndarray, np.ndarray], np.ndarray] | None


def predict_batches(
    answer: Callable[[dict[str, Any]], np.ndarray], features: Any, collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int, name: str, keep: Answers, at_once: int = 1,
) -> np.ndarray:  # fmt: skip
    lengths = features["length"] if "length" in features.column_names else [1] * len(features)
    batches = batches_by_length(lengths, batch_size)

    def collated() -> Iterator[dict[str, Any]]:
        for indices in tqdm(batches, desc=name, leave=False, disable=len(features) < 64):
            yield collate([features[int(index)] for index in indices])

    def answer_batch(batch: dict[str, Any]) -> np.ndarray:
        labels = batch.pop("labels", None)
        answers = answer(dict(batch))
        return answers if keep is None else keep(answers, np.asarray(labels))

    logits: np.ndarray | None = None
    for indices, answers in zip(batches, in_order(answer_batch, collated(), at_once), strict=True):
        if logits is None:
            logits = np.empty((len(features), *answers.shape[1:]), dtype=np.float32)
        logits[indices] = answers
    assert logits is not None, "no examples"
    return logits


def predict_torch(
    model: Any,
    features: Any,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int = 32,
    name: str = "predict",
    answers: Answers = None,
) -> np.ndarray:
    """Logits (examples, labels) of a torch model over tokenized `features`, in their order; the model is left in eval mode.

    `answers(logits, labels)`, where given, is applied to every batch and its result kept instead.
    """
    import torch

    model.eval()
    device = next(model.parameters()).device

    def answer(batch: dict[str, Any]) -> np.ndarray:
        with torch.inference_mode():
            return model(**{key: value.to(device) for key, value in batch.items()}).logits.float().cpu().numpy()

    return predict_batches(answer, features, collate, batch_size, name, answers)
