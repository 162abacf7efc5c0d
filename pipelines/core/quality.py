"""Quality gates: what a stage may lose of the model that it was made from, by one metric and by the recall of every class.

All figures are of the validation split, and both models are scored on the same examples.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pipelines.core.config import GateConfig, did_you_mean
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.records import read_record
from pipelines.core.task import Task

HALF = 0.5  # a class that loses this share of its recall is broken, and so is a trained model that loses more of its metric
LOST_EXAMPLES = 2  # a single example that was right and is wrong now says nothing of its class
LISTED_CLASSES = 5
# What helps a stage that lost too much, by the name of its function.
REMEDIES = {
    "distill_student": "train it longer (--num_train_epochs), or give it more layers (--student_layers)",
    "prune_and_recover": "prune less (--prune_heads, --prune_ffn), or let it recover longer (--prune_epochs)",
    "quantize_onnx": "take another scheme (--quantization int8_blocks or fp32), or a better model to quantize",
}


def gate_metric(task: Task, gate: GateConfig) -> str:
    """The metric that --gate names, or the task's primary one. Raises InputError for a name that the task does not have."""
    name = gate.gate or task.primary_metric
    if name not in task.metrics:
        raise InputError(
            f"expected --gate out of {', '.join(task.metrics)}, found {name!r}.{did_you_mean([name], task.metrics)}"
        )
    return name


def quality_lost(before: float, after: float, greater_is_better: bool) -> float:
    """The share of a metric that is lost: 0.01 where an accuracy of 0.90 becomes 0.891, or a perplexity of 19.8 becomes 20.

    Less than 0 where it is gained. (A metric that was 0 has no shares: then it is the difference.)
    """
    whole, kept = (before, after) if greater_is_better else (after, before)
    return float((whole - kept) / (abs(whole) or 1.0))


def problem_of(
    before: dict[str, Any], after: dict[str, Any], task: Task, gate: GateConfig, least: float = 0.0
) -> str | None:
    """What a model with the metrics `after` lost that it may not lose, in words; None where it may be used.

    The gate's metric may lose --max_quality_drop, or `least` where that is more; from 1 on whatever is lost, as long as it is a number.
    """
    metric, limit = gate_metric(task, gate), max(least, gate.max_quality_drop)
    # A record holds None for what is not a number.
    old, new = (math.nan if one[metric] is None else one[metric] for one in (before, after))
    lost, problems = quality_lost(old, new, task.metrics[metric]), []
    if not lost <= (math.inf if limit >= 1 else limit):
        problems.append(f"{metric} {old:.4f} before and {new:.4f} after ({lost:.1%} lost, {limit:.1%} allowed)")
    for name, least_near in task.least.items() if limit < 1 else ():
        if not after.get(name, 1.0) >= least_near:
            problems.append(f"{name} {after[name]:.4f} ({least_near} is the least)")
    broken = []
    for label, count in after.get("examples_per_class", {}).items():
        had, kept = (round(metrics["recall_per_class"][label] * count) for metrics in (before, after))
        lost = quality_lost(had, kept, greater_is_better=True)
        if lost >= HALF and lost > gate.max_quality_drop and had - kept >= LOST_EXAMPLES:
            broken.append((lost, f"{label!r} {had / count:.3f} before and {kept / count:.3f} after ({count} examples)"))
    if broken:
        worst = [words for _, words in sorted(broken, reverse=True)[:LISTED_CLASSES]]
        more = f", and of {len(broken) - len(worst)} more" if len(broken) > len(worst) else ""
        problems.append(f"at most half of the recall left of class {', '.join(worst)}{more}")
    return "; ".join(problems) or None


def check_stage(directory: Path, task: Task, gate: GateConfig, **others: dict[str, Any]) -> None:
    """Raise VerificationError where the model in `directory` lost more than half of what its source has, or one with the scores `others`.

    It is finished, with a record that says what was lost, and stays: with --max_quality_drop 1 the same command goes on from it.
    """
    record = read_record(directory)
    assert record is not None
    after = record["metrics"]["validation"]
    references = {record["made_by"]["source"]: record["details"].get("source_metrics", after), **others}
    for name, before in references.items():
        problem = problem_of(before, after, task, gate, least=HALF)
        if problem is not None:
            remedy = REMEDIES[record["made_by"]["function"].rpartition(".")[2]]
            rare = "; for rare classes --class_weights balanced may help" if "recall_per_class" in before else ""
            raise VerificationError(
                f"expected {directory} to keep on the validation split what {name} has, found {problem}. To mend it, {remedy}{rare}. To go on "
                "whatever is lost, pass --max_quality_drop 1: nothing is trained again."
            )
