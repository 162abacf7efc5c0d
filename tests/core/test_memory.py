"""Freed memory is kept while a training lasts, and given back after it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

SCRIPT = """
import resource, statistics, torch
from pipelines.training.cpu import keep_freed_memory
from contextlib import nullcontext

def count():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def faults(steps=20):
    # Of a usual step: the system may take pages back at any moment.
    found = []
    for _ in range(steps):
        before = count()
        torch.zeros(10_000_000).add_(1)
        found.append(count() - before)
    return int(statistics.median(found))

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
usual, before = faults(), resident()
with keep_freed_memory():
    faults(1)
    kept = faults()
print(usual, kept, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_pages_are_kept_while_it_lasts_and_returned_after_it():
    told = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    usual, kept, more = (int(value) for value in told.split())
    pages = 40_000_000 // resource.getpagesize()
    assert usual > pages / 2  # the pages of a tensor, or fewer where the system's pages are larger
    assert kept < pages / 20
    assert more < 20_000_000
