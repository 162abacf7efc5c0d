"""Students of another kind: each forward pass against a formula in NumPy, whatever the padding; how they start; their graphs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import example_inputs, tiny_model
from pipelines.models.small import (
    ImageCnnConfig,
    ImageCnnForImageClassification,
    LstmConfig,
    LstmForSequenceClassification,
    StaticConfig,
    StaticForSequenceClassification,
    TextCnnConfig,
    TextCnnForSequenceClassification,
)

TEXT_MODELS = {
    "lstm": (LstmConfig, LstmForSequenceClassification),
    "cnn": (TextCnnConfig, TextCnnForSequenceClassification),
    "static": (StaticConfig, StaticForSequenceClassification),
}


def make(kind: str):
    config, model = TEXT_MODELS[kind]
    torch.manual_seed(0)
    return model(config(vocab_size=80, width=6, hidden=5, num_labels=3)).eval()


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


def lstm(weights, vectors):
    """The last states of both directions of one text, by the equations of Hochreiter and Schmidhuber (1997)."""
    found = []
    for suffix, order in (("", 1), ("_reverse", -1)):
        w, r, b, c = (
            weights[f"encoder.lstm.{name}_l0{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        state, cell = np.zeros(r.shape[1]), np.zeros(r.shape[1])
        for vector in vectors[::order]:
            enter, forget, candidate, leave = np.split(w @ vector + r @ state + b + c, 4)
            cell = sigmoid(forget) * cell + sigmoid(enter) * np.tanh(candidate)
            state = sigmoid(leave) * np.tanh(cell)
        found.append(state)
    return np.concatenate(found)


def cnn(weights, vectors):
    """Of each filter the largest value over the places of one text, beyond whose ends are zeros."""
    found = []
    for index, size in enumerate((1, 3, 5)):
        kernel, bias = (
            weights[f"encoder.filters.{index}.{name}"] for name in ("weight", "bias")
        )  # (filters, width, size)
        padded = np.pad(vectors, ((size // 2, size // 2), (0, 0)))
        values = [np.einsum("fws,sw->f", kernel, padded[at : at + size]) + bias for at in range(len(vectors))]
        found.append(np.maximum(np.max(values, axis=0), 0))
    return np.concatenate(found)


def static(weights, vectors):
    mean = np.mean(vectors, axis=0)
    return np.maximum(weights["encoder.dense.weight"] @ mean + weights["encoder.dense.bias"], 0)


@pytest.mark.parametrize(("kind", "formula"), [("lstm", lstm), ("cnn", cnn), ("static", static)])
def test_each_text_of_a_padded_batch_equals_the_formula_for_it_alone(kind, formula):
    model, inputs = make(kind), example_inputs()
    weights = weights_of(model)
    with torch.no_grad():
        found = model(**inputs).logits.numpy()
        other_padding = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)
        torch.testing.assert_close(model(other_padding, inputs["attention_mask"]).logits.numpy(), found)
        unmasked = model(inputs["input_ids"]).logits.numpy()
    for row, tokens in enumerate(inputs["input_ids"].numpy()):
        length = int(inputs["attention_mask"][row].sum())
        for logits, text in ((found, tokens[:length]), (unmasked, tokens)):
            features = formula(weights, weights["encoder.embed_tokens.weight"][text])
            expected = weights["classifier.weight"] @ features + weights["classifier.bias"]
            np.testing.assert_allclose(logits[row], expected, atol=1e-5)


def test_the_cnn_of_images_equals_the_formula():
    torch.manual_seed(0)
    model = ImageCnnForImageClassification(ImageCnnConfig(image_size=[8, 6], width=2, hidden=5, num_labels=3)).eval()
    weights, pixels = weights_of(model), torch.randn(2, 3, 8, 6)
    maps = pixels.double().numpy()
    for layer in (0, 3):
        kernel, bias = (weights[f"encoder.layers.{layer}.{name}"] for name in ("weight", "bias"))
        padded = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        maps = np.maximum(np.einsum("bchwij,ocij->bohw", windows, kernel) + bias[:, None, None], 0)
        batch, channels, height, width = maps.shape
        halves = maps[:, :, : height // 2 * 2, : width // 2 * 2].reshape(batch, channels, height // 2, 2, width // 2, 2)
        maps = halves.max(axis=(3, 5))
    hidden = np.maximum(
        maps.reshape(2, -1) @ weights["encoder.layers.7.weight"].T + weights["encoder.layers.7.bias"], 0
    )
    expected = hidden @ weights["classifier.weight"].T + weights["classifier.bias"]
    with torch.no_grad():
        np.testing.assert_allclose(model(pixels).logits.numpy(), expected, atol=1e-5)


def test_an_image_of_any_size_ends_in_few_numbers():
    for sides, layers in (([8, 8], 2), ([32, 32], 2), ([224, 160], 5), ([256, 4], 5)):
        model = ImageCnnForImageClassification(ImageCnnConfig(image_size=sides, num_channels=1, width=2))
        assert sum(isinstance(layer, torch.nn.Conv2d) for layer in model.encoder.layers) == layers
        assert model(torch.zeros(1, 1, *sides)).logits.shape == (1, 2)


def test_token_vectors_start_as_the_principal_components_of_the_teachers():
    teacher = tiny_model()
    model = make("static")
    model.start_from(teacher)
    vectors = teacher.get_input_embeddings().weight.detach().double().numpy()
    centred = vectors - vectors.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    expected = (left * sizes)[:, :6]
    expected /= expected.std()
    found = model.get_input_embeddings().weight.detach().double().numpy()
    for column in range(6):  # each up to its sign
        assert min(np.abs(found[:, column] - sign * expected[:, column]).max() for sign in (1, -1)) < 1e-4


def test_token_vectors_of_few_tokens_have_as_many_components():
    teacher = tiny_model(vocab_size=4, pad_token_id=0)
    model = StaticForSequenceClassification(StaticConfig(vocab_size=4, width=6, hidden=5))
    model.start_from(teacher)
    assert not model.get_input_embeddings().weight[:, 4:].any()


def test_token_vectors_as_wide_as_the_teachers_are_the_teachers():
    teacher, config = tiny_model(), StaticConfig(vocab_size=80, width=40)
    model = StaticForSequenceClassification(config)
    model.start_from(teacher)
    vectors = teacher.get_input_embeddings().weight.detach()
    torch.testing.assert_close(model.get_input_embeddings().weight[:, :32], vectors / vectors.std(correction=0))
    assert not model.get_input_embeddings().weight[:, 32:].any()
