"""Two hosts that are network namespaces of this machine, each with its own address, and one directory that both see.

`TWO_HOSTS_LOG=docs/two_hosts.log pytest -m hosts`, as root; the variable has what the hosts said written to a file.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
RECIPE = "recipes/distill_bert.py"
ADDRESSES = ["10.77.0.1", "10.77.0.2"]
SMALL = shlex.split("""
    --teacher_epochs 1 --teacher_learning_rate 1e-3 --num_train_epochs 6 --learning_rate 1e-3 --student_layers 2
    --max_length 32 --benchmark_rounds 1 --benchmark_seconds 0.1 --prune_heads 0 --prune_ffn 0 --quantization none
    --label_baseline false --baselines false --use_cpu true --logging_steps 1 --disable_tqdm true --eval_strategy no
    --load_best_model_at_end false --save_strategy steps --save_steps 10 --web false
""")

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("ip"),
        reason="only root makes network namespaces, with iproute2",
    ),
]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture(scope="module")
def hosts():
    """The commands that put another into host1 or host2, which a cable joins."""
    names = [f"pocketformers{number}" for number in (1, 2)]
    prefixes = []
    try:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, (name, address) in enumerate(zip(names, ADDRESSES, strict=True), 1):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            named = ["unshare", "--uts", "sh", "-c", f'hostname host{number} && exec "$@"', "sh"]
            prefixes.append(["ip", "netns", "exec", name, *named])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine makes no network namespaces: {error}")
    yield names, prefixes
    for name in names:
        end_host(name)
        ip("netns", "delete", name)


def end_host(name: str) -> None:
    """SIGKILL for all that runs on a host, as when its power fails but the network's other end is told."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout.split()
    for pid in found:
        os.kill(int(pid), signal.SIGKILL)


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ours = {"PATH": path, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours, "GLOO_SOCKET_IFNAME": "cable", **more}


def command(rank: int, arguments: list[str]) -> list[str]:
    launcher = ["accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/multi_node.yaml"]
    return [*launcher, "--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0], RECIPE, *arguments]


def start(hosts, directory: Path, arguments: list[str], **more: str) -> list[tuple[subprocess.Popen, Path]]:
    """The recipe's command on both hosts, and where each one's output goes."""
    started = []
    for rank, prefix in enumerate(hosts[1]):
        output = directory / f"host{rank + 1}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                [*prefix, *command(rank, arguments)],
                cwd=REPOSITORY,
                env=environment(**more),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        started.append((process, output))
    return started


def start_as_job(hosts, directory: Path, arguments: list[str]) -> list[tuple[subprocess.Popen, Path]]:
    """The same as a job of SLURM, of which only what the script asks for is here: srun on the two hosts, and their addresses."""
    programs = directory / "programs"
    programs.mkdir()
    parts = "".join(
        f'SLURM_NODEID={rank} {shlex.join(prefix)} "$@" > {directory}/host{rank + 1}.txt 2>&1 & part{rank}=$!\n'
        for rank, prefix in enumerate(hosts[1])
    )
    scripts = {"srun": f"shift\n{parts}wait $part0 && wait $part1", "scontrol": f"printf '%s\\n' {' '.join(ADDRESSES)}"}
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    job = environment(SLURM_NNODES="2", SLURM_JOB_ID="1", SLURM_JOB_NODELIST="host[1-2]")
    job["PATH"] = f"{programs}:{job['PATH']}"
    process = subprocess.Popen(
        ["bash", "accelerate_configs/multi_node.slurm", RECIPE, *arguments], cwd=REPOSITORY, env=job
    )
    return [(process, directory / f"host{rank}.txt") for rank in (1, 2)]


def losses(run: Path, stage: str) -> list[float]:
    details = json.loads((run / stage / "record.json").read_text())["details"]
    return [line["loss"] for line in details["losses"]]


class Log:
    """What was done and said, without this machine's paths; written where TWO_HOSTS_LOG says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str = "") -> None:
        self.lines.append(line)

    def said(self, started: list[tuple[subprocess.Popen, Path]], run: Path, data: dict[str, Path]) -> None:
        for rank, (process, output) in enumerate(started):
            text = output.read_text(errors="replace")
            for name, path in {"runs/two_hosts": run, **data}.items():
                text = text.replace(str(path), name)
            lines = [line for line in text.splitlines() if re.match(r"[a-z_]+: (?! )", line)]
            self.lines += [f"host{rank + 1}| {line}" for line in lines]
            self.lines.append(f"host{rank + 1}| exit status {process.returncode}")

    def write(self) -> None:
        if "TWO_HOSTS_LOG" in os.environ:
            Path(os.environ["TWO_HOSTS_LOG"]).write_text("\n".join(self.lines) + "\n", encoding="utf-8")


def wait(started: list[tuple[subprocess.Popen, Path]], seconds: float = 1200) -> None:
    deadline = time.monotonic() + seconds
    for process, _ in started:
        process.wait(timeout=max(1, deadline - time.monotonic()))


def saved(run: Path) -> set[str]:
    whole = (run / ".student.partial" / "checkpoints").glob("checkpoint-*/trainer_state.json")
    return {path.parent.name for path in whole}


def test_two_hosts_train_to_the_curve_of_one_and_one_that_dies_is_told_and_made_good(
    hosts, trained_teacher, csv_file, tmp_path
):
    log = Log()
    named = {"articles.csv": csv_file, "teacher": trained_teacher}
    data = ["--teacher_model", str(trained_teacher), "--dataset", str(csv_file), *SMALL]
    run, alone = tmp_path / "run", tmp_path / "alone"
    arguments = [*data, "--per_device_train_batch_size", "4", "--output_dir", str(run)]
    log.add(
        "Two hosts, 10.77.0.1 and 10.77.0.2: network namespaces joined by a veth pair, one process on each, gloo, one run directory."
    )
    log.add("host1$ " + " ".join([*command(0, []), "--per_device_train_batch_size 4 --output_dir runs/two_hosts …"]))
    log.add("host2$ the same with --machine_rank 1")

    for victim, survivor in ((1, 0), (0, 1)):  # the launcher's store is on host1
        log.add(f"*** {'both commands' if victim else 'the same two commands again'}")
        started = start(hosts, tmp_path, arguments)
        deadline, before = time.monotonic() + 600, saved(run)
        while not saved(run) - before:
            said = [path.read_text()[-3000:] for _, path in started]
            assert all(process.poll() is None for process, _ in started), said
            assert time.monotonic() < deadline
            time.sleep(0.02)
        end_host(hosts[0][victim])
        killed = time.monotonic()
        wait(started, 120)
        log.add(f"*** kill -9 for all that ran on host{victim + 1} while the student was trained")
        log.said(started, run, named)
        log.add(f"*** host{survivor + 1} ended {time.monotonic() - killed:.1f} s after host{victim + 1}")
        process, output = started[survivor]
        text = output.read_text()
        assert process.returncode == 1
        messages = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(messages) == 1, text
        assert "expected all 2 processes to work to the end, found that one is gone" in messages[0]
        assert "Run the same command again" in messages[0]
        assert "Traceback" not in text[: text.index(messages[0])]  # the launcher's own follows
        assert not (run / "student").exists()

    log.add(
        "*** the same again, as accelerate_configs/multi_node.slurm starts them, with stand-ins for srun and scontrol"
    )
    started = start_as_job(hosts, tmp_path, arguments)
    wait(started)
    log.said(started, run, named)
    assert [process.returncode for process, _ in started] == [0, 0], [path.read_text()[-3000:] for _, path in started]
    assert "teacher: finished already" in started[0][1].read_text()
    record = json.loads((run / "student" / "record.json").read_text())
    assert record["processes"] == 2
    assert record["details"]["resumed_from_step"] >= 20
    log.add(f"*** student: resumed from step {record['details']['resumed_from_step']} of {record['details']['steps']}")
    report = json.loads((run / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["teacher", "teacher_onnx", "student", "onnx"]

    reference = [sys.executable, RECIPE, *data, "--per_device_train_batch_size", "8", "--output_dir", str(alone)]
    finished = subprocess.run(reference, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for stage in ("teacher", "student"):
        both, one = losses(run, stage), losses(alone, stage)
        assert len(both) == len(one) > 10
        assert both == pytest.approx(one, abs=1e-4), stage
        difference = max(abs(left - right) for left, right in zip(both, one, strict=True))
        log.add(f"*** {stage}: {len(one)} logged losses, at most {difference:.0e} from those of one process alone")
    log.write()
