"""ONNX directory -> bundle: the model with all that predicting needs on a device or in a browser, and no torch."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import pipelines
from pipelines.core.config import BundleConfig
from pipelines.core.disk import write_json
from pipelines.core.errors import VerificationError
from pipelines.core.records import Outcome, read_record, shipped_files
from pipelines.core.sources import WEIGHT_SUFFIXES
from pipelines.core.task import Arrays, Collate, Task
from pipelines.data.sources import check_onnx_directory
from pipelines.data.windows import prompt_tokens
from pipelines.edge.settings import check_tokenizer, head_outputs, text_settings
from pipelines.edge.web import RUNTIME_LIBRARY, TOKENIZER_LIBRARY, add_page
from pipelines.onnx.export import ONNX_FILE
from pipelines.onnx.runtimes import oldest_runtime
from pipelines.runtime import answers, generate, images, infer, spans, vectors

MANIFEST = "manifest.json"
VERIFIED_EXAMPLES = 32
# What the runtime was tried with, each on its oldest version. Pillow 13 resizes tall images along their columns first, which rounds
# some pixels to the next byte: older versions open the same images and see slightly others.
REQUIREMENTS = {"text": ["numpy>=1.26", "tokenizers>=0.20"], "image": ["numpy>=1.26", "pillow>=13"]}
# infer.py itself takes Python 3.10, Pillow 13 takes 3.11; ONNX Runtime has no builds for 32 bits.
PYTHON = {"text": "3.10", "image": "3.11"}
LIBRARIES = {"text": (RUNTIME_LIBRARY, TOKENIZER_LIBRARY), "image": (RUNTIME_LIBRARY,)}
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

# An example that a data set may lack: its name, the example, and the inputs that the pipeline makes of it.
Probe = tuple[str, infer.Example, Arrays]


def build_bundle(source: str, directory: Path, task: Task, bundle: BundleConfig) -> Outcome:
    """Copy the ONNX model in `source` and what it needs, and verify that the bundle predicts as the pipeline does, to the last digit.

    Raises InputError for a tokenizer that the runtime cannot run, VerificationError where inputs or outputs differ.
    """
    check_onnx_directory(Path(source))
    task.check_config(task.load_config(source), source)
    for path in shipped_files(Path(source)):
        if path.suffix not in WEIGHT_SUFFIXES:
            shutil.copy2(path, directory / path.name)
    processor = task.load_processor(source)
    settings = task.bundle_settings(directory, processor)
    kind = settings["inputs"]["kind"]
    parts = {"image": [images], "continuation": [generate], "answer": [answers], "spans": [spans], "vector": [vectors]}
    for module in [infer, *parts.get(kind, []), *parts.get(settings["outputs"]["kind"], [])]:
        path = Path(str(module.__file__))
        shutil.copyfile(path, directory / path.name)
    graph = onnx.load(directory / ONNX_FILE, load_external_data=False)
    minimum = oldest_runtime(graph)
    requirements = [*REQUIREMENTS[kind], f"onnxruntime>={minimum}"]
    lines = [f"# Python {PYTHON[kind]} or newer, 64-bit", *requirements, ""]
    (directory / "requirements.txt").write_text("\n".join(lines))
    names = [requirement.partition(">=")[0] for requirement in requirements]
    installed = {name: importlib.metadata.version(name) for name in names}
    page, missing = add_page(directory, bundle, LIBRARIES[kind])
    manifest = {
        "format": infer.FORMAT,
        "task": task.name,
        "model": ONNX_FILE,
        **settings,
        "opset": next(opset.version for opset in graph.opset_import if opset.domain == ""),
        "minimum_onnxruntime": minimum,
        "versions": {"pocketformers": pipelines.__version__, **installed, **page},
    }
    write_manifest(directory, manifest)
    details = {
        "minimum_onnxruntime": minimum,
        "page": page or f"none: {missing}",
        "verification": task.verify_bundle(directory, processor),
    }
    return Outcome("bundle", {}, (read_record(Path(source)) or {}).get("parameters"), details)


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of the files in `directory`, with their checksums and its own."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
    manifest["files"] = {
        path.relative_to(directory).as_posix(): {"sha256": infer.file_checksum(path), "bytes": path.stat().st_size}
        for path in paths
        if path.name != MANIFEST
    }
    # As the runtime reads it: numbers and keys that JSON does not keep would change the checksum.
    written = json.loads(json.dumps(manifest))
    write_json(directory / MANIFEST, {**written, "checksum": infer.content_checksum(written)})


# ---- What the tasks' bundle_settings and verify_bundle are made of, with pipelines/edge/settings.py


def example_of(row: dict[str, Any]) -> infer.Example:
    """A row of a data set as the runtime takes it."""
    if "image" in row:
        cell = row["image"]
        return (BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"],)
    return tuple(row[name] for name in ("text", "text_pair") if name in row)


def text_probes(tokenizer: Any, pair: bool, max_length: int) -> Iterator[Probe]:
    for text in PROBE_TEXTS:
        example = (text, "word " * 300) if pair else (text,)
        tokens = tokenizer(*example, truncation=True, max_length=max_length)
        yield f"the text {text[:30]!r}", example, {name: np.array([value], np.int64) for name, value in tokens.items()}


def image_probes(collate: Collate) -> Iterator[Probe]:
    from PIL import Image

    generator = np.random.default_rng(0)
    for width, height in PROBE_SIZES:
        file = BytesIO()
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
        batch = collate([{"image": {"bytes": file.getvalue(), "path": None}, "labels": 0}])
        yield f"an image of {width} x {height} pixels", (file,), {"pixel_values": batch["pixel_values"].numpy()}


def text_inputs(directory: Path, tokenizer: Any, pair: bool, max_length: int) -> dict[str, Any]:
    """The settings of a text or a pair of texts, with probes for the page, which has another tokenizer library."""
    probes = text_probes(tokenizer, pair, max_length)
    return {
        **text_settings(directory, tokenizer.truncation_side, pair, max_length),
        "probes": [page_probe(example, inputs["input_ids"][0]) for _, example, inputs in probes],
    }


def prompt_inputs(directory: Path, tokenizer: Any) -> dict[str, Any]:
    """The settings of a text that is to be continued, with probes for the page."""
    check_tokenizer(directory)
    tokens = {text: prompt_tokens(tokenizer, text) for text in PROBE_TEXTS}
    return {"kind": "text", "pair": False, "probes": [page_probe((text,), ids) for text, ids in tokens.items()]}


def page_probe(example: infer.Example, tokens: Iterable[int]) -> dict[str, Any]:
    return {"texts": example, "ids": " ".join(map(str, tokens))}


def verify_predictor(directory: Path, task: Task, processor: Any, probes: Iterable[Probe], rows: Any) -> dict[str, Any]:
    """Compare what the bundle's runtime makes of probes and predicts for the first validation `rows` with what the pipeline does.

    Raises VerificationError unless both are the same to the last digit.
    """
    predictor = infer.Predictor(directory)
    tried = list(probes)
    for name, example, expected in tried:
        found = predictor.prepare(example)
        different = [key for key in found if not np.array_equal(found[key], expected[key])]
        if different:
            raise VerificationError(
                f"expected the bundle's runtime to prepare {name} exactly as {type(processor).__name__} does, found that "
                f"{', '.join(different)} differ. The runtime does not support this tokenizer or image processor; ship the ONNX directory "
                "instead."
            )
    count = min(VERIFIED_EXAMPLES, len(rows))
    expected_outputs = list(pipeline_outputs(directory, task, processor, "validation", count))
    found_outputs = [predictor.logits(example_of(row)) for row in rows.select(range(count))]
    if not np.array_equal(found_outputs, expected_outputs):
        difference = np.abs(np.array(found_outputs) - np.array(expected_outputs)).max()
        raise VerificationError(
            f"expected the bundle to give the outputs of {ONNX_FILE} for {count} validation examples to the last digit, found a "
            f"difference of {difference:.3g}. The bundle must not be used; report this model."
        )
    return {"examples": count, "probes": len(tried)}


def pipeline_outputs(directory: Path, task: Task, processor: Any, split: str, count: int) -> Iterator[np.ndarray]:
    """The outputs (labels,) of a graph for each of the first examples of a split, prepared by the pipeline's own processor."""
    session = infer.open_session(directory / ONNX_FILE)
    read = head_outputs(directory).get("output")
    names = [value.name for value in session.get_inputs()]
    features, collate = task.features(processor)[split], task.collate(processor)
    for index in range(count):
        batch = collate([features[index]])
        yield session.run(read and [read], {name: np.asarray(batch[name]) for name in names})[0].reshape(-1)


def verify_generator(directory: Path, processor: Any, prompts: list[str]) -> dict[str, Any]:
    """Compare the runtime's tokens with the pipeline's on prompts and probes, and continue them; raises VerificationError."""
    bundled = infer.Generator(directory).model
    probes = list(filter(None, PROBE_TEXTS))
    for text in [*prompts, *probes]:
        expected = prompt_tokens(processor, text)
        if bundled.encode(text) != expected:
            raise VerificationError(
                f"expected the bundle's runtime to make the tokens of {text[:30]!r} exactly as {type(processor).__name__} does, found "
                "others. The runtime does not support this tokenizer; ship the ONNX directory instead."
            )
        bundled.generate_tokens([expected[: (bundled.context or len(expected) + 1) - 1]], generate.Sampling(16))
    return {"prompts": len(prompts), "probes": len(probes)}
