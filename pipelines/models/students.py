"""Build a student from a teacher: some of its layers, with its embeddings and head."""

from __future__ import annotations

import copy
from typing import Any

from pipelines.core.errors import InputError
from pipelines.models.families import select_layers


def parse_layers(text: str, teacher_layers: int) -> list[int]:
    """The teacher layers a student keeps: '3' spreads three over the depth, first and last included; '0,2,5' names them."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"expected --student_layers such as 3 or 0,2,5, found {text!r}.") from error
    if "," in text:
        if sorted(set(numbers)) != numbers or not 0 <= numbers[0] <= numbers[-1] < teacher_layers:
            raise InputError(
                f"expected --student_layers to name layers from 0 to {teacher_layers - 1} in rising order, found {text!r}."
            )
        return numbers
    count = numbers[0]
    if not 1 <= count <= teacher_layers:
        raise InputError(f"expected --student_layers between 1 and the teacher's {teacher_layers}, found {count}.")
    if count == 1:
        return [0]
    # Rounding half down keeps 0, 2, 5 of six layers: the early ones, whose loss costs least to make good.
    return [int(position * (teacher_layers - 1) / (count - 1)) for position in range(count)]


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
