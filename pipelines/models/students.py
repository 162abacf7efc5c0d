"""Build a student: some of a teacher's layers with its embeddings and head, or a model of its own."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from pipelines.core.config import StudentConfig
from pipelines.core.errors import InputError
from pipelines.core.task import Task
from pipelines.models.families import layer_count, select_layers


class Student(NamedTuple):
    model: Any
    processor: Any
    layers: list[int] | None  # of the teacher, that were copied; None for a model of its own


def build_student(student: StudentConfig, teacher: str, task: Task) -> Student:
    """The student, not yet trained, of the teacher in `teacher`: what `student_model` names, or else the teacher's `student_layers`."""
    if student.student_model is not None:
        model = task.load_model(student.student_model, task.student_head, student.student_from_scratch)
        return Student(model, task.load_processor(student.student_model), None)
    whole = task.load_model(teacher)
    layers = parse_layers(student.student_layers, layer_count(whole.config))
    return Student(student_from_layers(whole, layers), task.load_processor(teacher), layers)


def parse_layers(text: str, teacher_layers: int) -> list[int]:
    """The teacher layers a student keeps: '3' spreads three over the depth, first and last included; '0,2,5' names them."""
    named = "," in text
    allowed = range(teacher_layers) if named else range(1, teacher_layers + 1)
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if numbers != sorted(set(numbers) & set(allowed)):
        raise InputError(
            f"expected --student_layers of at most {teacher_layers}, the teacher's, or its layers from 0 to {teacher_layers - 1} in rising "
            f"order such as 0,2,5, found {text!r}."
        )
    if named:
        return numbers
    count = numbers[0]
    if count == 1:
        return [0]
    # Rounded down: three of six layers are 0, 2 and 5.
    return [position * (teacher_layers - 1) // (count - 1) for position in range(count)]


def student_from_layers(teacher: Any, layers: list[int]) -> Any:
    """A model of the teacher's class with copies of the named layers, the embeddings and the head."""
    changes, state = select_layers(teacher.config, teacher.state_dict(), layers)
    config = copy.deepcopy(teacher.config)
    config.update(changes)
    student = type(teacher)(config)
    student.load_state_dict(state, strict=True)
    if teacher.can_generate():
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student
