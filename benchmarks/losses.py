"""One table of losses: the student of a finished run's teacher, trained with each in turn and with several seeds.

    python benchmarks/losses.py --run runs/bert_bbc_news --config recipes/configs/bert_bbc_news.yaml --seeds 42 43 44 45 46
    python benchmarks/losses.py --run runs/mine --config mine.yaml --losses labels forward_kl decoupled --temperature 4

The settings are those of the YAML and of further flags; a loss changes only its own. Every student is a stage with a record, so the same
command continues where it was stopped. The table has the primary metric on the validation and on the test split: mean and standard
deviation over the seeds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.chain import CHAIN
from pipelines.core.command import parse_config, run_main
from pipelines.core.config import Settings
from pipelines.core.records import read_record
from pipelines.core.run import Run
from pipelines.core.task import Task
from pipelines.models.predict import predict_torch
from pipelines.report.markdown import markdown_table
from pipelines.tasks import DEFAULT_TASK, TASKS, TaskConfig, make_task, task_class
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
    settings: Settings, task: Task, teacher: Path, losses: list[str], seeds: list[int], output: Path
) -> dict[str, list[dict[str, float]]]:
    """The scores of a student for each loss and seed."""
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="A finished run, whose teacher is used.")
    parser.add_argument("--task", choices=list(TASKS), default=DEFAULT_TASK, help="The job of the run.")
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES), help="The losses.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44, 45, 46], help="The seeds.")
    parser.add_argument("--output", type=Path, help="The directory of the students. Left out: <run>_losses.")
    flags, others = parser.parse_known_args(argv)
    settings = parse_config([*task_class(flags.task).settings, *CHAIN], argv=others)
    settings.task = TaskConfig(flags.task)
    task, teacher = make_task(settings), (flags.run / "teacher").absolute()
    output = flags.output or flags.run.with_name(f"{flags.run.name}_losses")
    found = train_students(settings, task, teacher, flags.losses, flags.seeds, output.absolute())
    print(table({"teacher": [score(teacher, task)], **found}))


if __name__ == "__main__":
    run_main(main)
