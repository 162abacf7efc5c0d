"""The image recipe, run as a user runs it, on a tiny shape and a few images; every one of its YAMLs; its kinds of bad input."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

import pipelines.onnx.measure
import processes
from conftest import make_image_processor, tiny_config, tiny_model, write_image_folder
from pipelines.onnx import quantize
from pipelines.onnx.measure import measure
from pipelines.training.baselines import load_baseline
from watched import check_only_the_main_process_wrote, watched_recipe

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "recipes" / "distill_vit.py"
SMALL = """
    --teacher_from_scratch --teacher_epochs 6 --teacher_learning_rate 3e-3 --num_train_epochs 3 --learning_rate 3e-3
    --per_device_train_batch_size 8 --student_layers 1 --benchmark_rounds 1 --benchmark_seconds 0.1 --prune_epochs 1
    --prune_heads 0.25 --prune_ffn 0.25 --prune_steps 1 --max_quality_drop 0.1 --use_cpu --label_baseline false --web false
""".split()
BASELINES = ["teacher_quantized", "majority_class", "nearest_neighbours", "pixel_logistic_regression"]
STAGES = ["teacher", "teacher_onnx", "student", "pruned", "onnx", "quantized", *BASELINES]


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A directory that only says what shape a model has, and how it sees images."""
    directory = tmp_path_factory.mktemp("shape")
    tiny_config("vit", num_hidden_layers=2, initializer_range=0.1).save_pretrained(directory)
    make_image_processor().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shape, image_folder):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    argv = [str(RECIPE), "--teacher_model", str(shape), "--dataset", str(image_folder), "--output_dir", str(directory)]
    argv += [*SMALL, "--quantization", "auto"]
    return directory, argv, processes.run_recipe(*argv, function=with_a_short_choice)


def with_a_short_choice(argv: list[str]) -> None:
    """The recipe, which times the candidates of `--quantization auto` once and shortly."""
    quantize.measure = lambda subjects, **settings: measure(subjects, rounds=1, seconds=0.05)
    pipelines.onnx.measure.run_worker = processes.time_here
    processes.recipe(argv)


def test_the_recipe_makes_every_stage_and_a_report_as_in_the_contract(finished):
    directory, _, process = finished
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads((directory / "report.json").read_text())
    assert (report["task"], report["primary_metric"]) == ("image-classification", "accuracy")
    assert [stage["name"] for stage in report["stages"]] == STAGES
    by_name = {stage["name"]: stage for stage in report["stages"]}
    assert by_name["teacher"]["metrics"]["accuracy"] > 0.7
    assert by_name["pruned"]["parameters"] < by_name["student"]["parameters"] < by_name["teacher"]["parameters"]
    assert by_name["quantized"]["latency_ms"]["shape"] == [1, 3, 8, 8]
    assert by_name["nearest_neighbours"]["latency_ms"]["shape"] == [1, 8 * 8 * 3]
    assert by_name["nearest_neighbours"]["metrics"]["accuracy"] > 0.9
    details = json.loads((directory / "quantized" / "record.json").read_text())["details"]
    assert details["fused_nodes"]["attention"] == 1
    candidates = [
        "dynamic_int8",
        *(f"static_int8_{calibration}" for calibration in ("minmax", "entropy", "percentile")),
    ]
    assert list(details["candidates"]) == candidates
    assert details["scheme"] in candidates
    card = (directory / "README.md").read_text()
    assert "AutoImageProcessor" in card
    assert "AutoTokenizer" not in card
    assert not list((directory / "quantized").glob(".*"))


def test_every_stage_opens_with_stock_tools_and_answers_alike(finished, image_folder):
    import numpy as np
    import onnxruntime
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    directory, _, _ = finished
    image = Image.open(next(image_folder.rglob("*.png")))
    for name in ("teacher", "student", "pruned"):
        model, info = AutoModelForImageClassification.from_pretrained(directory / name, output_loading_info=True)
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), name
    expected = model.eval()(
        **AutoImageProcessor.from_pretrained(directory / "pruned")(image, return_tensors="pt")
    ).logits
    for name in ("teacher_onnx", "onnx", "quantized"):
        session = onnxruntime.InferenceSession(str(directory / name / "model.onnx"))
        inputs = AutoImageProcessor.from_pretrained(directory / name)(image, return_tensors="np")
        logits = session.run(["logits"], {"pixel_values": inputs["pixel_values"]})[0]
        if name == "onnx":
            np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4)
    answer = pipeline("image-classification", model=str(directory / "pruned"))(image)[0]["label"]
    assert answer == model.config.id2label[int(expected.argmax())]


def test_a_second_run_does_nothing_but_say_so(finished, capsys, monkeypatch):
    _, argv, _ = finished
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(RECIPE), run_name="__main__")  # in this process; it was made in another
    assert capsys.readouterr().out.count("finished already") == len(STAGES) + 3


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_another_process(finished, tmp_path, monkeypatch):
    directory, argv, _ = finished
    # Among the schemes of `--quantization auto` measured speed decides, which is another every time.
    scheme = json.loads((directory / "quantized" / "record.json").read_text())["details"]["scheme"]
    quantization = ["--quantization", *scheme.replace("int8_", "int8 --calibration ").split()]
    monkeypatch.setattr("pipelines.chain.report_run", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", [*argv, "--output_dir", str(tmp_path / "run"), *quantization])
    runpy.run_path(str(RECIPE), run_name="__main__")
    # The pickle of one estimator has other bytes where other tests ran in the process before; its coefficients are compared instead.
    others = {"teacher_quantized", "pixel_logistic_regression"}
    for name in ("soft_targets", "bundle", *(name for name in STAGES if name not in others)):
        files = [json.loads((run / name / "record.json").read_text())["files"] for run in (directory, tmp_path / "run")]
        assert files[0] == files[1], name
    fitted = [load_baseline(run / "pixel_logistic_regression")[-1] for run in (directory, tmp_path / "run")]
    assert fitted[0].coef_ == pytest.approx(fitted[1].coef_, abs=1e-5)


def test_a_convolutional_student_goes_through_the_recipe_without_pruning_in_two_processes(
    finished, shape, image_folder, tmp_path
):
    student = tmp_path / "resnet"
    tiny_config("resnet").save_pretrained(student)
    make_image_processor(16).save_pretrained(student)
    argv = ["--teacher_model", str(shape), "--dataset", str(image_folder), "--output_dir", str(tmp_path / "run")]
    argv += [*SMALL, "--student_model", str(student), "--student_from_scratch", "true", "--quantization", "static_int8"]
    flags = ["--num_train_epochs", "8", "--per_device_train_batch_size", "4", "--baselines", "false"]
    process = processes.run_recipe(str(RECIPE), *argv, *flags, processes=2, function=watched_recipe)
    assert process.returncode == 0, process.stderr[-3000:]
    check_only_the_main_process_wrote(tmp_path / "run")
    assert all(f"pruned: the {kind} of a resnet stay" in process.stdout for kind in ("heads", "neurons"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["teacher", "teacher_onnx", "student", "onnx", "quantized"]
    assert report["stages"][-1]["metrics"]["accuracy"] > 0.7


@pytest.fixture
def bad_arguments(tmp_path, image_folder):
    one_class = tmp_path / "one class"
    write_image_folder(tmp_path / "three", 9)
    one_class.mkdir()
    (tmp_path / "three" / "tech").rename(one_class / "tech")
    broken = write_image_folder(tmp_path / "broken", 30)
    (broken / "tech" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    two_labels = tmp_path / "two labels"
    tiny_model("vit", id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1}).save_pretrained(two_labels)
    make_image_processor().save_pretrained(two_labels)
    no_processor = tmp_path / "no processor"
    tiny_model("vit").save_pretrained(no_processor)
    return {
        "one class": (["--dataset", str(one_class)], "at least two classes"),
        "unreadable image": (["--dataset", str(broken)], "tech/broken.jpg"),
        "no weights": (["--teacher_from_scratch", "false"], "safetensors"),
        "other labels": (
            ["--teacher_model", str(two_labels), "--teacher_from_scratch", "false", "--teacher_epochs", "0"],
            "yes",
        ),
        "no image processor": (["--teacher_model", str(no_processor)], "image processor"),
        "missing column": (["--dataset", "package://sklearn/datasets/data/wine_data.csv"], "pixels"),
    }


BAD_INPUTS = ["one class", "unreadable image", "no weights", "other labels", "no image processor", "missing column"]


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_input_is_one_message(kind, bad_arguments, shape, image_folder, tmp_path, capsys, monkeypatch):
    argv, expected = bad_arguments[kind]
    whole = [
        "--teacher_model",
        str(shape),
        "--dataset",
        str(image_folder),
        "--output_dir",
        str(tmp_path / "run"),
        *SMALL,
    ]
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *whole, *argv])
    with pytest.raises(SystemExit) as caught:  # in this process, which spares the seconds that the imports take
        runpy.run_path(str(RECIPE), run_name="__main__")
    errors = capsys.readouterr().err
    assert caught.value.code == 1
    assert len([line for line in errors.splitlines() if line.startswith("error:")]) == 1, errors
    assert all(part in errors for part in (expected, "expected", "found")), errors
    assert "Traceback" not in errors
