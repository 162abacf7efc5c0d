"""The Trainer of every training stage, and how a stage trains a model with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import SchedulerType

from pipelines.core.errors import InputError
from pipelines.core.task import IGNORED, Collate, Task
from pipelines.models.predict import lengths_of, longest_first, try_model
from pipelines.training.arguments import best_metric
from pipelines.training.checkpoints import BestCheckpoint, EarlyStopping, last_whole_checkpoint, write_checksums
from pipelines.training.cpu import cpu_speedups
from pipelines.training.losses import ClassifierLoss, NextTokenLoss, losses_of
from pipelines.training.transfer import RowsOf, WithTransfer, own_labels

# The scale of fp16 is halved at every overflow, so that it is found after 16 steps at most; none of these updates the weights.
HARMLESS_OVERFLOWS = 20


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """Batches of like length, the same whatever the number of processes, and the same again when a run is resumed.

    transformers groups within one device's batch and draws from the global generator, so two processes see other batches than one,
    and dropout on one of them shifts its order against the other's. Here the group is the global batch and an epoch has its own seed.
    `fillers` more indices follow at the end (see Filled). `rows_of` tells which rows an epoch has (see transfer.py). Rows of the same of
    `groups`, such as the candidates of a query, stay together, so that a loss may compare them.
    """

    def __init__(
        self,
        batch_size: int,
        lengths: list[int],
        seed: int,
        fillers: int = 0,
        rows_of: RowsOf | None = None,
        groups: list[int] | None = None,
    ) -> None:
        self.total, self.members = len(lengths), None
        if groups is not None:
            of = np.unique(groups, return_inverse=True)[1]
            self.members = np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))[:-1])
            lengths = [max(lengths[row] for row in rows) for rows in self.members]
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.fillers, self.rows_of, self.all_lengths = seed, fillers, rows_of, lengths
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)
        self.rows = range(len(self.all_lengths)) if self.rows_of is None else self.rows_of(self.seed, epoch)
        self.lengths = [self.all_lengths[row] for row in self.rows]

    def __len__(self) -> int:
        return (len(self.lengths) if self.members is None else self.total) + self.fillers

    def __iter__(self) -> Iterator[int]:
        for place in super().__iter__():
            row = int(self.rows[place])
            yield from [row] if self.members is None else self.members[row].tolist()
        yield from range(self.total, self.total + self.fillers)


class Filled(torch.utils.data.Dataset):
    """Examples, and after them fillers without labels, so that several processes have batches of one size to the end of an epoch.

    Else accelerate fills up the last batches with the epoch's first examples, which then count twice.
    """

    def __init__(self, examples: Any, multiple: int) -> None:
        self.examples, self.size = examples, math.ceil(len(examples) / multiple) * multiple

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.examples[index if index < len(self.examples) else 0]
        return row if index < len(self.examples) else row | {"labels": np.full_like(row["labels"], IGNORED).tolist()}


class Trainer(transformers.Trainer):
    """transformers' Trainer with one loss rule for all: a sum over examples, divided by their number in the global batch.

    The global batch spans accumulation steps and processes. The stock Trainer multiplies the gradients of most classifiers by the
    number of accumulation steps (transformers issue 47688), and a mean of means weighs a short last batch wrongly. Without a `task`
    the losses are those of classifiers and causal language models (see losses_of).
    """

    loss_is_scaled_for_ga = True
    rows_per_label = 1.0  # of the global batch: how many rows (or tokens) of it count for each that has a label
    all_tokens = False  # whether the last hidden states of all tokens are needed
    teacher: Any = None

    def __init__(
        self, *arguments: Any, task: Task | None = None, train_collate: Collate | None = None, **keywords: Any
    ) -> None:
        if keywords.get("compute_loss_func") is not None:
            raise InputError(
                "expected no compute_loss_func, found one: the losses are those of the task. Override summed_loss in a subclass instead."
            )
        super().__init__(*arguments, **keywords)
        self.has_task = task is not None
        self.task: Task | ClassifierLoss = losses_of(self.model) if task is None else task
        self.train_collate = train_collate
        # The labels of the global batch are counted, the first of a text left out where none predicts it.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = isinstance(self.task, NextTokenLoss)
        self.overflows = 0  # steps in a row whose gradient was not finite
        self.add_callback(BestCheckpoint())
        if self.args.n_gpu > 1:
            # nn.DataParallel would be slower than processes, and its replicas share what is set on a module.
            print(f"training: on one of {self.args.n_gpu} GPUs; accelerate launch --multi_gpu uses all", flush=True)
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size

    def _inner_training_loop(self, *arguments: Any, **keywords: Any) -> Any:
        # Not in train(): a search has a new model for each trial by now.
        on_cpu = self.args.device.type == "cpu" and getattr(self.args, "cpu_speedups", False)
        models = [model for model in (self.model, self.teacher) if model is not None]
        with cpu_speedups(*models, all_tokens=self.all_tokens) if on_cpu else nullcontext():
            return super()._inner_training_loop(*arguments, **keywords)

    # ---- The loss

    def summed_loss(self, model: Any, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor, Any]:
        """The loss summed over the examples (or tokens) of a batch, their number, and the model's outputs."""
        outputs = self.task.outputs(model(**inputs))
        return *self.task.label_loss(outputs, labels, self.args.label_smoothing_factor), outputs

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        if "labels" not in inputs:
            raise InputError(
                f"expected a column labels in every batch, found {', '.join(inputs)}. Use a collator that makes one, such as "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False) for a language model."
            )
        labels = inputs.pop("labels")
        loss, count, outputs = self.summed_loss(model, inputs, labels)
        if num_items_in_batch is None:
            loss = loss / count
        else:
            # Gradients are averaged over processes, the number of items is summed over them.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss / num_items_in_batch * processes
        return (loss, {"predictions": self.task.predictions(outputs, labels)}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The number of rows, or tokens, that count; of a transfer set, too, for which those that have a label are counted besides."""
        count: Any = super()._get_num_items_in_batch(batch_samples, device)
        if isinstance(self.train_dataset, WithTransfer) and batch_samples:
            own = [{"labels": own_labels(batch["labels"])} for batch in batch_samples]
            labels: Any = super()._get_num_items_in_batch(own, device)
            self.rows_per_label = float(count / labels.clamp(min=1))
        return count

    # ---- Numbers that stop a training, on all processes alike: gradients and weights are the same, or summed over them

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.overflows = 0 if grad_norm is None or math.isfinite(grad_norm) else self.overflows + 1
        # With fp16 a gradient may overflow while its scale is sought; that step is left out.
        if self.overflows > (0 if self.accelerator.scaler is None else HARMLESS_OVERFLOWS):
            self._stop(f"a gradient of norm {float(grad_norm)}")
        return grad_norm

    def check_weights(self) -> None:
        """Raise InputError where a weight is not finite."""
        held = [p.to_local() if hasattr(p, "to_local") else p for p in self.model_wrapped.parameters()]
        broken = any(not weights.isfinite().all() for weights in held)
        if self.accelerator.reduce(torch.tensor(float(broken), device=self.args.device)):
            self._stop("weights that are not finite")

    def _stop(self, found: str) -> None:
        kept = last_whole_checkpoint(Path(str(self.args.output_dir)))
        fp16 = "fp16, which overflows above 65,504: use --bf16 or full precision; or " if self.args.fp16 else ""
        raise InputError(
            f"expected numbers that a training can go on with, found {found} at step {self.state.global_step + 1}. The likely cause is {fp16}"
            f"a learning rate too high ({self.args.learning_rate:.3g}): lower --learning_rate (of a teacher --teacher_learning_rate, after "
            "pruning --prune_learning_rate) or lengthen --warmup_steps; or values that were not finite before, in the model, the examples "
            f"or the teacher's logits. Nothing of it was saved; {f'the last good checkpoint is {kept}' if kept else 'there was no checkpoint yet'}."
        )

    # ---- Checkpoints

    def _run_epoch(self, *arguments: Any, **keywords: Any) -> None:
        if not self.control.should_training_stop:  # a training may be resumed that had stopped early
            super()._run_epoch(*arguments, **keywords)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # transformers 5 writes the weights of a ViT, for one, under the names of earlier versions, and the Trainer that resumes or takes
        # the best checkpoint does not know these: it leaves the weights as they are, in silence (transformers issue 43701).
        by_own_names = partialmethod(PreTrainedModel.save_pretrained, save_original_format=False)
        with patch.object(PreTrainedModel, "save_pretrained", by_own_names):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_weights()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every process writes the state of its random numbers
        if self.args.should_save:
            write_checksums(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")

    # ---- Data

    def get_train_dataloader(self) -> Any:
        """Training examples may be collated otherwise than those of an evaluation: augmented, or with the teacher's inputs."""
        collate, dataset = self.train_collate or self.data_collator, self.train_dataset
        if self._groups_lengths() and self.args.world_size > 1 and not self.args.dataloader_drop_last:
            dataset = Filled(dataset, self._train_batch_size * self.args.world_size)
        with patch.object(self, "data_collator", collate), patch.object(self, "train_dataset", dataset):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """All examples of an evaluation, also where a training leaves out those that are no whole batch: they are scored together."""
        with patch.object(self.args, "dataloader_drop_last", False):
            return super().get_eval_dataloader(eval_dataset)

    def _groups_lengths(self) -> bool:
        return self.has_task and self.args.train_sampling_strategy == "group_by_length"

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        examples = dataset.examples if isinstance(dataset, Filled) else dataset
        draws = hasattr(examples, "rows_of_epoch")
        has_groups = self.has_task and "group" in getattr(examples, "column_names", [])
        groups = list(examples["group"]) if has_groups else None
        if not self._groups_lengths() and not draws and groups is None:
            return super()._get_train_sampler(train_dataset)
        global_batch = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = lengths_of(examples) if self._groups_lengths() else [1] * len(examples)
        in_epoch = examples.in_epoch if draws else len(examples)
        fillers = -in_epoch % (self._train_batch_size * self.args.world_size) if isinstance(dataset, Filled) else 0
        rows_of = examples.rows_of_epoch if draws else None
        return EpochLengthGroupedSampler(global_batch, lengths, seed, fillers, rows_of, groups)

    def num_examples(self, dataloader: Any) -> int:
        examples = getattr(dataloader.dataset, "examples", dataloader.dataset)
        return examples.in_epoch if hasattr(examples, "in_epoch") else super().num_examples(dataloader)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if not self.has_task:
            return super()._get_eval_sampler(eval_dataset)
        return longest_first(lengths_of(eval_dataset)).tolist()


def train(
    model: Any,
    task: Task,
    processor: Any,
    training: transformers.TrainingArguments,
    directory: Path,
    train_features: Any,
    trainer_class: type[Trainer] = Trainer,
    search: Callable[[Any], dict[str, Any]] | None = None,
    **trainer_arguments: Any,
) -> dict[str, Any]:
    """Train `model` in place on `train_features`; keep checkpoints under `directory` and resume from the last one there.

    Returns what is worth recording, see _details. With `search` the trainer is made, nothing is trained, and what `search(trainer)` returns
    is returned.
    """
    arguments = _arguments_of(training, task, directory)
    _check_batch(arguments, train_features)
    patience = getattr(arguments, "early_stopping_patience", None)
    validation = task.features(processor)["validation"]
    place = np.argsort(longest_first(lengths_of(validation)))  # of each example among the evaluated ones

    def numbers(found: Any) -> dict[str, float]:
        scores = task.scores(found.predictions[place], found.label_ids[place])
        return {name: value for name, value in scores.items() if isinstance(value, float)}

    try_model(model, task.features(processor)["train"], task.collate(processor))
    use_cache = getattr(model.config, "use_cache", None)
    trainer = trainer_class(
        model=model,
        args=arguments,
        task=task,
        data_collator=task.collate(processor),
        train_dataset=train_features,
        eval_dataset=validation,
        processing_class=processor,
        compute_metrics=numbers,
        callbacks=[] if patience is None else [EarlyStopping(patience)],
        **trainer_arguments,
    )
    if search is not None:
        return search(trainer)
    resumed = last_whole_checkpoint(directory)
    whole = copy.deepcopy(model) if trainer.is_fsdp_enabled and trainer.accelerator.is_main_process else None
    result = trainer.train(resume_from_checkpoint=resumed)
    trainer.check_weights()
    make_whole(trainer, model, whole)
    # The Trainer turned the cache of keys and values off: for good, and so for every model made of this one.
    vars(model.config).pop("use_cache", None)
    if use_cache is not None:
        model.config.use_cache = use_cache
    return _details(result, trainer.state.log_history, task, resumed)


def _details(result: Any, history: list[dict[str, Any]], task: Task, resumed: str | None) -> dict[str, Any]:
    """What of a training is worth recording: steps, losses, the validation score of every epoch, and examples a second.

    In one that was resumed `train_loss` and the next of `losses` are means of the steps since, as transformers counts them.
    """
    metric = task.primary_metric
    return {
        "steps": result.global_step,
        "train_loss": result.training_loss,
        "losses": [{"step": line["step"], "loss": line["loss"]} for line in history if "loss" in line],
        "validation": [
            {"epoch": line["epoch"], metric: line[f"eval_{metric}"]} for line in history if f"eval_{metric}" in line
        ],
        "train_samples_per_second": result.metrics.get("train_samples_per_second"),
        **task.loss_details,
        "resumed_from_step": int(resumed.rsplit("-", 1)[1]) if resumed else None,
    }


def _check_batch(arguments: transformers.TrainingArguments, train_features: Any) -> None:
    """Raise InputError where all that there is would be left out with --dataloader_drop_last."""
    batch = arguments.train_batch_size * arguments.world_size
    rows = getattr(train_features, "in_epoch", len(train_features))  # of a transfer set or of views not all
    if arguments.dataloader_drop_last and rows < batch:
        raise InputError(
            f"expected a whole batch of {batch} training examples with --dataloader_drop_last, found {rows}. Lower "
            "--per_device_train_batch_size, or leave --dataloader_drop_last out."
        )


def _arguments_of(training: transformers.TrainingArguments, task: Task, directory: Path) -> Any:
    """The arguments of one training of a task, with its checkpoints in `directory`."""
    arguments = copy.copy(training)
    arguments.output_dir = str(directory)
    # A run is pushed whole, once it is verified; and a checkpoint holds all arguments, where no secret belongs.
    arguments.push_to_hub, arguments.hub_token = False, None
    arguments.remove_unused_columns = False  # the collator keeps what the loss needs
    arguments.label_names = ["labels"]  # which the Trainer looks for in the model's own forward; the loss is ours
    arguments.metric_for_best_model, arguments.greater_is_better = best_metric(arguments, task)
    if getattr(arguments, "early_stopping_patience", None) is not None:
        arguments.restore_callback_states_from_checkpoint = True  # how many evaluations brought nothing better
    if arguments.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        # These look at that metric, and take it for a loss unless they are told.
        given: Any = arguments.lr_scheduler_kwargs or {}
        arguments.lr_scheduler_kwargs = {"mode": "max" if arguments.greater_is_better else "min", **given}
    return arguments


def make_whole(trainer: Trainer, model: Any, whole: Any) -> None:
    """Turn `model`, on the main process, into one that holds all its trained weights in float32, as a model that was trained alone
    does: FSDP leaves a share of them on each process, DeepSpeed rounds them. `whole` is a copy from before the training."""
    if trainer.is_fsdp_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model)
        if whole is not None:
            whole.load_state_dict(weights)
            model.__class__, model.__dict__ = type(whole), whole.to(trainer.args.device).__dict__
    elif trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param

        for parameter in model.parameters():
            exact = safe_get_full_fp32_param(parameter)  # None for a frozen weight
            parameter.data = (parameter.data if exact is None else exact).float()
