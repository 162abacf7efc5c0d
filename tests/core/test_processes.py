"""Several processes end together: an error in any one of them is told once, whichever it is, and none is left waiting."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.core.command import parse_config, run_main
from pipelines.core.config import DataConfig, DistillConfig, PruneConfig, StudentConfig, TeacherConfig
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.records import Outcome
from pipelines.core.run import Run
from pipelines.tasks.text_classification import TextClassification
from pipelines.training import prune, soft_targets
from pipelines.training.arguments import TrainingArguments
from pipelines.training.distill import distill_student
from pipelines.training.fine_tune import fine_tune
from pipelines.training.prune import prune_and_recover
from pipelines.training.soft_targets import compute_soft_targets
from pipelines.training.trainer import Trainer
from processes import run_processes, values

REPOSITORY = Path(__file__).parents[2]


def rank() -> int:
    return int(os.environ["RANK"])


def fail_in(place, directory, csv, teacher):
    """A recipe's stages, in one of which a process fails: where `place` says."""

    def export(source: str, stage: Path, task: object) -> Outcome:
        if place == "main":
            raise InputError("expected a graph, found none, of process 0.")
        return Outcome("onnx")

    def main() -> None:
        missing = place == "data" and rank() == 1
        task = TextClassification(DataConfig(dataset=csv + ".of process 1" * missing, max_length=32))
        quick: dict[str, Any] = {
            "use_cpu": True,
            "disable_tqdm": True,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
        }
        quick |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "load_best_model_at_end": False}
        training = TrainingArguments(output_dir=str(directory), **quick)
        run = Run(directory, task, 0)
        if place == "main":
            run.stage("onnx", export, teacher)
        if place == "gate" and rank() == 0:  # between two stages, as a quality gate
            raise VerificationError("expected half of the accuracy, found less, of process 0.")
        if place == "soft targets":
            run.stage("soft_targets", compute_soft_targets, teacher, distributed=True, distill=DistillConfig())
        if place == "cut":
            settings = {"prune": PruneConfig(), "distill": DistillConfig(), "training": training}
            run.stage("pruned", prune_and_recover, teacher, distributed=True, teacher=Path(teacher), **settings)
        run.stage("teacher", fine_tune, teacher, distributed=True, teacher=TeacherConfig(), training=training)

    def step(self: Trainer, *arguments: object, **keywords: object) -> object:
        if rank() == 1 and self.state.global_step == 2:
            if place == "training":
                raise InputError("expected a number, found none, in a step of process 1.")
            if place == "mistake":
                raise ZeroDivisionError("a mistake of process 1")
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(self, *arguments, **keywords)

    def fail(*arguments: object, **keywords: object) -> object:
        if rank() == (0 if place == "cut" else 1):
            raise InputError(f"expected an answer, found none, of process {rank()}.")
        return usual(*arguments, **keywords)

    failing: dict[str, tuple[Any, str, Any]] = {
        **dict.fromkeys(("training", "mistake", "killed"), (Trainer, "training_step", step)),
        "evaluation": (Trainer, "prediction_step", fail),
        "soft targets": (soft_targets, "map_batches", fail),
        "cut": (prune, "measure_importance", fail),
    }
    if place in failing:
        owner, name, instead = failing[place]
        usual = getattr(owner, name)
        setattr(owner, name, instead)
    run_main(main)


@pytest.mark.parametrize("place", ["data", "training", "evaluation", "soft targets", "main", "cut", "gate"])
def test_an_error_in_one_of_two_processes_is_told_once_and_ends_both(place, csv_file, trained_teacher, tmp_path):
    started = time.monotonic()
    ended = run_processes(2, tmp_path / "out", fail_in, place, tmp_path / "run", str(csv_file), str(trained_teacher))
    assert time.monotonic() - started < 90
    failing = 0 if place in ("main", "cut", "gate") else 1
    said = [line for process in ended for line in process.output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, said
    assert f"of process {failing}" in said[0]
    assert ended[failing].status == 1
    assert ended[1 - failing].status in (1, -signal.SIGTERM)
    assert all("Traceback" not in process.output for process in ended)


def test_a_mistake_in_one_process_shows_its_traceback_and_no_other(csv_file, trained_teacher, tmp_path):
    ended = run_processes(
        2, tmp_path / "out", fail_in, "mistake", tmp_path / "run", str(csv_file), str(trained_teacher)
    )
    assert "ZeroDivisionError: a mistake of process 1" in ended[1].output
    assert ended[1].output.count("Traceback") == 1
    assert "Traceback" not in ended[0].output
    assert "error:" not in ended[0].output
    assert [process.status for process in ended] == [1, 1]


def test_a_killed_process_is_told_by_one_that_is_left(csv_file, trained_teacher, tmp_path):
    ended = run_processes(3, tmp_path / "out", fail_in, "killed", tmp_path / "run", str(csv_file), str(trained_teacher))
    assert ended[1].status == -signal.SIGKILL
    said = [line for process in ended for line in process.output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, said
    assert "expected all 3 processes to work to the end, found that one is gone" in said[0]
    assert "Run the same command again" in said[0]
    assert all("Traceback" not in process.output for process in ended)


def distil_and_prune(directory, csv, teacher, killed):
    """The records of a student that learns with dropout, and is pruned; where `killed`, process 1 dies in the student's second epoch."""

    def step(self: Trainer, *arguments: object, **keywords: object) -> object:
        if self.state.global_step == 0:
            torch.manual_seed(rank())  # with one seed for all, the state of one process would do for the other
        if killed and rank() == 1 and self.state.epoch > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(self, *arguments, **keywords)

    usual = Trainer.training_step
    Trainer.training_step = step  # type: ignore[method-assign]
    run = Run(directory, TextClassification(DataConfig(dataset=csv, max_length=32)), 0)
    training = TrainingArguments(output_dir=str(directory), use_cpu=True, disable_tqdm=True, num_train_epochs=2)
    learning = {"distill": DistillConfig(), "training": training, "distributed": True}
    settings = {"distill": DistillConfig(), "shard_examples": 50}
    learning["soft_targets"] = run.stage("soft_targets", compute_soft_targets, teacher, True, **settings)
    run.stage("student", distill_student, teacher, student=StudentConfig(student_layers="2"), **learning)
    prune = PruneConfig(prune_steps=1, prune_epochs=1)
    run.stage("pruned", prune_and_recover, "student", teacher=Path(teacher), prune=prune, **learning)
    return [run.record(name) for name in run.stages]


def test_two_processes_of_which_one_was_killed_end_as_undisturbed_ones_do(csv_file, trained_teacher, tmp_path):
    """Byte for byte, with dropout, so that the state of each process's random numbers counts."""
    teacher = shutil.copytree(trained_teacher, tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.3}))
    arguments = (str(csv_file), str(teacher))
    out = tmp_path / "out"
    undisturbed = values(run_processes(2, out, distil_and_prune, tmp_path / "undisturbed", *arguments, False))[0]
    ended = run_processes(2, out, distil_and_prune, tmp_path / "run", *arguments, True)
    assert ended[1].status == -signal.SIGKILL
    assert not (tmp_path / "run" / "student").exists()
    resumed = values(run_processes(2, out, distil_and_prune, tmp_path / "run", *arguments, False))[0]
    _, student, _ = resumed
    assert student["details"]["resumed_from_step"] == student["details"]["steps"] / 2
    assert [record["processes"] for record in resumed] == [2, 2, 2]
    assert [record["files"] for record in resumed] == [record["files"] for record in undisturbed]


def read_flags(argv):
    parse_config([DataConfig], argv=argv, program="recipe.py")


def test_a_bad_flag_is_told_once_with_status_2(tmp_path):
    ended = run_processes(2, tmp_path, read_flags, ["--no_such_flag", "1"])
    assert [process.status for process in ended] == [2, 2]
    said = "".join(process.output for process in ended)
    assert said.count("usage: recipe.py") == said.count("recipe.py: error: ") == 1
    ended = run_processes(2, tmp_path, read_flags, ["--help"])
    assert [process.status for process in ended] == [0, 0]
    assert "".join(process.output for process in ended).count("usage: recipe.py") == 1


SCRIPT = """
import sys, time
from pathlib import Path
import pipelines.core.run
from pipelines.core.command import run_main
from pipelines.core.errors import InputError
from pipelines.core.records import Outcome
from pipelines.core.run import Run

directory = Path(sys.argv[1])

class Task:
    def describe(self):
        return {}

def export(source, stage, task):
    (directory / "at_work").touch()
    time.sleep(600)

def fail_while_waiting():
    while not (directory / "at_work").exists():
        time.sleep(0.05)
    (directory / "failed").touch()
    raise InputError("expected this disk to last, found that it does not, in process 1.")

def main():
    run = Run(directory / "run", Task(), 0)
    pipelines.core.run.wait_for_all = fail_while_waiting
    run.stage("onnx", export, str(directory))

run_main(main)
"""


def test_the_launcher_ends_a_process_alone_at_work_when_another_fails(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "config.json").write_text("{}")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launcher += [str(REPOSITORY / "accelerate_configs" / "multi_cpu.yaml"), str(tmp_path / "script.py"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    finished = subprocess.run(launcher, capture_output=True, text=True, env=environment, timeout=300)
    assert (tmp_path / "failed").exists(), finished.stderr
    assert time.time() - (tmp_path / "failed").stat().st_mtime < 60
    assert finished.returncode == 1
    messages = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert messages == ["error: expected this disk to last, found that it does not, in process 1."]
    assert not (tmp_path / "run" / "onnx").exists()
