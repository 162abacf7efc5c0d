"""A classifier's last layer computed for the first token only, the one its head reads: the same logits and gradients of less work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipelines.models.families import FAMILIES, Family, layers_of, unit_width


def _attend(layer: Any, family: Family, hidden: Tensor, mask: Tensor | None, dropout: float, keywords: Any) -> Tensor:
    """What the first token attends to (batch, 1, heads x head size), of the states of all tokens (batch, tokens, width)."""
    assert family.heads is not None
    query, key, value = (outputs.path for outputs in family.heads.outputs)
    attention, size = layer.get_submodule(query.rpartition(".")[0]), unit_width(layer, family.heads)

    def project(path: str, states: Tensor) -> Tensor:
        states = layer.get_submodule(path)(states)
        return states.view(*states.shape[:2], -1, size).transpose(1, 2)

    output, _ = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation](
        attention, project(query, hidden[:, :1]), project(key, hidden), project(value, hidden),
        None if mask is None else mask[..., :1, :], dropout=dropout if attention.training else 0.0, scaling=attention.scaling, **keywords,
    )  # fmt: skip
    return output.reshape(len(hidden), 1, -1)


# What a layer of each family does after the attention, as in transformers' own forward pass. An encoder's layers get more than they use.


def _bert(layer: Any, family: Family, hidden: Tensor, mask: Tensor | None = None, *_: Any, **keywords: Any) -> Any:
    attended = _attend(layer, family, hidden, mask, layer.attention.self.dropout.p, keywords)
    return layer.feed_forward_chunk(layer.attention.output(attended, hidden[:, :1]))


def _distilbert(layer: Any, family: Family, hidden: Tensor, mask: Tensor | None = None, **keywords: Any) -> Any:
    attended = layer.attention.out_lin(_attend(layer, family, hidden, mask, layer.attention.dropout.p, keywords))
    attended = layer.sa_layer_norm(attended + hidden[:, :1])
    return layer.output_layer_norm(layer.ffn.ff_chunk(attended) + attended)


def _vit(layer: Any, family: Family, hidden: Tensor, mask: Tensor | None = None, **keywords: Any) -> Any:
    normalized = layer.layernorm_before(hidden)
    attended = _attend(layer, family, normalized, mask, layer.attention.attention_dropout, keywords)
    attended = layer.dropout(layer.attention.o_proj(attended)) + hidden[:, :1]
    return layer.dropout(layer.mlp(layer.layernorm_after(attended))) + attended


_FORWARDS: dict[Family, Callable[..., Any]] = {
    FAMILIES["bert"]: _bert,
    FAMILIES["distilbert"]: _distilbert,
    FAMILIES["vit"]: _vit,
}


@contextmanager
def first_token_only(model: Any) -> Iterator[None]:
    """While it lasts, the last layer of an encoder whose classification head reads its first token computes no other.

    Its keys and values are still those of all tokens. Of a student of three layers that is a quarter of all products fewer. The last hidden
    states are then one token's. Any other model, or one with an attention of its own, is left as it is.
    """
    stock = model.get_base_model() if hasattr(model, "get_base_model") else model  # below a LoRA adapter
    family = FAMILIES.get(stock.config.model_type)
    if (
        family not in _FORWARDS
        or not type(stock).__module__.startswith("transformers.")  # a head of other code may read other tokens
        or not type(stock).__name__.endswith(("ForSequenceClassification", "ForImageClassification"))
        or stock.config._attn_implementation != "sdpa"
        or getattr(stock.config, "is_decoder", False)
    ):
        yield
        return
    forward = _FORWARDS[family]
    last = layers_of(stock)[-1]
    last.forward = partial(forward, last, family)
    try:
        yield
    finally:
        # A training that was sharded leaves copies of the layers in the model, or wraps them.
        for module in stock.modules():
            if getattr(vars(module).get("forward"), "func", None) is forward:
                del module.forward
