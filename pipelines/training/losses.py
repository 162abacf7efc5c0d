"""Losses as functions of tensors. Each returns a sum over examples (or tokens); the trainer divides by their number.

A sum can be divided by the count of the global batch, over all accumulation steps and processes; a mean of means cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.core.divergences import DIVERGENCES
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, Tensors

if TYPE_CHECKING:
    from pipelines.core.config import DistillConfig

# What is stored of a teacher's logits where all of them are too many: the likeliest classes and the probability of all others.
TOP_K_COLUMNS = ("teacher_ids", "teacher_log_probabilities", "teacher_log_tail_mass")


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Summed cross entropy of `logits` (…, labels) against `labels` (…), in float32; labels of -100 do not count.

    `class_weights` (labels) multiply the loss of every example by the weight of its label.
    """
    labels = labels.reshape(-1)
    losses = F.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]),
        labels,
        reduction="sum" if class_weights is None else "none",
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )
    return losses if class_weights is None else (losses * class_weights.to(losses)[labels.clamp(min=0)]).sum()


def soft_target_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    valid: Tensor,
    kind: str = "forward_kl",
    beta: float = 0.5,
) -> Tensor:
    """T² times the summed divergence of the teacher's and the student's distribution at temperature T (Hinton et al., 2015).

    Logits are (…, labels), `valid` (…) is true where a position counts. The gradient of soft targets shrinks as 1/T², so the
    factor keeps it comparable to that of the labels. Computed in float32.
    """
    if student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"expected logits of one shape from student and teacher, found {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}. "
            "Take a teacher with the student's labels, or vocabulary, and the same inputs."
        )
    # Positions that do not count are left out, not multiplied by 0: of padding even the logits may be infinite.
    teacher = F.log_softmax(teacher_logits[valid].float() / temperature, dim=-1)
    student = F.log_softmax(student_logits[valid].float() / temperature, dim=-1)
    return temperature**2 * DIVERGENCES[kind](teacher, student, beta).sum()


def top_k_targets(teacher_logits: Tensor, count: int, temperature: float) -> Tensors:
    """The `count` likeliest classes of logits (…, classes) at a temperature: their ids and log probabilities (…, count), and the
    log of the tail mass (…), the probability of all other classes together."""
    log_probabilities = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    top, ids = log_probabilities.topk(count, dim=-1)
    return dict(zip(TOP_K_COLUMNS, (ids, top, _log_tail_mass(log_probabilities, ids)), strict=True))


def _log_tail_mass(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    """The log of the probability that all but the classes `ids` have together; summed, since 1 minus the others rounds to 0."""
    return log_probabilities.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)


def top_k_loss(
    student_logits: Tensor,
    targets: Tensors,
    temperature: float,
    valid: Tensor,
    kind: str = "forward_kl",
    beta: float = 0.5,
) -> Tensor:
    """`soft_target_loss` from the teacher's `top_k_targets` at the same temperature, all other classes taken as one.

    What is lost is bounded exactly: it is never more than soft_target_loss, and with forward KL the gradient by the student's
    (scaled) logits of a position differs by m (p - q), m being the tail mass, p and q the teacher's and the student's distribution
    within the tail: by 2 m at most, summed over the classes, and not at all for the classes that are kept.
    """
    ids, log_probabilities, log_tail_mass = (targets[name][valid] for name in TOP_K_COLUMNS)
    student = F.log_softmax(student_logits[valid].float() / temperature, dim=-1)
    student_top = torch.cat([student.gather(-1, ids.long()), _log_tail_mass(student, ids.long()).unsqueeze(-1)], dim=-1)
    teacher_top = torch.cat([log_probabilities.float(), log_tail_mass.float().unsqueeze(-1)], dim=-1)
    return temperature**2 * DIVERGENCES[kind](teacher_top, student_top, beta).sum()


def hidden_state_loss(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared difference of two hidden states (batch, tokens, width), averaged over an example's valid tokens, summed over examples.

    `valid` (batch, tokens) is 1 where a token counts, for instance the attention mask (as in TinyBERT; Jiao et al., 2020).
    """
    squares = (student.float() - teacher.float()).pow(2).mean(dim=-1)
    if valid is None:
        return squares.mean(dim=-1).sum()
    weights = valid.to(squares.dtype)
    return ((squares * weights).sum(dim=-1) / weights.sum(dim=-1).clamp(min=1)).sum()


class ClassifierLoss:
    """The losses (see pipelines/core/task.py) of any model with logits (…, labels) for labels (…): one an example or one a token."""

    class_weights: Tensor | None = None  # (labels), each label's in the loss against the labels
    soft_target_settings: Sequence[str] = ()

    def outputs(self, model_output: Any) -> Tensors:
        return {"logits": model_output.logits}

    def predictions(self, outputs: Tensors, labels: Tensor) -> Tensor:
        return outputs["logits"]

    def label_loss(self, outputs: Tensors, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        # Divided by the number of examples, not by their weights: balanced weights have a mean of 1, and the soft loss has none.
        return cross_entropy(outputs["logits"], labels, label_smoothing, self.class_weights), labels.ne(IGNORED).sum()

    def soft_targets(self, outputs: Tensors, distill: DistillConfig) -> Tensors:
        return {"teacher_logits": outputs["logits"].float()}

    def soft_loss(self, outputs: Tensors, teacher: Tensors, labels: Tensor, distill: DistillConfig) -> Tensor:
        settings = (distill.temperature, labels.ne(IGNORED), distill.divergence, distill.beta)
        if "teacher_ids" in teacher:
            return top_k_loss(outputs["logits"], teacher, *settings)
        return soft_target_loss(outputs["logits"], teacher["teacher_logits"], *settings)

    def hidden_state_loss(self, student: Tensor, teacher: Tensor, inputs: Tensors, labels: Tensor) -> Tensor:
        counted = labels.ne(IGNORED)  # examples without a label only fill up a batch
        if labels.dim() > 1:  # the other losses are one per token, too
            return hidden_state_loss(student[counted][:, None], teacher[counted][:, None])
        mask = inputs.get("attention_mask")
        return hidden_state_loss(student[counted], teacher[counted], None if mask is None else mask[counted])


class NextTokenLoss(ClassifierLoss):
    """The losses of a causal language model: its logits (batch, tokens, vocabulary) at one position are about the next."""

    soft_target_settings: Sequence[str] = ("temperature", "soft_target_top_k")

    def label_loss(self, outputs: Tensors, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        return super().label_loss({"logits": outputs["logits"][:, :-1]}, labels[:, 1:], label_smoothing)

    def soft_targets(self, outputs: Tensors, distill: DistillConfig) -> Tensors:
        """Of all logits there are thousands for every token, so the likeliest tokens are stored, and the mass of all others."""
        logits = outputs["logits"]
        classes = logits.shape[-1]
        targets = top_k_targets(logits, min(distill.soft_target_top_k, classes - 1), distill.temperature)
        targets["teacher_ids"] = targets["teacher_ids"].to(torch.uint16 if classes <= 2**16 else torch.int32)
        return targets

    def soft_loss(self, outputs: Tensors, teacher: Tensors, labels: Tensor, distill: DistillConfig) -> Tensor:
        shifted = {name: column[:, :-1] for name, column in teacher.items()}
        return super().soft_loss({"logits": outputs["logits"][:, :-1]}, shifted, labels[:, 1:], distill)

    def hidden_state_loss(self, student: Tensor, teacher: Tensor, inputs: Tensors, labels: Tensor) -> Tensor:
        return super().hidden_state_loss(student[:, :-1], teacher[:, :-1], inputs, labels[:, 1:])


def losses_of(model: Any) -> ClassifierLoss:
    """The losses for a model that no task comes with: those of causal language models by the name of its class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    stock = model.get_base_model() if hasattr(model, "get_base_model") else model  # below a LoRA adapter
    is_causal = type(stock).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    config = stock.config
    if not is_causal and (config.num_labels == 1 or config.problem_type not in (None, "single_label_classification")):
        raise InputError(
            f"expected a model that chooses one of several labels, or a causal language model, found {type(stock).__name__} with "
            f"{config.num_labels} outputs (problem_type {config.problem_type!r}). Scores are distilled by pocketformers compress --task "
            "text-regression."
        )
    return NextTokenLoss() if is_causal else ClassifierLoss()
