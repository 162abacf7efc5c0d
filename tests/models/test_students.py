"""What a student is built of."""

from __future__ import annotations

import pytest
import torch

from conftest import example_inputs, tiny_config, tiny_language_model, tiny_model
from pipelines.core.config import StudentConfig
from pipelines.core.errors import InputError
from pipelines.models.families import FAMILIES, layers_of
from pipelines.models.students import (
    build_student,
    config_of_student,
    layers_to_keep,
    parse_layers,
    student_from_layers,
)


def test_layers_are_spread_over_the_depth_or_named():
    assert parse_layers("3", [6]) == [0, 2, 5]
    assert parse_layers("6", [12]) == [0, 2, 4, 6, 8, 11]
    assert parse_layers("1", [6]) == [0]
    assert parse_layers("0,1,5", [6]) == [0, 1, 5]
    for wrong in ("0", "7", "5,1", "0,6", "three"):
        with pytest.raises(InputError, match="--student_layers"):
            parse_layers(wrong, [6])


def test_layers_of_stages_are_spread_over_each_and_keep_their_kind():
    swin = [2, 2, 6, 2]
    assert parse_layers("1", swin) == [0, 2, 4, 10]
    assert parse_layers("3", swin) == [0, 1, 2, 3, 4, 6, 9, 10, 11]
    shifted = FAMILIES["swin"].kind
    assert parse_layers("3", swin, shifted) == [
        0,
        1,
        2,
        3,
        4,
        5,
        8,
        10,
        11,
    ]  # shifted windows at odd places of each stage
    assert parse_layers("6", swin, shifted) == list(range(12))
    assert parse_layers("0,2,4,10", swin, shifted) == [0, 2, 4, 10]
    for wrong in ("1,2,4,10", "0,2,4", "7", "0,2,4,12"):
        with pytest.raises(InputError, match="in each stage"):
            parse_layers(wrong, swin, shifted)
    with pytest.raises(InputError, match="another kind"):  # ModernBERT's first layer has no normalization
        parse_layers("1,2", [4], FAMILIES["modernbert"].kind)


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


def test_a_student_of_an_unknown_family_has_all_layers_and_a_line_says_so(capsys):
    config = tiny_config("squeezebert")
    assert layers_to_keep(config, "3") is None
    assert "all layers" in capsys.readouterr().out
    assert config_of_student(config, None).to_dict() == config.to_dict()
