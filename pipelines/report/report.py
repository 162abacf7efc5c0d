"""What compression kept and what it broke: records, predictions and timings become report.json, two pages and a plot."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.core.config import STUDENT_KINDS
from pipelines.core.disk import write_json, write_whole
from pipelines.core.errors import InputError
from pipelines.core.records import CHECKSUM, checksum, damaged_files, versions, with_checksum
from pipelines.core.sources import resolve
from pipelines.core.task import Comparison, Presentation, StageResult, Task
from pipelines.onnx.measure import carries, paired_ratios
from pipelines.onnx.runtimes import needed_versions
from pipelines.report.bootstrap import paired_bootstrap
from pipelines.report.card import format_model_card
from pipelines.report.pages import BASELINES, LABELS_ONLY, TEACHER, TEACHER_QUANTIZED, format_markdown
from pipelines.report.plot import draw_report
from pipelines.runtime.infer import available_cores, cpu_info

REPORT_FILES = ("report.json", "report.md", "report.png", "README.md")
# What decides the speed of int8 and bfloat16 matmuls, under the names that Linux gives on x86 and on ARM.
X86_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
ARM_SETS = ("asimd", "asimddp", "i8mm", "sve")


def describe_environment(seed: int) -> dict[str, Any]:
    """The machine and the versions that the figures hold for; nothing that names its owner."""
    flags = cpu_info("flags|Features").split()
    return {
        "cpu": cpu_info() or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": available_cores(),
        "instruction_sets": [name for name in X86_SETS + ARM_SETS if name in flags],
        "os": f"{platform.system()} {platform.release()}",
        "packages": versions(),
        "seed": seed,
    }


def shipped_stage(stages: list[StageResult]) -> StageResult:
    """The last stage that is no baseline; without a student the quantized teacher, which `fit` may choose."""
    last = [stage for stage in stages if stage.name not in BASELINES and stage.format != "sklearn"][-1]
    return next((stage for stage in stages if last.name == TEACHER and stage.name == TEACHER_QUANTIZED), last)


def build_report(
    run_dir: str | Path,
    task: Task,
    stages: list[StageResult],
    comparison: Comparison,
    *,
    recipe: str,
    environment: dict[str, Any],
    config: dict[str, Any],
) -> dict[str, Any]:
    """The report of a run, as plain JSON without NaN.

    `config` are the run's flags, from which the recipe can be run again (absolute paths are cut to their last part, since reports get
    published). The shipped model is the last stage that is no baseline.
    """
    samples, shipped = comparison.samples, shipped_stage(stages)

    def delta(name: str, other: str, level: float = 0.95) -> dict[str, float | None]:
        return paired_bootstrap(comparison.metric, samples[name], samples[other], level)

    named = {stage.name: stage for stage in stages}
    made_of = named.get("student", named[TEACHER]).record["made_by"].get("student", {}).get("student_model")
    both = {"student", LABELS_ONLY} <= samples.keys()
    teacher, *more_teachers = _describe_teachers(stages, config.get("teacher_model"))
    report = {
        "recipe": recipe,
        "task": task.name,
        "primary_metric": task.primary_metric,
        "greater_is_better": task.greater_is_better,
        "environment": environment,
        "stages": _rows(Path(run_dir), task, stages, comparison, delta),
        # What the teacher did for the student.
        "delta_to_labels_only": delta("student", LABELS_ONLY) if both else None,
        "name": Path(run_dir).resolve().name,
        "shipped": shipped.name,
        "student_kind": made_of if made_of in STUDENT_KINDS else None,
        "quantization": shipped.record["details"].get("scheme"),
        **comparison.report,
        "teacher": teacher,
        **({"more_teachers": more_teachers} if more_teachers else {}),
        **_describe_data(task, stages, config),
        "config": _without_folders(config),
    }
    if config.get("within") is not None:  # whose ends are the one-sided 95 % bounds
        report["delta_90"] = delta(shipped.name, TEACHER, level=0.9)
    add_timings(report, {stage.name: stage.timing for stage in stages})
    # NumPy's scalars and arrays become Python's, paths strings, and what is not finite None.
    text = json.dumps(report, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
    return json.loads(text, parse_constant=lambda _: None)


def _rows(
    directory: Path, task: Task, stages: list[StageResult], comparison: Comparison, delta: Callable[[str, str], Any]
) -> list[dict[str, Any]]:
    """What the report says of each stage, but for its timing; `delta` compares two of them."""
    teacher, shipped = next(stage for stage in stages if stage.name == TEACHER), shipped_stage(stages)
    best = comparison.stages[TEACHER]["metrics"][task.primary_metric]
    rows = []
    for stage in stages:
        score = comparison.stages[stage.name]["metrics"][task.primary_metric]
        for_less = stage.name == TEACHER_QUANTIZED or stage.format == "sklearn"  # what one could have instead
        rows.append(
            {
                "name": stage.name,
                "path": stage.name,
                "format": stage.format,
                **comparison.stages[stage.name],
                "constant": stage.format == "sklearn" and bool((stage.predictions == stage.predictions[:1]).all()),
                "delta": delta(stage.name, TEACHER),
                "delta_to_shipped": delta(stage.name, shipped.name) if for_less else None,
                "quality_retained": _divide(score, best) if task.greater_is_better else _divide(best, score),
                **{key: stage.record[key] for key in ("parameters", "bytes", "seconds")},
                "needs": needed_versions(directory / stage.name),
                "ratios": {"smaller_than_teacher": _divide(teacher.record["bytes"], stage.record["bytes"])},
            }
        )
    return rows


def _describe_data(task: Task, stages: list[StageResult], config: dict[str, Any]) -> dict[str, Any]:
    """The data set, how the splits came about, and what else the stages read."""
    dataset, configuration = (config.get(key) or task.details.get(key) for key in ("dataset", "dataset_config"))
    details = [stage.record["details"] for stage in stages]
    read = {name: one[name] for one in details for name in ("transfer", "vocabulary") if name in one}
    return {
        "dataset": _describe_source(dataset) | {"config": configuration},
        "data": _without_folders(task.details | read),
    }


def _describe_teachers(stages: list[StageResult], named: Any) -> list[dict[str, Any]]:
    """Sources and licences, of several teachers first that of the one that the student is made of; `named` are the flag's."""
    records = [stage.record for stage in stages if re.fullmatch(r"teacher(_\d+)?", stage.name)]
    sources = dict(enumerate(named if isinstance(named, list) else [named]))
    return [
        {
            "source": _without_folders(sources.get(number) or record["made_by"].get("source")),
            **{name: record["details"].get(name) for name in ("hub_id", "license")},
        }
        for number, record in enumerate(records)
    ]


def add_timings(report: dict[str, Any], timings: dict[str, dict[str, Any]]) -> None:
    """Put the timings of all stages into the report, in place of those it has; it is `busy` where they carry no claim about speed."""
    ratios = []
    for stage in report["stages"]:
        stage |= {key: value for key, value in timings[stage["name"]].items() if key != "rounds"}
        for other in (TEACHER, "teacher_onnx"):
            ratio = paired_ratios(timings, other, stage["name"]) if other in timings else None
            stage["ratios"][f"faster_than_{other}"] = ratio
            # An estimator may take microseconds, of which noise can be a half.
            ratios += [ratio] if ratio and stage["format"] != "sklearn" else []
        stage["ratios"]["faster_than_shipped"] = paired_ratios(timings, report["shipped"], stage["name"])
    report["busy"] = any(timing.get("busy") for timing in timings.values()) or not all(map(carries, ratios))


def _divide(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _describe_source(source: str | None) -> dict[str, str | None]:
    """How a data set is named in public, and its Hub id where it has one."""
    try:
        # A local path, absolute or with a scheme, is its own resolution too.
        local = not source or "://" in source or Path(source).is_absolute() or resolve(source) != source
    except InputError:
        local = True
    return {"source": _without_folders(source), "hub_id": None if local else source}


def _without_folders(value: Any) -> Any:
    """The same value with absolute paths cut to their last part: whose folder it lies in is nobody else's business."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    is_path = isinstance(value, (str, Path)) and (Path(value).is_absolute() or str(value).startswith("~/"))
    return f"<local>/{Path(value).name}" if is_path else value


# Files


def write_report(run_dir: str | Path, report: dict[str, Any], presentation: Presentation) -> None:
    """Write report.png, report.md, README.md (the model card) and, last, report.json into `run_dir`.

    Each file is replaced at once, so a reader meets the old one or the whole new one.
    """
    plot = io.BytesIO()
    draw_report(report, presentation).savefig(plot, format="png")
    pages = {
        "report.png": plot.getvalue(),
        "report.md": format_markdown(report, presentation).encode(),
        "README.md": format_model_card(report, presentation).encode(),
    }
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in pages.items()}
    for name, content in pages.items():
        write_whole(Path(run_dir) / name, content)
    write_json(Path(run_dir) / "report.json", with_checksum(report | {"files": hashes}))


def public_report(report: dict[str, Any]) -> bytes:
    """The content of a report.json for others: its flags, which `report --again` takes as they were given, without the folders of this machine."""
    made_by = report["made_by"] | {"flags": _without_folders(report["made_by"]["flags"])}
    return json.dumps(with_checksum(report | {"made_by": made_by}), indent=2).encode()


def read_report(run_dir: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The report in `run_dir`, and which of its files are missing or no longer what `write_report` wrote."""
    directory = Path(run_dir)
    try:
        report: dict[str, Any] = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        changed = damaged_files(directory, report) if checksum(report) == report[CHECKSUM] else ["report.json"]
    except (OSError, ValueError, AttributeError, KeyError):
        return {}, ["report.json"]
    return report, changed
