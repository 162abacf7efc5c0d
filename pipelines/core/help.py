"""The help of a command within a second: importing transformers and torch, whose flags it lists too, takes several."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

OURS = Path(__file__).parents[1] / "training" / "trainer.py"


def print_help(kinds: list[Any], **parser_arguments: Any) -> None:
    """Print what HfArgumentParser(kinds, …) prints as help; it is loaded by itself, without the package around it."""
    spec = importlib.util.spec_from_file_location("hf_argparser", _transformers() / "hf_argparser.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.HfArgumentParser(kinds, **parser_arguments).print_help()


def training_flags() -> type:
    """A dataclass with the names, types, defaults and help texts of our TrainingArguments, read from the source of both classes."""
    fields = _fields(_transformers() / "training_args.py") | _fields(OURS)
    return dataclasses.make_dataclass("TrainingArguments", fields.values())


def _transformers() -> Path:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _fields(source: Path) -> dict[str, tuple[str, Any, Any]]:
    """The fields of the class TrainingArguments in a source file, by name, as make_dataclass takes them."""
    classes = (node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    body = next(node for node in classes if node.name == "TrainingArguments").body
    fields = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            settings = {str(keyword.arg): _literal(keyword.value) for keyword in node.value.keywords}
            # A default that is computed, or a type that is a class of transformers' own, shows as text.
            settings["default"] = settings.get("default")
            settings.pop("default_factory", None)
            name = node.target.id
            fields[name] = (name, _type(ast.unparse(node.annotation)), dataclasses.field(**settings))
    return fields


def _literal(node: ast.expr) -> Any:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return None if isinstance(value, (list, dict)) and not value else value


def _type(annotation: str) -> Any:
    names = {"str": str, "int": int, "float": float, "bool": bool}
    known = [names[part] for part in annotation.split(" | ") if part in names]
    kind = known[-1] if known else str
    return kind | None if "None" in annotation else kind
