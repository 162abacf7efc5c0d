"""The same examples through a torch model or an ONNX file: logits in the order of the examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.models.predict import Answers, predict_batches
from pipelines.runtime.infer import available_cores


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

    return predict_batches(answer, features, collate, batch_size, name, answers, at_once)
