"""What one would try before a transformer: chosen on validation, fitted on any data, again only where the data changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import FunctionTransformer

from conftest import make_texts, write_csv
from pipelines.core.config import DataConfig, LabelConfig
from pipelines.core.run import Run
from pipelines.onnx.measure import Subject, estimator_workload, measure
from pipelines.tasks import baselines
from pipelines.tasks.text_classification import TextClassification
from pipelines.tasks.text_regression import TextRegression
from pipelines.training import baselines as stages
from pipelines.training.baselines import fit_baseline, load_baseline


def fit(task: Any, name: str, directory: Path) -> tuple[Any, Any]:
    directory.mkdir()
    return fit_baseline(None, directory, task, name), load_baseline(directory)


def accuracy(task: Any, estimator: Any, split: str) -> float:
    examples = task.splits[split]
    predicted = task.baseline_predictions(estimator, task.baseline_inputs(examples))
    assert np.isfinite(predicted).all()
    return float(np.mean(predicted.argmax(axis=1) == np.asarray(examples["label"])))


def test_words_tell_the_classes_of_texts_and_a_majority_does_not(task, tmp_path):
    outcome, estimator = fit(task, "tfidf_logistic_regression", tmp_path / "words")
    assert outcome.format == "sklearn"
    assert outcome.metrics["validation"]["accuracy"] == accuracy(task, estimator, "validation") > 0.9
    # The same as written without us, with the strength that was chosen.
    train, test = task.splits["train"], task.splits["test"]
    features = TfidfVectorizer(sublinear_tf=True)
    strength = estimator[-1].C
    other = LogisticRegression(C=strength, max_iter=300).fit(features.fit_transform(train["text"]), train["label"])
    assert len(estimator[0].get_feature_names_out()) == len(features.vocabulary_)
    np.testing.assert_allclose(
        task.baseline_predictions(estimator, test["text"]),
        np.log(other.predict_proba(features.transform(test["text"]))),
        atol=1e-3,
    )
    majority, constant = fit(task, "majority_class", tmp_path / "majority")
    counts = np.bincount(train["label"])
    assert majority.metrics["validation"]["accuracy"] == np.mean(
        np.asarray(task.splits["validation"]["label"]) == counts.argmax()
    )
    np.testing.assert_allclose(
        np.exp(task.baseline_predictions(constant, ["a", "b"])), np.tile(counts / counts.sum(), (2, 1))
    )


def test_pixels_tell_the_classes_of_images(image_task, tmp_path):
    inputs = image_task.baseline_inputs(image_task.splits["train"])
    assert inputs.shape[1] == 8 * 8 * 3
    assert (inputs.dtype, inputs.min() >= 0, 0.5 < inputs.max() <= 1) == (np.float32, True, True)
    for name in ("nearest_neighbours", "pixel_logistic_regression"):
        outcome, estimator = fit(image_task, name, tmp_path / name)
        assert accuracy(image_task, estimator, "test") > 0.9
        assert outcome.parameters is None


def test_the_best_on_validation_is_kept_and_of_equals_the_first(task, tmp_path):
    """Not the best on the training split, on which one neighbour is always right."""

    class Right(DummyClassifier):
        def predict_proba(self, inputs: Any) -> np.ndarray:
            return np.eye(3)[np.asarray(task.splits["validation"]["label"])]

    def candidates(texts: list[str], labels: np.ndarray) -> Any:
        features = TfidfVectorizer(max_features=5)
        yield features, [KNeighborsClassifier(1), DummyClassifier(random_state=1)]
        yield FunctionTransformer(), [Right(random_state=2), Right(random_state=3)]

    data = {split: (task.splits[split]["text"][:], np.asarray(task.splits[split]["label"])) for split in task.splits}
    found = stages._choose(candidates, data, task)
    assert found is not None
    estimator, metrics = found
    assert (metrics["accuracy"], estimator[-1].random_state) == (1, 2)


def test_every_class_weighs_the_same_where_that_is_asked_for(csv_file):
    label = LabelConfig(class_weights="balanced")
    balanced = TextClassification(DataConfig(dataset=str(csv_file)), label).baselines["tfidf_logistic_regression"]
    plain = TextClassification(DataConfig(dataset=str(csv_file))).baselines["tfidf_logistic_regression"]
    for candidates, weights in ((balanced, "balanced"), (plain, None)):
        choices = list(candidates(["a text", "another"], np.array([0, 1])))
        assert {one.class_weight for _, estimators in choices for one in estimators} == {weights}
        assert len(choices) == 2


def test_hardly_any_data_is_enough(tmp_path):
    """A class with one example, a class that only the test split has, one class in validation, fewer examples than neighbours."""
    rows = {
        "train": [("a b", "x"), ("c d", "x"), ("e f", "y")],
        "validation": [("c b", "x")],
        "test": [("q", "z"), ("a", "x")],
    }
    for name, texts in rows.items():
        write_csv(tmp_path / f"{name}.csv", texts)
    splits = {
        name: [{"text": text, "label": "xyz".index(label)} for text, label in texts] for name, texts in rows.items()
    }
    task = TextClassification(DataConfig(dataset=str(tmp_path)))
    from datasets import Dataset

    data = {name: Dataset.from_list(split) for name, split in splits.items()}
    task.data = SimpleNamespace(splits=data, label_names=["x", "y", "z"])
    for name in task.baselines:
        _, estimator = fit(task, name, tmp_path / name)
        predicted = task.baseline_predictions(estimator, ["a b", "?"])
        assert predicted.shape == (2, 3)
        assert np.isfinite(predicted).all()
    (_, neighbours) = next(baselines.nearest_neighbours(np.zeros((3, 2)), np.zeros(3)))
    assert [one.n_neighbors for one in neighbours] == [1, 3]
    # One class alone: what fits any data takes the place of what does not.
    task.data.splits["train"] = data["train"].select(range(2))
    outcome, _ = fit(task, "tfidf_logistic_regression", tmp_path / "alone")
    assert "DummyClassifier" in outcome.details["estimator"]


def test_a_part_of_a_large_split_is_read_and_the_record_says_so(task, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "MOST_EXAMPLES", 60)
    monkeypatch.setattr(baselines, "MOST_CHARACTERS", 100)
    read = []
    monkeypatch.setattr(task, "baseline_inputs", lambda examples: read.append(len(examples)) or examples["text"][:])
    outcome, estimator = fit(task, "tfidf_logistic_regression", tmp_path / "part")
    sizes = {split: len(task.splits[split]) for split in ("train", "validation")}
    assert sizes["train"] > 60
    assert outcome.details["examples"] == {split: {"read": min(size, 60), "of": size} for split, size in sizes.items()}
    assert read == [min(size, 60) for size in sizes.values()]
    assert "char_wb" not in outcome.details["estimator"]
    # Few features where there are many classes.
    (features, _) = next(baselines.tfidf_logistic_regression(["a text"] * 1000, np.arange(1000), False))
    assert features.max_features == baselines.MOST_WEIGHTS / 1000


def test_scores_have_a_mean_and_a_ridge(tmp_path):
    rows = [(text, str({"sport": 1.0, "tech": 3.0, "trade": 8.0}[label])) for text, label in make_texts(120)]
    task = TextRegression(DataConfig(dataset=str(write_csv(tmp_path / "scores.csv", rows))))
    mean, constant = fit(task, "mean_score", tmp_path / "mean")
    assert mean.metrics["validation"]["pearson"] == 0
    np.testing.assert_allclose(task.baseline_predictions(constant, ["a", "b"]), np.mean(task.splits["train"]["label"]))
    ridge, _ = fit(task, "tfidf_ridge", tmp_path / "ridge")
    assert ridge.metrics["validation"]["pearson"] > 0.8


def test_a_baseline_is_fitted_again_where_the_data_changed_and_nowhere_else(csv_file, tmp_path, capsys):
    def run(**changes: Any) -> str:
        task = TextClassification(replace(DataConfig(dataset=str(csv_file), max_length=32), **changes))
        with Run(tmp_path / "run", task, seed=42) as opened:
            for name in task.baselines:
                opened.stage(name, fit_baseline, None, baseline=name)
        return capsys.readouterr().out

    first = run()
    assert first.count(": done in") == 2
    record = json.loads((tmp_path / "run" / "majority_class" / "record.json").read_text())
    assert record["made_by"]["source"] is None
    assert record["bytes"] == (tmp_path / "run" / "majority_class" / "model.joblib").stat().st_size
    files = record["files"]
    assert run().count("finished already") == 2  # whatever models the run has
    assert run(max_train_samples=30).count("redone, because task.data changed") == 2
    assert run().count("redone") == 2
    assert json.loads((tmp_path / "run" / "majority_class" / "record.json").read_text())["files"] == files


def test_an_estimator_is_timed_one_text_at_a_time_and_in_batches(task, tmp_path):
    _, estimator = fit(task, "tfidf_logistic_regression", tmp_path / "words")
    texts = task.baseline_inputs(task.splits["test"])
    workload = estimator_workload(texts)
    assert workload.feeds["single"]["inputs"].tolist() == [max(texts, key=len)]
    batches = [workload.feeds[f"batch_{index}"]["inputs"].tolist() for index in range(workload.settings["batches"])]
    assert sorted(text for batch in batches for text in batch) == sorted(texts)
    assert max(map(len, batches)) == 16
    result = measure(
        [Subject("words", tmp_path / "words" / "model.joblib", "sklearn", workload)], rounds=1, seconds=0.05
    )["words"]
    assert result["latency_ms"]["shape"] == [1]
    assert result["samples_per_second"] > 0
    # Without torch.
    assert 50e6 < result["peak_memory_bytes"] < 300e6
