"""Distillation: the Trainer that learns from a teacher's answers, and the stage that trains a student with it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pipelines.core.config import DistillConfig, StudentConfig
from pipelines.core.errors import InputError
from pipelines.core.run import Outcome
from pipelines.core.task import IGNORED
from pipelines.models.families import layer_count
from pipelines.models.students import parse_layers, student_from_layers
from pipelines.tasks.text_generation.task import check_knows_language, check_same_vocabulary
from pipelines.training.finite import unfinite_inputs
from pipelines.training.first_token import first_token_only
from pipelines.training.losses import distillation_loss, hidden_state_loss, label_loss, top_soft_target_loss
from pipelines.training.soft_targets import TOP_ANSWERS, WithSoftTargets, check_teacher
from pipelines.training.trainer import CHECKPOINTS, Trainer, finish_model, train

PROJECTIONS = "hidden_state_projections"


class DistillationTrainer(Trainer):
    """Learns from the labels, from the teacher's logits (a column of the data, or a teacher in the loop), and from its hidden states."""

    def __init__(
        self,
        *,
        distill: DistillConfig,
        teacher: Any = None,
        hidden_state_map: list[tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.distill, self.hidden_state_map = distill, hidden_state_map or []
        # The teacher is no part of the student (it would be saved and counted) and is not wrapped: it has no gradients to share.
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device) if teacher is not None else None

    def summed_loss(self, model: Any, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Any]:
        teacher_logits = inputs.pop("teacher_logits", None)
        # A teacher of images in the loop has its own processor, so the collator adds what that makes of the same images.
        teacher_pixels = inputs.pop("teacher_pixel_values", None)
        teacher_inputs = inputs if teacher_pixels is None else {"pixel_values": teacher_pixels}
        top_answers = [inputs.pop(name) for name in TOP_ANSWERS] if "teacher_ids" in inputs else None
        smoothing = self.args.label_smoothing_factor
        if not model.training:  # an evaluation: the labels alone, and no hidden states to gather
            outputs = model(**inputs)
            return label_loss(*self.align(outputs.logits, labels), smoothing), outputs

        outputs = model(**inputs, output_hidden_states=bool(self.hidden_state_map))
        teacher_outputs: Any = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_outputs = self.teacher(**teacher_inputs, output_hidden_states=bool(self.hidden_state_map))
            teacher_logits = teacher_outputs.logits
            self.unfinite_answers.append(unfinite_inputs({"teacher_logits": teacher_logits}))
        logits, targets = self.align(outputs.logits, labels)
        if top_answers is not None:
            loss = (1 - self.distill.soft_target_weight) * label_loss(logits, targets, smoothing)
            # What the teacher said at a token is about the next one, as the logits are.
            ids, log_probabilities, log_rest = (answer[:, :-1] for answer in top_answers)
            loss = loss + self.distill.soft_target_weight * top_soft_target_loss(
                logits, ids, log_probabilities, log_rest, self.distill.temperature, targets.ne(IGNORED),
                self.distill.divergence, self.distill.teacher_share,
            )  # fmt: skip
        else:
            if self.causal and teacher_logits is not None:
                teacher_logits, _ = self.align(teacher_logits, labels)
            loss = distillation_loss(
                logits, targets, teacher_logits, self.distill.temperature, self.distill.soft_target_weight, smoothing,
                self.distill.divergence, self.distill.teacher_share,
            )  # fmt: skip
        projections = getattr(self.accelerator.unwrap_model(model), PROJECTIONS, None)
        for index, (student_state, teacher_state) in enumerate(self.hidden_state_map):
            student_hidden = outputs.hidden_states[student_state]
            if projections is not None:
                student_hidden = projections[index](student_hidden)
            teacher_hidden = teacher_outputs.hidden_states[teacher_state]
            if student_hidden.shape[:2] != teacher_hidden.shape[:2]:
                raise InputError(
                    f"expected hidden states of as many positions from teacher and student, found {teacher_hidden.shape[1]} and "
                    f"{student_hidden.shape[1]}. Use --hidden_state_weight 0, or a student with the teacher's image and patch size."
                )
            # Examples without a label only fill up a batch.
            counted = labels.ne(IGNORED).reshape(len(labels), -1).any(dim=1)
            student_hidden, teacher_hidden = student_hidden[counted], teacher_hidden[counted]
            valid = None if self.causal or "attention_mask" not in inputs else inputs["attention_mask"][counted]
            if self.causal:  # its loss is one per token, not one per example
                student_hidden, teacher_hidden = (
                    student_hidden.flatten(0, 1)[:, None],
                    teacher_hidden.flatten(0, 1)[:, None],
                )
            hidden_loss = hidden_state_loss(student_hidden, teacher_hidden, valid)
            loss = loss + self.distill.hidden_state_weight * hidden_loss / len(self.hidden_state_map)
        return loss, outputs


def parse_hidden_state_map(text: str | None, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Pairs (student hidden state, teacher hidden state); state 0 is the embeddings, state i the output of layer i - 1.

    Without `text` every student state from 1 on is paired with the teacher's at the same share of the depth.
    """
    if text is None:
        return [(state, state * teacher_layers // student_layers) for state in range(1, student_layers + 1)]
    try:
        pairs = [(int(left), int(right)) for left, right in (pair.split(":") for pair in text.split(","))]
    except ValueError as error:
        raise InputError(f"expected --hidden_state_map such as 1:2,2:4,3:6, found {text!r}.") from error
    if any(not 0 <= left <= student_layers or not 0 <= right <= teacher_layers for left, right in pairs):
        raise InputError(
            f"expected --hidden_state_map within the student's states 0 to {student_layers} and the teacher's 0 to {teacher_layers}, "
            f"found {text!r}."
        )
    return pairs


def distil(
    student: Any, processor: Any, task: Any, teacher_source: str, distill: DistillConfig,
    training: transformers.TrainingArguments, soft_targets: Path | None, directory: Path,
) -> dict[str, Any]:  # fmt: skip
    """Train `student` in place on the training split, from labels and from the teacher in `teacher_source`; return the details.

    `soft_targets` is the directory of the stored logits; without it, or for hidden states, the teacher runs in the loop.
    """
    features = task.features(processor)["train"]
    with_hidden_states = distill.hidden_state_weight > 0
    in_the_loop = with_hidden_states or (distill.soft_target_weight > 0 and soft_targets is None)
    teacher: Any = None
    teacher_processor: Any = None
    hidden_state_map: list[tuple[int, int]] = []
    if task.causal:  # without a teacher, too: the report compares them token by token
        teacher_size = task.load_config(teacher_source).vocab_size
        check_same_vocabulary(task.load_processor(teacher_source), processor, teacher_size, student.config.vocab_size)
    if in_the_loop:
        teacher_processor = task.load_processor(teacher_source)
        teacher = task.load_model(teacher_source)
        if task.causal:
            check_knows_language(teacher, task, processor)
        else:
            check_teacher(teacher, task, teacher_processor)
    elif soft_targets is not None and distill.soft_target_weight > 0:
        features = WithSoftTargets(features, soft_targets)
    if with_hidden_states:
        hidden_state_map = parse_hidden_state_map(
            distill.hidden_state_map, layer_count(student.config), layer_count(teacher.config)
        )
        student_width, teacher_width = student.config.hidden_size, teacher.config.hidden_size
        if student_width != teacher_width:
            # The same whatever was drawn before: a resumed pruning has not trained its earlier steps.
            transformers.set_seed(training.seed)
            # Part of the student while it trains, so that optimizer, checkpoints and gradient sharing see them.
            projections = nn.ModuleList(nn.Linear(student_width, teacher_width) for _ in hidden_state_map)
            student.add_module(PROJECTIONS, projections)
    # The baseline on labels alone is trained as the student is, so the choice does not depend on the weights of the losses.
    augment = distill.soft_targets == "online"
    with ExitStack() as cheaper:
        if not hidden_state_map:  # which pairs the states of all tokens
            cheaper.enter_context(first_token_only(student))
            if teacher is not None:
                cheaper.enter_context(first_token_only(teacher))
        details = train(
            student, task, processor, training, directory, features, DistillationTrainer,
            train_collate=task.training_collate(processor, teacher_processor, augment), distill=distill, teacher=teacher,
            hidden_state_map=hidden_state_map,
        )  # fmt: skip
    if hasattr(student, PROJECTIONS):
        delattr(student, PROJECTIONS)
    details["soft_targets"] = "none" if distill.soft_target_weight == 0 else "online" if in_the_loop else "stored"
    if hidden_state_map:
        details["hidden_state_map"] = [list(pair) for pair in hidden_state_map]
    return details


def distill_student(
    source: str,
    directory: Path,
    task: Any,
    student: StudentConfig,
    distill: DistillConfig,
    training: transformers.TrainingArguments,
    soft_targets: Path | None = None,
) -> Outcome:
    """Build a student of the teacher in `source` and train it on the labels and the teacher's answers."""
    details: dict[str, Any] = {}
    if student.student_model is not None:
        processor = task.load_processor(student.student_model)
        model = task.load_model(student.student_model, task.student_head, student.student_from_scratch)
    else:
        processor = task.load_processor(source)
        teacher = task.load_model(source)
        layers = parse_layers(student.student_layers, layer_count(teacher.config))
        model = student_from_layers(teacher, layers)
        details["layers"] = layers
    details |= distil(model, processor, task, source, distill, training, soft_targets, directory / CHECKPOINTS)
    return finish_model(model, task, processor, directory, details)
