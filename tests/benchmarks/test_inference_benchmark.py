"""The benchmark against peers on a tiny model: all rows are the same model, what is counted is right, a failed peer is named."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import tiny_model
from processes import time_here

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from benchmarks import inference, inference_language_worker, inference_limits, inference_pages  # noqa: E402

ROWS = ["torch", "exporters", "openvino", "ours_standard", "ours", "ours_int8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, teacher: Path, csv_file: Path) -> Path:
    """A whole run; the environment of OpenVINO is a stranger's folder, so that row cannot be made."""
    directory = tmp_path_factory.mktemp("inference")
    (directory / "environments" / "openvino").mkdir(parents=True)
    small = "--max_length 32 --shapes 2x8 mix --threads 1 --rounds 1 --seconds 0.02 --max_quality_drop 1".split()
    folders = ["--output_dir", str(directory), "--environments", str(directory / "environments")]
    data = ["--models", str(teacher), "--dataset", str(csv_file)]
    command = ["inference.py", *data, "--rows", *ROWS, *small, *folders]
    # In this process, which spares the seconds that the imports take; test_readme.py starts the file as a script.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", command)
        patched.setattr(inference, "run_worker", time_here)  # whose fresh processes are in test_benchmark.py
        patched.setenv("TQDM_DISABLE", "1")
        patched.setenv("TORCHINDUCTOR_CACHE_DIR", str(directory))  # which main sets, too
        inference.main()
    return directory


@pytest.mark.slow
def test_every_row_is_scored_and_timed_in_turn(run: Path) -> None:
    (model,) = json.loads((run / "inference.json").read_text())["models"]
    measured = [row for row in ROWS if row != "openvino"]
    assert list(model["rows"]) == measured
    for row in measured:
        assert model["rows"][row]["metrics"].keys() >= {"accuracy", "macro_f1"}
        assert model["rows"][row]["bytes"] > 0
        for shape in ("2x8", "mix"):
            timing = model["timings"]["1"][shape][row]
            assert timing["p50"] == pytest.approx(np.mean([found["p50"] for found in timing["rounds"]]))
    # The same weights in another form are the same answers.
    for row in ("exporters", "ours_standard", "ours"):
        assert model["rows"][row]["largest_difference"] < 1e-4
        assert model["rows"][row]["agreement_with_torch"] == 1
    assert len(model["mix_lengths"]) == 8
    assert model["profile"]["2x8"]["operators"]["Attention"] > 0


@pytest.mark.slow
def test_a_peer_that_cannot_be_made_is_named_and_the_others_are_measured(run: Path) -> None:
    (model,) = json.loads((run / "inference.json").read_text())["models"]
    assert list(model["failed"]) == ["openvino"]
    assert "expected room for a virtual environment" in model["failed"]["openvino"]
    assert "Not measured: `openvino`" in (run / "inference.md").read_text()


@pytest.mark.slow
def test_the_pages_come_from_the_figures_alone(run: Path, tmp_path: Path) -> None:
    measured = json.loads((run / "inference.json").read_text())
    (model,) = measured["models"]
    for row, time in {"torch": 8.0, "exporters": 6.0, "ours_standard": 5.0, "ours": 4.0, "ours_int8": 1.0}.items():
        model["timings"]["1"]["2x8"][row] = {"p50": time, "rounds": [{"p50": time}, {"p50": time * 1.5}]}
    model["limits"]["1"]["shapes"]["2x8"] |= {"ours_fp32_ms": 2.0, "ours_int8_ms": 0.25}

    inference_pages.write(measured, tmp_path)

    text = (tmp_path / "inference.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert "| exporters' default over ours | 1.50 (1.50-1.50) |" in text
    assert "| torch | ours | 2.00 (2.00-2.00) |" in text
    assert "4.00 (50%)" in text  # ours reaches half of the fp32 limit
    assert "1.00 (25%)" in text  # ours_int8 a quarter of the int8 limit
    assert "MatMulInteger" in "".join(rows)
    assert 1000 < (tmp_path / "inference.png").stat().st_size < 150_000


def test_products_are_those_of_the_model() -> None:
    model = tiny_model()
    batch, tokens, hidden, neurons, layers, labels = 3, 7, 32, 64, 4, len(model.config.id2label)
    feed: dict[str, Any] = {"input_ids": np.ones((batch, tokens), np.int64)}
    projections = 4 * hidden * hidden + 2 * hidden * neurons
    expected = layers * 2 * batch * (tokens * projections + 2 * tokens * tokens * hidden)
    expected += 2 * batch * (hidden * hidden + hidden * labels)  # the pooler and the classifier read one token
    assert inference_limits.operations(inference_limits.products_of(model, feed)) == expected
    # One query of the last layer, and one token behind its attention: the keys and values are those of all.
    unread = 2 * batch * (tokens - 1) * (2 * hidden * hidden + 2 * hidden * neurons + 2 * tokens * hidden)
    assert inference_limits.operations(inference_limits.products_of(model, feed, True)) == expected - unread


def test_a_limit_is_the_least_time_whenever_it_was_measured() -> None:
    products = {("1x8", False): [(2, 1, 8, 4, 4)], ("1x8", True): [(1, 1, 1, 4, 4), (1, 1, 8, 4, 4)]}
    assert inference.sizes_of(products) == [(1, 1, 4, 4), (1, 8, 4, 4)]
    before = {1: {"fp32": [0.5, 1.0], "int8": [0.25, 4.0], "batch_1_bandwidth": 3.0}}
    after = {1: {"fp32": [2.0, 0.5], "int8": [0.5, 0.25], "batch_1_bandwidth": 2.0}}
    limits = inference.find_limits(products, {"1x8": [{}]}, [before, after])
    found = limits["1"]["shapes"]["1x8"]
    assert limits["1"]["bytes_per_second"] == {"batch_1_bandwidth": 3.0}
    assert (found["fp32_ms"], found["int8_ms"]) == (1000.0, 500.0)
    assert (found["ours_fp32_ms"], found["ours_int8_ms"]) == (1000.0, 500.0)
    assert found["operations"] == 2 * 2 * 8 * 4 * 4
    assert found["ours_int8_operations_per_second"] == 2 * (1 + 8) * 4 * 4 / 0.5


def test_a_product_takes_the_time_of_its_size() -> None:
    # A CPU with AMX computes the small one in less time than its call takes: the large one is 2,048 times the work.
    sizes = [(1, 64, 64, 64), (1, 512, 1024, 1024)]
    small, large = (inference_limits.product_seconds(size, "int8", 1, 0.02) for size in sizes)
    assert large > 4 * small
    products = [(2, 1, 64, 64, 64), (1, 1, 64, 512, 512)]
    sizes = [(1, 64, 64, 64), (1, 64, 512, 512)]
    assert inference_limits.limit_seconds(products, sizes, [0.5, 3.0]) == 4.0


@pytest.mark.slow
def test_every_loop_of_a_language_model_writes_the_same(
    tmp_path: Path, language_model_dir: Path, language_task: Any
) -> None:
    from pipelines.onnx.export import export_onnx

    (tmp_path / "ours").mkdir()
    export_onnx(str(language_model_dir), tmp_path / "ours", language_task)
    inference.make_exporters(language_model_dir, tmp_path, language_task, "exporters")
    windows = np.random.default_rng(0).integers(0, 300, (2, 9))
    loaders = inference_language_worker.LOADERS
    torch_write, torch_logits = loaders["torch"](language_model_dir, 1)
    expected = torch_write([5, 6, 7], 12)
    assert len(expected) == 12
    for name in ("exporters", "ours"):
        write, logits = loaders[name](tmp_path / name, 1)
        assert write([5, 6, 7], 12) == expected
        np.testing.assert_allclose(logits(windows), torch_logits(windows), atol=1e-3)


def test_instructions_can_be_hidden(tmp_path: Path) -> None:
    library = tmp_path / "avx2_only.so"
    source = REPOSITORY / "benchmarks" / "avx2_only.c"
    if shutil.which("cc") is None or platform.machine() != "x86_64":
        pytest.skip("needs cc and x86-64")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    found = "import numpy; print(numpy.show_config(mode='dicts')['SIMD Extensions']['found'])"
    done = subprocess.run(
        [sys.executable, "-c", found], env=os.environ | {"LD_PRELOAD": str(library)}, capture_output=True, text=True
    )
    if "cannot make CPUID fault" in done.stderr:
        pytest.skip("needs a processor and a kernel whose CPUID can fault")
    assert done.returncode == 0
    assert "AVX512" not in done.stdout
    assert "X86_V4" not in done.stdout
