"""The whole chain: a model and a data set enter, a small, verified, measured model leaves. Every recipe and `compress` run it."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipelines.core.command import parse_config
from pipelines.core.config import OF_STAGES, PruneConfig, Settings
from pipelines.core.quality import check_stage
from pipelines.core.records import read_record
from pipelines.core.run import Run
from pipelines.core.task import Task, TransferSet
from pipelines.edge.bundle import build_bundle
from pipelines.hub import check_access, push_run
from pipelines.models.vocabulary import tokens_to_keep
from pipelines.onnx.export import check_export, export_onnx
from pipelines.onnx.quantize import quantize_onnx
from pipelines.report.results import report_run
from pipelines.tasks import TaskConfig, make_task, task_class
from pipelines.training.arguments import TrainingArguments, arguments_for
from pipelines.training.baselines import fit_baseline
from pipelines.training.distill import check_distillation, distill_student
from pipelines.training.fine_tune import fine_tune
from pipelines.training.prune import possible_pruning, prune_and_recover
from pipelines.training.search import check_search, search_settings, with_found
from pipelines.training.soft_targets import compute_soft_targets, one_or_more
from pipelines.training.transfer import check_transfer

# The settings of the stages; those of the task come before them.
CHAIN = (*OF_STAGES, TrainingArguments)


def compress(settings: Settings, recipe: str) -> None:
    """The chain in a run's directory, a directory inside it for each stage; a finished stage is not rebuilt."""
    training = settings.training
    task = make_task(settings)
    with Run(training.output_dir, task, training.seed) as run:
        transfer = task.transfer_set(settings.transfer)
        prune, without_bundle = plan(run, task, settings, transfer)
        shipped = make_models(run, settings, prune, transfer)

        # 7. One seed says little of a small difference: others repeat whatever depends on the seed.
        seeds = [training.seed + number for number in range(1, settings.repeat.seeds)]
        others = [run.inside(f"seeds/{seed}", seed) for seed in seeds]
        for other in others:
            make_models(other, settings, prune, transfer)
        quantized = settings.quantize.quantization != "none"
        make_baselines(run, settings, run.record("quantized")["details"]["scheme"] if quantized else None)
        finish(run, settings, recipe, shipped, without_bundle, others)


def make_baselines(run: Run, settings: Settings, scheme: str | None) -> None:
    """8. What a user gets without any of this: the teacher quantized, whatever it loses, and what needs no transformer, of the data alone."""
    if settings.report.baselines:
        if scheme is not None:
            given: dict[str, Any] = {"quantize": settings.quantize, "scheme": scheme, "gated": False}
            run.stage("teacher_quantized", quantize_onnx, "teacher_onnx", optional=True, **given)
        for name in run.task.baselines:
            run.stage(name, fit_baseline, None, baseline=name)


def finish(
    run: Run,
    settings: Settings,
    recipe: str,
    shipped: str,
    without_bundle: str | None,
    others: Sequence[Run] = (),
) -> None:
    """The bundle of the stage to ship, the report of all of them, and what is published."""
    # 9. What a device or a browser needs, without torch: copy this directory and run infer.py in it.
    bundle = None if without_bundle else run.stage("bundle", build_bundle, shipped, bundle=settings.bundle)

    # 10. Only here is the test split read. Only what was verified and measured is published, and only its owner sees it by default.
    training = settings.training
    report_run(run, recipe, settings.report, settings.given, training.per_device_eval_batch_size, others)
    if training.push_to_hub:
        push_run(run, training)
    if bundle is not None:
        run.state.print(
            next_commands(run.directory, bundle, run.task.presentation.in_shell({"config": asdict(run.task.config)}))
        )


def teach(run: Run, settings: Settings, transfer: TransferSet | None) -> dict[str, Any]:
    """The teacher and what it teaches: what the trainings of students are given. A run that repeats another one shares these, unless a seed
    changes them."""
    teacher, distill, task, first = settings.teacher, settings.distill, run.task, run.first
    training = copy.copy(settings.training)
    training.seed = run.seed
    shares_teacher = first is not None and (teacher.teacher_epochs == 0 or run.seed == first.seed)

    # 1. A teacher that already knows the task is used as it is (--teacher_epochs 0). The student is made of the first of several.
    teaching = arguments_for(training, teacher.teacher_learning_rate, teacher.teacher_epochs)
    teachers = {} if shares_teacher else teacher.each()
    for suffix, one in teachers.items():
        run.stage(f"teacher{suffix}", fine_tune, one.teacher_model, distributed=True, teacher=one, training=teaching)

    # 2. Stored, the teacher's logits are computed once, and every epoch of the student and of its recovery reads them. They are of the
    # examples as they are, or of so many augmented views of images; a student of hidden states needs the teacher beside it.
    soft_targets: Path | list[Path] | None = None
    if distill.needs_stored_targets:
        storing: dict[str, Any] = {"distributed": True, "distill": distill.only(task.soft_target_settings)}
        for suffix in teachers:
            run.stage(f"soft_targets{suffix}", compute_soft_targets, f"teacher{suffix}", **storing)
        soft_targets = one_or_more([run.place(f"soft_targets{suffix}") for suffix in teacher.each()])
        # Unlabelled examples have no other labels than the teacher's.
        if transfer is not None:
            storing["transfer"] = replace(transfer, ratio=None)
            for suffix in teachers:
                run.stage(f"transfer_soft_targets{suffix}", compute_soft_targets, f"teacher{suffix}", **storing)
            stored = [run.place(f"transfer_soft_targets{suffix}") for suffix in teacher.each()]
            transfer = replace(transfer, soft_targets=one_or_more(stored))
    return {"distributed": True, "training": training, "soft_targets": soft_targets, "transfer": transfer}


def make_models(run: Run, settings: Settings, prune: PruneConfig, transfer: TransferSet | None) -> str:
    """The stages up to the model to ship, whose name is returned; of a run that repeats another one only those that differ from it."""
    small = make_small(run, settings, prune, transfer)
    if settings.quantize.quantization == "none":
        return small
    # Another seed is quantized by the same scheme, also where speed chose it.
    scheme = None if run.first is None else run.first.record("quantized")["details"]["scheme"]
    return make_quantized(run, settings, small, scheme)


def make_small(run: Run, settings: Settings, prune: PruneConfig, transfer: TransferSet | None) -> str:
    """The stages up to the small model in ONNX, whose name is returned."""
    distill, first = settings.distill, run.first
    learning = teach(run, settings, transfer)
    training = learning["training"]

    # The settings that are best on the validation split, of so many students of the first seed.
    if trials := settings.repeat.search_trials:
        if first is None:
            searching = {"trials": trials, "student": settings.student, "distill": distill, **learning}
            run.stage("search", search_settings, "teacher", **searching)
        distill, learning["training"] = with_found(run.record("search"), distill, training)

    # 3. The student starts from the teacher's own layers, so its embeddings and head come trained; or it is another model altogether.
    run.stage("student", distill_student, "teacher", student=settings.student, distill=distill, **learning)
    _check_quality(run, "student", settings)
    # The baseline that might win: the same student, the same steps, no teacher.
    if settings.report.label_baseline:
        # Of a transfer set it needs no more than how many examples an epoch had with it: another one of that size redoes nothing.
        labels_only = {**learning, "distill": distill.labels_only(), "soft_targets": None, "transfer": None}
        labels_only["examples_per_epoch"] = run.record("student")["details"].get("examples_per_epoch")
        run.stage("student_labels_only", distill_student, "teacher", student=settings.student, **labels_only)

    # 4. Pruning removes whole heads and neurons, so the ONNX graph is smaller, not just sparser; the teacher helps it to recover.
    small = "student"
    if prune.prune_heads or prune.prune_ffn:
        recovery = {**learning, "teacher": run.place("teacher"), "distill": distill}
        small = run.stage("pruned", prune_and_recover, small, prune=prune, **recovery).name
        _check_quality(run, "pruned", settings)

    # 5. The teacher in ONNX is the fair baseline of speed.
    if first is None:
        run.stage("teacher_onnx", export_onnx, "teacher")
    return run.stage("onnx", export_onnx, small).name


def make_quantized(run: Run, settings: Settings, small: str, scheme: str | None) -> str:
    """6. Only what keeps the quality of the exported model is shipped. By a `scheme` that is given, whatever it loses is part of the result."""
    given: dict[str, Any] = {} if scheme is None else {"scheme": scheme, "gated": False}
    quantized = run.stage("quantized", quantize_onnx, small, quantize=settings.quantize, **given)
    _check_quality(run, "quantized", settings)
    return quantized.name


def plan(run: Run, task: Task, settings: Settings, transfer: TransferSet | None) -> tuple[PruneConfig, str | None]:
    """What of the chain is possible: what to prune, and why there is no bundle, or None. What cannot work shows now, not after hours of
    training: a token that the Hub refuses, a student that is none, what a family's layers do not allow."""
    if settings.training.push_to_hub:
        check_access(run, settings.training)
    teacher = settings.teacher
    config = check_distillation(settings.student, settings.distill, teacher.teacher_model, task, teacher.more_teachers)
    if settings.repeat.search_trials:
        check_search(settings.distill)
    prune = possible_pruning(config, settings.prune)
    check_transfer(transfer, settings.distill)
    student, vocabulary = settings.student.checkpoint, settings.student.student_vocabulary
    if read_record(run.directory / "teacher") is None:
        if student is not None:
            task.checked_config(student, settings.student.student_from_scratch)
            check_export(student, task, settings.student.student_from_scratch)
        for other in teacher.more_teachers:
            task.checked_config(other, teacher.teacher_from_scratch)
        check_export(teacher.teacher_model, task, teacher.teacher_from_scratch)
        if vocabulary is not None:
            tokens_to_keep(vocabulary, task.load_processor(teacher.teacher_model), task, transfer)
    without_bundle = task.bundle_obstacle(student or teacher.teacher_model)
    if without_bundle:
        run.state.print(f"bundle: left out, since {without_bundle}; the run ends with ONNX files and a report")
    return prune, without_bundle


def _check_quality(run: Run, name: str, settings: Settings) -> None:
    """A stage is kept, but what a user would not want of it stops the run. What another seed loses is part of the result."""
    if run.state.is_main_process and run.first is None:
        of_teacher = run.record("teacher")["metrics"]["validation"]
        check_stage(run.directory / name, run.task, settings.quantize, teacher=of_teacher)


def read_settings(task: str, default_config: Path | None = None) -> Settings:
    """The settings of the chain for a task, from --config (else `default_config`) and the flags."""
    kind = task_class(task)
    settings = parse_config([*kind.settings, *CHAIN], default_config, defaults=kind.defaults)
    settings.task = TaskConfig(task)
    return settings


def demo_config(task: str) -> Path:
    """The YAML of a task's offline demo: in a wheel beside this file, in a clone among the recipes."""
    here = Path(__file__).parent
    folders = (here / "configs", here.parent / "recipes" / "configs")
    return next(folder for folder in folders if folder.is_dir()) / f"{task_class(task).demo}.yaml"


def next_commands(directory: Path, bundle: Path, example: str) -> str:
    infer, run = shlex.quote(str(bundle / "infer.py")), shlex.quote(str(directory))
    return (
        "What next:\n"
        f"  try it      python {infer} {example}\n"
        f"  measure it  python {infer} --benchmark\n"
        f"  in Python   from pipelines import load; model = load({str(bundle)!r})\n"
        f"  publish it  pocketformers push --output_dir {run} --hub_model_id NAME"
    )
