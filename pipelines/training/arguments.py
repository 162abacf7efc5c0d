"""The arguments of every training: transformers' own with other defaults, and what of them cannot work, before any data is read."""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import transformers
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from pipelines.core.config import Count, Positive, Share, did_you_mean, flag
from pipelines.core.errors import InputError
from pipelines.core.task import Task

NEEDED = {"prediction_loss_only": False, "batch_eval_metrics": False, "eval_do_concat_batches": True}
LOGGER_PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml"}  # the others are named as their loggers


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own arguments with defaults for small models: batches of like length, one evaluation and checkpoint an epoch."""

    output_dir: str = flag("runs/demo", "The directory of the run.")
    num_train_epochs: Positive = flag(4.0, "Epochs of the distillation.")
    max_steps: int = flag(
        -1,
        "Steps of the distillation, instead of --num_train_epochs. The teacher's fine-tuning and the recovery after pruning have "
        "--teacher_epochs and --prune_epochs.",
    )
    learning_rate: Positive = flag(1e-4, "Peak learning rate of the distillation.")
    per_device_train_batch_size: Count = flag(16, "Training examples a device takes at a time.")
    per_device_eval_batch_size: Count = flag(32, "Evaluation examples a device takes at a time.")
    gradient_accumulation_steps: Count = flag(1, "Batches whose gradients are added up for one update.")
    warmup_steps: float = flag(
        0.1,
        "Steps of warm-up; below 1, a share of all steps. A number of steps is for the distillation only: the other trainings then keep "
        "the default.",
    )
    weight_decay: float = flag(0.01, "Weight decay.")
    label_smoothing_factor: Share = flag(0.0, "Share of each label's probability that is spread over all labels.")
    optim_args: str | None = flag(None, "Arguments of the optimizer.", metavar="name=value,name=value")
    lr_scheduler_type: SchedulerType | str = flag("linear", "Learning rate schedule.")
    train_sampling_strategy: str = flag(
        "group_by_length",
        "Order of the training examples: group_by_length wastes little on padding.",
        choices=["random", "sequential", "group_by_length"],
    )
    eval_strategy: IntervalStrategy | str = flag("epoch", "When to evaluate on the validation split.")
    save_strategy: SaveStrategy | str = flag("epoch", "When to write a checkpoint.")
    save_total_limit: int = flag(2, "Checkpoints kept while training.")
    load_best_model_at_end: bool = flag(True, "Keep the checkpoint with the best --metric_for_best_model.")
    metric_for_best_model: str | None = flag(
        None,
        "What the best checkpoint is best by. Left out: the task's primary metric; eval_loss: the loss against the labels.",
    )
    early_stopping_patience: Annotated[int | None, "at least 1"] = flag(
        None,
        "End every training, the teacher's and the recoveries, too, once this many evaluations in a row brought nothing better.",
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Pin the batches' memory, which only a GPU gains from."},
    )
    # Every weight of the models here takes part in every step, so DDP need not look for those that do not.
    ddp_find_unused_parameters: bool | None = flag(False, "Let DDP look for weights without a gradient.")
    ddp_timeout: int = flag(
        86400, "Seconds that processes wait for one another, also while one works alone, such as to quantize."
    )
    cpu_speedups: bool = flag(
        True, "Train faster on a CPU: see pipelines/training/cpu.py. It changes nothing on a GPU."
    )
    resume_from_checkpoint: str | None = flag(
        None, "Refused: a run continues from the last whole checkpoint of its --output_dir by itself."
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Where to log to.", "choices": ["none", "all", *INTEGRATION_TO_CALLBACK]},
    )
    logging_steps: float = flag(20, "Log every this many steps.")

    def __post_init__(self) -> None:
        if self.resume_from_checkpoint is not None:
            raise InputError(
                f"expected no --resume_from_checkpoint, found {self.resume_from_checkpoint!r}. Leave it out: the same command continues from the "
                "last whole checkpoint of its --output_dir by itself."
            )
        strategies = [str(getattr(one, "value", one)) for one in (self.eval_strategy, self.save_strategy)]
        if self.early_stopping_patience is not None and "no" in strategies:
            raise InputError(
                "expected --eval_strategy and --save_strategy of epoch or steps with --early_stopping_patience, which looks at "
                f"evaluations, found {' and '.join(strategies)}."
            )
        if self.metric_for_best_model == "loss":  # what transformers also makes of a metric that was left out
            self.metric_for_best_model = "eval_loss"
        self.greater_is_better_given = self.greater_is_better  # which transformers sets, by the metric's name
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """The settings that a result depends on: `cpu_speedups` only where they are switched off on a CPU, and what accelerate launch
        asks for beside the flags: another precision, a compiler."""
        settings: dict[str, Any] = super().to_dict()
        if self.cpu_speedups or self.device.type != "cpu":
            del settings["cpu_speedups"]
        if self.early_stopping_patience is None:
            del settings["early_stopping_patience"]
        launch = {
            "mixed_precision": "no" if self.fp16 or self.bf16 else self.mixed_precision,
            "dynamo_backend": os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower(),
        }
        return settings | {name: value for name, value in launch.items() if value != "no"}


def best_metric(arguments: transformers.TrainingArguments, task: Task) -> tuple[str, bool]:
    """The metric that the best checkpoint is best by, and whether greater is better. Raises InputError for one that there is not."""
    name = str(arguments.metric_for_best_model or "loss")
    # "loss" is what transformers makes of a metric that was left out; a task may have a score of that name.
    known = {**task.metrics, "eval_loss": False}
    name = task.primary_metric if name == "loss" else name if name in known else name.removeprefix("eval_")
    if name not in known:
        raise InputError(
            f"expected --metric_for_best_model out of {', '.join(known)}, with eval_ before it or without, found {name!r}."
            f"{did_you_mean([name], known)}"
        )
    given = getattr(arguments, "greater_is_better_given", None)
    if given is not None and given != known[name]:
        raise InputError(
            f"expected --greater_is_better {str(known[name]).lower()} for {name}, found {str(given).lower()}. Leave it out."
        )
    return name, known[name]


def check_training(arguments: transformers.TrainingArguments, task: Task) -> None:
    """Raise InputError for settings that the Trainer will refuse, before any data is read: an optimizer that is not installed,
    arguments that a schedule does not take.

    transformers looks at most of them when a Trainer is made, so one is made here, of a model of two weights.
    """
    best_metric(arguments, task)
    for name, needed in NEEDED.items():
        if getattr(arguments, name) != needed:
            raise InputError(
                f"expected --{name} {str(needed).lower()}, since a task scores all predictions at once, found the contrary. Leave it out."
            )
    known = {*get_available_reporting_integrations(), "flyte"}  # which says itself that it is missing
    missing = [name for name in arguments.report_to or () if name not in known]
    if missing:
        packages = " ".join(LOGGER_PACKAGES.get(name, name) for name in missing)
        raise InputError(
            f"expected loggers that are installed for --report_to, found {', '.join(missing)}, which cannot be imported. Install "
            f"what is missing (pip install {packages}), or leave --report_to out."
        )
    if arguments.mixed_precision == "fp16" and arguments.device.type == "cpu":
        raise InputError(
            "expected a GPU for fp16, found none: it would be left out in silence. Train in full precision (without --fp16, "
            "accelerate launch --mixed_precision no), or with --bf16 --use_cpu."
        )
    tried = copy.copy(arguments)
    tried.push_to_hub = tried.torch_compile = False
    tried.label_smoothing_factor = 0.0  # for which it looks into the config of a true model
    with tempfile.TemporaryDirectory() as tried.output_dir:
        try:
            trainer = transformers.Trainer(torch.nn.Linear(1, 1), tried, eval_dataset=[])
            if arguments.use_liger_kernel:
                apply_liger_kernel(trainer.model, None)
            if arguments.torch_compile:
                backend, mode = str(arguments.torch_compile_backend), arguments.torch_compile_mode
                torch.compile(torch.nn.Linear(1, 1), backend=backend, mode=mode)(torch.ones(1, 1))
            # What shards a model makes an optimizer of its own, and target modules are those of the true model.
            if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or arguments.optim_target_modules):
                trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        except Exception as error:
            raise InputError(
                f"expected settings that a training can be carried out with on this machine, found: {str(error).rstrip('.')}. Install what "
                "is missing, or change the flag."
            ) from error


def arguments_for(
    training: transformers.TrainingArguments, learning_rate: float | None, epochs: float
) -> transformers.TrainingArguments:
    """The arguments of another training than the distillation: with a learning rate of its own, if given, and its length in epochs, not steps."""
    arguments = copy.copy(training)
    arguments.max_steps, arguments.num_train_epochs = -1, epochs
    if arguments.warmup_steps > 1:
        arguments.warmup_steps = TrainingArguments.warmup_steps
    if learning_rate is not None:
        arguments.learning_rate = learning_rate
    return arguments
