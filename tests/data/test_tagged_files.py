"""Tagged texts as Kaggle and annotation tools export them: all of one data set are the same words and tags."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError
from pipelines.data.tagged import load_tagged
from pipelines.data.tagged_files import read_tagged

WORDS, TAGS = ["José", "Lee", '"', "of", "Rome"], ["B-PER", "I-PER", "O", "O", "B-LOC"]
TEXT = " ".join(WORDS)
SPANS = [(0, 8, "PER"), (14, 18, "LOC")]
EXPECTED = {(*zip(WORDS, TAGS, strict=True), (str(row), "O")) for row in range(10)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(path: Path, content: str | bytes, **settings: Any) -> set[tuple[tuple[str, str], ...]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    data = load_tagged(DataConfig(dataset=str(path), test_size=0.2, validation_size=0.2, **settings))
    found = set()
    for row in (row for split in data.splits.values() for row in split):
        words = [row["text"][start:end] for start, end in zip(row["starts"], row["ends"], strict=True)]
        tags = [data.label_names[int(tag)] for tag in row["label"].split()]
        found.add(tuple(zip(words, tags, strict=True)))
    return found


# ---- A word a row


def word_rows(in_all: bool, header: str = "Sentence #,Word,POS,Tag") -> str:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(header.split(","))
    for number in range(10):
        for place, (word, tag) in enumerate(zip([*WORDS, number], [*TAGS, "O"], strict=True)):
            writer.writerow([f"Sentence: {number}" if in_all or place == 0 else "", word, "X", tag])
    return file.getvalue()


@pytest.mark.parametrize("in_all", [True, False])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_the_words_of_a_sentence_are_rows(in_all: bool, encoding: str, tmp_path: Path) -> None:
    assert load(tmp_path / "ner_dataset.csv", word_rows(in_all).encode(encoding)) == EXPECTED
    parted = word_rows(in_all).replace("Sentence: 1", ",,,\r\nSentence: 1", 1)
    assert load(tmp_path / "parted.csv", parted.encode(encoding)) == EXPECTED


def test_columns_of_words_may_have_other_names(tmp_path: Path) -> None:
    assert load(tmp_path / "a.csv", word_rows(True, "sentence_id,words,pos,labels")) == EXPECTED
    assert load(tmp_path / "c.csv", word_rows(True, "sentence_idx,word,pos,tag")) == EXPECTED
    in_text = word_rows(True, "sentence_id,word,text,label").replace(",X,", ",José Lee of Rome,")
    assert load(tmp_path / "text.csv", in_text) == EXPECTED
    named = {"text_column": "token", "label_column": "ner"}
    assert load(tmp_path / "b.csv", word_rows(True, "sentence_id,token,Tag,ner"), **named) == EXPECTED


@pytest.mark.parametrize("in_all", [True, False])
def test_a_tsv_file_with_numbers_of_sentences_is_no_conll_file(in_all: bool, tmp_path: Path) -> None:
    file = io.StringIO()
    csv.writer(file, delimiter="\t").writerows(csv.reader(io.StringIO(word_rows(in_all))))
    assert load(tmp_path / "ner_dataset.tsv", file.getvalue()) == EXPECTED
    named = file.getvalue().replace("Word", "token").replace("Tag", "ner")
    assert load(tmp_path / "named.tsv", named, text_column="token", label_column="ner") == EXPECTED
    # A first word is no name of a column.
    conll = "".join(f"sentence\tO\n{number}\tB-A\n\n" for number in range(10))
    assert load(tmp_path / "conll.tsv", conll) == {(("sentence", "O"), (str(row), "B-A")) for row in range(10)}


def numbered(numbers: str) -> str:
    """A word for each number of a sentence; _ is an empty cell."""
    rows = [f"{number.strip('_')},{'abc'[place % 3]}{place},{'OB'[place % 2]}" for place, number in enumerate(numbers)]
    return "\n".join(["sentence_id,word,tag", *rows])


@pytest.mark.parametrize(
    ("numbers", "lengths", "times"),
    [
        ("112233" + "112" + "11223344", [2, 2, 2, 2, 1, 2, 2, 2, 2], 2),
        ("1_2_3_1_1_1_2_", [2] * 7, 3),  # one sentence in a document
        ("112233" + "113344", [2] * 6, 1),
        ("223311", [2] * 3, 0),
    ],
)
def test_sentences_that_are_numbered_anew_are_others(
    numbers: str, lengths: list[int], times: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rows.csv").write_text(numbered(numbers))
    assert [len(words) for words in read_tagged(tmp_path / "rows.csv", DataConfig())["text"]] == lengths
    assert ("numbered from '1' anew" in caplog.text) == bool(times)
    assert (f"anew {times} time" in caplog.text) == bool(times)


@pytest.mark.parametrize(
    ("numbers", "again"), [("1122332244", "'2' again in row 6"), ("3122134", "'1' again in row 4")]
)
def test_a_sentence_whose_rows_do_not_stand_together_is_refused(numbers: str, again: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"each sentence one after another in .*, found {again}.*; sort the rows"):
        load(tmp_path / "rows.csv", numbered(numbers))


@pytest.mark.parametrize(
    "content",
    [
        "text,label\nAnn Lee,name\n",
        "Sentence #,Tag\nSentence: 1,O\n",
        "Sentence #,Word,Tag\n",
        "Sentence #,Word,Tag\n,Ann,B-PER\nSentence: 1,of,O\n",
    ],
)
def test_a_csv_file_without_sentences_of_words_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a word in every row of .*'Sentence #'.*found the columns .*rename"):
        load(tmp_path / "rows.csv", content)


def test_a_word_without_a_tag_is_named_by_its_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"words and their tags .* found 1 of 10 rows without one .*: 0\);"):
        load(tmp_path / "rows.csv", word_rows(True).replace("Rome,X,B-LOC", "Rome,X,", 1))


# ---- Spans


def lines(**columns: Any) -> str:
    return "\n".join(json.dumps({"text": f"{TEXT} {row}", **columns}) for row in range(10))


@pytest.mark.parametrize("column", ["label", "labels", "entities", "spans"])
@pytest.mark.parametrize("keys", [None, ("start", "end", "label"), ("start_offset", "end_offset", "label")])
def test_spans_are_found_in_the_usual_columns(column: str, keys: Any, tmp_path: Path) -> None:
    spans = [span if keys is None else dict(zip(keys, span, strict=True), id=7) for span in SPANS]
    assert load(tmp_path / "all.jsonl", lines(**{column: spans, "Comments": []})) == EXPECTED


def test_a_column_that_is_named_is_no_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a column 'ner' in the split"):
        load(tmp_path / "all.jsonl", lines(entities=SPANS), label_column="ner")
    with pytest.raises(InputError, match="a column 'label' in the split"):
        load(tmp_path / "two.jsonl", lines(entities=SPANS, spans=SPANS))


def test_what_an_annotator_of_prodigy_rejected_or_ignored_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spans = [dict(zip(("start", "end", "label"), span, strict=True)) for span in SPANS]
    accepted = lines(spans=spans, answer="accept").splitlines()
    others = [json.dumps({"text": f"no {n}", "spans": [], "answer": "reject" if n else "ignore"}) for n in range(3)]
    assert load(tmp_path / "all.jsonl", "\n".join([*others, *accepted])) == EXPECTED
    assert "3 of 13 rows of all.jsonl are left out" in caplog.text
    tagged = {"label": ["B-PER", "O"]}
    other = [json.dumps({"text": ["Ann", str(n)], **tagged, "answer": "no" if n else "reject"}) for n in range(10)]
    expected = {(("Ann", "B-PER"), (str(n), "O")) for n in range(10)}
    assert load(tmp_path / "other.jsonl", "\n".join(other)) == expected  # an answer of another kind
    assert "of other.jsonl are left out" not in caplog.text


@pytest.mark.parametrize(
    "spans", [[(0, 8, "PER"), (5, 8, "LOC")], [(14, 99, "LOC")], [(8, 8, "PER")], [(-4, 8, "PER")]]
)
def test_spans_that_overlap_or_are_not_in_the_text_are_named_by_row(spans: list[Any], tmp_path: Path) -> None:
    content = lines(label=SPANS).splitlines()
    content[3] = json.dumps({"text": TEXT, "label": spans})
    with pytest.raises(InputError, match="within the text that do not overlap, found .* in row 3 of the split 'train'"):
        load(tmp_path / "all.jsonl", "\n".join(content))


# ---- Label Studio


def task(text: str, *annotations: Any) -> dict[str, Any]:
    made = []
    for spans in annotations:
        values = [
            {"start": start, "end": end, "text": text[start:end], "labels": labels} for start, end, labels in spans
        ]
        result = [
            {"id": "x", "from_name": "label", "to_name": "text", "type": "labels", "value": one} for one in values
        ]
        made.append({"was_cancelled": False, "result": [*result, {"type": "relation", "from_id": "x", "to_id": "x"}]})
    return {"id": 1, "data": {"text": text, "source": "a"}, "annotations": made, "predictions": []}


def test_tasks_of_label_studio_are_texts_with_spans(tmp_path: Path) -> None:
    spans = [(start, end, [label]) for start, end, label in SPANS]
    tasks = [task(f"{TEXT} {row}", spans, []) for row in range(10)]  # the second annotator found nothing
    tasks[4]["annotations"].insert(0, {"was_cancelled": True, "result": []})
    assert load(tmp_path / "project.json", json.dumps(tasks)) == EXPECTED
    assert load(tmp_path / "lines.json", json.dumps(tasks, indent=2)) == EXPECTED
    tasks.append(task("nobody is here") | {"annotations": [{"was_cancelled": False}]})
    with pytest.raises(InputError, match=r"words and their tags .* found 1 of 11 rows without one .*: 10\);"):
        load(tmp_path / "project.json", json.dumps(tasks))
    assert load(tmp_path / "project.json", json.dumps(tasks), missing="drop") == EXPECTED
    tasks[-1] = task("nobody is here", [])
    nobody = tuple((word, "O") for word in "nobody is here".split())
    assert load(tmp_path / "project.json", json.dumps(tasks)) == {*EXPECTED, nobody}
    short = [
        {"text": f"{TEXT} {row}", "label": [dict(start=s, end=e, labels=ls) for s, e, ls in spans]} for row in range(10)
    ]
    assert load(tmp_path / "min.json", json.dumps(short)) == EXPECTED  # JSON_MIN


def test_tasks_of_label_studio_that_are_refused(tmp_path: Path) -> None:
    tasks = [task(f"{TEXT} {row}", [(0, 8, ["PER"])]) for row in range(10)]
    with pytest.raises(
        InputError, match="a text 'body' in the data of every task of .*, found text, source in row 0; name"
    ):
        load(tmp_path / "project.json", json.dumps(tasks), text_column="body")
    tasks[2] = {**task(TEXT), "data": TEXT}
    with pytest.raises(InputError, match="a text 'text' in the data of every task of .*, found none in row 2"):
        load(tmp_path / "project.json", json.dumps(tasks))
    for spans in ([(0, 8, ["PER", "LOC"])], [(0, 8, ["PER"]), (5, 11, ["LOC"])], [(14, 99, ["LOC"])]):
        tasks[2] = task(TEXT, spans)
        with pytest.raises(InputError, match="found .* in row 2"):
            load(tmp_path / "project.json", json.dumps(tasks))
    tasks[2] = task(TEXT, [(0, 8, ["PER"])])
    value = tasks[2]["annotations"][0]["result"][0]["value"]
    value["hypertextlabels"] = value.pop("labels")
    with pytest.raises(InputError, match="expected spans of plain text .* found hypertextlabels in row 2"):
        load(tmp_path / "project.json", json.dumps(tasks))
    tasks[2] = task("\N{PILE OF POO} by Ann", [(6, 9, ["PER"])])
    tasks[2]["annotations"][0]["result"][0]["value"]["text"] = "Ann"  # as JavaScript counts
    with pytest.raises(InputError, match="expected 'Ann' from 6 to 9 of the text in row 2, .*found 'nn'.*emoji"):
        load(tmp_path / "project.json", json.dumps(tasks))
