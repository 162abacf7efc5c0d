"""One table of students: those of a finished run's teacher, each trained another way or of another kind, with several seeds.

    python benchmarks/students.py --run runs/bert_bbc_headlines --config recipes/configs/bert_bbc_headlines.yaml --output_dir runs/losses
    python benchmarks/students.py --variants layers_3 layers_2 lstm cnn static --timed --run … --config … --output_dir runs/kinds

The settings are those of the YAML and of further flags; a variant changes only its own. Every student is a stage with a record, so the same
command continues where it was stopped. The table has the primary metric on the validation and on the test split: mean and standard
deviation over the seeds. With --timed the students of the first seed are exported and quantized, whatever that loses, and timed
together with their teacher and the task's baselines.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.chain import CHAIN
from pipelines.core.command import parse_config, run_main
from pipelines.core.config import Settings, flag
from pipelines.core.errors import InputError
from pipelines.core.records import read_record
from pipelines.core.run import Run
from pipelines.core.task import Task
from pipelines.onnx.export import export_onnx
from pipelines.onnx.measure import paired_ratios
from pipelines.onnx.quantize import quantize_onnx
from pipelines.report.markdown import markdown_table
from pipelines.report.results import predict_stage, time_stages
from pipelines.tasks import DEFAULT_TASK, TaskConfig, make_task, task_class
from pipelines.training.baselines import fit_baseline
from pipelines.training.distill import check_distillation, distill_student
from pipelines.training.soft_targets import compute_soft_targets
from pipelines.training.transfer import check_transfer

# What each changes in the settings of the distillation. What is inside MiniLM is 0.05 to 0.3 away from a student of 3 of its layers by
# these losses, before any training.
LOSSES: dict[str, dict[str, Any]] = {
    "labels": {},
    "forward_kl": {"divergence": "forward_kl"},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jensen_shannon": {"divergence": "jensen_shannon"},
    "squared_error": {"divergence": "squared_error"},
    "decoupled": {"divergence": "decoupled", "beta": 8 / 9},
    "standardized": {"standardize_logits": True},
    "hidden_squared_error": {"hidden_state_weight": 1.0},
    "hidden_cosine": {"hidden_state_weight": 1.0, "hidden_state_loss": "cosine"},
    "attention": {"attention_weight": 1.0},
    "relations": {"relation_weight": 1.0},
}
# What each changes in the settings of the student and of its training: chosen on the validation split of the BBC headlines. What begins
# with random layers needs more steps; they cost it little.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "layers_3": ({"student_layers": "3"}, {}),
    "layers_2": ({"student_layers": "2"}, {}),
    "lstm": ({"student_model": "lstm"}, {"learning_rate": 1e-3, "num_train_epochs": 20}),
    "cnn": ({"student_model": "cnn"}, {"learning_rate": 1e-3, "num_train_epochs": 40}),
    "static": ({"student_model": "static"}, {"learning_rate": 2e-3, "num_train_epochs": 20}),
}
VARIANTS = [*LOSSES, *KINDS]


@dataclass
class StudentsConfig:
    run: str | None = flag(None, "A finished run, whose teacher is used.")
    variants: list[str] = field(
        default_factory=lambda: list(LOSSES), metadata={"help": "The students.", "choices": VARIANTS}
    )
    student_seeds: list[int] = field(
        default_factory=lambda: [42, 43, 44, 45, 46], metadata={"help": "The seeds that each student is trained with."}
    )
    timed: bool = flag(False, "Export, quantize and time the students of the first seed.")


def varied(settings: Settings, name: str, seed: int) -> dict[str, Any]:
    """What `distill_student` takes for a variant."""
    training = copy.copy(settings.training)
    training.seed = seed
    if name == "labels":
        return {"student": settings.student, "distill": settings.distill.labels_only(), "training": training}
    if name in LOSSES:
        distill = replace(settings.distill, **LOSSES[name])
        return {"student": settings.student, "distill": distill, "training": training}
    of_student, of_training = KINDS[name]
    for setting, value in of_training.items():
        setattr(training, setting, value)
    return {"student": replace(settings.student, **of_student), "distill": settings.distill, "training": training}


def score_on_test(directory: Path, task: Task, references: Any) -> float:
    """The primary metric of a stage on the test split, whose labels are given."""
    record = read_record(directory)
    assert record is not None
    predictions = predict_stage(directory, record["format"], task, 32)
    return float(task.scores(predictions, references, "test")[task.primary_metric])


def score(directory: Path, task: Task, references: Any) -> dict[str, float]:
    """The same on both splits: on the validation split as the stage's record has it."""
    record = read_record(directory)
    assert record is not None
    validation = record["metrics"]["validation"][task.primary_metric]
    return {"validation": validation, "test": score_on_test(directory, task, references)}


def train_students(settings: Settings, task: Task, teacher: Path, references: Any) -> dict[str, list[dict[str, float]]]:
    """The scores of every variant's students, one for each seed."""
    output, names, seeds = (
        Path(settings.training.output_dir).absolute(),
        settings.students.variants,
        settings.students.student_seeds,
    )
    transfer = task.transfer_set(settings.transfer)
    for name in names:
        kinds = varied(settings, name, seeds[0])
        check_distillation(kinds["student"], kinds["distill"], str(teacher), task)
        if name != "labels":
            check_transfer(transfer, kinds["distill"])
    stored: dict[str, dict[str, Any]] = {}
    with Run(output, task, seeds[0]) as run:
        for name in names:
            distill = varied(settings, name, seeds[0])["distill"]
            stored[name] = {"transfer": transfer}
            if distill.needs_stored_targets:
                what = distill.only(task.soft_target_settings)
                suffix = "_standardized" if what.standardize_logits else ""
                storing: dict[str, Any] = {"distributed": True, "distill": what}
                stored[name]["soft_targets"] = run.stage(
                    f"soft_targets{suffix}", compute_soft_targets, str(teacher), **storing
                )
                if transfer is not None:
                    storing["transfer"] = replace(transfer, ratio=None)
                    place = run.stage(f"transfer{suffix}", compute_soft_targets, str(teacher), **storing)
                    stored[name]["transfer"] = replace(transfer, soft_targets=place)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in seeds:
        with Run(output / f"seed_{seed}", task, seed) as run:
            for name in names:
                learning = varied(settings, name, seed) | stored[name]
                student = run.stage(name, distill_student, str(teacher), distributed=True, **learning)
                found[name].append(score(student, task, references))
                print(name, seed, found[name][-1], flush=True)
    return found


def time_students(settings: Settings, task: Task, teacher: Path, references: Any) -> str:
    """A table of what the students of the first seed are as int8 files, beside their teacher and the baselines: one timing of all."""
    seed = settings.students.student_seeds[0]
    with Run(Path(settings.training.output_dir).absolute() / f"seed_{seed}", task, seed) as run:
        places = {"teacher": teacher, "teacher, ONNX": run.stage("teacher_onnx", export_onnx, str(teacher))}
        for name in settings.students.variants:
            run.stage(f"{name}_onnx", export_onnx, str(run.directory / name))
            quantizing = {"quantize": settings.quantize, "gated": False}
            places[f"{name}, int8"] = run.stage(f"{name}_int8", quantize_onnx, f"{name}_onnx", **quantizing)
        for name in task.baselines:
            places[name] = run.stage(name, fit_baseline, None, baseline=name)
    timings = time_stages(places, task, "test", settings.report)
    rows = []
    for name, place in places.items():
        record, ratio = read_record(place), paired_ratios(timings, "teacher", name)
        assert record is not None
        rows.append(
            [
                name,
                f"{score_on_test(place, task, references):.3f}",
                f"{record['bytes'] / 1e6:.1f}",
                f"{timings[name]['latency_ms']['p50']:.3f}",
            ]
            + [f"{timings[name]['samples_per_second']:,.0f}"]
            + [f"{ratio['median']:.1f} ({ratio['low']:.1f}-{ratio['high']:.1f})"]
        )
    header = ["of the first seed", "test", "MB", "p50 ms", "samples/s", "times faster than the teacher in torch"]
    return markdown_table(header, rows)


def table(found: dict[str, list[dict[str, float]]]) -> str:
    def cell(scores: list[float]) -> str:
        deviation = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        return f"{statistics.mean(scores):.4f}{deviation}"

    columns = [*next(iter(found.values()))[0]]
    rows = [[name, *(cell([one[column] for one in scores]) for column in columns)] for name, scores in found.items()]
    return markdown_table(["student", *columns], rows)


def main() -> None:
    task_flag = parse_config([TaskConfig], only=True).task.task or DEFAULT_TASK
    kinds = [StudentsConfig, TaskConfig, *task_class(task_flag).settings, *CHAIN]
    settings: Any = parse_config(kinds)
    settings.task = TaskConfig(task_flag)
    if settings.students.run is None:
        raise InputError("expected a finished run, found none. Pass --run.")
    task, teacher = make_task(settings), Path(settings.students.run).absolute() / "teacher"
    references = task.features(task.load_processor(str(teacher)))["test"]["labels"]
    found = train_students(settings, task, teacher, references)
    print(table({"teacher": [score(teacher, task, references)], **found}))
    if settings.students.timed:
        print(time_students(settings, task, teacher, references))


if __name__ == "__main__":
    run_main(main)
