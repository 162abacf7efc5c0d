"""The machine: the cores that a container leaves to a process, how threads wait, and who else is at work."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from pipelines.core.machine import _seconds_of_others, is_busy, load_beside, quieten_libraries
from pipelines.runtime.infer import available_cores

# What /proc/self/cgroup says, the files below /sys/fs/cgroup, and how many of 16 cores are left.
CONTAINERS = {
    "none": ("0::/", {}, 16),
    "version 2, its own root": ("0::/", {"cpu.max": "200000 100000"}, 2),
    "version 2, no limit": ("0::/", {"cpu.max": "max 100000"}, 16),
    "version 2, less than a core": ("0::/", {"cpu.max": "50000 100000"}, 1),
    "version 2, half a core too few": ("0::/a", {"a/cpu.max": "350000 100000"}, 3),
    "version 2, more than there are": ("0::/a", {"a/cpu.max": "6400000 100000"}, 16),
    "version 2, a group around it": (
        "0::/pods/b/c",
        {"pods/cpu.max": "300000 100000", "pods/b/c/cpu.max": "max 100000"},
        3,
    ),
    "version 2, the least of several": ("0::/a/b", {"a/cpu.max": "800000 100000", "a/b/cpu.max": "400000 100000"}, 4),
    "version 2, the name is the host's": ("0::/docker/1f2e", {"cpu.max": "150000 50000"}, 3),
    "version 1": (
        "4:cpu,cpuacct:/a\n3:cpuset:/other\n0::/",
        {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "50000"},
        5,
    ),
    "version 1, no limit": ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
    "version 1, a pod's limit": (
        "5:cpuacct,cpu:/kubepods/burstable/pod7/9",
        {
            "cpu/kubepods/burstable/pod7/9/cpu.cfs_quota_us": "-1",
            "cpu/kubepods/burstable/pod7/9/cpu.cfs_period_us": "100000",
            "cpu/kubepods/burstable/pod7/cpu.cfs_quota_us": "400000",
            "cpu/kubepods/burstable/pod7/cpu.cfs_period_us": "100000",
        },
        4,
    ),
    "version 1, of sets of cores only": ("3:cpuset:/a", {"cpu/a/cpu.cfs_quota_us": "1", "cpu.max": "1 1"}, 16),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_containers_quota_limits_the_cores(container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, files, expected = CONTAINERS[container]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{key}": text for key, text in files.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert available_cores(str(tmp_path)) == expected


def test_a_system_without_groups_has_its_cores(tmp_path: Path) -> None:
    assert available_cores(str(tmp_path)) == len(os.sched_getaffinity(0))


def test_how_threads_wait_is_said_before_torch_is_loaded() -> None:
    def spins(**environment: str) -> str:
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        command = [sys.executable, "-c", "import pipelines, torch"]
        told = subprocess.run(
            command,
            env={**plain, "OMP_DISPLAY_ENV": "verbose", **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return next(line.split("'")[1] for line in told.stderr.splitlines() if "GOMP_SPINCOUNT" in line)

    assert spins() == "1000"
    assert spins(GOMP_SPINCOUNT="7") == "7"
    assert spins(OMP_WAIT_POLICY="passive") == "0"


def test_the_work_of_others_is_load_and_our_own_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"user": 10.0, "system": 5.0, "idle": 90.0, "iowait": 3.0, "steal": 1.0, "guest": 2.0}
    Times = namedtuple("Times", fields)  # type: ignore[misc]
    monkeypatch.setattr("psutil.cpu_times", lambda percpu: [Times(**fields), Times(**dict.fromkeys(fields, 1e9))])
    monkeypatch.setattr("pipelines.core.machine._own_cores", lambda: {0})

    def neighbours() -> str:
        time.sleep(0.5)
        for name in fields:
            fields[name] += 1.0
        return "done"

    def ours() -> None:
        before = _seconds_of_others()
        command = "import time\nwhile time.process_time() < 1: pass"
        subprocess.run([sys.executable, "-c", command], check=True)
        assert _seconds_of_others() - before <= -0.9

    done, load = load_beside(neighbours)
    assert done == "done"
    assert 1.5 < load < 6.1  # user, system and steal: 3 seconds in half a second or more, less what this process used
    assert load_beside(ours) == (None, 0.0)


def test_busy_is_less_than_a_core_for_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.core.machine._own_cores", lambda: set(range(8)))
    assert [is_busy(load, threads=8) for load in (0.0, 0.7, 0.9)] == [False, False, True]
    assert [is_busy(load, threads=2) for load in (0.9, 6.1, 6.3)] == [False, False, True]


def test_of_several_processes_one_warns():
    import datasets

    try:
        quieten_libraries(main_process=False)
        assert not logging.getLogger("pipelines.data.folders").isEnabledFor(logging.WARNING)
    finally:
        logging.getLogger("pipelines").setLevel(logging.NOTSET)
        datasets.enable_progress_bars()
