"""The one dict of tasks, and which task a model was made for."""

from __future__ import annotations

import json

import pytest

from pipelines.chain import demo_config
from pipelines.core.config import DataConfig, make_settings
from pipelines.tasks import TASKS, TaskConfig, make_task, task_class, task_of_model


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_found_by_its_name_and_has_a_demo(name):
    kind = task_class(name)
    assert kind.name == name
    assert kind.settings[0] is DataConfig
    assert demo_config(name).is_file()


def test_a_task_is_made_of_its_own_settings(image_folder):
    kinds = (TaskConfig, *task_class("image-classification").settings)
    values = {"task": "image-classification", "dataset": str(image_folder), "random_flip": True}
    task = make_task(make_settings(kinds, values))
    assert task.name == "image-classification"
    assert task.config.dataset == str(image_folder)
    assert task.augmentation.random_flip  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("architectures", "task"),
    [
        (["DistilBertForSequenceClassification"], "text-classification"),
        (["ViTForImageClassification"], "image-classification"),
        (["GPT2LMHeadModel"], "text-generation"),
        (["LlamaForCausalLM"], "text-generation"),
        (["BertForMaskedLM"], None),
        (None, None),
    ],
)
def test_the_task_of_a_model_is_that_of_its_class(architectures, task, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
    assert task_of_model(tmp_path) == task


def test_a_directory_without_a_config_has_no_task(tmp_path):
    assert task_of_model(tmp_path) is None
    (tmp_path / "config.json").write_text("[")
    assert task_of_model(tmp_path) is None
    assert task_of_model(None) is None
