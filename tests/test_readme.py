"""The README: its commands parse, its files exist, and it names every module."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from pipelines.cli import STAGE_COMMANDS

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The shell commands of the README's code blocks, one list of words each."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&") if part.strip()]


def test_the_two_commands_of_the_contract_are_there():
    assert "pip install -e '.[demo]' -c constraints.txt && accelerate launch recipes/distill_bert.py" in README
    assert "pip install -e '.[test]' -c constraints.txt && pytest" in README


def test_every_flag_and_stage_of_a_command_exists(capsys, monkeypatch):
    known: dict[str, str] = {}

    def help_of(name: str, run) -> str:
        if name not in known:
            with pytest.raises(SystemExit):
                run()
            known[name] = capsys.readouterr().out
        return known[name]

    checked = 0
    for words in commands():
        script = next((word for word in words if word.endswith(".py")), None)
        flags = [word for word in words if word.startswith("--") and word != "--config_file"]
        if script is not None:
            path = REPOSITORY / ("pipelines/runtime/infer.py" if script == "infer.py" else script)
            assert path.is_file(), script

            def run(path: Path = path) -> None:
                monkeypatch.setattr(sys, "argv", [str(path), "--help"])
                runpy.run_path(str(path), run_name="__main__")

            text = help_of(script, run)
        elif words[:3] == ["python", "-m", "pipelines"]:
            assert words[3] in STAGE_COMMANDS

            def run(stage: str = words[3]) -> None:
                monkeypatch.setattr(sys, "argv", ["pipelines", stage, "--help"])
                STAGE_COMMANDS[stage]()

            text = help_of(words[3], run)
        else:
            continue
        for flag in flags:
            assert flag in text, (flag, words)
        checked += 1
    assert checked >= 20
    assert "infer.py" in known


def test_every_file_it_names_exists():
    for path in re.findall(r"(?:recipes|accelerate_configs|docs)/[\w/]+\.\w+", README):
        assert (REPOSITORY / path).is_file(), path
