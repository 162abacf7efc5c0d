"""Published runs in other tools: the files that these read, texts that are hard to read alike, and transformers.js in Node."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conftest import FILLER, WORDS
from pipelines.core.task import Presentation
from pipelines.hub import check_run, published_graphs, published_tokenizer

KNOWN = [*FILLER, *(word for words in WORDS.values() for word in words)]
# Known words that are written in other ways, and what a tiny vocabulary does not know: emoji, words of other letters, punctuation.
ODD = [
    "Goal",
    "co\u0301ach",
    "chip\u0301",
    "server,",
    "(bank)",
    "42",
    "e\u0301",
    "🙂",
    "👩\u200d👩\u200d👧",
    "👍🏽",
    "東京",
    "—",
    "…",
    "?!",
]
BETWEEN = [" ", " ", " ", "  ", "\n", "\t", "\u00a0"]
# Calls `answer(pipeline, row)` for each of the rows that come in on stdin, with a pipeline of what is published in argv[1].
IN_NODE = """
import { env, pipeline } from "@huggingface/transformers";
import { readFileSync } from "node:fs";
env.localModelPath = process.argv[1]; env.allowRemoteModels = false;
const model = await pipeline(process.argv[2], "small", { dtype: "fp32" }), found = [];
for (const row of JSON.parse(readFileSync(0, "utf8"))) found.push(await (%s)(model, row));
console.log(JSON.stringify(found));
"""


def odd_texts(tokenizer: Any, longest: int, count: int = 200, seed: int = 0) -> list[str]:
    """Texts of known and odd words, with 3 to `longest` tokens, special ones included; some have exactly so many."""
    generator, texts = np.random.default_rng(seed), []
    for number in range(count):
        limit = longest if number % 4 == 0 else int(generator.integers(3, longest + 1))
        text, longer = "", str(generator.choice(KNOWN))
        while len(tokenizer(longer)["input_ids"]) <= limit:
            word = str(generator.choice(KNOWN if generator.random() < 0.8 else ODD))
            text, longer = longer, longer + str(generator.choice(BETWEEN)) + word
        texts.append(text)
    return texts


def write_published(run: Path, presentation: Presentation, directory: Path) -> Path:
    """The files of a run in `directory` as they are published, but for the model card."""
    report, files = check_run(run)
    changed = published_tokenizer(files, presentation.tokenizer_settings(report)) | published_graphs(files)
    for name, content in (files | changed).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return directory


def install_node(directory: Path) -> Path:
    directory.mkdir()
    package = "@huggingface/transformers@4"
    subprocess.run(["npm", "install", "--silent", "--ignore-scripts", package], cwd=directory, check=True)
    return directory


def in_node(run: Path, presentation: Presentation, directory: Path, task: str, answer: str, rows: Sequence[Any]) -> Any:
    """What `answer`, a function of transformers.js's pipeline and a row, gives for each of the rows; in fp32."""
    write_published(run, presentation, directory / "published" / "small")
    command = ["node", "--input-type=module", "--eval", IN_NODE % answer, str(directory / "published"), task]
    node = install_node(directory / "node")
    done = subprocess.run(command, cwd=node, input=json.dumps(rows), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
