"""The report of a language model: its figures against figures worked out by hand, and its pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from pipelines.core.errors import InputError, VerificationError
from pipelines.core.task import IGNORED
from pipelines.report.pages import format_markdown, format_summary
from pipelines.report.plot import draw_report
from pipelines.report.report import StageResult, assemble, describe_environment
from pipelines.tasks.text_generation.report import compare, documents_of

END = 9
# Four windows; the documents end at the second token of the first, the last of the third and the last of the fourth.
REFERENCES = np.array([[1, END, 2], [IGNORED, 3, 4], [IGNORED, 5, END], [IGNORED, 6, END]])
LOSSES = np.array([[1.0, 1.0, 1.0], [0, 2.0, 2.0], [0, 1.0, 3.0], [0, 2.0, 1.0]])
TOKENS = (REFERENCES != IGNORED).sum(axis=1)


def make_stage(name: str, form: str, losses: np.ndarray, size: int, p50: float) -> StageResult:
    answers = np.stack([losses, np.where(losses > 2, 0, REFERENCES)], axis=-1).astype(np.float32)
    record = {"parameters": size // 4, "bytes": size, "seconds": 1.5, "made_by": {}, "details": {}}
    timing = {
        "first_token_ms": 2 * p50, "latency_ms": {"p50": p50, "p95": p50, "batch_size": 1, "shape": [1, 16]},
        "tokens_per_second": 1000 / p50, "samples_per_second": 1000 / p50, "peak_memory_bytes": 5_000_000, "threads": 2,
        "rounds": [{"p50": p50}],
    }  # fmt: skip
    return StageResult(name, name, form, answers, record, timing)


def make_stages() -> list[StageResult]:
    worse = LOSSES + np.array([0.5, 0.0, 1.0, -0.5])[:, None] * (REFERENCES != IGNORED)
    return [
        make_stage("teacher", "transformers", LOSSES, 8_000_000, 8.0),
        make_stage("quantized", "onnx", worse, 1_000_000, 1.0),
    ]


def metrics_of(stage: StageResult) -> dict[str, Any]:
    loss = stage.answers[..., 0].sum() / TOKENS.sum()
    return {"perplexity": float(np.exp(loss)), "bits_per_byte": 1.5, "next_token_accuracy": 0.5}


def make_report(stages: list[StageResult] | None = None) -> dict[str, Any]:
    stages = make_stages() if stages is None else stages
    texts = ["one | two", "b", "c *d*", "e"]
    compared, own = compare(
        stages, REFERENCES, {stage.name: metrics_of(stage) for stage in stages}, texts, END, 8e9,
        {"teacher": 8_000_000, "quantized": 1_000_000}, "quantized",
    )  # fmt: skip
    environment = describe_environment(3) | {"memory_bandwidth_bytes_per_second": 8e9}
    return assemble(
        "runs/news", "distill_gpt2", "text-generation", "perplexity", stages, compared, own, {}, environment, {},
        greater_is_better=False,
    )  # fmt: skip


def test_windows_belong_to_the_document_they_begin_in():
    document, documents = documents_of(REFERENCES, END)
    assert (document.tolist(), documents) == ([0, 1, 1, 2], 3)


def test_report_has_the_figures_worked_out_by_hand():
    report = make_report()
    teacher, quantized = report["stages"]
    assert teacher["metrics"]["perplexity"] == pytest.approx(np.exp(14 / 9))
    # The losses change by 3 x 0.5, 0, 2 x 1 and 2 x -0.5.
    change = np.exp((14 + 1.5 + 2 - 1) / 9) - np.exp(14 / 9)
    assert quantized["difference"]["value"] == pytest.approx(change)
    # Three times the same of three documents is drawn once in 27 times, so the interval ends at the worst and the best of them.
    assert quantized["difference"]["low"] == pytest.approx(np.exp(2 / 2) - np.exp(3 / 2))
    assert quantized["difference"]["high"] == pytest.approx(np.exp(10 / 4) - np.exp(8 / 4))
    assert quantized["quality_retained"] == pytest.approx(np.exp(14 / 9 - 16.5 / 9))
    assert teacher["quality_retained"] == teacher["agreement"] == 1
    changed = ((make_stages()[1].answers[..., 1] != make_stages()[0].answers[..., 1]) & (REFERENCES != IGNORED)).sum()
    assert quantized["agreement"] == pytest.approx(1 - changed / 9)
    assert quantized["tokens_per_second_at_memory_bandwidth"] == 8000
    assert quantized["ratios"]["faster_than_teacher"]["median"] == 8
    assert (report["test_examples"], report["test_tokens"]) == (3, 9)


def test_broken_windows_are_those_whose_loss_rose_most():
    broken = make_report()["broken_examples"]
    assert (broken["stage"], broken["total"], broken["repaired_total"]) == ("quantized", 2, 1)
    assert [example["index"] for example in broken["examples"]] == [2, 0]
    assert broken["examples"][0]["teacher_perplexity"] == pytest.approx(np.exp(2))
    assert broken["examples"][0]["shipped_perplexity"] == pytest.approx(np.exp(3))


def test_pages_say_that_less_is_better():
    report = make_report()
    page = MarkdownIt("commonmark").enable(["table"]).render(format_markdown(report))
    assert page.count("<table>") == 2
    assert "<em>d</em>" not in page
    assert "bits per byte" in page
    summary = format_summary(report)
    assert "8.0 times smaller and 8.0 times faster" in summary
    assert max(map(len, summary.splitlines()[:4])) <= 120
    figure = draw_report(report)
    assert "smaller is better" in figure.axes[0].get_ylabel()
    better = make_report([make_stages()[0], make_stage("quantized", "onnx", LOSSES * 0.5, 1_000_000, 1.0)])
    assert "a gain beyond chance" in format_summary(better)


def test_pieces_that_do_not_fit_are_refused():
    stages = make_stages()
    with pytest.raises(InputError, match="the teacher"):
        make_report(stages[1:])
    stages[1].answers = stages[1].answers[:, :2]
    with pytest.raises(InputError, match="vocabulary"):
        make_report(stages)
    stages = make_stages()
    stages[1].answers[2, 1, 0] = np.nan
    with pytest.raises(VerificationError, match="1 of 4 test windows"):
        make_report(stages)
