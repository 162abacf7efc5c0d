"""Load models, their configs and their tokenizers, with one message for the many ways in which that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipelines.core.errors import InputError
from pipelines.core.sources import resolve
from pipelines.core.task import Head

GENERIC_LABEL = "LABEL_"  # transformers' names for labels nobody has named


def load_classifier(
    model_class: Any, source: str, config: Any, label_names: list[str], head: Head, from_scratch: bool, **code: bool
) -> Any:
    """The model in `source`, by an Auto class, with a head for `label_names` in their order; `config` is what `source` has.

    A head for exactly these labels, in any order, is kept, and its rows are put in the data's order. Where the checkpoint has
    none, or one for other labels, `head` says whether it gets a fresh one; raises InputError where it may not. With `from_scratch`
    all weights are random and `source` need have none.
    """
    labels = dict(enumerate(label_names))
    names = {"id2label": labels, "label2id": {name: i for i, name in labels.items()}, "num_labels": len(labels)}
    if from_scratch:
        return new_model(model_class, source, **names, **code)
    suffix = model_class.__name__.removeprefix("AutoModel")
    has_head = any(suffix in name for name in config.architectures or [])
    order = label_order(config, label_names) if has_head else None
    if order is not None:
        model = load_weights(model_class, source, **code)
        reorder_labels(model, order, label_names)
        return model
    if head == "required" or (head == "new if none" and has_head):
        found = f"the labels {list(config.id2label.values())}" if has_head else "no classification head"
        raise InputError(
            f"expected a model for the labels {label_names}, found {found} in {source}; teacher and student need the same "
            "labels. Fine-tune it on this data set (a teacher: --teacher_epochs above 0), or use the data set it was fine-tuned on."
        )
    return load_weights(model_class, source, head_may_be_new=True, **names, **code)


def new_model(model_class: Any, source: str, **settings: Any) -> Any:
    """A model by an Auto class with random weights, in the shape of the one in `source` with other `settings`."""
    from transformers import AutoConfig

    shape = load(AutoConfig.from_pretrained, source, "a model's config.json", **settings)
    shape.architectures = shape.architectures or []  # from_config cannot do without
    code = {"trust_remote_code": settings.get("trust_remote_code", False)}
    return load(lambda _: model_class.from_config(shape, dtype="float32", **code), source, "the shape of a model")


def load_weights(model_class: Any, source: str, head_may_be_new: bool = False, **settings: Any) -> Any:
    """The model in `source` by an Auto class; refuses weights that leave part of it at random, which transformers only logs."""
    model, info = load(
        model_class.from_pretrained,
        source,
        "a model's weights",
        output_loading_info=True,
        use_safetensors=True,  # a pickle runs whatever code is in it
        dtype="float32",  # whatever it was stored in: mixed precision is the Trainer's
        ignore_mismatched_sizes=head_may_be_new,
        **settings,
    )
    prefix = f"{model.base_model_prefix}."
    # The pooler belongs to the head where it is trained with it: a masked language model has none.
    fresh = [str(name) for name in [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]]
    encoder = [name for name in fresh if name.startswith(prefix) and ".pooler." not in name]
    if encoder or (fresh and not head_may_be_new):
        missing = encoder or fresh
        raise InputError(
            f"expected the weights of a whole {type(model).__name__} in {source}, found none for {len(missing)} of its tensors, such as "
            f"{missing[0]}. Use a checkpoint of that architecture, or save it again with save_pretrained."
        )
    return model


def label_order(config: Any, label_names: list[str]) -> list[int] | None:
    """For each label of the data its row in the model's head, or None where the head is for other labels.

    Labels are compared by name, or else without case, since the same data set is spelt differently on different hubs. A head whose
    labels have no names (LABEL_0, …) is taken to be in the data's order where their number agrees.
    """
    names = [str(config.id2label[index]) for index in range(len(config.id2label))]
    spellings: tuple[Callable[[str], str], ...] = (str, str.casefold)
    for spelling in spellings:
        found, wanted = [spelling(name) for name in names], [spelling(name) for name in label_names]
        # Names that differ in nothing but case say no order without it.
        if sorted(found) == sorted(wanted) and len({*found}) == len(found):
            return [found.index(name) for name in wanted]
    generic = all(name.startswith(GENERIC_LABEL) for name in names)
    return list(range(len(names))) if generic and len(names) == len(label_names) else None


def reorder_labels(model: Any, order: list[int], label_names: list[str]) -> None:
    """Put the head's rows in the data's order, so that a logit means the same in teacher, student and report."""
    import torch

    from pipelines.models.families import head_output

    if order != list(range(len(order))):
        head = head_output(model)
        with torch.no_grad():
            head.weight.copy_(head.weight[order].clone())
            if head.bias is not None:
                head.bias.copy_(head.bias[order].clone())
    model.config.id2label = dict(enumerate(label_names))
    model.config.label2id = {name: index for index, name in enumerate(label_names)}


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer in `source`. Raises InputError where there is none."""
    from transformers import AutoTokenizer

    tokenizer = load(AutoTokenizer.from_pretrained, source, "a tokenizer", trust_remote_code=trust_remote_code)
    # Without its files transformers makes one of special tokens alone, and says nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(
            f"expected a tokenizer beside the model in {source}, found none. Save the one that the model was trained with there "
            "(save_pretrained)."
        )
    return tokenizer


def load(loader: Callable[..., Any], source: str, what: str, **arguments: Any) -> Any:
    """`loader(source, …)`, `source` being located, with one message for the many ways in which that fails."""
    located = resolve(source)
    try:
        return loader(located, **arguments)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        summary = " ".join(str(error).split())[:400]
        if "trust_remote_code" in str(error):
            raise InputError(
                f"expected {what} of transformers' own classes at {source}, found one that brings code of its own, which was not run. "
                "Read that code; where you trust it, pass --trust_remote_code true, or take another model."
            ) from error
        raise InputError(
            f"expected {what} at {source}, found: {summary}. Check the path or the Hub id; a gated or private model needs HF_TOKEN, and "
            "without a network only a local directory or package:// path works."
        ) from error
