"""Settings of a training that cannot work are one message before any data is read."""

from __future__ import annotations

import re

import pytest

from pipelines.core.command import parse_config
from pipelines.core.config import DataConfig, LabelConfig, LanguageConfig, TeacherConfig
from pipelines.core.errors import InputError
from pipelines.core.identity import describe
from pipelines.tasks import TaskConfig, make_task, task_class
from pipelines.training.arguments import TrainingArguments, best_metric


def settings_of(tmp_path, *argv: str, task: str = "text-classification"):
    kinds = [TeacherConfig, TrainingArguments, *task_class(task).settings]
    argv = ("--dataset", "/no/such/data.csv", "--output_dir", str(tmp_path / "run"), "--use_cpu", *argv)
    settings = parse_config(kinds, argv=list(argv))
    settings.task = TaskConfig(task)
    return settings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--metric_for_best_model eval_f1", "macro_f1"),
        ("--metric_for_best_model acuracy", "Did you mean accuracy"),
        ("--metric_for_best_model macro_f1 --greater_is_better false", "greater_is_better true for macro_f1"),
        ("--metric_for_best_model eval_loss --greater_is_better", "greater_is_better false for eval_loss"),
        ("--report_to wandb", "pip install wandb"),
        ("--report_to mlflow tensorboard", "install"),
        ("--optim adamw_bnb_8bit", "bitsandbytes"),
        ("--optim galore_adamw", "galore"),
        ("--use_liger_kernel", "liger"),
        ("--optim adamw_torch --adam_beta1 1.5", "beta"),
        ("--lr_scheduler_type cosine_with_min_lr", "min_lr"),
        ('--lr_scheduler_type cosine --lr_scheduler_kwargs {"cycles":2}', "cycles"),
        ("--fp16", "fp16"),
        ("--prediction_loss_only", "prediction_loss_only false"),
        ("--eval_do_concat_batches false", "eval_do_concat_batches true"),
        ("--lr_scheduler_kwargs num_cycles=2", "mapping"),
        ("--torch_compile_backend nonesuch", "NONESUCH"),
    ],
)
def test_what_the_trainer_would_refuse_is_refused_before_the_data_is_read(tmp_path, flags, message):
    with pytest.raises(InputError, match=f"expected.*{message}.*"):
        make_task(settings_of(tmp_path, *flags.split()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--report_to wandbb", "Did you mean .*wandb"),
        ("--optim adamw_torc", "Did you mean adamw_torch"),
        ("--lr_scheduler_type cosin", "Did you mean cosine"),
        ("--eval_strategy epochs", "Did you mean epoch"),
        ("--train_sampling_strategy by_length", "group_by_length"),
        ("--save_strategy steps", "found:.*save and eval strategy to match"),
        ("--save_strategy steps --save_steps 150 --eval_strategy steps --eval_steps 100", "multiple"),
        ("--tf32 true", "tf32"),
        ("--weight_decay -0.1", "--weight_decay at least 0, found -0.1"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps at least 1, found 0"),
        ("--label_smoothing_factor 1.5", "--label_smoothing_factor below 1"),
        ("--save_total_limit -1", "--save_total_limit at least 0"),
        ("--deepspeed nowhere.json", "expected"),
        ("--fsdp full_shard --fsdp_config nowhere.json", "nowhere.json"),
        ("--accelerator_config nowhere.json", "nowhere.json"),
        ("--resume_from_checkpoint nowhere", "by itself"),
        ("--early_stopping_patience 0", "at least 1"),
        ("--early_stopping_patience 2 --eval_strategy no --save_strategy no", "epoch or steps"),
    ],
)
def test_what_is_wrong_whatever_the_task_is_a_bad_flag(tmp_path, flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        settings_of(tmp_path, *flags.split())
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("task", "name", "expected"),
    [
        ("text-classification", "accuracy", ("accuracy", True)),
        ("text-classification", "eval_macro_f1", ("macro_f1", True)),
        ("text-classification", "eval_loss", ("eval_loss", False)),
        ("text-classification", "loss", ("eval_loss", False)),
        ("text-regression", "root_mean_squared_error", ("root_mean_squared_error", False)),
        ("text-generation", "eval_next_token_accuracy", ("next_token_accuracy", True)),
        ("text-generation", None, ("perplexity", False)),
    ],
)
def test_the_direction_of_a_metric_is_the_tasks(tmp_path, task, name, expected):
    settings = settings_of(tmp_path, *(["--metric_for_best_model", name] if name else []), task=task)
    assert best_metric(settings.training, make_task(settings)) == expected


@pytest.mark.parametrize("task", ["question-answering", "token-classification", "image-classification"])
def test_a_part_of_texts_that_a_task_would_not_cut_is_refused(tmp_path, task):
    with pytest.raises(InputError, match=f"expected --text_part whole for --task {task}, .*found first_line"):
        make_task(settings_of(tmp_path, "--text_part", "first_line", task=task))
    make_task(settings_of(tmp_path, "--text_part", "first_line"))


@pytest.mark.parametrize("flags", ["--label_smoothing_factor 0.1", "--optim adafactor", "--neftune_noise_alpha 5"])
def test_what_the_trainer_can_do_is_not_refused(tmp_path, flags):
    make_task(settings_of(tmp_path, *flags.split()))


def test_a_bad_environment_is_not_blamed_on_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="deepspeed[^(]*$"):
        settings_of(tmp_path)


def test_the_metrics_named_are_those_of_a_score():
    import numpy as np

    from pipelines.tasks.metrics import classification_metrics
    from pipelines.tasks.text_regression import regression_metrics

    made = classification_metrics(np.array([0, 1, 1]), np.array([0, 1, 0]), ["a", "b"])
    numbers = {name for name, value in made.items() if isinstance(value, float)}
    assert task_class("text-classification").metrics.keys() == numbers
    assert task_class("text-regression").metrics.keys() == regression_metrics(np.ones(3), np.arange(3)).keys()


@pytest.mark.parametrize(
    ("variable", "value"), [("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")]
)
def test_what_accelerate_launch_sets_is_part_of_what_made_a_stage(tmp_path, monkeypatch, variable, value):
    plain = describe(settings_of(tmp_path).training)
    monkeypatch.setenv(variable, "no")
    assert describe(settings_of(tmp_path).training) == plain
    monkeypatch.setenv(variable, value)
    changed = describe(settings_of(tmp_path).training)
    assert changed != plain
    assert value.lower() in changed.values()


def test_allowing_a_weak_teacher_redoes_nothing():
    assert describe(TeacherConfig(allow_weak_teacher=True)) == describe(TeacherConfig())


def test_no_early_stopping_redoes_nothing(tmp_path):
    assert "early_stopping_patience" not in describe(settings_of(tmp_path).training)
    patient = settings_of(tmp_path, "--early_stopping_patience", "2")
    assert describe(patient.training)["early_stopping_patience"] == 2


def test_class_weights_are_of_tasks_with_classes():
    assert LabelConfig in task_class("image-classification").settings
    assert LabelConfig not in task_class("text-regression").settings
    assert LanguageConfig in task_class("text-generation").settings
    assert DataConfig in task_class("text-classification").settings
