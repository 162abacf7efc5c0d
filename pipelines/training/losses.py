"""Losses as pure functions of tensors. Each returns a sum over examples (or tokens); the trainer divides by their number.

A sum can be divided by the count of the whole batch, over all accumulation steps and processes; a mean of means cannot be mended.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.core.task import IGNORED


def label_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross entropy of `logits` (…, labels) against `labels` (…), in float32; labels of -100 do not count."""
    return F.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        reduction="sum",
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )


def next_token(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (batch, tokens, …) of a causal model and labels (batch, tokens), shifted so that each logit meets the token it is about."""
    return logits[:, :-1], labels[:, 1:]


def divergence(teacher: Tensor, student: Tensor, kind: str = "forward_kl", teacher_share: float = 0.5) -> Tensor:
    """The divergence (…) of two distributions given as log probabilities (…, classes), summed over the classes.

    "forward_kl" is KL(teacher ‖ student), which spreads the student over all that the teacher finds likely; "reverse_kl" is
    KL(student ‖ teacher), which draws it to the likeliest; "jensen_shannon" is the generalized one of Agarwal et al. (2024),
    β KL(teacher ‖ M) + (1 - β) KL(student ‖ M) with M = β teacher + (1 - β) student and β = `teacher_share` in (0, 1).
    """

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(dim=-1)

    if kind == "forward_kl":
        return kl(teacher, student)
    if kind == "reverse_kl":
        return kl(student, teacher)
    assert kind == "jensen_shannon", kind
    mixture = torch.logaddexp(teacher + math.log(teacher_share), student + math.log(1 - teacher_share))
    return teacher_share * kl(teacher, mixture) + (1 - teacher_share) * kl(student, mixture)


def soft_target_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    valid: Tensor | None = None,
    kind: str = "forward_kl",
    teacher_share: float = 0.5,
) -> Tensor:
    """T² times the summed divergence of the teacher's and the student's distribution at temperature T (Hinton et al., 2015).

    Logits are (…, labels), `valid` (…) is true where a position counts. The gradient of soft targets shrinks as 1/T², so the
    factor keeps it comparable to that of the labels. Computed in float32.
    """
    if valid is not None:
        # Positions that do not count are left out, not multiplied by 0: of padding even the logits may be infinite.
        student_logits, teacher_logits = student_logits[valid.bool()], teacher_logits[valid.bool()]
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    return temperature**2 * divergence(teacher, student, kind, teacher_share).sum()


def top_answers(teacher_logits: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` likeliest classes of logits (…, classes) at a temperature: their ids and log probabilities (…, count), and the log
    of the probability of all others together (…)."""
    log_probabilities = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    top, ids = log_probabilities.topk(count, dim=-1)
    return ids, top, _log_rest(log_probabilities, ids)


def _log_rest(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    """The log of the probability that all but the classes `ids` have together; summed, since 1 minus the others rounds to 0."""
    return log_probabilities.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)


def top_soft_target_loss(
    student_logits: Tensor,
    ids: Tensor,
    log_probabilities: Tensor,
    log_rest: Tensor,
    temperature: float,
    valid: Tensor,
    kind: str = "forward_kl",
    teacher_share: float = 0.5,
) -> Tensor:
    """`soft_target_loss` from the teacher's `top_answers` at the same temperature, all other classes taken as one.

    What is lost is bounded exactly: it is never more than soft_target_loss, and with forward KL the gradient by the student's
    (scaled) logits of a position differs by m (p - q), m being the teacher's probability of the rest, p and q the teacher's and the
    student's distribution within it: by 2 m at most, summed over the classes, and not at all for the classes that are kept.
    """
    valid = valid.bool()
    student = F.log_softmax(student_logits[valid].float() / temperature, dim=-1)
    ids, log_probabilities, log_rest = ids[valid].long(), log_probabilities[valid].float(), log_rest[valid].float()
    student_top = torch.cat([student.gather(-1, ids), _log_rest(student, ids)[..., None]], dim=-1)
    teacher_top = torch.cat([log_probabilities, log_rest[..., None]], dim=-1)
    return temperature**2 * divergence(teacher_top, student_top, kind, teacher_share).sum()


def hidden_state_loss(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared difference of two hidden states (batch, tokens, width), averaged over an example's valid tokens, summed over examples.

    `valid` (batch, tokens) is 1 where a token counts, for instance the attention mask (as in TinyBERT; Jiao et al., 2020).
    """
    difference = (student.float() - teacher.float()).pow(2).mean(dim=-1)
    if valid is None:
        return difference.mean(dim=-1).sum()
    weights = valid.to(difference.dtype)
    return ((difference * weights).sum(dim=-1) / weights.sum(dim=-1).clamp(min=1)).sum()


def distillation_loss(
    student_logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    temperature: float,
    soft_target_weight: float,
    label_smoothing: float = 0.0,
    kind: str = "forward_kl",
    teacher_share: float = 0.5,
) -> Tensor:
    """`(1 - soft_target_weight)` times the label loss plus `soft_target_weight` times the soft-target loss, summed over examples.

    Both leave out labels of -100. The teacher's logits may be left out where their weight is 0.
    """
    hard_loss = label_loss(student_logits, labels, label_smoothing)
    if soft_target_weight == 0 or teacher_logits is None:
        return hard_loss
    soft_loss = soft_target_loss(student_logits, teacher_logits, temperature, labels.ne(IGNORED), kind, teacher_share)
    return (1 - soft_target_weight) * hard_loss + soft_target_weight * soft_loss
