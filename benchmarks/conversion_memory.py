"""Memory of exporting and quantizing, as a multiple of the model's fp32 bytes: the largest that each holds beyond its imports.

    python benchmarks/conversion_memory.py                              # a BERT of BERT-base's shape with random weights, 438 MB
    python benchmarks/conversion_memory.py --layers 2 4 8 12 --output memory.json

Each stage runs in a fresh process, which first takes a model of one narrow layer through the same stage: what that leaves in memory is its
imports, counted as resident bytes. The kernel's count of the largest resident size is then reset, and read again at the end of the stage.
So everything counts that the stage itself holds: weights, graphs, copies, sessions of ONNX Runtime, pages of files that it has mapped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` beside `pipelines`, installed or not

from benchmarks.synthetic import write_shape, write_texts  # noqa: E402
from pipelines.onnx.measure import peak_memory_bytes  # noqa: E402

STAGES = ("export", "quantize")


def resident_bytes() -> int:
    """Bytes of this process in memory, by Linux's count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


def write_model(directory: Path, width: int, layers: int) -> int:
    """A BERT of random weights with the usual vocabulary; returns the bytes of its parameters."""
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(write_shape(directory, width, layers, vocabulary_size=30_522))
    model.save_pretrained(directory)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def measure(stage: str, folder: Path) -> dict[str, Any]:
    """One stage in this process."""
    from pipelines.core.config import DataConfig, QuantizeConfig
    from pipelines.onnx.export import export_onnx
    from pipelines.onnx.quantize import quantize_onnx
    from pipelines.tasks.text_classification import TextClassification

    task = TextClassification(DataConfig(dataset=str(folder / "texts.csv"), max_length=16))

    def run(name: str) -> None:
        target = folder / f"{name}_{stage}"
        target.mkdir()
        if stage == "export":
            export_onnx(str(folder / name), target, task)
        else:  # random weights guess, so any loss is allowed
            quantize_onnx(str(folder / f"{name}_export"), target, task, QuantizeConfig(max_quality_drop=1.0))

    run("narrow")
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident size so far is forgotten
    started = time.perf_counter()
    run("model")
    return {
        "before_bytes": before,
        "peak_bytes": peak_memory_bytes() - before,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="Hidden units.")
    parser.add_argument("--layers", type=int, nargs="+", default=[12], help="Layers, a model for each.")
    parser.add_argument("--output", type=Path, help="A file for the figures, as JSON.")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)  # the stage to run in this process, and its folder
    flags = parser.parse_args()
    if flags.alone:
        print(json.dumps(measure(flags.alone[0], Path(flags.alone[1]))))
        return
    found = []
    for layers in flags.layers:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_texts(folder / "texts.csv", 40)
            write_model(folder / "narrow", 64, 1)
            size = write_model(folder / "model", flags.width, layers)
            for stage in STAGES:
                command = [sys.executable, __file__, "--alone", stage, str(folder)]
                worker = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                one = json.loads(worker.stdout.splitlines()[-1])
                found.append(
                    {"stage": stage, "layers": layers, "model_bytes": size, **one, "times": one["peak_bytes"] / size}
                )
                print(json.dumps(found[-1]), flush=True)
    if flags.output:
        flags.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
