"""The trainings of a search: the candidates enter, a row for each form that was made of them leaves, with its score on the validation split."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.budget.choice import Row, choose, evenly, rank, rounds_of, sought
from pipelines.budget.shapes import Forecast, Shape, is_copy
from pipelines.budget.table import live_table
from pipelines.budget.words import drop_of
from pipelines.chain import make_quantized, make_small
from pipelines.core.config import Settings, StudentConfig
from pipelines.core.run import Run
from pipelines.core.task import StageResult, TransferSet
from pipelines.report.bootstrap import paired_bootstrap
from pipelines.report.pages import TEACHER, TEACHER_QUANTIZED
from pipelines.report.results import score_stage

# Seconds that a step of training takes for each of a prediction: forward and backward.
TRAINING_STEP = 3
# Of a static student, which has no layers: what it needs is more than a transformer does, and takes seconds.
STATIC_RATE, STATIC_EPOCHS = 2e-3, 20


@dataclass(frozen=True)
class Search:
    """What all trainings have in common: the run of the teacher, and its settings; the forecast of the teacher's own shape (`whole`); for
    each model the forecasts of the `forms` that it is quantized in; the examples without labels; and, in the main process, the
    teacher's predictions of the validation split (`reference`)."""

    run: Run
    settings: Settings
    whole: Forecast
    forms: Mapping[str, Sequence[Forecast]]
    transfer: TransferSet | None
    reference: StageResult | None


def train_candidates(search: Search, candidates: Sequence[Forecast]) -> list[Row]:
    """The rows of the candidates in all their forms, each from the last round that it came to, in a folder of its own in candidates/."""
    run, settings, task = search.run, search.settings, search.run.task
    rows, asked = dict[str, Row](), sought(settings.fit.budget)
    copies = [one for one in candidates if knows_all(settings, one, search.whole)]
    # Another checkpoint is no step between two shapes of the teacher, so it is tried in any case.
    apart = [one for one in candidates if one.shape.student is not None and asked == "fastest"]
    searched = [one for one in candidates if one not in (*copies, *apart)]
    rounds = rounds_of(*_seconds(search, searched, apart), asked)
    students = dict[tuple[Shape, float], str]()  # where shapes that differ after pruning alone have theirs
    if settings.fit.train and searched and (asked == "fastest" or rounds != [(len(searched), 1.0)]):
        said = ", then ".join(f"{count} with {share:.0%} of the training" for count, share in rounds)
        within = f", to end within --time {settings.fit.time}" if settings.fit.time else ""
        run.state.print(f"search: {said}{within}")
    with live_table(settings.fit.budget, run.state.is_main_process) as show:

        def train(folder: str, own: Settings, forms: Mapping[str, Row]) -> list[Row]:
            inside, found = run.inside(folder), []
            small = make_small(inside, own, own.prune, search.transfer)
            for scheme, row in forms.items():
                path = f"{folder}/{scheme}/{make_quantized(inside.inside(scheme), own, small, scheme)}"
                rows.pop(row["name"], None)
                rows[row["name"]] = made(search, path, row)
                found.append(rows[row["name"]])
                show(list(rows.values()))
            return found

        def train_share(one: Forecast, share: float, parent: str = "candidates") -> list[Row]:
            forms = {
                form.shape.scheme: planned(form) | {"share_of_training": share}
                for form in search.forms[one.shape.model]
            }
            folder, key = f"{parent}/{one.shape.model}", (one.shape.unpruned, share)
            if key in students:
                run.inside(folder).adopt(run.directory / students[key], ["student"])
            students.setdefault(key, folder)
            return train(folder, settings_of(settings, one.shape, share), forms)

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
            own = settings_of(settings, replace(search.whole.shape, vocabulary=candidates[0].shape.vocabulary))
            own.student = replace(own.student, student_model="static")
            own.training.learning_rate, own.training.num_train_epochs = STATIC_RATE, STATIC_EPOCHS
            train("candidates/static", own, {search.whole.shape.scheme: {"name": "static", "kind": "candidate"}})
    return list(rows.values())


def train_on_labels_alone(search: Search, row: Row, candidates: Sequence[Forecast]) -> None:
    """The same student and the same steps as in a candidate's row, without the teacher, in the candidate's folder."""
    folder = Path(row["path"]).parents[1]
    for one in candidates:
        if folder.name == one.shape.model and row["share_of_training"]:
            own = settings_of(search.settings, one.shape, row["share_of_training"])
            own.report = search.settings.report
            make_small(search.run.inside(str(folder)), own, own.prune, search.transfer)


def baseline_rows(search: Search) -> list[Row]:
    """What needs no student, in the same table."""
    run = search.run
    names = [name for name in (TEACHER_QUANTIZED, *run.task.baselines) if name in run.stages]
    kinds = {name: "teacher" if name == TEACHER_QUANTIZED else "estimator" for name in names}
    return [made(search, name, {"name": name, "kind": kinds[name]}) for name in names]


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


def _seconds(
    search: Search, searched: Sequence[Forecast], apart: Sequence[Forecast]
) -> tuple[list[float], float, float | None]:
    """The seconds of each whole training of those `searched`, those that each takes besides, and the time that these and those `apart` leave:
    of records alone, so that a killed search comes to the same rounds."""
    run, settings, whole = search.run, search.settings, search.whole
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
    seconds, learnt = [], set[Shape]()
    for one in [*searched, *apart]:
        needed = prune.prune_steps * prune.prune_epochs * epoch if one.shape.heads * one.shape.neurons < 1 else 0.0
        # Which ones a search for the fastest will train is not known, so nothing is counted as learnt already.
        if sought(settings.fit.budget) == "fastest" or one.shape.unpruned not in learnt:
            needed += learning
        learnt.add(one.shape.unpruned)
        seconds.append(TRAINING_STEP * needed * (one.ms or 1.0) / (whole.ms or 1.0))
    # The export of each, and its quantization in every scheme.
    fixed = (1 + max(map(len, search.forms.values()))) * spent["teacher_onnx"]
    others = seconds[len(searched) :]
    left = settings.fit.seconds - sum(spent.values()) - sum(others) - fixed * len(others)
    return seconds[: len(searched)], fixed, max(1.0, left)


def planned(one: Forecast) -> Row:
    """The row of a shape before it is trained."""
    shape = one.shape
    model = {"name": shape.name, "kind": "candidate", "model": "student" if shape.student is None else shape.model}
    left = {"layers": one.layers, "heads": one.heads, "neurons": one.neurons, "vocabulary": one.vocabulary}
    return {**model, **left, "scheme": shape.scheme, "forecast": one.costs, **one.costs}


def made(search: Search, path: str, row: Row) -> Row:
    """The row of the finished stage in `path`; its milliseconds are a forecast until they are timed. The main process adds
    the `delta` to the teacher: its lower end is a one-sided 95 % bound, where more is better."""
    run, settings, reference = search.run, search.settings, search.reference
    record = run.record(path)
    score = record["metrics"]["validation"][run.task.primary_metric]
    row = row | {"path": path, "bytes": record["bytes"], "score": score}
    if reference is not None:
        processor = run.task.load_processor(str(run.directory / TEACHER))
        found = run.task.compare([reference, predicted(run, settings, path)], processor, path, "validation")
        row["delta"] = paired_bootstrap(found.metric, found.samples[path], found.samples[TEACHER], level=0.9)
    return weighed(run, settings, row)


def predicted(run: Run, settings: Settings, path: str) -> StageResult:
    return score_stage(run, path, settings.training.per_device_eval_batch_size, "validation")


def weighed(run: Run, settings: Settings, row: Row) -> Row:
    """The row with what it loses of the teacher's score, and the bounds that it breaks."""
    teacher = run.record("teacher")["metrics"]["validation"][run.task.primary_metric]
    drop = drop_of(run.task, teacher, np.nan if row["score"] is None else row["score"])
    return row | {"drop": drop, "breaks": settings.fit.budget.broken(drop, bytes=row["bytes"], ms=row.get("ms"))}
