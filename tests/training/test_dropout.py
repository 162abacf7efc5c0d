"""Cheaper dropout is the same dropout, and leaves the model as it was."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from conftest import example_inputs, tiny_language_model, tiny_model
from pipelines.training import dropout
from pipelines.training.dropout import BitDropout, cheap_dropout, drop_out
from pipelines.training.trainer import TrainingArguments, train


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_bits_drop_the_asked_share_and_keep_the_mean(p):
    torch.manual_seed(0)
    values = torch.ones(999, 1001, requires_grad=True)
    dropped = BitDropout(p)(values)
    kept = dropped != 0
    # Four standard deviations of a binomial share.
    assert abs(kept.double().mean() - (1 - p)) < 4 * (p * (1 - p) / values.numel()) ** 0.5
    torch.testing.assert_close(dropped[kept], torch.full((int(kept.sum()),), 1 / (1 - p)))
    dropped.sum().backward()
    torch.testing.assert_close(values.grad, dropped.detach())
    # No row or column is dropped more than another: a draw's four parts are independent.
    assert (kept.double().mean(0) - (1 - p)).abs().max() < 6 * (p * (1 - p) / 999) ** 0.5
    assert BitDropout(p).eval()(values) is values


def test_a_seed_draws_the_same_again():
    values = torch.ones(7, 3)
    torch.manual_seed(1)
    first = BitDropout(0.5)(values)
    torch.manual_seed(1)
    assert torch.equal(first, BitDropout(0.5)(values))


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "vit", "gpt2"])
def test_attention_keeps_every_probability_while_it_lasts(model_type):
    names = {"bert": "attention_probs_dropout_prob", "vit": "attention_probs_dropout_prob", "gpt2": "attn_pdrop"}
    changes = {names.get(model_type, "attention_dropout"): 0.5}
    model = tiny_language_model(**changes) if model_type == "gpt2" else tiny_model(model_type, **changes)
    inputs = example_inputs("vit" if model_type == "vit" else "bert")
    expected = model(**inputs).logits
    model.train()
    with cheap_dropout(model, in_attention=False):
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(**inputs).logits, expected, atol=1e-2)
    assert model.config._attn_implementation == "sdpa"


def test_dropping_out_is_computed_in_gradients_as_well():
    values = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def dropped(values):
        torch.manual_seed(3)
        return drop_out(values, 0.4)

    assert torch.autograd.gradcheck(dropped, values)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "vit", "gpt2", "llama"])
def test_attention_drops_out_probabilities_and_nothing_else(model_type, monkeypatch):
    """With draws that keep every value it is the model's own attention; the mean of many draws is near it; padding stays hidden."""
    language = model_type in ("gpt2", "llama")
    names = {"bert": "attention_probs_dropout_prob", "vit": "attention_probs_dropout_prob", "gpt2": "attn_pdrop"}
    changes = {names.get(model_type, "attention_dropout"): 0.2}
    model = tiny_language_model(model_type, **changes) if language else tiny_model(model_type, **changes)
    inputs = example_inputs("vit" if model_type == "vit" else "bert")
    expected = model(**inputs).logits
    model.train()
    with cheap_dropout(model):
        first, second = model(**inputs).logits, model(**inputs).logits
        assert not torch.allclose(first, second, atol=1e-3)
        if model_type != "llama":  # whose keys are shared by heads, which is torch's to do
            monkeypatch.setattr(dropout, "drop_out", lambda values, p: values)
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_attention_is_the_formula_with_its_own_draws():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 7, 8).unbind(0)
    mask = torch.rand(2, 1, 7, 7) > 0.3
    mask |= torch.eye(7, dtype=torch.bool)
    torch.manual_seed(5)
    found, _ = dropout.attend(nn.Module(), query, key, value, mask, drops=True, dropout=0.5, is_causal=False)
    torch.manual_seed(5)
    kept = drop_out(torch.ones(2, 4, 7, 7), 0.5).double()  # 0 or 2
    scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double()) / 8**0.5
    weights = torch.where(mask, scores.exp(), 0.0)
    expected = torch.einsum("bhqk,bhkd->bqhd", kept * weights / weights.sum(-1, keepdim=True), value.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_attention", [True, False])
def test_a_trained_model_is_a_stock_one(in_attention, task, tokenizer, tmp_path):
    model = tiny_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    training = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, disable_tqdm=True, use_cpu=True, max_steps=2, save_strategy="steps",
        save_steps=1, eval_strategy="no", load_best_model_at_end=False, attention_dropout=in_attention,
    )  # fmt: skip
    train(model, task, tokenizer, training, tmp_path, task.features(tokenizer)["train"])
    assert model.config._attn_implementation == "sdpa"
    assert {type(module) for module in model.modules() if isinstance(module, nn.Dropout)} == {nn.Dropout}
    config = json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())
    assert config["attention_probs_dropout_prob"] == 0.1
    assert "sdpa_" not in json.dumps(config)


def test_bfloat16_attends_in_float32_on_a_cpu():
    model, inputs = tiny_model(), example_inputs()
    expected = model(**inputs).logits
    with cheap_dropout(model), torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs).logits
    assert found.dtype == torch.bfloat16
    # Eight bits of mantissa through four layers.
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()
