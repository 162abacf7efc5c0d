"""The run directory: what is skipped, redone, resumed, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from conftest import make_texts, write_csv
from pipelines.core.errors import InputError
from pipelines.core.identity import NOT_IN_RESULT, describe, differences
from pipelines.core.records import RECORD, Outcome, copy_beside, read_record
from pipelines.core.run import MARKER, Run


@dataclass
class Setting:
    size: int = 1


class Task:
    def __init__(self, data: str = "a") -> None:
        self.data = data

    def describe(self):
        return {"data": self.data}


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


calls: list[str] = []


@pytest.fixture(autouse=True)
def forget_calls():
    calls.clear()


def write_first(source: str, directory: Path, task: Task, setting: Setting) -> Outcome:
    calls.append("first")
    (directory / "model.txt").write_text(f"{task.data} {setting.size}")
    return Outcome("transformers", {"validation": {"accuracy": 0.5}}, parameters=10)


def write_second(source: str, directory: Path, task: Task, other: Path | None = None) -> Outcome:
    calls.append("second")
    (directory / "copy.txt").write_text((Path(source) / "model.txt").read_text())
    return Outcome("onnx")


def cannot(source: str, directory: Path, task: Task) -> Outcome:
    (directory / "half.txt").write_text("")
    raise InputError("expected another model")


def test_what_is_there_for_comparison_only_is_left_out_where_it_cannot_be_made(tmp_path, source, capsys):
    with Run(tmp_path / "run", Task(), seed=0) as run:
        run.stage("first", write_first, str(source), setting=Setting())
        run.stage("rival", cannot, "first", optional=True)
        assert run.stages == ["first"]
        assert [path.name for path in run.directory.iterdir() if "rival" in path.name] == []
        assert "rival: left out, since it cannot be made: expected another model" in capsys.readouterr().out
        with pytest.raises(InputError, match="another model"):
            run.stage("needed", cannot, "first")


def run_both(directory: Path, source: Path, setting: Setting | None = None, task: Task | None = None) -> list[str]:
    calls.clear()
    with Run(directory, task or Task(), seed=0) as run:
        run.stage("first", write_first, str(source), setting=setting or Setting())
        run.stage("second", write_second, "first")
    return list(calls)


def test_a_second_run_does_nothing_and_says_so(tmp_path, source, capsys):
    assert run_both(tmp_path / "run", source) == ["first", "second"]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run_both(tmp_path / "run", source) == []
    assert capsys.readouterr().out.splitlines() == ["first: finished already", "second: finished already"]
    unchanged = {path: path.stat().st_mtime_ns for path in written if path.name not in (".lock", MARKER)}
    assert unchanged == {path: time for path, time in written.items() if path in unchanged}


def test_a_changed_setting_redoes_its_stage_and_what_follows(tmp_path, source, capsys):
    run_both(tmp_path / "run", source)
    capsys.readouterr()
    assert run_both(tmp_path / "run", source, Setting(size=2)) == ["first", "second"]
    assert "first: redone, because setting.size changed from 1 to 2" in capsys.readouterr().out
    assert (tmp_path / "run" / "second" / "copy.txt").read_text() == "a 2"


def test_changed_data_and_a_changed_source_redo(tmp_path, source):
    run_both(tmp_path / "run", source)
    assert run_both(tmp_path / "run", source, task=Task("b")) == ["first", "second"]
    (source / "config.json").write_text('{"a": 1}')
    assert run_both(tmp_path / "run", source, task=Task("b"))[0] == "first"


def test_a_model_that_was_moved_or_is_spelt_otherwise_is_the_same(tmp_path, source):
    run_both(tmp_path / "run", source)
    assert run_both(tmp_path / "run", Path(f"{source.parent}/../{source.parent.name}/{source.name}")) == []
    source.rename(tmp_path / "moved")
    assert run_both(tmp_path / "run", tmp_path / "moved") == []


def test_a_stage_whose_source_came_out_the_same_is_not_redone(tmp_path, source):
    """The source's identity is the content of its files, not when or by which flags they were made."""
    run_both(tmp_path / "run", source)
    shutil.rmtree(tmp_path / "run" / "first")
    assert run_both(tmp_path / "run", source) == ["first"]


@pytest.mark.parametrize("damage", [lambda path: path.write_text("other"), lambda path: path.unlink()])
def test_a_damaged_file_is_noticed_and_made_again(tmp_path, source, damage, capsys):
    run_both(tmp_path / "run", source)
    damage(tmp_path / "run" / "first" / "model.txt")
    assert run_both(tmp_path / "run", source) == ["first"]
    assert "model.txt changed since it was written" in capsys.readouterr().out
    assert (tmp_path / "run" / "first" / "model.txt").read_text() == "a 1"


def test_a_stage_on_another_disk_is_made_again_each_time(tmp_path, source):
    run_both(tmp_path / "run", source)
    (tmp_path / "run" / "second").rename(tmp_path / "disk")
    (tmp_path / "run" / "second").symlink_to(tmp_path / "disk")
    for _ in range(2):
        (tmp_path / "run" / "second" / "copy.txt").write_text("other")
        assert run_both(tmp_path / "run", source) == ["second"]
    assert not (tmp_path / "run" / ".second.old").is_symlink()
    assert (tmp_path / "disk" / "copy.txt").read_text() == "other"


def test_a_models_path_is_not_taken_for_a_stage_of_the_same_name(tmp_path, source, monkeypatch):
    """`--teacher_model teacher`, the directory of a single stage, and a run whose first stage is called `teacher`, too."""
    source.rename(tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    for expected in (["first"], []):
        calls.clear()
        run = Run(tmp_path / "run", Task(), seed=0)
        run.stage("first", write_first, "first", setting=Setting())
        run._lock.release()
        assert calls == expected
    assert read_record(tmp_path / "run" / "first")["made_by"]["source"] == "first"


def test_a_stage_is_not_made_of_files_that_its_sources_record_does_not_know(tmp_path, source):
    run_both(tmp_path / "run", source)
    (tmp_path / "run" / "first" / "model.txt").write_text("other")
    run = Run(tmp_path, Task(), seed=0, only_stage="alone")
    with pytest.raises(InputError, match=r"found model.txt changed or missing.*once its record.json is deleted"):
        run.stage("alone", write_second, str(tmp_path / "run" / "first"))
    (tmp_path / "run" / "first" / RECORD).unlink()
    run.stage("alone", write_second, str(tmp_path / "run" / "first"))
    run._lock.release()
    assert (tmp_path / "alone" / "copy.txt").read_text() == "other"


def test_a_run_killed_while_it_puts_a_stage_in_place_does_not_make_it_again(tmp_path, source, monkeypatch):
    def die(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    def train(source: str, directory: Path, task: Task) -> Outcome:
        calls.append("trained")
        (directory / "model.txt").write_text("weights")
        (directory / "checkpoints").mkdir()
        (directory / "checkpoints" / "state.txt").write_text("state")
        return Outcome("transformers")

    for place in ("pathlib.Path.rename", "shutil.rmtree"):
        directory = tmp_path / place
        calls.clear()
        for dies in (True, False):
            with monkeypatch.context() as patched:
                run = Run(directory, Task(), seed=0)
                if dies:
                    patched.setattr(place, die)
                    with pytest.raises(KeyboardInterrupt):
                        run.stage("first", train, str(source), distributed=True)
                else:
                    run.stage("first", train, str(source), distributed=True)
                run._lock.release()
        assert calls == ["trained"]
        assert {path.name for path in (directory / "first").rglob("*")} == {"model.txt", RECORD}


def test_a_record_holds_what_made_the_stage(tmp_path, source):
    run_both(tmp_path / "run", source)
    record = read_record(tmp_path / "run" / "first")
    assert record["stage"] == "first"
    assert record["format"] == "transformers"
    assert record["made_by"]["setting"] == {"size": 1}
    assert record["made_by"]["task"] == {"data": "a"}
    assert record["made_by"]["seed"] == 0
    assert record["parameters"] == 10
    assert record["bytes"] == len("a 1")
    assert record["metrics"] == {"validation": {"accuracy": 0.5}}
    assert set(record["files"]) == {"model.txt"}
    assert record["versions"]["torch"]


def test_an_interrupted_stage_keeps_its_checkpoints_and_another_one_does_not(tmp_path, source):
    def interrupted(source: str, directory: Path, task: Task, setting: Setting) -> Outcome:
        found = (directory / "checkpoints" / "1").exists()
        (directory / "checkpoints").mkdir(exist_ok=True)
        (directory / "checkpoints" / "1").touch()
        if not found:
            raise KeyboardInterrupt
        (directory / "model.txt").write_text("resumed")
        return Outcome("transformers")

    def attempt(setting: Setting, distributed: bool = True) -> None:
        run = Run(tmp_path / "run", Task(), seed=0)
        try:
            run.stage("first", interrupted, str(source), distributed=distributed, setting=setting)
        finally:
            run._lock.release()

    with pytest.raises(KeyboardInterrupt):
        attempt(Setting(1))
    assert not (tmp_path / "run" / "first").exists()
    with pytest.raises(KeyboardInterrupt):
        attempt(Setting(2))  # other settings do not continue from the checkpoints of the first
    with pytest.raises(KeyboardInterrupt):
        attempt(Setting(2), distributed=False)  # what trains nothing starts in an empty directory
    attempt(Setting(2))
    assert (tmp_path / "run" / "first" / "model.txt").read_text() == "resumed"
    assert not (tmp_path / "run" / "first" / "checkpoints").exists()


def test_a_failed_stage_leaves_the_earlier_result_in_place(tmp_path, source):
    run_both(tmp_path / "run", source)

    def failing(source: str, directory: Path, task: Task, setting: Setting) -> Outcome:
        (directory / "model.txt").write_text("half")
        raise InputError("no")

    run = Run(tmp_path / "run", Task(), seed=0)
    with pytest.raises(InputError):
        run.stage("first", failing, str(source), setting=Setting(3))
    assert (tmp_path / "run" / "first" / "model.txt").read_text() == "a 1"
    assert read_record(tmp_path / "run" / "first")["made_by"]["setting"] == {"size": 1}


def test_a_stage_that_failed_gives_its_directory_back(tmp_path, source):
    """While its error is being looked at, as in a notebook."""
    with pytest.raises(FileNotFoundError) as caught, Run(tmp_path, Task(), seed=0, only_stage="alone") as run:
        run.stage("alone", write_second, str(source))
    assert caught.tb is not None
    with Run(tmp_path, Task(), seed=0, only_stage="alone") as run:
        run.stage("alone", write_first, str(source), setting=Setting())


def test_a_result_that_a_kill_caught_between_two_names_is_still_there(tmp_path, source):
    run_both(tmp_path / "run", source)
    for name in ("first", "second"):
        shutil.copytree(tmp_path / "run" / name, tmp_path / "run" / f".{name}.partial")
        (tmp_path / "run" / name).rename(tmp_path / "run" / f".{name}.old")
    assert run_both(tmp_path / "run", source) == []
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix in (".old", ".partial")]


def test_a_directory_with_other_things_in_it_is_refused_untouched(tmp_path):
    directory = tmp_path / "photos"
    directory.mkdir()
    (directory / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"empty, missing, or of an earlier run"):
        Run(directory, Task(), seed=0)
    assert [path.name for path in directory.iterdir()] == ["README.md"]
    stage = tmp_path / "model"
    stage.mkdir()
    (stage / "weights").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        Run(tmp_path, Task(), seed=0, only_stage="model")


def test_what_is_named_like_a_stage_and_is_none_stays_where_it_is(tmp_path, source):
    mine = tmp_path / "run" / "first"
    run_both(tmp_path / "run", source)
    shutil.rmtree(mine)
    mine.write_text("mine")
    with pytest.raises(InputError, match="found something without a record.json. Nothing was touched"):
        run_both(tmp_path / "run", source)
    assert mine.read_text() == "mine"
    mine.unlink()
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="found something without a record.json"):
        run_both(tmp_path / "run", source)
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]
    (mine / "notes.txt").unlink()
    assert run_both(tmp_path / "run", source) == ["first"]  # an empty directory is nobody's


def test_a_file_and_a_place_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="found the file"):
        Run(tmp_path / "file", Task(), seed=0)
    with pytest.raises(InputError, match="output_dir"):
        Run(tmp_path / "file" / "below", Task(), seed=0)


def test_two_runs_in_one_directory(tmp_path, source):
    run_both(tmp_path / "run", source)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    script = (
        "import sys, time; from types import SimpleNamespace; from pipelines.core.run import Run\n"
        "run = Run(sys.argv[1], SimpleNamespace(describe=dict), 0); print('ready', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline().strip() == "ready"
        with pytest.raises(InputError, match="no other run at work"):
            Run(tmp_path / "run", Task("b"), seed=0)
        with pytest.raises(InputError, match="no other run at work"):
            Run(tmp_path / "run", Task("b"), seed=0, only_stage="first")
        assert {path: path.read_bytes() for path in before} == before
    finally:
        other.kill()
        other.wait()
    Run(tmp_path / "run", Task(), seed=0)  # a killed run holds nothing


def test_a_record_edited_by_hand_is_named(tmp_path, source):
    run_both(tmp_path / "run", source)
    (tmp_path / "run" / "first" / RECORD).write_text("{oops")
    with pytest.raises(InputError, match=r"record\.json.*Delete"):
        run_both(tmp_path / "run", source)


def test_only_what_changes_a_result_is_part_of_a_stages_identity(training):
    before = describe(training)
    assert before["learning_rate"] == 1e-3
    training.logging_steps, training.output_dir, training.save_total_limit = 7, "/elsewhere", 9
    assert describe(training) == before
    assert not any("token" in name and "hub" in name for name in before)
    training.weight_decay = 0.5
    assert differences(before, describe(training)) == ["weight_decay changed from 0.01 to 0.5"]
    json.dumps(before)


def test_what_redoes_nothing_is_named_exactly(training):
    """A prefix would take fields along that it was not written for."""
    assert {field.name for field in fields(training)} >= NOT_IN_RESULT


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataloader_drop_last", True),  # fewer examples an epoch
        ("dataloader_num_workers", 2),  # each draws augmentations of its own
        ("dataloader_persistent_workers", True),
        ("save_strategy", "steps"),  # other checkpoints to take the best of
        ("save_steps", 7),
        ("ddp_broadcast_buffers", True),
    ],
)
def test_settings_of_the_loader_and_of_checkpoints_that_change_a_result_redo_its_stage(name, value, training):
    before = describe(training)
    assert before[name] != value
    setattr(training, name, value)
    assert [difference.split()[0] for difference in differences(before, describe(training))] == [name]


def test_a_finished_run_ends_without_reading_its_data(tmp_path, source, capsys):
    from pipelines.core.config import DataConfig
    from pipelines.tasks.text_classification import TextClassification

    path = write_csv(tmp_path / "texts.csv", make_texts(30))

    def write(source: str, directory: Path, task) -> Outcome:
        (directory / "model.txt").write_text(task.splits["train"][0]["text"])
        return Outcome("transformers")

    for said in ("first: done", "first: finished already"):
        task = TextClassification(DataConfig(dataset=str(path)))
        run = Run(tmp_path / "run", task, seed=0)
        run.stage("first", write, str(source))
        run._lock.release()
        assert said in capsys.readouterr().out
    assert "data" not in vars(task)


def test_data_that_cannot_be_read_leaves_no_directory(tmp_path):
    from pipelines.core.config import DataConfig
    from pipelines.tasks.text_classification import TextClassification

    (tmp_path / "texts.csv").write_text("text,label\n")
    with pytest.raises(InputError, match="expected"):
        Run(tmp_path / "run", TextClassification(DataConfig(dataset=str(tmp_path / "texts.csv"))), seed=0)
    assert not (tmp_path / "run").exists()


def test_a_teacher_depends_on_its_own_epochs_and_learning_rate(tmp_path):
    from pipelines.training.arguments import TrainingArguments, arguments_for

    one, other = (TrainingArguments(output_dir=str(tmp_path), num_train_epochs=n, learning_rate=n / 10) for n in (1, 2))
    assert describe(one) != describe(other)
    assert describe(arguments_for(one, 1e-3, 3)) == describe(arguments_for(other, 1e-3, 3))


def test_what_is_beside_a_model_is_copied_without_its_weights(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for directory in (source, target):
        directory.mkdir()
    for name in (
        "model.onnx",
        "model.onnx.data",
        "pytorch_model.bin",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        RECORD,
    ):
        (source / name).touch()
    copy_beside(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "tokenizer.json"]
