"""The bundle: infer.py alone, in a process that may import nothing but its four packages, predicts as the pipeline does."""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from conftest import make_bundle, make_texts
from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.records import read_record
from pipelines.data.images import MOST_PIXELS, read_image
from pipelines.edge.bundle import PROBE_TEXTS, write_manifest
from pipelines.edge.load import load
from pipelines.edge.settings import image_settings
from pipelines.onnx.predict import predict_onnx
from pipelines.runtime import images, infer
from pipelines.runtime.generate import Sampling
from pipelines.tasks.image_classification import ImageClassification
from pipelines.tasks.text_classification import TextClassification

# Runs infer.py as a person would, but for an import of anything that a minimal environment does not have.
ONLY_FOUR_PACKAGES = """
import os, runpy, sys
allowed = {"numpy", "onnxruntime", "tokenizers", "PIL", "generate", "images", *sys.stdlib_module_names}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and not top.startswith("__"):
            raise ModuleNotFoundError(f"{name} is not in a minimal environment", name=name)
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
assert not {"torch", "transformers", "pipelines", "onnx"} & sys.modules.keys()
"""


def start(bundle: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", ONLY_FOUR_PACKAGES, str(bundle / "infer.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, **options)


def predictions(bundle: Path, *arguments: str, **options: Any) -> list[dict[str, Any]]:
    done = start(bundle, *arguments, "--json", **options)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def refused(bundle: Path, *arguments: str, **options: Any) -> tuple[int, str]:
    """The exit status, and the one line of the error."""
    done = start(bundle, *arguments, **options)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_the_same_logits_to_the_last_digit_without_torch(text_bundle, task, tokenizer):
    features = task.features(tokenizer)["test"]
    expected = predict_onnx(text_bundle / "model.onnx", features, task.collate(tokenizer), task)
    (text_bundle.parent / "lines.txt").write_text("\n".join(task.texts_of()), encoding="utf-8")
    found = predictions(text_bundle, "--file", str(text_bundle.parent / "lines.txt"))
    assert len(found) == len(features) == 48
    np.testing.assert_array_equal(np.array([one["logits"] for one in found], np.float32), expected)
    assert [one["label"] for one in found] == [task.label_names[index] for index in expected.argmax(axis=1)]
    softmax = torch.softmax(torch.from_numpy(expected), dim=1).numpy()
    np.testing.assert_allclose([list(one["probabilities"].values()) for one in found], softmax, atol=1e-6)
    assert len({one["label"] for one in found}) > 1


def test_long_odd_and_empty_texts_are_tokenized_as_transformers_does(text_bundle, tokenizer):
    prepare = infer.Predictor(text_bundle).prepare
    texts = ["goal " * 500, "", "[SEP] goal [MASK]", "NAÏVE 東京 🙂\u200b\t\r x", "a" * 300]
    for text in texts:
        expected = tokenizer(text, truncation=True, max_length=32)
        found = prepare((text,))
        assert {name: value[0].tolist() for name, value in found.items()} == dict(expected)
    assert found["input_ids"].shape[1] < 32 == prepare((texts[0],))["input_ids"].shape[1]


def test_pairs(tmp_path, text_onnx):
    texts = make_texts(120)
    rows = [f'"{text}","{texts[(7 * i) % 120][0]}",{label}\n' for i, (text, label) in enumerate(texts)]
    (tmp_path / "pairs.csv").write_text("text,other,label\n" + "".join(rows), encoding="utf-8")
    data = DataConfig(dataset=str(tmp_path / "pairs.csv"), text_pair_column="other", max_length=16)
    task = TextClassification(data)
    bundle = make_bundle(text_onnx / "quantized", tmp_path / "bundle", task)
    tokenizer = task.load_processor(str(bundle))
    test = task.data.splits["test"]
    features = task.features(tokenizer)["test"]
    # Both halves are cut, and the second is told from the first.
    assert max(features["length"]) == 16
    assert any(1 in row for row in features["token_type_ids"])
    expected = predict_onnx(bundle / "model.onnx", features, task.collate(tokenizer), task)
    (tmp_path / "lines.txt").write_text(
        "".join(f"{a}\t{b}\n" for a, b in zip(test["text"], test["text_pair"], strict=True))
    )
    found = predictions(bundle, "--pair", "--file", str(tmp_path / "lines.txt"))
    np.testing.assert_array_equal(np.array([one["logits"] for one in found], np.float32), expected)
    by_arguments = predictions(bundle, "--pair", test["text"][0], test["text_pair"][0])
    assert by_arguments == found[:1]

    assert refused(bundle, "a goal")[0] == 2
    assert refused(bundle, "--pair", "a", "b", "c")[0] == 2
    status = start(bundle, "--pair", "--stdin", input="a\tb\nno tab\n")
    assert status.returncode == 1
    assert "line 2 of standard input" in status.stderr
    assert len(status.stdout.splitlines()) == 1


def test_a_stream_is_answered_line_by_line(text_bundle):
    command = [sys.executable, str(text_bundle / "infer.py"), "--stdin"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for text in ("a goal", "", "the bank"):
            process.stdin.write(text + "\n")
            assert select.select([process.stdout], [], [], 60)[0], "the answer waits for more input, or in a buffer"
            label, probability, given = process.stdout.readline().rstrip("\n").split("\t")
            assert label in ("sport", "tech", "trade")
            assert 1 / 3 < float(probability) <= 1
            assert given == text
        process.stdin.close()
    assert process.returncode == 0


def test_images_to_the_last_digit(image_bundle, image_task, image_folder):
    paths = sorted(image_folder.rglob("*.png"))
    processor = image_task.load_processor(str(image_bundle))
    session = onnxruntime.InferenceSession(image_bundle / "model.onnx", providers=["CPUExecutionProvider"])
    for one, path in zip(predictions(image_bundle, *map(str, paths[:20])), paths, strict=False):
        pixels = processor([read_image({"path": str(path)})], return_tensors="np")["pixel_values"]
        expected = session.run(["logits"], {"pixel_values": pixels})[0][0]
        np.testing.assert_array_equal(np.array(one["logits"], np.float32), expected)
        assert one["input"] == str(path)


def test_images_of_more_than_8_bits_to_the_last_digit(image_onnx, tmp_path):
    generator = np.random.default_rng(0)
    for number in range(60):
        folder = tmp_path / "data" / ["sport", "tech", "trade"][number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(100, 4096, (8, 8), np.uint16)).save(folder / f"{number}.png")
    task = ImageClassification(DataConfig(dataset=str(tmp_path / "data")))
    bundle = make_bundle(image_onnx, tmp_path / "bundle", task)
    manifest = json.loads((bundle / "manifest.json").read_text())
    low, high = manifest["inputs"]["value_range"]
    assert [low, high] == task.value_range
    assert 100 <= low < 150
    assert 4000 < high < 4096
    paths = sorted((tmp_path / "data").rglob("*.png"))[:5]
    processor = task.load_processor(str(bundle))
    rows = [{"image": {"path": str(path), "bytes": None}, "labels": 0} for path in paths]
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    found = predictions(bundle, *map(str, paths))
    for one, row in zip(found, rows, strict=True):
        inputs = {"pixel_values": task.collate(processor)([row])["pixel_values"].numpy()}
        np.testing.assert_array_equal(np.array(one["logits"], np.float32), session.run(["logits"], inputs)[0][0])
    # A directory without a manifest knows the range from the record.
    stage = tmp_path / "stage"
    shutil.copytree(image_onnx, stage)
    (stage / "record.json").write_text(json.dumps({"made_by": {"task": task.describe()}}))
    assert load(stage)(str(paths[0]))["logits"] == found[0]["logits"]


def image_files() -> list[BytesIO]:
    """Upright, lying, tiny, odd; grey, 16-bit, with a palette, transparent, turned by its orientation tag."""
    generator = np.random.default_rng(0)
    images = [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
        for height, width in [(53, 37), (37, 53), (3, 90), (7, 7), (256, 256), (431, 299)]
    ]
    images += [images[0].convert(mode) for mode in ("L", "1", "P", "RGBA", "CMYK", "LA")]
    images.append(Image.fromarray(generator.integers(0, 65536, (40, 31), np.uint16)))
    files = []
    for image in images:
        files.append(BytesIO())
        image.save(files[-1], "TIFF" if image.mode == "CMYK" else "PNG")
    turned = images[0].getexif()
    turned[274] = 6
    files.append(BytesIO())
    images[0].save(files[-1], "JPEG", exif=turned)
    return files


@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        ("ViTImageProcessorPil", {"size": {"height": 32, "width": 24}, "image_mean": [0.485, 0.456, 0.406]}),
        ("ViTImageProcessorPil", {"resample": 3, "do_normalize": False}),
        ("ViTImageProcessorPil", {"do_rescale": False, "resample": 1, "size": {"height": 9, "width": 300}}),
        ("ViTImageProcessorPil", {"do_resize": False}),
        ("DeiTImageProcessorPil", {}),
        ("DeiTImageProcessorPil", {"crop_size": {"height": 301, "width": 270}, "resample": 0}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 224}}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 77}, "crop_pct": 0.9, "resample": 4}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 384}, "resample": 5}),
        ("BitImageProcessorPil", {}),
        ("MobileNetV2ImageProcessorPil", {}),
    ],
)
def test_pixels_are_those_of_transformers_bit_by_bit(processor, settings):
    import transformers

    reference = getattr(transformers, processor)(**settings)
    for number, file in enumerate(image_files()):
        expected = reference([read_image({"bytes": file.getvalue()})], return_tensors="np")["pixel_values"][0]
        found = images.image_pixels(images.read_image(file), image_settings(reference))
        assert found.dtype == expected.dtype == np.float32 or not (reference.do_rescale or reference.do_normalize)
        np.testing.assert_array_equal(found, expected, err_msg=f"image {number}")


def test_a_processor_that_the_runtime_does_not_follow_is_refused(image_onnx, image_task, tmp_path):
    source = tmp_path / "onnx"
    shutil.copytree(image_onnx, source)
    settings = json.loads((source / "preprocessor_config.json").read_text())
    # EfficientNet's normalizes twice.
    settings |= {"image_processor_type": "EfficientNetImageProcessor", "include_top": True}
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        VerificationError, match="an image of 37 x 53 pixels exactly as EfficientNet.* pixel_values differ"
    ):
        make_bundle(source, tmp_path / "bundle", image_task)


def test_a_slow_tokenizer_is_refused(text_onnx, task, tmp_path, monkeypatch):
    source = tmp_path / "onnx"
    shutil.copytree(text_onnx / "onnx", source)
    processor = task.load_processor(str(source))
    (source / "tokenizer.json").unlink()
    monkeypatch.setattr(task, "load_processor", lambda _: processor)
    with pytest.raises(InputError, match="has only a slow tokenizer"):
        make_bundle(source, tmp_path / "bundle", task)


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("model.onnx", "flip", "changed or cut"),
        ("model.onnx", "cut", "changed or cut"),
        ("tokenizer.json", "flip", "changed or cut"),
        ("config.json", "remove", "No such file"),
        ("manifest.json", "remove", "FileNotFoundError"),
        ("manifest.json", "cut", "JSONDecodeError"),
        ("manifest.json", "relabel", "it was changed"),
        ("manifest.json", "older", "format 2 in .*, found 1"),
    ],
)
def test_damage_is_refused_by_name(text_bundle, tmp_path, name, change, found):
    bundle = tmp_path / "bundle"
    shutil.copytree(text_bundle, bundle)
    path = bundle / name
    content = path.read_bytes()
    middle = len(content) // 2
    changes = {
        "flip": lambda: content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "cut": lambda: content[:middle],
        "relabel": lambda: content.replace(b'"sport"', b'"tennis"', 1),
        "older": lambda: content.replace(b'"format": 2', b'"format": 1'),
    }
    if change == "remove":
        path.unlink()
    else:
        path.write_bytes(changes[change]())
        assert path.read_bytes() != content
    status, error = refused(bundle, "a goal")
    assert status == 1
    assert str(path) in error
    assert re.search(found, error)


def test_a_name_that_leads_out_of_the_bundle_is_refused_unread(text_bundle, tmp_path):
    outside = tmp_path / "outside.onnx"
    os.mkfifo(outside)  # who opened it would wait for ever
    forged = {"sha256": "0" * 64, "bytes": 1}
    for name in ("../outside.onnx", str(outside), "web/../../outside.onnx"):
        for as_model in (False, True):
            bundle = tmp_path / "bundle"
            shutil.rmtree(bundle, ignore_errors=True)
            shutil.copytree(text_bundle, bundle)
            manifest = json.loads((bundle / "manifest.json").read_text())
            manifest |= {"model": name} if as_model else {"files": manifest["files"] | {name: forged}}
            manifest["checksum"] = infer.content_checksum(manifest)
            (bundle / "manifest.json").write_text(json.dumps(manifest))
            with pytest.raises(infer.BundleError, match=re.escape(f"found {name!r}, which leads out of it")):
                infer.read_manifest(bundle)


def test_a_bundle_of_links_as_in_the_cache_of_the_hub(text_bundle, tmp_path):
    for path in text_bundle.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert predictions(tmp_path, "a goal") == predictions(text_bundle, "a goal")


def test_the_page_may_be_left_on_the_computer(text_bundle, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(text_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "web").mkdir()
    for name in ("index.html", "web/library.mjs"):
        (bundle / name).write_text("for a browser")
    write_manifest(bundle, manifest)
    (bundle / "web" / "library.mjs").unlink()
    assert predictions(bundle, "a goal")


def test_errors_are_one_line(text_bundle, image_bundle, tmp_path):
    status, error = refused(text_bundle, "a goal", "--provider", "CUDA")
    assert status == 1
    assert "cpu" in error
    assert "--provider CUDA" in error
    assert refused(text_bundle, "--file", str(tmp_path / "none.txt"))[0] == 1
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe caf\xe9")
    assert "UTF-8" in refused(text_bundle, "--file", str(tmp_path / "latin.txt"))[1]
    assert "UTF-8" in refused(text_bundle, os.fsdecode(b"caf\xe9"))[1]
    (tmp_path / "no.png").write_text("not an image")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    for file, found in (
        ("none.png", "No such file"),
        ("no.png", "cannot identify"),
        ("huge.png", "more than 64 million"),
    ):
        done = start(image_bundle, str(tmp_path / file))
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert file in done.stderr
        assert found in done.stderr
    assert images.MOST_PIXELS == MOST_PIXELS
    for flags in (
        [],
        ["a", "--stdin"],
        ["a", "--threads", "0"],
        ["--pair", "a", "b"],
        ["--nosuchflag"],
        ["--thr", "1"],
    ):
        assert refused(text_bundle, *flags)[0] == 2, flags
    assert refused(image_bundle, "--pair", "a", "b")[0] == 2


def test_without_a_standard_input(text_bundle):
    closed = {"preexec_fn": lambda: os.close(0)}
    assert predictions(text_bundle, "a goal", **closed)
    status, error = refused(text_bundle, "--stdin", **closed)
    assert status == 1
    assert "found: it is closed" in error


def test_a_carriage_return_inside_a_line_is_part_of_the_text(tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"a goal\rof the team\r\n\r\nthe bank\r")
    flags = argparse.Namespace(inputs=[], file=str(tmp_path / "lines.txt"), stdin=False)
    assert list(infer.read_examples(flags, 1)) == [("a goal\rof the team",), ("",), ("the bank",)]


def test_ready_in_less_than_a_second_after_the_imports(text_bundle, image_bundle, language_bundle):
    for bundle, open_model in (
        (text_bundle, infer.Predictor),
        (image_bundle, infer.Predictor),
        (language_bundle, infer.Generator),
    ):
        seconds = []
        for _ in range(3):  # the least of three: other tests run beside this one
            started = time.perf_counter()
            open_model(bundle)
            seconds.append(time.perf_counter() - started)
        assert min(seconds) < 1


def test_a_provider_that_is_not_the_cpu(text_bundle, tmp_path, monkeypatch):
    model = text_bundle / "model.onnx"
    # In every build for Linux; without an endpoint of its own it leaves all to the CPU.
    session = infer.open_session(model, provider="Azure")
    assert session.get_providers() == ["AzureExecutionProvider", "CPUExecutionProvider"]
    (tmp_path / "lines.txt").write_text("a goal\nthe bank\n")
    lines = ("--file", str(tmp_path / "lines.txt"))
    assert predictions(text_bundle, *lines, "--provider", "azure") == predictions(text_bundle, *lines)

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    with pytest.raises(infer.BundleError, match="expected the execution provider CUDA to start, found that it does"):
        infer.open_session(model, provider="CUDA")


def test_the_benchmark_of_a_long_file_warms_up_on_its_first_lines(text_bundle, monkeypatch):
    predictor, run = infer.Predictor(text_bundle, threads=1), []
    monkeypatch.setattr(predictor, "logits", run.append)
    clock = iter(range(10_000))
    monkeypatch.setattr(infer.time, "perf_counter", lambda: next(clock))
    texts = [(text,) for text, _ in make_texts(100)]
    infer.benchmark(predictor, texts)
    assert run == texts[:5] + texts[:5]


def test_the_benchmark(text_bundle, image_bundle):
    for bundle in (text_bundle, image_bundle):
        done = start(bundle, "--benchmark", "--json", "--threads", "1")
        assert done.returncode == 0, done.stderr
        measured = json.loads(done.stdout)
        assert (measured["threads"], measured["provider"]) == (1, "CPUExecutionProvider")
        assert 0 < measured["p50_ms"] <= measured["p95_ms"] < measured["ready_ms"]


def test_a_language_model_continues_as_torch_does_and_streams(language_bundle):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(language_bundle.parent / "model").eval()
    words = AutoTokenizer.from_pretrained(language_bundle.parent / "model")
    prompts = ["the team said", "a new\rchip", "naïve 東京"]
    continuations = []
    for prompt in prompts:
        ids = torch.tensor([words(prompt)["input_ids"]])
        new = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        continuations.append(words.decode(new, skip_special_tokens=True))
    found = predictions(language_bundle, "--max_new_tokens", "12", "--stdin", input="\n".join(prompts))
    assert [one["continuation"] for one in found] == continuations
    assert [one["input"] for one in found] == prompts
    shown = start(language_bundle, prompts[0], "--max_new_tokens", "12")
    assert shown.stdout == prompts[0] + continuations[0] + "\n"

    assert not list(language_bundle.rglob("__pycache__"))

    generator = infer.Generator(language_bundle)
    # transformers.js makes an empty cache with an axis of any other name 0 long.
    assert {value.shape[0] for value in generator.session.get_inputs()} == {"batch_size"}
    pieces = list(generator.stream(prompts[0], Sampling(max_new_tokens=12)))
    assert len(pieces) > 3
    assert "".join(pieces) == continuations[0]


def test_sampling_flags_of_a_language_model(language_bundle, text_bundle):
    draw = ["the team", "--max_new_tokens", "8", "--sampling_temperature", "1.5", "--top_k", "50", "--top_p", "0.95"]
    first, again, other = (predictions(language_bundle, *draw, "--seed", seed)[0] for seed in ("1", "1", "2"))
    assert first == again != other
    assert refused(language_bundle, "the team", "--top_p", "2")[0] == 2
    assert refused(text_bundle, "the team", "--top_p", "0.5")[0] == 2
    status, error = refused(language_bundle, "goal " * 200)
    assert status == 1
    assert re.search("fewer than 64 tokens.*Shorten the text", error)
    assert refused(language_bundle, "goal " * 200, "--benchmark") == (1, error)
    status, error = refused(language_bundle, "the team", "--seed", "-1")
    assert (status, error.endswith("seed cannot be -1")) == (2, True)
    measured = json.loads(start(language_bundle, "--benchmark", "--json", "--max_new_tokens", "8").stdout)
    assert measured["tokens_per_second"] > 0 < measured["time_to_first_token_ms"]
    shutil.copytree(language_bundle, copy := language_bundle.parent / "copy", dirs_exist_ok=True)
    (copy / "generate.py").unlink()
    assert re.search("generate.py, found: .*No such file", refused(copy, "the team")[1])


def test_the_record_and_the_manifest_say_what_is_there(text_bundle):
    manifest = json.loads((text_bundle / "manifest.json").read_text())
    there = {path.name for path in text_bundle.iterdir()} - {"manifest.json"}
    assert manifest["files"].keys() == there >= {"model.onnx", "tokenizer.json", "infer.py", "requirements.txt"}
    assert manifest["outputs"] == {"kind": "classes", "activation": "softmax", "labels": ["sport", "tech", "trade"]}
    probes = manifest["inputs"].pop("probes")
    assert manifest["inputs"] == {"kind": "text", "pair": False, "max_length": 32, "truncation_side": "right"}
    assert [probe["texts"] for probe in probes] == [[text] for text in PROBE_TEXTS]
    assert (manifest["opset"], manifest["minimum_onnxruntime"]) == (23, "1.23.0")
    requirements = (text_bundle / "requirements.txt").read_text().splitlines()
    assert requirements[0] == "# Python 3.10 or newer, 64-bit"
    assert "onnxruntime>=1.23.0" in requirements
    assert read_record(text_bundle) is None  # the run writes it


def test_an_older_onnxruntime_is_refused_with_the_version_it_takes(text_bundle):
    with pytest.raises(infer.BundleError, match="expected onnxruntime 99.1 or newer"):
        infer.open_session(text_bundle / "model.onnx", minimum="99.1")
    assert infer.version_key("1.23.0") < infer.version_key("1.23.1+cu") < infer.version_key("1.101.0.dev2")


@pytest.mark.packages
@pytest.mark.parametrize(
    ("bundle", "minimum", "atol"),
    [("text_bundle", "1.23.0", 0.05), ("image_bundle", "1.18.0", 1e-4), ("language_bundle", "1.18.0", 0)],
)
def test_the_oldest_onnxruntime_that_it_asks_for_answers_alike(bundle, minimum, atol, request, image_folder, tmp_path):
    directory = request.getfixturevalue(bundle)
    assert f"onnxruntime>={minimum}" in (directory / "requirements.txt").read_text().splitlines()
    python = tmp_path / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
    # ONNX Runtime of that time was built for NumPy 1.
    packages = ["-r", str(directory / "requirements.txt"), f"onnxruntime=={minimum}", "numpy<2"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    examples = [text for text, _ in make_texts(12, seed=5)]
    if bundle == "image_bundle":
        examples = [str(path) for path in sorted(image_folder.rglob("*.png"))[:12]]
    command = [str(python), str(directory / "infer.py"), "--json", *examples]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for one, here in zip(map(json.loads, done.stdout.splitlines()), predictions(directory, *examples), strict=True):
        assert one.get("label") == here.get("label")
        assert one.get("continuation") == here.get("continuation")
        np.testing.assert_allclose(one.get("logits", []), here.get("logits", []), atol=atol)
