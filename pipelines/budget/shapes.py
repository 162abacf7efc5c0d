"""The shapes that a teacher can be cut to, and the bytes of each, from the shapes of its parameters."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipelines.budget.choice import evenly
from pipelines.budget.words import Budget
from pipelines.core.config import QuantizeConfig, StudentConfig
from pipelines.core.errors import InputError
from pipelines.core.records import shipped_files
from pipelines.core.sources import model_fingerprint
from pipelines.core.task import Task, TransferSet
from pipelines.models.families import FAMILIES, depths_of, groups_of, layers_of, unit_count
from pipelines.models.removal import cut, shape_of
from pipelines.models.students import config_of_student, layers_to_keep
from pipelines.models.vocabulary import tokens_to_keep, trim_config, trim_tokenizer
from pipelines.onnx.dynamic import SENSITIVE_SHARE
from pipelines.onnx.quantize import schemes_to_try
from pipelines.training.prune import MINIMUM

LAYERS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
# The shares of heads and of neurons that stay. Of several mixes that take equally long, a third of the heads with half of the neurons lost
# least when they went, in five of five seeds (benchmarks/pruning_criteria.py); so the share of heads that goes is two thirds of that of the neurons.
SHARES = ((1.0, 1.0), (0.83, 0.75), (0.67, 0.5), (0.5, 0.25))
# Of a teacher that is cut and not trained.
UNTRAINED_SHARES = ((1.0, 1.0), (0.93, 0.9), (0.83, 0.75), (0.67, 0.5))
# Bits of a table's weight and of a matmul's, by the names of schemes; all others have 8 and 8.
BITS = {
    "fp32": (32, 32),
    "int8_int4_embeddings": (4, 8),
    "mixed_int8": (8, 8 + 24 * SENSITIVE_SHARE),
    "int4_blocks": (4, 4),
    "int4_blocks_int8_embeddings": (8, 4),
}
# What a graph takes beside its weights: its nodes, and small constants.
GRAPH_BYTES, LAYER_BYTES = 8_000, 5_500


# The tokens that stay, by what --student_vocabulary calls them; None: all.
Vocabularies = Mapping[str | None, list[int] | None]


@dataclass(frozen=True)
class Shape:
    """What a student keeps of its teacher. A step that chooses heads and neurons by what each costs (ZipLM: Kurtic et al., 2023) would
    hold a number for each layer here; until then pruning spreads the shares by importance.
    """

    layers: int  # --student_layers
    heads: float  # share that stays, over all layers
    neurons: float
    scheme: str  # of quantization
    vocabulary: str | None = None  # --student_vocabulary; None: the teacher's
    student: str | None = None  # another checkpoint, whole (--student_model); None: the teacher's own layers
    fingerprint: str | None = None  # of that checkpoint

    @property
    def model(self) -> str:
        """Its name before it is quantized: one training serves all schemes."""
        if self.student is not None:
            return f"student_{Path(self.student).name}"
        vocabulary = "" if self.vocabulary is None else f"_{self.vocabulary}_vocabulary"
        units = f"{self.layers}_layers_{self.heads:.0%}_heads_{self.neurons:.0%}_neurons"
        return units.replace("%", "") + vocabulary

    @property
    def name(self) -> str:
        return f"{self.model}_{self.scheme}"

    @property
    def unpruned(self) -> Shape:
        """What a student is trained as, before anything of it goes."""
        return replace(self, heads=1.0, neurons=1.0, scheme="")


@dataclass(frozen=True)
class Forecast:
    """A shape, what is left of it in all layers together, and what it will cost."""

    shape: Shape
    layers: int
    heads: int
    neurons: int
    bytes: float
    vocabulary: int | None = None  # tokens; None of images
    ms: float | None = None

    @property
    def costs(self) -> dict[str, float | None]:
        return {"bytes": self.bytes, "ms": self.ms}

    @property
    def cost(self) -> float:
        return self.ms or self.bytes

    @property
    def capacity(self) -> tuple[float, ...]:
        """What a model can learn with: more of all of these is no worse."""
        return (self.layers, self.heads, self.neurons, *BITS.get(self.shape.scheme, (8, 8)), self.vocabulary or 0)


def schemes_of(task: Task, quantize: QuantizeConfig) -> list[str]:
    """The schemes of the shapes: the one that is asked for, or all of the task's that need no training examples."""
    schemes = schemes_to_try(task, replace(quantize, quantization=quantize.quantization or "auto"))
    weights_only = [name for name in schemes if not name.startswith(("static", "mixed"))]
    return ["fp32"] if schemes == ["none"] else weights_only if len(schemes) > 1 else schemes


def vocabularies_of(teacher: str, student: StudentConfig, task: Task, transfer: TransferSet | None) -> Vocabularies:
    """The vocabularies of the shapes: the one that is asked for, or else the teacher's and, where it can be trimmed, what the corpus needs."""
    processor, asked = task.load_processor(teacher), student.student_vocabulary
    if asked is not None:
        return {asked: tokens_to_keep(asked, processor, task, transfer)}
    try:
        return {None: None, "corpus": tokens_to_keep("corpus", processor, task, transfer)}
    except InputError:
        return {None: None}


def grid(
    config: Any, schemes: Sequence[str], vocabularies: Iterable[str | None] = (None,), trained: bool = True
) -> list[Shape]:
    """Every shape that the family of a model with this config allows, the teacher's own first; with all layers, where none is `trained`."""
    depth = max(depths_of(config)) if config.model_type in FAMILIES else 1
    may = groups_of(config)
    shares = [
        (heads if "heads" in may else 1.0, neurons if "neurons" in may else 1.0)
        for heads, neurons in (SHARES if trained else UNTRAINED_SHARES)
    ]
    shapes, fewer = [], {count for count in LAYERS if count < depth and trained}
    for layers in sorted({depth, *fewer}, reverse=True):
        try:
            kept_layers(config, layers)
        except InputError:  # a layer would come to a place for which transformers builds another kind
            continue
        shapes += [
            Shape(layers, heads, neurons, scheme, vocabulary)
            for vocabulary in vocabularies
            for scheme in schemes
            for heads, neurons in dict.fromkeys(shares)
        ]
    return shapes


def shapes_of_students(students: Sequence[str], task: Task, scheme: str) -> list[Shape]:
    """Every checkpoint in `students` as it is; raises InputError where two have one name."""
    shapes = [
        replace(grid(task.load_config(one), [scheme])[0], student=one, fingerprint=model_fingerprint(one))
        for one in students
    ]
    names = [shape.name for shape in shapes]
    if twice := {one for one, name in zip(students, names, strict=True) if names.count(name) > 1}:
        raise InputError(
            f"expected --students whose last folders have different names, found {', '.join(sorted(twice))}. Rename or copy them."
        )
    return shapes


def kept_layers(config: Any, layers: int) -> list[int] | None:
    return layers_to_keep(config, str(layers)) if config.model_type in FAMILIES else None


def untrained(teacher: str, layers: int, task: Task, folder: Path, tokens: list[int] | None = None) -> Any:
    """A model with random weights that keeps so many layers of the teacher, and these `tokens` or all; its config and processor are written
    into `folder`."""
    config, processor = task.load_config(teacher), task.load_processor(teacher)
    config = config_of_student(config, kept_layers(config, layers))
    if tokens is not None:
        processor = trim_tokenizer(processor, tokens)
        trim_config(config, tokens)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return task.load_model(str(folder), "new if other", from_scratch=True).eval()


def cut_to(model: Any, shape: Shape) -> Any:
    """Remove, in place, as many heads and neurons as pruning will, spread evenly over the layers."""
    kept = {}
    for kind, group in groups_of(model.config).items():
        counts = [unit_count(layer, group) for layer in layers_of(model)]
        left = sum(counts) - round((1 - getattr(shape, kind)) * sum(counts))
        ends = np.round(np.cumsum(counts) * left / sum(counts)).astype(int)
        evenly = np.diff(ends, prepend=0)
        kept[kind] = [
            np.arange(max(min(MINIMUM[kind], count), share)) for count, share in zip(counts, evenly, strict=True)
        ]
    cut(model, **kept)
    return model


def forecast_bytes(
    shapes: Sequence[Shape], teacher: str, task: Task, block_size: int, vocabularies: Vocabularies
) -> list[Forecast]:
    """What each shape will take on the disk, from models without weights: the files of its quantized directory."""
    wholes: dict[tuple[int, str | None, str | None], tuple[Any, int]] = {}
    found = []
    for shape in shapes:
        key = shape.layers, shape.vocabulary, shape.student
        if key not in wholes:
            with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
                source, tokens = shape.student or teacher, vocabularies[shape.vocabulary]
                model = untrained(source, shape.layers, task, Path(folder), tokens)
                wholes[key] = model, sum(path.stat().st_size for path in shipped_files(Path(folder)))
        whole, beside = wholes[key]
        model = cut_to(copy.deepcopy(whole), shape)
        known = model.config.model_type in FAMILIES
        layers = len(layers_of(model)) if known else 1
        left = {kind: sum(counts) for kind, counts in shape_of(model).items()}
        size = weight_bytes(model, shape.scheme, block_size) + beside + GRAPH_BYTES + LAYER_BYTES * layers
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
        found.append(Forecast(shape, layers, left.get("heads", 0), left.get("neurons", 0), size, vocabulary))
    return found


def weight_bytes(model: Any, scheme: str, block_size: int) -> float:
    """Bytes of a model's parameters once they are quantized; what is tied counts once, what is no matrix stays in fp32."""
    table_bits, matrix_bits = BITS.get(scheme, (8, 8))
    in_blocks, total, seen = "blocks" in scheme, 0.0, set()
    output = model.get_output_embeddings()
    # A tied head reads the blocks of its table, and then all tables are in blocks: see pipelines/onnx/quantize.py.
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_table = isinstance(module, nn.Embedding)
            is_matrix = name == "weight" and (is_table or isinstance(module, (nn.Linear, Conv1D)))
            bits = table_bits if is_table else matrix_bits
            if not is_matrix or bits == 32:
                total += 4 * parameter.numel()
                continue
            rows, columns = parameter.shape
            if is_table:
                blocks = in_blocks or tied or bits < 8
                whole = blocks and columns % block_size > 0  # a table whose width blocks do not divide stays as it is
                scales = rows * columns / block_size * 4 if blocks else 5
                # Of these the dynamic quantizer makes int8 afterwards.
                left = 4 * parameter.numel() if in_blocks or tied else parameter.numel() + 5
                total += left if whole else parameter.numel() * bits / 8 + scales
            else:
                outputs, inputs = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
                steps = math.ceil(inputs / block_size)
                # A scale for each block of inputs, or a scale and a zero point for each output.
                total += outputs * (steps * (block_size * bits / 8 + 4) if in_blocks else inputs * bits / 8 + 5)
    return total


def undominated(forecasts: Sequence[Forecast]) -> list[Forecast]:
    """Those that no other one has at least as much of everything of; of equals the fastest, or smallest."""

    def beats(other: Forecast, one: Forecast) -> bool:
        if other.capacity == one.capacity:
            return (other.ms or 0.0, other.bytes, other.shape.scheme) < (one.ms or 0.0, one.bytes, one.shape.scheme)
        return all(more >= less for more, less in zip(other.capacity, one.capacity, strict=True))

    return [one for one in forecasts if not any(beats(other, one) for other in forecasts)]


def is_copy(one: Forecast, whole: Forecast) -> bool:
    """Whether a shape has all layers, heads and neurons of the teacher."""
    return one.shape.student is None and one.capacity[:3] == whole.capacity[:3]


def candidates_of(feasible: Sequence[Forecast], whole: Forecast, budget: Budget, most: int) -> list[Forecast]:
    """At most so many shapes of the teacher to train, and all other students, each in its smallest scheme, the slowest first. With a bound on
    size or time those that no other one has more of; without any a spread from the cheapest on, so that there is a front to choose from. A
    copy of the `whole` teacher is one with fewer tokens, or where there is no other shape."""
    others = [one for one in feasible if one.shape.student is not None]
    own = [one for one in feasible if one.shape.student is None]
    shapes = [one for one in own if one.shape.vocabulary is not None or not is_copy(one, whole)] or own
    found = _spread(shapes, most) if budget.bytes is None and budget.ms is None else _front(shapes, most)
    return sorted([*_smallest(others), *found], key=lambda one: -one.cost)


def _smallest(forms: Sequence[Forecast]) -> list[Forecast]:
    """The smallest form of each model."""
    return list({one.shape.model: one for one in sorted(forms, key=lambda one: -one.bytes)}.values())


def _front(shapes: Sequence[Forecast], most: int) -> list[Forecast]:
    """Some of few layers and many neurons, some of many and few."""
    return evenly(sorted(_smallest(undominated(shapes)), key=lambda one: one.capacity), most)


def _spread(shapes: Sequence[Forecast], most: int) -> list[Forecast]:
    """In equal steps of the logarithm of their cost. All have as few tokens as they can: those cost bytes, and hardly time or score."""
    lean = {one.capacity[:3]: one for one in sorted(shapes, key=lambda one: -one.bytes)}
    by_cost = sorted(lean.values(), key=lambda one: one.cost)
    if not by_cost:
        return []
    targets = 1.0001 * np.geomspace(by_cost[0].cost, by_cost[-1].cost, most)
    found = [max((one for one in by_cost if one.cost <= target), key=lambda one: one.bytes) for target in targets]
    return list(dict.fromkeys(found))
