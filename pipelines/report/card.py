"""The model card of a run: README.md as the Hub reads it, with the results in its front matter."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from pipelines.core.task import Presentation
from pipelines.report.markdown import escape, fence
from pipelines.report.pages import (
    BASELINES,
    conclusion,
    sections,
    stage_of,
    tested_on,
)

# The schemes of pipelines/onnx/quantize.py that quantize activations while the model runs.
DYNAMIC = ("dynamic_int8", "int8_int4_embeddings", "mixed_int8")


def format_model_card(report: dict[str, Any], presentation: Presentation, usage: str | None = None) -> str:
    """README.md, a Hub model card: YAML front matter with the results, then what a stranger needs to know.

    `usage` tells how to use the model where it is published; left out, how to use it in this directory.
    """
    from huggingface_hub import ModelCard

    teachers = teachers_of(report)
    compressed = " and ".join(escape(str(teacher["source"])) for teacher in teachers)
    body = "\n\n".join(
        [
            f"# {escape(report['name'])}",
            f"A model for {presentation.kind(report)}, compressed from the teacher{'s' * (len(teachers) > 1)} {compressed} by Pocketformers. "
            + escape(conclusion(report, presentation), None),
            "## How to use it",
            usage or _usage_section(report, presentation),
            "## Results",
            *sections(report, presentation, "How it was made", listed=5),
            "## Limitations",
            _limitations_section(report, presentation),
            "## Licence",
            _license_section(report),
        ]
    )
    return str(ModelCard(f"---\n{_front_matter(report, presentation)}\n---\n\n{body}\n"))


def _front_matter(report: dict[str, Any], presentation: Presentation) -> str:
    """What the Hub reads of a model: its licence, where it comes from, and its results, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    shipped, dataset, teachers = stage_of(report, report["shipped"]), report["dataset"], teachers_of(report)
    licenses = list(dict.fromkeys(one for teacher in teachers for one in _licenses(teacher)))
    on_hub = [teacher["hub_id"] for teacher in teachers if teacher["hub_id"]]
    names, task = {stage["name"] for stage in report["stages"]}, presentation.hub_task or report["task"]
    possible = {"student": "distillation", "pruned": "pruning", "quantized": _bits(report)}
    data = ModelCardData(
        license=None if None in licenses else _one_or_list(licenses),
        library_name=library_of(report, presentation),
        base_model=_one_or_list(on_hub),
        datasets=[dataset["hub_id"]] if dataset["hub_id"] else None,
        metrics=list(presentation.hub_metrics.values()),
        pipeline_tag=task,
        tags=["pocketformers", shipped["format"], *(tag for stage, tag in possible.items() if tag and stage in names)],
        model_name=report["name"],
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=dataset["hub_id"] or "local",
                dataset_name=dataset["source"] or "local data",
                dataset_config=dataset["config"],
                dataset_split="test",
                metric_type=hub_metric,
                metric_name=f"{metric.replace('_', ' ')} of {shipped['path']}",
                metric_value=round(shipped["metrics"][metric], 4),
            )
            for metric, hub_metric in presentation.hub_metrics.items()
            if shipped["metrics"].get(metric) is not None
        ],
    )
    return str(data.to_yaml())


def _usage_section(report: dict[str, Any], presentation: Presentation) -> str:
    shipped = stage_of(report, report["shipped"])
    own = [stage for stage in report["stages"] if stage["name"] not in BASELINES]
    opened = [stage for stage in own if stage["format"] == "transformers"][-1]
    parts = [
        f"In a copy of this directory, with {presentation.hub_library}:",
        python_code(report, presentation, opened["path"]),
    ]
    if opened["name"] == "pruned":
        parts.append(
            "The pruned weights are stored as zeros, so that stock transformers opens the directory. The ONNX files do not have them, "
            "and they were removed in memory for the timing below."
        )
    if shipped["format"] == "onnx":
        parts += [
            "The shipped model, with ONNX Runtime and without torch:",
            fence(presentation.in_onnx_runtime(report, shipped["path"]), "python"),
        ]
    parts.append(versions_section(report))
    return "\n\n".join(filter(None, parts))


def of_another_kind(report: dict[str, Any]) -> bool:
    """Whether the student is of a class that transformers does not have."""
    return report.get("student_kind") is not None


def library_of(report: dict[str, Any], presentation: Presentation) -> str | None:
    """What opens the model; None for a student of a class that transformers does not have."""
    library = presentation.hub_library
    return None if of_another_kind(report) and library == "transformers" else library


def python_code(report: dict[str, Any], presentation: Presentation, model: str) -> str:
    """The code that predicts with the model's library and a model directory, or published model."""
    code = textwrap.dedent(presentation.in_python(report, model)).strip()
    if library_of(report, presentation):
        return fence(code, "python")
    return fence(f"import pipelines.models.small  # of Pocketformers\n{code}", "python") + (
        "\n\nThe first line brings the model's class, which transformers does not have. The ONNX files need neither of the two."
    )


def versions_section(report: dict[str, Any], published: Mapping[str, str] | None = None) -> str:
    """The oldest versions of other tools that run each graph; `published` are the names that files of the run have elsewhere."""
    lines = []
    for stage in report["stages"]:
        own = stage["name"] not in BASELINES or stage["name"] == report.get("shipped")
        for file, needs in stage.get("needs", {}).items() if own else ():
            path = f"{stage['path']}/{file}"
            versions = " or ".join(f"{tool} {version}" for tool, version in needs.items() if version)
            lines.append(f"- `{(published or {}).get(path, path)}`: {versions}, or newer")
    return "\n".join(["What runs the graphs:\n", *lines]) if lines else ""


def _bits(report: dict[str, Any]) -> str | None:
    """What the shipped model's weights are, where they are quantized."""
    return next((bits for bits in ("int4", "int8") if bits in (report["quantization"] or "")), None)


def _limitations_section(report: dict[str, Any], presentation: Presentation) -> str:
    points = [
        f"The scores are those of {'the first seed' if report.get('seeds') else 'one run with one seed'} on {tested_on(report, presentation)} from the same source as the training data. "
        "Expect lower quality on other data.",
        *presentation.limitations,
        "Times and memory were measured on the machine above. Another CPU can rank the stages differently: measure on your own.",
    ]
    if report["quantization"] in DYNAMIC:
        points.append(
            "Dynamic quantization uses one scale for a whole batch of activations. A close decision can therefore depend on the other "
            "inputs of the batch, and on the CPU."
        )
    return "\n".join(f"- {point}" for point in points)


def teachers_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is said of each teacher: source, hub_id, license."""
    return [report["teacher"], *report.get("more_teachers", [])]


def _licenses(teacher: dict[str, Any]) -> list[Any]:
    """The licences of a teacher, of which a card may name several; None stands for one that was not stated."""
    found = teacher["license"]
    return found if isinstance(found, list) else [found]


def _one_or_list(values: list[str]) -> Any:
    """As the front matter of a card has it."""
    return values if len(values) > 1 else next(iter(values), None)


def _license_section(report: dict[str, Any]) -> str:
    """The licence of every teacher, or that it was not stated."""
    sentences = []
    for teacher in teachers_of(report):
        source = escape(str(teacher["source"]))
        if teacher["license"]:
            named = escape(", ".join(_licenses(teacher)))
            sentences.append(f"The licence of the teacher {source}, {named}, applies to this model too.")
        else:
            sentences.append(
                f"The licence of the teacher ({source}) applies to this model. It was not stated where the teacher was loaded from. Look it up "
                "before you use or publish this model."
            )
    return " ".join([*sentences, "The licence of the data applies, too: check it."])
