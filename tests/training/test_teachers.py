"""Several teachers, and teachers that read other tokens than their student: they meet in stored soft targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import quick_arguments, tiny_model, write_byte_encoder
from pipelines.cli import main
from pipelines.core.command import parse_config
from pipelines.core.config import DistillConfig, StudentConfig, TeacherConfig
from pipelines.core.errors import InputError
from pipelines.training.distill import check_distillation, distill_student
from pipelines.training.fine_tune import fine_tune
from pipelines.training.soft_targets import compute_soft_targets, with_soft_targets


@pytest.fixture(scope="module")
def byte_encoder(task, tmp_path_factory) -> Path:
    return write_byte_encoder(tmp_path_factory.mktemp("byte_encoder"), task.data.splits["train"]["text"], 400)


@pytest.fixture(scope="module")
def byte_teacher(byte_encoder, task, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("byte_teacher")
    training = quick_arguments(directory, per_device_train_batch_size=8)
    settings = TeacherConfig(teacher_epochs=8, teacher_learning_rate=3e-3)
    assert fine_tune(str(byte_encoder), directory, task, settings, training).metrics["validation"]["accuracy"] > 0.8
    return directory


@pytest.fixture
def stored(trained_teacher, byte_teacher, task, tmp_path) -> list[Path]:
    directories = [tmp_path / "soft_targets", tmp_path / "soft_targets_2"]
    for teacher, directory in zip((trained_teacher, byte_teacher), directories, strict=True):
        directory.mkdir()
        compute_soft_targets(str(teacher), directory, task, DistillConfig())
    return directories


def test_tokenizers_do_differ(trained_teacher, byte_teacher, task):
    ours, theirs = (task.features(task.load_processor(str(one)))["train"] for one in (trained_teacher, byte_teacher))
    assert len(ours) == len(theirs) > 0
    assert sum(a != b for a, b in zip(ours["input_ids"], theirs["input_ids"], strict=True)) == len(ours)
    assert sum(a != b for a, b in zip(ours["length"], theirs["length"], strict=True)) > len(ours) / 2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "squared_error"},
        {"divergence": "decoupled", "beta": 0.9},
        {"standardize_logits": True},
        {"combine_teachers": "each"},
    ],
)
def test_a_student_of_other_tokens_learns_from_several_teachers(
    settings, stored, byte_encoder, trained_teacher, task, training, tmp_path
):
    """Without the labels: what it knows in the end it has from both teachers' stored logits alone."""
    training.num_train_epochs, training.learning_rate, training.per_device_train_batch_size = 8, 3e-3, 8
    outcome = distill_student(
        str(trained_teacher),
        tmp_path / "student",
        task,
        StudentConfig(student_model=str(byte_encoder)),
        DistillConfig(soft_target_weight=1.0, **settings),
        training,
        stored,
    )
    assert outcome.details["soft_targets"] == "stored"
    assert outcome.metrics["validation"]["accuracy"] > 0.7


def test_every_row_has_the_logits_of_both_teachers(stored, task, tokenizer):
    features = task.features(tokenizer)["train"]
    both = with_soft_targets(task, lambda processor: features, features, stored)
    assert both.column_names == [*features.column_names, "teacher_logits", "teacher_logits_2"]
    some = both.select([5, 70])
    for place, row in enumerate((5, 70)):
        for suffix, directory in zip(("", "_2"), stored, strict=True):
            alone = with_soft_targets(task, lambda processor: features, features, directory)[row]["teacher_logits"]
            np.testing.assert_array_equal(some[place][f"teacher_logits{suffix}"], alone)
    batch = task.collate(tokenizer)([some[0], some[1]])
    assert batch["teacher_logits_2"].shape == (2, 3)


def test_one_teacher_is_a_name_and_several_are_a_list(tmp_path):
    one = parse_config([TeacherConfig], argv=["--teacher_model", "a"])
    assert one.teacher.teacher_model == one.given["teacher_model"] == "a"
    assert parse_config([TeacherConfig], argv=["--teacher_model=google-bert/bert-base-uncased"]).given == {}
    (tmp_path / "two.yaml").write_text("teacher_model: [a, b]")
    for argv in (["--teacher_model", "a", "b"], ["--config", str(tmp_path / "two.yaml")]):
        two = parse_config([TeacherConfig], argv=argv)
        assert (two.teacher.teacher_model, two.teacher.more_teachers) == ("a", ["b"])
        assert two.given["teacher_model"] == ["a", "b"]
        assert {suffix: one.teacher_model for suffix, one in two.teacher.each().items()} == {"": "a", "_2": "b"}


@pytest.mark.usefixtures("timed_here")
def test_the_whole_chain_with_two_teachers(pretrained, byte_encoder, csv_file, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    command = f"""
        pocketformers compress --dataset {csv_file} --teacher_model {pretrained} {byte_encoder} --output_dir {run} --max_length 32
        --teacher_epochs 1 --allow_weak_teacher --student_layers 1 --max_steps 2 --prune_heads 0.25
        --prune_ffn 0 --prune_steps 1 --prune_epochs 0.1 --quantization none --combine_teachers each --max_quality_drop 1 --benchmark_rounds 1
        --benchmark_seconds 0.1 --web false --baselines false --use_cpu --disable_tqdm true --per_device_train_batch_size 8
    """
    monkeypatch.setattr("sys.argv", command.split())
    main()
    report = json.loads((run / "report.json").read_text())
    names = [stage["name"] for stage in report["stages"]]
    assert names == ["teacher", "teacher_2", "teacher_onnx", "student", "pruned", "onnx"]
    assert report["config"]["teacher_model"] == [f"<local>/{one.name}" for one in (pretrained, byte_encoder)]
    records = {
        name: json.loads((run / name / "record.json").read_text()) for name in ("teacher", "teacher_2", "student")
    }
    assert records["teacher"]["made_by"]["teacher"]["teacher_model"] == str(pretrained)
    assert records["teacher_2"]["made_by"]["teacher"]["teacher_model"] == str(byte_encoder)
    assert len(records["student"]["made_by"]["soft_targets"]) == 2
    assert (run / "soft_targets_2" / "record.json").is_file()
    capsys.readouterr()
    main()
    assert (
        capsys.readouterr().out.count("finished already") == len(names) + 4
    )  # both soft targets, the bundle, the report


@pytest.mark.parametrize("verb", ["fine-tune", "soft-targets"])
def test_commands_of_one_teacher_refuse_several(verb, csv_file, pretrained, tmp_path, monkeypatch):
    several = f"--teacher_model {pretrained} {pretrained} --dataset {csv_file} --output_dir {tmp_path / 'out'}"
    monkeypatch.setattr("sys.argv", ["pocketformers", verb, *several.split()])
    with pytest.raises(InputError, match="one --teacher_model for this command"):
        main()


def test_the_verb_distill_takes_several_teachers_and_what_was_stored_of_them(
    byte_teacher, trained_teacher, csv_file, tmp_path, monkeypatch
):
    out = tmp_path / "student"
    flags = f"--teacher_model {trained_teacher} {byte_teacher} --dataset {csv_file} --max_length 32 --validation_size 0.2 --test_size 0.2"
    flags += " --use_cpu --disable_tqdm true --max_steps 2 --student_layers 2"

    def distill(*more: str) -> None:
        monkeypatch.setattr("sys.argv", ["pocketformers", "distill", *flags.split(), *more])
        main()

    distill("--output_dir", str(out))
    stored = tmp_path / "student_soft_targets"
    distill("--output_dir", str(tmp_path / "again"), "--soft_target_dir", str(stored))
    made_by = [json.loads((one / "record.json").read_text())["made_by"] for one in (out, tmp_path / "again")]
    assert made_by[0]["soft_targets"] == made_by[1]["soft_targets"]
    assert len({*made_by[0]["soft_targets"]}) == 2
    stored.with_name("turned").symlink_to(stored.with_name(f"{stored.name}_2"))
    with pytest.raises(InputError, match="found others"):
        distill("--output_dir", str(tmp_path / "other"), "--soft_target_dir", str(tmp_path / "turned"))


def test_language_models_teach_each_their_likeliest_tokens(language_teacher, language_task, training, tmp_path):
    stored = [tmp_path / "one", tmp_path / "two"]
    for directory in stored:
        directory.mkdir()
        what = DistillConfig(soft_target_top_k=8, standardize_logits=True)
        compute_soft_targets(str(language_teacher), directory, language_task, what)
    distill = DistillConfig(combine_teachers="each", standardize_logits=True)
    training.max_steps = 2
    student, settings = StudentConfig(student_layers="2"), (distill, training)
    learnt = [
        distill_student(str(language_teacher), tmp_path / name, language_task, student, *settings, targets).details
        for name, targets in (("student", stored), ("of_one", stored[0]))
    ]
    # Two teachers that are the same one.
    assert learnt[0]["train_loss"] == pytest.approx(learnt[1]["train_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["language", "image"])
def test_attention_and_relations_of_other_tasks(kind, request, training, tmp_path, image_processor, monkeypatch):
    if kind == "language":
        task, source = (request.getfixturevalue(f"language_{name}") for name in ("task", "teacher"))
    else:
        task, source = request.getfixturevalue("image_task"), tmp_path / "vit"
        tiny_model("vit").save_pretrained(source)
        image_processor.save_pretrained(source)
        monkeypatch.setattr(task, "allow_weak_teacher", True)
    distill = DistillConfig(attention_weight=1.0, relation_weight=1.0, hidden_state_weight=0.1)
    training.max_steps, student = 2, StudentConfig(student_layers="2")
    check_distillation(student, distill, str(source), task)
    outcome = distill_student(str(source), tmp_path / "student", task, student, distill, training)
    assert outcome.details["soft_targets"] == "online"
    assert np.isfinite(outcome.details["train_loss"])
