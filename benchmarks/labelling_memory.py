"""Memory of the teacher's pass over a data set, by the number of examples: it must stay flat.

    python benchmarks/labelling_memory.py --examples 10000 100000 1000000 --labels 1000 --output memory.json

So many labels that all logits together are far larger than the memory that is counted: 4 bytes each, 4 GB for a million examples of
1,000. Each size runs in a fresh process: a tiny BERT of random weights predicts that many tokenized examples, as the stage of the soft
targets does. Counted is the memory that the process holds for itself (anonymous: arrays, Python's objects, weights), sampled ten times
a second. Files that are mapped into memory, the tokens and the logits, are apart: the system takes them back when it needs the room.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def memory() -> dict[str, int]:
    """Bytes of this process in memory, its own and those of files, by Linux's count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    named = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "RssFile"))}
    return {"anonymous": int(named["RssAnon"]) * 1024, "file": int(named["RssFile"]) * 1024}


def rows(examples: int, tokens: int) -> Iterator[dict[str, Any]]:
    generator = np.random.default_rng(0)
    for _ in range(examples):
        length = int(generator.integers(1, tokens + 1))
        ids = generator.integers(5, 100, length).tolist()
        yield {"input_ids": ids, "attention_mask": [1] * length, "length": length}


def tiny_teacher(width: int, labels: int) -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=labels, **sizes))


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    longest = max(row["length"] for row in rows)
    return {
        name: torch.tensor([row[name] + [0] * (longest - row["length"]) for row in rows])
        for name in ("input_ids", "attention_mask")
    }


def measure(examples: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One size, in this process."""
    import datasets
    import torch

    from pipelines.models.predict import map_batches
    from pipelines.training.soft_targets import WithSoftTargets, write_shards

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    features = datasets.Dataset.from_generator(
        rows, gen_kwargs={"examples": examples, "tokens": arguments.tokens}, cache_dir=str(folder / "cache")
    )
    teacher = tiny_teacher(arguments.width, arguments.labels)
    before, done = memory(), threading.Event()
    peak = dict(before)

    def watch() -> None:
        ended = False
        while not ended:  # once more at the end, however soon that comes
            ended = done.wait(0.1)
            for kind, size in memory().items():
                peak[kind] = max(peak[kind], size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    shards = folder / "soft_targets"
    shards.mkdir()
    teacher.eval()

    def logits(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            return {"teacher_logits": teacher(**batch).logits}

    write_shards(
        features,
        shards,
        arguments.shard_examples,
        lambda part: map_batches(logits, part, collate, 256, "soft targets"),
    )
    seconds = time.perf_counter() - started
    # Read back in a random order, as training does.
    stored = WithSoftTargets(features, shards)
    for index in np.random.default_rng(0).integers(examples, size=min(examples, arguments.read)):
        stored[int(index)]
    done.set()
    watcher.join()
    return {
        "examples": examples,
        "shards": len(stored.shards),
        "stored_bytes": sum(path.stat().st_size for path in shards.iterdir()),
        "before_anonymous_bytes": before["anonymous"],
        "peak_anonymous_bytes": peak["anonymous"],
        "peak_file_bytes": peak["file"],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="The sizes.")
    parser.add_argument("--shard_examples", type=int, default=4096, help="Examples of a shard.")
    parser.add_argument("--tokens", type=int, default=16, help="Tokens of the longest example.")
    parser.add_argument("--labels", type=int, default=2, help="Labels, and so logits of an example.")
    parser.add_argument("--width", type=int, default=16, help="Hidden units of the tiny teacher.")
    parser.add_argument("--read", type=int, default=20_000, help="Examples read back in a random order, at most.")
    parser.add_argument("--output", help="A file for the figures, as JSON.")
    parser.add_argument("--alone", action="store_true", help="Measure the one size in this process.")
    arguments = parser.parse_args()
    if arguments.alone:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(arguments.examples[0], arguments, Path(folder))))
        return
    found = []
    print(
        f"{'examples':>10} {'shards':>7} {'stored MB':>10} {'own MB before':>14} {'own MB at most':>15} {'seconds':>8}"
    )
    for examples in arguments.examples:
        command = [sys.executable, __file__, "--alone", "--examples", str(examples)]
        for name in ("shard_examples", "tokens", "labels", "width", "read"):
            command += [f"--{name}", str(getattr(arguments, name))]
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        worker = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        one = json.loads(worker.stdout.splitlines()[-1])
        found.append(one)
        megabytes = [one[name] / 1e6 for name in ("stored_bytes", "before_anonymous_bytes", "peak_anonymous_bytes")]
        print(
            f"{examples:>10,} {one['shards']:>7} {megabytes[0]:>10.1f} {megabytes[1]:>14.1f} {megabytes[2]:>15.1f} "
            f"{one['seconds']:>8.1f}",
            flush=True,
        )
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
