"""Sentence embeddings: pooling and losses against formulas, the layout of sentence-transformers, and the whole chain on pairs."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import spearmanr
from transformers import AutoConfig, AutoModel, AutoTokenizer

from conftest import FILLER, WORDS, make_tokenizer, tiny_config
from others import install_node, write_published
from pipelines.core.config import DataConfig, DistillConfig, StudentConfig, TransferConfig
from pipelines.core.errors import InputError
from pipelines.core.task import UNLABELLED, StageResult
from pipelines.data.text import title_and_passages
from pipelines.hub import check_run
from pipelines.models.embedder import SETTINGS, load_embedder, pool, width_of
from pipelines.models.removal import load_model
from pipelines.models.students import build_student
from pipelines.onnx.export import export_onnx
from pipelines.onnx.measure import estimator_workload
from pipelines.runtime.vectors import convert, search, unit
from pipelines.tasks.ranking import Bm25, Retriever
from pipelines.tasks.sentence_embedding import losses
from pipelines.tasks.sentence_embedding.data import CORPUS, EmbeddingConfig
from pipelines.tasks.sentence_embedding.task import SentenceEmbedding
from pipelines.training.fine_tune import save
from pipelines.training.transfer import own_labels
from processes import run_here

ALL_WORDS = [*FILLER, *(word for words in WORDS.values() for word in words)]


def write_pairs(path: Path, pairs: int = 120) -> Path:
    """Queries of four words, and positives that have three of them."""
    generator = np.random.default_rng(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "other", "score"])
        for index in range(pairs):
            words = generator.choice(ALL_WORDS, 4, replace=False)
            others = [*words[:3], *generator.choice(ALL_WORDS, generator.integers(3, 8))]
            writer.writerow([f"{' '.join(words)} {index}", " ".join(generator.permutation(others)), index % 6])
    return path


def write_embedder(directory: Path, dense: bool = False, pooling: str = "mean") -> Path:
    """A tiny BERT as sentence-transformers saves it, with pooling and normalization, perhaps a Dense module between them."""
    directory.mkdir()
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config("bert", num_hidden_layers=2, initializer_range=0.02)).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    config = AutoConfig.from_pretrained(directory)
    settings = {"pooling": pooling, "dense": [], "normalize": True, "max_length": 32}
    setattr(config, SETTINGS, settings)
    model = load_embedder(str(directory), config)
    if dense:
        model.append_dense(24)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.csv")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedder(tmp_path_factory.mktemp("embedder") / "model")


@pytest.fixture(scope="module")
def run(pairs: Path, embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole chain, with the flags that a stranger would give."""
    run = tmp_path_factory.mktemp("chain") / "run"
    flags = f"""
        compress --task sentence-embedding --dataset {pairs} --text_pair_column other --teacher_model {embedder} --output_dir {run}
        --max_length 32 --num_train_epochs 2 --learning_rate 3e-3 --student_layers 1 --prune_steps 1 --prune_epochs 1
        --prune_heads 0 --prune_ffn 0.25 --max_quality_drop 0.4 --use_cpu --benchmark_rounds 1 --benchmark_seconds 0.05 --web false
        --matryoshka_sizes 16
    """.split()
    run_here("pocketformers", *flags)
    return run


def test_a_prompt_that_is_not_put_before_texts_is_told(tmp_path, caplog):
    directory = write_embedder(tmp_path / "model")
    said = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(said))
    for _ in range(2):
        load_embedder(str(directory))
    assert caplog.text.count("texts are read without the prompt 'query: '") == 1


def test_a_damaged_directory_of_sentence_transformers_is_named(tmp_path):
    whole = write_embedder(tmp_path / "whole", dense=True)
    for number, (name, content, message) in enumerate(
        [
            ("modules.json", b"{bad", "expected JSON of sentence-transformers in .*modules.json"),
            ("modules.json", b"[]", "expected a module that pools"),
            ("2_Dense/model.safetensors", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
            ("2_Dense/config.json", None, "weights of the shape that config.json .* size mismatch"),
        ]
    ):
        damaged = Path(shutil.copytree(whole, tmp_path / str(number)))
        settings = json.loads((whole / "2_Dense" / "config.json").read_text()) | {"out_features": 8}
        (damaged / name).write_bytes(content or json.dumps(settings).encode())
        with pytest.raises(InputError, match=message):
            load_embedder(str(damaged))


def test_the_whole_chain(run, embedder):
    report = json.loads((run / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert (report["task"], report["primary_metric"]) == ("sentence-embedding", "mrr_at_10")
    assert [*stages][-3:] == ["teacher_quantized", "bm25", "tfidf"]
    assert stages["teacher"]["metrics"]["mrr_at_10"] > 0.2
    assert stages["quantized"]["metrics"]["mrr_at_10"] > 0.7 * stages["teacher"]["metrics"]["mrr_at_10"]
    assert (stages["teacher"]["agreement"], stages["bm25"]["agreement"]) == (1, None)
    assert stages["onnx"]["agreement"] > 0.5
    assert stages["quantized"]["cosine_to_fp32"]["least"] > 0.95
    kinds = [(one["kind"], one["size"], one["bytes"]) for one in report["vector_options"]]
    assert kinds == [("float32", 32, 128), ("int8", 32, 32), ("binary", 32, 4), ("float32", 16, 64), ("int8", 16, 16)]
    assert report["vector_options"][0]["score"] == pytest.approx(stages["quantized"]["metrics"]["mrr_at_10"])
    page = (run / "report.md").read_text()
    assert "recall@10" in page
    assert "whose positive quantized finds at a later place" in page
    assert "SentenceTransformer" in (run / "README.md").read_text()
    # What sentence-transformers reads is published, the folders of its modules among it.
    assert {"modules.json", "1_Pooling/config.json", "onnx/model_quantized.onnx"} <= check_run(run)[1].keys()
    assert "pipeline_tag: sentence-similarity" in (run / "README.md").read_text()
    quantized = json.loads((run / "quantized" / "record.json").read_text())["metrics"]["validation"]
    assert 0.95 < quantized["cosine_to_fp32"] < 1
    # Vectors are compared with one another, so an evaluation during training has to have them in the order of the texts.
    student = json.loads((run / "student" / "record.json").read_text())
    assert max(one["mrr_at_10"] for one in student["details"]["validation"]) == pytest.approx(
        student["metrics"]["validation"]["mrr_at_10"], abs=0.02
    )
    # Used as it is: no training of the teacher.
    assert "steps" not in json.loads((run / "teacher" / "record.json").read_text())["details"]


def test_the_bundle_gives_the_vectors_of_the_graph(run, tmp_path):
    import onnxruntime

    from pipelines import load

    session = onnxruntime.InferenceSession(run / "quantized" / "model.onnx")
    assert [value.name for value in session.get_outputs()] == ["token_embeddings", "sentence_embedding"]
    texts = ["a goal for the team 1", "shares fell"]
    found = load(run / "bundle")(texts)
    assert (found.shape, found.dtype) == ((2, 32), np.float32)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(load(run / "quantized")(texts[1]), found[1])
    lines, output = tmp_path / "lines.txt", tmp_path / "vectors.npy"
    lines.write_text("\n".join(texts))
    command = [sys.executable, str(run / "bundle" / "infer.py"), "--file", str(lines)]
    subprocess.run([*command, "--output", str(output)], check=True)
    np.testing.assert_array_equal(np.load(output), found)
    subprocess.run([*command, "--output", str(output), "--vector_type", "int8"], check=True)
    np.testing.assert_array_equal(np.load(output), convert(found, "int8"))
    kept = output.read_bytes()
    (tmp_path / "nothing.txt").write_text("")
    for name, target in (("nothing.txt", output), ("lines.txt", tmp_path / "nowhere" / "vectors.npy")):
        flags = ["--file", str(tmp_path / name), "--output", str(target)]
        failed = subprocess.run([*command[:2], *flags], capture_output=True, text=True)
        assert failed.returncode == 1
        assert failed.stderr.startswith("error: expected")
        assert failed.stderr.count("\n") == 1
    assert output.read_bytes() == kept
    written = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert np.array(json.loads(written[1])["vector"], np.float32) == pytest.approx(found[1])


@pytest.mark.parametrize(
    ("pooling", "dense"), [("mean", False), ("cls", True), ("lasttoken", False), ("weightedmean", True)]
)
def test_sentence_transformers_opens_what_is_written_and_gives_the_same_vectors(pooling, dense, run, tmp_path):
    transformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    directory = write_embedder(tmp_path / "model", dense, pooling)
    texts = ["a goal for the team 1", "shares", "a match of the season and the coach"]
    stock = transformer(str(directory), device="cpu")
    assert stock.max_seq_length == 32
    np.testing.assert_allclose(vectors_of(directory, texts), stock.encode(texts), atol=1e-6)
    # And the other way round, as that library writes it.
    stock.save_pretrained(str(tmp_path / "again"), create_model_card=False)
    np.testing.assert_allclose(vectors_of(tmp_path / "again", texts), stock.encode(texts), atol=1e-6)
    if pooling == "mean":  # zeros of pruning are removed by us, and stay for others
        pruned = transformer(str(run / "pruned"), device="cpu")
        np.testing.assert_allclose(vectors_of(run / "pruned", texts), pruned.encode(texts), atol=1e-6)


def vectors_of(directory: Path, texts: list[str]) -> np.ndarray:
    model, tokenizer = load_model(directory), AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).sentence_embedding.numpy()


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_leaves_padding_out(side):
    tokens, lengths = np.random.default_rng(0).normal(size=(3, 6, 4)), [6, 3, 1]
    mask = np.array([[1] * n + [0] * (6 - n) for n in lengths])
    expected: dict[str, list[np.ndarray]] = {"mean": [], "cls": [], "lasttoken": [], "weightedmean": []}
    if side == "left":
        mask = mask[:, ::-1].copy()
    for row, own in zip(tokens, mask, strict=True):
        real = row[own == 1]
        weights = np.arange(1, len(real) + 1)[:, None]
        expected["mean"].append(real.mean(axis=0))
        expected["cls"].append(real[0])
        expected["lasttoken"].append(real[-1])
        expected["weightedmean"].append((real * weights).sum(axis=0) / weights.sum())
    for how, wanted in expected.items():
        np.testing.assert_allclose(pool(torch.from_numpy(tokens), torch.from_numpy(mask), how), wanted, atol=1e-6)


def test_losses_are_their_formulas():
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(6, 5)), generator.normal(size=(6, 5))
    left, right = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (student, teacher))
    given = torch.from_numpy(student), torch.from_numpy(teacher)
    assert losses.vector_loss(*given, "cosine").item() == pytest.approx((1 - (left * right).sum(axis=1)).sum())
    assert losses.vector_loss(*given, "squared_error").item() == pytest.approx(((left - right) ** 2).sum())

    def others(unit: np.ndarray) -> np.ndarray:
        return np.array([[unit[i] @ unit[j] for j in range(6) if j != i] for i in range(6)])

    error = ((others(left) - others(right)) ** 2).mean(axis=1).sum()
    assert losses.similarity_error(*given).item() == pytest.approx(error)
    # The two may have other sizes.
    assert losses.similarity_error(given[0][:, :2], given[1]).item() > 0
    p, q = (softmax(others(one) / 0.1, axis=1) for one in (right, left))
    assert losses.similarity_divergence(*given, 0.1).item() == pytest.approx((p * np.log(p / q)).sum())
    margins = []
    for both in (left.reshape(3, 2, 5), right.reshape(3, 2, 5)):
        margins.append(
            [[both[i, 0] @ both[i, 1] - both[i, 0] @ both[j, 1] for j in range(3) if j != i] for i in range(3)]
        )
    expected = ((np.array(margins[0]) - np.array(margins[1])) ** 2).mean(axis=1).sum()
    pairs = [one.unflatten(0, (3, 2)) for one in given]
    assert losses.margin_error(*pairs).item() == pytest.approx(expected)
    scores = 20 * left.reshape(3, 2, 5)[:, 0] @ left.reshape(3, 2, 5)[:, 1].T
    assert losses.multiple_negatives(pairs[0]).item() == pytest.approx(-np.log(np.diag(softmax(scores, axis=1))).sum())


def test_vectors_in_fewer_bytes():
    vectors = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    cosines = unit(vectors) @ unit(vectors).T
    stored = convert(vectors, "int8")
    assert (stored.dtype, stored.nbytes) == (np.int8, 80)
    np.testing.assert_allclose(unit(stored) @ unit(stored).T, cosines, atol=0.02)
    bits = convert(vectors, "binary")
    assert bits.shape == (5, 2)
    same = (np.sign(vectors[0]) == np.sign(vectors[1])).mean()
    assert unit(bits)[0] @ unit(bits)[1] == pytest.approx(2 * same - 1)
    places, found = search(stored[:1], stored, 3)
    assert places[0, 0] == 0
    assert found[0, 0] == pytest.approx(1)


def test_scores_that_are_the_same_in_the_validation_split_are_one_message(tmp_path):
    for name, scores in (("train", [1.0, 2.0]), ("validation", [1.0, 1.0]), ("test", [1.0, 2.0])):
        rows = [{"text": f"{name} {one}", "other": "b", "score": scores[one % 2]} for one in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(dataset=str(tmp_path), text_pair_column="other")
    with pytest.raises(InputError, match="scores that differ .* found one value in the whole validation split"):
        SentenceEmbedding(config, EmbeddingConfig(score_column="score")).data  # noqa: B018


def test_titles_are_queries_of_the_ends_of_their_articles(tmp_path):
    for index in range(30):
        (tmp_path / "news").mkdir(exist_ok=True)
        (tmp_path / "news" / f"{index}.txt").write_text(
            f"Title {100 + index % 29}\n\nBegin {100 + index}.\nThe end of {100 + index}."
        )
    task = SentenceEmbedding(DataConfig(dataset=str(tmp_path)), EmbeddingConfig(title_pairs=12))
    sizes = {role: len(split) for role, split in task.splits.items()}
    assert sum(sizes.values()) == 29  # one title is there twice
    rows = task.rows.splits["test"]
    labels, texts = np.array(rows["label"]), rows["text"][:]
    assert (labels == CORPUS).sum() == 29
    assert len(task.rows.splits["validation"]) == 2 * sizes["validation"]  # searched among its own
    for row in range(sizes["test"]):
        assert (texts[row], texts[labels[row]]) == (f"Title {texts[row][6:]}", f"The end of {texts[row][6:]}."[-12:])
    inputs = task.baseline_inputs(task.splits["test"])
    retriever = Retriever(Bm25).fit(task.baseline_inputs(task.splits["train"]))
    found = task.baseline_predictions(retriever, inputs)
    assert found.shape == (sizes["test"],)
    assert task.scores(found, labels)["recall_at_10"] > 0.9  # the number is in both
    assert len(retriever.predict(inputs[:2])) == 2


def test_a_query_with_several_positives_is_asked_once(pairs, tmp_path, caplog):
    """Its other positives are no wrong answers, and it is in no other split."""
    lines = pairs.read_text().splitlines()
    more = [f"{line.split(',')[0]},another answer {row},0" for row, line in enumerate(lines[1:61])]
    (tmp_path / "more.csv").write_text("\n".join([*lines, *more]))
    data = DataConfig(dataset=str(tmp_path / "more.csv"), text_pair_column="other")
    task = SentenceEmbedding(data, EmbeddingConfig(learn_from="pairs"))
    queries = {role: split["text"][:] for role, split in task.splits.items()}
    asked = [*queries["validation"], *queries["test"]]
    assert len({*asked}) == len(asked)
    assert not {*asked} & {*queries["train"]}
    assert len({*queries["train"]}) < len(queries["train"])  # to train on there may be several
    left_out = len(lines) - 1 + len(more) - sum(map(len, queries.values()))
    assert left_out > 0
    assert f"{left_out} pairs are left out: validation or test asks their query already" in caplog.text
    assert task.data.details["examples"] == {role: len(texts) for role, texts in queries.items()}
    # Pairs with scores are no queries.
    scored = SentenceEmbedding(data, EmbeddingConfig(score_column="score"))
    assert sum(map(len, scored.splits.values())) == len(lines) - 1 + len(more)


def test_a_title_learns_to_find_every_passage_of_its_article(tmp_path, embedder):
    for number in range(20):
        body = f"{number:03}a then\n\n{number:03}b then {number:03}c end."
        (tmp_path / f"{number}.txt").write_text(f"Title {number}\n{body}")
    task = SentenceEmbedding(DataConfig(dataset=str(tmp_path)), EmbeddingConfig(title_pairs=9, learn_from="pairs"))
    numbers = [int(title.split()[1]) for title in task.splits["train"]["text"]]
    # A rest of two characters is no passage.
    bodies = [f"{one:03}a then\n{one:03}b then {one:03}c end." for one in numbers]
    expected = [
        (f"Title {one}", body[start : start + 9])
        for one, body in zip(numbers, bodies, strict=True)
        for start in (20, 11, 2)
    ]
    rows = task.rows.splits["train"]["text"][:]
    pairs = [*zip(rows[::2], rows[1::2], strict=True)]
    assert pairs == expected
    assert len(task.features(task.load_processor(str(embedder)))["train"]) == len(pairs)
    texts = SentenceEmbedding(DataConfig(dataset=str(tmp_path)), EmbeddingConfig(title_pairs=9))
    assert {*texts.rows.splits["train"]["text"]} == {*rows}
    # Another passage is another data set, though titles and ends are the same.
    before = task.data.fingerprint
    path = tmp_path / f"{numbers[0]}.txt"
    path.write_text(path.read_text().replace("a then", "a when"))
    again = SentenceEmbedding(DataConfig(dataset=str(tmp_path)), EmbeddingConfig(title_pairs=9, learn_from="pairs"))
    assert again.data.fingerprint != before


def test_passages_are_cut_from_the_end():
    assert title_and_passages("T\nabcdefgh", 3) == ("T", ["fgh", "cde"])
    assert title_and_passages("T\nabcdef", 3) == ("T", ["def", "abc"])
    assert title_and_passages("T\nab", 3) == ("T", ["ab"])
    assert title_and_passages("T\n", 3) == ("T", [])
    assert title_and_passages("", 3) == ("", [])


def test_training_examples_that_are_pairs(pairs, embedder):
    settings = EmbeddingConfig(learn_from="pairs", score_column="score", margin_weight=0.5)
    task = SentenceEmbedding(DataConfig(dataset=str(pairs), text_pair_column="other", max_length=32), settings)
    processor = task.load_processor(str(embedder))
    rows = task.features(processor)["train"]
    assert len(rows) == len(task.splits["train"])
    batch = task.collate(processor)([rows[0], rows[1]])
    assert len(batch["input_ids"]) == 4
    model = task.load_model(str(embedder)).eval()
    labels = batch.pop("labels")
    with torch.no_grad():
        outputs = task.outputs(model(**batch))
    loss, count = task.label_loss(outputs, labels)
    first, second = outputs["sentence_embedding"].numpy().reshape(2, 2, -1).transpose(1, 0, 2)
    expected = ((first * second).sum(axis=1) - labels.numpy() / 5) ** 2
    assert (loss.item(), count) == (pytest.approx(expected.sum(), rel=1e-5), 2)
    stored = task.soft_targets(outputs, DistillConfig())
    assert stored["teacher_sentence_embedding"].shape == (2, 2, 32)
    assert task.soft_loss(outputs, stored, labels, DistillConfig()).item() == pytest.approx(0, abs=1e-5)
    assert task.token_weights(batch, labels, batch["input_ids"].shape[1]).sum().item() == pytest.approx(2)
    assert {*task.metrics} == {"spearman", "pearson"}
    vectors = np.random.default_rng(0).normal(size=(2 * len(task.splits["test"]), 4))
    found = task.scores(vectors, task.rows.splits["test"]["label"][:])
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*np.split(vectors, 2), strict=True)]
    assert found["spearman"] == pytest.approx(spearmanr(cosines, task.splits["test"]["label"][:]).statistic)


def test_a_transfer_set_beside_pairs_teaches_vectors_alone(pairs, embedder, tmp_path):
    """Its texts come two by two, and have no part in the loss of pairs."""
    lines = [f"goal number {index} of the match" for index in range(7)]
    rows = [f"{lines[place]},{lines[min(place + 4, 6)]}" for place in range(4)]  # 7 different texts
    (tmp_path / "more.csv").write_text("\n".join(["text,other", *rows]))
    data = DataConfig(dataset=str(pairs), text_pair_column="other", max_length=32)
    task = SentenceEmbedding(data, EmbeddingConfig(learn_from="pairs"))
    config = TransferConfig(transfer_dataset=str(tmp_path / "more.csv"))
    transfer, processor = task.transfer_set(config), task.load_processor(str(embedder))
    rows = task.features(processor, transfer.load())["transfer"]
    first, second = (processor(lines[place])["input_ids"] for place in (0, 1))
    assert (len(rows), rows[0]["input_ids"], {*rows["labels"]}) == (3, [first, second], {UNLABELLED})
    batch = task.collate(processor)([rows[0], task.features(processor)["train"][0]])
    labels = batch.pop("labels")
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.nn.functional.normalize(torch.randn(4, 32, generator=generator)) for _ in range(2))
    loss, count = task.label_loss({"sentence_embedding": student}, own_labels(labels))
    assert (loss.item(), count) == (0, 1)  # one labelled pair has no others to be told from
    stored = task.soft_targets({"sentence_embedding": teacher}, DistillConfig())
    soft = task.soft_loss({"sentence_embedding": student}, stored, labels, DistillConfig())
    assert soft.item() == pytest.approx((1 - (student * teacher).sum(1)).sum().item() / 2, rel=1e-5)


def test_texts_alone_are_scored_by_the_neighbours_of_the_reference(pairs, embedder):
    data = DataConfig(dataset=str(pairs), max_length=32, validation_size=0.3)
    with pytest.raises(InputError, match="--reference_model"):
        SentenceEmbedding(data).splits  # noqa: B018
    task = SentenceEmbedding(data, EmbeddingConfig(reference_model=str(embedder), vector_size=8))
    vectors = task._vectors(str(embedder), "validation")
    same = task.scores(vectors, task.rows.splits["validation"]["label"][:])
    assert same == {"overlap_at_10": 1, "similarity_spearman": pytest.approx(1)}
    noise = np.random.default_rng(0).normal(size=vectors.shape)
    other = task.scores(noise, task.rows.splits["validation"]["label"][:])
    assert other["overlap_at_10"] < 0.9
    # The smaller vectors of a student begin as the principal components of the teacher's.
    student = task.load_model(str(embedder))
    task.fit_outputs(student, str(embedder))
    assert width_of(student.config) == 8
    weight = student.dense[0].weight.detach().numpy()
    np.testing.assert_allclose(weight @ weight.T, np.eye(8), atol=1e-5)
    found = vectors @ weight.T
    assert np.square(found).sum() > 0.5 * np.square(vectors).sum()


def test_a_static_embedder_begins_as_the_vectors_of_single_tokens(pairs, embedder, tmp_path):
    task = SentenceEmbedding(DataConfig(dataset=str(pairs), text_pair_column="other", max_length=32))
    student = StudentConfig(student_model="static", student_width=16)
    model, processor, _ = build_student(student, str(embedder), task)
    assert [layer.out_features for layer in model.dense] == [32]
    save(model, processor, tmp_path)
    (tmp_path / "onnx").mkdir()
    assert export_onnx(str(tmp_path), tmp_path / "onnx", task).details["verification"]["padded_tokens"] > 0
    text = "goal match shares"
    ids = processor(text)["input_ids"]
    assert len(ids) == 3  # no special tokens
    table = model.embedding.weight.detach().numpy()
    vector = table[ids].mean(axis=0) @ model.dense[0].weight.detach().numpy().T
    np.testing.assert_allclose(vectors_of(tmp_path, [text])[0], vector / np.linalg.norm(vector), atol=1e-6)
    transformers = pytest.importorskip("sentence_transformers")
    stock = transformers.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(stock.encode([text, "the"]), vectors_of(tmp_path, [text, "the"]), atol=1e-6)


def test_what_cannot_work_is_refused(pairs, pretrained, embedder):
    data = DataConfig(dataset=str(pairs), text_pair_column="other", max_length=32)
    task = SentenceEmbedding(data)
    with pytest.raises(InputError, match="--pooling"):
        task.load_model(str(pretrained))
    pooled = SentenceEmbedding(data, EmbeddingConfig(pooling="cls")).load_model(str(pretrained))
    assert pooled.config.sentence_embedding["pooling"] == "cls"
    with pytest.raises(InputError, match="--learn_from pairs"):
        task.load_model(str(embedder), "new if other")
    with pytest.raises(InputError, match="no better than guessing"):
        task.check_teacher({"mrr_at_10": 0.001}, None)
    with pytest.raises(InputError, match="nothing to learn"):
        task.check_soft_loss(DistillConfig(soft_target_weight=0))
    with pytest.raises(InputError, match="no distributions"):
        task.check_soft_loss(DistillConfig(divergence="reverse_kl"))
    with pytest.raises(InputError, match="--margin_weight"):
        EmbeddingConfig(margin_weight=1)
    with pytest.raises(InputError, match="--matryoshka_sizes"):
        EmbeddingConfig(matryoshka_sizes="small")
    with pytest.raises(InputError, match="--matryoshka_sizes"):
        EmbeddingConfig(matryoshka_sizes="16,0")


def test_a_query_is_timed_alone_and_the_corpus_in_batches(pairs, embedder):
    task = SentenceEmbedding(DataConfig(dataset=str(pairs), text_pair_column="other", max_length=32))
    rows = task.rows.splits["test"]
    queries = rows["text"][: sum(label != CORPUS for label in rows["label"])]
    tokenizer = task.load_processor(str(embedder))
    asked = max(queries, key=lambda query: (len(query.split()), len(query)))  # these have no marks
    longest = tokenizer(asked)["input_ids"]
    assert len(longest) < max(task.features(tokenizer)["test"]["length"])  # the corpus has longer ones
    workload = task.workload(embedder, "test")
    assert workload.feeds["single"]["input_ids"].tolist() == [longest]
    assert workload.settings["batches"] * 16 > len(queries)
    inputs = task.baseline_inputs(task.splits["test"])
    single = estimator_workload(inputs, task.lengths_alone("test")).feeds["single"]["inputs"].tolist()
    assert [one.partition("\t")[2] for one in single] == [asked]
    # Without queries every text may be asked for.
    scored = SentenceEmbedding(
        DataConfig(dataset=str(pairs), text_pair_column="other"), EmbeddingConfig(score_column="score")
    )
    assert len(scored.lengths_alone("test")) == len(scored.rows.splits["test"])


def test_a_baseline_is_compared_as_if_it_was_shipped(pairs):
    """As `fit` does with each row of its table."""
    task = SentenceEmbedding(DataConfig(dataset=str(pairs), text_pair_column="other", max_length=32))
    labels = np.asarray(task.rows.splits["validation"]["label"][:])
    vectors = np.random.default_rng(0).normal(size=(len(labels), 8)).astype(np.float32)
    first = np.ones((labels != CORPUS).sum(), np.int64)
    stages = [
        StageResult("teacher", "transformers", vectors, {}, {}),
        StageResult("bm25", "sklearn", first, {}, {}),
    ]
    found = task.compare(stages, None, "bm25", "validation")
    assert found.stages["bm25"]["metrics"]["mrr_at_10"] == 1 > found.stages["teacher"]["metrics"]["mrr_at_10"]
    assert found.report["vector_options"] == []
    assert found.report["worse_examples"]["total"] == 0
    assert found.samples["bm25"][0].mean() == 1
    with pytest.raises(InputError, match=r"one of them the teacher .*found \['bm25'\]"):
        task.compare(stages[1:], None, "bm25", "validation")
    with pytest.raises(InputError, match=rf"shape \({len(first)},\) .*from bm25"):
        task.compare([stages[0], replace(stages[1], predictions=first[1:])], None, "bm25", "validation")


IN_NODE = """
import { env, pipeline, AutoModel, AutoTokenizer } from "@huggingface/transformers";
env.localModelPath = process.argv[1]; env.allowRemoteModels = false;
const texts = JSON.parse(process.argv[2]), found = {};
for (const dtype of ["fp32", "q8"]) {
    const embed = await pipeline("feature-extraction", "small", { dtype });
    found[dtype] = (await embed(texts, { pooling: "mean", normalize: true })).tolist();
}
const tokenizer = await AutoTokenizer.from_pretrained("small"), model = await AutoModel.from_pretrained("small", { dtype: "fp32" });
found.graph = (await model(tokenizer(texts, { padding: true }))).sentence_embedding.tolist();
console.log(JSON.stringify(found));
"""
IN_PYTHON = """
import json, sys
import chromadb
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
from pipelines import load

published, bundle, texts = *sys.argv[1:3], json.loads(sys.argv[3])
how = {"pooling": PoolingType.MEAN, "normalization": True, "dim": 32, "model_file": "onnx/model.onnx"}
TextEmbedding.add_custom_model(model="own/small", sources=ModelSource(hf="own/small"), **how)
found = {"fastembed": [one.tolist() for one in TextEmbedding("own/small", specific_model_path=published).embed(texts)]}


class Small(chromadb.EmbeddingFunction):
    def __init__(self):
        self.model = load(bundle)

    def __call__(self, input):
        return list(self.model(list(input)))


collection = chromadb.EphemeralClient().create_collection("texts", embedding_function=Small())
collection.add(ids=list(map(str, range(len(texts)))), documents=texts)
found["chroma"] = collection.get(include=["embeddings"])["embeddings"].tolist()
print(json.dumps(found))
"""


@pytest.mark.packages
def test_others_embed_as_we_do(run, tmp_path):
    from pipelines import load

    write_published(run, SentenceEmbedding.presentation, tmp_path / "published" / "small")
    texts = ["a goal for the team 1", "shares of the bank", "the phone"]
    node, python = install_node(tmp_path / "node"), tmp_path / "python" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "python"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "fastembed>=0.9", "chromadb>=1.5"], check=True)
    given, found = json.dumps(texts), {}
    script = ["node", "--input-type=module", "--eval", IN_NODE, str(tmp_path / "published"), given]
    small = [str(python), "-c", IN_PYTHON, str(tmp_path / "published" / "small"), str(run / "bundle"), given]
    for command in (script, small):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, cwd=node, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found |= json.loads(done.stdout.splitlines()[-1])
    ours = {name: load(run / name)(texts) for name in ("onnx", "quantized")}
    for name in ("fp32", "graph", "fastembed"):
        np.testing.assert_allclose(found[name], ours["onnx"], atol=1e-5)
    np.testing.assert_allclose(found["chroma"], ours["quantized"], atol=1e-6)
    np.testing.assert_allclose(found["q8"], ours["quantized"], atol=0.05)
