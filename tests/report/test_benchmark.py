"""The benchmark on tiny real models: fresh processes, the right order, the right arithmetic, no heavy imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import pipelines
from pipelines.core.errors import InputError
from pipelines.core.task import Workload
from pipelines.onnx.measure import (
    Subject,
    carries,
    encoder_workload,
    measure,
    paired_ratios,
    percentiles,
    run_worker,
    time_batches,
    time_calls,
    write_spec,
)


def write_matmuls(path: Path, count: int, width: int = 192) -> Path:
    """An ONNX model of `count` matmuls in a row, so that twice the count is twice the work."""
    path.mkdir()
    weight = np.random.default_rng(0).normal(0, width**-0.5, (width, width)).astype(np.float32)
    nodes = [helper.make_node("MatMul", [f"h{i}", "weight"], [f"h{i + 1}"]) for i in range(count)]
    graph = helper.make_graph(
        nodes,
        "matmuls",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["batch", "length", width])],
        [helper.make_tensor_value_info(f"h{count}", TensorProto.FLOAT, ["batch", "length", width])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path / "model.onnx")
    return path


def feed(batch: int, length: int, width: int = 192) -> dict[str, np.ndarray]:
    # `unused` stands for what a tokenizer gives and the graph does not take.
    return {"h0": np.ones((batch, length, width), np.float32), "unused": np.ones((batch, length), np.int64)}


def onnx_subject(path: Path) -> Subject:
    return Subject(path.name, path, "onnx", encoder_workload(feed(1, 64), [feed(4, 32), feed(2, 64)]))


def test_measure_tells_a_slow_model_from_a_fast_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = [onnx_subject(write_matmuls(tmp_path / "slow", 60)), onnx_subject(write_matmuls(tmp_path / "fast", 2))]
    # The caller's folder must matter neither for finding the package nor for the modules that the worker imports.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('shadowed by the working directory')")
    subjects[0].path = Path("slow")
    # ru_maxrss would inherit this from the parent.
    ballast = np.ones(100_000_000, np.float32)

    results = measure(subjects, rounds=3, threads=2, seconds=0.1)

    assert list(results) == ["slow", "fast"]
    for result in results.values():
        assert len(result["rounds"]) == 3
        assert result["threads"] == 2
        assert result["latency_ms"]["shape"] == [1, 64, 192]
        assert result["latency_ms"]["batch_size"] == 1
        assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p95"]
        assert result["latency_ms"]["p50"] == sorted(one["p50"] for one in result["rounds"])[1]
        assert result["samples_per_second"] == sorted(one["samples_per_second"] for one in result["rounds"])[1]
        assert all(one["repetitions"] >= 20 for one in result["rounds"])
        assert 10e6 < result["peak_memory_bytes"] < ballast.nbytes
    ratio = paired_ratios(results, "slow", "fast")
    assert 3 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert results["fast"]["samples_per_second"] > 3 * results["slow"]["samples_per_second"]


def test_a_torch_stage_is_timed_beside_an_onnx_one(tmp_path: Path) -> None:
    pytest.importorskip("pipelines.training.prune")
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    token_ids = np.arange(24, dtype=np.int64).reshape(2, 12)
    batch = {"input_ids": token_ids, "attention_mask": np.ones_like(token_ids)}
    workload = encoder_workload({k: v[:1] for k, v in batch.items()}, [batch])
    bert = Subject("bert", tmp_path / "bert", "transformers", workload)

    results = measure([bert, onnx_subject(write_matmuls(tmp_path / "matmuls", 1))], rounds=1, seconds=0.1)

    assert results["bert"]["latency_ms"]["shape"] == [1, 12]
    assert results["bert"]["samples_per_second"] > 0
    # A process with torch in it is several times the size of one with ONNX Runtime alone.
    assert results["bert"]["peak_memory_bytes"] > 1.5 * results["matmuls"]["peak_memory_bytes"]


def test_paired_ratios_are_taken_within_rounds() -> None:
    # The machine is twice as slow in the second round: the ratio of each pair does not notice.
    results = {
        "slow": {"rounds": [{"p50": 8.0}, {"p50": 18.0}, {"p50": 10.0}]},
        "fast": {"rounds": [{"p50": 2.0}, {"p50": 4.0}, {"p50": 2.0}]},
    }
    assert paired_ratios(results, "slow", "fast") == {"median": 4.5, "low": 4.0, "high": 5.0}


def test_time_calls_takes_the_percentiles_of_the_calls() -> None:
    # After 3 calls of warm-up every tenth call is slow: the median does not see it, the 95th percentile does.
    calls = 0

    def run(_: object) -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.02 if calls > 3 and calls % 10 == 0 else 0.001)

    timed = time_calls(run, None, seconds=0.0)
    assert timed["repetitions"] == 20
    assert calls == 23
    assert 1 <= timed["p50"] < 5
    assert timed["p95"] > timed["p50"] + 5


def test_no_95th_percentile_is_taken_of_a_few_numbers() -> None:
    assert percentiles(np.arange(19.0)) == {"p50": 9.0}
    assert percentiles(np.arange(21.0)) == {"p50": 10.0, "p95": 19.0}


def test_whatever_else_a_worker_times_is_reported_as_a_median(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [{"p50": time, "words_per_second": 10 * time, "peak_memory_bytes": time} for time in (4.0, 1.0, 2.0)]
    rounds = iter([times[0] | {"p95": 5.0}, *times[1:]])  # of which one had calls enough for it
    monkeypatch.setattr("pipelines.onnx.measure.run_worker", lambda module, spec, name, fork: next(rounds))
    subject = Subject("words", write_matmuls(tmp_path / "words", 1), "onnx", Workload("words", shape=[1, 4]))
    (result,) = measure([subject], rounds=3, threads=1).values()
    assert result["latency_ms"] == {"p50": 2.0, "p95": None, "batch_size": 1, "shape": [1, 4]}
    assert result["words_per_second"] == 20.0
    assert result["peak_memory_bytes"] == 4


def test_the_load_beside_each_round_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([0.0, *(0.1, 0.0), *(1.2, 0.1), *(0.9, 0.2)])  # before, and beside both models in each of the rounds
    monkeypatch.setattr("pipelines.onnx.measure.load_beside", lambda work: (work(), next(loads)))
    monkeypatch.setattr("pipelines.core.machine._own_cores", lambda: {0, 1})
    subjects = [onnx_subject(write_matmuls(tmp_path / name, 1)) for name in ("first", "second")]
    results = measure(subjects, rounds=3, threads=2, seconds=0.01)
    assert results["first"]["load"] == {"before": 0.0, "during": 0.9}
    assert results["second"]["load"] == {"before": 0.0, "during": 0.1}
    assert [result["busy"] for result in results.values()] == [True, False]


def test_a_ratio_carries_within_a_factor_of_two() -> None:
    assert carries({"median": 3.0, "low": 2.0, "high": 4.0})
    assert not carries({"median": 274.0, "low": 87.0, "high": 1965.0})


def test_throughput_counts_whole_passes() -> None:
    ran: list[int] = []

    def run(feed: dict[str, np.ndarray]) -> None:
        ran.append(len(feed["a"]))
        time.sleep(0.002)

    feeds = [{"a": np.zeros((3, 5))}, {"a": np.zeros((2, 50))}]
    start = time.perf_counter()
    samples_per_second = time_batches(run, feeds, [3, 2], seconds=0.2)
    elapsed = time.perf_counter() - start
    # The warm-up runs the largest feed, then whole passes follow.
    assert ran[0] == 2
    assert ran[1:] == [3, 2] * (len(ran) // 2)
    # The warm-up is in the one and not in the other, and a busy machine may pause between them.
    assert sum(ran[1:]) / elapsed <= samples_per_second <= 2 * sum(ran[1:]) / elapsed


def test_the_onnx_worker_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "datasets", "pandas", "matplotlib", "onnx", "sklearn", "evaluate"]
    code = f"import sys, pipelines.onnx.measure; print([name for name in {heavy} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(Path(pipelines.__file__).parent.parent)}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    broken = write_matmuls(tmp_path / "broken", 1)
    content = (broken / "model.onnx").read_bytes()
    (broken / "model.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="(?s)timing broken ended with status 1.*INVALID_PROTOBUF"):
        measure([onnx_subject(broken)], rounds=1, seconds=0.01)

    subject = onnx_subject(write_matmuls(tmp_path / "hungry", 1))
    subject.workload.feeds["single"] = {"other": np.ones((1, 4), np.float32)}
    with pytest.raises(InputError, match=r"found none for \['h0'\]"):
        measure([subject], rounds=1, seconds=0.01)


def test_a_torch_worker_that_fails_says_why_and_the_next_one_does_not_mind(tmp_path: Path) -> None:
    from conftest import tiny_model

    tiny_model("bert").save_pretrained(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    ids = {"input_ids": np.ones((1, 4), np.int64), "attention_mask": np.ones((1, 4), np.int64)}
    specs = {}
    for name in ("broken", "good"):
        subject = Subject(name, tmp_path / name, "transformers", encoder_workload(ids, [ids]))
        specs[name] = write_spec(tmp_path / f"spec_{name}", subject, threads=1, seconds=0.01)
    with pytest.raises(InputError, match=rf"^expected whole safetensors weights in {weights}, found .*\Z"):
        run_worker("pipelines.onnx.measure", specs["broken"], "broken", fork=True)
    assert run_worker("pipelines.onnx.measure", specs["good"], "good", fork=True)["p50"] > 0
