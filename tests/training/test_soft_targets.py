"""Soft targets: the same bytes however many shards or processes, resumed at a shard, flat in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.core.config import DistillConfig
from pipelines.core.errors import InputError
from pipelines.core.records import RECORD
from pipelines.core.run import Run
from pipelines.models.predict import predict_torch
from pipelines.training.losses import TOP_K_COLUMNS
from pipelines.training.soft_targets import WithSoftTargets, compute_soft_targets, shard_is_whole, write_shards

REPOSITORY = Path(__file__).parents[2]


def stored(features, directory, name="teacher_logits"):
    return np.stack([row[name] for row in WithSoftTargets(features, directory)])


@pytest.fixture
def teacher_logits(trained_teacher, task, tokenizer):
    teacher = task.load_model(str(trained_teacher))
    return predict_torch(teacher, task.features(tokenizer)["train"], task.collate(tokenizer), task)


def test_shards_hold_the_logits_of_every_example_once(trained_teacher, task, tokenizer, tmp_path, teacher_logits):
    features = task.features(tokenizer)["train"]
    outcome = compute_soft_targets(str(trained_teacher), tmp_path, task, DistillConfig(), shard_examples=50)
    assert len(features) == 144
    shards = [f"shard-0000{i}.safetensors" for i in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*shards, "tokenizer.json", "tokenizer_config.json"]
    assert outcome.details == {"examples": 144, "bytes_per_example": 12, "shards": 3}
    np.testing.assert_allclose(stored(features, tmp_path), teacher_logits, atol=1e-5)

    some = WithSoftTargets(features, tmp_path).select([100, 3, 143])
    np.testing.assert_array_equal(
        np.stack([some[i]["teacher_logits"] for i in range(3)]), stored(features, tmp_path)[[100, 3, 143]]
    )
    again = some.select([2, 0])
    assert [again[i]["input_ids"] for i in range(2)] == [features[i]["input_ids"] for i in (143, 100)]
    np.testing.assert_array_equal(again[1]["teacher_logits"], some[0]["teacher_logits"])


def test_a_run_killed_in_the_soft_targets_continues_with_that_shard(
    trained_teacher, task, tokenizer, tmp_path, monkeypatch, capsys
):
    """Through Run.stage, whose partial directory keeps the shards; one of these is then damaged in the middle."""
    from pipelines.training import soft_targets

    written: list[str] = []
    real = soft_targets.check_finite

    def killed_at_the_fourth(arrays, first):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(str(first))
        real(arrays, first)

    settings = {"distill": DistillConfig(), "shard_examples": 25}

    def attempt() -> None:
        run = Run(tmp_path / "run", task, seed=0)
        try:
            run.stage("soft_targets", compute_soft_targets, str(trained_teacher), distributed=True, **settings)
        finally:
            run._lock.release()

    monkeypatch.setattr(soft_targets, "check_finite", killed_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        attempt()
    partial = tmp_path / "run" / ".soft_targets.partial"
    shards = sorted(partial.glob("shard-*.safetensors"))
    assert len(shards) == 3
    content = bytearray(shards[1].read_bytes())
    content[-5] ^= 1
    shards[1].write_bytes(content)
    before = {path: path.stat().st_mtime_ns for path in shards}

    monkeypatch.setattr(soft_targets, "check_finite", lambda arrays, first: written.append(str(first)))
    attempt()
    assert written == ["0", "25", "50", "25", "75", "100", "125"]
    assert "shard-00001.safetensors of an interrupted attempt is damaged" in capsys.readouterr().out
    finished = tmp_path / "run" / "soft_targets"
    assert (finished / shards[0].name).stat().st_mtime_ns == before[shards[0]]
    files = {*json.loads((finished / RECORD).read_text())["files"]}
    assert files > {f"shard-0000{i}.safetensors" for i in range(6)}
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    monkeypatch.undo()
    compute_soft_targets(str(trained_teacher), undisturbed, task, **settings)
    for path in undisturbed.iterdir():
        assert path.read_bytes() == (finished / path.name).read_bytes()


def test_a_shard_is_whole_only_with_its_own_content_and_length(tmp_path, task, tokenizer):
    features = task.features(tokenizer)["train"].select(range(5))
    write_shards(features, tmp_path, 5, lambda rows: {"teacher_logits": np.ones((len(rows), 2), np.float32)})
    path = tmp_path / "shard-00000.safetensors"
    whole = path.read_bytes()
    assert shard_is_whole(path, 5)
    assert not shard_is_whole(path, 4)
    for damaged in (whole[:-8], whole[: len(whole) // 2], b"", whole[:-1] + b"\x01"):
        path.write_bytes(damaged)
        assert not shard_is_whole(path, 5)


def test_another_runs_shards_in_the_same_place_are_not_mixed_up(tmp_path, task, tokenizer):
    features = task.features(tokenizer)["train"].select(range(5))
    for value in (1.0, 2.0):
        for path in tmp_path.iterdir():
            path.unlink()
        write_shards(features, tmp_path, 5, lambda rows, v=value: {"teacher_logits": np.full((5, 2), v, np.float32)})
        assert stored(features, tmp_path).mean() == value


def test_logits_that_are_not_finite_are_refused_by_row(task, tokenizer, tmp_path):
    features = task.features(tokenizer)["train"].select(range(20))

    def compute(rows):
        logits = np.ones((len(rows), 3), np.float32)
        if rows[0]["input_ids"] == features[10]["input_ids"]:
            logits[3, 1] = np.inf
        return {"teacher_logits": logits}

    with pytest.raises(InputError, match=r"teacher_logits for 1 training examples, row 13 of"):
        write_shards(features, tmp_path, 10, compute)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.safetensors"]


def test_token_soft_targets_are_the_same_in_any_shards(language_task, language_teacher, tmp_path):
    features = language_task.features(language_task.load_processor(str(language_teacher)))["train"]
    details, targets = [], []
    distill = DistillConfig(temperature=2.0, soft_target_top_k=5)
    for size in (1000, 8):
        directory = tmp_path / str(size)
        directory.mkdir()
        outcome = compute_soft_targets(str(language_teacher), directory, language_task, distill, shard_examples=size)
        details.append(outcome.details)
        targets.append({name: stored(features, directory, name) for name in TOP_K_COLUMNS})
    assert details[0]["shards"] == 1
    assert details[1]["shards"] == -(-len(features) // 8) > 2
    for name in TOP_K_COLUMNS:
        np.testing.assert_array_equal(targets[0][name], targets[1][name])
    assert targets[0]["teacher_ids"].dtype == np.uint16
    assert details[0]["bytes_per_example"] == 32 * (5 * 6 + 4)
    mass = np.exp(targets[0]["teacher_log_tail_mass"].astype(np.float64))
    total = np.exp(targets[0]["teacher_log_probabilities"]).sum(axis=-1) + mass
    np.testing.assert_allclose(total, 1, atol=1e-4)


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_examples(tmp_path):
    """The short form of the benchmark: twenty times as many examples, whose logits together would break the limit four times over."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "labelling_memory.py"), "--examples", "400", "8000"]
    command += [
        "--shard_examples",
        "400",
        "--width",
        "8",
        "--tokens",
        "4",
        "--labels",
        "3000",
        "--read",
        "500",
        "--output",
        str(tmp_path / "memory.json"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert finished.returncode == 0, finished.stderr[-2000:]
    few, many = json.loads((tmp_path / "memory.json").read_text())
    assert (few["examples"], many["examples"]) == (400, 8000)
    assert many["shards"] == 20
    assert many["stored_bytes"] > 15 * few["stored_bytes"]
    assert many["stored_bytes"] > 90e6
    assert many["peak_anonymous_bytes"] - few["peak_anonymous_bytes"] < 25e6


def test_soft_targets_are_keyed_by_what_they_depend_on(task, language_task):
    """Logits are stored as they are; of tokens only the likeliest, at a temperature."""
    hot = DistillConfig(temperature=4.0, soft_target_top_k=5, divergence="reverse_kl")
    assert hot.only(task.soft_target_settings) == DistillConfig()
    assert hot.only(language_task.soft_target_settings) == DistillConfig(temperature=4.0, soft_target_top_k=5)
