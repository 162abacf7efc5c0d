"""The machine that a run is on: how it was launched, its cores, who else uses them, and how much the libraries say."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from pipelines.core.errors import InputError
from pipelines.runtime.infer import available_cores


def check_launch() -> None:
    """Refuse a launch in which models come out empty on all processes but one."""
    switches = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    if all(os.environ.get(switch, "false").lower() == "true" for switch in switches):
        raise InputError(
            "expected every process to load its own models, of which a teacher is not sharded; found fsdp_cpu_ram_efficient_loading, "
            "which leaves them empty on all but the first. Set it to false, as accelerate_configs/fsdp.yaml does."
        )


def use_available_cores() -> None:
    """Give torch this process's share of the cores: accelerate launch sets OMP_NUM_THREADS to 1 unless told otherwise."""
    import torch

    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, available_cores() // processes_here))


Result = TypeVar("Result")


def load_beside(work: Callable[[], Result]) -> tuple[Result, float]:
    """What `work` returns, and how many cores others used meanwhile, on average: other processes, and other guests of the host (steal)."""
    started, before = time.perf_counter(), _seconds_of_others()
    result = work()
    return result, max(0.0, (_seconds_of_others() - before) / (time.perf_counter() - started))


def is_busy(load: float, threads: int) -> bool:
    """Whether `load` cores used by others leave less than nine tenths of a core to each thread."""
    return len(_own_cores()) - load < 0.9 * threads


def _own_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _seconds_of_others() -> float:
    """CPU seconds that all but this process and its children have used of its cores, since some moment in the past."""
    import psutil

    cores, this = _own_cores(), psutil.Process()
    each = [times._asdict() for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in cores]
    # What guests of this machine use is also in "user" and "nice".
    not_used = {"idle", "iowait", "guest", "guest_nice"}
    seconds = sum(value for times in each for name, value in times.items() if name not in not_used)
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.Error):  # it has ended
            seconds -= sum(process.cpu_times()[:4])  # user and system, its own and of its children that have ended
    return seconds


def quieten_libraries(main_process: bool) -> None:
    """Leave the terminal to what a person wants to know: no bar for every file that is read, and one process that talks."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not main_process:
        datasets.disable_progress_bars()
        logging.getLogger("pipelines").setLevel(logging.ERROR)
