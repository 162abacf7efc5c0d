"""How cost grows: with length, batch and layers of a shipped model and of a training step, with examples, and with processes.

    python benchmarks/scaling.py --plot docs/scaling.png

Each series runs in a fresh process. Beside its seconds stand two exponents, slopes of a line through the larger sizes on logarithmic axes:
that of the seconds, and that of the work, which for a model are its multiplications (products and attention) and for data its examples.
Seconds with a larger exponent than their work would mean that something is done more often than it need be. Processes train the same
examples on one thread each; their seconds are those of the training loop, and twice as many should take half as long.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HEADS, WIDTH, LAYERS, LENGTH = 4, 256, 4, 64
SIZES: dict[str, list[int]] = {
    "length": [16, 32, 64, 128, 256, 512],
    "batch": [1, 2, 4, 8, 16, 32],
    "layers": [1, 2, 4, 8],
    "examples": [2_000, 4_000, 8_000, 16_000, 32_000, 64_000],
    "processes": [1, 2],
}
WORDS = [f"word{index}" for index in range(60)]


def write_shape(directory: Path, layers: int = LAYERS) -> Any:
    """The shape and the tokenizer of a small BERT; returns its config."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertTokenizerFast

    vocabulary = {piece: index for index, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizerFast(tokenizer_object=BertWordPieceTokenizer(vocab=vocabulary)._tokenizer).save_pretrained(directory)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS, "vocab_size": 65}
    config = BertConfig(**sizes, num_hidden_layers=layers)
    config.save_pretrained(directory)
    return config


def write_texts(path: Path, examples: int) -> None:
    """Texts of 3 to 40 words, whose first tells their class; one in ten is a copy of another."""
    generator = np.random.default_rng(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(examples):
            words = [WORDS[row % 2], *generator.choice(WORDS, generator.integers(2, 40)), str(row - row % 10 // 9)]
            writer.writerow([" ".join(words), "ab"[row % 2]])


def median_seconds(call: Callable[[], Any], least: float) -> float:
    """The median of calls that take so many seconds in all, at least three, after one that does not count."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def model_series(axis: str, size: int, folder: Path, least: float) -> dict[str, float]:
    """Seconds of one call of the shipped model and of one training step, and their work."""
    import torch
    from transformers import BertForSequenceClassification

    from pipelines.export import export_graph
    from pipelines.fuse import fuse_for_onnxruntime
    from pipelines.predict import open_session
    from pipelines.quantize import quantize_dynamic_int8

    shape = {"length": LENGTH, "batch": 1, "layers": LAYERS} | {axis: size}
    model = BertForSequenceClassification(write_shape(folder, shape["layers"])).eval()
    tokens = torch.randint(5, 65, (shape["batch"], shape["length"]))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    sample = {"input_ids": torch.randint(5, 65, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}
    sample["attention_mask"][0, 9:] = 0
    names = ("standard", "fused", "int8")
    standard, fused, int8 = (folder / f"{name}.onnx" for name in names)
    export_graph(model, sample, {name: {0: "batch", 1: "sequence"} for name in sample}, standard)
    fuse_for_onnxruntime(standard, fused)
    quantize_dynamic_int8(fused, int8, reduce_range=True)
    session, feed = open_session(int8), {name: value.numpy() for name, value in inputs.items()}
    products = 12 * shape["length"] * WIDTH**2 + 2 * shape["length"] ** 2 * WIDTH
    return {
        "int8 model": median_seconds(lambda: session.run(None, feed), least),
        "training step": median_seconds(lambda: model(**inputs).logits.sum().backward(), least),
        "work": shape["batch"] * shape["layers"] * products,
    }


def example_series(examples: int, folder: Path, least: float) -> dict[str, float]:
    """Seconds of each step that goes through a data set, and the number of its examples."""
    from pipelines.config import DataConfig
    from pipelines.metrics import paired_bootstrap
    from pipelines.soft_targets import WithSoftTargets, write_shards
    from pipelines.tasks import TextClassification
    from pipelines.training import EpochLengthGroupedSampler

    write_shape(folder)
    write_texts(folder / "texts.csv", examples)
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        seconds[name] = time.perf_counter() - start
        return result

    config = DataConfig(dataset=str(folder / "texts.csv"), max_length=LENGTH)
    task = timed("read, check, de-duplicate, split", lambda: TextClassification(config))
    features = timed("tokenize", lambda: task.features(task.load_processor(str(folder)))["train"])
    timed("order of an epoch", lambda: list(EpochLengthGroupedSampler(16, list(features["length"]), 0)))
    (folder / "answers").mkdir()
    answers = np.zeros((len(features), 2), np.float32)
    timed(
        "store soft targets",
        lambda: write_shards(features, folder / "answers", 4096, lambda part: {"teacher_logits": answers[: len(part)]}),
    )
    stored = WithSoftTargets(features, folder / "answers")
    order = np.random.default_rng(0).permutation(len(stored))
    timed("read soft targets", lambda: [stored[int(index)] for index in order])
    guesses = np.random.default_rng(0).integers(0, 2, (3, examples // 5))
    timed("bootstrap of the report", lambda: paired_bootstrap(*guesses))
    return seconds | {"work": float(examples)}


def process_series(processes: int, folder: Path, least: float) -> dict[str, float]:
    """Seconds of a fine-tuning on so many processes of one thread each."""
    write_shape(folder)
    write_texts(folder / "texts.csv", 400 if least < 0.1 else 3000)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command += ["--num_cpu_threads_per_process", "1", "-m", "pipelines", "fine-tune", "--teacher_model", str(folder)]
    command += [
        "--teacher_from_scratch",
        "true",
        "--teacher_epochs",
        "1",
        "--teacher_learning_rate",
        "1e-3",
        "--dataset",
    ]
    command += [str(folder / "texts.csv"), "--output_dir", str(folder / "out"), "--max_length", str(LENGTH)]
    command += ["--per_device_train_batch_size", str(32 // processes), "--eval_strategy", "no", "--save_strategy", "no"]
    command += ["--load_best_model_at_end", "false"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    details = json.loads((folder / "out" / "record.json").read_text(encoding="utf-8"))["details"]
    return {"training loop": 1000 / details["train_samples_per_second"], "work": 1 / processes}


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of a line through the larger half of the sizes on logarithmic axes."""
    first = (len(sizes) - 1) // 2
    return float(np.polyfit(np.log(sizes[first:]), np.log(values[first:]), 1)[0])
