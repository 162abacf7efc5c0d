"""Score every stage of a run on the test split, time them together, and write the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import pipelines
from pipelines.core.config import ReportConfig
from pipelines.core.errors import InputError
from pipelines.core.run import check_files, differences, fingerprint, needing_room, read_record
from pipelines.core.task import IGNORED
from pipelines.models.predict import batches_by_length, predict_torch
from pipelines.models.removal import load_model
from pipelines.onnx.export import ONNX_FILE
from pipelines.onnx.measure import Subject, measure, paired_ratios
from pipelines.onnx.predict import predict_onnx
from pipelines.report.pages import TEACHER, format_summary
from pipelines.report.report import (
    StageResult,
    assemble,
    build_report,
    changed_report_files,
    describe_environment,
    shipped_stage,
    write_report,
)
from pipelines.tasks.text_generation.measure import Decoding, measure_decoding, memory_bandwidth
from pipelines.tasks.text_generation.report import compare

STAGES = ("teacher", "teacher_onnx", "student", "student_labels_only", "pruned", "onnx", "quantized")
THROUGHPUT_BATCH, THROUGHPUT_EXAMPLES = 16, 128
PROMPT_TOKENS, NEW_TOKENS = 16, 64  # at most; what a language model is timed on


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
        **config.timing(),
        "task": run.task.describe(),
        "flags": given,
    }
    made_by = json.loads(json.dumps(made_by, default=str))
    report = _finished(run.directory, made_by)
    if report is None:
        build = _language_report if run.task.causal else _classification_report
        report = build(run, records, recipe, config, given)
        report["made_by"] = made_by
        with needing_room("report", run.directory):
            write_report(run.directory, report)
        print(f"report: written to {run.directory}", flush=True)
    else:
        print("report: finished already", flush=True)
    print(format_summary(report), flush=True)


def finished_stages(run: Any) -> list[str]:
    """The stages in a run's directory that belong together: each made of what its source is now.

    Raises InputError where one was made of other data than the run's, which would be scored on another test split, or was changed since.
    """
    found: list[str] = []
    left_out: list[str] = []
    for name in STAGES:
        record = read_record(run.directory / name)
        if record is None:
            continue
        made_by = record["made_by"]
        task = json.loads(json.dumps(run.task.describe(), default=str))
        changed = differences(made_by["task"] | {"augmentation": None}, task | {"augmentation": None})
        if changed:
            raise InputError(
                f"expected the data and the settings that {run.directory / name} was made with, found others: {'; '.join(changed)}. Pass the "
                "flags of that run; report.md ends with them."
            )
        check_files(run.directory / name, record)
        source = read_record(run.directory / made_by["source"])
        outlived = source is not None and fingerprint(source) != made_by["source_fingerprint"]
        if outlived or made_by["source"] in left_out:
            print(
                f"{name}: left out, because {made_by['source']} was {'made again since' if outlived else 'left out'}",
                flush=True,
            )
            left_out.append(name)
        else:
            found.append(name)
    return found


def _classification_report(
    run: Any, records: dict[str, dict[str, Any]], recipe: str, config: ReportConfig, given: dict[str, Any]
) -> dict[str, Any]:
    task = run.task
    results, subjects = [], []
    for name, record in records.items():
        processor = task.load_processor(str(run.directory / name))
        features, collate = task.features(processor)["test"], task.collate(processor)
        logits = _answer(run.directory / name, record, task, features, collate)
        results.append(StageResult(name, name, record["format"], logits, record, {}))
        single, batches = timing_feeds(features, collate)
        path = run.directory / name
        subjects.append(Subject(name, path, record["format"], single, batches, task.trust_remote_code))
    timings = measure(subjects, **config.timing())
    for result in results:
        result.timing = timings[result.name]
    return build_report(
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


def _language_report(
    run: Any, records: dict[str, dict[str, Any]], recipe: str, config: ReportConfig, given: dict[str, Any]
) -> dict[str, Any]:
    task = run.task
    processor = task.load_processor(str(run.directory / TEACHER))
    features = task.features(processor)["test"]
    references = np.asarray(features["labels"])
    timings = measure_decoding(
        [
            Decoding(name, run.directory / name, record["format"], task.trust_remote_code)
            for name, record in records.items()
        ],
        **config.timing(),
        new_tokens=min(NEW_TOKENS, task.config.max_length // 2),
        prompt_tokens=min(PROMPT_TOKENS, task.config.max_length // 4),
    )
    results, metrics = [], {}
    for name, record in records.items():
        own = task.features(task.load_processor(str(run.directory / name)))["test"]
        answers = _answer(run.directory / name, record, task, own, task.collate(processor))
        metrics[name] = task.metrics(answers, own["labels"], task.data.text_bytes["test"])
        results.append(StageResult(name, name, record["format"], answers, record, timings[name]))
    bandwidth = memory_bandwidth()
    texts = [processor.decode(labels[labels != IGNORED]) for labels in references]
    weights = {name: _weight_bytes(run.directory / name) for name in records}
    compared, own = compare(
        results, references, metrics, texts, processor.eos_token_id, bandwidth, weights, shipped_stage(results).name
    )
    return assemble(
        run.directory, recipe, task.name, task.primary_metric, results, compared, own, task.data.details,
        describe_environment(run.seed) | {"memory_bandwidth_bytes_per_second": bandwidth}, given, greater_is_better=False,
    )  # fmt: skip


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("model*") if path.suffix in (".onnx", ".safetensors"))


def benchmark_directories(directories: list[Path], task: Any, config: ReportConfig) -> str:
    """Time stage directories against one another on the validation split's own length mix; the result is JSON."""
    names = [f"{index} {directory.name}" for index, directory in enumerate(directories)]
    forms = ["onnx" if (directory / ONNX_FILE).is_file() else "transformers" for directory in directories]
    if task.causal:
        decoded = [
            Decoding(*subject, task.trust_remote_code) for subject in zip(names, directories, forms, strict=True)
        ]
        return _compared(measure_decoding(decoded, **config.timing()), names[0])
    subjects = []
    for name, directory, form in zip(names, directories, forms, strict=True):
        processor = task.load_processor(str(directory))
        single, batches = timing_feeds(task.features(processor)["validation"], task.collate(processor))
        subjects.append(Subject(name, directory, form, single, batches, task.trust_remote_code))
    return _compared(measure(subjects, **config.timing()), names[0])


def _compared(timings: dict[str, dict[str, Any]], first: str) -> str:
    for name, timing in timings.items():
        timing[f"faster_than_{first}"] = paired_ratios(timings, first, name)
    return json.dumps(timings, indent=2)


def _finished(directory: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if report.get("made_by") == made_by and not changed_report_files(directory) else None


def _answer(directory: Path, record: dict[str, Any], task: Any, features: Any, collate: Any) -> np.ndarray:
    """A stage's answers to the test split."""
    name = f"test {directory.name}"
    if record["format"] == "onnx":
        return predict_onnx(directory / ONNX_FILE, features, collate, name=name, answers=task.answers)
    model = load_model(directory, task.trust_remote_code)
    return predict_torch(model, features, collate, name=name, answers=task.answers)


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
