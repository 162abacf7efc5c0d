"""Answer with the model in this directory. Needs numpy, onnxruntime and tokenizers (for texts) or Pillow (for images), nothing else.

    python infer.py "some text"                   the label, its probability and the input, between tabs
    python infer.py --pair "a text" "another"     where the model reads two texts at a time
    python infer.py photo.jpg picture.png         images by their files
    python infer.py --file lines.txt --json       a text, two texts with a tab between them, or an image file on every line
    tail -f log.txt | python infer.py --stdin     every answer as soon as its line is there
    python infer.py "Once upon" --top_p 0.9 --sampling_temperature 0.8     where the model continues texts

Exit status: 0 done, 1 bad input or a damaged bundle, 2 a bad flag.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Before anything that an older Python lacks is used. All of this file parses from Python 3.7 on.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"error: expected Python 3.10 or newer, found {sys.version.split()[0]}. Run infer.py with a newer Python.")

FORMAT = 1
PAGE = ("index.html", "web/")  # only a browser needs these, so a device may do without
MOST_PIXELS = 64_000_000  # of an image, as in training: a small file can unpack into gigabytes

# What is to be answered: a text, two texts, or an image file, its path or an open file.
Example = tuple[Any, ...]


class BundleError(Exception):
    """What was expected, what was found, what to do: one line."""


# ---- The files


def content_checksum(manifest: dict[str, Any]) -> str:
    """The sha256 of a manifest without its own checksum."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a bundle. Raises BundleError unless it and every file that it names, but for the page, are as they were made."""
    path = directory / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        format_found, checksum = manifest["format"], manifest["checksum"]
    except FileNotFoundError as error:
        raise BundleError(f"expected the bundle's {path}, found no such file. Copy the whole bundle.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"expected a bundle's manifest in {path}, found: {error!r}. Copy the bundle again."
        ) from error
    if format_found != FORMAT:
        raise BundleError(
            f"expected a manifest of format {FORMAT} in {path}, found {format_found!r}. Use the infer.py of that bundle."
        )
    if checksum != content_checksum(manifest):
        raise BundleError(f"expected {path} as it was made, found that it was changed. Copy the bundle again.")
    for name in (manifest["model"], *manifest["files"]):
        # A checksum proves only that who wrote the manifest wrote it: its names must not lead to other files, nor may links.
        if not (directory / name).resolve().is_relative_to(directory.resolve()):
            raise BundleError(
                f"expected {path} to name files in {directory}, found {name!r}, which leads out of it. Copy the bundle's own files, from "
                'where you trust it; the Hub\'s cache has links: hf download NAME --include "bundle/*" --local-dir .'
            )
    for name, expected in manifest["files"].items():
        if not name.startswith(PAGE):
            check_file(directory / name, expected)
    return manifest


def check_file(path: Path, expected: dict[str, Any]) -> None:
    """Raise BundleError unless the file has the size and the sha256 that the manifest gives."""
    if not path.is_file():
        raise BundleError(f"expected the bundle's {path}, found no such file. Copy the whole bundle.")
    try:
        whole = path.stat().st_size == expected["bytes"] and file_checksum(path) == expected["sha256"]
    except OSError as error:
        raise BundleError(f"expected to be able to read {path}, found: {error}. Copy the bundle again.") from error
    if not whole:
        raise BundleError(f"expected {path} as it was made, found that it was changed or cut. Copy the bundle again.")


# ---- ONNX Runtime


def open_session(path: Path, minimum: str, threads: int | None, provider: str) -> Any:
    """An ONNX Runtime session on one of its execution providers, such as "CPU" or "CUDA"; raises BundleError where it has none such."""
    import onnxruntime

    found = onnxruntime.__version__
    if version_key(found) < version_key(minimum):
        raise BundleError(
            f"expected onnxruntime {minimum} or newer, which has this model's operators, found {found}. Run pip install "
            "-r requirements.txt."
        )
    suffix = "ExecutionProvider"
    names = {name.removesuffix(suffix).lower(): name for name in onnxruntime.get_available_providers()}
    wanted = names.get(provider.lower().removesuffix(suffix.lower()))
    if wanted is None:
        has = ", ".join(name.removesuffix(suffix) for name in names.values())
        raise BundleError(
            f"expected an execution provider that onnxruntime {found} was built with ({has}), found --provider {provider}. Choose one "
            "of these, or install a build that has it, such as onnxruntime-gpu or onnxruntime-openvino."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.log_severity_level = 3
    # What a provider has no kernel for runs on the CPU.
    providers = list(dict.fromkeys([wanted, names["cpu"]]))
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's own errors have no common class
        raise BundleError(
            f"expected onnxruntime {found} to open {path} with the provider {provider}, found: {one_line(error)}. Try --provider CPU, or "
            "another version of onnxruntime."
        ) from error
    if session.get_providers()[0] != wanted:
        raise BundleError(
            f"expected the execution provider {provider} to start, found that it does not on this machine. Install its driver and "
            "libraries, or use --provider CPU."
        )
    return session


def available_cores() -> int:
    """Cores that this process may use: not those of the machine, which ONNX Runtime would count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(answer: Callable[[Any], Any], examples: Iterable[Any], at_once: int) -> Iterator[Any]:
    """The answer to each example in their order, so many of them worked on at a time.

    One example on each core is faster than each example on all cores, which wait for one another, and needs no padding and no batch,
    whose examples would share the scales of dynamic quantization: so the answers stay the same to the last digit.
    """
    if at_once == 1:
        yield from map(answer, examples)
        return
    with ThreadPoolExecutor(at_once) as pool:

        def begun() -> Iterator[Future[Any]]:
            try:
                for example in examples:
                    yield pool.submit(answer, example)
            except Exception as error:  # to be raised in its place, after the answers before it
                failed: Future[Any] = Future()
                failed.set_exception(error)
                yield failed

        waiting: deque[Future[Any]] = deque()
        for future in begun():
            waiting.append(future)
            if len(waiting) > 4 * at_once:  # an example that takes long must not leave the other cores without work
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def version_key(version: str) -> list[int]:
    """The first three numbers of a version, to compare it by."""
    return [int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:3]]


# ---- Inputs


def text_inputs(directory: Path, manifest: dict[str, Any]) -> Callable[[Example], dict[str, Any]]:
    """A function from a text or two to the inputs of the graph, each int64 (1, tokens)."""
    import numpy as np
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise BundleError(
            f"expected a tokenizer in {path}, found: {one_line(error)}. Run pip install -r requirements.txt."
        ) from error
    # The file also holds what its last user truncated and padded to.
    tokenizer.no_padding()
    side = manifest["text"]["truncation_side"]
    tokenizer.enable_truncation(manifest["max_length"], strategy="longest_first", direction=side)

    def prepare(example: Example) -> dict[str, Any]:
        encoding = tokenizer.encode(*example)
        columns = {
            "input_ids": encoding.ids,
            "attention_mask": encoding.attention_mask,
            "token_type_ids": encoding.type_ids,
        }
        return {name: np.array([columns[name]], np.int64) for name in manifest["inputs"]}

    return prepare


def image_inputs(directory: Path, manifest: dict[str, Any]) -> Callable[[Example], dict[str, Any]]:
    """A function from an image file to the input of the graph, float32 (1, 3, height, width)."""
    settings = manifest["image"]

    def prepare(example: Example) -> dict[str, Any]:
        return {manifest["inputs"][0]: image_pixels(read_image(example[0]), settings)[None]}

    return prepare


def read_image(source: Any) -> Any:
    """The RGB image in a file, turned as its orientation tag asks; 16-bit grey keeps its upper 8 bits."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(source) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS / 1e6:.0f} million")
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                upright = Image.fromarray((np.asarray(upright) // 256).clip(0, 255).astype(np.uint8))
            return upright.convert("RGB")
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise BundleError(f"expected an image file that Pillow reads, found {source!r}: {one_line(error)}.") from error


def image_pixels(image: Any, settings: dict[str, Any]) -> Any:
    """An RGB image as the model sees it, float32 (3, height, width): resized, cropped, rescaled and normalized as in training."""
    import numpy as np

    if settings["resize"] is not None:
        image = image.resize(resized(image.size, settings["resize"]), resample=settings["resample"])
    pixels = np.asarray(image)
    if settings["crop"] is not None:
        pixels = center_crop(pixels, settings["crop"]["height"], settings["crop"]["width"])
    if settings["rescale"] is not None:
        pixels = (pixels.astype(np.float64) * settings["rescale"]).astype(np.float32)
    pixels = pixels.astype(np.float32)
    if settings["mean"] is not None:
        pixels = (pixels - np.array(settings["mean"], np.float32)) / np.array(settings["std"], np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def resized(size: tuple[int, int], resize: dict[str, int]) -> tuple[int, int]:
    """Width and height after resizing: the ones given, or those that keep the proportions and have the given shortest edge."""
    if "shortest_edge" not in resize:
        return resize["width"], resize["height"]
    (width, height), short = size, resize["shortest_edge"]
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)


def center_crop(pixels: Any, height: int, width: int) -> Any:
    """The middle (height, width) of pixels (rows, columns, 3), with black around it where they are fewer."""
    import numpy as np

    rows, columns = pixels.shape[:2]
    # A border that an odd difference leaves uneven is wider above and on the left.
    above, left = -(-max(height - rows, 0) // 2), -(-max(width - columns, 0) // 2)
    canvas = np.zeros((max(height, rows), max(width, columns), 3), pixels.dtype)
    canvas[above : above + rows, left : left + columns] = pixels
    top, first = (rows - height) // 2 + above, (columns - width) // 2 + left
    return canvas[top : top + height, first : first + width]


PREPARATIONS = {"text-classification": text_inputs, "image-classification": image_inputs}


# ---- Answers


class Classifier:
    """The classification model of a bundle, ready to answer."""

    def __init__(
        self, directory: str | Path, manifest: dict[str, Any] | None = None, threads: int | None = None, provider: str = "CPU"
    ) -> None:  # fmt: skip
        directory = Path(directory)
        self.manifest = read_manifest(directory) if manifest is None else manifest
        self.labels: list[str] = self.manifest["labels"]
        self.prepare = PREPARATIONS[self.manifest["task"]](directory, self.manifest)
        self.session = open_session(
            directory / self.manifest["model"], self.manifest["minimum_onnxruntime"], threads, provider
        )

    def logits(self, example: Example) -> Any:
        """The logits (labels,) of one example: always one at a time, since dynamic quantization takes one scale for a whole batch."""
        return self.session.run(["logits"], self.prepare(example))[0][0]

    def answer(self, example: Example) -> dict[str, Any]:
        """The likeliest label, and the probability and the logit of each."""
        import numpy as np

        logits = self.logits(example)
        weights = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = weights / weights.sum()
        best = int(logits.argmax())
        return {
            "input": example[0] if len(example) == 1 else list(example),
            "label": self.labels[best],
            "probability": float(probabilities[best]),
            "probabilities": dict(zip(self.labels, probabilities.tolist(), strict=True)),
            "logits": logits.tolist(),
        }


class Writer:
    """The language model of a bundle, ready to continue texts."""

    def __init__(
        self, directory: str | Path, manifest: dict[str, Any] | None = None, threads: int | None = None, provider: str = "CPU"
    ) -> None:  # fmt: skip
        directory = Path(directory)
        self.manifest = read_manifest(directory) if manifest is None else manifest
        self.session = open_session(
            directory / self.manifest["model"], self.manifest["minimum_onnxruntime"], threads, provider
        )
        self.model = generation().LanguageModel(directory, session=self.session)

    def stream(self, prompt: str, sampling: Any = None) -> Iterator[str]:
        """The continuation of a text in pieces, each as soon as it is there; `sampling` is generate.py's."""
        try:
            yield from self.model.stream(prompt, sampling)
        except ValueError as error:  # a prompt that leaves the model no room
            raise BundleError(str(error)) from error


def generation() -> Any:
    """generate.py, which is beside this file in a bundle, and in the same package where this file is part of one."""
    if __package__:
        from pipelines.runtime import generate
    else:
        sys.dont_write_bytecode = True  # the bundle stays as it was made
        import generate  # type: ignore[no-redef]
    return generate


def write_continuation(writer: Writer, prompt: str, sampling: Any, as_json: bool) -> None:
    if as_json:
        continuation = "".join(writer.stream(prompt, sampling))
        print(json.dumps({"input": prompt, "continuation": continuation}, ensure_ascii=False), flush=True)
        return
    pieces = writer.stream(prompt, sampling)
    first = next(pieces, "")  # a prompt that is too long is refused before it is written
    print(prompt, first, sep="", end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def write_answer(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        line = json.dumps(answer, ensure_ascii=False)
    else:
        given = answer["input"] if isinstance(answer["input"], str) else "\t".join(answer["input"])
        line = f"{answer['label']}\t{answer['probability']:.4f}\t{given}"
    print(line, flush=True)


def read_lines(lines: Any, columns: int, origin: str) -> Iterator[Example]:
    """The example on each line; raises BundleError for a line without the tab between two texts."""
    for number, line in enumerate(lines, start=1):
        text = line.removesuffix("\n").removesuffix("\r")
        example = tuple(text.split("\t")) if columns > 1 else (text,)
        if len(example) != columns:
            raise BundleError(
                f"expected two texts with a tab between them on line {number} of {origin}, found {len(example)}. Correct that line."
            )
        yield example


def benchmark(classifier: Classifier, examples: list[Example], started: float) -> dict[str, Any]:
    """Milliseconds until ready, and of one answer over two seconds: all of it, and the share of preparing the input."""
    import numpy as np

    ready = time.perf_counter() - started
    for example in examples[:5]:
        classifier.logits(example)  # the first runs allocate
    seconds: list[float] = []
    preparing: list[float] = []
    end = time.perf_counter() + 2
    while time.perf_counter() < end or len(seconds) < 5:
        example = examples[len(seconds) % len(examples)]
        start = time.perf_counter()
        inputs = classifier.prepare(example)
        prepared = time.perf_counter()
        classifier.session.run(["logits"], inputs)
        seconds.append(time.perf_counter() - start)
        preparing.append(prepared - start)
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    return {
        "ready_ms": round(ready * 1000, 1),
        "p50_ms": round(p50, 3),
        "p95_ms": round(p95, 3),
        "preparing_p50_ms": round(float(np.median(preparing)) * 1000, 3),
        "answers_per_second": round(len(seconds) / sum(seconds), 1),
        **setting(classifier.session),
    }


def benchmark_writer(writer: Writer, prompt: str, sampling: Any, started: float) -> dict[str, Any]:
    """Milliseconds until ready and until the first token after a prompt, and the tokens per second from there on: medians of five."""
    import numpy as np

    ready = time.perf_counter() - started
    tokens = [writer.model.encode(prompt)]
    first, rates = [], []
    try:
        for _ in range(5):
            start = time.perf_counter()
            times = [time.perf_counter() - start for _ in writer.model.steps(tokens, sampling)]
            first += times[:1]
            rates += [(len(times) - 1) / (times[-1] - times[0])] if len(times) > 1 else []
    except ValueError as error:
        raise BundleError(str(error)) from error
    return {
        "ready_ms": round(ready * 1000, 1),
        "first_token_ms": round(float(np.median(first)) * 1000, 3) if first else None,
        "tokens_per_second": round(float(np.median(rates)), 1) if rates else None,
        **setting(writer.session),
    }


def setting(session: Any) -> dict[str, Any]:
    """What a time depends on besides the model."""
    import onnxruntime

    return {
        "threads": session.get_session_options().intra_op_num_threads,
        "provider": session.get_providers()[0],
        "onnxruntime": onnxruntime.__version__,
    }


def sample(manifest: dict[str, Any]) -> Example:
    """An example to time where none was given: as long a text as the model reads, or a photograph's worth of noise."""
    if manifest["task"] == "text-classification":
        return (("a " * manifest["max_length"]),) * (2 if manifest["text"]["pair"] else 1)
    import io

    from PIL import Image

    picture = io.BytesIO()
    Image.effect_noise((640, 480), 64).save(picture, "PNG")
    return (picture,)


# ---- The command


SAMPLING: dict[str, tuple[type, str]] = {
    "max_new_tokens": (int, "the most tokens to add (64)"),
    "sampling_temperature": (float, "draw tokens, the likeliest less often the higher this is; 0 draws none"),
    "top_k": (int, "draw from this many of the likeliest tokens"),
    "top_p": (float, "draw from the likeliest tokens that have this probability together"),
    "repetition_penalty": (float, "divide the logits of tokens that were there by this"),
    "stop_tokens": (int, "token ids to end at, besides the model's own"),
    "seed": (int, "seed of the draws"),
}


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("inputs", nargs="*", help="texts, or image files")
    parser.add_argument("--pair", action="store_true", help="the inputs are pairs of texts")
    parser.add_argument("--file", help="read the inputs from the lines of this file")
    parser.add_argument("--stdin", action="store_true", help="read the inputs from standard input, line by line")
    parser.add_argument("--json", action="store_true", help="write each answer as a line of JSON, with all logits")
    parser.add_argument("--threads", type=int, help="threads of the computation; left out: every core of this process")
    parser.add_argument("--provider", default="CPU", help="ONNX Runtime's execution provider: CPU, CUDA, CoreML, …")
    parser.add_argument("--benchmark", action="store_true", help="time the model, on the inputs or on one of its own")
    writing = parser.add_argument_group(
        "for a model that continues texts; left as they are, it takes the likeliest token"
    )
    for name, (kind, what) in SAMPLING.items():
        writing.add_argument(f"--{name}", type=kind, nargs="+" if name == "stop_tokens" else None, help=what)
    return parser, parser.parse_args(argv)


def check_flags(parser: argparse.ArgumentParser, flags: argparse.Namespace, manifest: dict[str, Any]) -> int:
    """The number of texts or images that make an example; a wrong combination of flags ends the program with status 2."""
    pair = "text" in manifest and manifest["text"]["pair"]
    given = bool(flags.inputs) + (flags.file is not None) + flags.stdin
    if given > 1 or (given == 0 and not flags.benchmark):
        parser.error(f"expected one of inputs, --file or --stdin, found {given or 'none'} of them")
    if flags.benchmark and flags.stdin:
        parser.error("expected inputs or --file with --benchmark, found --stdin")
    if flags.pair != pair and given:
        found = "pairs of texts: pass --pair" if pair else f"single {'images' if 'image' in manifest else 'texts'}"
        parser.error(f"expected what the model was trained on, {found}")
    if pair and len(flags.inputs) % 2:
        parser.error(f"expected two texts for each answer, found {len(flags.inputs)}")
    if flags.threads is not None and flags.threads < 1:
        parser.error(f"expected --threads of 1 or more, found {flags.threads}")
    if manifest["task"] != "text-generation":
        sampling = [f"--{name}" for name in SAMPLING if getattr(flags, name) is not None]
        if sampling:
            parser.error(f"expected no {', '.join(sampling)}, which are for a model that continues texts")
    if "text" in manifest and any("\udc80" <= character <= "\udcff" for text in flags.inputs for character in text):
        raise BundleError(
            "expected UTF-8 texts, found bytes that are not. Pass them with --file after converting the file."
        )
    return 2 if pair else 1


def read_sampling(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> Any:
    given = {name: getattr(flags, name) for name in SAMPLING if getattr(flags, name) is not None}
    try:
        return generation().Sampling(**given)
    except ValueError as error:
        return parser.error(str(error))


def read_examples(flags: argparse.Namespace, columns: int) -> Iterator[Example]:
    if flags.inputs:
        yield from zip(*[iter(flags.inputs)] * columns, strict=True)
    elif flags.file is not None:
        try:
            # A carriage return inside a line is part of the text.
            with open(flags.file, encoding="utf-8-sig", newline="\n") as file:
                yield from read_lines(file, columns, flags.file)
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"expected a UTF-8 text file, found {flags.file!r}: {error}.") from error
    elif flags.stdin:
        if sys.stdin is None:
            raise BundleError("expected lines on standard input, found it closed. Pipe them in, or use --file.")
        sys.stdin.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
        try:
            yield from read_lines(sys.stdin, columns, "standard input")
        except UnicodeDecodeError as error:
            raise BundleError(f"expected UTF-8 text on standard input, found: {error}.") from error


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser, flags = parse(argv)
    directory = Path(__file__).absolute().parent
    manifest = read_manifest(directory)
    columns = check_flags(parser, flags, manifest)
    if sys.stdout is None:
        raise BundleError("expected an open standard output, found it closed. Send the answers to a file: > FILE")
    # Pillow's, of an image so large that it is refused here.
    warnings.simplefilter("ignore")
    # A file's name need not be UTF-8; it is written as it was given.
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    if manifest["task"] == "text-generation":
        sampling = read_sampling(parser, flags)
        writer = Writer(directory, manifest, flags.threads, flags.provider)
        if flags.benchmark:
            (prompt,) = next(read_examples(flags, columns), ("",))
            write_measured(benchmark_writer(writer, prompt, sampling, started), flags.json)
            return
        for (prompt,) in read_examples(flags, columns):
            write_continuation(writer, prompt, sampling, flags.json)
        return
    # A file is answered one example on each core; other providers than the CPU have no cores to share out.
    in_file = flags.file is not None and flags.provider.lower().startswith("cpu") and not flags.benchmark
    at_once = flags.threads or available_cores() if in_file else 1
    classifier = Classifier(directory, manifest, 1 if in_file else flags.threads, flags.provider)
    if flags.benchmark:
        examples = list(read_examples(flags, columns)) or [sample(manifest)]
        write_measured(benchmark(classifier, examples, started), flags.json)
        return
    for answer in in_order(classifier.answer, read_examples(flags, columns), at_once):
        write_answer(answer, flags.json)


def write_measured(measured: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(measured) if as_json else "\n".join(f"{name}\t{value}" for name, value in measured.items()))


if __name__ == "__main__":
    try:
        main()
    except BundleError as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(
            f"error: expected the packages in requirements.txt, found: {error}. Run pip install -r requirements.txt."
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read the answers has enough
    except KeyboardInterrupt:
        sys.exit(130)
