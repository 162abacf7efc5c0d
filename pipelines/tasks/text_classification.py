"""One text, or a pair of texts, and one label out of several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from pipelines.core.config import DataConfig, LabelConfig
from pipelines.core.task import Candidates, Presentation
from pipelines.data.examples import Examples, load_examples
from pipelines.data.references import read_classes
from pipelines.data.text import TEXTS
from pipelines.tasks import baselines
from pipelines.tasks.classification import Classification, ClassifierPresentation
from pipelines.tasks.texts import (
    TextPresentation,
    TextTask,
    is_pair,
    javascript_code,
    onnx_code,
    python_text,
    token_limit,
)


class TextClassifierPresentation(TextPresentation, ClassifierPresentation):
    """What a report says of a classifier of texts, or of pairs."""

    def in_python(self, report: dict[str, Any], model: str) -> str:
        return f"""
            from transformers import pipeline
            classify = pipeline("text-classification", model={json.dumps(model)})
            print(classify({python_text(report)}, truncation=True, max_length={token_limit(report)}))
        """

    def in_onnx_runtime(self, report: dict[str, Any], directory: str) -> str:
        return onnx_code(report, directory, 'print(config["id2label"][str(logits[0].argmax())])', reads_config=True)

    def in_javascript(self, report: dict[str, Any], repo_id: str, dtype: str) -> str:
        if is_pair(report):  # which the pipeline does not take
            return javascript_code(report, repo_id, dtype)
        return super().in_javascript(report, repo_id, dtype)


class TextClassification(TextTask, Classification):
    """One text, or a pair of texts, and one label out of several."""

    name = "text-classification"
    presentation: Presentation = TextClassifierPresentation()
    settings = (DataConfig, LabelConfig)
    demo = "bert_bbc_headlines"

    def __init__(self, config: DataConfig, label: LabelConfig | None = None) -> None:
        super().__init__(config)
        self.weigh_classes(label)

    @property
    def baselines(self) -> Mapping[str, Candidates]:
        return {
            "majority_class": baselines.majority_class,
            "tfidf_logistic_regression": partial(baselines.tfidf_logistic_regression, balanced=self.balanced),
        }

    def load_data(self) -> Examples:
        return load_examples(self.config, TEXTS, read_classes)
