"""What compression kept and what it broke: records, test answers and timings become a table, a plot, a model card."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import math
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core.errors import InputError, VerificationError
from pipelines.core.run import CHECKSUM, checksum, hash_file, sealed
from pipelines.onnx.measure import paired_ratios
from pipelines.report.bootstrap import RESAMPLED_METRICS, paired_bootstrap
from pipelines.report.card import format_model_card
from pipelines.report.markdown import CLIPPED_TEXT, clip
from pipelines.report.pages import BASELINES, TEACHER, format_markdown
from pipelines.report.plot import draw_report
from pipelines.runtime.infer import available_cores
from pipelines.tasks.metrics import classification_metrics

LISTED_EXAMPLES = 50
REPORT_FILES = ("report.json", "report.md", "report.png", "README.md")
PACKAGES = (
    "accelerate", "datasets", "evaluate", "huggingface_hub", "numpy", "onnx", "onnxruntime", "onnxscript", "peft",
    "scikit-learn", "tokenizers", "torch", "transformers",
)  # fmt: skip
# What decides the speed of int8 and bfloat16 products, under the names that Linux gives on x86 and on ARM.
INSTRUCTION_SETS = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip


@dataclass
class StageResult:
    """A stage as the report sees it: its record, its answers to the test split, its timing.

    Answers are logits (examples, labels), or for a language model `token_answers` (windows, tokens, 2).
    """

    name: str
    path: str
    format: str
    answers: np.ndarray
    record: dict[str, Any]
    timing: dict[str, Any]


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
    references = np.asarray(references)
    teacher = _check_stages(primary_metric, label_names, references, texts, stages)
    metric = RESAMPLED_METRICS[primary_metric]
    predictions = {stage.name: np.argmax(stage.answers, axis=-1) for stage in stages}
    scores = {name: classification_metrics(answers, references, label_names) for name, answers in predictions.items()}
    compared = {
        name: {
            "metrics": scores[name],
            "agreement": float(np.mean(answers == predictions[TEACHER])),
            "difference": paired_bootstrap(answers, predictions[TEACHER], references, metric),
            "recall_change_per_class": {
                label: scores[name]["recall_per_class"][label] - scores[TEACHER]["recall_per_class"][label]
                for label in label_names
            },
        }
        for name, answers in predictions.items()
    }
    counts = np.bincount(references, minlength=len(label_names))
    own = {
        "label_names": label_names,
        "test_examples": len(references),
        "test_examples_per_class": dict(zip(label_names, counts.tolist(), strict=True)),
        "broken_examples": _broken_examples(teacher, shipped_stage(stages), references, texts, label_names),
    }
    return assemble(
        run_dir, recipe, task, primary_metric, stages, compared, own, data_details, environment, config, greater_is_better=True
    )  # fmt: skip


def shipped_stage(stages: list[StageResult]) -> StageResult:
    """The last stage that is no baseline."""
    return [stage for stage in stages if stage.name not in BASELINES][-1]


def assemble(
    run_dir: str | Path, recipe: str, task: str, primary_metric: str, stages: list[StageResult],
    compared: dict[str, dict[str, Any]], own: dict[str, Any], data_details: dict[str, Any], environment: dict[str, Any],
    config: dict[str, Any], *, greater_is_better: bool,
) -> dict[str, Any]:  # fmt: skip
    """The report of any task, as plain JSON.

    `compared` has the metrics, the agreement, the difference and whatever else a kind of task compares of each stage; `own` has what
    the report as a whole says of that kind of task only.
    """
    timings = {stage.name: stage.timing for stage in stages}
    teacher, shipped = next(stage for stage in stages if stage.name == TEACHER), shipped_stage(stages)
    best = compared[TEACHER]["metrics"][primary_metric]
    rows = []
    for stage in stages:
        score = compared[stage.name]["metrics"][primary_metric]
        rows.append(
            {
                "name": stage.name,
                "path": stage.path,
                "format": stage.format,
                **compared[stage.name],
                "quality_retained": _divide(score, best) if greater_is_better else _divide(best, score),
                "parameters": stage.record["parameters"],
                "bytes": stage.record["bytes"],
                "seconds": stage.record["seconds"],
                **{key: value for key, value in stage.timing.items() if key != "rounds"},
                "ratios": {
                    "smaller_than_teacher": _divide(teacher.record["bytes"], stage.record["bytes"]),
                    "faster_than_teacher": paired_ratios(timings, TEACHER, stage.name),
                    "faster_than_teacher_onnx": (
                        paired_ratios(timings, "teacher_onnx", stage.name) if "teacher_onnx" in timings else None
                    ),
                },
            }
        )
    source = config.get("teacher_model") or teacher.record["made_by"].get("source")
    report = {
        "recipe": recipe,
        "task": task,
        "primary_metric": primary_metric,
        "greater_is_better": greater_is_better,
        "environment": environment,
        "stages": rows,
        "name": Path(run_dir).resolve().name,
        "shipped": shipped.name,
        "quantization": shipped.record["details"].get("scheme"),
        **own,
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
        if stage.answers.shape != expected:
            raise InputError(
                f"expected logits of shape {expected} (examples, labels) from {stage.name}, found "
                f"{stage.answers.shape}. Run it over the whole test split of the data that the teacher was trained on."
            )
        if not np.isfinite(stage.answers).all():
            raise VerificationError(
                f"expected finite logits from {stage.name}, found NaN or infinity for "
                f"{int((~np.isfinite(stage.answers)).any(axis=-1).sum())} of {len(references)} test examples. "
                "Do not use this model; export or quantize it again, in fp32 if need be."
            )
    return stages[names.index(TEACHER)]


def _broken_examples(
    teacher: StageResult, shipped: StageResult, references: np.ndarray, texts: list[str], label_names: list[str]
) -> dict[str, Any]:
    """The examples that only the teacher got right, the shipped model's most confident mistakes first."""
    teacher_answers, answers = np.argmax(teacher.answers, axis=-1), np.argmax(shipped.answers, axis=-1)
    broken = np.flatnonzero((teacher_answers == references) & (answers != references))
    repaired = np.flatnonzero((teacher_answers != references) & (answers == references))
    teacher_confidence = _softmax(teacher.answers).max(axis=-1)
    confidence = _softmax(shipped.answers).max(axis=-1)
    ordered = broken[np.argsort(-confidence[broken], kind="stable")]
    return {
        "stage": shipped.name,
        "total": len(broken),
        "repaired_total": len(repaired),
        "examples": [
            {
                "index": int(index),
                "text": clip(texts[index], CLIPPED_TEXT),
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
    from pipelines.data.sources import resolve

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
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in pages.items()}
    text = json.dumps(sealed(_plain(report | {"files": hashes})), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    files = pages | {"report.json": text.encode()}
    for name, content in files.items():
        target = Path(run_dir) / name
        temporary = target.with_name(f".{name}.partial")
        try:
            temporary.write_bytes(content)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def changed_report_files(run_dir: str | Path) -> list[str]:
    """The files of a report that are missing, or no longer what `write_report` wrote."""
    directory = Path(run_dir)
    try:
        report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        if checksum(report) != report[CHECKSUM]:
            return ["report.json"]
        written: dict[str, str] = report["files"]
    except (OSError, ValueError, AttributeError, KeyError):
        return ["report.json"]
    return [
        name
        for name, digest in written.items()
        if not (directory / name).is_file() or hash_file(directory / name) != digest
    ]
