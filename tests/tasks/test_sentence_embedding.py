"""Sentence embeddings: pooling and losses against formulas, the layout of sentence-transformers, and the whole chain on pairs."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import FILLER, WORDS, make_tokenizer, tiny_config
from pipelines.cli import main
from pipelines.core.command import run_main
from pipelines.core.config import DataConfig

ALL_WORDS = [*FILLER, *(word for words in WORDS.values() for word in words)]


def write_pairs(path: Path, pairs: int = 150) -> Path:
    """Queries of four words, and positives that have three of them."""
    generator = np.random.default_rng(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "other", "score"])
        for index in range(pairs):
            words = generator.choice(ALL_WORDS, 4, replace=False)
            others = [*words[:3], *generator.choice(ALL_WORDS, generator.integers(3, 8))]
            writer.writerow([f"{' '.join(words)} {index}", " ".join(generator.permutation(others)), index % 6])
    return path


def write_embedder(directory: Path, dense: bool = False, pooling: str = "mean") -> Path:
    """A tiny BERT as sentence-transformers saves it, with pooling and normalization, perhaps a Dense module between them."""
    from transformers import AutoModel

    from pipelines.models.embedder import SETTINGS, load_embedder

    directory.mkdir()
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config("bert", initializer_range=0.3)).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    settings = {"pooling": pooling, "dense": [], "normalize": True, "max_length": 32}
    setattr(config, SETTINGS, settings)
    model = load_embedder(str(directory), config)
    if dense:
        model.append_dense(24)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.csv")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedder(tmp_path_factory.mktemp("embedder") / "model")


@pytest.fixture(scope="module")
def run(pairs: Path, embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole chain, with the flags that a stranger would give."""
    run = tmp_path_factory.mktemp("chain") / "run"
    flags = f"""
        compress --task sentence-embedding --dataset {pairs} --text_pair_column other --teacher_model {embedder} --output_dir {run}
        --max_length 32 --num_train_epochs 4 --learning_rate 3e-3 --student_layers 2 --prune_steps 1 --prune_epochs 1
        --prune_heads 0.25 --prune_ffn 0.25 --max_quality_drop 0.4 --use_cpu --benchmark_rounds 1 --benchmark_seconds 0.05 --web false
        --matryoshka_sizes 16
    """.split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pocketformers", *flags])
        run_main(main)
    return run


def test_the_whole_chain(run):
    report = json.loads((run / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert (report["task"], report["primary_metric"]) == ("sentence-embedding", "mrr_at_10")
    assert [*stages][-3:] == ["teacher_quantized", "bm25", "tfidf"]
    assert stages["teacher"]["metrics"]["mrr_at_10"] > 0.3
