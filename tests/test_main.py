"""`python -m pipelines <stage>`: each stage alone, on directories that no recipe made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.core.config import run_main

TRAIN = [
    "--max_length", "32", "--num_train_epochs", "2", "--learning_rate", "3e-3", "--per_device_train_batch_size", "8",
    "--use_cpu", "true",
]  # fmt: skip


@pytest.fixture
def stage(monkeypatch, capsys):
    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pipelines", *argv])
        status = 0
        try:
            run_main(main)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def record(directory: Path) -> dict:
    return json.loads((directory / "record.json").read_text())


def test_the_chain_stage_by_stage(stage, pretrained, csv_file, tmp_path):
    data = ["--dataset", str(csv_file), "--max_length", "32"]
    out = {name: str(tmp_path / name) for name in ("teacher", "student", "pruned", "onnx", "quantized")}

    def ok(*argv: str) -> str:
        status, output, errors = stage(*argv)
        assert status == 0, errors
        return output

    teacher = ["--teacher_model", str(pretrained), "--teacher_epochs", "6", "--teacher_learning_rate", "3e-3"]
    ok("fine-tune", *teacher, *data, *TRAIN, "--output_dir", out["teacher"])
    assert record(tmp_path / "teacher")["metrics"]["validation"]["accuracy"] > 0.7
    ok(
        "distill",
        "--teacher_model",
        out["teacher"],
        "--student_layers",
        "0,3",
        *data,
        *TRAIN,
        "--output_dir",
        out["student"],
    )
    assert record(tmp_path / "student")["details"]["soft_targets"] == "online"
    prune = ["--model", out["student"], "--teacher_model", out["teacher"], "--prune_heads", "0.5", "--prune_steps", "1"]
    ok("prune", *prune, "--prune_epochs", "1", *data, *TRAIN, "--output_dir", out["pruned"])
    assert record(tmp_path / "pruned")["details"]["heads_removed"] == 0.5
    ok("export", "--model", out["pruned"], *data, "--output_dir", out["onnx"])
    ok("quantize", "--model", out["onnx"], "--max_quality_drop", "0.2", *data, "--output_dir", out["quantized"])
    assert "largest_difference" in ok("verify", "--model", out["onnx"], "--reference", out["pruned"], *data)
    status, _, errors = stage(
        "quantize", "--model", out["onnx"], "--quantization", "none", *data, "--output_dir", out["quantized"]
    )
    assert status == 1
    assert "ship the exported directory itself" in errors
    assert "agreement" in ok(
        "verify", "--model", out["quantized"], "--reference", out["onnx"], "--max_quality_drop", "0.2", *data
    )
    timed = ok(
        "benchmark",
        "--models",
        out["pruned"],
        out["quantized"],
        "--benchmark_rounds",
        "1",
        "--benchmark_seconds",
        "0.1",
        *data,
    )
    assert len(json.loads(timed[timed.index("{") :])) == 2
    status, _, errors = stage("verify", "--model", out["onnx"], "--reference", out["teacher"], *data)
    assert status == 1
    assert "must not be used" in errors
    assert (
        stage("export", "--model", out["pruned"], *data, "--output_dir", out["onnx"])[1].strip()
        == "onnx: finished already"
    )
    assert not list(tmp_path.glob(".*.partial"))


def test_the_chain_of_a_language_model_stage_by_stage(stage, language_shape, language_text, tmp_path):
    data = [
        "--task",
        "text-generation",
        "--dataset",
        str(language_text),
        "--max_length",
        "32",
        "--vocabulary_size",
        "300",
    ]
    train = [*TRAIN, "--max_steps", "8"]
    out = {name: str(tmp_path / name) for name in ("teacher", "student", "pruned", "onnx", "quantized")}

    def ok(*argv: str) -> str:
        status, output, errors = stage(*argv, *data)
        assert status == 0, errors
        return output

    teacher = [
        "--teacher_model",
        str(language_shape),
        "--teacher_from_scratch",
        "true",
        "--teacher_learning_rate",
        "5e-3",
    ]
    ok("fine-tune", *teacher, *train, "--max_steps", "30", "--output_dir", out["teacher"])
    student = ["--teacher_model", out["teacher"], "--student_layers", "2"]
    ok("distill", *student, *train, "--output_dir", out["student"])
    prune = [
        "--model",
        out["student"],
        "--teacher_model",
        out["teacher"],
        "--prune_steps",
        "1",
        "--prune_samples",
        "16",
    ]
    ok("prune", *prune, *train, "--output_dir", out["pruned"])
    ok("export", "--model", out["pruned"], "--output_dir", out["onnx"])
    blocks = ["--quantization", "int8_blocks", "--block_size", "16"]
    ok("quantize", "--model", out["onnx"], *blocks, "--output_dir", out["quantized"])
    assert "'prompts': 20" in ok("verify", "--model", out["onnx"], "--reference", out["pruned"])
    assert "perplexity" in ok("verify", "--model", out["quantized"], "--reference", out["onnx"])
    timed = ok(
        "benchmark", "--models", out["onnx"], out["quantized"], "--benchmark_rounds", "1", "--benchmark_seconds", "0.1"
    )
    assert all(timing["tokens_per_second"] > 0 for timing in json.loads(timed[timed.index("{") :]).values())
    verify = ["verify", "--model", out["onnx"], "--reference", out["teacher"]]
    status, _, errors = stage(*verify, *data)
    assert status == 1
    assert "must not be used" in errors


def test_a_stage_does_not_overwrite_what_it_did_not_write(stage, teacher, csv_file, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    status, _, errors = stage(
        "export",
        "--model",
        str(teacher),
        "--dataset",
        str(csv_file),
        "--max_length",
        "32",
        "--output_dir",
        str(tmp_path / "photos"),
    )
    assert status == 1
    assert "something else" in errors
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_help_and_unknown_stages(stage):
    status, output, _ = stage("--help")
    assert status == 0
    assert all(name in output for name in STAGE_COMMANDS)
    for name in STAGE_COMMANDS:
        assert stage(name, "--help")[0] == 0
    assert stage("squash")[0] == 2


@pytest.mark.parametrize("name", ["export", "quantize", "prune", "benchmark", "report", "verify"])
def test_a_stage_without_its_input_says_what_is_missing(name, stage, csv_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", str(csv_file), "--max_length", "32"]
    status, _, errors = stage(name, *flags, *(["--use_cpu", "true"] if name == "prune" else []))
    assert status == 1
    assert "expected" in errors
