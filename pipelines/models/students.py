"""Build a student: some of a teacher's layers with its embeddings and head, a model of its own, or one of another kind."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from accelerate import PartialState

from pipelines.core.config import StudentConfig
from pipelines.core.errors import InputError
from pipelines.core.task import Task, TransferSet
from pipelines.models.families import FAMILIES, config_changes, depths_of, family_of, select_layers
from pipelines.models.vocabulary import tokens_to_keep, trim_config, trim_model, trim_tokenizer


class Student(NamedTuple):
    model: Any
    processor: Any
    layers: list[int] | None  # of the teacher, that were copied; None for a model of its own


def build_student(student: StudentConfig, teacher: str, task: Task, transfer: TransferSet | None = None) -> Student:
    """The student, not yet trained, of the teacher in `teacher`: what `student_model` names, or else the teacher's `student_layers`.

    With `student_vocabulary` it has the tokens that the training examples and those of the `transfer` set need.
    """
    if student.checkpoint is not None:
        model = task.load_model(student.checkpoint, task.student_head, student.student_from_scratch)
        return Student(model, task.load_processor(student.checkpoint), None)
    whole, processor = task.load_model(teacher), task.load_processor(teacher)
    kept: list[int] | None = None
    if student.student_vocabulary is not None:
        kept = tokens_to_keep(student.student_vocabulary, processor, task, transfer)
        processor = trim_tokenizer(processor, kept)
        trim_model(whole, kept)
    if student.kind is not None:
        sizes = {"width": student.student_width, "hidden": student.student_hidden}
        given = {name: size for name, size in sizes.items() if size is not None}
        config = kind_of(student.kind, task)(**task.input_sizes(teacher), **given)
        if kept is not None:
            trim_config(config, kept)
        with tempfile.TemporaryDirectory() as shape:  # as --student_from_scratch takes it
            config.save_pretrained(shape)
            processor.save_pretrained(shape)
            model, processor = task.load_model(shape, "new if other", from_scratch=True), task.load_processor(shape)
        if not student.student_from_scratch:
            model.start_from(whole)
        return Student(model, processor, None)
    layers = layers_to_keep(whole.config, student.student_layers)
    return Student(whole if layers is None else student_from_layers(whole, layers), processor, layers)


def kind_of(name: str, task: Task) -> Any:
    """The class of the config of a student of another kind. Raises InputError where the task has none of this name."""
    if name not in task.student_kinds:
        known = f"of {', '.join(task.student_kinds)} or " if task.student_kinds else ""
        raise InputError(
            f"expected --student_model {known}with the name of a checkpoint for {task.name}, found {name!r}. A directory of that name is "
            f"./{name}."
        )
    return task.student_kinds[name]


def planned_config(student: StudentConfig, teacher: str, task: Task) -> Any:
    """The config of the student of the teacher in `teacher`, as far as it is known before that is loaded: a kind has its default sizes."""
    if student.kind is not None:
        return kind_of(student.kind, task)()
    if student.checkpoint is not None:
        return task.load_config(student.checkpoint)
    config = task.load_config(teacher)
    return config_of_student(config, layers_to_keep(config, student.student_layers))


def layers_to_keep(config: Any, text: str) -> list[int] | None:
    """The layers that `text` (--student_layers) asks of a teacher with this config; of an unknown family all, which is None, with a line."""
    if config.model_type not in FAMILIES:
        PartialState().print(
            f"student: all layers of the teacher, since which are a {config.model_type}'s is not known; --student_model names a smaller one",
            flush=True,
        )
        return None
    return parse_layers(text, depths_of(config), family_of(config).kind)


def parse_layers(text: str, depths: list[int], kind: Callable[[int], int] = lambda position: 0) -> list[int]:
    """The teacher layers a student keeps: '3' spreads three over the depth, first and last included; '0,2,5' names them.

    Of a teacher with several stages, which have `depths`, '3' keeps three of each, or all where a stage has fewer; names count through. A
    layer keeps its `kind` (see families.py): of spread layers the one before stands in, named ones are refused.
    """
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    named = len(numbers) > 1
    spread = [
        start + layer for start, depth in zip(starts, depths, strict=True) for layer in _spread(numbers[0], depth, kind)
    ]
    layers = numbers if named else spread
    stages = [
        [layer - start for layer in layers if 0 <= layer - start < depth]
        for start, depth in zip(starts, depths, strict=True)
    ]
    keep_their_kind = all(kind(layer) == kind(place) for stage in stages for place, layer in enumerate(stage))
    in_range = sorted({*layers} & {*range(sum(depths))}) if named or numbers[0] <= max(depths) else None
    if layers != in_range or not all(stages) or not keep_their_kind:
        of_each_stage = " in each stage" if len(depths) > 1 else ""
        example = ",".join(map(str, parse_layers(str(min(2, max(depths))), depths, kind)))
        reason = (
            ""
            if keep_their_kind
            else ", where a layer would come to a place for which transformers builds another kind"
        )
        raise InputError(
            f"expected --student_layers of at most {max(depths)}, the teacher's{of_each_stage}, or its layers from 0 to {sum(depths) - 1} "
            f"in rising order{of_each_stage and ', some of each stage,'} such as {example}, found {text!r}{reason}."
        )
    return layers


def _spread(count: int, depth: int, kind: Callable[[int], int]) -> list[int]:
    """At most `count` of `depth` layers, first and last included: rounded down, three of six are 0, 2 and 5."""
    count = min(count, depth)
    layers = [place * (depth - 1) // max(1, count - 1) for place in range(count)]
    return [layer - (kind(layer) != kind(place)) for place, layer in enumerate(layers)]


def config_of_student(teacher: Any, layers: list[int] | None) -> Any:
    """The config of a student that keeps `layers` of the teacher with this one; None keeps all."""
    config = copy.deepcopy(teacher)
    if layers is not None:
        config.update(config_changes(teacher, layers))
        # The layers of a model that can be a backbone are its stages, unless it has stages of several layers.
        if hasattr(config, "stage_names") and not hasattr(config, "depths"):
            config.stage_names = config.stage_names[: len(layers) + 1]
            config.set_output_features_output_indices(None, None)  # the last one
    return config


def student_from_layers(teacher: Any, layers: list[int]) -> Any:
    """A model of the teacher's class with copies of the named layers, the embeddings and the head."""
    student = type(teacher)(config_of_student(teacher.config, layers))
    student.load_state_dict(select_layers(teacher.config, teacher.state_dict(), layers), strict=True)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student
