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
from pipelines.tasks.texts import TextPresentation, TextTask, is_pair, token_limit


class TextClassifierPresentation(TextPresentation, ClassifierPresentation):
    """What a report says of a classifier of texts, or of pairs."""

    def in_python(self, report: dict[str, Any], model: str) -> str:
        text = '{"text": "A first text.", "text_pair": "A second text."}' if is_pair(report) else '"A text."'
        return f"""
            from transformers import pipeline
            classify = pipeline("text-classification", model={json.dumps(model)})
            print(classify({text}, truncation=True, max_length={token_limit(report)}))
        """

    def in_onnx_runtime(self, report: dict[str, Any], directory: str) -> str:
        texts = '["A first text."], ["A second text."]' if is_pair(report) else '["A text."]'
        return f"""
            import json

            import onnxruntime
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained({json.dumps(directory)})
            inputs = tokenizer({texts}, truncation=True, max_length={token_limit(report)}, return_tensors="np")
            session = onnxruntime.InferenceSession({json.dumps(directory + "/model.onnx")})
            logits = session.run(["logits"], {{node.name: inputs[node.name] for node in session.get_inputs()}})[0]
            with open({json.dumps(directory + "/config.json")}) as file:
                print(json.load(file)["id2label"][str(logits[0].argmax())])
        """

    def in_javascript(self, report: dict[str, Any], repo_id: str, dtype: str) -> str:
        if is_pair(report):
            return super().in_javascript(report, repo_id, dtype)
        return f"""
            import {{ pipeline }} from "@huggingface/transformers";
            const classify = await pipeline("text-classification", {json.dumps(repo_id)}, {{ dtype: "{dtype}" }});
            console.log(await classify("A text."));
        """


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
