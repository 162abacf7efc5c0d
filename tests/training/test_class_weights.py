"""Rare classes: balanced weights in the loss, in pruning, and in the score that models are chosen by."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from conftest import make_texts, make_tokenizer, tiny_model, write_csv
from pipelines.core.config import DataConfig, DistillConfig, LabelConfig
from pipelines.core.identity import describe
from pipelines.tasks.classification import weighted_accuracy
from pipelines.tasks.image_classification import ImageClassification
from pipelines.tasks.text_classification import TextClassification
from pipelines.training.arguments import TrainingArguments
from pipelines.training.prune import training_loss
from pipelines.training.trainer import train
from processes import run_processes, values


def skewed(path: Path, balanced: bool = True) -> TextClassification:
    """Texts of which sport has a tenth."""
    if not path.exists():
        rows = make_texts(240)
        kept = [row for place, row in enumerate(rows) if row[1] != "sport" or place % 5 == 0]
        write_csv(path, kept)
    return TextClassification(
        DataConfig(dataset=str(path), max_length=32), LabelConfig("balanced" if balanced else "none")
    )


@pytest.fixture(scope="module")
def rare(tmp_path_factory):
    return skewed(tmp_path_factory.mktemp("rare") / "rare.csv")


def numpy_loss(logits, labels, counts, smoothing=0.0):
    """The sum of w[label] times the cross entropy, with w = n / (k n_label), written out."""
    weights = counts.sum() / (len(counts) * counts)
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        log_probabilities = row - row.max() - np.log(np.exp(row - row.max()).sum())
        loss = -(1 - smoothing) * log_probabilities[label] - smoothing * log_probabilities.mean()
        total += weights[label] * loss
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_weighted_as_numpy_weighs_it(rare, smoothing):
    counts = np.bincount(rare.splits["train"]["label"])
    assert counts.min() * 3 < counts.max()
    logits, labels = np.random.default_rng(0).normal(size=(7, 3)), np.array([0, 1, 2, 0, 1, 1, 2])
    outputs = {"logits": torch.tensor(np.concatenate([logits, np.ones((1, 3))]))}
    loss, count = rare.label_loss(outputs, torch.tensor([*labels, -100]), smoothing)
    assert loss.item() == pytest.approx(numpy_loss(logits, labels, counts, smoothing), rel=1e-5)
    assert count == 7
    # Over the training split the weights have a mean of 1, so a learning rate means what it meant.
    weights = rare.class_weights.numpy()
    assert (weights * counts).sum() == pytest.approx(counts.sum())
    assert rare.loss_details == {"class_weights": dict(zip(rare.label_names, weights.tolist(), strict=True))}


def trained(rare, training, batch_size, accumulation, directory):
    arguments = copy.copy(training)
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = batch_size, accumulation
    arguments.max_steps, arguments.logging_steps, arguments.lr_scheduler_type = 4, 1, "constant"
    arguments.eval_strategy, arguments.save_strategy, arguments.load_best_model_at_end = "no", "no", False
    arguments.optim, arguments.learning_rate, arguments.max_grad_norm = "sgd", 1e-3, 1e9
    model, tokenizer = tiny_model(), make_tokenizer()
    details = train(model, rare, tokenizer, arguments, directory, rare.features(tokenizer)["train"])
    return details, torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).numpy()


def in_processes(csv, count, directory):
    training = TrainingArguments(output_dir=str(directory), disable_tqdm=True, use_cpu=True)
    details, weights = trained(skewed(Path(csv)), training, 8 // count, 1, Path(directory))
    return [line["loss"] for line in details["losses"]], weights


def test_accumulating_gradients_changes_nothing(rare, training, tmp_path):
    whole, whole_weights = trained(rare, training, 8, 1, tmp_path / "whole")
    parts, parts_weights = trained(rare, training, 2, 4, tmp_path / "parts")
    start = torch.cat([parameter.detach().reshape(-1) for parameter in tiny_model().parameters()]).numpy()
    moved = np.linalg.norm(whole_weights - start)
    assert moved > 1e-4
    assert np.linalg.norm(whole_weights - parts_weights) / moved < 1e-3
    losses = [[line["loss"] for line in details["losses"]] for details in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert whole["class_weights"] == rare.loss_details["class_weights"]


def test_two_processes_train_as_one(tmp_path):
    csv = tmp_path / "rare.csv"
    skewed(csv)
    found = {
        count: values(run_processes(count, tmp_path / str(count), in_processes, str(csv), count, tmp_path / "out"))
        for count in (1, 2)
    }
    assert found[2][0][0] == pytest.approx(found[1][0][0], abs=1e-4)
    np.testing.assert_allclose(found[2][0][1], found[1][0][1], atol=1e-5)


def test_importance_is_of_the_weighted_loss(rare, teacher):
    tokenizer = make_tokenizer()
    rows = rare.features(tokenizer)["train"].select(range(6))
    model = tiny_model().eval()
    loss = training_loss(model, tokenizer, rare, DistillConfig().labels_only(), None)([rows[i] for i in range(6)])
    batch = rare.collate(tokenizer)([rows[i] for i in range(6)])
    labels = batch.pop("labels").numpy()
    counts = np.bincount(rare.splits["train"]["label"])
    expected = numpy_loss(model(**batch).logits.detach().numpy().astype(float), labels, counts)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_models_are_chosen_by_balanced_accuracy(rare, tmp_path):
    assert (rare.primary_metric, TextClassification.primary_metric) == ("balanced_accuracy", "accuracy")
    references = np.array([0, 1, 1, 1, 2, 2])
    logits = np.eye(3)[[0, 1, 1, 2, 2, 0]]
    scores = rare.scores(logits, references)
    expected = balanced_accuracy_score(references, logits.argmax(axis=-1))
    assert scores["balanced_accuracy"] == pytest.approx(expected)
    weights = 1 / np.bincount(references)[references]
    correct = (logits.argmax(axis=-1) == references).astype(float)
    assert weighted_accuracy(correct, weights) == pytest.approx(expected)


def test_weights_redo_a_stage_and_their_absence_does_not(rare, tmp_path):
    plain = TextClassification(rare.config)
    assert describe(rare) == describe(plain) | {"class_weights": "balanced"}
    assert plain.class_weights is None
    assert plain.loss_details == {}
    assert ImageClassification(DataConfig(), label=LabelConfig("balanced")).primary_metric == "balanced_accuracy"
