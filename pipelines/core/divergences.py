"""How far a student's logits are from its teacher's: one function for each --divergence, and the dict that names them.

Each takes the log probabilities of both (…, classes), but `squared_error` their logits, and returns (…). `beta` is the setting of that
name, `target` (…) the class of the label, which only `decoupled` reads. The docstrings are what --help says.
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


def forward_kl(teacher: Tensor, student: Tensor, beta: float, target: Tensor | None = None) -> Tensor:
    """KL(teacher ‖ student), which spreads the student over all that the teacher finds likely."""
    return kl(teacher, student)


def reverse_kl(teacher: Tensor, student: Tensor, beta: float, target: Tensor | None = None) -> Tensor:
    """KL(student ‖ teacher), which draws the student to what the teacher finds likeliest."""
    return kl(student, teacher)


def jensen_shannon(teacher: Tensor, student: Tensor, beta: float, target: Tensor | None = None) -> Tensor:
    """The generalized one of Agarwal et al. (2024): β KL(teacher ‖ M) + (1 - β) KL(student ‖ M) with M = β teacher + (1 - β) student."""
    mixture = (teacher + math.log(beta)).logaddexp(student + math.log(1 - beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def squared_error(teacher: Tensor, student: Tensor, beta: float, target: Tensor | None = None) -> Tensor:
    """The squared error of the logits, a mean over the classes (Ba & Caruana, 2014; Kim et al., 2021); --temperature changes nothing in it."""
    return (teacher - student).pow(2).mean(dim=-1)


def decoupled(teacher: Tensor, student: Tensor, beta: float, target: Tensor | None = None) -> Tensor:
    """The decoupled one of Zhao et al. (2022): (1 - β) KL of the label's class against all others together + β KL of the others among
    themselves, which plain KL weighs by 1 - the teacher's probability of the label's class. With β = 0.889 the two weigh 1:8, as there."""
    import torch  # which reading the settings does without

    assert target is not None
    of_target = torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, target.unsqueeze(-1), True)

    def parts(log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
        others = log_probabilities.masked_fill(of_target, -math.inf)
        mass = others.logsumexp(dim=-1, keepdim=True)
        chosen = log_probabilities.gather(-1, target.unsqueeze(-1))
        return torch.cat([chosen, mass], dim=-1), (log_probabilities - mass).masked_fill(of_target, -math.inf)

    (teacher_target, teacher_others), (student_target, student_others) = parts(teacher), parts(student)
    return (1 - beta) * kl(teacher_target, student_target) + beta * kl(teacher_others, student_others)


DIVERGENCES = {one.__name__: one for one in (forward_kl, reverse_kl, jensen_shannon, squared_error, decoupled)}
