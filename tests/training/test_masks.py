"""What pruning left is scaled without training: against a least squares of its own, in every family, and in the stage."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from conftest import example_inputs, tiny_model
from pipelines.core.config import DistillConfig, PruneConfig
from pipelines.models.families import FAMILIES, groups_of, layers_of
from pipelines.models.removal import cut, load_model, shape_of
from pipelines.training import masks
from pipelines.training.masks import tune_masks
from pipelines.training.prune import prune_and_recover

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import families as tiny  # noqa: E402

UNCUT = ("albert", "convnextv2", "resnet")  # or a layer used several times


def of_tokens(model: Any, path: str, layer: int, batch: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs, without bias, of a map of a layer, where there is no padding."""
    linear, found = layers_of(model)[layer].get_submodule(path), []
    hook = linear.register_forward_hook(lambda _, inputs, output: found.append((inputs[0], output - linear.bias)))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return tuple(values[batch["attention_mask"].bool()].double().numpy() for values in found[0])


@pytest.mark.parametrize(
    ("kind", "path", "width"), [("heads", "attention.output.dense", 8), ("neurons", "output.dense", 1)]
)
def test_the_factors_are_those_of_a_least_squares_and_padding_does_not_count(kind, path, width, monkeypatch):
    monkeypatch.setattr(masks, "DAMPING", 1e-6)
    whole, batch = tiny_model(seed=2), example_inputs()
    batch = {name: values.repeat(8, 1) for name, values in batch.items()}
    batch["input_ids"] = torch.randint(5, 50, batch["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    kept = {"heads": [np.array([0, 3])] * 4, "neurons": [np.arange(0, 64, 4)] * 4}
    model = copy.deepcopy(whole)
    cut(model, **kept)
    plain = copy.deepcopy(model)
    off = tune_masks(model, whole, [batch])
    # Of the first layer and, with all before it scaled, of the last one.
    for layer in (0, 3):
        before = copy.deepcopy(model)
        stale, tuned = (layers_of(one)[layer].get_submodule(path).weight.detach() for one in (plain, model))
        layers_of(before)[layer].get_submodule(path).weight.data.copy_(stale)
        read, written = of_tokens(before, path, layer, batch)[0], of_tokens(whole, path, layer, batch)[1]
        units = len(kept[kind][layer])
        columns = np.einsum(
            "ruw,duw->rdu", read.reshape(-1, units, width), stale.double().numpy().reshape(-1, units, width)
        )
        solved, *_ = np.linalg.lstsq(columns.reshape(-1, units), written.ravel())
        factors = (tuned / stale).numpy().reshape(-1, units, width)
        np.testing.assert_allclose(factors, np.broadcast_to(solved[:, None], factors.shape), rtol=2e-2, atol=2e-3)
        shares = [
            np.square(columns @ one - written).sum() / np.square(written).sum() for one in (np.ones(units), solved)
        ]
        np.testing.assert_allclose(off[kind][layer], shares, rtol=1e-3)
        assert shares[1] < 0.99 * shares[0]
    noisy = copy.deepcopy(plain)
    other = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)
    assert tune_masks(noisy, whole, [{**batch, "input_ids": other}]) == off


@pytest.mark.parametrize("model_type", sorted({*FAMILIES} - {*UNCUT}))
def test_every_family_comes_closer_to_the_uncut_model(model_type):
    whole = tiny.tiny_model(model_type)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_((0.2 if parameter.dim() > 1 else 0.1) * torch.randn_like(parameter))
    batch = example_inputs()
    if tiny.task_of(model_type) == "image-classification":
        batch = {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    counts = shape_of(whole)
    kept = {kind: [np.arange(0, count, 2) for count in layers] for kind, layers in counts.items()}
    model = copy.deepcopy(whole)
    cut(model, **kept)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    off = tune_masks(model, whole, [batch])
    assert {kind: len(layers) for kind, layers in off.items()} == {kind: len(kept[kind]) for kind in kept}
    for kind, group in groups_of(model.config).items():
        assert all(after <= untuned + 1e-6 for untuned, after in off[kind])
        for layer in layers_of(model):
            linear = layer.get_submodule(group.input)
            changed = next(
                name for name, values in model.state_dict().items() if values.data_ptr() == linear.weight.data_ptr()
            )
            factors = linear.weight.detach() / before.pop(changed)
            # One factor for each input of the map, whatever the output.
            assert factors.std(dim=1 if isinstance(linear, Conv1D) else 0).max() < 1e-3
            assert (factors - 1).abs().max() > 1e-3
    assert all(torch.equal(values, model.state_dict()[name]) for name, values in before.items())


def test_factors_that_explode_are_damped_and_layers_used_several_times_are_left(monkeypatch, capsys):
    whole, batch = tiny_model(seed=2), example_inputs()
    model = copy.deepcopy(whole)
    cut(model, neurons=[np.arange(8)] * 4)
    monkeypatch.setattr(masks, "LARGEST", 1.05)
    before = copy.deepcopy(model.state_dict())
    tune_masks(model, whole, [batch])
    for layer in range(4):
        name = f"bert.encoder.layer.{layer}.output.dense.weight"
        factors = (model.state_dict()[name] / before[name])[0]
        assert (factors - 1).abs().max() > 1e-3
        assert factors.abs().max() < 1.0501
    albert = tiny_model("albert")
    assert tune_masks(albert, albert, [batch]) == {}
    assert "albert uses a layer several times" in capsys.readouterr().out


def test_without_epochs_the_stage_scales_what_is_left(trained_teacher, task, training, tmp_path, monkeypatch):
    def pruned(name: str) -> Any:
        prune = PruneConfig(prune_heads=0.25, prune_ffn=0.5, prune_steps=1, prune_epochs=0)
        arguments = (str(trained_teacher), tmp_path / name, task, trained_teacher, prune)
        outcome = prune_and_recover(*arguments, DistillConfig(soft_target_weight=0.0), training)
        return outcome, load_model(tmp_path / name)

    outcome, tuned = pruned("tuned")
    off = outcome.details["steps"][0]["recovery"]["off"]
    assert sum(after for _, after in off["neurons"]) < 0.95 * sum(untuned for untuned, _ in off["neurons"])
    monkeypatch.setattr("pipelines.training.prune.tune_masks", lambda *arguments: {})
    _, plain = pruned("plain")
    assert shape_of(tuned) == shape_of(plain)
    # What is on the disk is scaled.
    assert not torch.equal(*(layers_of(one)[3].output.dense.weight for one in (tuned, plain)))
