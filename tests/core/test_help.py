"""The help of every command: without torch and transformers, and yet all that can be given."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import STAGE_COMMANDS

REPOSITORY = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "onnxruntime", "numpy")
TRAINING = {"fine-tune", "distill", "prune"}


def help_of(code: str, *argv: str) -> str:
    said = f"print('imported:', *sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    code = f"import atexit, runpy, sys; sys.argv = {list(argv)!r}; atexit.register(lambda: {said}); {code}"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False
    )
    assert (process.returncode, process.stderr) == (0, "imported:\n")
    return process.stdout


@pytest.mark.parametrize("recipe", ["distill_bert", "distill_vit", "distill_gpt2"])
def test_a_recipes_help_lists_every_training_flag(recipe):
    from dataclasses import fields

    from pipelines.training.trainer import TrainingArguments

    shown = help_of("runpy.run_path(sys.argv[0], run_name='__main__')", f"recipes/{recipe}.py", "--help")
    flags = set(re.findall(r"^  --(\w+)", shown, re.MULTILINE))
    assert {field.name for field in fields(TrainingArguments) if field.init} <= flags
    assert {"config", "dataset", "teacher_model", "label_baseline"} <= flags
    # Ours, not that of transformers.
    assert "Epochs of the distillation. (default: 4.0)" in " ".join(shown.split())


def test_every_stages_help():
    code = "runpy.run_module('pipelines', run_name='__main__')"
    assert "fine-tune" in help_of(code, "pipelines", "--help")
    for stage in STAGE_COMMANDS:
        shown = help_of(code, "pipelines", stage, "--help")
        assert f"python -m pipelines {stage}" in shown
        assert ("--num_train_epochs" in shown) == (stage in TRAINING)
