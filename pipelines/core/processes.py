"""Several processes of one run: they wait for one another at barriers, and an error in any one of them ends all with one message.

Which process failed first they settle in the launcher's key-value store. That one prints its message, once on every machine; those
that fail because it is gone print nothing.
"""

from __future__ import annotations

import os
import re
import sys
import time
from datetime import timedelta
from typing import Any, NoReturn

# How long a process waits at a barrier, while another may work alone: to quantize a model, or to time one. (--ddp_timeout)
PATIENCE = timedelta(days=1)

# What gloo, NCCL and the store say to a process when another is gone or does not answer.
LOST = re.compile(r"gloo|NCCL|TCPStore|ProcessGroup|Connection (?:reset|closed|refused)|Broken pipe|Socket", re.I)

TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


def several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def wait_for_all() -> None:
    """Wait until every process is here. Raises RuntimeError where another one is gone."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def lost_process(error: Exception) -> str | None:
    """The message for an error that tells of the end of another process; None for other errors."""
    if not several_processes() or not isinstance(error, RuntimeError) or not LOST.search(str(error)):
        return None
    # The first sentence, without the place in gloo's sources that stands before it.
    reason = re.sub(r"^\[[^]]*\] ", "", str(error).split("\n")[0]).split(". ")[0]
    return (
        f"expected all {os.environ['WORLD_SIZE']} processes to work to the end, found that one is gone or does not answer "
        f"({reason:.300}): it was killed, ran out of memory, or its machine or the network failed. Run the same command again, on "
        "every machine: finished stages are kept, and a training resumes from its last checkpoint."
    )


def exit_with(message: str, status: int) -> NoReturn:
    """End this process with its message, or with that of the process whose failure made it fail; tokens are left out of it."""
    for token in {os.environ.get("HF_TOKEN"), *TOKEN.findall(message)} - {None, ""}:
        message = message.replace(str(token), "hf_…")
    first, prints = first_failure(message)
    if prints:
        print(first, file=sys.stderr, flush=True)
    else:
        time.sleep(1)  # the launcher ends all processes when one has ended, also the one that has yet to print
    sys.exit(status)


def first_failure(message: str) -> tuple[str, bool]:
    """The message of the first process that failed, `message` where it is this one; and whether this one prints it on its machine."""
    store = _store()
    if store is None:
        return message, True
    first = store.compare_set("failure", "", message).decode()
    return first, store.add(f"printed/{os.environ.get('GROUP_RANK', '0')}", 1) == 1


def _store() -> Any:
    """The launcher's store, None where there is but one process or the machine of the store is gone."""
    if not several_processes():
        return None
    from torch.distributed import PrefixStore, TCPStore

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A launcher that starts failed processes again keeps its store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"pocketformers/{attempt}", TCPStore(address, port, timeout=timedelta(seconds=5)))
    except (KeyError, RuntimeError):
        return None
