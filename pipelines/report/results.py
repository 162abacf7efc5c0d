"""Score every stage of a run on the test split, time them together, and write the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import pipelines
from pipelines.core.config import ReportConfig
from pipelines.core.disk import as_json, needing_room
from pipelines.core.errors import InputError
from pipelines.core.identity import differences
from pipelines.core.records import check_files, fingerprint, read_record
from pipelines.core.run import Run
from pipelines.core.task import StageResult, Task
from pipelines.models.predict import predict_torch
from pipelines.models.removal import load_model
from pipelines.onnx.export import ONNX_FILE
from pipelines.onnx.measure import Subject, estimator_workload, measure, paired_ratios
from pipelines.onnx.predict import predict_onnx
from pipelines.report.pages import LABELS_ONLY, TEACHER, TEACHER_QUANTIZED, format_summary
from pipelines.report.report import (
    add_timings,
    build_report,
    describe_environment,
    read_report,
    shipped_stage,
    write_report,
)
from pipelines.report.seeds import over_seeds
from pipelines.training.baselines import BASELINE_FILE, load_baseline

MORE_TEACHERS = tuple(f"teacher_{number}" for number in range(2, 10))  # of a student of several
STAGES = (
    TEACHER,
    *MORE_TEACHERS,
    "teacher_onnx",
    "student",
    LABELS_ONLY,
    "pruned",
    "onnx",
    "quantized",
    TEACHER_QUANTIZED,
)


def report_run(
    run: Run,
    recipe: str,
    config: ReportConfig,
    given: dict[str, Any],
    batch_size: int = 32,
    others: Sequence[Run] = (),
) -> None:
    """Write the report of the stages this run went through, unless it is there and of these very stages; print its table.

    `others` are the same run with other seeds, which are scored, not timed. Only the main process works; this is the only reader of the
    test split. Torch models are scored in batches of `batch_size`.
    """
    if not run.state.is_main_process:
        return
    task: Task = run.task
    records = {name: run.record(name) for name in (*STAGES, *task.baselines) if name in run.stages}
    made_by = {
        "version": pipelines.__version__,
        "stages": {name: fingerprint(record) for name, record in records.items()},
        **config.timing(),
        "task": task.describe(),
        "flags": given,
    }
    if others:
        made_by["seeds"] = {
            other.seed: {name: fingerprint(other.record(name)) for name in STAGES if name in other.stages}
            for other in others
        }
    made_by = as_json(made_by)
    report, changed = read_report(run.directory)
    if changed or report["made_by"] != made_by:
        report = _score_and_time(run, records, recipe, config, given, batch_size, others)
        report["made_by"] = made_by
        _write(run, report)
    else:
        print(f"report: finished already\n{format_summary(report, task.presentation)}", flush=True)


def whole_report(directory: Path) -> dict[str, Any]:
    """The report of a finished run. Raises InputError where its files are missing, or no longer what was written."""
    report, changed = read_report(directory)
    if changed:
        raise _no_report(directory, ", ".join(changed))
    return report


def _no_report(directory: Path, found: str) -> InputError:
    return InputError(
        f"expected a report of the stages that are in {directory}, found {found}. Leave --again out: then the stages are scored, too."
    )


def time_again(run: Run, report: dict[str, Any], config: ReportConfig) -> None:
    """Write the report of a finished run with new timings of the stages that it is of; nothing is scored again."""
    if not run.state.is_main_process:
        return
    made_of = report["made_by"]["stages"]
    if any(name not in run.stages or fingerprint(run.record(name)) != made_of[name] for name in made_of):
        raise _no_report(run.directory, "one of others")
    run.stages = list(made_of)  # flags of other runs may have left further ones in the directory
    add_timings(report, time_stages({name: run.directory / name for name in run.stages}, run.task, "test", config))
    report["environment"] = describe_environment(run.seed)
    report["made_by"] |= config.timing()
    _write(run, report)


def _write(run: Run, report: dict[str, Any]) -> None:
    with needing_room("report", run.directory):
        write_report(run.directory, report, run.task.presentation)
    print(f"report: written to {run.directory}", flush=True)
    print(format_summary(report, run.task.presentation), flush=True)


def finished_stages(run: Run) -> list[str]:
    """The stages in a run's directory that belong together: each made of what its source is now.

    Raises InputError where one was made of other data than the run's, which would be scored on another test split, or was changed since.
    """
    found: list[str] = []
    left_out: list[str] = []
    task = as_json(run.task.describe())
    for name in (*STAGES, *run.task.baselines):
        record = read_record(run.directory / name)
        if record is None:
            continue
        made_by = record["made_by"]
        # Augmented or not, the training data is that of the same test split.
        changed = differences(*(one | {"augmentation": None} for one in (made_by["task"], task)))
        if changed:
            raise InputError(
                f"expected the data and the settings that {run.directory / name} was made with, found others: {'; '.join(changed)}. Pass the "
                "flags of that run; report.md ends with them."
            )
        check_files(run.directory / name, record)
        source = made_by["source"] and read_record(run.directory / made_by["source"])
        outlived = source and fingerprint(source) != made_by["source_fingerprint"]
        if outlived or made_by["source"] in left_out:
            print(
                f"{name}: left out, because {made_by['source']} was {'rebuilt since' if outlived else 'left out'}",
                flush=True,
            )
            left_out.append(name)
        else:
            found.append(name)
    return found


def _score_and_time(
    run: Run,
    records: dict[str, dict[str, Any]],
    recipe: str,
    config: ReportConfig,
    given: dict[str, Any],
    batch_size: int,
    others: Sequence[Run],
) -> dict[str, Any]:
    task: Task = run.task
    results = [score_stage(run, name, batch_size) for name in records]
    # Before the timing, which takes minutes: a model whose predictions are not finite is refused here.
    processor = task.load_processor(str(run.directory / TEACHER))
    shipped = shipped_stage(results).name
    comparison = task.compare(results, processor, shipped)
    comparisons = {records[shipped]["made_by"]["seed"]: comparison}
    for other in others:
        own = [
            result
            if other.place(result.name) == run.place(result.name)
            else score_stage(other, result.name, batch_size)
            for result in results
            if result.name == TEACHER or result.name in other.stages
        ]
        comparisons[other.seed] = task.compare(own, processor, shipped)
    timings = time_stages({name: run.directory / name for name in records}, task, "test", config)
    for result in results:
        result.timing = timings[result.name]
    environment = describe_environment(run.seed)
    report = build_report(
        run.directory, task, results, comparison, recipe=recipe, environment=environment, config=given
    )
    if others:
        report["seeds"] = over_seeds(comparisons, task.primary_metric, [(shipped, TEACHER), ("student", LABELS_ONLY)])
    return report


def score_stage(run: Run, name: str, batch_size: int, split: str = "test") -> StageResult:
    """A finished stage with what it predicts for a split."""
    record = run.record(name)
    predictions = predict_stage(run.place(name), record["format"], run.task, batch_size, split)
    return StageResult(name, record["format"], predictions, record, timing={})


def predict_stage(directory: Path, form: str, task: Task, batch_size: int, split: str = "test") -> np.ndarray:
    """What a stage predicts for a split: in torch on the device of the process, in ONNX Runtime on the CPU."""
    from accelerate import PartialState

    if form == "sklearn":
        return task.baseline_predictions(load_baseline(directory), _baseline_inputs(task, split))  # type: ignore[arg-type]
    processor = task.load_processor(str(directory))
    features, collate = task.features(processor)[split], task.collate(processor)
    name = f"{split} {directory.name}"
    if form == "onnx":
        return predict_onnx(directory / ONNX_FILE, features, collate, task, name=name)
    model = load_model(directory, task.config.trust_remote_code).to(PartialState().device)
    return predict_torch(model, features, collate, task, batch_size, name=name)


@lru_cache(maxsize=1)
def _baseline_inputs(task: Task, split: str) -> Any:
    """What all estimators of a task, which is known by its identity, are given."""
    return task.baseline_inputs(task.splits[split])


def time_stages(
    directories: dict[str, Path], task: Task, split: str, config: ReportConfig
) -> dict[str, dict[str, Any]]:
    """Time directories together, on examples of a split."""
    subjects = []
    for name, path in directories.items():
        if (path / BASELINE_FILE).is_file():
            workload = estimator_workload(_baseline_inputs(task, split), task.lengths_alone(split))  # type: ignore[arg-type]
            subjects.append(Subject(name, path / BASELINE_FILE, "sklearn", workload))
        else:
            form = "onnx" if (path / ONNX_FILE).is_file() else "transformers"
            subjects.append(Subject(name, path, form, task.workload(path, split), task.config.trust_remote_code))
    return measure(subjects, **config.timing())


def benchmark_directories(directories: list[Path], task: Task, config: ReportConfig) -> str:
    """Time stage directories against one another on examples of the validation split; the result is JSON."""
    named = {f"{index} {directory.name}": directory for index, directory in enumerate(directories)}
    timings, first = time_stages(named, task, "validation", config), next(iter(named))
    for name, timing in timings.items():
        timing[f"faster_than_{first}"] = paired_ratios(timings, first, name)
    return json.dumps(timings, indent=2)
