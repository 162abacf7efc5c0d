"""How far a student's distribution is from its teacher's: one function for each --divergence, and the dict that names them.

Distributions are log probabilities (…, classes); a divergence is summed over the classes. `beta` is the setting of that name. The
docstrings are what --help says.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def kl(p: Tensor, q: Tensor) -> Tensor:
    # A class without any probability adds 0, where 0 times infinity would be NaN.
    impossible = p == -math.inf
    difference = (p - q).masked_fill(impossible, 0.0)
    return (p.exp() * difference).sum(dim=-1)


def forward_kl(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """KL(teacher ‖ student), which spreads the student over all that the teacher finds likely."""
    return kl(teacher, student)


def reverse_kl(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """KL(student ‖ teacher), which draws the student to what the teacher finds likeliest."""
    return kl(student, teacher)


def jensen_shannon(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """The generalized one of Agarwal et al. (2024): β KL(teacher ‖ M) + (1 - β) KL(student ‖ M) with M = β teacher + (1 - β) student."""
    mixture = (teacher + math.log(beta)).logaddexp(student + math.log(1 - beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jensen_shannon": jensen_shannon}
