"""Losses of vectors, as functions of tensors. Each returns a sum over rows; the trainer divides by their number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.core.divergences import kl

SCALE = 20.0  # of cosines before a softmax, as sentence-transformers has it


def vector_loss(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """The distance of vectors (texts, size): 1 minus their cosine, or the squared error of vectors of length 1, summed over the size
    (Reimers & Gurevych, 2020, with the mean), which is twice as much."""
    distance = 1 - F.cosine_similarity(student, teacher, dim=-1)
    return (distance if kind == "cosine" else 2 * distance).sum()


def similarities(vectors: Tensor) -> Tensor:
    """The cosines of all texts with all others (texts, texts - 1)."""
    unit = F.normalize(vectors, dim=-1)
    others = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    return (unit @ unit.T)[others].reshape(len(unit), -1)


def similarity_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared error of the cosines of each text with the others of its batch, a mean over these; the two may have other sizes."""
    if len(student) < 2:
        return student.sum() * 0
    return (similarities(student) - similarities(teacher)).pow(2).mean(dim=1).sum()


def similarity_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of how each text's likeness spreads over the others of its batch (as in SEED; Fang et al., 2021)."""
    if len(student) < 2:
        return student.sum() * 0
    left, right = (F.log_softmax(similarities(one) / temperature, dim=-1) for one in (teacher, student))
    return kl(left, right).sum()


def pair_scores(vectors: Tensor) -> Tensor:
    """The cosines of all queries with all positives (pairs, pairs), of vectors (pairs, 2, size)."""
    unit = F.normalize(vectors, dim=-1)
    return unit[:, 0] @ unit[:, 1].T


def margin_error(student: Tensor, teacher: Tensor) -> Tensor:
    """MarginMSE (Hofstätter et al., 2020) of vectors (pairs, 2, size): the squared error of how much better the positive is than another's
    positive of the batch, a mean over these."""
    left, right = (scores.diagonal()[:, None] - scores for scores in (pair_scores(student), pair_scores(teacher)))
    return (left - right).pow(2).sum(dim=1).sum() / max(1, len(student) - 1)


def multiple_negatives(vectors: Tensor) -> Tensor:
    """The cross entropy of each query's positive among all of the batch (Henderson et al., 2017)."""
    own = torch.arange(len(vectors), device=vectors.device)
    return F.cross_entropy(SCALE * pair_scores(vectors), own, reduction="sum")
