"""What goes wrong on a disk: each fault is named in one message, with exit status 1, and what was finished stays as it was."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from conftest import killed_after, tiny_model
from pipelines.core.command import run_main
from pipelines.core.config import DataConfig, DistillConfig, TeacherConfig
from pipelines.core.disk import no_room
from pipelines.core.errors import InputError
from pipelines.core.records import RECORD, Outcome, read_record
from pipelines.core.run import Run
from pipelines.tasks.text_classification import TextClassification
from pipelines.training import soft_targets
from pipelines.training.checkpoints import checkpoint_damage, last_whole_checkpoint, write_checksums
from pipelines.training.fine_tune import fine_tune
from pipelines.training.soft_targets import compute_soft_targets
from pipelines.training.trainer import Trainer, train


class Task:
    def describe(self) -> dict[str, str]:
        return {}


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def write_small(source: str, directory: Path, task: Task, size: int = 10) -> Outcome:
    (directory / "model.txt").write_text("x" * size)
    return Outcome("transformers", {"validation": {"accuracy": 0.5}})


def finish(directory: Path, source: Path, function=write_small, **arguments) -> None:
    run = Run(directory, Task(), seed=0)
    try:
        run.stage("first", function, str(source), **arguments)
    finally:
        run._lock.release()


def contents(directory: Path) -> dict[Path, bytes]:
    """What a run has finished: all but the locks and what lies in hidden directories."""
    return {
        path: path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }


# ---- A full disk


def write_large(source: str, directory: Path, task: Task, writer: str) -> Outcome:
    import safetensors.numpy
    import torch

    values = np.zeros(1_000_000, np.float32)
    {
        "python": lambda path: path.write_bytes(values.tobytes()),
        "numpy": lambda path: np.save(path.with_suffix(".npy"), values),
        "safetensors": lambda path: safetensors.numpy.save_file({"a": values}, path),
        "torch": lambda path: torch.save({"a": torch.from_numpy(values)}, path),
    }[writer](directory / "model")
    return Outcome("transformers")


@pytest.fixture
def leave_room() -> Iterator[Callable[[int], None]]:
    """`leave_room(1000)` lets no file grow above 1,000 bytes, -1 every file: a limit on a file's size stands for the disk, since both
    fail in the same calls, in the same ways."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda room: resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("writer", ["python", "numpy", "safetensors", "torch"])
def test_a_full_disk_is_named_whoever_writes_and_the_earlier_result_stays(writer, tmp_path, source, capsys, leave_room):
    finish(tmp_path / "run", source, size=10)
    before = contents(tmp_path / "run")
    leave_room(1_000_000)
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: finish(tmp_path / "run", source, write_large, writer=writer))
    leave_room(-1)
    assert exit_.value.code == 1
    messages = capsys.readouterr().err.splitlines()
    assert len(messages) == 1
    assert messages[0].startswith("error: expected room on the disk for the stage first, found")
    assert contents(tmp_path / "run") == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(tmp_path, source):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        finish(disk / "run", source, size=10)
        before = contents(disk / "run")
        with pytest.raises(InputError, match=r"room on the disk for the stage first.*No space left.*MB are free"):
            finish(disk / "run", source, size=10**6)
        assert contents(disk / "run") == before
        finish(disk / "run", source, size=1000)  # with what room there is, the same run goes on
        assert (disk / "run" / "first" / "model.txt").stat().st_size == 1000
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["teacher", "soft_targets"])
def test_a_disk_that_fills_up_at_work_is_named_and_the_same_command_goes_on(
    name, trained_teacher, task, training, tmp_path, capsys, leave_room, monkeypatch
):
    """After the first of two checkpoints, and after the first of three shards."""
    learning = {"teacher": TeacherConfig(teacher_epochs=2, teacher_learning_rate=1e-3), "training": training}
    storing = {"distill": DistillConfig(), "shard_examples": 50}
    stages = {"teacher": (fine_tune, learning), "soft_targets": (compute_soft_targets, storing)}
    function, arguments = stages[name]
    save_checkpoint, check_finite = Trainer._save_checkpoint, soft_targets.check_finite

    def save_and_fill(*arguments):
        save_checkpoint(*arguments)
        leave_room(100_000)

    def check_and_fill(answers, first):
        check_finite(answers, first)
        leave_room(500 if first else -1)

    def command() -> None:
        run = Run(tmp_path / "run", task, seed=0)
        try:
            run.stage(name, function, str(trained_teacher), distributed=True, **arguments)
        finally:
            run._lock.release()

    monkeypatch.setattr(Trainer, "_save_checkpoint", save_and_fill)
    monkeypatch.setattr(soft_targets, "check_finite", check_and_fill)
    with pytest.raises(SystemExit) as exit_:
        run_main(command)
    monkeypatch.undo()
    leave_room(-1)
    assert exit_.value.code == 1
    messages = capsys.readouterr().err.splitlines()
    assert [line for line in messages if line.startswith("error: ")] == messages[-1:]
    assert messages[-1].startswith(f"error: expected room on the disk for the stage {name}, found")
    assert "Traceback" not in "".join(messages)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("shard-*.safetensors")}
    assert len(kept) == (0 if name == "teacher" else 1)

    command()
    record = read_record(tmp_path / "run" / name)
    if name == "teacher":
        assert record["details"]["resumed_from_step"] == record["details"]["steps"] / 2
    else:
        assert record["details"]["shards"] == 3
        first = tmp_path / "run" / name / "shard-00000.safetensors"
        assert [first.stat().st_mtime_ns] == list(kept.values())


def test_a_disk_that_is_full_before_the_data_is_read_is_not_taken_for_a_broken_file(tmp_path, csv_file, leave_room):
    copied = tmp_path / "texts.csv"  # a file that is not in the cache
    copied.write_text(csv_file.read_text() + "one more goal,sport\n")
    leave_room(5000)
    with pytest.raises(InputError, match=r"room on the disk for a copy of .*texts\.csv.*HF_DATASETS_CACHE"):
        TextClassification(DataConfig(dataset=str(copied))).load_data()
    leave_room(-1)
    assert TextClassification(DataConfig(dataset=str(copied))).splits


def test_only_a_full_disk_is_called_one():
    assert no_room(OSError(28, "No space left on device"))
    wrapped = RuntimeError("cannot save")
    wrapped.__cause__ = OSError(122, "Disk quota exceeded")
    assert "quota" in no_room(wrapped)
    assert no_room(OSError(2, "No such file")) is None
    assert no_room(ValueError("size")) is None


# ---- A read-only directory


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Root may write everywhere, so that for root permissions only show as another user."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("only_stage", [None, "model"])
def test_a_read_only_directory_is_named_and_left_alone(only_stage):
    directory = Path(tempfile.mkdtemp())  # pytest's own are closed to other users
    (directory / "run").mkdir()
    (directory / "run").chmod(0o555)
    directory.chmod(0o755)
    try:
        with as_somebody_else(), pytest.raises(InputError, match=r"able to write to .*run.*--?output_dir"):
            Run(directory / "run", Task(), 0, only_stage)
        assert not list((directory / "run").iterdir())
        with as_somebody_else(), pytest.raises(InputError, match="able to write to"):
            Run(directory / "run" / "below", Task(), 0, only_stage)
    finally:
        (directory / "run").chmod(0o755)
        shutil.rmtree(directory)


def test_an_error_of_the_disk_that_nobody_foresaw_is_one_message_and_status_1(capsys):
    def main() -> None:
        raise PermissionError(13, "Permission denied", "/somewhere/model.safetensors")

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: expected to be able to read and write")
    assert "/somewhere/model.safetensors" in error
    assert len(error.splitlines()) == 1


# ---- A damaged checkpoint


@pytest.fixture(scope="module")
def interrupted(task, tokenizer, tmp_path_factory):
    """The checkpoints of two epochs of a training that was killed in the third, and the weights that it would have ended with."""
    from pipelines.training.arguments import TrainingArguments

    directory = tmp_path_factory.mktemp("interrupted")
    training = TrainingArguments(
        output_dir=str(directory), num_train_epochs=3, learning_rate=1e-3, disable_tqdm=True, use_cpu=True
    )
    features = task.features(tokenizer)["train"]
    undisturbed = tiny_model()
    train(undisturbed, task, tokenizer, training, directory / "undisturbed", features)
    with killed_after(2):
        train(tiny_model(), task, tokenizer, training, directory / "killed", features)
    return directory / "killed", training, undisturbed.state_dict()


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    *(
        (damage, name)
        for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "checksums.json")
        for damage in (halve, flip, Path.unlink)
    ),
    (halve, "config.json"),
    (flip, "scheduler.pt"),
]


def test_every_damage_to_a_checkpoint_is_noticed(interrupted, tmp_path, capsys):
    killed, _, _ = interrupted
    assert last_whole_checkpoint(killed) == str(killed / "checkpoint-18")
    assert not capsys.readouterr().out
    for index, (damage, name) in enumerate(DAMAGES):
        copied = shutil.copytree(killed, tmp_path / str(index))
        damage(copied / "checkpoint-18" / name)
        assert last_whole_checkpoint(copied) == str(copied / "checkpoint-9")
        assert "checkpoint-18: not used, because" in capsys.readouterr().out
        found = checkpoint_damage(copied / "checkpoint-18")
        if (damage, name) == (Path.unlink, "checksums.json"):
            assert found == "it was not written to its end"
        else:
            assert found.endswith(" is truncated, changed or missing")
            assert found.startswith(name) or name == "checksums.json"


def make_best(checkpoint: Path, best: str) -> None:
    """Let the state of a checkpoint say that another was the best so far, in a directory that is gone."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    state["best_model_checkpoint"], state["best_global_step"] = f"/gone/{best}", int(best.split("-")[1])
    path.write_text(json.dumps(state))
    write_checksums(checkpoint)


def test_a_checkpoint_is_not_used_without_the_best_one_before_it(interrupted, tmp_path, capsys):
    """The training would end with the weights of the last epoch where it promises those of the best."""
    killed, _, _ = interrupted
    copied = shutil.copytree(killed, tmp_path / "copy")
    make_best(copied / "checkpoint-18", "checkpoint-9")
    assert last_whole_checkpoint(copied) == str(copied / "checkpoint-18")
    flip(copied / "checkpoint-9" / "model.safetensors")
    assert last_whole_checkpoint(copied) is None
    said = capsys.readouterr().out
    assert "checkpoint-18: not used, because the best one up to it, checkpoint-9, is not whole" in said
    assert "checkpoint-9: not used, because model.safetensors is" in said


def test_a_run_that_was_moved_still_ends_with_its_best_checkpoint(interrupted, task, tokenizer, tmp_path):
    killed, training, _ = interrupted
    moved = shutil.copytree(killed.parent / "undisturbed", tmp_path / "moved")
    best, last = sorted(moved.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    make_best(last, best.name)
    model = tiny_model()
    details = train(model, task, tokenizer, copy.copy(training), moved, task.features(tokenizer)["train"])
    assert details["resumed_from_step"] == 27
    expected = load_file(best / "model.safetensors")
    for name, weights in model.state_dict().items():
        np.testing.assert_array_equal(weights.numpy(), expected[name].numpy(), err_msg=name)


def test_a_training_goes_on_from_the_checkpoint_before_a_truncated_one(interrupted, task, tokenizer, tmp_path):
    killed, training, undisturbed = interrupted
    copied = shutil.copytree(killed, tmp_path / "copy")
    halve(copied / "checkpoint-18" / "optimizer.pt")
    model = tiny_model()
    details = train(model, task, tokenizer, copy.copy(training), copied, task.features(tokenizer)["train"])
    assert details["resumed_from_step"] == 9
    for name, weights in model.state_dict().items():
        np.testing.assert_array_equal(weights.numpy(), undisturbed[name].numpy(), err_msg=name)


# ---- A record edited by hand

EDITS = [
    lambda record: record["metrics"]["validation"].update(accuracy=0.99),
    lambda record: record["made_by"].update(seed=1),
    lambda record: record["files"].update({"model.txt": "0" * 64}),
    lambda record: record.update(bytes="many"),
    lambda record: record.pop("metrics"),
    lambda record: record.update(files=["model.txt"]),
    lambda record: record.update(sha256="0" * 64),
    lambda record: record.pop("sha256"),
]


@pytest.mark.parametrize("edit", EDITS)
def test_a_record_edited_by_hand_is_named_and_nothing_is_made_again(edit, tmp_path, source):
    finish(tmp_path / "run", source)
    path = tmp_path / "run" / "first" / RECORD
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=r"record\.json, found a file that.*Delete that stage's directory"):
        finish(tmp_path / "run", source)
    assert contents(tmp_path / "run") == before


def test_a_record_is_read_however_it_is_laid_out(tmp_path, source):
    finish(tmp_path / "run", source)
    path = tmp_path / "run" / "first" / RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(record.items()))))
    assert read_record(path.parent) == record


def test_a_score_that_is_not_finite_is_null_in_the_record(tmp_path, source):
    def diverged(source: str, directory: Path, task: Task) -> Outcome:
        (directory / "model.txt").write_text("x")
        return Outcome("transformers", {"validation": {"perplexity": float("inf")}})

    finish(tmp_path / "run", source, diverged)
    assert read_record(tmp_path / "run" / "first")["metrics"]["validation"]["perplexity"] is None
