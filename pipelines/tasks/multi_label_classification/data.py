"""Texts with any number of labels: how a data set has them, and how they are made of texts with one class each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import datasets
import numpy as np

from pipelines.core.config import Checked, flag
from pipelines.core.disk import digest
from pipelines.core.errors import InputError
from pipelines.data.examples import Examples


@dataclass
class LabelSetConfig(Checked):
    label_separator: str | None = flag(
        None,
        "What parts the labels in a cell of the label column, such as ';'; an empty cell then is a text that no label fits. Left out: the "
        "column holds lists, or there is a column for each label.",
    )
    joined_texts: Annotated[int, "at least 1"] = flag(
        1,
        "Make examples of several labels from texts that have one class each: up to this many random texts of a split are joined, with the "
        "labels of all. Of no use but to try things out, as the demo does.",
    )

    OF_DATA: ClassVar = ("label_separator", "joined_texts")  # for parse_config()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.label_separator = "\t" if self.label_separator in ("\\t", "tab") else self.label_separator
        if self.label_separator == "":
            raise InputError(
                "expected a text that parts labels as --label_separator, found an empty one. Leave it out, or name it."
            )


def join_texts(data: Examples, most: int, seed: int) -> Examples:
    """Examples of several labels out of such of one class: each text, and with it up to `most` - 1 others of its split, in any order.

    No text is in two splits, since the splits were there before. The hashes stay those of the texts.
    """
    if "text_pair" in data.splits["train"].column_names:
        raise InputError(
            "expected single texts for --joined_texts, found pairs. Leave --text_pair_column or --joined_texts out."
        )
    splits = {}
    for number_of_split, (name, split) in enumerate(data.splits.items()):
        random = np.random.default_rng([seed, number_of_split])
        texts, classes = split["text"][:], np.asarray(split["label"][:])
        rows: dict[str, list[Any]] = {"text": [], "label": []}
        for index, others in enumerate(random.integers(0, most, len(split))):
            parts = random.permutation([index, *random.integers(0, len(split), others)])
            rows["text"].append(" / ".join(texts[part].strip() for part in parts))
            rows["label"].append(np.isin(np.arange(len(data.label_names)), classes[parts]).astype(int).tolist())
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.List(datasets.Value("int8"))})
        splits[name] = datasets.Dataset.from_dict(rows, features)
    counts = {
        name: dict(zip(data.label_names, np.sum(split["label"][:], axis=0).tolist(), strict=True))
        for name, split in splits.items()
    }
    details = data.details | {"classes": counts, "joined_texts": most}
    fingerprint = digest([data.fingerprint, "joined", most, seed])
    return replace(data, splits=datasets.DatasetDict(splits), details=details, fingerprint=fingerprint)
