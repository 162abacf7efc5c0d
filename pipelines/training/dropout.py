"""Dropout that costs less on a CPU: the same dropout of cheaper draws; and, on request, none for attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BITS, NONE = "sdpa_bit_dropout", "sdpa_without_dropout"


def drop_out(values: Tensor, p: float) -> Tensor:
    """Zeros for a share p of `values`, the others times 1 / (1 - p): 16 random bits a value meet p within 2e-5.

    The bits are those of NumPy's SFC64, which torch's generator seeds: drawing took most of the time of torch's own dropout. Who is kept
    is written as a number and multiplied: masks of booleans take ten times as long, in the backward pass, too.
    """
    generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**63 - 1, ()))))
    draws = generator.integers(0, 2**64 - 1, -(-values.numel() // 4), np.uint64, endpoint=True).view(np.int16)
    factors = torch.empty(values.shape, dtype=values.dtype)
    torch.ge(torch.from_numpy(draws)[: values.numel()].view(values.shape), int(p * 2**16) - 2**15, out=factors)
    return values * factors.mul_(1 / (1 - p))


class BitDropout(nn.Dropout):
    """nn.Dropout whose values are dropped by drop_out() on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or input.device.type != "cpu":
            return super().forward(input)
        return drop_out(input, self.p)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    drops: bool, dropout: float = 0.0, **keywords: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention over torch's scaled_dot_product_attention; its dropout is drop_out(), or none unless it `drops`.

    Query, key and value are (batch, heads, tokens, head size); the output is (batch, tokens, heads, head size).
    """
    # On a CPU torch's backward pass of attention takes two (256 tokens) to eight times (64) as long in bfloat16 as in float32.
    with torch.autocast("cpu", enabled=False):
        inputs = (query.float(), key.float(), value.float())
        unusual = [name for name in ("position_bias", "cache", "softcap") if keywords.get(name) is not None]
        if dropout and drops and not unusual and query.shape[1] == key.shape[1]:
            output = _attend_with_dropout(module, *inputs, attention_mask, dropout, **keywords)
        else:
            rest = dropout if drops else 0.0
            output, _ = sdpa_attention_forward(module, *inputs, attention_mask, dropout=rest, **keywords)
    return output.to(query.dtype), None


def _attend_with_dropout(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float,
    scaling: float | None = None, is_causal: bool | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(2, 3)
    if mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if mask is not None:
        if mask.dtype == torch.bool:  # as numbers: 0, or the least there is
            mask = (mask.to(scores.dtype) - 1) * torch.finfo(scores.dtype).max
        scores = scores + mask
    return (drop_out(scores.softmax(-1), dropout) @ value).transpose(1, 2).contiguous()


@contextmanager
def cheap_dropout(model: Any, in_attention: bool = True) -> Iterator[None]:
    """While it lasts, a model on a CPU drops out by drop_out(); its attention, where that is torch's own, too, or not at all.

    Drawing what to drop took a quarter of a training step of 64 tokens on a CPU, and almost half of one of 256. Attention that drops out
    nothing takes fewer passes over its scores.
    """
    dropouts = [module for module in model.modules() if type(module) is nn.Dropout]
    attention = model.config._attn_implementation
    for module in dropouts:
        module.__class__ = BitDropout
    if attention == "sdpa":
        name = BITS if in_attention else NONE
        AttentionInterface.register(name, partial(attend, drops=in_attention))
        AttentionMaskInterface.register(name, sdpa_mask)
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        for module in dropouts:
            module.__class__ = nn.Dropout
        model.set_attn_implementation(attention)
