"""What the report of a language model has of its own: what is compared, and how its pages say it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core.task import IGNORED, Comparison, StageResult
from pipelines.report.markdown import number
from pipelines.report.pages import TEACHER
from pipelines.tasks.base import LEARNED_FROM, BasePresentation, check_predictions, examples_section, worse_examples


def compare_language_models(
    stages: list[StageResult],
    references: np.ndarray,
    score: Callable[[np.ndarray], dict[str, Any]],
    texts: list[str],
    end_token: int,
    shipped: str,
) -> Comparison:
    """What a report says of language models.

    `references` are the labels (windows, tokens), `texts` what they say, and predictions the loss and the likeliest token of each
    (windows, tokens, 2). `score` gives the metrics of predictions. The unit of the bootstrap is the document: its losses are summed
    over all windows that hold a part of it.
    """
    check_predictions(stages, (*references.shape, 2), "windows, tokens, loss and likeliest token")
    counted = references != IGNORED
    document = documents_of(references[counted], end_token)
    losses = {stage.name: stage.predictions[..., 0].astype(np.float64) for stage in stages}
    likeliest = {stage.name: stage.predictions[..., 1][counted] for stage in stages}
    compared = {
        stage.name: {
            "metrics": score(stage.predictions),
            "agreement": float(np.mean(likeliest[stage.name] == likeliest[TEACHER])),
        }
        for stage in stages
    }
    tokens = np.bincount(document)
    samples = {name: (np.bincount(document, weights=loss[counted]), tokens) for name, loss in losses.items()}
    before, after = (np.sum(losses[name], axis=1, where=counted) / counted.sum(axis=1) for name in (TEACHER, shipped))
    report = {
        "test_examples": len(tokens),
        "test_tokens": int(counted.sum()),
        "broken_examples": _broken_windows(before, after, texts),
    }
    return Comparison(compared, report, samples, perplexity)


def documents_of(labels: np.ndarray, end_token: int) -> np.ndarray:
    """For each token (tokens,) of joined documents the one that it is in, counted from 0; an end token belongs to what it ends."""
    ends = labels == end_token
    return np.cumsum(ends) - ends


def perplexity(losses: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Perplexity of documents, by the summed loss and the number of tokens of each, over the last axis."""
    return np.exp(np.sum(losses, axis=-1) / np.sum(tokens, axis=-1))


def _broken_windows(before: np.ndarray, after: np.ndarray, texts: list[str]) -> dict[str, Any]:
    """The windows whose mean loss a token rose most, by the perplexities of both models."""
    rise = after - before
    perplexities = {"teacher_perplexity": np.exp(before), "shipped_perplexity": np.exp(after)}
    return worse_examples(rise, texts, **perplexities) | {"repaired_total": int((rise < 0).sum())}


class GenerationPresentation(BasePresentation):
    """What a report says of a language model."""

    unit = "documents"
    digits = 2
    latency_digits = 2
    latency_of = "one token"
    speed_unit = "tokens/s"
    hub_metrics: Mapping[str, str] = {"perplexity": "perplexity", "next_token_accuracy": "accuracy"}
    limitations: Sequence[str] = (
        "It generates text that is likely after texts like those it was trained on, not text that is true or right.",
        f"{LEARNED_FROM} Compression can make them worse for what is rare: "
        "perplexity is a mean over all tokens and hides that.",
    )
    javascript = ("generate", '"A text", { max_new_tokens: 40 }')

    def kind(self, report: dict[str, Any]) -> str:
        return str(report["task"])

    def columns(self, stage: dict[str, Any]) -> dict[str, str]:
        return {
            "bits per byte": number(stage["metrics"]["bits_per_byte"], ".3f"),
            "TTFT ms": number(stage["time_to_first_token_ms"], ".1f"),
        }

    def how_scored(self, report: dict[str, Any]) -> str:
        return (
            f"*perplexity*: e to the mean loss of {report['test_tokens']:,} tokens, read in windows that move on by --stride; smaller is "
            "better. *bits per byte*: the loss of the whole text divided by its UTF-8 bytes. *retained*: the teacher's perplexity divided "
            "by this one. *agreement*: the share of tokens for which both models find the same token most likely."
        )

    def how_timed(self, report: dict[str, Any]) -> str:
        prompt = report["stages"][0]["latency_ms"]["shape"][1]
        return (
            f"*TTFT*: the time to the first token after a prompt of {prompt} tokens. *p50*, *p95*: one token of a greedy continuation of "
            "one prompt, the time of the prompt included."
        )

    def what_was_lost(self, report: dict[str, Any], shipped: dict[str, Any], listed: int) -> str:
        broken, name = report["broken_examples"], shipped["name"]
        columns = ("teacher_perplexity", "shipped_perplexity")
        section = examples_section(
            f"{name} finds {broken['total']:,} windows of the test text less likely than the teacher does, and "
            f"{broken['repaired_total']:,} more likely.",
            "largest rises in loss",
            broken["examples"][:listed],
            ["window", "text", "teacher's perplexity", f"{name}'s perplexity"],
            lambda one: [str(one["index"]), one["text"], *(number(one[key], ".1f") for key in columns)],
        )
        return "\n\n".join(section)

    def in_python(self, report: dict[str, Any], model: str) -> str:
        return f"""
            from transformers import pipeline
            generate = pipeline("text-generation", model={json.dumps(model)})
            print(generate("A text", max_new_tokens=40)[0]["generated_text"])
        """

    def in_onnx_runtime(self, report: dict[str, Any], directory: str) -> str:
        return f"""
            import numpy
            import onnxruntime
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file({json.dumps(directory + "/tokenizer.json")})
            session = onnxruntime.InferenceSession({json.dumps(directory + "/model.onnx")})
            cached = [node for node in session.get_inputs() if node.name.startswith("past_key_values.")]
            past = {{node.name: numpy.zeros((1, node.shape[1], 0, node.shape[3]), numpy.float32) for node in cached}}
            tokens = tokenizer.encode("A text").ids
            new = tokens
            for _ in range(40):  # the most likely token each time
                inputs = {{"input_ids": numpy.array([new]), "attention_mask": numpy.ones((1, len(tokens)), numpy.int64)}}
                logits, *present = session.run(None, inputs | past)
                past = dict(zip(past, present))
                new = [int(logits[0, -1].argmax())]
                tokens = tokens + new
            print(tokenizer.decode(tokens))
        """

    def in_shell(self, report: dict[str, Any]) -> str:
        return '"A text"'

    def remarks(self, files: Mapping[str, Path]) -> list[str]:
        if not _has_other_heads(files):
            return []
        return [
            "Pruning left layers with fewer heads than `config.json` says. transformers.js reads each layer's number from the graph. "
            "optimum-onnx 0.1.0 takes the number of the config for all layers, and cannot run the ONNX files."
        ]


def _has_other_heads(files: Mapping[str, Path]) -> bool:
    """Whether a layer of the graph has not as many heads as config.json says, which has one number for all."""
    import onnx

    config = json.loads(files["config.json"].read_text(encoding="utf-8"))
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or config.get("n_head")
    inputs = onnx.load(files["onnx/model.onnx"], load_external_data=False).graph.input
    caches = [value for value in inputs if value.name.startswith("past_key_values.")]
    return heads is not None and any(value.type.tensor_type.shape.dim[1].dim_value != heads for value in caches)
