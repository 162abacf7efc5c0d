"""The Trainer of every training stage, its arguments, and the stage that fine-tunes a teacher."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.trainer_pt_utils import LengthGroupedSampler

from pipelines.config import TeacherConfig
from pipelines.errors import InputError
from pipelines.losses import IGNORED, label_loss, next_token
from pipelines.predict import predict_torch
from pipelines.run import Outcome
from pipelines.sources import model_license

CHECKPOINTS = "checkpoints"
Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own arguments with defaults for small models: batches of like length, one evaluation and checkpoint an epoch."""

    output_dir: str = field(default="runs/demo", metadata={"help": "The directory of the run."})
    num_train_epochs: float = field(default=4.0, metadata={"help": "Epochs of the distillation."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of the distillation."})
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Training examples a device takes at a time."}
    )
    per_device_eval_batch_size: int = field(
        default=32, metadata={"help": "Evaluation examples a device takes at a time."}
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up; below 1, a share of all steps."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Learning rate schedule."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "Order of the training examples: group_by_length wastes little on padding."},
    )
    eval_strategy: str = field(
        default="epoch", metadata={"help": "When to evaluate on the validation split: no, steps or epoch."}
    )
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint: no, steps or epoch."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept while training."})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Keep the checkpoint best on the validation split."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Pin the batches' memory, which only a GPU gains from."},
    )
    # Every weight of the models here takes part in every step, so DDP need not look for those that do not.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP look for weights without a gradient."}
    )
    report_to: str = field(default="none", metadata={"help": "Where to log to: none, tensorboard, wandb, …"})
    logging_steps: float = field(default=20, metadata={"help": "Log every this many steps."})

    def __post_init__(self) -> None:
        if self.push_to_hub:
            raise InputError(
                "expected no --push_to_hub, which this version does not have yet, found it set. Leave it out, and upload the finished "
                "run with 'hf upload <name> <output_dir>'."
            )
        super().__post_init__()


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """Batches of like length, the same whatever the number of processes, and the same again when a run is resumed.

    transformers groups within one device's batch and draws from the global generator, so two processes see other batches than one,
    and dropout on one of them shifts its order against the other's. Here the group is the whole batch and an epoch has its own seed.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class Trainer(transformers.Trainer):
    """transformers' Trainer with one loss rule for all: a sum over examples, divided by their number in the whole batch.

    The whole batch spans accumulation steps and processes. The stock Trainer multiplies the gradients of most classifiers by the
    number of accumulation steps (transformers issue 47688), and a mean of means weighs a short last batch wrongly.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *, causal: bool = False, train_collate: Collate | None = None, **kwargs: Any) -> None:
        """`causal` models predict the next token: their logits meet the labels shifted by one."""
        # A loss function makes the Trainer count the labels of the whole batch and hand us the number.
        super().__init__(compute_loss_func=label_loss, **kwargs)
        self.causal, self.train_collate = causal, train_collate

    def get_train_dataloader(self) -> Any:
        """Training examples may be collated otherwise than those of an evaluation: augmented, or with the teacher's inputs."""
        usual, self.data_collator = self.data_collator, self.train_collate or self.data_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = usual

    def summed_loss(self, model: Any, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Any]:
        """The loss summed over the examples of one batch, and the model's outputs."""
        outputs = model(**inputs)
        return label_loss(*self.align(outputs.logits, labels), self.args.label_smoothing_factor), outputs

    def align(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the labels they are about."""
        return next_token(logits, labels) if self.causal else (logits, labels)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        loss, outputs = self.summed_loss(model, inputs, labels)
        if num_items_in_batch is None:
            loss = loss / labels.ne(IGNORED).sum()
        else:
            # Gradients are averaged over processes, the number of items is summed over them.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss / num_items_in_batch * processes
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        whole_batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = list(dataset["length"]) if "length" in dataset.column_names else [1] * len(dataset)
        return EpochLengthGroupedSampler(whole_batch, lengths, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if "length" in eval_dataset.column_names:
            return super()._get_eval_sampler(eval_dataset)
        return torch.utils.data.SequentialSampler(eval_dataset)  # images have no length to group by


def arguments_for(
    training: transformers.TrainingArguments, learning_rate: float | None = None, epochs: float | None = None
) -> transformers.TrainingArguments:
    """A copy of the training arguments with another learning rate and number of epochs."""
    arguments = copy.copy(training)
    if learning_rate is not None:
        arguments.learning_rate = learning_rate
    if epochs is not None:
        arguments.num_train_epochs = epochs
    return arguments


def train(
    model: Any, task: Any, processor: Any, training: transformers.TrainingArguments, directory: Path,
    train_features: Any, trainer_class: type[Trainer] = Trainer, **trainer_arguments: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train `model` in place on `train_features`; keep checkpoints under `directory` and resume from the last one there.

    Returns what is worth recording: steps, losses, the validation score of every epoch, seconds and examples a second.
    """
    arguments = copy.copy(training)
    arguments.output_dir = str(directory)
    arguments.push_to_hub = False  # a run is pushed whole, once it is verified
    arguments.remove_unused_columns = False  # the collator keeps what the loss needs
    if arguments.load_best_model_at_end:
        arguments.metric_for_best_model = arguments.metric_for_best_model or task.primary_metric
        if arguments.greater_is_better is None or training.metric_for_best_model is None:
            arguments.greater_is_better = task.greater_is_better

    trainer = trainer_class(
        model=model,
        args=arguments,
        data_collator=task.collate(processor),
        train_dataset=train_features,
        eval_dataset=task.features(processor)["validation"],
        processing_class=processor,
        compute_metrics=lambda prediction: task.numbers(prediction.predictions, prediction.label_ids),
        preprocess_logits_for_metrics=keep_answers(task),
        causal=task.causal,
        **trainer_arguments,
    )
    resumed = last_whole_checkpoint(directory)
    result = trainer.train(resume_from_checkpoint=resumed)
    history = trainer.state.log_history
    return {
        "steps": result.global_step,
        "train_loss": result.training_loss,
        "losses": [{"step": line["step"], "loss": line["loss"]} for line in history if "loss" in line],
        "validation": [
            {"epoch": line["epoch"], task.primary_metric: line[f"eval_{task.primary_metric}"]}
            for line in history
            if f"eval_{task.primary_metric}" in line
        ],
        "train_samples_per_second": result.metrics.get("train_samples_per_second"),
        "resumed_from_step": int(resumed.rsplit("-", 1)[1]) if resumed else None,
    }


def last_whole_checkpoint(directory: Path) -> str | None:
    """The latest checkpoint below `directory` that was written to its end: the Trainer writes its state last.

    transformers' own get_last_checkpoint takes the latest folder, also one that a kill left half written.
    """
    for checkpoint in sorted(
        directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True
    ):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None


def keep_answers(task: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What the Trainer keeps of a batch's logits for the metrics: all, unless the task needs less (`task.answers`)."""
    answers = task.answers
    if answers is None:
        return None

    def keep(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.from_numpy(answers(logits.float().cpu().numpy(), labels.cpu().numpy())).to(logits.device)

    return keep


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def save(model: Any, processor: Any, directory: Path) -> None:
    """Write a directory that stock `from_pretrained` opens: weights as safetensors, config, tokenizer or image processor."""
    model.config.use_cache = getattr(model.config, "use_cache", None)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def validation_metrics(model: Any, task: Any, processor: Any) -> dict[str, Any]:
    """Scores on the validation split; the test split is the report's."""
    return task.score(partial(predict_torch, model, name="validate"), processor, "validation")


def fine_tune(
    source: str, directory: Path, task: Any, teacher: TeacherConfig, training: transformers.TrainingArguments
) -> Outcome:
    """Fine-tune a pretrained model into a teacher, or take one that already knows the task as it is (`teacher_epochs` 0).

    With `lora_rank` a LoRA adapter (Hu et al., 2021) is trained in place of all weights, kept in `adapter/`, and merged.
    """
    processor = task.load_processor(source)
    details: dict[str, Any] = {"license": model_license(source)}
    if teacher.teacher_epochs == 0:
        model = task.load_model(source, head="required")
    else:
        model = task.load_model(source, "new if other", teacher.teacher_from_scratch)
        arguments = arguments_for(training, teacher.teacher_learning_rate, teacher.teacher_epochs)
        trained = model
        if teacher.lora_rank:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(
                r=teacher.lora_rank,
                lora_alpha=2 * teacher.lora_rank,
                **task.lora_settings,
            )
            trained = get_peft_model(model, lora)
            details["trainable_parameters"] = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        details |= train(
            trained, task, processor, arguments, directory / CHECKPOINTS, task.features(processor)["train"],
            train_collate=task.training_collate(processor, augment=True),
        )  # fmt: skip
        if teacher.lora_rank:
            if is_main_process():
                trained.save_pretrained(directory / "adapter")
            model = trained.merge_and_unload()
    return finish_model(model, task, processor, directory, details)


def is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def finish_model(model: Any, task: Any, processor: Any, directory: Path, details: dict[str, Any]) -> Outcome:
    """Score a trained model on the validation split and save it, on the main process; the others have nothing left to do."""
    if not is_main_process():
        return Outcome("transformers")
    metrics = validation_metrics(model, task, processor)
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    save(model, processor, directory)
    return Outcome("transformers", {"validation": metrics}, count_parameters(model), details)


def check_above_chance(metrics: dict[str, Any], label_names: list[str]) -> None:
    """Refuse a teacher that does no better than guessing: soft targets of it teach nothing."""
    recalls = list(metrics["recall_per_class"].values())
    if sum(recalls) / len(recalls) <= 1 / len(label_names):
        raise InputError(
            f"expected a teacher that knows the task, found one whose mean recall on the validation split is "
            f"{sum(recalls) / len(recalls):.3f}, no better than guessing among {len(label_names)} labels. Train it longer "
            "(--teacher_epochs, --teacher_learning_rate), or check that its labels mean what the data set's do."
        )
