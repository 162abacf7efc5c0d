"""Is an ONNX file the model it claims to be? Every check raises where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core.errors import VerificationError
from pipelines.onnx.predict import open_session, predict_onnx

TOLERANCE = (
    1e-4  # largest difference of a logit, as a share of the largest logit (or of 1); fp32 graphs stay below 1e-5
)
BATCH_SIZES = (1, 2, 7)


def verification_batches(features: Any, collate: Any) -> Iterator[dict[str, Any]]:
    """Real batches of several sizes: the shortest examples, the longest, and, where examples have a length, ragged ones.

    In a ragged batch each example is cut to another length, since real ones may all have been cut to the same: without it no
    padding would be seen.
    """
    sequences = "length" in features.column_names
    order = np.argsort(features["length"], kind="stable") if sequences else np.arange(len(features))
    for size in BATCH_SIZES:
        for indices in (order[:size], order[-size:]):
            yield _batch([features[int(index)] for index in indices], collate)
        if sequences:
            examples = [features[int(index)] for index in order[-size - 1 :]]
            yield _batch([_shortened(example, (i + 1) / len(examples)) for i, example in enumerate(examples)], collate)


def _batch(examples: list[dict[str, Any]], collate: Any) -> dict[str, Any]:
    return {name: value for name, value in collate(examples).items() if name != "labels"}


def _shortened(example: dict[str, Any], share: float) -> dict[str, Any]:
    """The first `share` of a tokenized example, of every column that has an entry for each token."""
    length = max(2, round(share * example["length"]))
    return {name: value[:length] if isinstance(value, list) else value for name, value in example.items()}


def verify_against_torch(path: Path, model: Any, task: Any, processor: Any) -> dict[str, Any]:
    """Compare the logits of an fp32 ONNX file with those of `model` on real validation batches; return what was compared.

    Raises VerificationError where they differ by more than rounding.
    """
    import torch

    model.eval()

    def expected(batches: list[dict[str, Any]]) -> list[np.ndarray]:
        with torch.inference_mode():
            return [model(**batch).logits.numpy() for batch in batches]

    return _compare(path, expected, "the model it was made from", task, processor)


def verify_same_graph(path: Path, original: Path, task: Any, processor: Any) -> dict[str, Any]:
    """The same comparison with the fp32 ONNX file that `path` was rewritten from."""

    def expected(batches: list[dict[str, Any]]) -> list[np.ndarray]:
        session = open_session(original)
        return [_run(session, batch) for batch in batches]

    return _compare(path, expected, f"{original}, which it was rewritten from", task, processor)


def verify_directory(directory: Path, reference: Path, task: Any, max_quality_drop: float) -> dict[str, Any]:
    """Verify the ONNX model in `directory` against the model directory it was exported from, or the ONNX directory it was quantized from."""
    from pipelines.models.removal import load_model

    task.check_graph(str(directory))
    processor = task.load_processor(str(directory))
    if (reference / "model.onnx").is_file():
        task.check_graph(str(reference))
        return verify_quality(directory / "model.onnx", reference / "model.onnx", task, processor, max_quality_drop)
    model = load_model(reference, task.trust_remote_code)
    task.order_labels(model, str(reference))
    return verify_against_torch(directory / "model.onnx", model, task, processor)


def _run(session: Any, batch: dict[str, Any]) -> np.ndarray:
    return session.run(["logits"], {value.name: batch[value.name].numpy() for value in session.get_inputs()})[0]


def _compare(
    path: Path,
    expected_logits: Callable[[list[dict[str, Any]]], list[np.ndarray]],
    origin: str,
    task: Any,
    processor: Any,
) -> dict[str, Any]:
    batches = list(verification_batches(task.features(processor)["validation"], task.collate(processor)))
    # One after the other, since each of the two models takes more memory than its weights.
    answers = expected_logits(batches)
    session = open_session(path)
    largest_difference = largest_logit = 0.0
    shapes, padded = [], 0
    for batch, expected in zip(batches, answers, strict=True):
        found = _run(session, batch)
        shape = list(next(iter(batch.values())).shape)
        if found.shape != expected.shape or not np.isfinite(found).all():
            raise VerificationError(
                f"expected finite logits of shape {expected.shape} from {path} for a batch of shape {shape}, found shape {found.shape} "
                f"with {int((~np.isfinite(found)).sum())} that are not finite. The graph is broken and must not be used; export it again."
            )
        shapes.append(shape)
        padded += int((batch["attention_mask"] == 0).sum()) if "attention_mask" in batch else 0
        largest_difference = max(largest_difference, float(np.abs(found - expected).max()))
        largest_logit = max(largest_logit, float(np.abs(expected).max()))
    if largest_difference > TOLERANCE * max(1.0, largest_logit):
        raise VerificationError(
            f"expected the logits of {path} to equal those of {origin}, within {TOLERANCE:g} of the largest ({largest_logit:.3g}), found "
            f"a difference of {largest_difference:.3g}. The graph is not that model and must not be used; export it again, and report the "
            "model if it happens again."
        )
    return {
        "largest_difference": largest_difference,
        "largest_logit": largest_logit,
        "batch_shapes": shapes,
        "padded_tokens": padded,
    }


def verify_quality(path: Path, reference: Path, task: Any, processor: Any, max_quality_drop: float) -> dict[str, Any]:
    """Score a quantized ONNX file and the fp32 one it was made from on the validation split; return both scores and the agreement.

    Raises VerificationError where the primary metric falls by more than `max_quality_drop`.
    """
    features, collate = task.features(processor)["validation"], task.collate(processor)
    logits = predict_onnx(path, features, collate, name="verify quantized")
    reference_logits = predict_onnx(reference, features, collate, name="verify fp32")
    if not np.isfinite(logits).all():
        raise VerificationError(
            f"expected finite logits from {path}, found {int((~np.isfinite(logits)).sum())} that are not. The file is broken and must not "
            "be used; quantize again, or ship fp32 with --quantization fp32."
        )
    metrics = task.metrics(logits, features["labels"])
    before = task.metrics(reference_logits, features["labels"])[task.primary_metric]
    drop = (before - metrics[task.primary_metric]) * (1 if task.greater_is_better else -1)
    if drop > max_quality_drop:
        raise VerificationError(
            f"expected quantization to cost at most {max_quality_drop:g} of {task.primary_metric} on the validation split, found "
            f"{before:.4f} before and {metrics[task.primary_metric]:.4f} after. Allow more with --max_quality_drop, name the CPU it will "
            "run on with --target_cpu, prune less or train the student longer, or ship fp32 with --quantization fp32."
        )
    return {
        "metrics": metrics,
        "fp32": before,
        "drop": drop,
        "agreement": float(task.agreement(logits, reference_logits)),
        "largest_difference": float(np.abs(logits - reference_logits).max()),
        "examples": len(features),
    }
