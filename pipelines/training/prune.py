"""Structured pruning: which heads and neurons matter least, and the stage that cuts them and lets the model recover."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from torch import Tensor, nn

from pipelines.core.config import DistillConfig, PruneConfig
from pipelines.core.errors import InputError
from pipelines.core.processes import wait_for_all
from pipelines.core.run import Outcome, sealed, write_json
from pipelines.models.families import FAMILIES, family_of, head_size, input_size, layers_of
from pipelines.models.removal import cut, part, remove_zeros, shape_of, with_stock_shapes
from pipelines.training.checkpoints import CHECKPOINTS, checkpoint_damage, write_checksums
from pipelines.training.distill import train_student
from pipelines.training.fine_tune import save, validation_metrics
from pipelines.training.losses import losses_of
from pipelines.training.soft_targets import WithSoftTargets
from pipelines.training.trainer import arguments_for, count_parameters

STEPS = "steps.json"  # beside what a step left: what the steps before it did
MINIMUM_NEURONS = 8  # a layer keeps at least these, and at least one head


def measure_importance(
    model: Any, features: Any, collate: Any, distill: DistillConfig, batch_size: int = 16
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """First-order importance of every head and every feed-forward neuron, one array a layer.

    A gate of 1 multiplies each head's (neuron's) output; the importance is the mean over examples of the size of the loss's gradient
    by that gate, which estimates how much the loss changes when it closes (Michel et al., 2019; Molchanov et al., 2019). Gates are
    per example, so gradients of different signs do not cancel.
    """
    family, size = family_of(model.config), head_size(model.config)
    layers = list(layers_of(model))
    head_modules = [part(layer, family.attention_output) for layer in layers]
    neuron_modules = [part(layer, family.ffn_output) for layer in layers]
    widths: list[tuple[Any, int]] = [(module, size) for module in head_modules] + [
        (module, 1) for module in neuron_modules
    ]
    totals = [np.zeros(input_size(module) // width) for module, width in widths]
    gates: dict[int, Tensor] = {}
    losses = losses_of(model)

    def gate(index: int, width: int) -> Any:
        def multiply(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = inputs[0]
            gates[index] = torch.ones(
                hidden.shape[0], 1, hidden.shape[-1] // width, device=hidden.device, requires_grad=True
            )
            return (hidden * gates[index].repeat_interleave(width, dim=-1), *inputs[1:])

        return multiply

    hooks = [module.register_forward_pre_hook(gate(i, width)) for i, (module, width) in enumerate(widths)]
    model.eval()
    device = next(model.parameters()).device  # a recovery leaves the model where it was trained
    try:
        for start in range(0, len(features), batch_size):
            batch = collate([features[i] for i in range(start, min(start + batch_size, len(features)))])
            batch = {name: values.to(device) for name, values in batch.items()}
            labels, teacher = batch.pop("labels"), {n: batch.pop(n) for n in list(batch) if n.startswith("teacher_")}
            outputs = losses.outputs(model(**batch))
            loss, _ = losses.label_loss(outputs, labels)
            if teacher:
                weight = distill.soft_target_weight
                loss = (1 - weight) * loss + weight * losses.soft_loss(outputs, teacher, labels, distill)
            gradients = torch.autograd.grad(loss, [gates[i] for i in range(len(widths))])
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient[:, 0].abs().sum(dim=0).double().cpu().numpy()
    finally:
        for hook in hooks:
            hook.remove()
    totals = [total / len(features) for total in totals]
    return totals[: len(layers)], totals[len(layers) :]


def choose_kept(importance: list[np.ndarray], remove: int, minimum: int) -> list[np.ndarray]:
    """Indices to keep in each layer when the `remove` least important of all layers together go.

    Layers compete with one another, so they end up uneven; none falls below `minimum`.
    """
    kept = [np.ones(len(layer), dtype=bool) for layer in importance]
    ranked = sorted(
        (value, layer, index) for layer, values in enumerate(importance) for index, value in enumerate(values)
    )
    for _, layer, index in ranked:
        if remove == 0:
            break
        if kept[layer].sum() > minimum:
            kept[layer][index] = False
            remove -= 1
    return [np.flatnonzero(layer) for layer in kept]


def can_be_pruned(directory: Path) -> bool:
    """Whether the model in `directory` has heads and neurons to remove; says so where it has none."""
    model_type = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    prunable = model_type in FAMILIES and FAMILIES[model_type].prunable
    if not prunable and PartialState().is_main_process:
        reason = (
            "shares them among heads"
            if model_type in FAMILIES
            else "has no attention heads and feed-forward neurons to remove"
        )
        print(f"pruned: skipped, a {model_type} {reason}", flush=True)
    return prunable


def prune_and_recover(
    source: str,
    directory: Path,
    task: Any,
    teacher: Path,
    prune: PruneConfig,
    distill: DistillConfig,
    training: transformers.TrainingArguments,
    soft_targets: Path | None = None,
) -> Outcome:
    """Remove the least important heads and neurons of the student in `source`, in steps, recovering by distillation after each."""
    state = PartialState()
    processor = task.load_processor(source)
    model = remove_zeros(task.load_model(source))
    check_prunable(model)
    before = shape_of(model)
    details: dict[str, Any] = {"before": before, "steps": []}
    arguments = arguments_for(training, prune.prune_learning_rate, prune.prune_epochs)
    if PartialState().is_main_process:
        for chosen in (directory / CHECKPOINTS).glob("step-*-cut"):
            if damage := checkpoint_damage(chosen):
                print(f"{chosen.name}: not used, because {damage}", flush=True)
                shutil.rmtree(chosen)
    state.wait_for_everyone()
    for step in range(1, prune.prune_steps + 1):
        # The main process chooses and writes what is left, and every process reads that: a rank decided by the last bit of a
        # gradient would otherwise give the processes models of different shapes. A resumed run reads it, too.
        chosen = directory / CHECKPOINTS / f"step-{step}-cut"
        if PartialState().is_main_process and not chosen.is_dir():
            share = step / prune.prune_steps
            cut_step(model, processor, task, prune, distill, soft_targets, before, share)
            partial = chosen.with_suffix(".partial")
            save(with_stock_shapes(model), processor, partial)
            write_json(partial / STEPS, sealed({"steps": details["steps"]}))
            write_checksums(partial)
            partial.rename(chosen)
        wait_for_all()
        if (directory / CHECKPOINTS / f"step-{step + 1}-cut").is_dir():
            continue
        details["steps"] = json.loads((chosen / STEPS).read_text(encoding="utf-8"))["steps"]
        model = remove_zeros(task.load_model(str(chosen)))
        recovery: dict[str, Any] = {}
        if prune.prune_epochs > 0:
            checkpoints = directory / CHECKPOINTS / f"step-{step}"
            try:
                recovery = train_student(
                    model, processor, task, str(teacher), distill, arguments, soft_targets, checkpoints
                )  # fmt: skip
            except InputError as error:
                raise InputError(f"{error} What the cut of step {step} left is kept in {chosen}.") from error
        details["steps"].append({**shape_of(model), "recovery": recovery})
    if not PartialState().is_main_process:
        return Outcome("transformers")
    after = shape_of(model)
    details["after"] = after
    details["heads_removed"] = 1 - sum(after["heads"]) / sum(before["heads"])
    details["neurons_removed"] = 1 - sum(after["neurons"]) / sum(before["neurons"])
    metrics = validation_metrics(model, task, processor)
    save(with_stock_shapes(model), processor, directory)
    return Outcome("transformers", {"validation": metrics}, count_parameters(model), details)


def check_prunable(model: Any) -> None:
    if not family_of(model.config).prunable:
        raise InputError(
            f"expected a model whose attention heads can be removed one by one, found {model.config.model_type!r}, where query heads share "
            "keys and values. Leave pruning out (--prune_heads 0 --prune_ffn 0)."
        )


def cut_step(
    model: Any, processor: Any, task: Any, prune: PruneConfig, distill: DistillConfig, soft_targets: Path | None,
    before: dict[str, list[int]], share: float,
) -> None:  # fmt: skip
    """Cut `model` in place down to what `share` of the whole pruning leaves of the shapes `before`."""
    features = task.features(processor)["train"]
    if soft_targets is not None:
        features = WithSoftTargets(features, soft_targets)
    chosen = np.random.default_rng(0).permutation(len(features))[: prune.prune_samples]
    heads, neurons = measure_importance(model, features.select(np.sort(chosen)), task.collate(processor), distill)
    left = shape_of(model)
    remove_heads = round(prune.prune_heads * share * sum(before["heads"])) - (sum(before["heads"]) - sum(left["heads"]))
    remove_neurons = round(prune.prune_ffn * share * sum(before["neurons"])) - (
        sum(before["neurons"]) - sum(left["neurons"])
    )
    cut(model, choose_kept(heads, remove_heads, 1), choose_kept(neurons, remove_neurons, MINIMUM_NEURONS))
