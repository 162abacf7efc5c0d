"""Which split plays which role, no example in two of them, and what is missing cut from the training split."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
from sklearn.model_selection import train_test_split

from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError
from pipelines.data.folders import SPLIT_NAMES, split_named_by
from pipelines.data.kinds import SPLITS

logger = logging.getLogger(__name__)


def choose_splits(
    splits: dict[str, datasets.Dataset], config: DataConfig, has_references: Callable[[datasets.Dataset], bool]
) -> dict[str, str | None]:
    """Which of the data set's splits plays which role; None where one must be cut (see load_examples). A line names those that play none.

    `has_references` tells whether a split that no flag names can be scored: hidden test labels cannot.
    Raises InputError for several of a role that have longer names, such as validation_matched and validation_mismatched.
    """
    # By the role itself first: a data set may have both "validation" and "dev".
    called = {
        role: sorted((name for name in splits if SPLIT_NAMES.get(name.lower()) == role), key=lambda name: name != role)
        for role in SPLITS
    }

    def usable(role: str, taken: set[str | None]) -> str | None:
        for name in called[role]:
            if name not in taken and has_references(splits[name]):
                return name
        several = [name for name in splits if split_named_by(Path(name)) == role and has_references(splits[name])]
        if len(several) > 1 and taken.isdisjoint(several):
            raise InputError(
                f"expected one {role} split, found {' and '.join(several)}; choose one with --{role}_split (files that are parts of one split are "
                f"called {role}-0, {role}-1, …)"
            )
        return None

    choices = [config.train_split, *called.get(config.train_split, []), *(splits if len(splits) == 1 else [])]
    train = next((name for name in choices if name in splits), config.train_split)
    if train not in splits:
        usable("train", set())  # raises where there are several
    named = {"train_split": train, "validation_split": config.validation_split, "test_split": config.test_split}
    for flag, name in named.items():
        if name is not None and name not in splits:
            raise InputError(
                f"expected the split {name!r} that --{flag} names, found the splits {', '.join(splits)}; pass one of them with --{flag}"
            )

    test = config.test_split or usable("test", {train, config.validation_split})
    validation = config.validation_split or usable("validation", {train, test})
    if test is None and config.validation_split is None:
        test, validation = validation, None
    if len({train, validation, test} - {None}) < 3 - (validation is None) - (test is None):
        raise InputError(
            f"expected three different splits, found train {train!r}, validation {validation!r} and test {test!r}; "
            "leave --validation_split or --test_split out to have it cut from the training split"
        )
    if unused := [name for name in splits if name not in (train, validation, test)]:
        logger.warning(
            "not used are the splits %s; --train_split, --validation_split and --test_split name others",
            ", ".join(map(repr, unused)),
        )
    return {"train": train, "validation": validation, "test": test}


def drop_duplicates(
    rows: dict[str, tuple[np.ndarray, np.ndarray]], noun: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The row numbers that stay in each given split, and how many went.

    `rows` are hashes, equal where two examples are, and labels, one or several of each.
    """
    # Test goes first, so it stays whole.
    tables = {
        role: pandas.DataFrame(
            {
                "hash": rows[role][0],
                "label": rows[role][1] if rows[role][1].ndim == 1 else list(map(bytes, rows[role][1])),
            }
        )
        for role in SPLITS[::-1]
        if role in rows
    }
    table = pandas.concat(tables, names=["role", "row"]).reset_index()
    stays = ~table.duplicated("hash") | (table["role"] == "test")
    conflicts = ~stays & (table["label"] != table.groupby("hash")["label"].transform("first"))
    kept = {role: table["row"][stays & (table["role"] == role)].to_numpy() for role in tables}
    removed = {role: len(rows[role][0]) - len(kept[role]) for role in SPLITS if role in rows}
    for role, numbers in kept.items():
        if len(numbers) == 0:
            raise InputError(
                f"expected {noun} in the {role} split that no other split holds, found that all {removed[role]} are "
                "also in the validation or test split; give splits that differ, or let them be cut (leave the flags "
                "out)"
            )
    tell_of_equal(sum(removed.values()), len(table), int(conflicts.sum()), noun)
    return kept, {"duplicates_removed": removed, "conflicting_labels": int(conflicts.sum())}


def tell_of_equal(again: int, total: int, conflicts: int, noun: str) -> None:
    """Say how many of all examples are left out since an equal one is there, and how many of these had another label."""
    if again:
        logger.warning("%d of %d %s are there more than once, and stay once", again, total, noun)
    if conflicts:
        logger.warning(
            "%d of these %s have another label than the first of their kind, whose label counts; correct the labels, or a model learns what is "
            "not so",
            conflicts,
            noun,
        )


def strata_of(labels: np.ndarray) -> np.ndarray:
    """What rows are spread evenly by: their class; of several labels (rows, labels) the rarest that fits, or that none does.

    The rarest ones are those that chance would spread worst (Sechidis et al., 2011).
    """
    if labels.ndim == 1:
        return labels
    rarity = np.where(labels > 0, labels.sum(axis=0, dtype=np.int64), len(labels) + 1)
    return np.where(labels.any(axis=1), rarity.argmin(axis=1), labels.shape[1])


def cut_missing_splits(
    kept: dict[str, np.ndarray], strata: np.ndarray, train: str, config: DataConfig, noun: str
) -> None:
    """Cut the test and validation split that the data set does not have from the training rows, in place."""
    total = len(kept["train"])
    if np.bincount(strata[kept["train"]]).max() < 2 < total:
        raise InputError(
            f"expected classes that several examples share in the column {config.label_column!r}, found {total} "
            f"different values in {total} examples; name the column of classes with --label_column"
        )
    shares = {"test": config.test_size, "validation": config.validation_size}
    sizes = {role: max(1, round(share * total)) for role, share in shares.items() if role not in kept}
    if sizes and total - sum(sizes.values()) < 2:
        raise InputError(
            f"expected enough different {noun} in the split {train!r} to cut {' and '.join(sizes)} from it, "
            f"found {total}; add examples, or lower --test_size and --validation_size"
        )
    for role, size in sizes.items():
        rest, cut = cut_stratified(strata[kept["train"]], size, config.split_seed)
        kept["train"], kept[role] = kept["train"][rest], kept["train"][cut]


def cut_stratified(labels: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rest and of a seeded, stratified cut of `size` rows, both in ascending order.

    The rest keeps a row of every class where it has room for that; `size` is less than the number of rows.
    """
    # Not the split of `datasets`, which reads the strata one row at a time: two minutes for 400,000.
    order = np.random.default_rng(seed).permutation(len(labels))
    reserved = order[np.unique(labels[order], return_index=True)[1]]
    if len(reserved) > len(labels) - size:
        reserved = reserved[:0]
    pool = np.setdiff1d(np.arange(len(labels)), reserved)
    if len(pool) == size:
        return np.sort(reserved), pool
    # A stratum needs two rows, so a class with a single one left joins the largest class.
    strata = labels[pool].copy()
    counts = np.bincount(strata)
    strata[counts[strata] < 2] = counts.argmax()
    enough = min(size, len(pool) - size) >= len(np.unique(strata)) and counts.max() > 1
    rest, cut = train_test_split(pool, test_size=size, random_state=seed, stratify=strata if enough else None)
    return np.sort(np.concatenate([reserved, rest])), np.sort(cut)
