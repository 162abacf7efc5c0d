"""The Trainer of every training stage, its arguments, and the stage that fine-tunes a teacher."""

from __future__ import annotations

import copy
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.trainer_pt_utils import LengthGroupedSampler

from pipelines.core.config import TeacherConfig
from pipelines.core.errors import InputError
from pipelines.core.memory import keep_freed_memory
from pipelines.core.run import Outcome, damaged_files, hash_file, write_json
from pipelines.core.task import IGNORED
from pipelines.data.sources import check_safetensors, model_license
from pipelines.models.predict import predict_torch
from pipelines.tasks.text_generation.task import check_perplexity
from pipelines.training.dropout import cheap_dropout
from pipelines.training.finite import (
    HARMLESS_OVERFLOWS,
    REMEMBERED_NORMS,
    has_exploded,
    in_words,
    likely_cause,
    name_rows,
    shapes,
    unfinite_inputs,
    weights_are_finite,
)
from pipelines.training.first_token import first_token_only
from pipelines.training.losses import label_loss, next_token

CHECKPOINTS = "checkpoints"
CHECKSUMS = "checksums.json"
WEIGHTS = "model.safetensors"
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
        default=True,
        metadata={"help": "Keep the checkpoint with the least validation loss, or the best --metric_for_best_model."},
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available,
        metadata={"help": "Pin the batches' memory, which only a GPU gains from."},
    )
    # Every weight of the models here takes part in every step, so DDP need not look for those that do not.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP look for weights without a gradient."}
    )
    ddp_timeout: int = field(
        default=86400,
        metadata={
            "help": "Seconds that processes wait for one another, also while one works alone, such as to quantize."
        },
    )
    attention_dropout: bool = field(
        default=True,
        metadata={
            "help": "False: when training on a CPU, attention drops out nothing, whatever the model's config says, as torch's fast kernel for "
            "it needs: a step of 512 tokens takes about half the time, one of 64 the same."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Refused: a run goes on from the last whole checkpoint of its --output_dir by itself."},
    )
    report_to: str = field(default="none", metadata={"help": "Where to log to: none, tensorboard, wandb, …"})
    logging_steps: float = field(default=20, metadata={"help": "Log every this many steps."})

    def __post_init__(self) -> None:
        if self.resume_from_checkpoint is not None:
            raise InputError(
                f"expected no --resume_from_checkpoint, found {self.resume_from_checkpoint!r}. Leave it out: the same command goes on from the "
                "last whole checkpoint of its --output_dir by itself."
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


class BestCheckpoint(transformers.TrainerCallback):
    """Finds the best checkpoint of a run that was moved since: the state of a checkpoint names it by its whole path."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)


class Trainer(transformers.Trainer):
    """transformers' Trainer with one loss rule for all: a sum over examples, divided by their number in the whole batch.

    The whole batch spans accumulation steps and processes. The stock Trainer multiplies the gradients of most classifiers by the
    number of accumulation steps (transformers issue 47688), and a mean of means weighs a short last batch wrongly.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *, causal: bool = False, train_collate: Collate | None = None, **kwargs: Any) -> None:
        """`causal` models predict the next token: their logits meet the labels shifted by one."""
        # A loss function makes the Trainer count the labels of the whole batch and hand us the number.
        super().__init__(compute_loss_func=label_loss, callbacks=[BestCheckpoint()], **kwargs)
        self.causal, self.train_collate = causal, train_collate
        # Of the step at work: how many went before, its batches on this process and their loss; and what gradients were like.
        self.step, self.step_epoch, self.step_learning_rate = 0, 0.0, 0.0
        self.step_batches: list[dict[str, Any]] = []
        # Of each batch that a teacher in the loop has answered, where its answers are not finite.
        self.unfinite_answers: list[dict[str, list[int]]] = []
        self.step_loss: Tensor | float = 0.0
        self.norms: deque[float] = deque(maxlen=REMEMBERED_NORMS)
        self.overflows = 0

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

    def evaluation_loop(self, dataloader: Any, description: str, *arguments: Any, **keywords: Any) -> Any:
        """An evaluation whose loss, too, counts every example once: the stock one is a mean over batches that several processes fill up
        with examples they have seen, and by it the best checkpoint is found."""
        output: Any = super().evaluation_loop(dataloader, description, *arguments, **keywords)
        metrics, labels = output.metrics, output.label_ids
        metric_key_prefix = keywords.get("metric_key_prefix", "eval")
        if self.causal and f"{metric_key_prefix}_perplexity" in metrics:
            metrics[f"{metric_key_prefix}_loss"] = math.log(metrics[f"{metric_key_prefix}_perplexity"])
        elif not self.causal and output.predictions is not None:
            logits = torch.from_numpy(output.predictions)
            loss = label_loss(logits, torch.from_numpy(labels), self.args.label_smoothing_factor)
            metrics[f"{metric_key_prefix}_loss"] = float(loss) / len(labels)
        return output

    # Numbers that stop: the loss and the gradient are looked at after the backward pass and before the weights change.

    def get_batch_samples(self, epoch_iterator: Any, *arguments: Any, **keywords: Any) -> Any:
        batches, items = super().get_batch_samples(self._each_example_once(epoch_iterator), *arguments, **keywords)
        self.step, self.step_epoch = self.state.global_step, float(self.state.epoch or 0)
        self.step_batches, self.step_loss, self.step_learning_rate = batches, 0.0, self._get_learning_rate()
        self.unfinite_answers = []
        return batches, items

    def _each_example_once(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """This process's batches of one step. Of several processes all take equal parts of an epoch's last batch: what fills it up
        are the epoch's first examples again, which lose their labels here and so have no part in the loss."""
        examples: Any = self.train_dataset
        for index, batch in enumerate(batches, self._first_batch_of_step(self.state.global_step)):
            first = (index * self.args.world_size + self.args.process_index) * self.args.train_batch_size
            batch["labels"][max(0, len(examples) - first) :] = IGNORED
            yield batch

    def _first_batch_of_step(self, step: int) -> int:
        """The place in its epoch of the first batch, of all processes together, that a step takes."""
        examples: Any = self.train_dataset
        batch = self.args.train_batch_size * self.args.world_size
        batches = len(examples) // batch if self.args.dataloader_drop_last else math.ceil(len(examples) / batch)
        steps = math.ceil(batches / self.args.gradient_accumulation_steps)
        return step % steps * self.args.gradient_accumulation_steps

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        loss = super().training_step(*arguments, **keywords)
        self.step_loss = self.step_loss + loss.detach()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.check_step(None if grad_norm is None else float(grad_norm))
        return grad_norm

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        model: Any = self.model
        # transformers 5 writes the weights of a ViT, for one, under the names of earlier versions, and the Trainer that resumes or takes
        # the best checkpoint does not know these: it leaves the weights as they are, in silence (transformers issue 43701).
        directory = Path(str(output_dir or self.args.output_dir))
        if self.args.should_save and (directory / WEIGHTS).is_file():
            own = model.state_dict() if state_dict is None else state_dict
            if not check_safetensors(directory / WEIGHTS) <= own.keys():
                model.save_pretrained(directory, state_dict=state_dict, save_original_format=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_weights()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every process writes the state of its random numbers
        if self.args.should_save:
            seal_checkpoint(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")

    def check_step(self, norm: float | None) -> None:
        """Raise InputError, on every process alike, where the step's loss or gradient is no number to go on with.

        The gradient's norm is the same on all processes, and the loss is summed over them, so that none is left waiting.
        """
        loss = self._sum_over_processes(self.step_loss) / self.accelerator.num_processes
        # With fp16 a gradient may overflow while its scale is sought; that step is left out.
        overflow = norm is not None and not math.isfinite(norm) and self.accelerator.scaler is not None
        self.overflows = self.overflows + 1 if overflow else 0
        harmless = overflow and self.overflows <= HARMLESS_OVERFLOWS
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm) and not harmless):
            self._stop(f"a loss of {in_words(loss)} and a gradient of norm {in_words(norm)}")
        if norm is None or harmless:
            return
        if has_exploded(norm, self.norms):
            self._stop(f"a gradient of norm {in_words(norm)}, more than 1,000 times what it was")
        self.norms.append(norm)

    def check_weights(self) -> None:
        """Raise InputError, on every process alike, where the last step left weights that are not finite."""
        if self._sum_over_processes(0.0 if weights_are_finite(self.model_wrapped) else 1.0):
            self._stop("weights that are not finite after the update")

    def _sum_over_processes(self, value: Tensor | float) -> float:
        summed: Any = self.accelerator.reduce(torch.as_tensor(value, dtype=torch.float32, device=self.args.device))
        return float(summed)

    def _stop(self, found: str) -> None:
        from accelerate.utils import gather_object

        rows = self._rows_of_step()
        bad_inputs = []
        for index, batch in enumerate(self.step_batches):
            first = (index * self.args.world_size + self.args.process_index) * self.args.train_batch_size
            answers = self.unfinite_answers[index] if index < len(self.unfinite_answers) else {}
            for column, places in (unfinite_inputs(batch) | answers).items():
                named = name_rows([rows[(first + place) % len(rows)] for place in places]) if rows else "this batch"
                bad_inputs.append(f"{column} (rows {named} of the training split)" if rows else f"{column} ({named})")
        cause = likely_cause(
            sorted(set(gather_object(bad_inputs))),
            weights_are_finite(self.model_wrapped),
            self.state.global_step == 0,
            self.args.fp16,
            self.step_learning_rate,
        )
        kept = last_whole_checkpoint(Path(str(self.args.output_dir)))
        raise InputError(
            f"expected numbers that a training can go on with, found {found} at step {self.step + 1} (epoch "
            f"{self.step_epoch:.2f}), {f'on rows {name_rows(rows)} of the training split, ' if rows else ''}"
            f"{shapes(self.step_batches)}. The likely cause is {cause}. Nothing of it was saved; "
            + (f"the last good checkpoint is {kept}." if kept else "there was no checkpoint yet.")
        )

    def _rows_of_step(self) -> list[int]:
        """The rows of the training split in the step at work, of all processes; none where their order is not ours."""
        sampler = self._get_train_sampler()
        if not isinstance(sampler, EpochLengthGroupedSampler):
            return []
        sampler.set_epoch(int(self.step_epoch))
        order = list(sampler)
        batch = self.args.train_batch_size * self.args.world_size
        start = self._first_batch_of_step(self.step) * batch
        return order[start : start + batch * self.args.gradient_accumulation_steps]

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

    Returns what is worth recording: steps, losses, the validation score of every epoch, seconds and examples a second. In a training
    that was resumed `train_loss` and the next of `losses` are means of the steps since, as transformers counts them.
    """
    arguments = copy.copy(training)
    arguments.output_dir = str(directory)
    # A run is pushed whole, once it is verified; and a checkpoint holds all arguments, where no secret belongs.
    arguments.push_to_hub, arguments.hub_token = False, None
    arguments.remove_unused_columns = False  # the collator keeps what the loss needs
    arguments.label_names = ["labels"]  # which the Trainer looks for in the model's own forward; the loss is ours
    if (arguments.metric_for_best_model or "").removeprefix("eval_") == task.primary_metric:
        # transformers takes every score but a loss for one that should rise.
        arguments.greater_is_better = task.greater_is_better

    use_cache = getattr(model.config, "use_cache", None)
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
    whole = copy.deepcopy(model) if trainer.is_fsdp_enabled and is_main_process() else None
    in_attention = getattr(training, "attention_dropout", True)
    with ExitStack() as cheaper:
        if arguments.device.type == "cpu":
            cheaper.enter_context(keep_freed_memory())
            cheaper.enter_context(cheap_dropout(model, in_attention))
        result = trainer.train(resume_from_checkpoint=resumed)
    trainer.check_weights()
    make_whole(trainer, model, whole)
    # The Trainer turned the cache of keys and values off: for good, and so for every model made of this one.
    vars(model.config).pop("use_cache", None)
    if use_cache is not None:
        model.config.use_cache = use_cache
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


def last_whole_checkpoint(directory: Path) -> str | None:
    """The latest checkpoint below `directory` that is what was written, and so is the best one up to it; damaged ones are named.

    transformers' own get_last_checkpoint takes the latest folder, also one that a kill left half written, and a training whose best
    checkpoint is gone ends with the weights of the last.
    """
    for checkpoint in sorted(
        directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True
    ):
        damage = checkpoint_damage(checkpoint)
        if damage is None:
            best = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"]
            if best is None or checkpoint_damage(directory / Path(best).name) is None:
                return str(checkpoint)
            damage = f"the best one up to it, {Path(best).name}, is not whole"
        if is_main_process():
            print(f"{checkpoint.name}: not used, because {damage}", flush=True)
    return None


def seal_checkpoint(checkpoint: Path) -> None:
    """Write what every file of a checkpoint hashes to: a checkpoint without that was not written to its end."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    write_json(
        checkpoint / CHECKSUMS, {"files": {str(path.relative_to(checkpoint)): hash_file(path) for path in files}}
    )


def checkpoint_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint of the Trainer, None where every file of it has the bytes that were written."""
    if not (checkpoint / CHECKSUMS).is_file():
        return "it was not written to its end"
    try:
        changed = damaged_files(checkpoint, json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8")))
    except Exception:  # whatever a changed byte makes of it
        changed = [CHECKSUMS]
    return f"{changed[0]} is truncated, changed or missing" if changed else None


def keep_answers(task: Any) -> Callable[[Any, Tensor], Tensor]:
    """What the Trainer keeps of a batch's logits for the metrics: all, unless the task needs less (`task.answers`)."""
    answers = task.answers

    def keep(outputs: Any, labels: Tensor) -> Tensor:
        # A distilled DeiT has the logits of its two heads, too.
        logits: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        if answers is None:
            return logits
        return torch.from_numpy(answers(logits.float().cpu().numpy(), labels.cpu().numpy())).to(logits.device)

    return keep


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def save(model: Any, processor: Any, directory: Path) -> None:
    """Write a directory that stock `from_pretrained` opens: weights as safetensors, config, tokenizer or image processor."""
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
        with first_token_only(trained):
            details |= train(
                trained, task, processor, arguments, directory / CHECKPOINTS, task.features(processor)["train"],
                train_collate=task.training_collate(processor, augment=True),
            )  # fmt: skip
        if teacher.lora_rank and is_main_process():
            trained.save_pretrained(directory / "adapter")
            model = trained.merge_and_unload()
    return finish_model(model, task, processor, directory, details, must_know_task=True)


def is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def finish_model(
    model: Any, task: Any, processor: Any, directory: Path, details: dict[str, Any], must_know_task: bool = False
) -> Outcome:
    """Score a trained model on the validation split and save it, on the main process; the others have nothing left to do.

    A model that `must_know_task`, a teacher, is refused where it does no better than guessing, its checkpoints left in place.
    """
    if not is_main_process():
        return Outcome("transformers")
    metrics = validation_metrics(model, task, processor)
    if must_know_task:
        check_knows_task(model, task, metrics)
    save(model, processor, directory)
    return Outcome("transformers", {"validation": metrics}, count_parameters(model), details)


def check_knows_task(model: Any, task: Any, metrics: dict[str, Any]) -> None:
    """Refuse a teacher that does no better than guessing, by its scores on the validation split."""
    if task.causal:
        check_perplexity(metrics["perplexity"], model.config.vocab_size)
    else:
        present = {task.label_names[index] for index in set(task.data.splits["validation"]["label"])}
        check_above_chance(metrics, task.label_names, present)


def check_above_chance(metrics: dict[str, Any], label_names: list[str], present: set[str]) -> None:
    """Refuse a teacher that does no better than guessing, such as one with one answer to everything: its answers teach nothing.

    `present` are the classes that the validation split holds; the recall of another says nothing.
    """
    recalls = {name: recall for name, recall in metrics["recall_per_class"].items() if name in present}
    mean = sum(recalls.values()) / len(recalls)
    always = [name for name, recall in recalls.items() if recall == 1]
    one_answer = f" (it answers {always[0]!r} to everything)" if sorted(recalls.values())[-2:] == [0, 1] else ""
    if one_answer or mean <= 1 / len(label_names):
        raise InputError(
            f"expected a teacher that knows the task, found one whose mean recall on the validation split is {mean:.3f}"
            f"{one_answer}, no better than guessing among {len(label_names)} labels. Train it longer or slower (--teacher_epochs, "
            "--teacher_learning_rate), or check that its labels mean what the data set's do."
        )
