"""What the report of an embedder has of its own: what is compared, and how its pages say it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.core.task import Comparison, StageResult
from pipelines.report.markdown import markdown_table, number
from pipelines.report.pages import TEACHER
from pipelines.tasks.base import LEARNED_FROM, check_predictions, examples_section, mean, worse_examples
from pipelines.tasks.sentence_embedding import scores
from pipelines.tasks.sentence_embedding.data import CORPUS
from pipelines.tasks.text_regression import spearman
from pipelines.tasks.texts import TextPresentation, javascript_code, onnx_code


def compare_embedders(
    stages: list[StageResult],
    labels: np.ndarray,
    texts: list[str],
    searches: bool,
    sizes: list[int],
    score: Callable[[np.ndarray], dict[str, Any]],
    sample: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    shipped: str,
) -> Comparison:
    """What a report says of embedders.

    Predictions are the vectors (texts, size) of `texts`, whose `labels` are those of single_texts(); or, of an estimator that searches, ranks
    (queries,). `score` gives their metrics, `sample` what the primary one is computed from. Agreement is the mean overlap of the ten
    nearest texts with the teacher's.
    """
    queries = int((labels != CORPUS).sum())
    shapes = {
        stage.name: (queries,) if stage.format == "sklearn" else (len(labels), stage.predictions.shape[-1])
        for stage in stages
    }
    check_predictions(stages, shapes, "a vector for each text, or the rank of each query's positive")
    found = {stage.name: stage.predictions for stage in stages}
    reference = scores.likeness(found[TEACHER], labels, searches)
    compared: dict[str, dict[str, Any]] = {}
    for name, predictions in found.items():
        metrics = score(predictions)
        compared[name] = {"metrics": metrics, "agreement": None, "similarity_spearman": None}
        if predictions.ndim == 2:
            own = scores.likeness(predictions, labels, searches)
            compared[name] |= {
                "agreement": float(scores.overlap(own, reference).mean()),
                "similarity_spearman": scores.rank_correlation(own, reference),
                "vector_size": predictions.shape[1],
            }
    samples = {name: sample(predictions) for name, predictions in found.items()}
    metric = spearman if len(samples[TEACHER]) == 2 else mean
    if "onnx" in found and found["onnx"].shape == found[shipped].shape:
        cosines = scores.cosines(found["onnx"], found[shipped])
        compared[shipped]["cosine_to_fp32"] = {"mean": float(cosines.mean()), "least": float(cosines.min())}
    report: dict[str, Any] = {
        "test_examples": len(samples[TEACHER][0]),
        "corpus_examples": len(labels) - queries,
        "vector_options": [],
    }
    if found[shipped].ndim == 2:  # no ranks of an estimator, which `fit` compares, too
        report["vector_options"] = scores.options(
            found[shipped], sizes, lambda vectors: float(metric(*sample(vectors)))
        )
    if searches:
        before, after = (scores.ranks_of(found[name], labels) for name in (TEACHER, shipped))
        worse = worse_examples(1 / before - 1 / after, texts, teacher_place=before, shipped_place=after)
        report["worse_examples"] = worse | {"better": int((after < before).sum())}
    return Comparison(compared, report, samples, metric)


class EmbedderPresentation(TextPresentation):
    """What a report says of an embedder."""

    latency_of = "one text"
    speed_unit = "texts/s"
    shown: Mapping[str, str] = {
        "recall_at_1": "recall@1",
        "recall_at_10": "recall@10",
        "ndcg_at_10": "NDCG@10",
        "pearson": "pearson",
    }
    hub_task: str | None = "sentence-similarity"
    hub_library = "sentence-transformers"
    hub_metrics: Mapping[str, str] = {
        "mrr_at_10": "mrr_at_10",
        "ndcg_at_10": "ndcg_at_10",
        "recall_at_1": "recall_at_1",
        "spearman": "spearmanr",
    }
    limitations: Sequence[str] = (
        "A cosine says which of several texts is nearer to another one. It is no probability, and no threshold holds for all texts.",
        "Vectors of one model cannot be compared with those of another, not even of its teacher: index all texts anew.",
        LEARNED_FROM,
    )

    def kind(self, report: dict[str, Any]) -> str:
        return "sentence embeddings: texts become vectors, and like texts near ones"

    def columns(self, stage: dict[str, Any]) -> dict[str, str]:
        return super().columns(stage) | {"similarity": number(stage.get("similarity_spearman"), ".3f")}

    def how_scored(self, report: dict[str, Any]) -> str:
        searched = ""
        if "worse_examples" in report:
            searched = (
                f"Each query is searched by its cosine in a corpus of {report['corpus_examples']:,} texts, of which one is its positive; texts of the "
                "same cosine count against it. *mrr at 10*: 1 / the place of the positive, 0 beyond the tenth. *recall@k*: the share of "
                "positives among the first k. *NDCG@10*: 1 / log2(1 + place). Latency is that of the longest query; throughput that of queries and "
                "corpus. "
            )
        return (
            f"{searched}*agreement*: the share of the ten nearest texts that are among the teacher's ten, too. *similarity*: Spearman's "
            "correlation of all cosines with the teacher's. *retained*: the score divided by the teacher's."
        )

    def what_was_lost(self, report: dict[str, Any], shipped: dict[str, Any], listed: int) -> str:
        name, parts = shipped["name"], []
        if closeness := shipped.get("cosine_to_fp32"):
            parts.append(
                f"The vectors of {name} have a mean cosine of {closeness['mean']:.4f} with those of the fp32 model, and one of "
                f"{closeness['least']:.4f} at least."
            )
        rows = [
            [one["kind"], str(one["size"]), str(one["bytes"]), f"{one['score']:.3f}"]
            for one in report["vector_options"]
        ]
        metric = report["primary_metric"].replace("_", " ")
        parts.append(f"The vectors of {name} in fewer bytes (infer.py --vector_type), and what that costs:")
        parts.append(markdown_table(["numbers", "size", "bytes", metric], rows))
        if worse := report.get("worse_examples"):
            parts += examples_section(
                f"Test queries whose positive {name} finds at a later place than the teacher: {worse['total']:,} of "
                f"{report['test_examples']:,}. The other way round: {worse['better']:,}.",
                "that lost most",
                worse["examples"][:listed],
                ["query", "text", "teacher's place", f"{name}'s place"],
                lambda one: [str(one["index"]), one["text"], str(one["teacher_place"]), str(one["shipped_place"])],
            )
        return "\n\n".join(parts)

    def in_python(self, report: dict[str, Any], model: str) -> str:
        return f"""
            from sentence_transformers import SentenceTransformer
            model = SentenceTransformer({json.dumps(model)})
            print(model.similarity(model.encode("A query."), model.encode(["A text.", "Another text."])))
        """

    def in_onnx_runtime(self, report: dict[str, Any], directory: str) -> str:
        output = "sentence_embedding"
        return onnx_code(report, directory, f"print({output})", texts='["A text."]', output=output)

    def in_javascript(self, report: dict[str, Any], repo_id: str, dtype: str) -> str:
        return javascript_code(report, repo_id, dtype, '["A text."]', "AutoModel", "sentence_embedding")

    def in_shell(self, report: dict[str, Any]) -> str:
        return '"A text." "Another text." --output vectors.npy'
