"""`pocketformers fit` on tiny real models: the forecast against files, a device's times, a whole search that is killed, and another row."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import make_tokenizer, tiny_model
from pipelines.budget import fit, latency, search
from pipelines.budget.shapes import Forecast, Shape, forecast_bytes, grid, schemes_of, shapes_of_students
from pipelines.budget.words import Budget
from pipelines.cli import main
from pipelines.core.command import run_main
from pipelines.core.config import QuantizeConfig
from pipelines.core.errors import InputError
from pipelines.runtime import infer


@pytest.fixture
def pocketformers(monkeypatch, capsys):
    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pocketformers", *argv])
        status = 0
        try:
            run_main(main)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


QUANTIZE = QuantizeConfig(quantization="dynamic_int8")
SHAPES = [
    Shape(2, 1.0, 1.0, "dynamic_int8"),
    Shape(1, 0.5, 0.5, "dynamic_int8"),
    Shape(1, 0.5, 0.5, "int4_blocks"),
    Shape(1, 0.5, 0.5, "int8_int4_embeddings"),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A teacher with weights enough that its graph's nodes are a small part of its files."""
    directory = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 4000}
    tiny_model(**sizes).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory, wide, task):
    directory = tmp_path_factory.mktemp("untrained")
    latency.write_graphs(wide, directory, task, SHAPES, QuantizeConfig())
    return directory


def test_forecast_bytes_are_those_of_the_files(untrained, wide, task):
    for forecast in forecast_bytes(SHAPES, wide, task, QuantizeConfig().block_size, {None: None}):
        files = [path for path in (untrained / forecast.shape.name).iterdir() if path.name != "profile.json"]
        assert forecast.bytes == pytest.approx(sum(path.stat().st_size for path in files), rel=0.02)


def test_a_profile_of_a_device_resumes_and_is_of_one_teacher(untrained, wide, task, tmp_path, monkeypatch, capsys):
    def killed(folder: Path, name: str, orders: dict, threads: int) -> float:
        if name == SHAPES[1].name:
            raise KeyboardInterrupt
        return time_graph(folder, name, orders, threads)

    time_graph = infer.time_graph
    monkeypatch.setattr(infer, "time_graph", killed)
    with pytest.raises(KeyboardInterrupt):
        infer.main(["--profile", str(untrained), "--threads", "1"])
    first = (untrained / SHAPES[0].name / "profile.json").stat().st_mtime_ns
    monkeypatch.undo()
    capsys.readouterr()
    infer.main(["--profile", str(untrained), "--threads", "1"])
    assert (untrained / SHAPES[0].name / "profile.json").stat().st_mtime_ns == first
    file = tmp_path / "pi.json"
    file.write_text(capsys.readouterr().out)
    times, machine = latency.read_profile(str(file), latency.identity(wide, SHAPES, task, QuantizeConfig()))
    assert times[0] > times[1] > 0
    assert machine["threads"] == 1
    with pytest.raises(InputError, match="others"):
        latency.read_profile(str(file), latency.identity(wide, SHAPES[:2], task, QuantizeConfig()))
    with pytest.raises(InputError, match="--forecast"):
        latency.read_profile(str(tmp_path / "none.json"), "")


def write_profile(file: Path, source: str, task, others: list[Shape], quantize: QuantizeConfig = QUANTIZE) -> None:
    """The times of a device on which a layer takes a millisecond, and neurons and heads nearly nothing."""
    shapes = [*latency.graphs_of(task.load_config(source), schemes_of(task, quantize)), *others]
    times = {shape.name: 0.1 + shape.layers + 0.01 * shape.layers * (shape.heads + shape.neurons) for shape in shapes}
    orders = {"of": latency.identity(source, shapes, task, quantize), "shapes": dict.fromkeys(times)}
    machine = {"cpu": "a slow one", "threads": 1, "onnxruntime": "1.31", "slowed": 1.0}
    file.write_text(json.dumps({**machine, "orders": orders, "p50_ms": times}))


@pytest.fixture(scope="module")
def command(csv_file, small_teacher, task, tmp_path_factory):
    device = tmp_path_factory.mktemp("device") / "pi.json"
    write_profile(device, str(small_teacher), task, [])
    few = ["--num_train_epochs", "2", "--learning_rate", "3e-3", "--per_device_train_batch_size", "8", "--use_cpu"]
    few += ["--prune_steps", "1", "--prune_epochs", "1", "--benchmark_rounds", "1", "--benchmark_seconds", "0.05"]
    few += ["--quantization", QUANTIZE.quantization, "--baselines", "false"]
    data = [str(csv_file), "--max_length", "32", "--validation_size", "0.2", "--test_size", "0.2", "--web", "false"]
    return ["fit", *data, "--teacher", str(small_teacher), "--on", str(device), *few]


@pytest.fixture(scope="module")
def taught(command, tmp_path_factory):
    """A search that was killed before its first candidate: copies of it go on, and share what serves all candidates."""
    run = tmp_path_factory.mktemp("taught") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "train_candidates", killed)
        patch.setattr(sys, "argv", ["pocketformers", *command, "--output_dir", str(run)])
        with pytest.raises(KeyboardInterrupt):
            main()
    return run


@pytest.fixture
def run(taught, tmp_path, timed_here):
    return shutil.copytree(taught, tmp_path / "run")


@pytest.fixture
def all_schemes(small_teacher, task, tmp_path):
    """Flags of a search that quantizes each candidate in every way."""
    quantize = QuantizeConfig(quantization="auto")
    write_profile(tmp_path / "all_schemes.json", str(small_teacher), task, [], quantize)
    return ["--quantization", quantize.quantization, "--on", str(tmp_path / "all_schemes.json")]


def killed(*_):
    raise KeyboardInterrupt


def test_an_impossible_budget_ends_before_training(pocketformers, command, tmp_path):
    status, output, errors = pocketformers(*command, "--under", "10kB", "5ms", "--output_dir", str(tmp_path / "run"))
    assert status == 1
    assert "10kB" in errors or "0.01MB" in errors
    assert "would do" in errors
    assert "10 MB" not in output
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_killed_search_goes_on_and_another_row_is_shipped_without_training(
    pocketformers, command, run, all_schemes, monkeypatch
):
    command = [*command, "--within", "60", "--under", "1MB", "--under", "1.5ms", "--output_dir", str(run)]
    command += ["--baselines", "true", *all_schemes]
    command += ["--student_layers", "2"]  # as the YAML of a chain has it
    monkeypatch.setattr(fit, "MOST_TRAININGS", 2)
    make_small = search.make_small
    made = []

    def killed_in_the_second(*arguments):
        made.append(arguments[0].prefix)
        if len(made) == 2:
            raise KeyboardInterrupt
        return make_small(*arguments)

    monkeypatch.setattr(search, "make_small", killed_in_the_second)
    status, _, errors = pocketformers(*command)
    assert status == 130
    assert "the same command goes on" in errors
    monkeypatch.setattr(search, "make_small", make_small)
    status, output, errors = pocketformers(*command)
    assert status == 0, errors
    assert f"{made[0]}dynamic_int8/quantized: finished already" in output
    assert f"{made[0]}int8_int4_embeddings/quantized: finished already" in output
    assert "they are not used: --student_layers 2" in output
    front = json.loads((run / "front.json").read_text())
    rows = {row["number"]: row for row in front["rows"]}
    trained = [row for row in rows.values() if "forecast" in row]
    assert {row["layers"] for row in trained} == {1}
    assert {"teacher_quantized", "static", "tfidf_logistic_regression"} <= {row["name"] for row in rows.values()}
    for row in rows.values():
        assert row["delta"]["low"] <= row["delta"]["value"] <= row["delta"]["high"]
        assert row["delta"]["value"] == pytest.approx(row["score"] - front["teacher"])
    inside = [row for row in rows.values() if not row["breaks"]]
    assert rows[front["answer"]]["score"] == max(row["score"] for row in inside)
    report = json.loads((run / "report.json").read_text())
    assert report["recipe"] == "fit"
    assert "(one-sided bound)" in output
    assert (run / "bundle" / "manifest.json").is_file()
    assert (run / "front.png").is_file()

    # The same command again: nothing is made, and the same is said.
    before = (run / "front.json").read_bytes()
    status, output, _ = pocketformers(*command)
    assert status == 0
    assert "started" not in output
    assert (run / "front.json").read_bytes() == before

    bundled = (run / "bundle" / "model.onnx").read_bytes()
    other = next(row for row in rows.values() if row["kind"] != "estimator" and model_of(run, row) != bundled)
    status, output, errors = pocketformers("take", str(run), str(other["number"]))
    assert status == 0, errors
    assert [line.split(":")[0] for line in output.splitlines() if line.endswith(": started")] == ["bundle"]
    assert (run / "bundle" / "model.onnx").read_bytes() == model_of(run, other)
    status, _, errors = pocketformers("take", str(run), "99")
    assert status == 1
    assert "99" in errors


def test_with_within_alone_the_interval_is_halved_and_only_the_answer_learns_from_labels_alone(
    pocketformers, command, run, all_schemes, monkeypatch
):
    monkeypatch.setattr(fit, "MOST_TRAININGS", 2)
    flags = ["--within", "100", "--label_baseline", "true", "--output_dir", str(run), *all_schemes]
    status, output, errors = pocketformers(*command, *flags)
    assert status == 0, errors
    assert "search: 2 with 100% of the training\n" in output
    front = json.loads((run / "front.json").read_text())
    fast, slow = sorted({row["path"].split("/")[1] for row in front["rows"]})
    # All of three candidates are good enough: first the middle one is trained, then the fastest. Both are quantized in three ways.
    assert output.index(f"candidates/{slow}/student: started") < output.index(f"candidates/{fast}/student: started")
    assert [row["scheme"] for row in front["rows"]].count("dynamic_int8") == len(front["rows"]) / 3 == 2
    answer = next(row for row in front["rows"] if row["number"] == front["answer"])
    assert answer["ms"] == min(row["ms"] for row in front["rows"])
    made = [path.parent.name for path in (run / "candidates").glob("*/student_labels_only")]
    assert made == [answer["path"].split("/")[1]]
    assert json.loads((run / "report.json").read_text())["delta_to_labels_only"] is not None


@pytest.mark.slow
def test_shapes_that_differ_after_pruning_alone_share_a_training(pocketformers, command, run):
    status, output, errors = pocketformers(*command, "--output_dir", str(run))
    assert status == 0, errors
    folders = [folder for folder in (run / "candidates").iterdir() if folder.name[0].isdigit()]
    of_one_layer = [folder for folder in folders if folder.name.startswith("1_layers")]
    assert len({(folder / "student" / "model.safetensors").read_bytes() for folder in of_one_layer}) == 1
    assert len({(folder / "onnx" / "model.onnx").read_bytes() for folder in of_one_layer}) == len(of_one_layer) > 1
    started = [line for line in output.splitlines() if line.endswith("/student: started") and "static" not in line]
    assert len(started) == len({folder.name[0] for folder in folders}) < len(folders)


def test_the_quantized_teacher_may_be_the_answer(pocketformers, command, run, monkeypatch):
    monkeypatch.setattr(
        fit, "choose", lambda rows, *_: dict.fromkeys(("answer", "best", "smallest", "fastest"), quantized(rows))
    )
    monkeypatch.setattr(fit, "MOST_TRAININGS", 1)

    def quantized(rows):
        return next((row for row in rows if row["name"] == "teacher_quantized"), rows[0])

    flags = ["--within", "100", "--label_baseline", "true", "--baselines", "true", "--output_dir", str(run)]
    status, output, errors = pocketformers(*command, *flags)
    assert status == 0, errors
    assert "answer: teacher_quantized, which needs no student, is the fastest inside the budget" in output
    assert not [*run.glob("candidates/*/student_labels_only")]
    assert (run / "bundle" / "manifest.json").is_file()


def test_the_teacher_with_fewer_tokens_needs_no_training(pocketformers, command, run, small_teacher, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.train", killed)
    flags = ["--student_vocabulary", "corpus", "--label_baseline", "true"]
    status, output, errors = pocketformers(*command, *flags, "--under", "10MB", "--output_dir", str(run))
    assert status == 0, errors
    front = json.loads((run / "front.json").read_text())
    row = front["rows"][0]
    config = json.loads(Path(small_teacher, "config.json").read_text())
    assert row["layers"] == config["num_hidden_layers"]
    assert row["vocabulary"] < config["vocab_size"]
    assert row["score"] == pytest.approx(front["teacher"], abs=0.05)


def test_another_checkpoint_is_a_candidate_too(pocketformers, command, run, small_teacher, task, tmp_path):
    small = str(tmp_path / "small")
    tiny_model(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1).save_pretrained(small)
    make_tokenizer().save_pretrained(small)
    students = shapes_of_students([small], task, "dynamic_int8")
    [forecast] = forecast_bytes(students, str(small_teacher), task, QuantizeConfig().block_size, {None: None})
    write_profile(tmp_path / "pi.json", str(small_teacher), task, students)
    with pytest.raises(InputError, match="different names"):
        shapes_of_students([small, str(shutil.copytree(small, tmp_path / "other" / "small"))], task, "dynamic_int8")
    # So small is nothing that is made of the teacher.
    budget = ["--within", "100", "--under", f"{1.1 * forecast.bytes:.0f}B", "--on", str(tmp_path / "pi.json")]
    flags = ["--students", small, "--output_dir", str(run)]
    status, output, errors = pocketformers(*command, *flags, *budget)
    assert status == 0, output + errors
    [row] = json.loads((run / "front.json").read_text())["rows"]
    assert row["name"] == "student_small_dynamic_int8"
    assert row["bytes"] == pytest.approx(forecast.bytes, rel=0.1)
    assert json.loads((run / "student" / "config.json").read_text())["hidden_size"] == 8


def test_with_train_false_the_teacher_is_cut_scaled_and_quantized(
    pocketformers, command, run, tmp_path, monkeypatch, pretrained
):
    monkeypatch.setattr("transformers.Trainer.train", killed)
    monkeypatch.setattr(fit, "MOST_TRAININGS", 1)
    command = [*command, "--train", "false", "--under", "1MB", "3.149ms", "--output_dir", str(run)]
    status, output, errors = pocketformers(*command)
    assert status == 0, errors
    front = json.loads((run / "front.json").read_text())
    candidates = [row for row in front["rows"] if row["kind"] == "candidate"]
    assert {row["layers"] for row in candidates} == {3}
    assert all((row["heads"], row["neurons"]) < (12, 192) for row in candidates)
    assert (run / "bundle" / "manifest.json").is_file()
    for row in candidates:
        record = json.loads((run / row["path"]).parents[1].joinpath("pruned", "record.json").read_text())
        steps = record["details"]["steps"]
        assert all(len(step["recovery"]["off"]["neurons"]) == 3 for step in steps)
    # What has to be trained first is refused.
    place = command.index("--teacher")
    command[place + 1] = str(pretrained)
    status, _, errors = pocketformers(*command[:-1], str(tmp_path / "other"))
    assert status == 1
    assert "--train false" in errors
    status, _, errors = pocketformers(*command, "--time", "1m")
    assert status == 1
    assert "--train" in errors


@pytest.mark.slow
def test_a_machine_that_is_slower_after_the_search_is_no_error_of_the_forecast(
    pocketformers, command, run, monkeypatch
):
    slower = iter((1, 3))  # before the search and after it

    def by_size(directories, *_):
        sizes = {name: sum(file.stat().st_size for file in path.iterdir()) for name, path in directories.items()}
        factor = next(slower)
        return {name: {"latency_ms": {"p50": factor * 1e-5 * size}} for name, size in sizes.items()}

    monkeypatch.setattr(latency, "time_stages", by_size)
    monkeypatch.setattr(latency, "remembered", lambda machine, key, make: make())
    monkeypatch.setattr(fit, "MOST_TRAININGS", 1)
    monkeypatch.setattr(fit, "ship", lambda *_: None)
    place = command.index("--on")
    here = [*command[:place], *command[place + 2 :]]
    status, output, errors = pocketformers(*here, "--train", "false", "--under", "1MB", "--output_dir", str(run))
    assert status == 0, errors
    assert "timed again, take 3.00 times" in output
    front = json.loads((run / "front.json").read_text())
    assert front["machine_slower_than_for_the_forecast"] == pytest.approx(3)
    known = [row for row in front["rows"] if "forecast" in row]
    off = [abs(3 * row["forecast"]["ms"] / row["ms"] - 1) for row in known]
    assert front["forecast_off_by"]["ms"] == pytest.approx(sorted(off)[len(off) // 2], abs=0.05)
    assert max(off) < 0.5


def model_of(run: Path, row: dict) -> bytes:
    return (run / row["path"] / "model.onnx").read_bytes()


def test_the_grid_is_what_the_family_allows(task, wide, tmp_path):
    config = task.load_config(wide)
    assert {shape.layers for shape in grid(config, ["fp32"])} == {1, 2}
    assert grid(config, ["fp32"])[0] == Shape(2, 1.0, 1.0, "fp32")
    config.model_type = "unknown"
    assert grid(config, ["fp32"]) == [Shape(1, 1.0, 1.0, "fp32")]


@pytest.mark.parametrize(
    ("transfer_ratio", "max_steps", "pruned", "views", "seconds"),
    [
        # Three forward passes a step, half of the teacher's time each, over 2 epochs of 10 s for the labelled and 50 s for all the others.
        (None, -1, 1.0, 0, 3 * 0.5 * 2 * (10 + 50)),
        # Two unlabelled examples for each labelled one.
        (2.0, -1, 1.0, 0, 3 * 0.5 * 2 * (10 + 20)),
        # There are no more of them than 50 s for all.
        (9.0, -1, 1.0, 0, 3 * 0.5 * 2 * (10 + 50)),
        # An epoch has one of five views, which took 10 s together.
        (None, -1, 1.0, 5, 3 * 0.5 * 2 * (10 / 5 + 50)),
        # 5 steps of 16 of the 200 labelled examples, whatever the epochs.
        (2.0, 5, 1.0, 0, 3 * 0.5 * 5 * 16 * 10 / 200),
        # And two rounds of pruning with an epoch of recovery each.
        (2.0, 5, 0.5, 0, 3 * 0.5 * (5 * 16 * 10 / 200 + 2 * 30)),
    ],
)
def test_the_seconds_of_a_training_count_the_transfer_set_and_the_steps(
    transfer_ratio, max_steps, pruned, views, seconds
):
    spent = {"teacher": 100.0, "soft_targets": 10.0, "transfer_soft_targets": 50.0, "teacher_onnx": 3.0}
    run = SimpleNamespace(
        stages=list(spent),
        record=lambda name: {"seconds": spent[name]},
        state=SimpleNamespace(num_processes=1),
        task=SimpleNamespace(splits={"train": range(200)}),
    )
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    settings = SimpleNamespace(
        fit=SimpleNamespace(seconds=1000.0, budget=Budget(within=1.0, bytes=1e6)),
        training=SimpleNamespace(num_train_epochs=2.0, max_steps=max_steps, **batch),
        prune=SimpleNamespace(prune_steps=2, prune_epochs=1.0),
        transfer=SimpleNamespace(transfer_ratio=transfer_ratio),
        distill=SimpleNamespace(augmented_views=views),
        teacher=SimpleNamespace(more_teachers=[]),
    )
    candidate = Forecast(Shape(1, 1.0, pruned, "dynamic_int8"), 1, 4, 64, 1e6, 100, ms=1.0)
    whole = Forecast(Shape(2, 1.0, 1.0, "dynamic_int8"), 2, 8, 128, 2e6, 100, ms=2.0)
    trimmed = replace(whole, shape=replace(whole.shape, vocabulary="corpus"), vocabulary=50)
    assert search.knows_all(settings, trimmed, whole)
    of_all = search.Search(run, settings, whole, {"of one": [candidate] * 2}, None, None)
    other = replace(candidate, shape=replace(candidate.shape, student="other/model"))
    found, fixed, left = search._seconds(of_all, [candidate], [other])
    assert found == [pytest.approx(seconds)]
    assert (fixed, left) == (9.0, pytest.approx(1000.0 - 163.0 - seconds - 9.0))

    # One that differs after pruning alone adopts the student of the first, and pays for its recovery; which ones a search for the fastest
    # will train is not known, so there each pays for all.
    unpruned, more = (replace(candidate, shape=replace(candidate.shape, neurons=share)) for share in (1.0, 0.25))
    shared, _, _ = search._seconds(of_all, [unpruned, more], [])
    settings.fit.budget = Budget(within=1.0)
    alone, _, _ = search._seconds(of_all, [unpruned, more], [])
    assert shared == [alone[0], pytest.approx(alone[1] - alone[0])]
    assert shared[1] > 0
