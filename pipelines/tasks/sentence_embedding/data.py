"""Texts, pairs and scored pairs in three splits, and the rows of single texts that an embedder reads of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any, ClassVar

import datasets
import numpy as np

from pipelines.core.config import Checked, DataConfig, Positive, flag
from pipelines.core.disk import digest
from pipelines.core.errors import InputError
from pipelines.core.task import TRANSFER, UNLABELLED
from pipelines.data.documents import load_texts
from pipelines.data.examples import (
    Examples,
    Given,
    hash_of,
    hash_rows,
    inputs_of,
    load_examples,
    prepared,
    split_examples,
    usable_rows,
)
from pipelines.data.references import read_scores
from pipelines.data.splits import choose_splits
from pipelines.data.text import TEXTS, title_and_passages
from pipelines.models.embedder import POOLINGS

logger = logging.getLogger(__name__)

PASSAGES = "passages"  # the column of a document's, the last one first
CORPUS = -1  # the label of a row that is searched; a query's is the row of its positive


@dataclass
class EmbeddingConfig(Checked):
    pooling: str | None = flag(
        None,
        "How the vectors of the tokens become one, of a model that is an encoder alone; a directory of sentence-transformers says it itself.",
        choices=list(POOLINGS),
    )
    score_column: str | None = flag(
        None,
        "The column with how alike the two texts of a pair are: the models are scored by their correlation with it.",
    )
    title_pairs: Annotated[int | None, "at least 1"] = flag(
        None,
        "Make pairs of each single text: its first line is the query, the other lines are positives of so many characters each. The models are "
        "scored by the last of them. A text whose first line another one has is left out.",
    )
    reference_model: str | None = flag(
        None,
        "For texts without pairs: the embedder, as a rule the teacher, whose nearest neighbours the models are scored by.",
    )
    corpus_size: Annotated[int, "at least 1"] = flag(
        10_000,
        "Texts that the queries of the test split are searched in: their positives, and those of the other splits up to this many. Those of the "
        "validation split are searched in their own positives.",
    )
    learn_from: str = flag(
        "texts",
        "What a training example is: one of all 'texts', of which the teacher's vector is learnt; or a 'pair' as a row, of which queries "
        "learn to find their positives among those of the batch (multiple negatives), or cosines to be the scores.",
        choices=["texts", "pairs"],
    )
    vector_loss: str = flag(
        "cosine",
        "The distance from the teacher's vector: 1 minus the 'cosine', or the 'squared_error'. Vectors of another size learn the teacher's "
        "cosines with the other texts of the batch instead.",
        choices=["cosine", "squared_error"],
    )
    similarity_weight: float = flag(
        0.0, "Weight of the divergence of the distributions of likeness over the other texts of the batch."
    )
    similarity_temperature: Positive = flag(0.05, "Temperature of these distributions.")
    margin_weight: float = flag(0.0, "Weight of MarginMSE, with --learn_from pairs.")
    matryoshka_sizes: str | None = flag(
        None,
        "Sizes to which the student's vectors may be cut, such as 64,128: their first numbers learn the teacher's cosines, too.",
        metavar="64,128",
    )
    vector_size: Annotated[int | None, "at least 1"] = flag(
        None,
        "Size of the student's vectors: a Dense module that starts as the principal components of the teacher's. Left out: the teacher's.",
    )

    OF_DATA: ClassVar = ("score_column", "title_pairs")  # for parse_config()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin_weight > 0 and self.learn_from != "pairs":
            raise InputError(
                "expected --learn_from pairs with --margin_weight, found texts. Pass it, or leave the weight out."
            )
        try:
            self.sizes = [int(size) for size in self.matryoshka_sizes.split(",")] if self.matryoshka_sizes else []
            if min(self.sizes, default=1) < 1:
                raise ValueError("a vector has at least one number")
        except ValueError as error:
            raise InputError(f"expected --matryoshka_sizes such as 64,128, found {self.matryoshka_sizes!r}.") from error


def load_pairs(config: DataConfig, embedding: EmbeddingConfig) -> Examples:
    """The texts (column `text`), or pairs (`text_pair`, too), in three splits; `label` is the score of a pair, else 0."""
    if embedding.score_column is not None:
        if config.text_pair_column is None:
            raise InputError(
                "expected --text_pair_column with --score_column, found single texts. Pass the column of the second text."
            )
        scored = load_examples(replace(config, label_column=embedding.score_column), TEXTS, read_scores)
        if np.ptp(scored.splits["validation"]["label"][:]) == 0:  # with which nothing has a correlation
            raise InputError(
                f"expected scores that differ in the column {embedding.score_column!r}, found one value in the whole validation split, by which "
                "models are chosen. Add pairs with other scores, or raise --validation_size."
            )
        return scored
    source = load_texts(config)
    roles = choose_splits(source.splits, config, lambda split: config.text_column in split.column_names)
    given = {
        role: _given(source.splits[name], name, config, embedding) for role, name in roles.items() if name is not None
    }
    examples = split_examples(given, config, "texts", source.details, datasets.Value("int64"))
    del examples.details["conflicting_labels"]
    return examples if config.text_pair_column is None else _asked_once(examples)


def _asked_once(examples: Examples) -> Examples:
    """A query of validation or test has its first positive there, and no other pair in any split.

    Another positive would count as a wrong answer, and one to train on would give the query away.
    """
    asked: set[str] = set()
    kept: dict[str, list[int]] = {}
    for role in ("test", "validation", "train"):
        rows: dict[str, list[int]] = {}
        for row, text in enumerate(examples.splits[role]["text"]):
            rows.setdefault(" ".join(text.split()), []).append(row)
        new = [own if role == "train" else own[:1] for query, own in rows.items() if query not in asked]
        kept[role] = sorted(chain.from_iterable(new))
        asked |= {*rows}
        if not kept[role]:
            raise InputError(
                f"expected queries in the {role} split that no other split asks, found none. Give splits that differ, or let them be cut."
            )
    left_out = sum(map(len, examples.splits.values())) - sum(map(len, kept.values()))
    if left_out == 0:
        return examples
    logger.warning(
        "%d pairs are left out: validation or test asks their query already, with one positive, and a second one would count as wrong",
        left_out,
    )
    splits = {role: split.select(kept[role], keep_in_memory=True) for role, split in examples.splits.items()}
    counts = {role: len(split) for role, split in splits.items()}
    return replace(
        examples,
        splits=datasets.DatasetDict(splits),
        details=examples.details | {"examples": counts, "second_positives_removed": left_out},
        fingerprint=digest(["asked once", examples.fingerprint]),
        hashes={role: hashes[kept[role]] for role, hashes in examples.hashes.items()},
    )


def _given(split: datasets.Dataset, name: str, config: DataConfig, embedding: EmbeddingConfig) -> Given:
    inputs = inputs_of(prepared(split, name, config, TEXTS, labelled=False), config, TEXTS)
    if config.text_pair_column is None and embedding.title_pairs is not None:
        inputs, hashes = _documents(inputs["text"], name, embedding.title_pairs)
        config = replace(config, missing="drop")  # a text may be nothing but its title
    else:
        hashes = hash_rows(inputs, name, TEXTS)
    kept = usable_rows(hashes[:, 0] > 0, "text", name, config)
    return Given(name, inputs.select(kept), hashes[kept], np.zeros(len(kept), np.int64))


def _documents(texts: Sequence[str | None], name: str, characters: int) -> tuple[datasets.Dataset, np.ndarray]:
    """The titles, the last passages (`text_pair`) and all PASSAGES of documents, and their hashes: of the whole, and of the title, so that no
    query has two documents."""
    found = [title_and_passages(text or "", characters) for text in texts]
    pairs = {"text": [title for title, _ in found], "text_pair": [own[0] if own else "" for _, own in found]}
    hashes = hash_rows(datasets.Dataset.from_dict(pairs), name, TEXTS)
    whole = np.array([hash_of((text or "").encode()) for text in texts], np.uint64)
    hashes[:, 0] = np.where(hashes[:, 0] > 0, whole, 0)
    hashes[:, 1] = [hash_of(" ".join(title.split()).encode()) for title, _ in found]
    return datasets.Dataset.from_dict({**pairs, PASSAGES: [own for _, own in found]}), hashes


def single_texts(examples: Examples, embedding: EmbeddingConfig) -> Examples:
    """The same splits, or a transfer set, as rows of one text each, with the column `label`.

    To train on: all different texts, or with --learn_from pairs both texts of each pair, one after the other; a document's title is in a
    pair with each of its passages. To search: the queries, then the corpus, see queries_and_corpus. Of scored pairs all first texts, then all
    second ones, both with the score.
    """
    rows: dict[str, tuple[list[str], Any]] = {}
    for role, split in examples.splits.items():
        texts, labels, others = (
            split["text"][:],
            split["label"][:],
            split["text_pair"][:] if is_paired(examples) else [],
        )
        positives = split[PASSAGES][:] if PASSAGES in split.column_names else [[other] for other in others]
        if role == "train" and embedding.learn_from == "pairs":
            pairs = [(text, other) for text, own in zip(texts, positives, strict=True) for other in own]
            counts = [2 * len(own) for own in positives]
            rows[role] = [text for pair in pairs for text in pair], np.repeat(labels, counts)
        elif role in ("train", TRANSFER) or not others:
            different = [*dict.fromkeys([*texts, *(other for own in positives for other in own)])]
            rows[role] = different, np.full(len(different), UNLABELLED if role == TRANSFER else 0)
        elif embedding.score_column is not None:
            rows[role] = [*texts, *others], np.tile(labels, 2)
        else:
            rows[role] = queries_and_corpus(examples, split, embedding.corpus_size if role == "test" else 0)
    splits = {
        role: datasets.Dataset.from_dict({"text": texts, "label": labels}) for role, (texts, labels) in rows.items()
    }
    key = [examples.fingerprint, embedding.learn_from, embedding.corpus_size, embedding.score_column]
    return Examples(
        datasets.DatasetDict(splits), examples.details, digest(["rows of one text", *key]), hashes=examples.hashes
    )


def is_paired(examples: Examples) -> bool:
    return all("text_pair" in split.column_names for split in examples.splits.values())


def queries_and_corpus(examples: Examples, split: datasets.Dataset, most: int) -> tuple[list[str], np.ndarray]:
    """The queries of a split and then the corpus, every text once: the positives of the split, and those of the others until it has `most`.

    The labels are the row of each query's positive, and CORPUS for the rest.
    """
    queries, own = split["text"][:], split["text_pair"][:]
    corpus = {text: len(queries) + place for place, text in enumerate(dict.fromkeys(own))}
    for role in sorted(examples.splits) if most else ():
        for text in examples.splits[role]["text_pair"][:]:
            if len(corpus) < most:
                corpus.setdefault(text, len(queries) + len(corpus))
    return [*queries, *corpus], np.array([corpus[text] for text in own] + [CORPUS] * len(corpus))
