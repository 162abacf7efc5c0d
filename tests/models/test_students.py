"""What a student is built of."""

from __future__ import annotations

import pytest
import torch

from conftest import example_inputs, tiny_language_model, tiny_model
from pipelines.core.config import StudentConfig
from pipelines.core.errors import InputError
from pipelines.models.families import layers_of
from pipelines.models.students import build_student, parse_layers, student_from_layers


def test_layers_are_spread_over_the_depth_or_named():
    assert parse_layers("3", 6) == [0, 2, 5]
    assert parse_layers("6", 12) == [0, 2, 4, 6, 8, 11]
    assert parse_layers("1", 6) == [0]
    assert parse_layers("0,1,5", 6) == [0, 1, 5]
    for wrong in ("0", "7", "5,1", "0,6", "three"):
        with pytest.raises(InputError, match="--student_layers"):
            parse_layers(wrong, 6)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "gpt2", "qwen3"])
def test_a_student_has_copies_of_the_layers_that_it_is_told_to_keep(model_type):
    language = model_type in ("gpt2", "qwen3")
    teacher = tiny_language_model(model_type) if language else tiny_model(model_type)
    student = student_from_layers(teacher, [0, 2]).eval()
    assert student.config.num_hidden_layers == len(layers_of(student)) == 2
    assert teacher.config.num_hidden_layers == len(layers_of(teacher)) > 2
    for layer, kept in zip(layers_of(student), (0, 2), strict=True):
        for own, theirs in zip(layer.parameters(), layers_of(teacher)[kept].parameters(), strict=True):
            torch.testing.assert_close(own, theirs)
    if not language:  # whose cache counts the layers
        for gone in (3, 1):
            del layers_of(teacher)[gone]
        inputs = example_inputs(model_type)
        torch.testing.assert_close(student(**inputs).logits, teacher.eval()(**inputs).logits)


def test_a_student_comes_with_its_processor_and_the_layers_it_copies(task, teacher, tmp_path):
    of_teacher = build_student(StudentConfig(student_layers="0,3"), str(teacher), task)
    assert of_teacher.layers == [0, 3]
    assert len(layers_of(of_teacher.model)) == 2
    tiny_model("distilbert").save_pretrained(tmp_path)
    task.load_processor(str(teacher)).save_pretrained(tmp_path)
    of_its_own = build_student(StudentConfig(student_model=str(tmp_path)), str(teacher), task)
    assert of_its_own.layers is None
    assert of_its_own.model.config.model_type == "distilbert"
    assert len(of_its_own.processor) == len(of_teacher.processor)
