"""Distillation: the Trainer that learns from a teacher's logits and hidden states, and the stage that trains a student with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from inspect import signature
from math import gcd
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from pipelines.core.config import DistillConfig, StudentConfig
from pipelines.core.errors import InputError
from pipelines.core.records import CHECKPOINTS, Outcome
from pipelines.core.task import Task, TransferSet
from pipelines.models.families import layer_count, queries_keys_values, removable
from pipelines.models.students import build_student, planned_config
from pipelines.models.vocabulary import checked_content
from pipelines.training.fine_tune import finish, source_metrics
from pipelines.training.losses import attention_loss, hidden_state_loss, relation_loss, teachers_loss
from pipelines.training.soft_targets import check_teacher, with_soft_targets, with_transfer
from pipelines.training.trainer import Trainer, train
from pipelines.training.transfer import OneViewAnEpoch, own_labels

PROJECTIONS = "hidden_state_projections"
TEACHER_LAYERS = "teacher_layers"  # in a student's config: the teacher's layers that its own are copies of
TEACHER_COLUMN = "teacher_"  # how the names of a batch's columns begin that are the teacher's


class DistillationTrainer(Trainer):
    """A transformers.Trainer whose loss is `(1 - soft_target_weight)` times that of the labels plus `soft_target_weight` times the
    divergence from the teacher's logits at a `temperature`, plus `hidden_state_weight` times the distance of hidden states, and the like for
    attention maps and relations.

    The teacher is a model (online distillation), or its logits are a column `teacher_logits` of the training data (stored soft targets).
    Without a `task` student and teacher have an output `logits` and read the same inputs. `hidden_state_map` pairs hidden states of student
    and teacher, see parse_hidden_state_map. Further keywords are settings of DistillConfig, such as `divergence` and `beta`, which may also
    be given whole as `distill`, or arguments of transformers.Trainer.
    """

    def __init__(
        self,
        *arguments: Any,
        teacher: Any = None,
        distill: DistillConfig | None = None,
        hidden_state_map: Sequence[tuple[int, int]] | str | None = None,
        **keywords: Any,
    ) -> None:
        own = {one.name: keywords.pop(one.name) for one in fields(DistillConfig) if one.name in keywords}
        if own and distill is not None:
            raise InputError(
                f"expected settings in `distill` or as keywords, found both: {', '.join(own)}. Leave one out."
            )
        self.distill = distill or DistillConfig(**own)
        student: Any = arguments[0] if arguments else keywords.get("model")
        self.hidden_state_map: list[tuple[int, int]] = []
        if self.distill.needs_teacher:
            if teacher is None:
                raise InputError(
                    "expected a teacher for --hidden_state_weight, --attention_weight or --relation_weight above 0, found none. Pass the model."
                )
            if hidden_state_map is None or isinstance(hidden_state_map, str):
                hidden_state_map = pairs_of(self.distill, student.config, teacher.config, hidden_state_map)
            self.hidden_state_map = list(hidden_state_map)
        if self.distill.hidden_state_weight > 0:
            add_projections(student, teacher, len(self.hidden_state_map))
        super().__init__(*arguments, **keywords)
        self.all_tokens = bool(self.hidden_state_map)
        # The teacher is no part of the student (it would be saved and counted) and is not wrapped: it has no gradients to share.
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device) if teacher is not None else None

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        with eager_attention(self.model, self.teacher) if self.distill.attention_weight > 0 else nullcontext():
            result = super().train(*arguments, **keywords)
        if not self.is_fsdp_enabled:  # whose shares are put together first
            remove_projections(self.model)
        return result

    def _hp_search_setup(self, trial: Any) -> None:
        """Set what a trial of hyperparameter_search suggests: settings of the distillation, too, which are no TrainingArguments."""
        super()._hp_search_setup(trial)
        if trial is not None:
            suggested = {name: value for name, value in trial.params.items() if hasattr(self.distill, name)}
            self.distill = replace(self.distill, **suggested)

    def summed_loss(self, model: Any, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor, Any]:
        named = {name: inputs.pop(name) for name in list(inputs) if name.startswith(TEACHER_COLUMN)}
        if not model.training:  # an evaluation: the labels alone, and no hidden states to gather
            return super().summed_loss(model, inputs, labels)

        asked = {}
        if self.distill.hidden_state_weight > 0:
            asked["output_hidden_states"] = True
        if self.distill.attention_weight > 0:
            asked["output_attentions"] = True
        with self._vectors(self.accelerator.unwrap_model(model), 0) as vectors:
            found = model(**inputs, **asked)
        outputs = self.task.outputs(found)
        loss, count = self.task.label_loss(outputs, own_labels(labels), self.args.label_smoothing_factor)
        loss = loss * self.rows_per_label  # all will be divided by the number of rows
        teacher: dict[str, Any] = named
        if self.teacher is not None:
            with self._vectors(self.teacher, 1) as teacher_vectors:
                from_teacher, teacher = ask_teacher(self.teacher, self.task, inputs, named, **asked)
        weight = self.distill.soft_target_weight
        if weight > 0:
            if not teacher:
                raise InputError(
                    f"expected a teacher, or a column teacher_logits in the batches, found {', '.join(inputs)}. Pass teacher=model, or "
                    "keep the column (a collator of your own must make a tensor of it)."
                )
            loss = (1 - weight) * loss + weight * teachers_loss(self.task, outputs, teacher, labels, self.distill)
        if self.hidden_state_map:
            weigh = partial(self.task.token_weights, inputs, labels)
            loss = loss + self._inner_loss(model, found, from_teacher, (vectors, teacher_vectors), weigh)
        return loss, count, outputs

    def _vectors(self, model: Any, side: int) -> AbstractContextManager[list[Tensor]]:
        """What collects the queries, keys and values of one layer of the student (`side` 0) or the teacher (1), where they are needed."""
        if self.distill.relation_weight == 0:
            return nullcontext([])
        return queries_keys_values(model, layer_pairs(self.hidden_state_map)[-1][side])

    def _inner_loss(
        self,
        model: Any,
        student: Any,
        teacher: Any,
        vectors: tuple[list[Tensor], list[Tensor]],
        weigh: Callable[[int], Tensor],
    ) -> Tensor:
        """The losses of hidden states, attention maps and relations, each the mean over its pairs, by their weights."""
        distill = self.distill
        loss = torch.zeros((), device=self.args.device)
        if distill.hidden_state_weight > 0:
            states = [
                (student.hidden_states[left], teacher.hidden_states[right]) for left, right in self.hidden_state_map
            ]
            maps = getattr(self.accelerator.unwrap_model(model), PROJECTIONS, None)
            if maps is not None:
                states = [(project(left), right) for project, (left, right) in zip(maps, states, strict=True)]
            of_pair = partial(hidden_state_loss, kind=distill.hidden_state_loss)
            loss += distill.hidden_state_weight * _mean_loss(of_pair, states, weigh, axis=1)
        if distill.attention_weight > 0:
            attention = [
                (student.attentions[left], teacher.attentions[right])
                for left, right in layer_pairs(self.hidden_state_map)
            ]
            loss += distill.attention_weight * _mean_loss(attention_loss, attention, weigh, axis=2)
        if distill.relation_weight > 0:
            widths = [one.shape[-1] for both in vectors for one in both]
            heads = gcd(distill.relation_heads or self.teacher.config.num_attention_heads, *widths)
            of_vectors = partial(relation_loss, heads=heads)
            loss += distill.relation_weight * _mean_loss(of_vectors, list(zip(*vectors, strict=True)), weigh, axis=1)
        return loss

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = getattr(self.train_dataset, "column_names", None) or []
        known: Any = self._signature_columns
        known += [name for name in columns if name.startswith(TEACHER_COLUMN) and name not in known]


def ask_teacher(
    teacher: Any, task: Any, inputs: dict[str, Any], columns: dict[str, Any], **asked: Any
) -> tuple[Any, dict[str, Any]]:
    """What a teacher returns for a batch, and its outputs as columns.

    A teacher with a processor of its own reads what the collator made with that of the same examples, as further `columns`.
    """
    taken = signature(teacher.forward).parameters
    own = {name: values for column, values in columns.items() if (name := column.removeprefix(TEACHER_COLUMN)) in taken}
    with torch.no_grad():
        found = teacher(**(own or inputs), **asked)
    return found, {TEACHER_COLUMN + name: values for name, values in task.outputs(found).items()}


def _mean_loss(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
    weigh: Callable[[int], Tensor],
    axis: int,
) -> Tensor:
    """The mean of `loss` over pairs of student's and teacher's tensors, which have their tokens on an axis."""
    losses = []
    for student, teacher in pairs:
        if student.shape[axis] != teacher.shape[axis]:
            raise InputError(
                f"expected hidden states of as many positions from teacher and student, found {teacher.shape[axis]} and "
                f"{student.shape[axis]}. Use --hidden_state_weight 0 --attention_weight 0 --relation_weight 0, or a student with the teacher's "
                "image and patch size."
            )
        losses.append(loss(student, teacher, weigh(student.shape[axis])))
    return torch.stack(losses).mean()


@contextmanager
def eager_attention(*models: Any) -> Iterator[None]:
    """While it lasts, the models compute attention as maps, which faster implementations do not have."""
    usual = [model.config._attn_implementation for model in models]
    for model in models:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for model, implementation in zip(models, usual, strict=True):
            model.set_attn_implementation(implementation)


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


def layer_pairs(hidden_state_map: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer) whose outputs are the paired hidden states."""
    return [(left - 1, right - 1) for left, right in hidden_state_map if left and right]


def pairs_of(distill: DistillConfig, student: Any, teacher: Any, text: str | None = None) -> list[tuple[int, int]]:
    """The hidden states that are paired (`text`, or else --hidden_state_map), of the configs of student and teacher; raises InputError where
    what --attention_weight and --relation_weight compare is not there."""
    pairs = parse_hidden_state_map(text or distill.hidden_state_map, student, teacher)
    if max(distill.attention_weight, distill.relation_weight) > 0 and not layer_pairs(pairs):
        raise InputError(
            "expected a pair of layers in --hidden_state_map for --attention_weight and --relation_weight, found embeddings alone (0). Add "
            f"{layer_count(student)}:{layer_count(teacher)}."
        )
    for config in (student, teacher) if distill.relation_weight > 0 else ():
        heads = removable(config)["heads"]
        if isinstance(heads, str):
            raise InputError(
                "expected models whose queries, keys and values can be told apart by heads for --relation_weight, found "
                f"{config.model_type!r}: {heads}. Use --relation_weight 0."
            )
        if config.hidden_size % (distill.relation_heads or 1):
            raise InputError(
                f"expected --relation_heads that divide {config.hidden_size}, the width of {config.model_type!r}, found "
                f"{distill.relation_heads}. Leave it out: then they are the teacher's heads."
            )
    return pairs


def check_distillation(
    student: StudentConfig, distill: DistillConfig, teacher: str, task: Task, more_teachers: Sequence[str] = ()
) -> Any:
    """Refuse, before anything is trained, layers that the teacher in `teacher` lacks, losses that the task or the models do not have,
    several teachers where there can be but one, and views of what is not augmented.

    Returns the config of the student, see planned_config.
    """
    config = planned_config(student, teacher, task)
    if distill.needs_teacher:
        pairs_of(distill, config, task.load_config(teacher))
    check_losses(distill, task, more_teachers)
    if student.student_vocabulary is not None:
        checked_content(task.load_processor(teacher), task)
    processor = task.load_processor(student.checkpoint or teacher) if more_teachers else None
    for other in more_teachers:
        task.check_teacher_fits(other, SimpleNamespace(config=config), processor, online=False)
    return config


def check_losses(distill: DistillConfig, task: Task, more_teachers: Sequence[str] = ()) -> None:
    """Raise InputError for losses that the task does not have, or not of several teachers."""
    task.check_soft_loss(distill, 1 + len(more_teachers))
    if distill.augmented_views and "augmented_views" not in task.soft_target_settings:
        raise InputError(
            "expected images and --random_shift, --random_crop or --random_flip with --augmented_views, found none of these. Pass one, or "
            "leave --augmented_views out."
        )
    if more_teachers and not distill.needs_stored_targets:
        raise InputError(
            f"expected one --teacher_model where the teacher runs beside the student, found {1 + len(more_teachers)}. Pass --soft_targets stored, "
            "a --soft_target_weight above 0, and no weight of hidden states, attention or relations; or one teacher."
        )


def train_student(
    student: Any,
    processor: Any,
    task: Task,
    teacher_source: str,
    distill: DistillConfig,
    training: transformers.TrainingArguments,
    soft_targets: Path | list[Path] | None,
    directory: Path,
    transfer: TransferSet | None = None,
    search: Callable[[Any], dict[str, Any]] | None = None,
    examples_per_epoch: int | None = None,
) -> dict[str, Any]:
    """Train `student` in place on the training split, from labels and from the teacher in `teacher_source`; return the details.

    `soft_targets` is the directory of the stored ones, of several teachers one each; without it, or for hidden states, attention and
    relations, the teacher runs along (online distillation). Examples of a `transfer` set have no labels; a student that learns from
    labels alone, and takes as many steps without them, sees the others so often that an epoch has `examples_per_epoch`. A `search` is given
    the trainer instead, see train().
    """
    weight = distill.soft_target_weight
    online = distill.needs_teacher or (weight > 0 and soft_targets is None)
    # Without a teacher, too, since the report compares student and teacher.
    task.check_teacher_fits(teacher_source, student, processor, online)
    teacher: Any = None
    teacher_processor: Any = None
    if online:
        teacher_processor = task.load_processor(teacher_source)
        teacher = task.load_model(teacher_source)
        check_teacher(teacher, task, teacher_processor, training.per_device_eval_batch_size)
    # Stored soft targets are of the examples as they are, or of stored views; the baseline on labels alone is trained as the student is.
    augment = online or (weight == 0 and distill.soft_targets == "online")
    stored = None if online or weight == 0 else soft_targets
    features, of_examples = _examples(task, processor, distill, augment, stored, transfer, examples_per_epoch)
    pairs = pairs_of(distill, student.config, teacher.config) if distill.needs_teacher else []
    details = train(
        student,
        task,
        processor,
        training,
        directory,
        features,
        DistillationTrainer,
        search=search,
        train_collate=task.training_collate(processor, teacher_processor, augment),
        distill=distill,
        teacher=teacher,
        hidden_state_map=pairs,
    )
    remove_projections(student)
    details |= of_examples
    details["soft_targets"] = "none" if weight == 0 else "online" if online else "stored"
    if pairs:
        details["hidden_state_map"] = [list(pair) for pair in pairs]
    return details


def _examples(
    task: Task,
    processor: Any,
    distill: DistillConfig,
    augment: bool,
    soft_targets: Path | list[Path] | None,
    transfer: TransferSet | None,
    examples_per_epoch: int | None,
) -> tuple[Any, dict[str, Any]]:
    """The examples that a student is trained on, and what of them is worth recording; see train_student."""
    read = partial(task.soft_target_features, distill=distill)
    features = task.features(processor)["train"] if augment else read(processor)
    if soft_targets is not None:
        features = with_soft_targets(task, read, features, soft_targets)
    if views := distill.only(task.soft_target_settings).augmented_views:
        features = OneViewAnEpoch(features, views)
    if transfer is not None:
        with_others = with_transfer(features, transfer, task, processor)
        return with_others, {"examples_per_epoch": with_others.in_epoch, "transfer": transfer.load().details}
    if examples_per_epoch is None:
        return features, {}
    repeated = features.select(np.resize(np.arange(len(features)), examples_per_epoch))
    return repeated, {"examples_per_epoch": examples_per_epoch}


def distill_student(
    source: str,
    directory: Path,
    task: Task,
    student: StudentConfig,
    distill: DistillConfig,
    training: transformers.TrainingArguments,
    soft_targets: Path | list[Path] | None = None,
    transfer: TransferSet | None = None,
    search: Callable[[Any], dict[str, Any]] | None = None,
    examples_per_epoch: int | None = None,
) -> Outcome:
    """Build a student of the teacher in `source` and train it on the labels and the logits of the teacher, or of several; or `search` for
    its settings. See train_student."""
    model, processor, layers = build_student(student, source, task, transfer)
    vars(model.config).pop(TEACHER_LAYERS, None)  # those of another teacher
    batch_size = training.per_device_eval_batch_size
    details: dict[str, Any] = {"source_metrics": source_metrics(source, task, batch_size)}
    if layers is not None:
        setattr(model.config, TEACHER_LAYERS, layers)
        details["layers"] = layers
    if student.student_vocabulary is not None:
        details["vocabulary"] = {"tokens": len(processor), "of_teacher": len(task.load_processor(source))}
    learning = (distill, training, soft_targets, directory / CHECKPOINTS, transfer, search, examples_per_epoch)
    if training.num_train_epochs > 0 or training.max_steps > 0:  # else it stays a copy, see fit --train false
        details |= train_student(model, processor, task, source, *learning)
    if search is not None:
        return Outcome("settings", details=details)
    return finish(model, task, processor, directory, details, batch_size)
