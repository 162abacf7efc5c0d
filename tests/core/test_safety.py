"""What comes from elsewhere runs no code, leaves no root, fills no memory, and carries no secret on."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import shutil
import signal
import sys
import tracemalloc
from dataclasses import fields
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import make_texts, tiny_model, write_csv
from pipelines.cli import main
from pipelines.core.command import parse_config, run_main
from pipelines.core.config import (
    AugmentConfig,
    DataConfig,
    DistillConfig,
    LanguageConfig,
    PruneConfig,
    QuantizeConfig,
    ReportConfig,
    StudentConfig,
    TeacherConfig,
)
from pipelines.core.errors import InputError
from pipelines.core.identity import describe
from pipelines.core.records import RECORD, read_record
from pipelines.core.sources import model_fingerprint, resolve
from pipelines.data.examples import load_examples
from pipelines.data.images import MOST_PIXELS, read_image
from pipelines.data.references import read_classes
from pipelines.data.sources import check_model, check_model_directory
from pipelines.data.text import TEXTS, tokenize
from pipelines.models.removal import load_model
from pipelines.tasks.image_classification import ImageClassification
from pipelines.tasks.text_classification import TextClassification
from pipelines.tasks.text_generation.task import LanguageModeling
from pipelines.training.arguments import TrainingArguments
from pipelines.training.distill import distill_student
from pipelines.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]


# ---- Weights: safetensors only


class Poison:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def pickled(tmp_path, tokenizer):
    """A model directory whose only weights are a poisoned pickle, and the mark that unpickling it leaves."""
    directory = tmp_path / "pickled"
    tiny_model().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Poison(tmp_path / "mark")))
    return directory, tmp_path / "mark"


def test_a_pickle_is_refused_on_every_road(pickled, teacher, task, training, language_task, image_task, tmp_path):
    directory, mark = pickled
    roads = {
        "teacher": lambda: task.load_model(str(directory)),
        "teacher with a new head": lambda: task.load_model(str(directory), "new if other"),
        "student": lambda: distill_student(
            str(teacher),
            tmp_path / "student",
            task,
            StudentConfig(student_model=str(directory)),
            DistillConfig(),
            training,
        ),
        "image model": lambda: image_task.load_model(str(directory)),
        "language model": lambda: language_task.load_model(str(directory)),
        "export, verify, benchmark, report": lambda: load_model(directory),
    }
    for road, load in roads.items():
        with pytest.raises(InputError, match=r"pytorch_model\.bin.*save_pretrained"):
            load()
        assert not mark.exists(), road


def test_a_pickle_beside_safetensors_is_never_read(teacher, task, tmp_path, tokenizer):
    directory = tmp_path / "both"
    tiny_model().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Poison(tmp_path / "mark")))
    task.load_model(str(directory))
    assert not (tmp_path / "mark").exists()


def cache_as_hub_model(cache: Path, directory: Path) -> str:
    """Lay a model directory out as the Hub's cache does; the id under which it is then found without a network."""
    commit = "0" * 40
    snapshot = cache / "models--somebody--model" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    directory.rename(snapshot)
    (cache / "models--somebody--model" / "refs").mkdir()
    (cache / "models--somebody--model" / "refs" / "main").write_text(commit)
    return "somebody/model"


def test_a_hub_model_of_a_pickle_is_refused(pickled, task, tmp_path, monkeypatch):
    """Through the Hub's own cache."""
    directory, mark = pickled
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    name = cache_as_hub_model(tmp_path / "cache", directory)
    assert task.load_config(name).num_labels == 3
    with pytest.raises(InputError, match=f"expected a model's weights at {name}"):
        task.load_model(name)
    assert not mark.exists()


def test_an_adapter_is_refused_before_it_leads_to_another_base(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    for check in (lambda: check_model_directory(tmp_path), lambda: check_model(str(tmp_path))):
        with pytest.raises(InputError, match="found an adapter.*merge_and_unload"):
            check()


def test_shards_outside_the_directory_are_refused(tmp_path):
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(InputError, match="leads elsewhere"):
            check_model_directory(model)


# ---- Code that a model brings

OWN_CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import BertConfig, BertForSequenceClassification
class OwnConfig(BertConfig):
    model_type = "own"
class OwnForSequenceClassification(BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.fixture
def with_own_code(tmp_path, trained_teacher):
    """A model directory with code of its own, and the mark that running it leaves."""
    directory = shutil.copytree(trained_teacher, tmp_path / "own_model")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForSequenceClassification"]}
    names = {"AutoConfig": "OwnConfig", "AutoModelForSequenceClassification": "OwnForSequenceClassification"}
    config["auto_map"] = {auto: f"code.{own}" for auto, own in names.items()}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "code.py").write_text(OWN_CODE.format(mark=str(tmp_path / "mark")))
    return directory, tmp_path / "mark"


def test_code_of_a_models_own_is_not_run_unless_it_is_trusted(with_own_code, csv_file, task, monkeypatch, tmp_path):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    directory, mark = with_own_code
    for load in (task.load_model, task.load_config, load_model):
        with pytest.raises(InputError, match="--trust_remote_code true"):
            load(str(directory))
    assert not mark.exists()
    before = model_fingerprint(str(directory))

    trusting = TextClassification(DataConfig(dataset=str(csv_file), max_length=32, trust_remote_code=True))
    assert type(trusting.load_model(str(directory))).__name__ == "OwnForSequenceClassification"
    assert mark.exists()
    assert type(load_model(directory, trust_remote_code=True)).__name__ == "OwnForSequenceClassification"
    assert trusting.describe()["trust_remote_code"] is True
    assert "trust_remote_code" not in task.describe()
    (directory / "code.py").write_text(OWN_CODE.format(mark="elsewhere"))
    assert model_fingerprint(str(directory)) != before  # other code is another model


@pytest.fixture
def stage(monkeypatch, capsys, csv_file):
    """A single stage of `python -m pipelines`, in this process: its exit status and what it said of errors."""

    def run(name: str, *flags: str) -> tuple[int, str]:
        argv = ["pipelines", name, "--dataset", str(csv_file), "--max_length", "32", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            run_main(main)
        except SystemExit as exit_:
            return int(exit_.code or 0), capsys.readouterr().err
        return 0, ""

    return run


@pytest.mark.parametrize("name", ["export", "quantize", "bundle", "verify", "benchmark", "distill", "prune"])
def test_no_single_stage_runs_a_pickle_or_code_of_a_models_own(
    name, stage, pickled, with_own_code, teacher, text_onnx, tmp_path
):
    output = ["--output_dir", str(tmp_path / "made")]
    others = {
        "benchmark": lambda model: ["--models", str(model)],
        "verify": lambda model: ["--model", str(text_onnx / "onnx"), "--reference", str(model)],
        "distill": lambda model: ["--teacher_model", str(model), "--use_cpu", "true", *output],
        "prune": lambda model: ["--model", str(model), "--teacher_model", str(teacher), "--use_cpu", "true", *output],
    }
    flags = others.get(name, lambda model: ["--model", str(model), *output])
    reads_graphs = name in ("quantize", "bundle")
    if reads_graphs:
        # The config beside a graph may name code, too.
        shutil.copyfile(text_onnx / "onnx" / "model.onnx", with_own_code[0] / "model.onnx")
    named = {"pickled": "model.onnx" if reads_graphs else "pytorch_model.bin", "own_model": "--trust_remote_code true"}
    # Timing starts a process that imports torch, so once is enough; that it refuses a pickle is tried above.
    for directory, mark in (with_own_code,) if name == "benchmark" else (pickled, with_own_code):
        status, errors = stage(name, *flags(directory))
        assert status == 1
        assert len([line for line in errors.splitlines() if line.startswith("error: ")]) == 1
        assert named[directory.name] in errors
        assert not mark.exists()
        assert not (tmp_path / "made").exists()


def test_the_record_of_a_stage_says_that_code_was_trusted(stage, with_own_code, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    directory, mark = with_own_code
    flags = ["--teacher_model", str(directory), "--teacher_epochs", "0", "--output_dir", str(tmp_path / "teacher")]
    assert stage("fine-tune", *flags, "--use_cpu", "true", "--trust_remote_code", "true") == (0, "")
    assert mark.exists()
    assert read_record(tmp_path / "teacher")["made_by"]["task"]["trust_remote_code"] is True


def test_trusting_is_a_flag_that_the_report_records():
    settings = parse_config([DataConfig], argv=["--trust_remote_code", "true"])
    assert settings.data.trust_remote_code
    assert settings.given == {"trust_remote_code": True}


# ---- Paths


@pytest.mark.parametrize(
    "inside",
    [
        "../secret",
        "data/../../secret",
        "/etc/passwd",
        "//etc/passwd",
        "data/link/secret",
        "\0",
        "a" * 5000,
        "data/\0",
        "..",
        "~",
        "%2e%2e/secret",
        "data\\..\\..\\secret",
    ],
)
def test_a_package_path_never_leaves_its_package(inside, tmp_path, monkeypatch):
    root = tmp_path / "site" / "somebodys_package"
    (root / "data").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root.parent / "secret").write_text("outside")
    (root / "data" / "link").symlink_to(root.parent)
    monkeypatch.syspath_prepend(str(root.parent))
    with pytest.raises(InputError, match=r"leads out of it|no such file"):
        resolve(f"package://somebodys_package/{inside}")


# ---- Data that fills memory


def long_csv(tmp_path, last: str) -> Path:
    path = write_csv(tmp_path / "texts.csv", make_texts(40))
    with path.open("a") as file:
        file.write(last)
    return path


def load_classification(config: DataConfig):
    return load_examples(config, TEXTS, read_classes)


def load_language(config: DataConfig) -> LanguageModeling:
    """A task whose data is loaded."""
    task = LanguageModeling(config, LanguageConfig(vocabulary_size=300))
    assert task.splits
    return task


def test_a_line_of_a_million_characters_is_a_text(tmp_path, tokenizer, language_model_dir):
    path = long_csv(tmp_path, "goal " * 200_000 + ",sport\n")
    data = load_classification(DataConfig(dataset=str(path)))
    assert max(len(text) for split in data.splits.values() for text in split["text"]) == 1_000_000
    assert max(length for split in tokenize(data, tokenizer, 16).values() for length in split["length"]) == 16

    (tmp_path / "texts.txt").write_text("".join(f"{text}\n\n" for text, _ in make_texts(40)) + "goal" * 250_000)
    for name in ("texts.csv", "texts.txt"):
        task = load_language(DataConfig(dataset=str(tmp_path / name), max_length=64, test_size=0.3))
        assert sum(task.data.text_bytes.values()) > 1_000_000
        windows = task.features(task.load_processor(str(language_model_dir)))
        assert {length for split in windows.values() for length in split["length"]} == {64}


def test_nul_bytes_and_unpaired_surrogates(tmp_path, tokenizer, language_model_dir):
    """What is no text is refused; a NUL character is one, which the tokenizer drops."""
    rows = make_texts(40)
    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    for name, content in {
        "nul.jsonl": lines + '{"text": "goal \\u0000 match", "label": "sport"}\n',
        "nul.csv": "text,label\n" + "".join(f"{text},{label}\n" for text, label in [*rows, ("goal \0 match", "sport")]),
    }.items():
        (tmp_path / name).write_text(content)
        data = load_classification(DataConfig(dataset=str(tmp_path / name)))
        assert sum("\0" in text for split in data.splits.values() for text in split["text"]) == 1
        tokenize(data, tokenizer, 16)
        task = load_language(DataConfig(dataset=str(tmp_path / name), max_length=16))
        assert sum("\0" in text for split in task.data.splits.values() for text in split["text"]) == 1
        task.features(task.load_processor(str(language_model_dir)))
    surrogate = "goal \ud800 match".encode("utf-8", "surrogatepass")
    refused = {
        "surrogate.csv": b"text,label\n"
        + b"".join(f"{text},{label}\n".encode() for text, label in rows)
        + surrogate
        + b",sport\n",
    }
    import pyarrow
    import pyarrow.parquet

    binary = pyarrow.array([text.encode() for text, _ in rows] + [surrogate], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), len(binary), binary.buffers())
    labels = pyarrow.array([label for _, label in rows] + ["sport"])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), tmp_path / "surrogate.parquet")
    for name, content in refused.items():
        (tmp_path / name).write_bytes(content)
    for name in (*refused, "surrogate.parquet"):
        for load in (load_classification, load_language):
            with pytest.raises(InputError, match=f"well-formed .*{name}"):
                load(DataConfig(dataset=str(tmp_path / name)))
    (tmp_path / "texts.txt").write_bytes(b"goal \0 match")
    with pytest.raises(InputError, match=r"expected text files.*found other bytes in .*texts\.txt"):
        load_language(DataConfig(dataset=str(tmp_path / "texts.txt")))


def test_an_image_of_a_hundred_megapixels_is_refused_before_it_is_decoded(tmp_path, image_folder):
    from PIL import Image

    for label in ("left", "right"):
        (tmp_path / label).mkdir()
        for index in range(8):
            pixels = np.full((4, 4, 3), 10 * index + (100 if label == "left" else 0), np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{index}.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "left" / "huge.png")
    assert MOST_PIXELS < 100_000_000
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"at most 64 million pixels, in every row.*huge\.png"):
            assert ImageClassification(DataConfig(dataset=str(tmp_path))).splits
        with pytest.raises(InputError, match="10000 x 10000 pixels, more than 64 million"):
            read_image({"bytes": None, "path": str(tmp_path / "left" / "huge.png")})
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


# ---- Secrets

TOKEN = "hf_" + "a1B2c3D4" * 5


def test_a_token_reaches_no_file_and_no_output(pretrained, csv_file, tmp_path, monkeypatch, capfd):
    """A recipe of a user who is logged in and passes a token, killed in training: neither the checkpoints nor the output have it."""
    save = Trainer._save_checkpoint

    def save_and_die(self, *arguments):
        save(self, *arguments)
        raise KeyboardInterrupt

    recipe = REPOSITORY / "recipes" / "distill_bert.py"
    argv = [str(recipe), "--teacher_model", str(pretrained), "--dataset", str(csv_file), "--hub_token", TOKEN]
    argv += ["--output_dir", str(tmp_path / "run"), "--teacher_epochs", "1", "--max_length", "16", "--use_cpu", "true"]
    argv += ["--student_layers", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(Trainer, "_save_checkpoint", save_and_die)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(recipe), run_name="__main__")
    assert ended.value.code == 130
    assert TOKEN not in "".join(capfd.readouterr())
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_a_token_is_in_no_record_and_in_no_list_of_flags(tmp_path):
    argv = ["--hub_token", TOKEN, "--output_dir", str(tmp_path), "--weight_decay", "0.3"]
    file = tmp_path / "run.yaml"
    file.write_text(f"hub_token: {TOKEN}\nweight_decay: 0.3\noutput_dir: {tmp_path}\n")
    for given_as in (argv, ["--config", str(file)]):
        read = parse_config([TrainingArguments], argv=given_as)
        assert read.training.hub_token == TOKEN
        assert TOKEN not in json.dumps([read.given, describe(read.training)], default=str)


# ---- Anything at all

FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
SECONDS = 10  # that one input may take; a call is ended then, where a deadline of hypothesis would wait for its end
KINDS = [
    DataConfig,
    AugmentConfig,
    LanguageConfig,
    TeacherConfig,
    StudentConfig,
    DistillConfig,
    PruneConfig,
    QuantizeConfig,
    ReportConfig,
    TrainingArguments,
]
FLAGS = sorted({flag.name for kind in KINDS for flag in fields(kind) if flag.init})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["stored", "3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def refused_or_read(call) -> None:
    """The only two ends that bad input may have; anything else is raised."""
    message = "expected, found"
    environment = dict(os.environ)
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"not done after {SECONDS} seconds"))
    signal.alarm(SECONDS)
    try:
        call()
    except InputError as error:
        message = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        # Training arguments leave switches for accelerate there, as soon as they are made.
        os.environ.clear()
        os.environ.update(environment)
    assert "expected" in message
    assert "found" in message


@settings(FUZZ, max_examples=100)
@given(content=st.dictionaries(st.sampled_from(FLAGS) | st.text(max_size=6), VALUES, max_size=4))
def test_any_settings_are_read_or_refused(content, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    refused_or_read(lambda: parse_config(KINDS, argv=["--config", str(file)]))


@FUZZ
@given(content=st.binary(max_size=60) | st.text(alphabet="ab:-[]{}&*!|>%@`'\"#? \n\t01.", max_size=60).map(str.encode))
def test_any_bytes_as_settings_are_read_or_refused(content, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    refused_or_read(lambda: parse_config(KINDS, argv=["--config", str(file)]))


@pytest.mark.parametrize(
    "content",
    [
        "a: &a [x, x]\nstudent_layers: [*a, *a]",
        "temperature: 2001-99-99",
        "[" * 3000,
        "temperature: !!python/none",
        "accelerator_config: -0.5",
        "accelerator_config: {a: 1}",
        "logging_steps: '1e400'",
        "deepspeed: a",
        "lr_scheduler_type: stored",
        "? [a]\n: b",
        "hidden_state_map: '%s %(prog)s'",
        "\ud800",
        "dataset: 'a\\0b'",
    ],
)
def test_settings_that_readers_stumble_over(content, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    refused_or_read(lambda: parse_config(KINDS, argv=["--config", str(file)]))


@settings(FUZZ, max_examples=25)
@given(
    rows=st.lists(st.tuples(st.text(max_size=12), st.sampled_from(["a", "b", "", "1", "-1", "NaN"])), max_size=30),
    raw=st.binary(max_size=40),
)
def test_any_table_is_read_or_refused(rows, raw, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    table = tmp_path / "table.csv"
    lines = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
    table.write_bytes(lines.encode("utf-8", "surrogatepass") + raw)
    refused_or_read(lambda: load_classification(DataConfig(dataset=str(table))))


@FUZZ
@given(
    content=st.binary(max_size=80)
    | st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["stage", "made_by", "files", "metrics", "bytes", "format", "seconds"]), inner
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_record_is_read_or_refused(content, tmp_path):
    (tmp_path / RECORD).write_bytes(content)
    refused_or_read(lambda: read_record(tmp_path))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"stage": ' * 50_000, "1" * 5000, "", "null", "NaN"])
def test_records_that_readers_stumble_over(content, tmp_path):
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(InputError, match=r"record\.json"):
        read_record(tmp_path)
