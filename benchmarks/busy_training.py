"""Training beside one busy process: how the threads of OpenMP should wait for one another.

    python benchmarks/busy_training.py                                          # 10 turns of 3 steps for each choice: 3 minutes
    python benchmarks/busy_training.py --turns 40 --choices default spin_1000    # on a quiet machine: what the choice costs

Trains a BERT of MiniLM's size (6 layers, width 384) with random weights on 16 texts of 64 tokens, as the demo's teacher is trained. OpenMP
reads its environment when it is loaded, so every choice is a process of its own. One of them trains at a time, in turn, for a few steps,
while the others sleep; then all do so again beside a process that uses one core without end, in a session of its own as another user's is.
Ratios are medians over the turns (least, largest), each of two times of the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# What each choice adds to the environment. GNU's OpenMP, which torch's wheels bring, spins about 100,000 times a millisecond.
CHOICES = {
    "default": {"GOMP_SPINCOUNT": "300000"},  # what OpenMP does where nothing is said
    "passive": {"OMP_WAIT_POLICY": "passive"},  # it never spins
    "spin_1000": {"GOMP_SPINCOUNT": "1000"},  # what pipelines/__init__.py sets
    "spin_10000": {"GOMP_SPINCOUNT": "10000"},
    "one_thread": {"OMP_NUM_THREADS": "1"},
}
OPENMP = ("OMP_", "GOMP_", "KMP_")
# Uses one core until it is killed, or nobody is left who would.
NEIGHBOUR = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"


def work() -> None:
    """Train as many steps as each line of the standard input says; write how long a step took."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from pipelines.runtime.infer import available_cores
    from pipelines.training.cpu import cpu_speedups

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", available_cores())))
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = BertForSequenceClassification(BertConfig(num_labels=5, **sizes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = {"input_ids": torch.randint(1000, 30000, (16, 64)), "labels": torch.randint(0, 5, (16,))}
    with cpu_speedups(model):
        for line in sys.stdin:
            started = time.perf_counter()
            for _ in range(int(line)):
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            print((time.perf_counter() - started) / int(line), flush=True)


def start(choice: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OPENMP)}
    command = [sys.executable, str(Path(__file__).resolve()), "--work"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    return subprocess.Popen(command, env=environment | CHOICES[choice], **pipes)


def train(worker: subprocess.Popen[str], steps: int) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(steps, file=worker.stdin, flush=True)
    return float(worker.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="steps of one turn")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.work:
        work()
        return
    workers = {choice: start(choice) for choice in flags.choices}
    times: dict[str, dict[str, list[float]]] = {}
    try:
        for worker in workers.values():  # all of them have loaded and warmed up before the first turn
            train(worker, flags.steps)
        for load in ("quiet", "busy"):
            command = [sys.executable, "-c", NEIGHBOUR]
            neighbour = subprocess.Popen(command, start_new_session=True) if load == "busy" else None
            times[load] = {choice: [] for choice in workers}
            try:
                for _ in range(flags.turns):
                    for choice, worker in workers.items():
                        times[load][choice].append(train(worker, flags.steps))
            finally:
                if neighbour is not None:
                    neighbour.kill()
    finally:
        for worker in workers.values():
            worker.kill()
    first = flags.choices[0]
    for choice in workers:
        quiet, busy = times["quiet"][choice], times["busy"][choice]
        cost = [ours / base for ours, base in zip(quiet, times["quiet"][first], strict=True)]
        found = {
            "choice": choice,
            "quiet_ms": round(1000 * statistics.median(quiet), 1),
            "busy_ms": round(1000 * statistics.median(busy), 1),
            "busy_over_quiet": round(statistics.median(busy) / statistics.median(quiet), 2),
            f"quiet_over_{first}": [round(value, 3) for value in (statistics.median(cost), min(cost), max(cost))],
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
