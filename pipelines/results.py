"""Score every stage of a run on the test split, time them together, and write the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import pipelines
from pipelines.benchmark import Subject, measure, paired_ratios
from pipelines.config import ReportConfig
from pipelines.export import ONNX_FILE
from pipelines.predict import batches_by_length, predict_onnx, predict_torch
from pipelines.report import (
    StageResult,
    build_report,
    changed_report_files,
    describe_environment,
    format_summary,
    write_report,
)
from pipelines.run import fingerprint
from pipelines.surgery import load_model

STAGES = ("teacher", "teacher_onnx", "student", "student_labels_only", "pruned", "onnx", "quantized")
THROUGHPUT_BATCH, THROUGHPUT_EXAMPLES = 16, 128


def report_run(run: Any, recipe: str, config: ReportConfig, given: dict[str, Any]) -> None:
    """Write the report of the stages this run went through, unless it is there and of these very stages; print its table.

    Only the main process works; this is the only reader of the test split.
    """
    if not run.state.is_main_process:
        return
    records = {name: run.record(name) for name in STAGES if name in run.stages}
    made_by = {
        "version": pipelines.__version__,
        "stages": {name: fingerprint(record) for name, record in records.items()},
        "rounds": config.benchmark_rounds,
        "threads": config.benchmark_threads,
    }
    report = _finished(run.directory, made_by)
    if report is None:
        task = run.task
        results, subjects = [], []
        for name, record in records.items():
            logits, subject = _answer(run.directory / name, record, task)
            results.append(StageResult(name, name, record["format"], logits, record, {}))
            subjects.append(subject)
        timings = measure(subjects, rounds=config.benchmark_rounds, threads=config.benchmark_threads)
        for result in results:
            result.timing = timings[result.name]
        report = build_report(
            run.directory,
            recipe=recipe,
            task=task.name,
            primary_metric=task.primary_metric,
            label_names=task.label_names,
            references=np.asarray(task.data.splits["test"]["label"]),
            texts=task.test_texts(),
            stages=results,
            data_details=task.data.details,
            environment=describe_environment(run.seed),
            config=given,
        )
        report["made_by"] = made_by
        write_report(run.directory, report)
        print(f"report: written to {run.directory}", flush=True)
    else:
        print("report: finished already", flush=True)
    print(format_summary(report), flush=True)


def benchmark_directories(directories: list[Path], task: Any, config: ReportConfig) -> str:
    """Time stage directories against one another on the validation split's own length mix; the result is JSON."""
    subjects = []
    for index, directory in enumerate(directories):
        processor = task.load_processor(str(directory))
        single, batches = timing_feeds(task.features(processor)["validation"], task.collate(processor))
        form = "onnx" if (directory / ONNX_FILE).is_file() else "transformers"
        subjects.append(Subject(f"{index} {directory.name}", directory, form, single, batches))
    timings = measure(subjects, rounds=config.benchmark_rounds, threads=config.benchmark_threads)
    first = subjects[0].name
    for name, timing in timings.items():
        timing[f"faster_than_{first}"] = paired_ratios(timings, first, name)
    return json.dumps(timings, indent=2)


def _finished(directory: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if report.get("made_by") == made_by and not changed_report_files(directory) else None


def _answer(directory: Path, record: dict[str, Any], task: Any) -> tuple[np.ndarray, Subject]:
    """A stage's logits on the test split, and what to time it on."""
    processor = task.load_processor(str(directory))
    features, collate = task.features(processor)["test"], task.collate(processor)
    name = f"test {directory.name}"
    if record["format"] == "onnx":
        logits = predict_onnx(directory / ONNX_FILE, features, collate, name=name)
    else:
        logits = predict_torch(load_model(directory), features, collate, name=name)
    single, batches = timing_feeds(features, collate)
    return logits, Subject(directory.name, directory, record["format"], single, batches)


def timing_feeds(
    features: Any, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """The longest example alone, for the latency, and a fixed sample in batches of like length, for the throughput."""

    def feed(indices: np.ndarray) -> dict[str, np.ndarray]:
        batch = collate([features[int(index)] for index in indices])
        return {key: value.numpy() for key, value in batch.items() if key != "labels"}

    lengths = np.asarray(features["length"] if "length" in features.column_names else [1] * len(features))
    sample = np.sort(np.random.default_rng(0).permutation(len(features))[:THROUGHPUT_EXAMPLES])
    batches = [feed(sample[batch]) for batch in batches_by_length(lengths[sample], THROUGHPUT_BATCH)]
    return feed(np.array([int(np.argmax(lengths))])), batches
