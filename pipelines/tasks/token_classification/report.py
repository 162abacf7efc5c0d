"""What a report says of a model that finds spans."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.core.task import Comparison, StageResult
from pipelines.report.markdown import CLIPPED_TEXT, clip
from pipelines.report.pages import TEACHER
from pipelines.runtime.spans import OVERLAP
from pipelines.tasks.base import LEARNED_FROM, LISTED_EXAMPLES, examples_section
from pipelines.tasks.classification import ClassifierPresentation, class_report, compared_classes, recall_tables
from pipelines.tasks.texts import TextPresentation, onnx_code, token_limit
from pipelines.tasks.token_classification.entities import Entity, entities, entity_metrics, f1_of


def compare_entities(
    stages: list[StageResult],
    tags: dict[str, list[str]],
    expected: list[str],
    places: tuple[np.ndarray, np.ndarray],
    test: Any,
    kinds: list[str],
    shipped: str,
) -> Comparison:
    """What a report says of the tags (words,) of every stage; `places` are the rows of `test` that words belong to, and their
    numbers there, both (words,)."""
    documents, _ = places
    found = {name: entities(own, documents) for name, own in tags.items()}
    gold = entities(expected, documents)
    words = {name: np.array(own) for name, own in tags.items()}
    scores = {
        name: entity_metrics(own, gold, kinds) | {"accuracy": float(np.mean(words[name] == np.array(expected)))}
        for name, own in found.items()
    }
    agreement = {name: float(np.mean(own == words[TEACHER])) for name, own in words.items()}

    def per_document(some: set[Entity]) -> np.ndarray:
        return np.bincount(np.array([document for document, *_ in some], int), minlength=len(test))

    lost = sorted((gold & found[TEACHER]) - found[shipped])
    counts = np.array([*scores[TEACHER]["examples_per_class"].values()])
    report = class_report(stages, kinds, counts, len(test)) | {
        "test_words": len(expected),
        "test_words_without_token": sum(map(len, test["starts"])) - len(expected),
        "lost_spans": {
            "total": len(lost),
            "expected": len(gold),
            "gained_total": len((gold & found[shipped]) - found[TEACHER]),
            "examples": [_described(one, found[shipped], places, test) for one in lost[:LISTED_EXAMPLES]],
        },
    }
    samples = {name: (per_document(own & gold), per_document(own), per_document(gold)) for name, own in found.items()}
    return Comparison(compared_classes(scores, agreement), report, samples, metric=f1_of)


def _described(
    entity: Entity, shipped: set[Entity], places: tuple[np.ndarray, np.ndarray], test: Any
) -> dict[str, Any]:
    """A span that is lost, in its text, and what the shipped model finds in its place."""
    document, start, end, kind = entity
    row, words = test[int(document)], places[1]

    def text_of(start: int, end: int) -> str:
        return str(row["text"][row["starts"][words[start]] : row["ends"][words[end - 1]]])

    instead = [one for one in sorted(shipped) if one[0] == document and one[1] < end and start < one[2]]
    return {
        "index": int(document),
        "text": clip(row["text"], CLIPPED_TEXT),
        "span": text_of(start, end),
        "label": kind,
        "shipped": ", ".join(f"{text_of(one[1], one[2])} ({one[3]})" for one in instead),
    }


class TokenPresentation(TextPresentation, ClassifierPresentation):
    """What a report says of a model that finds spans."""

    shown: Mapping[str, str] = {"precision": "precision", "recall": "recall", "accuracy": "accuracy"}
    hub_metrics: Mapping[str, str] = {"f1": "f1", "precision": "precision", "recall": "recall", "accuracy": "accuracy"}
    limitations: Sequence[str] = (
        "It misses spans and finds some that are none: see the recall and the precision per type. Do not rely on it alone where a miss does "
        "harm. Its scores are not calibrated, and compression changes them.",
        f"{LEARNED_FROM} Names and forms that its data lacks are found less often.",
    )
    javascript = ("find", '"A text.", { ignore_labels: ["O"] }')

    def how_scored(self, report: dict[str, Any]) -> str:
        return (
            "*f1*, *precision*, *recall*: of spans with the right words and the right type, all types together (strict IOB2). *accuracy*: the "
            "share of words with the right tag. *retained*: the F1 divided by the teacher's. *agreement*: the share of words with the "
            "teacher's tag."
        )

    def what_was_lost(self, report: dict[str, Any], shipped: dict[str, Any], listed: int) -> str:
        lost, name = report["lost_spans"], shipped["name"]
        section = examples_section(
            f"Spans that the teacher finds and {name} does not: {lost['total']:,} of {lost['expected']:,}. The other way round: "
            f"{lost['gained_total']:,}.",
            "first of them",
            lost["examples"][:listed],
            ["example", "text", "span", f"{name} finds"],
            lambda one: [
                str(one["index"]),
                one["text"],
                f"{one['span']} ({one['label']})",
                one["shipped"] or "nothing",
            ],
            text_columns=4,
        )
        return "\n\n".join([*recall_tables(report, shipped, "spans"), *section])

    def in_python(self, report: dict[str, Any], model: str) -> str:
        return f"""
            from transformers import pipeline
            find = pipeline("token-classification", model={json.dumps(model)}, aggregation_strategy="simple", stride={token_limit(report) // OVERLAP})
            print(find("A text."))
        """

    def in_onnx_runtime(self, report: dict[str, Any], directory: str) -> str:
        tags = 'print([config["id2label"][str(number)] for number in logits[0].argmax(-1)])'
        return onnx_code(report, directory, tags, reads_config=True)
