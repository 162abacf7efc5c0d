"""A run directory: its stages, their records, what is finished, and what must be redone.

A stage is a function that writes one directory. It writes into a hidden sibling; `record.json` comes last and then the whole is
renamed, so that a directory with a record is finished and a run killed at any moment continues where it stopped.

The same seed on the same machine with the same number of processes and cores gives the same bytes of every file of a stage. Only times
differ: those in records and reports, the report's pages and plot that show them, and what is chosen by measured speed (`--quantization
auto`).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pipelines
from pipelines.core.disk import as_json, lock, needing_room, write_json
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.identity import describe, differences
from pipelines.core.machine import check_launch, quieten_libraries, use_available_cores
from pipelines.core.processes import PATIENCE, wait_for_all
from pipelines.core.records import (
    ATTEMPT,
    CHECKPOINTS,
    PARTIAL,
    RECORD,
    Outcome,
    check_files,
    damaged_files,
    fingerprint,
    read_record,
    shipped_files,
    summary_line,
    versions,
    with_checksum,
)
from pipelines.core.sources import model_fingerprint
from pipelines.core.task import Task
from pipelines.runtime.infer import file_checksum

MARKER = ".pocketformers"


def prepare(directory: Path, only_stage: str | None) -> Any:
    """Make `directory` ready for a run, or for one stage beside whatever is there; the lock of it, held as long as this process lives.

    Raises InputError where something else is in the way or nothing can be written.
    """
    target = directory if only_stage is None else directory / only_stage
    is_run = (directory / MARKER).exists()
    is_ours = is_run if only_stage is None else read_record(target) is not None
    if not is_ours and _holds_something(target):
        found = "something else" if target.is_dir() else "the file of that name"
        raise InputError(
            f"expected {target} to be empty, missing, or of an earlier run; found {found} there. Nothing was touched: pass another "
            "--output_dir."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if only_stage is None:
            (directory / MARKER).touch()
        # One stage of a run's directory may be what that run is at work on.
        return lock(directory / (".lock" if only_stage is None or is_run else f".{only_stage}.lock"))
    except OSError as error:
        raise InputError(
            f"expected to be able to write to {directory}, found: {error}. Pass an --output_dir that you may write to."
        ) from error


class Run:
    """The stages of one recipe in one directory. Every process of a distributed launch makes one; only the main one writes."""

    def __init__(self, directory: str | Path, task: Task, seed: int, only_stage: str | None = None) -> None:
        """Open `directory` as a run; with `only_stage` it is just where that one stage's directory goes, beside whatever is there."""
        import torch
        from accelerate import PartialState

        check_launch()
        self.directory = Path(directory).absolute()
        self.task, self.seed = task, seed
        # A command that trains nothing has not told accelerate yet where it runs, and several processes it takes for those of GPUs.
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()
        self.state = PartialState(cpu=on_cpu, timeout=PATIENCE)
        use_available_cores()
        quieten_libraries(self.state.is_main_process)
        self.stages: list[str] = []  # those of this run's flags; the directory may hold others of an earlier run
        self.first: Run | None = None  # of a run that repeats another one with a seed of its own: that one
        self.prefix = ""  # of its stages' names in what it prints
        if self.state.is_main_process:
            self._task_made_by = task.describe()  # first of all: data that cannot be read leaves the directory as it is
            self._lock = prepare(self.directory, only_stage)
        wait_for_all()  # the main process may have read the data alone

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        """Let others work in the directory: an error's traceback would keep the lock as long as it lives itself."""
        if self.state.is_main_process:
            self._lock.release()

    def inside(self, folder: str, seed: int | None = None) -> Run:
        """This run in a folder of its directory and under its lock, maybe with another seed. A stage that is not made there is this run's."""
        run = copy.copy(self)
        run.prefix, run.directory = f"{self.prefix}{folder}/", self.directory / folder
        run.seed, run.stages, run.first = self.seed if seed is None else seed, [], self
        return run

    def adopt(self, folder: Path, names: Sequence[str]) -> None:
        """Take the finished stages of a run inside this one as its own, in place of what it has by these names."""
        self.stages += names
        for name in names if self.state.is_main_process else ():
            source, target, partial = folder / name, self.directory / name, self.directory / f".{name}{PARTIAL}"
            record = read_record(source)
            assert record is not None
            check_files(source, record)
            if read_record(target) != record or damaged_files(target, record):
                with needing_room(name, self.directory):
                    shutil.rmtree(partial, ignore_errors=True)
                    shutil.copytree(source, partial)
                    self._put_in_place(partial, target)
        self.state.wait_for_everyone()

    def place(self, name: str) -> Path:
        """The directory of a stage: this run's own, or that of the run that it repeats."""
        run = self if self.first is None or name in self.stages else self.first
        return run.directory / name

    def stage(
        self,
        name: str,
        function: Callable[..., Outcome],
        source: str | None,
        distributed: bool = False,
        optional: bool = False,
        **arguments: Any,
    ) -> Path:
        """Make the directory `name` with `function(source, directory, task, **arguments)`, unless it is there and still what it would be.

        `source`, and every argument that is a Path or has some, names an earlier stage's directory in this run or a model elsewhere; a
        stage made of the data alone has none.
        `distributed` stages run on every process, and go on where an interrupted attempt stopped (checkpoints, shards); the others run
        on the main process while the rest wait, and start anew. What is there for comparison only is `optional`: where it cannot be made it is
        left out, with a line.
        """
        from accelerate.utils import broadcast_object_list

        self.stages.append(name)
        target, partial = self.directory / name, self.directory / f".{name}{PARTIAL}"
        is_main = self.state.is_main_process
        made_by = self._made_by(function, source, arguments) if is_main else {}
        finished = is_main and self._finished(partial, target, made_by)
        if broadcast_object_list([finished])[0]:
            return target

        with needing_room(name, self.directory):
            if is_main:
                print(f"{self.prefix}{name}: started", flush=True)
                self._start(partial, made_by, resumes=distributed)
            self.state.wait_for_everyone()
            started, outcome = time.perf_counter(), None
            if distributed or is_main:
                from transformers import set_seed

                set_seed(self.seed)
                try:
                    outcome = function(self._locate(source), partial, self.task, **arguments)
                except (InputError, VerificationError) as error:
                    if not optional:
                        raise
                    print(f"{self.prefix}{name}: left out, since it cannot be made: {error}", flush=True)
            wait_for_all()  # the main process may have worked alone
            if is_main and outcome is not None:
                self._commit(name, partial, target, made_by, outcome, time.perf_counter() - started)
            elif is_main:
                shutil.rmtree(partial)
                self.stages.remove(name)
            self.state.wait_for_everyone()
        return target

    def record(self, name: str) -> dict[str, Any]:
        record = read_record(self.place(name))
        if record is None:
            raise InputError(
                f"expected the finished stage {name!r} in {self.directory}, found none. Run that stage first."
            )
        return record

    def _earlier(self) -> dict[str, Path]:
        """The directories of the stages before the present one, those of the run that this one repeats among them."""
        shared = {} if self.first is None else {name: self.first.directory / name for name in self.first.stages}
        shared.pop(self.stages[-1], None)
        return shared | {name: self.directory / name for name in self.stages[:-1]}

    def _locate(self, source: str | None) -> str | None:
        """An earlier stage of this run by its name; whatever else a source is stays as it was given, a relative path, too."""
        return source if source is None else str(self._earlier().get(source, source))

    def _identify(self, source: str | None) -> str | None:
        if source is None:
            return None
        located = Path(self._locate(source) or source)
        record = read_record(located) if located.is_dir() else None
        if record is None:
            return model_fingerprint(source)
        if located not in self._earlier().values():  # which were looked at in their turn
            check_files(located, record)
        return fingerprint(record)

    def _made_by(
        self, function: Callable[..., Outcome], source: str | None, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        def identify(value: Any) -> Any:
            if isinstance(value, list):
                return [identify(one) for one in value]
            return self._identify(str(value)) if isinstance(value, Path) else describe(value)

        settings = {key: identify(value) for key, value in arguments.items()}
        made_by: dict[str, Any] = {
            "function": f"{function.__module__}.{function.__qualname__}",
            "version": pipelines.__version__,
            "source": source,
            "source_fingerprint": self._identify(source),
            "task": self._task_made_by,
            "seed": self.seed,
            **settings,
        }
        return as_json(made_by)

    def _finished(self, partial: Path, target: Path, made_by: dict[str, Any]) -> bool:
        """Whether a stage is there and what it would be; raises InputError where something else is in its place."""
        self._end_commit(partial, target, made_by)
        record = read_record(target)
        if record is None and _holds_something(target):
            raise InputError(
                f"expected nothing at {target}, or the stage of that name, found something without a {RECORD}. Nothing was touched: move it, or "
                "pass another --output_dir."
            )
        if record is None:
            return False
        # A model is known by its content, wherever it lies and however its path is spelt.
        reasons = differences(record["made_by"] | {"source": made_by["source"]}, made_by)
        damaged = damaged_files(target, record)
        if damaged:
            reasons.append(f"{', '.join(damaged)} changed since it was written")
        if reasons:
            print(
                f"{self.prefix}{target.name}: redone, because {reasons[0]}"
                + (f" (and {len(reasons) - 1} more)" if reasons[1:] else ""),
                flush=True,
            )
            return False
        print(f"{self.prefix}{target.name}: finished already", flush=True)
        return True

    def _start(self, partial: Path, made_by: dict[str, Any], resumes: bool) -> None:
        """Keep what an interrupted attempt at the very same stage left, if it is one that resumes, and nothing else."""
        unfinished = partial / ATTEMPT
        try:
            same = json.loads(unfinished.read_text(encoding="utf-8")) == made_by
        except (OSError, ValueError):
            same = False
        if not (same and resumes) and partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        (partial / RECORD).unlink(missing_ok=True)
        write_json(unfinished, made_by)

    def _commit(
        self, name: str, partial: Path, target: Path, made_by: dict[str, Any], outcome: Outcome, seconds: float
    ) -> None:
        attempt = (partial / ATTEMPT, partial / CHECKPOINTS)
        files = sorted(path for path in partial.rglob("*") if path.is_file() and not {path, *path.parents} & {*attempt})
        record = {
            "stage": name,
            "format": outcome.format,
            "made_by": made_by,
            "metrics": outcome.metrics,
            "parameters": outcome.parameters,
            "bytes": sum(path.stat().st_size for path in shipped_files(partial)),
            "seconds": round(seconds, 3),
            "processes": self.state.num_processes,
            "details": outcome.details,
            "versions": versions(),
            "files": {str(path.relative_to(partial)): file_checksum(path) for path in files},
        }
        record = with_checksum(record)
        write_json(partial / RECORD, record)
        self._put_in_place(partial, target)
        print(f"{self.prefix}{summary_line(record)}", flush=True)

    def _end_commit(self, partial: Path, target: Path, made_by: dict[str, Any]) -> None:
        """Put in place what an interrupted run had written to its end, the record last, so that nothing is trained twice."""
        record = read_record(partial)
        if record is not None and record["made_by"] == made_by and not damaged_files(partial, record):
            self._put_in_place(partial, target)
        _remove(target.with_name(f".{target.name}.old"))

    def _put_in_place(self, partial: Path, target: Path) -> None:
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
        (partial / ATTEMPT).unlink(missing_ok=True)
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            _remove(old)
            target.rename(old)
        partial.rename(target)
        _remove(old)


def _holds_something(path: Path) -> bool:
    """Whether there is something that somebody may want: an empty directory is nobody's."""
    return os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))


def _remove(path: Path) -> None:
    """Remove a directory, or a link to one, which stays as it is."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
