"""Importance, the choice, the physical removal, and what stays on disk."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch

from conftest import example_inputs, tiny_model
from pipelines.core.config import DistillConfig, PruneConfig
from pipelines.core.errors import InputError
from pipelines.models.families import family_of, layers_of
from pipelines.models.removal import cut, load_model, remove_zeros, shape_of, with_stock_shapes
from pipelines.training.prune import choose_kept, measure_importance, prune_and_recover
from pipelines.training.soft_targets import compute_soft_targets

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


def test_pruning_removes_the_share_asked_for_unevenly_and_recovers(trained_teacher, task, training, tmp_path, capsys):
    compute_soft_targets(str(trained_teacher), tmp_path, task, DistillConfig())
    training.num_train_epochs, training.learning_rate = 3, 3e-3
    arguments = {
        "source": str(trained_teacher), "directory": tmp_path / "pruned", "task": task, "teacher": trained_teacher,
        "prune": PruneConfig(prune_heads=0.5, prune_ffn=0.5, prune_steps=2, prune_epochs=3), "distill": DistillConfig(),
        "training": training, "soft_targets": tmp_path,
    }  # fmt: skip
    outcome = prune_and_recover(**arguments)
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

    # Killed in the second step, and what that began from has a flipped bit: the same cut, the same weights, the same record.
    undisturbed = (tmp_path / "pruned" / "model.safetensors").read_bytes()
    checkpoints = tmp_path / "pruned" / "checkpoints"
    shutil.rmtree(checkpoints / "step-2")
    flipped = checkpoints / "step-2-cut" / "model.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"!")
    again = prune_and_recover(**arguments)
    assert "step-2-cut: not used, because model.safetensors is truncated, changed" in capsys.readouterr().out
    assert (tmp_path / "pruned" / "model.safetensors").read_bytes() == undisturbed
    shutil.rmtree(checkpoints / "step-2")
    third = prune_and_recover(**arguments)
    assert (tmp_path / "pruned" / "model.safetensors").read_bytes() == undisturbed
    for resumed in (again, third):
        assert [step["recovery"]["losses"] for step in resumed.details["steps"]] == [
            step["recovery"]["losses"] for step in outcome.details["steps"]
        ]


def test_gpt2_heads_and_neurons_are_removed_physically_and_come_back_as_zeros(tmp_path):
    """Its query, key and value are one transposed map, of which each needs its own columns removed."""
    from conftest import tiny_language_model

    model = tiny_language_model()
    zeroed = tiny_language_model()
    heads = [np.array([0, 2]), np.array([1]), np.arange(4)]
    neurons = [np.arange(128), np.arange(0, 128, 3), np.arange(9)]
    with torch.no_grad():
        for layer, kept_heads, kept_neurons in zip(zeroed.transformer.h, heads, neurons, strict=True):
            gone = np.setdiff1d(np.arange(4), kept_heads)
            rows = (gone[:, None] * 8 + np.arange(8)).reshape(-1)
            layer.attn.c_proj.weight[rows] = 0
            layer.mlp.c_proj.weight[np.setdiff1d(np.arange(128), kept_neurons)] = 0
    tokens = torch.arange(3, 43).reshape(2, 20)
    expected = zeroed(tokens).logits
    assert (expected - model(tokens).logits).abs().max() > 0.1
    cut(model, heads, neurons)
    assert shape_of(model) == {"heads": [2, 1, 4], "neurons": [128, 43, 9]}
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)

    with_stock_shapes(model).save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(stock(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    again = load_model(tmp_path)
    assert shape_of(again) == shape_of(model)
    torch.testing.assert_close(again(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        generated = again.generate(tokens[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert (
            generated.tolist()
            == zeroed.generate(tokens[:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()
        )


def test_the_heads_of_a_language_model_that_matter_least_go_first(
    language_task, language_model_dir, training, tmp_path
):
    """A head whose output is halved again and again matters less and less."""
    from pipelines.training.prune import measure_importance

    model = language_task.load_model(str(language_model_dir))
    with torch.no_grad():
        for head in range(4):
            model.transformer.h[1].attn.c_proj.weight[head * 8 : head * 8 + 8] *= 0.05**head
    model.save_pretrained(tmp_path / "model")
    processor = language_task.load_processor(str(language_model_dir))
    processor.save_pretrained(tmp_path / "model")
    features = language_task.features(processor)["train"].select(range(16))
    distill = DistillConfig(soft_target_weight=0.0)
    heads, neurons = measure_importance(model, features, language_task.collate(processor), distill)
    assert list(np.argsort(-heads[1])) == [0, 1, 2, 3]
    assert [len(layer) for layer in neurons] == [128, 128, 128]
    outcome = prune_and_recover(
        str(tmp_path / "model"), tmp_path / "pruned", language_task, language_model_dir,
        PruneConfig(prune_heads=0.25, prune_ffn=0.5, prune_steps=2, prune_epochs=0, prune_samples=16),
        DistillConfig(soft_targets="online"), training,
    )  # fmt: skip
    assert sum(outcome.details["after"]["heads"]) == 9
    assert sum(outcome.details["after"]["neurons"]) == 192
    assert outcome.metrics["validation"]["perplexity"] > 1
    llama = tmp_path / "llama"
    from conftest import tiny_language_model

    tiny_language_model("llama").save_pretrained(llama)
    processor.save_pretrained(llama)
    with pytest.raises(InputError, match="--prune_heads 0"):
        prune_and_recover(
            str(llama), tmp_path / "out", language_task, language_model_dir, PruneConfig(), DistillConfig(), training
        )
