"""A recipe as one of several processes, of which those that are not the main one note what they change: watched.py NOTES RECIPE FLAGS.

What Python itself opens to write, renames or removes in the run's directory is told by its audit events; what other libraries write
past Python (weights, the state of the random numbers) by the mode of their files, which is looked at before a directory is removed.
"""

import os
import runpy
import shutil
import sys
from pathlib import Path

notes = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.argv = sys.argv[2:]
directory = os.path.join(sys.argv[sys.argv.index("--output_dir") + 1], "")
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")


def note_change(event: str, arguments: tuple) -> None:
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    for path in arguments[:2] if event in CHANGES else arguments[:1] if writes else ():
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(directory):
            os.write(notes, os.fsencode(path) + b"\n")


def note_files(path: str | Path, *arguments: object, **keywords: object) -> None:
    for made in Path(path).rglob("*"):
        if made.is_file() and made.stat().st_mode & 0o020:
            os.write(notes, os.fsencode(made) + b"\n")
    remove(path, *arguments, **keywords)


if os.environ["RANK"] == "0":
    os.umask(0o022)
    remove, shutil.rmtree = shutil.rmtree, note_files
else:
    os.umask(0o002)
    sys.addaudithook(note_change)
runpy.run_path(sys.argv[0], run_name="__main__")
