"""Losses as pure functions of tensors. Each returns a sum over examples (or tokens); the trainer divides by their number.

A sum can be divided by the count of the whole batch, over all accumulation steps and processes; a mean of means cannot be mended.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label that takes no part in the loss, as everywhere in transformers


def label_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Summed cross entropy of `logits` (…, labels) against `labels` (…), in float32; labels of -100 do not count."""
    return F.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        reduction="sum",
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )


def soft_target_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, valid: Tensor | None = None
) -> Tensor:
    """T² times the summed KL divergence from the teacher's to the student's distribution at temperature T (Hinton et al., 2015).

    Logits are (…, labels), `valid` (…) is true where a position counts. The gradient of soft targets shrinks as 1/T², so the
    factor keeps it comparable to that of the labels. Computed in float32.
    """
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=-1)
    if valid is not None:
        divergence = divergence * valid
    return temperature**2 * divergence.sum()


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
) -> Tensor:
    """`(1 - soft_target_weight)` times the label loss plus `soft_target_weight` times the soft-target loss, summed over examples.

    The teacher's logits may be left out where their weight is 0.
    """
    hard_loss = label_loss(student_logits, labels, label_smoothing)
    if soft_target_weight == 0 or teacher_logits is None:
        return hard_loss
    soft_loss = soft_target_loss(student_logits, teacher_logits, temperature)
    return (1 - soft_target_weight) * hard_loss + soft_target_weight * soft_loss
