"""A run directory: its stages, their records, what is finished, and what must be redone.

A stage is a function that writes one directory. It writes into a hidden sibling; `record.json` comes last and then the whole is
renamed, so that a directory with a record is finished and a run killed at any moment continues where it stopped.

The same seed on the same machine with the same number of processes and cores gives the same bytes of every file of a stage. Only times
differ: those in records and reports, the report's pages and plot that show them, and what is chosen by measured speed (`--quantization
auto`).
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import pipelines
from pipelines.core.errors import InputError
from pipelines.core.processes import PATIENCE, wait_for_all
from pipelines.runtime.infer import available_cores

RECORD = "record.json"
MARKER = ".pocketformers"
ATTEMPT = ".made_by.json"  # what an unfinished stage is to become
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "peft",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "numpy",
)

# What a record must hold for those who read it; `parameters` may be null.
RECORD_TYPES: dict[str, type | tuple[type, ...]] = {
    "stage": str, "format": str, "made_by": dict, "metrics": dict, "bytes": int, "seconds": (int, float),
    "details": dict, "versions": dict, "files": dict,
}  # fmt: skip
CHECKSUM = "sha256"

# How libraries that write files themselves (safetensors, torch, NumPy, Arrow) tell of a full disk, instead of an error's number.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ROOM_TEXT = re.compile(
    r"No space left|File too large|quota exceeded|PytorchStreamWriter|unexpected pos \d+ vs|\d+ requested and \d+ written"
)

# Settings of TrainingArguments that say how a training is run, watched or stored. A change of one of them leaves the trained
# weights what they are, so it redoes nothing. All other fields are part of what made a stage.
NOT_IN_RESULT = (
    "output_dir", "logging_", "log_level", "log_on_each_node", "report_to", "run_name", "hub_", "push_to_hub", "project", "trackio_",
    "disable_tqdm", "dataloader_", "resume_from_checkpoint", "save_", "ddp_", "per_device_eval_batch_size", "eval_accumulation_steps",
    "eval_on_start", "local_rank", "do_", "include_", "skip_memory_metrics", "enable_jit_checkpoint", "restore_callback_states",
)  # fmt: skip


@dataclass
class Outcome:
    """What a stage function tells of the directory it wrote: quality per split, parameters, and whatever else is worth recording."""

    format: str
    metrics: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


def describe(value: Any) -> Any:
    """The part of a stage's argument that its result depends on, as JSON: the key under which a finished stage is found again."""
    from transformers import TrainingArguments

    if isinstance(value, TrainingArguments):
        settings = value.to_dict()
        return {name: settings[name] for name in sorted(settings) if not name.startswith(NOT_IN_RESULT)}
    if hasattr(value, "describe"):
        return value.describe()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    return value


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The leaves in which two JSON values differ, one short phrase each."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            phrase
            for key in sorted(old.keys() | new.keys())
            for phrase in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    if old == new:
        return []
    # Hashes tell a person nothing; that the thing behind them changed does.
    hashed = any(isinstance(value, str) and re.fullmatch("[0-9a-f]{40,64}", value) for value in (old, new))
    return [f"{path.removesuffix('_fingerprint')} changed" + ("" if hashed else f" from {old!r} to {new!r}")]


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shipped_files(directory: Path) -> list[Path]:
    """The files that must be shipped to use a stage: its top level without the record. Adapters and the like live in sub-folders."""
    return sorted(path for path in directory.iterdir() if path.is_file() and path.name not in (RECORD, ATTEMPT))


def copy_beside(source: Path, directory: Path) -> None:
    """Copy what belongs to the ONNX model in `source` except its graph: config, and tokenizer or image processor."""
    from pipelines.data.sources import WEIGHT_SUFFIXES

    for path in shipped_files(source):
        # The graph, or weights beside it: model.onnx.data, and what a foreign directory may hold for torch.
        if ".onnx" not in path.suffixes and path.suffix not in WEIGHT_SUFFIXES:
            shutil.copy2(path, directory / path.name)


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a finished stage directory, or None where there is none. Raises InputError for one that does not parse."""
    path = directory / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _check_record(record)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"expected the record of a stage in {path}, found a file that cannot be read: {error}. "
            "Delete that stage's directory to have it made again."
        ) from error
    return record


def _check_record(record: Any) -> None:
    """Raise ValueError for what no stage wrote: other keys, other types, or a content that its checksum is not of."""
    if not isinstance(record, dict):
        raise ValueError(f"it is a JSON {type(record).__name__}")
    for key, kind in RECORD_TYPES.items():
        if not isinstance(record.get(key), kind):
            raise ValueError(f"its {key!r} is missing or of another kind")
    if not all(isinstance(digest, str) for digest in record["files"].values()):
        raise ValueError("its 'files' are not names and hashes")
    if record.get(CHECKSUM) != checksum(record):
        raise ValueError("it was changed after it was written, since its checksum is missing or of another content")


def checksum(record: dict[str, Any]) -> str:
    """The sha256 of a record's content, without the checksum in it."""
    content = {key: value for key, value in record.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record as plain JSON, where a number that is not finite is null, and with its checksum."""
    plain: dict[str, Any] = json.loads(json.dumps(record, default=str), parse_constant=lambda _: None)
    return plain | {CHECKSUM: checksum(plain)}


def no_room(error: BaseException | None) -> str | None:
    """What of an error, or of what caused it, says that the disk is full or a file at its limit; None where it is something else."""
    while error is not None:
        text = " ".join(str(error).split())
        if getattr(error, "errno", None) in NO_ROOM or NO_ROOM_TEXT.search(text):
            return f"{type(error).__name__}: {text:.200}"
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def needing_room(name: str, directory: Path) -> Iterator[None]:
    """Turn the many errors of a full disk into one message."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = no_room(error)
        if reason is None:
            raise
        free = shutil.disk_usage(directory).free
        raise InputError(
            f"expected room on the disk for the stage {name}, found that a file in {directory} could not be written whole ({reason}; "
            f"{free / 1e6:,.0f} MB are free). Make room, or lift the limit of a file's size, and run the same command again: what is "
            "finished is as it was, and this stage goes on where it stopped."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that the file is either the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(
        json.dumps(value, indent=2, sort_keys=False, allow_nan=False, default=str) + "\n", encoding="utf-8"
    )
    temporary.replace(path)


def fingerprint(record: dict[str, Any]) -> str:
    """Identity of a finished stage: the content of its files."""
    return hashlib.sha256(json.dumps(record["files"], sort_keys=True).encode()).hexdigest()


def damaged_files(directory: Path, record: dict[str, Any]) -> list[str]:
    """Files of a finished stage that are missing or no longer what the record says."""
    return [
        name
        for name, digest in record["files"].items()
        if not (directory / name).is_file() or hash_file(directory / name) != digest
    ]


def check_files(directory: Path, record: dict[str, Any]) -> None:
    """Raise InputError where the files of a finished stage are not what its record says, by which others know what they were made of."""
    damaged = damaged_files(directory, record)
    if damaged:
        raise InputError(
            f"expected the files of {directory} to be those that its {RECORD} names, found {', '.join(damaged)} changed or missing. Make that "
            f"stage again; or delete its {RECORD}, and it is taken as it is."
        )


def prepare_directory(directory: Path) -> None:
    """Make `directory` ready to hold results, and refuse one that holds something else or cannot be written."""
    if directory.exists() and not directory.is_dir():
        raise InputError(
            f"expected a directory for the results, found the file {directory}. Pass another --output_dir."
        )
    if directory.is_dir() and any(directory.iterdir()) and not (directory / MARKER).exists():
        raise InputError(
            f"expected {directory} to be empty, missing, or of an earlier run; found other files there. Nothing was touched: "
            "pass another --output_dir."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MARKER).touch()
    except OSError as error:
        raise InputError(
            f"expected to be able to write to {directory}, found: {error}. Pass an --output_dir that you may write to."
        ) from error


def prepare_stage_directory(target: Path) -> None:
    """Refuse a directory that holds something else than an earlier result of a stage, or that cannot be written."""
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and read_record(target) is None)):
        raise InputError(
            f"expected {target} to be empty, missing, or written by an earlier stage; found something else there. Nothing was touched: "
            "pass another --output_dir."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"expected to be able to write to {target.parent}, found: {error}. Pass an --output_dir that you may write to."
        ) from error
    if not os.access(target.parent, os.W_OK):
        raise InputError(
            f"expected to be able to write to {target.parent}, found that it is read-only. Pass another --output_dir."
        )


def lock(path: Path) -> Any:
    """Take the lock file at `path` for the life of this process."""
    from filelock import FileLock, Timeout

    taken = FileLock(path)
    try:
        taken.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"expected no other run at work in {path.parent}, found one. Wait for it to end, or pass another --output_dir."
        ) from error
    except OSError as error:
        raise InputError(
            f"expected to be able to write to {path.parent}, found: {error}. Pass another --output_dir."
        ) from error
    return taken


class Run:
    """The stages of one recipe in one directory. Every process of a distributed launch makes one; only the main one writes."""

    def __init__(self, directory: str | Path, task: Any, seed: int, only_stage: str | None = None) -> None:
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
        if self.state.is_main_process:
            if only_stage is None:
                prepare_directory(self.directory)
            else:
                prepare_stage_directory(self.directory / only_stage)
            # One stage of a run's directory may be what that run is at work on.
            whole = only_stage is None or (self.directory / MARKER).exists()
            self._lock = lock(self.directory / (".lock" if whole else f".{only_stage}.lock"))
            for leftover in self.directory.glob(f".{only_stage or '*'}.old"):
                target = self.directory / leftover.name[1:].removesuffix(".old")
                if target.exists():
                    shutil.rmtree(leftover)
                else:  # killed between the two renames of a commit
                    leftover.rename(target)

    def stage(
        self, name: str, function: Callable[..., Outcome], source: str, distributed: bool = False, **arguments: Any
    ) -> Path:
        """Make the directory `name` with `function(source, directory, task, **arguments)`, unless it is there and still what it would be.

        `source`, and every argument that is a Path, names an earlier stage's directory in this run or a model elsewhere.
        `distributed` stages run on every process, and go on where an interrupted attempt stopped (checkpoints, shards); the others run
        on the main process while the rest wait, and start anew.
        """
        self.stages.append(name)
        target = self.directory / name
        partial = self.directory / f".{name}.partial"
        made_by = self._made_by(name, function, source, arguments) if self.state.is_main_process else None
        if made_by is not None:
            self._end_commit(partial, target, made_by)
        finished = self._finished(target, made_by) if made_by is not None else False
        if self._agree(finished):
            return target

        with needing_room(name, self.directory):
            if made_by is not None:
                print(f"{name}: started", flush=True)
                self._start(partial, made_by, resumes=distributed)
            self.state.wait_for_everyone()
            started = time.perf_counter()
            if distributed or self.state.is_main_process:
                from transformers import set_seed

                set_seed(self.seed)
                outcome = function(self._locate(source), partial, self.task, **arguments)
            wait_for_all()  # the main process may have worked alone
            if made_by is not None:
                self._commit(name, partial, target, made_by, outcome, time.perf_counter() - started)
            self.state.wait_for_everyone()
        return target

    def record(self, name: str) -> dict[str, Any]:
        record = read_record(self.directory / name)
        if record is None:
            raise InputError(
                f"expected the finished stage {name!r} in {self.directory}, found none. Run that stage first."
            )
        return record

    def _locate(self, source: str) -> str:
        """An earlier stage of this run by its name; whatever else a source is stays as it was given, a relative path, too."""
        return str(self.directory / source) if source in self.stages[:-1] else source

    def _identify(self, source: str) -> str:
        from pipelines.data.sources import model_fingerprint

        located = Path(self._locate(source))
        record = read_record(located) if located.is_dir() else None
        if record is None:
            return model_fingerprint(source)
        if located not in [self.directory / name for name in self.stages[:-1]]:  # which were looked at in their turn
            check_files(located, record)
        return fingerprint(record)

    def _made_by(
        self, name: str, function: Callable[..., Outcome], source: str, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        settings = {
            key: self._identify(str(value)) if isinstance(value, Path) else describe(value)
            for key, value in arguments.items()
        }
        made_by = {
            "function": f"{function.__module__}.{function.__qualname__}",
            "version": pipelines.__version__,
            "source": source,
            "source_fingerprint": self._identify(source),
            "task": self.task.describe(),
            "seed": self.seed,
            **settings,
        }
        return json.loads(json.dumps(made_by, default=str))

    def _finished(self, target: Path, made_by: dict[str, Any]) -> bool:
        record = read_record(target)
        if record is None:
            return False
        reasons = differences(record["made_by"], made_by)
        damaged = damaged_files(target, record)
        if damaged:
            reasons.append(f"{', '.join(damaged)} changed since it was written")
        if reasons:
            print(
                f"{target.name}: redone, because {reasons[0]}"
                + (f" (and {len(reasons) - 1} more)" if reasons[1:] else ""),
                flush=True,
            )
            return False
        print(f"{target.name}: finished already", flush=True)
        return True

    def _agree(self, finished: bool) -> bool:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([finished])[0] if self.state.num_processes > 1 else finished

    def _start(self, partial: Path, made_by: dict[str, Any], resumes: bool) -> None:
        """Keep what an interrupted attempt at the very same stage left, if it is one that resumes, and nothing else."""
        unfinished = partial / ATTEMPT
        try:
            same = json.loads(unfinished.read_text(encoding="utf-8")) == made_by
        except (OSError, ValueError):
            same = False
        if not (same and resumes) and partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
        (partial / RECORD).unlink(missing_ok=True)
        write_json(unfinished, made_by)

    def _commit(
        self, name: str, partial: Path, target: Path, made_by: dict[str, Any], outcome: Outcome, seconds: float
    ) -> None:
        attempt = (partial / ATTEMPT, partial / "checkpoints")
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
            "files": {str(path.relative_to(partial)): hash_file(path) for path in files},
        }
        record = sealed(record)
        write_json(partial / RECORD, record)
        self._put_in_place(partial, target)
        print(summary_line(record), flush=True)

    def _end_commit(self, partial: Path, target: Path, made_by: dict[str, Any]) -> None:
        """Put in place what an interrupted run had written to its end, the record last, so that nothing is trained twice."""
        record = read_record(partial)
        if record is not None and record["made_by"] == made_by and not damaged_files(partial, record):
            self._put_in_place(partial, target)

    def _put_in_place(self, partial: Path, target: Path) -> None:
        shutil.rmtree(partial / "checkpoints", ignore_errors=True)
        (partial / ATTEMPT).unlink(missing_ok=True)
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)


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


def versions() -> dict[str, str]:
    found = {"pocketformers": pipelines.__version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def summary_line(record: dict[str, Any]) -> str:
    """One line that tells how a stage ended."""
    parts = [f"{record['bytes'] / 1e6:.1f} MB"]
    if record["parameters"]:
        parts.insert(0, f"{record['parameters'] / 1e6:.2f} M parameters")
    for split, metrics in record["metrics"].items():
        parts += [f"{split} {name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)][:1]
    return f"{record['stage']}: done in {record['seconds']:.0f} s, " + ", ".join(parts)
