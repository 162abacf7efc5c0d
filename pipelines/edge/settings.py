"""How a model's inputs are prepared and its outputs read, in the words of a bundle's manifest.

    "inputs":  {"kind": "text", "pair", "max_length", "truncation_side", "probes"}, for a language model only the kind and the probes
               {"kind": "image", "channels", "resize", "resample", "crop", "rescale", "mean", "std", "value_range"}
    "outputs": {"kind": "classes", "activation": "softmax" | "sigmoid" | "none", "labels", and perhaps "thresholds" of a sigmoid:
                 the probability of each label, in their order, from which on it is predicted; 0.5 where they are left out}
               {"kind": "values", "names", and perhaps "ranks": the value of a pair says how well the second text answers the first}
               {"kind": "spans", "labels"}, of tokens: O, and B- and I- of every type; inputs have "offsets" in their probes
               {"kind": "continuation", "end_tokens", "context", "cache", "cache_until"}, the tokens up to which
                 the cache is that of any longer text
               {"kind": "vector", "output"}, the name of the graph's output that is the vector of a text
               {"kind": "answer", "max_answer_tokens", "unanswerable"}: a part of the second text, which is read in windows whose shared tokens
                 "overlap" of the inputs counts; or none, where "unanswerable" is true

A task writes them (Task.bundle_settings); pipelines/runtime reads them. Neither torch nor transformers is imported here.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipelines.core.errors import InputError
from pipelines.runtime.generate import LanguageModel

# Image processors whose steps are those of image_settings. A bundle may be of any other, too: it is verified when it is built.
IMAGE_PROCESSORS = (
    "BitImageProcessor",
    "ConvNextImageProcessor",
    "DeiTImageProcessor",
    "MobileNetV2ImageProcessor",
    "ViTImageProcessor",
)

# Models whose positions are counted from the id of the padding token on.
FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "data2vec-text",
    "roberta-prelayernorm",
)

# What of a config.json says how a model answers questions: its windows' "overlap", "max_answer_tokens", "unanswerable".
ANSWERS = "question_answering"


def text_settings(directory: Path, truncation_side: str, pair: bool | None, max_length: int) -> dict[str, Any]:
    """What of tokenization is not in tokenizer.json, which must be there; whether inputs are pairs is None where it is not known."""
    check_tokenizer(directory)
    return {"kind": "text", "pair": pair, "max_length": max_length, "truncation_side": truncation_side}


def check_tokenizer(directory: Path) -> None:
    if not (directory / "tokenizer.json").is_file():
        raise InputError(
            f"expected a tokenizer.json in {directory}, which the tokenizers library reads, found none: the model has only a slow "
            "tokenizer. Convert it to a fast one, or use a model that has one."
        )


def image_settings(processor: Any) -> dict[str, Any]:
    """The steps of an image processor, in the order in which every one of transformers' takes them; None leaves a step out."""
    size = {name: value for name, value in dict(processor.size).items() if value is not None}
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
    crop_share = getattr(processor, "crop_pct", None)
    if crop_share is not None and "shortest_edge" in size:
        # ConvNeXT's: up to 384 pixels a frame around the crop is resized along, from there on the whole is squeezed into a square.
        edge = size["shortest_edge"]
        square = {"height": edge, "width": edge}
        size, crop = ({"shortest_edge": int(edge / crop_share)}, crop or square) if edge < 384 else (square, crop)
    return {
        "kind": "image",
        "channels": len(processor.image_mean or "RGB"),
        "resize": size if processor.do_resize else None,
        "resample": int(processor.resample),
        "crop": {name: crop[name] for name in ("height", "width")} if crop is not None else None,
        "rescale": processor.rescale_factor if processor.do_rescale else None,
        "mean": list(processor.image_mean) if processor.do_normalize else None,
        "std": list(processor.image_std) if processor.do_normalize else None,
    }


def head_outputs(directory: Path) -> dict[str, Any]:
    """How the logits of a head are read, by the class of the model, and by the `problem_type` and `id2label` of its config.json; or that the
    model is an embedder."""
    config = read_json(directory / "config.json")
    if "sentence_embedding" in config:  # see pipelines/models/embedder.py
        return {"kind": "vector", "output": "sentence_embedding"}
    if _has_head(config, "ForQuestionAnswering"):
        usual = {"max_answer_tokens": 30, "unanswerable": False}  # of a model that was trained elsewhere
        own = config.get(ANSWERS, {})
        return {"kind": "answer", **{name: own.get(name, value) for name, value in usual.items()}}
    # transformers leaves out of the file what is its default: two labels.
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if {*labels} != {*map(str, range(len(labels)))}:
        raise InputError(
            f"expected id2label in {directory / 'config.json'} to have a row of the head (0, 1, ...) for every label, found "
            f"{', '.join(labels)}. Correct it."
        )
    names = [labels[str(index)] for index in range(len(labels))]
    if _has_head(config, "ForTokenClassification"):
        return {"kind": "spans", "labels": names}
    # One output without a problem_type is a value for transformers, too.
    problem = config.get("problem_type") or ("regression" if len(names) == 1 else None)
    if problem == "regression":
        return {"kind": "values", "names": ["score"] if names == ["LABEL_0"] else names}
    if problem != "multi_label_classification":
        return {"kind": "classes", "activation": "softmax", "labels": names}
    outputs: dict[str, Any] = {"kind": "classes", "activation": "sigmoid", "labels": names}
    thresholds = config.get("thresholds")
    if isinstance(thresholds, dict) and thresholds.keys() == {*names}:
        return outputs | {"thresholds": [thresholds[name] for name in names]}
    return outputs


def _has_head(config: dict[str, Any], *endings: str) -> bool:
    return any(name.endswith(endings) for name in config.get("architectures") or [])


def generation_outputs(model: LanguageModel) -> dict[str, Any]:
    """What a page needs to continue texts, and infer.py reads from the graph and the config: end tokens, positions, cache."""
    return {
        "kind": "continuation",
        "end_tokens": model.end_tokens,
        "context": model.context,
        "cache": model.cache_shapes,
        "cache_until": model.cache_until,
    }


def settings_of(directory: Path, graph: str) -> dict[str, Any]:
    """The manifest of an ONNX directory that is no bundle, from the files beside the `graph` that transformers wrote.

    Its inputs are not verified against transformers', as a bundle's are, so that only well-known image processors are taken.
    """
    config = read_json(directory / "config.json")
    outputs = head_outputs(directory)
    inputs: dict[str, Any] = {"kind": "text"}
    if _has_head(config, "ForCausalLM", "LMHeadModel"):
        check_tokenizer(directory)
        outputs = {"kind": "continuation"}  # all else is in the graph and config.json
    elif (directory / "preprocessor_config.json").is_file():
        inputs = _image_inputs(directory)
    else:
        inputs = _text_inputs(directory, config, answers=outputs["kind"] == "answer")
    return {"model": graph, "inputs": inputs, "outputs": outputs, "minimum_onnxruntime": "0"}


def _image_inputs(directory: Path) -> dict[str, Any]:
    processor = read_json(directory / "preprocessor_config.json")
    name = str(processor.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
    if name not in IMAGE_PROCESSORS:
        raise InputError(
            f"expected one of the image processors {', '.join(IMAGE_PROCESSORS)} in {directory}, found {name}. Build a bundle "
            "(pocketformers bundle), which verifies that its images become the same numbers, and load that."
        )
    try:
        inputs = image_settings(SimpleNamespace(**processor)) | {"value_range": recorded(directory, "value_range")}
        size = {*(inputs["resize"] or {})}
        if processor.get("do_pad") or size not in (set(), {"shortest_edge"}, {"height", "width"}):
            raise ValueError(f"padding, or a size of {' and '.join(sorted(size))}, which the runtime does not have")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # Each class has defaults of its own for what is left out.
        raise InputError(
            f"expected every step of {name} in {directory / 'preprocessor_config.json'} as transformers 5 writes it, found: {error}. Load it "
            "with AutoImageProcessor and save it again (save_pretrained), or build a bundle (pocketformers bundle)."
        ) from error
    return inputs


def _text_inputs(directory: Path, config: dict[str, Any], answers: bool) -> dict[str, Any]:
    """Of a text as long as in training, or else as the tokenizer and the positions of the model let it be."""
    tokenizer = read_json(directory / "tokenizer_config.json")
    positions = config.get("max_position_embeddings")
    if positions and config.get("model_type") in FROM_PADDING:
        padding = config.get("pad_token_id")
        positions -= 1 + (1 if padding is None else padding)
    limits = (tokenizer.get("model_max_length"), positions, 512)
    length = recorded(directory, "max_length") or int(min(filter(None, limits)))
    inputs = text_settings(directory, tokenizer.get("truncation_side", "right"), answers or None, length)
    return inputs | ({"overlap": config.get(ANSWERS, {}).get("overlap", length // 4)} if answers else {})


def recorded(directory: Path, name: str) -> Any:
    """What the stage's record, or the report of a published run, says of how inputs were prepared in training; None where neither does."""
    for file, *keys in (("record.json", "made_by", "task"), ("report.json", "config"), ("report.json", "data")):
        found: Any = read_json(directory / file) if (directory / file).is_file() else {}
        for key in keys:
            found = found.get(key) or {}
        if name in found:
            return found[name]
    return None


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"expected the {path.name} of a model in {path.parent}, found: {error}. Copy the whole directory."
        ) from error
