"""Questions, contexts and answers: read in the forms that they are kept in, checked, and split by context."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar

import datasets
import numpy as np
import pyarrow.parquet

from pipelines.core.config import Checked, DataConfig, flag
from pipelines.core.errors import InputError, reason
from pipelines.data.documents import documents_of, load_texts
from pipelines.data.examples import Examples, Given, check_no_classes, hash_of, split_examples, usable_rows
from pipelines.data.folders import load_source
from pipelines.data.kinds import Source
from pipelines.data.objects import json_lines, rows_of_columns, whole_characters
from pipelines.data.references import parse_cell
from pipelines.data.splits import choose_splits, tell_of_equal
from pipelines.data.tables import JSON_SUFFIXES, open_text, read_table
from pipelines.data.text import TEXTS
from pipelines.tasks.question_answering.speakers import questions_of_speakers

logger = logging.getLogger(__name__)

COLUMNS = datasets.Features(
    {
        "question": datasets.Value("string"),
        "context": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "starts": datasets.List(datasets.Value("int64")),
        "label": datasets.Value("int64"),
    }
)


@dataclass
class AnswerConfig(Checked):
    question_column: str = flag("question", "The column with the question.")
    context_column: str = flag("context", "The column with the text that the answer is a part of.")
    answer_column: str | None = flag(
        None,
        "The column with the answers, of SQuAD's form {text, answer_start}, or with the one answer, a text; empty where there is none. Left "
        "out: 'answers', else 'answer'.",
    )
    start_column: str = flag(
        "start",
        "The column with the character of the context, counted from 0, at which an answer begins that is a text.",
    )
    overlap: Annotated[int | None, "at least 0"] = flag(
        None,
        "Tokens that a window of a context that is longer than --max_length shares with the one before. Left out: a quarter of --max_length.",
    )
    max_answer_tokens: Annotated[int, "at least 1"] = flag(30, "No answer that is found has more tokens.")
    quoted_speakers: bool = flag(
        False,
        "Make questions of plain texts (--dataset as for text-generation): who said what a text quotes. For demonstrations.",
    )

    OF_DATA: ClassVar = ("quoted_speakers", "max_answer_tokens", "overlap")  # for parse_config()


Row = dict[str, Any]  # question, context, answers (texts), starts (characters)

NO_ANSWER = "is_impossible"  # SQuAD's name for it
# Its values in lower case: of json, of tables, and the numbers that pandas makes of a column with gaps.
TRUTH = dict.fromkeys(("true", "yes", "1", "1.0"), True) | dict.fromkeys(
    ("false", "no", "0", "0.0", "none", "nan", ""), False
)


# ---- Forms


def read_file(path: Path, config: DataConfig, settings: AnswerConfig) -> datasets.Dataset:
    """The rows of a file, with SQuAD's nested ones (data, paragraphs, qas) as rows of their own."""
    name = path.name.lower()
    if not name.endswith((".parquet", *JSON_SUFFIXES)):
        columns = [settings.question_column, settings.context_column, settings.answer_column or "answer"]
        named: dict[str, Any] = dict(zip(("text_column", "text_pair_column", "label_column"), columns, strict=True))
        read = replace(config, **named, image_column=settings.start_column)
        read.more_label_columns = [NO_ANSWER] if settings.answer_column else [NO_ANSWER, "answers"]
        cells = read_table(path, read)
        return _table(cells.to_list(), cells.column_names, settings, cells.info.description)
    try:
        if name.endswith(".parquet"):
            table = pyarrow.parquet.read_table(path)
            table.validate(full=True)  # nobody has looked at the bytes of its texts yet
            wanted = [one for one in table.column_names if one in columns_of(settings)]
            return _table(table.select(wanted).to_pylist(), table.column_names, settings)
        with closing(open_text(path, config)) as file:
            try:
                found = json.load(file)
            except ValueError:  # an object on every line
                file.seek(0)
                found = list(json_lines(file))
        rows = _flat(whole_characters(found), settings)
        return _table(rows, [*dict.fromkeys(chain.from_iterable(rows))], settings)
    except InputError:
        raise
    except Exception as error:  # parsers raise errors of their own kinds
        raise InputError(
            f"expected a file of questions in {path}, as SQuAD has them or with an object of the same kind for every row, found that it cannot "
            f"be read ({reason(error)}). Repair or convert it."
        ) from error


def _flat(found: Any, settings: AnswerConfig) -> list[Row]:
    """The questions of what a json file holds as rows."""
    rows = found.get("data", found) if isinstance(found, dict) else found
    if isinstance(rows, dict) and isinstance(rows.get(settings.question_column), list | dict):
        rows = rows_of_columns(rows)
    column = settings.answer_column or "answers"
    flat: list[Row] = []
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, dict):
            raise ValueError(f"{row!r:.80} is no object")
        if "paragraphs" not in row:
            flat.append(row)
            continue
        try:
            for paragraph in row["paragraphs"]:
                for question in paragraph["qas"]:
                    named = {
                        settings.question_column: question["question"],
                        settings.context_column: paragraph["context"],
                        NO_ANSWER: question.get(NO_ANSWER),
                    }
                    flat.append({**named, column: _columns_of(question.get("answers") or [])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                "its paragraphs need a context and qas, these a question and answers, and these a text and an answer_start: "
                f"{row!r:.80} has not all of them"
            ) from error
    return flat


def columns_of(settings: AnswerConfig) -> list[str]:
    """All columns that are read, where they are there."""
    return [
        settings.question_column,
        settings.context_column,
        settings.start_column,
        NO_ANSWER,
        *_answer_columns(settings),
    ]


def _table(rows: list[Row], names: list[str], settings: AnswerConfig, description: str = "") -> datasets.Dataset:
    """Rows, of which each may have its own keys and form of answers, in one form, whatever file they are from: shards are joined.

    Columns that nobody named have nothing but their names, as in read_table().
    """
    answers = next((name for name in _answer_columns(settings) if name in names), "")
    text = datasets.Value("string")
    kinds = {
        settings.question_column: text,
        settings.context_column: text,
        NO_ANSWER: text,
        answers: {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int64"))},
    }
    columns: dict[str, list[Any]] = {name: [None] * len(rows) for name in names}
    for name in columns.keys() & {settings.question_column, settings.context_column}:
        columns[name] = [row[name] if isinstance(row.get(name), str) else None for row in rows]
    if NO_ANSWER in columns:
        columns[NO_ANSWER] = [str(row.get(NO_ANSWER)) for row in rows]
    if answers in columns:
        columns[answers] = [_answers(row, settings) for row in rows]
    features = datasets.Features({name: kinds.get(name, datasets.Value("null")) for name in names})
    info = datasets.DatasetInfo(description=description, features=features)
    return datasets.Dataset.from_dict(columns, features, info)


def _columns_of(answers: list[Row]) -> Row:
    return {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}


def rows_of(split: datasets.Dataset, name: str, settings: AnswerConfig) -> Iterator[Row]:
    """The rows of a split of the source in one form, without answers where it is said that there is none."""
    wanted = [settings.question_column, settings.context_column]
    if any(one not in split.column_names for one in wanted):
        raise InputError(
            f"expected the columns {', '.join(wanted)} in the split {name!r}, found {', '.join(split.column_names[:20])}. Name them with "
            "--question_column and --context_column."
        )
    for number, row in enumerate(split):
        if (impossible := TRUTH.get(str(row.get(NO_ANSWER)).strip().lower())) is None:
            raise InputError(
                f"expected true or false in the column {NO_ANSWER!r} of the split {name!r}, found {row[NO_ANSWER]!r} in row {number}, counted "
                "from 0. Write one of the two, or leave the column out."
            )
        question, context = (row[one] if isinstance(row[one], str) else "" for one in wanted)
        answers = _answers({} if impossible else row, settings)
        yield {"question": question, "context": context, "answers": answers["text"], "starts": answers["answer_start"]}


def _answer_columns(settings: AnswerConfig) -> list[str]:
    """The columns that may have the answers of a row: the first that is there and not empty has them."""
    return [settings.answer_column] if settings.answer_column else ["answers", "answer"]


def _answers(row: Row, settings: AnswerConfig) -> Row:
    """The answers of a row, whatever their form, as two lists of one length where nothing is wrong: text and answer_start."""
    cell = next((row[name] for name in _answer_columns(settings) if row.get(name) is not None), None)
    if isinstance(cell, str) and "answer_start" in cell:  # SQuAD's form in a table
        cell = parse_cell(cell)
    if isinstance(cell, list) and all(isinstance(one, dict) for one in cell):
        cell = {name: [one.get(name) for one in cell] for name in ("text", "answer_start")}
    if not isinstance(cell, dict):
        cell = {"text": cell, "answer_start": row.get(settings.start_column)}
    given, starts = (one if isinstance(one, list) else [one] for one in map(cell.get, ("text", "answer_start")))
    texts = ["" if one is None else str(one) for one in given]
    if not any(text.strip() for text in texts):  # there is no answer, wherever it begins
        texts, starts = [], []
    return {"text": texts, "answer_start": [_number(one) for one in starts]}


def _number(cell: Any) -> int:
    """A whole number, also as pandas writes one in a column with gaps (4.0); -1 where there is none."""
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return -1
    return int(number) if number.is_integer() else -1


# ---- Checks and splits


def problem_of(row: Row) -> str | None:
    """What is wrong with a row, in a few words."""
    if not row["question"].strip() or not row["context"].strip():
        return "no question or no context"
    if len(row["answers"]) != len(row["starts"]):
        return f"{len(row['answers'])} answers with {len(row['starts'])} starts"
    for answer, start in zip(row["answers"], row["starts"], strict=True):
        if start < 0:
            return f"the answer {answer!r:.60} has no character at which it begins"
        found = row["context"][start : start + len(answer)]
        if found != answer or not answer.strip():
            return f"the answer {answer!r:.60} is not in the context at character {start}, where {found!r:.60} stands"
    return None


def load_questions(config: DataConfig, settings: AnswerConfig) -> Examples:
    """Questions in three splits, whose columns are those of COLUMNS; `label` is the number of the row. No context is in two of them.

    Splits that the data set has are used as in load_examples, missing ones are cut from the training split; of a context that is in
    several the questions in test stay, then those in validation. Within a split equal questions on a context stay once.

    Raises InputError for an answer that is not where its row says.
    """
    check_no_classes(config, "questions")
    source, tables = _read(config, settings)
    answered = [source.splits[name] for name, rows in tables.items() if any(row["answers"] for row in rows)]
    roles = choose_splits(source.splits, config, lambda split: any(split is one for one in answered))
    given, dropped = {}, {}
    for role, name in roles.items():
        if name is not None:
            _check_starts(tables[name], name, source.splits[name].column_names, settings)
            rows = _usable(tables[name], name, config)
            given[role], dropped[name] = _contexts(rows, name), len(tables[name]) - len(rows)
    unlimited = replace(config, max_train_samples=None, max_eval_samples=None)  # which are limits of questions
    details = source.details | ({"rows_dropped": dropped} if any(dropped.values()) else {})
    return _questions_of(split_examples(given, unlimited, "contexts", details), config)


def _read(config: DataConfig, settings: AnswerConfig) -> tuple[Source, dict[str, list[Row]]]:
    """The data set, and the rows of each of its splits."""
    if settings.quoted_speakers:
        source = load_texts(config)
        texts = {name: documents_of(split, name, config, None) for name, split in source.splits.items()}
        return source, {name: questions_of_speakers(found) for name, found in texts.items()}
    kind = replace(TEXTS, noun="questions", columns={}, read_file=partial(read_file, settings=settings))
    named = replace(config)
    named.more_label_columns = columns_of(settings)
    source = load_source(named, kind)
    return source, {name: list(rows_of(split, name, settings)) for name, split in source.splits.items()}


def _questions_of(contexts: Examples, config: DataConfig) -> Examples:
    """The questions on the contexts of each split, as many as the limits of `config` let be."""
    splits, content = {}, hashlib.sha256()
    for role, split in contexts.splits.items():
        rows = [row for questions in split["questions"] for row in json.loads(questions)]
        rows = rows[: config.max_train_samples if role == "train" else config.max_eval_samples]
        content.update(json.dumps([role, rows], sort_keys=True).encode())
        numbered = [{**row, "label": number} for number, row in enumerate(rows)]
        splits[role] = datasets.Dataset.from_list(numbered, features=COLUMNS)
    details = {
        **contexts.details,
        "questions": {role: len(split) for role, split in splits.items()},
        "unanswerable": {role: sum(not one for one in split["answers"]) for role, split in splits.items()},
        "contexts": {role: len(set(split["context"])) for role, split in splits.items()},
    }
    details["contexts_in_several_splits"] = sum(details.pop("duplicates_removed").values())
    del details["examples"], details["conflicting_labels"]
    return Examples(datasets.DatasetDict(splits), details, content.hexdigest())


def _check_starts(rows: list[Row], name: str, columns: list[str], settings: AnswerConfig) -> None:
    """Where no answer has a start, it is the column that is wrong, not each row."""
    starts = [row["starts"] for row in rows if row["answers"]]
    if starts and all(start < 0 for start in chain.from_iterable(starts)):
        raise InputError(
            f"expected the character at which an answer begins in the column {settings.start_column!r} of the split {name!r}, or as answer_start "
            f"beside the answer's text, found none for {len(starts)} questions with answers (the columns: {', '.join(columns[:20])}). Name the "
            "column with --start_column."
        )


def _usable(rows: list[Row], name: str, config: DataConfig) -> list[Row]:
    """The rows with nothing wrong, an answer in one of them; others raise InputError unless --missing drop leaves them out."""
    problems = [problem_of(row) for row in rows]
    why = next((f"; the first: {problem}" for problem in problems if problem), "")
    good = np.array([problem is None for problem in problems], bool)
    what = "a question, a context and answers that are parts of it"
    usable = [rows[number] for number in usable_rows(good, what, name, config, why)]
    if not any(row["answers"] for row in usable):
        raise InputError(
            f"expected questions with an answer in the split {name!r}, found none among {len(usable)}. Name the column of answers with "
            "--answer_column, or another split."
        )
    return usable


def _contexts(rows: list[Row], name: str) -> Given:
    """The contexts of a split as its examples, each with the rows of its questions as json; of equal questions the first."""
    found: dict[int, dict[str, Row]] = {}
    others = 0
    for row in rows:
        key = hash_of(" ".join(row["context"].split()).encode())
        first = found.setdefault(key, {}).setdefault(" ".join(row["question"].split()), row)
        others += first["answers"] != row["answers"]
    tell_of_equal(len(rows) - sum(map(len, found.values())), len(rows), 0, f"questions of the split {name!r}")
    if others:
        logger.warning(
            "%d of these have other answers than the first of their kind, which are left out; write all answers to a question into one row, as "
            "SQuAD does",
            others,
        )
    questions = {"questions": [json.dumps([*one.values()]) for one in found.values()]}
    hashes = np.fromiter(found, np.uint64, len(found)).repeat(2).reshape(-1, 2)
    return Given(name, datasets.Dataset.from_dict(questions), hashes, np.zeros(len(found), np.int64))
