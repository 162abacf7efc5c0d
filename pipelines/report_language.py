"""The report of a language model's run: text of the test split scored, generation timed, and what is left compared."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.benchmark_language import Decoding, measure_decoding, memory_bandwidth, paired_speed
from pipelines.config import ReportConfig
from pipelines.export import ONNX_FILE
from pipelines.predict import predict_onnx, predict_torch
from pipelines.run import Run, versions, write_json
from pipelines.surgery import load_model

TEACHER = "teacher"
# What a table compares, in the order in which it is made.
STAGES = ("teacher", "teacher_onnx", "student_labels_only", "student", "pruned", "onnx", "quantized")


def report_language_run(run: Run, recipe: str, settings: ReportConfig, given: dict[str, Any]) -> None:
    """Write report.json and report.md into the run's directory, on the main process; print the table. Reads the test split."""
    if run.state.is_main_process:
        report = build_report(run, recipe, settings, given)
        write_json(run.directory / "report.json", report)
        text = format_table(report)
        (run.directory / "report.md").write_text(f"# {recipe}\n\n{text}\n", encoding="utf-8")
        print(text, flush=True)
    run.state.wait_for_everyone()


def build_report(run: Run, recipe: str, settings: ReportConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The scores, sizes and speeds of all stages of the run, as JSON."""
    task = run.task
    names = [name for name in STAGES if name in run.stages]
    records = {name: run.record(name) for name in names}
    answers: dict[str, np.ndarray] = {}
    metrics: dict[str, dict[str, Any]] = {}
    for name in names:
        directory = run.directory / name
        processor = task.load_processor(str(directory))
        is_onnx = records[name]["format"] == "onnx"
        predict: Any = (
            partial(predict_onnx, directory / ONNX_FILE, name=f"test {name}")
            if is_onnx
            else partial(predict_torch, load_model(directory), name=f"test {name}")
        )
        features = task.features(processor)["test"]
        answers[name] = predict(features, task.collate(processor), answers=task.answers)
        metrics[name] = task.metrics(answers[name], features["labels"], task.data.text_bytes["test"])
    speeds = measure_decoding(
        [Decoding(name, run.directory / name, records[name]["format"]) for name in names],
        rounds=settings.benchmark_rounds,
        threads=settings.benchmark_threads,
        new_tokens=min(64, task.config.max_length // 2),
        prompt_tokens=min(16, task.config.max_length // 4),
    )
    bandwidth = memory_bandwidth()
    stages = []
    for name in names:
        weights = sum(
            path.stat().st_size
            for path in (run.directory / name).glob("model*")
            if path.suffix in (".onnx", ".safetensors")
        )
        speed = speeds[name]
        stages.append(
            {
                "name": name,
                "path": name,
                "format": records[name]["format"],
                "metrics": metrics[name],
                "quality_retained": metrics[TEACHER][task.primary_metric] / metrics[name][task.primary_metric],
                "agreement": task.agreement(answers[name], answers[TEACHER]),
                "parameters": records[name]["parameters"],
                "bytes": records[name]["bytes"],
                "latency_ms": speed["latency_ms"],
                "samples_per_second": speed["tokens_per_second"],
                "first_token_ms": speed["first_token_ms"],
                "tokens_per_second": speed["tokens_per_second"],
                # Every weight is read for every token, unless it fits the processor's caches.
                "tokens_per_second_of_one_cores_bandwidth": bandwidth / weights,
                "faster_than_teacher": paired_speed(speeds, TEACHER, name),
                "faster_than_student": paired_speed(speeds, "student", name) if "student" in speeds else None,
                "peak_memory_bytes": speed["peak_memory_bytes"],
                "seconds": records[name]["seconds"],
                "threads": speed["threads"],
            }
        )
    return {
        "recipe": recipe,
        "task": task.name,
        "primary_metric": task.primary_metric,
        "environment": {"packages": versions(), "seed": run.seed, "memory_bandwidth": bandwidth},
        "stages": stages,
        "data": {key: value for key, value in task.data.details.items() if key != "dataset"},
        "config": {key: Path(value).name if Path(str(value)).is_absolute() else value for key, value in given.items()},
    }


def format_table(report: dict[str, Any]) -> str:
    """The stages as a Markdown table."""
    header = (
        "stage", "perplexity", "bits per byte", "agreement", "parameters", "MB", "first token ms", "tokens/s", "x faster than teacher",
    )  # fmt: skip
    rows = [
        (
            stage["name"],
            f"{stage['metrics']['perplexity']:.2f}",
            f"{stage['metrics']['bits_per_byte']:.3f}",
            f"{stage['agreement']:.3f}",
            f"{stage['parameters'] / 1e6:.2f} M" if stage["parameters"] else "n/a",
            f"{stage['bytes'] / 1e6:.2f}",
            f"{stage['first_token_ms']:.1f}",
            f"{stage['tokens_per_second']:.0f}",
            f"{stage['faster_than_teacher']['median']:.1f}",
        )
        for stage in report["stages"]
    ]
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
