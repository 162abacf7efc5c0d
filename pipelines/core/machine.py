"""The machine that a run is on: how it was launched, its cores, and how much the libraries say."""

from __future__ import annotations

import os

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


def quieten_libraries(main_process: bool) -> None:
    """Leave the terminal to what a person wants to know: no bar for every file that is read, and one process that talks."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not main_process:
        datasets.disable_progress_bars()
