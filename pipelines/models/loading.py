"""Load models, their configs and their tokenizers, with one message for the many ways in which that fails."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.core.errors import InputError
from pipelines.core.sources import resolve
from pipelines.core.task import Head
from pipelines.data.sources import check_config

GENERIC_LABEL = "LABEL_"  # transformers' names for labels nobody has named
# How the names of a tokenizer's files begin.
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "spm", "sentencepiece", "tekken")
POSITIONS = re.compile(r"(^|\.)(position_embeddings|positions_embed|embed_positions|wpe)$")


class Inputs(NamedTuple):
    """What a model of texts takes, by the tables of its embeddings."""

    positions: int | None  # None where they are relative or rotary: texts may have any length
    from_padding: bool  # whether positions are counted from the id of the padding token on, as RoBERTa's are
    token_types: float  # 0 where it tells the two texts of a pair apart by their tokens only


def load_classifier(
    model_class: Any, source: str, config: Any, label_names: list[str], head: Head, from_scratch: bool, **code: bool
) -> Any:
    """The model in `source`, by an Auto class, with a head for `label_names` in their order; `config` is what `source` has.

    A head for exactly these labels, in any order, is kept, and its rows are put in the data's order. Where the checkpoint has
    none, or one for other labels, `head` says whether it gets a fresh one; raises InputError where it may not. With `from_scratch`
    all weights are random and `source` need have none.
    """
    config = copy.deepcopy(config)
    suffix = model_class.__name__.removeprefix("AutoModel")
    has_head = any(suffix in name for name in config.architectures or [])
    order = label_order(config, label_names) if has_head else None
    may_be_new = from_scratch or head == "new if other" or (head == "new if none" and not has_head)
    if order is None and not may_be_new:
        found = f"no classifier in 'architectures' of config.json ({config.architectures})"
        if has_head:
            found = f"id2label {config.id2label} and label2id {config.label2id}"[:500]
        raise InputError(
            f"expected a model for the labels {label_names}, found {found} in {source}; teacher and student need the same "
            "labels. Fine-tune it on this data set (a teacher: --teacher_epochs above 0), or use the data set it was fine-tuned on."
        )
    if order is None or from_scratch:
        name_labels(config, label_names)
        order = list(range(len(label_names)))
    if from_scratch:
        return new_model(model_class, source, config, **code)
    model = load_weights(model_class, source, config, head_may_be_new=head != "required", **code)
    reorder_labels(model, order, label_names)
    return model


def load_config(source: str, **settings: Any) -> Any:
    """The config of the model in `source` with other `settings`, but for what a checkpoint may ask for that changes no number of it: outputs
    beside the logits, which are read by name; kernels that this machine may not have; and the parts that a layer is computed in."""
    from transformers import AutoConfig

    config = load(AutoConfig.from_pretrained, source, "a model's config.json", **settings)
    _check_rotary(config, source)
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    config._attn_implementation = None
    if getattr(config, "chunk_size_feed_forward", 0):
        config.chunk_size_feed_forward = 0
    return config


def _check_rotary(config: Any, source: str) -> None:
    """Raise InputError for rotary positions whose frequencies follow the length of the text, which no graph holds."""
    rope = getattr(config, "rope_parameters", None) or {}
    # Families with two kinds of attention have settings for each.
    if "dynamic" in [one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)]:
        raise InputError(
            f"expected rotary positions that are the same for texts of any length, found rope_type 'dynamic' in config.json of {source}, which no "
            f"ONNX graph can hold. Up to max_position_embeddings ({config.max_position_embeddings}) tokens it equals 'default': write that there, "
            "and use no longer texts."
        )


def new_model(model_class: Any, source: str, config: Any = None, **settings: Any) -> Any:
    """A model by an Auto class with random weights, in the shape of `config`, or of the one in `source` with other `settings`."""
    if config is None:
        config = load_config(source, **settings)
    _check_family(model_class, source, config)
    config.architectures = config.architectures or []  # from_config cannot do without
    code = {"trust_remote_code": settings.get("trust_remote_code", False)}
    return load(lambda _: model_class.from_config(config, dtype="float32", **code), source, "the shape of a model")


def _check_family(model_class: Any, source: str, config: Any) -> None:
    """Raise InputError where neither transformers nor the model's own code has a class for `config` behind this Auto class."""
    known, own = model_class._model_mapping, getattr(config, "auto_map", None) or {}
    if type(config) not in known and model_class.__name__ not in own:
        raise InputError(
            f"expected a family that transformers has the class {model_class.__name__} for, which the task needs, found {type(config).__name__} at "
            f"{source}. Use a model of another family, or another --task."
        )


def check_encoder(config: Any, source: str) -> None:
    """Raise InputError for a model of two parts."""
    if config.is_encoder_decoder:
        raise InputError(
            f"expected an encoder such as BERT, or a decoder such as GPT-2, found {config.model_type!r} in {source}, which has both; its "
            "classifier cannot be exported. Use one of the others."
        )


def inputs_of(model_class: Any, source: str, config: Any, **code: bool) -> Inputs:
    """What the model in `source` takes, read from its modules, which are made without weights."""
    import torch

    with torch.device("meta"):
        model = new_model(model_class, source, copy.deepcopy(config), **code)
    modules = dict(model.named_modules())
    tables = [
        (len(modules[name].weight), getattr(modules[name], "padding_idx", None), getattr(modules[name], "offset", 0))
        for name in modules
        if POSITIONS.search(name) and "vision" not in name
    ]
    types = [
        len(parameter) if "token_type" in name else math.inf  # XLNet compares the types of two tokens
        for name, parameter in model.named_parameters()
        if name.endswith(("token_type_embeddings.weight", "seg_embed"))
    ]
    return Inputs(
        min((size - (offset if padding is None else padding + 1) for size, padding, offset in tables), default=None),
        any(padding is not None for _, padding, _ in tables),
        min(types, default=0),
    )


def load_weights(model_class: Any, source: str, config: Any, head_may_be_new: bool = False, **settings: Any) -> Any:
    """The model in `source` with this `config`, by an Auto class; refuses weights that leave part of it at random, which transformers only logs."""
    if hasattr(model_class, "_model_mapping"):  # an Auto class
        _check_family(model_class, source, config)
    model, info = load(
        model_class.from_pretrained,
        source,
        "a model's weights",
        config=config,
        output_loading_info=True,
        use_safetensors=True,  # a pickle runs whatever code is in it
        dtype="float32",  # whatever it was stored in: mixed precision is the Trainer's
        ignore_mismatched_sizes=True,  # they are looked at below
        **settings,
    )
    # A few, such as CLIP's, have no base model; then all but the last part is the encoder.
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    *_, (head, _) = model.named_children()
    # The pooler belongs to the head where it is trained with it: a masked language model has none.
    fresh = [str(name) for name in [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]]
    inside = (lambda name: name.startswith(prefix)) if prefix else (lambda name: not name.startswith(f"{head}."))
    encoder = [name for name in fresh if inside(name) and ".pooler." not in name]
    if encoder or (fresh and not head_may_be_new):
        missing = encoder or fresh
        shapes = {
            str(name): f" ({[*stored]} in the file, {[*wanted]} by config.json)"
            for name, stored, wanted in info["mismatched_keys"]
        }
        raise InputError(
            f"expected the weights of a whole {type(model).__name__} in {source}, found none of the right shape for {len(missing)} of its "
            f"tensors, such as {missing[0]}{shapes.get(missing[0], '')}. "
            f"{_remedy(source, missing[0].removeprefix(prefix), prefix, info['unexpected_keys'])}"
        )
    check_finite(model, source)
    # A runtime without transformers reads config.json alone, and generation_config.json may have more ends.
    known = (getattr(one, "eos_token_id", None) for one in (model.config, getattr(model, "generation_config", None)))
    ends = [end for one in known if one is not None for end in (one if isinstance(one, list) else [one])]
    if len({*ends}) > 1:
        model.config.eos_token_id = list(dict.fromkeys(ends))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = _what_is_saved(model.generation_config)
    return model


def _what_is_saved(settings: Any) -> Any:
    """How a checkpoint generates, without what generate() ignores, such as the temperature where nothing is drawn: the Trainer gives these
    settings the tokenizer's special tokens, and transformers saves none that were changed with such a setting among them."""
    from transformers import GenerationConfig

    try:
        settings.validate(strict=True)
    except ValueError:
        kept, given = GenerationConfig(), settings.to_diff_dict()
        for name in sorted(given, key=lambda name: name not in ("do_sample", "num_beams")):  # on which others depend
            before = getattr(kept, name, None)
            setattr(kept, name, given[name])
            try:
                kept.validate(strict=True)
            except ValueError:
                setattr(kept, name, before)
        return kept
    return settings


def check_finite(model: Any, source: str) -> None:
    """Raise InputError for NaN or infinity in what a model keeps; statistics of batches, too."""
    numbers = ((name, one) for name, one in model.state_dict().items() if one.is_floating_point())
    broken = next((name for name, one in numbers if not one.isfinite().all()), None)
    if broken is not None:
        raise InputError(
            f"expected weights that are finite numbers in {source}, found NaN or infinity in {broken}: a training that diverged leaves them. "
            "Use an earlier checkpoint, or another model."
        )


def _remedy(source: str, missing: str, base: str, unexpected: Any) -> str:
    """What to do about a tensor that is `missing`, which torch.compile, a wrapper or a module of one's own may have given a longer name."""
    longer = next((str(name) for name in unexpected if str(name).endswith(missing)), missing)
    wrapper = longer.removesuffix(missing).removesuffix(base)
    if not wrapper:
        return "Use a checkpoint of that architecture, or save it again with save_pretrained."
    code = (
        "from pathlib import Path; from safetensors.torch import load_file, save_file; "
        f"folder = Path({resolve(source)!r}); weights = {{name.removeprefix({wrapper!r}): tensor for file in "
        "folder.glob('*.safetensors') for name, tensor in load_file(file).items()}; "
        "save_file(weights, folder / 'model.safetensors', {'format': 'pt'})"
    )
    return (
        f'All names begin with {wrapper!r}, as torch.compile and wrappers save them. Take that away: python -c "{code}"'
    )


def label_order(config: Any, label_names: list[str]) -> list[int] | None:
    """For each label of the data its row in the model's head, or None where the head is for other labels.

    Labels are compared by name, or else without case, since the same data set is spelt differently on different hubs. A head whose
    labels have no names (LABEL_0, …) is taken to be in the data's order where their number agrees. Where id2label does not number its
    labels from 0 on, or label2id says otherwise, nobody knows which row is whose.
    """
    names, rows = [str(name) for _, name in sorted(config.id2label.items())], list(range(len(config.id2label)))
    stated = {str(name): int(row) for name, row in (config.label2id or {}).items()}
    if sorted(config.id2label) != rows or (stated.keys() == {*names} and [stated[name] for name in names] != rows):
        return None
    spellings: tuple[Callable[[str], str], ...] = (str, str.casefold)
    for spelling in spellings:
        found, wanted = [spelling(name) for name in names], [spelling(name) for name in label_names]
        # Names that differ in nothing but case say no order without it.
        if sorted(found) == sorted(wanted) and len({*found}) == len(found):
            return [found.index(name) for name in wanted]
    return rows if has_unnamed_labels(config) and len(rows) == len(label_names) else None


def has_unnamed_labels(config: Any) -> bool:
    """Whether the labels of a head are LABEL_0, LABEL_1, …"""
    return all(str(name).startswith(GENERIC_LABEL) for name in config.id2label.values())


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
    name_labels(model.config, label_names)


def name_labels(config: Any, label_names: list[str]) -> None:
    """Let `config` be of a classifier of these labels, whatever its head was for before."""
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: index for index, name in enumerate(label_names)}
    config.problem_type = None


def has_tokenizer(source: str) -> bool:
    """Whether a directory holds files of a tokenizer; of a Hub id only a download would tell."""
    directory = Path(resolve(source))
    return not directory.is_dir() or any(file.name.startswith(TOKENIZER_FILES) for file in directory.iterdir())


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer in `source`. Raises InputError where there is none."""
    from transformers import AutoTokenizer

    # Without its files transformers makes one of hardly more than special tokens, and says nothing.
    if not has_tokenizer(source):
        check_config(Path(resolve(source)))
        raise InputError(
            f"expected a tokenizer beside the model in {source}, found none. Save the one that the model was trained with there "
            "(save_pretrained)."
        )
    what = "a tokenizer (tokenizer.json)"
    tokenizer = load(AutoTokenizer.from_pretrained, source, what, trust_remote_code=trust_remote_code)
    # What transformers makes of a tokenizer_config.json alone.
    if len(tokenizer) <= len({*tokenizer.all_special_tokens}):
        raise InputError(
            f"expected a tokenizer with a vocabulary in {source}, found {len(tokenizer)} special tokens alone. Copy the rest of its files "
            "there, too: tokenizer.json, or vocab.txt and the like."
        )
    return tokenizer


def load(loader: Callable[..., Any], source: str, what: str, **arguments: Any) -> Any:
    """`loader(source, …)`, `source` being located, with one message for the many ways in which that fails."""
    located = resolve(source)
    if os.path.isabs(located):
        check_config(Path(located))
    try:
        return loader(located, **arguments)
    except Exception as error:  # the libraries raise whatever their parsers do
        summary = " ".join(str(error).split())[:400]
        if "trust_remote_code" in str(error):
            raise InputError(
                f"expected {what} of transformers' own classes at {source}, found one that brings code of its own, which was not run. "
                "Read that code; where you trust it, pass --trust_remote_code true, or take another model."
            ) from error
        raise InputError(
            f"expected {what} at {source}, found: {summary}. Check the path or the Hub id; files of a newer library need that one (pip "
            "install -U transformers tokenizers); a gated or private model needs HF_TOKEN, and without a network only a local directory "
            "or package:// path works."
        ) from error
