"""--seeds: what depends on the seed is repeated, the rest is shared; the report says what differs over them, and what does not."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

import processes
from pipelines import chain
from pipelines.cli import main
from pipelines.core.task import Comparison
from pipelines.report.report import read_report
from pipelines.report.seeds import delta_over_seeds, over_seeds, seeds_section
from pipelines.tasks.classification import ClassifierPresentation, weighted_accuracy
from watched import check_only_the_main_process_wrote, watched_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "distill_bert.py"
SMALL = (
    "--num_train_epochs 1 --learning_rate 3e-3 --per_device_train_batch_size 8 --student_layers 1 --max_length 32 --use_cpu "
    "--benchmark_rounds 1 --benchmark_seconds 0.1 --prune_epochs 1 --prune_steps 1 --max_quality_drop 1 --web false --baselines false --seeds 2"
).split()


def models(seeds: int, examples: int, effect: float, seed: int = 0):
    """For each seed whether two models are right (examples,), the first one more often; their errors are on the same examples."""
    generator = np.random.default_rng(seed)
    hard = generator.random(examples)
    pairs = []
    for _ in range(seeds):
        skill = 0.8 + 0.03 * generator.standard_normal()
        noisy = [np.clip(hard + 0.1 * generator.standard_normal(examples), 0, 1) for _ in range(2)]
        pairs.append(
            tuple(
                ((noise < skill + gain).astype(float), np.ones(examples))
                for noise, gain in zip(noisy, (effect, 0), strict=True)
            )
        )
    return pairs


def test_the_interval_is_that_of_the_formula():
    pairs = models(5, 400, 0.02)
    found = delta_over_seeds(weighted_accuracy, pairs)
    deltas = np.array([one[0] - other[0] for one, other in pairs])  # (seeds, examples)
    of_seeds = deltas.mean(axis=1).var(ddof=1) / 5
    of_examples = deltas.mean(axis=0).var(ddof=0) / 400  # what a bootstrap estimates by drawing
    freedom = (of_seeds + of_examples) ** 2 / (of_seeds**2 / 4 + of_examples**2 / 399)
    half = t.ppf(0.975, freedom) * np.sqrt(of_seeds + of_examples)
    assert found["value"] == pytest.approx(deltas.mean())
    assert found["values"] == pytest.approx(deltas.mean(axis=1))
    assert found["standard_deviation"] == pytest.approx(deltas.mean(axis=1).std(ddof=1))
    assert found["low"] == pytest.approx(deltas.mean() - half, abs=0.05 * half)
    assert found["high"] == pytest.approx(deltas.mean() + half, abs=0.05 * half)


def test_an_interval_covers_the_truth_and_few_examples_have_none(monkeypatch):
    """Of twenty studies of models that are equally good, an interval of 95 % may miss zero once or twice."""
    monkeypatch.setattr("pipelines.report.bootstrap.RESAMPLES", 200)
    missed = 0
    for study in range(20):
        found = delta_over_seeds(weighted_accuracy, models(3, 200, 0.0, seed=study))
        missed += not found["low"] <= 0 <= found["high"]
    assert missed <= 3
    assert delta_over_seeds(weighted_accuracy, models(3, 10, 0.5))["low"] is None
    same = [(one, one) for one, _ in models(2, 50, 0.0)]
    found = delta_over_seeds(weighted_accuracy, same)
    assert (found["value"], found["low"], found["high"]) == (0, 0, 0)


def comparisons(effect):
    found = {}
    for seed, (one, other) in enumerate(models(3, 300, effect)):
        samples = {"teacher": one, "student": one, "student_labels_only": other}
        stages = {name: {"metrics": {"accuracy": weighted_accuracy(*sample)}} for name, sample in samples.items()}
        stages |= {"teacher_onnx": stages["teacher"]} if seed == 0 else {}
        found[42 + seed] = Comparison(stages, {}, samples, weighted_accuracy)
    return found


@pytest.mark.parametrize(("effect", "verdict"), [(0.0, "no measurable difference"), (0.3, "a measurable gain")])
def test_the_section_has_means_deviations_and_what_they_are_worth(effect, verdict):
    pairs = [("student", "teacher"), ("student", "student_labels_only"), ("student", "pruned"), ("teacher", "teacher")]
    seeds = over_seeds(comparisons(effect), "accuracy", pairs)
    assert seeds["seeds"] == [42, 43, 44]
    assert list(seeds["stages"]) == ["teacher", "student", "student_labels_only"]  # what every seed has
    values = seeds["stages"]["student"]["values"]
    assert seeds["stages"]["student"]["mean"] == pytest.approx(np.mean(values))
    assert seeds["stages"]["student"]["standard_deviation"] == pytest.approx(np.std(values, ddof=1))
    assert [(delta["stage"], delta["other"]) for delta in seeds["deltas"]] == pairs[:2]
    report = {"seeds": seeds, "primary_metric": "accuracy", "greater_is_better": True}
    text = "\n\n".join(seeds_section(report, ClassifierPresentation()))
    assert "## Over 3 seeds" in text
    assert f"student minus student_labels_only, mean of the seeds: {seeds['deltas'][1]['value']:+.3f}" in text
    assert verdict in text
    assert "With 3 seeds only" in text
    assert seeds_section({"seeds": None}, ClassifierPresentation()) == []


def run_recipe(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *argv])
    runpy.run_path(str(RECIPE), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def argv(small_teacher, csv_file, tmp_path_factory):
    """A run whose teacher is used as it is."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--teacher_model", str(small_teacher), "--teacher_epochs", "0", "--label_baseline", "true"]
    return ["--dataset", str(csv_file), "--output_dir", str(directory), *flags, *SMALL]


@pytest.mark.usefixtures("timed_here")
def test_a_run_with_two_seeds_that_is_killed_in_the_second(argv, monkeypatch, capsys):
    directory = Path(argv[argv.index("--output_dir") + 1])
    real = chain.prune_and_recover

    def killed(source, target, *arguments, **keywords):
        if "seeds" in target.parts:
            raise KeyboardInterrupt
        return real(source, target, *arguments, **keywords)

    monkeypatch.setattr(chain, "prune_and_recover", killed)
    killed.__module__, killed.__qualname__ = real.__module__, real.__qualname__
    with pytest.raises(SystemExit) as ended:
        run_recipe(argv, monkeypatch, capsys)
    assert ended.value.code == 130
    monkeypatch.setattr(chain, "prune_and_recover", real)
    said = run_recipe(argv, monkeypatch, capsys)
    assert "seeds/43/student: finished already" in said
    assert "seeds/43/pruned: done in" in said

    made = {path.name for path in (directory / "seeds" / "43").iterdir()}
    assert made == {
        "student",
        "student_labels_only",
        "pruned",
        "onnx",
        "quantized",
    }  # the teacher and its logits are shared
    records = [json.loads((directory / place / "record.json").read_text()) for place in ("student", "seeds/43/student")]
    assert [record["made_by"]["seed"] for record in records] == [42, 43]
    assert [record["made_by"]["training"]["seed"] for record in records] == [42, 43]
    assert records[0]["files"]["model.safetensors"] != records[1]["files"]["model.safetensors"]
    assert records[0]["made_by"]["source_fingerprint"] == records[1]["made_by"]["source_fingerprint"]

    report, changed = read_report(directory)
    assert not changed
    seeds = report["seeds"]
    assert seeds["seeds"] == [42, 43]
    assert set(seeds["stages"]) == {*made, "teacher"}
    by_name = {stage["name"]: stage["metrics"]["accuracy"] for stage in report["stages"]}
    assert all(seeds["stages"][name]["values"][0] == by_name[name] for name in seeds["stages"])
    assert seeds["stages"]["teacher"]["standard_deviation"] == 0
    assert [(delta["stage"], delta["other"]) for delta in seeds["deltas"]] == [
        ("quantized", "teacher"),
        ("student", "student_labels_only"),
    ]
    for page in ("report.md", "README.md"):
        assert "## Over 2 seeds" in (directory / page).read_text()
    assert "student minus student_labels_only, mean of the seeds" in said


def test_finished_again_there_is_nothing_to_do_and_timed_again_the_seeds_stay(argv, monkeypatch, capsys, tmp_path):
    directory = Path(argv[argv.index("--output_dir") + 1])
    moved = shutil.copytree(directory, tmp_path / "moved")
    said = run_recipe([*argv, "--output_dir", str(moved)], monkeypatch, capsys)
    assert "done in" not in said
    assert "report: finished already" in said
    assert said.count("seeds/43/") == 5
    monkeypatch.setattr(sys, "argv", ["pocketformers", "report", "--again", "--output_dir", str(moved)])
    main()
    assert read_report(moved)[0]["seeds"] == read_report(directory)[0]["seeds"]
    assert "## Over 2 seeds" in (moved / "report.md").read_text()


@pytest.mark.slow
def test_a_teacher_that_is_trained_is_repeated_too_on_several_processes(pretrained, csv_file, tmp_path):
    argv = [
        "--teacher_model",
        str(pretrained),
        "--dataset",
        str(csv_file),
        "--output_dir",
        str(tmp_path / "run"),
        *SMALL,
    ]
    argv += ["--teacher_epochs", "4", "--teacher_learning_rate", "3e-3", "--prune_heads", "0", "--prune_ffn", "0"]
    argv += ["--label_baseline", "false", "--per_device_train_batch_size", "4"]
    process = processes.run_recipe(str(RECIPE), *argv, processes=2, function=watched_recipe)
    assert process.returncode == 0, process.stderr[-3000:]
    check_only_the_main_process_wrote(tmp_path / "run")
    made = {path.name for path in (tmp_path / "run" / "seeds" / "43").iterdir()}
    assert made == {"teacher", "soft_targets", "student", "onnx", "quantized"}
    seeds = json.loads((tmp_path / "run" / "report.json").read_text())["seeds"]
    assert [(delta["stage"], delta["other"]) for delta in seeds["deltas"]] == [("quantized", "teacher")]
