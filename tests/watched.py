"""A recipe as one of several processes, of which those that are not the main one note what they change in the run's directory.

What Python itself opens to write, renames or removes there is told by its audit events; what other libraries write past Python (weights,
the state of the random numbers) by the mode of their files, which is looked at before a directory is removed.
"""

import os
import shutil
import sys
from pathlib import Path

from pipelines.onnx import measure
from processes import recipe, time_here

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")


def watched_recipe(argv: list[str]) -> None:
    """What a process of `run_recipe` does, under watch; the models are timed in it."""
    measure.run_worker = time_here
    directory = output_directory(argv)
    notes = os.open(notes_of(directory), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    inside = os.path.join(directory, "")

    def note_change(event: str, arguments: tuple) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        for path in arguments[:2] if event in CHANGES else arguments[:1] if writes else ():
            if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(inside):
                os.write(notes, os.fsencode(path) + b"\n")

    def note_and_remove(path: str | Path, *arguments: object, **keywords: object) -> None:
        for made in made_by_others(Path(path)):
            os.write(notes, os.fsencode(made) + b"\n")
        remove(path, *arguments, **keywords)

    if os.environ["RANK"] == "0":
        os.umask(0o022)
        remove, shutil.rmtree = shutil.rmtree, note_and_remove
    else:
        os.umask(0o002)
        sys.addaudithook(note_change)
    recipe(argv)


def check_only_the_main_process_wrote(directory: Path) -> None:
    """But for a share of the soft targets, and the state of each process's random numbers in a checkpoint."""
    changed = {Path(line).name for line in notes_of(directory).read_text().splitlines()}
    changed |= {path.name for path in made_by_others(directory)}
    assert "rng_state_1.pth" in changed
    assert all(name == "rng_state_1.pth" or name.startswith("answers-") for name in changed), changed


def output_directory(argv: list[str]) -> Path:
    return Path(argv[argv.index("--output_dir") + 1])


def notes_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}_changes.txt")


def made_by_others(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and path.stat().st_mode & 0o020]
