"""A data set and a model enter; all that one job needs and another does not leaves. One file a task."""

from pipelines.tasks.base import Task
from pipelines.tasks.image_classification import ImageClassification
from pipelines.tasks.text_classification import TextClassification
from pipelines.tasks.text_generation.task import LanguageModeling

TASKS: dict[str, type[Task]] = {kind.name: kind for kind in (TextClassification, ImageClassification, LanguageModeling)}
