"""Every loss against its formula written out in NumPy, and against what it must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.training.losses import (
    distillation_loss,
    hidden_state_loss,
    label_loss,
    soft_target_loss,
    top_answers,
    top_soft_target_loss,
)


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


def numpy_divergence(p, q, kind, share):
    """`p` (teacher) and `q` (student) are probabilities; written with logarithms of quotients, not of softmax."""
    m = share * p + (1 - share) * q
    return {
        "forward_kl": np.sum(p * np.log(p / q), axis=-1),
        "reverse_kl": np.sum(q * np.log(q / p), axis=-1),
        "jensen_shannon": share * np.sum(p * np.log(p / m), axis=-1) + (1 - share) * np.sum(q * np.log(q / m), axis=-1),
    }[kind]


def numpy_softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_divergences_over_tokens_do_not_grow_with_padding(kind, share):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 9, 50) * 3, torch.randn(3, 9, 50) * 3
    valid = torch.rand(3, 9) > 0.4
    found = soft_target_loss(student, teacher, 2.0, valid, kind, share)
    p, q = numpy_softmax(teacher.double().numpy() / 2), numpy_softmax(student.double().numpy() / 2)
    expected = 4 * numpy_divergence(p, q, kind, share)[valid.numpy()].sum()
    assert found.item() == pytest.approx(expected, rel=1e-5)
    student[~valid], teacher[~valid] = torch.inf, -torch.inf
    assert soft_target_loss(student, teacher, 2.0, valid, kind, share).item() == pytest.approx(found.item())


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_top_answers_lose_no_more_than_they_say(kind):
    torch.manual_seed(0)
    student, teacher = (torch.randn(4, 6, 40) * 3).requires_grad_(), torch.randn(4, 6, 40) * 3
    valid = torch.rand(4, 6) > 0.3
    full = soft_target_loss(student, teacher, 2.0, valid, kind)
    (full_gradient,) = torch.autograd.grad(full, student)
    for count in (1, 5, 20, 39):
        ids, top, rest = top_answers(teacher, count, 2.0)
        mass = numpy_softmax(teacher.double().numpy() / 2)
        outside = 1 - np.take_along_axis(mass, ids.numpy(), -1).sum(-1)
        np.testing.assert_allclose(rest.exp().numpy(), outside, rtol=1e-4)
        loss = top_soft_target_loss(student, ids, top, rest, 2.0, valid, kind)
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
    ids, top, rest = top_answers(teacher, 39, 2.0)
    assert top_soft_target_loss(student, ids, top, rest, 2.0, valid, kind).item() == pytest.approx(
        full.item(), rel=1e-4
    )
