"""Queries with their candidates: read as pairs or as lists, or found by TF-IDF; and split by query."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import datasets
import numpy as np
import pandas
from sklearn.feature_extraction.text import TfidfVectorizer

from pipelines.core.config import Checked, DataConfig, flag
from pipelines.core.disk import digest
from pipelines.core.errors import InputError
from pipelines.data.examples import Examples, Given, hash_of, read_given, split_examples
from pipelines.data.references import read_scores
from pipelines.data.splits import tell_of_equal
from pipelines.data.tables import read_table
from pipelines.data.text import TEXTS, content, map_kept, title_and_passages

LISTS = (datasets.List, datasets.LargeList)
SIMILARITIES_AT_A_TIME = 20_000_000  # of queries and passages, in memory
PASSAGE = "passage"  # the column of the passages that documents give
TO_TRAIN_ON = 2.0  # is added to the label of a candidate that is there for training alone


@dataclass
class RankingConfig(Checked):
    relevance: str = flag(
        "binary",
        "What the labels say: 'binary', 1 for a passage that answers the query and 0 for another, scored by MRR@10; or 'graded', how well it does, "
        "such as 0 to 3 or the scores of another model, scored by NDCG@10.",
        choices=["binary", "graded"],
    )
    ranking_loss: str | None = flag(
        None,
        "The loss against the labels: 'binary_cross_entropy' of each pair; 'listwise', the cross entropy of a softmax over the candidates of a "
        "query; 'squared_error' of each pair; or 'margin', the squared error of the differences between the candidates of a query (MarginMSE). "
        "Left out: binary_cross_entropy, or squared_error where the labels are graded.",
        choices=["binary_cross_entropy", "listwise", "squared_error", "margin"],
    )
    soft_ranking_loss: str = flag(
        "squared_error",
        "The loss against the teacher's scores: their 'squared_error', or 'margin' as in --ranking_loss.",
        choices=["squared_error", "margin"],
    )
    first_stage: bool = flag(
        False,
        "The candidates of each query stand in the order in which a first stage found them, such as BM25: then this order is a row of the "
        "report.",
    )
    tfidf_candidates: Annotated[int | None, "at least 2"] = flag(
        None,
        "Give each query so many candidates, the best ones by TF-IDF out of all passages of its split, where the data set has only the right "
        "passages; no label column is read. To train on, a query has its right passages in any case, and as many passages at random.",
    )
    train_candidates: Annotated[int | None, "at least 1"] = flag(
        None,
        "Train on so many candidates for each relevant one of a query, it and others drawn at random, not on all: more queries in the same time. "
        "Validation and test have all.",
    )
    title_pairs: Annotated[int | None, "at least 1"] = flag(
        None,
        "For single texts, with --tfidf_candidates: the first line of each is the query, the last so many characters of its other lines are the "
        "right passage. To train on, all passages of so many characters are right.",
    )

    OF_DATA: ClassVar = ("relevance", "first_stage", "tfidf_candidates", "title_pairs")  # for parse_config()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.title_pairs is not None and self.tfidf_candidates is None:
            raise InputError("expected --tfidf_candidates with --title_pairs, found none. Pass a number, such as 10.")
        if self.tfidf_candidates is not None and self.relevance != "binary":
            raise InputError(
                "expected --relevance binary with --tfidf_candidates, which knows only right passages, found graded. Leave one out."
            )

    @property
    def label_loss(self) -> str:
        return self.ranking_loss or ("binary_cross_entropy" if self.relevance == "binary" else "squared_error")

    @property
    def read_as(self) -> str:
        """What of these settings the examples depend on."""
        return f"{self.tfidf_candidates} {self.title_pairs} {self.train_candidates}"


# ---- Reading


def _content(rows: list[tuple[Any, ...]]) -> list[tuple[bytes, bytes] | None]:
    """Of each pair its texts, and the query alone, which is in one split only."""
    found = content(rows)
    return [one and (one[0], one[1].partition(b"\0")[0]) for one in found]


PAIRS = replace(TEXTS, usable="a query and a passage", read_file=partial(read_table, nested=True), content=_content)


def unpack(split: datasets.Dataset, name: str, config: DataConfig, ranking: RankingConfig) -> datasets.Dataset:
    """A row for each pair of a query and a candidate, in the columns that the flags name; `split` may have lists of candidates, right
    passages alone, or single texts. One without these columns stays as it is, for the checks to refuse."""
    # A column may have others in it: passages.passage_text. A format, which is not flattened with them, would hide these.
    split = split.with_format(None).flatten()
    query, passage, label = (str(one) for one in (config.text_column, config.text_pair_column, config.label_column))
    lists = {name: kind.feature for name, kind in split.features.items() if isinstance(kind, LISTS)}
    of_objects = {f"{name}.{key}" for name, kind in lists.items() if isinstance(kind, dict) for key in kind}
    has_lists = passage in {*lists, *of_objects}
    if ranking.tfidf_candidates is not None:
        if has_lists:
            raise InputError(
                f"expected the right passage of each query in the column {passage!r} with --tfidf_candidates, found lists. Leave the flag out: "
                "the lists are the candidates."
            )
        needed = [query] if ranking.title_pairs else [query, passage]
        if not {*needed} <= {*split.column_names} or len(split) == 0:
            return split
        texts = [[str(text or "") for text in split[column]] for column in needed]
        if ranking.title_pairs is not None:
            documents = [title_and_passages(text, ranking.title_pairs) for text in texts[0]]
        else:
            documents = [(text, [right] if right else []) for text, right in zip(*texts, strict=True)]
        found = zip(*find_candidates(documents, ranking.tfidf_candidates), strict=True)
        return datasets.Dataset.from_dict(dict(zip((query, passage, label), map(list, found), strict=True)))
    if not has_lists or not {query, label} <= {*split.column_names, *of_objects}:
        return split
    columns = [query, passage, label]
    pairs = partial(_pairs_of_lists, columns=columns, of_objects=of_objects, name=name, config=config)
    return map_kept(split, pairs, "candidates", [split._fingerprint, columns], remove_columns=split.column_names)


def _pairs_of_lists(
    batch: dict[str, list[Any]], columns: list[str], of_objects: set[str], name: str, config: DataConfig
) -> dict[str, list[Any]]:
    """The pairs of rows of a query and lists of its candidates and their labels, each of which may be a key of the objects in a list."""

    def cells(name: str) -> list[Any]:
        if name not in of_objects:
            return batch[name]
        column, _, key = name.rpartition(".")
        return [cell and [one and one[key] for one in cell] for cell in batch[column]]

    pairs: list[tuple[Any, Any, Any]] = []
    for query, candidates, labels in zip(*map(cells, columns), strict=True):
        if not candidates:  # which a row may lack as it may lack its passage
            candidates, labels = [None], [None]
        labels = _labels_of(candidates, labels, name, config)
        pairs += [(query, passage, label) for passage, label in zip(candidates, labels, strict=True)]
    return {column: [pair[place] for pair in pairs] for place, column in enumerate(columns)}


def _labels_of(candidates: list[str], labels: Any, name: str, config: DataConfig) -> list[Any]:
    """The labels of a list of candidates: as many as there are, or the place (from 0 on) or the text of the right one."""
    if isinstance(labels, list) and len(labels) == len(candidates):
        return labels
    if isinstance(labels, list):
        raise InputError(
            f"expected a label for each candidate in the column {config.label_column!r} of the split {name!r}, found {len(labels)} labels for "
            f"{len(candidates)} candidates. Correct the lists, or give the text or the place of the right one."
        )
    if labels in (None, "", -1) or labels != labels:  # hidden, or not there
        return [math.nan] * len(candidates)
    found = [float(labels in (place, text)) for place, text in enumerate(candidates)]
    if not any(found):
        raise InputError(
            f"expected the right one of its candidates, by its text or its place from 0 on, in every row of the column {config.label_column!r} "
            f"of the split {name!r}, found {labels!r:.80} for {len(candidates)} candidates. Correct the row, or give a label for each candidate."
        )
    return found


def find_candidates(documents: list[tuple[str, list[str]]], count: int) -> Iterator[tuple[str, str, float]]:
    """Pairs and their labels, of queries and their right passages, of which the first is searched among those of all queries: of each query the
    `count` passages that are nearest to it by TF-IDF, the nearest first.

    More follow to train on, with TO_TRAIN_ON added to their labels: the right ones that are not among these, the `count` nearest of all
    passages, and as many at random. Among near ones alone, what is far from the query would be right; far ones alone say nothing of near ones.
    Rows without one of the texts come first, as they are.
    """
    yield from ((query, "".join(own[:1]), 0.0) for query, own in documents if not (query and own))
    first: dict[str, str] = {}  # of texts that differ in white space only, which are one

    def one(text: str) -> str:
        return first.setdefault(" ".join(text.split()), text)

    documents = [(one(query), [one(passage) for passage in own]) for query, own in documents if query and own]
    corpus = list(dict.fromkeys(passage for _, own in documents for passage in own))
    place = {text: index for index, text in enumerate(corpus)}
    is_searched = np.zeros(len(corpus), bool)
    places: dict[str, list[int]] = {}
    for query, own in documents:
        is_searched[place[own[0]]] = True
        places.setdefault(query, []).extend(place[passage] for passage in own)
    random = np.random.default_rng(0)
    for query, order in zip(places, _nearest_first(list(places), corpus), strict=True):
        is_right = np.isin(order, places[query])
        nearest = np.flatnonzero(is_searched[order])[:count]
        to_train_on = is_right.copy()
        to_train_on[:count] = True
        to_train_on[random.choice(len(order), min(count, len(order)), replace=False)] = True
        to_train_on[nearest] = False
        for rank in nearest.tolist():
            yield query, corpus[order[rank]], float(is_right[rank])
        for rank in np.flatnonzero(to_train_on).tolist():
            yield query, corpus[order[rank]], TO_TRAIN_ON + float(is_right[rank])


def _nearest_first(queries: list[str], corpus: list[str]) -> Iterator[np.ndarray]:
    """For each query the places in the corpus of all passages (passages,), the nearest by TF-IDF first."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32)
    try:
        weights = vectorizer.fit_transform([*corpus, *queries])[: len(corpus)]
    except ValueError as error:
        raise InputError(
            f"expected words to find candidates by with --tfidf_candidates, found none in {len(corpus)} passages. Name the columns with "
            "--text_column and --text_pair_column."
        ) from error
    step = max(1, SIMILARITIES_AT_A_TIME // max(1, len(corpus)))
    for start in range(0, len(queries), step):
        nearness = (vectorizer.transform(queries[start : start + step]) @ weights.T).toarray()
        yield from np.argsort(-nearness, axis=1, kind="stable")


# ---- Splitting


def load_rankings(config: DataConfig, ranking: RankingConfig) -> Examples:
    """The splits: pairs in the columns `text` (query) and `text_pair` (passage), and as `label` the score of the pair and the number of its
    query (two float32); all candidates of a query in one split, one after another, in their order.

    What load_examples() does with examples is done with queries here: a query is in one split only, and limits count queries.
    """
    given, details, *_ = read_given(
        config, PAIRS, read_scores, partial(unpack, config=config, ranking=ranking), ranking.read_as
    )
    marks = ranking.tfidf_candidates is not None
    to_train_on = {role: (split.labels >= TO_TRAIN_ON) & marks for role, split in given.items()}
    given = {
        role: replace(split, labels=split.labels - TO_TRAIN_ON * to_train_on[role]) for role, split in given.items()
    }
    rows = {role: rows_of_queries(split.hashes) for role, split in given.items()}
    for role, split in given.items():
        labels = pandas.Series(split.labels)
        others = labels != labels.groupby(split.hashes[:, 0]).transform("first")
        again = len(labels) - sum(map(len, rows[role]))
        tell_of_equal(again, len(labels), int(others.sum()), f"pairs of the split {split.name!r}")
    queries = {role: _as_queries(split, rows[role]) for role, split in given.items()}
    examples = split_examples(queries, config, "queries", details)
    pairs = {role: _with_labels(split, rows[role]) for role, split in given.items()}
    for role, split in examples.splits.items():
        origin = role if role in given else "train"
        chosen = [rows[origin][query] for query in split["query"]]
        if role != "train":
            chosen = [own[~to_train_on[origin][own]] for own in chosen]
        elif ranking.train_candidates is not None:
            random, is_right = np.random.default_rng(config.split_seed), given[origin].labels > 0
            chosen = [drawn(own, is_right[own], ranking.train_candidates, random) for own in chosen]
        examples.splits[role] = pairs[origin].select(np.concatenate(chosen), keep_in_memory=True)
    counts = {role: len(split) for role, split in examples.splits.items()}
    details = {**examples.details, "pairs": counts}
    return replace(examples, details=details, fingerprint=digest([examples.fingerprint, ranking.read_as]))


def drawn(rows: np.ndarray, is_right: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """The right rows of a query and others at random, so many for each right one, in their order. With the first others a right one would mostly
    be the last."""
    others = random.permutation(np.flatnonzero(~is_right))[: count * max(1, is_right.sum()) - is_right.sum()]
    return rows[np.sort(np.concatenate([np.flatnonzero(is_right), others]))]


def rows_of_queries(hashes: np.ndarray) -> list[np.ndarray]:
    """The rows of each query, in the order of both, by their hashes (rows, 2) of pair and query; of equal pairs the first."""
    table = pandas.DataFrame({"query": pandas.factorize(hashes[:, 1])[0], "pair": hashes[:, 0]})
    number = table.drop_duplicates()["query"].sort_values(kind="stable")
    return np.split(number.index.to_numpy(), np.cumsum(np.bincount(number))[:-1])


def _as_queries(split: Given, rows: list[np.ndarray]) -> Given:
    """The queries of a split as its examples: their inputs are their numbers."""
    whole = [hash_of(split.hashes[own, 0].tobytes() + split.labels[own].tobytes()) for own in rows]
    shared = [split.hashes[own[0], 1] for own in rows]
    hashes = np.stack([np.array(whole, np.uint64), np.array(shared, np.uint64)], axis=1)
    numbers = np.arange(len(rows))
    return Given(split.name, datasets.Dataset.from_dict({"query": numbers}), hashes, np.zeros(len(rows), np.int64))


def _with_labels(split: Given, rows: list[np.ndarray]) -> datasets.Dataset:
    """The pairs of a split with the column `label`; float32 has whole numbers up to 16 million."""
    labels = np.zeros((len(split.labels), 2), np.float32)
    labels[:, 0] = split.labels
    labels[np.concatenate(rows), 1] = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
    return split.inputs.add_column("label", list(labels), feature=datasets.List(datasets.Value("float32")))
