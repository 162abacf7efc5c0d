"""Losses as functions of tensors. Each returns a sum over examples (or tokens); the trainer divides by their number.

A sum can be divided by the count of the global batch, over all accumulation steps and processes; a mean of means cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.core.config import DistillConfig
from pipelines.core.divergences import DIVERGENCES, kl
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, Task, Tensors

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


def standardize(logits: Tensor) -> Tensor:
    """Logits (…, labels) with a mean of 0 and a standard deviation of 1 over the labels, in float32 (Sun et al., 2024).

    A student then learns in which order and how far apart its teacher ranks the labels, not how large the teacher's logits are.
    """
    return F.layer_norm(logits.float(), logits.shape[-1:], eps=1e-12)


def soft_target_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    valid: Tensor,
    kind: str = "forward_kl",
    beta: float = 0.5,
    target: Tensor | None = None,
) -> Tensor:
    """T² times the summed divergence of the teacher's and the student's distribution at temperature T (Hinton et al., 2015).

    Logits are (…, labels), `valid` (…) is true where a position counts, and `target` (…), the class of the label, is negative where there is
    none: it is the teacher's likeliest class then. The gradient of soft targets shrinks as 1/T², so the factor keeps it
    comparable to that of the labels. Computed in float32.
    """
    if student_logits.shape != teacher_logits.shape:
        raise InputError(
            f"expected logits of one shape from student and teacher, found {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}. "
            "Take a teacher with the student's labels, or vocabulary, and the same inputs."
        )
    # Positions that do not count are left out, not multiplied by 0: of padding even the logits may be infinite.
    teacher, student = teacher_logits[valid].float() / temperature, student_logits[valid].float() / temperature
    if target is not None and kind == "decoupled":
        target = torch.where(target[valid] < 0, teacher.argmax(dim=-1), target[valid])
    if kind != "squared_error":
        teacher, student = F.log_softmax(teacher, dim=-1), F.log_softmax(student, dim=-1)
    return temperature**2 * DIVERGENCES[kind](teacher, student, beta, target).sum()


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


# The losses of tokens: `weights` (batch, tokens) are what each token counts, 0 for padding; see ClassifierLoss.token_weights.


def hidden_state_loss(student: Tensor, teacher: Tensor, weights: Tensor, kind: str = "squared_error") -> Tensor:
    """The distance of two hidden states (batch, tokens, width), summed over tokens by their weights.

    Of each token it is the mean squared difference (as in TinyBERT; Jiao et al., 2020), or with `kind` cosine 1 minus the cosine of the
    angle between the two (as in DistilBERT; Sanh et al., 2019).
    """
    if kind == "cosine":
        distance = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    else:
        distance = (student.float() - teacher.float()).pow(2).mean(dim=-1)
    return (distance * weights).sum()


def attention_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """The squared distance of two attention maps (batch, heads, tokens, tokens) of probabilities, summed over queries by their weights.

    Of each query it is the sum over the keys, averaged over the heads (as in TinyBERT; Jiao et al., 2020, with probabilities in place of
    scores, so that it does not depend on the length; the student's maps have its attention dropout in them). Where the two have different
    numbers of heads, the mean over the heads is compared, as Zagoruyko & Komodakis (2017) sum over channels.
    """
    student, teacher = student.float(), teacher.float()
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
    return ((student - teacher).pow(2).sum(dim=-1).mean(dim=1) * weights).sum()


def relation_loss(student: Tensor, teacher: Tensor, weights: Tensor, heads: int) -> Tensor:
    """KL(teacher ‖ student) of the self-attention relations of vectors (batch, tokens, width), summed over tokens by their weights.

    The vectors are queries, or keys, or values, all heads side by side. They are cut into as many `heads` on both sides, whatever heads and
    widths the models have; a relation is the softmax of their scaled dot products (MiniLMv2; Wang et al., 2021), averaged over the heads.
    """

    def relations(vectors: Tensor) -> Tensor:
        parts = vectors.float().unflatten(-1, (heads, -1)).transpose(1, 2)  # (batch, heads, tokens, width of a head)
        products = parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5
        # Finite, since of an example that does not count all tokens are left out.
        return F.log_softmax(products.masked_fill((weights == 0)[:, None, None], -1e9), dim=-1)

    divergence = kl(relations(teacher), relations(student)).mean(dim=1)
    return (divergence * weights).sum()


class ClassifierLoss:
    """The losses (see pipelines/core/task.py) of any model with logits (…, labels) for labels (…): one an example or one a token."""

    class_weights: Tensor | None = None  # (labels), each label's in the loss against the labels
    has_distributions = True
    soft_target_settings: Sequence[str] = ()
    divergences: Sequence[str] = tuple(DIVERGENCES)  # that soft_loss can do
    unlike_classes = ""  # why these are not all, and logits cannot be standardized

    def outputs(self, model_output: Any) -> Tensors:
        return {"logits": model_output.logits}

    def predictions(self, outputs: Tensors, labels: Tensor) -> Tensor:
        return outputs["logits"]

    def label_loss(self, outputs: Tensors, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        # Divided by the number of examples, not by their weights: balanced weights have a mean of 1, and the soft loss has none.
        return cross_entropy(outputs["logits"], labels, label_smoothing, self.class_weights), labels.ne(IGNORED).sum()

    def soft_targets(self, outputs: Tensors, distill: DistillConfig) -> Tensors:
        return {"teacher_logits": outputs["logits"].float()}

    def check_soft_loss(self, distill: DistillConfig, teachers: int = 1) -> None:
        """Raise InputError for a loss that the outputs do not serve; logits of classes, stored as they are, serve all."""
        is_other = distill.divergence not in self.divergences
        if is_other or (distill.standardize_logits and self.unlike_classes):
            found = f"--divergence {distill.divergence}" if is_other else "--standardize_logits"
            raise InputError(f"expected no {found}, found it. Leave it out: {self.unlike_classes}.")

    def soft_loss(self, outputs: Tensors, teacher: Tensors, labels: Tensor, distill: DistillConfig) -> Tensor:
        logits = standardize(outputs["logits"]) if distill.standardize_logits else outputs["logits"]
        settings = (distill.temperature, labels.ne(IGNORED), distill.divergence, distill.beta)
        if "teacher_ids" in teacher:
            return top_k_loss(logits, teacher, *settings)
        from_teacher = teacher["teacher_logits"]
        if distill.standardize_logits:
            from_teacher = standardize(from_teacher)
        return soft_target_loss(logits, from_teacher, *settings, target=labels)

    def token_weights(self, inputs: Tensors, labels: Tensor, tokens: int) -> Tensor:
        counted = labels.ne(IGNORED).float()  # examples without a label only fill up a batch
        if labels.dim() > 1:  # the other losses are one per token, too
            return counted
        mask = inputs.get("attention_mask", counted.new_ones(len(labels), tokens))
        return counted[:, None] * mask / mask.sum(dim=-1, keepdim=True).clamp(min=1)


class NextTokenLoss(ClassifierLoss):
    """The losses of a causal language model: its logits (batch, tokens, vocabulary) at one position are about the next."""

    soft_target_settings: Sequence[str] = ("temperature", "soft_target_top_k", "standardize_logits")

    def label_loss(self, outputs: Tensors, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        return super().label_loss({"logits": outputs["logits"][:, :-1]}, labels[:, 1:], label_smoothing)

    def soft_targets(self, outputs: Tensors, distill: DistillConfig) -> Tensors:
        """Of all logits there are thousands for every token, so the likeliest tokens are stored, and the mass of all others."""
        logits = standardize(outputs["logits"]) if distill.standardize_logits else outputs["logits"]
        classes = logits.shape[-1]
        targets = top_k_targets(logits, min(distill.soft_target_top_k, classes - 1), distill.temperature)
        targets["teacher_ids"] = targets["teacher_ids"].to(torch.uint16 if classes <= 2**16 else torch.int32)
        return targets

    def soft_loss(self, outputs: Tensors, teacher: Tensors, labels: Tensor, distill: DistillConfig) -> Tensor:
        shifted = {name: column[:, :-1] for name, column in teacher.items()}
        return super().soft_loss({"logits": outputs["logits"][:, :-1]}, shifted, labels[:, 1:], distill)

    def token_weights(self, inputs: Tensors, labels: Tensor, tokens: int) -> Tensor:
        return super().token_weights(inputs, F.pad(labels[:, 1:], (0, 1), value=IGNORED), tokens)

    def check_soft_loss(self, distill: DistillConfig, teachers: int = 1) -> None:
        """Raise InputError for what the likeliest tokens, which are all that is stored, do not tell."""
        if distill.needs_stored_targets and distill.divergence in ("squared_error", "decoupled"):
            raise InputError(
                f"expected --divergence forward_kl, reverse_kl or jensen_shannon with stored soft targets of a language model, found "
                f"{distill.divergence}: it needs the logits of all tokens, of which only the likeliest are stored. Pass --soft_targets online."
            )
        if teachers > 1 and distill.combine_teachers == "mean":
            raise InputError(
                f"expected --combine_teachers each for a language model, found mean with {teachers} teachers: the tokens that each finds "
                "likeliest, which are all that is stored, are others. Pass --combine_teachers each."
            )


def teachers_loss(
    task: Task | ClassifierLoss, outputs: Tensors, teachers: Tensors, labels: Tensor, distill: DistillConfig
) -> Tensor:
    """The task's soft_loss of one teacher or of several, the names of whose soft targets end in _2, _3, …

    Of several it is that of the mean of their logits, which is the geometric mean of their distributions (Hinton et al., 2015), or the mean
    of the losses of each, which with forward KL has the gradient of the mean of the distributions.
    """
    each: dict[str, Tensors] = {}
    for name, values in teachers.items():
        own, _, number = name.rpartition("_")
        each.setdefault(number if number.isdigit() else "", {})[own if number.isdigit() else name] = values
    targets = list(each.values())
    if len(targets) > 1 and distill.combine_teachers == "mean":
        targets = [{name: torch.stack([one[name] for one in targets]).mean(dim=0) for name in targets[0]}]
    return torch.stack([task.soft_loss(outputs, one, labels, distill) for one in targets]).mean()


def losses_of(model: Any) -> ClassifierLoss:
    """The losses for a model that no task comes with: those of causal language models by the name of its class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    stock = model.get_base_model() if hasattr(model, "get_base_model") else model  # below a LoRA adapter
    is_causal = type(stock).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    config = stock.config
    if not is_causal and (config.num_labels == 1 or config.problem_type not in (None, "single_label_classification")):
        raise InputError(
            f"expected a model that chooses one of several labels, or a causal language model, found {type(stock).__name__} with "
            f"{config.num_labels} outputs (problem_type {config.problem_type!r}). Scores and several labels are distilled by pocketformers "
            "compress --task text-regression and multi-label-classification."
        )
    return NextTokenLoss() if is_causal else ClassifierLoss()
