"""Is an ONNX file the model it claims to be? Every check raises where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.core.config import GateConfig
from pipelines.core.errors import VerificationError
from pipelines.core.quality import gate_metric, problem_of, quality_lost
from pipelines.core.task import Arrays, Task
from pipelines.models.loading import has_tokenizer
from pipelines.models.removal import load_model
from pipelines.onnx.predict import feed_of, score_beside
from pipelines.runtime.infer import open_session

# Largest difference of an output, as a share of its largest number (or of 1); fp32 graphs stay below 1e-5.
TOLERANCE = 1e-4
BATCH_SIZES = (1, 2, 7)


def verification_batches(features: Any, collate: Any) -> Iterator[Arrays]:
    """Real batches of several sizes: the shortest examples, the longest, and, where examples have a length, ragged ones.

    In a ragged batch each example is cut to another length, since real ones may all have been cut to the same: without it no
    padding would be seen.
    """
    sequences = "length" in features.column_names
    order = np.argsort(features["length"], kind="stable") if sequences else np.arange(len(features))
    for size in BATCH_SIZES:
        for indices in (order[:size], order[-size:]):
            yield feed_of(features, indices, collate)
        if sequences:
            examples = [features[int(index)] for index in order[-size - 1 :]]
            ragged = [_shortened(example, (i + 1) / len(examples)) for i, example in enumerate(examples)]
            yield feed_of(ragged, range(len(ragged)), collate)


def _shortened(example: dict[str, Any], share: float) -> dict[str, Any]:
    """The first `share` of a tokenized example, of every column that has an entry for each token."""
    length = max(2, round(share * example["length"]))
    return {name: value[:length] if isinstance(value, list) else value for name, value in example.items()}


def verify_against_torch(path: Path, model: Any, task: Task, processor: Any) -> dict[str, Any]:
    """Compare the outputs of an fp32 ONNX file with those of `model` on the task's feeds; return what was compared.

    Raises VerificationError where they differ by more than rounding.
    """
    model.eval()
    feeds = task.verification_feeds(processor)
    return _compare(path, [task.run_model(model, feed) for feed in feeds], "the model it was made from", task, feeds)


def verify_same_graph(path: Path, original: Path, task: Task, processor: Any) -> dict[str, Any]:
    """The same comparison with the fp32 ONNX file that `path` was rewritten from."""
    session, feeds = open_session(original), task.verification_feeds(processor)
    expected = [task.run_graph(session, feed) for feed in feeds]
    del session  # one after the other, since each of the two takes more memory than its weights
    return _compare(path, expected, f"{original}, which it was rewritten from", task, feeds)


def _compare(path: Path, expected: list[Arrays], origin: str, task: Task, feeds: list[Arrays]) -> dict[str, Any]:
    session = open_session(path)
    largest_difference = 0.0
    for feed, wanted in zip(feeds, expected, strict=True):
        found = task.run_graph(session, feed)
        for name, numbers in wanted.items():
            if found[name].shape != numbers.shape or not np.isfinite(found[name]).all():
                raise VerificationError(
                    f"expected finite {name} of shape {numbers.shape} from {path}, found shape {found[name].shape} with "
                    f"{int((~np.isfinite(found[name])).sum())} that are not finite. The graph is broken and must not be used; export it "
                    "again."
                )
            difference, scale = float(np.abs(found[name] - numbers).max()), float(np.abs(numbers).max())
            if difference > TOLERANCE * max(1.0, scale):
                raise VerificationError(
                    f"expected the {name} of {path} to equal those of {origin}, within {TOLERANCE:g} of the largest ({scale:.3g}), found "
                    f"a difference of {difference:.3g}. The graph is not that model and must not be used; export it again, and report "
                    "the model if it happens again."
                )
            largest_difference = max(largest_difference, difference)
    return {
        "largest_difference": largest_difference,
        "padded_tokens": sum(int((feed["attention_mask"] == 0).sum()) for feed in feeds if "attention_mask" in feed),
    }


def verify_quality(
    before: dict[str, Any], after: dict[str, Any], task: Task, gate: GateConfig, name: str
) -> dict[str, Any]:
    """Compare the scores of a quantized model with those of the fp32 one it was made from; return both and what was lost.

    Raises VerificationError where that is more than the gate allows.
    """
    problem = problem_of(before, after, task, gate)
    if problem is not None:
        raise VerificationError(
            f"expected quantization to keep the quality on the validation split, found {problem} with {name}. Allow more with "
            "--max_quality_drop (1 for whatever is lost), name the CPU it will run on with --target_cpu, take another scheme, such as "
            "--quantization mixed_int8, or smaller blocks with --block_size, prune less or train the student longer, or ship fp32 with "
            "--quantization fp32."
        )
    metric = gate_metric(task, gate)
    lost = quality_lost(before[metric], after[metric], task.metrics[metric])
    return {"metric": metric, "fp32": before[metric], "quantized": after[metric], "quality_lost": lost}


def check_processor(processor: Any, directory: Path, reference: Path, task: Task) -> None:
    """Raise VerificationError where the `processor` of `directory` makes other inputs than that of the reference, if it has one."""
    if not has_tokenizer(str(reference)) and not (reference / "preprocessor_config.json").is_file():
        return
    theirs = task.verification_feeds(task.load_processor(str(reference)))
    ours = task.verification_feeds(processor)
    for one, other in zip(ours, theirs, strict=True):
        if one.keys() != other.keys() or not all(np.array_equal(one[name], other[name]) for name in one):
            raise VerificationError(
                f"expected the tokenizer or image processor in {directory} to make the inputs that the one in {reference} makes, found others. "
                "Copy that one's files, or export the model again."
            )


def verify_directory(directory: Path, reference: Path, task: Task, gate: GateConfig) -> dict[str, Any]:
    """Verify the ONNX model in `directory` against the model directory it was exported from, or the ONNX directory it was quantized from."""
    task.check_graph(str(directory))
    processor = task.load_processor(str(directory))
    path, original = directory / "model.onnx", reference / "model.onnx"
    if original.is_file():
        task.check_graph(str(reference))
        before, score = score_beside(original, task, processor)
        after = score(path, directory.name)
        return verify_quality(before, after, task, gate, str(path)) | {"metrics": after, "source_metrics": before}
    check_processor(processor, directory, reference, task)
    model = load_model(reference, task.config.trust_remote_code)
    task.check_config(model.config, str(reference))
    task.align_labels(model, str(reference))
    return verify_against_torch(path, model, task, processor) | task.verify_behaviour(directory, model, processor)
