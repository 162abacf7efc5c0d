"""Kill runs at random moments in every stage, repeat the command, and require that they end as an undisturbed run did.

    python benchmarks/kills.py --moments 10                                                  # tiny BERT, ViT and GPT-2, an hour on one core
    python benchmarks/kills.py --moments 10 -- recipes/distill_bert.py --dataset reviews.csv …      # a run of one's own

A round is a whole run. In each of its stages it is killed twice, by SIGKILL and with all its processes: at a random moment of the time
that the stage takes, and before a random one of the changes that the stage makes to the directory (a file opened for writing, renamed
or removed). In the end every file of every stage must have the same bytes as in the undisturbed run, and the report and the records the
same content, but for times; and nothing else may be left in the directory.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import pkgutil
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPORT = "report"
OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
# What differs between two runs that are the same: times, what is computed from them, and means over the steps since a resume.
TIMES = {
    "seconds",
    "latency_ms",
    "samples_per_second",
    "train_samples_per_second",
    "peak_memory_bytes",
    "faster_than_teacher",
    "faster_than_teacher_onnx",
    "faster_than_shipped",
    "load",
    "busy",
    "time_to_first_token_ms",
    "tokens_per_second",
    "files",
    "sha256",
    "resumed_from_step",
    "train_loss",
    "losses",
}

# Stored soft targets, every optional stage, and no choice that is made by measuring time.
FAST = (
    "--num_train_epochs 2 --learning_rate 3e-3 --per_device_train_batch_size 8 --student_layers 2 --label_baseline true "
    "--prune_heads 0.25 --prune_ffn 0.25 --prune_steps 2 --prune_epochs 1 --benchmark_rounds 1 --benchmark_threads 1 --benchmark_seconds 0.1 "
    "--use_cpu true --teacher_learning_rate 3e-3 --max_quality_drop 1 --web false"
)
TINY = {
    "bert": "--teacher_epochs 4 --max_length 32",
    "vit": "--teacher_epochs 4 --teacher_from_scratch true --quantization static_int8",
    "gpt2": "--teacher_epochs 4 --teacher_from_scratch true --vocabulary_size 300 --max_length 32 --soft_targets stored "
    "--quantization int8_blocks --block_size 16",
}


def import_everything() -> None:
    """Import what a recipe imports on its way: a run is then forked in a moment, where its own start would take ten seconds."""
    # A fork has one thread only, so the libraries must not start others.
    os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"})
    sys.path.insert(0, str(ROOT))
    import pipelines

    for module in pkgutil.walk_packages(pipelines.__path__, "pipelines."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("matplotlib.pyplot", "peft", "torch.onnx", "transformers.exporters", "onnxscript"):
        importlib.import_module(name)
    gc.freeze()  # so that no collection of a run looks through all of it


class FileOperations:
    """An audit hook that counts the changes a process makes to each stage's directory, and kills it before a chosen one."""

    def __init__(self, run: Path, kill_in: str | None, kill_before: int) -> None:
        self.hidden = re.compile(re.escape(str(run)) + r"/\.(\w+)\.")
        self.kill_in, self.kill_before = kill_in, kill_before
        self.stage, self.counts = "", Counter[str]()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes and event not in OPERATIONS:
            return
        found = self.hidden.search(" ".join(map(str, arguments[:2])))
        if found:
            self.stage = REPORT if found[1] == "README" else found[1]
        elif os.path.isabs(str(arguments[0])):
            return  # a change elsewhere; names that are not absolute are of a directory that is being removed
        self.counts[self.stage] += 1
        if self.stage == self.kill_in and self.counts[self.stage] == self.kill_before:
            os.killpg(0, signal.SIGKILL)


def start(command: list[str], run: Path, kill_in: str | None = None, kill_before: int = 0) -> int:
    """Run a recipe in a forked process group of its own, its output in `output.log` beside the run; the process's id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    status = 1
    try:
        output = os.open(run.parent / "output.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        operations = FileOperations(run, kill_in, kill_before)
        sys.addaudithook(operations)
        sys.argv = [*command, "--output_dir", str(run)]
        runpy.run_path(command[0], run_name="__main__")
        counts = dict(operations.counts)
        (run.parent / "operations.json").write_text(json.dumps(counts), encoding="utf-8")
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(command: list[str], run: Path) -> None:
    """Run a recipe to its end. Raises RuntimeError with its last lines where it fails."""
    check_status(os.waitpid(start(command, run), 0)[1], run)


def check_status(status: int, run: Path) -> None:
    if status:
        log = (run.parent / "output.log").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the run in {run} ended with status {status}:\n{log[-3000:]}")


def kill_in_stage(
    command: list[str], run: Path, stage: str, before: str | None, seconds: float, operation: int
) -> bool:
    """Go on with a run and kill it in `stage`: after `seconds` of it, or before its file operation of that number, if that is not 0.

    `before` is the stage before it. Where the stage ends sooner, it is killed at that moment; false where the whole run has ended before.
    """
    log = run.parent / "output.log"
    log.unlink(missing_ok=True)
    pid = start(command, run, stage if operation else None, operation)
    begun = rf"^{before}: (done|finished)" if stage == REPORT else rf"^{stage}: (started|finished)"
    ended = rf"^{stage}: (done|finished|written)"
    deadline = None
    while True:
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if deadline is None and re.search(begun, text, re.MULTILINE):
            deadline = time.monotonic() + (1e9 if operation else seconds)
        if re.search(ended, text, re.MULTILINE) or (deadline is not None and time.monotonic() >= deadline):
            os.killpg(pid, signal.SIGKILL)
            return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        over, status = os.waitpid(pid, os.WNOHANG)
        if over:
            killed = os.WIFSIGNALED(status)
            check_status(0 if killed else status, run)
            return killed
        time.sleep(0.005)


def stage_seconds(run: Path) -> dict[str, float]:
    """The stages of a finished run in their order, and how long each took; the report comes last."""
    records = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in run.glob("*/record.json")}
    written = {name: (run / name / "record.json").stat().st_mtime for name in records}
    ordered = sorted(records, key=lambda name: written[name])
    found = {name: float(records[name]["seconds"]) for name in ordered}
    return found | {REPORT: (run / "report.json").stat().st_mtime - max(written.values())}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def compare(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs, and what is left in the second beside its files."""
    from pipelines.core.identity import differences

    found = []
    for path in sorted(one.glob("*/record.json")):
        name = path.parent.name
        left, right = (json.loads((run / name / "record.json").read_text(encoding="utf-8")) for run in (one, other))
        found += [f"{name}/{phrase}" for phrase in differences(left["files"], right["files"])]
        found += [f"{name}/record.json: {phrase}" for phrase in differences(without_times(left), without_times(right))]
    reports = [without_times(json.loads((run / "report.json").read_text(encoding="utf-8"))) for run in (one, other)]
    found += [f"report.json: {phrase}" for phrase in differences(*reports)]
    listings = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (one, other)]
    return found + [f"{name} is in one of them only" for name in sorted(listings[0] ^ listings[1])]


def kill_round(
    command: list[str], undisturbed: Path, run: Path, generator: random.Random, both: bool
) -> dict[str, int]:
    """One run, killed in every stage at a moment and before a change, or by one of the two, and brought to its end; kills by stage."""
    counted = undisturbed.parent / "operations.json"
    operations = json.loads(counted.read_text(encoding="utf-8")) if counted.exists() else {}
    kills = Counter[str]()
    before = None
    for stage, seconds in stage_seconds(undisturbed).items():
        for at_change in (True, False) if both else (generator.random() < 0.5,):
            operation = generator.randint(1, operations.get(stage, 10)) if at_change else 0
            kills[stage] += kill_in_stage(command, run, stage, before, generator.uniform(0, seconds), operation)
        before = stage
    finish(command, run)
    return dict(kills)


def disturb(
    command: list[str], undisturbed: Path, folder: Path, moments: int = 1, seed: int = 0, both: bool = True
) -> tuple[dict[str, int], list[str]]:
    """So many rounds on a command, whose --output_dir is replaced: kills by stage, and what differs from the run in `undisturbed`."""
    kills, found = Counter[str](), []
    for number in range(moments):
        # In a directory of the same name, which the report and the model card hold.
        run = folder / str(seed + number) / undisturbed.name
        shutil.rmtree(run.parent, ignore_errors=True)
        run.parent.mkdir(parents=True)
        kills.update(kill_round(command, undisturbed, run, random.Random(seed + number), both))
        found += [f"round {seed + number}: {phrase}" for phrase in compare(undisturbed, run)]
    return dict(kills), found


def make_inputs(name: str, folder: Path) -> None:
    """A tiny model, or its shape, and data to learn from, as the tests make them."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from transformers import AutoModel

    import conftest

    torch.manual_seed(0)
    if name == "bert":
        AutoModel.from_config(conftest.tiny_config("bert", initializer_range=0.1)).save_pretrained(folder / "model")
        conftest.make_tokenizer().save_pretrained(folder / "model")
        conftest.write_csv(folder / "data.csv", conftest.make_texts(240))
    elif name == "vit":
        conftest.tiny_config("vit", initializer_range=0.1).save_pretrained(folder / "model")
        conftest.make_image_processor().save_pretrained(folder / "model")
        conftest.write_image_folder(folder / "data")
    else:
        conftest.tiny_language_model(n_layer=4).config.save_pretrained(folder / "model")
        texts = [" ".join(text for text, _ in conftest.make_texts(6, seed)) + "." for seed in range(40)]
        (folder / "data.txt").write_text("\n\n".join(texts), encoding="utf-8")


def tiny_command(name: str, folder: Path) -> list[str]:
    """The command of a recipe on inputs that are made in `folder` first, by a process of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("data*")):
        pid = os.fork()
        if not pid:
            make_inputs(name, folder)
            os._exit(0)
        os.waitpid(pid, 0)
    data = next(folder.glob("data*"))
    inputs = ["--teacher_model", str(folder / "model"), "--dataset", str(data)]
    return [str(ROOT / "recipes" / f"distill_{name}.py"), *inputs, *f"{FAST} {TINY[name]}".split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=10, help="Rounds: kills of either kind in every stage.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the first round's moments; the next has the next.")
    parser.add_argument("--recipes", nargs="+", choices=list(TINY), default=list(TINY), help="The tiny runs to make.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/kills"), help="Where the runs are made.")
    parser.add_argument(
        "command", nargs="*", help="After --: a recipe and its flags, to kill in place of the tiny runs."
    )
    arguments = parser.parse_args()
    import_everything()

    folder = arguments.output_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in arguments.recipes if not arguments.command else [Path(arguments.command[0]).stem]:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            tempfile.tempdir = os.environ["TMPDIR"] = scratch
            command = arguments.command or tiny_command(name, folder / name / "inputs")
            undisturbed = folder / name / "undisturbed" / "run"
            undisturbed.parent.mkdir(parents=True, exist_ok=True)
            if not (undisturbed.parent / "operations.json").exists():
                shutil.rmtree(undisturbed, ignore_errors=True)
                finish(command, undisturbed)
            started = time.perf_counter()
            kills, found = disturb(command, undisturbed, folder / name / "killed", arguments.moments, arguments.seed)
            seconds = time.perf_counter() - started
        killed = f"killed {sum(kills.values())} times in {len(kills)} stages, {', '.join(kills)}, in {seconds:.0f} s"
        ended = f"{len(found)} differences from the undisturbed run" if found else "the same as the undisturbed run"
        print("\n  ".join([f"{name}: {killed}; {ended}", *found]), flush=True)
        failed |= bool(found)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
