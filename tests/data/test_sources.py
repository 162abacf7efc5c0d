"""Sources: what a name means, and which model directories are refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from conftest import tiny_model
from pipelines.core.errors import InputError
from pipelines.core.sources import model_fingerprint, resolve
from pipelines.data.sources import check_model_directory


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package that must not be imported: doing so raises."""
    root = tmp_path / "site" / "poisoned_package"
    (root / "data").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / "data" / "texts.csv").write_text("text,label\n")
    (root.parent / "lonely_module.py").write_text("")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (directory / "tokenizer.json").write_text("{}")
    save_file({"weight": np.ones((64, 64), np.float32)}, directory / "model.safetensors")
    return directory


def shard(model: Path) -> None:
    """Turn the model's one weight file into two shards with an index."""
    (model / "model.safetensors").unlink()
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for tensor, file in names.items():
        save_file({tensor: np.ones(8, np.float32)}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_package_files_are_found_without_importing_the_package(package: Path) -> None:
    assert resolve("package://poisoned_package/data/texts.csv") == str(package / "data" / "texts.csv")
    assert resolve("package://poisoned_package/data") == str(package / "data")
    assert "poisoned_package" not in sys.modules


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("package://poisoned_package/../secret", "leads out of it"),
        ("package://poisoned_package/link", "leads out of it"),
        ("package://poisoned_package/missing.csv", "no such file"),
        ("package://no_such_package_here/data", "pip install"),
        ("package://poisoned-package/data", "underscores"),
        ("package://poisoned_package.data/texts.csv", "no dots"),
        ("package://lonely_module/data", "no such package"),
        ("package://", "top-level name"),
    ],
)
def test_package_sources_that_are_refused(package: Path, source: str, expected: str) -> None:
    (package.parent / "secret").write_text("outside")
    (package / "link").symlink_to(package.parent / "secret")
    with pytest.raises(InputError, match=expected) as error:
        resolve(source)
    assert "expected" in str(error.value)
    assert "found" in str(error.value)
    assert "poisoned_package" not in sys.modules


def test_existing_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts.csv").write_text("text,label\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = os.path.abspath("texts.csv")
    assert [resolve(source) for source in ("texts.csv", "./texts.csv", "~/texts.csv", expected)] == [expected] * 4


@pytest.mark.parametrize(
    "name", ["bert-base-uncased", "glue", "nyu-mll/glue", "Qwen/Qwen2.5-0.5B", "google/bert_uncased_L-2"]
)
def test_hub_ids_stay_as_they_are(name: str) -> None:
    assert resolve(name) == name


@pytest.mark.parametrize(
    "source",
    [
        "",
        "texts.csv",
        "data/texts.jsonl",
        "/no/such/folder",
        "./glue",
        "~/glue",
        "~nobody/glue",
        "a/b/c",
        "two words",
        "https://example.org/texts",
        "x" * 5000,
        "data/",
    ],
)
def test_a_missing_path_is_not_taken_for_a_hub_id(source: str) -> None:
    with pytest.raises(InputError, match=r"(?s)expected an existing file.*found.*check the spelling"):
        resolve(source)


def test_whole_model_directories_pass(model: Path) -> None:
    check_model_directory(model)
    shard(model)
    check_model_directory(model)


def test_model_directories_that_are_refused(model: Path) -> None:
    config, weights = model / "config.json", model / "model.safetensors"
    whole = weights.read_bytes()

    def refused(message: str, directory: Path = model) -> None:
        with pytest.raises(InputError, match=f"(?s)^expected.*{message}"):
            check_model_directory(directory)

    refused("nothing at.*; give", model / "missing")
    refused("a file at", config)

    for content in (whole[:-100], whole[:20], whole + b"more", b"", b"version https://git-lfs.github.com/spec/v1\n"):
        weights.write_bytes(content)
        refused("truncated or corrupt.*; copy or download")
    save_file({}, weights)
    refused("without a tensor")

    weights.unlink()
    refused("found none; download")
    (model / "pytorch_model.bin").write_bytes(b"")
    refused("only pytorch_model.bin; loading a pickle runs.*save_pretrained")
    weights.write_bytes(whole)
    check_model_directory(model)

    for content in (b"", b"[1]", b"\xff"):
        config.write_bytes(content)
        refused("something else.*; copy or download")
    config.unlink()
    refused("model.safetensors, pytorch_model.bin, tokenizer.json.*; give")


def test_shards_that_are_refused(model: Path) -> None:
    shard(model)
    second = model / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-4])
    with pytest.raises(InputError, match="00002.*truncated or corrupt"):
        check_model_directory(model)
    save_file({"c": np.ones(8, np.float32)}, second)
    with pytest.raises(InputError, match="1 tensors missing, such as 'b' of model-00002.*download all"):
        check_model_directory(model)
    second.unlink()
    with pytest.raises(
        InputError, match="found 1 shards.*such as 'b' of model-00002-of-00002.safetensors; download all"
    ):
        check_model_directory(model)
    (model / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="'weight_map'"):
        check_model_directory(model)


def test_fingerprint_follows_the_model_files_only(model: Path) -> None:
    first = model_fingerprint(str(model))
    (model / "record.json").write_text("{}")
    (model / "README.md").write_text("a model")
    (model / "training_args.bin").write_bytes(b"")
    moved = model.rename(model.with_name("moved"))
    assert model_fingerprint(str(moved)) == first

    prints = {first}
    (moved / "1_Pooling").mkdir()
    # An embedder is what its modules.json names, too.
    of_modules = [("modules.json", "[]"), ("1_Pooling/config.json", "{}"), ("1_Pooling/config.json", "{ }")]
    for name, content in [("tokenizer.json", "{ }"), ("vocab.txt", "a"), ("config.json", "{}"), *of_modules]:
        (moved / name).write_text(content)
        prints.add(model_fingerprint(str(moved)))
    save_file({"weight": np.zeros((64, 64), np.float32)}, moved / "model.safetensors")
    prints.add(model_fingerprint(str(moved)))
    assert len(prints) == 8


def test_fingerprint_needs_model_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected model files.*found none; give"):
        model_fingerprint(str(tmp_path))


def test_hub_fingerprint_offline_is_the_cached_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--small-bert"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_fingerprint("someone/small-bert") == commit
    with pytest.raises(InputError, match="expected the Hub model 'someone/other'.*found neither.*HF_TOKEN"):
        model_fingerprint("someone/other")


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert"])
def test_weights_without_their_tokenizer_are_refused(tmp_path, model_type, task):
    tiny_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected a tokenizer beside the model"):
        task.load_processor(str(tmp_path))


def test_the_licence_is_that_of_the_model_card(tmp_path):
    from pipelines.data.sources import model_license

    assert model_license(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert model_license(str(tmp_path)) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [mit, apache-2.0]\n---\n")
    assert model_license(str(tmp_path)) == ["mit", "apache-2.0"]
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert model_license(str(tmp_path)) is None
