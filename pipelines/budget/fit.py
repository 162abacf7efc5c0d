"""Compress to a budget: what a user can afford enters, the model that meets it leaves. `pocketformers fit` and `take` are told here."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.budget.choice import Row, choose, front, nearest, rank, sought
from pipelines.budget.latency import graphs_of, identity, read_profile, solve, time_graphs, time_rows, write_graphs
from pipelines.budget.search import (
    Search,
    baseline_rows,
    planned,
    predicted,
    settings_of,
    train_candidates,
    train_on_labels_alone,
    weighed,
)
from pipelines.budget.shapes import (
    Forecast,
    candidates_of,
    forecast_bytes,
    grid,
    schemes_of,
    shapes_of_students,
    vocabularies_of,
)
from pipelines.budget.table import cells, draw_front, format_rows
from pipelines.budget.words import Budget, exclusions, impossible
from pipelines.chain import finish, make_baselines, plan, teach
from pipelines.core.config import (
    RepeatConfig,
    Settings,
    StudentConfig,
    TeacherConfig,
    TransferConfig,
)
from pipelines.core.disk import as_json, write_json, write_whole
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.records import read_record
from pipelines.core.run import Run
from pipelines.core.task import Task, TransferSet
from pipelines.onnx.export import export_onnx
from pipelines.report.pages import TEACHER, TEACHER_QUANTIZED
from pipelines.report.results import LABELS_ONLY, STAGES, finished_stages
from pipelines.tasks import make_task

FRONT = "front.json"
# So many trainings without --time.
MOST_TRAININGS = 4
# What is chosen here. The YAML of a chain may say it.
CHOSEN = tuple(field.name for field in fields(StudentConfig) if field.name != "student_vocabulary")
CHOSEN += ("prune_heads", "prune_ffn")
# The stages of a candidate, which become those of the run.
OF_CANDIDATE = STAGES[STAGES.index("student") : STAGES.index(TEACHER_QUANTIZED)]


def fit(settings: Settings) -> None:
    """The smallest effort first: a forecast, then as few trainings as decide. Every stage is kept, so a killed search goes on."""
    if not settings.fit.train:
        if settings.fit.students:
            raise InputError(
                "expected no --students with --train false, which trains none, found some. Leave one of the two out."
            )
        settings = without_training(settings)
    budget = settings.fit.budget
    if settings.fit.seconds is not None and not settings.distill.needs_stored_targets:
        raise InputError(
            "expected stored soft targets with --time, which trainings are timed by, found none. Leave --time, or --soft_targets and --train, "
            "out."
        )
    settings.repeat = RepeatConfig()
    task = make_task(settings)
    with Run(settings.training.output_dir, task, settings.training.seed) as run:
        if given := [f"--{name} {settings.given[name]}" for name in CHOSEN if name in settings.given]:
            run.state.print(f"fit chooses what these say, so they are not used: {', '.join(given)}")
        settings.student = StudentConfig(student_vocabulary=settings.student.student_vocabulary)

        # 1. A model with a head for these labels is a teacher already.
        settings.teacher = teacher_of(run, settings)

        # 2. What every shape will cost, before anything is trained. A budget that none can meet ends here.
        transfer = task.transfer_set(settings.transfer)
        forecasts = forecast(run, settings, transfer)
        feasible = [one for one in forecasts if not budget.broken(**one.costs)]
        candidates = candidates_of(feasible, forecasts[0], budget, most_candidates(settings)) if feasible else []
        run.state.print(f"forecast: {exclusions([one.costs for one in forecasts], budget, len(candidates))}")
        if not candidates:
            raise InputError(impossible({one.shape.name: one.costs for one in forecasts}, budget))
        forms = {
            one.shape.model: [other for other in feasible if other.shape.model == one.shape.model] for one in candidates
        }
        run.state.print(format_rows([planned(one) for of_model in forms.values() for one in of_model], budget))
        if settings.fit.forecast:
            return
        without_bundle = None
        for shape in {one.shape.student: one.shape for one in candidates}.values():
            without_bundle = plan(run, task, settings_of(settings, shape), transfer)[1] or without_bundle

        # 3. The teacher and its soft targets serve all candidates, and so do the baselines.
        teach(run, settings, transfer)
        run.stage("teacher_onnx", export_onnx, "teacher")
        make_baselines(run, settings, max(forms[candidates[0].shape.model], key=lambda one: one.bytes).shape.scheme)
        reference = predicted(run, settings, TEACHER) if run.state.is_main_process else None

        # 4. The candidates, each with a chain of its own.
        search = Search(run, settings, forecasts[0], forms, transfer, reference)
        rows = train_candidates(search, candidates) + baseline_rows(search)

        # 5. All are timed together, and the choice is made on the validation split.
        rows = judge(run, settings, rows)
        chosen = choose(rows, budget, task.greater_is_better)
        write_front(run, settings, rows, chosen)
        answer = chosen["answer"]
        if answer is None:
            raise VerificationError(
                f"expected a model inside the budget, found none of {len(rows)}. The nearest: {'; '.join(_nearly(row, budget) for row in nearest(rows))}. "
                f"All rows are in {run.directory / FRONT}; 'pocketformers take {run.directory} ROW' ships one of them. More --time, more "
                "--num_train_epochs or a looser bound may help."
            )
        if answer["kind"] != "candidate":
            asked = {"knee": "the knee of the front"}.get(sought(budget), f"the {sought(budget)} inside the budget")
            run.state.print(f"answer: {answer['name']}, which needs no student, is {asked}")

        # 6. The answer becomes the run's own model; an estimator is no bundle, so the best model beside it is bundled. Its training on labels
        # alone says what the teacher brought.
        if answer["kind"] == "estimator":
            models_alone = [row for row in rows if row["kind"] != "estimator"]
            answer = choose(models_alone, budget, task.greater_is_better)["answer"]
        if answer is not None and answer["kind"] == "candidate" and settings.report.label_baseline:
            train_on_labels_alone(search, answer, candidates)
        ship(run, settings, answer, without_bundle)


def teacher_of(run: Run, settings: Settings) -> TeacherConfig:
    """The teacher's settings, without a training where it knows the task already."""
    teacher, trained = settings.teacher, settings.fit.fine_tune
    models: Any = [teacher.teacher_model, *teacher.more_teachers]
    if trained is None and not teacher.teacher_from_scratch and teacher.teacher_epochs:
        trained = not _know_the_task(run.task, models)
    if not settings.fit.train and (trained or teacher.teacher_from_scratch):
        raise InputError(
            f"expected a teacher with a head for the labels of the data with --train false, found {teacher.teacher_model}. Leave --train out, "
            "or fine-tune it first (pocketformers fine-tune)."
        )
    if trained is not False:
        return teacher
    run.state.print("teacher: used as it is; --fine_tune true trains it first")
    known = copy.copy(teacher)
    known.teacher_epochs = 0.0
    return known


def _know_the_task(task: Task, models: list[str]) -> bool:
    try:
        for model in models:
            task.load_model(model, head="required")
    except InputError:
        return False
    return True


def take(settings: Settings, number: int) -> None:
    """Ship another row of a finished search: its bundle and its report, without training."""
    directory = Path(settings.training.output_dir)
    row = next((row for row in read_front(directory)["rows"] if row["number"] == number), None)
    if row is None or row["kind"] == "estimator":
        raise InputError(
            f"expected the number of a row of {directory / FRONT} that is a model, found {number}"
            + ("." if row is None else f", the estimator {row['name']}, which is in {directory / row['path']}.")
        )
    settings.repeat = RepeatConfig()
    task = make_task(settings)
    with Run(directory, task, settings.training.seed) as run:
        run.stages = [name for name in finished_stages(run) if name not in OF_CANDIDATE]
        ship(run, settings, row, task.bundle_obstacle(str(run.directory / "teacher")))


def read_front(directory: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((directory / FRONT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"expected the directory of a search that 'pocketformers fit' ended, found no {FRONT} in {directory} ({error})."
        ) from error
    return found


def ship(run: Run, settings: Settings, row: Row | None, without_bundle: str | None) -> None:
    """Make a row's stages the run's own, bundle the model, and write the report: only here is the test split read."""
    stage = run.directory / (row or {}).get("path", "")
    folders = stage.parents[1::-1] if row is not None and row["kind"] == "candidate" else []
    made = {folder: [name for name in OF_CANDIDATE if _belongs(folder, name)] for folder in folders}
    if run.state.is_main_process:
        for name in {*OF_CANDIDATE}.difference(*made.values()):
            shutil.rmtree(run.directory / name, ignore_errors=True)
    for folder, names in made.items():
        run.adopt(folder, names)
    finish(run, settings, "fit", stage.name, without_bundle if row is not None else "no model meets the budget")


def _belongs(folder: Path, name: str) -> bool:
    """Whether a stage is there, and not what an earlier search with other steps left."""
    record, student = read_record(folder / name), read_record(folder / "student")
    if name != LABELS_ONLY or record is None or student is None:
        return record is not None
    return bool(record["made_by"]["training"] == student["made_by"]["training"])


def forecast(run: Run, settings: Settings, transfer: TransferSet | None) -> list[Forecast]:
    """The forecast of every shape, the teacher's own first."""
    task, source = run.task, settings.teacher.teacher_model
    config, schemes = task.load_config(source), schemes_of(task, settings.quantize)
    vocabularies = vocabularies_of(source, settings.student, task, transfer)
    others = shapes_of_students(settings.fit.students, task, schemes[0])
    shapes = [*grid(config, schemes, vocabularies, settings.fit.train), *others]
    timed = [*graphs_of(config, schemes), *others]
    making: dict[str, Any] = {"shapes": timed, "quantize": settings.quantize}
    if settings.fit.forecast:
        folder = run.stage("untrained", write_graphs, source, **making)
        run.state.print(
            f"untrained graphs: copy {folder} to the device, and there run: python {folder.name}/infer.py --profile {folder.name} > device.json"
        )
    if settings.fit.on is None:
        run.stage("latency", time_graphs, source, report=settings.report, **making)
        ms = run.record("latency")["details"]["ms"]
    else:
        ms, machine = read_profile(settings.fit.on, identity(source, timed, task, settings.quantize))
        run.state.print(f"forecast: milliseconds of {machine['cpu']} on {machine['threads']} threads")
    every = forecast_bytes([*shapes, *timed], source, task, settings.quantize.block_size, {None: None, **vocabularies})
    found, known = every[: len(shapes)], list(zip(every[len(shapes) :], ms, strict=True))
    times = {one.shape: time for one, time in known if one.shape.student is not None}
    table = {}
    for scheme in schemes:
        of_scheme = [(one, time) for one, time in known if one.shape.scheme == scheme and one.shape not in times]
        table[scheme] = solve(*zip(*of_scheme, strict=True))
    return [replace(one, ms=times.get(one.shape) or table[one.shape.scheme](one)) for one in found]


def most_candidates(settings: Settings) -> int:
    """How many candidates there are: for the fastest as many as MOST_TRAININGS can tell apart, else MOST_TRAININGS, with --time twice as many."""
    if sought(settings.fit.budget) == "fastest":
        return 2**MOST_TRAININGS - 1
    return MOST_TRAININGS if settings.fit.seconds is None else 2 * MOST_TRAININGS


def without_training(settings: Settings) -> Settings:
    """The settings by which students are copies of the teacher and nothing recovers. What is cut is chosen by the labels: a copy loses nothing
    of its teacher yet, so there is no slope."""
    own = copy.copy(settings)
    own.teacher, own.transfer = copy.copy(settings.teacher), TransferConfig()
    own.teacher.more_teachers = []
    own.distill, own.prune = settings.distill.labels_only(), replace(settings.prune, prune_epochs=0.0)
    own.training = copy.copy(settings.training)
    own.training.num_train_epochs, own.training.max_steps = 0.0, -1
    return own


def judge(run: Run, settings: Settings, rows: list[Row]) -> list[Row]:
    """The rows with their measured milliseconds, the bounds that they break, and their numbers: the best score first.

    On another device (--on) a candidate takes what its table says, since only untrained graphs were there; all else is as much slower than
    here as the candidates are.
    """
    source = settings.teacher.teacher_model
    places = [run.directory / row["path"] for row in rows]
    making: dict[str, Any] = {"report": settings.report, "quantize": settings.quantize, "shapes": []}
    if settings.fit.on is None:
        # Two of those that were timed for the forecast, of the fewest layers and of the most: to export one takes its time.
        making["shapes"] = graphs_of(run.task.load_config(source), schemes_of(run.task, settings.quantize)[:1])[:2]
    run.stage("timings", time_rows, source, directories=places, **making)
    here = run.record("timings")["details"]["ms"]
    known = [row["forecast"]["ms"] / ms for row, ms in zip(rows, here, strict=True) if "forecast" in row]
    slower = 1.0 if settings.fit.on is None else float(np.median(known))
    judged = []
    for row, ms in zip(rows, here, strict=True):
        there = row["forecast"]["ms"] if settings.fit.on is not None and "forecast" in row else ms * slower
        judged.append(weighed(run, settings, row | {"ms": there, "ms_here": ms}))
    judged.sort(key=lambda row: (-rank(row["score"], run.task.greater_is_better), row["bytes"], row["name"]))
    return [{"number": number, **row} for number, row in enumerate(judged, start=1)]


def write_front(run: Run, settings: Settings, rows: Sequence[Row], chosen: dict[str, Row | None]) -> None:
    """front.json, front.png, and the table with what was chosen and how far the forecast was off."""
    if not run.state.is_main_process:
        return
    task, budget = run.task, settings.fit.budget
    teacher = run.record("teacher")["metrics"]["validation"][task.primary_metric]
    known = [row for row in rows if "forecast" in row]
    slower = slower_than_then(run)
    off = {
        name: float(np.median([abs(row["forecast"][name] * factor / row[name] - 1) for row in known]))
        for name, factor in (("bytes", 1.0), ("ms", slower or 1.0))
    }
    found = {
        "task": task.name,
        "flags": settings.given,
        "primary_metric": task.primary_metric,
        "teacher": teacher,
        "budget": asdict(budget),
        **{name: row and row["number"] for name, row in chosen.items()},
        "front": [row["number"] for row in front(rows, task.greater_is_better)],
        "forecast_off_by": off,
        "machine_slower_than_for_the_forecast": slower,
        "rows": rows,
    }
    plot = io.BytesIO()
    draw_front(rows, budget, task.primary_metric, teacher, chosen["answer"]).savefig(plot, format="png")
    write_whole(run.directory / "front.png", plot.getvalue())
    write_json(run.directory / FRONT, as_json(found))
    print(format_rows(rows, budget))
    times = "" if slower is None else f" and {off['ms']:.0%} in milliseconds"  # on a device only the forecast is known
    print(f"forecast: off by {off['bytes']:.1%} in bytes{times}, median of {len(known)} rows")
    if slower is not None:
        print(
            f"forecast: the untrained graphs, timed again, take {slower:.2f} times what they took before; this is not counted as an error of the "
            "forecast"
        )
    said = ", ".join(f"{name} {row['number']} ({row['name']})" for name, row in chosen.items() if row is not None)
    print(f"inside the budget: {said or 'none'}; the teacher's {task.primary_metric} is {teacher:.4f}", flush=True)


def slower_than_then(run: Run) -> float | None:
    """How many times what they took for the forecast its untrained graphs take now: the median of their ratios; None where they are timed on
    a device."""
    now = run.record("timings")["details"]["graphs"]
    return float(np.median(np.divide(now, run.record("latency")["details"]["ms"][: len(now)]))) if now else None


def _nearly(row: Row, budget: Budget) -> str:
    shown = cells(row, budget)
    return f"row {shown['row']}, {row['name']} ({shown['MB']} MB, {shown['ms']} ms, {row['drop']:.2g} below the teacher; {shown['budget']})"
