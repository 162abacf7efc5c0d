"""A score of a text or of a pair: the losses and metrics against formulas, and the whole chain on a score that can be learnt."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from conftest import FILLER, WORDS, tiny_language_model, tiny_model
from pipelines.cli import main
from pipelines.core.command import run_main
from pipelines.core.config import DataConfig, DistillConfig
from pipelines.core.errors import InputError
from pipelines.core.task import StageResult
from pipelines.tasks import task_of_model
from pipelines.tasks.text_regression import TextRegression, pearson, regression_metrics


def write_scores(path: Path, examples: int = 240) -> Path:
    """Texts, beside another one, whose score is 10 for each word of sport in them, and 30 besides."""
    generator = np.random.default_rng(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "other", "label"])
        for index in range(examples):
            count = int(generator.integers(0, 4))
            words = [*generator.choice(FILLER, generator.integers(3, 9)), *generator.choice(WORDS["sport"], count)]
            writer.writerow([f"{' '.join(generator.permutation(words))} {index}", "the match", 30 + 10 * count])
    return path


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> TextRegression:
    path = write_scores(tmp_path_factory.mktemp("scores") / "scores.csv")
    return TextRegression(DataConfig(dataset=str(path), max_length=32))


def test_metrics_equal_scipys():
    generator = np.random.default_rng(0)
    references = generator.normal(size=50).round(1)  # with ties
    scores = references + generator.normal(size=50)
    found = regression_metrics(scores, references)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(scores, references).statistic)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(scores, references).statistic)
    assert found["root_mean_squared_error"] == pytest.approx(np.linalg.norm(scores - references) / 50**0.5)
    assert regression_metrics(np.ones(50), references)["pearson"] == 0
    # Over the last axis, as the bootstrap asks for it.
    many = generator.normal(size=(3, 50))
    by_row = [scipy.stats.pearsonr(row, references).statistic for row in many]
    assert pearson(many, np.broadcast_to(references, many.shape)) == pytest.approx(by_row)


def test_losses_are_squared_errors_over_the_variance_of_the_labels(scored):
    labels = torch.tensor([30.0, 50.0, -100.0])  # the last only fills up a batch
    student, teacher = torch.tensor([[32.0], [45.0], [7.0]]), torch.tensor([[31.0], [49.0], [0.0]])
    variance = np.var(scored.splits["train"]["label"][:])
    loss, count = scored.label_loss({"logits": student}, labels)
    assert (loss.item(), count.item()) == (pytest.approx((2**2 + 5**2) / variance), 2)
    stored = scored.soft_targets({"logits": teacher}, DistillConfig())
    soft = scored.soft_loss({"logits": student}, stored, labels, DistillConfig())
    assert soft.item() == pytest.approx((1**2 + 4**2) / variance)


def test_a_fresh_head_starts_in_the_unit_of_the_labels(scored, pretrained, tmp_path):
    model = scored.load_model(str(pretrained), "new if other")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    labels = np.array(scored.splits["train"]["label"][:])
    assert model.classifier.bias.item() == pytest.approx(labels.mean())
    # A head that was trained stays as it is, and says what the model is for.
    with torch.no_grad():
        model.classifier.bias.fill_(1.5)
    model.save_pretrained(tmp_path)
    assert scored.load_model(str(tmp_path)).classifier.bias.item() == 1.5
    assert task_of_model(tmp_path) == "text-regression"


def test_a_decoder_scores_texts(scored, tokenizer, tmp_path):
    tiny_language_model("gpt2", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = scored.load_model(str(tmp_path), "new if other")
    assert model.score.bias is None
    assert model.score.weight.std().item() == pytest.approx(0.02 * scored._labels.std(), rel=0.5)


def test_a_classifier_is_no_teacher(scored, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected a model for the labels"):
        scored.load_model(str(tmp_path))
    with pytest.raises(InputError, match="no better than guessing"):
        scored.check_teacher({"pearson": -0.1}, None)


def test_a_score_that_means_no_label_to_transformers_is_refused(tmp_path):
    path = write_scores(tmp_path / "scores.csv")
    path.write_text(path.read_text().replace(",30\n", ",-100\n"))
    with pytest.raises(InputError, match="other than -100"):
        TextRegression(DataConfig(dataset=str(path))).data  # noqa: B018


@pytest.mark.parametrize("constant", ["train", "validation"])
def test_a_split_whose_scores_are_all_the_same_is_refused(constant, tmp_path):
    for index, name in enumerate(("train", "validation", "test")):
        rows = [f"text {index} {row},{4.5 if name == constant else row}" for row in range(20)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
    with pytest.raises(InputError, match=f"found 4.5 in every row of the {constant} split.*--label_column"):
        TextRegression(DataConfig(dataset=str(tmp_path))).data  # noqa: B018


def test_the_comparison_names_the_texts_whose_error_grew(scored, tokenizer):
    references = np.array(scored.features(tokenizer)["test"]["labels"], np.float64)
    worse = references.copy()
    worse[3] += 9
    stages = [StageResult(name, "onnx", scores, {}, {}) for name, scores in (("teacher", references), ("onnx", worse))]
    found = scored.compare(stages, tokenizer, shipped="onnx")
    assert found.report["worse_examples"]["total"] == 1
    [example] = found.report["worse_examples"]["examples"]
    assert (example["index"], example["shipped"] - example["teacher"]) == (3, 9)
    assert found.stages["onnx"]["agreement"] == pytest.approx(1 - 1 / len(references))
    text = scored.presentation.what_was_lost(found.report, {"name": "onnx"}, 5)
    assert "1 of" in text
    assert example["text"] in text


@pytest.mark.usefixtures("timed_here")
def test_the_whole_chain_of_pairs(pretrained, tmp_path, monkeypatch, capsys):
    """Of single texts it is in test_other_kinds.py."""
    path, run = write_scores(tmp_path / "scores.csv"), tmp_path / "run"
    flags = f"""
        compress --task text-regression --dataset {path} --teacher_model {pretrained} --output_dir {run} --max_length 32
        --teacher_epochs 8 --teacher_learning_rate 3e-3 --num_train_epochs 6 --learning_rate 3e-3 --per_device_train_batch_size 8
        --student_layers 1 --prune_steps 1 --prune_epochs 2 --prune_heads 0.25 --prune_ffn 0.25 --max_quality_drop 0.2 --use_cpu
        --benchmark_rounds 1 --benchmark_seconds 0.05 --web false --label_baseline true
        --text_pair_column other
    """
    monkeypatch.setattr(sys, "argv", ["pocketformers", *flags.split()])
    run_main(main)
    report = json.loads((run / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert (report["task"], report["primary_metric"]) == ("text-regression", "pearson")
    assert stages["teacher"]["metrics"]["pearson"] > 0.8
    assert stages["quantized"]["metrics"]["pearson"] > 0.7
    assert [*stages][-3:] == ["teacher_quantized", "mean_score", "tfidf_ridge"]
    assert stages["mean_score"]["metrics"]["pearson"] == 0
    assert stages["tfidf_ridge"]["metrics"]["pearson"] > 0.7
    assert "root mean squared error" in (run / "report.md").read_text()
    card = (run / "README.md").read_text()
    assert "type: pearsonr" in card
    assert "scoring pairs of texts" in card
    assert "pearson" in capsys.readouterr().out

    command = [sys.executable, str(run / "bundle" / "infer.py"), "--pair", "a goal", "the match", "--json"]
    predicted = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    from pipelines import load

    assert predicted == load(run / "bundle")(("a goal", "the match"))
    score = next(iter(predicted["values"].values()))
    assert 20 < score < 80
    # Stock transformers opens the pruned directory and gives the number itself, not its sigmoid.
    from transformers import pipeline

    stock = pipeline("text-classification", model=str(run / "pruned"))({"text": "a goal", "text_pair": "the match"})
    assert stock["score"] == pytest.approx(score, abs=5)


def test_settings_of_distributions_are_refused_for_scores(scored):
    for settings in ({"divergence": "decoupled"}, {"divergence": "reverse_kl"}, {"standardize_logits": True}):
        with pytest.raises(InputError, match="squared error"):
            scored.check_soft_loss(DistillConfig(**settings))
    scored.check_soft_loss(DistillConfig(divergence="squared_error"), teachers=2)
