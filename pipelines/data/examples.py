"""From the flags to examples ready for training: read, checked, no example twice, in three splits."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import datasets
import numpy as np
import pandas

from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError
from pipelines.data.folders import load_source
from pipelines.data.kinds import SPLITS, Kind
from pipelines.data.references import ReadReferences, dtype, has_references, missing
from pipelines.data.remembered import remembered, state_of
from pipelines.data.splits import choose_splits, cut_missing_splits, cut_stratified, drop_duplicates, strata_of

logger = logging.getLogger(__name__)


# From a split of the source and its name to the rows of its examples.
Unpack = Callable[[datasets.Dataset, str], datasets.Dataset]


@dataclass
class Examples:
    """A data set ready for training: its three splits, how it came about, and the names of its classes, if it has any.

    The splits have the columns that the kind names (`text` and perhaps `text_pair`, or `image`) and `label` (a class id, a score, or a list
    with 1 or 0 for each label).
    `details` is ready for JSON; `fingerprint` is a sha256 of the splits' content and the label names.
    """

    splits: datasets.DatasetDict
    details: dict[str, Any]
    fingerprint: str
    label_names: list[str] = field(default_factory=list)
    hashes: dict[str, np.ndarray] = field(default_factory=dict)  # by split (rows,) uint64, equal where two examples are


@dataclass
class Given:
    """A split that the data set has: its inputs, under our names, and what the checks need to know of each row."""

    name: str
    inputs: datasets.Dataset
    hashes: np.ndarray  # (rows, 2) uint64 of the content, and of what a row shares with its duplicates
    # (rows,) class ids, scores, or zeros where the task has no references; (rows, labels) where a row has several
    labels: np.ndarray


def load_examples(config: DataConfig, kind: Kind, read_references: ReadReferences) -> Examples:
    """Load, check and de-duplicate a data set and give it a train, validation and test split.

    The task says what the reference column becomes: read_classes, read_label_sets or read_scores.

    Splits. Those the flags name are used as they are, and must have references. Unnamed, 'test' and 'validation' are used
    where they exist and have references. A data set that then has a validation but no test split (GLUE, whose test labels
    are hidden) gives its 'validation' as the test split, unless --validation_split claimed it for validation. What is
    missing is cut from the training split: seeded, stratified where there are classes, every class staying represented in
    training. Only a given test split keeps its order; the others are shuffled, so that their first examples are of all classes.

    Duplicates. An example is in one split only: a split that is given as test stays untouched, validation loses what is
    in test, training what is in either. Within training and validation, the first of equal texts (or images) stays.

    Raises InputError where the data cannot be read, or cannot be used as it is.
    """
    given, details, feature, names = read_given(config, kind, read_references)
    return split_examples(given, config, kind.noun, details, feature, names)


def read_given(
    config: DataConfig, kind: Kind, read_references: ReadReferences, unpack: Unpack | None = None, read_as: str = ""
) -> tuple[dict[str, Given], dict[str, Any], Any, Sequence[str]]:
    """The splits that a data set has, by their roles, read and checked; how they were read; the type of their labels and the classes' names.

    `unpack` makes the rows of the examples out of those of the source; `read_as` says how.
    """
    state = state_of(config.dataset)
    source = load_source(config, kind)
    if unpack is not None:
        source.splits = {name: unpack(split, name) for name, split in source.splits.items()}
    roles = choose_splits(source.splits, config, partial(has_references, config=config))
    named = {role: name for role, name in roles.items() if name is not None}
    used = {name: prepared(source.splits[name], name, config, kind) for name in named.values()}
    hashes, dropped = {}, {}
    for name, split in used.items():
        columns = list(kind.columns_of(config).values())
        key = [config.dataset_config, config.label_column, name, columns, config.separator, config.encoding]
        key += [config.text_part, *filter(None, [read_as])]
        hashes[name] = remembered(state, key, partial(hash_rows, inputs_of(split, config, kind), name, kind))
        usable = hashes[name][:, 0] > 0
        first = [inputs_of(split, config, kind)[int(row)] for row in np.flatnonzero(~usable)[:1]]
        why = kind.why_unusable(tuple(first[0].values())) if first else ""
        used[name] = _kept(split, usable, kind.usable, name, config, why)
        hashes[name] = hashes[name][usable]
        dropped[name] = len(usable) - len(hashes[name])
    labels, feature, names = read_references(used, config)
    given = {}
    for role, name in named.items():
        has_label = ~missing(labels[name])
        inputs = inputs_of(_kept(used[name], has_label, "a label", name, config), config, kind)
        given[role] = Given(name, inputs, hashes[name][has_label], labels[name][has_label])
        dropped[name] += len(has_label) - len(inputs)
    counted = {"rows_dropped": dropped} if any(dropped.values()) else {}
    return given, source.details | counted, feature, names


def split_examples(
    given: dict[str, Given],
    config: DataConfig,
    noun: str,
    details: dict[str, Any],
    feature: Any = None,
    names: Sequence[str] = (),
) -> Examples:
    """The three splits of what a data set has by their roles; `feature` is the type of their column `label`, None for none, and `names`
    are those of its classes."""
    train, names = given["train"], list(names)
    if not names:
        check_no_classes(config, noun)
    origins = {role: given.get(role, train) for role in SPLITS}
    # Only classes can be spread evenly.
    strata = {
        role: strata_of(split.labels) if names else np.zeros(len(split.labels), np.int64)
        for role, split in origins.items()
    }
    kept, found = drop_duplicates({role: (split.hashes[:, 1], split.labels) for role, split in given.items()}, noun)
    cut_missing_splits(kept, strata["train"], train.name, config, noun)
    for role in SPLITS:
        # Only a given test split keeps its order.
        shuffled = role != "test" or role not in given
        kept[role] = _limited(kept[role], strata[role], role, shuffled, bool(names), config)
    classes = {}
    if names:
        counts = {role: count_labels(origin.labels[kept[role]], len(names)) for role, origin in origins.items()}
        _check_classes(counts, names, config)
        by_name = {role: dict(zip(names, column.tolist(), strict=True)) for role, column in counts.items()}
        classes = {"classes": by_name}
    content = hashlib.sha256(json.dumps(names).encode())
    for role, origin in origins.items():
        content.update(f"\n{role} {len(kept[role])}\n".encode())
        content.update(origin.hashes[kept[role], 0].tobytes() + origin.labels[kept[role]].tobytes())
    details = {
        "dataset": config.dataset,
        "dataset_config": config.dataset_config,
        **details,
        "examples": {role: len(kept[role]) for role in SPLITS},
        **classes,
        "came_from": {
            role: f"split {origin.name!r}" if role in given else f"cut from split {origin.name!r}"
            for role, origin in origins.items()
        },
        **found,
        **({} if config.text_part == "whole" else {"text_part": config.text_part}),
        "split_seed": config.split_seed,
    }
    splits = {role: _rows_of(origin, kept[role], feature) for role, origin in origins.items()}
    hashes = {role: origin.hashes[kept[role], 1] for role, origin in origins.items()}
    return Examples(datasets.DatasetDict(splits), details, content.hexdigest(), names, hashes)


def _limited(
    rows: np.ndarray, strata: np.ndarray, role: str, shuffled: bool, has_classes: bool, config: DataConfig
) -> np.ndarray:
    """As many rows of a split as the flags allow, a row of every class among them where there is room."""
    limit = config.max_train_samples if role == "train" else config.max_eval_samples
    if has_classes and limit is not None and limit < len(rows):
        rest, _ = cut_stratified(strata[rows], len(rows) - limit, config.split_seed)
        rows = rows[rest]
    if shuffled:
        rows = np.random.default_rng(config.split_seed).permutation(rows)
    rows = rows[:limit]
    if config.max_samples_per_class is not None and role != "test":
        classes = pandas.Series(strata[rows])
        rows = rows[classes.groupby(classes).cumcount().to_numpy() < config.max_samples_per_class]
    return rows


def _rows_of(origin: Given, rows: np.ndarray, feature: Any) -> datasets.Dataset:
    """These rows of a split with their labels, if the data set has some; only row numbers and labels take memory."""
    table = origin.inputs
    if feature is not None:
        labels = origin.labels if origin.labels.ndim == 1 else list(origin.labels)
        table = table.add_column("label", labels, feature=feature)
    return table.select(rows, keep_in_memory=True)


def check_no_classes(config: DataConfig, noun: str) -> None:
    """Raise InputError for a limit of each class where there are none."""
    if config.max_samples_per_class is not None:
        raise InputError(
            f"expected classes with --max_samples_per_class, found a task without. Limit its {noun} by --max_train_samples."
        )


def count_labels(labels: np.ndarray, names: int) -> np.ndarray:
    """How many examples (names,) have each class, or each of several labels."""
    return np.bincount(labels, minlength=names) if labels.ndim == 1 else labels.sum(axis=0, dtype=np.int64)


def prepared(
    split: datasets.Dataset, name: str, config: DataConfig, kind: Kind, labelled: bool = True
) -> datasets.Dataset:
    """The split, ready to read; raises InputError unless the columns are there and the inputs hold what the kind reads."""
    if len(split) == 0:
        raise InputError(
            f"expected examples in the split {name!r}, found none; give a data set with rows in every split"
        )
    columns = kind.columns_of(config) | ({"label_column": config.label_column} if labelled else {})
    more = [("label_column", column) for column in config.more_label_columns if labelled]
    for flag, column in [*columns.items(), *more]:
        if column not in split.column_names:
            raise InputError(
                f"expected a column {column!r} in the split {name!r}, found the columns "
                f"{', '.join(map(repr, split.column_names[:20]))}{' …' if len(split.column_names) > 20 else ''}; name the right one with --{flag} (the first line of a table has the names of its columns"
                f"{'; if these are several columns, say what parts them with --separator' * (len(split.column_names) == 1)})"
            )
    for flag, column in kind.columns_of(config).items():
        ready = kind.prepare(split, column, config)
        if ready is None:
            raise InputError(
                f"expected {kind.noun} in the column {column!r} of the split {name!r}, found values of type "
                f"{dtype(split, column)}; name a column of {kind.noun} with --{flag} (columns: "
                f"{', '.join(split.column_names)})"
            )
        split = ready
    named = [*columns.values(), *(column for _, column in more)]
    if len(set(named)) < len(named):
        raise InputError(
            f"expected different columns for {', '.join(columns)}, found {', '.join(named)}; the split "
            f"{name!r} has the columns {', '.join(split.column_names)}"
        )
    return split


def inputs_of(split: datasets.Dataset, config: DataConfig, kind: Kind) -> datasets.Dataset:
    """The input columns under our own names."""
    columns = {column: kind.columns[flag] for flag, column in kind.columns_of(config).items()}
    return split.select_columns(list(columns)).rename_columns(columns)


def hash_rows(inputs: datasets.Dataset, name: str, kind: Kind) -> np.ndarray:
    """Read a split once and hash every row; zeros for those that cannot be used."""
    hashes = np.zeros((len(inputs), 2), np.uint64)
    start = 0
    batches = inputs.with_format("arrow").iter(batch_size=1000)
    for batch in datasets.utils.tqdm(
        batches, total=math.ceil(len(inputs) / 1000), desc=f"Checking {name}", unit="batch"
    ):
        rows = list(zip(*(column.to_pylist() for column in batch.columns), strict=True))
        for row, content in enumerate(kind.content(rows), start):
            if content is not None:
                hashes[row] = [hash_of(part) for part in content]
        start += len(rows)
    return hashes


def hash_of(content: bytes) -> int:
    """A hash to find equal examples by."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _kept(
    split: datasets.Dataset, good: np.ndarray, what: str, name: str, config: DataConfig, why: str = ""
) -> datasets.Dataset:
    if good.all():
        return split
    # A file is a better name than a number.
    files = split["file"] if "file" in split.column_names and dtype(split, "file") == "string" else None
    return split.select(usable_rows(good, what, name, config, why, files))


def usable_rows(
    good: np.ndarray, what: str, name: str, config: DataConfig, why: str = "", files: Any = None
) -> np.ndarray:
    """The numbers of the rows that have `what` every row must have. Raises InputError where some do not, unless --missing drop leaves them
    out; it names them by their `files`, if they have some."""
    unusable = np.flatnonzero(~good)
    if len(unusable) and (config.missing == "error" or not good.any()):
        names = [str(row if files is None else files[int(row)]) for row in unusable[:10]]
        raise InputError(
            f"expected {what} in every row of the split {name!r}, found {len(unusable)} of {len(good)} rows without one "
            f"({'rows, counted from 0:' if files is None else 'files'} {', '.join(names)}{' …' if len(unusable) > len(names) else ''}{why}); "
            "remove these rows, or leave them out with --missing drop"
        )
    return np.flatnonzero(good)


def _check_classes(counts: dict[str, np.ndarray], label_names: list[str], config: DataConfig) -> None:
    present = np.flatnonzero(sum(counts.values()))
    if len(present) < 2:
        raise InputError(
            f"expected at least two classes in the column {config.label_column!r}, found examples of {len(present)} "
            f"({label_names[present[0]] if len(present) else 'no label fits any text'}); add examples of another class, or name another "
            "column with --label_column"
        )
    for role in SPLITS[1:]:
        if none := [name for name, count in zip(label_names, counts[role], strict=True) if count == 0]:
            logger.warning("no example in the %s split of %s", role, ", ".join(none[:10]))
    absent = [name for name, count in zip(label_names, counts["train"], strict=True) if count == 0]
    if absent:
        where = "it from --label_column" if config.more_label_columns else "the class from the data set"
        raise InputError(
            f"expected training examples of all {len(label_names)} classes, found none of "
            f"{', '.join(absent[:5])}{' …' if len(absent) > 5 else ''} among {counts['train'].sum()}; add examples, "
            f"remove {where}, or raise --max_train_samples"
        )
