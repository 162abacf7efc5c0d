"""What compression kept and what it broke: records, test answers and timings become a table, a plot, a model card."""

from __future__ import annotations

import hashlib
import html
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.benchmark import paired_ratios
from pipelines.config import DataConfig
from pipelines.errors import InputError, VerificationError
from pipelines.predict import available_cores
from pipelines.run import hash_file

TEACHER = "teacher"
# Rows to compare with; what is shipped is never one of them.
BASELINES = ("teacher_onnx", "student_labels_only")
LISTED_EXAMPLES = 50
REPORT_FILES = ("report.json", "report.md", "report.png", "README.md")
CLIPPED_TEXT = 200
PACKAGES = (
    "accelerate", "datasets", "evaluate", "huggingface_hub", "numpy", "onnx", "onnxruntime", "onnxscript", "peft",
    "scikit-learn", "tokenizers", "torch", "transformers",
)  # fmt: skip
# What decides the speed of int8 and bfloat16 products, under the names that Linux gives on x86 and on ARM.
INSTRUCTION_SETS = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip

Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass
class StageResult:
    """A stage as the report sees it: its record, its answers to the test split, its timing from `benchmark.measure`."""

    name: str
    path: str
    format: str
    logits: np.ndarray
    record: dict[str, Any]
    timing: dict[str, Any]


def accuracy(predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Accuracy over the last axis, so that many resamples are scored in one call."""
    return np.mean(predictions == references, axis=-1)


# Written over the last axis, unlike the metrics of pipelines.metrics, which score one set of answers.
RESAMPLED_METRICS: dict[str, Metric] = {"accuracy": accuracy}


def paired_bootstrap(
    predictions: np.ndarray,
    teacher_predictions: np.ndarray,
    references: np.ndarray,
    metric: Metric = accuracy,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """The difference of two models' scores on the same examples, with a 95 % percentile interval.

    All arrays have shape (examples,); `metric` maps two arrays (…, examples) to scores (…). Each resample draws
    examples with replacement and scores both models on them, so what is hard for both cancels (Koehn, 2004).
    """
    generator = np.random.default_rng(seed)
    count = len(references)
    at_once = max(1, 4_000_000 // count)  # bounds the memory to some 100 MB whatever the size of the split
    differences = []
    for start in range(0, resamples, at_once):
        drawn = generator.integers(0, count, (min(at_once, resamples - start), count))
        resampled = references[drawn]
        differences.append(metric(predictions[drawn], resampled) - metric(teacher_predictions[drawn], resampled))
    low, high = np.percentile(np.concatenate(differences), [2.5, 97.5])
    value = metric(predictions, references) - metric(teacher_predictions, references)
    return {"value": float(value), "low": float(low), "high": float(high)}


def describe_environment(seed: int) -> dict[str, Any]:
    """The machine and the versions that the figures hold for; nothing that names its owner."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(errors="replace") if information.exists() else ""
    named = re.search(r"^(?:model name|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set(listed.group(1).split()) if listed else set()
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": named.group(1).strip() if named else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": available_cores(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": packages,
        "seed": seed,
    }


def build_report(
    run_dir: str | Path,
    *,
    recipe: str,
    task: str,
    primary_metric: str,
    label_names: list[str],
    references: np.ndarray,
    texts: list[str],
    stages: list[StageResult],
    data_details: dict[str, Any],
    environment: dict[str, Any],
    config: dict[str, Any],
) -> dict[str, Any]:
    """Score and compare the stages on the test split; the result is plain JSON, without NaN.

    `references` are class ids (examples,) and `texts` the same examples for people to read; `config` are the run's
    flags, from which the recipe can be run again (absolute paths are cut to their last part: reports get published).
    The shipped model is the last stage that is no baseline. Raises InputError where the pieces do not fit together, and
    VerificationError for a stage whose logits are not finite.
    """
    from pipelines.metrics import classification_metrics

    references = np.asarray(references)
    teacher = _check_stages(primary_metric, label_names, references, texts, stages)
    metric = RESAMPLED_METRICS[primary_metric]
    predictions = {stage.name: np.argmax(stage.logits, axis=-1) for stage in stages}
    scores = {name: classification_metrics(answers, references, label_names) for name, answers in predictions.items()}
    timings = {stage.name: stage.timing for stage in stages}

    rows = []
    for stage in stages:
        own, reference = scores[stage.name], scores[TEACHER]
        rows.append(
            {
                "name": stage.name,
                "path": stage.path,
                "format": stage.format,
                "metrics": own,
                "quality_retained": _divide(own[primary_metric], reference[primary_metric]),
                "agreement": float(np.mean(predictions[stage.name] == predictions[TEACHER])),
                "parameters": stage.record["parameters"],
                "bytes": stage.record["bytes"],
                "latency_ms": stage.timing["latency_ms"],
                "samples_per_second": stage.timing["samples_per_second"],
                "peak_memory_bytes": stage.timing["peak_memory_bytes"],
                "seconds": stage.record["seconds"],
                "threads": stage.timing["threads"],
                "difference": paired_bootstrap(predictions[stage.name], predictions[TEACHER], references, metric),
                "recall_change_per_class": {
                    name: own["recall_per_class"][name] - reference["recall_per_class"][name] for name in label_names
                },
                "ratios": {
                    "smaller_than_teacher": _divide(teacher.record["bytes"], stage.record["bytes"]),
                    "faster_than_teacher": paired_ratios(timings, TEACHER, stage.name),
                    "faster_than_teacher_onnx": (
                        paired_ratios(timings, "teacher_onnx", stage.name) if "teacher_onnx" in timings else None
                    ),
                },
            }
        )

    shipped = [stage for stage in stages if stage.name not in BASELINES][-1]
    source = config.get("teacher_model") or teacher.record["made_by"].get("source")
    report = {
        "recipe": recipe,
        "task": task,
        "primary_metric": primary_metric,
        "environment": environment,
        "stages": rows,
        "name": Path(run_dir).resolve().name,
        "shipped": shipped.name,
        "quantization": shipped.record["details"].get("scheme"),
        "label_names": label_names,
        "test_examples": len(references),
        "test_examples_per_class": {
            name: int(np.sum(references == class_id)) for class_id, name in enumerate(label_names)
        },
        "broken_examples": _broken_examples(teacher, shipped, references, texts, label_names),
        "teacher": _describe_source(source) | {"license": teacher.record["details"].get("license")},
        "dataset": _describe_source(config.get("dataset") or data_details.get("dataset"))
        | {"config": config.get("dataset_config") or data_details.get("dataset_config")},
        "data": _without_folders(data_details),
        "config": _without_folders(config),
    }
    plain: dict[str, Any] = _plain(report)
    return plain


def _check_stages(
    primary_metric: str, label_names: list[str], references: np.ndarray, texts: list[str], stages: list[StageResult]
) -> StageResult:
    """The teacher, once it is clear that every stage answered the same examples with the same labels."""
    if primary_metric not in RESAMPLED_METRICS:
        raise InputError(
            f"expected a primary metric out of {sorted(RESAMPLED_METRICS)}, found {primary_metric!r}. Pass one of them."
        )
    names = [stage.name for stage in stages]
    if names.count(TEACHER) != 1 or len(set(names)) < len(names):
        raise InputError(
            f"expected different stages, one of them the teacher that the others are compared with, found {names}. "
            "Run the missing stages first."
        )
    expected = (len(references), len(label_names))
    if len(texts) != len(references):
        raise InputError(
            f"expected as many texts as references, found {len(texts)} and {len(references)}. Pass one test split."
        )
    for stage in stages:
        if stage.logits.shape != expected:
            raise InputError(
                f"expected logits of shape {expected} (examples, labels) from {stage.name}, found "
                f"{stage.logits.shape}. Run it over the whole test split of the data that the teacher was trained on."
            )
        if not np.isfinite(stage.logits).all():
            raise VerificationError(
                f"expected finite logits from {stage.name}, found NaN or infinity for "
                f"{int((~np.isfinite(stage.logits)).any(axis=-1).sum())} of {len(references)} test examples. "
                "Do not use this model; export or quantize it again, in fp32 if need be."
            )
    return stages[names.index(TEACHER)]


def _broken_examples(
    teacher: StageResult, shipped: StageResult, references: np.ndarray, texts: list[str], label_names: list[str]
) -> dict[str, Any]:
    """The examples that only the teacher got right, the shipped model's most confident mistakes first."""
    teacher_answers, answers = np.argmax(teacher.logits, axis=-1), np.argmax(shipped.logits, axis=-1)
    broken = np.flatnonzero((teacher_answers == references) & (answers != references))
    repaired = np.flatnonzero((teacher_answers != references) & (answers == references))
    teacher_confidence = _softmax(teacher.logits).max(axis=-1)
    confidence = _softmax(shipped.logits).max(axis=-1)
    ordered = broken[np.argsort(-confidence[broken], kind="stable")]
    return {
        "stage": shipped.name,
        "total": len(broken),
        "repaired_total": len(repaired),
        "examples": [
            {
                "index": int(index),
                "text": _clip(texts[index], CLIPPED_TEXT),
                "reference": label_names[references[index]],
                "teacher_answer": label_names[teacher_answers[index]],
                "teacher_probability": float(teacher_confidence[index]),
                "shipped_answer": label_names[answers[index]],
                "shipped_probability": float(confidence[index]),
            }
            for index in ordered[:LISTED_EXAMPLES]
        ],
    }


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _divide(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _describe_source(source: str | None) -> dict[str, str | None]:
    """How a model or data set is named in public, and its Hub id where it has one."""
    from pipelines.sources import resolve

    try:
        hub_id = source if source and "://" not in source and resolve(source) == source else None
    except InputError:
        hub_id = None
    # An absolute local path is its own resolution too.
    hub_id = None if hub_id and Path(hub_id).is_absolute() else hub_id
    return {"source": _without_folders(source), "hub_id": hub_id}


def _without_folders(value: Any) -> Any:
    """The same value with absolute paths cut to their last part: whose folder it lies in is nobody else's business."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    is_path = isinstance(value, (str, Path)) and (Path(value).is_absolute() or str(value).startswith("~/"))
    return f"<local>/{Path(value).name}" if is_path else value


def _plain(value: Any) -> Any:
    """The same value for JSON: NumPy's scalars and arrays as Python's, paths as strings, what is not finite as None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


# Files


def write_report(run_dir: str | Path, report: dict[str, Any]) -> None:
    """Write report.png, report.md, README.md (the model card) and, last, report.json into `run_dir`.

    Each file is replaced at once, so a reader meets the old one or the whole new one.
    """
    plot = io.BytesIO()
    draw_report(report).savefig(plot, format="png")
    pages = {
        "report.png": plot.getvalue(),
        "report.md": format_markdown(report).encode(),
        "README.md": format_model_card(report).encode(),
    }
    sealed = report | {"files": {name: hashlib.sha256(content).hexdigest() for name, content in pages.items()}}
    sealed |= {"sha256": content_hash(sealed)}
    text = json.dumps(_plain(sealed), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    files = pages | {"report.json": text.encode()}
    for name, content in files.items():
        target = Path(run_dir) / name
        temporary = target.with_name(f".{name}.{os.getpid()}.partial")
        try:
            temporary.write_bytes(content)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def content_hash(report: dict[str, Any]) -> str:
    """The sha256 of all that a report says but this very hash."""
    content = {key: value for key, value in report.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(_plain(content), sort_keys=True).encode()).hexdigest()


def changed_report_files(run_dir: str | Path) -> list[str]:
    """The files of a report that are missing, or no longer what `write_report` wrote."""
    directory = Path(run_dir)
    try:
        report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        if content_hash(report) != report["sha256"]:
            return ["report.json"]
        written: dict[str, str] = report["files"]
    except (OSError, ValueError, AttributeError, KeyError):
        return ["report.json"]
    return [
        name
        for name, digest in written.items()
        if not (directory / name).is_file() or hash_file(directory / name) != digest
    ]


def format_summary(report: dict[str, Any]) -> str:
    """The table for the terminal, and one sentence about the shipped model."""
    header, rows = _table(report)
    # What a terminal has no room for is in report.md.
    left_out = {"difference (95 %)", "p95 ms", "x faster than teacher_onnx"}
    columns = [column for column, title in enumerate(header) if title not in left_out]
    lines = [[line[column] for column in columns] for line in [header, *rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*text, "", _conclusion(report)])


def format_markdown(report: dict[str, Any]) -> str:
    """report.md: the table, what compression broke, the data, and how to make the run again."""
    return "\n\n".join(
        [
            f"# {_escape(report['name'])}: what compression kept and what it broke",
            _escape(_conclusion(report), None),
            _markdown_table(*_table(report)),
            _how_measured(report),
            "![Quality against size and against latency](report.png)",
            "## What compression broke",
            _broken_section(report, listed=20),
            "## Data",
            _data_section(report),
            "## Made again",
            _reproduce_section(report),
            "## Machine and versions",
            _bullets(report["environment"]),
        ]
    )


def format_model_card(report: dict[str, Any], usage: str | None = None) -> str:
    """README.md, a Hub model card: YAML front matter with the results, then what a stranger needs to know.

    `usage` tells how to use the model where it is published; left out, how to use it in this directory.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    shipped = _stage(report, report["shipped"])
    dataset, teacher = report["dataset"], report["teacher"]
    hub_metrics = {"accuracy": "accuracy", "macro_f1": "f1", "matthews_correlation": "matthews_correlation"}
    names = {stage["name"] for stage in report["stages"]}
    possible = {"student": "distillation", "pruned": "pruning"} | ({"quantized": "int8"} if _is_int8(report) else {})
    tags = ["pocketformers", shipped["format"], *(tag for stage, tag in possible.items() if stage in names)]
    data = ModelCardData(
        license=teacher["license"],
        library_name="transformers",
        base_model=teacher["hub_id"],
        datasets=[dataset["hub_id"]] if dataset["hub_id"] else None,
        metrics=list(hub_metrics.values()),
        pipeline_tag=report["task"],
        tags=tags,
        model_name=report["name"],
        eval_results=[
            EvalResult(
                task_type=report["task"],
                dataset_type=dataset["hub_id"] or "local",
                dataset_name=dataset["source"] or "local data",
                dataset_config=dataset["config"],
                dataset_split="test",
                metric_type=hub_metric,
                metric_name=f"{metric.replace('_', ' ')} of {shipped['path']}",
                metric_value=round(shipped["metrics"][metric], 4),
            )
            for metric, hub_metric in hub_metrics.items()
            if shipped["metrics"].get(metric) is not None
        ],
    )
    labels = ", ".join(_escape(name, 40) for name in report["label_names"][:20])
    more = f" and {len(report['label_names']) - 20} more" if len(report["label_names"]) > 20 else ""
    body = "\n\n".join(
        [
            f"# {_escape(report['name'])}",
            f"A model for {_escape(report['task'])} with {len(report['label_names'])} labels ({labels}{more}), "
            f"compressed from the teacher {_escape(str(teacher['source']))} by Pocketformers. "
            + _escape(_conclusion(report), None),
            "## How to use it",
            usage or _usage_section(report),
            "## Results",
            _markdown_table(*_table(report)),
            _how_measured(report),
            "![Quality against size and against latency](report.png)",
            "## What compression broke",
            _broken_section(report, listed=5),
            "## Data",
            _data_section(report),
            "## How it was made",
            _reproduce_section(report),
            "## Machine and versions",
            _bullets(report["environment"]),
            "## Limitations",
            _limitations_section(report),
            "## Licence",
            _license_section(report),
        ]
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


# Parts of the pages


def _stage(report: dict[str, Any], name: str) -> dict[str, Any]:
    stage: dict[str, Any] = next(stage for stage in report["stages"] if stage["name"] == name)
    return stage


def _table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    metric = report["primary_metric"]
    has_onnx_teacher = any(stage["name"] == "teacher_onnx" for stage in report["stages"])
    header = [
        "stage", metric.replace("_", " "), "difference (95 %)", "retained", "agreement", "parameters", "MB", "p50 ms",
        "p95 ms", "samples/s", "x smaller", "x faster",
    ]  # fmt: skip
    header += ["x faster than teacher_onnx"] * has_onnx_teacher
    rows = []
    for stage in report["stages"]:
        is_teacher = stage["name"] == TEACHER
        difference, ratios = stage["difference"], stage["ratios"]
        row = [
            stage["name"],
            _number(stage["metrics"][metric], ".3f"),
            "" if is_teacher else _interval(difference),
            _number(stage["quality_retained"], ".3f"),
            _number(stage["agreement"], ".3f"),
            _count(stage["parameters"]),
            _number(stage["bytes"] / 1e6, ".1f"),
            _number(stage["latency_ms"]["p50"], ".1f"),
            _number(stage["latency_ms"]["p95"], ".1f"),
            _number(stage["samples_per_second"], ",.0f" if stage["samples_per_second"] >= 100 else ".1f"),
            _number(ratios["smaller_than_teacher"], ".1f"),
            "" if is_teacher else _spread(ratios["faster_than_teacher"]),
        ]
        if has_onnx_teacher:
            row.append("" if stage["name"] == "teacher_onnx" else _spread(ratios["faster_than_teacher_onnx"]))
        rows.append(row)
    return header, rows


def _number(value: float | None, specification: str) -> str:
    return "n/a" if value is None else format(value, specification)


def _count(value: int | None) -> str:
    if value is None:
        return "n/a"
    return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value:,}"


def _interval(difference: dict[str, float]) -> str:
    return f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.1f} ({ratio['low']:.1f}-{ratio['high']:.1f})"


def _conclusion(report: dict[str, Any]) -> str:
    """What the shipped model costs and brings, in plain text."""
    shipped, teacher = _stage(report, report["shipped"]), _stage(report, TEACHER)
    metric, ratios = report["primary_metric"], shipped["ratios"]
    name = metric.replace("_", " ")
    if shipped is teacher:
        return f"The teacher's {name} is {teacher['metrics'][metric]:.3f} on {report['test_examples']} test examples."
    faster = f"{ratios['faster_than_teacher']['median']:.1f} times faster than the teacher in torch"
    if ratios["faster_than_teacher_onnx"]:
        faster += f" ({ratios['faster_than_teacher_onnx']['median']:.1f} times faster than the teacher in fp32 ONNX)"
    difference = shipped["difference"]
    if difference["low"] == difference["high"] == 0:
        verdict = "the two are right and wrong on the same examples"
    elif difference["high"] < 0:
        verdict = "a loss beyond chance"
    elif difference["low"] > 0:
        verdict = "a gain beyond chance"
    else:
        verdict = "too small a difference to tell from chance with so many examples"
    return (
        f"The shipped model ({shipped['path']}) is {_number(ratios['smaller_than_teacher'], '.1f')} times smaller and "
        f"{faster}. Its {name} is {shipped['metrics'][metric]:.3f} on {report['test_examples']} test examples, the "
        f"teacher's {teacher['metrics'][metric]:.3f}. The difference, with its 95 % interval, is "
        f"{_interval(difference)}: {verdict}."
    )


def _how_measured(report: dict[str, Any]) -> str:
    teacher = _stage(report, TEACHER)
    shape = " x ".join(str(size) for size in teacher["latency_ms"]["shape"])
    memory = ", ".join(f"{stage['name']} {stage['peak_memory_bytes'] / 1e6:.0f} MB" for stage in report["stages"])
    return (
        "Scores are of the test split, which nothing else in the run has read; the ONNX rows are ONNX Runtime's own "
        "answers. *difference*: score minus the teacher's on the same examples, with a paired bootstrap interval. "
        "*retained*: score over the teacher's. *agreement*: share of examples answered as the teacher answers them. "
        "*MB*: what must be shipped, in millions of bytes. *p50*, *p95*: one call of shape "
        f"{shape} on {teacher['threads']} threads, every stage in fresh processes in turn; *x faster*: median of the "
        "rounds, with the least and the largest. *samples/s*: over batches of the test split's own lengths. "
        f"Peak memory of the whole process while timed: {memory}."
    )


def _broken_section(report: dict[str, Any], listed: int) -> str:
    broken, shipped, teacher = report["broken_examples"], _stage(report, report["shipped"]), _stage(report, TEACHER)
    if shipped is teacher:
        return "Nothing was compressed."
    changes = shipped["recall_change_per_class"]
    classes = sorted(changes, key=lambda name: changes[name])
    header = ["class", "test examples", "teacher's recall", f"{shipped['name']}'s recall", "change"]
    rows = [
        [
            name,
            str(report["test_examples_per_class"][name]),
            _number(teacher["metrics"]["recall_per_class"][name], ".3f"),
            _number(shipped["metrics"]["recall_per_class"][name], ".3f"),
            f"{changes[name]:+.3f}",
        ]
        for name in classes[:20]
    ]
    parts = ["Recall per class, the largest loss first:", _markdown_table(header, rows)]
    if len(classes) > 20:
        parts.append(f"The other {len(classes) - 20} classes are in report.json.")
    examples = broken["examples"][:listed]
    parts.append(
        f"Of {report['test_examples']} test examples, the teacher got {broken['total']} right that {shipped['name']} "
        f"gets wrong, and {broken['repaired_total']} wrong that {shipped['name']} gets right."
        + (f" The first {len(examples)}, the most confident mistakes first:" if len(examples) < broken["total"] else "")
    )
    if examples:
        header = ["example", "text", "right answer, the teacher's", f"{shipped['name']}'s answer"]
        rows = [
            [
                str(example["index"]),
                example["text"],
                f"{example['teacher_answer']} ({example['teacher_probability']:.2f})",
                f"{example['shipped_answer']} ({example['shipped_probability']:.2f})",
            ]
            for example in examples
        ]
        parts.append(_markdown_table(header, rows, text_columns=len(header)))
    return "\n\n".join(parts)


def _data_section(report: dict[str, Any]) -> str:
    dataset = report["dataset"]
    details = {key: value for key, value in report["data"].items() if key not in ("dataset", "dataset_config")}
    named = ", configuration ".join(_escape(part) for part in (dataset["source"], dataset["config"]) if part)
    return f"Data set: {named or 'not named'}.\n\n{_bullets(details)}"


def _reproduce_section(report: dict[str, Any]) -> str:
    import yaml

    seconds = ", ".join(f"{stage['name']} {stage['seconds']:.0f}" for stage in report["stages"])
    records = (
        f"Seconds that the stages took: {_escape(seconds, None)}. In the run, every stage's directory has a record.json with its "
        "source, settings, seed, versions and file hashes."
    )
    # Reported by itself, a run may have been put together stage by stage: then only the records know how.
    if report["recipe"] == "report":
        return records
    flags = {flag: value for flag, value in report["config"].items() if flag != "output_dir"}
    settings = yaml.safe_dump(flags, sort_keys=False, allow_unicode=True, width=1000)
    command = f"accelerate launch recipes/{report['recipe']}.py --config run.yaml"
    return (
        "Save these flags as run.yaml in a clone of Pocketformers (a path that starts with `<local>` was a local file) "
        f"and run\n\n{_fence(command, 'bash')}\n\n{_fence(settings, 'yaml')}\n\n{records}"
    )


def _usage_section(report: dict[str, Any]) -> str:
    shipped = _stage(report, report["shipped"])
    own = [stage for stage in report["stages"] if stage["name"] not in BASELINES]
    opened = [stage for stage in own if stage["format"] == "transformers"][-1]
    config = report["config"]
    limit = f"truncation=True, max_length={config.get('max_length', DataConfig.max_length)}"
    is_pair = bool(config.get("text_pair_column"))
    text = '{"text": "A first text.", "text_pair": "A second text."}' if is_pair else '"A text."'
    of_images = report["task"] == "image-classification"
    called_with = '"image.png"' if of_images else f"{text}, {limit}"
    parts = [
        "In a copy of this directory, with transformers:",
        _fence(
            "from transformers import pipeline\n\n"
            f"classify = pipeline({json.dumps(report['task'])}, model={json.dumps(opened['path'])})\n"
            f"print(classify({called_with}))",
            "python",
        ),
    ]
    if opened["name"] == "pruned":
        parts.append(
            "What was pruned is stored as zeros, so that stock transformers opens the directory; the zeros are gone "
            "from the ONNX files, and were removed in memory for the timing below."
        )
    if shipped["format"] == "onnx":
        path = json.dumps(shipped["path"])
        texts = '["A first text."], ["A second text."]' if is_pair else '["A text."]'
        imports, reads = (
            "AutoConfig, AutoTokenizer",
            f'AutoTokenizer.from_pretrained({path})({texts}, {limit}, return_tensors="np")',
        )
        if of_images:
            imports = "AutoConfig, AutoImageProcessor"
            reads = f'AutoImageProcessor.from_pretrained({path}, backend="pil")(image, return_tensors="np")'
        image = """
            from PIL import Image, ImageOps
            image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")
        """
        code = f"""
            import onnxruntime
            from transformers import {imports}

            session = onnxruntime.InferenceSession({json.dumps(shipped["path"] + "/model.onnx")})
            inputs = {reads}
            logits = session.run(["logits"], {{node.name: inputs[node.name] for node in session.get_inputs()}})[0]
            print(AutoConfig.from_pretrained({path}).id2label[int(logits[0].argmax())])
        """
        lines = (textwrap.dedent(image).strip() + "\n" if of_images else "") + textwrap.dedent(code).strip()
        parts += ["The shipped model, with ONNX Runtime and no torch:", _fence(lines, "python")]
    return "\n\n".join(parts)


def _is_int8(report: dict[str, Any]) -> bool:
    return report["shipped"] == "quantized" and report["config"].get("quantization") != "none"


def _limitations_section(report: dict[str, Any]) -> str:
    points = [
        f"The scores are those of one run with one seed on {report['test_examples']} test examples of the same source "
        "as the training data. Expect less on others; an interval of zero width means that no difference was "
        "seen, not that there is none.",
        "The model always answers with one of its labels, also where none fits. Its probabilities were not calibrated, "
        "and compression changes them.",
        "It knows what its teacher and its data know: their errors and biases are passed on, and compression can make "
        "them worse for rare classes (see the recall per class).",
        "Times and memory are of the machine above; another CPU can rank the stages differently. Measure there.",
    ]
    if _is_int8(report) and not (report["quantization"] or "").startswith("static"):
        points.append(
            "Dynamic quantization takes one scale for a whole batch of activations, so an answer that is a close call "
            "can depend on what else is in its batch, and it can differ between CPUs."
        )
    return "\n".join(f"- {point}" for point in points)


def _license_section(report: dict[str, Any]) -> str:
    teacher = report["teacher"]
    if teacher["license"]:
        return (
            f"The teacher's licence, {_escape(teacher['license'])}, applies to this model too. Mind the data's as well."
        )
    return (
        f"The licence of the teacher ({_escape(str(teacher['source']))}) applies to this model. It was not stated "
        "where the teacher was loaded from: look it up, and that of the data, before you use or pass on this model."
    )


# Text that others wrote


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _escape(text: str, length: int | None = CLIPPED_TEXT) -> str:
    """Somebody's text as one line that Markdown and HTML take literally."""
    folded = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    clipped = folded if length is None else _clip(folded, length)
    # An underscore inside a word is literal already; escaped, it would only make the source hard to read.
    escaped = re.sub(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", html.escape(clipped, quote=False))
    # GitHub makes links of bare addresses.
    return re.sub(r"(?i)\b(https?|ftp)://", r"\1&#58;//", escaped)


def _fence(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _markdown_table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """A table whose first columns hold text and whose others hold figures."""
    lines = [[_escape(cell) for cell in line] for line in [header, *rows]]
    lines.insert(1, ["---"] * text_columns + ["---:"] * (len(header) - text_columns))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(values: dict[str, Any], depth: int = 0) -> str:
    """Nested settings as a nested list; long lists are cut."""
    lines = []
    for key, value in values.items():
        item = f"{'  ' * depth}- {_escape(str(key).replace('_', ' '))}:"
        if isinstance(value, dict) and any(isinstance(inner, (dict, list)) for inner in value.values()):
            lines += [item, _bullets(value, depth + 1)]
            continue
        if isinstance(value, dict):
            value = [f"{inner_key} {inner}" for inner_key, inner in value.items()]
        if isinstance(value, list):
            more = [f"and {len(value) - 20} more"] if len(value) > 20 else []
            value = ", ".join([str(inner) for inner in value[:20]] + more) or "none"
        lines.append(f"{item} {_escape(str(value), 1000)}")
    return "\n".join(lines)


# The plot

# Okabe and Ito's colours, which colour-blind people tell apart; the light yellow is left out.
COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


def draw_report(report: dict[str, Any]) -> Any:
    """The matplotlib figure of report.png: quality against size and against latency, every point labelled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    stages, metric = report["stages"], report["primary_metric"].replace("_", " ")
    # Figure and canvas without pyplot: no global state, and no display is looked for.
    figure = Figure(figsize=(11, 5), dpi=150)
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.075, right=0.985, top=0.9, bottom=0.22, wspace=0.06)
    size = [stage["bytes"] / 1e6 for stage in stages]
    latency = [stage["latency_ms"]["p50"] for stage in stages]
    for axes, values, label in zip(
        panels, (size, latency), ("shipped size (MB)", "latency, batch 1, p50 (ms)"), strict=True
    ):
        _draw_points(axes, stages, values, report["primary_metric"])
        _scale_axis(axes, values)
        axes.set_xlabel(f"{label}, smaller is better" + (", log scale" if axes.get_xscale() == "log" else ""))
    panels[0].set_ylabel(f"{metric} on the test split")
    figure.suptitle(f"{report['name']}: {metric} on {report['test_examples']} test examples", parse_math=False)
    markers = [
        Line2D([], [], marker="o", linestyle="none", color="#555555", markersize=7, label="torch"),
        Line2D(
            [], [], marker="s", linestyle="none", color="#555555", markersize=10, fillstyle="none", label="ONNX Runtime"
        ),
        Line2D([], [], color="#555555", label="95 % interval of the difference from the teacher (paired bootstrap)"),
    ]
    figure.legend(handles=markers, loc="lower center", ncols=3, frameon=False)
    figure.draw_without_rendering()
    for axes, values in zip(panels, (size, latency), strict=True):
        _place_labels(axes, stages, values, report["primary_metric"], canvas.get_renderer())
    return figure


def _darker(color: str) -> tuple[float, float, float]:
    """The colour dark enough for text; a marker may be lighter."""
    from matplotlib.colors import to_rgb

    red, green, blue = (0.65 * part for part in to_rgb(color))
    return red, green, blue


def _draw_points(axes: Any, stages: list[dict[str, Any]], values: list[float], metric: str) -> None:
    for index, (stage, value) in enumerate(zip(stages, values, strict=True)):
        color, score, difference = COLORS[index % len(COLORS)], stage["metrics"][metric], stage["difference"]
        spread = [[difference["value"] - difference["low"]], [difference["high"] - difference["value"]]]
        if difference["low"] < difference["high"]:
            axes.errorbar(value, score, yerr=spread, color=color, linewidth=1.2, capsize=3, alpha=0.7, zorder=2)
        # An open square around a filled circle: both are seen where torch and ONNX coincide.
        if stage["format"] == "onnx":
            axes.scatter(value, score, s=110, marker="s", facecolors="none", edgecolors=color, linewidths=2, zorder=4)
        else:
            axes.scatter(value, score, s=45, marker="o", color=color, zorder=3)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _scale_axis(axes: Any, values: list[float]) -> None:
    """Room at both ends for labels; a log scale where the values differ by more than four times."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = min(values), max(values)
    if low > 0 and high / low > 4:
        room = (high / low) ** 0.25
        axes.set_xscale("log")
        axes.set_xlim(low / room, high * room)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.3 * (high - low) or 0.5 * high or 1.0
        axes.set_xlim(low - room, high + room)
    axes.margins(y=0.2)


def _place_labels(axes: Any, stages: list[dict[str, Any]], values: list[float], metric: str, renderer: Any) -> None:
    """Put every name at the nearest place where it covers no point, no interval and no other name."""
    from matplotlib.transforms import Bbox

    pixel = axes.figure.dpi / 72
    taken: list[Any] = []
    for stage, value in zip(stages, values, strict=True):
        score, difference = stage["metrics"][metric], stage["difference"]
        offset = score - difference["value"]
        x, y = axes.transData.transform((value, score))
        low, high = (axes.transData.transform((value, offset + difference[end]))[1] for end in ("low", "high"))
        taken.append(Bbox.from_extents(x - 7 * pixel, y - 7 * pixel, x + 7 * pixel, y + 7 * pixel))
        taken.append(Bbox.from_extents(x - 3 * pixel, low - 2 * pixel, x + 3 * pixel, high + 2 * pixel))
    directions = [math.radians(angle) for angle in (0, 35, -35, 180, 145, -145, 70, -70, 110, -110, 90, -90)]
    offsets = [(radius, direction) for radius in (11, 18, 26, 36, 48, 62, 78, 96) for direction in directions]
    for index, (stage, value) in enumerate(zip(stages, values, strict=True)):
        score, color = stage["metrics"][metric], COLORS[index % len(COLORS)]
        style = {"fontsize": 9, "color": _darker(color), "ha": "left", "va": "bottom", "parse_math": False}
        probe = axes.text(0, 0, stage["name"], **style)
        width, height = probe.get_window_extent(renderer).size
        probe.remove()
        x, y = axes.transData.transform((value, score))
        place = None
        for radius, direction in offsets:
            left = x + math.cos(direction) * (radius * pixel + width / 2) - width / 2
            bottom = y + math.sin(direction) * (radius * pixel + height / 2) - height / 2
            box = Bbox.from_bounds(left, bottom, width, height)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                place = radius, box
                break
        # Where nothing is free, a name on top of another is better than none.
        radius, box = place or (0, Bbox.from_bounds(x, y, width, height))
        taken.append(box)
        axes.annotate(
            stage["name"],
            (value, score),
            xytext=((box.x0 - x) / pixel, (box.y0 - y) / pixel),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 4} if radius > 18 else None,
            zorder=5,
            **style,
        )
