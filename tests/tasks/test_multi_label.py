"""Any number of labels for a text: how they are read, losses and thresholds against formulas, and the whole chain on labels that can be
learnt."""

from __future__ import annotations

import ast
import csv
import json
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from transformers import AutoModel, pipeline

from conftest import FILLER, WORDS, make_tokenizer, tiny_config, tiny_model
from others import in_node, odd_texts
from pipelines import load
from pipelines.core.config import DataConfig, DistillConfig, LabelConfig
from pipelines.core.errors import InputError
from pipelines.core.records import fingerprint
from pipelines.core.task import StageResult
from pipelines.edge.settings import head_outputs
from pipelines.tasks import task_of_model
from pipelines.tasks.metrics import best_thresholds, multi_label_metrics
from pipelines.tasks.multi_label_classification.data import LabelSetConfig
from pipelines.tasks.multi_label_classification.report import mean_f1
from pipelines.tasks.multi_label_classification.task import MultiLabelClassification
from pipelines.tasks.text_classification import TextClassification
from pipelines.training.arguments import TrainingArguments
from pipelines.training.baselines import fit_baseline, load_baseline
from pipelines.training.trainer import train
from processes import run_here, run_processes, values

LABELS = list(WORDS)
RECIPE = Path(__file__).parents[2] / "recipes" / "distill_multi_label.py"


def make_topics(examples: int = 240) -> list[tuple[str, list[str]]]:
    """Texts with words of some topics, which are their labels; some have none."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(examples):
        labels = [label for label in LABELS if generator.random() < 0.4]
        words = list(generator.choice(FILLER, generator.integers(3, 9)))
        words += [word for label in labels for word in generator.choice(WORDS[label], 3)]
        rows.append((" ".join(generator.permutation(words)) + f" {index}", labels))
    return rows


def write_jsonl(path: Path, rows: list[tuple[str, object]]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": labels}) + "\n" for text, labels in rows))
    return path


def task_of(path: Path, separator: str | None = None, joined: int = 1, balanced: bool = False, **settings):
    config = DataConfig(dataset=str(path), max_length=32, **settings)
    return MultiLabelClassification(
        config, LabelConfig("balanced" if balanced else "none"), LabelSetConfig(separator, joined)
    )


@pytest.fixture(scope="module")
def topics(tmp_path_factory) -> MultiLabelClassification:
    return task_of(write_jsonl(tmp_path_factory.mktemp("topics") / "topics.jsonl", make_topics()))


@pytest.fixture(scope="module")
def balanced(topics) -> MultiLabelClassification:
    return task_of(topics.config.dataset, balanced=True)


@pytest.fixture(scope="module")
def chain(tokenizer, tmp_path_factory) -> tuple[Path, str]:
    """A finished run, and what its command printed."""
    directory = tmp_path_factory.mktemp("chain")
    pretrained = directory / "pretrained"
    AutoModel.from_config(tiny_config("bert", num_hidden_layers=2, initializer_range=0.1)).save_pretrained(pretrained)
    tokenizer.save_pretrained(pretrained)
    path, run = write_jsonl(directory / "topics.jsonl", make_topics()), directory / "run"
    flags = f"""
        --dataset {path} --teacher_model {pretrained} --output_dir {run} --max_length 32
        --teacher_epochs 8 --teacher_learning_rate 3e-3 --num_train_epochs 5 --learning_rate 3e-3 --per_device_train_batch_size 8
        --student_layers 1 --prune_steps 1 --prune_epochs 1 --prune_heads 0.25 --prune_ffn 0.25 --max_quality_drop 0.2 --use_cpu
        --benchmark_rounds 1 --benchmark_seconds 0.05 --web false --baselines false --class_weights balanced
        --label_baseline false
    """.split()
    return run, run_here(str(RECIPE), *flags)


def test_the_whole_chain(chain, capsys):
    run, printed = chain
    report = json.loads((run / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert (report["task"], report["primary_metric"]) == ("multi-label-classification", "macro_f1")
    assert stages["teacher"]["metrics"]["micro_f1"] > 0.75
    assert stages["quantized"]["metrics"]["micro_f1"] > 0.7
    # An exported model has the thresholds of the one that it is the graph of; a quantized one its own, and so have its files and the bundle.
    assert stages["onnx"]["metrics"]["thresholds"] == stages["pruned"]["metrics"]["thresholds"]
    thresholds = stages["quantized"]["metrics"]["thresholds"]
    manifest = json.loads((run / "bundle" / "manifest.json").read_text())
    config = json.loads((run / "quantized" / "config.json").read_text())
    assert config["thresholds"] == thresholds
    assert manifest["outputs"]["thresholds"] == [thresholds[label] for label in LABELS]
    assert f"{LABELS[0]} {thresholds[LABELS[0]]:.3f}" in (run / "report.md").read_text()
    card = (run / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "average precision" in card
    assert "macro f1" in printed

    text = f"{' '.join(WORDS[LABELS[0]])} {' '.join(WORDS[LABELS[2]])}"
    command = [sys.executable, str(run / "bundle" / "infer.py"), text, "--json"]
    predicted = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert predicted["labels"] == [LABELS[0], LABELS[2]]
    assert predicted == load(run / "bundle")(text) == load(run / "quantized")(text)
    assert task_of_model(run / "pruned") == "multi-label-classification"
    # The code of the card: stock transformers takes a sigmoid, and the thresholds are in config.json.
    code = textwrap.dedent(MultiLabelClassification.presentation.in_python(report, str(run / "teacher")))
    variables: dict[str, Any] = {}
    exec(code.replace('"A text."', json.dumps(text)), variables)
    ours = load(run / "teacher_onnx")
    assert [one["label"] for one in ast.literal_eval(capsys.readouterr().out)] == sorted(
        (found := ours(text))["labels"], key=lambda label: -found["probabilities"][label]
    )


def same_probabilities(run: Path, texts: list[str], theirs: list[list[dict[str, Any]]]) -> None:
    for found, others in zip(load(run / "onnx")(texts), theirs, strict=True):
        assert {one["label"]: one["score"] for one in others} == pytest.approx(found["probabilities"], abs=1e-5)


def test_stock_transformers_gives_our_probabilities(chain, tokenizer):
    texts = odd_texts(tokenizer, 32)
    same_probabilities(
        chain[0], texts, pipeline("text-classification", model=str(chain[0] / "pruned"))(texts, top_k=None)
    )


@pytest.mark.packages
def test_transformers_js_gives_our_probabilities(chain, tokenizer, tmp_path):
    texts, long, run = odd_texts(tokenizer, 32), "the goal of the bank " * 20, chain[0]
    answer = "(classify, text) => classify(text, { top_k: null })"
    presentation = MultiLabelClassification.presentation
    *theirs, cut = in_node(run, presentation, tmp_path, "text-classification", answer, [*texts, long])
    same_probabilities(run, texts, theirs)
    # Where it cuts a text, the special token at the end goes, too.
    session, inputs = load(run / "onnx").predictor.session, tokenizer([long], return_tensors="np")
    logits = session.run(["logits"], {node.name: inputs[node.name][:, :32] for node in session.get_inputs()})[0][0]
    assert {one["label"]: one["score"] for one in cut} == pytest.approx(
        dict(zip(LABELS, 1 / (1 + np.exp(-logits)), strict=True)), abs=1e-5
    )


# ---- Data


def in_columns(path: Path, rows: list[tuple[str, list[str]]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", *LABELS])
        writer.writerows([text, *(int(label in labels) for label in LABELS)] for text, labels in rows)
    return path


def in_cells(path: Path, rows: list[tuple[str, list[str]]], write) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *((text, write(labels)) for text, labels in rows)])
    return path


def on_the_hub(path: Path, rows: list[tuple[str, list[str]]], feature) -> Path:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.List(feature)})
    ids = hasattr(feature, "names")
    labels = [[LABELS.index(one) if ids else one for one in labels] for _, labels in rows]
    datasets.Dataset.from_dict({"text": [text for text, _ in rows], "label": labels}, features).save_to_disk(path)
    return path


def test_lists_columns_and_separators_are_the_same_examples(topics, tmp_path):
    rows = make_topics()
    expected = {text: [int(label in labels) for label in LABELS] for text, labels in rows}
    ways = [
        topics,
        task_of(in_columns(tmp_path / "columns.csv", rows), label_column=LABELS),
        task_of(in_cells(tmp_path / "separated.csv", rows, " ; ".join), separator=";"),
        task_of(in_cells(tmp_path / "lists.csv", rows, json.dumps)),
        task_of(in_cells(tmp_path / "pandas.csv", rows, str)),
        task_of(on_the_hub(tmp_path / "ids", rows, datasets.ClassLabel(names=LABELS))),
        task_of(on_the_hub(tmp_path / "names", rows, datasets.Value("string"))),
    ]
    for task in ways:
        assert task.label_names == LABELS
        found = {row["text"]: row["label"] for split in task.splits.values() for row in split}
        assert found == expected
    assert len({task.data.fingerprint for task in ways}) == 1
    counts = Counter(label for _, labels in rows for label in labels)
    assert Counter() + counts == sum((Counter(one) for one in topics.details["classes"].values()), Counter())


def test_a_rare_label_is_in_every_split_and_so_are_texts_without_one(tmp_path):
    rows = [(f"text {index}", ["often", "now and then"][: 1 + index % 2]) for index in range(200)]
    rows = [
        (text, ["rare", *labels] if index % 40 == 7 else [] if index % 20 == 3 else labels)
        for index, (text, labels) in enumerate(rows)
    ]
    task = task_of(write_jsonl(tmp_path / "rows.jsonl", rows), validation_size=0.2)
    for role, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        assert task.details["classes"][role]["rare"] == 5 * share
        empty = sum(not any(labels) for labels in task.splits[role]["label"])
        assert empty == pytest.approx(10 * share)
    few = task_of(write_jsonl(tmp_path / "rows.jsonl", rows), max_samples_per_class=2)
    assert few.details["classes"]["train"]["rare"] == 2


def test_duplicates_whose_labels_differ_are_counted(tmp_path):
    rows = [(f"text {index}", [["a"], ["b"], ["a", "b"]][index % 3]) for index in range(60)]
    doubled = [*rows, ("text  0", ["b"]), ("text 1", ["b"])]
    details = task_of(write_jsonl(tmp_path / "rows.jsonl", doubled)).details
    assert (details["duplicates_removed"], details["conflicting_labels"]) == ({"train": 2}, 1)


def test_an_empty_list_is_no_missing_one(tmp_path):
    rows = [(f"text {index}", [["a"], ["b"], ["a", "b"], []][index % 4]) for index in range(60)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, ("text 60", None)])
    with pytest.raises(InputError, match="expected a label in every row .* found 1 of 61 rows without one"):
        task_of(path).data  # noqa: B018
    assert sum(task_of(path, missing="drop").details["examples"].values()) == 60
    # Of a cell with a separator nobody can tell.
    cells = in_cells(tmp_path / "rows.csv", rows, "|".join)
    assert sum(task_of(cells, separator="|").details["examples"].values()) == 60


def test_half_of_an_emoji_is_no_character_of_a_label(tmp_path):
    rows = [(f"text {index}", ["a"] if index % 2 else ["b\ud83d"]) for index in range(20)]
    assert task_of(write_jsonl(tmp_path / "rows.jsonl", rows)).label_names == ["a", "b?"]


def test_hidden_labels_are_no_test_split(tmp_path):
    for name, labels in (("train", ["a", "b"]), ("validation", ["a"]), ("test", [])):
        write_jsonl(tmp_path / f"{name}.jsonl", [(f"{name} {index}", labels[: 1 + index % 2]) for index in range(20)])
    assert task_of(tmp_path).details["came_from"]["test"] == "split 'validation'"


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([], {}, "expected at least two classes in the column 'label', found 0 \\(no label at all\\)"),
        (["a"], {}, "expected at least two classes in the column 'label', found 1"),
        ("a, b", {}, "expected a list of labels .* found 'a, b' .* --label_separator"),
        ([["a"]], {}, "expected a list of labels"),
        ("[" * 5000, {}, "expected a list of labels"),
        ("a", {"separator": ""}, "expected a text that parts labels"),
        ("['a' 'b']", {}, "expected a list of labels .* found \"\\['a' 'b'\\]\""),  # as numpy writes a list
        ([0, 1, 0], {}, "found 1 and 0 for every label"),
        ([False, True, False], {}, "found 1 and 0 for every label"),
        (["a"], {"label_column": ["label", "text"]}, "expected different columns"),
        (["a"], {"label_column": ["label", "other"]}, "expected a column 'other'"),
        (
            ["a"],
            {"label_column": ["label", "other"], "separator": ";"},
            "found --label_column with 2 columns and --label_separator",
        ),
    ],
)
def test_labels_that_are_none_are_one_message(labels, settings, message, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [(f"text {index}", labels) for index in range(20)])
    with pytest.raises(InputError, match=message):
        task_of(path, **settings).data  # noqa: B018


def test_vectors_of_two_labels_are_no_names(tmp_path):
    rows = [(f"text {index}", [[1, 0], [0, 1]][index % 2]) for index in range(20)]
    with pytest.raises(InputError, match="found 1 and 0 for every label"):
        task_of(write_jsonl(tmp_path / "rows.jsonl", rows)).data  # noqa: B018


def test_a_separator_is_a_tab_in_words_and_one_that_parts_nothing_is_said(tmp_path, caplog):
    rows = [(f"text {index}", ["a\tb", "b"][index % 2]) for index in range(20)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert task_of(path, separator="\\t").data.label_names == ["a", "b"]
    assert not caplog.text
    task_of(path, separator=";").data  # noqa: B018
    assert "no cell of the column 'label'" in caplog.text


def test_columns_of_labels_that_fit_no_text_are_one_message(tmp_path):
    rows = [{"text": f"text {index}", "a": 0, "b": 0} for index in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="found examples of 0 .no label fits any text"):
        task_of(tmp_path / "rows.jsonl", label_column=["a", "b"]).data  # noqa: B018


def test_a_label_that_fits_no_training_text_is_named_with_its_remedy(tmp_path):
    columns = {"a": lambda index: index % 2, "b": lambda index: 1 - index % 2, "never": lambda index: 0}
    rows = [{"text": f"text {index}"} | {name: fits(index) for name, fits in columns.items()} for index in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        InputError, match="training examples of all 3 classes, found none of never .* from --label_column"
    ):
        task_of(tmp_path / "rows.jsonl", label_column=[*columns]).data  # noqa: B018
    assert task_of(tmp_path / "rows.jsonl", label_column=["a", "b"]).label_names == ["a", "b"]


def test_columns_of_labels_hold_1_and_0(tmp_path):
    path = in_columns(tmp_path / "rows.csv", make_topics(40))
    path.write_text(path.read_text().replace(",1\n", ",2\n"))
    with pytest.raises(InputError, match=f"expected 1 or 0 in every row of the column '{LABELS[-1]}'.* found '2'"):
        task_of(path, label_column=LABELS).data  # noqa: B018
    with pytest.raises(InputError, match="expected one --label_column for this task, found 3"):
        TextClassification(DataConfig(dataset=str(path), label_column=LABELS)).data  # noqa: B018


def test_joined_texts_have_the_labels_of_all_and_no_text_is_in_two_splits(csv_file):
    single = TextClassification(DataConfig(dataset=str(csv_file)))
    task = task_of(csv_file, joined=3)
    label_of = {row["text"]: row["label"] for split in single.splits.values() for row in split}
    seen: dict[str, set[str]] = {}
    for name, split in task.splits.items():
        for row in split:
            parts = row["text"].split(" / ")
            seen.setdefault(name, set()).update(parts)
            assert [index for index, fits in enumerate(row["label"]) if fits] == sorted(
                {label_of[part] for part in parts}
            )
        assert Counter(len(row["text"].split(" / ")) for row in split).keys() == {1, 2, 3}
        assert seen[name] == {*single.splits[name]["text"]}
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert task.describe()["data"] != single.describe()["data"] != task_of(csv_file, joined=2).describe()["data"]


# ---- Losses


def bits(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The logarithms of a sigmoid and of its complement."""
    return -np.logaddexp(0, -logits), -np.logaddexp(0, logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_label_loss_is_binary_cross_entropy(topics, balanced, smoothing):
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(5, 3)), generator.integers(0, 2, (5, 3))
    batch = torch.tensor([*labels.tolist(), [-100] * 3])  # the last only fills up a batch
    outputs = {"logits": torch.tensor([*logits.tolist(), [9.0] * 3])}
    fits, without = bits(logits)
    target = labels * (1 - smoothing) + smoothing / 2
    losses = -(target * fits + (1 - target) * without)
    loss, count = topics.label_loss(outputs, batch, smoothing)
    assert (loss.item(), count.item()) == (pytest.approx(losses.sum(), rel=1e-5), 15)
    # Balanced, the texts with a label weigh what those without it do, and all together what they did.
    counts, train = np.array([*balanced.details["classes"]["train"].values()]), len(balanced.splits["train"])
    weights = np.where(labels == 1, train / (2 * counts), train / (2 * (train - counts)))
    loss, _ = balanced.label_loss(outputs, batch, smoothing)
    assert loss.item() == pytest.approx((weights * losses).sum(), rel=1e-5)
    assert balanced.primary_metric == "macro_f1"
    assert [*balanced.loss_details["class_weights"]] == LABELS


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_targets_are_a_sigmoid_of_each_label(topics, temperature):
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 5, 3))
    labels = torch.tensor([[0, 1, 0]] * 3 + [[-101] * 3, [-100] * 3])  # of a transfer set, of a filler
    outputs, stored = ({"logits": torch.tensor(one)} for one in (student, teacher))
    targets = topics.soft_targets(stored, DistillConfig())
    (yes, no), (student_yes, student_no) = (bits(one[:4] / temperature) for one in (teacher, student))
    kl = np.exp(yes) * (yes - student_yes) + np.exp(no) * (no - student_no)
    found = topics.soft_loss(outputs, targets, labels, DistillConfig(temperature=temperature))
    assert found.item() == pytest.approx(temperature**2 * kl.sum(), rel=1e-5)
    reverse = np.exp(student_yes) * (student_yes - yes) + np.exp(student_no) * (student_no - no)
    settings = DistillConfig(temperature=temperature, divergence="reverse_kl")
    assert topics.soft_loss(outputs, targets, labels, settings).item() == pytest.approx(
        temperature**2 * reverse.sum(), rel=1e-4
    )
    settings = DistillConfig(temperature=temperature, divergence="squared_error")
    squares = ((student - teacher)[:4] ** 2).sum()
    assert topics.soft_loss(outputs, targets, labels, settings).item() == pytest.approx(squares, rel=1e-5)


def test_the_losses_of_tokens_count_as_the_labels_do(topics):
    labels = torch.tensor([[0, 1, 0], [-101] * 3, [-100] * 3])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    weights = topics.token_weights({"attention_mask": mask}, labels, 4)
    np.testing.assert_allclose(weights, [[1.5, 1.5, 0, 0], [0.75] * 4, [0] * 4])


def test_settings_that_compare_labels_with_one_another_are_refused(topics):
    for settings in ({"divergence": "decoupled"}, {"standardize_logits": True}):
        with pytest.raises(InputError, match="each is predicted by itself"):
            topics.check_soft_loss(DistillConfig(**settings))
    topics.check_soft_loss(DistillConfig(divergence="jensen_shannon"), teachers=2)


def trained(task, count: int, accumulation: int, directory: Path) -> np.ndarray:
    """The weights after three steps of 8 texts and one of 3: of so many processes, or steps that are added up."""
    arguments = TrainingArguments(
        output_dir=str(directory), disable_tqdm=True, use_cpu=True, max_steps=4, learning_rate=0.05
    )
    arguments.per_device_train_batch_size = 8 // count // accumulation
    arguments.gradient_accumulation_steps, arguments.optim, arguments.max_grad_norm = accumulation, "sgd", 1e9
    arguments.eval_strategy, arguments.save_strategy, arguments.load_best_model_at_end = "no", "no", False
    model, tokenizer = tiny_model(num_hidden_layers=1), make_tokenizer()
    rows = task.features(tokenizer)["train"].select(range(27))
    train(model, task, tokenizer, arguments, directory, rows)
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).numpy()


def in_processes(path: str, count: int, directory: str) -> np.ndarray:
    return trained(task_of(Path(path)), count, 1, Path(directory))


def test_processes_and_accumulated_steps_train_as_one(topics, tmp_path):
    whole = trained(topics, 1, 1, tmp_path / "whole")
    start = torch.cat([one.detach().reshape(-1) for one in tiny_model(num_hidden_layers=1).parameters()]).numpy()
    moved = np.linalg.norm(whole - start)
    assert moved > 1e-3
    assert np.linalg.norm(trained(topics, 1, 4, tmp_path / "parts") - whole) / moved < 1e-3
    both = values(run_processes(2, tmp_path / "two", in_processes, topics.config.dataset, 2, str(tmp_path / "out")))
    for one in both:
        assert np.linalg.norm(one - whole) / moved < 1e-3


# ---- Scores


def test_thresholds_are_those_of_the_highest_f1():
    generator = np.random.default_rng(0)
    references = generator.integers(0, 2, (60, 4))
    references[:, 3] = 0
    logits = generator.normal(size=(60, 4)) + references - 2
    found = best_thresholds(logits, references)
    probabilities = 1 / (1 + np.exp(-logits))
    for label in range(3):
        by_all = [f1_score(references[:, label], probabilities[:, label] >= value) for value in probabilities[:, label]]
        assert f1_score(references[:, label], probabilities[:, label] >= found[label]) == max(by_all)
        assert np.abs(probabilities[:, label] - found[label]).min() > 1e-6
    assert found[3] == 0.5
    # Where any in between are as good, the one between the two groups.
    assert best_thresholds(np.array([[-9.0], [9.0]]), np.array([[0], [1]])) == pytest.approx(0.5)


def test_metrics_equal_a_count_by_hand():
    generator = np.random.default_rng(1)
    references = generator.integers(0, 2, (40, 4))
    references[:, 3] = 0
    logits = generator.normal(size=(40, 4)).astype(np.float32)
    thresholds = np.array([0.3, 0.5, 0.6, 1.0])
    scores = multi_label_metrics(logits, references, ["a", "b", "c", "d"], thresholds)
    found = 1 / (1 + np.exp(-logits.astype(float))) >= thresholds
    hits, errors = (found * references).sum(axis=0), (found != references).sum(axis=0)
    assert scores["micro_f1"] == pytest.approx(2 * hits.sum() / (2 * hits.sum() + errors.sum()))
    # The last label neither occurs nor is predicted.
    assert scores["macro_f1"] == pytest.approx((2 * hits[:3] / (2 * hits + errors)[:3]).mean())
    assert [*scores["recall_per_class"].values()] == pytest.approx([*(hits[:3] / references.sum(axis=0)[:3]), 0])
    precisions = [average_precision_score(references[:, label], logits[:, label]) for label in range(3)]
    assert scores["average_precision"] == pytest.approx(np.mean(precisions))
    assert json.loads(json.dumps(scores)) == scores
    # What the bootstrap draws is the same score, over the last axis.
    both = (found * references).astype(float), (found != references).astype(float)
    assert mean_f1(*(one.sum(axis=1) for one in both)) == pytest.approx(scores["micro_f1"])
    assert mean_f1(*both[0].T, *both[1].T) == pytest.approx(scores["macro_f1"])
    assert mean_f1(*(np.stack([one.sum(axis=1)] * 2) for one in both)) == pytest.approx([scores["micro_f1"]] * 2)


def test_the_baselines_are_the_frequency_of_each_label_and_one_vs_rest(topics, tmp_path):
    texts, references = topics.splits["test"]["text"][:], np.array(topics.splits["test"]["label"][:])
    shares = np.mean(topics.splits["train"]["label"][:], axis=0)
    for name, least in (("label_frequency", 0.3), ("tfidf_logistic_regression", 0.9)):
        (tmp_path / name).mkdir()
        outcome = fit_baseline(None, tmp_path / name, topics, name)
        logits = topics.baseline_predictions(load_baseline(tmp_path / name), texts)
        assert logits.shape == references.shape
        assert least < outcome.metrics["validation"]["micro_f1"]
        if name == "label_frequency":
            np.testing.assert_allclose(logits, np.broadcast_to(np.log(shares / (1 - shares)), references.shape))


def record_of(logits: np.ndarray | None, source: str | None = None) -> dict:
    metrics = {} if logits is None else {"validation": {"thresholds": dict.fromkeys(LABELS, 0.2)}}
    return {"metrics": metrics, "files": {"x": str(logits)}, "made_by": {"source_fingerprint": source}, "details": {}}


def test_a_baseline_that_is_sure_has_finite_logits(topics):
    for dtype in (np.float32, np.float64):
        certain = SimpleNamespace(predict_proba=lambda texts, dtype=dtype: np.array([[0, 1, 0.5]], dtype))
        logits = topics.baseline_predictions(certain, ["text"]).astype(np.float32)
        np.testing.assert_allclose(logits, [[-np.log(1e9), np.log(1e9), 0]], rtol=1e-5)


def test_the_comparison_names_the_texts_whose_labels_were_lost(topics, tokenizer):
    references = np.array(topics.features(tokenizer)["test"]["labels"])
    logits = np.where(references, 3.0, -3.0)
    row = int(np.flatnonzero(references.sum(axis=1) == 1)[0])
    worse = logits.copy()
    worse[row] = -worse[row]
    teacher = record_of(logits)
    # An exported model was not scored on the validation split, and has the thresholds of its source.
    exported = record_of(None, fingerprint(teacher))
    stages = [
        StageResult("teacher", "onnx", logits, teacher, {}),
        StageResult("onnx", "onnx", worse, exported, {}),
    ]
    found = topics.compare(stages, tokenizer, shipped="onnx")
    assert found.stages["onnx"]["metrics"]["thresholds"] == dict.fromkeys(LABELS, 0.2)
    assert found.stages["onnx"]["agreement"] == pytest.approx(1 - 1 / len(references))
    [example] = found.report["broken_examples"]["examples"]
    others = ", ".join(label for label, fits in zip(LABELS, references[row], strict=True) if not fits)
    assert (example["index"], example["shipped_prediction"]) == (row, others)
    probability = 1 / (1 + np.exp(-3))
    assert example["teacher_probability"] == pytest.approx(probability**3)
    for name, score in (("teacher", 1.0), ("onnx", found.stages["onnx"]["metrics"]["micro_f1"])):
        assert found.metric(*found.samples[name]) == pytest.approx(score)


# ---- Models


def test_a_teacher_knows_its_labels_and_their_order(topics, pretrained, tmp_path):
    chance = np.mean(topics.splits["validation"]["label"][:])
    with pytest.raises(InputError, match="average_precision on .*, no better than guessing"):
        topics.check_teacher({"average_precision": float(chance)}, None)
    topics.check_teacher({"average_precision": 0.9}, None)
    tokenizer = topics.load_processor(str(pretrained))

    def predict(order):
        return lambda sample, *_: np.where(np.array(sample["labels"])[:, order], 2.0, -2.0)

    topics.check_label_order(tokenizer, predict([0, 1, 2]))
    with pytest.raises(InputError, match=f"{LABELS[0]!r} is predicted as {LABELS[1]!r}"):
        topics.check_label_order(tokenizer, predict([2, 0, 1]))
    # A head that was trained for a choice of one keeps its weights, and says from then on what it is for.
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = topics.load_model(str(tmp_path))
    assert model.config.problem_type == "multi_label_classification"
    model.save_pretrained(tmp_path)
    assert task_of_model(tmp_path) == "multi-label-classification"


def test_the_bundle_has_the_thresholds_of_config_json(tmp_path):
    config = {"problem_type": "multi_label_classification", "id2label": {"0": "a", "1": "b"}}
    classes = {"kind": "classes", "activation": "sigmoid", "labels": ["a", "b"]}
    for thresholds, expected in (
        ({"b": 0.2, "a": 0.7}, {"thresholds": [0.7, 0.2]}),
        ({"a": 0.7}, {}),
        ([0.7, 0.2], {}),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"thresholds": thresholds}))
        assert head_outputs(tmp_path) == classes | expected
