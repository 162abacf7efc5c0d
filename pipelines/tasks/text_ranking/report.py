"""What a report says of a reranker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.report.markdown import clip, number
from pipelines.tasks.base import LEARNED_FROM, examples_section
from pipelines.tasks.texts import TextPresentation, javascript_code, onnx_code, token_limit

BATCH, LARGE_BATCH = 32, 128  # that throughput is timed at
SHOWN = 100  # characters of a passage in a table


class RankingPresentation(TextPresentation):
    """What a report says of a model that ranks passages for a query."""

    unit = "queries"
    latency_of = "one pair"
    speed_unit = "pairs/s"
    hub_metrics: Mapping[str, str] = {"mrr_at_10": "mrr", "ndcg_at_10": "ndcg"}
    limitations: Sequence[str] = (
        "It orders the candidates that a first stage finds. What that does not find stays lost.",
        "Scores order the passages of one query. They are no probabilities, and those of two queries cannot be compared.",
        LEARNED_FROM,
    )

    def __init__(self, other_metric: str = "ndcg_at_10") -> None:
        self.other_metric = other_metric  # beside the primary one

    def kind(self, report: dict[str, Any]) -> str:
        return "ranking passages for a query"

    def columns(self, stage: dict[str, Any]) -> dict[str, str]:
        return {
            self.other_metric.replace("_", " "): number(stage["metrics"][self.other_metric], ".3f"),
            f"pairs/s at {LARGE_BATCH}": number(stage.get(f"samples_per_second_{LARGE_BATCH}"), ",.0f"),
        }

    def how_scored(self, report: dict[str, Any]) -> str:
        return (
            f"Each query ranks its own candidates, {report['test_pairs']:,} pairs in all. *mrr at 10*: 1 / the place of the first relevant candidate, 0 "
            "from place 11 on; *ndcg at 10*: the gain of the first ten, discounted by their place, of the largest that is possible. Of candidates with "
            f"the same score the least relevant counts as the first. {report['without_relevant']:,} queries have no relevant candidate, and so 0 "
            "whatever ranks them. *retained*: the score divided by the teacher's. *agreement*: the share of queries whose first candidate is the "
            "teacher's."
        )

    def how_timed(self, report: dict[str, Any]) -> str:
        shape = " x ".join(str(size) for size in report["stages"][0]["latency_ms"]["shape"])
        return (
            f"*p50*, *p95*: one call with an input of shape {shape}. *pairs/s*: over batches of {BATCH} test pairs, together with others of their "
            f"length (estimators: of 16); *pairs/s at {LARGE_BATCH}*: over batches of {LARGE_BATCH}."
        )

    def what_was_lost(self, report: dict[str, Any], shipped: dict[str, Any], listed: int) -> str:
        worse, name = report["worse_examples"], shipped["name"]
        metric = report["primary_metric"].replace("_", " ")
        section = examples_section(
            f"Test queries whose {metric} is lower with {name} than with the teacher: {worse['total']:,} of {report['test_examples']:,}.",
            "that lost most",
            worse["examples"][:listed],
            ["query", f"what {name} puts first", "teacher's", f"{name}'s"],
            lambda one: [
                one["text"],
                clip(one["passage"], SHOWN),
                *(number(one[key], ".2f") for key in ("teacher", "shipped")),
            ],
        )
        return "\n\n".join(section)

    def in_python(self, report: dict[str, Any], model: str) -> str:
        return f"""
            from sentence_transformers import CrossEncoder
            reranker = CrossEncoder({json.dumps(model)}, max_length={token_limit(report)})
            print(reranker.rank("A query", ["A passage.", "Another passage."]))
        """

    def in_onnx_runtime(self, report: dict[str, Any], directory: str) -> str:
        texts = '["A query"] * 2, ["A passage.", "Another passage."], padding=True'
        return onnx_code(report, directory, "print(logits)", texts=texts)

    def in_shell(self, report: dict[str, Any]) -> str:
        return '--query "A query" --file passages.txt'

    def in_javascript(self, report: dict[str, Any], repo_id: str, dtype: str) -> str:
        texts = '["A query", "A query"], { text_pair: ["A passage.", "Another."], padding: true, truncation: true }'
        return javascript_code(report, repo_id, dtype, texts)
