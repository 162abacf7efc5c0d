"""Compress to a budget: what a user can afford enters, the model that meets it leaves. `pocketformers fit` and `take` are told here."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.budget.choice import Row, choose, evenly, front, nearest, rank, rounds_of, sought
from pipelines.budget.latency import graphs_of, identity, read_profile, solve, time_graphs, write_graphs
from pipelines.budget.shapes import (
    Forecast,
    Shape,
    candidates_of,
    forecast_bytes,
    grid,
    is_copy,
    schemes_of,
    shapes_of_students,
    vocabularies_of,
)
from pipelines.budget.table import cells, draw_front, format_rows, live_table
from pipelines.budget.words import Budget, drop_of, exclusions, impossible
from pipelines.chain import finish, make_baselines, make_quantized, make_small, plan, teach
from pipelines.core.config import RepeatConfig, ReportConfig, Settings, StudentConfig, TransferConfig
from pipelines.core.disk import write_json, write_whole
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.records import Outcome, read_record
from pipelines.core.run import Run
from pipelines.core.task import StageResult, Task, TransferSet
from pipelines.onnx.export import export_onnx
from pipelines.report.bootstrap import paired_bootstrap
from pipelines.report.pages import TEACHER, TEACHER_QUANTIZED
from pipelines.report.results import LABELS_ONLY, STAGES, finished_stages, score_stage, time_stages
from pipelines.tasks import make_task

FRONT = "front.json"
# So many trainings without --time.
MOST_TRAININGS = 4
# What is chosen here. The YAML of a chain may say it.
CHOSEN = tuple(field.name for field in fields(StudentConfig) if field.name != "student_vocabulary")
CHOSEN += ("prune_heads", "prune_ffn")
# The stages of a candidate, which become those of the run.
OF_CANDIDATE = STAGES[STAGES.index("student") : STAGES.index(TEACHER_QUANTIZED)]
# Seconds that a step of training takes for each of a prediction: forward and backward.
TRAINING_STEP = 3


def fit(settings: Settings) -> None:
    """The smallest effort first: a forecast, then as few trainings as decide. Every stage is kept, so a killed search goes on."""
    if not settings.fit.train:
        if settings.fit.students:
            raise InputError(
                "expected no --students with --train false, which trains none, found some. Leave one of the two out."
            )
        settings = without_training(settings)
    budget, teacher = settings.fit.budget, settings.teacher
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
        models: Any = [teacher.teacher_model, *teacher.more_teachers]
        trained = settings.fit.fine_tune
        if trained is None and not teacher.teacher_from_scratch and teacher.teacher_epochs:
            trained = not _know_the_task(task, models)
        if not settings.fit.train and (trained or teacher.teacher_from_scratch):
            raise InputError(
                f"expected a teacher with a head for the labels of the data with --train false, found {teacher.teacher_model}. Leave --train out, "
                "or fine-tune it first (pocketformers fine-tune)."
            )
        if trained is False:
            settings.teacher = copy.copy(teacher)
            settings.teacher.teacher_epochs = 0.0
            run.state.print("teacher: used as it is; --fine_tune true trains it first")

        # 2. What every shape will cost, before anything is trained. A budget that none can meet ends here.
        transfer = task.transfer_set(settings.transfer)
        forecasts = forecast(run, settings, transfer)
        feasible = [one for one in forecasts if not budget.broken(**one.costs)]
        candidates = candidates_of(feasible, forecasts[0], budget, most_candidates(settings)) if feasible else []
        run.state.print(f"forecast: {exclusions([one.costs for one in forecasts], budget, len(candidates))}")
        if not candidates:
            raise InputError(impossible({one.shape.name: one.costs for one in forecasts}, budget))
        schemes = {
            one.shape.model: [other for other in feasible if other.shape.model == one.shape.model] for one in candidates
        }
        run.state.print(format_rows([planned(one) for forms in schemes.values() for one in forms], budget))
        if settings.fit.forecast:
            return
        without_bundle = None
        for shape in {one.shape.student: one.shape for one in candidates}.values():
            without_bundle = plan(run, task, settings_of(settings, shape), transfer)[1] or without_bundle

        # 3. The teacher and its soft targets serve all candidates, and so do the baselines.
        teach(run, settings, transfer)
        run.stage("teacher_onnx", export_onnx, "teacher")
        make_baselines(run, settings, max(schemes[candidates[0].shape.model], key=lambda one: one.bytes).shape.scheme)
        reference = predicted(run, settings, TEACHER) if run.state.is_main_process else None

        # 4. The candidates, each with a chain of its own.
        rows = train_candidates(run, settings, candidates, schemes, forecasts[0], transfer, reference)
        rows += baseline_rows(run, settings, reference)

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
            train_on_labels_alone(run, settings, answer, candidates, transfer)
        ship(run, settings, answer, without_bundle)


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


def knows_all(settings: Settings, one: Forecast, whole: Forecast) -> bool:
    """Whether a candidate has nothing to learn: it is a copy of its only teacher."""
    return is_copy(one, whole) and not settings.teacher.more_teachers


def settings_of(settings: Settings, shape: Shape, share: float = 1.0) -> Settings:
    """The settings of the chain that makes a shape, with a share of the training, and nothing beside it."""
    own = copy.copy(settings)
    own.report = replace(settings.report, label_baseline=False)
    if shape.student is None:
        own.student = replace(settings.student, student_layers=str(shape.layers), student_vocabulary=shape.vocabulary)
    else:
        own.student = StudentConfig(student_model=shape.student)
    epochs = settings.prune.prune_epochs * share
    own.prune = replace(settings.prune, prune_heads=1 - shape.heads, prune_ffn=1 - shape.neurons, prune_epochs=epochs)
    if settings.quantize.quantization == "none":
        own.quantize = replace(settings.quantize, quantization="fp32")
    own.training = copy.copy(settings.training)
    own.training.num_train_epochs *= share
    if own.training.max_steps > 0:
        own.training.max_steps = max(1, round(own.training.max_steps * share)) if share else -1
    return own


def train_candidates(
    run: Run,
    settings: Settings,
    candidates: Sequence[Forecast],
    schemes: Mapping[str, Sequence[Forecast]],
    whole: Forecast,
    transfer: TransferSet | None,
    reference: StageResult | None,
) -> list[Row]:
    """The rows of the candidates in all their `schemes`, each from the last round that it came to, in a folder of its own in candidates/."""
    task, rows, asked = run.task, dict[str, Row](), sought(settings.fit.budget)
    copies = [one for one in candidates if knows_all(settings, one, whole)]
    # Another checkpoint is no step between two shapes of the teacher, so it is tried in any case.
    apart = [one for one in candidates if one.shape.student is not None and asked == "fastest"]
    searched = [one for one in candidates if one not in (*copies, *apart)]
    rounds = rounds_of(*_seconds(run, settings, searched, apart, schemes, whole), asked)
    if settings.fit.train and searched and (asked == "fastest" or rounds != [(len(searched), 1.0)]):
        said = ", then ".join(f"{count} with {share:.0%} of the training" for count, share in rounds)
        within = f", to end within --time {settings.fit.time}" if settings.fit.time else ""
        run.state.print(f"search: {said}{within}")
    with live_table(settings.fit.budget, run.state.is_main_process) as show:

        def train(folder: str, own: Settings, forms: Mapping[str, Row]) -> list[Row]:
            inside, found = run.inside(folder), []
            small = make_small(inside, own, own.prune, transfer)
            for scheme, row in forms.items():
                path = f"{folder}/{scheme}/{make_quantized(inside.inside(scheme), own, small, scheme)}"
                rows.pop(row["name"], None)
                rows[row["name"]] = made(run, settings, path, row, reference)
                found.append(rows[row["name"]])
                show(list(rows.values()))
            return found

        def train_share(one: Forecast, share: float, parent: str = "candidates") -> list[Row]:
            forms = {
                form.shape.scheme: planned(form) | {"share_of_training": share} for form in schemes[one.shape.model]
            }
            return train(f"{parent}/{one.shape.model}", settings_of(settings, one.shape, share), forms)

        def best(found: list[Row]) -> float:
            return max(rank(row["score"], task.greater_is_better) for row in found)

        [*earlier, (count, share)] = rounds
        for one in copies:
            train_share(one, 0.0)
        for one in apart:
            train_share(one, share)
        if asked == "fastest":
            # What is slower than one that is good enough need not be tried, nor what is faster than one that is not.
            left = evenly(searched, 2**count - 1)
            while left:
                middle = len(left) // 2
                found = choose(train_share(left[middle], share), settings.fit.budget, task.greater_is_better)
                left = left[:middle] if found["answer"] is None else left[middle + 1 :]
        else:
            alive = evenly(searched, rounds[0][0])
            for place, (_, less) in enumerate(earlier, start=1):
                scores = {one: best(train_share(one, less, f"candidates/round_{place}")) for one in alive}
                alive = sorted(alive, key=lambda one: -scores[one])[: rounds[place][0]]
            for one in alive:
                train_share(one, share)
        # A student without a transformer costs little to try.
        if settings.report.baselines and settings.fit.train and "static" in task.student_kinds:
            own = settings_of(settings, replace(whole.shape, vocabulary=candidates[0].shape.vocabulary))
            own.student = replace(own.student, student_model="static")
            train("candidates/static", own, {whole.shape.scheme: {"name": "static", "kind": "candidate"}})
    return list(rows.values())


def train_on_labels_alone(
    run: Run, settings: Settings, row: Row, candidates: Sequence[Forecast], transfer: TransferSet | None
) -> None:
    """The same student and the same steps as in a candidate's row, without the teacher, in the candidate's folder."""
    folder = Path(row["path"]).parents[1]
    for one in candidates:
        if folder.name == one.shape.model and row["share_of_training"]:
            own = settings_of(settings, one.shape, row["share_of_training"])
            own.report = settings.report
            make_small(run.inside(str(folder)), own, own.prune, transfer)


def _seconds(
    run: Run,
    settings: Settings,
    searched: Sequence[Forecast],
    apart: Sequence[Forecast],
    schemes: Mapping[str, Sequence[Forecast]],
    whole: Forecast,
) -> tuple[list[float], float, float | None]:
    """The seconds of each whole training of those `searched`, those that each takes besides, and the time that these and those `apart` leave:
    of records alone, so that a killed search comes to the same rounds."""
    if settings.fit.seconds is None:
        return [0.0] * len(searched), 0.0, None
    spent = {name: run.record(name)["seconds"] for name in run.stages}
    training, prune = settings.training, settings.prune
    # What the teacher needs for the examples of an epoch, and a student as much less as it is faster.
    epoch = labelled = spent["soft_targets"] / max(1, settings.distill.augmented_views)
    if "transfer_soft_targets" in spent:
        ratio = settings.transfer.transfer_ratio
        every = spent["transfer_soft_targets"]
        epoch += every if ratio is None else min(ratio * labelled, every)
    learning = training.num_train_epochs * epoch
    if training.max_steps > 0:
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * run.state.num_processes
        learning = training.max_steps * batch * labelled / len(run.task.splits["train"])
    seconds = []
    for one in [*searched, *apart]:
        recovery = prune.prune_steps * prune.prune_epochs * epoch if one.shape.heads * one.shape.neurons < 1 else 0.0
        seconds.append(TRAINING_STEP * (learning + recovery) * (one.ms or 1.0) / (whole.ms or 1.0))
    # The export of each, and its quantization in every scheme.
    fixed = (1 + max(map(len, schemes.values()))) * spent["teacher_onnx"]
    others = seconds[len(searched) :]
    left = settings.fit.seconds - sum(spent.values()) - sum(others) - fixed * len(others)
    return seconds[: len(searched)], fixed, max(1.0, left)


def planned(one: Forecast) -> Row:
    """The row of a shape before it is trained."""
    of_shape = {"name": one.shape.name, "scheme": one.shape.scheme, "vocabulary": one.vocabulary}
    left = {"layers": one.layers, "heads": one.heads, "neurons": one.neurons}
    return {**of_shape, "kind": "candidate", **left, "forecast": one.costs, **one.costs}


def made(run: Run, settings: Settings, path: str, row: Row, reference: StageResult | None) -> Row:
    """The row of the finished stage in `path`; its milliseconds are a forecast until judge() knows them. The main process, which has the
    teacher's predictions as `reference`, adds the `delta` to it: its lower end is a one-sided 95 % bound, where more is better."""
    record = run.record(path)
    score = record["metrics"]["validation"][run.task.primary_metric]
    row = row | {"path": path, "bytes": record["bytes"], "score": score}
    if reference is not None:
        processor = run.task.load_processor(str(run.directory / TEACHER))
        found = run.task.compare([reference, predicted(run, settings, path)], processor, path, "validation")
        row["delta"] = paired_bootstrap(found.metric, found.samples[path], found.samples[TEACHER], level=0.9)
    return _weighed(run, settings, row)


def predicted(run: Run, settings: Settings, path: str) -> StageResult:
    return score_stage(run, path, settings.training.per_device_eval_batch_size, "validation")


def _weighed(run: Run, settings: Settings, row: Row) -> Row:
    """The row with what it loses of the teacher's score, and the bounds that it breaks."""
    teacher = run.record("teacher")["metrics"]["validation"][run.task.primary_metric]
    drop = drop_of(run.task, teacher, np.nan if row["score"] is None else row["score"])
    return row | {"drop": drop, "breaks": settings.fit.budget.broken(drop, bytes=row["bytes"], ms=row.get("ms"))}


def baseline_rows(run: Run, settings: Settings, reference: StageResult | None) -> list[Row]:
    """What needs no student, in the same table."""
    names = [name for name in (TEACHER_QUANTIZED, *run.task.baselines) if name in run.stages]
    kinds = {name: "teacher" if name == TEACHER_QUANTIZED else "estimator" for name in names}
    return [made(run, settings, name, {"name": name, "kind": kinds[name]}, reference) for name in names]


def time_rows(source: None, directory: Path, task: Task, directories: list[Path], report: ReportConfig) -> Outcome:
    """The median milliseconds of directories, timed together on examples of the validation split."""
    named = {f"{place} {'/'.join(path.parts[-3:])}": path for place, path in enumerate(directories)}
    timings = time_stages(named, task, "validation", report)
    return Outcome("timings", details={"ms": [timings[name]["latency_ms"]["p50"] for name in named]})


def judge(run: Run, settings: Settings, rows: list[Row]) -> list[Row]:
    """The rows with their measured milliseconds, the bounds that they break, and their numbers: the best score first.

    On another device (--on) a candidate takes what its table says, since only untrained graphs were there; all else is as much slower than
    here as the candidates are.
    """
    places = [run.directory / row["path"] for row in rows]
    run.stage("timings", time_rows, None, directories=places, report=settings.report)
    here = run.record("timings")["details"]["ms"]
    known = [row["forecast"]["ms"] / ms for row, ms in zip(rows, here, strict=True) if "forecast" in row]
    slower = 1.0 if settings.fit.on is None else float(np.median(known))
    judged = []
    for row, ms in zip(rows, here, strict=True):
        there = row["forecast"]["ms"] if settings.fit.on is not None and "forecast" in row else ms * slower
        judged.append(_weighed(run, settings, row | {"ms": there, "ms_here": ms}))
    judged.sort(key=lambda row: (-rank(row["score"], run.task.greater_is_better), row["bytes"], row["name"]))
    return [{"number": number, **row} for number, row in enumerate(judged, start=1)]


def write_front(run: Run, settings: Settings, rows: Sequence[Row], chosen: dict[str, Row | None]) -> None:
    """front.json, front.png, and the table with what was chosen and how far the forecast was off."""
    if not run.state.is_main_process:
        return
    task, budget = run.task, settings.fit.budget
    teacher = run.record("teacher")["metrics"]["validation"][task.primary_metric]
    known = [row for row in rows if "forecast" in row]
    off = {
        name: float(np.median([abs(row["forecast"][name] / row[name] - 1) for row in known]))
        for name in ("bytes", "ms")
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
        "rows": rows,
    }
    plot = io.BytesIO()
    draw_front(rows, budget, task.primary_metric, teacher, chosen["answer"]).savefig(plot, format="png")
    write_whole(run.directory / "front.png", plot.getvalue())
    write_json(run.directory / FRONT, json.loads(json.dumps(found, default=str), parse_constant=lambda _: None))
    print(format_rows(rows, budget))
    # On a device only the forecast is known.
    times = f" and {off['ms']:.0%} in milliseconds" if settings.fit.on is None else ""
    print(f"forecast: off by {off['bytes']:.1%} in bytes{times}, median of {len(known)} rows")
    said = ", ".join(f"{name} {row['number']} ({row['name']})" for name, row in chosen.items() if row is not None)
    print(f"inside the budget: {said or 'none'}; the teacher's {task.primary_metric} is {teacher:.4f}", flush=True)


def _nearly(row: Row, budget: Budget) -> str:
    shown = cells(row, budget)
    return f"row {shown['row']}, {row['name']} ({shown['MB']} MB, {shown['ms']} ms, {row['drop']:.2g} below the teacher; {shown['budget']})"


def _know_the_task(task: Task, models: list[str]) -> bool:
    try:
        for model in models:
            task.load_model(model, head="required")
    except InputError:
        return False
    return True
