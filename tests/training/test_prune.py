"""Importance, the choice of what to remove, and the stage that prunes and recovers."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from conftest import example_inputs, tiny_config, tiny_language_model, tiny_model
from pipelines.core.config import DistillConfig, PruneConfig
from pipelines.core.divergences import DIVERGENCES
from pipelines.core.errors import InputError
from pipelines.models.families import groups_of, layers_of
from pipelines.models.removal import load_model, shape_of
from pipelines.training.prune import (
    checked_pruning,
    choose_kept,
    choose_units,
    measure_importance,
    possible_pruning,
    prune_and_recover,
    training_loss,
)
from pipelines.training.soft_targets import compute_soft_targets


class Standin:
    """The part of a task that importance asks for, over rows that are a model's inputs and labels."""

    def __init__(self, teacher: Any = None) -> None:
        self.teacher = teacher

    def load_processor(self, source: str) -> str:
        return source

    def load_model(self, source: str) -> Any:
        return self.teacher

    def collate(self, processor: str) -> Any:
        return lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def training_collate(self, processor: str, teacher_processor: str | None = None) -> Any:
        return self.collate(processor)

    def outputs(self, model_output: Any) -> dict[str, torch.Tensor]:
        return {"logits": model_output.logits}

    def label_loss(self, outputs: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.cross_entropy(outputs["logits"], labels, reduction="sum"), torch.tensor(len(labels))

    def soft_loss(self, outputs: Any, teacher: Any, labels: torch.Tensor, distill: DistillConfig) -> torch.Tensor:
        # Of stored soft targets as of a teacher's outputs.
        target = teacher["teacher_logits"] if "teacher_logits" in teacher else teacher["logits"]
        return (
            distill.temperature**2
            * DIVERGENCES[distill.divergence](
                (target / distill.temperature).log_softmax(-1),
                (outputs["logits"] / distill.temperature).log_softmax(-1),
                distill.beta,
            ).sum()
        )


def make_rows(model_type: str, examples: int = 6) -> list[dict[str, torch.Tensor]]:
    batches = [example_inputs(model_type) for _ in range(examples // 3)]
    for shift, batch in enumerate(batches):
        if "input_ids" in batch:
            batch["input_ids"] = (batch["input_ids"] + 7 * shift) % 80
        else:
            batch["pixel_values"] = batch["pixel_values"].roll(shift, dims=0) * (1 + shift)
    return [
        {**{name: values[row] for name, values in batch.items()}, "labels": torch.tensor((row + shift) % 3)}
        for shift, batch in enumerate(batches)
        for row in range(3)
    ]


class LastToken(torch.nn.Module):
    """A classifier of a causal model: its logits for three tokens at the last place."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.base_model = model, model.config, model.base_model

    def forward(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self.model(**inputs).logits[:, 0, :3])


def make_model(model_type: str) -> Any:
    if model_type in ("gpt2", "llama"):
        sizes = {"num_attention_heads": 8, "num_key_value_heads": 4} if model_type == "llama" else {}
        return LastToken(tiny_language_model(model_type, **sizes)).double()
    return tiny_model(model_type, seed=2).double()


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("bert", {"soft_target_weight": 0.0}),
        ("bert", {"soft_target_weight": 0.7, "divergence": "forward_kl"}),
        ("bert", {"soft_target_weight": 0.7, "divergence": "reverse_kl"}),
        ("vit", {"soft_target_weight": 0.0}),
        ("gpt2", {"soft_target_weight": 0.5, "divergence": "jensen_shannon"}),
        ("llama", {"soft_target_weight": 0.0}),
    ],
)
def test_importance_is_the_slope_of_the_loss_as_a_gate_closes(model_type, settings):
    """Against finite differences: scale one unit's output weights by 1 - h and see the loss of each example move."""
    model, distill, rows = make_model(model_type), DistillConfig(**settings), make_rows(model_type)
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        if "pixel_values" in row:
            row["pixel_values"] = row["pixel_values"].double()
        if distill.soft_target_weight:
            row["teacher_logits"] = torch.randn(3, generator=generator).double()
    importance = measure_importance(
        model, rows, training_loss(model, "processor", Standin(), distill, teacher=None), batch_size=4
    )
    assert [len(layer) for layer in importance["heads"]] == [4] * len(layers_of(model))

    step = 1e-4
    for kind, layer, unit in [("heads", 0, 1), ("heads", 2, 0), ("neurons", 1, 17), ("neurons", 2, 63)]:
        moved = []
        for sign in (1, -1):
            changed = copy.deepcopy(model)
            linear = layers_of(changed)[layer].get_submodule(groups_of(model.config)[kind].input)
            weight = linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data
            width = weight.shape[1] // len(importance[kind][layer])
            weight[:, unit * width : (unit + 1) * width] *= 1 + sign * step
            of_row = training_loss(changed, "processor", Standin(), distill, teacher=None)
            moved.append(np.array([of_row([row]).item() for row in rows]))
        slope = np.abs((moved[0] - moved[1]) / (2 * step)).mean()
        assert slope > 1e-7
        assert importance[kind][layer][unit] == pytest.approx(slope, rel=2e-2, abs=1e-6)


def test_an_online_teacher_counts_as_its_stored_soft_targets_do():
    model, teacher, rows = tiny_model(seed=2), tiny_model(seed=3), make_rows("bert")
    distill = DistillConfig(soft_target_weight=0.9, divergence="reverse_kl")
    task = Standin(teacher)
    online = measure_importance(model, rows, training_loss(model, "processor", task, distill, teacher="teacher"))
    with torch.no_grad():
        logits = teacher(**{name: torch.stack([row[name] for row in rows]) for name in example_inputs()}).logits
    stored = [{**row, "teacher_logits": soft} for row, soft in zip(rows, logits, strict=True)]
    from_stored = measure_importance(model, stored, training_loss(model, "processor", task, distill, teacher=None))
    labels_only = DistillConfig(soft_target_weight=0.0)
    from_labels = measure_importance(model, rows, training_loss(model, "processor", task, labels_only, "teacher"))
    for kind, layers in online.items():
        for layer, values in enumerate(layers):
            np.testing.assert_allclose(values, from_stored[kind][layer], rtol=1e-3, atol=1e-6)
            assert not np.allclose(values, from_labels[kind][layer], rtol=1e-2)


def test_a_layer_that_is_used_several_times_has_one_gate():
    model, rows = tiny_model("albert").double(), make_rows("bert")
    loss = training_loss(model, "processor", Standin(), DistillConfig(soft_target_weight=0.0), teacher=None)
    importance = measure_importance(model, rows, loss)["heads"]
    assert [len(layer) for layer in importance] == [4]
    moved = []
    for sign in (1, -1):
        changed = copy.deepcopy(model)
        layers_of(changed)[0].get_submodule("attention.dense").weight.data[:, :8] *= 1 + sign * 1e-4
        of_row = training_loss(changed, "processor", Standin(), DistillConfig(soft_target_weight=0.0), teacher=None)
        moved.append(np.array([of_row([row]).item() for row in rows]))
    assert importance[0][0] == pytest.approx(np.abs((moved[0] - moved[1]) / 2e-4).mean(), rel=2e-2)


def test_the_least_important_go_first_and_no_layer_goes_empty():
    importance = [np.array([0.1, 0.2, 0.3]), np.array([5.0, 0.25, 6.0]), np.array([0.01, 0.02, 0.03])]
    kept = choose_kept(importance, 5, minimum=1)
    assert [layer.tolist() for layer in kept] == [[2], [0, 2], [2]]
    assert [len(layer) for layer in choose_kept(importance, 9, minimum=1)] == [1, 1, 1]


def test_the_share_to_remove_grows_from_step_to_step():
    importance = {"heads": [np.arange(4.0), np.arange(4.0)], "neurons": [np.arange(64.0)] * 2}
    before = {"heads": [4, 4], "neurons": [64, 64]}
    kept = choose_units(importance, before, PruneConfig(prune_heads=0.5, prune_ffn=0.25), 0.5)
    assert [len(layer) for layer in kept["heads"]] == [3, 3]
    assert sum(len(layer) for layer in kept["neurons"]) == 128 - 16
    least = choose_units(importance, before, PruneConfig(prune_heads=0.99, prune_ffn=0.99), 1.0)
    assert [len(layer) for kind in ("heads", "neurons") for layer in least[kind]] == [1, 1, 8, 8]


def test_what_a_family_does_not_allow_is_left_out_with_a_line(capsys):
    config, resnet = tiny_model().config, tiny_model("resnet").config
    assert possible_pruning(config, PruneConfig()) == PruneConfig()
    assert capsys.readouterr().out == ""
    assert possible_pruning(resnet, PruneConfig()) == PruneConfig(prune_heads=0.0, prune_ffn=0.0)
    assert "pruned: the neurons of a resnet stay: its layers are convolutions" in capsys.readouterr().out
    assert possible_pruning(tiny_config("mpnet"), PruneConfig()) == PruneConfig(prune_heads=0.0)
    assert capsys.readouterr().out.startswith("pruned: the heads of a mpnet stay: all layers share a bias")
    with pytest.raises(InputError, match="Leave pruning out"):
        checked_pruning(resnet, PruneConfig(), "resnet")


def test_pruning_removes_the_share_asked_for_unevenly_and_recovers(trained_teacher, task, training, tmp_path, capsys):
    compute_soft_targets(str(trained_teacher), tmp_path, task, DistillConfig())
    training.num_train_epochs, training.learning_rate = 3, 3e-3
    arguments = {
        "source": str(trained_teacher),
        "directory": tmp_path / "pruned",
        "task": task,
        "teacher": trained_teacher,
        "prune": PruneConfig(prune_heads=0.5, prune_ffn=0.5, prune_steps=2, prune_epochs=3),
        "distill": DistillConfig(),
        "training": training,
        "soft_targets": tmp_path,
    }
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


def test_a_pruned_model_recovers_by_attention_and_relations_though_its_heads_are_fewer(
    trained_teacher, task, training, tmp_path
):
    """Maps are averaged over the heads, and queries cut into as many relation heads as divide what is left of both widths."""
    distill = DistillConfig(attention_weight=1.0, relation_weight=1.0, hidden_state_weight=0.1)
    prune, training.max_steps = PruneConfig(prune_heads=0.3, prune_ffn=0.0, prune_steps=1, prune_epochs=0.5), 3
    outcome = prune_and_recover(
        str(trained_teacher), tmp_path / "pruned", task, trained_teacher, prune, distill, training
    )
    assert len(set(outcome.details["after"]["heads"])) > 1
    losses = outcome.details["steps"][0]["recovery"]
    assert losses["soft_targets"] == "online"
    assert np.isfinite(losses["train_loss"])


def test_the_heads_of_a_language_model_that_matter_least_go_first(
    language_task, language_model_dir, training, tmp_path
):
    """A head whose output is halved again and again matters less and less."""
    model = language_task.load_model(str(language_model_dir))
    with torch.no_grad():
        for head in range(4):
            model.transformer.h[1].attn.c_proj.weight[head * 8 : head * 8 + 8] *= 0.05**head
    model.save_pretrained(tmp_path / "model")
    processor = language_task.load_processor(str(language_model_dir))
    processor.save_pretrained(tmp_path / "model")
    features = language_task.features(processor)["train"].select(range(16))
    loss = training_loss(model, processor, language_task, DistillConfig(soft_target_weight=0.0), teacher=None)
    importance = measure_importance(model, features, loss)
    assert list(np.argsort(-importance["heads"][1])) == [0, 1, 2, 3]
    assert [len(layer) for layer in importance["neurons"]] == [128, 128, 128]
    outcome = prune_and_recover(
        str(tmp_path / "model"),
        tmp_path / "pruned",
        language_task,
        language_model_dir,
        PruneConfig(prune_heads=0.25, prune_ffn=0.5, prune_steps=2, prune_epochs=0, prune_samples=16),
        DistillConfig(soft_targets="online"),
        training,
    )
    assert sum(outcome.details["after"]["heads"]) == 9
    assert sum(outcome.details["after"]["neurons"]) == 192
    assert outcome.metrics["validation"]["perplexity"] > 1


def test_query_groups_of_a_llama_are_pruned_and_recover(language_task, language_model_dir, training, tmp_path):
    processor = language_task.load_processor(str(language_model_dir))
    tiny_language_model("llama", num_key_value_heads=2).save_pretrained(tmp_path / "llama")
    processor.save_pretrained(tmp_path / "llama")
    training.max_steps = 3
    outcome = prune_and_recover(
        str(tmp_path / "llama"),
        tmp_path / "pruned",
        language_task,
        tmp_path / "llama",
        PruneConfig(prune_heads=0.5, prune_ffn=0.25, prune_steps=1, prune_epochs=1, prune_samples=16),
        DistillConfig(soft_target_weight=0.0),
        training,
    )
    after = outcome.details["after"]
    assert (sum(after["heads"]), sum(after["neurons"])) == (3, 144)
    assert shape_of(load_model(tmp_path / "pruned")) == after


def test_a_model_with_nothing_to_remove_is_refused():
    with pytest.raises(InputError, match="--prune_heads 0"):
        checked_pruning(tiny_config("resnet"), PruneConfig(), "a/resnet")
