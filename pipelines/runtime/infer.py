"""Predict with the model in this directory. Needs numpy, onnxruntime and tokenizers (for texts) or Pillow (for images), nothing else.

    python infer.py "some text"                   the label, its probability and the input, between tabs
    python infer.py --pair "a text" "another"     where the model reads two texts at a time
    python infer.py --query "what?" --file lines.txt     the lines by how well they answer, where the model scores pairs of texts
    python infer.py "Ann Lee called." --redact    the text with [LABEL] in place of every span, where the model finds spans
    python infer.py photo.jpg picture.png         images by their files
    python infer.py --file lines.txt --json       a text, two texts with a tab between them, or an image file on every line
    tail -f log.txt | python infer.py --stdin     every prediction as soon as its line is there
    python infer.py --pair "a question" "a text"  where it finds answers: the answer, its probability, its characters, and the question
    python infer.py --profile untrained > pi.json  the times of this device, for 'pocketformers fit --on pi.json'
    python infer.py "Once upon" --top_p 0.9 --sampling_temperature 0.8     where the model continues texts
    python infer.py --file lines.txt --output vectors.npy     where it makes vectors of texts: an array (lines, size)

What the inputs are and how the outputs are read stands in manifest.json. Exit status: 0 done, 1 bad input or a damaged bundle, 2 a bad flag.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import os
import platform
import re
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

FORMAT = 2
PAGE = ("index.html", "web/")  # only a browser needs these, so a device may do without

# An input of the model: a text, two texts, or an image: the path of its file, an open file, or an image of Pillow.
Example = tuple[Any, ...]


class BundleError(ValueError):
    """What was expected, what was found, what to do: one line. The files beside this one, which stand alone, raise ValueError."""


# ---- The files


def content_checksum(manifest: dict[str, Any]) -> str:
    """The sha256 of a manifest without its own checksum."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a bundle. Raises BundleError unless it and every file that it names, but for the page, are as they were built."""
    path = directory / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        found, checksum = manifest["format"], manifest["checksum"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"expected a bundle's manifest in {path}, found: {error!r}. Copy the whole bundle."
        ) from error
    if found != FORMAT:
        raise BundleError(
            f"expected a manifest of format {FORMAT} in {path}, found {found!r}. Use the infer.py of that bundle."
        )
    if checksum != content_checksum(manifest):
        raise BundleError(f"expected {path} as it was built, found that it was changed. Copy the bundle again.")
    for name in (manifest["model"], *manifest["files"]):
        # Whoever wrote the manifest wrote its checksum, too: its names must not lead to other files.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BundleError(
                f"expected {path} to name files in {directory}, found {name!r}, which leads out of it. Do not use this bundle."
            )
    for name, expected in manifest["files"].items():
        if not name.startswith(PAGE):
            check_file(directory / name, expected)
    return manifest


def check_file(path: Path, expected: dict[str, Any]) -> None:
    """Raise BundleError unless the file has the size and the sha256 that the manifest gives."""
    try:
        whole = path.stat().st_size == expected["bytes"] and file_checksum(path) == expected["sha256"]
    except OSError as error:
        raise BundleError(f"expected the bundle's {path}, found: {error}. Copy the whole bundle.") from error
    if not whole:
        raise BundleError(f"expected {path} as it was built, found that it was changed or cut. Copy the bundle again.")


# ---- ONNX Runtime


def open_session(path: Path, threads: int | None = None, minimum: str = "0", provider: str = "CPU") -> Any:
    """An ONNX Runtime session of a graph that needs the version `minimum`; by default on the cores that this process may use."""
    import onnxruntime

    found = onnxruntime.__version__
    if version_key(found) < version_key(minimum):
        raise BundleError(
            f"expected onnxruntime {minimum} or newer, which has this model's operators, found {found}. Run pip install "
            "-r requirements.txt."
        )
    known = {name.removesuffix("ExecutionProvider").lower(): name for name in onnxruntime.get_available_providers()}
    wanted = known.get(provider.lower())
    if wanted is None:
        raise BundleError(
            f"expected an execution provider that onnxruntime {found} was built with ({', '.join(known)}), found --provider {provider}. "
            "Choose one of these, or install a build that has it, such as onnxruntime-gpu."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    # Fused graphs name operators that the optimizer then finds nothing to do for; only errors are worth a line.
    options.log_severity_level = 3
    try:
        # What a provider has no kernel for runs on the CPU.
        session = onnxruntime.InferenceSession(
            str(path), options, providers=list(dict.fromkeys([wanted, known["cpu"]]))
        )
    except Exception as error:  # ONNX Runtime's own errors have no common class
        raise BundleError(
            f"expected onnxruntime {found} to open {path} ({path.stat().st_size if path.is_file() else 0:,} bytes), found: {one_line(error)}. "
            "Copy the file again, with git after 'git lfs pull', or try another version of onnxruntime."
        ) from error
    if session.get_providers()[0] != wanted:
        raise BundleError(
            f"expected the execution provider {provider} to start, found that it does not on this machine. Install its driver and "
            "libraries, or use --provider CPU."
        )
    return session


def available_cores(root: str = "/") -> int:
    """Cores that this process may use: not those of the machine, which ONNX Runtime would count, and no more than its container's quota.

    A quota of 1.5 cores is one thread: of two that wait for each other, both would stand still for a part of each period.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    groups = Path(root, "proc/self/cgroup")
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else ():
        controllers, name = line.split(":", 2)[1:]
        if "cpu" not in (controllers or "cpu").split(","):  # cgroups of version 2 name no controllers
            continue
        # The quotas of all groups around this one hold, too. In a container the name may be the host's: then only the last is found.
        inner = Path(root, "sys/fs/cgroup", "cpu" if controllers else "", name.lstrip("/"))
        for folder in (inner, *inner.parents):
            for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
                try:
                    quota, period = (int(word) for file in files for word in (folder / file).read_text().split())
                except (OSError, ValueError):  # there is no such file, or no limit: "max"
                    continue
                if quota > 0:
                    cores = min(cores, max(1, quota // period))
    return cores


def in_order(predict: Callable[[Any], Any], examples: Iterable[Any], at_once: int) -> Iterator[Any]:
    """The prediction for each example in their order, so many of them worked on at a time.

    One example on each core is faster than each example on all cores, which wait for one another, and needs no padding and no batch,
    whose examples would share the scales of dynamic quantization: so the predictions stay the same to the last digit.
    """
    if at_once == 1:
        yield from map(predict, examples)
        return
    left, waiting, failed = iter(examples), deque[Future[Any]](), None
    with ThreadPoolExecutor(at_once) as pool:
        while failed is None:
            try:
                waiting.append(pool.submit(predict, next(left)))
            except (
                Exception
            ) as error:  # none is left, or one cannot be read: raised in its place, after those before it
                failed = error
            if failed or len(waiting) > 4 * at_once:  # one that takes long must not leave the other cores without work
                yield from (waiting.popleft().result() for _ in range(len(waiting) if failed else 1))
    if not isinstance(failed, StopIteration):
        raise failed


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def version_key(version: str) -> list[int]:
    """The first three numbers of a version, to compare it by."""
    return [int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:3]]


# ---- Inputs


def text_inputs(path: Path, settings: dict[str, Any], names: list[str]) -> Callable[[Example], dict[str, Any]]:
    """A function from a text or two to the inputs of the graph by their `names`, each int64 (1, tokens); `path` is a tokenizer.json."""
    tokenizer = open_tokenizer(path)
    tokenizer.enable_truncation(settings["max_length"], strategy="longest_first", direction=settings["truncation_side"])
    return lambda example: token_inputs(tokenizer.encode(*example), names)


def token_inputs(encoding: Any, names: list[str]) -> dict[str, Any]:
    """An Encoding of tokenizers as the inputs of the graph by their `names`, each int64 (1, tokens)."""
    import numpy as np

    columns = {
        "input_ids": encoding.ids,
        "attention_mask": encoding.attention_mask,
        "token_type_ids": encoding.type_ids,
    }
    return {name: np.array([columns[name]], np.int64) for name in names}


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of a tokenizer.json, which pads nothing."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise BundleError(
            f"expected a tokenizer in {path}, found: {one_line(error)}. Run pip install -r requirements.txt."
        ) from error
    tokenizer.no_padding()  # the file also holds what its last user truncated and padded to
    return tokenizer


def image_inputs(settings: dict[str, Any], names: list[str]) -> Callable[[Example], dict[str, Any]]:
    """A function from an image to the input of the graph, float32 (1, channels, height, width)."""
    images = module_beside("images")
    return lambda example: {
        names[0]: images.image_pixels(images.read_image(example[0], settings.get("value_range")), settings)[None]
    }


def module_beside(name: str) -> Any:
    """A module that is beside this file in a bundle, such as generate.py, and in the same package where this file is part of one."""
    sys.dont_write_bytecode |= not __package__  # a bundle stays as it was built
    return importlib.import_module(f"{__package__}.{name}" if __package__ else name)


# ---- Outputs


def open_model(directory: str | Path, manifest: dict[str, Any] | None, **how: Any) -> tuple[dict[str, Any], Any]:
    """The manifest of a bundle, read and its files checked where it is not given, and the session of its graph."""
    manifest = manifest or read_manifest(Path(directory))
    path, minimum = Path(directory) / manifest["model"], manifest["minimum_onnxruntime"]
    return manifest, open_session(path, minimum=minimum, **how)


class Predictor:
    """The model of a bundle that gives labels, values or a vector, ready to predict.

    A `manifest` is taken as it is; left out, the bundle's is read and its files are checked. `threads` and `provider` are as in
    open_session().
    """

    def __init__(self, directory: str | Path, manifest: dict[str, Any] | None = None, **how: Any) -> None:
        self.manifest, self.session = open_model(directory, manifest, **how)
        names = [value.name for value in self.session.get_inputs()]
        settings, output = self.manifest["inputs"], self.manifest["outputs"].get("output")
        self.read = None if output is None else [output]  # of several outputs
        if settings["kind"] == "image":
            self.prepare = image_inputs(settings, names)
        else:
            self.prepare = text_inputs(Path(directory) / "tokenizer.json", settings, names)

    def logits(self, example: Example) -> Any:
        """The outputs (labels,) for one example: always one at a time, since dynamic quantization takes one scale for a whole batch."""
        return self.session.run(self.read, self.prepare(example))[0].reshape(-1)

    def predict(self, example: Example) -> dict[str, Any]:
        given = example[0] if len(example) == 1 else list(example)
        return {"input": given, **read_outputs(self.logits(example), self.manifest["outputs"])}


def read_outputs(logits: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What a model's outputs say: the vector of a text; values by their names; the likeliest label; or, with a sigmoid, every label above its threshold.

    The activation "none" is for a graph whose outputs are probabilities already.
    """
    import numpy as np

    if settings["kind"] == "vector":
        return {"vector": logits.tolist()}
    if settings["kind"] == "values":
        return {"values": dict(zip(settings["names"], logits.tolist(), strict=True))}
    labels, activation = settings["labels"], settings["activation"]
    exact = logits.astype(np.float64)
    if activation == "softmax":
        weights = np.exp(exact - exact.max())
        probabilities = (weights / weights.sum()).tolist()
    else:
        probabilities = (np.exp(-np.logaddexp(0, -exact)) if activation == "sigmoid" else exact).tolist()
    by_label = dict(zip(labels, probabilities, strict=True))
    every = {"probabilities": by_label, "logits": logits.tolist()}
    if activation == "sigmoid":
        thresholds = settings.get("thresholds") or [0.5] * len(labels)
        found = [label for label, least in zip(labels, thresholds, strict=True) if by_label[label] >= least]
        return {"labels": found, **every}
    best = int(logits.argmax())
    return {"label": labels[best], "probability": probabilities[best], **every}


def ranked(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The predictions for pairs of one query, the highest value first; the input is the second text alone."""
    passages = ({**one, "input": one["input"][1]} for one in found)
    return sorted(passages, key=lambda one: -next(iter(one["values"].values())))


class Generator:
    """The language model of a bundle, ready to continue texts; its arguments are Predictor's."""

    def __init__(self, directory: str | Path, manifest: dict[str, Any] | None = None, **how: Any) -> None:
        self.manifest, self.session = open_model(directory, manifest, **how)
        self.model = module_beside("generate").LanguageModel(Path(directory), self.session)

    def stream(self, prompt: str, sampling: Any = None) -> Iterator[str]:
        """The continuation of a text in pieces, each as soon as it is there; `sampling` is generate.py's."""
        yield from self.model.stream(prompt, sampling)

    def predict(self, example: Example, sampling: Any = None) -> dict[str, Any]:
        return {"input": example[0], "continuation": "".join(self.stream(example[0], sampling))}


class Answerer:
    """The model of a bundle that answers a question with a part of a text; its arguments are Predictor's."""

    def __init__(self, directory: str | Path, manifest: dict[str, Any] | None = None, **how: Any) -> None:
        self.manifest, self.session = open_model(directory, manifest, **how)
        tokenizer = open_tokenizer(Path(directory) / "tokenizer.json")
        feed = partial(token_inputs, names=[value.name for value in self.session.get_inputs()])
        settings = self.manifest["inputs"], self.manifest["outputs"]
        self.model = module_beside("answers").AnswerModel(tokenizer, feed, self.session, *settings)

    def logits(self, example: Example) -> Any:
        return [self.model.logits(window) for window in self.model.windows(*example)]

    def predict(self, example: Example) -> dict[str, Any]:
        return {"input": list(example), **self.model.answer(*example)}


class SpanFinder:
    """The model of a bundle that finds spans in texts of any length; its arguments are Predictor's."""

    def __init__(self, directory: str | Path, manifest: dict[str, Any] | None = None, **how: Any) -> None:
        self.manifest, self.session = open_model(directory, manifest, **how)
        module, tokenizer = module_beside("spans"), open_tokenizer(Path(directory) / "tokenizer.json")
        feed = partial(token_inputs, names=[value.name for value in self.session.get_inputs()])
        windows = module.Windows(tokenizer, feed, self.manifest["inputs"]["max_length"])
        labels = self.manifest["outputs"]["labels"]
        self.model = module.SpanModel(windows, labels, lambda feed: self.session.run(None, feed)[0])

    def logits(self, example: Example) -> Any:
        """The outputs (tokens, labels)."""
        return self.model.tokens(example[0])[1]

    def predict(self, example: Example) -> dict[str, Any]:
        return {"input": example[0], "spans": self.model.spans(example[0])}


# What runs a bundle by the kind of its outputs; else Predictor does.
MODELS: dict[str, Any] = {"continuation": Generator, "answer": Answerer, "spans": SpanFinder}


# ---- The command


def make_parser(beside: list[str]) -> argparse.ArgumentParser:
    """The flags of a bundle that has the modules `beside` infer.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("inputs", nargs="*", help="texts, or image files")
    parser.add_argument("--pair", action="store_true", help="the inputs are pairs of texts")
    parser.add_argument("--query", help="rank the inputs for this query, the best first")
    parser.add_argument("--file", help="read the inputs from the lines of this file")
    parser.add_argument("--stdin", action="store_true", help="read the inputs from standard input, line by line")
    parser.add_argument("--json", action="store_true", help="write each prediction as a line of JSON, with all logits")
    parser.add_argument("--threads", type=int, help="threads of the computation; left out: every core of this process")
    parser.add_argument("--provider", default="CPU", help="ONNX Runtime's execution provider: CPU, CUDA, CoreML, …")
    parser.add_argument("--benchmark", action="store_true", help="time the model, on the inputs or on one of its own")
    parser.add_argument("--profile", metavar="FOLDER", help="time the graphs that 'pocketformers fit --forecast' wrote")
    if "spans" in beside:
        parser.add_argument("--redact", action="store_true", help="write each text with [LABEL] in place of every span")
    if "vectors" in beside:
        parser.add_argument("--output", help="write the vectors of all inputs as one array to this .npy file")
        kinds = module_beside("vectors").KINDS
        words = "numbers of --output; binary: 8 to a byte, 1 where a number is above 0"
        parser.add_argument("--vector_type", default=kinds[0], choices=kinds, help=words)
    if "generate" in beside:
        for field in fields(module_beside("generate").Sampling):
            kind = float if field.type == "float" else int
            several = "+" if field.default == () else None
            words = field.metadata["help"]
            parser.add_argument(f"--{field.name}", type=kind, nargs=several, default=field.default, help=words)
    return parser


def make_sampling(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> Any:
    """generate.py's Sampling of the flags; ends the program with status 2 for a value that it cannot have."""
    kind = module_beside("generate").Sampling
    try:
        return kind(**{field.name: getattr(flags, field.name) for field in fields(kind)})
    except ValueError as error:
        parser.error(str(error))


def check_flags(parser: argparse.ArgumentParser, flags: argparse.Namespace, manifest: dict[str, Any]) -> None:
    """End the program with status 2 for flags that do not fit together or the model."""
    inputs, pair = manifest["inputs"]["kind"], manifest["inputs"].get("pair", False)
    given = bool(flags.inputs) + (flags.file is not None) + flags.stdin
    if given > 1 or (given == 0 and not flags.benchmark):
        parser.error(f"expected one of inputs, --file or --stdin, found {given or 'none'} of them")
    if flags.benchmark and flags.stdin:
        parser.error("expected inputs or --file with --benchmark, found --stdin")
    ranks = pair and manifest["outputs"]["kind"] == "values"
    if flags.query is not None and (flags.pair or not ranks):
        parser.error("expected --query with a model that scores pairs of texts, and without --pair, found the contrary")
    if flags.pair != pair and given and flags.query is None:
        parser.error(f"expected {'pairs of texts: pass --pair' if pair else f'single {inputs}s, without --pair'}")
    if pair and flags.query is None and len(flags.inputs) % 2:
        parser.error(f"expected two texts for each prediction, found {len(flags.inputs)} texts")
    if flags.threads is not None and flags.threads < 1:
        parser.error(f"expected --threads of 1 or more, found {flags.threads}")


def read_examples(flags: argparse.Namespace, columns: int, texts: bool = True) -> Iterator[Example]:
    """The examples of the command line, a file or standard input, each of one or two `columns`; raises BundleError for what is none."""
    origin = flags.file or ("standard input" if flags.stdin else "the command line")
    try:
        if flags.file is not None:
            # A carriage return inside a line is part of the text.
            with open(flags.file, encoding="utf-8-sig", newline="\n") as file:
                yield from read_lines(file, columns, origin)
        elif flags.stdin:
            if sys.stdin is None:
                raise OSError("it is closed")
            sys.stdin.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
            yield from read_lines(sys.stdin, columns, origin)
        elif texts:
            "".join(flags.inputs).encode()  # raises for bytes that are no UTF-8, which an image file's name may have
        yield from zip(*[iter(flags.inputs)] * columns, strict=True)
    except (OSError, UnicodeError) as error:
        raise BundleError(
            f"expected to read UTF-8 text from {origin}, found: {error}. Check the path, or convert the text to UTF-8."
        ) from error


def read_lines(lines: Iterable[str], columns: int, origin: str) -> Iterator[Example]:
    for number, line in enumerate(lines, start=1):
        text = line.removesuffix("\n").removesuffix("\r")
        example = tuple(text.split("\t")) if columns > 1 else (text,)
        if len(example) != columns:
            raise BundleError(
                f"expected two texts with a tab between them on line {number} of {origin}, found {len(example)}. Correct that line."
            )
        yield example


def write_predictions(model: Any, examples: Iterable[Example], flags: argparse.Namespace, at_once: int) -> None:
    """Predict so many examples at a time, and write them as the flags say."""
    if getattr(flags, "output", None) is not None:
        write_vectors(list(in_order(model.logits, examples, at_once)), flags.output, flags.vector_type)
        return
    predictions = in_order(model.predict, examples, at_once)
    for found in predictions if flags.query is None else ranked(predictions):
        if getattr(flags, "redact", False):
            print(module_beside("spans").redact(found["input"], found["spans"]), flush=True)
        else:
            write_prediction(found, flags.json)


def write_prediction(found: dict[str, Any], as_json: bool) -> None:
    given = found["input"] if isinstance(found["input"], str) else "\t".join(found["input"])
    if as_json:
        line = json.dumps(found, ensure_ascii=False)
    elif "vector" in found:
        line = "\t".join([" ".join(f"{value:.6g}" for value in found["vector"]), given])
    elif "spans" in found:
        spans = (f"{one['label']} {one['start']}-{one['end']} {one['text']}" for one in found["spans"])
        line = f"{'; '.join(spans)}\t{given}"
    elif "answers" in found:
        place = f"{found['start']}-{found['end']}"
        line = "\t".join(
            [" ".join(found["answer"].split()), f"{found['score']:.4f}", place, " ".join(found["input"][0].split())]
        )
    elif "values" in found:
        line = "\t".join([*(f"{value:.6g}" for value in found["values"].values()), given])
    elif "labels" in found:
        likely = (f"{found['probabilities'][label]:.4f}" for label in found["labels"])
        line = f"{', '.join(found['labels'])}\t{', '.join(likely)}\t{given}"
    else:
        line = f"{found['label']}\t{found['probability']:.4f}\t{given}"
    print(line, flush=True)


def write_vectors(found: list[Any], path: str, kind: str) -> None:
    """One array (inputs, size) as a .npy file."""
    import numpy as np

    if not found:
        raise BundleError("expected texts to make vectors of, found none. Give at least one.")
    try:
        np.save(path, module_beside("vectors").convert(np.array(found), kind))
    except OSError as error:
        raise BundleError(f"expected to write {path}, found: {error}. Give another --output.") from error


def write_continuation(generator: Generator, prompt: str, sampling: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(generator.predict((prompt,), sampling), ensure_ascii=False), flush=True)
        return
    pieces = generator.stream(prompt, sampling)
    # A prompt that is too long is refused before it is written.
    for piece in chain([prompt + next(pieces, "")], pieces, ["\n"]):
        print(piece, end="", flush=True)


def write_times(times: dict[str, Any], session: Any, as_json: bool) -> None:
    threads, provider = session.get_session_options().intra_op_num_threads, session.get_providers()[0]
    measured = {**times, "threads": threads, "provider": provider}
    print(json.dumps(measured) if as_json else "\n".join(f"{name}\t{value}" for name, value in measured.items()))


def benchmark(predictor: Predictor, examples: list[Example]) -> dict[str, Any]:
    """Milliseconds of one prediction, from the input to the logits, over two seconds."""
    import numpy as np

    def call(number: int) -> None:
        predictor.logits(examples[number % len(examples)])

    time_calls(call, 0, 5)  # these allocate
    seconds = time_calls(call, 2, 5)
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    rate = len(seconds) / sum(seconds)
    return {"p50_ms": round(p50, 3), "p95_ms": round(p95, 3), "predictions_per_second": round(rate, 1)}


def cpu_info(entry: str = "model name|Hardware|Model") -> str:
    """An entry of Linux's description of the first core, its name if no other is asked for; empty where there is none."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(errors="replace") if information.exists() else ""
    found = re.search(rf"^(?:{entry})\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def profile(folder: Path, threads: int | None) -> dict[str, Any]:
    """The median milliseconds of a call (of a language model: of a token) of each graph in a folder of untrained ones, on this device.

    Each time is kept beside its graph, so that what was stopped goes on. The first graph is timed again at the end: `slowed` is how many
    times longer it then takes, which is above 1 on a device that throttles when it gets hot.
    """
    import onnxruntime

    orders = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
    machine = {
        "cpu": cpu_info() or platform.machine(),
        "threads": threads or available_cores(),
        "onnxruntime": onnxruntime.__version__,
    }
    made_by, times = {**machine, "of": orders["of"]}, dict[str, float]()
    for name in orders["shapes"]:
        kept = folder / name / "profile.json"
        known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        if not made_by.items() <= known.items():
            known = {**made_by, "p50_ms": time_graph(folder, name, orders, machine["threads"])}
            kept.with_suffix(".partial").write_text(json.dumps(known), encoding="utf-8")
            kept.with_suffix(".partial").replace(kept)
        times[name] = known["p50_ms"]
        print(f"{name}: {times[name]:.3f} ms", file=sys.stderr, flush=True)
    first = next(iter(times))
    slowed = time_graph(folder, first, orders, machine["threads"]) / times[first]
    return {**machine, "slowed": round(slowed, 3), "orders": orders, "p50_ms": times}


def time_graph(folder: Path, name: str, orders: dict[str, Any], threads: int) -> float:
    import numpy as np

    session = open_session(folder / name / "model.onnx", threads)
    own = next((place / "feed.npz" for place in (folder / name, folder) if (place / "feed.npz").is_file()), None)
    if own is not None:
        with np.load(own) as arrays:
            feed = {value.name: arrays[value.name] for value in session.get_inputs()}
        time_calls(lambda _: session.run(None, feed), 0, 5)  # these allocate
        return float(np.median(time_calls(lambda _: session.run(None, feed), 1, 20))) * 1000
    model = module_beside("generate").LanguageModel(folder / name, session)
    model.end_tokens = []
    prompt = list(range(1, orders["prompt_tokens"] + 1))
    sampling = module_beside("generate").Sampling(max_new_tokens=orders["new_tokens"])
    steps = ([time.perf_counter(), *(time.perf_counter() for _ in model.steps([prompt], sampling))] for _ in range(5))
    return float(np.median([np.diff(one) for one in steps])) * 1000


def time_calls(call: Callable[[int], Any], seconds: float, least: int) -> list[float]:
    """The seconds of each of `least` calls or more, by their numbers."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < least:
        start = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - start)
    return times


def benchmark_generation(generator: Generator, prompt: str, sampling: Any) -> dict[str, Any]:
    """Milliseconds until the first token after a prompt, and the tokens per second from there on: medians of five."""
    import numpy as np

    first, rates = [], []
    for _ in range(5):
        start = time.perf_counter()
        steps = generator.model.steps([generator.model.encode(prompt)], sampling)
        times = [time.perf_counter() - start for _ in steps]
        first += times[:1]
        rates += [(len(times) - 1) / (times[-1] - times[0])] if len(times) > 1 else []
    return {
        "time_to_first_token_ms": round(float(np.median(first)) * 1000, 3) if first else None,
        "tokens_per_second": round(float(np.median(rates)), 1) if rates else None,
    }


def sample(settings: dict[str, Any]) -> Example:
    """An example to time where none was given: as long a text as the model reads, or a photograph's worth of noise."""
    if settings["kind"] == "text":
        long = "a " * settings["max_length"]
        if "overlap" in settings:  # a question and a context
            return "a", long[: -2 * 16]
        return (long,) * (2 if settings["pair"] else 1)
    from PIL import Image

    picture = io.BytesIO()
    Image.effect_noise((640, 480), 64).save(picture, "PNG")
    return (picture,)


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    directory = Path(__file__).absolute().parent
    # Only the bundle of a language model, of one that finds spans, or of an embedder, has one of these.
    beside = [name for name in ("generate", "spans", "vectors") if (directory / f"{name}.py").is_file()]
    generates = "generate" in beside
    parser = make_parser(beside)
    flags = parser.parse_args(argv)
    if flags.profile is not None:
        print(json.dumps(profile(Path(flags.profile), flags.threads), indent=1))
        return
    manifest = read_manifest(directory)
    check_flags(parser, flags, manifest)
    inputs, output = manifest["inputs"], getattr(flags, "output", None)
    if output is not None and not os.access(Path(output).absolute().parent, os.W_OK):  # known before all texts are read
        raise BundleError(
            f"expected to write {output}, found that its folder cannot be written. Give another --output."
        )
    examples = read_examples(flags, 2 if flags.pair else 1, inputs["kind"] == "text")
    if flags.query is not None:
        examples = ((flags.query, passage) for (passage,) in examples)
    # Pillow's, of an image so large that it is refused here.
    warnings.simplefilter("ignore")
    # A file's name need not be UTF-8; it is written as it was given.
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    sampling = make_sampling(parser, flags) if generates else None
    # The inputs of a file are predicted one on each core; other providers have no cores to share out.
    shares_cores = flags.file is not None and flags.provider.lower() == "cpu" and not (flags.benchmark or generates)
    how = {"threads": 1 if shares_cores else flags.threads, "provider": flags.provider}
    model: Any = MODELS.get(manifest["outputs"]["kind"], Predictor)(directory, manifest, **how)
    if flags.benchmark:
        ready = round((time.perf_counter() - started) * 1000, 1)
        if generates:
            times = benchmark_generation(model, next(examples, ("",))[0], sampling)
        else:
            times = benchmark(model, list(examples) or [sample(inputs)])
        write_times({"ready_ms": ready, **times}, model.session, flags.json)
    elif generates:
        for (prompt,) in examples:
            write_continuation(model, prompt, sampling, flags.json)
    else:
        write_predictions(model, examples, flags, flags.threads or available_cores() if shares_cores else 1)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(
            f"error: expected the packages in requirements.txt, found: {error}. Run pip install -r requirements.txt."
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read the predictions has enough
    except KeyboardInterrupt:
        sys.exit(130)
