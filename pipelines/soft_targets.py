"""The teacher's answers to the training examples, computed once and stored; every epoch and every later stage reads them.

They are a stage like another: the run's record keys them by teacher, data and tokenization, so a changed teacher makes them anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.predict import predict_torch
from pipelines.run import Outcome
from pipelines.training import check_above_chance, validation_metrics

LOGITS = "logits.npy"


def compute_soft_targets(source: str, directory: Path, task: Any) -> Outcome:
    """Write the teacher's logits (training examples, labels), float32, in the order of the training split.

    Every process answers its share of the examples. Raises InputError for a teacher no better than chance.
    """
    from accelerate import PartialState

    state = PartialState()
    processor = task.load_processor(source)
    teacher = task.load_model(source).to(state.device)
    features = task.features(processor)["train"]

    def part(rank: int) -> Path:
        return directory / f"part-{rank}.npy"

    share = features.shard(state.num_processes, state.process_index, contiguous=True)
    np.save(part(state.process_index), predict_torch(teacher, share, task.collate(processor), name="soft targets"))
    state.wait_for_everyone()
    if not state.is_main_process:
        return Outcome("soft targets")
    logits = np.concatenate([np.load(part(rank)) for rank in range(state.num_processes)])
    np.save(directory / LOGITS, logits)
    for rank in range(state.num_processes):
        part(rank).unlink()
    metrics = validation_metrics(teacher, task, processor)
    check_above_chance(metrics, task.label_names)
    return Outcome(
        "soft targets", {"validation": metrics}, details={"examples": len(logits), "labels": logits.shape[1]}
    )


def with_soft_targets(features: Any, directory: Path) -> Any:
    """The training features with the stored logits as the column `teacher_logits`."""
    logits = np.load(directory / LOGITS)
    assert len(logits) == len(features), "the record keys soft targets by the data, so they cannot differ in length"
    return features.add_column("teacher_logits", list(logits))
