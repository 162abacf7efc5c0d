"""Freed memory returned to the system between two steps of a conversion."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any


def from_glibc(name: str) -> Any:
    """A function of the C library's own allocator, None where that is another than glibc's."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def give_memory_back() -> None:
    """Return to the system what is no longer used: most of a model, between two steps of a stage.

    A graph's nodes and values name one another, so that only the garbage collector frees them; and glibc keeps what is freed for later.
    """
    gc.collect()
    trim = from_glibc("malloc_trim")
    if trim is not None:
        trim(0)
