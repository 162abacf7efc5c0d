"""The disk below a run: files written whole or not at all, digests, the lock of a directory, and one message when it is full."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipelines.core.errors import InputError

# How libraries that write files themselves (safetensors, torch, NumPy, Arrow) tell of a full disk, instead of an error's number.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ROOM_TEXT = re.compile(
    r"No space left|File too large|quota exceeded|PytorchStreamWriter|unexpected pos \d+ vs|\d+ requested and \d+ written"
)


def as_json(value: Any) -> Any:
    """The value as plain JSON, in which a path is its text, and a number that is not finite null."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, allow_nan=False, default=str) + "\n"
    write_whole(path, text.encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """The sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def no_room(error: BaseException | None) -> str | None:
    """What of an error, or of what caused it, says that the disk is full or a file at its limit; None where it is something else."""
    while error is not None:
        text = " ".join(str(error).split())
        if getattr(error, "errno", None) in NO_ROOM or NO_ROOM_TEXT.search(text):
            return f"{type(error).__name__}: {text:.200}"
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def needing_room(name: str, directory: Path) -> Iterator[None]:
    """Turn the many errors of a full disk into one message."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = no_room(error)
        if reason is None:
            raise
        free = shutil.disk_usage(directory).free
        raise InputError(
            f"expected room on the disk for the stage {name}, found that a file in {directory} could not be written whole ({reason}; "
            f"{free / 1e6:,.0f} MB are free). Make room, or lift the limit of a file's size, and run the same command again: what is "
            "finished is as it was, and this stage goes on where it stopped."
        ) from error


def lock(path: Path) -> Any:
    """Take the lock file at `path` for the life of this process."""
    taken = FileLock(path)
    try:
        taken.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"expected no other run at work in {path.parent}, found one. Wait for it to end, or pass another --output_dir."
        ) from error
    return taken
