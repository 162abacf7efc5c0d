"""Documents, their split, the tokenizer trained on them, and windows of tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipelines.core.config import DataConfig, LanguageConfig
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED
from pipelines.data.documents import load_documents
from pipelines.data.windows import (
    begin_tokens,
    cut_windows,
    prompt_tokens,
    token_stream,
    tokenize_windows,
    train_tokenizer,
    unlearnt_tokens,
    vocabulary_fingerprint,
)
from pipelines.runtime.generate import beginning

DOCUMENTS = [
    f"Document {number} tells of {word}.\nIt has two lines." for number in range(20) for word in ("goals", "banks")
]


def load(path, language=None, **settings):
    return load_documents(DataConfig(dataset=str(path), **settings), language or LanguageConfig())


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300)


def test_the_same_documents_from_every_kind_of_source(tmp_path):
    (tmp_path / "all.txt").write_text("\n\n".join(DOCUMENTS) + "\n", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in DOCUMENTS))
    flat, classes = tmp_path / "flat", tmp_path / "classes"
    flat.mkdir()
    for name in ("one", "two"):
        (classes / name).mkdir(parents=True)
    for number, text in enumerate(DOCUMENTS):
        (flat / f"{number}.txt").write_text(text)
        (classes / ("one", "two")[number % 2] / f"{number}.txt").write_text(text)
    sources = [tmp_path / "all.txt", tmp_path / "rows.jsonl", tmp_path / "rows.csv", flat, classes]
    for source in sources:
        data = load(source)
        found = [text for split in data.splits.values() for text in split["text"]]
        assert sorted(found) == sorted(DOCUMENTS), source
        assert {role: len(split) for role, split in data.splits.items()} == {"train": 28, "validation": 4, "test": 8}
        assert data.text_bytes == {role: sum(map(len, split["text"])) for role, split in data.splits.items()}


def test_what_is_left_out_of_a_folder_of_texts_is_named(tmp_path, caplog):
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("A text in a folder.")
    (tmp_path / "scan.pdf").write_bytes(b"%PDF-1.4")
    assert sum(load(tmp_path).details["documents"].values()) == len(DOCUMENTS)
    assert f"left out of the data set in {tmp_path}: more, scan.pdf" in caplog.text


def test_no_document_is_in_two_splits_and_the_split_is_seeded(tmp_path):
    (tmp_path / "all.jsonl").write_text(
        "".join(
            json.dumps({"text": text}) + "\n" for text in [*DOCUMENTS, *(f" {text}  " for text in DOCUMENTS), "", " "]
        )
    )
    first, again = load(tmp_path / "all.jsonl"), load(tmp_path / "all.jsonl")
    assert first.fingerprint == again.fingerprint
    assert load(tmp_path / "all.jsonl", split_seed=1).fingerprint != first.fingerprint
    folded = [
        {" ".join(text.split()) for text in first.splits[role]["text"]} for role in ("train", "validation", "test")
    ]
    assert sum(map(len, folded)) == len(set().union(*folded)) == len(DOCUMENTS)
    assert first.details["duplicates_removed"] == {"train": len(DOCUMENTS)}
    assert first.details["empty_removed"] == 2


def test_files_named_after_splits_are_those_splits(tmp_path):
    for name, texts in {"train": DOCUMENTS[:30], "valid": DOCUMENTS[30:34], "test": DOCUMENTS[33:]}.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    data = load(tmp_path)
    assert data.splits["test"]["text"][:] == DOCUMENTS[33:]
    assert sorted(data.splits["validation"]["text"]) == sorted(DOCUMENTS[30:33])  # what is in the test goes from it
    assert len(data.splits["train"]) == 30


def test_shards_are_their_splits_and_what_names_no_split_among_them_is_refused(tmp_path):
    shards = {"train-0": DOCUMENTS[:15], "train-1": DOCUMENTS[15:30], "valid": DOCUMENTS[30:34], "test": DOCUMENTS[34:]}
    for name, texts in shards.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    data = load(tmp_path)
    assert data.splits["test"]["text"][:] == DOCUMENTS[34:]
    assert sorted(data.splits["validation"]["text"]) == sorted(DOCUMENTS[30:34])
    assert sorted(data.splits["train"]["text"]) == sorted(DOCUMENTS[:30])
    for name in ("README.md", "notes.txt"):
        (tmp_path / name).write_text("What these files are.")
    with pytest.raises(
        InputError, match=r"named after their split .* found README\.md, notes\.txt; rename the files, remove them"
    ):
        load(tmp_path)


def test_longer_names_are_of_splits_where_all_of_a_folder_are(tmp_path):
    for name, texts in {"wiki.train": DOCUMENTS[:30], "wiki.test": DOCUMENTS[30:]}.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    assert load(tmp_path).splits["test"]["text"][:] == DOCUMENTS[30:]
    for number in range(8):
        (tmp_path / f"book {number}.txt").write_text(f"Book {number}.\n\nIt has two parts.")
    assert sum(load(tmp_path).details["documents"].values()) == 10  # one a file
    (tmp_path / "Train to Busan.txt").write_text("A title, not a split.\n\nIt has two parts.")
    assert sum(load(tmp_path).details["documents"].values()) == 11


def test_rows_are_joined_into_documents_at_a_pattern(tmp_path):
    lines = [
        line
        for number in range(10)
        for line in (f" = Title {number} = \n", "\n", f" text {number} \n", " = = Section = = \n")
    ]
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "wiki.txt").write_text("".join(lines))
    pattern = LanguageConfig(document_start=r"^ = [^=]+ = \n?$")
    for name in ("wiki.jsonl", "wiki.txt"):
        data = load(tmp_path / name, pattern)
        found = sorted(text for split in data.splits.values() for text in split["text"])
        assert found == [f" = Title {number} = \n\n text {number} \n = = Section = = \n" for number in range(10)]


def test_a_pattern_for_the_start_of_documents_changes_no_text(tmp_path):
    documents = [f"# {number}\nA page\x0cand\u2028# no title, but\x85 the same line.\n" for number in range(10)]
    (tmp_path / "book.txt").write_text("".join(documents), encoding="utf-8")
    data = load(tmp_path / "book.txt", LanguageConfig(document_start="^# "))
    assert sorted(text for split in data.splits.values() for text in split["text"]) == sorted(documents)


def test_a_text_file_in_cp1252_is_read(tmp_path, caplog):
    (tmp_path / "all.txt").write_text("\n\n".join(text + " é" for text in DOCUMENTS), encoding="cp1252")
    data = load(tmp_path / "all.txt")
    assert data.details["read_as"] == {"encoding cp1252": 1}
    assert "all.txt" in caplog.text
    assert all(text.endswith("é") for text in data.splits["train"]["text"])


def test_a_class_folder_file_in_cp1252_is_read(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / ("one", "two")[number % 2] / f"{number}.txt").write_text(text + " é", encoding="cp1252")
    data = load(tmp_path)
    assert data.details["read_as"] == {"encoding cp1252": len(DOCUMENTS)}
    assert all(text.endswith("é") for text in data.splits["train"]["text"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file"),
        (b" \n\n ", "empty file"),
        ("naïve café\n".encode() * 3 + b"caf\xe9", "expected one encoding .* beside 3 lines"),
        (b"a\0b", "other bytes"),
        (b"one document", "enough"),
    ],
)
def test_text_files_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "a.txt")


def test_a_missing_column_or_one_without_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "tags": ["a", "b"]}\n' * 5)
    with pytest.raises(InputError, match="--text_column"):
        load(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="in the column 'tags' .* found a list"):
        load(tmp_path / "a.jsonl", text_column="tags")


def test_the_tokenizer_gives_every_text_back(tokenizer):
    assert len(tokenizer) == 300
    for text in (*DOCUMENTS[:3], "naïve — 日本 \U0001f600\n\ttabs", "<|endoftext|> is text here"):
        stream = token_stream([text], tokenizer)
        assert stream[0] == stream[-1] == tokenizer.eos_token_id == 0
        assert tokenizer.decode(stream[1:-1], clean_up_tokenization_spaces=False) == text
        assert 0 not in stream[1:-1]


def test_documents_and_prompts_begin_as_the_tokenizer_begins_a_text():
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(DOCUMENTS, 300)
    plain = tokenizer("team")["input_ids"]
    assert (begin_tokens(tokenizer), prompt_tokens(tokenizer, "team")) == ([], plain)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    template = TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", begin), ("<|endoftext|>", end)]
    )
    tokenizer.backend_tokenizer.post_processor = template
    assert prompt_tokens(tokenizer, "team") == [begin, *plain]
    assert prompt_tokens(tokenizer, "") == [begin]
    assert prompt_tokens(tokenizer, "team<|endoftext|>") == [begin, *plain, end]
    stream = token_stream(["team", "team"], tokenizer)
    assert stream.tolist() == [end, begin, *plain, end, begin, *plain, end]
    assert beginning([begin], [], [end]) == [begin]  # a letter that the vocabulary lacks
    # What begins a text is read, and not learnt.
    windows = cut_windows(stream, len(stream), 1, unlearnt_tokens(tokenizer))
    assert windows["labels"].tolist() == [[-100, -100, *plain, end, -100, *plain, end]]


def test_vocabularies_are_compared_by_content(tokenizer):
    other = train_tokenizer([text.upper() for text in DOCUMENTS], 300)
    assert len(other) == len(tokenizer)
    assert vocabulary_fingerprint(other) != vocabulary_fingerprint(tokenizer)
    assert vocabulary_fingerprint(train_tokenizer(DOCUMENTS, 300)) == vocabulary_fingerprint(tokenizer)


@pytest.mark.parametrize("tokens", [2, 5, 8, 9, 31, 32, 33])
@pytest.mark.parametrize("stride", [1, 4, 7])
def test_windows_predict_every_token_once_with_enough_before_it(tokens, stride):
    stream = np.arange(100, 100 + tokens)
    windows = cut_windows(stream, 8, stride)
    ids, labels = windows["input_ids"], windows["labels"]
    targets = labels != IGNORED
    assert sorted(labels[targets]) == list(stream[1:])
    assert (labels[targets] == ids[targets]).all()
    assert (np.diff(ids, axis=1) == 1).all()
    for row, position in zip(*np.nonzero(targets), strict=True):
        assert position >= min(8 - stride, ids[row, position] - 100)


def test_training_windows_overlap_by_one_token(tokenizer, tmp_path):
    (tmp_path / "all.txt").write_text("\n\n".join(DOCUMENTS))
    data = load(tmp_path / "all.txt")
    features = tokenize_windows(data, tokenizer, 16, 8)
    ids = np.array(features["train"]["input_ids"])
    assert (ids[:-2, -1] == ids[1:-1, 0]).all()
    targets = (np.array(features["test"]["labels"]) != IGNORED).sum()
    assert targets == len(token_stream(data.splits["test"]["text"], tokenizer)) - 1
