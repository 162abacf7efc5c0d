"""The page of a bundle: its JavaScript against Pillow and tokenizers in Node, and all of it in a real headless Chromium."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from test_edge import image_files
from test_load import LABELS, VALUES, bundle_by_hand

from conftest import make_texts
from pipelines.core.config import BundleConfig, DataConfig, QuantizeConfig
from pipelines.core.errors import InputError
from pipelines.edge.bundle import build_bundle, write_manifest
from pipelines.edge.load import load
from pipelines.edge.settings import image_settings
from pipelines.edge.web import HERE, LIBRARIES, RUNTIME_LIBRARY, TOKENIZER_LIBRARY, add_page
from pipelines.onnx.export import export_onnx
from pipelines.onnx.quantize import quantize_onnx
from pipelines.runtime import images, infer, spans
from pipelines.runtime.answers import AnswerModel
from pipelines.runtime.generate import LanguageModel, Sampling
from pipelines.tasks.sentence_embedding.data import EmbeddingConfig
from pipelines.tasks.sentence_embedding.task import SentenceEmbedding
from pipelines.tasks.text_classification import TextClassification
from pipelines.training.fine_tune import save

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js on the PATH")
TEXTS = [text for text, _ in make_texts(12, seed=5)]
SPAN_TEXTS = int(os.environ.get("SPAN_TEXTS", 1000))  # 10,000 were tried
ODD_TEXTS = ["goal " * 100, "NAÏVE 東京 🙂 server", "[SEP] goal"]
feed_ids = functools.partial(infer.token_inputs, names=["input_ids"])


def node(script: str, given: Any) -> Any:
    """What an ES module prints as JSON, when it finds `model` imported and `given` parsed."""
    program = f"""
        import * as model from {json.dumps((HERE / "model.mjs").as_uri())};
        import {{readFileSync}} from "node:fs";
        const given = JSON.parse(readFileSync(0, "utf8"));
        {script}
    """
    command = ["node", "--input-type=module", "--eval", program]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
def test_resampling_is_pillows_to_the_byte(resample):
    generator = np.random.default_rng(0)
    cases = []
    for size, target in [
        ((37, 53), (24, 24)),
        ((53, 37), (24, 24)),
        ((8, 8), (31, 17)),
        ((19, 19), (25, 4)),
        ((64, 5), (64, 9)),
        ((50, 40), (7, 40)),
        ((9, 9), (9, 9)),
    ]:
        image = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), np.uint8))
        expected = np.asarray(image.resize(target, resample=resample))
        cases.append({"data": np.asarray(image).ravel().tolist(), "sizes": [*size, *target], "expected": expected})
    script = "console.log(JSON.stringify(given.map(({data, sizes, filter}) => [...model.resample(Uint8Array.from(data), ...sizes, filter)])))"
    found = node(script, [{"data": case["data"], "sizes": case["sizes"], "filter": resample} for case in cases])
    for case, pixels in zip(cases, found, strict=True):
        np.testing.assert_array_equal(np.array(pixels, np.uint8), case["expected"].ravel())


@needs_node
def test_pixels_are_those_of_infer_py():
    import transformers

    processors = [
        transformers.ViTImageProcessorPil(size={"height": 12, "width": 10}),
        transformers.DeiTImageProcessorPil(size={"height": 20, "width": 20}, crop_size={"height": 25, "width": 14}),
        transformers.ConvNextImageProcessorPil(size={"shortest_edge": 15}),
        transformers.ViTImageProcessorPil(do_resize=False, do_rescale=False),
        transformers.ViTImageProcessorPil(size={"height": 9, "width": 11}, image_mean=[0.4], image_std=[0.2]),
    ]
    generator = np.random.default_rng(0)
    given, expected = [], []
    for settings in map(image_settings, processors):
        for width, height in [(33, 21), (21, 34), (6, 6)]:
            image = Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
            rgba = np.asarray(image.convert("RGBA")).ravel().tolist()
            given.append({"image": {"data": rgba, "width": width, "height": height}, "settings": settings})
            expected.append(images.image_pixels(image, settings))
    script = """
        for (const {image} of given) image.data = Uint8ClampedArray.from(image.data);
        console.log(JSON.stringify(given.map(({image, settings}) => [...model.imagePixels(image, settings).data])));
    """
    for found, pixels in zip(node(script, given), expected, strict=True):
        np.testing.assert_array_equal(np.array(found, np.float32), pixels.ravel())


@needs_node
def test_files_that_a_browser_would_read_otherwise_are_refused():
    files = {}
    for name, pixels, kind in [
        ("deep", np.zeros((2, 2), np.uint16), "PNG"),
        ("plain", np.zeros((2, 2), np.uint8), "PNG"),
        ("tiff", np.zeros((2, 2), np.float32), "TIFF"),
        ("photograph", np.zeros((2, 2, 3), np.uint8), "JPEG"),
    ]:
        Image.fromarray(pixels).save(file := BytesIO(), kind)
        files[name] = list(file.getvalue())
    script = """
        const check = (bytes) => { try { model.checkImageFile(bytes); return "read"; } catch (error) { return error.message; } };
        console.log(JSON.stringify(Object.fromEntries(Object.entries(given).map(([name, bytes]) => [name, check(bytes)]))));
    """
    found = node(script, files)
    assert (found["plain"], found["photograph"]) == ("read", "read")
    assert "16 bits, of which a browser reads 8" in found["deep"]
    assert "Use the bundle's infer.py" in found["tiff"]


@needs_node
def test_truncation_is_that_of_tokenizers(tokenizer):
    room = 12
    lengths = [(first, second) for first in range(1, 30, 3) for second in range(1, 30, 4)]
    expected = []
    for first, second in lengths:
        types = tokenizer(
            ["goal"] * first, ["team"] * second, is_split_into_words=True, truncation=True, max_length=room + 3
        ).token_type_ids
        kept = sum(types) - 1
        expected.append([len(types) - kept - 3, kept])
    script = f"console.log(JSON.stringify(given.map((pair) => model.truncatedLengths(...pair, {room}))))"
    assert node(script, lengths) == expected


# Pieces of texts: combining marks before and after normalization, emoji of several code points, right-to-left and other scripts, white space.
PIECES = [
    *"\r\n \t \n . , @ - x",
    "\r\n",
    " ",
    "🙂",
    "👩\u200d👧",
    "e\u0301",
    "é",
    "a\u0323\u0302",
    "שלום",
    "مرحبا",
    "नमस्ते",
    "東京",
    "İ",
    "ß",
]
PIECES += ["ﬁ", "ΟΔΟΣ", "Hello", "goal", "WORLD", "123", "’", "한국", "\u200b", "\u00a0", "[SEP]", "½"]
SPAN_LABELS = ["O", "B-A", "I-A", "B-B", "I-B"]


def wordpiece_of(texts: list[str]) -> Any:
    """A tokenizer whose pieces are the letters of the texts and a few words."""
    from tokenizers import BertWordPieceTokenizer

    letters = sorted({one for text in texts for one in BertWordPieceTokenizer().normalize(text)} - {"½"})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "goal", "##lo", *letters, *(f"##{one}" for one in letters)]
    return BertWordPieceTokenizer({piece: number for number, piece in enumerate(pieces)})


@needs_node
def test_spans_are_those_of_infer_py_wherever_they_begin(libraries, tmp_path):
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(PIECES, generator.integers(0, 25))) for _ in range(SPAN_TEXTS)]
    wordpiece_of(texts).save(str(tmp_path / "tokenizer.json"))
    windows = spans.Windows(infer.open_tokenizer(tmp_path / "tokenizer.json"), feed_ids, 12)
    script = """
        const {Tokenizer} = await import(given.library);
        const tokenizer = new Tokenizer(given.tokenizer, {});
        const find = (text) => {
            const placed = model.placedTokens(tokenizer, text);
            const logits = placed.map((_, token) => given.labels.map((_, label) => (label === (token * token + 3 * token) % 5 ? 4 : 0)));
            const {windows, before} = model.textWindows(tokenizer, placed, 12);
            return {
                spans: model.findSpans(text, placed.map(({start, end}) => [start, end]), logits, given.labels),
                kept: windows.map(({tokens, from, to}) => tokens.slice(from, to).map(({token, start}) => [token, start])),
                before,
            };
        };
        console.log(JSON.stringify(given.texts.map(find)));
    """
    library = libraries / "@huggingface" / "tokenizers" / "dist" / "tokenizers.min.mjs"
    given = {"library": library.as_uri(), "tokenizer": json.loads((tmp_path / "tokenizer.json").read_text())}
    found = node(script, {**given, "labels": SPAN_LABELS, "texts": texts})
    count = 0
    for text, of_page in zip(texts, found, strict=True):
        offsets = [place for _, _, places in windows(text) for place in places]
        numbers = (np.arange(len(offsets)) ** 2 + 3 * np.arange(len(offsets))) % 5
        expected = spans.find_spans(text, offsets, np.eye(5)[numbers] * 4, SPAN_LABELS)
        for one, other in zip(expected, of_page["spans"], strict=True):
            assert one["text"] == text[one["start"] : one["end"]] == other["text"] != ""
            units = len(text[: one["start"]].encode("utf-16-le")) // 2
            assert (one["label"], units) == (other["label"], other["start"])
            assert one["score"] == pytest.approx(other["score"])
        kept = [len(places) for _, _, places in windows(text)]
        assert kept == [len(tokens) for tokens in of_page["kept"]]
        assert of_page["before"] == 1
        count += len(expected)
    assert count > SPAN_TEXTS


def test_libraries_come_from_the_named_directory_and_are_checked(tmp_path):
    (tmp_path / "bundle").mkdir()
    library = tmp_path / "node_modules" / RUNTIME_LIBRARY / "dist"
    library.mkdir(parents=True)
    config = BundleConfig(web_assets=str(tmp_path / "node_modules"))
    with pytest.raises(InputError, match=r"ort\.wasm\.min\.mjs of onnxruntime-web .* found no such file"):
        add_page(tmp_path / "bundle", config, (RUNTIME_LIBRARY,))
    (library / "ort.wasm.min.mjs").write_text("something else")
    shutil.rmtree(tmp_path / "bundle" / "web")
    with pytest.raises(InputError, match="found another version of it"):
        add_page(tmp_path / "bundle", config, (RUNTIME_LIBRARY,))


def test_a_page_that_nobody_asked_for_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    assert add_page(bundle, BundleConfig(web=False), (RUNTIME_LIBRARY,)) == ({}, "--web false")
    reasons = ["npm error code ECONNREFUSED"] * (shutil.which("npm") is not None)
    for reason in [*reasons, "No such file or directory: 'npm'"]:
        page, why = add_page(bundle, BundleConfig(), (RUNTIME_LIBRARY,))
        assert page == {}
        assert reason in why
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="or leave the page out with --web false"):
        add_page(bundle, BundleConfig(web=True), (RUNTIME_LIBRARY,))
    assert not list(bundle.iterdir())


# ---- In a browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium: Debian's, or the one that playwright installed."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
    with api.sync_playwright() as playwright:
        installed = shutil.which("chromium") or shutil.which("google-chrome") or playwright.chromium.executable_path
        if not Path(installed).is_file():
            pytest.skip("needs Chromium: apt-get install chromium, or playwright install chromium")
        chromium = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node_modules with the page's libraries, fetched by npm."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm on the PATH")
    folder = tmp_path_factory.mktemp("npm")
    packages = [f"{name}@{version}" for name, (version, *_) in LIBRARIES.items()]
    command = ["npm", "install", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", *packages]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs npm to reach its registry: {(done.stderr or done.stdout)[-200:]}")
    return folder / "node_modules"


@needs_node
@pytest.mark.parametrize("unanswerable", [False, True])
def test_answers_are_those_of_infer_py(unanswerable, tokenizer, libraries, tmp_path):
    """Windows, spans and characters, of logits that depend on the tokens."""
    inputs, outputs = {"max_length": 24, "overlap": 6}, {"max_answer_tokens": 5, "unanswerable": unanswerable}

    def run(names: list[str], feed: dict[str, Any]) -> list[np.ndarray]:
        return [3 * np.sin(feed["input_ids"] * (7.0 + side) + side) for side in range(2)]

    tokenizer.save_pretrained(tmp_path)
    model = AnswerModel(
        infer.open_tokenizer(tmp_path / "tokenizer.json"), feed_ids, SimpleNamespace(run=run), inputs, outputs
    )
    pieces = [
        "goal ",
        "the match, ",
        "cafe\u0301 ",
        "🙂",
        "👩\u200d👧 ",
        "\r\n",
        "\t",
        "東京",
        "\u05e9\u05dc ",
        "42",
        "\u201c",
        ".",
        "\u200b",
        "team",
    ]
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(pieces, generator.integers(0, 40))) for _ in range(150)]
    library = (libraries / TOKENIZER_LIBRARY / "dist" / "tokenizers.min.mjs").as_uri()
    script = f"""
        const {{Tokenizer}} = await import({json.dumps(library)});
        const read = (name) => JSON.parse(readFileSync({json.dumps(str(tmp_path))} + "/" + name));
        const run = async ({{input_ids: {{data}}}}) => Object.fromEntries(["start_logits", "end_logits"].map((name, side) =>
            [name, {{data: Array.from(data, (id) => 3 * Math.sin(Number(id) * (7 + side) + side))}}]));
        const bundle = {{
            manifest: {{inputs: {json.dumps(inputs)}, outputs: {json.dumps(outputs)}}},
            ort: {{Tensor: class {{ constructor(type, data) {{ this.data = data; }} }}}},
            session: {{inputNames: ["input_ids"], run}},
            tokenizer: new Tokenizer(read("tokenizer.json"), read("tokenizer_config.json")),
        }};
        const found = [];
        for (const text of given) found.push(await model.answer(bundle, ["the match", text]));
        console.log(JSON.stringify(found));
    """
    several = 0
    for text, shown in zip(texts, node(script, texts), strict=True):
        expected = model.answer("the match", text)
        spans = [
            (name, probability)
            for name, probability, span in zip(*map(shown.get, ("names", "probabilities", "spans")), strict=True)
            if span
        ]
        assert [name for name, _ in spans] == [one["answer"] for one in expected["answers"]], text
        np.testing.assert_allclose([one for _, one in spans], [one["score"] for one in expected["answers"]], rtol=1e-6)
        assert shown["names"][0] == (expected["answer"] or "(no answer)")
        several += len(spans) > 1
    assert several > 100


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The bundle behind what `python -m http.server` is made of."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def end_headers(self) -> None:
            self.send_header(
                "Cache-Control", "no-store"
            )  # a file may change within the second that Last-Modified counts
            super().end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(bundle)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def test_values_and_several_labels_in_a_browser(browser, tokenizer, tmp_path, libraries):
    for outputs in (VALUES, LABELS):
        bundle = bundle_by_hand(tmp_path / outputs["kind"], tokenizer, outputs, [1, len(outputs.get("labels", "1"))])
        add_page(bundle, BundleConfig(web_assets=str(libraries)), tuple(LIBRARIES))
        write_manifest(bundle, json.loads((bundle / "manifest.json").read_text()))
        expected = infer.Predictor(bundle).predict((TEXTS[0],))
        with served(bundle) as address:
            page = browser.new_page()
            page.goto(address)
            page.fill("#text", TEXTS[0])
            page.wait_for_selector("tr", timeout=120_000)
            rows = page.eval_on_selector_all(
                "tr", "rows => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
            )
            chosen = page.eval_on_selector_all("tr.chosen", "rows => rows.map((row) => row.cells[0].textContent)")
            if outputs is VALUES:
                assert page.inner_text("#title") == "Which value does the text have?"
                ((name, value),) = rows
                assert (name, float(value)) == ("score", pytest.approx(expected["values"]["score"], rel=1e-5))
            else:
                assert page.inner_text("#title") == "Which labels fit the text?"
                marks = page.eval_on_selector_all("tr i", "marks => marks.map((mark) => mark.style.left)")
                assert sorted(marks) == ["50%", "50%", "90%"]
                shown = {name: text for name, text, _ in rows}
                probabilities = expected["probabilities"]
                assert list(shown) == sorted(probabilities, key=lambda name: -probabilities[name])
                assert shown == {name: f"{100 * share:.1f} %" for name, share in probabilities.items()}
                assert chosen == expected["labels"]
            page.close()


def test_lines_are_ranked_in_a_browser(browser, tokenizer, tmp_path, libraries):
    bundle = bundle_by_hand(tmp_path / "bundle", tokenizer, VALUES | {"ranks": True}, [1, 1])
    add_page(bundle, BundleConfig(web_assets=str(libraries)), tuple(LIBRARIES))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["inputs"]["pair"] = True
    write_manifest(bundle, manifest)
    lines = ["the goal", "software and code", "a"]
    expected = load(bundle).rank("team", lines)
    with served(bundle) as address:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("body[data-state=ready]", timeout=120_000)
        assert page.inner_text("#title") == "Which line answers best?"
        page.fill("#text", "team")
        page.fill("#pair", "\n".join([*lines[:2], "", lines[2]]))
        page.wait_for_selector("tr >> nth=2", timeout=120_000)
        rows = page.eval_on_selector_all("tr", "rows => rows.map((row) => [row.cells[0].textContent, row.title])")
        assert [text for text, _ in rows] == [one["input"] for one in expected]
        assert [float(score) for _, score in rows] == pytest.approx(
            [one["values"]["score"] for one in expected], abs=1e-5
        )


def test_spans_in_a_browser(browser, tokenizer, tmp_path, libraries):
    bundle, text = tmp_path / "bundle", "🙂 goal שלום 12, the coach said"
    bundle.mkdir()
    tokenizer.save_pretrained(bundle)
    weights = np.random.default_rng(0).normal(size=(len(tokenizer), 5)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["weights", "input_ids"], ["logits"])],
        "by_hand",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 5])],
        [numpy_helper.from_array(weights, "weights")],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), bundle / "model.onnx")
    add_page(bundle, BundleConfig(web_assets=str(libraries)), tuple(LIBRARIES))
    inputs = {"kind": "text", "pair": False, "max_length": 8, "truncation_side": "right", "probes": []}
    manifest = {"format": infer.FORMAT, "model": "model.onnx", "minimum_onnxruntime": "1.18.0", "inputs": inputs}
    write_manifest(bundle, manifest | {"outputs": {"kind": "spans", "labels": SPAN_LABELS}})
    expected = infer.SpanFinder(bundle).predict((text,))["spans"]
    assert len(expected) > 1
    with served(bundle) as address:
        page = browser.new_page()
        page.goto(address)
        page.fill("#text", text)
        page.wait_for_selector("mark", timeout=120_000)
        marks = "marks => marks.map((mark) => [mark.textContent, mark.dataset.label])"
        assert page.eval_on_selector_all("mark", marks) == [[one["text"], one["label"]] for one in expected]
        assert page.text_content("#spans") == text
        page.close()


@contextmanager
def opened(browser: Any, source: Path, directory: Path, task: Any, libraries: Path) -> Iterator[Any]:
    """A page that shows the bundle of an ONNX directory; it may ask no other server for anything."""
    directory.mkdir()
    build_bundle(str(source), directory, task, BundleConfig(web_assets=str(libraries)))
    with served(directory) as address:
        page = browser.new_page()
        strangers: list[str] = []
        page.on(
            "request",
            lambda request: request.url.startswith((address, "data:", "blob:")) or strangers.append(request.url),
        )
        page.goto(address)
        page.wait_for_selector("body[data-state]", timeout=120_000)
        assert page.get_attribute("body", "data-state") == "ready", page.inner_text("body")
        yield page
        page.close()
        assert strangers == []


def shown_logits(page: Any, predictor: infer.Predictor) -> list[float]:
    """The logits in the table, which must be sorted, beside their probabilities and the time."""
    page.wait_for_selector("body[data-state=ready]", timeout=120_000)
    rows = page.eval_on_selector_all(
        "tr", "rows => rows.map((row) => [row.cells[0].textContent, row.title, row.cells[1].textContent])"
    )
    found = {label: float(title.removeprefix("logit ")) for label, title, _ in rows}
    assert next(iter(found)) == max(found, key=lambda label: found[label])
    weights = np.exp(np.array(list(found.values())))
    shown = [float(text.removesuffix(" %")) for *_, text in rows]
    np.testing.assert_allclose(shown, 100 * weights / weights.sum(), atol=0.051)
    milliseconds = re.fullmatch(r"(\d+\.\d) ms", page.inner_text("#time"))
    assert milliseconds
    assert 0 < float(milliseconds[1]) < 10_000
    return [found[label] for label in predictor.manifest["outputs"]["labels"]]


def drop(page: Any, names: list[str], where: str) -> list[bool]:
    """Drop files of the server, one right after the other; whether each is left to the browser, which would leave the page."""
    script = """async ([names, where]) => {
        const files = await Promise.all(names.map(async (name) => new File([await (await fetch(name)).blob()], name)));
        return files.map((file) => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(file);
            const event = new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true});
            return document.querySelector(where).dispatchEvent(event);
        });
    }"""
    return list(page.evaluate(script, [names, where]))


def test_texts_in_a_browser(browser, text_onnx, task, tmp_path, libraries):
    bundle = tmp_path / "bundle"
    with opened(browser, text_onnx / "quantized", bundle, task, libraries) as page:
        predictor = infer.Predictor(bundle)
        for text in [*TEXTS, *ODD_TEXTS]:
            page.fill("#text", text)
            found = shown_logits(page, predictor)
            np.testing.assert_allclose(found, predictor.logits((text,)), atol=1e-3)
        page.fill("#text", " ")
        assert page.inner_text("#predictions") == page.inner_text("#time") == ""

        # One prediction for many keys, or the model would hold up the next of them.
        page.evaluate(
            "new MutationObserver(() => (window.predicted = (window.predicted ?? 0) + 1)).observe(predictions, {childList: true})"
        )
        page.type("#text", "a goal in the league", delay=5)
        np.testing.assert_allclose(
            shown_logits(page, predictor), predictor.logits(("a goal in the league",)), atol=1e-3
        )
        assert page.evaluate("window.predicted") < 10

        manifest = json.loads((bundle / "manifest.json").read_text())
        page.set_viewport_size({"width": 360, "height": 640})
        (bundle / "manifest.json").write_text(
            json.dumps(manifest | {"outputs": manifest["outputs"] | {"labels": ["l" * 200, "long " * 50, "tech"]}})
        )
        page.reload()
        page.wait_for_selector("body[data-state=ready]")
        page.fill("#text", "goal")
        page.wait_for_selector("tr >> nth=2")
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")

        # What infer.py would refuse, and tokens that another library makes otherwise.
        probes = manifest["inputs"]["probes"]
        assert len(probes) == 5
        probes[2]["ids"] += " 7"
        write_manifest(bundle, manifest)
        page.reload()
        page.wait_for_selector("body[data-state=failed]")
        assert 'for "[SEP] </s> <|endoftext|>", found others' in page.inner_text("#error")
        for name, change in [("tokenizer.json", lambda content: content[:-1]), ("model.onnx", bytes.swapcase)]:
            (bundle / name).write_bytes(change((bundle / name).read_bytes()))
            page.reload()
            page.wait_for_selector("body[data-state=failed]")
            assert f"expected {name} of" in page.inner_text("#error")
            assert page.is_hidden("#text")


def test_pairs_in_a_browser(browser, text_onnx, tmp_path, libraries):
    texts = make_texts(60)
    rows = [f'"{text}","{texts[(7 * i) % 60][0]}",{label}\n' for i, (text, label) in enumerate(texts)]
    (tmp_path / "pairs.csv").write_text("text,other,label\n" + "".join(rows), encoding="utf-8")
    data = DataConfig(dataset=str(tmp_path / "pairs.csv"), text_pair_column="other", max_length=16)
    task, quantized = TextClassification(data), tmp_path / "quantized"
    quantized.mkdir()
    config = QuantizeConfig(quantization="int8_int4_embeddings", block_size=16, max_quality_drop=1.0)
    quantize_onnx(str(text_onnx / "onnx"), quantized, task, config)
    assert b"GatherBlockQuantized" in (quantized / "model.onnx").read_bytes()
    with opened(browser, quantized, tmp_path / "bundle", task, libraries) as page:
        predictor = infer.Predictor(tmp_path / "bundle")
        for pair in [*zip(TEXTS[:4], reversed(TEXTS[:4]), strict=True), ("goal", ODD_TEXTS[0]), ODD_TEXTS[:2]]:
            page.fill("#text", pair[0])
            page.fill("#pair", pair[1])
            np.testing.assert_allclose(shown_logits(page, predictor), predictor.logits(tuple(pair)), atol=1e-3)
        page.fill("#text", "")
        assert page.inner_text("#predictions") == ""  # until there are two texts again


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "int4_blocks"])
def test_lines_are_searched_in_a_browser(quantization, browser, pretrained, csv_file, tokenizer, tmp_path, libraries):
    data = DataConfig(dataset=str(csv_file), text_pair_column="label", max_length=16)
    task = SentenceEmbedding(data, EmbeddingConfig(pooling="mean"))
    save(task.load_model(str(pretrained)), tokenizer, tmp_path / "model")
    (tmp_path / "onnx").mkdir()
    export_onnx(str(tmp_path / "model"), shipped := tmp_path / "onnx", task)
    if quantization != "none":
        (shipped := tmp_path / "quantized").mkdir()
        config = QuantizeConfig(quantization=quantization, block_size=16, max_quality_drop=1.0)
        quantize_onnx(str(tmp_path / "onnx"), shipped, task, config)
        assert b"MatMulNBits" in (shipped / "model.onnx").read_bytes()
    with opened(browser, shipped, tmp_path / "bundle", task, libraries) as page:
        assert page.inner_text("#title") == "Which line is nearest to the text?"
        predictor = infer.Predictor(tmp_path / "bundle")
        page.fill("#pair", "\n".join([*TEXTS, "", TEXTS[0]]))
        for query in ("a goal for the team", "NAÏVE 東京"):
            page.fill("#text", query)
            page.wait_for_timeout(300)
            page.wait_for_selector("body[data-state=ready]", timeout=120_000)
            rows = page.eval_on_selector_all("tr", "rows => rows.map((row) => [row.cells[0].textContent, row.title])")
            vectors = np.array([predictor.logits((text,)) for text in (query, *TEXTS)])
            cosines = vectors[1:] @ vectors[0] / np.linalg.norm(vectors[1:], axis=1) / np.linalg.norm(vectors[0])
            expected = dict(zip(TEXTS, cosines, strict=True))
            assert len(rows) == 10
            found = [float(title.removeprefix("cosine ")) for _, title in rows]
            np.testing.assert_allclose(found, [expected[text] for text, _ in rows], atol=1e-3)
            np.testing.assert_allclose(found, np.sort(cosines)[::-1][:10], atol=1e-3)


def test_images_in_a_browser(browser, image_onnx, image_task, image_folder, tmp_path, libraries):
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate([(33, 90), (200, 151)]):
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{number}.png")
    bundle = tmp_path / "bundle"
    with opened(browser, image_onnx, bundle, image_task, libraries) as page:
        page.evaluate("""() => {
            window.held = {images: 0, addresses: 0};
            const [create, close, show, revoke] = [createImageBitmap, ImageBitmap.prototype.close, URL.createObjectURL, URL.revokeObjectURL];
            window.createImageBitmap = (...given) => create(...given).then((image) => { held.images++; return image; });
            ImageBitmap.prototype.close = function () { held.images--; close.call(this); };
            URL.createObjectURL = (file) => { held.addresses++; return show(file); };
            URL.revokeObjectURL = (address) => { held.addresses -= address.startsWith("blob:"); revoke(address); };
        }""")
        predictor = infer.Predictor(bundle)
        paths = [*sorted(image_folder.rglob("*.png"))[:10], *tmp_path.glob("*.png")]
        for number, file in enumerate(image_files()):
            with Image.open(file) as image:
                paths.append(tmp_path / f"of_mode_{image.mode.replace(';', '_')}_{number}.{image.format}".lower())
            paths[-1].write_bytes(file.getvalue())
        assert {path.suffix for path in paths} == {".png", ".jpeg", ".tiff"}
        for path in paths:
            page.set_input_files("#image", path)
            if path.suffix == ".tiff" or "_i_16" in path.name:
                page.wait_for_selector("body[data-state=failed]")
                assert path.name in page.inner_text("#error")
                assert "infer.py" in page.inner_text("#error")
                continue
            found = shown_logits(page, predictor)
            np.testing.assert_allclose(found, predictor.logits((path,)), atol=1e-3, err_msg=path.name)
        assert page.evaluate("window.held") == {"images": 0, "addresses": 1}
        (tmp_path / "no.png").write_text("no image")
        page.set_input_files("#image", tmp_path / "no.png")
        page.wait_for_selector("body[data-state=failed]")
        assert "no.png" in page.inner_text("#error")
        assert page.inner_text("#time") == ""
        assert page.is_hidden("#picture")

        half = generator.integers(0, 256, (20, 20, 4), np.uint8)
        Image.fromarray(half).save(tmp_path / "half.png")
        page.set_input_files("#image", tmp_path / "half.png")
        # A canvas rounds its colours otherwise than Pillow.
        found = shown_logits(page, predictor)
        np.testing.assert_allclose(found, predictor.logits((tmp_path / "half.png",)), atol=0.03)

        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "image"
        assert page.evaluate("getComputedStyle(document.querySelector('#drop')).outlineStyle") == "solid"

        # The older of two images is decoded after the newer.
        Image.new("RGB", (4000, 3000)).save(bundle / "large.png")
        for number, where in enumerate(["#drop", "#title"]):
            shutil.copyfile(paths[10 + number], bundle / "small.png")
            assert drop(page, ["large.png", "small.png"], where) == [False, False]
            page.wait_for_timeout(700)
            expected = predictor.logits((bundle / "small.png",))
            np.testing.assert_allclose(shown_logits(page, predictor), expected, atol=1e-3)
            with Image.open(bundle / "small.png") as image:
                assert page.evaluate("document.querySelector('#picture').naturalWidth") == image.width


@pytest.mark.slow
def test_quantized_images_in_a_browser(browser, image_onnx, image_task, image_folder, tmp_path, libraries):
    (tmp_path / "quantized").mkdir()
    quantize_onnx(str(image_onnx), tmp_path / "quantized", image_task, QuantizeConfig(max_quality_drop=1.0))
    with opened(browser, tmp_path / "quantized", tmp_path / "bundle", image_task, libraries) as page:
        predictor = infer.Predictor(tmp_path / "bundle")
        for path in sorted(image_folder.rglob("*.png"))[::20]:
            page.set_input_files("#image", path)
            found, expected = shown_logits(page, predictor), predictor.logits((path,))
            assert np.argmax(found) == np.argmax(expected)
            np.testing.assert_allclose(found, expected, atol=1e-3)


def continued(page: Any, prompt: str) -> str:
    page.fill("#temperature", "0")
    page.fill("#text", prompt)
    page.click("#generate")
    page.wait_for_selector("body[data-state=ready]", timeout=120_000)
    shown = page.text_content("#continuation")
    assert shown.startswith(prompt)
    return str(shown.removeprefix(prompt))


# Of the next token after a text; and after one that leaves no token, as for a tokenizer that drops what it does not know.
FIRST_LOGITS = """async ([prompt, dropped]) => {
    const model = await import(new URL("web/model.mjs", document.baseURI));
    const bundle = await model.openBundle(document.baseURI);
    if (dropped) bundle.tokenizer.encode = () => ({ids: []});
    let found;
    const choose = (logits) => { found = Array.from(logits); return 1; };
    for await (const _ of model.continueText(bundle, prompt, {choose, limit: 1}));
    return found;
}"""


def native_logits(model: LanguageModel, tokens: list[int]) -> np.ndarray:
    feed = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), np.int64)}
    cache = {name: np.zeros((1, heads, 0, size), np.float32) for name, (heads, size) in model.cache_shapes.items()}
    return np.asarray(model.session.run(["logits"], feed | cache)[0][0, -1])


def test_continuations_in_a_browser(browser, language_bundle, language_task, tmp_path, libraries):
    source = language_bundle.parent / "onnx"
    with opened(browser, source, tmp_path / "bundle", language_task, libraries) as page:
        model_here = infer.Generator(tmp_path / "bundle")
        page.evaluate("""() => {
            window.changes = 0;
            new MutationObserver((changes) => (window.changes += changes.length)).observe(continuation, {childList: true, subtree: true});
        }""")
        for prompt in ("the team said", ""):
            expected = "".join(model_here.stream(prompt, Sampling(max_new_tokens=100)))
            assert continued(page, prompt) == expected
        assert "tokens" in page.inner_text("#time")
        assert page.evaluate("window.changes") > 20

        # Every look at this clock takes long, so the page draws after every token.
        begun, stopped, later, button = page.evaluate("""async () => {
            let now = 0;
            performance.now = () => (now += 100);
            const added = () => document.querySelector("#continuation b").textContent;
            generate.click();
            const begun = generate.textContent;
            while (!added()) await new Promise((drawn) => setTimeout(drawn));
            generate.click();
            const stopped = added();
            await new Promise((drawn) => setTimeout(drawn, 300));
            return [begun, stopped, added(), generate.textContent];
        }""")
        assert (begun, button) == ("Stop", "Continue")
        assert 0 < len(stopped) == len(later) < len(expected) / 2

        model = infer.Generator(tmp_path / "bundle").model
        expected = native_logits(model, model.encode("the team said"))
        np.testing.assert_allclose(page.evaluate(FIRST_LOGITS, ["the team said", False]), expected, atol=1e-3)
        expected = native_logits(model, model.end_tokens)
        np.testing.assert_allclose(page.evaluate(FIRST_LOGITS, ["\u200b", True]), expected, atol=1e-3)


@pytest.mark.slow
def test_quantized_continuations_in_a_browser(browser, language_bundle, language_task, tmp_path, libraries):
    (tmp_path / "quantized").mkdir()
    config = QuantizeConfig(quantization="int4_blocks_int8_embeddings", block_size=16, max_quality_drop=9.0)
    quantize_onnx(str(language_bundle.parent / "onnx"), tmp_path / "quantized", language_task, config)
    with opened(browser, tmp_path / "quantized", tmp_path / "bundle", language_task, libraries) as page:
        model = infer.Generator(tmp_path / "bundle").model
        # Blocks of weights are multiplied by other kernels here than there, and later near ties may fall otherwise.
        expected = native_logits(model, model.encode("the team said"))
        np.testing.assert_allclose(page.evaluate(FIRST_LOGITS, ["the team said", False]), expected, atol=2e-2)
        first = "".join(infer.Generator(tmp_path / "bundle").stream("the team said", Sampling(max_new_tokens=8)))
        assert len(first) > 8
        assert continued(page, "the team said").startswith(first)
