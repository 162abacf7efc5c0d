"""A reranker: queries with candidates as pairs, as lists and from TF-IDF, split by query; losses against formulas; and the whole chain."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from conftest import FILLER, WORDS, tiny_model
from pipelines.core.config import DataConfig, DistillConfig
from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, StageResult
from pipelines.data.text import title_and_passages
from pipelines.onnx.measure import estimator_workload
from pipelines.tasks import task_of_model
from pipelines.tasks.ranking import Bm25
from pipelines.tasks.text_ranking.candidates import RankingConfig, find_candidates
from pipelines.tasks.text_ranking.task import TextRanking, first_candidates, ranking_metrics
from pipelines.training.baselines import fit_baseline, load_baseline
from processes import run_here

COLUMNS = {"text_column": "query", "text_pair_column": "passage"}


def write_candidates(path: Path, queries: int = 80, candidates: int = 4, lists: bool = True) -> Path:
    """Queries whose right candidate is about sport, and no other."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(queries):
        query, place = f"{' '.join(generator.choice(FILLER, 2))} {number}", int(generator.integers(candidates))
        topics = [
            "sport" if index == place else str(generator.choice(["tech", "trade"])) for index in range(candidates)
        ]
        passages = [
            " ".join([*generator.choice(WORDS[topic], 3), *generator.choice(FILLER, 3)]) + f" {number} {index}"
            for index, topic in enumerate(topics)
        ]
        labels = [float(index == place) for index in range(candidates)]
        if lists:
            rows.append({"query": query, "passage": passages, "label": labels})
        else:
            pairs = zip(passages, labels, strict=True)
            rows += [{"query": query, "passage": text, "label": label} for text, label in pairs]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Path:
    return write_candidates(tmp_path_factory.mktemp("lists") / "candidates.jsonl")


@pytest.fixture(scope="module")
def ranking(lists) -> TextRanking:
    return TextRanking(DataConfig(dataset=str(lists), max_length=32, **COLUMNS))


# ---- Data


def test_all_candidates_of_a_query_are_in_one_split_in_their_order(ranking, lists):
    rows = {row["query"]: row for row in map(json.loads, lists.read_text().splitlines())}
    seen: list[str] = []
    for split in ranking.splits.values():
        by_query: dict[str, list[dict]] = {}
        for row in split:
            by_query.setdefault(row["text"], []).append(row)
        for number, (query, own) in enumerate(by_query.items()):
            assert [row["text_pair"] for row in own] == rows[query]["passage"]
            assert [row["label"][0] for row in own] == rows[query]["label"]
            assert len({row["label"][1] for row in own}) == 1, number
        seen += by_query
    assert sorted(seen) == sorted(rows)
    assert ranking.details["examples"] == {"train": 56, "validation": 8, "test": 16}
    assert ranking.details["pairs"] == {"train": 224, "validation": 32, "test": 64}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("of_objects", [True, False])
def test_candidates_inside_another_column_are_read(of_objects, suffix, lists, ranking, tmp_path):
    """As MS MARCO has them, and as objects in a list; with half of a pair, where a text was cut within an emoji."""
    rows = []
    for row in map(json.loads, lists.read_text().splitlines()):
        columns = {"passage_text": row["passage"], "is_selected": [int(label) for label in row["label"]]}
        inside = [dict(zip(columns, one, strict=True)) for one in zip(*columns.values(), strict=True)]
        rows.append({"query": row["query"], "passages": inside if of_objects else columns, "url": ["a", {}]})
    file = tmp_path / f"nested.{suffix}"
    if suffix == "parquet":
        datasets.Dataset.from_list([row | {"url": ""} for row in rows]).to_parquet(str(file))
    else:
        rows[0]["query"] += "\ud83d"
        file.write_text(json.dumps({"data": rows}) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    names = {
        "text_column": "query",
        "text_pair_column": "passages.passage_text",
        "label_column": "passages.is_selected",
    }
    config = DataConfig(dataset=str(file), max_length=32, **names)

    def pairs(task: TextRanking) -> list[tuple]:
        return sorted(
            (row["text_pair"], row["text"].rstrip("?"), row["label"][0])
            for split in task.splits.values()
            for row in split
        )

    assert pairs(TextRanking(config)) == pairs(ranking)
    with pytest.raises(InputError, match="found lists. Leave the flag out"):
        _ = TextRanking(config, RankingConfig(tfidf_candidates=3)).splits


def test_fewer_candidates_to_train_on(ranking, lists):
    fewer = TextRanking(ranking.config, RankingConfig(train_candidates=2))
    rows, queries = list(fewer.splits["train"]), ranking.splits["train"].num_rows // 4
    assert len(rows) == 2 * queries
    assert [sum(row["label"][0] for row in rows[start : start + 2]) for start in range(0, len(rows), 2)] == [
        1.0
    ] * queries
    whole = [row["text_pair"] for row in ranking.splits["train"]]
    places = [whole.index(row["text_pair"], start // 2 * 4) % 4 for start, row in enumerate(rows)]
    assert all(first < second for first, second in zip(places[::2], places[1::2], strict=True))  # in their order
    wrong = [place for place, row in zip(places, rows, strict=True) if not row["label"][0]]
    assert {*wrong} >= {0, 1, 2}  # not the first ones alone
    assert list(fewer.splits["test"]) == list(ranking.splits["test"])
    assert fewer.describe() != ranking.describe()


def test_pairs_a_right_text_and_a_right_place_are_read_as_lists_are(ranking, lists, tmp_path):
    def read(path: Path, **columns: str) -> list[dict]:
        task = TextRanking(DataConfig(dataset=str(path), max_length=32, **(COLUMNS | columns)))
        return [dict(row) for split in task.splits.values() for row in split]

    expected = [dict(row) for split in ranking.splits.values() for row in split]
    assert read(write_candidates(tmp_path / "pairs.jsonl", lists=False)) == expected
    rows = [json.loads(line) for line in lists.read_text().splitlines()]
    for row in rows:
        row["place"] = row["label"].index(1)
        row["text"] = row["passage"][row["place"]]
    path = tmp_path / "right.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read(path, label_column="place") == read(path, label_column="text") == expected
    # As MS MARCO has it: a column that holds both lists.
    nested = [{"query": row["query"], "passages": {"passage": row["passage"], "label": row["label"]}} for row in rows]
    datasets.Dataset.from_list(nested).save_to_disk(tmp_path / "nested")
    assert read(tmp_path / "nested", text_pair_column="passages.passage", label_column="passages.label") == expected


@pytest.mark.parametrize("nothing", [None, []])
def test_rows_without_candidates_or_a_label_are_left_out_as_others_are(nothing, lists, tmp_path):
    rows = [json.loads(line) for line in lists.read_text().splitlines()]
    rows = [row | {"label": row["label"].index(1)} for row in rows]
    rows[3]["passage"], rows[4]["label"] = nothing, None
    path = tmp_path / "gaps.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="1 of 317 rows without"):
        TextRanking(DataConfig(dataset=str(path), max_length=32, **COLUMNS)).data  # noqa: B018
    task = TextRanking(DataConfig(dataset=str(path), max_length=32, missing="drop", **COLUMNS))
    assert sum(map(len, task.splits.values())) == 4 * 78


def test_equal_pairs_with_another_label_are_told(lists, tmp_path, caplog):
    rows = [json.loads(line) for line in lists.read_text().splitlines()]
    rows += [rows[0], rows[1] | {"label": [1 - label for label in rows[1]["label"]]}]
    path = tmp_path / "twice.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = TextRanking(DataConfig(dataset=str(path), max_length=32, **COLUMNS))
    assert sum(map(len, task.splits.values())) == 320
    assert "8 of 328 pairs of the split 'train' are there more than once, and stay once" in caplog.text
    assert "4 of these pairs of the split 'train' have another label than the first" in caplog.text


def test_bad_candidates_are_one_message(lists, tmp_path):
    rows = [json.loads(line) for line in lists.read_text().splitlines()]

    def message(change: dict, ranking: RankingConfig | None = None, **settings) -> str:
        path = tmp_path / "bad.jsonl"
        path.write_text("\n".join(json.dumps(row | change) for row in rows))
        with pytest.raises(InputError) as caught:
            TextRanking(DataConfig(**({"dataset": str(path), "max_length": 32} | COLUMNS | settings)), ranking).data  # noqa: B018
        return str(caught.value)

    assert "found 3 labels for 4 candidates" in message({"label": [0, 1, 0]})
    assert "expected labels 0 and 1 in the column 'label', found 2" in message({"label": [0, 1, 2, 0]})
    assert "found 4 for 4 candidates" in message({"label": 4})
    assert "found 'none of them' for 4 candidates" in message({"label": "none of them"})
    assert "found 80 of 80 rows without" in message({"passage": None})
    assert "--text_pair_column" in message({}, text_pair_column=None)
    assert "expected a column 'nothing'" in message({}, text_pair_column="nothing")
    graded = RankingConfig(relevance="graded", ranking_loss="listwise")
    assert "expected labels from 0 to inf for --ranking_loss listwise, found -1" in message(
        {"label": [0, -1, 2, 0]}, graded
    )
    with pytest.raises(InputError, match="--tfidf_candidates with --title_pairs"):
        RankingConfig(title_pairs=100)


def test_candidates_of_tfidf(tmp_path):
    rows = [("a goal", ["goal of the team"]), ("the bank", ["shares and profit"]), ("a goal", ["match today"])]
    found = list(find_candidates(rows, 1))
    assert found[0] == ("a goal", "goal of the team", 1.0)
    # What differs in white space only is one text, as it is where duplicates are counted.
    twice = [("a  goal", ["goal of\nthe team"]), *rows, ("the bank ", ["shares and  profit"])]
    spaced = list(find_candidates(twice, 3))
    assert [" ".join(passage.split()) for query, passage, _ in spaced if query == "a  goal"] == [
        passage for query, passage, _ in find_candidates(rows, 3) if query == "a goal"
    ]
    assert {query for query, *_ in spaced} == {"a  goal", "the bank"}
    assert len(spaced) == 6
    # To train on, a query has its right passage where it is far off, too, and others at random from all places.
    near = [(f"near {number}", [f"alpha beta {number}"]) for number in range(10)]
    far = [(f"alpha beta query {number}", [f"gamma {number + 100}"]) for number in range(40)]
    found, others = list(find_candidates(near + far, 4)), set[str]()
    for query, (right,) in far:
        own = [(text, label) for asked, text, label in found if asked == query]
        assert all(text.startswith("alpha") and label == 0 for text, label in own[:4])
        assert len({text for text, _ in own}) == len(own) <= 4 + 1 + 4
        assert [text for text, label in own if label % 2] == [right]
        assert all(label >= 2 for _, label in own[4:])
        others |= {text for text, label in own[4:] if label == 2}
    assert len(others) > 30
    assert {text[:5] for text in others} == {"alpha", "gamma"}
    # Of a document all passages are learnt, and the first alone is searched.
    documents = [
        (f"title {number}", [f"end {number}", f"middle {number}", f"begin title {number}"]) for number in range(9)
    ]
    found = list(find_candidates(documents, 2))
    for query, passages in documents:
        own = [(text, label) for asked, text, label in found if asked == query]
        assert {text for text, label in own if label in (1.0, 3.0)} == {*passages}
        assert all(text.startswith("end") for text, label in own if label < 2)
        # What is nearest of all passages is there, though it is not searched.
        assert (f"begin {query}", 3.0) in own

    folder = tmp_path / "documents" / "topic"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(60):
        words = generator.choice([*WORDS["tech"], *FILLER], 6)
        (folder / f"{number}.txt").write_text(f"{words[0]} {words[1]} {number}\n{' '.join(words)} and {number} more\n")
    config = DataConfig(dataset=str(folder.parent), max_length=32)
    task = TextRanking(config, RankingConfig(tfidf_candidates=5, title_pairs=40))
    labels = {name: np.asarray(split["label"][:]) for name, split in task.splits.items()}
    counts = np.unique(labels["test"][:, 1], return_counts=True)[1]
    assert (counts == 5).all()  # what TF-IDF found, right or not
    right = [labels["train"][labels["train"][:, 1] == query, 0].sum() for query in np.unique(labels["train"][:, 1])]
    assert right == [1.0] * len(right)
    assert {*labels["test"][:, 0]} == {0.0, 1.0}
    # Every passage is learnt, the last one too, where it is among the nearest and where it is not.
    for number in range(60):
        first = (folder / f"{number}.txt").read_text().split("\n")[0]
        rest = " ".join(f"part {number} {place} of {first}." for place in range(6))
        (folder / f"{number}.txt").write_text(f"{first}\n{rest}\n")
    task = TextRanking(config, RankingConfig(tfidf_candidates=5, title_pairs=40))
    learnt: dict[str, set[str]] = {}
    for row in task.splits["train"]:
        if row["label"][0]:
            learnt.setdefault(row["text"], set()).add(row["text_pair"])
    for file in folder.iterdir():
        title, passages = title_and_passages(file.read_text(), 40)
        assert learnt.get(title, {*passages}) == {*passages}
    assert list(task.baselines) == ["first_stage", "bm25"]
    assert list(find_candidates([("a headline alone", []), *rows], 1)) == [
        ("a headline alone", "", 0.0),
        *find_candidates(rows, 1),
    ]
    with pytest.raises(InputError, match="expected words"):
        list(find_candidates([("?", ["!"])], 2))


def test_the_orders_before_a_reranker(lists, tmp_path):
    task = TextRanking(DataConfig(dataset=str(lists), **COLUMNS), RankingConfig(first_stage=True))
    test = task.splits["test"]
    references = np.asarray(test["label"][:])
    inputs = task.baseline_inputs(test)
    for name in task.baselines:
        (tmp_path / name).mkdir()
        fit_baseline(None, tmp_path / name, task, name)
    found = {name: task.baseline_predictions(load_baseline(tmp_path / name), inputs) for name in task.baselines}
    expected = np.mean([1 / (1 + int(np.argmax(own))) for own in references[:, 0].reshape(-1, 4)])
    assert task.scores(found["first_stage"], references)["mrr_at_10"] == pytest.approx(expected)
    # BM25 over the passages that are ranked together.
    passages = sorted({passage for _, passage, _ in inputs})
    whole = Bm25().fit(passages).scores([query for query, _, _ in inputs])
    by_formula = [whole[row, passages.index(passage)] for row, (_, passage, _) in enumerate(inputs)]
    np.testing.assert_allclose(found["bm25"], by_formula)
    assert by_formula != [0.0] * len(inputs)
    assert list(TextRanking(task.config).baselines) == ["mean_score", "bm25"]
    # As it is timed: arrays of text.
    feeds = estimator_workload(inputs).feeds
    assert feeds["single"]["inputs"].shape == (1, 3)
    assert load_baseline(tmp_path / "bm25").predict(feeds["batch_0"]["inputs"]).shape == (16,)


# ---- Losses and scores


def references_of(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    return generator.normal(size=len(groups)), generator.integers(0, 2, len(groups)).astype(float), groups


def test_losses_are_those_of_the_formulas(lists):
    sizes = [4, 3, 1, 5]
    logits, labels, groups = references_of(sizes)
    teacher = logits + np.random.default_rng(1).normal(size=len(logits))
    rows = [np.flatnonzero(groups == group) for group in range(len(sizes))]

    def margin(errors: np.ndarray) -> float:
        total = 0.0
        for own in rows:
            for row in own:
                others = [other for other in own if other != row]
                total += (
                    np.mean([(errors[row] - errors[other]) ** 2 for other in others]) if others else errors[row] ** 2
                )
        return total

    cross_entropy = -(labels * np.log(1 / (1 + np.exp(-logits))) + (1 - labels) * np.log(1 / (1 + np.exp(logits))))
    listwise = 0.0
    for own in rows:
        if len(own) == 1:
            listwise += cross_entropy[own[0]]
        elif labels[own].any():
            softmax = np.exp(logits[own]) / np.exp(logits[own]).sum()
            listwise -= len(own) * (labels[own] / labels[own].sum() * np.log(softmax)).sum()
    expected = {
        "binary_cross_entropy": cross_entropy.sum(),
        "squared_error": ((logits - labels) ** 2).sum(),
        "margin": margin(logits - labels),
        "listwise": listwise,
    }
    order = np.random.default_rng(2).permutation(len(logits))
    references = np.stack([labels, groups], axis=1)[order]
    # The last row only fills up a batch.
    outputs = {"logits": torch.tensor([*logits[order], 9.0])[:, None]}
    filled = torch.tensor([*references.tolist(), [IGNORED, IGNORED]])
    for name, value in expected.items():
        task = TextRanking(DataConfig(dataset=str(lists)), RankingConfig(ranking_loss=name))
        loss, count = task.label_loss(outputs, filled)
        # Divided by all numbers of the references, it is the mean over pairs.
        assert (loss / count).item() == pytest.approx(value / len(logits), rel=1e-5), name
    for name, value in {"squared_error": ((logits - teacher) ** 2).sum(), "margin": margin(logits - teacher)}.items():
        task = TextRanking(DataConfig(dataset=str(lists)), RankingConfig(soft_ranking_loss=name))
        stored = {"teacher_logits": torch.tensor([*teacher[order], 0.0])[:, None]}
        assert task.soft_loss(outputs, stored, filled, DistillConfig()).item() == pytest.approx(2 * value, rel=1e-5), (
            name
        )
    weights = task.token_weights({"attention_mask": torch.ones(len(filled), 3)}, filled, 3)
    assert weights.sum().item() == pytest.approx(2 * len(logits))


def test_metrics_count_a_query_as_one():
    references = np.array([[0, 5], [1, 5], [0, 5], [1, 2], [0, 2]], float)
    scores = np.array([3.0, 2.0, 1.0, 0.5, 0.1])
    assert ranking_metrics(scores, references)["mrr_at_10"].tolist() == [
        1,
        1 / 2,
    ]  # in the order of the queries' numbers
    assert first_candidates(scores, references).tolist() == [3, 0]
    # Scores below 0: the gain is counted from the lowest of the query.
    graded = np.array([[-2, 0], [-1, 0], [1, 0]], float)
    expected = (1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3))
    assert ranking_metrics(np.array([0.0, 2.0, 1.0]), graded)["ndcg_at_10"].tolist() == [pytest.approx(expected)]


def test_a_batch_has_whole_queries(ranking, tokenizer):
    from pipelines.training.trainer import EpochLengthGroupedSampler

    features = ranking.features(tokenizer)["train"]
    lengths, groups = list(features["length"]), list(features["group"])
    sampler = EpochLengthGroupedSampler(8, lengths, seed=0, fillers=2, groups=groups)
    order = list(sampler)
    assert len(order) == len(sampler) == len(features) + 2
    assert sorted(order) == list(range(len(features) + 2))
    starts = [groups[row] for row in order[:-2:4]]
    assert starts == [groups[row] for row in order[3:-2:4]]
    assert len(set(starts)) == len(starts)
    sampler.set_epoch(1)
    assert list(sampler) != order
    batch = ranking.collate(tokenizer)([features[row] for row in order[:4]])
    assert {*batch} == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["labels"].shape == (4, 2)
    assert len(set(batch["labels"][:, 1].tolist())) == 1


def test_a_teacher_must_rank_better_than_chance(ranking, tmp_path, pretrained):
    with pytest.raises(InputError, match="mrr_at_10 on the validation split is 0.1000, no better than guessing"):
        ranking.check_teacher({"mrr_at_10": 0.1}, None)
    ranking.check_teacher({"mrr_at_10": 0.9}, None)
    model = ranking.load_model(str(pretrained), "new if other")
    model.save_pretrained(tmp_path)
    assert task_of_model(tmp_path) == "text-ranking"
    # A cross-encoder of the Hub says nothing of regression.
    del model.config.problem_type
    model.config.id2label = {0: "LABEL_0"}
    model.save_pretrained(tmp_path)
    ranking.load_processor(str(pretrained)).save_pretrained(tmp_path)
    assert task_of_model(tmp_path) == "text-ranking"
    assert ranking.load_model(str(tmp_path)).config.problem_type == "regression"
    tiny_model().save_pretrained(tmp_path / "classifier")
    assert task_of_model(tmp_path / "classifier") == "text-classification"


# ---- The whole chain


@pytest.fixture(scope="module")
def run(lists, pretrained, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "ranking"
    flags = f"""
        compress --task text-ranking --dataset {lists} --text_column query --text_pair_column passage --baselines false
        --teacher_model {pretrained} --output_dir {directory} --max_length 32 --teacher_epochs 4 --teacher_learning_rate 3e-3
        --num_train_epochs 3 --learning_rate 3e-3 --per_device_train_batch_size 16 --soft_ranking_loss margin --student_layers 1
        --prune_heads 0 --prune_ffn 0 --max_quality_drop 0.3 --use_cpu
        --benchmark_rounds 1 --benchmark_seconds 0.05 --web false
    """.split()
    run_here("pocketformers", *flags)
    return directory


def test_the_whole_chain(run):
    report = json.loads((run / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert (report["task"], report["primary_metric"], report["test_examples"]) == ("text-ranking", "mrr_at_10", 16)
    assert stages["teacher"]["metrics"]["mrr_at_10"] > 0.9
    assert stages["quantized"]["metrics"]["mrr_at_10"] > 0.8
    assert stages["quantized"]["samples_per_second_128"] > 0
    assert report["without_relevant"] == 0
    page = (run / "report.md").read_text()
    assert "16 test queries" in page
    assert "pairs/s at 128" in page
    card = (run / "README.md").read_text()
    assert "CrossEncoder" in card
    assert "type: mrr" in card


def test_the_bundle_ranks_the_lines_of_a_file(run, tmp_path):
    from pipelines import load

    lines = ["the bank said profit", "match the goal", "code server"]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    infer = [sys.executable, str(run / "bundle" / "infer.py")]

    def start(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*infer, *flags], capture_output=True, text=True)

    done = start("--query", "the year", "--file", str(tmp_path / "lines.txt"), "--json")
    found = list(map(json.loads, done.stdout.splitlines()))
    scores = [one["values"]["score"] for one in found]
    assert found[0]["input"] == "match the goal"
    assert scores == sorted(scores, reverse=True)
    assert found == load(run / "bundle").rank("the year", lines)
    assert found[0] == load(run / "bundle")(("the year", "match the goal")) | {"input": "match the goal"}
    score, text = start("--query", "the year", *lines).stdout.splitlines()[0].split("\t")
    assert (float(score), text) == (pytest.approx(scores[0], rel=1e-4), "match the goal")
    refused = start("--query", "the year", "--pair", *lines)
    assert (refused.returncode, "without --pair" in refused.stderr) == (2, True)
    assert len(start("--pair", "the year", "match the goal").stdout.splitlines()) == 1


def test_the_report_names_the_queries_that_lost(ranking, tokenizer):
    references = np.asarray(ranking.splits["test"]["label"][:])
    worse = references[:, 0].copy()
    worse[references[:, 1] == references[0, 1]] = [0.0, 0.1, 0.2, 0.3]
    stages = [
        StageResult(name, "onnx", scores, {}, {}) for name, scores in (("teacher", references[:, 0]), ("onnx", worse))
    ]
    found = ranking.compare(stages, tokenizer, shipped="onnx")
    place = 4 - int(np.argmax(references[:4, 0]))
    expected = 1 - (1 - 1 / place) / 16
    assert found.stages["onnx"]["metrics"]["mrr_at_10"] == pytest.approx(expected)
    assert found.report["worse_examples"]["total"] == int(place > 1)
    assert found.stages["onnx"]["agreement"] == (1 if place == 1 else 15 / 16)


def test_it_opens_as_a_cross_encoder(run):
    cross_encoder = pytest.importorskip("sentence_transformers").CrossEncoder
    import onnxruntime
    from transformers import AutoTokenizer

    model = cross_encoder(str(run / "student"), max_length=32, device="cpu")
    passages = ["match the goal", "the bank said profit", "code"]
    ranked = model.rank("the year", passages)
    scores = np.array([one["score"] for one in sorted(ranked, key=lambda one: one["corpus_id"])])
    assert ranked[0]["corpus_id"] == 0
    # The numbers of the exported graph, not their sigmoid.
    tokenizer = AutoTokenizer.from_pretrained(run / "onnx")
    inputs = tokenizer(["the year"] * 3, passages, padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(str(run / "onnx" / "model.onnx"))
    logits = session.run(["logits"], {one.name: inputs[one.name] for one in session.get_inputs()})[0][:, 0]
    np.testing.assert_allclose(scores, logits, atol=1e-4)
