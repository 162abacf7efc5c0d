"""Whether the bundles of finished runs predict alike in the pipeline's process, in a new environment without torch, and in a browser.

    python benchmarks/bundle_answers.py --runs runs/bert_bbc_news runs/vit_digits runs/gpt2_bbc_news

The test examples of each run (for a language model: the beginnings of its test texts, continued greedily) are predicted by ONNX Runtime in this
process; by the bundle's infer.py in a virtual environment of its requirements.txt alone; and by the bundle's page in headless Chromium, where
each text is typed and each image chosen, with the shipped graph and with the run's fp32 one. Prints a table. Needs npm, Chromium and playwright.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

from edge import make_environment

from pipelines.core.command import run_main
from pipelines.core.config import BundleConfig, make_settings
from pipelines.core.errors import InputError
from pipelines.core.task import Task
from pipelines.edge.bundle import MANIFEST, example_of, pipeline_outputs, write_manifest
from pipelines.edge.settings import read_json
from pipelines.edge.web import LIBRARIES, add_page
from pipelines.onnx.export import ONNX_FILE
from pipelines.runtime.generate import LanguageModel, Sampling
from pipelines.runtime.infer import open_session
from pipelines.tasks import TaskConfig, make_task, task_class

NEW_TOKENS = 100  # as many as the page writes
ARGUMENTS = 50  # examples to a process of infer.py
HEADER = [
    "run",
    "graph",
    "predicted by",
    "examples",
    "largest difference of an output",
    "within 0.001",
    "same prediction",
]

# What one side predicts for an example: the logit of each label or each value, by their names, or the continuation of a text.
Prediction = dict[str, float] | str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, nargs="+", type=Path, help="Directories of finished runs.")
    parser.add_argument("--examples", type=int, default=1000, help="At most this many test examples of each run.")
    parser.add_argument("--prompts", type=int, default=20, help="Texts that a language model continues.")
    flags = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    for cells in (HEADER, ["---"] * 3 + ["---:"] * 4):
        print("| " + " | ".join(cells) + " |", flush=True)
    try:
        with opened_browser() as browser:
            for run in flags.runs:
                for row in compare(run, flags, scratch, browser):
                    print("| " + " | ".join(row) + " |", flush=True)
    finally:
        shutil.rmtree(scratch)


def compare(run: Path, flags: argparse.Namespace, scratch: Path, browser: Any) -> Iterator[list[str]]:
    """The rows of one run."""
    if not (run / "report.json").is_file() or not (run / "bundle" / MANIFEST).is_file():
        raise InputError(f"expected a finished run with its bundle in {run}, found none. Run a recipe to its end.")
    report = read_json(run / "report.json")
    name = report["task"]
    task = make_task(make_settings((TaskConfig, *task_class(name).settings), report["config"] | {"task": name}))
    folder = scratch / run.resolve().name
    bundle = Path(shutil.copytree(run / "bundle", folder / "bundle"))
    if not (bundle / "index.html").is_file():
        add_page(bundle, BundleConfig(web=True), tuple(LIBRARIES))
    fp32 = Path(shutil.copytree(bundle, folder / "fp32"))
    shutil.copyfile(run / "onnx" / ONNX_FILE, fp32 / ONNX_FILE)
    # The page refuses a graph that is not its manifest's.
    write_manifest(fp32, read_json(fp32 / MANIFEST))
    python = make_environment(folder / "environment", "-r", str(bundle / "requirements.txt"))
    examples = examples_of(bundle, task, flags, folder)
    shipped = predict_here(bundle, task, examples)
    full = predict_here(fp32, task, examples)

    def row(graph: str, where: str, found: list[Prediction], expected: list[Prediction]) -> list[str]:
        return [run.resolve().name, graph, where, str(len(found)), *compared(found, expected)]

    name = report["shipped"]
    yield row(name, "infer.py in an environment of its own", predict_on_device(python, bundle, examples), shipped)
    yield row(name, "the page in Chromium", predict_in_browser(browser, bundle, examples), shipped)
    yield row("onnx", "the page in Chromium", predict_in_browser(browser, fp32, examples), full)
    yield row(f"{name} beside onnx", "ONNX Runtime here", shipped, full)


def compared(found: list[Prediction], expected: list[Prediction]) -> list[str]:
    """The largest difference of a logit or value, the examples without one above 0.001, and those with the same label or continuation."""
    if isinstance(found[0], str):
        same = sum(one == other for one, other in zip(found, expected, strict=True))
        return ["", "", str(same)]
    pairs = list(zip(found, expected, strict=True))
    differences = [max(abs(one[label] - other[label]) for label in one) for one, other in pairs]
    best = [max(one, key=one.__getitem__) == max(other, key=other.__getitem__) for one, other in pairs]
    return [f"{max(differences):.2g}", str(sum(value <= 1e-3 for value in differences)), str(sum(best))]


def examples_of(bundle: Path, task: Task, flags: argparse.Namespace, folder: Path) -> list[tuple[str, ...]]:
    """Test examples as the command line takes them: one or two texts, or the path of an image file."""
    test = task.splits["test"]
    if read_json(bundle / MANIFEST)["outputs"]["kind"] == "continuation":
        return [(" ".join(text.split()[:12]),) for text in test["text"][: flags.prompts]]
    examples = []
    for index in range(min(flags.examples, len(test))):
        example = example_of(test[index])
        if isinstance(example[0], BytesIO):
            path = folder / f"{index}.png"
            path.write_bytes(example[0].getvalue())
            example = (str(path),)
        examples.append(example)
    return examples


def predict_here(bundle: Path, task: Task, examples: list[tuple[str, ...]]) -> list[Prediction]:
    """What the pipeline predicts, with its own processor and ONNX Runtime."""
    outputs = read_json(bundle / MANIFEST)["outputs"]
    if outputs["kind"] == "continuation":
        model = LanguageModel(bundle, open_session(bundle / "model.onnx"))
        return [model.generate([prompt], Sampling(max_new_tokens=NEW_TOKENS))[0] for (prompt,) in examples]
    names = outputs.get("labels") or outputs["names"]
    processor = task.load_processor(str(bundle))
    rows = pipeline_outputs(bundle, task, processor, "test", len(examples))
    return [dict(zip(names, row.tolist(), strict=True)) for row in rows]


def predict_on_device(python: Path, bundle: Path, examples: list[tuple[str, ...]]) -> list[Prediction]:
    """What infer.py writes as JSON."""
    flags = ["--json"] + ["--pair"] * (len(examples[0]) == 2)
    lines: list[dict[str, Any]] = []
    if read_json(bundle / MANIFEST)["outputs"]["kind"] == "continuation":
        flags += ["--max_new_tokens", str(NEW_TOKENS)]
    for start in range(0, len(examples), ARGUMENTS):
        texts = [text for example in examples[start : start + ARGUMENTS] for text in example]
        command = [str(python), str(bundle / "infer.py"), *flags, "--", *texts]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        lines += map(json.loads, done.stdout.splitlines())
    return [prediction_of_line(line) for line in lines]


def prediction_of_line(line: dict[str, Any]) -> Prediction:
    if "continuation" in line:
        return str(line["continuation"])
    # JSON carries every digit of the float32 logits.
    return line.get("values") or dict(zip(line["probabilities"], line["logits"], strict=True))


@contextmanager
def opened_browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        installed = shutil.which("chromium") or shutil.which("google-chrome") or playwright.chromium.executable_path
        yield playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])


def predict_in_browser(browser: Any, bundle: Path, examples: list[tuple[str, ...]]) -> list[Prediction]:
    """What the page shows, used as a person uses it."""
    with served(bundle) as address:
        page = browser.new_page()
        page.set_default_timeout(600_000)  # a busy machine may take its time
        page.goto(address)
        page.wait_for_selector("body[data-state=ready]")
        predictions = [predict_in_page(page, example) for example in examples]
        page.close()
    return predictions


def predict_in_page(page: Any, example: tuple[str, ...]) -> Prediction:
    page.evaluate("document.body.dataset.state = 'waiting'")
    if page.is_visible("#drop"):
        page.set_input_files("#image", example[0])
    for field, text in zip(("#text", "#pair"), example, strict=False):
        if page.is_visible(field):
            page.fill(field, text)
    if page.is_visible("#generate"):
        page.fill("#temperature", "0")
        page.click("#generate")
    page.wait_for_selector("body[data-state=ready]")
    if page.is_visible("#generate"):
        return str(page.text_content("#continuation b"))
    rows = page.eval_on_selector_all("tr", "rows => rows.map((row) => [row.cells[0].textContent, row.title])")
    return {label: float(title.removeprefix("logit ")) for label, title in rows}


@contextmanager
def served(directory: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    run_main(main)
