"""The report of a language model: its figures against figures worked out by hand, and its pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from pipelines.core.errors import InputError, VerificationError
from pipelines.core.task import IGNORED, StageResult
from pipelines.report.card import format_model_card
from pipelines.report.pages import format_markdown, format_summary
from pipelines.report.plot import draw_report
from pipelines.report.report import build_report, describe_environment
from pipelines.tasks.text_generation.report import GenerationPresentation, compare_language_models, documents_of

END = 9
WORDS = GenerationPresentation()
# Four windows; the documents end at the second token of the first, the last of the third and the last of the fourth.
REFERENCES = np.array([[1, END, 2], [IGNORED, 3, 4], [IGNORED, 5, END], [IGNORED, 6, END]])
LOSSES = np.array([[1.0, 1.0, 1.0], [0, 2.0, 2.0], [0, 1.0, 3.0], [0, 2.0, 1.0]])


def make_stage(name: str, form: str, losses: np.ndarray, size: int, p50: float) -> StageResult:
    likeliest = np.where(losses > 2, 0, np.tile(REFERENCES, (len(losses) // len(REFERENCES), 1)))
    record = {"parameters": size // 4, "bytes": size, "seconds": 1.5, "made_by": {}, "details": {}}
    timing = {
        "time_to_first_token_ms": 2 * p50,
        "latency_ms": {"p50": p50, "p95": p50, "batch_size": 1, "shape": [1, 16]},
        "samples_per_second": 1000 / p50,
        "peak_memory_bytes": 5_000_000,
        "threads": 2,
        "rounds": [{"p50": p50}],
    }
    return StageResult(name, form, np.stack([losses, likeliest], axis=-1).astype(np.float32), record, timing)


def make_stages(repeated: int = 1) -> list[StageResult]:
    """A teacher and a model that is mostly worse, on three documents that may stand there several times."""
    worse = LOSSES + np.array([0.5, 0.0, 1.0, -0.5])[:, None] * (REFERENCES != IGNORED)
    return [
        make_stage("teacher", "transformers", np.tile(LOSSES, (repeated, 1)), 8_000_000, 8.0),
        make_stage("quantized", "onnx", np.tile(worse, (repeated, 1)), 1_000_000, 1.0),
    ]


def make_report(stages: list[StageResult] | None = None, repeated: int = 1) -> dict[str, Any]:
    stages = make_stages(repeated) if stages is None else stages
    references, texts = np.tile(REFERENCES, (repeated, 1)), ["one | two", "b", "c *d*", "e"] * repeated
    tokens = (references != IGNORED).sum()

    def score(predictions: np.ndarray) -> dict[str, Any]:
        loss = predictions[..., 0].sum() / tokens
        return {"perplexity": float(np.exp(loss)), "bits_per_byte": 1.5, "next_token_accuracy": 0.5}

    compared = compare_language_models(stages, references, score, texts, END, stages[-1].name)
    task: Any = SimpleNamespace(
        name="text-generation", primary_metric="perplexity", greater_is_better=False, details={}
    )
    environment = describe_environment(3)
    return build_report("runs/news", task, stages, compared, recipe="distill_gpt2", environment=environment, config={})


def test_tokens_belong_to_the_document_that_they_are_in_whatever_their_window():
    # The first window holds the end of one document and the beginning of the next, which goes on in two more.
    assert documents_of(REFERENCES[REFERENCES != IGNORED], END).tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2]


def test_report_has_the_figures_worked_out_by_hand():
    report = make_report()
    teacher, quantized = report["stages"]
    assert teacher["metrics"]["perplexity"] == pytest.approx(np.exp(14 / 9))
    # The losses change by 3 x 0.5, 0, 2 x 1 and 2 x -0.5.
    change = np.exp((14 + 1.5 + 2 - 1) / 9) - np.exp(14 / 9)
    assert quantized["delta"] == pytest.approx({"value": change, "low": None, "high": None})
    assert quantized["quality_retained"] == pytest.approx(np.exp(14 / 9 - 16.5 / 9))
    assert teacher["quality_retained"] == teacher["agreement"] == 1
    before, after = (stage.predictions[..., 1] for stage in make_stages())
    changed = ((before != after) & (REFERENCES != IGNORED)).sum()
    assert quantized["agreement"] == pytest.approx(1 - changed / 9)
    assert quantized["ratios"]["faster_than_teacher"]["median"] == 8
    assert (report["test_examples"], report["test_tokens"]) == (3, 9)


def test_documents_are_resampled_not_windows(monkeypatch):
    monkeypatch.setattr("pipelines.report.bootstrap.MINIMUM_UNITS", 3)
    delta = make_report()["stages"][1]["delta"]
    # Three times the same of three documents is drawn once in 27 times, so the interval ends at the worst and the best of them: the
    # last, of 2 tokens, and the first, of 2; the second has 5.
    assert delta["low"] == pytest.approx(np.exp(2 / 2) - np.exp(3 / 2))
    deltas = [np.exp(3 / 2) - np.exp(2 / 2), np.exp((9 + 2.5) / 5) - np.exp(9 / 5)]
    assert delta["high"] == pytest.approx(max(deltas))


def test_broken_windows_are_those_whose_loss_rose_most():
    broken = make_report()["broken_examples"]
    assert (broken["total"], broken["repaired_total"]) == (2, 1)
    assert [example["index"] for example in broken["examples"]] == [2, 0]
    assert broken["examples"][0]["teacher_perplexity"] == pytest.approx(np.exp(2))
    assert broken["examples"][0]["shipped_perplexity"] == pytest.approx(np.exp(3))


def test_pages_say_that_less_is_better():
    report = make_report(repeated=10)
    page = MarkdownIt("commonmark").enable(["table"]).render(format_markdown(report, WORDS))
    assert page.count("<table>") == 2
    assert "<em>d</em>" not in page
    assert "bits per byte" in page
    assert "TTFT ms" in page
    assert "30 test documents" in page
    summary = format_summary(report, WORDS)
    assert "8.0 times smaller and 8.0 times faster" in summary
    assert "a measurable loss" in summary
    assert max(map(len, summary.splitlines()[:4])) <= 120
    figure = draw_report(report, WORDS)
    assert "smaller is better" in figure.axes[0].get_ylabel()
    assert "bandwidth" not in format_model_card(report, WORDS)
    better = make_stages(10)
    better[1].predictions[..., 0] = better[0].predictions[..., 0] * 0.5
    assert "a measurable gain" in format_summary(make_report(better, repeated=10), WORDS)


def test_pieces_that_do_not_fit_are_refused():
    stages = make_stages()
    with pytest.raises(InputError, match="the teacher"):
        make_report(stages[1:])
    stages[1].predictions = stages[1].predictions[:, :2]
    with pytest.raises(InputError, match="vocabulary"):
        make_report(stages)
    stages = make_stages()
    stages[1].predictions[2, 1, 0] = np.nan
    with pytest.raises(VerificationError, match="1 of 4 rows"):
        make_report(stages)
