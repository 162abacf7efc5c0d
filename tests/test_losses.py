"""Every loss against its formula written out in NumPy, and against what it must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.losses import distillation_loss, hidden_state_loss, label_loss, soft_target_loss


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(6, 4)) * 3, generator.normal(size=(6, 4)) * 3, generator.integers(0, 4, 6)


def test_label_loss_is_the_sum_of_negative_log_probabilities(logits):
    student, _, labels = logits
    expected = -np.log(softmax(student)[np.arange(6), labels]).sum()
    assert label_loss(torch.tensor(student), torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-5)


def test_label_loss_leaves_out_ignored_labels(logits):
    student, _, labels = logits
    ignoring = labels.copy()
    ignoring[[1, 4]] = -100
    kept = [0, 2, 3, 5]
    expected = label_loss(torch.tensor(student[kept]), torch.tensor(labels[kept]))
    assert label_loss(torch.tensor(student), torch.tensor(ignoring)).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_soft_target_loss_is_temperature_squared_times_kl(logits, temperature):
    student, teacher, _ = logits
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum()
    found = soft_target_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_soft_target_loss_counts_valid_tokens_only():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator), torch.randn(2, 5, 7, generator=generator)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    one_by_one = sum(
        soft_target_loss(student[row, token], teacher[row, token], 2.0)
        for row in range(2)
        for token in range(5)
        if valid[row, token]
    )
    assert soft_target_loss(student, teacher, 2.0, valid).item() == pytest.approx(float(one_by_one), rel=1e-5)


def test_the_gradient_of_soft_targets_keeps_its_size_as_the_temperature_rises():
    """Without the factor T squared it would shrink by 100 from 1 to 10."""
    student = torch.tensor([[0.2, -0.1, 0.1]], requires_grad=True)
    teacher = torch.tensor([[0.1, 0.3, -0.2]])
    sizes = []
    for temperature in (1.0, 10.0):
        (gradient,) = torch.autograd.grad(soft_target_loss(student, teacher, temperature), student)
        sizes.append(gradient.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.2)


def test_equal_logits_cost_nothing(logits):
    student, _, _ = logits
    assert soft_target_loss(torch.tensor(student), torch.tensor(student), 3.0).item() == pytest.approx(0, abs=1e-6)


def test_hidden_state_loss_averages_valid_tokens_and_sums_examples():
    generator = np.random.default_rng(1)
    student, teacher = generator.normal(size=(2, 3, 4)), generator.normal(size=(2, 3, 4))
    mask = np.array([[1, 1, 1], [1, 0, 0]])
    squares = ((student - teacher) ** 2).mean(axis=-1)
    expected = squares[0].mean() + squares[1, 0]
    found = hidden_state_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(mask))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    # What padding holds must not matter.
    teacher[1, 1:] = 1e3
    assert hidden_state_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(mask)).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_distillation_loss_weighs_both_terms(logits):
    student, teacher, labels = (torch.tensor(array) for array in logits)
    hard, soft = label_loss(student, labels), soft_target_loss(student, teacher, 2.0)
    found = distillation_loss(student, labels, teacher, temperature=2.0, soft_target_weight=0.7)
    assert found.item() == pytest.approx((0.3 * hard + 0.7 * soft).item(), rel=1e-5)
    assert distillation_loss(student, labels, None, 2.0, 0.0).item() == pytest.approx(hard.item())
