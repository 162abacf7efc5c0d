"""Every recipe by every configuration that needs GPUs: `pytest -m gpu` on a machine that has them; skipped where there are too few."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from conftest import make_image_processor, tiny_config

REPOSITORY = Path(__file__).parents[2]
SMALL = shlex.split("""
    --teacher_epochs 6 --teacher_learning_rate 3e-3 --num_train_epochs 3 --learning_rate 3e-3 --student_layers 2
    --label_baseline false --baselines false --benchmark_rounds 1 --benchmark_seconds 0.1 --prune_heads 0.5 --prune_steps 2
    --prune_epochs 1 --soft_targets online --max_quality_drop 0.2 --web false
""")


@pytest.fixture
def flags(recipe, pretrained, csv_file, image_folder, language_shape, language_text, tmp_path):
    """A tiny model and a small data set for each recipe."""
    if recipe == "distill_bert":
        return ["--teacher_model", str(pretrained), "--dataset", str(csv_file), "--max_length", "32"]
    if recipe == "distill_vit":
        tiny_config("vit", initializer_range=0.1).save_pretrained(tmp_path / "shape")
        make_image_processor().save_pretrained(tmp_path / "shape")
        return [
            "--teacher_model",
            str(tmp_path / "shape"),
            "--dataset",
            str(image_folder),
            "--teacher_from_scratch",
            "true",
        ]
    scratch = ["--teacher_from_scratch", "true", "--vocabulary_size", "300", "--max_length", "32"]
    return ["--teacher_model", str(language_shape), "--dataset", str(language_text), *scratch, "--block_size", "16"]


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["single_gpu", "multi_gpu", "fsdp", "deepspeed_zero2"])
@pytest.mark.parametrize("recipe", ["distill_bert", "distill_vit", "distill_gpt2"])
def test_a_recipe_on_gpus(recipe, config, flags, tmp_path):
    path = REPOSITORY / "accelerate_configs" / f"{config}.yaml"
    processes = yaml.safe_load(path.read_text())["num_processes"]
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    if config == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    command = [
        *launcher,
        str(REPOSITORY / "recipes" / f"{recipe}.py"),
        *flags,
        *SMALL,
        "--output_dir",
        str(tmp_path / "run"),
    ]
    finished = subprocess.run(
        [*command, "--per_device_train_batch_size", str(8 // processes)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert stages.keys() == {"teacher", "teacher_onnx", "student", "pruned", "onnx", "quantized"}
    if recipe == "distill_gpt2":
        assert stages["teacher"]["metrics"]["perplexity"] < 200
    else:
        assert stages["teacher"]["metrics"]["accuracy"] > 0.6
    for stage in ("teacher", "student", "pruned"):
        record = json.loads((tmp_path / "run" / stage / "record.json").read_text())
        assert record["processes"] == processes
