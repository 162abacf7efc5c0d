"""What a person reads of a report: the table, the summary for a terminal, report.md, and the sections that the model card shares."""

from __future__ import annotations

from typing import Any

from pipelines.core.task import Presentation
from pipelines.onnx.measure import carries
from pipelines.report.markdown import (
    count,
    describe_delta,
    escape,
    fence,
    figure,
    interval,
    markdown_table,
    number,
    settings,
    spread,
)
from pipelines.report.seeds import seeds_section, seeds_sentences

TEACHER = "teacher"
# Rows to compare with; what is shipped is never one of them.
TEACHER_QUANTIZED = "teacher_quantized"
LABELS_ONLY = "student_labels_only"
BASELINES = ("teacher_onnx", TEACHER_QUANTIZED, LABELS_ONLY)  # and all estimators of scikit-learn
DELTA, P95, FASTER_THAN_ONNX = "delta (95 %)", "p95 ms", "x faster than teacher_onnx"


def format_summary(report: dict[str, Any], presentation: Presentation) -> str:
    """The table for the terminal, and a few sentences about the shipped model."""
    from pandas import DataFrame

    # What a terminal has no room for is in report.md.
    left_out = [DELTA, P95, FASTER_THAN_ONNX, *presentation.columns(report["stages"][0])]
    table = DataFrame(table_of(report, presentation)).drop(columns=left_out, errors="ignore")
    names = table["stage"].str.len().max()
    table["stage"] = table["stage"].str.ljust(names)
    return f"{table.rename(columns={'stage': 'stage'.ljust(names)}).to_string(index=False)}\n\n{conclusion(report, presentation)}"


def format_markdown(report: dict[str, Any], presentation: Presentation) -> str:
    """report.md: the table, what compression broke, the data, and how to reproduce the run."""
    return "\n\n".join(
        [
            f"# {escape(report['name'])}: what compression kept and what it broke",
            escape(conclusion(report, presentation), None),
            *sections(report, presentation, "How to reproduce", listed=20),
        ]
    )


def sections(report: dict[str, Any], presentation: Presentation, reproduce: str, listed: int) -> list[str]:
    """What report.md and the model card have both; `reproduce` is the title of how to, and so many examples are `listed`."""
    return [
        results_section(report, presentation),
        *seeds_section(report, presentation),
        "## What compression broke",
        losses_section(report, presentation, listed),
        "## Data",
        data_section(report),
        f"## {reproduce}",
        reproduce_section(report),
        "## Machine and versions",
        settings(report["environment"]),
    ]


# Parts of the pages


def stage_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(stage for stage in report["stages"] if stage["name"] == name)


def metric_name(report: dict[str, Any]) -> str:
    return str(report["primary_metric"]).replace("_", " ")


def tested_on(report: dict[str, Any], presentation: Presentation) -> str:
    return f"{report['test_examples']:,} test {presentation.unit}"


def table_of(report: dict[str, Any], presentation: Presentation) -> list[dict[str, str]]:
    """A row for each stage: its cells by their titles, the same ones in each row."""
    digits, latency_digits = presentation.digits, presentation.latency_digits
    rows = []
    for stage in report["stages"]:
        is_teacher, ratios, speed = stage["name"] == TEACHER, stage["ratios"], stage["samples_per_second"]
        row = {
            "stage": stage["name"],
            metric_name(report): number(stage["metrics"][report["primary_metric"]], f".{digits}f"),
            DELTA: "" if is_teacher else interval(stage["delta"], digits),
            "retained": number(stage["quality_retained"], ".3f"),
            "agreement": number(stage["agreement"], ".3f"),
            "parameters": count(stage["parameters"]),
            "MB": figure(stage["bytes"] / 1e6, 1),
            **presentation.columns(stage),
            "p50 ms": figure(stage["latency_ms"]["p50"], latency_digits),
            P95: figure(stage["latency_ms"].get("p95"), latency_digits),
            presentation.speed_unit: number(speed, ",.0f" if speed >= 100 else ".1f"),
            "x smaller": number(ratios["smaller_than_teacher"], ".1f"),
            "x faster": "" if is_teacher else spread(ratios["faster_than_teacher"]),
        }
        if ratios["faster_than_teacher_onnx"]:
            is_itself = stage["name"] == "teacher_onnx"
            row[FASTER_THAN_ONNX] = "" if is_itself else spread(ratios["faster_than_teacher_onnx"])
        rows.append(row)
    return rows


def conclusion(report: dict[str, Any], presentation: Presentation) -> str:
    """What the shipped model costs and brings, and what the teacher did for it, in plain text; first of all whether less would do."""
    shipped, teacher = stage_of(report, report["shipped"]), stage_of(report, TEACHER)
    name, digits = metric_name(report), presentation.digits
    before, after = (number(stage["metrics"][report["primary_metric"]], f".{digits}f") for stage in (teacher, shipped))
    if shipped is teacher:
        return f"The teacher's {name} is {before} on {tested_on(report, presentation)}."
    ratios = shipped["ratios"]
    claim = f"The shipped model ({shipped['path']}) is {number(ratios['smaller_than_teacher'], '.1f')} times smaller"
    if report.get("busy"):  # reports of earlier versions do not have it
        loads = [stage["load"]["during"] for stage in report["stages"] if stage.get("busy")]
        seen = f"others used up to {max(loads):.1f} cores" if loads else "rounds differ by more than a factor of two"
        claim += (
            f". The machine was busy while the stages were timed ({seen}), so nothing is claimed about speed. Time them again, and nothing "
            "else, with: pocketformers report --again --output_dir RUN"
        )
    else:
        claim += f" and {ratios['faster_than_teacher']['median']:.1f} times faster than the teacher in torch"
        if ratios["faster_than_teacher_onnx"]:
            claim += f" ({ratios['faster_than_teacher_onnx']['median']:.1f} times faster than the teacher in fp32 ONNX)"
    sentences = [
        *less_would_do(report, presentation),
        f"{claim}.",
        f"Its {name} is {after} on {tested_on(report, presentation)}, the teacher's {before}.",
        f"The delta is {describe_delta(shipped['delta'], report, presentation)}.",
        *_within_budget(report, teacher),
    ]
    if report.get("seeds"):
        sentences += seeds_sentences(report, presentation)
    elif report["delta_to_labels_only"]:
        delta = describe_delta(report["delta_to_labels_only"], report, presentation)
        sentences.append(f"Against the same student trained on labels only, the student's {name} differs by {delta}.")
    return " ".join(sentences)


def _within_budget(report: dict[str, Any], teacher: dict[str, Any]) -> list[str]:
    """What the test split says of `pocketformers fit --within`: the drop, its one-sided 95 % bound, and whether the data can tell."""
    within, delta = report["config"].get("within"), report.get("delta_90")
    if within is None or delta is None:
        return []
    sign, unit = -100.0, "points"
    if not report["greater_is_better"]:
        sign, unit = 100.0 / teacher["metrics"][report["primary_metric"]], "per cent"
    drop, bound = sign * delta["value"], delta["low" if report["greater_is_better"] else "high"]
    told = f"For --within {within:g}, it is {drop:.2g} {unit} below the teacher"
    if bound is None:
        return [f"{told}; the examples are too few for more, so the data cannot tell whether that holds."]
    verdict = "that holds" if sign * bound <= within else "that does not hold here"
    if drop <= within < sign * bound:
        verdict = "the data cannot tell whether that holds"
    return [f"{told}, with 95 % confidence at most {sign * bound:.2g} (one-sided bound): {verdict}."]


def less_would_do(report: dict[str, Any], presentation: Presentation) -> list[str]:
    """The sentence that names what is as good as the shipped model within the interval, and smaller or faster; none where nothing is.

    An estimator of scikit-learn comes before the quantized teacher, the one with the best score first.
    """
    metric, sign = report["primary_metric"], 1 if report["greater_is_better"] else -1
    others = [stage for stage in report["stages"] if stage["name"] != report["shipped"]]
    rivals = [stage for stage in others if _is_as_good(report, stage) and _is_cheaper(report, stage)]
    if not rivals:
        return []
    rival = min(rivals, key=lambda one: (one["format"] != "sklearn", -sign * one["metrics"][metric], one["bytes"]))
    shipped, name = stage_of(report, report["shipped"]), metric_name(report)
    score, other_score = (number(stage["metrics"][metric], f".{presentation.digits}f") for stage in (rival, shipped))
    size, other_size = (figure(stage["bytes"] / 1e6, 1) for stage in (rival, shipped))
    time, other_time = (figure(stage["latency_ms"]["p50"], presentation.latency_digits) for stage in (rival, shipped))
    if rival["constant"]:
        opening = "The shipped model is no better than the same prediction for every example"
    else:
        needless = "transformer" if rival["format"] == "sklearn" else "student"
        opening = f"You may not need a {needless} here"
    times = "" if report["busy"] else f", and takes {time} ms against {other_time} ms for {presentation.latency_of}"
    return [
        f"{opening}: the {name} of {rival['name']} is {score}, the shipped model's {other_score}, a delta of "
        f"{describe_delta(rival['delta_to_shipped'], report, presentation)}; it has {size} MB against {other_size} MB{times}."
    ]


def _is_as_good(report: dict[str, Any], stage: dict[str, Any]) -> bool:
    """Whether the interval of the delta to the shipped model includes zero or is on the better side; reports of earlier versions have none."""
    delta = stage.get("delta_to_shipped")
    if delta is None or delta["low"] is None:
        return False
    best, value = (delta["high"], delta["value"]) if report["greater_is_better"] else (-delta["low"], -delta["value"])
    # A small test split has wide intervals: the same prediction for every example is as good only where its score is.
    return bool(best >= 0 and (value >= 0 or not stage["constant"]))


def _is_cheaper(report: dict[str, Any], stage: dict[str, Any]) -> bool:
    """Whether it is not larger than the shipped model, or not slower in any round of a quiet machine."""
    ratio = stage["ratios"]["faster_than_shipped"]
    is_faster = not report["busy"] and carries(ratio) and ratio["low"] >= 1
    return is_faster or bool(stage["bytes"] <= stage_of(report, report["shipped"])["bytes"])


def results_section(report: dict[str, Any], presentation: Presentation) -> str:
    """The table, how its figures were measured, and the plot."""
    rows = table_of(report, presentation)
    memory = ", ".join(f"{stage['name']} {stage['peak_memory_bytes'] / 1e6:.0f} MB" for stage in report["stages"])
    threads = report["stages"][0]["threads"]
    on_threads = f"{threads} thread{'s' if threads > 1 else ''}"
    explanation = (
        "The test split was read for this report only. The ONNX rows are the predictions of ONNX Runtime. *delta*: the score minus the "
        f"teacher's, with a paired bootstrap interval over the test {presentation.unit}. {presentation.how_scored(report)} *MB*: the files that "
        f"must be shipped, in millions of bytes. {presentation.how_timed(report)} *x faster*: the ratio of the two p50 in one round, as the "
        f"median of the rounds, with the smallest and the largest; *busy* where these are more than a factor of two apart. All times are on {on_threads}, each stage in a fresh process, the "
        f"stages in turn.{_about_estimators(report)} Peak memory of the whole process while it was timed: {memory}."
    )
    table = markdown_table(list(rows[0]), [list(row.values()) for row in rows])
    return "\n\n".join([table, explanation, "![Quality against size and against latency](report.png)"])


def _about_estimators(report: dict[str, Any]) -> str:
    if all(stage["format"] != "sklearn" for stage in report["stages"]):
        return ""
    return (
        " The last rows are what one would try before a transformer: fitted by scikit-learn on the training split, chosen on the validation "
        "split. Their times include all that is done with a text or with pixels, the others' leave out the tokenizer and the image processor."
    )


def losses_section(report: dict[str, Any], presentation: Presentation, listed: int) -> str:
    shipped = stage_of(report, report["shipped"])
    if shipped["name"] == TEACHER:
        return "Nothing was compressed."
    return presentation.what_was_lost(report, shipped, listed)


def data_section(report: dict[str, Any]) -> str:
    dataset = report["dataset"]
    details = {key: value for key, value in report["data"].items() if key not in ("dataset", "dataset_config")}
    named = ", configuration ".join(escape(part) for part in (dataset["source"], dataset["config"]) if part)
    return f"Data set: {named or 'not named'}.\n\n{settings(details)}"


def reproduce_section(report: dict[str, Any]) -> str:
    seconds = ", ".join(f"{stage['name']} {stage['seconds']:.0f}" for stage in report["stages"])
    records = (
        f"Seconds that the stages took: {escape(seconds, None)}. Each stage's directory has a record.json with its source, settings, "
        "seed, versions and file hashes."
    )
    # Reported by itself, a run may have been put together stage by stage: then only the records know how.
    if report["recipe"] == "report":
        return records
    flags = {flag: value for flag, value in report["config"].items() if flag != "output_dir"}
    verb = "fit" if report["recipe"] == "fit" else "compress"
    command = f"accelerate launch -m pipelines {verb} --task {report['task']} --config run.yaml"
    return (
        "Save these flags as run.yaml (a path that starts with `<local>` was a local file), install Pocketformers, "
        f"and run\n\n{fence(command, 'bash')}\n\n{settings(flags, inline=False)}\n\n{records}"
    )
