"""ONNX directory -> bundle: the model with all that answers need on a device or in a browser, and no torch."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import pipelines
from pipelines.core.config import BundleConfig
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.run import Outcome, hash_file, read_record, shipped_files, write_json
from pipelines.data.sources import WEIGHT_SUFFIXES, check_onnx_directory
from pipelines.edge.web import RUNTIME_LIBRARY, TOKENIZER_LIBRARY, add_page
from pipelines.onnx.export import ONNX_FILE
from pipelines.onnx.predict import open_session, predict_onnx
from pipelines.runtime import generate, infer
from pipelines.tasks.text_generation.export import prompts_for

MANIFEST = "manifest.json"
RUNTIME = Path(infer.__file__)
GENERATION = Path(generate.__file__)
VERIFIED_EXAMPLES = 32
VERIFIED_PROMPTS = 8
# What the runtime was tried with, each on its oldest version. Pillow 13 resizes tall images along their columns first, which rounds
# some pixels to the next byte: older versions open the same images and see slightly others.
REQUIREMENTS = {"text": ["numpy>=1.26", "tokenizers>=0.20"], "image": ["numpy>=1.26", "pillow>=13"]}
# infer.py itself takes Python 3.10, Pillow 13 takes 3.11; ONNX Runtime has no builds for 32 bits.
PYTHON = {"text": "3.10", "image": "3.11"}
PACKAGES = {"text": ("numpy", "onnxruntime", "tokenizers"), "image": ("numpy", "onnxruntime", "pillow")}
# Texts and image sizes (width, height) that a data set may lack and a user will not: beyond any length, without any letter, control
# tokens spelt out; upright, lying, smaller than the model's input and odd.
PROBE_TEXTS = [
    "word " * 2000,
    "",
    "[SEP] </s> <|endoftext|>",
    "naïve\u00a0🙂 東京\t123\u200b",
    "It's  €1,000.50: “Straße”, cafe\u0301\n\nİ½ﬁ",
]
PROBE_SIZES = [(37, 53), (301, 200), (5, 64), (512, 512)]


def build_bundle(source: str, directory: Path, task: Any, bundle: BundleConfig) -> Outcome:
    """Copy the ONNX model in `source` and what it needs, and prove that the bundle answers as the pipeline does, to the last digit.

    Raises InputError for a tokenizer that the runtime cannot run, VerificationError where inputs or logits differ.
    """
    check_onnx_directory(Path(source))
    labels: dict[int, str] = {}
    if not task.causal:
        config = task.load_config(source)
        task.check_config(config, source)
        labels = config.id2label
    for path in shipped_files(Path(source)):
        if path.suffix not in WEIGHT_SUFFIXES:
            shutil.copy2(path, directory / path.name)
    for path in (RUNTIME, GENERATION) if task.causal else (RUNTIME,):
        shutil.copyfile(path, directory / path.name)
    processor = task.load_processor(source)
    kind = "image" if task.name == "image-classification" else "text"
    settings = image_settings(processor) if kind == "image" else text_settings(processor, task, source)
    graph = onnx.load(directory / ONNX_FILE, load_external_data=False)
    opsets = {domain.domain: domain.version for domain in graph.opset_import}
    minimum = oldest_runtime(opsets)
    requirements = [f"# Python {PYTHON[kind]} or newer, 64-bit", *REQUIREMENTS[kind], f"onnxruntime>={minimum}"]
    (directory / "requirements.txt").write_text("\n".join(requirements) + "\n")
    libraries = (RUNTIME_LIBRARY, TOKENIZER_LIBRARY) if kind == "text" else (RUNTIME_LIBRARY,)
    installed = {name: importlib.metadata.version(name) for name in PACKAGES[kind]}
    page, missing = add_page(directory, bundle, libraries)
    manifest = {
        "format": infer.FORMAT,
        "task": task.name,
        "model": ONNX_FILE,
        "labels": [labels[index] for index in range(len(labels))],
        "inputs": [value.name for value in graph.graph.input],
        "max_length": task.config.max_length if kind == "text" else None,
        kind: settings,
        "opset": opsets[""],
        "minimum_onnxruntime": minimum,
        "versions": {"pocketformers": pipelines.__version__, **installed, **page},
    }
    if task.causal:
        manifest["generation"] = generation_settings(directory)
    if page and kind == "text":
        settings["probes"] = page_probes(task, processor)
    write_manifest(directory, manifest)
    verification = (verify_writer if task.causal else verify_classifier)(directory, task, processor)
    details = {
        "minimum_onnxruntime": minimum,
        "page": page or f"none: {missing}",
        "verification": verification,
    }
    return Outcome("bundle", {}, (read_record(Path(source)) or {}).get("parameters"), details)


def oldest_runtime(opsets: dict[str, int]) -> str:
    """The oldest ONNX Runtime that was tried on graphs with these operator sets.

    1.18 is the first that reads the exporter's files, 1.23 the first with the Attention of opset 23, and has all operators of its
    own domain that are used here.
    """
    if opsets.keys() == {""} and opsets[""] <= 21:
        return "1.18.0"
    return "1.23.0" if opsets[""] <= 23 else importlib.metadata.version("onnxruntime")


def text_settings(tokenizer: Any, task: Any, source: str) -> dict[str, Any]:
    """What of tokenization is not in tokenizer.json."""
    if not (Path(source) / "tokenizer.json").is_file():
        raise InputError(
            f"expected a tokenizer.json in {source}, which the tokenizers library reads, found none: {type(tokenizer).__name__} has only "
            "a slow tokenizer. Convert it to a fast one, or use a model that has one."
        )
    pair = "text_pair" in task.data.splits["validation"].column_names
    return {"pair": pair, "truncation_side": tokenizer.truncation_side}


def generation_settings(directory: Path) -> dict[str, Any]:
    """What a page needs to continue texts, and infer.py reads from the graph and the config: end tokens, positions, cache."""
    model = generate.LanguageModel(directory)
    return {"end_tokens": model.end_tokens, "context": model.context, "cache": model.cache_shapes}


def page_probes(task: Any, processor: Any) -> list[dict[str, Any]]:
    """Texts and their tokens, to which the page compares those of its own tokenizer library."""
    if task.causal:
        found = [((text,), processor(text, add_special_tokens=False)["input_ids"]) for text in PROBE_TEXTS]
    else:
        found = [(example, inputs["input_ids"][0]) for _, example, inputs in probe_inputs(task, processor)]
    return [{"texts": example, "ids": " ".join(map(str, tokens))} for example, tokens in found]


def image_settings(processor: Any) -> dict[str, Any]:
    """The steps of an image processor, in the order in which every one of transformers' takes them; None leaves a step out."""
    size = {name: value for name, value in dict(processor.size).items() if value is not None}
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
    crop_share = getattr(processor, "crop_pct", None)
    if crop_share is not None and "shortest_edge" in size:
        # ConvNeXT's: up to 384 pixels a frame around the crop is resized along, from there on the whole is squeezed into a square.
        edge = size["shortest_edge"]
        square = {"height": edge, "width": edge}
        size, crop = ({"shortest_edge": int(edge / crop_share)}, crop or square) if edge < 384 else (square, crop)
    return {
        "resize": size if processor.do_resize else None,
        "resample": int(processor.resample),
        "crop": {name: crop[name] for name in ("height", "width")} if crop is not None else None,
        "rescale": processor.rescale_factor if processor.do_rescale else None,
        "mean": list(processor.image_mean) if processor.do_normalize else None,
        "std": list(processor.image_std) if processor.do_normalize else None,
    }


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of the files in `directory`, with their checksums and its own."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
    manifest["files"] = {
        path.relative_to(directory).as_posix(): {"sha256": hash_file(path), "bytes": path.stat().st_size}
        for path in paths
        if path.name != MANIFEST
    }
    # As the runtime reads it: numbers and keys that JSON does not keep would change the checksum.
    written = json.loads(json.dumps(manifest))
    write_json(directory / MANIFEST, {**written, "checksum": infer.content_checksum(written)})


# ---- Verification


def verify_classifier(directory: Path, task: Any, processor: Any) -> dict[str, Any]:
    """Compare the runtime's inputs and logits with the pipeline's on validation examples and probes; raises VerificationError."""
    classifier = infer.Classifier(directory)
    collate = task.collate(processor)
    probes = 0
    for name, example, expected in probe_inputs(task, processor):
        found = classifier.prepare(example)
        different = [key for key in found if not np.array_equal(found[key], expected[key])]
        if different:
            raise VerificationError(
                f"expected the bundle's runtime to prepare {name} exactly as {type(processor).__name__} does, found that "
                f"{', '.join(different)} differ. The runtime does not support this tokenizer or image processor; ship the ONNX directory "
                "instead."
            )
        probes += 1
    count = min(VERIFIED_EXAMPLES, len(task.data.splits["validation"]))
    features = task.features(processor)["validation"].select(range(count))
    expected_logits = predict_onnx(directory / ONNX_FILE, features, collate, name="verify bundle")
    rows = task.data.splits["validation"].select(range(count))
    found_logits = np.stack([classifier.logits(example_of(row)) for row in rows])
    if not np.array_equal(found_logits, expected_logits):
        raise VerificationError(
            f"expected the bundle to answer {count} validation examples with the logits of {ONNX_FILE} to the last digit, found a "
            f"difference of {np.abs(found_logits - expected_logits).max():.3g}. The bundle must not be used; report this model."
        )
    return {"examples": count, "probes": probes}


def verify_writer(directory: Path, task: Any, processor: Any) -> dict[str, Any]:
    """Compare the runtime's tokens and greedy continuations with the pipeline's on validation prompts and probes; raises VerificationError."""
    writer = infer.Writer(directory)
    pipeline = generate.LanguageModel(directory, session=open_session(directory / ONNX_FILE))
    prompts = [processor.decode(tokens) for tokens in prompts_for(task, processor, VERIFIED_PROMPTS)]
    sampling = generate.Sampling(max_new_tokens=16)
    for text in [*prompts, *filter(None, PROBE_TEXTS)]:
        expected = processor(text, add_special_tokens=False)["input_ids"]
        if writer.model.encode(text) != expected:
            raise VerificationError(
                f"expected the bundle's runtime to make the tokens of {text[:30]!r} exactly as {type(processor).__name__} does, found "
                "others. The runtime does not support this tokenizer; ship the ONNX directory instead."
            )
        room = expected[: (pipeline.context or len(expected) + 1) - 1]
        if writer.model.generate_tokens([room], sampling) != pipeline.generate_tokens([room], sampling):
            raise VerificationError(
                f"expected the bundle to continue {text[:30]!r} as the pipeline does, found another continuation. The bundle must not be "
                "used; report this model."
            )
    return {"prompts": len(prompts), "probes": len(PROBE_TEXTS) - 1}


def example_of(row: dict[str, Any]) -> infer.Example:
    """A row of a data set as the runtime takes it."""
    if "image" in row:
        cell = row["image"]
        return (BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"],)
    return tuple(row[name] for name in ("text", "text_pair") if name in row)


def probe_inputs(task: Any, processor: Any) -> Iterator[tuple[str, infer.Example, dict[str, Any]]]:
    """Examples that a data set may lack: a name, the example, and the inputs that the pipeline makes of it."""
    if task.name == "image-classification":
        from PIL import Image

        generator = np.random.default_rng(0)
        for width, height in PROBE_SIZES:
            file = BytesIO()
            Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
            batch = task.collate(processor)([{"image": {"bytes": file.getvalue(), "path": None}, "labels": 0}])
            yield f"an image of {width} x {height} pixels", (file,), {"pixel_values": batch["pixel_values"].numpy()}
        return
    pair = "text_pair" in task.data.splits["validation"].column_names
    for text in PROBE_TEXTS:
        example = (text, "word " * 300) if pair else (text,)
        tokens = processor(*example, truncation=True, max_length=task.config.max_length)
        yield f"the text {text[:30]!r}", example, {name: np.array([value], np.int64) for name, value in tokens.items()}
