"""What is known of a data set from an earlier run, and when it is found out again."""

from __future__ import annotations

import os

import datasets
import pytest

from conftest import make_texts, write_csv, write_image_folder
from pipelines.core.config import DataConfig, LanguageConfig
from pipelines.data import remembered
from pipelines.data.remembered import state_of
from pipelines.tasks.image_classification import ImageClassification
from pipelines.tasks.text_classification import TextClassification
from pipelines.tasks.text_generation.task import LanguageModeling


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def csv_task(folder, **settings):
    path = folder / "texts.csv"
    if not path.exists():
        write_csv(path, make_texts(60))
    return TextClassification(DataConfig(dataset=str(path), **settings)), path


def image_task(folder, **settings):
    path = folder / "images" / "tech" / "001.png"
    if not (folder / "images").exists():
        write_image_folder(folder / "images", 30)
    return ImageClassification(DataConfig(dataset=str(folder / "images"), **settings)), path


def language_task(folder, **settings):
    path = folder / "texts.txt"
    if not path.exists():
        path.write_text("\n\n".join(text for text, _ in make_texts(60)))
    return LanguageModeling(DataConfig(dataset=str(path), **settings), LanguageConfig()), path


TASKS = [csv_task, image_task, language_task]


@pytest.mark.parametrize("make", TASKS)
def test_a_second_process_describes_the_data_without_reading_it(make, tmp_path):
    first, path = make(tmp_path)
    described = first.describe()
    assert described["data"] == first.data.fingerprint
    # Other bytes that only reading could tell from the first ones.
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second, _ = make(tmp_path)
    assert second.describe() == described
    assert "data" not in vars(second)


@pytest.mark.parametrize("make", TASKS)
def test_changed_files_and_changed_settings_are_noticed(make, tmp_path):
    described = make(tmp_path)[0].describe()
    for settings in ({"split_seed": 1}, {"max_train_samples": 9}):
        assert make(tmp_path, **settings)[0].describe()["data"] != described["data"]
    task, path = make(tmp_path)
    path.touch()  # written again with the same content: read again, and nothing is redone
    assert task.describe() == described
    assert "data" in vars(task)
    path.unlink()
    if make is csv_task:
        write_csv(path, make_texts(60, seed=1))
    elif make is language_task:
        path.write_text("\n\n".join(text for text, _ in make_texts(60, seed=1)))
    assert make(tmp_path)[0].describe()["data"] != described["data"]


def test_pixels_are_compared_once(tmp_path, monkeypatch):
    first = image_task(tmp_path)[0].data
    monkeypatch.setattr("pipelines.runtime.images.open_image", None)
    again = image_task(tmp_path, split_seed=1)[0].data  # another split of the same images
    assert again.details["examples"] == first.details["examples"]
    assert again.fingerprint != first.fingerprint


@pytest.mark.parametrize("content", [b"", b"damaged", b"\x93NUMPY"])
def test_a_damaged_memory_is_made_again(content, tmp_path, cache):
    described = csv_task(tmp_path)[0].describe()
    for path in (cache / "pocketformers").glob("known-*"):
        path.write_bytes(content)
    task, _ = csv_task(tmp_path)
    assert task.describe() == described
    assert "data" in vars(task)


def test_without_a_place_to_remember_it_is_found_out_every_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    task, _ = image_task(tmp_path)
    described = task.describe()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    again, _ = image_task(tmp_path)
    assert again.describe() == described
    assert "data" in vars(again)


def test_a_hub_data_set_is_known_by_its_commit(monkeypatch):
    class Info:
        sha = "0" * 40

    monkeypatch.setattr(remembered.huggingface_hub, "dataset_info", lambda name: Info)
    assert state_of("somebody/texts") == Info.sha
    monkeypatch.undo()
    assert state_of("somebody/texts") is None  # offline: it is read every time
    assert state_of(None) is None
