"""Any number of labels for a text: how they are read, losses and thresholds against formulas, and the whole chain on labels that can be
learnt."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from conftest import FILLER, WORDS, tiny_model
from pipelines.cli import main
from pipelines.core.command import run_main
from pipelines.core.config import DataConfig, DistillConfig, LabelConfig
from pipelines.core.errors import InputError
from pipelines.core.task import StageResult
from pipelines.edge.settings import head_outputs
from pipelines.tasks import task_of_model
from pipelines.tasks.metrics import best_thresholds, multi_label_metrics
from pipelines.tasks.multi_label_classification import LabelSetConfig, MultiLabelClassification, mean_f1

LABELS = list(WORDS)


def make_topics(examples: int = 240) -> list[tuple[str, list[str]]]:
    """Texts with words of some topics, which are their labels; some have none."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(examples):
        labels = [label for label in LABELS if generator.random() < 0.4]
        words = list(generator.choice(FILLER, generator.integers(3, 9)))
        words += [word for label in labels for word in generator.choice(WORDS[label], 3)]
        rows.append((" ".join(generator.permutation(words)) + f" {index}", labels))
    return rows


def write_jsonl(path: Path, rows: list[tuple[str, object]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": labels}) + "\n" for text, labels in rows))
    return path


def task_of(path: Path, separator: str | None = None, joined: int = 1, balanced: bool = False, **settings):
    config = DataConfig(dataset=str(path), max_length=32, **settings)
    return MultiLabelClassification(
        config, LabelConfig("balanced" if balanced else "none"), LabelSetConfig(separator, joined)
    )


@pytest.fixture(scope="module")
def topics(tmp_path_factory) -> MultiLabelClassification:
    return task_of(write_jsonl(tmp_path_factory.mktemp("topics") / "topics.jsonl", make_topics()))


@pytest.fixture(scope="module")
def balanced(topics) -> MultiLabelClassification:
    return task_of(topics.config.dataset, balanced=True)


def test_the_whole_chain(pretrained, tmp_path, monkeypatch, capsys):
    path, run = write_jsonl(tmp_path / "topics.jsonl", make_topics()), tmp_path / "run"
    flags = f"""
        compress --task multi-label-classification --dataset {path} --teacher_model {pretrained} --output_dir {run} --max_length 32
        --teacher_epochs 8 --teacher_learning_rate 3e-3 --num_train_epochs 6 --learning_rate 3e-3 --per_device_train_batch_size 8
        --student_layers 2 --prune_steps 1 --prune_epochs 2 --prune_heads 0.25 --prune_ffn 0.25 --max_quality_drop 0.2 --use_cpu
        --benchmark_rounds 1 --benchmark_seconds 0.05 --web false --label_baseline true --class_weights balanced
    """.split()
    monkeypatch.setattr(sys, "argv", ["pocketformers", *flags])
    run_main(main)
    report = json.loads((run / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert (report["task"], report["primary_metric"]) == ("multi-label-classification", "macro_f1")
    assert stages["teacher"]["metrics"]["micro_f1"] > 0.75
    assert stages["quantized"]["metrics"]["micro_f1"] > 0.7
    assert [*stages][-3:] == ["teacher_quantized", "label_frequency", "tfidf_logistic_regression"]
    assert stages["label_frequency"]["constant"]
    assert stages["tfidf_logistic_regression"]["metrics"]["macro_f1"] > 0.8
    # An exported model has the thresholds of the one that it is the graph of; a quantized one its own, and so have its files and the bundle.
    assert stages["onnx"]["metrics"]["thresholds"] == stages["pruned"]["metrics"]["thresholds"]
    thresholds = stages["quantized"]["metrics"]["thresholds"]
    manifest = json.loads((run / "bundle" / "manifest.json").read_text())
    config = json.loads((run / "quantized" / "config.json").read_text())
    assert config["thresholds"] == thresholds
    assert manifest["outputs"]["thresholds"] == [thresholds[label] for label in LABELS]
    assert f"{LABELS[0]} {thresholds[LABELS[0]]:.3f}" in (run / "report.md").read_text()
    card = (run / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "average precision" in card
    assert "macro f1" in capsys.readouterr().out

    text = f"{' '.join(WORDS[LABELS[0]])} {' '.join(WORDS[LABELS[2]])}"
    command = [sys.executable, str(run / "bundle" / "infer.py"), text, "--json"]
    predicted = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert predicted["labels"] == [LABELS[0], LABELS[2]]
    from pipelines import load

    assert predicted == load(run / "bundle")(text) == load(run / "quantized")(text)
    assert task_of_model(run / "pruned") == "multi-label-classification"
    # The code of the card, with the teacher: stock transformers takes a sigmoid, and the thresholds from config.json.
    from pipelines.tasks.multi_label_classification import MultiLabelPresentation

    code = MultiLabelPresentation().in_python(report, str(run / "teacher")).replace('"A text."', json.dumps(text))
    import textwrap

    exec(textwrap.dedent(code), {})
    assert [one for one in LABELS if f"'label': '{one}'" in capsys.readouterr().out or one == LABELS[0]]
