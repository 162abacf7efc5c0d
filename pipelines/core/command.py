"""A command: how its settings are read, from a --config YAML first, then from flags, and how an error ends it."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pipelines.core.config import (
    NOT_RECORDED,
    DataConfig,
    Settings,
    TransferConfig,
    did_you_mean,
    make_settings,
)
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.processes import exit_with, first_failure, lost_process

SWITCHES = {"on": "yes", "off": "no", "false": "no"}  # what YAML takes for yes and no, where a flag knows only these


def parse_config(
    kinds: Iterable[Any],
    default_config: Path | None = None,
    argv: list[str] | None = None,
    program: str | None = None,
    only: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """Read the dataclasses `kinds` from the YAML file named by `--config` (else `default_config`), then from the flags.

    The file is read as the flags that it stands for, before those of the command line. What `default_config` says of its own data set
    is left out where a flag names another one. Raises InputError for a file that is missing or
    malformed, an unknown key or a bad value in it; a bad flag exits with status 2 as argparse does. With `only` these few settings are
    looked up ahead of the others, whose flags and keys are left alone. Flags that are in `defaults` have these instead of their own.
    """
    kinds, argv = list(kinds), sys.argv[1:] if argv is None else argv
    parser = _make_parser(kinds, default_config, program, only)
    flags = {action.dest: action for action in reversed(parser._actions)}
    parser.set_defaults(**{flag: value for flag, value in (defaults or {}).items() if flag in flags})
    usual, (named, unknown) = vars(parser.parse_known_args([])[0]), parser.parse_known_args(argv)
    if unknown and not only:
        words = [word.partition("=")[0].replace("-", "_") for word in unknown if word.startswith("--")]
        hint = did_you_mean([f"--{word.strip('_')}" for word in words], [f"--{flag}" for flag in flags])
        parser.error(f"unknown flags: {' '.join(unknown)}.{hint}")
    in_file = [] if named.config is None else _read_file(Path(named.config), flags, only)
    other_data = getattr(named, "dataset", None) is not None and f"--dataset={named.dataset}" not in in_file
    if named.config is default_config and other_data:
        in_file = _without_data(in_file, kinds)
    parser.exit_on_error = False
    try:
        words = [*in_file, *argv]
        values = vars(parser.parse_known_args(words)[0])
        named_values = vars(parser.parse_known_args(words, argparse.Namespace(**dict.fromkeys(usual)))[0])
        settings = make_settings(kinds, values)
    except (argparse.ArgumentError, InputError) as error:
        # A bad value in the file is bad input, a bad flag is a usage error: which of the two it is shows when the file is read alone.
        _check_file(parser, kinds, in_file, f" (in {named.config})" if in_file else "")
        parser.error(str(error))
    changed = {flag: value for flag, value in values.items() if value != usual[flag]}
    settings.given = {flag: value for flag, value in changed.items() if not flag.startswith(NOT_RECORDED)}
    settings.named = {flag: value for flag, value in named_values.items() if value is not None}
    return settings


def _without_data(words: list[str], kinds: list[Any]) -> list[str]:
    """The words of a file without what they say of its data set."""
    names = [name for kind in kinds for name in getattr(kind, "OF_DATA", ())]
    names += [one.name for kind in (DataConfig, TransferConfig) for one in fields(kind)]
    of_data = tuple(f"--{name}=" for name in names)
    return [word for word in words if not word.startswith(of_data)]


def _check_file(parser: Any, kinds: list[Any], words: list[str], where: str) -> None:
    """Raise InputError where the words of a file alone are no settings."""
    try:
        make_settings(kinds, vars(parser.parse_known_args(words)[0]))
    except argparse.ArgumentError as error:
        raise InputError(f"expected flags that parse, found: {_with_hint(str(error))}{where}") from error
    except InputError as error:
        raise InputError(f"{error}{where}") from error


def _make_parser(kinds: list[Any], default_config: Path | None, program: str | None, only: bool) -> Any:
    from transformers import HfArgumentParser

    parser: Any = HfArgumentParser(
        kinds,
        prog=program,
        usage="%(prog)s [--config FILE.yaml] [--flag value …]; --help lists every flag",
        allow_abbrev=False,
        add_help=not only,
    )
    parser.error = partial(_refuse_flags, parser)
    if os.environ.get("RANK", "0") != "0":  # one of several processes prints the help
        parser.print_help = lambda: None
    of_file = "A YAML file of flags; those on the command line override it."
    parser.add_argument("--config", default=default_config, help=of_file)
    if "--debug" not in parser._option_string_actions:
        parser.add_argument("--debug")
    for action in parser._actions:
        if action.dest == "debug":  # ours without a value, transformers' with one, such as underflow_overflow
            action.nargs, action.help = "*", "Without a value: show the traceback of an error in the input."
        elif getattr(action.type, "__name__", "") == "string_to_bool":  # every switch can be given without a value
            action.nargs, action.const = "?", True
    return parser


def _with_hint(message: str) -> str:
    """What argparse says of a value that is none of the choices, with those that are close to it."""
    found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
    return message + (did_you_mean([found[1]], re.findall(r"[\w-]+", found[2])) if found else "")


class Loader(yaml.SafeLoader):
    """Knows that 1e-6 is a number, as YAML 1.2 does and 1.1 does not."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[\d.]+[eE][-+]?\d+$"), list("-+.0123456789"))


def _read_file(path: Path, flags: dict[str, argparse.Action], only: bool) -> list[str]:
    """The YAML file at `path` as words of a command line.

    A value is the text that stands there, since the flag knows its type: `no`, `3:6` and `010` are other things to YAML 1.1.
    """
    try:
        root = yaml.compose(path.read_bytes(), Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"expected a YAML file at {path}, found: {error}. Check the path given to --config, and that line."
        ) from error
    if not isinstance(root, yaml.MappingNode | None):
        raise InputError(
            f"expected lines of 'flag: value' in {path}, found {'a list' if isinstance(root, yaml.SequenceNode) else 'one value'}."
        )
    keys = [(str(key.value).replace("-", "_"), value) for key, value in (root.value if root else [])]
    names = [key for key, _ in keys]
    unknown = sorted(key for key in names if key not in flags or key in ("help", "config"))
    if unknown and not only:
        raise InputError(
            f"expected only known flags as keys in {path}, found {', '.join(unknown)}.{did_you_mean(unknown, flags)} "
            "--help lists every flag."
        )
    twice = sorted({key for key in names if names.count(key) > 1})
    if twice:
        raise InputError(f"expected every key once in {path}, found {', '.join(twice)} twice. Leave one of them out.")
    try:
        return [word for key, value in keys if key not in unknown for word in _words(flags[key], value, path.parent)]
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"expected flags that parse in {path}, found: {error}. --help lists every flag.") from error


def _words(action: argparse.Action, node: Any, folder: Path) -> list[str]:
    """A flag of the command line with the value of a file in `folder`."""
    flag, example, value = f"--{action.dest}", str(action.metavar or ""), node.value
    if isinstance(node, yaml.SequenceNode):
        items = [_text(item, example) for item in value]
        if action.nargs in ("+", "*"):
            return [flag, *items] if items else []
        if not example:
            raise ValueError(f"argument {flag}: one value is expected, not the list {items}")
        value = ",".join(items)
    elif isinstance(node, yaml.MappingNode) and example:
        value = _text(node, example)
    elif isinstance(node, yaml.MappingNode):
        value = json.dumps(Loader("").construct_document(node), default=str)
    elif node.tag.endswith(":null"):
        return []
    elif value.startswith(("./", "../")):  # the file's own neighbour, from wherever the command is run
        value = str((folder / value).resolve())
    elif value.lower() in SWITCHES and (action.const is True or "no" in (action.choices or ())):
        value = SWITCHES[value.lower()]
    return [f"{flag}={value}"]


def _text(node: Any, example: str) -> str:
    """A value as text, a mapping with the sign between name and value that the flag's example has."""
    if isinstance(node, yaml.MappingNode):
        return ",".join(f"{key.value}{'=' if '=' in example else ':'}{one.value}" for key, one in node.value)
    return str(node.value)


def run_main(main: Callable[[], None]) -> None:
    """Run a command: errors in the input become one message and exit status 1, with a traceback only under --debug.

    Ctrl-C is one line and status 130, any other error shows its traceback. Of several processes only the first that fails prints its message.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # one that cannot show a sign of a name shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        exit_with("stopped; the same command goes on from here", 130)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, (InputError, VerificationError)):
            text: str | None = str(error)
        elif isinstance(error, BrokenPipeError):
            text = "expected to be able to write what it says, found that the reader of the output had closed it. The same command goes on."
        elif isinstance(error, OSError):
            text = f"expected to be able to read and write every file of the run, found: {error}. Check its permissions and the disk."
        else:
            text = lost_process(error)
        if text is None:
            text = f"{type(error).__name__}: {error}"
            if first_failure(f"error: {text}")[0] == f"error: {text}":
                raise
        exit_with(f"error: {text}", 1)


def _refuse_flags(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """What argparse does with a bad flag; of several processes one prints it."""
    exit_with(f"{parser.format_usage()}{parser.prog}: error: {_with_hint(message)}", 2)
