"""The same examples through a torch model or an ONNX file: logits in the order of the examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pipelines.edge.infer import available_cores, in_order


def batches_by_length(lengths: Sequence[int] | np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Indices in batches of like length, the longest first, so that little of a batch is padding."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


# What is kept of a batch's logits, given its labels; all of them where there is none.
Answers = Callable[[np.ndarray, np.ndarray], np.ndarray] | None


def _predict(
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

    return _predict(answer, features, collate, batch_size, name, answers)


def open_session(path: Path, threads: int | None = None) -> Any:
    """An ONNX Runtime CPU session on the cores this process may use."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    # Fused graphs name operators the optimizer then finds nothing to do for; only errors are worth a line.
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def empty_cache(session: Any, batch_size: int) -> dict[str, np.ndarray]:
    """The keys and values of no tokens at all (batch, heads, 0, head size), for each input of a graph with a KV cache."""
    return {
        value.name: np.zeros((batch_size, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }


def predict_onnx(
    path: Path,
    features: Any,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int = 1,
    name: str = "predict",
    answers: Answers = None,
) -> np.ndarray:
    """Logits (examples, labels) of an ONNX file over tokenized `features`, in their order.

    One example on each core by default: dynamic quantization takes one scale for a whole batch, so only a batch of one gives the
    answers that a device gives. Larger batches come one after the other, each on all cores.
    """
    at_once = available_cores() if batch_size == 1 else 1
    session = open_session(path, threads=1 if batch_size == 1 else None)
    names = [value.name for value in session.get_inputs()]

    def answer(batch: dict[str, Any]) -> np.ndarray:
        feed = {key: np.asarray(batch[key]) for key in names if key in batch}
        if "attention_mask" in names and "attention_mask" not in feed:
            feed["attention_mask"] = np.ones_like(feed["input_ids"])
        return session.run(["logits"], feed | empty_cache(session, len(feed[next(iter(feed))])))[0]

    return _predict(answer, features, collate, batch_size, name, answers, at_once)
