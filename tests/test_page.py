"""The page of a bundle: its JavaScript against Pillow and tokenizers in Node, and all of it in a real headless Chromium."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import make_texts
from pipelines.config import BundleConfig
from pipelines.edge import infer
from pipelines.edge.bundle import build_bundle, image_settings
from pipelines.edge.generate import Sampling
from pipelines.edge.web import HERE, LIBRARIES, RUNTIME_LIBRARY, add_page
from pipelines.errors import InputError

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js on the PATH")
TEXTS = [text for text, _ in make_texts(12, seed=5)]
ODD_TEXTS = ["goal " * 100, "NAÏVE 東京 🙂 server", "[SEP] goal"]


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
    ]
    generator = np.random.default_rng(0)
    given, expected = [], []
    for settings in map(image_settings, processors):
        for width, height in [(33, 21), (21, 34), (6, 6)]:
            image = Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
            rgba = np.asarray(image.convert("RGBA")).ravel().tolist()
            given.append({"image": {"data": rgba, "width": width, "height": height}, "settings": settings})
            expected.append(infer.image_pixels(image, settings))
    script = """
        for (const {image} of given) image.data = Uint8ClampedArray.from(image.data);
        console.log(JSON.stringify(given.map(({image, settings}) => [...model.imagePixels(image, settings).data])));
    """
    for found, pixels in zip(node(script, given), expected, strict=True):
        np.testing.assert_array_equal(np.array(found, np.float32), pixels.ravel())


@needs_node
def test_an_image_with_transparency_is_refused():
    pixels = [[9, 8, 7, 255], [9, 8, 7, 254]]
    script = """
        const settings = {resize: null, crop: null, rescale: null, mean: null};
        console.log(JSON.stringify(given.map((pixel) => {
            try { return [...model.imagePixels({data: pixel, width: 1, height: 1}, settings).data]; } catch (error) { return error.message; }
        })));
    """
    opaque, refused = node(script, pixels)
    assert opaque == [9, 8, 7]
    assert "without transparency" in refused


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
    (tmp_path / "none").mkdir()
    assert add_page(tmp_path / "none", BundleConfig(), (RUNTIME_LIBRARY,)) == {}
    assert not list((tmp_path / "none").iterdir())


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


@contextmanager
def served(bundle: Path) -> Iterator[str]:
    """The bundle behind what `python -m http.server` is made of."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(bundle)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


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


def shown_logits(page: Any, labels: list[str]) -> list[float]:
    page.wait_for_selector("body[data-state=ready]", timeout=120_000)
    rows = page.eval_on_selector_all("tr", "rows => rows.map((row) => [row.cells[0].textContent, row.title])")
    found = {label: float(title.removeprefix("logit ")) for label, title in rows}
    assert next(iter(found)) == max(found, key=lambda label: found[label])
    return [found[label] for label in labels]


@pytest.mark.slow
def test_texts_in_a_browser(browser, text_onnx, task, tmp_path, libraries):
    with opened(browser, text_onnx / "quantized", tmp_path / "bundle", task, libraries) as page:
        classifier = infer.Classifier(tmp_path / "bundle")
        for text in [*TEXTS, *ODD_TEXTS]:
            page.fill("#text", text)
            found = shown_logits(page, classifier.labels)
            np.testing.assert_allclose(found, classifier.logits((text,)), atol=1e-3)


@pytest.mark.slow
def test_images_in_a_browser(browser, image_onnx, image_task, image_folder, tmp_path, libraries):
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate([(33, 90), (200, 151)]):
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{number}.png")
    with opened(browser, image_onnx, tmp_path / "bundle", image_task, libraries) as page:
        classifier = infer.Classifier(tmp_path / "bundle")
        for path in [*sorted(image_folder.rglob("*.png"))[:10], *tmp_path.glob("*.png")]:
            page.evaluate("document.body.dataset.state = 'waiting'")
            page.set_input_files("#image", path)
            found = shown_logits(page, classifier.labels)
            np.testing.assert_allclose(found, classifier.logits((path,)), atol=1e-3)
        page.evaluate("document.body.dataset.state = 'waiting'")
        (tmp_path / "no.png").write_text("no image")
        page.set_input_files("#image", tmp_path / "no.png")
        page.wait_for_selector("body[data-state=failed]")
        assert "no.png" in page.inner_text("#error")

        # Its colours beneath the transparency, which infer.py reads, do not survive a canvas.
        half = generator.integers(0, 256, (20, 20, 4), np.uint8)
        half[..., 3] //= 2
        Image.fromarray(half).save(tmp_path / "half.png")
        page.set_input_files("#image", sorted(image_folder.rglob("*.png"))[0])
        shown_logits(page, classifier.labels)
        page.set_input_files("#image", tmp_path / "half.png")
        page.wait_for_selector("body[data-state=failed]")
        assert "without transparency" in page.inner_text("#error")
        assert page.inner_text("#answers") == ""  # or the last image's would stand beneath this one


@pytest.mark.slow
def test_continuations_in_a_browser(browser, language_bundle, language_task, tmp_path, libraries):
    source = language_bundle.parent / "onnx"
    with opened(browser, source, tmp_path / "bundle", language_task, libraries) as page:
        page.fill("#temperature", "0")
        page.fill("#text", "the team said")
        page.click("#write")
        page.wait_for_selector("body[data-state=ready]", timeout=120_000)
        shown = page.text_content("#continuation")
        expected = "".join(infer.Writer(tmp_path / "bundle").stream("the team said", Sampling(max_new_tokens=100)))
        assert shown == "the team said" + expected
        assert "tokens" in page.inner_text("#time")
