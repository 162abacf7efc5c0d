"""Every verb of the command `pocketformers` as a function of its settings: any one stage on any one directory, and the whole chain.

A stage alone reads and writes what it does in the chain, with the same record, resuming and safety. The command line (cli.py) and the
Python functions (api.py) are two doors to what is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from pipelines import chain
from pipelines.budget import fit as search
from pipelines.budget.words import FitConfig
from pipelines.chain import CHAIN
from pipelines.core.config import (
    BundleConfig,
    DistillConfig,
    GateConfig,
    PruneConfig,
    QuantizeConfig,
    RepeatConfig,
    ReportConfig,
    Settings,
    StudentConfig,
    TeacherConfig,
    TransferConfig,
    flag,
    make_settings,
)
from pipelines.core.disk import as_json, lock
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.identity import describe, differences
from pipelines.core.machine import use_available_cores
from pipelines.core.quality import check_stage
from pipelines.core.records import check_files, fingerprint, read_record
from pipelines.core.run import MARKER, Run
from pipelines.core.sources import model_fingerprint, resolve
from pipelines.core.task import Task, TransferSet
from pipelines.doctor import diagnose
from pipelines.edge.bundle import build_bundle
from pipelines.hub import push as push_run
from pipelines.onnx.export import export_onnx
from pipelines.onnx.quantize import quantize_onnx
from pipelines.onnx.verify import verify_directory
from pipelines.report.pages import TEACHER_QUANTIZED
from pipelines.report.results import benchmark_directories, finished_stages, report_run, time_again, whole_report
from pipelines.tasks import TaskConfig, make_task, task_class
from pipelines.training.arguments import TrainingArguments, arguments_for
from pipelines.training.distill import check_distillation, check_losses, distill_student
from pipelines.training.fine_tune import fine_tune as fine_tune_model
from pipelines.training.prune import checked_pruning, prune_and_recover
from pipelines.training.soft_targets import compute_soft_targets, one_or_more
from pipelines.training.transfer import check_transfer


@dataclass
class ModelConfig:
    model: str | None = flag(None, "The model directory to work on.")


@dataclass
class ReferenceConfig:
    reference: str | None = flag(None, "The directory that the ONNX model was made from.")


@dataclass
class ModelsConfig:
    models: list[str] = field(
        default_factory=list, metadata={"help": "The stage directories to time against one another."}
    )


@dataclass
class SoftTargetConfig:
    soft_target_dir: str | None = flag(
        None,
        "What the verb soft-targets wrote for this teacher and this data; of a second teacher the directory of this name and _2. Left out, "
        "with --soft_targets stored: computed first, into the directory <output_dir>_soft_targets. Those of --transfer_dataset are beside "
        "it, in <soft_target_dir>_transfer.",
    )


@dataclass
class OutputConfig:
    output_dir: str | None = flag(None, "The directory to write.")
    seed: int = flag(42, "Random seed.")


@dataclass
class AgainConfig:
    again: bool = flag(
        False,
        "Only time the stages of a finished report again, by the flags that it was made with, and write it with the new times.",
    )


@dataclass
class PushConfig:
    output_dir: str | None = flag(None, "The directory of the finished run.")
    hub_model_id: str | None = flag(None, "The repository: name or organisation/name. Left out: the directory's name.")
    hub_private_repo: bool = flag(True, "Whether only you can see it.")
    hub_token: str | None = flag(None, "A token with write access. Left out: HF_TOKEN, or that of 'hf auth login'.")


@dataclass
class TakeConfig:
    output_dir: str | None = flag(None, "The directory of a search that 'pocketformers fit' ended.")
    row: int = flag(0, "The number of the row of its table to ship.")


@dataclass
class DemoConfig:
    demo: bool = flag(False, "Start from the settings of the task's offline demo (pip install 'pocketformers[demo]').")


def compress(settings: Settings) -> None:
    chain.compress(settings, recipe="compress")


def take(settings: Settings) -> None:
    """With the flags of the search, which its front.json has."""
    directory, row = _run_directory(settings.take.output_dir), settings.take.row
    found = search.read_front(directory)
    again = make_settings(kinds_of("fit", found["task"]), {**found["flags"], "output_dir": str(directory)})
    again.task, again.given = TaskConfig(found["task"]), found["flags"]
    search.take(again, row)


def fine_tune(settings: Settings) -> Path:
    teacher, training = _one_teacher(settings), settings.training
    arguments = arguments_for(training, teacher.teacher_learning_rate, teacher.teacher_epochs)
    learning = {"distributed": True, "teacher": teacher, "training": arguments}
    return _stage(make_task(settings), training, fine_tune_model, teacher.teacher_model, **learning)


def soft_targets(settings: Settings) -> Path:
    task, teacher = make_task(settings), _one_teacher(settings).teacher_model
    check_losses(settings.distill, task)
    transfer = task.transfer_set(settings.transfer)
    directory = _store_soft_targets(task, settings, teacher, settings.output)
    if transfer is not None:
        _store_transfer(task, settings, teacher, directory, transfer)
    return directory


def distill(settings: Settings) -> Path:
    task, training = make_task(settings), settings.training
    teacher = settings.teacher
    check_distillation(settings.student, settings.distill, teacher.teacher_model, task, teacher.more_teachers)
    learning = {"distributed": True, "distill": settings.distill, "training": training, "student": settings.student}
    learning |= _teaching(task, settings)
    student = _stage(task, training, distill_student, teacher.teacher_model, **learning)
    # A student alone may be a first try, whose scores are what somebody wants to see.
    try:
        return _checked(student, task, settings)
    except VerificationError as error:
        print(f"warning: {error}", flush=True)
        return student


def prune(settings: Settings) -> Path:
    task, training, source = make_task(settings), settings.training, _source(settings)
    check_losses(settings.distill, task, settings.teacher.more_teachers)
    task.load_model(source)  # one that cannot be used is refused now, not after the soft targets are computed
    learning = {"distributed": True, "distill": settings.distill, "training": training}
    learning["prune"] = checked_pruning(task.load_config(source), settings.prune, source)
    learning["teacher"] = Path(resolve(settings.teacher.teacher_model))
    learning |= _teaching(task, settings)
    return _checked(_stage(task, training, prune_and_recover, source, **learning), task, settings)


def export(settings: Settings) -> Path:
    return _stage(make_task(settings), settings.output, export_onnx, _source(settings))


def quantize(settings: Settings) -> Path:
    if settings.quantize.quantization == "none":
        raise InputError(
            "expected a way to quantize, found --quantization none. Leave this stage out: bundle and ship the exported directory itself."
        )
    return _stage(make_task(settings), settings.output, quantize_onnx, _source(settings), quantize=settings.quantize)


def bundle(settings: Settings) -> Path:
    return _stage(make_task(settings), settings.output, build_bundle, _source(settings), bundle=settings.bundle)


def verify(settings: Settings) -> dict[str, Any]:
    reference = Path(_needed(settings.reference.reference, "the directory that the model was made from", "reference"))
    model = Path(_source(settings))
    use_available_cores()
    return verify_directory(model, reference, make_task(settings), settings.quantize)


def doctor(settings: Settings) -> str:
    return diagnose(_source(settings))


def benchmark(settings: Settings) -> str:
    models = [Path(model) for model in _needed(settings.models.models, "the directories to time", "models")]
    return benchmark_directories(models, make_task(settings), settings.report)


def report(settings: Settings) -> None:
    directory = _run_directory(settings.output.output_dir)
    earlier = whole_report(directory) if settings.again.again else None
    if earlier is not None:  # with the flags of the run, unless others are given
        given = {**earlier["made_by"]["flags"], **settings.named, **vars(settings.task), "output_dir": directory}
        settings = make_settings(kinds_of("report", settings.task.task), given)
    with Run(directory, make_task(settings), settings.output.seed) as run:
        run.stages = finished_stages(run)
        if not settings.report.baselines:
            run.stages = [name for name in run.stages if name not in (*run.task.baselines, TEACHER_QUANTIZED)]
        if earlier is None:
            report_run(run, "report", settings.report, settings.given)
        else:
            time_again(run, earlier, settings.report)


def push(settings: Settings) -> None:
    flags = settings.push
    directory = _run_directory(flags.output_dir)
    # No run changes these files between their check and their upload.
    held = lock(directory / ".lock") if (directory / MARKER).exists() else None
    push_run(directory, flags.hub_model_id, flags.hub_private_repo, flags.hub_token)
    if held is not None:
        held.release()


LEARNING = (TaskConfig, TeacherConfig, DistillConfig, TransferConfig, GateConfig, SoftTargetConfig, TrainingArguments)
# Each verb's function and its dataclasses; where TaskConfig stands, those of the task come, too.
VERBS: dict[str, tuple[Callable[[Settings], Any], tuple[type, ...]]] = {
    "compress": (compress, (DemoConfig, TaskConfig, *CHAIN)),
    "fit": (search.fit, (FitConfig, TaskConfig, *(kind for kind in CHAIN if kind is not RepeatConfig))),
    "take": (take, (TakeConfig,)),
    "fine-tune": (fine_tune, (TaskConfig, TeacherConfig, TrainingArguments)),
    "soft-targets": (soft_targets, (TaskConfig, TeacherConfig, DistillConfig, TransferConfig, OutputConfig)),
    "distill": (distill, (StudentConfig, *LEARNING)),
    "prune": (prune, (ModelConfig, PruneConfig, *LEARNING)),
    "export": (export, (ModelConfig, TaskConfig, OutputConfig)),
    "quantize": (quantize, (ModelConfig, TaskConfig, QuantizeConfig, OutputConfig)),
    "doctor": (doctor, (ModelConfig,)),
    "verify": (verify, (ModelConfig, ReferenceConfig, TaskConfig, QuantizeConfig)),
    "benchmark": (benchmark, (ModelsConfig, TaskConfig, ReportConfig)),
    "bundle": (bundle, (ModelConfig, TaskConfig, BundleConfig, OutputConfig)),
    "report": (report, (AgainConfig, TaskConfig, ReportConfig, OutputConfig)),
    "push": (push, (PushConfig,)),
}


def kinds_of(verb: str, task: str) -> list[type]:
    """The dataclasses of a verb for a task."""
    kinds: list[type] = []
    for kind in VERBS[verb][1]:
        if kind is TaskConfig:
            kinds += [kind, *task_class(task).settings]
        else:
            kinds.append(kind)
    return kinds


def _needed(value: Any, what: str, name: str) -> Any:
    if not value:
        raise InputError(f"expected {what}, found none. Pass --{name}.")
    return value


def _stage(task: Task, output: Any, function: Callable[..., Any], source: str, **arguments: Any) -> Path:
    """Run one stage function into `output.output_dir`, with the record, the resuming and the safety of a stage of the chain."""
    # What a link leads to: the stage takes the place of its target, and would take the link's.
    target = Path(_needed(output.output_dir, "a directory to write", "output_dir")).resolve()
    made = read_record(target) if target.is_dir() else None
    of_another = made is not None and not made["made_by"]["function"].endswith(f".{function.__name__}")
    if of_another or resolve(source) == str(target):
        raise InputError(
            f"expected {target} to be empty, missing, or of an earlier run of this command; found "
            f"{'what another made' if of_another else 'its own source'} there. Nothing was touched: pass another --output_dir."
        )
    with Run(target.parent, task, output.seed, only_stage=target.name) as run:
        return run.stage(target.name, function, source, **arguments)


def _checked(directory: Path, task: Task, settings: Any) -> Path:
    if PartialState().is_main_process:
        check_stage(directory, task, settings.gate)
    return directory


def _source(settings: Settings) -> str:
    return str(_needed(settings.model.model, "a model directory", "model"))


def _run_directory(output_dir: str | None) -> Path:
    if output_dir is None or not Path(output_dir).is_dir():
        raise InputError(f"expected the directory of a run, found {output_dir!r}. Pass --output_dir.")
    return Path(output_dir)


def _one_teacher(settings: Settings) -> TeacherConfig:
    if settings.teacher.more_teachers:
        raise InputError(
            f"expected one --teacher_model for this command, found {1 + len(settings.teacher.more_teachers)}. Run it once for each."
        )
    return settings.teacher


def _store_soft_targets(task: Task, settings: Settings, teacher: str, output: Any, **transfer: TransferSet) -> Path:
    """A teacher's soft targets, computed unless they are there."""
    distill = settings.distill.only(task.soft_target_settings)
    return _stage(task, output, compute_soft_targets, teacher, distributed=True, distill=distill, **transfer)


def _store_transfer(task: Task, settings: Settings, teacher: str, beside: Path, transfer: TransferSet) -> Path:
    """Those of a transfer set, beside the others and with their seed."""
    seed = int((read_record(beside) or {})["made_by"]["seed"])
    output = OutputConfig(str(beside.with_name(f"{beside.name}_transfer")), seed)
    return _store_soft_targets(task, settings, teacher, output, transfer=replace(transfer, ratio=None))


def _teaching(task: Task, settings: Settings) -> dict[str, Any]:
    """What a training learns from beside the labels: the stored soft targets, and the transfer set."""
    transfer = task.transfer_set(settings.transfer)
    check_transfer(transfer, settings.distill)
    teachers = settings.teacher.each() if settings.distill.needs_stored_targets else {}
    found = [_soft_targets_of(task, settings, one.teacher_model, suffix) for suffix, one in teachers.items()]
    if transfer is not None and found:
        stored = [
            _store_transfer(task, settings, one.teacher_model, directory.absolute(), transfer)
            for one, directory in zip(teachers.values(), found, strict=True)
        ]
        transfer = replace(transfer, soft_targets=one_or_more(stored))
    return {"soft_targets": one_or_more(found), "transfer": transfer}


def _soft_targets_of(task: Task, settings: Settings, teacher: str, suffix: str) -> Path:
    """The directory of a teacher's stored soft targets: the one given, once it fits the data, or one that is made first."""
    if settings.softtarget.soft_target_dir is None:
        target = Path(settings.training.output_dir).absolute()
        beside = OutputConfig(str(target.with_name(f"{target.name}_soft_targets{suffix}")), settings.training.seed)
        PartialState().print(
            f"soft targets: stored in {beside.output_dir}, for other trainings, too (--soft_target_dir). With --soft_targets online the "
            "teacher runs beside the student instead."
        )
        return _store_soft_targets(task, settings, teacher, beside)
    given = f"{settings.softtarget.soft_target_dir}{suffix}"
    record = read_record(Path(given))
    if record is None or record["format"] != "soft targets":
        raise InputError(
            f"expected stored soft targets in {given}, found none. Pass a directory that 'pocketformers soft-targets' wrote, or leave "
            "--soft_target_dir out."
        )
    check_files(Path(given), record)
    made = read_record(Path(teacher)) if Path(teacher).is_dir() else None
    now = {
        "task": task.describe(),
        "distill": describe(settings.distill.only(task.soft_target_settings)),
        "source_fingerprint": model_fingerprint(teacher) if made is None else fingerprint(made),
    }
    changed = differences({key: record["made_by"][key] for key in now}, as_json(now))
    if changed:
        raise InputError(
            f"expected the teacher, the data and the settings that the soft targets in {given} were computed with, found others: "
            f"{'; '.join(changed)}. Pass the same flags, or leave --soft_target_dir out to compute them again."
        )
    return Path(given)
