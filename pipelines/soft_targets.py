"""The teacher's answers to the training examples, computed once and stored; every epoch and every later stage reads them.

They are a stage like another: the run's record keys them by teacher, data and tokenization, so a changed teacher makes them anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.losses import top_answers
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


# ---- Language models: the likeliest tokens only, since all of them are thousands of numbers for every token of text

TOP_ANSWERS = {
    "teacher_ids": "ids.npy",
    "teacher_log_probabilities": "log_probabilities.npy",
    "teacher_log_rest": "log_rest.npy",
}


def compute_token_soft_targets(source: str, directory: Path, task: Any, temperature: float, top_k: int) -> Outcome:
    """Write the teacher's `top_k` likeliest tokens at every position of the training windows, at `temperature`, and the mass of the rest.

    The files hold ids (windows, tokens, k), log probabilities (windows, tokens, k) and the log of the remaining probability
    (windows, tokens). The record tells the bytes a token takes and the bound on what is lost (see losses.top_soft_target_loss).
    """
    processor = task.load_processor(source)
    teacher = task.load_model(source).eval()
    features = task.features(processor)["train"]
    collate = task.collate(processor)
    windows, tokens, k = len(features), features[0]["length"], min(top_k, teacher.config.vocab_size - 1)
    kinds = {
        "teacher_ids": (np.uint16 if teacher.config.vocab_size <= 2**16 else np.int32, (windows, tokens, k)),
        "teacher_log_probabilities": (np.float32, (windows, tokens, k)),
        "teacher_log_rest": (np.float32, (windows, tokens)),
    }
    stored = {
        name: np.lib.format.open_memmap(directory / TOP_ANSWERS[name], "w+", kind, shape)
        for name, (kind, shape) in kinds.items()
    }
    for start in range(0, windows, 8):
        rows = slice(start, min(start + 8, windows))
        batch = collate([features[row] for row in range(rows.start, rows.stop)])
        with torch.inference_mode():
            answers = top_answers(teacher(batch["input_ids"]).logits, k, temperature)
        for array, answer in zip(stored.values(), answers, strict=True):
            array[rows] = answer.numpy()
    for array in stored.values():
        array.flush()
    mass = np.exp(stored["teacher_log_rest"])
    details = {
        "top_k": k,
        "temperature": temperature,
        "bytes_per_token": sum(array.nbytes for array in stored.values()) / (windows * tokens),
        "remaining_mass": {"mean": float(mass.mean()), "largest": float(mass.max())},
        "gradient_error_bound": {"mean": float(2 * mass.mean()), "largest": float(2 * mass.max())},
    }
    return Outcome("soft targets", details=details)


class WithTopAnswers(torch.utils.data.Dataset):
    """Training windows and the stored answers to them, which stay on disk until they are read."""

    def __init__(self, features: Any, directory: Path) -> None:
        self.features, self.column_names = features, features.column_names
        self.answers = {name: np.load(directory / file, mmap_mode="r") for name, file in TOP_ANSWERS.items()}
        assert all(len(array) == len(features) for array in self.answers.values()), "the record keys them by the data"

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.features[index]
        return {**self.features[int(index)], **{name: array[int(index)] for name, array in self.answers.items()}}
