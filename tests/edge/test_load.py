"""load(): a bundle, an ONNX directory or a published model in Python, by the code of infer.py; and what outputs a manifest may name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from test_edge import predictions, start

from conftest import make_texts
from pipelines.core.errors import InputError
from pipelines.edge.bundle import write_manifest
from pipelines.edge.load import load
from pipelines.edge.settings import head_outputs
from pipelines.runtime import infer
from pipelines.runtime.generate import LanguageModel, Sampling

TEXTS = [text for text, _ in make_texts(4, seed=5)]
VALUES = {"kind": "values", "names": ["score"]}
LABELS = {
    "kind": "classes",
    "activation": "sigmoid",
    "labels": ["sport", "tech", "trade"],
    "thresholds": [0.5, 0.5, 0.9],
}


def bundle_by_hand(directory: Path, tokenizer: Any, outputs: dict[str, Any], shape: list[int]) -> Path:
    """A bundle whose graph is made by hand: the tokens' mean times 1, -1, 0.5, … as logits of this shape (batch first)."""
    directory.mkdir()
    tokenizer.save_pretrained(directory)
    shutil.copy(infer.__file__, directory)
    weights = np.array([1.0, -1.0, 0.5, 0.25], np.float32)[: np.prod(shape)].reshape(shape) / 20
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "by_hand",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), directory / "model.onnx"
    )
    inputs = {"kind": "text", "pair": False, "max_length": 16, "truncation_side": "right", "probes": []}
    manifest = {
        "format": infer.FORMAT,
        "task": "a new task",
        "model": "model.onnx",
        "inputs": inputs,
        "outputs": outputs,
    }
    write_manifest(directory, manifest | {"minimum_onnxruntime": "1.18.0"})
    return directory


# ---- Outputs


@pytest.mark.parametrize("shape", [[1], [1, 1]])
def test_a_value(tokenizer, tmp_path, shape):
    bundle = bundle_by_hand(tmp_path / "bundle", tokenizer, VALUES, shape)
    mean = np.mean(tokenizer(TEXTS[0], truncation=True, max_length=16)["input_ids"])
    (found,) = predictions(bundle, TEXTS[0])
    assert found == {"input": TEXTS[0], "values": {"score": pytest.approx(mean / 20)}}
    value, given = start(bundle, TEXTS[0]).stdout.rstrip("\n").split("\t")
    assert (float(value), given) == (pytest.approx(mean / 20, rel=1e-5), TEXTS[0])
    assert load(bundle)(TEXTS[0]) == found


def test_several_labels(tokenizer, tmp_path):
    bundle = bundle_by_hand(tmp_path / "bundle", tokenizer, LABELS, [1, 3])
    (found,) = predictions(bundle, TEXTS[0])
    logits = np.array(found["logits"])
    np.testing.assert_allclose(list(found["probabilities"].values()), 1 / (1 + np.exp(-logits)), atol=1e-12)
    assert 0.5 < found["probabilities"]["trade"] < 0.9
    assert found["labels"] == ["sport"]
    assert start(bundle, TEXTS[0]).stdout == f"sport\t{found['probabilities']['sport']:.4f}\t{TEXTS[0]}\n"
    assert load(bundle)(TEXTS[0]) == found


def test_outputs_that_are_probabilities_already_and_logits_that_overflow():
    settings = {"kind": "classes", "activation": "none", "labels": ["a", "b"]}
    found = infer.read_outputs(np.array([0.25, 0.75], np.float32), settings)
    assert (found["label"], found["probability"], found["probabilities"]) == ("b", 0.75, {"a": 0.25, "b": 0.75})
    logits = np.array([-1e4, 1e4], np.float32)
    for activation in ("softmax", "sigmoid"):
        found = infer.read_outputs(logits, settings | {"activation": activation})
        assert found["probabilities"] == {"a": 0.0, "b": 1.0}


def test_how_a_head_is_read_follows_from_its_config(tmp_path):
    def outputs(**config: Any) -> dict[str, Any]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return head_outputs(tmp_path)

    three = {"2": "c", "0": "a", "1": "b"}
    classes = {"kind": "classes", "activation": "softmax", "labels": ["a", "b", "c"]}
    assert outputs(id2label=three) == outputs(id2label=three, problem_type=None) == classes
    assert outputs(id2label=three, problem_type="multi_label_classification") == classes | {"activation": "sigmoid"}
    assert outputs()["labels"] == ["LABEL_0", "LABEL_1"]
    assert outputs(id2label={"0": "LABEL_0"}, problem_type="regression") == VALUES
    assert outputs(id2label={"0": "quality"}, problem_type="regression")["names"] == ["quality"]
    assert outputs(id2label={"0": "LABEL_0"}) == VALUES
    with pytest.raises(InputError, match="a row of the head .* found 1, 2"):
        outputs(id2label={"1": "a", "2": "b"})


# ---- load


def test_a_bundle_predicts_as_infer_py_does(text_bundle):
    model = load(str(text_bundle))
    expected = predictions(text_bundle, *TEXTS)
    assert model(TEXTS) == expected
    assert model(TEXTS[0]) == expected[0]
    assert model([]) == []
    with pytest.raises(TypeError, match="max_new_tokens: the model continues no texts"):
        model(TEXTS[0], max_new_tokens=3)


def test_a_stage_is_read_as_its_bundle(text_onnx, text_bundle, task, tmp_path):
    quantized = tmp_path / "quantized"
    shutil.copytree(text_onnx / "quantized", quantized)
    # In a run the record says what texts were cut to; without one it is all that the model reads.
    texts = ["goal " * 100, *TEXTS]
    expected = predictions(text_bundle, *texts)
    assert load(quantized)(texts)[1:] == expected[1:]
    (quantized / "record.json").write_text(json.dumps({"made_by": {"task": task.describe()}}))
    assert load(quantized)(texts) == expected
    assert set(load(text_onnx / "onnx")(TEXTS[0])["probabilities"]) == {"sport", "tech", "trade"}


def test_an_onnx_directory_of_another_exporter_is_read_by_its_config(text_onnx, tmp_path):
    onnx = Path(shutil.copytree(text_onnx / "onnx", tmp_path / "onnx"))
    (onnx / "record.json").unlink(missing_ok=True)
    config = json.loads((onnx / "config.json").read_text())

    def write(**changes: Any) -> None:
        (onnx / "config.json").write_text(json.dumps(config | changes))

    # As many positions as RoBERTa's table has, of which those up to the padding's are not used.
    write(model_type="roberta", max_position_embeddings=18, pad_token_id=1)
    assert load(onnx).manifest["inputs"]["max_length"] == 16
    write(model_type="roberta", max_position_embeddings=18, pad_token_id=None)
    assert load(onnx).manifest["inputs"]["max_length"] == 16
    write(id2label={"0": "a", "1": "b"})
    with pytest.raises(InputError, match="names for the 3 outputs .* found 2"):
        load(onnx)


@pytest.mark.parametrize("item", [None, 3, b"bytes", ("a", "b", "c"), np.array(["a", "b"]), ["a"]])
def test_what_is_no_text_is_refused(item, text_bundle):
    with pytest.raises(InputError, match="expected texts, found"):
        load(text_bundle)([item])


def test_a_bundle_knows_whether_its_model_reads_pairs(text_bundle, tmp_path):
    with pytest.raises(InputError, match=r"expected texts, found .* \(tuple\).* several inputs are a list"):
        load(text_bundle)((TEXTS[0], TEXTS[1]))
    of_pairs = Path(shutil.copytree(text_bundle, tmp_path / "bundle"))
    manifest = json.loads((of_pairs / "manifest.json").read_text())
    manifest["inputs"]["pair"] = True
    write_manifest(of_pairs, manifest)
    assert load(of_pairs)((TEXTS[0], TEXTS[1]))["input"] == TEXTS[:2]
    with pytest.raises(InputError, match="expected tuples of two texts, found"):
        load(of_pairs)(TEXTS[0])


def test_pairs(text_onnx, tokenizer):
    # Pairs need no setting of their own: a tuple is one.
    model = load(text_onnx / "quantized")
    inputs = model.predictor.prepare((TEXTS[0], TEXTS[1]))
    assert inputs["input_ids"][0].tolist() == tokenizer(TEXTS[0], TEXTS[1])["input_ids"]
    found = model((TEXTS[0], TEXTS[1]))
    assert found["input"] == TEXTS[:2]
    assert model([(TEXTS[0], TEXTS[1]), TEXTS[0]])[0] == found


def test_images_by_path_and_from_pillow(image_onnx, image_bundle, image_folder):
    path = sorted(image_folder.rglob("*.png"))[0]
    (expected,) = predictions(image_bundle, str(path))
    for directory in (image_bundle, image_onnx):
        model = load(directory)
        assert model(str(path)) == expected
        with Image.open(path) as image:
            assert model([image])[0]["logits"] == expected["logits"]


def test_an_image_processor_that_is_not_known_needs_a_bundle(image_onnx, tmp_path):
    shutil.copytree(image_onnx, tmp_path / "onnx")
    settings = json.loads((tmp_path / "onnx" / "preprocessor_config.json").read_text())
    settings |= {"image_processor_type": "EfficientNetImageProcessor"}
    (tmp_path / "onnx" / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="found EfficientNetImageProcessor. Build a bundle"):
        load(tmp_path / "onnx")
    settings |= {"image_processor_type": "ViTImageProcessor", "size": 8}  # as older versions wrote it
    (tmp_path / "onnx" / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="as transformers 5 writes it"):
        load(tmp_path / "onnx")
    settings |= {"size": {"height": 8, "width": 8}, "do_center_crop": True, "crop_size": {"shortest_edge": 8}}
    (tmp_path / "onnx" / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="as transformers 5 writes it"):
        load(tmp_path / "onnx")
    settings |= {"do_center_crop": False}
    for other in ({"size": {"shortest_edge": 8, "longest_edge": 9}}, {"do_pad": True}):
        (tmp_path / "onnx" / "preprocessor_config.json").write_text(json.dumps(settings | other))
        with pytest.raises(InputError, match="which the runtime does not have"):
            load(tmp_path / "onnx")


def test_a_language_model(language_bundle):
    expected = LanguageModel(language_bundle, infer.open_session(language_bundle / "model.onnx")).generate(
        ["the team said"], Sampling(max_new_tokens=7)
    )
    for directory in (language_bundle, language_bundle.parent / "onnx"):
        found = load(directory)("the team said", max_new_tokens=7)
        assert found == {"input": "the team said", "continuation": expected[0]}


def test_damage_and_what_is_no_model_are_refused(text_bundle, tmp_path):
    with pytest.raises(InputError, match=r"found neither manifest.json nor model.onnx"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"found no directory 'runs/x/bundle', and on the Hub"):
        load("runs/x/bundle")
    shutil.copytree(text_bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "tokenizer.json").write_text("{}")
    with pytest.raises(infer.BundleError, match="it was changed or cut"):
        load(tmp_path)  # the bundle of a run


def test_a_published_model(text_bundle, text_onnx, tmp_path, monkeypatch):
    repository, fetched = tmp_path / "repository", []
    repository.mkdir()

    def snapshot_download(repo_id: str, allow_patterns: list[str], ignore_patterns: str) -> str:
        assert repo_id == "ann/small"
        folder = tmp_path / "cache"
        fetched.append(allow_patterns)
        for path in repository.rglob("*"):
            name = path.relative_to(repository)
            if path.is_file() and any(fnmatch(str(name), pattern) for pattern in allow_patterns):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    # As `push` publishes a run that has no bundle, and one that has.
    shutil.copytree(text_onnx / "quantized", repository, ignore=lambda *_: ["model.onnx"], dirs_exist_ok=True)
    shutil.copy(text_onnx / "quantized" / "model.onnx", repository / "onnx" / "model_fused.onnx")
    (repository / "report.json").write_text(json.dumps({"config": {"max_length": 32}}))
    expected = predictions(text_bundle, "goal " * 100)
    assert load("ann/small")(["goal " * 100]) == expected
    assert len(fetched) == 2
    shutil.rmtree(tmp_path / "cache")
    shutil.copytree(text_bundle, repository / "bundle")
    assert load("ann/small")(["goal " * 100]) == expected
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"bundle"}

    def breaks_off(*_: Any, **__: Any) -> str:
        raise RuntimeError("peer closed connection")  # of a library that raises no OSError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", breaks_off)
    with pytest.raises(InputError, match="on the Hub: peer closed connection. Check"):
        load("ann/small")


def test_no_torch_is_imported(text_bundle, language_bundle, image_onnx, image_folder):
    script = """
import sys
from pipelines.edge.load import load
for directory, given in zip(sys.argv[1::2], sys.argv[2::2]):
    load(directory)(given)
print([name for name in ("torch", "transformers", "onnx", "sklearn", "datasets") if name in sys.modules])
"""
    image = sorted(image_folder.rglob("*.png"))[0]
    given = map(str, [text_bundle, "a goal", language_bundle, "a goal", image_onnx, image])
    done = subprocess.run([sys.executable, "-c", script, *given], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
