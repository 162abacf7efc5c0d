"""A transfer set: unlabelled examples for the teacher to label, none of which stands in the validation or test split."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import datasets
import numpy as np

from pipelines.core.config import DataConfig, TransferConfig
from pipelines.core.errors import InputError
from pipelines.core.task import TRANSFER, UNLABELLED
from pipelines.data.documents import documents_of, load_texts, rows_of
from pipelines.data.examples import Examples, hash_of, hash_rows, inputs_of, prepared
from pipelines.data.folders import load_source
from pipelines.data.kinds import Kind
from pipelines.data.text import TEXTS, content, first_lines, first_sentences, lines_of, sentences_of


def load_transfer(
    transfer: TransferConfig, config: DataConfig, kind: Kind, labelled: Examples, document_start: str | None = None
) -> Examples:
    """The transfer set of a task whose labelled examples were read by `config`: all splits of the source as one, called TRANSFER.

    What stands in the validation or test split of `labelled` is left out; of single texts also a document of which a line or a sentence
    stands there, and every part of such a document wherever it comes from. What stands in the training split stays only there, and of equal examples the
    first stays. Empty and unreadable ones are left out, too. `details` count them all.

    Only hashes and row numbers take memory where the source is a table or a data set of the Hub.

    Raises InputError where the source cannot be read, or nothing is left of it.
    """
    sentences, one_text = transfer.transfer_sentences, kind is TEXTS and config.text_pair_column is None
    if sentences is not None and not one_text:
        raise InputError("expected single texts for --transfer_sentences, found pairs or images. Leave it out.")
    is_cut = kind is TEXTS and config.text_part != "whole"
    config = _config_of(transfer, config, kind)
    source = load_texts(config, document_start) if kind is TEXTS else load_source(config, kind, in_split=True)
    rows = datasets.concatenate_datasets(
        [_inputs(split, name, config, kind, document_start) for name, split in source.splits.items()]
    )
    held_out = np.concatenate([labelled.hashes["validation"], labelled.hashes["test"]])
    read, documents = len(rows), np.zeros(len(rows), bool)
    if one_text:
        documents, parts = _held_out_documents(rows, held_out)
        held_out = np.concatenate([held_out, parts])
        rows = rows.select(np.flatnonzero(~documents))
    if sentences is not None:
        rows = first_sentences(rows, sentences)
    elif is_cut:
        for column in rows.column_names:
            rows = first_lines(rows, column)
    hashes = hash_rows(rows, "the transfer set", kind)
    usable, shared = hashes[:, 0] > 0, hashes[:, 1]
    stand = usable & np.isin(shared, held_out)
    in_training = usable & np.isin(shared, labelled.hashes["train"])
    others = np.flatnonzero(usable & ~stand & ~in_training)
    kept = others[np.sort(np.unique(shared[others], return_index=True)[1])]
    counts = {
        "rows_read": read,
        "in_validation_or_test": int(documents.sum() + stand.sum()),
        "in_training": int(in_training.sum()),
        "duplicates_removed": len(others) - len(kept),
        "unusable": int((~usable).sum()),
        "examples": len(kept),
    }
    if len(kept) == 0:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(
            f"expected {kind.noun} in --transfer_dataset that no split holds already, found none ({found}). Give other {kind.noun}."
        )
    train = labelled.splits["train"]
    if "label" in train.column_names:
        label = np.full_like(np.asarray(train[0]["label"]), UNLABELLED).tolist()  # one number, or one for each label
        rows = rows.add_column("label", [label] * len(rows), feature=train.features["label"])
    details = {"dataset": config.dataset, "dataset_config": config.dataset_config, **counts}
    splits = datasets.DatasetDict({TRANSFER: rows.select(kept, keep_in_memory=True)})
    return Examples(splits, details | source.details, hashlib.sha256(hashes[kept, 0].tobytes()).hexdigest())


def _config_of(transfer: TransferConfig, config: DataConfig, kind: Kind) -> DataConfig:
    """How the transfer set is read: as the labelled examples are, and its texts whole."""
    column: dict[str, Any] = (
        {next(iter(kind.columns)): transfer.transfer_column} if transfer.transfer_column is not None else {}
    )
    named: dict[str, Any] = {"dataset": transfer.transfer_dataset, "dataset_config": transfer.transfer_dataset_config}
    return replace(config, **named, **column, text_part="whole")


def _inputs(
    split: datasets.Dataset, name: str, config: DataConfig, kind: Kind, document_start: str | None
) -> datasets.Dataset:
    """The input columns of a split under our names; messages are about the flags of the transfer set."""
    try:
        if document_start is not None:
            return rows_of("text", documents_of(split, name, config, document_start))
        return inputs_of(prepared(split, name, config, kind, labelled=False), config, kind)
    except InputError as error:
        first = next(iter(kind.columns))
        raise InputError(f"--transfer_dataset: {str(error).replace(f'--{first}', '--transfer_column')}") from error


def _held_out_documents(rows: datasets.Dataset, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which documents are, or have a line or a sentence that is, one of the `held_out` hashes; and the hashes of all their parts, since
    another document may have them, too."""
    known = {*held_out.tolist()}
    found, parts = [], set()
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for text in batch["text"].to_pylist():
            pieces = {text or "", *lines_of(text or ""), *sentences_of(text or "")}
            hashes = {hash_of(piece[1]) for piece in content([(piece,) for piece in pieces]) if piece is not None}
            found.append(not known.isdisjoint(hashes))
            parts |= hashes if found[-1] else set()
    return np.array(found), np.array([*parts], np.uint64)
