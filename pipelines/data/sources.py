"""Whether a directory or a Hub id holds a whole model, told without running anybody's code: no pickle, no adapter, no half a download."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipelines.core.errors import InputError
from pipelines.core.sources import PICKLE_SUFFIXES, folders_below, resolve

READ_AS_TEXT = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


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
    check_config(path)
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        check_safetensors(single)
    elif index.is_file():
        _check_shards(index)
    else:
        _raise_no_weights(path)


def check_config(path: Path) -> None:
    """Raise InputError where `path` is not a directory with the config of a model in floating point."""
    if not path.is_dir():
        raise InputError(
            f"expected a model directory, found {'a file' if path.exists() else 'nothing'} at {path}; give the folder "
            "that holds config.json and model.safetensors"
        )
    if (path / "adapter_config.json").exists():
        _raise_adapter(path)
    small = (path / name for name in READ_AS_TEXT if (path / name).is_file() and (path / name).stat().st_size < 200)
    if pointers := [file.name for file in small if file.read_bytes().startswith(b"version https://git-lfs")]:
        raise InputError(
            f"expected the files of a model in {path}, found pointers of Git LFS in place of {', '.join(pointers)}; run 'git lfs pull' there, "
            "or download them"
        )
    config = _read_json_object(path / "config.json", "transformers configuration", path)
    if isinstance(quantization := config.get("quantization_config"), dict):
        raise InputError(
            f"expected a model in float32, bfloat16 or float16 in {path}, found weights quantized by {quantization.get('quant_method')}; give "
            "the model that was quantized, or load this one with that library, call dequantize() and save_pretrained(folder), then give that "
            "folder"
        )
    for name, rows in (("id2label", dict.keys), ("label2id", dict.values)):
        labels = config.get(name) or {}
        if not isinstance(labels, dict) or not all(str(row).isdecimal() for row in rows(labels)):
            raise InputError(
                f"expected {name} in {path}/config.json to have a row of the head (0, 1, ...) for every label, found {labels!s:.200}. Correct "
                "it, or leave id2label and label2id out of the file."
            )


def _read_json_object(file: Path, meaning: str, directory: Path) -> dict[str, object]:
    if not file.is_file():
        held = ", ".join(sorted(entry.name for entry in directory.iterdir())[:20]) or "nothing"
        raise InputError(
            f"expected a {meaning} in {file}, found no such file (the folder holds: {held}); give "
            + (
                folders_below(directory, file.name)
                or "a directory written by save_pretrained, which a GGUF or ONNX file alone is not"
            )
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
    held = ", ".join(sorted(file.name for file in path.iterdir())[:20])
    raise InputError(
        f"expected weights (model.safetensors, or model.safetensors.index.json with its shards) in {path}, found none; download "
        f"the weights as well, or give a directory written by save_pretrained (this folder holds: {held})"
    )


def check_onnx_directory(path: Path) -> None:
    """Raise InputError where `path` does not hold model.onnx, or one that does not parse."""
    import onnx

    file = path / "model.onnx"
    try:
        nodes = onnx.load(file, load_external_data=False).graph.node
        found = "" if nodes else "a damaged file (no operators in it)"
    except FileNotFoundError:
        found = "no such file"
    except Exception as error:  # protobuf's own, which is of another class in each of its implementations
        found = f"a damaged file ({type(error).__name__}: {str(error):.200})"
    if found:
        raise InputError(
            f"expected an ONNX graph in {file}, as the stages export and quantize write it, found {found}. Export the model again, or copy "
            "the file again."
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
    present = [shard for shard in shards if (index.parent / shard).is_file()]
    held: set[str] = set().union(*(check_safetensors(index.parent / shard) for shard in present))
    if lost := sorted(set(weight_map) - held):
        raise InputError(
            f"expected the {len(weight_map)} tensors of {index} in its {len(shards)} shards, found {len(present)} shards and {len(lost)} "
            f"tensors missing, such as {lost[0]!r} of {weight_map[lost[0]]}; download all shards of the model together"
        )


def model_license(source: str) -> str | list[str] | None:
    """The licence, or several, that the model card beside the weights, or on the Hub, names; None where none is to be had."""
    from huggingface_hub import ModelCard

    resolved = resolve(source)
    card = Path(resolved) / "README.md" if os.path.isabs(resolved) else resolved
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.license
    except Exception:  # a card is a courtesy: whatever is wrong with it, the model can be used
        return None
    if isinstance(found, list):
        return [str(one) for one in found] or None
    return found if isinstance(found, str) else None
