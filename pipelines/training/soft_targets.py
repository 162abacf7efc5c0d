"""The teacher's soft targets for the training examples, computed once and stored; every epoch and every later stage reads them.

They are a stage like another: the run's record keys them by teacher, data and tokenization, so a changed teacher invalidates them.
They lie on disk in shards of so many examples each, whatever the number of processes: shard-00000.safetensors and so on. A process
holds no more than one shard in memory, a run that was killed continues with the shard it stopped in, and readers map them into memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipelines.core.config import DistillConfig
from pipelines.core.errors import InputError
from pipelines.core.processes import wait_for_all
from pipelines.core.records import Outcome
from pipelines.core.task import TRANSFER, Arrays, Task, Tensors, TransferSet
from pipelines.models.predict import map_batches, predict_torch
from pipelines.training.fine_tune import refuse_weak_teacher, validation_metrics
from pipelines.training.transfer import WithTransfer

SHARD = "shard-{:05}.safetensors"
SHARD_BYTES = 2**26
MOST_SHARD_EXAMPLES = 4096
OPEN_SHARDS = 512


# ---- Writing


def compute_soft_targets(
    source: str,
    directory: Path,
    task: Task,
    distill: DistillConfig,
    transfer: TransferSet | None = None,
    batch_size: int = 8,
    shard_examples: int | None = None,
) -> Outcome:
    """Write what `task.soft_targets` keeps of the teacher's outputs for every training example, in the order of the training split; or
    for every example of the `transfer` set.

    Every process computes its share of the shards. Raises InputError for a teacher that does no better than guessing, before that.
    """
    processor = task.load_processor(source)
    teacher = task.load_model(source).eval().to(PartialState().device)
    collate = task.collate(processor)
    if transfer is None:
        features = task.soft_target_features(processor, distill)
    else:
        features = transfer_features(transfer, task, processor)
    metrics = check_teacher(teacher, task, processor, batch_size)
    if PartialState().is_main_process:
        processor.save_pretrained(directory)  # a student may read the same examples as other tokens

    def of_batch(batch: dict[str, Any]) -> Tensors:
        inputs = {name: values.to(teacher.device) for name, values in batch.items() if name != "labels"}
        with torch.inference_mode():
            return task.soft_targets(task.outputs(teacher(**inputs)), distill)

    def of_examples(examples: Any) -> Arrays:
        return map_batches(of_batch, examples, collate, batch_size, "soft targets")

    example = sum(array.nbytes for array in of_examples(features.select([0])).values())
    if shard_examples is None:
        shard_examples = max(1, min(MOST_SHARD_EXAMPLES, SHARD_BYTES // example))
    write_shards(features, directory, shard_examples, of_examples)
    if not PartialState().is_main_process:
        return Outcome("soft targets")
    shards = len(WithSoftTargets(features, directory).shards)
    details = {"examples": len(features), "bytes_per_example": example, "shards": shards}
    details |= {} if transfer is None else {"transfer": transfer.load().details}
    return Outcome("soft targets", {"validation": metrics}, details=details)


def transfer_features(transfer: TransferSet, task: Task, processor: Any) -> Any:
    return task.features(processor, transfer.load())[TRANSFER]


def check_teacher(teacher: Any, task: Task, processor: Any, batch_size: int) -> dict[str, Any]:
    """The teacher's scores on the validation split, once they are better than guessing; the other processes wait for the main one."""
    metrics: dict[str, Any] = {}
    if PartialState().is_main_process:
        metrics = validation_metrics(teacher, task, processor, batch_size)
        if not task.allow_weak_teacher:  # what guesses has its labels in no order
            task.check_label_order(processor, partial(predict_torch, teacher, name="labels"))
        refuse_weak_teacher(task, metrics, teacher.config)
    wait_for_all()
    return metrics


def write_shards(features: Any, directory: Path, shard_examples: int, compute: Callable[[Any], Arrays]) -> None:
    """Write `compute` of every `shard_examples` rows of `features` as a shard, every process its share.

    A shard is renamed to its name once it is whole, and says in its header what its content hashes to. Whole ones of an attempt
    that was interrupted stay; a damaged one is named and rebuilt. Raises InputError for logits that are not finite.
    """
    state = PartialState()
    shards = math.ceil(len(features) / shard_examples)
    for shard in range(state.process_index, shards, state.num_processes):
        path = directory / SHARD.format(shard)
        first = shard * shard_examples
        rows = range(first, min(first + shard_examples, len(features)))
        if path.exists():
            if shard_is_whole(path, len(rows)):
                continue
            print(f"soft targets: {path.name} of an interrupted attempt is damaged, it is rebuilt", flush=True)
        arrays = compute(features.select(rows))
        check_finite(arrays, first)
        partial = path.with_suffix(".partial")
        # One entry, since safetensors writes several in an order that changes, and the same arrays should be the same bytes.
        save_file(arrays, partial, metadata={"sha256": _digest(arrays)})
        partial.replace(path)
    wait_for_all()


def check_finite(arrays: Arrays, first: int) -> None:
    """Raise InputError for soft targets with a number that is not finite, naming rows of the training split or the transfer set from `first` on."""
    for name, values in arrays.items():
        # The log of no probability at all is minus infinity.
        bad = np.isnan(values) | (values == np.inf) if "log_" in name else ~np.isfinite(values)
        if bad.any():
            rows = (first + np.flatnonzero(bad.reshape(len(values), -1).any(axis=1))).tolist()
            raise InputError(
                f"expected finite soft targets, found NaN or infinity in {name} for {len(rows)} training examples, row {rows[0]} of the "
                "training split or transfer set first. Use another teacher, or one trained with a smaller --teacher_learning_rate."
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
    return safe_open(path, framework="numpy")


class WithSoftTargets(torch.utils.data.Dataset):
    """Training examples, each with its stored soft targets as further columns, which stay on disk until they are read."""

    def __init__(self, features: Any, directory: Path, rows: np.ndarray | None = None, suffix: str = "") -> None:
        """`rows`, where given, are the numbers that the examples of `features` have in the whole training split; the names of the columns
        end in `suffix`."""
        self.features, self.directory, self.rows, self.suffix = features, directory, rows, suffix
        self.shards: list[tuple[Path, str]] = []
        examples = []
        for path in sorted(directory.glob(SHARD.format(0).replace("00000", "*"))):
            with safe_open(path, framework="numpy") as shard:
                self.columns = list(shard.keys())
                self.shards.append((path, shard.metadata()["sha256"]))
                examples.append(shard.get_slice(self.columns[0]).get_shape()[0])
        self.shard_examples = examples[0]
        self.column_names = [*features.column_names, *(name + suffix for name in self.columns)]
        assert rows is not None or sum(examples) == len(features), "the record keys soft targets by the data"

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.features[index]
        row = int(index) if self.rows is None else int(self.rows[index])
        shard, place = divmod(row, self.shard_examples)
        opened = _open(*self.shards[shard])
        own = self.features[int(index)]
        return own | {name + self.suffix: opened.get_slice(name)[place] for name in self.columns}

    def select(self, indices: Any) -> WithSoftTargets:
        """The examples at these places, as the method of a data set is."""
        rows = np.asarray(indices) if self.rows is None else self.rows[indices]
        return WithSoftTargets(self.features.select(indices), self.directory, rows, self.suffix)


def with_soft_targets(task: Task, read: Callable[[Any], Any], features: Any, directories: Path | list[Path]) -> Any:
    """Examples with the stored soft targets of one teacher, or of several: the columns of the second one end in _2."""
    for number, directory in enumerate([directories] if isinstance(directories, Path) else directories, start=1):
        features = task.with_soft_targets(read, features, directory, "" if number == 1 else f"_{number}")
    return features


def one_or_more(directories: list[Path]) -> Path | list[Path] | None:
    """The directories of several teachers' soft targets, of one teacher its own."""
    return directories if len(directories) > 1 else next(iter(directories), None)


def with_transfer(features: Any, transfer: TransferSet, task: Task, processor: Any) -> WithTransfer:
    """Training examples, and after them those of a transfer set, with the soft targets that are stored of these."""
    read = partial(transfer_features, transfer, task)
    unlabelled = read(processor)
    if transfer.soft_targets is not None:
        unlabelled = with_soft_targets(task, read, unlabelled, transfer.soft_targets)
    return WithTransfer(features, unlabelled, transfer.ratio)
