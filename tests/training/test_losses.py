"""Every loss against its formula written out in NumPy, and against what it must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.core.config import DistillConfig
from pipelines.core.errors import InputError
from pipelines.training.losses import (
    TOP_K_COLUMNS,
    ClassifierLoss,
    NextTokenLoss,
    attention_loss,
    cross_entropy,
    hidden_state_loss,
    losses_of,
    relation_loss,
    soft_target_loss,
    standardize,
    teachers_loss,
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


def tokens_of():
    """Random states of student and teacher (2 examples, 3 tokens, 8 wide), and what each token counts: the second example has but one."""
    generator = np.random.default_rng(1)
    states = [generator.normal(size=(2, 3, 8)).astype(np.float32) for _ in range(2)]
    return *states, np.array([[1, 1, 1], [1, 0, 0]]) / [[3], [1]]


@pytest.mark.parametrize("kind", ["squared_error", "cosine"])
def test_hidden_state_loss_averages_valid_tokens_and_sums_examples(kind):
    student, teacher, weights = tokens_of()
    if kind == "cosine":
        norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
        distance = 1 - np.einsum("btw,btw->bt", student, teacher) / norms
    else:
        distance = ((student - teacher) ** 2).mean(axis=-1)
    expected = distance[0].mean() + distance[1, 0]
    found = hidden_state_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(weights), kind)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    # What padding holds must not matter.
    teacher[1, 1:] = 1e3
    again = hidden_state_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(weights), kind)
    assert again.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_loss_is_the_squared_distance_of_the_maps(heads):
    generator = np.random.default_rng(2)
    student, teacher = (softmax(generator.normal(size=(2, n, 3, 3))) for n in (heads, 4))
    _, _, weights = tokens_of()
    if heads != 4:  # other numbers of heads: their means
        left, right = student.mean(axis=1, keepdims=True), teacher.mean(axis=1, keepdims=True)
    else:
        left, right = student, teacher
    expected = 0.0
    for example, query in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        one = np.mean([((a - b) ** 2)[query].sum() for a, b in zip(left[example], right[example], strict=True)])
        expected += one * weights[example, query]
    found = attention_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(weights))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_relation_loss_is_the_kl_of_scaled_products_within_relation_heads():
    """With a student of another width; written head by head and token by token."""
    student, _, weights = tokens_of()
    teacher = np.random.default_rng(3).normal(size=(2, 3, 12)).astype(np.float32)
    expected = 0.0
    for example, tokens in [(0, 3), (1, 1)]:
        for head in range(4):
            probabilities = []
            for vectors in (teacher, student):
                width = vectors.shape[-1] // 4
                own = vectors[example, :tokens, head * width : (head + 1) * width]
                probabilities.append(softmax(own @ own.T / np.sqrt(width)))
            p, q = probabilities
            expected += (p * np.log(p / q)).sum() / tokens / 4
    found = relation_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(weights), heads=4)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    teacher[1, 1:] = 50
    again = relation_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(weights), heads=4)
    assert again.item() == pytest.approx(expected, rel=1e-5)
    nothing = relation_loss(torch.tensor(student), torch.tensor(teacher), torch.zeros(2, 3), heads=4)
    assert nothing.item() == 0  # a batch of nothing but fillers


def test_tokens_count_one_an_example_or_one_each_where_labels_are_tokens():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    labels = torch.tensor([2, 0, -100])
    found = ClassifierLoss().token_weights({"attention_mask": mask}, labels, 4)
    np.testing.assert_allclose(found, [[0.25] * 4, [0.5, 0.5, 0, 0], [0] * 4])
    np.testing.assert_allclose(ClassifierLoss().token_weights({}, labels, 2), [[0.5] * 2, [0.5] * 2, [0] * 2])
    tokens = torch.tensor([[5, 6, 7], [-100, 8, -100]])
    np.testing.assert_allclose(NextTokenLoss().token_weights({}, tokens, 3), [[1, 1, 0], [1, 0, 0]])


def test_squared_error_is_that_of_the_logits_whatever_the_temperature(logits):
    student, teacher, _ = logits
    expected = ((student - teacher) ** 2).mean(axis=-1).sum()
    for temperature in (1.0, 3.0):
        found = soft_target_loss(torch.tensor(student), torch.tensor(teacher), temperature, EVERY, "squared_error")
        assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("beta", [0.5, 8 / 9])
def test_decoupled_loss_weighs_the_labels_class_and_the_others_apart(logits, temperature, beta):
    student, teacher, labels = logits
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    rows = np.arange(6)

    def expected(labels):
        target, student_target = p[rows, labels], q[rows, labels]
        of_target = target * np.log(target / student_target)
        of_target += (1 - target) * np.log((1 - target) / (1 - student_target))
        others = np.array([np.delete(one, label) / (1 - one[label]) for one, label in zip(p, labels, strict=True)])
        student_others = np.array(
            [np.delete(one, label) / (1 - one[label]) for one, label in zip(q, labels, strict=True)]
        )
        of_others = (others * np.log(others / student_others)).sum(axis=-1)
        # The two parts are those of plain KL, which weighs the second by 1 - the probability of the label's class.
        np.testing.assert_allclose(of_target + (1 - target) * of_others, (p * np.log(p / q)).sum(axis=-1))
        return temperature**2 * ((1 - beta) * of_target + beta * of_others).sum()

    def found(labels):
        given = torch.tensor(student, requires_grad=True)
        target = torch.tensor(labels)
        loss = soft_target_loss(given, torch.tensor(teacher), temperature, EVERY, "decoupled", beta, target)
        (gradient,) = torch.autograd.grad(loss, given)
        assert gradient.isfinite().all()
        return loss.item()

    assert found(labels) == pytest.approx(expected(labels), rel=1e-4)
    # A row without a label has its teacher's likeliest class.
    unlabelled, likeliest = labels.copy(), labels.copy()
    unlabelled[[1, 4]], likeliest[[1, 4]] = [-100, -101], teacher.argmax(axis=-1)[[1, 4]]
    assert found(unlabelled) == pytest.approx(expected(likeliest), rel=1e-4)


def test_standardized_logits_have_neither_mean_nor_size(logits):
    student, teacher, labels = logits
    scaled = [(one - one.mean(axis=-1, keepdims=True)) / one.std(axis=-1, keepdims=True) for one in (student, teacher)]
    np.testing.assert_allclose(standardize(torch.tensor(student)), scaled[0], rtol=1e-5)
    p, q = softmax(scaled[1] / 2), softmax(scaled[0] / 2)
    distill = DistillConfig(standardize_logits=True)
    stored = {"teacher_logits": torch.tensor(teacher) * 10 + 3}
    found = ClassifierLoss().soft_loss({"logits": torch.tensor(student)}, stored, torch.tensor(labels), distill)
    assert found.item() == pytest.approx(4 * (p * np.log(p / q)).sum(), rel=1e-4)
    constant = torch.zeros(6, 4, requires_grad=True)
    ClassifierLoss().soft_loss({"logits": constant}, stored, torch.tensor(labels), distill).backward()
    assert constant.grad is not None
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "squared_error", "decoupled"])
@pytest.mark.parametrize("combine", ["mean", "each"])
def test_several_teachers_teach_the_mean_of_their_logits_or_each_its_own(logits, divergence, combine):
    student, teacher, labels = (torch.tensor(one) for one in logits)
    other = torch.tensor(np.random.default_rng(5).normal(size=(6, 4)) * 2)
    distill = DistillConfig(divergence=divergence, combine_teachers=combine)
    losses, outputs = ClassifierLoss(), {"logits": student}

    def of(one):
        return losses.soft_loss(outputs, {"teacher_logits": one}, labels, distill).item()

    both = {"teacher_logits": teacher, "teacher_logits_2": other}
    found = teachers_loss(losses, outputs, both, labels, distill).item()
    expected = of((teacher + other) / 2) if combine == "mean" else (of(teacher) + of(other)) / 2
    assert found == pytest.approx(expected, rel=1e-6)
    alone = teachers_loss(losses, outputs, {"teacher_logits": teacher}, labels, distill)
    assert alone.item() == of(teacher)


def test_each_teachers_forward_kl_has_the_gradient_of_their_mean_distribution(logits):
    student, teacher, labels = logits
    other = np.random.default_rng(5).normal(size=(6, 4)) * 2
    given = torch.tensor(student, requires_grad=True)
    both = {"teacher_logits": torch.tensor(teacher), "teacher_logits_2": torch.tensor(other)}
    distill = DistillConfig(combine_teachers="each")
    loss = teachers_loss(ClassifierLoss(), {"logits": given}, both, torch.tensor(labels), distill)
    (gradient,) = torch.autograd.grad(loss, given)
    mean = (softmax(teacher / 2) + softmax(other / 2)) / 2
    np.testing.assert_allclose(gradient, 2 * (softmax(student / 2) - mean), rtol=1e-4, atol=1e-6)


def test_what_the_likeliest_tokens_do_not_tell_is_refused():
    losses = NextTokenLoss()
    for divergence in ("squared_error", "decoupled"):
        with pytest.raises(InputError, match="--soft_targets online"):
            losses.check_soft_loss(DistillConfig(divergence=divergence))
        losses.check_soft_loss(DistillConfig(divergence=divergence, soft_targets="online"))
    with pytest.raises(InputError, match="--combine_teachers each"):
        losses.check_soft_loss(DistillConfig(), teachers=2)
    losses.check_soft_loss(DistillConfig(combine_teachers="each", standardize_logits=True), teachers=2)


@pytest.mark.parametrize("settings", [{}, {"standardize_logits": True}, {"divergence": "jensen_shannon"}])
def test_the_likeliest_tokens_of_all_classes_are_the_whole_loss(settings):
    torch.manual_seed(0)
    outputs, teacher = {"logits": torch.randn(2, 5, 9) * 3}, {"logits": torch.randn(2, 5, 9) * 3}
    labels, losses = torch.randint(0, 9, (2, 5)), NextTokenLoss()
    distill = DistillConfig(soft_target_top_k=8, **settings)
    stored = losses.soft_targets(teacher, distill)
    stored["teacher_ids"] = stored["teacher_ids"].long()
    online = losses.soft_loss(outputs, {"teacher_logits": teacher["logits"]}, labels, distill)
    assert losses.soft_loss(outputs, stored, labels, distill).item() == pytest.approx(online.item(), rel=1e-4)


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
