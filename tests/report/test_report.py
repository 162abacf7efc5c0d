"""The report: its figures against figures worked out by hand, its pages against the tools that will read them."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from onnx import TensorProto, helper, numpy_helper

from pipelines.cli import main
from pipelines.core.config import DataConfig, ReportConfig
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.records import Outcome
from pipelines.core.run import Run
from pipelines.core.task import StageResult
from pipelines.report.bootstrap import MINIMUM_UNITS, paired_bootstrap
from pipelines.report.card import format_model_card
from pipelines.report.pages import conclusion, format_markdown, format_summary
from pipelines.report.plot import draw_report
from pipelines.report.report import build_report, describe_environment, read_report, shipped_stage, write_report
from pipelines.report.results import report_run
from pipelines.tasks.classification import compare_classifiers
from pipelines.tasks.text_classification import TextClassification, TextClassifierPresentation

LABELS = ["bad", "good"]
# Ten test examples; the models below predict LABELS[answer] with a confidence that grows with the margin.
REFERENCES = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
TEACHER = np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, 0])
STUDENT = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0, 0])
SHIPPED = np.array([0, 0, 1, 1, 1, 1, 1, 0, 0, 1])
HOSTILE = "one | two\n<script>alert(1)</script> *a* _b_ `c` [d](http://e.f) $g$ ~~h~~ \\ & ![i](j) \x07" + " word" * 100
CONTRACT = {
    "name",
    "path",
    "format",
    "metrics",
    "quality_retained",
    "agreement",
    "parameters",
    "bytes",
    "latency_ms",
    "samples_per_second",
    "peak_memory_bytes",
    "seconds",
}
WORDS = TextClassifierPresentation()


def logits_of(answers: np.ndarray, margins: np.ndarray | float = 2.0) -> np.ndarray:
    signed = np.where(answers == 1, margins, -np.asarray(margins))
    return np.stack([np.zeros(len(answers)), signed], axis=1).astype(np.float32)


def make_stage(
    name: str, form: str, logits: np.ndarray, size: int, p50s: list[float], details: dict[str, Any] | None = None
) -> StageResult:
    record = {"parameters": size // 4, "bytes": size, "seconds": 1.5, "made_by": {}, "details": details or {}}
    middle = float(np.median(p50s))
    timing = {
        "latency_ms": {"p50": middle, "p95": 2 * middle, "batch_size": 1, "shape": [1, 16]},
        "samples_per_second": 1000 / middle,
        "peak_memory_bytes": 50_000_000,
        "threads": 2,
        "rounds": [{"p50": p50} for p50 in p50s],
    }
    return StageResult(name, form, logits, record, timing)


def make_stages() -> list[StageResult]:
    margins = np.array([2.0, 2.0, 1.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    return [
        make_stage("teacher", "transformers", logits_of(TEACHER), 8_000_000, [40.0, 44.0, 80.0]),
        make_stage("teacher_onnx", "onnx", logits_of(TEACHER), 8_000_000, [30.0, 33.0, 60.0]),
        make_stage("student", "transformers", logits_of(STUDENT), 4_000_000, [20.0, 22.0, 40.0]),
        make_stage("student_labels_only", "transformers", logits_of(STUDENT), 4_000_000, [20.0, 22.0, 40.0]),
        make_stage("pruned", "transformers", logits_of(STUDENT), 3_000_000, [16.0, 17.6, 32.0]),
        make_stage("quantized", "onnx", logits_of(SHIPPED, margins), 1_000_000, [10.0, 10.0, 16.0]),
    ]


def make_report(
    stages: list[StageResult] | None = None,
    references: np.ndarray = REFERENCES,
    texts: list[str] | None = None,
    repeated: int = 1,
    **changes: Any,
) -> dict[str, Any]:
    """The report of the stages on the ten examples, each of which may stand there several times."""
    stages = make_stages() if stages is None else stages
    for stage in stages:
        stage.predictions = np.tile(stage.predictions, (repeated, 1))
    texts = [HOSTILE, "b", HOSTILE, "d", "e", "f", "g", "h", "i", "j"] * repeated if texts is None else texts
    details = {"examples": {"train": np.int64(90), "test": 10}, "share": float("nan"), "file": "/a/b/c.csv"}
    task: Any = SimpleNamespace(
        name="text-classification", primary_metric="accuracy", greater_is_better=True, details=details
    )
    shipped = shipped_stage(stages).name
    compared = compare_classifiers(stages, np.tile(references, repeated), texts, LABELS, shipped)
    settings: dict[str, Any] = {
        "recipe": "distill_bert",
        "environment": describe_environment(seed=3),
        "config": {"teacher_model": "google-bert/bert-base-uncased", "dataset": "/home/somebody/reviews.csv"},
    }
    return build_report("runs/reviews", task, stages, compared, **(settings | changes))


def test_report_has_the_figures_worked_out_by_hand() -> None:
    report = make_report()
    stages = {stage["name"]: stage for stage in report["stages"]}

    assert list(stages) == [stage.name for stage in make_stages()]
    assert all(stage.keys() >= CONTRACT for stage in stages.values())
    assert report.keys() >= {"recipe", "task", "primary_metric", "environment", "stages", "data", "broken_examples"}
    teacher, quantized = stages["teacher"], stages["quantized"]
    # The teacher is wrong on 8 and 9, the shipped model on 2, 3, 7 and 8.
    assert teacher["metrics"]["accuracy"] == pytest.approx(0.8)
    assert quantized["metrics"]["accuracy"] == pytest.approx(0.6)
    assert quantized["quality_retained"] == pytest.approx(0.6 / 0.8)
    assert quantized["agreement"] == pytest.approx(0.6)
    assert stages["teacher_onnx"]["agreement"] == teacher["quality_retained"] == 1
    assert quantized["recall_change_per_class"] == pytest.approx({"bad": -0.5, "good": 0.0})
    assert quantized["ratios"]["smaller_than_teacher"] == 8
    # The third round, on a machine twice as slow, changes the times and hardly the ratios.
    assert quantized["ratios"]["faster_than_teacher"] == pytest.approx({"median": 4.4, "low": 4.0, "high": 5.0})
    assert quantized["ratios"]["faster_than_teacher_onnx"]["median"] == pytest.approx(3.3)
    assert quantized["delta"] == pytest.approx({"value": -0.2, "low": None, "high": None})
    assert report["shipped"] == "quantized"


def test_intervals_need_enough_examples() -> None:
    report = make_report(repeated=MINIMUM_UNITS // 10)
    teacher, *_, quantized = report["stages"]
    assert teacher["delta"] == {"value": 0, "low": 0, "high": 0}
    assert quantized["delta"]["value"] == pytest.approx(-0.2)
    assert quantized["delta"]["low"] < -0.2 < quantized["delta"]["high"]
    few = make_report()
    assert "too few test examples to tell" in format_summary(few, WORDS)
    for page in (format_markdown(few, WORDS), format_model_card(few, WORDS)):
        assert "| -0.200 |" in page
        assert "-0.200 (" not in page


def test_the_student_is_compared_with_the_one_without_a_teacher() -> None:
    # The student is right on 7 of 10 examples, the one without a teacher on 5.
    stages = make_stages()
    stages[3].predictions = logits_of(1 - STUDENT)
    stages[3].predictions[:2] *= -1
    report = make_report(stages, repeated=20)
    delta = report["delta_to_labels_only"]
    assert delta["value"] == pytest.approx(0.7 - 0.5)
    assert 0 < delta["low"] < 0.2 < delta["high"]
    sentence = "trained on labels only, the student's accuracy differs by +0.200 (95 % interval "
    assert sentence in format_summary(report, WORDS)
    assert format_summary(report, WORDS).endswith("a measurable gain.")
    assert "a measurable loss" in format_summary(report, WORDS)
    # Two students that predict alike, and one without another.
    alike = format_summary(make_report(repeated=2), WORDS)
    assert alike.endswith("(95 % interval +0.000 to +0.000): no measurable difference.")
    alone = [stage for stage in make_stages() if stage.name != "student_labels_only"]
    assert make_report(alone)["delta_to_labels_only"] is None


def with_rival(
    answers: np.ndarray, size: int, p50s: list[float], name: str = "tfidf", form: str = "sklearn", **changes: Any
) -> dict[str, Any]:
    """The report of the stages and one more, each of the ten examples twenty times."""
    stages = [*make_stages(), make_stage(name, form, logits_of(answers), size, p50s)]
    stages[-1].record |= {"parameters": None}
    return make_report(stages, repeated=20, **changes)


def first_sentence(report: dict[str, Any]) -> str:
    (line,) = [line for line in format_markdown(report, WORDS).splitlines() if "The shipped model (quantized)" in line]
    for page in pages_of(report):
        assert line in page.replace("\\_", "_")
    return line.partition("The shipped model (quantized)")[0].strip()


def test_what_is_as_good_and_cheaper_comes_first() -> None:
    # The shipped model is right on 6 of 10: here 7 are, with one of ten lost and two won.
    better = SHIPPED.copy()
    better[[2, 3, 4]] = [0, 0, 0]
    report = with_rival(better, 250_000, [1.0, 1.0, 2.0])
    assert report["shipped"] == "quantized"
    row = report["stages"][-1]
    # The normal approximation, since only the examples that the two differ on count (McNemar's setting).
    error = np.sqrt((0.1 + 0.2) - 0.1**2) / np.sqrt(200)
    delta = row["delta_to_shipped"]
    assert delta["value"] == pytest.approx(0.1)
    assert delta["low"] == pytest.approx(0.1 - 1.96 * error, abs=0.015)
    assert delta["high"] == pytest.approx(0.1 + 1.96 * error, abs=0.015)
    assert row["ratios"]["faster_than_shipped"] == {"median": 10, "low": 8, "high": 10}
    assert all(stage["delta_to_shipped"] is None for stage in report["stages"][:-1])
    assert first_sentence(report) == (
        "You may not need a transformer here: the accuracy of tfidf is 0.700, the shipped model's 0.600, a delta of +0.100 (95 % interval "
        f"{delta['low']:+.3f} to {delta['high']:+.3f}): a measurable gain; it has 0.2 MB against 1.0 MB, and takes 1.0 ms against 10.0 ms for one example."
    )
    assert "| tfidf | 0.700 |" in format_markdown(report, WORDS)


def test_nothing_is_said_of_what_is_worse_or_costs_more() -> None:
    worse = SHIPPED.copy()
    worse[[0, 1]] = 1
    assert first_sentence(with_rival(worse, 1_000, [0.1, 0.1, 0.1])) == ""
    assert first_sentence(with_rival(SHIPPED, 2_000_000, [20.0, 20.0, 20.0])) == ""
    # Larger, but faster in every round; and where the rounds do not agree, or others were at work, nothing is.
    faster = with_rival(SHIPPED, 2_000_000, [5.0, 5.0, 8.0])
    assert first_sentence(faster).startswith("You may not need a transformer here: the accuracy of tfidf is 0.600")
    assert "no measurable difference; it has 2.0 MB against 1.0 MB" in first_sentence(faster)
    assert first_sentence(with_rival(SHIPPED, 2_000_000, [1.0, 5.0, 8.0])) == ""
    assert not format_summary(faster | {"busy": True}, WORDS).split("\n\n")[1].startswith("You may")
    # Too few examples for an interval, and reports of earlier versions.
    few = make_report([*make_stages(), make_stage("tfidf", "sklearn", logits_of(SHIPPED), 1_000, [0.1, 0.1, 0.1])])
    assert "You may not need" not in format_summary(few, WORDS)
    for stage in faster["stages"]:
        del stage["delta_to_shipped"], stage["constant"], stage["ratios"]["faster_than_shipped"]
    assert first_sentence(faster) == ""
    assert draw_report(faster, WORDS)


def test_less_is_better_where_the_metric_says_so() -> None:
    report = with_rival(SHIPPED, 1_000, [0.1, 0.1, 0.1]) | {"greater_is_better": False}
    report["stages"][-1]["delta_to_shipped"] = {"value": 0.2, "low": 0.1, "high": 0.3}
    assert first_sentence(report) == ""
    report["stages"][-1]["delta_to_shipped"] = {"value": -0.2, "low": -0.3, "high": -0.1}
    assert "a measurable gain" in first_sentence(report)


def test_the_quantized_teacher_may_make_a_student_needless() -> None:
    small = with_rival(SHIPPED, 900_000, [20.0, 20.0, 20.0], "teacher_quantized", "onnx")
    assert small["shipped"] == "quantized"
    assert first_sentence(small).startswith("You may not need a student here: the accuracy of teacher_quantized is")
    assert first_sentence(with_rival(SHIPPED, 3_000_000, [20.0, 20.0, 20.0], "teacher_quantized", "onnx")) == ""


def test_the_same_prediction_for_everything_is_no_recommendation() -> None:
    # Right on 6 of 10 as the shipped model is: what was trained learned nothing.
    tie = with_rival(np.ones(10, int), 1_000, [0.01, 0.01, 0.03], "majority_class")
    assert tie["stages"][-1]["constant"]
    said = first_sentence(tie)
    assert said.startswith(
        "The shipped model is no better than the same prediction for every example: the accuracy of majority_class"
    )
    assert "0.001 MB against 1.0 MB, and takes 0.01 ms against 10.0 ms" in said
    assert tie["busy"] is False
    # Wide intervals of few examples include zero, but the score is below.
    stages = [*make_stages(), make_stage("majority_class", "sklearn", logits_of(np.ones(10, int)), 1_000, [0.1] * 3)]
    stages[5].predictions = logits_of(np.where(np.arange(10) < 3, 0, 1))
    report = make_report(stages, repeated=2)
    assert report["stages"][-1]["delta_to_shipped"]["high"] >= -0.2
    assert first_sentence(report) == ""
    # It would press all others of the plot together.
    assert "majority_class" not in [text.get_text() for text in draw_report(report, WORDS).legends[0].get_texts()]


def test_what_was_not_timed_is_not_invented() -> None:
    stages = make_stages()
    del stages[-1].timing["latency_ms"]["p95"]
    row = next(
        line for line in format_markdown(make_report(stages), WORDS).splitlines() if line.startswith("| quantized")
    )
    assert "| 10.0 | n/a |" in row


def test_broken_examples_are_the_teachers_alone_most_confident_first() -> None:
    broken = make_report()["broken_examples"]
    # 2, 3 and 7 were right and are wrong; 9 was wrong and is right; 8 is wrong in both.
    assert (broken["total"], broken["repaired_total"]) == (3, 1)
    assert [example["index"] for example in broken["examples"]] == [3, 7, 2]
    first, last = broken["examples"][0], broken["examples"][-1]
    assert (first["reference"], first["shipped_prediction"]) == ("bad", "good")
    assert first["shipped_probability"] == pytest.approx(1 / (1 + np.exp(-3)))
    assert first["teacher_probability"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert len(last["text"]) == 200


def test_at_most_fifty_broken_examples_are_listed_and_all_are_counted() -> None:
    references, wrong = np.arange(160) % 2, 1 - np.arange(160) % 2
    wrong[120:] = references[120:]
    stages = [
        make_stage("teacher", "transformers", logits_of(references), 8, [2.0]),
        make_stage("onnx", "onnx", logits_of(wrong), 8, [1.0]),
    ]
    broken = make_report(stages, references, ["a"] * 160)["broken_examples"]
    assert broken["total"] == 120
    assert len(broken["examples"]) == 50


def test_the_shipped_stage_is_never_a_baseline() -> None:
    stages = sorted(make_stages(), key=lambda stage: stage.name == "student_labels_only")
    assert stages[-1].name == "student_labels_only"
    assert make_report(stages)["shipped"] == "quantized"
    only_teacher = make_report(stages[:1])
    assert only_teacher["broken_examples"]["total"] == 0
    assert "Nothing was compressed" in format_markdown(only_teacher, WORDS)
    quantized = make_stage("teacher_quantized", "onnx", logits_of(TEACHER), 2_000_000, [10.0, 11.0, 20.0])
    report = make_report([*make_stages()[:2], quantized], repeated=10)
    assert report["shipped"] == "teacher_quantized"
    assert conclusion(report, WORDS).startswith(
        "The shipped model (teacher_quantized) is 4.0 times smaller and 4.0 times"
    )


def mean(values: np.ndarray) -> np.ndarray:
    return np.mean(values, axis=-1)


def test_bootstrap_agrees_with_every_possible_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.report.bootstrap.MINIMUM_UNITS", 5)
    monkeypatch.setattr("pipelines.report.bootstrap.RESAMPLES", 20_000)
    teacher, student = np.array([1.0, 1, 1, 1, 0]), np.array([1.0, 0, 1, 0, 1])
    every = [np.mean((student - teacher)[list(drawn)]) for drawn in itertools.product(range(5), repeat=5)]
    exact = np.percentile(every, [2.5, 97.5])
    sampled = paired_bootstrap(mean, (student,), (teacher,))
    assert sampled == pytest.approx({"value": -0.2, "low": exact[0], "high": exact[1]})


def test_bootstrap_agrees_with_the_normal_approximation() -> None:
    # McNemar's setting: only the examples on which the two differ count, 40 lost and 16 won of 1000.
    teacher, student = np.ones(1000), np.ones(1000)
    student[:40] = 0
    teacher[40:56] = 0
    interval = paired_bootstrap(mean, (student,), (teacher,))
    error = np.sqrt((40 + 16) / 1000 - (24 / 1000) ** 2) / np.sqrt(1000)
    assert interval["value"] == pytest.approx(-0.024)
    assert interval["low"] == pytest.approx(-0.024 - 1.96 * error, abs=0.0015)
    assert interval["high"] == pytest.approx(-0.024 + 1.96 * error, abs=0.0015)
    # Seeded; and pairing matters: two models that err alike have no interval, however many their errors.
    assert paired_bootstrap(mean, (student,), (teacher,)) == interval
    assert paired_bootstrap(mean, (student,), (student,)) == {"value": 0, "low": 0, "high": 0}


def test_bootstrap_takes_any_metric_of_several_arrays() -> None:
    def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.sum(x * y, axis=-1) / np.sum(x * x, axis=-1)

    x = np.linspace(1, 2, MINIMUM_UNITS)
    noise = np.random.default_rng(0).normal(0, 0.1, MINIMUM_UNITS)
    interval = paired_bootstrap(slope, (x, 3 * x + noise), (x, x))
    assert interval["value"] == pytest.approx(2 + slope(x, noise))
    assert interval["low"] < interval["value"] < interval["high"]


def test_pieces_that_do_not_fit_are_refused() -> None:
    stages = make_stages()
    with pytest.raises(InputError, match="the teacher that the others are compared with"):
        make_report(stages[1:])
    stages[2].predictions = stages[2].predictions[:-1]
    with pytest.raises(InputError, match=r"\(10, 2\).* from student, found \(9, 2\)"):
        make_report(stages)
    stages = make_stages()
    stages[5].predictions[4, 0] = np.nan
    with pytest.raises(VerificationError, match="from quantized, found NaN or infinity in 1 of 10"):
        make_report(stages)


def test_files_are_whole_strict_and_private(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in report.json")

    report = make_report()
    write_report(tmp_path, report, WORDS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "report.json", "report.md", "report.png"]
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    written = json.loads(text, parse_constant=refuse)
    assert {key: written[key] for key in report} == report
    assert report["data"] == {"examples": {"train": 90, "test": 10}, "share": None, "file": "<local>/c.csv"}
    for name in ("report.json", "report.md", "README.md"):
        assert "somebody" not in (tmp_path / name).read_text(encoding="utf-8")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_write_that_fails_leaves_the_old_report(tmp_path: Path) -> None:
    write_report(tmp_path, make_report(), WORDS)
    before = (tmp_path / "report.json").read_bytes()
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    with pytest.raises(OSError, match="README.md"):
        write_report(tmp_path, make_report(recipe="another"), WORDS)
    assert (tmp_path / "report.json").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_markdown_shows_hostile_text_literally() -> None:
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(format_markdown(make_report(), WORDS))
    cells = [MarkdownIt().utils.unescapeAll(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", page)]
    expected = " ".join(HOSTILE.replace("\x07", " ")[:200].split())[:150]
    shown = [cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for cell in cells]
    assert sum(cell.startswith(expected) for cell in shown) == 1
    assert "<script" not in page
    # Every row of every table has as many cells as its header: no pipe broke a row.
    rows = [len(re.findall("<t[hd]", row)) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    assert rows == [13] * 7 + [5] * 3 + [4] * 4


@pytest.mark.parametrize("scheme", ["dynamic_int8", "int8_int4_embeddings", "mixed_int8", "static_int8_minmax"])
def test_the_card_says_that_a_dynamic_scheme_depends_on_the_batch(tmp_path: Path, scheme: str) -> None:
    stages = make_stages()
    stages[-1].record["details"]["scheme"] = scheme
    write_report(tmp_path, make_report(stages), WORDS)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ("depend on the other inputs of the batch" in card) == (not scheme.startswith("static"))


def test_card_is_valid_metadata(tmp_path: Path) -> None:
    stages = make_stages()
    stages[0].record["details"] |= {"license": "apache-2.0", "hub_id": "google-bert/bert-base-uncased"}
    stages[-1].record["details"]["scheme"] = "dynamic_int8"
    write_report(tmp_path, make_report(stages), WORDS)
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "google-bert/bert-base-uncased"
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "text-classification"
    assert set(data["tags"]) == {"pocketformers", "onnx", "distillation", "pruning", "int8"}
    # A file of one's own is no data set of the Hub.
    assert "datasets" not in data
    results = {result.metric_type: result for result in card.data.eval_results or []}
    assert results["accuracy"].metric_value == pytest.approx(0.6)
    assert results["accuracy"].dataset_name == "<local>/reviews.csv"
    assert results.keys() == {"accuracy", "f1", "matthews_correlation"}

    # A folder is no model of the Hub, whatever it is called.
    write_report(tmp_path, make_report(config={"teacher_model": "mine/bert"}), WORDS)
    assert "base_model" not in ModelCard.load(tmp_path / "README.md").data.to_dict()
    given = {"teacher_model": "package://somewhere/model", "dataset": "nyu-mll/glue", "dataset_config": "sst2"}
    for scheme, tag in (("fp32", None), ("int4_blocks_int8_embeddings", "int4"), (None, None)):
        write_report(tmp_path, make_report(config=given) | {"quantization": scheme}, WORDS)
        data = ModelCard.load(tmp_path / "README.md").data.to_dict()
        assert {"int4", "int8"} & set(data["tags"]) == ({tag} if tag else set())
    assert data["datasets"] == ["nyu-mll/glue"]
    # What is not known is left out, and the page says whose licence counts.
    assert not {"base_model", "license"} & data.keys()
    assert "The licence of the teacher (package://somewhere/model) applies" in (tmp_path / "README.md").read_text()


def test_the_card_names_every_teacher_and_its_licence(tmp_path: Path) -> None:
    stages = make_stages()
    stages.insert(1, make_stage("teacher_2", "transformers", logits_of(TEACHER), 8_000_000, [40.0, 44.0, 80.0]))
    models = ["google-bert/bert-base-uncased", "FacebookAI/roberta-base"]
    for licenses, expected in (
        (("apache-2.0", "mit"), ["apache-2.0", "mit"]),
        (("mit", "mit"), "mit"),
        ((["mit", "apache-2.0"], "mit"), ["mit", "apache-2.0"]),
        (("mit", None), None),
    ):
        for stage, license, model in zip(stages, licenses, models, strict=False):
            stage.record["details"] |= {"license": license, "hub_id": model}
        write_report(tmp_path, make_report(stages, config={"teacher_model": models}), WORDS)
        card = ModelCard.load(tmp_path / "README.md")
        data = card.data.to_dict()
        assert (data["base_model"], data.get("license")) == (models, expected)
        assert "compressed from the teachers google-bert/bert-base-uncased and FacebookAI/roberta-base" in card.text
        named = ", ".join(licenses[0]) if isinstance(licenses[0], list) else licenses[0]
        assert f"The licence of the teacher {models[0]}, {named}, applies" in card.text
    assert f"The licence of the teacher ({models[1]}) applies to this model. It was not stated" in card.text


def write_onnx_classifier(directory: Path) -> None:
    """An ONNX model with a BERT's inputs that answers with the third label."""
    nodes = [
        helper.make_node("ReduceSum", ["input_ids", "axis"], ["sum"], keepdims=1),
        helper.make_node("Cast", ["sum"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["number", "weight"], ["logits"]),
    ]
    names = ("input_ids", "attention_mask", "token_type_ids")
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in names],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(np.array([1], np.int64), "axis"),
            numpy_helper.from_array(np.array([[0, 0, 1]], np.float32), "weight"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, directory / "model.onnx")


@pytest.mark.parametrize("pair", [False, True])
def test_the_cards_own_code_runs(
    tmp_path: Path, teacher: Path, pair: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(teacher, tmp_path / "pruned")
    shutil.copytree(teacher, tmp_path / "quantized", ignore=shutil.ignore_patterns("*.safetensors"))
    write_onnx_classifier(tmp_path / "quantized")
    config = {"max_length": 32} | ({"text_pair_column": "text2"} if pair else {})
    write_report(tmp_path, make_report(config=config), WORDS)

    codes = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)

    assert len(codes) == 2
    monkeypatch.chdir(tmp_path)
    answers = []
    for code in codes:
        exec(compile(code, "README.md", "exec"), {})
        answers.append(capsys.readouterr().out)
    assert "'score'" in answers[0]
    assert answers[1].strip() == "trade"


def test_the_plot_has_a_point_and_a_name_for_every_stage() -> None:
    report = make_report(repeated=10)
    figure = draw_report(report, WORDS)
    figure.draw_without_rendering()
    names = [stage["name"] for stage in report["stages"]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    size, latency = figure.axes
    for axes, quantity in ((size, [stage["bytes"] / 1e6 for stage in report["stages"]]), (latency, None)):
        points = [line for line in axes.lines if line.get_marker() in ("o", "s")]
        assert [line.get_color() for line in points] == [handle.get_color() for handle in legend.legend_handles]
        assert [line.get_ydata()[0] for line in points] == [stage["metrics"]["accuracy"] for stage in report["stages"]]
        assert quantity is None or [line.get_xdata()[0] for line in points] == quantity
        assert not legend.get_window_extent().overlaps(axes.get_tightbbox())


def test_summary_is_a_table_and_a_sentence() -> None:
    lines = format_summary(make_report(repeated=2), WORDS).splitlines()
    assert max(len(line) for line in lines[:7]) <= 120
    assert lines[0].split()[:4] == ["stage", "accuracy", "retained", "agreement"]
    assert lines[6].split()[:4] == ["quantized", "0.600", "0.750", "0.600"]
    assert lines[6].endswith("8.0 4.4 (4.0-5.0)")
    assert "8.0 times smaller and 4.4 times faster than the teacher in torch (3.3 times" in lines[-1]
    assert "no measurable difference" in lines[-1]


def test_environment_names_machine_and_versions_but_not_its_owner() -> None:
    environment = describe_environment(seed=5)
    assert environment["seed"] == 5
    assert environment["cores"] >= 1
    assert environment["cpu"]
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", environment["packages"]["onnxruntime"])
    assert isinstance(environment["instruction_sets"], list)
    assert "hostname" not in environment


def pages_of(report: dict[str, Any]) -> list[str]:
    return [format_summary(report, WORDS), format_markdown(report, WORDS), format_model_card(report, WORDS)]


def test_rounds_that_differ_too_much_carry_no_ratio_and_no_claim() -> None:
    stages = make_stages()
    stages[-1].timing["rounds"] = [{"p50": p50} for p50 in (10.0, 1.0, 2.0)]  # 4, 44 and 40 times
    report = make_report(stages)
    assert report["busy"] is True
    assert report["stages"][-1]["ratios"]["faster_than_teacher"] == {"median": 40.0, "low": 4.0, "high": 44.0}
    for page in pages_of(report):
        assert "8.0 times smaller. The machine was busy while the stages were timed (rounds differ by more" in page
        assert "pocketformers report --again --output_dir RUN" in page
        assert "times faster" not in page
        assert "40.0 (" not in page
        assert "2.0 (2.0-2.0)" in page  # the student's rounds agree
    assert format_summary(report, WORDS).splitlines()[6].endswith("  busy")


def test_others_at_work_are_told_of_where_the_rounds_agree_too() -> None:
    stages = make_stages()
    assert make_report(stages)["busy"] is False
    stages[2].timing |= {"busy": True, "load": {"before": 0.0, "during": 0.93}}
    report = make_report(stages)
    assert report["busy"] is True
    assert report["stages"][2]["load"] == {"before": 0.0, "during": 0.93}
    for page in pages_of(report):
        assert "The machine was busy while the stages were timed (others used up to 0.9 cores)" in page
        assert "times faster" not in page
        assert "4.4 (4.0-5.0)" in page
    assert "on a busy machine" in draw_report(report, WORDS).get_suptitle()
    assert "on a busy machine" not in draw_report(make_report(), WORDS).get_suptitle()


def test_a_finished_run_is_timed_again_by_its_own_flags(
    teacher: Path, csv_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def copy(source: str, directory: Path, task: Any) -> Outcome:
        shutil.copytree(source, directory, dirs_exist_ok=True)
        return Outcome("transformers", parameters=10)

    def command(*flags: str) -> str:
        monkeypatch.setattr("sys.argv", ["pocketformers", "report", "--output_dir", str(tmp_path / "run"), *flags])
        main()
        return capsys.readouterr().out

    def timed(load: float, p50: float) -> None:
        monkeypatch.setattr("pipelines.onnx.measure.load_beside", lambda work: (work(), load))
        times = {"p50": p50, "samples_per_second": 1.0, "peak_memory_bytes": 1}
        monkeypatch.setattr("pipelines.onnx.measure.run_worker", lambda *orders, **how: times)

    # Flags that a second command would have to repeat, or the test split would be another one.
    flags = {"dataset": str(csv_file), "max_length": 32, "validation_size": 0.2, "test_size": 0.2, "split_seed": 5}
    timed(load=64.0, p50=9.0)
    with Run(tmp_path / "run", TextClassification(DataConfig(**flags)), seed=0) as run:
        for stage in ("teacher", "student"):
            run.stage(stage, copy, str(teacher))
        report_run(
            run, "compress", ReportConfig(benchmark_rounds=1, benchmark_seconds=0.1), flags | {"benchmark_rounds": 5}
        )
    before, _ = read_report(tmp_path / "run")
    said = capsys.readouterr()
    assert before["busy"] is True
    assert "The machine was busy" in said.out
    assert "the machine is busy, others use 64.0 cores" in said.err

    timed(load=0.0, p50=4.0)
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.report.results.predict_stage", lambda *given: pytest.fail("scored again"))
        assert "1.0 times faster than the teacher in torch" in command(
            "--again", "--benchmark_rounds", "3"
        )  # the default, which the run had not
    after, changed = read_report(tmp_path / "run")
    assert not changed
    assert after["busy"] is False
    assert after["stages"][1]["latency_ms"]["p50"] == 4.0
    new = {"busy", "stages", "environment", "made_by", "files", "sha256"}
    assert {key for key in before if before[key] != after[key]} <= new
    assert after["made_by"] == before["made_by"] | {"rounds": 3, "seconds": 1.0}
    assert [stage["metrics"] for stage in after["stages"]] == [stage["metrics"] for stage in before["stages"]]

    (tmp_path / "run" / "report.md").write_text("changed")
    with pytest.raises(InputError, match="found report.md. Leave --again out"):
        command("--again")
    (tmp_path / "run" / "report.json").unlink()
    with pytest.raises(InputError, match="found report.json. Leave --again out"):
        command("--again")
    shutil.rmtree(tmp_path / "run" / "student")
    command(*(f"--{name}={value}" for name, value in flags.items()))
    with Run(tmp_path / "run", TextClassification(DataConfig(**flags)), seed=0) as run:
        run.stage("teacher", copy, str(teacher))
        run.stage("student", copy, str(teacher))
    command("--again", "--benchmark_rounds", "1")  # the report is of the teacher alone, and stays so
    assert [stage["name"] for stage in read_report(tmp_path / "run")[0]["stages"]] == ["teacher"]
    shutil.rmtree(tmp_path / "run" / "teacher")
    with pytest.raises(InputError, match="found one of others"):
        command("--again")
