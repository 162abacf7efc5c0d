"""The benchmarks of training, throughput, memory and scaling run on tiny models, and say what they measured."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.runtime.infer import in_order

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from benchmarks import conversion_memory, training  # noqa: E402


def run_script(name: str, output: Path, *arguments: Any) -> Any:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / name), *map(str, arguments), "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_training_compares_each_row_with_its_rival(trained_teacher, csv_file, tmp_path):
    flags = ["--teacher_model", str(trained_teacher), "--dataset", str(csv_file), "--max_length", "32", "--epochs", "1"]
    scripts = ["usual_script_max_length", "usual_script_dynamic"]
    rows = [*scripts, "fine_tune", *training.STUDENTS]
    # In this process, which spares the imports of five.
    parsed = training.parse_flags([*flags, "--student_layers", "2"])
    always = [(0.0, math.inf)]
    found = training.summarize({row: [training.figures(training.work(row, parsed, tmp_path), always)] for row in rows})
    assert list(found["rows"]) == rows
    pairs = {f"fine_tune / {script}" for script in scripts}
    pairs |= {"student_stored / student_labels", "student_stored / student_online"}
    assert found["samples_per_second_ratios"].keys() == pairs
    for name, row in found["rows"].items():
        assert 0 < row["seconds_to_score"] <= row["seconds"], name
        assert row["score_reached"] <= row["score"]
        assert (row["storing_soft_targets_seconds"] > 0) == (name == "student_stored")
    profile = training.profile(parsed, steps=1)
    limit = profile.pop("limit")
    assert list(profile) == ["usual_script_max_length", "fine_tune", "student", "online_teacher"]
    assert all(row["step"] > 0 for row in profile.values())
    del profile["online_teacher"]
    for row in profile.values():
        operators = [row[name] for name in row if name.startswith("aten::")]
        assert row["aten::addmm"] > 0
        assert operators == sorted(operators, reverse=True)
    matmuls = {name: row["matmul_gflop"] for name, row in profile.items()}
    assert matmuls["student"] < matmuls["fine_tune"] < matmuls["usual_script_max_length"]
    assert limit["student_stored / student_online"] > 1
    rows = ["usual_script_dynamic", "fine_tune"]
    together = run_script("training.py", tmp_path / "found.json", *flags, "--rows", *rows)
    assert list(together["rows"]) == rows
    assert together["rows"]["fine_tune"].keys() == found["rows"]["fine_tune"].keys()


def test_only_the_seconds_of_a_rows_own_turns_are_counted():
    row = {
        "examples": 30,
        "started": 10.5,
        "labelling": [12.0, 14.5],
        "evaluations": [(11.5, 0.5), (14.75, 0.75)],
        "ended": 17.0,
    }
    found = training.figures(row, [(8.0, 9.0), (10.0, 11.0), (12.0, 13.0), (14.0, 15.0), (16.0, 17.5)])
    assert found["storing_soft_targets_seconds"] == 1.0 + 0.5
    assert found["evaluations"] == [(0.5, 0.5), (0.75, 0.75)]
    assert found["seconds"] == 0.5 + 0.5 + 1.0
    assert found["samples_per_second"] == 15


def test_a_row_that_fails_ends_the_others(tmp_path):
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    began = time.monotonic()
    with pytest.raises(subprocess.CalledProcessError):
        training.take_turns({"one": sleep, "other": [sys.executable, "-c", "raise SystemExit(1)"]}, tmp_path, 0.1)
    assert time.monotonic() - began < 60


def test_throughput_scores_every_row_alike(text_bundle, csv_file, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(line.rsplit(",", 1)[0] for line in csv_file.read_text().splitlines()[1:]) + "\n")
    found = run_script(
        "throughput.py", tmp_path / "found.json", "--bundle", text_bundle, "--file", texts, "--rounds", 1
    )
    assert found["one_on_each_core"]["largest_difference"] == 0
    assert 0 < found["batches_in_file_order"]["largest_difference"] < 1
    assert all(row["texts_per_second"] > 0 for row in found.values())
    in_order_of_the_file, by_length = (found[f"batches_{kind}"] for kind in ("in_file_order", "of_like_length"))
    assert 1 <= by_length["padded_tokens_per_token"] < in_order_of_the_file["padded_tokens_per_token"]
    assert 0 < by_length["tokenizing_seconds"] < by_length["seconds"]


@pytest.mark.slow
def test_conversion_memory_counts_what_a_stage_holds(tmp_path, monkeypatch):
    # The model is written by this process, the stages run in others.
    monkeypatch.setattr(sys, "argv", ["", "--width", "128", "--layers", "1", "--output", str(tmp_path / "found.json")])
    conversion_memory.main()
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [row["stage"] for row in found] == ["export", "quantize"]
    assert all(row["model_bytes"] > 4 * 30_522 * 128 and row["peak_bytes"] > 0 for row in found)


@pytest.mark.parametrize("at_once", [1, 3])
def test_answers_come_in_order_and_an_error_in_its_place(at_once):
    def examples():
        yield from range(100)
        raise ValueError("the line after them")

    answers: list[int] = []
    with pytest.raises(ValueError, match="the line after"):
        answers.extend(in_order(lambda number: number**2, examples(), at_once))
    assert answers == (np.arange(100) ** 2).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("series", "sizes"), [("length", [8, 16]), ("examples", [200, 400])])
def test_scaling_fits_an_exponent_to_each_series(series, sizes, tmp_path):
    flags = ["--series", series, "--sizes", *sizes, "--seconds", 0.01, "--plot", tmp_path / "plot.png"]
    found = run_script("scaling.py", tmp_path / "found.json", *flags)[series]
    assert found["sizes"] == sizes
    assert found["exponents"].keys() == {*found["seconds"], "work"}
    assert found["exponents"]["work"] == pytest.approx(1, abs=0.05)
    assert (tmp_path / "plot.png").stat().st_size > 1000
