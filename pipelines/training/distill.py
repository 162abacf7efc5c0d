"""Distillation: the Trainer that learns from a teacher's logits and hidden states, and the stage that trains a student with it."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from pipelines.core.config import DistillConfig, StudentConfig
from pipelines.core.errors import InputError
from pipelines.core.records import Outcome
from pipelines.core.task import Task, TransferSet
from pipelines.models.families import layer_count
from pipelines.models.students import build_student, config_of_student, layers_to_keep
from pipelines.training.checkpoints import CHECKPOINTS
from pipelines.training.fine_tune import finish, source_metrics
from pipelines.training.soft_targets import WithSoftTargets, check_teacher, with_transfer
from pipelines.training.trainer import Trainer, train
from pipelines.training.transfer import own_labels

PROJECTIONS = "hidden_state_projections"
TEACHER_LAYERS = "teacher_layers"  # in a student's config: the teacher's layers that its own are copies of
TEACHER_COLUMN = "teacher_"  # how the names of a batch's columns begin that are the teacher's


class DistillationTrainer(Trainer):
    """A transformers.Trainer whose loss is `(1 - soft_target_weight)` times that of the labels plus `soft_target_weight` times the
    divergence from the teacher's logits at a `temperature`, plus `hidden_state_weight` times the distance of hidden states.

    The teacher is a model (online distillation), or its logits are a column `teacher_logits` of the training data (stored soft targets).
    Without a `task` student and teacher have an output `logits` and read the same inputs. The other settings are those of DistillConfig, which
    may also be given whole as `distill`; `hidden_state_map` pairs hidden states of student and teacher, see parse_hidden_state_map.
    """

    def __init__(
        self,
        *arguments: Any,
        teacher: Any = None,
        distill: DistillConfig | None = None,
        hidden_state_map: Sequence[tuple[int, int]] | str | None = None,
        temperature: float = DistillConfig.temperature,
        soft_target_weight: float = DistillConfig.soft_target_weight,
        hidden_state_weight: float = DistillConfig.hidden_state_weight,
        divergence: str = DistillConfig.divergence,
        beta: float = DistillConfig.beta,
        **keywords: Any,
    ) -> None:
        self.distill = distill or DistillConfig(
            temperature=temperature,
            soft_target_weight=soft_target_weight,
            hidden_state_weight=hidden_state_weight,
            divergence=divergence,
            beta=beta,
        )
        student: Any = arguments[0] if arguments else keywords.get("model")
        self.hidden_state_map: list[tuple[int, int]] = []
        if self.distill.hidden_state_weight > 0:
            if teacher is None:
                raise InputError("expected a teacher for --hidden_state_weight above 0, found none. Pass the model.")
            if hidden_state_map is None or isinstance(hidden_state_map, str):
                hidden_state_map = parse_hidden_state_map(hidden_state_map, student.config, teacher.config)
            self.hidden_state_map = list(hidden_state_map)
            add_projections(student, teacher, len(self.hidden_state_map))
        super().__init__(*arguments, **keywords)
        self.all_tokens = bool(self.hidden_state_map)
        # The teacher is no part of the student (it would be saved and counted) and is not wrapped: it has no gradients to share.
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device) if teacher is not None else None

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        result = super().train(*arguments, **keywords)
        if not self.is_fsdp_enabled:  # whose shares are put together first
            remove_projections(self.model)
        return result

    def summed_loss(self, model: Any, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor, Any]:
        named = {name: inputs.pop(name) for name in list(inputs) if name.startswith(TEACHER_COLUMN)}
        if not model.training:  # an evaluation: the labels alone, and no hidden states to gather
            return super().summed_loss(model, inputs, labels)

        asked = {"output_hidden_states": True} if self.all_tokens else {}
        found = model(**inputs, **asked)
        outputs = self.task.outputs(found)
        loss, count = self.task.label_loss(outputs, own_labels(labels), self.args.label_smoothing_factor)
        loss = loss * self.rows_per_label  # all will be divided by the number of rows
        teacher: dict[str, Any] = named
        from_teacher: Any = None
        if self.teacher is not None:
            # A teacher with a processor of its own: the collator adds what that makes of the same examples.
            taken = signature(self.teacher.forward).parameters
            own = {
                name: values
                for column, values in named.items()
                if (name := column.removeprefix(TEACHER_COLUMN)) in taken
            }
            with torch.no_grad():
                from_teacher = self.teacher(**(own or inputs), **asked)
            teacher = {TEACHER_COLUMN + name: values for name, values in self.task.outputs(from_teacher).items()}
        weight = self.distill.soft_target_weight
        if weight > 0:
            if not teacher:
                raise InputError(
                    f"expected a teacher, or a column teacher_logits in the batches, found {', '.join(inputs)}. Pass teacher=model, or "
                    "keep the column (a collator of your own must make a tensor of it)."
                )
            loss = (1 - weight) * loss + weight * self.task.soft_loss(outputs, teacher, labels, self.distill)
        if self.hidden_state_map:
            hidden = self._hidden_state_loss(model, found.hidden_states, from_teacher.hidden_states, inputs, labels)
            loss = loss + self.distill.hidden_state_weight * hidden
        return loss, count, outputs

    def _hidden_state_loss(self, model: Any, student: Any, teacher: Any, inputs: dict[str, Any], labels: Tensor) -> Any:
        """The mean of the losses of all pairs of hidden states."""
        maps = getattr(self.accelerator.unwrap_model(model), PROJECTIONS, None)
        losses = []
        for index, (left, right) in enumerate(self.hidden_state_map):
            if student[left].shape[:2] != teacher[right].shape[:2]:
                raise InputError(
                    f"expected hidden states of as many positions from teacher and student, found {teacher[right].shape[1]} and "
                    f"{student[left].shape[1]}. Use --hidden_state_weight 0, or a student with the teacher's image and patch size."
                )
            projected = student[left] if maps is None else maps[index](student[left])
            losses.append(self.task.hidden_state_loss(projected, teacher[right], inputs, labels))
        return sum(losses) / len(losses)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = getattr(self.train_dataset, "column_names", None) or []
        known: Any = self._signature_columns
        known += [name for name in columns if name.startswith(TEACHER_COLUMN) and name not in known]


def add_projections(student: Any, teacher: Any, count: int) -> None:
    """Give a student of another width than its teacher a linear map for each pair of hidden states.

    They are part of the student while it trains, so that optimizer, checkpoints and gradient sharing see them.
    """
    widths = student.config.hidden_size, teacher.config.hidden_size
    if widths[0] != widths[1] and not hasattr(student, PROJECTIONS):
        # The same whatever was drawn before: a resumed pruning has not trained its earlier steps.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            student.add_module(
                PROJECTIONS, nn.ModuleList(nn.Linear(*widths, dtype=student.dtype) for _ in range(count))
            )


def remove_projections(student: Any) -> None:
    if hasattr(student, PROJECTIONS):
        delattr(student, PROJECTIONS)


def parse_hidden_state_map(text: str | None, student: Any, teacher: Any) -> list[tuple[int, int]]:
    """Pairs (student hidden state, teacher hidden state), of their configs; state 0 is the embeddings, state i the output of layer i - 1.

    Without `text` each layer of a student that was made of the teacher's is paired with the layer that it is a copy of, and each of
    another student with the teacher's at the same share of the depth.
    """
    states, teacher_states = layer_count(student), layer_count(teacher)
    if text is None:
        copied = getattr(student, TEACHER_LAYERS, None)
        if copied and len(copied) == states and max(copied) < teacher_states:
            return [(state, layer + 1) for state, layer in enumerate(copied, start=1)]
        return [(state, state * teacher_states // states) for state in range(1, states + 1)]
    try:
        pairs = [(int(left), int(right)) for left, right in (pair.split(":") for pair in text.split(","))]
    except ValueError as error:
        raise InputError(f"expected --hidden_state_map such as 1:2,2:4,3:6, found {text!r}.") from error
    if any(not 0 <= left <= states or not 0 <= right <= teacher_states for left, right in pairs):
        raise InputError(
            f"expected --hidden_state_map within the student's states 0 to {states} and the teacher's 0 to {teacher_states}, "
            f"found {text!r}."
        )
    return pairs


def check_distillation(student: StudentConfig, distill: DistillConfig, teacher: str, task: Task) -> None:
    """Refuse, before anything is trained, layers that the teacher in `teacher` lacks and hidden states that cannot be paired."""
    config = task.load_config(teacher)
    if student.student_model is not None:
        student_config = task.load_config(student.student_model)
    else:
        student_config = config_of_student(config, layers_to_keep(config, student.student_layers))
    if distill.hidden_state_weight > 0:
        parse_hidden_state_map(distill.hidden_state_map, student_config, config)


def train_student(
    student: Any,
    processor: Any,
    task: Task,
    teacher_source: str,
    distill: DistillConfig,
    training: transformers.TrainingArguments,
    soft_targets: Path | None,
    directory: Path,
    transfer: TransferSet | None = None,
) -> dict[str, Any]:
    """Train `student` in place on the training split, from labels and from the teacher in `teacher_source`; return the details.

    `soft_targets` is the directory of the stored ones; without it, or for hidden states, the teacher runs along (online distillation).
    Examples of a `transfer` set have no labels; a student that learns from labels alone takes as many steps without them.
    """
    features = task.features(processor)["train"]
    with_hidden_states, weight = distill.hidden_state_weight > 0, distill.soft_target_weight
    online = with_hidden_states or (weight > 0 and soft_targets is None)
    # Without a teacher, too, since the report compares student and teacher.
    task.check_teacher_fits(teacher_source, student, processor, online)
    teacher: Any = None
    teacher_processor: Any = None
    if online:
        teacher_processor = task.load_processor(teacher_source)
        teacher = task.load_model(teacher_source)
        check_teacher(teacher, task, teacher_processor, training.per_device_eval_batch_size)
    elif soft_targets is not None and weight > 0:
        features = WithSoftTargets(features, soft_targets)
    pairs = (
        parse_hidden_state_map(distill.hidden_state_map, student.config, teacher.config) if with_hidden_states else []
    )
    # Stored soft targets are of the examples as they are; the baseline on labels alone is trained as the student is.
    augment = online or (weight == 0 and distill.soft_targets == "online")
    of_transfer: dict[str, Any] = {}
    if transfer is not None:
        mixed = with_transfer(features, transfer, task, processor)
        of_transfer["examples_per_epoch"] = mixed.in_epoch
        if online or weight > 0:
            features, of_transfer["transfer"] = mixed, transfer.load().details
        else:
            features = features.select(np.resize(np.arange(len(features)), mixed.in_epoch))
    details = train(
        student,
        task,
        processor,
        training,
        directory,
        features,
        DistillationTrainer,
        train_collate=task.training_collate(processor, teacher_processor, augment),
        distill=distill,
        teacher=teacher,
        hidden_state_map=pairs,
    )
    remove_projections(student)
    details |= of_transfer
    details["soft_targets"] = "none" if weight == 0 else "online" if online else "stored"
    if pairs:
        details["hidden_state_map"] = [list(pair) for pair in pairs]
    return details


def distill_student(
    source: str,
    directory: Path,
    task: Task,
    student: StudentConfig,
    distill: DistillConfig,
    training: transformers.TrainingArguments,
    soft_targets: Path | None = None,
    transfer: TransferSet | None = None,
) -> Outcome:
    """Build a student of the teacher in `source` and train it on the labels and the teacher's logits."""
    model, processor, layers = build_student(student, source, task)
    vars(model.config).pop(TEACHER_LAYERS, None)  # those of another teacher
    batch_size = training.per_device_eval_batch_size
    details: dict[str, Any] = {"source_metrics": source_metrics(source, task, batch_size)}
    if layers is not None:
        setattr(model.config, TEACHER_LAYERS, layers)
        details["layers"] = layers
    checkpoints = directory / CHECKPOINTS
    details |= train_student(model, processor, task, source, distill, training, soft_targets, checkpoints, transfer)
    return finish(model, task, processor, directory, details, batch_size)
