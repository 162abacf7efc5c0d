"""Causal model -> ONNX with a KV cache: one graph for the prompt and for every token after it, verified by generating text.

Inputs are input_ids (batch, sequence), attention_mask (batch, past and sequence) and, for each layer, past_key_values.N.key and .value
(batch, heads, past, head size); outputs are logits (batch, sequence, vocabulary) and present.N.key and .value, the next call's past.
The past may be empty. Positions follow from the mask, so padding stands on the left. (The names are those of optimum and
transformers.js, which makes its empty past from the graph's shapes and knows their first axis only as batch_size.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.core.errors import VerificationError
from pipelines.core.run import Outcome
from pipelines.models.removal import load_model
from pipelines.onnx.export import ONNX_FILE, OPSET, name_axes, quiet_exporters
from pipelines.onnx.file import save
from pipelines.onnx.predict import empty_cache, open_session
from pipelines.onnx.verify import TOLERANCE
from pipelines.runtime.generate import LanguageModel, Sampling
from pipelines.training.trainer import count_parameters

VERIFIED_PROMPTS = 20


class WithCache(nn.Module):
    """A causal model as a function of tensors only: token ids, mask and past in; logits and the longer past out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        from transformers import DynamicCache

        # As in generate(): positions count the tokens that are not padding.
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=DynamicCache(past),
            use_cache=True,
        )
        present = [tensor for layer in outputs.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return outputs.logits, present


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Attention written out in single steps, which gives the smaller graph and has no rows of NaN where all is padding."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def sample_inputs(model: Any) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Two sequences, one of them padded, that continue a past of five tokens by three; the past has each layer's own heads."""
    with torch.inference_mode():
        layers = model(torch.zeros((2, 5), dtype=torch.long), use_cache=True).past_key_values.layers
    past = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
    mask = torch.ones((2, 8), dtype=torch.long)
    mask[0, :2] = 0
    return torch.arange(6).reshape(2, 3), mask, past


def export_graph(model: Any, path: Path) -> dict[str, int]:
    """Write `model` as one ONNX file with a KV cache; return how many nodes of each operator it has."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from torch.export import Dim

    model.eval()
    input_ids, mask, past = sample_inputs(model)
    axes = {"input_ids": {0: "batch_size", 1: "sequence"}, "attention_mask": {0: "batch_size", 1: "total"}}
    caches = [f"{layer}.{kind}" for layer in range(len(past)) for kind in ("key", "value")]
    axes |= {f"past_key_values.{name}": {0: "batch_size", 2: "past"} for name in caches}
    dynamic = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    first_two = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    with eager_attention(model), quiet_exporters():
        program: Any = torch.onnx.export(
            WithCache(model),
            (input_ids, mask, past),
            dynamic_shapes=(first_two, first_two, [(dynamic, dynamic)] * len(past)),
            input_names=list(axes),
            output_names=["logits", *(f"present.{name}" for name in caches)],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    graph = program.model.graph
    name_axes(graph, axes)
    # The exporter notes for every node the lines of Python it came from: half a megabyte that names this machine's folders.
    ClearMetadataAndDocStringPass()(program.model)
    save(program.model, path)
    operators = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.all_nodes())
    return dict(sorted(operators.items()))


def export_language_model(source: str, directory: Path, task: Any) -> Outcome:
    """Export the causal model in `source`, without the zeros of pruning, and verify its logits and the text it generates."""
    processor = task.load_processor(source)
    model = load_model(source, task.trust_remote_code)
    task.check_config(model.config, source)
    operators = export_graph(model, directory / ONNX_FILE)
    processor.save_pretrained(directory)
    model.config.save_pretrained(directory)
    verification = {
        "logits": verify_logits(directory / ONNX_FILE, model, task, processor),
        "generation": verify_generation(directory, model, task, processor),
    }
    inputs = [value.name for value in open_session(directory / ONNX_FILE).get_inputs()]
    return Outcome(
        "onnx",
        parameters=count_parameters(model),
        details={"opset": OPSET, "inputs": inputs, "operators": operators, "verification": verification},
    )


def verify_logits(path: Path, model: Any, task: Any, processor: Any) -> dict[str, Any]:
    """Compare the logits of validation windows, whole and in two parts joined by the cache, with and without padding on the left.

    Raises VerificationError where they differ by more than rounding.
    """

    def expected(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        no_past: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode():
            logits: np.ndarray = WithCache(model)(torch.from_numpy(ids), torch.from_numpy(mask), no_past)[0].numpy()
        return logits

    return _compare_logits(path, expected, "the model it was made from", task, processor)


def verify_same_logits(path: Path, original: Path, task: Any, processor: Any) -> dict[str, Any]:
    """The same comparison with the fp32 ONNX file that `path` was rewritten from."""
    session = open_session(original)

    def expected(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        feed = {"input_ids": ids, "attention_mask": mask} | empty_cache(session, len(ids))
        logits: np.ndarray = session.run(["logits"], feed)[0]
        return logits

    return _compare_logits(path, expected, f"{original}, which it was rewritten from", task, processor)


def _compare_logits(
    path: Path, expected_logits: Callable[[np.ndarray, np.ndarray], np.ndarray], origin: str, task: Any, processor: Any
) -> dict[str, Any]:
    session = open_session(path)
    outputs = [value.name for value in session.get_outputs()]
    features = task.features(processor)["validation"]
    largest_difference = largest_logit = 0.0
    compared = []
    for batch, padding, split in ((1, 0, 0), (3, 0, 1), (2, 5, 0), (3, 4, 7)):
        windows = np.array(features[: min(batch, len(features))]["input_ids"])
        ids = windows.copy()
        mask = np.ones_like(ids)
        # The first of the batch is a shorter sequence: padding, then only its beginning.
        ids[0, padding:] = windows[0, : ids.shape[1] - padding]
        mask[0, :padding] = 0
        expected = expected_logits(ids, mask)
        cache = empty_cache(session, len(ids))
        found = []
        for part in [slice(0, split), slice(split, None)] if split else [slice(None)]:
            feed = {"input_ids": ids[:, part], "attention_mask": mask[:, : part.stop]}
            logits, *present = session.run(outputs, feed | cache)
            cache = dict(zip(cache, present, strict=True))
            found.append(logits)
        logits = np.concatenate(found, axis=1)
        counted = mask.astype(bool)
        if logits.shape != expected.shape or not np.isfinite(logits[counted]).all():
            raise VerificationError(
                f"expected finite logits of shape {expected.shape} from {path}, found shape {logits.shape} with "
                f"{int((~np.isfinite(logits)).sum())} that are not finite. The graph is broken and must not be used; export it again."
            )
        largest_difference = max(largest_difference, float(np.abs(logits - expected)[counted].max()))
        largest_logit = max(largest_logit, float(np.abs(expected[counted]).max()))
        compared.append({"shape": list(ids.shape), "padding": padding, "past": split})
    if largest_difference > TOLERANCE * max(1.0, largest_logit):
        raise VerificationError(
            f"expected the logits of {path} to equal those of {origin}, within {TOLERANCE:g} of the largest ({largest_logit:.3g}), found "
            f"a difference of {largest_difference:.3g}. The graph is not that model and must not be used; export it again, and report the "
            "model if it happens again."
        )
    return {"largest_difference": largest_difference, "largest_logit": largest_logit, "compared": compared}


def prompts_for(task: Any, processor: Any, count: int) -> list[list[int]]:
    """Beginnings of validation windows of different lengths, from 1 token to half a window."""
    features = task.features(processor)["validation"]
    length = len(features[0]["input_ids"])
    return [
        features[index * len(features) // count]["input_ids"][: 1 + index * (length // 2) // count]
        for index in range(count)
    ]


def verify_generation(
    directory: Path, model: Any, task: Any, processor: Any, count: int = VERIFIED_PROMPTS
) -> dict[str, Any]:
    """Continue prompts greedily with the ONNX loop and with torch's generate, one by one and in batches padded on the left.

    Neither stops at the end token, so that every continuation is compared in full. Raises VerificationError at the first token that
    differs, unless torch itself finds the two equally likely within rounding.
    """
    edge = LanguageModel(directory)
    edge.end_tokens = []
    prompts = prompts_for(task, processor, count)
    new = max(2, len(task.features(processor)["validation"][0]["input_ids"]) // 2)
    tokens = ties = 0
    for group in [[prompt] for prompt in prompts] + [prompts[start : start + 5] for start in range(0, count, 5)]:
        expected, found = torch_greedy(model, group, new), edge.generate_tokens(group, Sampling(max_new_tokens=new))
        for prompt, theirs, ours in zip(group, expected, found, strict=True):
            tokens += len(theirs)
            if theirs == ours:
                continue
            at = next(i for i, theirs_there in enumerate([*theirs, None]) if [*ours, None][i : i + 1] != [theirs_there])
            if is_tie(model, [*prompt, *theirs[:at]]):
                ties += 1
                continue
            raise VerificationError(
                f"expected the model in {directory} to generate what torch generates, found another token at position {at} after the "
                f"prompt {processor.decode(prompt)!r:.80} in a batch of {len(group)}: {processor.decode(ours[at : at + 1])!r} instead of "
                f"{processor.decode(theirs[at : at + 1])!r}. The graph is not that model and must not be used; export it again."
            )
    return {"prompts": len(prompts), "largest_batch": min(5, count), "tokens": tokens, "ties": ties}


def torch_greedy(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The `new` tokens after each prompt by torch's generate, which goes on after an end token."""
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    # The checkpoint's own settings may sample, penalize or stop.
    before = model.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    try:
        with torch.inference_mode():
            generated: list[list[int]] = model.generate(ids, attention_mask=mask)[:, longest:].tolist()
    finally:
        model.generation_config = before
    return generated


def is_tie(model: Any, tokens: list[int]) -> bool:
    """Whether the two likeliest next tokens are equally likely within rounding."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    return first - second < TOLERANCE * max(1.0, logits.abs().max().item())
