"""A last layer that computes the [CLS] token only gives the logits and the gradients of one that computes all, and is undone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import example_inputs, tiny_model
from pipelines.core.config import DistillConfig, StudentConfig
from pipelines.core.identity import describe
from pipelines.models.families import layers_of
from pipelines.models.removal import cut
from pipelines.training.arguments import TrainingArguments
from pipelines.training.cpu import cls_token_only
from pipelines.training.distill import DistillationTrainer, distill_student

MODEL_TYPES = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "vit", "deit"]
FFN_INPUTS = {"distilbert": "ffn.lin1", "vit": "mlp.fc1", "deit": "mlp.fc1"}


def is_hooked(model):
    return any(module._forward_hooks for module in model.modules())


def forward_and_backward(model, inputs):
    """Logits, the gradient of every weight, and how many tokens' neurons each layer has computed."""
    tokens = []
    path = FFN_INPUTS.get(model.config.model_type, "intermediate.dense")
    hooks = [
        layer.get_submodule(path).register_forward_hook(lambda _, arguments, output: tokens.append(output.shape[1]))
        for layer in layers_of(model)
    ]
    model.zero_grad()
    logits = model(**inputs).logits
    (logits * torch.arange(logits.numel()).view(logits.shape)).sum().backward()
    for hook in hooks:
        hook.remove()
    return logits.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}, tokens


def assert_alike(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5 * (1 + scale), msg=name)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_logits_and_all_gradients_are_the_same(model_type, uneven, attention):
    model = tiny_model(model_type)
    model.set_attn_implementation(attention)
    if uneven:
        cut(
            model,
            [np.arange(4), np.arange(2), np.arange(4), np.arange(3)],
            [np.arange(64), np.arange(9), np.arange(5), np.arange(33)],
        )
    inputs = example_inputs(model_type)
    expected = forward_and_backward(model, inputs)
    with cls_token_only(model):
        assert_alike(found := forward_and_backward(model, inputs), expected)
        model.gradient_checkpointing_enable()
        model.train()
        assert_alike(forward_and_backward(model, inputs), expected)
    assert expected[2][:4] == [expected[2][0]] * 4
    assert found[2] == [*expected[2][:3], 1]
    model.gradient_checkpointing_disable()
    assert forward_and_backward(model, inputs)[2] == expected[2]


def test_what_reads_other_tokens_is_left_as_it_is():
    from transformers import (
        AutoModelForMaskedLM,
        AutoModelForTokenClassification,
        DeiTForImageClassificationWithTeacher,
    )

    class MeanForSequenceClassification(type(tiny_model())):
        """A head that a model brought itself."""

    classifier = tiny_model("deit")
    models = [
        DeiTForImageClassificationWithTeacher(classifier.config),
        AutoModelForTokenClassification.from_config(tiny_model().config),
        AutoModelForMaskedLM.from_config(tiny_model().config),
        tiny_model("resnet"),
        MeanForSequenceClassification(tiny_model().config),
        tiny_model(chunk_size_feed_forward=2),  # one token is not cut in two
    ]
    for model in models:
        with cls_token_only(model):
            assert not is_hooked(model)


def test_it_drops_out_as_a_whole_layer_does():
    """Attention and hidden states of the last layer are dropped out while training: means over many draws are those of all tokens."""
    for model_type in ("bert", "distilbert", "vit"):
        drops = {"attention_dropout": 0.5, "dropout": 0.3} if model_type == "distilbert" else {}
        drops = drops or {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.3}
        model = tiny_model(model_type, **drops).train()
        inputs = {name: value[:1].repeat_interleave(4000, 0) for name, value in example_inputs(model_type).items()}
        torch.manual_seed(0)
        with torch.no_grad():
            expected = model(**inputs).logits
            with cls_token_only(model):
                found = model(**inputs).logits
        # Two samples of 4,000: means within five standard errors, spreads within a tenth.
        errors = (expected.var(0) + found.var(0)).div(4000).sqrt()
        assert ((found.mean(0) - expected.mean(0)).abs() < 5 * errors).all()
        torch.testing.assert_close(found.std(0), expected.std(0), rtol=0.1, atol=0)


def test_a_lora_adapter_of_the_last_layer_learns_the_same():
    model = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules=["query", "key", "value", "dense"], modules_to_save=["classifier"])
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = example_inputs()

    def gradients():
        model.zero_grad()
        model(**inputs).logits.square().sum().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    expected = gradients()
    with cls_token_only(model):
        assert is_hooked(model.get_base_model())
        found = gradients()
    assert not is_hooked(model.get_base_model())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-4 * float(1 + gradient.abs().max()), msg=name
        )


@pytest.mark.parametrize(("cpu_speedups", "hidden_state_weight"), [(True, 0.0), (True, 1.0), (False, 0.0)])
def test_student_and_online_teacher_use_it_unless_all_hidden_states_are_needed(
    cpu_speedups, hidden_state_weight, trained_teacher, task, training, tmp_path, monkeypatch
):
    seen = []
    step = DistillationTrainer.training_step

    def watched(self, model, *arguments, **keywords):
        seen.extend(map(is_hooked, (model, self.teacher)))
        return step(self, model, *arguments, **keywords)

    monkeypatch.setattr(DistillationTrainer, "training_step", watched)
    training.max_steps, training.cpu_speedups = 1, cpu_speedups
    distill = DistillConfig(soft_targets="online", hidden_state_weight=hidden_state_weight)
    distill_student(
        str(trained_teacher), tmp_path / "student", task, StudentConfig(student_layers="2"), distill, training
    )
    assert seen == [cpu_speedups and hidden_state_weight == 0] * 2


def test_the_switch_is_part_of_what_made_a_stage_only_where_it_changes_the_result(tmp_path):
    def key(**settings):
        return describe(TrainingArguments(str(tmp_path), **settings))

    usual = key(use_cpu=True)
    assert "cpu_speedups" not in usual
    assert key(use_cpu=True, cpu_speedups=False) == usual | {"cpu_speedups": False}
    on_gpu = TrainingArguments(str(tmp_path), use_cpu=True, cpu_speedups=False)
    on_gpu.__dict__["_setup_devices"] = torch.device("cuda", 0)
    assert describe(on_gpu) == usual


def test_it_is_undone_in_a_copy_that_took_the_models_place():
    """As after a training whose weights were sharded."""
    model = tiny_model()
    with cls_token_only(model):
        whole = copy.deepcopy(model)
        assert is_hooked(whole)
        model.__dict__ = whole.__dict__
    assert not is_hooked(model)
