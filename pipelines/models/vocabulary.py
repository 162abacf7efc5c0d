"""The vocabulary of a student: the tokens that its examples need, and those that any other text can be made of.

In a small model most weights are token vectors, of which a corpus needs a part (Abdaoui et al., 2020). Texts of the corpus become the same
tokens as before: what is removed is none of them, and what makes them stays. Only a word that --max_length cuts may end in others.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.compute as pc
from tokenizers import Tokenizer
from torch import nn

from pipelines.core.errors import InputError
from pipelines.core.task import TRANSFER, Task, TransferSet
from pipelines.models.loading import POSITIONS

KINDS = ("WordPiece", "BPE", "Unigram")  # of the tokenizers library
# A teacher of headlines scored 0.881 (419 of the validation split); with its table trimmed, untrained, 0.874 at 0.97 (19,212 tokens), 0.869 at 0.96
# and at 0.94 (12,908), 0.862 at 0.92, and 0.823 at 0.85.
COVERED = 0.94
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def checked_content(processor: Any, task: Task) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer whose vocabulary can be trimmed; raises InputError for any other."""
    backend = getattr(processor, "backend_tokenizer", None)  # a slow tokenizer has none, nor has an image processor
    content: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "slow"}}
    kind = content["model"]["type"]
    if kind not in KINDS or "soft_target_top_k" in task.soft_target_settings:
        raise InputError(
            f"expected a tokenizer with a tokenizer.json of the kind {', '.join(KINDS)} with --student_vocabulary, and a task whose scores are "
            f"not by token, found {type(processor).__name__} ({kind}) and {task.name}. Leave --student_vocabulary out."
        )
    return content


def tokens_to_keep(wanted: str, processor: Any, task: Task, transfer: TransferSet | None = None) -> list[int]:
    """The ids that a student keeps of the tokens of its teacher's `processor`, in rising order; `wanted` is --student_vocabulary.

    They are those of the training examples and of the transfer set, special tokens, single characters and bytes, and as many of the first ones
    of the vocabulary besides as the number says; with "corpus" until COVERED of the validation split's tokens are kept. Raises InputError where the number is too small.
    """
    content, ids = checked_content(processor, task), processor.get_vocab()
    model = content["model"]
    keep = {*processor.all_special_ids, *(token["id"] for token in content["added_tokens"])}
    examples = [task.features(processor)["train"]]
    if transfer is not None:
        examples.append(task.features(processor, transfer.load())[TRANSFER])
    for rows in examples:
        keep.update(pc.unique(tokens_of(rows)).to_pylist())
    prefix, suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    for token, number in ids.items():
        if len(token.removeprefix(prefix).removesuffix(suffix)) == 1 or BYTE.fullmatch(token):
            keep.add(number)
    if model["type"] == "Unigram":
        # What is unknown gets a score below the least of all, which should stay what it was.
        scores = [score for _, score in model["vocab"]]
        keep |= {model["unk_id"], int(np.argmin(scores))} - {None}
    elif model["unk_token"] in ids:
        keep.add(ids[model["unk_token"]])
    halves: dict[int, list[int]] = {}
    for left, right in model.get("merges", []):
        halves.setdefault(ids[left + right.removeprefix(prefix)], []).extend([ids[left], ids[right]])
    waiting = [*keep]
    while waiting:
        found = {*halves.get(waiting.pop(), [])} - keep
        keep |= found
        waiting += found
    others = (number for number in sorted(ids.values()) if number not in keep)
    if wanted == "corpus":
        found = pc.value_counts(tokens_of(task.features(processor)["validation"])).to_pylist()
        counts = {one["values"]: one["counts"] for one in found}
        missing = sum(count for number, count in counts.items() if number not in keep)
        while missing > (1 - COVERED) * sum(counts.values()):
            keep.add(number := next(others))
            missing -= counts.get(number, 0)
    else:
        if int(wanted) < len(keep):
            raise InputError(
                f"expected a --student_vocabulary of {len(keep)} tokens or more, which the training examples and the tokenizer need, found "
                f"{wanted}. Raise it, or pass 'corpus'."
            )
        keep.update(islice(others, int(wanted) - len(keep)))
    return sorted(keep)


def tokens_of(rows: Any) -> Any:
    return pc.list_flatten(rows.data.column("input_ids"), recursive=True)


def trim_tokenizer(processor: Any, kept: Sequence[int]) -> Any:
    """A copy of a tokenizer that has the tokens `kept` alone, numbered in their order; text is normalized and split as before."""
    content, numbers = json.loads(processor.backend_tokenizer.to_str()), _numbers(kept)
    model = content["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [piece for number, piece in enumerate(model["vocab"]) if number in numbers]
        model["unk_id"] = numbers.get(model["unk_id"])
    else:
        model["vocab"] = {token: numbers[number] for token, number in model["vocab"].items() if number in numbers}
    if model["type"] == "BPE":
        prefix = model["continuing_subword_prefix"] or ""
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if {left, right, left + right.removeprefix(prefix)} <= model["vocab"].keys()
        ]
    for token in content["added_tokens"]:
        token["id"] = numbers[token["id"]]
    if content["padding"]:
        content["padding"]["pad_id"] = numbers.get(content["padding"]["pad_id"], 0)
    _renumber(content["post_processor"] or {}, numbers)
    trimmed = copy.deepcopy(processor)
    trimmed._tokenizer = Tokenizer.from_str(json.dumps(content))
    return trimmed


def _renumber(post_processor: dict[str, Any], numbers: dict[int, int]) -> None:
    """The tokens that a post-processor adds, or one of several in a row, under their new ids."""
    for part in post_processor.get("processors", []):
        _renumber(part, numbers)
    for token in (post_processor.get("special_tokens") or {}).values():
        token["ids"] = [numbers[number] for number in token["ids"]]
    for name in {"cls", "sep"} & post_processor.keys():
        token, number = post_processor[name]
        post_processor[name] = (token, numbers[number])


def trim_model(model: Any, kept: Sequence[int]) -> None:
    """Leave the vectors of the tokens `kept` alone in a model without an output for each token."""
    table, numbers = model.get_input_embeddings(), _numbers(kept)
    last = len(table.weight) - 1  # a tokenizer may have tokens that the model was not given, which no text of ours has
    table.weight = nn.Parameter(table.weight.detach()[[min(number, last) for number in kept]])
    padding = table.padding_idx
    table.num_embeddings, table.padding_idx = len(kept), numbers.get(padding)
    trim_config(model.config, kept)
    # RoBERTa and its like count positions from the id of padding on, so that their rows move as far as that does.
    for name, positions in list(model.named_modules()):
        if padding in numbers and POSITIONS.search(name) and getattr(positions, "padding_idx", None) == padding:
            positions.weight = nn.Parameter(positions.weight.detach()[padding - numbers[padding] :])
            positions.num_embeddings, positions.padding_idx = len(positions.weight), numbers[padding]
            model.get_submodule(name.rpartition(".")[0]).padding_idx = numbers[padding]
            model.config.max_position_embeddings = len(positions.weight)


def trim_config(config: Any, kept: Sequence[int]) -> None:
    """Let `config` name the tokens `kept` by their new ids; None where one that it names is gone."""
    text_config, numbers = config.get_text_config(), _numbers(kept)
    text_config.vocab_size = len(kept)
    for name, value in text_config.to_dict().items():
        if name.endswith("_token_id"):
            several = isinstance(value, list)
            new = [numbers[one] for one in value if one in numbers] if several else numbers.get(value)
            setattr(text_config, name, new)


def _numbers(kept: Sequence[int]) -> dict[int, int]:
    return {old: new for new, old in enumerate(kept)}


def teacher_ids(processor: Any, teacher_processor: Any) -> list[int]:
    """For each of a student's tokens the id of the same token of its teacher; its own where the teacher has none."""
    teachers, own = teacher_processor.get_vocab(), range(len(processor))
    return [
        teachers.get(token, number) for number, token in zip(own, processor.convert_ids_to_tokens(own), strict=True)
    ]
