"""Several real processes of one training, joined by gloo, started in a second: they are forked from one that has made the imports."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

IMPORTS = ["conftest", "pipelines.distill", "pipelines.images", "pipelines.language", "pipelines.__main__"]


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
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        named = (
            {name: str(value) for name, value in environment.items()} if count > 1 else {"ACCELERATE_USE_CPU": "true"}
        )
        path = directory / f"process_{rank}"
        processes.append(context.Process(target=_run, args=(named, path, function, arguments)))
        processes[-1].start()
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline or any(process.exitcode for process in processes):
            time.sleep(2)
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


def run_in_two_processes(directory: Path, recipe: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """The recipe by multi_cpu.yaml, with proof that the main process alone writes in its --output_dir, but for a share of the soft
    targets and the state of each process's random numbers in a checkpoint. `directory` is for the notes of that."""
    repository, notes = Path(__file__).parents[1], directory / "changed_by_others.txt"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(repository / "accelerate_configs" / "multi_cpu.yaml"), str(Path(__file__).with_name("watched.py"))]
    finished = subprocess.run(
        [*command, str(notes), str(recipe), *argv], capture_output=True, text=True, timeout=600, cwd="/", check=False,
        env={**os.environ, "PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    changed = {Path(line).name for line in notes.read_text().splitlines()}
    left = Path(argv[argv.index("--output_dir") + 1]).rglob("*")
    changed |= {path.name for path in left if path.is_file() and path.stat().st_mode & 0o020}
    assert "rng_state_1.pth" in changed, finished.stderr[-3000:]
    assert all(name == "rng_state_1.pth" or name.startswith("answers-") for name in changed), changed
    return finished


def values(ended: list[Ended]) -> list[Any]:
    """What the processes returned; they must all have ended well."""
    for rank, process in enumerate(ended):
        assert process.status == 0, f"process {rank}: {process.output[-3000:]}"
    return [process.value for process in ended]


def _run(environment: dict[str, str], path: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
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
