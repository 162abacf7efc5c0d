"""Texts of two classes, and the shape and tokenizer of a BERT that reads them: what benchmarks of any size are made of."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

WORDS = [f"word{index}" for index in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_texts(path: Path, examples: int) -> None:
    """A csv of texts of 3 to 40 words, of which the first tells the class; every tenth is a copy of the one before."""
    generator = np.random.default_rng(0)
    rows: list[list[str]] = []
    for row in range(examples):
        words = [WORDS[row % 2], *generator.choice(WORDS, generator.integers(2, 40)), str(row)]
        rows.append(rows[-1] if row % 10 == 9 else [" ".join(words), "ab"[row % 2]])
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label"], *rows])


def write_shape(directory: Path, width: int, layers: int, vocabulary_size: int = 65) -> Any:
    """A BERT's config.json and tokenizer, whose labels are those of the texts; returns the config."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertTokenizerFast

    pieces = {piece: index for index, piece in enumerate([*SPECIAL, *WORDS])}
    BertTokenizerFast(tokenizer_object=BertWordPieceTokenizer(vocab=pieces)._tokenizer).save_pretrained(directory)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": max(1, width // 64)}
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    config = BertConfig(**sizes, **labels, num_hidden_layers=layers, vocab_size=vocabulary_size)
    config.save_pretrained(directory)
    return config
