"""The teacher's answers to the training examples, computed once and stored; every epoch and every later stage reads them.

They are a stage like another: the run's record keys them by teacher, data and tokenization, so a changed teacher makes them anew.
They lie on disk in shards of so many examples each, whatever the number of processes: answers-00000.safetensors and so on. A process
holds no more than one shard in memory, a run that was killed goes on at the shard it stopped in, and readers map them into memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.core.errors import InputError
from pipelines.core.processes import wait_for_all
from pipelines.core.run import Outcome
from pipelines.models.predict import predict_torch
from pipelines.training.finite import name_rows
from pipelines.training.losses import top_answers
from pipelines.training.trainer import check_knows_task, validation_metrics

SHARD = "answers-{:05}.safetensors"
SHARD_EXAMPLES = 4096
SHARD_TOKENS = 2**18
OPEN_SHARDS = 512

# What is stored of a language model's logits: the likeliest tokens only, since all of them are thousands of numbers for every token.
TOP_ANSWERS = ("teacher_ids", "teacher_log_probabilities", "teacher_log_rest")


# ---- Writing


def compute_soft_targets(source: str, directory: Path, task: Any, shard_examples: int = SHARD_EXAMPLES) -> Outcome:
    """Write the teacher's logits as `teacher_logits` (training examples, labels), float32, in the order of the training split.

    Every process answers its share of the shards. Raises InputError for a teacher no better than chance, before it is asked.
    """
    processor = task.load_processor(source)
    teacher = _teacher(source, task)
    features, collate = task.features(processor)["train"], task.collate(processor)
    metrics = check_teacher(teacher, task, processor)

    def answer(examples: Any) -> dict[str, np.ndarray]:
        return {"teacher_logits": predict_torch(teacher, examples, collate, name="soft targets")}

    if not write_shards(features, directory, shard_examples, answer):
        return Outcome("soft targets")
    stored = WithSoftTargets(features, directory)
    details = {"examples": len(features), "labels": stored[0]["teacher_logits"].shape[-1], "shards": len(stored.shards)}
    return Outcome("soft targets", {"validation": metrics}, details=details)


def compute_token_soft_targets(
    source: str, directory: Path, task: Any, temperature: float, top_k: int, shard_examples: int | None = None
) -> Outcome:
    """Write the teacher's `top_k` likeliest tokens at every position of the training windows, at `temperature`, and the mass of the rest.

    The shards hold ids (windows, tokens, k), log probabilities (windows, tokens, k) and the log of the remaining probability
    (windows, tokens). The record tells the bytes a token takes and the bound on what is lost (see losses.top_soft_target_loss).
    Every process answers its share of the shards.
    """
    processor = task.load_processor(source)
    teacher = _teacher(source, task)
    features, collate = task.features(processor)["train"], task.collate(processor)
    tokens, vocabulary_size = features[0]["length"], teacher.config.vocab_size
    k = min(top_k, vocabulary_size - 1)
    kind = np.uint16 if vocabulary_size <= 2**16 else np.int32

    def answer(windows: Any) -> dict[str, np.ndarray]:
        parts: list[list[np.ndarray]] = [[] for _ in TOP_ANSWERS]
        for start in range(0, len(windows), 8):
            batch = collate([windows[row] for row in range(start, min(start + 8, len(windows)))])
            with torch.inference_mode():
                found = top_answers(teacher(batch["input_ids"].to(teacher.device)).logits, k, temperature)
            for part, values in zip(parts, found, strict=True):
                part.append(values.cpu().numpy().astype(kind if part is parts[0] else np.float32))
        return {name: np.concatenate(part) for name, part in zip(TOP_ANSWERS, parts, strict=True)}

    if not write_shards(features, directory, shard_examples or max(1, SHARD_TOKENS // tokens), answer):
        return Outcome("soft targets")
    stored = WithSoftTargets(features, directory)
    total, largest = 0.0, 0.0
    for shard in stored.shards:
        mass = np.exp(_open(*shard).get_tensor("teacher_log_rest"))
        total, largest = total + float(mass.sum(dtype=np.float64)), max(largest, float(mass.max()))
    mean = total / (len(features) * tokens)
    details = {
        "top_k": k,
        "temperature": temperature,
        "shards": len(stored.shards),
        "bytes_per_token": k * (np.dtype(kind).itemsize + 4) + 4,
        "remaining_mass": {"mean": mean, "largest": largest},
        "gradient_error_bound": {"mean": 2 * mean, "largest": 2 * largest},
    }
    return Outcome("soft targets", details=details)


def _teacher(source: str, task: Any) -> Any:
    from accelerate import PartialState

    return task.load_model(source).eval().to(PartialState().device)


def check_teacher(teacher: Any, task: Any, processor: Any) -> dict[str, Any]:
    """The teacher's scores on the validation split, once they are better than chance; the other processes wait for the main one."""
    from accelerate import PartialState

    state = PartialState()
    metrics: dict[str, Any] = {}
    if state.is_main_process:
        metrics = validation_metrics(teacher, task, processor)
        check_knows_task(teacher, task, metrics)
    wait_for_all()
    return metrics


def write_shards(
    features: Any, directory: Path, shard_examples: int, answer: Callable[[Any], dict[str, np.ndarray]]
) -> bool:
    """Write `answer` of every `shard_examples` rows of `features` as a shard, every process its share; true on the main process.

    A shard is renamed to its name once it is whole, and says in its header what its content hashes to. Whole ones of an attempt
    that was interrupted stay; a damaged one is named and made again. Raises InputError for answers that are not finite.
    """
    from accelerate import PartialState
    from safetensors.numpy import save_file

    state = PartialState()
    shards = math.ceil(len(features) / shard_examples)
    for shard in range(state.process_index, shards, state.num_processes):
        path = directory / SHARD.format(shard)
        first = shard * shard_examples
        rows = range(first, min(first + shard_examples, len(features)))
        if path.exists():
            if shard_is_whole(path, len(rows)):
                continue
            print(f"soft targets: {path.name} of an interrupted attempt is damaged, it is made again", flush=True)
        answers = answer(features.select(rows))
        _check_finite(answers, first)
        partial = path.with_suffix(".partial")
        # One entry, since safetensors writes several in an order that changes, and the same answers should be the same bytes.
        save_file(answers, partial, metadata={"sha256": _digest(answers)})
        partial.replace(path)
    wait_for_all()
    return state.is_main_process


def _check_finite(answers: dict[str, np.ndarray], first: int) -> None:
    for name, values in answers.items():
        # The rest of the vocabulary may have no probability at all, of which the log is minus infinity.
        bad = np.isnan(values) | (values == np.inf) if name == "teacher_log_rest" else ~np.isfinite(values)
        if bad.any():
            rows = (first + np.flatnonzero(bad.reshape(len(values), -1).any(axis=1))).tolist()
            raise InputError(
                f"expected finite answers of the teacher, found NaN or infinity in its {name.removeprefix('teacher_')} for "
                f"{len(rows)} training examples, the rows {name_rows(rows)} of the training split. Take another teacher, or one "
                "trained with a smaller --teacher_learning_rate."
            )


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def shard_is_whole(path: Path, examples: int) -> bool:
    """Whether a shard has so many examples, and the content that its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as shard:
            arrays = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118, it is no dictionary
            written = (shard.metadata() or {}).get("sha256")
    except (SafetensorError, OSError):
        return False
    return written == _digest(arrays) and all(len(array) == examples for array in arrays.values())


# ---- Reading


@lru_cache(maxsize=OPEN_SHARDS)
def _open(path: Path, sha256: str) -> Any:
    """A shard mapped into memory; its content is part of the key, since another run may write another one in its place."""
    from safetensors import safe_open

    return safe_open(path, framework="numpy")


class WithSoftTargets(torch.utils.data.Dataset):
    """Training examples, each with the teacher's stored answers to it as further columns, which stay on disk until they are read."""

    def __init__(self, features: Any, directory: Path, rows: np.ndarray | None = None) -> None:
        """`rows`, where given, are the numbers that the examples of `features` have in the whole training split."""
        from safetensors import safe_open

        self.features, self.directory, self.rows = features, directory, rows
        self.shards: list[tuple[Path, str]] = []
        examples = []
        for path in sorted(directory.glob(SHARD.format(0).replace("00000", "*"))):
            with safe_open(path, framework="numpy") as shard:
                self.answers = list(shard.keys())
                self.shards.append((path, shard.metadata()["sha256"]))
                examples.append(shard.get_slice(self.answers[0]).get_shape()[0])
        self.shard_examples = examples[0]
        self.column_names = [*features.column_names, *self.answers]
        assert rows is not None or sum(examples) == len(features), "the record keys soft targets by the data"

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.features[index]
        row = int(index) if self.rows is None else int(self.rows[index])
        shard, place = divmod(row, self.shard_examples)
        opened = _open(*self.shards[shard])
        return {**self.features[int(index)], **{name: opened.get_slice(name)[place] for name in self.answers}}

    def select(self, indices: Any) -> WithSoftTargets:
        """The examples at these places, as the method of a data set is."""
        rows = np.asarray(indices) if self.rows is None else self.rows[indices]
        return WithSoftTargets(self.features.select(indices), self.directory, rows)
