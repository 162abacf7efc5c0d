"""The stage that fine-tunes a teacher; and how every training stage ends: scored on the validation split, and saved."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState

from pipelines.core.config import TeacherConfig
from pipelines.core.disk import as_json
from pipelines.core.errors import InputError
from pipelines.core.records import CHECKPOINTS, Outcome, read_record
from pipelines.core.sources import resolve
from pipelines.core.task import Task
from pipelines.data.sources import model_license
from pipelines.models.predict import predict_torch
from pipelines.training.arguments import arguments_for
from pipelines.training.trainer import train


def fine_tune(
    source: str, directory: Path, task: Task, teacher: TeacherConfig, training: transformers.TrainingArguments
) -> Outcome:
    """Fine-tune a pretrained model into a teacher, or take one that already knows the task as it is (`teacher_epochs` 0).

    With `lora_rank` a LoRA adapter (Hu et al., 2021) is trained in place of all weights, kept in `adapter/`, and merged. A teacher that
    does no better than guessing is refused, its checkpoints left in place.
    """
    processor = task.load_processor(source)
    is_local = os.path.isabs(resolve(source))
    details: dict[str, Any] = {"license": model_license(source), "hub_id": None if is_local else source}
    if teacher.teacher_epochs == 0:
        model = task.load_model(source, head="required").to(PartialState().device)
        task.check_label_order(processor, partial(predict_torch, model, name="labels"))
    else:
        model = trained = task.load_model(source, "new if other", teacher.teacher_from_scratch)
        if teacher.lora_rank:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=teacher.lora_rank, lora_alpha=2 * teacher.lora_rank, **task.lora_settings)
            try:
                trained = get_peft_model(model, lora)
            except ValueError as error:
                raise InputError(
                    f"expected linear maps beside the head, which --lora_rank adapts, found none in {type(model).__name__}. Leave --lora_rank "
                    "out."
                ) from error
            details["trainable_parameters"] = trained.get_nb_trainable_parameters()[0]
        details |= train(
            trained,
            task,
            processor,
            arguments_for(training, teacher.teacher_learning_rate, teacher.teacher_epochs),
            directory / CHECKPOINTS,
            task.features(processor)["train"],
            train_collate=task.training_collate(processor, augment=True),
        )
        if teacher.lora_rank and PartialState().is_main_process:
            trained.save_pretrained(directory / "adapter")
            model = trained.merge_and_unload()
    return finish(model, task, processor, directory, details, training.per_device_eval_batch_size, is_teacher=True)


def finish(
    model: Any,
    task: Task,
    processor: Any,
    directory: Path,
    details: dict[str, Any],
    batch_size: int,
    is_teacher: bool = False,
) -> Outcome:
    """Score a trained model on the validation split and save it, on the main process; the others have nothing left to do."""
    if not PartialState().is_main_process:
        return Outcome("transformers")
    metrics = validation_metrics(model, task, processor, batch_size)
    if is_teacher:
        details |= refuse_weak_teacher(task, metrics, model.config)
    model.config.update(task.config_entries(metrics))
    save(model, processor, directory)
    how_read = {name: task.details[name] for name in ("read_as", "rows_dropped") if name in task.details}
    return Outcome("transformers", {"validation": metrics}, model.num_parameters(), details | how_read)


def refuse_weak_teacher(task: Task, metrics: dict[str, Any], config: Any) -> dict[str, Any]:
    """Raise InputError for a teacher that has nothing to teach, unless it is allowed; then the record says that it is weak."""
    try:
        task.check_teacher(metrics, config)
    except InputError as error:
        if not task.allow_weak_teacher:
            raise InputError(f"{error} For a smoke run pass --allow_weak_teacher.") from error
        print(f"teacher: weak, but allowed ({error})", flush=True)
        return {"weak_teacher": True}
    return {}


def validation_metrics(model: Any, task: Task, processor: Any, batch_size: int = 32) -> dict[str, Any]:
    """Scores on the validation split, computed on this process's device; the test split is the report's."""
    features = task.features(processor)["validation"]
    predict = partial(predict_torch, model.to(PartialState().device), name="validate")
    predictions = predict(features, task.collate(processor), task, batch_size)
    return task.scores(predictions, features["labels"], "validation")


def source_metrics(source: str, task: Task, batch_size: int) -> dict[str, Any]:
    """The validation scores of the model that another is made from, on the main process: its record's, where that is of the same data."""
    if not PartialState().is_main_process:
        return {}
    record = read_record(Path(source))
    if record is not None and record["made_by"]["task"] == as_json(task.describe()):
        return record["metrics"]["validation"]
    return validation_metrics(task.load_model(source), task, task.load_processor(source), batch_size)


def save(model: Any, processor: Any, directory: Path) -> None:
    """Write a directory that stock `from_pretrained` opens: weights as safetensors, config, tokenizer or image processor."""
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
