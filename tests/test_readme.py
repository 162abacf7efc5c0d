"""The documentation is true: its commands parse, its files and links exist, its examples run, and no module is missing."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

import pipelines
from conftest import make_texts, tiny_model, write_csv
from pipelines import cli
from pipelines.models.families import FAMILIES

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
WRITTEN = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
PAGES = {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in WRITTEN}
README, ARCHITECTURE = PAGES["README.md"], PAGES["docs/architecture.md"]


def blocks(text: str, *languages: str) -> list[str]:
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", text, re.DOTALL)


def commands() -> list[list[str]]:
    """The shell commands of all pages' code blocks, one list of words each."""
    lines = [
        line
        for page in PAGES.values()
        for block in blocks(page, "bash", "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(part, comments=True) for line in lines for part in re.split(r"&&|\|", line) if part.strip()]


def options_in(help_text: str) -> set[str]:
    """The option strings of an argparse help: what stands before the first gap of the lines that begin an option."""
    heads = [re.split(r"\s{2,}", line.strip())[0] for line in help_text.splitlines() if re.match(r"  -", line)]
    return {option for head in heads for option in re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", head)}


def flags_in(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def test_the_readme_is_a_page_with_the_two_commands_of_the_contract():
    assert len(README.splitlines()) <= 150
    assert "pip install -e '.[demo]' -c constraints.txt && accelerate launch recipes/distill_bert.py" in README
    assert "pip install -e '.[test]' -c constraints.txt && pytest" in README


def test_options_are_whole_words_of_the_lines_that_begin_an_option():
    text = (
        "usage: x\n\n  -h, --help            show\n  --models A [A ...], --some-models A [A ...]\n"
        + " " * 24
        + "--model or\n"
    )
    assert options_in(text) == {"-h", "--help", "--models", "--some-models"}


def test_every_command_parses(capsys, monkeypatch):
    """Scripts and verbs exist, and each flag is one of theirs, by its whole name; the launcher's own are the launcher's."""
    from accelerate.commands.launch import launch_command_parser

    launcher = set(launch_command_parser()._option_string_actions)
    known: dict[str, set[str]] = {}

    def options(name: str, argv: list[str], run: Callable[[], object]) -> set[str]:
        if name not in known:
            monkeypatch.setattr(sys, "argv", [*argv, "--help"])
            status: object = 0
            try:
                run()
            except SystemExit as end:
                status = end.code
            assert status in (0, None), name
            known[name] = options_in(capsys.readouterr().out)
            assert "--help" in known[name], name
        return known[name]

    checked = 0
    for words in commands():
        rest = words
        if words[:2] == ["accelerate", "launch"]:
            place = next(index for index, word in enumerate(words) if word.endswith(".py") or word == "-m")
            unknown = set(flags_in(words[2:place])) - launcher
            assert not unknown, (unknown, words)
            rest = ["python", *words[place:]]
        if rest[:3] == ["python", "-m", "pipelines"] or rest[0] == "pocketformers":
            arguments = rest[1:] if rest[0] == "pocketformers" else rest[3:]
            task = arguments[arguments.index("--task") : arguments.index("--task") + 2] if "--task" in arguments else []
            argv = ["pocketformers", arguments[0], *task]
            found = options(" ".join(argv), argv, cli.main)
        elif rest[0] == "python" and rest[1].endswith(".py"):
            path = REPOSITORY / ("pipelines/runtime/infer.py" if rest[1] == "infer.py" else rest[1])
            assert path.is_file(), rest[1]
            monkeypatch.syspath_prepend(path.parent)  # as where Python runs the script
            task = rest[rest.index("--task") : rest.index("--task") + 2] if "--task" in rest else []
            script = " ".join([rest[1], *task])
            argv = [str(path), *task]
            found = options(script, argv, lambda path=path: runpy.run_path(str(path), run_name="__main__"))
        else:
            continue
        unknown = set(flags_in(rest)) - found
        assert not unknown, (unknown, words)
        checked += 1
    assert checked >= 40
    assert {"infer.py", "recipes/distill_bert.py", "benchmarks/inference.py"} <= set(known)


def test_every_file_that_a_page_names_exists():
    named = {
        (path, page)
        for page, text in PAGES.items()
        for path in re.findall(
            r"(?<![\w/.])(?:recipes|accelerate_configs|docs|tests|benchmarks|pipelines)/[\w/.-]*\.\w+", text
        )
    }
    assert len(named) > 80
    missing = [name for name in named if not (REPOSITORY / name[0]).is_file()]
    assert not missing


def test_every_link_and_picture_leads_to_a_file():
    """mkdocs sees the pages in docs/ only, and GitHub shows the others."""
    links = [
        (page, target.partition("#")[0])
        for page, text in (PAGES | {"CHANGELOG.md": (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")}).items()
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if not target.startswith(("http", "#"))
    ]
    assert len(links) > 30
    broken = [link for link in links if not (REPOSITORY / link[0]).parent.joinpath(link[1]).is_file()]
    assert not broken
    linked = {(REPOSITORY / page).parent.joinpath(target).resolve() for page, target in links}
    unused = [path.name for path in DOCS.iterdir() if path.suffix != ".md" and path not in linked]
    assert not unused, "files in docs/ that no page shows"


def test_every_page_is_in_the_navigation():
    navigation = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = set(re.findall(r"\w+\.md", str(navigation)))
    assert listed == {path.name for path in DOCS.glob("*.md")}


def test_the_architecture_has_a_phrase_for_every_file():
    listed = re.findall(r"^(\S+/\S+\.\w+) +\S.*$", "\n".join(blocks(ARCHITECTURE, "text")), re.MULTILINE)
    assert len(listed) == len(set(listed))

    def files(folder: str, *patterns: str) -> set[str]:
        found = [path for pattern in patterns for path in (REPOSITORY / folder).glob(pattern)]
        # A room's __init__.py without code is the room's sentence, which the table of rooms has.
        return {
            path.relative_to(REPOSITORY).as_posix() for path in found if path.name != "__init__.py" or has_code(path)
        }

    existing = files("pipelines", "**/*.py", "**/*.html", "**/*.mjs") | files("recipes", "*.py")
    existing |= files("benchmarks", "*.py", "*.c")
    optional = {"pipelines/__init__.py", "pipelines/tasks/__init__.py"}
    assert len(existing) > 50
    assert existing - set(listed) == set(), "files without a phrase in docs/architecture.md"
    assert set(listed) - existing - optional == set(), "phrases without a file"


def has_code(path: Path) -> bool:
    """Whether a module has more than its docstring."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)


def test_every_room_is_in_the_architecture():
    rooms = {path.name for path in (REPOSITORY / "pipelines").iterdir() if (path / "__init__.py").is_file()}
    assert len(rooms) >= 9
    assert rooms == set(re.findall(r"^\| `(\w+)` \| .* \| .* \|$", ARCHITECTURE, re.MULTILINE))


def test_every_benchmark_is_cited_by_a_page_or_used_by_one_that_is():
    scripts = {path.name: path.read_text(encoding="utf-8") for path in (REPOSITORY / "benchmarks").glob("*.*")}
    cited_in = "\n".join(text for page, text in PAGES.items() if page != "docs/architecture.md")
    cited = {name for name in scripts if f"benchmarks/{name}" in cited_in}
    used = {name for name in scripts for other in cited if re.search(rf"\b{Path(name).stem}\b", scripts[other])}
    assert len(cited) >= 8
    assert set(scripts) == cited | used


def test_benchmarks_import_what_exists():
    """Most of their imports stand in functions, which no test of the library runs."""
    checked = 0
    for path in (REPOSITORY / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipelines"):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    found = hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}")
                    assert found, f"{path.name}: {node.module}.{name.name}"
                    checked += 1
    assert checked > 30


def test_the_readme_names_every_task_and_family():
    from pipelines.tasks import TASKS

    families = re.search(r"(\d+) architectures: ([^|]+)\|", README)
    assert families is not None
    assert set(families[2].strip().split(", ")) == set(FAMILIES)
    assert int(families[1]) == len(FAMILIES)
    tasks = next(line for line in README.splitlines() if line.startswith("| tasks |"))
    assert set(re.findall(r"`([\w-]+)`", tasks)) == set(TASKS)


def test_tests_that_are_named_by_a_part_of_their_name_or_a_marker_exist():
    text = "\n".join(PAGES.values())
    parts, markers = set(re.findall(r"pytest -k (\w+)", text)), set(re.findall(r"pytest\s-m\s(\w+)", text))
    assert parts
    assert markers
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert not [part for part in parts if not re.search(rf"def test_\w*{part}", tests)]
    assert not [marker for marker in markers if f"pytest.mark.{marker}" not in tests]


def test_the_changelog_has_this_version():
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = [name for name in re.findall(r"^## (.*)$", changelog, re.MULTILINE) if name != "Unreleased"]
    assert re.fullmatch(rf"{re.escape(pipelines.__version__)} - \d{{4}}-\d\d-\d\d", versions[0])
    assert set(re.findall(r"^### (.*)$", changelog, re.MULTILINE)) <= {"Added", "Changed", "Fixed", "Removed"}


def test_the_python_examples_use_names_that_exist():
    examples = [code for page in PAGES.values() for code in blocks(page, "python")]
    assert len(examples) >= 2
    for code in examples:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module == "pipelines":
                assert all(hasattr(pipelines, name.name) for name in node.names), code


def test_the_example_of_the_distillation_trainer_trains(tmp_path, monkeypatch, tokenizer):
    """As the README has it: the names of its models are directories here, beside its reviews.csv."""
    [code] = [code for code in blocks(README, "python") if "DistillationTrainer" in code]
    labels = ["sport", "tech", "trade"]
    rows = [(text, str(labels.index(label))) for text, label in make_texts(60)]
    write_csv(tmp_path / "reviews.csv", rows)
    for name, layers in (("my/finetuned-bert", 2), ("my/small-bert", 1)):
        tiny_model("bert", num_hidden_layers=layers, num_labels=3).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    variables: dict[str, object] = {}
    exec(compile(code, "<the example in README.md>", "exec"), variables)
    assert variables["trainer"].state.global_step > 0
