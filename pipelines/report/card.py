"""The model card of a run: README.md as the Hub reads it, with the results in its front matter."""

from __future__ import annotations

import json
from typing import Any

from pipelines.core.config import DataConfig
from pipelines.report.markdown import bullets, escape, fence, markdown_table
from pipelines.report.pages import (
    BASELINES,
    broken_section,
    conclusion,
    data_section,
    how_measured,
    is_language,
    reproduce_section,
    stage_of,
    table_of,
    tested_on,
)
from pipelines.tasks.text_generation import report as report_language


def format_model_card(report: dict[str, Any], usage: str | None = None) -> str:
    """README.md, a Hub model card: YAML front matter with the results, then what a stranger needs to know.

    `usage` tells how to use the model where it is published; left out, how to use it in this directory.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    shipped = stage_of(report, report["shipped"])
    dataset, teacher = report["dataset"], report["teacher"]
    hub_metrics = {"accuracy": "accuracy", "macro_f1": "f1", "matthews_correlation": "matthews_correlation"}
    if is_language(report):
        hub_metrics = {"perplexity": "perplexity", "next_token_accuracy": "accuracy"}
    names = {stage["name"] for stage in report["stages"]}
    possible = {"student": "distillation", "pruned": "pruning", "quantized": _bits(report)}
    tags = ["pocketformers", shipped["format"], *(tag for stage, tag in possible.items() if tag and stage in names)]
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
    kind = escape(report["task"])
    if not is_language(report):
        names_shown = ", ".join(escape(name, 40) for name in report["label_names"][:20])
        more = f" and {len(report['label_names']) - 20} more" if len(report["label_names"]) > 20 else ""
        kind += f" with {len(report['label_names'])} labels ({names_shown}{more})"
    body = "\n\n".join(
        [
            f"# {escape(report['name'])}",
            f"A model for {kind}, compressed from the teacher {escape(str(teacher['source']))} by Pocketformers. "
            + escape(conclusion(report), None),
            "## How to use it",
            usage or _usage_section(report),
            "## Results",
            markdown_table(*table_of(report)),
            how_measured(report),
            "![Quality against size and against latency](report.png)",
            "## What compression broke",
            broken_section(report, listed=5),
            "## Data",
            data_section(report),
            "## How it was made",
            reproduce_section(report),
            "## Machine and versions",
            bullets(report["environment"]),
            "## Limitations",
            _limitations_section(report),
            "## Licence",
            _license_section(report),
        ]
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _usage_section(report: dict[str, Any]) -> str:
    shipped = stage_of(report, report["shipped"])
    own = [stage for stage in report["stages"] if stage["name"] not in BASELINES]
    opened = [stage for stage in own if stage["format"] == "transformers"][-1]
    config = report["config"]
    if is_language(report):
        return "\n\n".join(report_language.usage(opened, shipped, pruned_note(opened)))
    limit = f"truncation=True, max_length={config.get('max_length', DataConfig.max_length)}"
    is_pair = bool(config.get("text_pair_column"))
    text = '{"text": "A first text.", "text_pair": "A second text."}' if is_pair else '"A text."'
    of_images = report["task"] == "image-classification"
    called_with = '"image.png"' if of_images else f"{text}, {limit}"
    parts = [
        "In a copy of this directory, with transformers:",
        fence(
            "from transformers import pipeline\n\n"
            f"classify = pipeline({json.dumps(report['task'])}, model={json.dumps(opened['path'])})\n"
            f"print(classify({called_with}))",
            "python",
        ),
    ]
    parts += pruned_note(opened)
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
            image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")"""
        code = f"""
            import onnxruntime
            from transformers import {imports}

            session = onnxruntime.InferenceSession({json.dumps(shipped["path"] + "/model.onnx")})
            inputs = {reads}
            logits = session.run(["logits"], {{node.name: inputs[node.name] for node in session.get_inputs()}})[0]
            print(AutoConfig.from_pretrained({path}).id2label[int(logits[0].argmax())])
        """
        parts += [
            "The shipped model, with ONNX Runtime and no torch:",
            fence(image + code if of_images else code, "python"),
        ]
    return "\n\n".join(parts)


def pruned_note(opened: dict[str, Any]) -> list[str]:
    if opened["name"] != "pruned":
        return []
    return [
        "What was pruned is stored as zeros, so that stock transformers opens the directory; the zeros are gone "
        "from the ONNX files, and were removed in memory for the timing below."
    ]


def _bits(report: dict[str, Any]) -> str | None:
    """What the shipped model's weights are, where they are quantized."""
    none = report["quantization"] == "fp32" or report["config"].get("quantization") == "none"
    if report["shipped"] != "quantized" or none:
        return None
    return "int4" if (report["quantization"] or "").startswith("int4") else "int8"


CLASSIFIER_LIMITATIONS = (
    "The model always answers with one of its labels, also where none fits. Its probabilities were not calibrated, "
    "and compression changes them.",
    "It knows what its teacher and its data know: their errors and biases are passed on, and compression can make "
    "them worse for rare classes (see the recall per class).",
)


def _limitations_section(report: dict[str, Any]) -> str:
    points = [
        f"The scores are those of one run with one seed on {tested_on(report)} of the same source "
        "as the training data. Expect less on others; an interval of zero width means that no difference was "
        "seen, not that there is none.",
        *(report_language.LIMITATIONS if is_language(report) else CLASSIFIER_LIMITATIONS),
        "Times and memory are of the machine above; another CPU can rank the stages differently. Measure there.",
    ]
    if _bits(report) and (report["quantization"] or "dynamic").startswith("dynamic"):
        points.append(
            "Dynamic quantization takes one scale for a whole batch of activations, so an answer that is a close call "
            "can depend on what else is in its batch, and it can differ between CPUs."
        )
    return "\n".join(f"- {point}" for point in points)


def _license_section(report: dict[str, Any]) -> str:
    teacher = report["teacher"]
    if teacher["license"]:
        return (
            f"The teacher's licence, {escape(teacher['license'])}, applies to this model too. Mind the data's as well."
        )
    return (
        f"The licence of the teacher ({escape(str(teacher['source']))}) applies to this model. It was not stated "
        "where the teacher was loaded from: look it up, and that of the data, before you use or pass on this model."
    )
