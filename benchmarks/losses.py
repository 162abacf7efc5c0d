"""One table of losses: the student of a finished run's teacher, trained with each in turn and with several seeds.

    python benchmarks/losses.py --run runs/bert_bbc_news --config recipes/configs/bert_bbc_news.yaml --output_dir runs/losses
    python benchmarks/losses.py --run runs/mine --config mine.yaml --losses labels forward_kl --temperature 4 --output_dir runs/losses_4

The settings are those of the YAML and of further flags; a loss changes only its own. Every student is a stage with a record, so the same
command continues where it was stopped. The table has the primary metric on the validation and on the test split: mean and standard
deviation over the seeds.
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
from pipelines.models.predict import predict_torch
from pipelines.report.markdown import markdown_table
from pipelines.tasks import DEFAULT_TASK, TaskConfig, make_task, task_class
from pipelines.training.distill import check_distillation, distill_student
from pipelines.training.soft_targets import compute_soft_targets

# What each changes in the settings. What is inside MiniLM is 0.05 to 0.3 away from a student of 3 of its layers by these losses, before any training.
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


@dataclass
class LossesConfig:
    run: str | None = flag(None, "A finished run, whose teacher is used.")
    losses: list[str] = field(
        default_factory=lambda: list(LOSSES), metadata={"help": "The losses.", "choices": list(LOSSES)}
    )
    student_seeds: list[int] = field(
        default_factory=lambda: [42, 43, 44, 45, 46], metadata={"help": "The seeds that each student is trained with."}
    )


def score(directory: Path, task: Task) -> dict[str, float]:
    """The primary metric of a model on the validation split, from its record, and on the test split."""
    record = read_record(directory)
    assert record is not None
    processor = task.load_processor(str(directory))
    features = task.features(processor)["test"]
    predictions = predict_torch(task.load_model(str(directory)), features, task.collate(processor), task)
    tested = task.scores(predictions, features["labels"], "test")
    return {
        "validation": record["metrics"]["validation"][task.primary_metric],
        "test": tested[task.primary_metric],
    }


def train_students(
    settings: Settings, task: Task, teacher: Path, losses: list[str], seeds: list[int]
) -> dict[str, list[dict[str, float]]]:
    """The scores of a student for each loss and seed."""
    output = Path(settings.training.output_dir).absolute()
    distills = {name: replace(settings.distill, **LOSSES[name]) for name in losses}
    if "labels" in distills:
        distills["labels"] = settings.distill.labels_only()
    for distill in distills.values():
        check_distillation(settings.student, distill, str(teacher), task)
    stored: dict[str, Path] = {}
    with Run(output, task, seeds[0]) as run:
        for name, distill in distills.items():
            if distill.needs_stored_targets:
                what = distill.only(task.soft_target_settings)
                stage = "soft_targets_standardized" if what.standardize_logits else "soft_targets"
                stored[name] = run.stage(stage, compute_soft_targets, str(teacher), distributed=True, distill=what)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in losses}
    for seed in seeds:
        training = copy.copy(settings.training)
        training.seed = seed
        learning: dict[str, Any] = {"distributed": True, "student": settings.student, "training": training}
        with Run(output / f"seed_{seed}", task, seed) as run:
            for name, distill in distills.items():
                learning |= {"distill": distill, "soft_targets": stored.get(name)}
                student = run.stage(name, distill_student, str(teacher), **learning)
                found[name].append(score(student, task))
                print(name, seed, found[name][-1], flush=True)
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    def cell(scores: list[float]) -> str:
        deviation = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        return f"{statistics.mean(scores):.4f}{deviation}"

    rows = [
        [name, *(cell([one[split] for one in scores]) for split in ("validation", "test"))]
        for name, scores in found.items()
    ]
    return markdown_table(["loss", "validation", "test"], rows)


def main() -> None:
    task_flag = parse_config([TaskConfig], only=True).task.task or DEFAULT_TASK
    kinds = [LossesConfig, TaskConfig, *task_class(task_flag).settings, *CHAIN]
    settings: Any = parse_config(kinds)
    settings.task = TaskConfig(task_flag)
    if settings.losses.run is None:
        raise InputError("expected a finished run, found none. Pass --run.")
    task, teacher = make_task(settings), Path(settings.losses.run).absolute() / "teacher"
    found = train_students(settings, task, teacher, settings.losses.losses, settings.losses.student_seeds)
    print(table({"teacher": [score(teacher, task)], **found}))


if __name__ == "__main__":
    run_main(main)
