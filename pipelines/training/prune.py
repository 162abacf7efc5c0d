"""Structured pruning: which heads and neurons matter least, and the stage that removes them and lets the model recover."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from torch import Tensor, nn

from pipelines.core.config import DistillConfig, PruneConfig
from pipelines.core.disk import write_json
from pipelines.core.errors import InputError
from pipelines.core.processes import wait_for_all
from pipelines.core.records import CHECKPOINTS, Outcome, with_checksum
from pipelines.core.task import Task, TransferSet
from pipelines.models.families import groups_of, layers_of, removable, unit_count, unit_width
from pipelines.models.predict import sample_of
from pipelines.models.removal import cut, remove_zeros, shape_of, with_stock_shapes
from pipelines.training.arguments import arguments_for
from pipelines.training.checkpoints import checkpoint_damage, write_checksums
from pipelines.training.distill import TEACHER_COLUMN, ask_teacher, train_student
from pipelines.training.fine_tune import save, source_metrics, validation_metrics
from pipelines.training.losses import teachers_loss
from pipelines.training.masks import tune_masks
from pipelines.training.soft_targets import with_soft_targets

STEPS = "steps.json"  # beside the weights that a step left: what the steps before it did
MINIMUM = {"heads": 1, "neurons": 8}  # what every layer keeps


def measure_importance(
    model: Any, features: Any, loss: Callable[[list[dict[str, Any]]], Tensor], batch_size: int = 16
) -> dict[str, list[np.ndarray]]:
    """First-order importance of every head and every feed-forward neuron, one array a layer.

    A gate of 1 multiplies each unit where the next linear map reads it; the importance is the mean over examples of the size of the
    gradient of `loss(rows)`, a sum over examples, by that gate, which estimates how much the loss changes when it closes (Michel et al.,
    2019; Molchanov et al., 2019). Gates are per example, so gradients of different signs do not cancel.
    """
    places = [
        (kind, layer.get_submodule(group.input), unit_count(layer, group), unit_width(layer, group))
        for kind, group in groups_of(model.config).items()
        for layer in layers_of(model)
    ]
    gates: dict[int, Tensor] = {}

    def gate(place: int, units: int, width: int) -> Any:
        def multiply(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = inputs[0]
            if place not in gates:  # a layer that is used several times keeps its gate
                shape = (len(hidden), *[1] * (hidden.dim() - 2), units)
                gates[place] = torch.ones(shape, dtype=hidden.dtype, device=hidden.device, requires_grad=True)
            return (hidden * gates[place].repeat_interleave(width, dim=-1), *inputs[1:])

        return multiply

    hooks = [
        module.register_forward_pre_hook(gate(place, units, width))
        for place, (_, module, units, width) in enumerate(places)
    ]
    totals = [np.zeros(units) for _, _, units, _ in places]
    model.eval()
    try:
        for start in range(0, len(features), batch_size):
            gates.clear()
            rows = [features[row] for row in range(start, min(start + batch_size, len(features)))]
            value = loss(rows)
            gradients = torch.autograd.grad(value, [gates[place] for place in range(len(places))])
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient.flatten(0, -2).abs().sum(dim=0).double().cpu().numpy()
    finally:
        for hook in hooks:
            hook.remove()
    importance: dict[str, list[np.ndarray]] = {kind: [] for kind, *_ in places}
    for (kind, *_), total in zip(places, totals, strict=True):
        importance[kind].append(total / len(features))
    return importance


def training_loss(
    model: Any, processor: Any, task: Task, distill: DistillConfig, teacher: str | None
) -> Callable[[list[dict[str, Any]]], Tensor]:
    """The loss that the model recovers with, as a function of rows of the features, summed over examples; without the part of what is inside the teacher.

    With `teacher` that model predicts soft targets for the rows; without, they are columns of the rows, stored by the teacher.
    """
    device, weight = next(model.parameters()).device, distill.soft_target_weight
    collate = task.collate(processor)
    if teacher is not None and weight > 0:
        teacher_model = task.load_model(teacher).eval().to(device)
        collate = task.training_collate(processor, task.load_processor(teacher))

    def loss(rows: list[dict[str, Any]]) -> Tensor:
        batch = {name: values.to(device) for name, values in collate(rows).items()}
        labels = batch.pop("labels")
        soft_targets = {name: batch.pop(name) for name in list(batch) if name.startswith(TEACHER_COLUMN)}
        outputs = task.outputs(model(**batch))
        label_loss, _ = task.label_loss(outputs, labels)
        if weight == 0:
            return label_loss
        if teacher is not None:
            _, soft_targets = ask_teacher(teacher_model, task, batch, soft_targets)
        return (1 - weight) * label_loss + weight * teachers_loss(task, outputs, soft_targets, labels, distill)

    return loss


def choose_kept(importance: list[np.ndarray], remove: int, minimum: int) -> list[np.ndarray]:
    """Indices to keep in each layer when the `remove` least important of all layers together go.

    Layers compete with one another, so they end up uneven; none falls below `minimum`.
    """
    kept = [np.ones(len(layer), dtype=bool) for layer in importance]
    candidates = sorted(
        (values[index], layer, index)
        for layer, values in enumerate(importance)
        for index in np.argsort(values, kind="stable")[: max(0, len(values) - minimum)]
    )
    for _, layer, index in candidates[: max(0, remove)]:
        kept[layer][index] = False
    return [np.flatnonzero(layer) for layer in kept]


def possible_pruning(config: Any, prune: PruneConfig) -> PruneConfig:
    """`prune` without what the family of a model with this config does not allow; says what that is, and why.

    Called before the first training, it says so before hours of it.
    """
    shares = {"heads": prune.prune_heads, "neurons": prune.prune_ffn}
    for kind, found in removable(config).items():
        if isinstance(found, str) and shares[kind]:
            PartialState().print(f"pruned: the {kind} of a {config.model_type} stay: {found}", flush=True)
            shares[kind] = 0.0
    return dataclasses.replace(prune, prune_heads=shares["heads"], prune_ffn=shares["neurons"])


def checked_pruning(config: Any, prune: PruneConfig, source: str) -> PruneConfig:
    """possible_pruning; raises InputError where nothing is left to prune of the model in `source`."""
    prune = possible_pruning(config, prune)
    if prune.prune_heads == prune.prune_ffn == 0:
        raise InputError(
            f"expected a model with heads or neurons that can be removed, and a share of them to remove, found none in {source}. Leave "
            "pruning out (--prune_heads 0 --prune_ffn 0)."
        )
    return prune


def prune_and_recover(
    source: str,
    directory: Path,
    task: Task,
    teacher: Path,
    prune: PruneConfig,
    distill: DistillConfig,
    training: transformers.TrainingArguments,
    soft_targets: Path | list[Path] | None = None,
    transfer: TransferSet | None = None,
) -> Outcome:
    """Remove the least important heads and neurons of the student in `source`, in steps, recovering by distillation after each; without
    epochs for that what is left is scaled, see tune_masks.

    The main process chooses and writes what is left, and every process reads that: a rank decided by the last bit of a gradient would
    otherwise give the processes models of different shapes. A run that was interrupted goes on from the last step that was written.
    """
    processor = task.load_processor(source)
    prune = checked_pruning(task.load_config(source), prune, source)
    batch_size = training.per_device_eval_batch_size
    from_source = source_metrics(source, task, batch_size)
    model = remove_zeros(task.load_model(source))
    before = shape_of(model)
    cuts = [directory / CHECKPOINTS / f"step-{step}-cut" for step in range(1, prune.prune_steps + 1)]
    steps: list[dict[str, Any]] = []
    for step in range(_last_whole(cuts), prune.prune_steps):
        if PartialState().is_main_process and not cuts[step].is_dir():
            importance = _importance(
                model.to(training.device), processor, task, str(teacher), prune, distill, training, soft_targets
            )
            cut(model, **choose_units(importance, before, prune, (step + 1) / prune.prune_steps))
            _write_cut(model, processor, steps, cuts[step])
        wait_for_all()
        model = remove_zeros(task.load_model(str(cuts[step]))).to(training.device)
        steps = json.loads((cuts[step] / STEPS).read_text(encoding="utf-8"))["steps"]
        recovery: dict[str, Any] = {}
        if prune.prune_epochs > 0:
            arguments = arguments_for(training, prune.prune_learning_rate, prune.prune_epochs)
            learning = (distill, arguments, soft_targets, directory / CHECKPOINTS / f"step-{step + 1}", transfer)
            try:
                recovery = train_student(model, processor, task, str(teacher), *learning)
            except InputError as error:
                raise InputError(f"{error} What the cut of step {step + 1} left is kept in {cuts[step]}.") from error
        elif PartialState().is_main_process:
            rows = sample_of(task.features(processor)["train"], prune.prune_samples)
            batches = inputs_of(rows, task.collate(processor), batch_size, training.device)
            recovery = {"off": tune_masks(model, task.load_model(source).to(training.device), batches)}
        steps.append({**shape_of(model), "recovery": recovery})
    if not PartialState().is_main_process:
        return Outcome("transformers")
    after = shape_of(model)
    removed = {f"{kind}_removed": 1 - sum(left) / sum(before[kind]) for kind, left in after.items()}
    metrics = validation_metrics(model, task, processor, batch_size)
    model.config.update(task.config_entries(metrics))
    save(with_stock_shapes(model), processor, directory)
    details = {"before": before, "after": after, **removed, "steps": steps, "source_metrics": from_source}
    return Outcome("transformers", {"validation": metrics}, model.num_parameters(), details)


def _last_whole(cuts: list[Path]) -> int:
    """The place of the last cut that is there, 0 where none is; damaged ones are removed first."""
    if PartialState().is_main_process:
        for path in filter(Path.is_dir, cuts):
            damage = checkpoint_damage(path)
            if damage is not None:
                print(f"{path.name}: not used, because {damage}", flush=True)
                shutil.rmtree(path)
    wait_for_all()
    return max((step for step, path in enumerate(cuts) if path.is_dir()), default=0)


def _importance(
    model: Any,
    processor: Any,
    task: Task,
    teacher: str,
    prune: PruneConfig,
    distill: DistillConfig,
    training: transformers.TrainingArguments,
    soft_targets: Path | list[Path] | None,
) -> dict[str, list[np.ndarray]]:
    """Importance by the loss of the recovery, of --prune_samples training examples: with soft targets that are stored, or the teacher's."""
    if soft_targets is None:
        features: Any = task.features(processor)["train"]
    else:
        read = partial(task.soft_target_features, distill=distill)
        features = with_soft_targets(task, read, read(processor), soft_targets)
    loss = training_loss(model, processor, task, distill, teacher if soft_targets is None else None)
    batch_size = training.per_device_train_batch_size
    importance = measure_importance(model, sample_of(features, prune.prune_samples), loss, batch_size)
    if not any(values.any() for layers in importance.values() for values in layers):
        raise InputError(
            "expected a loss that depends on heads and neurons, found none: without a teacher this task has no labels to learn. Raise "
            "--soft_target_weight, or let fit train (--train true)."
        )
    return importance


def inputs_of(features: Any, collate: Any, batch_size: int, device: Any = "cpu") -> list[dict[str, Tensor]]:
    """Batches of all rows of the features, without the labels."""
    rows = range(len(features))
    batches = [collate([features[row] for row in rows[start : start + batch_size]]) for start in rows[::batch_size]]
    return [{name: values.to(device) for name, values in batch.items() if name != "labels"} for batch in batches]


def choose_units(
    importance: dict[str, list[np.ndarray]], before: dict[str, list[int]], prune: PruneConfig, share: float
) -> dict[str, list[np.ndarray]]:
    """The units of each layer that stay once `share` of the whole pruning is done to a model that had the shapes `before`."""
    wanted = {"heads": prune.prune_heads, "neurons": prune.prune_ffn}
    kept = {}
    for kind, layers in importance.items():
        left = sum(before[kind]) - round(wanted[kind] * share * sum(before[kind]))
        kept[kind] = choose_kept(layers, sum(map(len, layers)) - left, MINIMUM[kind])
    return kept


def _write_cut(model: Any, processor: Any, steps: list[dict[str, Any]], directory: Path) -> None:
    partial = directory.with_suffix(".partial")
    save(with_stock_shapes(model), processor, partial)
    write_json(partial / STEPS, with_checksum({"steps": steps}))
    write_checksums(partial)
    partial.rename(directory)
