"""Several real processes of one training, joined by gloo, started in a second: they are forked from one that has made the imports."""

from __future__ import annotations

import gc
import importlib
import io
import json
import multiprocessing
import os
import pickle
import pkgutil
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import pipelines
from pipelines.cli import main
from pipelines.core.command import run_main

# All that a recipe imports on its way.
IMPORTS = ["conftest", *(module.name for module in pkgutil.walk_packages(pipelines.__path__, "pipelines."))]
IMPORTS += [
    "matplotlib.pyplot",
    "peft",
    "sklearn.pipeline",
    "transformers.exporters",
    "onnxscript",
    "torch.onnx._internal.exporter._core",
]


class Ended(NamedTuple):
    """How a process ended: its exit status, what it wrote to both outputs, and what its function returned."""

    status: int | None
    output: str
    value: Any


def run_processes(
    count: int, directory: Path, function: Callable[..., Any], *arguments: Any, timeout: float = 300
) -> list[Ended]:
    """`function(*arguments)` in `count` processes as accelerate launch starts them on a CPU; once one fails the others are ended.

    The function is one of a test module, so that the processes find it by name.
    """
    from torch.distributed import TCPStore

    directory.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    repository = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([repository, str(Path(__file__).parent)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    processes = []
    for rank in range(count):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "ACCELERATE_USE_CPU": "true",
        }
        named = (
            {name: str(value) for name, value in environment.items()} if count > 1 else {"ACCELERATE_USE_CPU": "true"}
        )
        path = directory / f"process_{rank}"
        processes.append(context.Process(target=_run, args=(named, path, function, arguments)))
        processes[-1].start()
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline or any(process.exitcode for process in processes):
            for process in processes:
                process.join(2)
            for process in processes:
                process.terminate()
        time.sleep(0.05)
    ended = []
    for rank, process in enumerate(processes):
        path = directory / f"process_{rank}"
        value = path.with_suffix(".pickle")
        output = path.with_suffix(".txt").read_text(errors="replace")
        ended.append(Ended(process.exitcode, output, pickle.loads(value.read_bytes()) if value.exists() else None))
    return ended


def run_recipe(
    *argv: str, processes: int = 1, function: Callable[[list[str]], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """A recipe's command line in processes of its own, as accelerate launch starts them on a CPU; both outputs come as one."""
    with tempfile.TemporaryDirectory() as folder:
        ended = run_processes(processes, Path(folder), function or recipe, list(argv), timeout=600)
    said = "".join(process.output for process in ended)
    return subprocess.CompletedProcess(argv, next((e.status for e in ended if e.status), 0), said, said)


def recipe(argv: list[str]) -> None:
    """What a process of `run_recipe` does."""
    os.chdir("/")
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def time_here(module: str, spec: Path, name: str, **_: Any) -> Any:
    """What pipelines.onnx.measure.run_worker gives, from this process."""
    importlib.import_module(module).work(spec)
    return json.loads((spec.parent / "result.json").read_text())


def run_here(script: str, *argv: str) -> str:
    """A recipe, or `pocketformers`, in this process, which spares the seconds of imports, and its rows timed here; what it printed."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr("pipelines.onnx.measure.run_worker", time_here)
        patch.setattr(sys, "argv", [script, *argv])
        if script == "pocketformers":
            run_main(main)
        else:
            runpy.run_path(script, run_name="__main__")
    torch.set_num_threads(1)
    return printed.getvalue()


def values(ended: list[Ended]) -> list[Any]:
    """What the processes returned; they must all have ended well."""
    for rank, process in enumerate(ended):
        assert process.status == 0, f"process {rank}: {process.output[-3000:]}"
    return [process.value for process in ended]


def _run(environment: dict[str, str], path: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    gc.freeze()  # so that no collection looks through all that was imported
    os.environ.update(environment)
    output = os.open(path.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        value = function(*arguments)
        path.with_suffix(".pickle").write_bytes(pickle.dumps(value))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
