"""Every recipe, run as a user runs it, on tiny real models; every YAML; every kind of bad input."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import processes
from conftest import make_texts, tiny_model, write_csv
from pipelines.core.errors import InputError
from pipelines.onnx import measure
from watched import check_only_the_main_process_wrote, watched_recipe

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "recipes" / "distill_bert.py"
CONFIGS = REPOSITORY / "recipes" / "configs"
SMALL = """
    --teacher_epochs 6 --teacher_learning_rate 3e-3 --num_train_epochs 3 --learning_rate 3e-3
    --per_device_train_batch_size 8 --student_layers 1 --max_length 32 --benchmark_rounds 1 --benchmark_seconds 0.1
    --prune_epochs 1 --prune_heads 0.5 --max_quality_drop 0.1 --use_cpu --web false
""".split()
ESTIMATORS = ["majority_class", "tfidf_logistic_regression"]
STAGES = [
    "teacher",
    "teacher_onnx",
    "student",
    "student_labels_only",
    "pruned",
    "onnx",
    "quantized",
    "teacher_quantized",
]
STAGES += ESTIMATORS
pytestmark = pytest.mark.usefixtures("timed_here")
TOKEN = "hf_" + "a1B2c3D4" * 5


def run_recipe(*argv: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """The recipe in this process, which spares the seconds that the imports take: exit status, output, errors."""
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *argv])
    status = 0
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pretrained, csv_file):
    """A whole run on the csv file, with the baseline on labels alone."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    argv = [str(RECIPE), "--teacher_model", str(pretrained), "--dataset", str(csv_file), "--output_dir", str(directory)]
    argv += [*SMALL, "--label_baseline", "true", "--hub_token", TOKEN]
    return directory, argv, processes.run_recipe(*argv)


def test_the_recipe_makes_every_stage_and_a_report_as_in_the_contract(finished):
    directory, _, process = finished
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads((directory / "report.json").read_text())
    assert {"recipe", "task", "primary_metric", "environment", "stages"} <= report.keys()
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
            *("samples_per_second", "peak_memory_bytes", "seconds"),
        }
        assert {"p50", "p95", "batch_size", "shape"} <= stage["latency_ms"].keys()
        assert (directory / stage["path"] / "record.json").is_file()
        assert stage["latency_ms"]["batch_size"] == 1
        assert 0 <= stage["metrics"]["accuracy"] <= 1
        assert (stage["format"] == "sklearn") == (stage["name"] in ESTIMATORS)
        assert (stage["delta_to_shipped"] is None) == (stage["name"] not in ["teacher_quantized", *ESTIMATORS])
    by_name = {stage["name"]: stage for stage in report["stages"]}
    assert by_name["teacher"]["quality_retained"] == 1
    assert by_name["teacher"]["agreement"] == 1
    assert by_name["teacher"]["metrics"]["accuracy"] > 0.7
    assert by_name["pruned"]["parameters"] < by_name["student"]["parameters"] < by_name["teacher"]["parameters"]
    assert by_name["quantized"]["bytes"] < by_name["onnx"]["bytes"] < by_name["teacher_onnx"]["bytes"]
    assert by_name["teacher_quantized"]["bytes"] < by_name["teacher_onnx"]["bytes"]
    assert (
        by_name["tfidf_logistic_regression"]["metrics"]["accuracy"]
        > 0.8
        > by_name["majority_class"]["metrics"]["accuracy"]
    )
    assert by_name["majority_class"]["constant"]
    assert report["shipped"] == "quantized"
    for name in ("report.md", "report.png", "README.md"):
        assert (directory / name).stat().st_size > 500, name
    for name in ("report.md", "README.md"):
        assert (
            "You may not need a transformer here: the accuracy of tfidf_logistic_regression is"
            in (directory / name).read_text()
        )
    assert "You may not need a transformer here" in process.stdout
    # Scored again where the data changed, also if every stage then ends in the same bytes.
    record = json.loads((directory / "student" / "record.json").read_text())
    assert report["made_by"]["task"] == record["made_by"]["task"]
    assert report["made_by"]["flags"]["max_length"] == 32
    assert f"{STAGES[-1]}: done in" in process.stdout
    # At the end stands what to do next.
    said = process.stdout[process.stdout.index("What next:") :]
    assert f'python {directory}/bundle/infer.py "A text."' in said
    assert f"pocketformers push --output_dir {directory} --hub_model_id NAME" in said


def test_the_users_token_is_in_no_file_and_in_no_output(finished):
    directory, _, process = finished
    assert TOKEN not in process.stdout + process.stderr
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {"record.json", "report.json", "report.md", "README.md", "model.onnx"} <= {path.name for path in files}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_every_stage_opens_with_stock_tools(finished):
    import onnxruntime
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    directory, _, _ = finished
    for name in ("teacher", "student", "student_labels_only", "pruned"):
        _, info = AutoModelForSequenceClassification.from_pretrained(directory / name, output_loading_info=True)
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), name
        AutoTokenizer.from_pretrained(directory / name)
    for name in ("teacher_onnx", "onnx", "quantized"):
        onnxruntime.InferenceSession(str(directory / name / "model.onnx"))
        assert json.loads((directory / name / "config.json").read_text())["id2label"]
        AutoTokenizer.from_pretrained(directory / name)


def test_the_bundle_answers_alone(finished):
    directory, _, _ = finished
    command = [sys.executable, str(directory / "bundle" / "infer.py"), "--json", "a goal in the league"]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert answer["probabilities"].keys() == {"sport", "tech", "trade"}
    record = json.loads((directory / "bundle" / "record.json").read_text())
    assert record["details"]["verification"]["examples"] > 10
    assert record["details"]["page"].startswith("none")


def test_the_record_counts_the_fused_nodes(finished):
    directory, _, _ = finished
    details = json.loads((directory / "quantized" / "record.json").read_text())["details"]
    assert details["fused_nodes"]["attention"] == details["fused_nodes"]["attention_blocks"] == 1
    assert details["verification"]["quality_lost"] <= 0.1


def test_a_second_run_does_nothing_but_say_so(finished, capsys, monkeypatch):
    directory, argv, _ = finished
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    started = time.perf_counter()
    status, out, err = run_recipe(*argv[1:], capsys=capsys, monkeypatch=monkeypatch)  # made in another process
    assert status == 0, err
    assert time.perf_counter() - started < 60
    said = [line for line in out.splitlines() if line.endswith("finished already")]
    assert len(said) == len(STAGES) + 3  # the soft targets, the bundle and the report, too
    after = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    changed = {path.name for path in before if before[path] != after.get(path)}
    assert changed <= {".lock", ".pocketformers"}


def test_a_changed_flag_redoes_what_it_affects_and_no_more(finished, capsys, monkeypatch):
    directory, argv, _ = finished
    copy = directory.with_name("changed")
    shutil.copytree(directory, copy)
    # Without the baseline the report has a row less, and nothing is trained again.
    changed = [*argv[1:], "--output_dir", str(copy), "--target_cpu", "arm64", "--label_baseline", "false"]
    status, out, err = run_recipe(*changed, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0, err
    assert "quantized: redone, because quantize.target_cpu changed from 'any' to 'arm64'" in out
    redone = [line.partition(":")[0] for line in out.splitlines() if ": redone" in line]
    assert redone == ["quantized", "teacher_quantized", "bundle"]
    assert "report: written" in out


def test_the_single_report_refuses_other_data_and_leaves_out_what_its_source_outlived(finished, capsys):
    from pipelines.core.config import DataConfig
    from pipelines.core.run import Run
    from pipelines.report.results import finished_stages
    from pipelines.tasks.text_classification import TextClassification

    directory, argv, _ = finished
    copy = directory.with_name("outlived")
    shutil.copytree(directory, copy)
    data = {"dataset": argv[argv.index("--dataset") + 1], "max_length": 32}
    run = Run(copy, TextClassification(DataConfig(**data)), seed=42)
    assert finished_stages(run) == STAGES
    shutil.rmtree(copy / "student")
    shutil.copytree(copy / "student_labels_only", copy / "student")  # as if it was trained again
    alone = ["teacher_quantized", *ESTIMATORS]
    assert finished_stages(run) == ["teacher", "teacher_onnx", "student", "student_labels_only", *alone]
    said = capsys.readouterr().out
    assert "pruned: left out, because student was rebuilt since" in said
    assert "quantized: left out, because onnx was left out" in said
    run.task = TextClassification(DataConfig(**data, split_seed=1))
    with pytest.raises(InputError, match="data changed"):
        finished_stages(run)


def disturb(argv: list[str], directory: Path, scratch: Path) -> tuple[dict[str, int], list[str]]:
    """The stages in which a run was killed, and where it ended otherwise than the one in `directory`."""
    sys.path.insert(0, str(REPOSITORY))
    from benchmarks import kills

    os.chdir("/")
    kills.import_everything()
    measure.run_worker = processes.time_here
    return kills.disturb(argv, directory, scratch, seed=111, both=False)


def test_a_run_killed_in_every_stage_ends_as_the_undisturbed_one(finished, tmp_path):
    """The short form of benchmarks/kills.py. The run starts in another process, so the same seed gives the same bytes, too."""
    directory, argv, _ = finished
    (killed,) = processes.values(processes.run_processes(1, tmp_path / "kills", disturb, argv, directory, tmp_path))
    kills, differences = killed
    assert list(kills) == [
        *("teacher", "soft_targets", "student", "student_labels_only", "pruned"),
        *("teacher_onnx", "onnx", "quantized", "teacher_quantized", *ESTIMATORS, "bundle", "report"),
    ]
    assert sum(kills.values()) >= len(kills) - 1  # the run may end before the last of them comes
    assert not differences


ALIKE = ["bert_bbc_news", "bert_few_labels", "bert_sst2"]


# Not the demo's, which `finished` runs.
@pytest.mark.parametrize(
    "config", ["bert_mnli", "bert_film_reviews", *(pytest.param(name, marks=pytest.mark.slow) for name in ALIKE)]
)
def test_every_config_runs_on_data_of_its_shape(config, tokenizer, tmp_path, capsys, monkeypatch):
    """The file's columns, splits and settings, with a tiny model and a small data set of the same layout in their place: in this
    process, and in two."""
    import datasets

    tiny_model(num_hidden_layers=2).base_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    names = ["sport", "tech", "trade"]
    features = datasets.Features(
        {
            settings.get("text_column", "text"): datasets.Value("string"),
            **({settings["text_pair_column"]: datasets.Value("string")} if "text_pair_column" in settings else {}),
            "label": datasets.ClassLabel(names=names),
        }
    )

    def split(rows: int, seed: int, hidden: bool = False) -> datasets.Dataset:
        texts = make_texts(rows, seed)
        columns = [[text for text, _ in texts], *([["the end"] * rows] if len(features) == 3 else [])]
        labels = [-1 if hidden else names.index(label) for _, label in texts]
        return datasets.Dataset.from_dict(dict(zip(features, [*columns, labels], strict=True)), features=features)

    splits = {"train": split(150, 1)}
    if settings["dataset"] == "nyu-mll/glue":
        validation = settings.get("test_split", "validation")
        splits |= {validation: split(60, 2), "test": split(60, 3, hidden=True)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    argv = ["--config", str(CONFIGS / f"{config}.yaml"), "--teacher_model", str(tmp_path / "model")]
    argv += ["--dataset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"), *SMALL]
    argv += "--student_layers 1 --prune_ffn 0 --prune_heads 0 --quantization none --max_quality_drop 1".split()
    argv += ["--label_baseline", "false"]
    if "transfer_dataset" in settings:
        others = datasets.Dataset.from_dict({"text": [f"{text}. Said again." for text, _ in make_texts(40, 9)]})
        others.to_csv(tmp_path / "unlabelled.csv")
        argv += ["--transfer_dataset", str(tmp_path / "unlabelled.csv")]
    expected = ["teacher", "teacher_onnx", "student", "onnx"]
    if config == "bert_mnli":
        argv += ["--prune_heads", "0.5", "--prune_steps", "1", "--per_device_train_batch_size", "4"]
        finished = processes.run_recipe(str(RECIPE), *argv, processes=2, function=watched_recipe)
        check_only_the_main_process_wrote(tmp_path / "run")
        status, err = finished.returncode, finished.stderr[-3000:]
        assert finished.stdout.count("teacher: done in") == 1
        expected.insert(3, "pruned")
        expected += ESTIMATORS
    else:
        argv += ["--baselines", "false"]
        status, _, err = run_recipe(*argv, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0, err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == expected
    record = json.loads((tmp_path / "run" / "student" / "record.json").read_text())
    assert record["processes"] == (2 if config == "bert_mnli" else 1)
    transfer = report["data"].get("transfer", {})
    assert transfer.get("rows_read") == (40 if "transfer_dataset" in settings else None)
    assert transfer.get("examples") == record["details"].get("transfer", {}).get("examples")


def bad_inputs(tmp_path: Path, tokenizer) -> dict[str, tuple[list[str], str]]:
    """For each kind of bad input the flags and what the message must name."""
    rows = make_texts(60)
    one_class = write_csv(tmp_path / "one_class.csv", [(text, "sport") for text, _ in rows])
    empty_text = write_csv(tmp_path / "empty_text.csv", [*rows, ("", "sport")])
    no_weights, truncated, two_labels = tmp_path / "no_weights", tmp_path / "truncated", tmp_path / "two_labels"
    for directory in (no_weights, truncated):
        tiny_model().save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    (no_weights / "model.safetensors").unlink()
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    tiny_model(id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1}).save_pretrained(two_labels)
    tokenizer.save_pretrained(two_labels)
    unknown_key = tmp_path / "unknown.yaml"
    unknown_key.write_text("teacher_modle: x\n")
    (tmp_path / "file").write_text("")
    return {
        "missing file": (["--dataset", str(tmp_path / "nowhere.csv")], "nowhere.csv"),
        "missing column": (["--text_column", "body"], "body"),
        "one class": (["--dataset", str(one_class)], "class"),
        "empty text": (["--dataset", str(empty_text)], "60"),
        "a label the teacher does not know": (
            ["--teacher_model", str(two_labels), "--teacher_epochs", "0"],
            "yes",
        ),
        "a student with other labels": (["--student_model", str(two_labels)], "same labels"),
        "no weights": (["--teacher_model", str(no_weights)], "safetensors"),
        "truncated weights": (["--teacher_model", str(truncated)], "truncated"),
        "no permission": (["--output_dir", str(tmp_path / "file" / "run")], "output_dir"),
        "unknown key": (["--config", str(unknown_key)], "teacher_model"),
        "too long": (["--max_length", "100000"], "max_length"),
        "package not installed": (["--teacher_model", "package://no_such_package/model"], "no_such_package"),
        "outside the package": (["--teacher_model", "package://datasets/../numpy"], "datasets"),
    }


BAD_INPUTS = [
    *("missing file", "missing column", "one class", "empty text", "a label the teacher does not know"),
    *("a student with other labels", "no weights", "truncated weights", "no permission", "unknown key", "too long"),
    *("package not installed", "outside the package"),
]


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_input_gives_one_message_and_status_1(kind, tmp_path, tokenizer, pretrained, csv_file, capsys, monkeypatch):
    flags, named = bad_inputs(tmp_path, tokenizer)[kind]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    argv = ["--teacher_model", str(pretrained), "--dataset", str(csv_file), "--output_dir", str(tmp_path / "run")]
    argv += [*SMALL, "--teacher_epochs", "1", *flags]
    if kind == "a student with other labels":
        argv += ["--teacher_epochs", "6", "--soft_target_weight", "0"]
    status, _, err = run_recipe(*argv, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 1
    messages = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert "expected" in messages[0]
    assert "found" in messages[0]
    assert named in messages[0]
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in before} == before


def test_every_kind_of_bad_input_is_tried(tmp_path, tokenizer):
    assert sorted(bad_inputs(tmp_path, tokenizer)) == sorted(BAD_INPUTS)


def test_an_unknown_flag_exits_with_status_2(capsys, monkeypatch):
    status, _, err = run_recipe("--teacher_modle", "x", capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2
    assert "--teacher_modle" in err


def test_a_checkpoint_to_go_on_from_is_a_flag_that_is_refused(capsys, monkeypatch):
    status, _, err = run_recipe("--resume_from_checkpoint", "last", capsys=capsys, monkeypatch=monkeypatch)
    assert status == 2
    assert "the same command continues from the last whole checkpoint" in " ".join(err.split())


def test_help_documents_every_flag(capsys, monkeypatch):
    status, out, _ = run_recipe("--help", capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0
    contract = """
        config output_dir teacher_model student_model student_layers dataset dataset_config text_column
        text_pair_column image_column label_column max_length max_train_samples max_eval_samples temperature
        soft_target_weight hidden_state_weight prune_heads prune_ffn quantization max_quality_drop teacher_epochs
        teacher_learning_rate lora_rank label_baseline push_to_hub hub_model_id learning_rate
        per_device_train_batch_size seed
    """.split()
    missing = [flag for flag in contract if f"--{flag}" not in out]
    assert not missing
