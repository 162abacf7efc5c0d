"""What becomes of freed memory: returned to the system between two steps of a conversion, kept for the next step of a training."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Of glibc's malloc.h, and its own values for them.
TRIM_THRESHOLD, LARGEST_INT, USUAL_TRIM_THRESHOLD = -1, 2**31 - 1, 128 * 1024
MMAP_MAX, USUAL_MMAP_MAX = -4, 65536


def _from_glibc(name: str) -> Any:
    """A function of the C library's own allocator, None where that is another than glibc's."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def give_memory_back() -> None:
    """Return to the system what is no longer used: most of a model, between two steps of a stage.

    A graph's nodes and values name one another, so that only the garbage collector frees them; and glibc keeps what is freed for later.
    """
    gc.collect()
    trim = _from_glibc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """While it lasts, glibc keeps freed memory for the next tensor, which it else returns to the system where it is large.

    Every page that comes back is filled with zeros first: on a CPU a tenth of the time of a training step.
    """
    change = _from_glibc("mallopt")
    if change is None:
        yield
        return
    change(MMAP_MAX, 0)
    change(TRIM_THRESHOLD, LARGEST_INT)
    try:
        yield
    finally:
        change(MMAP_MAX, USUAL_MMAP_MAX)
        change(TRIM_THRESHOLD, USUAL_TRIM_THRESHOLD)
        give_memory_back()
