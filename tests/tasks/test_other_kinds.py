"""Students of another kind through the whole chain, from the command line to the bundle, as any other student."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, set_seed

from conftest import (
    killed_after,
    make_image_processor,
    make_texts,
    quick_arguments,
    tiny_config,
    tiny_model,
    write_csv,
    write_image_folder,
)
from pipelines import load
from pipelines.cli import main
from pipelines.core.command import run_main
from pipelines.core.config import DataConfig, DistillConfig, PruneConfig, StudentConfig
from pipelines.core.errors import InputError
from pipelines.hub import check_run, usage_section
from pipelines.models.students import build_student
from pipelines.tasks.text_classification import TextClassification
from pipelines.training.distill import check_distillation, distill_student
from pipelines.training.prune import checked_pruning
from pipelines.training.trainer import train as learn
from processes import run_processes, values

pytestmark = pytest.mark.usefixtures("timed_here")
STAGES = ["teacher", "teacher_onnx", "student", "onnx", "quantized"]
CHAIN = """
    --max_length 32 --num_train_epochs 3 --learning_rate 1e-2 --per_device_train_batch_size 8 --max_quality_drop 0.2 --use_cpu
    --baselines false --student_width 24 --student_hidden 16 --benchmark_rounds 1 --benchmark_seconds 0.05 --web false
"""


def compress(monkeypatch, run, flags: str):
    """Run the chain; the report, and the bundle's Python."""
    monkeypatch.setattr(
        sys, "argv", ["pocketformers", "compress", "--output_dir", str(run), *CHAIN.split(), *flags.split()]
    )
    run_main(main)
    report = json.loads((run / "report.json").read_text())
    stages = [stage["name"] for stage in report["stages"]]
    assert stages == ([*STAGES[:3], "student_labels_only", *STAGES[3:]] if "label_baseline" in flags else STAGES)
    assert all(stage["latency_ms"]["p50"] > 0 for stage in report["stages"])
    return report


def predict(run, *inputs: str):
    """What the bundle says in a process of its own, which must be what load() says."""
    command = [sys.executable, str(run / "bundle" / "infer.py"), *inputs, "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found == load(run / "bundle")(inputs[0] if len(inputs) == 1 else inputs[1:])
    return found


def check_padding(run):
    """No text of a padded batch changes another, in the graph, too."""
    texts = [text for text, _ in make_texts(9)]
    tokenizer = AutoTokenizer.from_pretrained(run / "onnx")
    session = onnxruntime.InferenceSession(run / "onnx" / "model.onnx")
    names = [value.name for value in session.get_inputs()]

    def logits(batch):
        tokens = tokenizer(batch, padding=True, return_tensors="np")
        return session.run(None, {name: tokens[name] for name in names})[0]

    np.testing.assert_allclose(logits(texts), np.concatenate([logits([text]) for text in texts]), atol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", pytest.param("cnn", marks=pytest.mark.slow)])
def test_texts(kind, pretrained, csv_file, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    flags = f"--dataset {csv_file} --teacher_model {pretrained} --teacher_epochs 8 --teacher_learning_rate 3e-3 --student_model {kind}"
    report = compress(monkeypatch, run, flags)
    assert "stay: it is no transformer" in capsys.readouterr().out
    assert report["stages"][-1]["metrics"]["accuracy"] > 0.7
    assert predict(run, "the goal of the match")["label"] == "sport"
    card = (run / "README.md").read_text()
    assert "import pipelines.models.small" in card
    assert "library_name" not in card
    report, files = check_run(run)
    published = usage_section(report, TextClassification.presentation, "me/run", files)
    assert "bundle/infer.py" in published
    assert "```js" not in published  # transformers.js knows no such model
    assert str(tmp_path) not in "".join(
        file.read_text() for file in (run / "student").glob("*.json") if file.name != "record.json"
    )
    check_padding(run)


@pytest.mark.slow
def test_scores(pretrained, tmp_path, monkeypatch):
    """Of pairs they are in test_text_regression.py."""
    rows = [
        (text, str(sum(word in text for word in ("goal", "match", "team", "coach")))) for text, _ in make_texts(240)
    ]
    data, run = write_csv(tmp_path / "scores.csv", rows), tmp_path / "run"
    flags = f"""
        --task text-regression --dataset {data} --teacher_model {pretrained} --teacher_epochs 8
        --teacher_learning_rate 3e-3 --student_model static --num_train_epochs 8 --soft_targets online
    """
    report = compress(monkeypatch, run, flags)
    assert report["stages"][-1]["metrics"]["pearson"] > 0.7
    assert "scoring texts" in (run / "README.md").read_text()
    assert -1 < next(iter(predict(run, "a goal")["values"].values())) < 4
    check_padding(run)


def test_images(tmp_path, monkeypatch):
    shape, run = tmp_path / "shape", tmp_path / "run"
    tiny_config("vit", num_hidden_layers=2, initializer_range=0.1).save_pretrained(shape)
    make_image_processor().save_pretrained(shape)
    images = write_image_folder(tmp_path / "images")
    flags = f"""
        --task image-classification --dataset {images} --teacher_model {shape} --teacher_from_scratch --teacher_epochs 6
        --teacher_learning_rate 3e-3 --student_model cnn --student_width 4 --num_train_epochs 4 --quantization static_int8
        --label_baseline
    """
    report = compress(monkeypatch, run, flags)
    assert report["stages"][-1]["metrics"]["accuracy"] > 0.7
    assert predict(run, str(images / "tech" / "001.png"))["label"] == "tech"


def test_what_makes_no_sense_is_refused_before_the_first_step(task, image_task, language_task, teacher):
    hidden = DistillConfig(hidden_state_weight=1.0)
    with pytest.raises(InputError, match="whose layers and heads can be told apart"):
        check_distillation(StudentConfig("static"), hidden, str(teacher), task)
    for other, kind in ((image_task, "lstm"), (language_task, "cnn")):
        with pytest.raises(InputError, match=rf"found '{kind}'.*\./{kind}"):
            check_distillation(StudentConfig(kind), DistillConfig(), str(teacher), other)
    with pytest.raises(InputError, match="found 'org/name'"):
        StudentConfig("org/name", student_width=8)
    config = check_distillation(StudentConfig("lstm"), DistillConfig(), str(teacher), task)
    with pytest.raises(InputError, match="found none in here"):
        checked_pruning(config, PruneConfig(), "here")


def test_an_lstm_reads_from_the_left_whatever_side_its_teacher_is_padded_on(task, tokenizer, tmp_path):
    left = copy.deepcopy(tokenizer)
    left.padding_side = left.init_kwargs["padding_side"] = "left"
    tiny_model().save_pretrained(tmp_path)
    left.save_pretrained(tmp_path)
    assert task.load_processor(str(tmp_path)).padding_side == "left"
    assert build_student(StudentConfig("lstm"), str(tmp_path), task).processor.padding_side == "right"


def test_a_killed_training_ends_as_an_undisturbed_one(task, trained_teacher, training, tmp_path):
    def train(directory):
        set_seed(0)
        student, alone = StudentConfig("lstm", student_width=8, student_hidden=8), DistillConfig(soft_target_weight=0.0)
        outcome = distill_student(str(trained_teacher), directory, task, student, alone, training)
        return outcome.details["resumed_from_step"], load_file(directory / "model.safetensors")

    training.num_train_epochs = 2
    _, undisturbed = train(tmp_path / "undisturbed")
    with killed_after(1):
        train(tmp_path / "killed")
    step, resumed = train(tmp_path / "killed")
    assert step
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)


def in_processes(csv, teacher, count, directory):
    """The weights of a student after four steps with global batches of 8."""
    task = TextClassification(DataConfig(dataset=csv, max_length=32))
    training = quick_arguments(directory, per_device_train_batch_size=8 // count, max_steps=4, optim="sgd")
    set_seed(0)
    model, processor, _ = build_student(StudentConfig("lstm", student_width=8, student_hidden=8), teacher, task)
    model.dropout.p = 0.0  # which each process draws for itself
    learn(model, task, processor, training, Path(directory), task.features(processor)["train"])
    return {name: value.numpy() for name, value in model.state_dict().items()}


def test_two_processes_train_as_one(csv_file, teacher, tmp_path):
    one, two = (
        values(
            run_processes(
                count, tmp_path / str(count), in_processes, str(csv_file), str(teacher), count, tmp_path / "out"
            )
        )
        for count in (1, 2)
    )
    for name, weights in one[0].items():
        np.testing.assert_allclose(two[0][name], weights, atol=1e-5, err_msg=name)


def test_a_student_is_as_large_as_its_flags_say_and_may_know_nothing_of_its_teacher(task, teacher):
    of_teacher = build_student(StudentConfig("static", student_width=4, student_hidden=3), str(teacher), task)
    table = of_teacher.model.get_input_embeddings().weight
    assert (tuple(table.shape), of_teacher.model.classifier.in_features, of_teacher.layers) == ((80, 4), 3, None)
    assert of_teacher.model.config.id2label == dict(enumerate(task.label_names))
    assert of_teacher.processor.model_input_names == ["input_ids", "attention_mask"]
    alone = build_student(StudentConfig("static", student_from_scratch=True), str(teacher), task)
    assert alone.model.get_input_embeddings().weight[:, 32:].any()
