"""The gates of quality: what a stage may lose, by a metric and by the recall of every class, and what becomes of a stage that lost more."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.cli import main
from pipelines.core.command import run_main
from pipelines.core.config import DataConfig, GateConfig, QuantizeConfig, Settings, settings_name
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.quality import HALF, check_stage, problem_of, quality_lost
from pipelines.core.records import with_checksum
from pipelines.core.task import StageResult
from pipelines.onnx.verify import verify_quality
from pipelines.tasks import TASKS, TaskConfig, make_task, task_class
from pipelines.tasks.classification import ClassifierPresentation, compare_classifiers
from pipelines.tasks.metrics import classification_metrics

CLASSIFICATION, REGRESSION = task_class("text-classification"), task_class("text-regression")
# A class of 30 among 300, which accuracy hardly sees.
MANY, RARE = np.zeros(270, int), np.ones(30, int)
REFERENCES = np.concatenate([MANY, RARE])


def scores(right_of_rare: int, rare: int = 30, right_of_many: int = 270) -> dict[str, Any]:
    """The metrics of a classifier that finds so many examples of each of two classes."""
    references = np.concatenate([MANY, np.ones(rare, int)])
    predictions = references.copy()
    predictions[right_of_many:270] = 1
    predictions[270 + right_of_rare :] = 0
    return classification_metrics(predictions, references, ["many", "rare"])


@pytest.mark.parametrize(
    ("before", "after", "greater_is_better", "expected"),
    [
        (0.90, 0.891, True, 0.01),
        (0.5, 0.55, True, -0.1),
        (20.0, 25.0, False, 0.2),
        (25.0, 20.0, False, -0.25),
        (0.0, 0.0, True, 0.0),
        (0.0, 0.3, True, -0.3),
        (-0.2, -0.3, True, 0.5),  # a correlation
        (0.4, 0.0, False, -0.4),
        (float("nan"), 0.4, True, float("nan")),
    ],
)
def test_a_loss_is_the_share_of_the_metric(before, after, greater_is_better, expected):
    assert quality_lost(before, after, greater_is_better) == pytest.approx(expected, nan_ok=True)


def test_a_class_that_falls_to_half_is_named_whatever_accuracy_says():
    before, after = scores(27), scores(9)
    assert after["accuracy"] > 0.92
    problem = problem_of(before, after, CLASSIFICATION, GateConfig(max_quality_drop=0.1))
    assert problem is not None
    assert "'rare' 0.900 before and 0.300 after (30 examples)" in problem
    assert "'many'" not in problem
    # Where the metric falls, too, both are said.
    problem = problem_of(before, after, CLASSIFICATION, GateConfig())
    assert problem is not None
    assert "accuracy 0.9900 before and 0.9300 after" in problem
    assert "'rare' 0.900 before" in problem
    # The same of a trained model, and at half exactly; a bit more than half is kept.
    assert problem_of(before, after, CLASSIFICATION, GateConfig(), least=HALF)
    assert problem_of(scores(20), scores(10), CLASSIFICATION, GateConfig(), least=HALF)
    assert problem_of(scores(20), scores(11), CLASSIFICATION, GateConfig(), least=HALF) is None
    # Whoever allows more allows it of classes, too.
    assert problem_of(before, after, CLASSIFICATION, GateConfig(max_quality_drop=0.7)) is None
    assert problem_of(before, scores(0), CLASSIFICATION, GateConfig(max_quality_drop=0.7))
    assert problem_of(before, scores(0), CLASSIFICATION, GateConfig(max_quality_drop=1)) is None


@pytest.mark.parametrize(
    ("rare", "before", "after", "broken"),
    [(2, 1, 0, False), (3, 2, 1, False), (4, 4, 3, False), (2, 2, 0, True), (8, 7, 3, True), (300, 6, 0, True)],
)
def test_a_single_example_of_a_class_says_nothing(rare, before, after, broken):
    allowed = GateConfig(max_quality_drop=0.1)
    problem = problem_of(scores(before, rare), scores(after, rare), CLASSIFICATION, allowed)
    assert (problem is not None) == broken


def test_many_broken_classes_are_one_short_message():
    names = [f"class {index}" for index in range(20)]
    references = np.repeat(np.arange(20), 10)
    before, after = (classification_metrics(found, references, names) for found in (references, references * 0))
    problem = problem_of(before, after, CLASSIFICATION, GateConfig(max_quality_drop=0.96))
    assert problem is not None
    assert problem.count("before") == 5
    assert problem.endswith("and of 14 more")


def test_another_metric_can_be_the_gate():
    before, after = scores(15), scores(13)
    assert problem_of(before, after, CLASSIFICATION, GateConfig()) is None
    problem = problem_of(before, after, CLASSIFICATION, GateConfig(gate="macro_f1"))
    assert problem is not None
    assert problem.startswith("macro_f1 ")
    # A regression whose scores keep their order and lose their unit.
    before = {"pearson": 0.9, "spearman": 0.9, "root_mean_squared_error": 0.4}
    after = {"pearson": 0.9, "spearman": 0.9, "root_mean_squared_error": 4.0}
    assert problem_of(before, after, REGRESSION, GateConfig()) is None
    assert problem_of(before, after, REGRESSION, GateConfig(gate="root_mean_squared_error"), least=HALF)
    found = verify_quality(before, before | {"spearman": 0.8991}, REGRESSION, GateConfig(gate="spearman"), "int8")
    assert found["metric"] == "spearman"
    assert found["quality_lost"] == pytest.approx(0.001)


def test_vectors_that_are_far_from_the_fp32_ones_are_refused_whatever_they_find():
    task, before = task_class("sentence-embedding"), {"overlap_at_10": 0.9}
    near, far = (before | {"cosine_to_fp32": cosine} for cosine in (0.99, 0.5))
    assert problem_of(before, near, task, GateConfig()) is None
    assert "cosine_to_fp32 0.5000" in (problem_of(before, far, task, GateConfig()) or "")
    assert problem_of(before, far, task, GateConfig(max_quality_drop=1)) is None
    exact = np.array([[3.0, 4.0], [0.0, 2.0]])
    assert task.nearness(task, np.array([[4.0, 3.0], [0.0, 1.0]]), exact)["cosine_to_fp32"] == pytest.approx(0.98)


def test_a_trained_model_may_lose_up_to_half_and_a_number_may_not_be_missing():
    task = task_class("text-generation")
    assert problem_of({"perplexity": 20.0}, {"perplexity": 39.0}, task, GateConfig(), least=HALF) is None
    assert problem_of({"perplexity": 20.0}, {"perplexity": 41.0}, task, GateConfig(), least=HALF)
    assert problem_of({"perplexity": 20.0}, {"perplexity": 20.5}, task, GateConfig())
    assert problem_of({"perplexity": 20.0}, {"perplexity": None}, task, GateConfig(max_quality_drop=1))
    # 1 is whatever is lost, and a correlation below 0 is more than all of it.
    lost = {"pearson": 0.1}, {"pearson": -0.2}
    assert problem_of(*lost, REGRESSION, GateConfig(max_quality_drop=0.9), least=HALF)
    assert problem_of(*lost, REGRESSION, GateConfig(max_quality_drop=1), least=HALF) is None


@pytest.mark.parametrize("name", TASKS)
def test_an_unknown_gate_is_refused_with_the_list_before_the_data_is_read(name):
    kind = task_class(name)
    assert kind.metrics[kind.primary_metric] == kind.greater_is_better
    own = {settings_name(one): one() for one in kind.settings}
    settings = Settings(**own | {"task": TaskConfig(name), "data": DataConfig(dataset="no/such/file.csv")})
    for one in (GateConfig("acuracy"), QuantizeConfig(gate="acuracy")):
        settings.gate = one
        with pytest.raises(InputError, match=f"expected --gate out of {', '.join(kind.metrics)}, found 'acuracy'"):
            make_task(settings)
    settings.gate = GateConfig(list(kind.metrics)[-1])
    make_task(settings)


def test_metrics_that_can_be_named_are_among_the_scores(task, language_task):
    assert CLASSIFICATION.metrics.keys() <= scores(3).keys()
    assert REGRESSION.metrics.keys() <= REGRESSION.scores(None, np.arange(4.0), np.arange(4.0)).keys()
    predictions, references = np.zeros((2, 4, 2)), np.ones((2, 4), int)
    assert language_task.metrics.keys() <= language_task.scores(predictions, references).keys()


def write_stage(directory: Path, function: str, source: str, before: dict[str, Any], after: dict[str, Any]) -> Path:
    made_by = {"function": f"pipelines.training.{function}", "source": source}
    details = {"source_metrics": before}
    record = {"made_by": made_by, "metrics": {"validation": after}, "details": details, "files": {}}
    directory.mkdir()
    (directory / "record.json").write_text(json.dumps(with_checksum(record)))
    return directory


def test_a_stage_is_compared_with_its_source_and_with_the_teacher(tmp_path):
    gate = GateConfig()
    student = write_stage(tmp_path / "student", "distill.distill_student", "teacher", scores(27), scores(16))
    check_stage(student, CLASSIFICATION, gate, teacher=scores(27))
    # Little more than half twice is a quarter.
    pruned = write_stage(tmp_path / "pruned", "prune.prune_and_recover", "student", scores(16), scores(9))
    check_stage(pruned, CLASSIFICATION, gate)
    with pytest.raises(
        VerificationError, match=r"pruned to keep.* what teacher has.*'rare'.*prune less.*class_weights"
    ):
        check_stage(pruned, CLASSIFICATION, gate, teacher=scores(27))
    check_stage(pruned, CLASSIFICATION, GateConfig(max_quality_drop=1), teacher=scores(27))


def test_the_report_names_the_class_that_each_stage_took_most_from():
    logits = np.eye(2)[REFERENCES]
    stages = [StageResult("teacher", "transformers", logits, {"details": {}}, {})]
    for name, source, before, after in (("student", "teacher", 27, 16), ("quantized", "student", 16, 17)):
        made = {"made_by": {"source": source}, "details": {"source_metrics": scores(before)}}
        record = made | {"metrics": {"validation": scores(after)}}
        stages.append(StageResult(name, "transformers", logits, record, {}))
    compared = compare_classifiers(stages, REFERENCES, ["a text"] * 300, ["many", "rare"], "quantized")
    assert [(one["stage"], one["class"]) for one in compared.report["lost_most"]] == [
        ("student", "rare"),
        ("quantized", "many"),
    ]
    report = compared.report | {"stages": [{"name": name, **stage} for name, stage in compared.stages.items()]}
    text = ClassifierPresentation().what_was_lost(report, report["stages"][-1], 5)
    assert "| student | rare | 30 | 0.900 | 0.533 |" in text
    assert "| quantized |" not in text  # which lost nothing


def test_a_broken_student_is_named_and_kept(trained_teacher, pretrained, csv_file, tmp_path, monkeypatch, capsys):
    flags = f"--teacher_model {trained_teacher} --dataset {csv_file} --max_length 32 --validation_size 0.2 --use_cpu".split()
    # Of random weights, and hardly trained: it predicts one label or so.
    flags += f"--student_model {pretrained} --student_from_scratch --soft_targets online --num_train_epochs 0.1".split()
    flags += ["--output_dir", str(tmp_path / "student")]

    def distill(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pocketformers", "distill", *flags, *more])
        try:
            run_main(main)
        except SystemExit as exit_:
            return int(exit_.code or 0), "".join(capsys.readouterr())
        return 0, "".join(capsys.readouterr())

    status, said = distill()
    assert status == 0, said
    assert "student: done" in said
    assert f"warning: expected {tmp_path / 'student'} to keep" in said
    assert "--max_quality_drop 1" in said
    record = json.loads((tmp_path / "student" / "record.json").read_text())
    before, after = record["details"]["source_metrics"], record["metrics"]["validation"]
    assert before["accuracy"] > 0.8 > after["accuracy"]
    assert before["recall_per_class"].keys() == after["recall_per_class"].keys()
    for more, warned in (([], True), (["--max_quality_drop", "1"], False)):
        status, said = distill(*more)
        assert status == 0, said
        assert "student: finished already" in said
        assert ("warning: " in said) == warned
