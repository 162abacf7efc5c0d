"""How cost grows: with length, batch and layers of a shipped model and of a training step, with examples, and with processes.

    python benchmarks/scaling.py --plot docs/scaling.png

Each series runs in a fresh process. Beside its seconds stand two exponents, slopes of a line through the larger sizes on logarithmic axes:
that of the seconds, and that of the work, which for a model are its multiplications (weights and attention) and for data its examples.
Seconds with a larger exponent than their work would mean that something is done more often than it need be. Processes train the same
examples on one thread each; their seconds are those of the training loop, and twice as many should take half as long.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` beside `pipelines`, installed or not

from benchmarks.synthetic import write_shape, write_texts  # noqa: E402

WIDTH, LAYERS, LENGTH = 256, 4, 64
SIZES: dict[str, list[int]] = {
    "length": [16, 32, 64, 128, 256, 512],
    "batch": [1, 2, 4, 8, 16, 32],
    "layers": [1, 2, 4, 8],
    "examples": [2_000, 4_000, 8_000, 16_000, 32_000, 64_000],
    "processes": [1, 2],
}


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

    shape = {"length": LENGTH, "batch": 1, "layers": LAYERS} | {axis: size}
    model, session = make_model(shape["layers"], folder)
    tokens = torch.randint(5, 65, (shape["batch"], shape["length"]))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    feed = {name: value.numpy() for name, value in inputs.items()}
    matmuls = 12 * shape["length"] * WIDTH**2 + 2 * shape["length"] ** 2 * WIDTH
    return {
        "int8 model": median_seconds(lambda: session.run(None, feed), least),
        "training step": median_seconds(lambda: model(**inputs).logits.sum().backward(), least),
        "work": shape["batch"] * shape["layers"] * matmuls,
    }


@cache
def make_model(layers: int, folder: Path) -> tuple[Any, Any]:
    """A BERT in torch, and a session of its int8 form."""
    import torch
    from transformers import BertForSequenceClassification

    from pipelines.core.task import Graph
    from pipelines.onnx.dynamic import quantize_dynamic_int8
    from pipelines.onnx.export import export_graph
    from pipelines.onnx.fuse import fuse_for_onnxruntime
    from pipelines.runtime.infer import open_session

    model = BertForSequenceClassification(write_shape(folder, WIDTH, layers)).eval()
    sample = {"input_ids": torch.randint(5, 65, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}
    sample["attention_mask"][0, 9:] = 0
    standard, fused, int8 = (folder / f"{name}.onnx" for name in ("standard", "fused", "int8"))
    axes = {name: {0: "batch", 1: "sequence"} for name in sample}
    export_graph(Graph(model, sample, axes, ["logits"]), standard)
    fuse_for_onnxruntime(standard, fused)
    quantize_dynamic_int8(fused, int8, reduce_range=True)
    return model, open_session(int8)


def example_series(examples: int, folder: Path) -> dict[str, float]:
    """Seconds of each step that goes through a data set, and the number of its examples."""
    from pipelines.core.config import DataConfig
    from pipelines.report.bootstrap import paired_bootstrap
    from pipelines.tasks.text_classification import TextClassification
    from pipelines.training.soft_targets import WithSoftTargets, write_shards
    from pipelines.training.trainer import EpochLengthGroupedSampler

    write_shape(folder, WIDTH, LAYERS)
    write_texts(folder / "texts.csv", examples)
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        seconds[name] = time.perf_counter() - start
        return result

    config = DataConfig(dataset=str(folder / "texts.csv"), max_length=LENGTH)
    task = TextClassification(config)
    timed("read, check, de-duplicate, split", lambda: task.data)
    features = timed("tokenize", lambda: task.features(task.load_processor(str(folder)))["train"])
    timed("order of an epoch", lambda: list(EpochLengthGroupedSampler(16, list(features["length"]), 0)))
    targets = folder / "soft_targets"
    targets.mkdir()
    logits = np.zeros((len(features), 2), np.float32)
    write = partial(write_shards, features, targets, 4096, lambda part: {"teacher_logits": logits[: len(part)]})
    timed("store soft targets", write)
    stored = WithSoftTargets(features, targets)
    order = np.random.default_rng(0).permutation(len(stored))
    timed("read soft targets", lambda: [stored[int(index)] for index in order])
    first, second = np.random.default_rng(0).integers(0, 2, (2, examples // 5)).astype(float)
    timed("bootstrap of the report", lambda: paired_bootstrap(partial(np.mean, axis=-1), (first,), (second,)))
    return seconds | {"work": float(examples)}


def process_series(processes: int, folder: Path) -> dict[str, float]:
    """Seconds of the training loop of a fine-tuning on so many processes of one thread each."""
    write_shape(folder, WIDTH, LAYERS)
    write_texts(folder / "texts.csv", 2000)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command += ["--num_cpu_threads_per_process", "1", "-m", "pipelines", "fine-tune", "--teacher_model", str(folder)]
    settings = {
        "dataset": folder / "texts.csv",
        "output_dir": folder / "out",
        "max_length": LENGTH,
        "teacher_from_scratch": "true",
        "teacher_epochs": 1,
        "teacher_learning_rate": 1e-3,
        "per_device_train_batch_size": 32 // processes,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": "false",
        "use_cpu": "true",
    }
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    subprocess.run(
        ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:processes])), *command],
        check=True,
        stdout=sys.stderr,
    )
    details = json.loads((folder / "out" / "record.json").read_text(encoding="utf-8"))["details"]
    return {"training loop": 1 / details["train_samples_per_second"], "work": 1 / processes}


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of a line through the larger half of the sizes on logarithmic axes."""
    first = (len(sizes) - 1) // 2
    return float(np.polyfit(np.log(sizes[first:]), np.log(values[first:]), 1)[0])


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Seconds by size, a panel for each series, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(found), 3.4), layout="constrained")
    for axes, (series, one) in zip(np.atleast_1d(figure.subplots(1, len(found))), found.items(), strict=True):
        for name, seconds in one["seconds"].items():
            axes.loglog(one["sizes"], seconds, marker="o", markersize=3, label=f"{name}: {one['exponents'][name]:.2f}")
        axes.set_title(f"{series} (work: {one['exponents']['work']:.2f})", fontsize=9)
        axes.set_xticks(one["sizes"], [f"{size:,}" for size in one["sizes"]], fontsize=6, rotation=30)
        axes.minorticks_off()
        axes.set_xlabel(series)
        axes.set_ylabel("seconds")
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=110)


def measure(series: str, sizes: list[int], least: float) -> list[dict[str, float]]:
    """A series in this process."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"HF_DATASETS_CACHE": scratch, "TQDM_DISABLE": "1"}
        for size in sizes:
            folder = Path(scratch) / (str(size) if series in ("examples", "processes") else "model")
            folder.mkdir(exist_ok=True)
            if series == "examples":
                rows.append(example_series(size, folder))
            elif series == "processes":
                rows.append(process_series(size, folder))
            else:
                rows.append(model_series(series, size, folder, least))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", nargs="+", choices=list(SIZES), default=list(SIZES), help="What grows.")
    parser.add_argument("--sizes", type=int, nargs="+", help="Its sizes, instead of the series' own.")
    parser.add_argument("--seconds", type=float, default=1.0, help="Seconds to repeat each call of a model for.")
    parser.add_argument("--plot", type=Path, help="A file for the plot, as PNG.")
    parser.add_argument("--output", type=Path, help="A file for the figures, as JSON.")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # measure the series in this process
    flags = parser.parse_args()
    if flags.alone:
        print(json.dumps(measure(flags.series[0], flags.sizes, flags.seconds)))
        return
    found: dict[str, dict[str, Any]] = {}
    for series in flags.series:
        sizes = flags.sizes or SIZES[series]
        command = [sys.executable, __file__, "--alone", "--series", series, "--seconds", str(flags.seconds), "--sizes"]
        worker = subprocess.run([*command, *map(str, sizes)], check=True, stdout=subprocess.PIPE, text=True)
        rows = json.loads(worker.stdout.splitlines()[-1])
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        exponents = {name: round(exponent(sizes, values), 2) for name, values in columns.items()}
        work = columns.pop("work")
        found[series] = {"sizes": sizes, "seconds": columns, "work": work, "exponents": exponents}
        print(series, json.dumps(exponents), flush=True)
    if flags.plot:
        draw(found, flags.plot)
    if flags.output:
        flags.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
