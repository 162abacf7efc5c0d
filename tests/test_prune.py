"""Importance, the choice, the physical removal, and what stays on disk."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from conftest import example_inputs, tiny_model
from pipelines.architectures import family_of, layers_of
from pipelines.config import DistillConfig, PruneConfig
from pipelines.prune import choose_kept, measure_importance, prune_and_recover
from pipelines.soft_targets import compute_soft_targets
from pipelines.surgery import cut, load_model, remove_zeros, shape_of, with_stock_shapes

FAMILIES = ["bert", "distilbert", "roberta", "electra", "vit", "deit"]
HEADS = [np.array([0, 3]), np.array([1]), np.array([0, 1, 2, 3]), np.array([2, 3])]
NEURONS = [np.arange(10), np.arange(5, 64), np.array([1, 4, 9, 63]), np.arange(64)]


def zeroed(model, kept_heads, kept_neurons):
    """The same model with the removed heads and neurons silenced by hand, in stock shapes."""
    model = copy.deepcopy(model)
    family = family_of(model.config)
    with torch.no_grad():
        for layer, heads, neurons in zip(layers_of(model), kept_heads, kept_neurons, strict=True):
            for head in set(range(4)) - set(heads.tolist()):
                layer.get_submodule(family.attention_output).weight[:, head * 8 : (head + 1) * 8] = 0
            for neuron in set(range(64)) - set(neurons.tolist()):
                layer.get_submodule(family.ffn_output).weight[:, neuron] = 0
    return model


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_cut_model_equals_the_silenced_one(model_type):
    model, inputs = tiny_model(model_type), example_inputs(model_type)
    expected = zeroed(model, HEADS, NEURONS)(**inputs).logits
    before = model(**inputs).logits
    cut(model, HEADS, NEURONS)
    assert shape_of(model) == {"heads": [2, 1, 4, 2], "neurons": [10, 59, 4, 64]}
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert (before - expected).abs().max() > 1e-2  # the parts removed did matter


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_pruned_model_opens_with_stock_classes_and_loads_without_its_zeros(model_type, tmp_path):
    model, inputs = tiny_model(model_type), example_inputs(model_type)
    cut(model, HEADS, NEURONS)
    with_stock_shapes(model).save_pretrained(tmp_path)
    stock, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model(**inputs).logits
    torch.testing.assert_close(stock.eval()(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    small = load_model(tmp_path)
    assert shape_of(small) == shape_of(model)
    torch.testing.assert_close(small(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_dense_model_has_nothing_to_remove():
    model = tiny_model()
    expected = model(**example_inputs()).logits
    assert shape_of(remove_zeros(model)) == {"heads": [4] * 4, "neurons": [64] * 4}
    torch.testing.assert_close(model(**example_inputs()).logits, expected)


@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_importance_is_the_slope_of_the_loss_as_a_gate_closes(model_type, task_and_processor):
    """Against finite differences: scale one head's, or neuron's, output weights by 1 - h and see the loss of each example move."""
    task, processor = task_and_processor
    model = tiny_model(model_type, seed=2).double()
    family = family_of(model.config)
    features, own = task.features(processor)["train"].select(range(6)), task.collate(processor)

    def collate(rows):
        return {name: value.double() if value.is_floating_point() else value for name, value in own(rows).items()}

    distill = DistillConfig(soft_target_weight=0.0)
    heads, neurons = measure_importance(model, features, collate, distill, batch_size=4)
    assert [len(layer) for layer in heads] == [4] * 4
    assert [len(layer) for layer in neurons] == [64] * 4

    def losses(model):
        values = []
        for example in features:
            batch = collate([example])
            labels = batch.pop("labels")
            values.append(torch.nn.functional.cross_entropy(model(**batch).logits, labels).item())
        return np.array(values)

    step = 1e-4
    for layer, path, columns, found in [
        (0, family.attention_output, slice(8, 16), heads[0][1]),
        (3, family.attention_output, slice(0, 8), heads[3][0]),
        (1, family.ffn_output, slice(17, 18), neurons[1][17]),
        (2, family.ffn_output, slice(63, 64), neurons[2][63]),
    ]:
        moved = []
        for sign in (1, -1):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                layers_of(changed)[layer].get_submodule(path).weight[:, columns] *= 1 + sign * step
            moved.append(losses(changed))
        slope = np.abs((moved[0] - moved[1]) / (2 * step)).mean()
        assert found == pytest.approx(slope, rel=2e-2, abs=1e-6)


def test_the_least_important_go_first_and_no_layer_goes_empty():
    importance = [np.array([0.1, 0.2, 0.3]), np.array([5.0, 0.25, 6.0]), np.array([0.01, 0.02, 0.03])]
    kept = choose_kept(importance, 5, minimum=1)
    assert [layer.tolist() for layer in kept] == [[2], [0, 2], [2]]
    assert [len(layer) for layer in choose_kept(importance, 9, minimum=1)] == [1, 1, 1]


def test_pruning_removes_the_share_asked_for_unevenly_and_recovers(trained_teacher, task, training, tmp_path):
    compute_soft_targets(str(trained_teacher), tmp_path, task)
    training.num_train_epochs, training.learning_rate = 3, 3e-3
    outcome = prune_and_recover(
        str(trained_teacher), tmp_path / "pruned", task, teacher=trained_teacher,
        prune=PruneConfig(prune_heads=0.5, prune_ffn=0.5, prune_steps=2, prune_epochs=3), distill=DistillConfig(),
        training=training, soft_targets=tmp_path,
    )  # fmt: skip
    assert outcome.details["heads_removed"] == pytest.approx(0.5)
    assert outcome.details["neurons_removed"] == pytest.approx(0.5)
    assert len(outcome.details["steps"]) == 2
    after = outcome.details["after"]
    assert min(after["heads"]) >= 1
    assert len(set(after["neurons"])) > 1
    assert outcome.metrics["validation"]["accuracy"] > 0.7
    small = load_model(tmp_path / "pruned")
    assert shape_of(small) == after
    assert sum(p.numel() for p in small.parameters()) == outcome.parameters
