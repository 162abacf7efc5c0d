"""Pocketformers: fine-tune, distil, prune, quantize, export, verify and measure small transformers."""

import os
import pkgutil
from typing import Any

__version__ = "0.1.0"

# How often threads of GNU's OpenMP, which torch's wheels bring, look again before they sleep: a hundredth of a millisecond, not three. Beside
# a busy process a step of training takes 1.8 times as long, not 15 times, and alone as long as before (benchmarks/busy_training.py). OpenMP
# reads it when torch is loaded, so it can be set nowhere else.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# What a script imports from here. Found when it is asked for: `load` needs no torch, and importing this needs nothing.
_PUBLIC = {
    "load": "pipelines.edge.load:load",
    "DistillationTrainer": "pipelines.training.distill:DistillationTrainer",
    "prune": "pipelines.api:prune",
    "export": "pipelines.api:export",
    "quantize": "pipelines.api:quantize",
    "verify": "pipelines.api:verify",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pkgutil.resolve_name(_PUBLIC[name])


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
