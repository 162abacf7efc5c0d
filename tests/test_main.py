"""The front door: every verb of the command alone, on directories that no recipe made, and the same as functions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pipelines
from conftest import make_texts
from pipelines.cli import main
from pipelines.core.command import run_main
from pipelines.core.errors import InputError
from pipelines.verbs import VERBS

TRAIN = """
    --max_length 32 --num_train_epochs 2 --learning_rate 3e-3 --per_device_train_batch_size 8 --use_cpu
""".split()


@pytest.fixture
def stage(monkeypatch, capsys):
    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pipelines", *argv])
        status = 0
        try:
            run_main(main)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def record(directory: Path) -> dict:
    return json.loads((directory / "record.json").read_text())


@pytest.mark.usefixtures("timed_here")
def test_the_chain_stage_by_stage(stage, pretrained, csv_file, tmp_path, capsys):
    data = ["--dataset", str(csv_file), "--max_length", "32"]
    out = {name: str(tmp_path / name) for name in ("teacher", "student", "pruned", "onnx", "quantized")}

    def ok(*argv: str) -> str:
        status, output, errors = stage(*argv)
        assert status == 0, errors
        return output

    teacher = ["--teacher_model", str(pretrained), "--teacher_epochs", "6", "--teacher_learning_rate", "3e-3"]
    ok("fine-tune", *teacher, *data, *TRAIN, "--output_dir", out["teacher"])
    assert record(tmp_path / "teacher")["metrics"]["validation"]["accuracy"] > 0.7

    # Soft targets are stored by default: computed first where none are given.
    student = ["--teacher_model", out["teacher"], "--student_layers", "1", *data, *TRAIN]
    said = ok("distill", *student, "--output_dir", out["student"])
    assert "--soft_target_dir" in said
    assert "--soft_targets online" in said
    assert record(tmp_path / "student")["details"]["soft_targets"] == "stored"
    soft_targets = tmp_path / "student_soft_targets"
    assert record(soft_targets)["format"] == "soft targets"
    ok("soft-targets", "--teacher_model", out["teacher"], *data, "--output_dir", str(tmp_path / "soft_targets"))
    assert record(tmp_path / "soft_targets")["files"] == record(soft_targets)["files"]

    given = ["--soft_target_dir", str(soft_targets)]
    prune = ["--model", out["student"], "--teacher_model", out["teacher"], "--prune_heads", "0.5", "--prune_steps", "1"]
    prune += ["--prune_epochs", "1", *given, *TRAIN, "--output_dir", out["pruned"]]
    for other, message in (
        (["--soft_target_dir", out["student"]], "none"),
        (["--split_seed", "1"], "data changed"),
        (["--teacher_model", str(pretrained)], "source changed"),
    ):
        status, _, errors = stage("prune", *prune, *data, *other)
        assert status == 1
        assert message in errors
    ok("prune", *prune, *data)
    assert record(tmp_path / "pruned")["details"]["heads_removed"] == 0.5
    assert not (tmp_path / "pruned_soft_targets").exists()

    ok("export", "--model", out["pruned"], *data, "--output_dir", out["onnx"])
    drop = ["--max_quality_drop", "0.2", *data]
    ok("quantize", "--model", out["onnx"], *drop, "--output_dir", out["quantized"])
    assert "largest_difference" in ok("verify", "--model", out["onnx"], "--reference", out["pruned"], *data)
    none = ["--quantization", "none", "--output_dir", out["quantized"]]
    status, _, errors = stage("quantize", "--model", out["onnx"], *data, *none)
    assert status == 1
    assert "ship the exported directory itself" in errors
    other = shutil.copytree(out["onnx"], tmp_path / "other")
    tokens = json.loads((other / "tokenizer.json").read_text())
    names = [name for name in tokens["model"]["vocab"] if not name.startswith("[")]
    tokens["model"]["vocab"] |= dict(
        zip(names, [tokens["model"]["vocab"][name] for name in reversed(names)], strict=True)
    )
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    status, _, errors = stage("verify", "--model", str(other), "--reference", out["pruned"], *data)
    assert status == 1
    assert "expected the tokenizer or image processor in" in errors
    verified = json.loads(ok("verify", "--model", out["quantized"], "--reference", out["onnx"], *drop))
    assert verified["quality_lost"] <= 0.2
    # As the stage itself found.
    found = record(tmp_path / "quantized")["details"]["verification"]
    assert {name: verified[name] for name in ("fp32", "quantized", "quality_lost")}.items() <= found.items()
    once = ["--benchmark_rounds", "1", "--benchmark_seconds", "0.1"]
    timed = ok("benchmark", "--models", out["pruned"], out["quantized"], *once, *data)
    assert len(json.loads(timed[timed.index("{") :])) == 2
    status, _, errors = stage("verify", "--model", out["onnx"], "--reference", out["teacher"], *data)
    assert status == 1
    assert "must not be used" in errors

    # The same as functions: a keyword for every flag, and what is finished is found.
    settings = {"dataset": str(csv_file), "max_length": 32}
    assert pipelines.export(out["pruned"], out["onnx"], **settings) == tmp_path / "onnx"
    assert capsys.readouterr().out.strip() == "onnx: finished already"
    pipelines.quantize(out["onnx"], tmp_path / "static", quantization="static_int8", max_quality_drop=0.5, **settings)
    verified = pipelines.verify(tmp_path / "static", out["onnx"], max_quality_drop=0.5, **settings)
    assert verified["quality_lost"] <= 0.5
    few = {"prune_steps": 1, "prune_epochs": 0.5, "use_cpu": True, "soft_targets": "online", **settings}
    pruned = pipelines.prune(Path(out["student"]), tmp_path / "again", teacher=out["teacher"], prune_heads=0.25, **few)
    assert record(pruned)["details"]["heads_removed"] == 0.25
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_lenght": 32}, r"found max_lenght\. Did you mean max_length"),
        ({"task": "text-classify"}, r"Did you mean text-classification"),
        ({"max_length": 1}, r"--max_length at least 2"),
        ({"max_length": 2}, r"--max_length above 2, the special tokens"),
    ],
)
def test_bad_keywords_are_bad_input(settings, message, teacher, csv_file, tmp_path):
    with pytest.raises(InputError, match=message):
        pipelines.export(teacher, tmp_path / "onnx", dataset=str(csv_file), **settings)


def test_importing_the_library_imports_nothing_else():
    code = "import sys, pipelines; print(sorted({'torch', 'numpy', 'transformers', 'yaml'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
    assert set(pipelines._PUBLIC) <= set(dir(pipelines))
    with pytest.raises(AttributeError, match="no attribute 'squash'"):
        pipelines.squash  # noqa: B018


def test_every_public_name_is_found():
    assert pipelines.DistillationTrainer.__name__ == "DistillationTrainer"
    assert all(callable(getattr(pipelines, name)) for name in ("prune", "export", "quantize", "verify"))


@pytest.mark.usefixtures("timed_here")
def test_the_chain_of_a_language_model_stage_by_stage(stage, language_shape, language_text, tmp_path):
    task = ["--task", "text-generation"]
    data = ["--dataset", str(language_text), "--max_length", "32", "--vocabulary_size", "300"]
    train = [*TRAIN, "--max_steps", "8"]
    out = {name: str(tmp_path / name) for name in ("teacher", "student", "pruned", "onnx", "quantized")}

    def ok(*argv: str) -> str:
        status, output, errors = stage(*argv, *data)
        assert status == 0, errors
        return output

    teacher = ["--teacher_model", str(language_shape), "--teacher_from_scratch", "--teacher_learning_rate", "5e-3"]
    ok("fine-tune", *task, *teacher, *train, "--max_steps", "30", "--output_dir", out["teacher"])
    student = ["--teacher_model", out["teacher"], "--student_layers", "2"]
    ok("distill", *task, *student, *train, "--output_dir", out["student"])
    assert record(tmp_path / "student")["details"]["soft_targets"] == "stored"
    prune = [
        "--model",
        out["student"],
        "--teacher_model",
        out["teacher"],
        "--prune_steps",
        "1",
        "--prune_samples",
        "16",
    ]
    # From here on the task is read from the model's config.json.
    ok("prune", *prune, *train, "--soft_targets", "online", "--output_dir", out["pruned"])
    ok("export", "--model", out["pruned"], "--output_dir", out["onnx"])
    blocks = ["--quantization", "int8_blocks", "--block_size", "16"]
    ok("quantize", "--model", out["onnx"], *blocks, "--output_dir", out["quantized"])
    assert '"prompts": 20' in ok("verify", "--model", out["onnx"], "--reference", out["pruned"])
    assert "perplexity" in ok("verify", "--model", out["quantized"], "--reference", out["onnx"])
    once = ["--benchmark_rounds", "1", "--benchmark_seconds", "0.1"]
    timed = ok("benchmark", *task, "--models", out["onnx"], out["quantized"], *once)
    assert all(timing["tokens_per_second"] > 0 for timing in json.loads(timed[timed.index("{") :]).values())
    status, _, errors = stage("verify", "--model", out["onnx"], "--reference", out["teacher"], *data)
    assert status == 1
    assert "must not be used" in errors


def test_a_stage_does_not_overwrite_what_it_did_not_write(stage, teacher, csv_file, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    argv = ["--model", str(teacher), "--dataset", str(csv_file), "--max_length", "32"]
    status, _, errors = stage("export", *argv, "--output_dir", str(tmp_path / "photos"))
    assert status == 1
    assert "something else" in errors
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_a_stage_does_not_take_the_place_of_another_or_of_its_source(stage, teacher, csv_file, tmp_path):
    data, onnx = ["--dataset", str(csv_file), "--max_length", "32"], str(tmp_path / "onnx")
    status, _, errors = stage("export", "--model", str(teacher), *data, "--output_dir", onnx)
    assert status == 0, errors
    before = (tmp_path / "onnx" / "model.onnx").read_bytes()
    for verb in ("quantize", "bundle"):
        status, _, errors = stage(verb, "--model", onnx, *data, "--output_dir", onnx)
        assert status == 1
        assert "found what another made there" in errors
    (tmp_path / "same").symlink_to(teacher)
    status, _, errors = stage("export", "--model", str(teacher), *data, "--output_dir", str(tmp_path / "same"))
    assert status == 1
    assert (tmp_path / "onnx" / "model.onnx").read_bytes() == before


def test_a_stage_is_written_to_where_a_link_leads(stage, teacher, csv_file, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    argv = ["--model", str(teacher), "--dataset", str(csv_file), "--max_length", "32"]
    status, _, errors = stage("export", *argv, "--output_dir", str(tmp_path / "link"))
    assert status == 0, errors
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped; the same command goes on"),
        (BrokenPipeError(), 1, "found that the reader of the output had closed it"),
    ],
)
def test_a_command_that_is_stopped_says_so_in_a_line(raised, status, said, capsys):
    def main() -> None:
        raise raised

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == status
    assert said in capsys.readouterr().err


def test_a_sign_that_the_output_cannot_show_is_shown_by_its_number():
    code = "from pipelines.core.command import run_main; run_main(lambda: print('m\\xfcll'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert shown.stdout == "m\\xfcll\n"


def test_help_lists_every_verb_without_importing_torch():
    code = "import sys; from pipelines.cli import main; sys.argv = ['pocketformers']; main(); assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    listed = [line.split()[0] for line in shown.splitlines() if line.startswith("    ")]
    assert sorted(listed) == sorted(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb(verb, stage):
    status, shown, _ = stage(verb, "--help")
    assert status == 0
    assert f"usage: pocketformers {verb}" in shown
    assert ("--num_train_epochs" in shown) == (verb in {"compress", "fit", "fine-tune", "distill", "prune"})
    assert ("--task" in shown) == (verb not in {"push", "doctor", "take"})


def test_an_unknown_verb_and_an_unknown_flag_have_status_2(stage):
    assert stage("squash")[0] == 2
    status, _, errors = stage("export", "--modle", "x")
    assert status == 2
    assert "unknown flags: --modle x. Did you mean --model?" in errors


@pytest.fixture
def compressed(monkeypatch):
    """What the chain would be run with."""
    found = []
    monkeypatch.setattr("pipelines.chain.compress", lambda settings, recipe: found.append((settings, recipe)))
    return found


def test_compress_has_the_flags_of_its_task_and_runs_its_demo(stage, compressed, tmp_path):
    assert stage("compress", "--demo")[0] == 0
    assert stage("compress", "--demo", "--task", "image-classification", "--random_flip")[0] == 0
    file = tmp_path / "mine.yaml"
    file.write_text("task: text-generation\ndataset: texts.txt\nvocabulary_size: 500\n")
    assert stage("compress", "--config", str(file))[0] == 0
    assert stage("compress", "--demo", "--task", "token-classification")[0] == 0
    (text, recipe), (image, _), (language, _), (made, _) = compressed
    assert recipe == "compress"
    assert (text.task.task, text.training.output_dir) == ("text-classification", "runs/bert_bbc_headlines")
    assert Path(image.teacher.teacher_model).is_dir()
    assert image.augment.random_flip
    assert (language.data.dataset, language.language.vocabulary_size) == ("texts.txt", 500)
    assert language.given == {"dataset": "texts.txt", "vocabulary_size": 500}
    assert made.token.made_texts  # which are its data: it names no data set


@pytest.mark.parametrize("verb", ["compress", "fit"])
def test_a_whole_chain_without_data_is_refused(verb, stage, tmp_path):
    status, _, errors = stage(verb, "--output_dir", str(tmp_path / "run"))
    assert status == 1
    assert "expected a data set, found none; pass --dataset" in errors
    assert not (tmp_path / "run").exists()


def test_a_wheel_has_what_a_clone_has(tmp_path):
    """All rooms, the demos' settings, and what is copied into a bundle."""
    import zipfile

    repository = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    for name in ("pipelines", "recipes"):
        shutil.copytree(repository / name, source / name)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(repository / name, source / name)
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        entry_points = opened.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "pocketformers = pipelines.cli:run" in entry_points
    expected = [path for path in (repository / "pipelines").rglob("*") if path.suffix in (".py", ".html", ".mjs")]
    assert {str(path.relative_to(repository)) for path in expected} <= names
    configs = repository / "recipes" / "configs"
    shipped = {f"pipelines/configs/{path.relative_to(configs)}" for path in configs.rglob("*") if path.is_file()}
    assert len(shipped) > 9
    assert shipped <= names
    assert {name.split("/")[0] for name in names} <= {"pipelines", wheel.name.split("-py3")[0] + ".dist-info"}


def test_the_verbs_that_learn_from_a_teacher_take_a_transfer_set(stage, trained_teacher, csv_file, tmp_path):
    """Its soft targets are beside the others, computed once, whoever asks for them first."""
    unlabelled = tmp_path / "unlabelled.csv"
    unlabelled.write_text("text\n" + "\n".join(text for text, _ in make_texts(30, seed=5)) + "\n")
    flags = ["--dataset", str(csv_file), "--max_length", "32", "--max_samples_per_class", "6"]
    flags += ["--teacher_model", str(trained_teacher), "--transfer_dataset", str(unlabelled)]
    targets, student, pruned = (str(tmp_path / name) for name in ("targets", "student", "pruned"))
    assert stage("soft-targets", *flags, "--output_dir", targets)[0] == 0
    stored = record(tmp_path / "targets_transfer")
    assert stored["details"]["examples"] == stored["details"]["transfer"]["rows_read"] == 30
    learn = [*flags, *TRAIN, "--soft_target_dir", targets, "--transfer_ratio", "1", "--max_quality_drop", "1"]
    status, said, errors = stage("distill", *learn, "--student_layers", "2", "--output_dir", student)
    assert status == 0, errors
    assert "targets_transfer: finished already" in said
    made = record(tmp_path / "student")
    assert made["made_by"]["transfer"]["transfer_ratio"] == 1
    assert made["details"]["examples_per_epoch"] == 36
    status, said, errors = stage("prune", "--model", student, *learn, "--prune_epochs", "1", "--output_dir", pruned)
    assert status == 0, errors
    assert record(tmp_path / "pruned")["details"]["steps"][0]["recovery"]["transfer"]["examples"] == 30
    # Another transfer set is another student.
    unlabelled.write_text(unlabelled.read_text() + "one more of the new\n")
    status, said, errors = stage("distill", *learn, "--student_layers", "2", "--output_dir", student)
    assert status == 0, errors
    assert "targets_transfer: redone, because transfer.examples changed" in said
    assert "student: redone, because transfer.examples changed" in said
    status, _, errors = stage("distill", *learn, "--soft_target_weight", "0", "--output_dir", student)
    assert status == 1
    assert "--soft_target_weight above 0 with --transfer_dataset" in errors


@pytest.mark.parametrize("name", ["export", "quantize", "prune", "benchmark", "report", "verify"])
def test_a_stage_without_its_input_says_what_is_missing(name, stage, csv_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", str(csv_file), "--max_length", "32"]
    status, _, errors = stage(name, *flags, *(["--use_cpu", "true"] if name == "prune" else []))
    assert status == 1
    assert "expected" in errors
