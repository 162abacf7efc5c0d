"""Extractive question answering: the scores against the published rules, spans against a brute force, and the whole chain on answers that
can be learnt."""

from __future__ import annotations

import csv
import json
import re
import string
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow.parquet
import pytest
import torch
from scipy.special import softmax
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
from transformers.pipelines.document_question_answering import select_starts_ends

from conftest import FILLER, WORDS, tiny_language_model
from others import in_node, odd_texts
from pipelines import load
from pipelines.chain import demo_config, read_settings
from pipelines.core.config import DataConfig, DistillConfig
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, StageResult
from pipelines.data.windows import train_tokenizer
from pipelines.report.results import predict_stage
from pipelines.runtime.answers import AnswerModel, likeliest_spans
from pipelines.runtime.infer import token_inputs
from pipelines.tasks import task_of_model
from pipelines.tasks.question_answering import scores
from pipelines.tasks.question_answering.data import AnswerConfig, load_questions
from pipelines.tasks.question_answering.report import compare_answers
from pipelines.tasks.question_answering.speakers import questions_of_speakers
from pipelines.tasks.question_answering.task import QuestionAnswering, answer_tokens
from pipelines.training.baselines import fit_baseline
from processes import run_here


def make_questions(contexts: int = 160) -> list[dict[str, Any]]:
    """Two questions on each context: for the word of trade in it, or there is none; and for the word of sport."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(contexts):
        words = [str(word) for word in generator.choice(FILLER, generator.integers(8, 40))]
        answers = {}
        for question, label in (("the price", "trade"), ("the match", "sport")):
            if label == "sport" or index % 4:
                word = answers[question] = str(generator.choice(WORDS[label][:4]))
                words.insert(int(generator.integers(0, len(words))), word)
        context = " ".join([*words, str(index)])
        for question in ("the price", "the match"):
            texts = [answers[question]] if question in answers else []
            starts = [re.search(rf"\b{text}\b", context).start() for text in texts]
            rows.append({"question": question, "context": context, "answers": texts, "starts": starts})
    return rows


def write_squad(path: Path, rows: list[dict[str, Any]]) -> Path:
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": str(number),
                    "question": row["question"],
                    "is_impossible": not row["answers"],
                    "answers": [
                        {"text": text, "answer_start": start}
                        for text, start in zip(row["answers"], row["starts"], strict=True)
                    ],
                }
            ],
        }
        for number, row in enumerate(rows)
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "context", "answer", "start"])
        for row in rows:
            writer.writerow([row["question"], row["context"], *(row["answers"] or [""]), *(row["starts"] or [""])])
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> QuestionAnswering:
    path = write_squad(tmp_path_factory.mktemp("questions") / "train.json", make_questions())
    return QuestionAnswering(DataConfig(dataset=str(path), max_length=24), AnswerConfig(overlap=8, max_answer_tokens=4))


# ---- Scores


def test_scores_are_those_of_the_published_rules():
    """The rules: lower case, without punctuation and the articles a, an, the; F1 of bags of words; the best of the references."""

    def words_of(text: str) -> list[str]:
        letters = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return [word for word in re.split(r"\s+", letters) if word not in ("a", "an", "the", "")]

    def f1(answer: str, reference: str) -> float:
        left, right = sorted(words_of(answer)), sorted(words_of(reference))
        if not left or not right:
            return float(left == right)
        rest, common = list(right), 0
        for word in left:
            if word in rest:
                rest.remove(word)
                common += 1
        precision, recall = common / len(left), common / len(right)
        return 2 * precision * recall / (precision + recall) if common else 0.0

    generator = np.random.default_rng(0)
    vocabulary = ["The", "a", "an", "cat", "Cat!", "sat,", "on", "mat.", "'s", "theatre", "42", "é", "-", "—"]
    texts = [" ".join(generator.choice(vocabulary, generator.integers(0, 5))) for _ in range(400)]
    references = [[str(one) for one in generator.choice(texts, generator.integers(0, 4))] for _ in texts]
    exact, partly = scores.score_answers(texts, references)
    for answer, wanted, is_exact, share in zip(texts, references, exact, partly, strict=True):
        known = [one for one in wanted if words_of(one)] or [""]
        assert share == pytest.approx(max(f1(answer, one) for one in known))
        assert is_exact == any(words_of(answer) == words_of(one) for one in known)
    assert 0 < exact.mean() < partly.mean() < 1
    assert scores.f1("Denver Broncos", "the Denver Broncos!") == 1
    assert scores.f1("Prime Minister Blair", "Tony Blair") == pytest.approx(2 * (1 / 3 * 1 / 2) / (1 / 3 + 1 / 2))


def test_the_best_span_is_that_of_the_likeliest_window():
    predictions = np.array(
        [
            # question, log probability, start, end, log probability of none
            [0, -2.0, 5, 9, -3.0],
            [0, -1.0, 40, 44, -0.5],
            [1, -4.0, 7, 8, -0.1],
            [1, -3.0, 17, 18, -0.2],
        ]
    )
    assert scores.best_spans(predictions, 2, unanswerable=False)[:, 1:].tolist() == [[40, 44], [17, 18]]
    # None is as likely as in the window in which it is least likely: -3 of the first question, -0.2 of the second.
    assert scores.best_spans(predictions, 2, unanswerable=True)[:, 1:].tolist() == [[40, 44], [0, 0]]


# ---- Spans


@pytest.mark.parametrize("longest", [1, 3, 50])
def test_likeliest_spans_are_those_of_transformers(longest):
    generator = np.random.default_rng(longest)
    for tokens in (5, 12, 40):
        start, end = generator.normal(0, 3, (2, tokens))
        first, last = 3, tokens - 2
        masked = np.ones(tokens)
        masked[[0, *range(first, last + 1)]] = 0
        attention = np.ones((1, tokens), int)
        count = min(4, last - first + 1)
        expected = select_starts_ends(
            start[None].copy(), end[None].copy(), masked[None].astype(int), attention, 1e6, count, True, longest
        )
        starts, ends, likely, none = likeliest_spans(start, end, first, last, longest, count)
        assert starts.tolist() == expected[0].tolist()
        assert ends.tolist() == expected[1].tolist()
        np.testing.assert_allclose(np.exp(likely), expected[2], rtol=1e-9)
        assert np.exp(none) == pytest.approx(expected[3])
    assert [len(one) for one in likeliest_spans(np.zeros(4), np.zeros(4), 3, 2, longest)[:3]] == [0, 0, 0]


def answer_model(tokenizer: Any, seed: int = 0, unanswerable: bool = False, max_length: int = 24) -> AnswerModel:
    """A model of random logits."""
    generator = np.random.default_rng(seed)

    def run(names: list[str], feed: dict[str, Any]) -> list[np.ndarray]:
        return [generator.normal(0, 3, feed["input_ids"].shape).astype(np.float32) for _ in names]

    feed = partial(token_inputs, names=["input_ids"])
    inputs = {"max_length": max_length, "overlap": 6}
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    return AnswerModel(
        backend, feed, SimpleNamespace(run=run), inputs, {"max_answer_tokens": 8, "unanswerable": unanswerable}
    )


def test_an_answer_is_the_characters_that_it_names(tokenizer):
    pieces = [
        "goal",
        "the ",
        "é",
        "e\u0301",
        "🙂",
        "👩‍👩‍👧",
        "\r\n",
        "\t",
        " ",
        "\u00a0",
        "東京",
        "שלום",
        "مرحبا",
        "İ",
        "ﬁ",
        "42",
        "“",
        ".",
        "\u200b",
    ]
    generator = np.random.default_rng(0)
    model, several = answer_model(tokenizer), 0
    for _ in range(10_000):
        context = "".join(generator.choice(pieces, generator.integers(0, 24)))
        found = model.answer("the match", context)
        for one in [found, *found["answers"]]:
            assert one["answer"] == context[one["start"] : one["end"]] == one["answer"].strip()
            assert 0 <= one["score"] <= 1
        assert not found["answers"] or found["answer"] == found["answers"][0]["answer"]
        several += len(found["answers"]) > 1
    assert several > 5_000


def test_a_question_that_leaves_no_room_is_refused(tokenizer):
    for words in (20, 200):
        with pytest.raises(ValueError, match="expected a question of at most 14 tokens, found .* Shorten it"):
            answer_model(tokenizer).windows("goal " * words, "the match " * 50)


def test_tokens_of_an_answer():
    offsets = np.array([[0, 3], [4, 8], [8, 9], [10, 14]])
    assert answer_tokens(offsets, 4, 9) == (1, 2)
    assert answer_tokens(offsets, 5, 7) == (1, 1)  # within a token
    assert answer_tokens(offsets, 10, 15) is None
    assert answer_tokens(offsets[1:], 0, 8) is None


# ---- Data


def test_the_forms_of_data_give_the_same_questions(tmp_path, questions):
    rows = make_questions()
    nested = questions.data
    hub = [
        {name: row[name] for name in ("question", "context")}
        | {"answers": {"text": row["answers"], "answer_start": row["starts"]}}
        for row in rows
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, hub)))
    datasets.Dataset.from_list(hub).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(hub).save_to_disk(tmp_path / "saved")
    write_csv(tmp_path / "rows.csv", rows)
    (tmp_path / "answers.csv").write_text((tmp_path / "rows.csv").read_text().replace("answer", "answers", 1))
    for name in ("rows.jsonl", "rows.parquet", "saved", "rows.csv", "answers.csv"):
        found = load_questions(DataConfig(dataset=str(tmp_path / name)), AnswerConfig())
        assert found.fingerprint == nested.fingerprint, name
    assert nested.details["unanswerable"] == {
        name: sum(not one for one in split["answers"]) for name, split in nested.splits.items()
    }
    assert sum(nested.details["unanswerable"].values()) == 40


def test_no_context_is_in_two_splits(questions, tmp_path):
    contexts = {name: {*split["context"]} for name, split in questions.data.splits.items()}
    assert [len(one) for one in contexts.values()] == [112, 16, 32]
    assert len(set.union(*contexts.values())) == 160
    assert all(len(split) == 2 * len(contexts[name]) for name, split in questions.data.splits.items())
    # A context that a given test split has, too, leaves the training split.
    rows = make_questions(20)
    write_squad(tmp_path / "train.json", rows)
    write_squad(tmp_path / "test.json", [{**row, "context": row["context"] + "\n"} for row in rows[:6]])
    found = load_questions(DataConfig(dataset=str(tmp_path)), AnswerConfig())
    assert found.splits["test"]["question"] == [row["question"] for row in rows[:6]]
    assert not {*found.splits["train"]["context"]} & {row["context"] for row in rows[:6]}
    assert found.details["contexts_in_several_splits"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"starts": [2]},
            r"1 of 40 rows without .*: 1; the first: .*is not in the context at character 2.*--missing drop",
        ),
        ({"answers": ["nowhere"]}, "the answer 'nowhere' is not in the context"),
        ({"question": " "}, "no question or no context"),
        ({"starts": []}, "1 answers with 0 starts"),
    ],
)
def test_an_answer_that_is_not_in_the_context_is_refused(change, message, tmp_path):
    rows = make_questions(20)
    rows[1] |= change
    hub = [
        {name: row[name] for name in ("question", "context")}
        | {"answers": {"text": row["answers"], "answer_start": row["starts"]}}
        for row in rows
    ]
    (tmp_path / "rows.json").write_text(json.dumps(hub))
    with pytest.raises(InputError, match=message):
        load_questions(DataConfig(dataset=str(tmp_path / "rows.json")), AnswerConfig())
    dropped = load_questions(DataConfig(dataset=str(tmp_path / "rows.json"), missing="drop"), AnswerConfig())
    assert dropped.details["rows_dropped"] == {"train": 1}


def one_question(index: int) -> dict[str, Any]:
    return {"question": "what?", "context": f"the goal {index}", "answers": {"text": ["goal"], "answer_start": [4]}}


@pytest.mark.parametrize(
    "change",
    [
        {"answers": {"text": "goal", "answer_start": 4}},
        {"answers": {"text": ["goal"], "answer_start": [4.0]}},
        {"answers": [{"text": "goal", "answer_start": 4}]},
        {"answers": "goal", "start": "4.0"},
        {"answers": ["goal"], "start": [4]},
        {"answers": str({"text": ["goal"], "answer_start": [4]})},
        {"answers": json.dumps([{"text": "goal", "answer_start": 4}])},
    ],
)
def test_an_answer_may_be_of_other_forms(change, tmp_path):
    expected = load_from(tmp_path, [one_question(index) for index in range(10)]).fingerprint
    assert load_from(tmp_path, [one_question(index) | change for index in range(10)]).fingerprint == expected


@pytest.mark.parametrize("orient", ["list", "dict"])
def test_questions_may_stand_in_columns(orient, tmp_path):
    rows = [one_question(index) for index in range(10)]
    columns = pandas.DataFrame(rows).to_dict(orient)
    assert load_from(tmp_path, columns).fingerprint == load_from(tmp_path, rows).fingerprint


def test_equal_questions_with_other_answers_are_told(tmp_path, caplog):
    """What annotators wrote, a row for each of them: only the first would be right in the test split."""
    rows = [one_question(index) for index in range(10)]
    load_from(tmp_path, [*rows, rows[0], rows[1] | {"answers": {"text": ["the"], "answer_start": [0]}}])
    assert "2 of 12 questions of the split 'train' are there more than once, and stay once" in caplog.text
    assert "1 of these have other answers than the first" in caplog.text


def load_from(folder: Path, found: Any) -> Any:
    (folder / "rows.json").write_text(json.dumps(found))
    return load_questions(DataConfig(dataset=str(folder / "rows.json")), AnswerConfig())


@pytest.mark.parametrize(
    "none",
    [{}, {"answers": None}, {"answers": []}, {"answers": ""}, {"answers": {"text": [], "answer_start": []}, "id": 3}],
)
def test_rows_of_a_json_file_need_not_have_one_form(none, tmp_path):
    """The first row tells nothing of the others, and columns that nobody named are in nobody's way."""
    rows: list[dict[str, Any]] = [one_question(index) | {"id": f"q{index}"} for index in range(10)]
    rows[0] = {"question": "why?", "context": "the goal 0"} | none
    rows[1] |= {"answers": [{"text": "goal", "answer_start": 4}]}
    found = load_from(tmp_path, rows)
    asked = {row["question"]: row["answers"] for split in found.splits.values() for row in split}
    assert asked == {"why?": [], "what?": ["goal"]}
    assert sum(found.details["unanswerable"].values()) == 1


@pytest.mark.parametrize(("true", "false"), [(True, False), (1, None), ("TRUE", "FALSE"), (1.0, 0.0), ("yes", "no")])
def test_an_impossible_question_has_no_answer_in_every_form(true, false, tmp_path):
    rows = [one_question(index) | {"is_impossible": true if index < 3 else false} for index in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    flat = [{**row, "answer": "goal", "start": 4} for row in rows]
    datasets.Dataset.from_list(flat).remove_columns("answers").to_csv(tmp_path / "rows.csv")
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {name: row[name] for name in ("question", "is_impossible")}
                | {"answers": [{"text": "goal", "answer_start": 4}]}
            ],
        }
        for row in rows
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    for name in ("rows.jsonl", "rows.parquet", "saved", "rows.csv", "squad.json"):
        found = load_questions(DataConfig(dataset=str(tmp_path / name)), AnswerConfig())
        none = {row["context"] for split in found.splits.values() for row in split if not row["answers"]}
        assert none == {"the goal 0", "the goal 1", "the goal 2"}, name


def test_shards_of_other_columns_and_forms_are_joined(tmp_path):
    rows = [one_question(index) | {"id": str(index)} for index in range(60)]
    impossible = [{**row, "is_impossible": index < 3} for index, row in enumerate(rows)]
    flat = [{**row, "answer": "goal", "start": 4} for row in rows]
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "train-0.jsonl").write_text("\n".join(map(json.dumps, impossible[:10])))
    (folder / "train-1.jsonl").write_text("\n".join(map(json.dumps, rows[10:20])))
    datasets.Dataset.from_list(rows[20:30]).to_parquet(folder / "train-2.parquet")
    datasets.Dataset.from_list(impossible[30:40]).to_parquet(folder / "train-3.parquet")
    datasets.Dataset.from_list(flat[40:50]).remove_columns("answers").to_csv(folder / "train-4.csv")
    datasets.Dataset.from_list(rows[50:]).to_parquet(folder / "train-5.parquet")
    small = pyarrow.struct(
        {"text": pyarrow.large_list(pyarrow.string()), "answer_start": pyarrow.list_(pyarrow.int32())}
    )
    table = pyarrow.parquet.read_table(folder / "train-5.parquet")
    place = table.column_names.index("answers")
    pyarrow.parquet.write_table(
        table.set_column(place, "answers", table["answers"].cast(small)), folder / "train-5.parquet"
    )
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, impossible)))
    one_file = load_questions(DataConfig(dataset=str(tmp_path / "rows.jsonl")), AnswerConfig())
    found = load_questions(DataConfig(dataset=str(folder)), AnswerConfig())
    assert found.fingerprint == one_file.fingerprint
    assert sum(found.details["unanswerable"].values()) == 3


def test_a_truth_value_that_is_none_is_refused(tmp_path):
    rows = [one_question(index) | {"is_impossible": "maybe" if index == 3 else "no"} for index in range(10)]
    with pytest.raises(InputError, match="'is_impossible' of the split 'train', found 'maybe' in row 3"):
        load_from(tmp_path, rows)


def test_an_empty_text_is_no_answer(tmp_path):
    rows = [one_question(index) for index in range(10)]
    rows[3]["answers"], rows[4]["answers"] = {"text": [""], "answer_start": [-1]}, {"text": [None], "answer_start": [0]}
    assert sum(load_from(tmp_path, rows).details["unanswerable"].values()) == 2


@pytest.mark.parametrize(
    "answers",
    [
        {"text": [4], "answer_start": [4]},
        {"text": ["goal", None], "answer_start": [4, 4]},
        {"text": ["goal", "goal"], "answer_start": [4, float("inf")]},
        {"text": ["goal", "goal"], "answer_start": [4, 4.5]},
        {"text": ["goal", "goal"], "answer_start": [4, None]},
    ],
)
def test_an_answer_without_its_place_is_refused(answers, tmp_path):
    with pytest.raises(InputError, match="10 of 10 rows without"):
        load_from(tmp_path, [one_question(index) | {"answers": answers} for index in range(10)])


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["goal"], "answer_start": [float("inf")]},
        {"text": ["goal"], "answer_start": [4.5]},
        {"text": ["goal"]},
        {"text": ["goal"], "answer_start": []},
        ["goal"],
        [{"text": "goal"}],
    ],
)
def test_where_no_answer_has_a_place_its_column_is_asked_for(answers, tmp_path):
    rows = [one_question(index) | {"answers": answers if index else []} for index in range(10)]
    with pytest.raises(InputError, match="found none for 9 questions .*question, context, answers.* --start_column"):
        load_from(tmp_path, rows)


@pytest.mark.parametrize("missing", ["error", "drop"])
def test_a_table_with_another_column_of_starts_is_told_its_flag(missing, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        "question,context,answer,answer_start\n" + "".join(f"what?,the goal {n},goal,4\n" for n in range(10))
    )
    config = DataConfig(dataset=str(path), missing=missing)
    with pytest.raises(InputError, match="the column 'start' .* answer, answer_start.* --start_column"):
        load_questions(config, AnswerConfig())
    found = load_questions(config, AnswerConfig(start_column="answer_start"))
    assert sum(map(len, found.splits.values())) == 10


def test_half_of_an_emoji_is_no_character(tmp_path):
    rows = [one_question(index) for index in range(10)]
    rows[3] |= {"context": "\ud83d goal", "answers": {"text": ["goal"], "answer_start": [2]}}
    contexts = {context for split in load_from(tmp_path, rows).splits.values() for context in split["context"]}
    assert "? goal" in contexts


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("data", "some"),
        ("data", None),
        ("data", ["some"]),
        ("paragraphs", None),
        ("context", ...),
        ("qas", ...),
        ("question", ...),
        ("answer_start", ...),
        ("answers", ["goal"]),
        ("answers", {"text": ["goal"], "answer_start": [4]}),
    ],
)
def test_a_broken_form_of_squad_is_one_message(part, found, tmp_path):
    """`part` is `found` instead of what it should be, or is missing (...)."""
    answer: dict[str, Any] = {"text": "goal", "answer_start": 4}
    question: dict[str, Any] = {"question": "what?", "answers": [answer]}
    paragraph: dict[str, Any] = {"context": "the goal", "qas": [question]}
    article: dict[str, Any] = {"paragraphs": [paragraph]}
    whole: dict[str, Any] = {"data": [article]}
    holder = next(one for one in (whole, article, paragraph, question, answer) if part in one)
    holder[part] = found
    if found is ...:
        del holder[part]
    with pytest.raises(InputError, match="expected a file of questions .* cannot be read"):
        load_from(tmp_path, whole)


@pytest.mark.parametrize(
    ("name", "content"), [("rows.parquet", b"PAR1" + b"x" * 99), ("rows.json.gz", b"\x1f\x8b" * 9)]
)
def test_a_damaged_file_of_questions_is_one_message(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        load_questions(DataConfig(dataset=str(tmp_path / name)), AnswerConfig())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "cp1252"])
@pytest.mark.parametrize("join", [json.dumps, lambda rows, **how: "\r".join(json.dumps(row, **how) for row in rows)])
def test_questions_in_another_encoding_are_read(join, encoding, tmp_path):
    answers = {"text": ["Renée"], "answer_start": [0]}
    rows = [{"question": f"who {n}?", "context": f"Renée {n} était là", "answers": answers} for n in range(20)]
    (tmp_path / "rows.json").write_bytes(join(rows, ensure_ascii=False).encode(encoding))
    examples = load_questions(DataConfig(dataset=str(tmp_path / "rows.json")), AnswerConfig())
    assert {row["context"][:5] for split in examples.splits.values() for row in split} == {"Renée"}


def test_data_without_questions_is_refused(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"question": "the match", "context": "a goal", "answer": ""}] * 2))
    for settings, message in [
        ({"question_column": "asked"}, "--question_column"),
        ({}, "an answer in the split 'train'"),
    ]:
        with pytest.raises(InputError, match=message):
            load_questions(DataConfig(dataset=str(tmp_path / "rows.json")), AnswerConfig(**settings))


def test_texts_without_their_column_are_one_message(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": '"It is a goal for the whole team," said Mr Blair.'}))
    with pytest.raises(InputError, match="expected a column 'text' .*found the columns 'body'; .* --text_column"):
        load_questions(DataConfig(dataset=str(tmp_path / "rows.jsonl")), AnswerConfig(quoted_speakers=True))


def test_questions_have_no_classes_to_limit(tmp_path):
    path = write_squad(tmp_path / "rows.json", make_questions(20))
    with pytest.raises(
        InputError, match="expected classes with --max_samples_per_class.*questions by --max_train_samples"
    ):
        load_questions(DataConfig(dataset=str(path), max_samples_per_class=2), AnswerConfig())


def test_questions_of_speakers():
    text = (
        'The headline\n\n"This will help every family in the country," said Mr Brown in London. "We shall publish the figures on Monday." '
        'Critics in Leeds disagreed. Jane Doe said the plan was far too small to matter. "It is all a mistake from end to end," she added.'
    )
    found = questions_of_speakers([text])
    asked = {row["question"]: row["answers"] for row in found}
    assert asked == {
        "Who said this will help every family in the country?": ["Mr Brown"],
        "Who said we shall publish the figures on Monday?": ["Mr Brown"],
        "Who said the plan was far too small to matter?": ["Jane Doe"],
    }
    assert all(row["context"][row["starts"][0] :].startswith(row["answers"][0]) for row in found)


# ---- Windows and losses


def test_windows_share_tokens_and_cover_the_context(questions, tokenizer):
    features, rows = questions.features(tokenizer)["validation"], questions.data.splits["validation"]
    covered: dict[int, list[set[int]]] = {}
    answered = 0
    for window, label in zip(features, features["labels"], strict=True):
        ((row, first, last, begin, end),) = questions._places(torch.tensor([label])).tolist()
        context = tokenizer(rows[row]["context"], add_special_tokens=False)["input_ids"]
        before = covered.setdefault(row, [])
        place = before[-1] and max(before[-1]) + 1 - 8 if before else 0
        own = window["input_ids"][first : last + 1]
        assert own == context[place : place + len(own)]
        assert len(window["input_ids"]) == window["length"] <= 24
        before.append({*range(place, place + len(own))})
        if begin:
            answered += 1
            assert tokenizer.decode(window["input_ids"][begin : end + 1]) == rows[row]["answers"][0]
        assert max(before[-1]) <= len(context) - 1
    for row, parts in covered.items():
        assert len(set.union(*parts)) == len(tokenizer(rows[row]["context"], add_special_tokens=False)["input_ids"])
    assert max(map(len, covered.values())) > 1
    assert answered >= sum(bool(one) for one in rows["answers"])


def test_a_question_longer_than_a_window_is_refused_before_training(tokenizer, tmp_path):
    rows = [row | {"question": "the match " * 9} for row in make_questions(20)]
    path = write_squad(tmp_path / "rows.json", rows)
    task = QuestionAnswering(DataConfig(dataset=str(path), max_length=24), AnswerConfig())
    with pytest.raises(InputError, match="expected questions of at most 14 tokens.*found 18.*--max_length"):
        task.features(tokenizer)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_decoder_is_refused(model_type, questions, tmp_path):
    tiny_language_model(model_type).save_pretrained(tmp_path)
    train_tokenizer(["a text"], 300).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=f"expected an encoder.* span head .*found '{model_type}' .* a decoder. Use an"
    ):
        questions.load_model(str(tmp_path), "new if other")


def test_losses_are_over_the_context_whatever_the_padding(questions, tokenizer):
    features = questions.features(tokenizer)["train"]
    batch = questions.collate(tokenizer)([features[row] for row in range(4)])
    labels, tokens = batch["labels"], batch["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(0)
    logits, taught = (
        {name: 3 * torch.randn(4, tokens + 3, generator=generator) for name in ("start_logits", "end_logits")}
        for _ in range(2)
    )
    labels = torch.cat([labels[:3], torch.tensor([IGNORED])])  # a filler
    expected, soft, temperature = 0.0, 0.0, 2.0
    for row, (_, first, last, *right) in enumerate(questions._places(labels[:3]).tolist()):
        places = [0, *range(first, last + 1)]
        for name, target in zip(logits, right, strict=True):
            student, teacher = (one[name][row, places].double().numpy() for one in (logits, taught))
            expected += np.log(np.exp(student).sum()) - student[places.index(target)]
            q, p = (np.exp(one / temperature) / np.exp(one / temperature).sum() for one in (student, teacher))
            soft += temperature**2 * (p * np.log(p / q)).sum()
    loss, count = questions.label_loss(logits, labels)
    assert (loss.item(), count.item()) == (pytest.approx(expected / 2, rel=1e-5), 3)
    stored = questions.soft_targets({name: one[:, :24] for name, one in taught.items()}, DistillConfig())
    assert [one.shape[1] for one in stored.values()] == [24, 24]
    online = {f"teacher_{name}": one for name, one in taught.items()}
    distill = DistillConfig(temperature=temperature)
    assert questions.soft_loss(logits, online, labels, distill).item() == pytest.approx(soft / 2, rel=1e-5)
    for kind in ("reverse_kl", "jensen_shannon", "decoupled"):
        student = {name: one.clone().requires_grad_() for name, one in logits.items()}
        one = questions.soft_loss(student, online, labels, DistillConfig(divergence=kind))
        one.backward()
        assert all(torch.isfinite(part.grad).all() and part.grad[3].eq(0).all() for part in student.values())
    for settings in ({"divergence": "squared_error"}, {"standardize_logits": True}):
        with pytest.raises(InputError, match="Leave it out"):
            questions.check_soft_loss(DistillConfig(**settings))


def test_the_comparison_names_the_questions_that_lost(questions):
    rows = questions.data.splits["test"]
    starts = np.array([one[0] if one else 0 for one in rows["starts"]], float)
    ends = starts + [len(one[0]) if one else 0 for one in rows["answers"]]
    none = np.where(ends > 0, -5.0, -0.1)
    right = np.stack([np.arange(len(rows)), np.full(len(rows), -1.0), starts, ends, none], axis=1)
    wrong = right.copy()
    lost = int(np.flatnonzero(ends)[0])
    wrong[lost, 2:4] = [0, 1]
    stages = [StageResult(name, "onnx", found, {}, {}) for name, found in (("teacher", right), ("onnx", wrong))]
    found = compare_answers(stages, rows, True, "onnx")
    assert found.stages["teacher"]["metrics"] == {"f1": 1.0, "exact_match": 1.0}
    assert found.stages["onnx"]["agreement"] == pytest.approx(1 - 1 / len(rows))
    [example] = found.report["worse_examples"]["examples"]
    assert (example["index"], example["teacher"]) == (lost, rows[lost]["answers"][0])
    assert found.metric(*found.samples["onnx"]) == pytest.approx(1 - 1 / len(rows))
    text = questions.presentation.what_was_lost(found.report, {"name": "onnx"}, 5)
    assert "1 of" in text
    assert rows[lost]["answers"][0] in text


def test_baselines_are_chosen_and_read_again(questions, tmp_path):
    found = {}
    for name in questions.baselines:
        (tmp_path / name).mkdir()
        found[name] = fit_baseline(None, tmp_path / name, questions, name).metrics["validation"]["f1"]
        predictions = predict_stage(tmp_path / name, "sklearn", questions, 8)
        assert predictions.shape == (len(questions.data.splits["test"]), 5)
        assert np.isfinite(predictions).all()
    # The whole text is one sentence here; a word of it can be learnt.
    assert 0 < found["tfidf_sentence"] < 0.2 < 0.4 < found["tfidf_span"]


# ---- The chain


def test_the_files_of_the_recipe_are_read(monkeypatch):
    for name, speakers in (("bert_bbc_speakers", True), ("bert_squad", False)):
        monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(demo_config("question-answering").with_stem(name))])
        settings = read_settings("question-answering")
        assert settings.answer.quoted_speakers is speakers
    # What the demo says of its data is of no use to other data.
    monkeypatch.setattr(sys, "argv", ["recipe", "--dataset", "mine.json"])
    assert not read_settings("question-answering", demo_config("question-answering")).answer.quoted_speakers


@pytest.fixture(scope="module")
def chain(pretrained, tmp_path_factory) -> tuple[Path, str]:
    """A finished run, and what its command printed."""
    directory = tmp_path_factory.mktemp("chain")
    path, run = write_squad(directory / "questions.json", make_questions()), directory / "run"
    flags = f"""
        compress --task question-answering --dataset {path} --teacher_model {pretrained} --output_dir {run} --max_length 32 --overlap 8
        --teacher_epochs 10 --teacher_learning_rate 3e-3 --num_train_epochs 4 --learning_rate 3e-3 --per_device_train_batch_size 8
        --student_layers 1 --prune_steps 1 --prune_epochs 1 --prune_heads 0.25 --prune_ffn 0.25 --max_quality_drop 0.3 --use_cpu
        --benchmark_rounds 1 --benchmark_seconds 0.05 --web false --baselines false
    """.split()
    return run, run_here("pocketformers", *flags)


def test_the_whole_chain(chain):
    run, printed = chain
    report = json.loads((run / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert (report["task"], report["primary_metric"]) == ("question-answering", "f1")
    assert stages["teacher"]["metrics"]["f1"] > 0.8
    assert stages["quantized"]["metrics"]["f1"] > 0.6
    assert task_of_model(run / "pruned") == "question-answering"
    assert "exact match" in (run / "report.md").read_text()
    assert "pipeline_tag: question-answering" in (run / "README.md").read_text()
    assert "f1" in printed

    context = "the\r\nteam 🙂 with a market of e\u0301 the year"
    command = [sys.executable, str(run / "bundle" / "infer.py"), "--pair", "the price", context]
    predicted = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert predicted == load(run / "bundle")(("the price", context))
    assert predicted == load(run / "quantized")(("the price", context))
    assert predicted["answer"] == context[predicted["start"] : predicted["end"]] == "market"
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert line == f"market\t{predicted['score']:.4f}\t{predicted['start']}-{predicted['end']}\tthe price\n"


def odd_questions(tokenizer: Any) -> list[tuple[str, str]]:
    """With contexts of one window of 32 tokens: three are left of the question and the token that ends it."""
    contexts = odd_texts(tokenizer, 29)
    return [(("the price", "the match")[number % 2], context) for number, context in enumerate(contexts)]


def test_stock_transformers_finds_our_answers(chain):
    """In fp32: the logits of its model, and the spans that its pipeline for documents takes from them; that for texts is gone."""
    run, count = chain[0], 0
    tokenizer, model = (kind.from_pretrained(run / "pruned") for kind in (AutoTokenizer, AutoModelForQuestionAnswering))
    ours = load(run / "onnx")
    for question, context in odd_questions(tokenizer):
        inputs = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
        offsets = inputs.pop("offset_mapping")[0].tolist()
        with torch.inference_mode():
            found = model(**inputs)
        logits = found.start_logits.numpy(), found.end_logits.numpy()
        [window] = ours.predictor.logits((question, context))
        np.testing.assert_allclose(np.concatenate(logits), window, atol=1e-4)
        masked = np.array([[int(one != 1) for one in inputs.sequence_ids()]])
        masked[0, 0] = 0
        mask = inputs["attention_mask"].numpy()
        starts, ends, scores, none = select_starts_ends(*logits, masked, mask, 1e6, 1, True, 30)
        answer = ours((question, context))
        first, end = offsets[starts[0]][0], offsets[ends[0]][1]
        # A combining mark behind an answer is one of its characters for us alone.
        end += context[end:].startswith("\u0301")
        best = answer["answers"][0]
        assert (best["answer"], best["start"], best["end"]) == (context[first:end], first, end)
        assert best["score"] == pytest.approx(scores[0], abs=1e-4)
        assert answer["answer"] == ("" if none > scores[0] else context[first:end])
        count += bool(answer["answer"])
    assert 0 < 200 - count < count


@pytest.mark.packages
def test_transformers_js_finds_our_answers(chain, tokenizer, tmp_path):
    """It always has an answer, no places in the text, and no answer begins or ends with an unknown token, which take no part in the softmax."""
    questions, whole, ours = odd_questions(tokenizer), 0, load(chain[0] / "onnx")
    presentation = QuestionAnswering.presentation
    answer = "(answer, [question, context]) => answer(question, context)"
    rows = in_node(chain[0], presentation, tmp_path, "question-answering", answer, questions)
    for (question, context), theirs in zip(questions, rows, strict=True):
        numbers = np.array(tokenizer(question, context)["input_ids"])
        [window] = ours.predictor.logits((question, context))
        left_out = np.isin(numbers, tokenizer.all_special_ids) | (np.arange(len(numbers)) < 4)
        left_out[0] = False
        start, end = softmax(np.where(left_out, -np.inf, window), axis=-1)
        start[0] = end[0] = 0
        both = np.triu(start[:, None] * end)
        first, last = np.unravel_index(both.argmax(), both.shape)
        assert theirs["answer"] == tokenizer.decode(numbers[first : last + 1], skip_special_tokens=True)
        assert theirs["score"] == pytest.approx(both.max(), abs=1e-4)
        best = ours((question, context))["answers"][0]["answer"]
        whole += theirs["answer"] == tokenizer.decode(tokenizer(best)["input_ids"], skip_special_tokens=True)
        if not left_out[4:-1].any():
            assert theirs["score"] == pytest.approx(ours((question, context))["answers"][0]["score"], abs=1e-4)
    assert whole > 150
