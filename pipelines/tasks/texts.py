"""What all jobs on a text or a pair of texts share: tokens, batches, the graph, the bundle, and code for people."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification

from pipelines.core.config import DataConfig
from pipelines.core.disk import digest
from pipelines.core.errors import InputError
from pipelines.core.task import Collate, Graph, Head
from pipelines.data.text import collate, tokenize, tokenizer_content
from pipelines.edge.bundle import text_inputs, text_probes, verify_predictor
from pipelines.edge.settings import head_outputs
from pipelines.models.loading import load_tokenizer
from pipelines.tasks.base import BasePresentation, BaseTask


class TextPresentation(BasePresentation):
    """What a report says of any job on texts."""

    def in_shell(self, report: dict[str, Any]) -> str:
        return '--pair "A first text." "A second text."' if is_pair(report) else '"A text."'

    def in_javascript(self, report: dict[str, Any], repo_id: str, dtype: str) -> str:
        """Prints the logits: transformers.js's own pipeline takes single texts, and makes probabilities of scores."""
        name = json.dumps(repo_id)
        texts = '"A first text.", { text_pair: "A second text." }' if is_pair(report) else '"A text."'
        return f"""
            import {{ AutoModelForSequenceClassification as Model, AutoTokenizer }} from "@huggingface/transformers";
            const tokenizer = await AutoTokenizer.from_pretrained({name}), model = await Model.from_pretrained({name}, {{ dtype: "{dtype}" }});
            console.log((await model(tokenizer({texts}))).logits.tolist());
        """

    def tokenizer_settings(self, report: dict[str, Any]) -> dict[str, Any]:
        # transformers.js cuts texts at the tokenizer's limit.
        return {"model_max_length": token_limit(report)}


class TextTask(BaseTask):
    """A job on one text, or a pair of texts."""

    auto_class = AutoModelForSequenceClassification
    architectures = ("ForSequenceClassification",)
    # The adapter's task type trains a new head along with it.
    lora_settings: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": "all-linear"}
    student_head: Head = "new if none"

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self._features: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """What of the data a stage's result depends on."""
        return super().describe() | {"max_length": self.config.max_length}

    @property
    def example(self) -> str:
        return '--pair "A first text." "A second text."' if self._reads_pairs else '"A text."'

    def load_processor(self, source: str) -> Any:
        """The tokenizer of a model."""
        return load_tokenizer(source, self.trust_remote_code)

    def check_teacher_fits(self, teacher_source: str, student: Any, processor: Any, online: bool) -> None:
        """Raise InputError unless an online teacher's tokenizer makes the student's tokens of the same texts."""
        if online:
            own, teachers = (
                self.features(tokenizer)["validation"][:32]
                for tokenizer in (processor, self.load_processor(teacher_source))
            )
            if own != teachers:
                raise InputError(
                    "expected teacher and student to read the same tokens, found that their tokenizers differ; online distillation "
                    "would give the teacher tokens that mean something else to it. Store its soft targets first (pocketformers "
                    "soft-targets, or --soft_targets stored in a recipe) and leave out hidden states (--hidden_state_weight 0)."
                )

    def features(self, processor: Any) -> Any:
        """The tokenized splits; the same tokenizer tokenizes once in a process."""
        key = digest(tokenizer_content(processor))
        if key not in self._features:
            self._features[key] = tokenize(self.data, processor, self.config.max_length)
        return self._features[key]

    def collate(self, processor: Any) -> Collate:
        return collate(processor)

    def test_texts(self) -> list[str]:
        """The test examples as a person reads them."""
        test = self.data.splits["test"]
        if self._reads_pairs:
            return [f"{text} ‖ {pair}" for text, pair in zip(test["text"], test["text_pair"], strict=True)]
        return list(test["text"])

    def graph(self, model: Any, processor: Any) -> Graph:
        """Two real examples of different length as the sample, so that the export sees padding and no axis of size 1."""
        features = self.features(processor)["train"]
        lengths = np.asarray(features["length"])
        batch = self.collate(processor)([features[int(np.argmin(lengths))], features[int(np.argmax(lengths))]])
        # A tokenizer may give more than the model takes, such as token types.
        taken = signature(model.forward).parameters.keys() - {"labels"}
        inputs = {name: value for name, value in batch.items() if name in taken}
        return Graph(model, inputs, {name: {0: "batch", 1: "sequence"} for name in inputs}, ["logits"])

    # ---- Bundle

    def bundle_settings(self, directory: Path, processor: Any) -> dict[str, Any]:
        return {
            "inputs": text_inputs(directory, processor, self._reads_pairs, self.config.max_length),
            "outputs": head_outputs(directory),
        }

    def verify_bundle(self, directory: Path, processor: Any) -> dict[str, Any]:
        probes = text_probes(processor, self._reads_pairs, self.config.max_length)
        return verify_predictor(directory, self, processor, probes, self.data.splits["validation"])

    @property
    def _reads_pairs(self) -> bool:
        return self.config.text_pair_column is not None


def is_pair(report: dict[str, Any]) -> bool:
    return bool(report["config"].get("text_pair_column"))


def token_limit(report: dict[str, Any]) -> int:
    return int(report["config"].get("max_length", DataConfig.max_length))
