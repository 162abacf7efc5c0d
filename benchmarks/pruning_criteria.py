"""Does it matter which heads and neurons go? Two tables on the student of a finished run.

    python benchmarks/pruning_criteria.py --run runs/bert_bbc_headlines --config recipes/configs/bert_bbc_headlines.yaml --output_dir runs/criteria

First, as many units by each criterion, and so as fast: first-order importance (ours), the norm of a unit's weights, or chance. Second, another
mix of heads and neurons, of which a call takes as long as in the first table by the line that `fit` lays through timed graphs. Either all
compete, by importance for each millisecond or for each parameter. Or several shares of heads are cut, and the one stays whose model loses least
on the sample: among mixes of equal milliseconds, or of equal parameters, made as fast as the others. What is left is as it is, scaled (see
pipelines/training/masks.py) or, with --recover, distilled again for --prune_epochs. A seed is another sample of --prune_samples examples, other
chances, and another order of the recovery.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` beside `pipelines`, installed or not

from benchmarks.students import table  # noqa: E402
from pipelines.budget.latency import graphs_of, solve, time_graphs  # noqa: E402
from pipelines.budget.shapes import Forecast, forecast_bytes  # noqa: E402
from pipelines.chain import CHAIN  # noqa: E402
from pipelines.core.command import parse_config, run_main  # noqa: E402
from pipelines.core.config import Settings, flag  # noqa: E402
from pipelines.core.errors import InputError  # noqa: E402
from pipelines.core.run import Run  # noqa: E402
from pipelines.core.task import Task  # noqa: E402
from pipelines.models.families import groups_of, layers_of, slices, unit_count  # noqa: E402
from pipelines.models.predict import predict_torch, sample_of  # noqa: E402
from pipelines.models.removal import cut, shape_of  # noqa: E402
from pipelines.tasks import DEFAULT_TASK, TaskConfig, make_task, task_class  # noqa: E402
from pipelines.training.arguments import arguments_for  # noqa: E402
from pipelines.training.distill import train_student  # noqa: E402
from pipelines.training.masks import tune_masks  # noqa: E402
from pipelines.training.prune import MINIMUM, choose_units, inputs_of, measure_importance, training_loss  # noqa: E402

# The shares of heads that are tried.
HEADS_REMOVED = (0.0, 1 / 6, 1 / 3, 1 / 2, 2 / 3)
Units = dict[str, list[np.ndarray]]  # a number, or the places, of each unit of each layer


@dataclass
class CriteriaConfig:
    run: str | None = flag(None, "A finished run, whose student is pruned.")
    criteria_seeds: list[int] = field(
        default_factory=lambda: [42, 43, 44, 45, 46], metadata={"help": "The seeds that each criterion is tried with."}
    )
    scale: bool = flag(True, "Also scale what is left.")
    recover: bool = flag(False, "Also let what is left recover by distillation.")


def magnitude(model: Any) -> Units:
    """The norm of all weights of each unit."""
    found: Units = {}
    for kind, group in groups_of(model.config).items():
        found[kind] = []
        for layer in layers_of(model):
            squares = np.zeros(unit_count(layer, group))
            for name, axis, places in slices(layer, group):
                values = layer.get_parameter(name).detach().movedim(axis, 0).flatten(1) if "weight" in name else None
                if values is not None:
                    squares += values[places].square().sum(dim=(1, 2)).numpy()
            found[kind].append(np.sqrt(squares))
    return found


def chance(model: Any, seed: int) -> Units:
    random = np.random.default_rng(seed)
    return {kind: [random.random(count) for count in counts] for kind, counts in shape_of(model).items()}


def parameters_of(model: Any) -> dict[str, float]:
    """The parameters of one head and of one neuron."""
    layer, found = layers_of(model)[0], {}
    for kind, group in groups_of(model.config).items():
        sizes = [layer.get_parameter(name).numel() for name, *_ in slices(layer, group)]
        found[kind] = sum(sizes) / unit_count(layer, group)
    return found


def saved_by(kept: Units, before: dict[str, list[int]], costs: dict[str, float]) -> float:
    """The cost of what is gone."""
    return sum(costs[kind] * (sum(before[kind]) - sum(map(len, kept[kind]))) for kind in kept)


def competing(importance: Units, costs: dict[str, float], ms: dict[str, float], target: float) -> Units:
    """The units that stay when those of least importance for their cost go, whatever they are, until `target` milliseconds are saved."""
    kept = {kind: [np.ones(len(layer), dtype=bool) for layer in layers] for kind, layers in importance.items()}
    ranked = sorted(
        (value / max(costs[kind], 1e-12), kind, layer, unit)
        for kind, layers in importance.items()
        for layer, values in enumerate(layers)
        for unit, value in enumerate(values)
    )
    for _, kind, layer, unit in ranked:
        # A unit that would save too much is passed over, so that both choices come equally near.
        if ms[kind] <= target and kept[kind][layer].sum() > MINIMUM[kind]:
            kept[kind][layer][unit] = False
            target -= ms[kind]
    return {kind: [np.flatnonzero(layer) for layer in layers] for kind, layers in kept.items()}


def mixes(
    importance: Units,
    before: dict[str, list[int]],
    shares: Iterable[float],
    costs: dict[str, float],
    saved: float,
    settings: Settings,
) -> dict[float, Units]:
    """For each share of heads that can go the units that stay when it does, and so many neurons that `saved` of the cost is saved in all."""
    found = {}
    for share in shares:
        heads = round(share * sum(before["heads"])) * costs["heads"]
        neurons = (saved - heads) / (sum(before["neurons"]) * costs["neurons"])
        if 0 <= neurons <= 0.95:
            prune = replace(settings.prune, prune_heads=share, prune_ffn=neurons)
            found[share] = choose_units(importance, before, prune, 1.0)
    if not found:
        raise InputError("expected a mix of heads and neurons that saves as much, found none. Prune less.")
    return found


def mean_loss(loss: Any, rows: Any) -> float:
    with torch.inference_mode():
        batches = ([rows[row] for row in range(at, min(at + 32, len(rows)))] for at in range(0, len(rows), 32))
        return sum(float(loss(batch)) for batch in batches) / len(rows)


def least_loss(whole: Any, tried: dict[float, Units], loss_of: Any, rows: Any) -> float:
    """The share of heads of the mix whose cut model has the least loss on the rows."""
    found = {}
    for share, kept in tried.items():
        model = copy.deepcopy(whole)
        cut(model, **kept)
        found[share] = mean_loss(loss_of(model.eval()), rows)
    best = min(found, key=lambda share: found[share])
    print(f"of the heads {best:.0%} go; loss", {f"{share:.0%}": f"{loss:.4f}" for share, loss in found.items()})
    return best


def milliseconds(settings: Settings, run: Run, student: Path) -> dict[str, float]:
    """What one head and one neuron take, by the line through graphs of the student's architecture."""
    task, shapes = run.task, graphs_of(run.task.load_config(str(student)), ["dynamic_int8"])
    making: dict[str, Any] = {"shapes": shapes, "quantize": settings.quantize, "report": settings.report}
    run.stage("latency", time_graphs, str(student), **making)
    rows = forecast_bytes(shapes, str(student), task, settings.quantize.block_size, {None: None})
    line = solve(rows, run.record("latency")["details"]["ms"])
    whole: Forecast = max(rows, key=lambda row: (row.layers, row.heads, row.neurons))

    def less(kind: str) -> float:
        count = getattr(whole, kind)
        return (line(whole) - line(replace(whole, **{kind: 0}))) / count

    return {kind: less(kind) for kind in ("heads", "neurons")}


def scores_of(model: Any, task: Task, processor: Any, loss_of: Any) -> dict[str, float]:
    """The loss on the validation split, which tells more than its score of few examples, and the score on both splits."""
    found = {"loss": mean_loss(loss_of(model.eval()), task.features(processor)["validation"])}
    for split in ("validation", "test"):
        features = task.features(processor)[split]
        predictions = predict_torch(model.eval(), features, task.collate(processor), task, 32)
        found[split] = float(task.scores(predictions, features["labels"], split)[task.primary_metric])
    return found


def compare(settings: Any, task: Task) -> dict[str, list[dict[str, float]]]:
    """The scores of every choice and of what became of what is left, one for each seed."""
    run_directory, prune = Path(settings.criteria.run).absolute(), settings.prune
    student, teacher = run_directory / "student", str(run_directory / "teacher")
    whole, processor = task.load_model(str(student)), task.load_processor(str(student))
    features, before, collate = task.features(processor)["train"], shape_of(whole), task.collate(processor)

    def loss_of(model: Any) -> Any:
        return training_loss(model, processor, task, settings.distill, teacher)

    output = Path(settings.training.output_dir).absolute()
    with Run(output, task, settings.training.seed) as run:
        ms, parameters = milliseconds(settings, run, student), parameters_of(whole)
    print("of a head and a neuron:", {kind: f"{1000 * value:.3g} us" for kind, value in ms.items()}, parameters)
    found: dict[str, list[dict[str, float]]] = {"student": [scores_of(whole, task, processor, loss_of)]}
    for seed in settings.criteria.criteria_seeds:
        rows = sample_of(features, prune.prune_samples, seed)
        batches = inputs_of(rows, collate, settings.training.per_device_eval_batch_size)
        importance = measure_importance(whole, rows, loss_of(whole))
        criteria = {"importance": importance, "magnitude": magnitude(whole), "random": chance(whole, seed)}
        choices = {name: choose_units(values, before, prune, 1.0) for name, values in criteria.items()}
        left = choices["importance"]
        saved = saved_by(left, before, ms)
        for name, costs in (("for each millisecond", ms), ("for each parameter", parameters)):
            choices[name] = competing(importance, costs, ms, saved)
        as_fast = mixes(importance, before, HEADS_REMOVED, ms, saved, settings)
        as_large = mixes(importance, before, as_fast, parameters, saved_by(left, before, parameters), settings)
        for name, found_by in (("milliseconds", as_fast), ("parameters", as_large)):
            # What was chosen among mixes of as many parameters is made as fast as the others.
            choices[f"least loss of equal {name}"] = as_fast[least_loss(whole, found_by, loss_of, rows)]
        for name, kept in choices.items():
            model = copy.deepcopy(whole)
            cut(model, **kept)
            print(seed, name, {kind: sum(counts) for kind, counts in shape_of(model).items()}, flush=True)
            left_as = {name: model}
            if settings.criteria.scale:
                left_as[f"{name}, scaled"] = copy.deepcopy(model)
                tune_masks(left_as[f"{name}, scaled"], whole, batches)
            if settings.criteria.recover:
                training = arguments_for(settings.training, prune.prune_learning_rate, prune.prune_epochs)
                training.seed = seed
                recovered = copy.deepcopy(model)
                place = output / "checkpoints" / f"{seed}_{name}".replace(" ", "_")
                train_student(recovered, processor, task, teacher, settings.distill, training, None, place)
                left_as[f"{name}, recovered"] = recovered
            for row, one in left_as.items():
                found.setdefault(row, []).append(scores_of(one, task, processor, loss_of))
    return found


def main() -> None:
    task_flag = parse_config([TaskConfig], only=True).task.task or DEFAULT_TASK
    settings: Any = parse_config([CriteriaConfig, TaskConfig, *task_class(task_flag).settings, *CHAIN])
    settings.task = TaskConfig(task_flag)
    if settings.criteria.run is None:
        raise InputError("expected a finished run, found none. Pass --run.")
    print(table(compare(settings, make_task(settings))))


if __name__ == "__main__":
    run_main(main)
