"""Every loss against its formula written out in NumPy, and against what it must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.core.config import DistillConfig
from pipelines.training.losses import (
    TOP_K_COLUMNS,
    ClassifierLoss,
    cross_entropy,
    hidden_state_loss,
    losses_of,
    soft_target_loss,
    top_k_loss,
    top_k_targets,
)

EVERY = torch.ones(6, dtype=torch.bool)


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
    assert cross_entropy(torch.tensor(student), torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-5)


def test_label_loss_leaves_out_ignored_labels(logits):
    student, _, labels = logits
    ignoring = labels.copy()
    ignoring[[1, 4]] = -100
    kept = [0, 2, 3, 5]
    expected = cross_entropy(torch.tensor(student[kept]), torch.tensor(labels[kept]))
    assert cross_entropy(torch.tensor(student), torch.tensor(ignoring)).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_soft_target_loss_is_temperature_squared_times_kl(logits, temperature):
    student, teacher, _ = logits
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum()
    found = soft_target_loss(torch.tensor(student), torch.tensor(teacher), temperature, EVERY)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_soft_target_loss_counts_valid_tokens_only():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator), torch.randn(2, 5, 7, generator=generator)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    one_by_one = sum(
        soft_target_loss(student[row, token], teacher[row, token], 2.0, torch.tensor(True))
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
        (gradient,) = torch.autograd.grad(soft_target_loss(student, teacher, temperature, EVERY[:1]), student)
        sizes.append(gradient.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.2)


def test_equal_logits_cost_nothing(logits):
    student, _, _ = logits
    assert soft_target_loss(torch.tensor(student), torch.tensor(student), 3.0, EVERY).item() == pytest.approx(
        0, abs=1e-6
    )


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


def test_both_losses_leave_out_ignored_labels(logits):
    student, teacher, labels = (torch.tensor(array) for array in logits)
    labels[2] = -100
    losses, outputs = ClassifierLoss(), {"logits": student}
    hard, count = losses.label_loss(outputs, labels)
    assert count == 5
    assert hard.item() == pytest.approx(cross_entropy(student, labels).item())
    soft = losses.soft_loss(outputs, {"teacher_logits": teacher}, labels, DistillConfig(temperature=2.0))
    kept = [0, 1, 3, 4, 5]
    assert soft.item() == pytest.approx(soft_target_loss(student[kept], teacher[kept], 2.0, EVERY[:5]).item())


def numpy_divergence(p, q, kind, beta):
    """`p` (teacher) and `q` (student) are probabilities; written with logarithms of quotients, not of softmax."""
    m = beta * p + (1 - beta) * q
    return {
        "forward_kl": np.sum(p * np.log(p / q), axis=-1),
        "reverse_kl": np.sum(q * np.log(q / p), axis=-1),
        "jensen_shannon": beta * np.sum(p * np.log(p / m), axis=-1) + (1 - beta) * np.sum(q * np.log(q / m), axis=-1),
    }[kind]


def numpy_softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_divergences_over_tokens_do_not_grow_with_padding(kind, beta):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 9, 50) * 3, torch.randn(3, 9, 50) * 3
    valid = torch.rand(3, 9) > 0.4
    found = soft_target_loss(student, teacher, 2.0, valid, kind, beta)
    p, q = numpy_softmax(teacher.double().numpy() / 2), numpy_softmax(student.double().numpy() / 2)
    expected = 4 * numpy_divergence(p, q, kind, beta)[valid.numpy()].sum()
    assert found.item() == pytest.approx(expected, rel=1e-5)
    student[~valid], teacher[~valid] = torch.inf, -torch.inf
    assert soft_target_loss(student, teacher, 2.0, valid, kind, beta).item() == pytest.approx(found.item())


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_top_k_targets_lose_no_more_than_they_say(kind):
    torch.manual_seed(0)
    student, teacher = (torch.randn(4, 6, 40) * 3).requires_grad_(), torch.randn(4, 6, 40) * 3
    valid = torch.rand(4, 6) > 0.3
    full = soft_target_loss(student, teacher, 2.0, valid, kind)
    (full_gradient,) = torch.autograd.grad(full, student)
    for count in (1, 5, 20, 39):
        targets = top_k_targets(teacher, count, 2.0)
        ids, _, log_tail = (targets[name] for name in TOP_K_COLUMNS)
        mass = numpy_softmax(teacher.double().numpy() / 2)
        outside = 1 - np.take_along_axis(mass, ids.numpy(), -1).sum(-1)
        np.testing.assert_allclose(log_tail.exp().numpy(), outside, rtol=1e-4)
        loss = top_k_loss(student, targets, 2.0, valid, kind)
        # The classes that were not kept become one in both distributions; then the formula is the same.
        q = numpy_softmax(student.detach().double().numpy() / 2)
        merged = [
            np.concatenate(
                [
                    np.take_along_axis(x, ids.numpy(), -1),
                    1 - np.take_along_axis(x, ids.numpy(), -1).sum(-1, keepdims=True),
                ],
                -1,
            )
            for x in (mass, q)
        ]
        expected = 4 * numpy_divergence(*merged, kind, 0.5)[valid.numpy()].sum()
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        assert loss.item() <= full.item() * (1 + 1e-6)
        if kind == "forward_kl":
            # T² times the derivative by logits / T is T times the derivative by the scaled logits.
            (gradient,) = torch.autograd.grad(loss, student)
            difference = (gradient - full_gradient).abs() / 2.0
            bound = torch.from_numpy(2 * outside).where(valid, torch.zeros(()))
            assert (difference.sum(dim=-1) <= bound + 1e-5).all()
            assert difference.gather(-1, ids).max() < 1e-5
    assert top_k_loss(student, targets, 2.0, valid, kind).item() == pytest.approx(full.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["forward_kl", "jensen_shannon"])
def test_a_teacher_that_rules_the_tail_out_gives_a_number(kind):
    """Tokens masked with minus infinity: 0 times infinity would be NaN, and so would its gradient."""
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 40, requires_grad=True), torch.randn(1, 40)
    teacher[:, 5:] = -torch.inf
    targets = top_k_targets(teacher, 5, 2.0)
    assert targets["teacher_log_tail_mass"].item() == -torch.inf
    valid = torch.ones(1, dtype=torch.bool)
    for loss in (top_k_loss(student, targets, 2.0, valid, kind), soft_target_loss(student, teacher, 2.0, valid, kind)):
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert gradient.isfinite().all()
    p, q = (softmax(logits.detach().numpy() / 2) for logits in (teacher, student))
    expected = 4 * numpy_divergence(np.maximum(p, 1e-30), q, kind, 0.5).sum()
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_losses_of_a_model_follow_from_its_class():
    from conftest import tiny_language_model, tiny_model

    assert type(losses_of(tiny_model())).__name__ == "ClassifierLoss"
    assert type(losses_of(tiny_language_model())).__name__ == "NextTokenLoss"
