"""What the report of a language model has of its own: what is scored, what is compared, and how its pages say it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.core.errors import InputError, VerificationError
from pipelines.core.task import IGNORED
from pipelines.report.bootstrap import paired_bootstrap, perplexity
from pipelines.report.markdown import CLIPPED_TEXT, clip, fence, markdown_table, number

TASK = "text-generation"
DIGITS = 2  # decimals of a perplexity
LISTED_WINDOWS = 50
LIMITATIONS = (
    "It writes what is likely after a text like those it was trained on, not what is true or right.",
    "It knows what its teacher and its data know: their errors and biases are passed on, and compression can make "
    "them worse for what is rare. Perplexity is a mean over all tokens and hides that.",
)


def compare(
    stages: list[Any], references: np.ndarray, metrics: dict[str, dict[str, Any]], texts: list[str], end_token: int,
    bandwidth: float, weight_bytes: dict[str, int], shipped: str, teacher: str = "teacher",
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """What `report.assemble` takes: the comparison of every stage with the teacher, and what the report says of all.

    `references` are the labels (windows, tokens), `texts` what they say, `metrics` the scores of each stage; a stage's answers are
    token_answers (windows, tokens, 2). `bandwidth` is in bytes a second. Documents are drawn with replacement for the intervals.
    """
    counted = references != IGNORED
    names = [stage.name for stage in stages]
    if names.count(teacher) != 1 or len(set(names)) < len(names):
        raise InputError(
            f"expected different stages, one of them the teacher that the others are compared with, found {names}. "
            "Run the missing stages first."
        )
    for stage in stages:
        if stage.answers.shape != (*references.shape, 2):
            raise InputError(
                f"expected answers to {references.shape} tokens (windows, length) from {stage.name}, found {stage.answers.shape[:2]}. "
                "Every stage must have the teacher's vocabulary."
            )
        if not np.isfinite(stage.answers).all():
            raise VerificationError(
                f"expected finite losses from {stage.name}, found NaN or infinity in "
                f"{int((~np.isfinite(stage.answers)).any(axis=(1, 2)).sum())} of {len(references)} test windows. Do not use this model; "
                "export or quantize it again, in fp32 if need be."
            )
    document, documents = documents_of(references, end_token)
    losses = {stage.name: stage.answers[..., 0].astype(np.float64).sum(axis=1) for stage in stages}
    tokens = counted.sum(axis=1)

    def by_document(values: np.ndarray) -> np.ndarray:
        return np.bincount(document, weights=values)

    compared = {}
    likeliest = {stage.name: stage.answers[..., 1][counted] for stage in stages}
    for stage in stages:
        difference = paired_bootstrap(
            by_document(losses[stage.name]), by_document(losses[teacher]), by_document(tokens), perplexity
        )
        compared[stage.name] = {
            "metrics": metrics[stage.name],
            "agreement": float(np.mean(likeliest[stage.name] == likeliest[teacher])),
            "difference": difference,
            # Every weight is read for every token; more than this only where weights stay in the processor's caches.
            "tokens_per_second_at_memory_bandwidth": bandwidth / weight_bytes[stage.name],
        }
    own = {
        "test_examples": documents,
        "test_tokens": int(counted.sum()),
        "broken_examples": _broken_windows(losses[teacher] / tokens, losses[shipped] / tokens, texts, shipped),
    }
    return compared, own


def documents_of(references: np.ndarray, end_token: int) -> tuple[np.ndarray, int]:
    """For each window the document that its labels begin in, counted from 0 without gaps, and how many documents there are."""
    ends = (references == end_token).sum(axis=1)
    _, document = np.unique(np.cumsum(ends) - ends, return_inverse=True)
    return document, int(ends.sum())


def _broken_windows(before: np.ndarray, after: np.ndarray, texts: list[str], shipped: str) -> dict[str, Any]:
    """The windows whose mean loss a token rose most, by the perplexities of both models."""
    rise = after - before
    order = np.argsort(-rise, kind="stable")[:LISTED_WINDOWS]
    return {
        "stage": shipped,
        "total": int((rise > 0).sum()),
        "repaired_total": int((rise < 0).sum()),
        "examples": [
            {
                "index": int(index),
                "text": clip(texts[index], CLIPPED_TEXT),
                "teacher_perplexity": float(np.exp(before[index])),
                "shipped_perplexity": float(np.exp(after[index])),
            }
            for index in order
            if rise[index] > 0
        ],
    }


# ---- Its part of the pages


def cells(stage: dict[str, Any]) -> dict[str, str]:
    """The columns of the table that only a language model has."""
    return {
        "bits per byte": number(stage["metrics"]["bits_per_byte"], ".3f"),
        "first token ms": number(stage["first_token_ms"], ".1f"),
    }


def how_scored(report: dict[str, Any]) -> str:
    return (
        f"*perplexity*: e to the mean loss of {report['test_tokens']:,} tokens, with a window that moves on by --stride; less is "
        "better. *difference*: perplexity minus the teacher's, with a paired bootstrap interval over documents. *bits per byte*: "
        "the loss of the whole text over its UTF-8 bytes. *retained*: the teacher's perplexity over this one. *agreement*: share of "
        "tokens for which both find the same one likeliest."
    )


def how_timed(report: dict[str, Any], threads: str) -> str:
    bandwidth = report["environment"]["memory_bandwidth_bytes_per_second"] / 1e9
    bounds = ", ".join(
        f"{stage['name']} {stage['tokens_per_second_at_memory_bandwidth']:,.0f}" for stage in report["stages"]
    )
    prompt = report["stages"][0]["latency_ms"]["shape"][1]
    return (
        f"*first token*: a prompt of {prompt} tokens read and one chosen. *p50*, *p95*: one token of a greedy continuation, prompt "
        f"included, batch 1, {threads}; *x faster*: median of the rounds, with the least and the largest. One core reads "
        f"{bandwidth:.1f} GB a second from memory; were every weight read from there for every token, the tokens a second would be at "
        f"most {bounds} (weights that stay in the caches allow more)."
    )


def broken_section(report: dict[str, Any], shipped: dict[str, Any], listed: int) -> str:
    broken = report["broken_examples"]
    examples = broken["examples"][:listed]
    parts = [
        f"Of the windows of test text, {broken['total']:,} are less likely to {shipped['name']} than to the teacher, and "
        f"{broken['repaired_total']:,} more likely." + (" Those whose loss rose most:" if examples else "")
    ]
    if examples:
        header = ["window", "text", "teacher's perplexity", f"{shipped['name']}'s"]
        rows = [
            [
                str(example["index"]),
                example["text"],
                number(example["teacher_perplexity"], ".1f"),
                number(example["shipped_perplexity"], ".1f"),
            ]
            for example in examples
        ]
        parts.append(markdown_table(header, rows, text_columns=2))
    return "\n\n".join(parts)


def usage(opened: dict[str, Any], shipped: dict[str, Any], note: list[str]) -> list[str]:
    """How to run the last model directory with transformers, and the shipped graph without torch."""
    code = f"""
        from transformers import pipeline

        write = pipeline("text-generation", model="{opened["path"]}")
        print(write("A text", max_new_tokens=40)[0]["generated_text"])
    """
    parts = ["In a copy of this directory, with transformers:", fence(code, "python"), *note]
    if shipped["format"] != "onnx":
        return parts
    code = f"""
        import numpy
        import onnxruntime
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file("{shipped["path"]}/tokenizer.json")
        session = onnxruntime.InferenceSession("{shipped["path"]}/model.onnx")
        cached = [node for node in session.get_inputs() if node.name.startswith("past_key_values.")]
        past = {{node.name: numpy.zeros((1, node.shape[1], 0, node.shape[3]), numpy.float32) for node in cached}}
        tokens = tokenizer.encode("A text").ids
        new = tokens
        for _ in range(40):
            inputs = {{"input_ids": numpy.array([new]), "attention_mask": numpy.ones((1, len(tokens)), numpy.int64)}}
            logits, *present = session.run(None, inputs | past)
            past = dict(zip(past, present))
            new = [int(logits[0, -1].argmax())]
            tokens = tokens + new
        print(tokenizer.decode(tokens))
    """
    return [
        *parts,
        "The shipped model, with ONNX Runtime and no torch, the likeliest token each time:",
        fence(code, "python"),
        "`pipelines/runtime/generate.py` of Pocketformers does the same for batches, with sampling, stop tokens and streaming.",
    ]
