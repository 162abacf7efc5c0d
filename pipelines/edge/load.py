"""A bundle, an ONNX directory or a published model -> a model to call in Python, run by the code of infer.py: no torch, no transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core.errors import InputError
from pipelines.edge.settings import settings_of
from pipelines.runtime.generate import Sampling
from pipelines.runtime.infer import MODELS, Answerer, Generator, Predictor, SpanFinder, ranked, read_manifest

# Where the graph is: of a stage's directory, and of a published model, the smaller first.
GRAPHS = ("model.onnx", "onnx/model_fused.onnx", "onnx/model_quantized.onnx", "onnx/model.onnx")


class Model:
    """A model that predicts: a dict like a line of `infer.py --json` for one input, a list of them for a list; an embedder gives an array,
    (size,) or (inputs, size).

    An input is a text, a pair of texts (a question and a context) as a tuple, or an image: its path, or an image of Pillow. A language model also takes the fields
    of `Sampling`, such as max_new_tokens.
    """

    def __init__(self, predictor: Predictor | Generator | Answerer | SpanFinder) -> None:
        self.predictor = predictor
        self.manifest = predictor.manifest

    def __call__(self, inputs: Any, **sampling: Any) -> Any:
        given = inputs if isinstance(inputs, list) else [inputs]
        if self.manifest["inputs"]["kind"] == "text":
            check_texts(given, self.manifest["inputs"].get("pair"))
        # One at a time, as on a device: dynamic quantization takes one scale for a whole batch.
        examples = [item if isinstance(item, tuple) else (item,) for item in given]
        if isinstance(self.predictor, Generator):
            how = Sampling(**sampling)
            found: Any = [self.predictor.predict(example, how) for example in examples]
        elif sampling:
            raise TypeError(f"expected inputs alone, found {', '.join(sampling)}: the model continues no texts.")
        elif self.manifest["outputs"]["kind"] == "vector":
            found = np.array([self.predictor.logits(example) for example in examples])
        else:
            found = [self.predictor.predict(example) for example in examples]
        return found if isinstance(inputs, list) else found[0]

    def rank(self, query: str, passages: list[str]) -> list[dict[str, Any]]:
        """The passages by how well they answer the query, the best first, of a model that scores pairs of texts."""
        return ranked(self([(query, passage) for passage in passages]))


def check_texts(given: list[Any], pair: bool | None) -> None:
    """Raise InputError unless all are texts, or tuples of two where the model reads a `pair`; either where that is not known (None)."""
    expected = {True: "tuples of two texts", False: "texts", None: "texts, or tuples of two"}[pair]
    for item in given:
        parts = item if isinstance(item, tuple) else (item,)
        counts = (1, 2) if pair is None else (1 + pair,)
        if len(parts) not in counts or not all(isinstance(part, str) for part in parts):
            raise InputError(
                f"expected {expected}, found {item!r:.80} ({type(item).__name__}). Convert it; several inputs are a list, such as list(column)."
            )


def load(source: str | Path, threads: int | None = None) -> Model:
    """Open the model in `source`: a bundle, a run or published model with one, an ONNX directory, or the Hub id of what `push` published.

    `threads` are all cores that this process may use where they are left out. Raises BundleError for a damaged bundle, InputError where
    there is no model that can be run.
    """
    directory = Path(source)
    found = find(directory) if directory.is_dir() else download(str(source))
    if found is None:
        raise InputError(
            f"expected a bundle or an ONNX directory, found neither manifest.json nor {', '.join(GRAPHS)} in {source}. Name a run's "
            "bundle/, quantized/ or onnx/."
        )
    folder, graph = found
    manifest = read_manifest(folder) if graph is None else settings_of(folder, graph)
    kind = MODELS.get(manifest["outputs"]["kind"], Predictor)
    predictor = kind(folder, manifest, threads=threads)
    names = manifest["outputs"].get("labels") or manifest["outputs"].get("names")
    rows = predictor.session.get_outputs()[0].shape[-1]
    if names and isinstance(rows, int) and rows != len(names):
        raise InputError(
            f"expected names for the {rows} outputs of {folder / manifest['model']}, found {len(names)} in id2label of config.json: "
            f"{', '.join(map(str, names)):.200}. Correct it."
        )
    return Model(predictor)


def find(directory: Path) -> tuple[Path, str | None] | None:
    """The bundle in a directory (and no graph), or else the directory and its smaller graph; None where it has neither."""
    for folder in (directory, directory / "bundle"):
        if (folder / "manifest.json").is_file():
            return folder, None
    return next(((directory, name) for name in GRAPHS if (directory / name).is_file()), None)


def download(repo_id: str) -> tuple[Path, str | None] | None:
    """What find() finds in a published model, of which no more is fetched than is needed."""
    from huggingface_hub import snapshot_download

    graphs = [["*.json", f"{graph}*"] for graph in GRAPHS[1:]]
    for patterns in (["bundle/*"], *graphs):
        try:
            # The page is for browsers only.
            folder = snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns="bundle/web/*")
        except Exception as error:  # the Hub's, the network's, and those of whatever library it is read with
            reason = " ".join(str(error).split())
            raise InputError(
                f"expected a directory or a published model, found no directory {repo_id!r}, and on the Hub: {reason}. Check the name; "
                "`hf auth login` opens private models."
            ) from error
        found = find(Path(folder))
        if found is not None:
            return found
    return None
