"""Cheaper dropout is the same dropout, and leaves the model as it was."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from conftest import example_inputs, tiny_language_model, tiny_model
from pipelines.dropout import BitDropout, fast_dropout
from pipelines.training import TrainingArguments, train


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
    with fast_dropout(model):
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(**inputs).logits, expected, atol=1e-2)
    assert model.config._attn_implementation == "sdpa"


def test_a_trained_model_is_a_stock_one(task, tokenizer, tmp_path):
    model = tiny_model(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    training = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, disable_tqdm=True, use_cpu=True, max_steps=2, save_strategy="steps",
        save_steps=1, eval_strategy="no", load_best_model_at_end=False, fast_dropout=True,
    )  # fmt: skip
    train(model, task, tokenizer, training, tmp_path, task.features(tokenizer)["train"])
    assert model.config._attn_implementation == "sdpa"
    assert {type(module) for module in model.modules() if isinstance(module, nn.Dropout)} == {nn.Dropout}
    config = json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())
    assert config["attention_probs_dropout_prob"] == 0.1
    assert "without_dropout" not in json.dumps(config)


def test_bfloat16_attends_in_float32_on_a_cpu():
    model, inputs = tiny_model(), example_inputs()
    expected = model(**inputs).logits
    with fast_dropout(model), torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs).logits
    assert found.dtype == torch.bfloat16
    # Eight bits of mantissa through four layers.
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()
