"""--search_trials: the settings of the distillation that are best on the validation split, by the Trainer's own search."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from conftest import tiny_model
from pipelines.core.command import parse_config
from pipelines.core.config import DataConfig, DistillConfig, StudentConfig
from pipelines.core.errors import InputError
from pipelines.core.run import Run
from pipelines.tasks.sentence_embedding.task import SentenceEmbedding
from pipelines.tasks.text_classification import TextClassification
from pipelines.tasks.text_regression import TextRegression
from pipelines.training import search
from pipelines.training.arguments import TrainingArguments
from pipelines.training.distill import DistillationTrainer
from pipelines.training.search import check_search, search_settings, searched, with_found
from pipelines.training.soft_targets import compute_soft_targets
from processes import run_processes, values

optuna = pytest.importorskip("optuna", reason="the extra pocketformers[search] is not installed")
RECIPE = Path(__file__).parents[2] / "recipes" / "distill_bert.py"
GIVEN = DistillConfig()


def arguments(directory, **changes):
    settings = {"num_train_epochs": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 16, "logging_steps": 50}
    return TrainingArguments(output_dir=str(directory), disable_tqdm=True, use_cpu=True, **settings | changes)


@pytest.fixture(scope="module")
def soft_targets(trained_teacher, task, tmp_path_factory):
    directory = tmp_path_factory.mktemp("soft_targets")
    compute_soft_targets(str(trained_teacher), directory, task, GIVEN)
    return directory


def find(directory, task, teacher, soft_targets, trials=4, **changes):
    run = Run(directory, task, seed=42)
    learning = {"student": StudentConfig(student_layers="1"), "distill": GIVEN, "soft_targets": soft_targets}
    try:
        run.stage(
            "search",
            search_settings,
            str(teacher),
            distributed=True,
            trials=trials,
            training=arguments(directory, **changes),
            **learning,
        )
    finally:
        if run.state.is_main_process:
            run._lock.release()
    return run.record("search")["details"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, task, trained_teacher, soft_targets):
    directory = tmp_path_factory.mktemp("undisturbed")
    return directory, find(directory, task, trained_teacher, soft_targets)


def test_the_search_begins_with_the_given_settings_and_finds_none_that_are_worse(undisturbed, capsys):
    directory, details = undisturbed
    trials = details["trials"]
    assert len(trials) == 4
    assert trials[0] == {
        "temperature": 2.0,
        "soft_target_weight": 0.9,
        "learning_rate": 1e-3,
        "accuracy": trials[0]["accuracy"],
    }
    assert len({trial["temperature"] for trial in trials}) == 4
    assert details["score"] == max(trial["accuracy"] for trial in trials)
    assert [path.name for path in (directory / "search").iterdir() if path.name != "record.json"] == ["settings.yaml"]
    read = parse_config(
        [DistillConfig, TrainingArguments], argv=["--config", str(directory / "search" / "settings.yaml")]
    )
    assert {name: read.given[name] for name in details["best"] if name in read.given}.items() <= details["best"].items()
    distill, training = with_found({"details": details}, GIVEN, arguments(directory))
    assert distill.temperature == read.distill.temperature == details["best"]["temperature"]
    assert training.learning_rate == read.training.learning_rate == details["best"]["learning_rate"]


def test_a_search_that_was_killed_goes_on_as_if_it_was_not(
    undisturbed, task, trained_teacher, soft_targets, tmp_path, monkeypatch, capsys
):
    started = []
    real = DistillationTrainer.train

    def killed(self, *arguments, **keywords):
        started.append(keywords["trial"].number)
        if len(started) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(DistillationTrainer, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        find(tmp_path, task, trained_teacher, soft_targets)
    details = find(tmp_path, task, trained_teacher, soft_targets)
    assert len(started) == 3 + 2  # the two that were finished are not trained again
    assert details == undisturbed[1]
    said = capsys.readouterr().out
    assert said.count("search: trial 3 of 4: accuracy") == 1


def test_each_trial_is_a_fresh_student_with_its_own_settings(
    task, trained_teacher, soft_targets, tmp_path, monkeypatch
):
    seen, starts = [], []
    real = DistillationTrainer._inner_training_loop

    def watched(self, *arguments, **keywords):
        seen.append((self.distill.temperature, self.distill.soft_target_weight, self.args.learning_rate))
        starts.append(next(self.model.parameters()).detach().clone())
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(DistillationTrainer, "_inner_training_loop", watched)
    monkeypatch.setattr(task, "soft_target_settings", ("temperature",))  # as those of tokens, stored at one temperature
    details = find(tmp_path, task, trained_teacher, soft_targets, trials=3, early_stopping_patience=1)
    found = [(2.0, trial["soft_target_weight"], trial["learning_rate"]) for trial in details["trials"]]
    assert seen == found
    assert all((start == starts[0]).all() for start in starts)


def test_anybodys_search_may_suggest_settings_of_the_distillation(task, trained_teacher, tokenizer, tmp_path):
    """The trainer as a drop-in, with the names of its own keywords."""
    teacher = task.load_model(str(trained_teacher))
    features = task.features(tokenizer)
    trainer = DistillationTrainer(
        model_init=lambda: tiny_model(num_hidden_layers=1),
        args=arguments(tmp_path, max_steps=2, save_strategy="no", eval_strategy="no", load_best_model_at_end=False),
        teacher=teacher,
        train_dataset=features["train"].select_columns(["input_ids", "attention_mask", "labels"]),
        eval_dataset=features["validation"].select_columns(["input_ids", "attention_mask", "labels"]),
        processing_class=tokenizer,
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"temperature": trial.suggest_float("temperature", 3, 5)}, n_trials=1
    )
    assert trainer.distill.temperature == best.hyperparameters["temperature"]


def in_processes(csv: str, teacher: str, directory: Path, soft_targets: Path, processes: int):
    task = TextClassification(DataConfig(dataset=csv, max_length=32, validation_size=0.2, test_size=0.2))
    return find(directory, task, teacher, soft_targets, trials=3, per_device_train_batch_size=16 // processes)


def test_two_processes_search_together(undisturbed, csv_file, trained_teacher, soft_targets, tmp_path):
    found = values(
        run_processes(2, tmp_path, in_processes, str(csv_file), str(trained_teacher), tmp_path / "run", soft_targets, 2)
    )
    assert found[0] == found[1]
    # The same as one process, but for what a sum in another order makes of the scores.
    for alone, together in zip(undisturbed[1]["trials"], found[0]["trials"], strict=False):
        assert together == pytest.approx(alone, abs=0.05)


@pytest.mark.slow
def test_the_chain_uses_what_it_found(trained_teacher, csv_file, tmp_path, monkeypatch, capsys):
    argv = ["--teacher_model", str(trained_teacher), "--dataset", str(csv_file), "--output_dir", str(tmp_path / "run")]
    argv += "--teacher_epochs 0 --num_train_epochs 2 --learning_rate 2e-4 --student_layers 1 --max_length 32 --use_cpu".split()
    argv += (
        "--prune_heads 0 --prune_ffn 0 --quantization none --max_quality_drop 1 --web false --search_trials 3".split()
    )
    argv += ["--label_baseline", "true", "--baselines", "false", "--seeds", "2"]
    monkeypatch.setattr("pipelines.chain.report_run", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *argv])
    runpy.run_path(str(RECIPE), run_name="__main__")
    said = capsys.readouterr().out
    assert said.count("soft_targets: done in") == 1
    assert "search: --" in said

    def record(stage):
        return json.loads((tmp_path / "run" / stage / "record.json").read_text())

    best = record("search")["details"]["best"]
    for stage in ("student", "seeds/43/student"):
        made_by = record(stage)["made_by"]
        assert {"temperature": made_by["distill"]["temperature"]}.items() <= best.items()
        assert made_by["distill"]["soft_target_weight"] == best["soft_target_weight"]
        assert made_by["training"]["learning_rate"] == best["learning_rate"]
    assert record("student_labels_only")["made_by"]["training"]["learning_rate"] == best["learning_rate"]
    assert not (tmp_path / "run" / "seeds" / "43" / "search").exists()
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert "search: finished already" in (said := capsys.readouterr().out)
    assert "done in" not in said


def test_a_temperature_that_changes_nothing_is_not_searched_for():
    classes, scores = TextClassification(DataConfig()), TextRegression(DataConfig())
    assert searched(classes, GIVEN, 1e-3) == {"learning_rate": 1e-3, "soft_target_weight": 0.9, "temperature": 2.0}
    for other in (scores, SentenceEmbedding(DataConfig())):
        assert searched(other, GIVEN, 1e-3) == {"learning_rate": 1e-3, "soft_target_weight": 0.9}
    assert "temperature" not in searched(classes, DistillConfig(divergence="squared_error"), 1e-3)


def test_what_cannot_be_searched_is_refused_before_anything_is_trained(monkeypatch):
    check_search(GIVEN)
    for other in ({"soft_targets": "online"}, {"hidden_state_weight": 0.1}, {"soft_target_weight": 0.0}):
        with pytest.raises(InputError, match="stored soft targets for --search_trials"):
            check_search(DistillConfig(**other))
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'pocketformers\[search\]'"):
        check_search(GIVEN)
