"""What a person reads of a report: the table, the summary for a terminal, report.md, and the sections that the model card shares."""

from __future__ import annotations

from typing import Any

from pipelines.report.markdown import bullets, count, escape, fence, interval, markdown_table, number, spread
from pipelines.tasks.text_generation import report as report_language

TEACHER = "teacher"
# Rows to compare with; what is shipped is never one of them.
BASELINES = ("teacher_onnx", "student_labels_only")


def format_summary(report: dict[str, Any]) -> str:
    """The table for the terminal, and one sentence about the shipped model."""
    header, rows = table_of(report)
    # What a terminal has no room for is in report.md.
    left_out = {"difference (95 %)", "bits per byte", "p95 ms", "x faster than teacher_onnx"}
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
    return "\n".join([*text, "", conclusion(report)])


def format_markdown(report: dict[str, Any]) -> str:
    """report.md: the table, what compression broke, the data, and how to make the run again."""
    return "\n\n".join(
        [
            f"# {escape(report['name'])}: what compression kept and what it broke",
            escape(conclusion(report), None),
            markdown_table(*table_of(report)),
            how_measured(report),
            "![Quality against size and against latency](report.png)",
            "## What compression broke",
            broken_section(report, listed=20),
            "## Data",
            data_section(report),
            "## Made again",
            reproduce_section(report),
            "## Machine and versions",
            bullets(report["environment"]),
        ]
    )


# Parts of the pages


def stage_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    stage: dict[str, Any] = next(stage for stage in report["stages"] if stage["name"] == name)
    return stage


def is_language(report: dict[str, Any]) -> bool:
    return bool(report["task"] == report_language.TASK)


def table_of(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    metric, digits = report["primary_metric"], digits_of(report)
    language = is_language(report)
    has_onnx_teacher = any(stage["name"] == "teacher_onnx" for stage in report["stages"])
    header = ["stage", metric.replace("_", " "), "difference (95 %)"]
    header += ["bits per byte"] * language
    header += ["retained", "agreement", "parameters", "MB"]
    header += ["first token ms"] * language
    header += ["p50 ms", "p95 ms", "tokens/s" if language else "samples/s", "x smaller", "x faster"]
    header += ["x faster than teacher_onnx"] * has_onnx_teacher
    rows = []
    for stage in report["stages"]:
        is_teacher = stage["name"] == TEACHER
        ratios = stage["ratios"]
        cells = {
            "stage": stage["name"],
            metric.replace("_", " "): number(stage["metrics"][metric], f".{digits}f"),
            "difference (95 %)": "" if is_teacher else interval(stage["difference"], digits),
            "retained": number(stage["quality_retained"], ".3f"),
            "agreement": number(stage["agreement"], ".3f"),
            "parameters": count(stage["parameters"]),
            "MB": number(stage["bytes"] / 1e6, ".1f"),
            "p50 ms": number(stage["latency_ms"]["p50"], ".2f" if language else ".1f"),
            "p95 ms": number(stage["latency_ms"]["p95"], ".2f" if language else ".1f"),
            "x smaller": number(ratios["smaller_than_teacher"], ".1f"),
            "x faster": "" if is_teacher else spread(ratios["faster_than_teacher"]),
        }
        cells["tokens/s" if language else "samples/s"] = number(
            stage["samples_per_second"], ",.0f" if stage["samples_per_second"] >= 100 else ".1f"
        )
        if has_onnx_teacher:
            is_itself = stage["name"] == "teacher_onnx"
            cells["x faster than teacher_onnx"] = "" if is_itself else spread(ratios["faster_than_teacher_onnx"])
        if language:
            cells |= report_language.cells(stage)
        rows.append([cells[title] for title in header])
    return header, rows


def digits_of(report: dict[str, Any]) -> int:
    """Decimals that the primary metric is shown with."""
    return report_language.DIGITS if is_language(report) else 3


def tested_on(report: dict[str, Any]) -> str:
    return f"{report['test_examples']:,} test {'documents' if is_language(report) else 'examples'}"


def conclusion(report: dict[str, Any]) -> str:
    """What the shipped model costs and brings, in plain text."""
    shipped, teacher = stage_of(report, report["shipped"]), stage_of(report, TEACHER)
    metric, ratios = report["primary_metric"], shipped["ratios"]
    name, digits = metric.replace("_", " "), digits_of(report)
    if shipped is teacher:
        return f"The teacher's {name} is {teacher['metrics'][metric]:.{digits}f} on {tested_on(report)}."
    faster = f"{ratios['faster_than_teacher']['median']:.1f} times faster than the teacher in torch"
    if ratios["faster_than_teacher_onnx"]:
        faster += f" ({ratios['faster_than_teacher_onnx']['median']:.1f} times faster than the teacher in fp32 ONNX)"
    difference = shipped["difference"]
    if difference["low"] == difference["high"] == 0:
        verdict = "the two are right and wrong on the same examples"
    elif difference["high"] < 0 or difference["low"] > 0:
        verdict = (
            "a gain beyond chance" if (difference["low"] > 0) == report["greater_is_better"] else "a loss beyond chance"
        )
    else:
        verdict = "too small a difference to tell from chance with so many examples"
    return (
        f"The shipped model ({shipped['path']}) is {number(ratios['smaller_than_teacher'], '.1f')} times smaller and "
        f"{faster}. Its {name} is {shipped['metrics'][metric]:.{digits}f} on {tested_on(report)}, the "
        f"teacher's {teacher['metrics'][metric]:.{digits}f}. The difference, with its 95 % interval, is "
        f"{interval(difference, digits)}: {verdict}."
    )


def how_measured(report: dict[str, Any]) -> str:
    teacher = stage_of(report, TEACHER)
    shape = " x ".join(str(size) for size in teacher["latency_ms"]["shape"])
    memory = ", ".join(f"{stage['name']} {stage['peak_memory_bytes'] / 1e6:.0f} MB" for stage in report["stages"])
    threads = f"on {teacher['threads']} threads, every stage in fresh processes in turn"
    if is_language(report):
        scores, times = report_language.how_scored(report), report_language.how_timed(report, threads)
    else:
        scores = (
            "*difference*: score minus the teacher's on the same examples, with a paired bootstrap interval. *retained*: "
            "score over the teacher's. *agreement*: share of examples answered as the teacher answers them."
        )
        times = (
            f"*p50*, *p95*: one call of shape {shape} {threads}; *x faster*: median of the rounds, with the least and the "
            "largest. *samples/s*: over batches of 16 of the test split, texts with others of their length."
        )
    return (
        "Scores are of the test split, which nothing else in the run has read; the ONNX rows are ONNX Runtime's own "
        f"answers. {scores} *MB*: what must be shipped, in millions of bytes. {times} "
        f"Peak memory of the whole process while timed: {memory}."
    )


def broken_section(report: dict[str, Any], listed: int) -> str:
    broken, shipped, teacher = report["broken_examples"], stage_of(report, report["shipped"]), stage_of(report, TEACHER)
    if shipped is teacher:
        return "Nothing was compressed."
    if is_language(report):
        return report_language.broken_section(report, shipped, listed)
    changes = shipped["recall_change_per_class"]
    classes = sorted(changes, key=lambda name: changes[name])
    header = ["class", "test examples", "teacher's recall", f"{shipped['name']}'s recall", "change"]
    rows = [
        [
            name,
            str(report["test_examples_per_class"][name]),
            number(teacher["metrics"]["recall_per_class"][name], ".3f"),
            number(shipped["metrics"]["recall_per_class"][name], ".3f"),
            f"{changes[name]:+.3f}",
        ]
        for name in classes[:20]
    ]
    parts = ["Recall per class, the largest loss first:", markdown_table(header, rows)]
    if len(classes) > 20:
        parts.append(f"The other {len(classes) - 20} classes are in report.json.")
    examples = broken["examples"][:listed]
    parts.append(
        f"Of {report['test_examples']} test examples, the teacher got {broken['total']} right that {shipped['name']} "
        f"gets wrong, and {broken['repaired_total']} wrong that {shipped['name']} gets right."
        + (f" The first {len(examples)}, the most confident mistakes first:" if len(examples) < broken["total"] else "")
    )
    if examples:
        header = [
            "example",
            "image" if report["task"] == "image-classification" else "text",
            "right answer, the teacher's",
            f"{shipped['name']}'s answer",
        ]
        rows = [
            [
                str(example["index"]),
                example["text"],
                f"{example['teacher_answer']} ({example['teacher_probability']:.2f})",
                f"{example['shipped_answer']} ({example['shipped_probability']:.2f})",
            ]
            for example in examples
        ]
        parts.append(markdown_table(header, rows, text_columns=len(header)))
    return "\n\n".join(parts)


def data_section(report: dict[str, Any]) -> str:
    dataset = report["dataset"]
    details = {key: value for key, value in report["data"].items() if key not in ("dataset", "dataset_config")}
    named = ", configuration ".join(escape(part) for part in (dataset["source"], dataset["config"]) if part)
    return f"Data set: {named or 'not named'}.\n\n{bullets(details)}"


def reproduce_section(report: dict[str, Any]) -> str:
    import yaml

    seconds = ", ".join(f"{stage['name']} {stage['seconds']:.0f}" for stage in report["stages"])
    records = (
        f"Seconds that the stages took: {escape(seconds, None)}. In the run, every stage's directory has a record.json with its "
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
        f"and run\n\n{fence(command, 'bash')}\n\n{fence(settings, 'yaml')}\n\n{records}"
    )
