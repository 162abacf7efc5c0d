"""A data set and a model enter; all that one job needs and another does not leaves. One file a task."""

from __future__ import annotations

import contextlib
import json
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.config import GateConfig, Settings, settings_name
from pipelines.core.errors import InputError
from pipelines.core.quality import gate_metric

if TYPE_CHECKING:
    from pipelines.core.task import Task

# Where the class of each task is. By name, so that a process that only times a model does not import all of them.
TASKS = {
    "text-classification": "pipelines.tasks.text_classification:TextClassification",
    "image-classification": "pipelines.tasks.image_classification:ImageClassification",
    "text-generation": "pipelines.tasks.text_generation.task:LanguageModeling",
    "token-classification": "pipelines.tasks.token_classification.task:TokenClassification",
    "text-regression": "pipelines.tasks.text_regression:TextRegression",
    "multi-label-classification": "pipelines.tasks.multi_label_classification.task:MultiLabelClassification",
    "text-ranking": "pipelines.tasks.text_ranking.task:TextRanking",
    "sentence-embedding": "pipelines.tasks.sentence_embedding.task:SentenceEmbedding",
    "question-answering": "pipelines.tasks.question_answering.task:QuestionAnswering",
}
DEFAULT_TASK = "text-classification"


@dataclass
class TaskConfig:
    task: str | None = field(
        default=None,
        metadata={
            "help": f"What the model does. Left out: what the model given by --model does, else {DEFAULT_TASK}.",
            "choices": list(TASKS),
        },
    )


def task_class(name: str) -> Any:
    return pkgutil.resolve_name(TASKS[name])


def make_task(settings: Settings) -> Task:
    """The task that `settings.task` names, made of its own dataclasses among the settings; --gate is one of its metrics."""
    kind = task_class(settings.task.task)
    task: Task = kind(*(getattr(settings, settings_name(one)) for one in kind.settings))
    if task.config.text_part != "whole" and not kind.reads_parts:
        raise InputError(
            f"expected --text_part whole for --task {kind.name}, which reads all that it is given, found "
            f"{task.config.text_part}. Leave it out."
        )
    for one in vars(settings).values():
        if isinstance(one, GateConfig):
            gate_metric(task, one)
    task.allow_weak_teacher = "teacher" in vars(settings) and settings.teacher.allow_weak_teacher
    if "training" in vars(settings):
        from pipelines.training.arguments import check_training  # and torch with it

        check_training(settings.training, task)
    return task


def task_of_model(directory: str | Path | None) -> str | None:
    """The task that the model in a directory was made for, by its config.json; None where that cannot be told."""
    config = None
    if directory is not None:
        with contextlib.suppress(OSError, ValueError):  # no such file, or no JSON
            config = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
    # A later task may be a special case of an earlier one, of the same classes of models.
    found = (name for name in reversed(TASKS) if isinstance(config, dict) and task_class(name).recognizes(config))
    return next(found, None)
