"""The language recipe, run as a user runs it, on a tiny shape and a few documents; its YAMLs; its kinds of bad input."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

import processes
from conftest import tiny_language_model
from pipelines import chain
from pipelines.data.windows import train_tokenizer
from watched import check_only_the_main_process_wrote, watched_recipe

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "recipes" / "distill_gpt2.py"
SMALL = """
    --teacher_from_scratch --vocabulary_size 300 --max_length 32 --teacher_epochs 6 --teacher_learning_rate 5e-3
    --num_train_epochs 1 --learning_rate 3e-3 --per_device_train_batch_size 8 --student_layers 1
    --label_baseline false --benchmark_rounds 1 --benchmark_seconds 0.1 --benchmark_threads 1 --prune_heads 0.25
    --prune_ffn 0.25 --prune_steps 1 --prune_epochs 0.5 --prune_samples 32 --quantization int8_blocks
    --block_size 16 --use_cpu --web false
""".split()
STAGES = ["teacher", "teacher_onnx", "student", "pruned", "onnx", "quantized", "teacher_quantized"]


def run_here(*argv: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The recipe in this process, which spares the seconds that the imports take; the exit status."""
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *argv])
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory, language_shape, language_text):
    """A whole run in two processes."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    argv = [
        "--teacher_model",
        str(language_shape),
        "--dataset",
        str(language_text),
        "--output_dir",
        str(directory),
        *SMALL,
    ]
    return directory, argv, processes.run_recipe(str(RECIPE), *argv, processes=2, function=watched_recipe)


def test_two_processes_make_every_stage_and_a_report_as_in_the_contract(finished):
    directory, _, process = finished
    assert process.returncode == 0, process.stderr[-3000:]
    check_only_the_main_process_wrote(directory)
    # ONNX Runtime's quantizer by blocks would have every library tell each step.
    assert "[INFO]" not in process.stdout + process.stderr
    report = json.loads((directory / "report.json").read_text())
    assert (report["task"], report["primary_metric"]) == ("text-generation", "perplexity")
    assert [stage["name"] for stage in report["stages"]] == STAGES
    for stage in report["stages"]:
        assert stage.keys() >= {
            *(
                "name",
                "path",
                "format",
                "metrics",
                "quality_retained",
                "agreement",
                "parameters",
                "bytes",
                "latency_ms",
            ),
            *("samples_per_second", "peak_memory_bytes", "seconds", "time_to_first_token_ms", "tokens_per_second"),
        }
        assert stage["metrics"].keys() >= {"perplexity", "bits_per_byte"}
    by_name = {stage["name"]: stage for stage in report["stages"]}
    assert by_name["teacher"]["metrics"]["perplexity"] < 150
    assert by_name["teacher"]["quality_retained"] == by_name["teacher"]["agreement"] == 1
    assert by_name["teacher_onnx"]["metrics"]["perplexity"] == pytest.approx(
        by_name["teacher"]["metrics"]["perplexity"], rel=1e-4
    )
    assert by_name["pruned"]["parameters"] < by_name["student"]["parameters"] < by_name["teacher"]["parameters"]
    assert by_name["quantized"]["bytes"] < by_name["onnx"]["bytes"]
    assert report["shipped"] == "quantized"
    assert by_name["teacher_quantized"]["bytes"] < by_name["teacher_onnx"]["bytes"]
    assert by_name["teacher_quantized"]["delta_to_shipped"]["value"] == pytest.approx(
        by_name["teacher_quantized"]["metrics"]["perplexity"] - by_name["quantized"]["metrics"]["perplexity"]
    )
    for name in ("report.md", "report.png", "README.md"):
        assert (directory / name).stat().st_size > 500, name
    # Training turns the cache off; what was trained generates with it, and so it is timed.
    for name in ("teacher", "student", "pruned"):
        for file in ("config.json", "generation_config.json"):
            assert json.loads((directory / name / file).read_text())["use_cache"] is True, (name, file)


@pytest.mark.parametrize("name", ["teacher_onnx", "onnx"])
def test_twenty_prompts_are_continued_as_torch_continues_them(finished, name):
    directory, _, _ = finished
    generation = json.loads((directory / name / "record.json").read_text())["details"]["verification"]["generation"]
    assert (generation["prompts"], generation["ties"]) == (20, 0)
    assert generation["tokens"] == 2 * 20 * 16  # alone and in batches


def test_a_second_run_in_one_process_does_nothing(finished, capsys, monkeypatch):
    _, argv, _ = finished
    assert run_here(*argv, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.count("finished already") == len(STAGES) + 2  # the bundle and the report, too
    record = json.loads((Path(argv[argv.index("--output_dir") + 1]) / "teacher" / "record.json").read_text())
    assert record["made_by"]["task"]["vocabulary_size"] == 300


def test_the_cards_own_code_runs(finished, capsys, monkeypatch):
    directory, _, _ = finished
    codes = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    assert len(codes) == 2
    monkeypatch.chdir(directory)
    for code in codes:
        exec(compile(code, "README.md", "exec"), {})
        assert len(capsys.readouterr().out) > len("A text")


def without_report(argv: list[str]) -> None:
    """The recipe, which leaves out what differs in times alone."""
    chain.report_run = lambda *arguments: None
    processes.recipe(argv)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_another_process(language_shape, language_text, tmp_path, monkeypatch):
    """With stored soft targets, in this process and in a fresh one; both without the report, of which only times differ."""
    argv = ["--teacher_model", str(language_shape), "--dataset", str(language_text), *SMALL, "--soft_targets", "stored"]
    argv += ["--quantization", "none"]  # measured speed chooses among the blocks
    fresh = processes.run_recipe(str(RECIPE), *argv, "--output_dir", str(tmp_path / "fresh"), function=without_report)
    assert fresh.returncode == 0, fresh.stderr[-3000:]
    monkeypatch.setattr("pipelines.chain.report_run", lambda *arguments: None)
    assert run_here(*argv, "--output_dir", str(tmp_path / "here"), monkeypatch=monkeypatch) == 0
    for name in ("teacher", "soft_targets", "student", "pruned", "teacher_onnx", "onnx", "bundle"):
        files = [json.loads((tmp_path / run / name / "record.json").read_text())["files"] for run in ("fresh", "here")]
        assert files[0] == files[1], name


def test_the_demos_shape_has_a_position_for_every_token():
    from pipelines.chain import demo_config
    from pipelines.core.command import parse_config
    from pipelines.core.config import DataConfig, TeacherConfig

    path = str(demo_config("text-generation"))
    settings = parse_config([DataConfig, TeacherConfig], argv=["--config", path], only=True)
    shape = json.loads((Path(settings.teacher.teacher_model) / "config.json").read_text())
    assert shape["n_positions"] >= settings.data.max_length


@pytest.fixture
def bad_arguments(tmp_path, language_model_dir):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "two.txt").write_bytes(b"caf\xc3\xa9\n\n" * 30 + b"caf\xe9\n")
    other = tmp_path / "other"
    tiny_language_model(n_layer=1).save_pretrained(other)
    train_tokenizer(["QUITE OTHER WORDS"] * 5 + ["AND MORE OF THEM TO LEARN FROM"] * 3, 300).save_pretrained(other)
    weights_only = tmp_path / "weights only"
    tiny_language_model().save_pretrained(weights_only)
    known = ["--teacher_model", str(language_model_dir), "--teacher_from_scratch", "false"]
    return {
        "empty file": (["--dataset", str(tmp_path / "empty.txt")], "empty file"),
        "two encodings": (["--dataset", str(tmp_path / "two.txt")], "expected one encoding"),
        "block above the limit": (["--max_length", "128"], "--max_length of at most 64"),
        "other vocabulary": ([*known, "--student_model", str(other)], "same vocabulary"),
        "no tokenizer": (["--teacher_model", str(weights_only), "--teacher_from_scratch", "false"], "a tokenizer"),
        "stride": (["--stride", "32"], "--stride below --max_length"),
    }


BAD_INPUTS = [
    "empty file",
    "two encodings",
    "block above the limit",
    "other vocabulary",
    "no tokenizer",
    "stride",
]


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_input_is_one_message(kind, bad_arguments, language_shape, language_text, tmp_path, capsys, monkeypatch):
    argv, expected = bad_arguments[kind]
    whole = [
        "--teacher_model",
        str(language_shape),
        "--dataset",
        str(language_text),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert run_here(*whole, *SMALL, *argv, monkeypatch=monkeypatch) == 1
    errors = capsys.readouterr().err
    assert len([line for line in errors.splitlines() if line.startswith("error:")]) == 1, errors
    assert all(part in errors for part in (expected, "expected", "found")), errors
    assert "Traceback" not in errors
