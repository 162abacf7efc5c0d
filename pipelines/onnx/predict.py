"""The same examples through a torch model or an ONNX file: logits in the order of the examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core.task import Arrays, Collate, Task
from pipelines.models.predict import predict_batches
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
    path: Path, features: Any, collate: Collate, task: Task, batch_size: int = 1, name: str = "predict"
) -> np.ndarray:
    """The predictions of an ONNX file for `features`, in their order.

    One example on each core by default: dynamic quantization takes one scale for a whole batch, so only a batch of one gives the
    predictions that a device gives. Larger batches come one after the other, each on all cores.
    """
    at_once = available_cores() if batch_size == 1 else 1
    session = open_session(path, threads=1 if batch_size == 1 else None)
    names = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs() if not value.name.startswith("present")]

    def run(batch: dict[str, Any]) -> Arrays:
        feed = {key: np.asarray(batch[key]) for key in names if key in batch}
        if "attention_mask" in names and "attention_mask" not in feed:
            feed["attention_mask"] = np.ones_like(feed["input_ids"])
        found = session.run(outputs, feed | empty_cache(session, len(feed[next(iter(feed))])))
        return dict(zip(outputs, found, strict=True))

    return predict_batches(run, features, collate, task, batch_size, name, at_once)
