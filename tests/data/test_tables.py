"""Tables and folders as people have them: separators, encodings, quotation marks, types, missing cells, what lies beside the data."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow.parquet
import pytest

from conftest import write_image_folder
from pipelines.core.config import DataConfig, LanguageConfig
from pipelines.core.errors import InputError
from pipelines.data.documents import load_documents
from pipelines.data.encodings import encoding_of
from pipelines.data.examples import Examples, load_examples
from pipelines.data.images import IMAGES
from pipelines.data.kinds import Kind
from pipelines.data.references import read_classes, read_scores
from pipelines.data.remembered import state_of
from pipelines.data.tables import read_table
from pipelines.data.text import TEXTS

ROWS = [(f"text number {row} says something", ("sport", "art")[row % 2]) for row in range(40)]
PLAIN = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(path: Path, content: str | bytes | None = None, kind: Kind = TEXTS, **settings: Any) -> Examples:
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_examples(DataConfig(dataset=str(path), **settings), kind, read_classes)


def found(data: Examples) -> set[tuple[str, str]]:
    return {(row["text"], data.label_names[row["label"]]) for split in data.splits.values() for row in split}


def with_labels(labels: list[Any]) -> str:
    return "text,label\n" + "".join(f"text {row},{labels[row % len(labels)]}\n" for row in range(40))


# ---- One table, written in many ways

QUOTED = "".join(f'"{text}"\t"{label}"\n' for text, label in ROWS)
WRITTEN: dict[str, tuple[bytes, str | None]] = {
    "tabs.csv": (PLAIN.replace(",", "\t").encode(), "separator '\\t'"),
    "pipes.csv": (PLAIN.replace(",", "|").encode(), "separator '|'"),
    "excel.csv": (b"sep=;\r\n" + PLAIN.replace(",", ";").replace("\n", "\r\n").encode(), "separator ';'"),
    "commas.tsv": (PLAIN.encode(), "separator ','"),
    "unicode_text.csv": (PLAIN.replace(",", "\t").encode("utf-16"), "encoding utf-16, separator '\\t'"),
    "big_endian.csv": (PLAIN.encode("utf-16-be"), "encoding utf_16_be"),
    "mark.csv": (PLAIN.encode("utf-8-sig"), None),
    "macintosh.csv": (PLAIN.replace("\n", "\r").encode(), None),
    "names.csv": (PLAIN.replace("text,label", ' "text" , label ', 1).encode(), None),
    "spaces.csv": (PLAIN.replace(",", ", ").encode(), None),
    "ends.csv": (PLAIN.replace("\n", ",\n").replace("label,", "label", 1).encode(), None),
    "all_quoted.tsv": (('"text"\t"label"\n' + QUOTED).encode(), None),
    "from_r.csv": (
        ('"text","label"\n' + "".join(f'"{i}","{text}","{label}"\n' for i, (text, label) in enumerate(ROWS))).encode(),
        None,
    ),
    "write_table.csv": (
        ('"text" "label"\n' + "".join(f'"{i}" "{text}" "{label}"\n' for i, (text, label) in enumerate(ROWS))).encode(),
        "separator ' '",
    ),
    "packed.csv.gz": (gzip.compress(PLAIN.encode()), None),
    "nested.json": (
        json.dumps({"version": 2, "rows": [{"text": t, "label": n, "more": {}} for t, n in ROWS]}).encode(),
        None,
    ),
    **{
        f"{orient}.json": (pandas.DataFrame(ROWS, columns=["text", "label"]).to_json(orient=orient).encode(), None)
        for orient in ("table", "columns")
    },
    "doccano.jsonl": ("".join(json.dumps({"text": t, "label": [n]}) + "\n" for t, n in ROWS).encode(), None),
    "lists.json": (json.dumps(dict(zip(("text", "label"), zip(*ROWS, strict=True), strict=True))).encode(), None),
    "keys.jsonl": (
        "".join(
            json.dumps({"label": n, "text": t} | ({"x": [1]} if n == "art" else {"x": "y"})) + "\n" for t, n in ROWS
        ).encode(),
        None,
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_same_rows_however_they_are_written(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content, note = WRITTEN[name]
    data = load(tmp_path / name, content)
    assert found(data) == set(ROWS)
    assert data.details.get("read_as") == (note and {note: 1})
    assert (note or "") in caplog.text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("the tickets cost £5 – and that’s all", "cp1252"),
        ("Zażółć gęślą jaźń, proszę mi powiedzieć, gdzie są książki", "cp1250"),
        ("Матч закончился победой хозяев поля сегодня вечером", "cp1251"),
        ("これは日本語のテキストです。新しいニュースを読みます。", "cp932"),
        ("Der neue Drucker wurde schnell geliefert – größer als gedacht, für 5 €", "cp1252"),
        ("Não gostei, a entrega atrasou e não funciona, péssima solução", "cp1252"),
        ("Die Qualität ist „völlig“ in Ordnung, größer", "mac_roman"),
        ("Výrobek je velmi dobrý, rychlé dodání, děkuji, příště zase", "cp1250"),
        ("Nagyon jó termék, gyors szállítás, tökéletes űrhajó, rossz minőség", "cp1250"),
        ("Zła jakość, nie działa, odesłałem książkę", "iso8859_2"),
        ("ürün güzel, kargo hızlı geldi, değil mi, teşekkürler", "cp1254"),
        ("המוצר טוב מאוד והמשלוח מהיר תודה", "cp1255"),
        ("хороший товар, быстрая доставка, всем рекомендую", "koi8_r"),
        ("배송이 아주 빠르고 제품이 좋아요 감사합니다", "cp949"),
        ("这个产品很好，快递很快，值得购买", "gb18030"),
    ],
)
def test_encodings_are_found_or_named(text: str, encoding: str, tmp_path: Path) -> None:
    content = "text,label\n" + "".join(f'"{text} {row}",{"ab"[row % 2]}\n' for row in range(40))
    data = load(tmp_path / "texts.csv", content.encode(encoding))
    assert data.details["read_as"] == {f"encoding {encoding}": 1}
    assert f"{text} 0" in {text for text, _ in found(data)}
    named = load(tmp_path / "texts.csv", encoding="cp437")
    assert named.details["read_as"] == {"encoding cp437": 1}
    assert named.fingerprint != data.fingerprint


def test_utf_8_may_be_named_and_have_a_mark(tmp_path: Path) -> None:
    data = load(tmp_path / "texts.csv", PLAIN.encode("utf-8-sig"), encoding="UTF-8")
    assert found(data) == set(ROWS)
    assert "read_as" not in data.details


def test_a_file_that_is_almost_utf_8_is_refused(tmp_path: Path) -> None:
    content = "".join(f"naïve café {row},{'ab'[row % 2]}\n" for row in range(40)).encode()
    with pytest.raises(InputError, match="one encoding in .* found bytes in 1 lines .* beside 40 lines .* --encoding"):
        load(tmp_path / "texts.csv", b"text,label\n" + content + b"caf\xc3,a\n")


@pytest.mark.parametrize("line", [1, 12_000])
@pytest.mark.parametrize(
    "text",
    ['"the new chip, said %d', 'he said "no", %d times', '"%d', "one\ttab and %d"],
)
def test_no_row_vanishes_for_a_quotation_mark(text: str, line: int, tmp_path: Path) -> None:
    for separator, name in (("\t", "texts.tsv"), ("|", "texts.csv")):
        if separator in text:
            continue
        rows = [f"text {row}" for row in range(12_050)]
        rows[line], rows[line + 20] = text % 1, text % 2
        content = "".join(f"{row}{separator}{'ab'[i % 2]}\n" for i, row in enumerate(rows))
        (tmp_path / name).write_text(f"text{separator}label\n{content}")
        assert read_table(tmp_path / name, DataConfig())["text"][:] == rows


def test_a_table_whose_quotation_marks_do_not_pair_says_how_it_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a table of one column, the lines of a quoted text would else become rows without a word."""
    content = "text\n" + "".join(f'"one {row}\nand more"\n' for row in range(40)).replace("one 7", 'the "one" 7')
    (tmp_path / "texts.csv").write_text(content)
    data = load_documents(DataConfig(dataset=str(tmp_path / "texts.csv")), LanguageConfig())
    assert "texts.csv is read with quotation marks as characters" in caplog.text
    assert [*data.details["read_as"].values()] == [1]


@pytest.mark.parametrize("columns", [["text", "label"], ["label", "text"], ["text", "note", "label"]])
@pytest.mark.parametrize("labels", [("sport", "art"), ("1.25", "-0.5")])
def test_a_quoted_cell_that_swallows_rows_is_named(
    columns: list[str], labels: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second mark stands where a cell may end: as far as csv goes, all is well."""
    texts = [f"text {row}" for row in range(40)]
    texts[10], texts[20] = '"text 10', 'text 20"'
    cells = [{"text": text, "label": labels[row % 2], "note": f"x{row}"} for row, text in enumerate(texts)]
    lines = [",".join(row[name] for name in columns) for row in [{name: name for name in columns}, *cells]]
    (tmp_path / "texts.csv").write_text("\n".join(lines))
    read_table(tmp_path / "texts.csv", DataConfig())
    [said] = [message for message in caplog.messages if "seems to hold whole rows" in message]
    assert "begins in line 12" in said
    assert "text 11" in said


def test_a_cell_of_several_lines_with_separators_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    letters = [
        "Dear Ann, hello\nso it goes, and on\nsport\nyours, Bob",
        "half art,sport\nand more",
        "a, art\nb, sport\nc, art",
    ]
    rows = [{"text": f"{letters[row % 3]} {row}", "label": ("sport", "art")[row % 2]} for row in range(40)]
    for columns in (["text", "label"], ["label", "text"]):
        pandas.DataFrame(rows)[columns].to_csv(tmp_path / "letters.csv", index=False)
        assert read_table(tmp_path / "letters.csv", DataConfig())["text"][:] == [row["text"] for row in rows]
    rows[3]["label"] = None  # of which the lines of a poem are not taken for a row
    rows[5]["text"] = "Roses are red,\nViolets are blue,\nSugar is sweet,\nAnd so are you"
    pandas.DataFrame(rows).to_csv(tmp_path / "poem.csv", index=False)
    assert len(read_table(tmp_path / "poem.csv", DataConfig())) == 40
    assert not caplog.messages


def test_the_tab_text_of_excel_is_quoted_where_it_must_be(tmp_path: Path) -> None:
    cells = [f'"he ""said"" {row}"' if row % 7 == 0 else f"text {row}" for row in range(40)]
    data = load(tmp_path / "a.tsv", "text\tlabel\r\n" + "".join(f"{c}\t{'ab'[i % 2]}\r\n" for i, c in enumerate(cells)))
    assert {text for text, _ in found(data)} == {cell.strip('"').replace('""', '"') for cell in cells}


def test_cells_over_several_lines_and_rows_of_other_lengths(tmp_path: Path) -> None:
    cell = 'one "line",\nand another'
    doubled = cell.replace('"', '""')
    content = "text,label\n" + "".join(f'"{doubled} {row}",{"ab"[row % 2]}\n' for row in range(40))
    assert {text for text, _ in found(load(tmp_path / "texts.csv", content))} == {f"{cell} {row}" for row in range(40)}
    tabs = "text\tlabel\n" + "".join(f'"one ""line""\nand {row}"\t{"ab"[row % 2]}\n' for row in range(40))
    assert ('one "line"\nand 0', "a") in found(load(tmp_path / "texts.tsv", tabs))
    escaped = "text,label\n" + "".join(f'"say \\"no\\", {row}",{"ab"[row % 2]}\n' for row in range(40))
    assert ('say "no", 0', "a") in found(load(tmp_path / "escaped.csv", escaped))
    # What an editor cut off at the end of a line is an empty cell; a cell too many is an error.
    short = PLAIN.replace("label\n", "label,note\n") + "and one more,art,checked\n"
    assert found(load(tmp_path / "short.csv", short)) == {*ROWS, ("and one more", "art")}
    with pytest.raises(InputError, match="well-formed csv.*Expected 2 fields in line 42, saw 3.*--separator"):
        load(tmp_path / "long.csv", PLAIN + "hello, world,art\n")


def test_other_columns_are_in_nobodys_way(tmp_path: Path) -> None:
    rows = [f'text {row},{"ab"[row % 2]},{"" if row < 10_020 else "checked"},"x"' for row in range(10_050)]
    data = load(tmp_path / "late.csv", "text,label,note,note\n" + "\n".join(rows))
    assert sum(data.details["examples"].values()) == 10_050
    lines = [
        json.dumps({"text": text, "label": label, "meta": n if n else None}) for n, (text, label) in enumerate(ROWS)
    ]
    lines += [json.dumps({"text": "last", "label": "art", "meta": {"deep": ["x"]}})]
    assert len(found(load(tmp_path / "late.jsonl", "\n".join(lines)))) == 41
    frame = pandas.DataFrame(ROWS, columns=["text", "label"])
    frame["label"] = frame["label"].astype("category")
    frame["when"], frame["kind"] = pandas.Timestamp(2020, 1, 1), pandas.Categorical(["x"] * 40)
    frame.to_parquet(tmp_path / "categories.parquet")
    assert found(load(tmp_path / "categories.parquet")) == set(ROWS)
    with pytest.raises(InputError, match=r"the columns 'text', 'label', 'note', 'note'.*|found the columns .*'note'"):
        load(tmp_path / "late.csv", text_column="body")
    with pytest.raises(InputError, match="one column 'label' in .*, found several"):
        load(tmp_path / "twice.csv", PLAIN.replace("text,label", "label,label", 1))


def test_a_table_without_a_header_or_with_another_separator_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="found the columns 'text number 0 says something', 'sport'.*first line of a table"
    ):
        load(tmp_path / "rows.csv", PLAIN.split("\n", 1)[1])
    content = PLAIN.replace(",", "#")
    with pytest.raises(InputError, match="'text#label'.*--separator"):
        load(tmp_path / "texts.csv", content)
    assert found(load(tmp_path / "texts.csv", separator="#")) == set(ROWS)
    with pytest.raises(InputError, match="one character as --separator"):
        DataConfig(separator="::")
    with pytest.raises(InputError, match="as --encoding"):
        DataConfig(encoding="latin-13")
    assert DataConfig(separator="\\t").separator == "\t"


# ---- Classes and scores


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["007", "10", "9"], ["007", "9", "10"]),
        ([-2, 0, 2, -1], ["-2", "-1", "0", "2"]),
        (["1.0", "0.0"], ["0", "1"]),
        (["1.0", "1", "2b"], ["1", "2b"]),
        (["True", "False"], ["False", "True"]),
        (["NaN", "None"], ["NaN", "None"]),
        (["2020-01-01", "2019-12-31"], ["2019-12-31", "2020-01-01"]),
    ],
)
def test_classes_are_called_what_stands_in_the_file(labels: list[Any], names: list[str], tmp_path: Path) -> None:
    assert load(tmp_path / "texts.csv", with_labels(labels)).label_names == names
    rows = [{"text": f"text {row}", "label": labels[row % len(labels)]} for row in range(40)]
    assert load(tmp_path / "texts.jsonl", "\n".join(map(json.dumps, rows))).label_names == names
    if len({type(label) for label in labels}) == 1:
        pandas.DataFrame(rows).to_parquet(tmp_path / "texts.parquet")
        assert load(tmp_path / "texts.parquet").label_names == names


@pytest.mark.parametrize("labels", [["Sport", "sport ", "sport"], ["1", "01"], ["caf\u00e9", "cafe\u0301", "bar"]])
def test_classes_that_look_alike_are_named(labels: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load(tmp_path / "texts.csv", with_labels(labels))
    assert set(data.label_names) == set(labels)
    assert all((repr(label) in caplog.text) == (label != "bar") for label in labels)
    assert "Unicode" in caplog.text


def test_classes_called_like_lists_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = "text,label\n" + "".join(f"text {row},\"['a', '{'bc'[row % 2]}']\"\n" for row in range(40))
    assert load(tmp_path / "texts.csv", content).label_names == ["['a', 'b']", "['a', 'c']"]
    assert "--task multi-label-classification" in caplog.text


def test_no_label_is_what_a_class_label_says(tmp_path: Path) -> None:
    rows = {"text": [f"text {row}" for row in range(40)], "label": [(0, 1, -1)[row % 3] for row in range(40)]}
    assert load(tmp_path / "texts.csv", with_labels(rows["label"])).label_names == ["-1", "0", "1"]
    declared = datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    declared.to_parquet(tmp_path / "declared.parquet")
    with pytest.raises(InputError, match="13 of 40 rows without one"):
        load(tmp_path / "declared.parquet")
    assert load(tmp_path / "declared.parquet", missing="drop").details["rows_dropped"] == {"train": 13}


def test_scores_are_the_numbers_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text(with_labels(["-1", " 2.5", "1e1", "0"]))
    data = load_examples(DataConfig(dataset=str(tmp_path / "scores.csv")), TEXTS, read_scores)
    assert {score for split in data.splits.values() for score in split["label"]} == {-1, 2.5, 10, 0}
    (tmp_path / "missing.csv").write_text(with_labels(["NA", "1", "2"]))
    config = DataConfig(dataset=str(tmp_path / "missing.csv"))
    with pytest.raises(InputError, match="14 of 40 rows"):
        load_examples(config, TEXTS, read_scores)
    config.missing = "drop"
    assert load_examples(config, TEXTS, read_scores).details["rows_dropped"] == {"train": 14}


@pytest.mark.parametrize(
    ("labels", "scores"), [(["3,5", "2", "0,125"], {3.5, 2, 0.125}), (["1,234", "2,000"], None), (["1,5", "2.5"], None)]
)
def test_a_decimal_comma_is_one_where_it_can_be_nothing_else(
    labels: list[str], scores: set[float] | None, tmp_path: Path
) -> None:
    rows = "".join(f"text {row};{labels[row % len(labels)]}\n" for row in range(42))
    (tmp_path / "comma.csv").write_text(f"text;label\n{rows}")
    config = DataConfig(dataset=str(tmp_path / "comma.csv"))
    if scores is None:
        with pytest.raises(InputError, match="a fraction has a point"):
            load_examples(config, TEXTS, read_scores)
    else:
        data = load_examples(config, TEXTS, read_scores)
        assert {score for split in data.splits.values() for score in split["label"]} == scores


def test_rows_without_a_text_or_label_are_named_or_left_out(tmp_path: Path) -> None:
    texts = ["  " if row == 3 else "" if row == 30 else text for row, (text, _) in enumerate(ROWS)]
    content = "text,label\n" + "".join(
        f"{text},{'' if row in (5, 30, 31) else label}\n"
        for row, (text, (_, label)) in enumerate(zip(texts, ROWS, strict=True))
    )
    with pytest.raises(InputError, match="a text in every row.* 2 of 40 .*: 3, 30.*--missing drop"):
        load(tmp_path / "texts.csv", content)
    data = load(tmp_path / "texts.csv", missing="drop")
    assert found(data) == {row for number, row in enumerate(ROWS) if number not in (3, 5, 30, 31)}
    assert data.details["rows_dropped"] == {"train": 4}
    with pytest.raises(InputError, match="--missing out of error, drop"):
        DataConfig(missing="ignore")
    with pytest.raises(InputError, match="40 of 40 rows"):
        load(tmp_path / "none.csv", "text,label\n" + ",a\n" * 40, missing="drop")


def test_numbers_in_the_text_column_are_texts(tmp_path: Path) -> None:
    pandas.DataFrame({"text": range(1000, 1040), "label": ["a", "b"] * 20}).to_parquet(tmp_path / "numbers.parquet")
    assert ("1000", "a") in found(load(tmp_path / "numbers.parquet"))


def test_what_databases_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = ["ab"[row % 2] if row % 20 else r"\N" for row in range(40)]
    rows = [rf'{row},"say \"no\", {row}",{label}' for row, label in enumerate(labels)]
    content = "id,text,label\n" + "\n".join(rows)
    with pytest.raises(InputError, match="a label in every row.* 2 of 40 "):
        load(tmp_path / "outfile.csv", content)
    data = load(tmp_path / "outfile.csv", missing="drop")
    assert found(data) == {(f'say "no", {row}', "ab"[row % 2]) for row in range(40) if row % 20}
    load(tmp_path / "words.csv", with_labels(["NULL", "x", "y"]))
    assert "'NULL' is called like a missing label" in caplog.text
    table = pyarrow.table({"text": pyarrow.array([text for text, _ in ROWS], pyarrow.string_view())})
    numbers = pyarrow.array([Decimal(row % 2) for row in range(40)], pyarrow.decimal128(38, 0))
    pyarrow.parquet.write_table(table.append_column("label", numbers), tmp_path / "numbers.parquet")
    assert load(tmp_path / "numbers.parquet").label_names == ["0", "1"]


@pytest.mark.parametrize("form", ["[%s\n]", "\n\n%s\n", "[\n%s]", " \n[%s]", '{"data": [%s]}'])
def test_where_the_lines_of_json_end_says_nothing(form: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    between = "\n" if form.startswith("\n") else "\n,"
    assert found(load(tmp_path / "texts.json", form % between.join(lines))) == set(ROWS)


@pytest.mark.parametrize(("first", "said"), [(1, False), (2007, True)])
def test_a_first_column_without_a_name_is_said_unless_it_counts_the_rows(
    first: int, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "".join(f"{first + number},{text},{label}\n" for number, (text, label) in enumerate(ROWS))
    for _ in range(2):  # the second time from its copy
        caplog.clear()
        assert found(load(tmp_path / "texts.csv", f"text,label\n{rows}")) == set(ROWS)
        assert ("the names of its rows in the first column, which has no name" in caplog.text) == said


def test_large_integers_beside_null_are_exact(tmp_path: Path) -> None:
    numbers = [2**53 + 1, None, 2**53]
    for name, columns in (("lists", numbers), ("columns", {str(row): one for row, one in enumerate(numbers)})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"text": columns, "label": columns}))
        assert read_table(tmp_path / f"{name}.json", DataConfig())["label"][:] == [str(2**53 + 1), None, str(2**53)]


@pytest.mark.parametrize("doubled", [False, True])
def test_only_what_escapes_a_quotation_mark_loses_its_backslash(doubled: bool, tmp_path: Path) -> None:
    texts = ['he said "no", 0', r"match \d+ and C:\new\9", r"\\server\share, or C:\\", "C:\\dir\\", "a \\"]
    texts += ["one\nline \\", r"\"", r"C:\,b", "plain"]
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        file.write("text,label\n")
        for text in texts:  # as Python and MySQL write it, or as Spark does
            cell = re.sub(r'["\\]' if doubled else r'"|\\(?=\\*("|$))', r"\\\g<0>", text)
            file.write(f'"{cell}",a\n')
        file.write("C:\\\\x,b\n" if doubled else "C:\\x,b\n")
    assert read_table(tmp_path / "texts.csv", DataConfig())["text"][:] == [*texts, r"C:\x"]


def test_half_of_an_emoji_is_no_character(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {row} 😀"}).replace("\\ude00", "") for row in range(3)]
    (tmp_path / "cut.jsonl").write_text("\n".join(lines))
    assert read_table(tmp_path / "cut.jsonl", DataConfig())["text"][:] == [f"text {row} ?" for row in range(3)]


def test_zip_archives_hold_one_table(tmp_path: Path) -> None:
    def pack(**files: str) -> Path:
        with zipfile.ZipFile(tmp_path / "texts.csv.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return tmp_path / "texts.csv.zip"

    assert found(load(pack(**{"__MACOSX/._texts.csv": "\0", "data/texts.csv": PLAIN}))) == set(ROWS)
    with pytest.raises(InputError, match="one file in .*, found train.csv, test.csv; unpack it"):
        load(pack(**{"train.csv": PLAIN, "test.csv": PLAIN}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts.csv", b"PK\3\4\x14\0\xf0\x96" * 20, "a spreadsheet, an archive or another binary file"),
        ("texts.csv", b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "git lfs pull"),
        ("texts.parquet", b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "git lfs pull"),
        ("texts.xlsx", b"PK\3\4", "convert it, rename it"),
        ("splits.json", b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}', r"several tables \(train, test\)"),
        (
            "texts.csv",
            (PLAIN + PLAIN).encode(),
            r"found them again in 1 rows .*counted from 0: 40\).*remove these rows",
        ),
        ("texts.json", b"[]", "expected rows in .*texts.json, found none"),
        ("texts.tsv", b"text\tlabel\nrow1\tone\ta\nrow2\ttwo\tb\n", "more cells than the header"),
    ],
)
def test_files_that_are_something_else(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path / name, content)


# ---- Folders


def test_class_folders_may_be_called_by_numbers_with_a_point(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["1.0", "1.1", "1.10", "1.2"]
    for number in range(80):
        file = tmp_path / "sections" / names[number % 4] / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text {number}")
    assert load(tmp_path / "sections").label_names == names
    assert not caplog.messages
    images = write_image_folder(tmp_path / "images", 60)
    for number, folder in enumerate(sorted(images.iterdir())):
        folder.rename(images / f"1.{number}")
    assert load(images, kind=IMAGES).label_names == ["1.0", "1.1", "1.2"]


def test_classes_of_a_table_that_look_like_fractions_need_a_letter(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"fractions such as 1\.1; .*--task text-regression.*a letter before .*, such as v1\.1"
    ):
        load(tmp_path / "versions.csv", with_labels(["1.1", "1.2"]))
    assert load(tmp_path / "versions.csv", with_labels(["v1.1", "v1.2"])).label_names == ["v1.1", "v1.2"]


def test_tables_where_none_belong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_classes(tmp_path / "data")
    (folder / "art" / "list.csv").write_text("a,b\n")
    assert found(load(folder)) == set(ROWS)
    assert "list.csv" in caplog.text
    for label in ("sport", "art"):
        (tmp_path / "parts" / f"label={label}").mkdir(parents=True)
        (tmp_path / "parts" / f"label={label}" / "0.csv").write_text("text\nx\n")
    with pytest.raises(InputError, match="nothing but tables in label=art .*after their splits"):
        load(tmp_path / "parts")
    load(tmp_path / "shared" / "train.csv", PLAIN)
    (tmp_path / "shared" / "test.csv").write_text("id,text\n1,x\n2,y\n")
    (tmp_path / "shared" / "test_labels.csv").write_text("id,label\n1,art\n2,sport\n")
    caplog.clear()
    assert load(tmp_path / "shared").details["came_from"]["test"] == "cut from split 'train'"
    assert "test_labels.csv" in caplog.text


# ---- Files named after splits within longer names


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("fashion-mnist_train.csv", "fashion-mnist_test.csv"),
        ("Corona_NLP_train.csv", "Corona_NLP_test.csv"),
        ("my reviews.Train.csv", "my reviews.Test.csv"),
        ("train_reviews.csv", "held_out_test1.csv"),
        ("news2020_training.csv", "test2017.csv"),
    ],
)
def test_a_split_may_be_named_within_a_longer_name(train: str, test: str, tmp_path: Path) -> None:
    load(tmp_path / "data" / train, PLAIN)
    data = load(tmp_path / "data" / test, PLAIN.replace("number", "test")).splits  # alone it is all there is
    assert sum(map(len, data.values())) == 40
    data = load(tmp_path / "data")
    assert data.details["examples"] == {"train": 36, "validation": 4, "test": 40}
    assert all(text.startswith("text test") for text in data.splits["test"]["text"])


def test_parts_of_a_split_have_one_name_and_others_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        load(tmp_path / "data" / f"train_news-{number}.csv", PLAIN.replace("number", f"part {number}"))
    load(tmp_path / "data" / "my_dev.csv", PLAIN.replace("number", "dev"))
    (tmp_path / "data" / "labels_of_dev.csv").write_text("id,label\n1,art\n")
    (tmp_path / "data" / "README.md").write_text("where these come from")
    caplog.clear()
    assert load(tmp_path / "data").details["examples"] == {"train": 72, "validation": 8, "test": 40}
    assert "README.md, labels_of_dev.csv" in caplog.text
    for name, message in [
        ("yelp_train.csv", "files of several for its train split: train_news-0.csv, .*yelp_train.csv; give a folder"),
        ("v2_dev.csv", "files of several for its validation split: my_dev.csv, v2_dev.csv"),
        ("more.csv", r"files named after their split .*, found more\.csv; rename"),
        ("the_train_test.csv", r"files named after their split .*, found the_train_test\.csv"),
        ("traincsv.csv", r"files named after their split .*, found traincsv\.csv"),
    ]:
        (tmp_path / "data" / name).write_text(PLAIN)
        with pytest.raises(InputError, match=message):
            load(tmp_path / "data")
        (tmp_path / "data" / name).unlink()


def test_two_versions_of_a_data_set_are_not_one(tmp_path: Path) -> None:
    for name in ("v1_train.csv", "v2_train.csv"):
        load(tmp_path / "data" / name, PLAIN.replace("number", name))
    with pytest.raises(InputError, match=r"files of several for its train split: v1_train\.csv, v2_train\.csv"):
        load(tmp_path / "data")


def test_two_files_of_one_split_with_names_of_their_own_are_two_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"multinli_1.0_{name}.csv" for name in ("train", "dev_matched", "dev_mismatched")]
    for name in names:
        load(tmp_path / "data" / name, PLAIN.replace("number", name))
    (tmp_path / "data" / "test_matched.csv").write_text("text,label\na,\nb,\n")  # hidden labels
    (tmp_path / "data" / "test_mismatched.csv").write_text("text,label\nc,\nd,\n")
    message = (
        "one validation split, found validation_matched and validation_mismatched; choose one with --validation_split"
    )
    with pytest.raises(InputError, match=message):
        load(tmp_path / "data")
    chosen = load(tmp_path / "data", validation_split="validation_matched", test_split="validation_mismatched")
    assert chosen.details["examples"] == {"train": 40, "validation": 40, "test": 40}
    assert all("dev_matched" in text for text in chosen.splits["validation"]["text"])
    assert "not used are the splits 'test_matched', 'test_mismatched'" in caplog.text
    for name in names[1:]:
        (tmp_path / "data" / name).rename(tmp_path / "data" / name.replace("dev_", "train_"))
    (tmp_path / "data" / names[0]).unlink()
    with pytest.raises(InputError, match="one train split, found train_matched and train_mismatched; .*--train_split"):
        load(tmp_path / "data")
    assert sum(load(tmp_path / "data", train_split="train_matched").details["examples"].values()) == 40


def test_shards_of_the_hub_are_one_split(tmp_path: Path) -> None:
    for number, content in enumerate(("b42a775f407cee45", "0c1d2e3f4a5b6c7d")):
        load(tmp_path / "data" / f"train-0000{number}-of-00002-{content}.csv", PLAIN.replace("number", content))
    assert sum(load(tmp_path / "data").details["examples"].values()) == 80


def test_a_longer_name_with_a_split_beside_class_folders_is_no_data_without_its_columns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_classes(tmp_path / "data")
    (folder / "list_of_test.csv").write_text("file\n01.txt\n")
    assert found(load(folder)) == set(ROWS)
    assert "list_of_test.csv" in caplog.text


def write_classes(folder: Path, prefix: str = "", inside: str = "") -> Path:
    for number, (text, label) in enumerate(ROWS):
        target = folder / label / (inside if number >= 30 else "") / f"{number:02}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(prefix + text)
    return folder


def test_shards_of_other_types_and_orders_are_joined(tmp_path: Path) -> None:
    def part(first: int, label: Any) -> pandas.DataFrame:
        return pandas.DataFrame({"text": [f"text {row}" for row in range(first, first + 20)], "label": label})

    part(0, 1).to_csv(tmp_path / "train-0.csv", index=False)
    part(20, 2.0).assign(extra="x").to_parquet(tmp_path / "train-1.parquet")
    part(40, "2b")[["label", "text"]].to_json(tmp_path / "train-2.jsonl", orient="records", lines=True)
    part(60, 1).to_json(tmp_path / "train-3.json", orient="records")
    data = load(tmp_path)
    assert data.label_names == ["1", "2", "2b"]
    assert len(found(data)) == 80


def test_splits_typed_differently_and_a_test_without_labels(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(with_labels(["0", "1"]))
    pandas.DataFrame({"text": ["x", "y"] * 10, "label": [1.0, 0.0] * 10}).to_parquet(tmp_path / "test.parquet")
    data = load(tmp_path)
    assert (data.label_names, data.details["came_from"]["test"]) == (["0", "1"], "split 'test'")
    (tmp_path / "test.parquet").unlink()
    (tmp_path / "test.csv").write_text("id,text\n1,x\n2,y\n")
    (tmp_path / "sample_submission.csv").write_text("id,label\n1,0\n")  # as competitions publish it
    assert load(tmp_path).details["came_from"]["test"] == "cut from split 'train'"


def test_what_desktops_and_our_own_runs_leave_in_a_folder_is_no_data(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "data", inside="more/of it")
    before, state = load(folder), state_of(str(folder))
    for name in (
        ".DS_Store",
        "Thumbs.db",
        "art/desktop.ini",
        "art/._00.txt",
        "__MACOSX/art/00.txt",
        "art/@eaDir/00.txt",
        "$RECYCLE.BIN/00.txt",
        "run/.pocketformers",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0")
    for stage in ("run/teacher", "student"):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "record.json").write_text("{}")
    assert state_of(str(folder)) == state
    data = load(folder)
    assert data.fingerprint == before.fingerprint
    assert found(data) == set(ROWS)


def test_tables_beside_class_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_classes(tmp_path / "data")
    (folder / "labels.tsv").write_text("number\tname\n0\tart\n")
    assert found(load(folder)) == set(ROWS)
    assert "labels.tsv" in caplog.text
    (folder / "labels.tsv").write_text(with_labels(["x", "y"]))
    caplog.clear()
    assert load(folder).label_names == ["x", "y"]
    assert "art, sport" in caplog.text


def test_folders_of_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_classes(tmp_path / "archive" / "Training")
    write_classes(tmp_path / "archive" / "Testing", prefix="another ")
    (tmp_path / "archive" / "single_prediction").mkdir()
    data = load(tmp_path)
    assert data.details["examples"] == {"train": 36, "validation": 4, "test": 40}
    assert "single_prediction" in caplog.text
    for split in ("train", "test"):
        for part in ("a", "b"):
            (tmp_path / "tables" / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / "tables" / split / f"{part}.csv").write_text(PLAIN.replace("number", split + part))
    assert load(tmp_path / "tables").details["examples"] == {"train": 72, "validation": 8, "test": 80}
    # A class may be called like a split.
    for name in ("train", "bus"):
        (tmp_path / "vehicles" / name).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "vehicles" / name / f"{number}.txt").write_text(f"{name} {number}")
    assert load(tmp_path / "vehicles").label_names == ["bus", "train"]
    write_classes(tmp_path / "deep" / "seg_train")
    write_classes(tmp_path / "deep" / "seg_test")
    with pytest.raises(InputError, match="no file in seg_test .*only the folders art, sport"):
        load(tmp_path / "deep")


def test_plain_files_in_folders_of_splits_are_those_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split, prefix in (("train", ""), ("Test", "another ")):
        (tmp_path / "books" / split).mkdir(parents=True)
        for number, (text, _) in enumerate(ROWS):
            (tmp_path / "books" / split / f"{number:02}.txt").write_text(prefix + text)
    (tmp_path / "books" / "val").mkdir()  # an empty one is none
    (tmp_path / "books" / "README.md").write_text("where these come from")
    for _ in range(2):
        data = load_documents(DataConfig(dataset=str(tmp_path / "books")), LanguageConfig())
        assert sorted(data.splits["test"]["text"]) == sorted(f"another {text}" for text, _ in ROWS)
        assert data.details["documents"] == {"train": 36, "validation": 4, "test": 40}
        with pytest.raises(InputError, match="a column 'label' in the split 'train'.*--label_column"):
            load(tmp_path / "books")
        (tmp_path / "books" / "notes").mkdir(exist_ok=True)
        (tmp_path / "books" / "notes" / "a.txt").write_text("what these are")
    assert "left out of the data set" in caplog.text
    assert "notes" in caplog.text


def test_a_class_may_be_called_like_what_python_hides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_classes(tmp_path / "data")
    (folder / "art").rename(folder / "__unknown__")
    (folder / ".cache").mkdir()
    (folder / "sport" / "__init__.py").write_text("")
    data = load(folder)
    assert data.label_names == ["__unknown__", "sport"]
    assert sum(data.details["examples"].values()) == 40
    assert "left out of the data set" in caplog.text
    assert ".cache" in caplog.text


def test_a_metadata_table_labels_the_images_beside_it(tmp_path: Path) -> None:
    images = write_image_folder(tmp_path / "images", 30)
    expected = load(images, kind=IMAGES)
    flat = tmp_path / "flat"
    flat.mkdir()
    lines = ["file_name,number,kind"]
    for file in sorted(images.rglob("*.png")):
        name = f"{file.parent.name}-{file.name}"
        file.rename(flat / name)
        lines.append(f"{name},1,{file.parent.name}")
    (flat / "metadata.csv").write_text("\n".join(lines))
    data = load(flat, kind=IMAGES, label_column="kind")
    assert (data.label_names, data.details["examples"]) == (expected.label_names, expected.details["examples"])
    with pytest.raises(InputError, match="a column 'label' in .*'image'.*--label_column"):
        load(flat, kind=IMAGES)
    for split, files in {"train": lines[1::2], "Test": lines[2::2]}.items():
        (tmp_path / "split" / split).mkdir(parents=True)
        for file in files:
            name = file.split(",")[0]
            (tmp_path / "split" / split / name).write_bytes((flat / name).read_bytes())
    rows = [f"train\\{row}" for row in lines[1::2]] + [f"Test/{row}" for row in lines[2::2]]
    (tmp_path / "split" / "metadata.csv").write_text("\n".join([lines[0], *rows]))
    split_data = load(tmp_path / "split", kind=IMAGES, label_column="kind")
    assert split_data.details["came_from"]["test"] == "split 'test'"
    # Or each split has a table of its own.
    (tmp_path / "split" / "metadata.csv").unlink()
    for split, files in {"train": lines[1::2], "Test": lines[2::2]}.items():
        rows = [{"file_name": name, "kind": kind} for name, _, kind in (file.split(",") for file in files)]
        (tmp_path / "split" / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("", "more"):
        (tmp_path / "split" / name).mkdir(exist_ok=True)
        assert load(tmp_path / "split", kind=IMAGES, label_column="kind").fingerprint == split_data.fingerprint
    (flat / lines[1].split(",")[0]).unlink()
    with pytest.raises(InputError, match="found 1 of them missing"):
        load(flat, kind=IMAGES, label_column="kind")


def test_a_metadata_table_without_labels_leaves_the_class_folders_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_image_folder(tmp_path / "images", 30)
    expected = load(images, kind=IMAGES)
    files = [str(file.relative_to(images)) for file in sorted(images.rglob("*.png"))]
    tables = {
        "metadata.csv": "file_name,width\n" + "".join(f"{file},8\n" for file in files),
        "metadata.jsonl": "".join(json.dumps({"file_name": file}) + "\n" for file in files),
    }
    for name, content in tables.items():
        caplog.clear()
        (images / name).write_text(content)
        data = load(images, kind=IMAGES)
        assert data.fingerprint == expected.fingerprint
        assert f"{name} has no labels and is left out" in caplog.text
        (images / name).unlink()
    (images / "metadata.csv").write_text("File_Name,label\n" + "".join(f"{file},x\n" for file in files))
    assert load(images, kind=IMAGES).fingerprint == expected.fingerprint
    assert "metadata.csv has no column 'file_name' and is left out (its columns: File_Name, label)" in caplog.text


def test_images_that_are_left_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = write_image_folder(tmp_path / "images", 30)
    files = [str(file.relative_to(images)) for file in sorted(images.rglob("*.png"))]
    (images / "beside.png").write_bytes((images / files[0]).read_bytes())
    load(images, kind=IMAGES)
    assert f"left out of the data set in {images}: beside.png\n" in caplog.text
    caplog.clear()
    rows = [f"./{file},{'ab'[row % 2]}" for row, file in enumerate(files[:-12])]
    (images / "metadata.jsonl").write_text("")
    (images / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    load(images, kind=IMAGES)
    said = caplog.text
    assert f"left out of the data set in {images}: beside.png, " in said
    assert files[-12] in said
    assert "and 4 more" in said
    (images / "beside.png").unlink()
    caplog.clear()
    rows += [f"{file},a" for file in files[-12:]]
    (images / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    load(images, kind=IMAGES)
    assert f"left out of the data set in {images}: metadata.jsonl\n" in caplog.text


def test_lines_are_documents_where_no_blank_lines_part_any(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lines.txt").write_bytes("\r\n".join(text for text, _ in ROWS).encode("utf-16"))
    data = load_documents(DataConfig(dataset=str(tmp_path / "lines.txt")), LanguageConfig())
    assert {text for split in data.splits.values() for text in split["text"]} == {text for text, _ in ROWS}
    assert data.details["read_as"] == {"encoding utf-16": 1}
    assert "--document_start" in caplog.text


def test_a_table_of_texts_alone_is_for_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text\n" + "".join(f'"{text}, and more"\n' for text, _ in ROWS))
    data = load_documents(DataConfig(dataset=str(tmp_path / "texts.csv")), LanguageConfig())
    assert data.details["documents"] == {"train": 28, "validation": 4, "test": 8}
    with pytest.raises(InputError, match="a column 'label' .* found the columns 'text'"):
        load(tmp_path / "texts.csv")


def test_a_copy_of_a_table_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(tmp_path / "texts.csv", PLAIN.replace(",", ";"))
    monkeypatch.setattr("pipelines.data.tables.encoding_of", None)
    again = load(tmp_path / "texts.csv")
    assert (again.fingerprint, again.details) == (first.fingerprint, first.details)


def test_the_guess_of_an_encoding_reads_the_lines_that_are_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes(b"nothing but ASCII\n" * 10_000 + "déjà vu à la carte\n".encode("latin-1"))
    with path.open("rb") as file:
        assert encoding_of(file, path) == "cp1252"
