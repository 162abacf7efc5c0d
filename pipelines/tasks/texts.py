"""What all jobs on a text or a pair of texts share: tokens, batches, the graph, the bundle, and code for people."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from pipelines.core.config import DataConfig
from pipelines.core.disk import digest
from pipelines.core.errors import InputError
from pipelines.core.task import Collate, Graph, Head
from pipelines.data.examples import Examples
from pipelines.data.text import collate, length_of, tokenize, tokenizer_content
from pipelines.edge.bundle import text_inputs, text_probes, verify_predictor
from pipelines.edge.settings import head_outputs
from pipelines.models.loading import Inputs, check_encoder, has_tokenizer, inputs_of, load_tokenizer
from pipelines.models.small import LstmConfig, StaticConfig, TextCnnConfig
from pipelines.models.vocabulary import teacher_ids
from pipelines.tasks.base import BasePresentation, BaseTask


class TextPresentation(BasePresentation):
    """What a report says of any job on texts."""

    def in_shell(self, report: dict[str, Any]) -> str:
        return '--pair "A first text." "A second text."' if is_pair(report) else '"A text."'

    def tokenizer_settings(self, report: dict[str, Any]) -> dict[str, Any]:
        # transformers.js cuts texts at the tokenizer's limit.
        return {"model_max_length": token_limit(report)}


class TextTask(BaseTask):
    """A job on one text, or a pair of texts."""

    auto_class: Any = AutoModelForSequenceClassification
    architectures: tuple[str, ...] = ("ForSequenceClassification",)
    # The adapter's task type trains a new head along with it.
    lora_settings: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": "all-linear"}
    student_head: Head = "new if none"
    quantization_schemes = ("dynamic_int8", "int8_int4_embeddings", "int4_blocks", *BaseTask.quantization_schemes[1:])
    graph_outputs = ["logits"]
    reads_windows = False  # whether a text longer than --max_length is read in parts, whose tokens have places in it
    student_kinds: Mapping[str, Any] = {"lstm": LstmConfig, "cnn": TextCnnConfig, "static": StaticConfig}

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self._features: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """What of the data a stage's result depends on."""
        return super().describe() | {"max_length": self.config.max_length}

    def load_processor(self, source: str) -> Any:
        """The tokenizer of a model, which gives what the model takes, and pads with a token that it has."""
        tokenizer = load_tokenizer(source, self.trust_remote_code)
        config = self.load_config(source)
        names = tokenizer.model_input_names
        if "token_type_ids" in names and self._inputs(config, source).token_types < 2:
            tokenizer.model_input_names = [name for name in names if name != "token_type_ids"]
            tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # what is saved
        if tokenizer.pad_token is None:
            _give_padding(tokenizer, config, source)
        if self.reads_windows and not tokenizer.is_fast:
            raise InputError(
                f"expected a fast tokenizer (tokenizer.json) at {source}, which knows where a token is in its text, found one in Python "
                "alone. Convert it, or use a model that has one."
            )
        # A decoder reads the last token before the padding, and counts positions from the left; some students read in order.
        in_order = of_decoder(tokenizer) or type(config) in self.student_kinds.values()
        for side in ("padding_side", "truncation_side"):
            if self.reads_windows or (in_order and side == "padding_side"):
                setattr(tokenizer, side, "right")
                tokenizer.init_kwargs[side] = "right"
        return tokenizer

    def input_sizes(self, source: str) -> dict[str, Any]:
        """The vocabulary of the model in `source`, and its padding."""
        vocabulary = self.load_config(source).get_text_config().vocab_size
        return {"vocab_size": vocabulary, "pad_token_id": self.load_processor(source).pad_token_id}

    def _inputs(self, config: Any, source: str) -> Inputs:
        return inputs_of(self.auto_class, source, config, trust_remote_code=self.trust_remote_code)

    def check_config(self, config: Any, source: str) -> None:
        """Raise InputError unless the model takes every token of the data; give `config` the tokenizer's padding."""
        check_encoder(config, source)
        inputs = self._inputs(config, source)
        self.check_length(inputs.positions, source)
        if not has_tokenizer(source):  # which is said where it is loaded
            return
        tokenizer = self.load_processor(source)
        text_config = config.get_text_config()
        is_decoder, padding = of_decoder(tokenizer), tokenizer.pad_token_id
        has_head = str((config.architectures or [""])[0]).endswith(self.architectures)
        # A decoder's head reads the last token that is no padding.
        pads_otherwise = text_config.pad_token_id != padding
        if is_decoder and has_head and pads_otherwise and tokenizer("a")["input_ids"][-1:] == [padding]:
            raise InputError(
                f"expected a padding token that ends no text in {source}, found that its tokenizer ends every text with its padding "
                f"{tokenizer.pad_token!r}, which was none when the model was trained (pad_token_id {text_config.pad_token_id} in config.json). "
                "Set another pad_token in tokenizer_config.json: the one of the training, or any that ends no text."
            )
        if not inputs.from_padding:  # which would move the positions
            text_config.pad_token_id = padding
        if is_decoder:
            text_config.use_cache = (
                False  # of keys and values, which only a continuation needs; ONNX has no such outputs
            )
        self.check_tokens(tokenizer, "input_ids", getattr(text_config, "vocab_size", math.inf), source)
        if "token_type_ids" in tokenizer.model_input_names:
            self.check_tokens(tokenizer, "token_type_ids", inputs.token_types, source)

    def check_teacher_fits(self, teacher_source: str, student: Any, processor: Any, online: bool) -> None:
        """Raise InputError unless an online teacher's tokenizer makes the student's tokens of the same training texts."""
        if online:
            teacher_processor = self.load_processor(teacher_source)
            columns = ["input_ids", *({"token_type_ids"} & {*teacher_processor.model_input_names})]
            read = (self.features(tokenizer)["train"][:32] for tokenizer in (processor, teacher_processor))
            own, teachers = ({name: _halves(rows[name]) for name in columns} for rows in read)
            ids = teacher_ids(processor, teacher_processor)
            own["input_ids"] = [[ids[token] for token in text] for text in own["input_ids"]]
            if own != teachers:
                raise InputError(
                    "expected teacher and student to read the same tokens, found that their tokenizers differ; online distillation "
                    "would give the teacher tokens that mean something else to it. Store its soft targets first (pocketformers "
                    "soft-targets, or --soft_targets stored in a recipe) and leave out hidden states (--hidden_state_weight 0)."
                )

    def features(self, processor: Any, data: Examples | None = None) -> Any:
        """The tokenized splits; the same tokenizer tokenizes once in a process."""
        data = data or self.data
        key = digest([data.fingerprint, *tokenizer_content(processor)])
        if key not in self._features:
            self.check_room(processor)
            self._features[key] = self.tokenized(data, processor, key)
        return self._features[key]

    def check_room(self, processor: Any) -> None:
        """Raise InputError where special tokens leave no room for a text; the tokenizer then cuts nothing, and does not say so."""
        special = processor.num_special_tokens_to_add(pair=self._reads_pairs)
        if self.config.max_length <= special:
            raise InputError(
                f"expected --max_length above {special}, the special tokens of an example, found {self.config.max_length}. Raise it."
            )

    def tokenized(self, data: Examples, processor: Any, key: str) -> Any:
        """The splits as tokens; `key` is all that they depend on besides the task."""
        return tokenize(data, processor, self.config.max_length)

    def collate(self, processor: Any) -> Collate:
        return collate(processor)

    def training_collate(self, processor: Any, teacher_processor: Any = None, augment: bool = False) -> Collate:
        """The collator for training, with the inputs of an online teacher where only one of the two takes token types, or where it has more
        tokens."""
        if teacher_processor is None:
            return self.collate(processor)
        names, ids = teacher_processor.model_input_names, teacher_ids(processor, teacher_processor)
        if names == processor.model_input_names and ids == list(range(len(ids))):
            return self.collate(processor)
        reader = copy.copy(processor)
        reader.model_input_names = names
        return partial(_collate_both, self.collate(processor), self.collate(reader), torch.tensor(ids))

    def texts_of(self, split: str = "test") -> list[str]:
        """The examples of a split as a person reads them."""
        return self.baseline_inputs(self.data.splits[split])

    def baseline_inputs(self, examples: Dataset) -> list[str]:
        """The texts themselves, whole, however many tokens a model reads of them."""
        if self._reads_pairs:
            return [f"{text} ‖ {pair}" for text, pair in zip(examples["text"], examples["text_pair"], strict=True)]
        return list(examples["text"])

    def lengths_alone(self, split: str) -> list[float] | None:
        """In words and marks: a student with fewer tokens needs more of them for the same text."""
        if self.reads_windows:
            return None
        texts = [self.splits[split][name] for name in ("text", "text_pair") if name in self.splits[split].column_names]
        return [sum(map(length_of, parts)) for parts in zip(*texts, strict=True)]

    def graph(self, model: Any, processor: Any) -> Graph:
        """Two real examples of different length as the sample, so that the export sees padding and no axis of size 1."""
        features = self.features(processor)["train"]
        lengths = np.asarray(features["length"])
        inputs = self.collate(processor)([features[int(np.argmin(lengths))], features[int(np.argmax(lengths))]])
        del inputs["labels"]
        return Graph(model, inputs, {name: {0: "batch", 1: "sequence"} for name in inputs}, self.graph_outputs)

    # ---- Bundle

    def bundle_settings(self, directory: Path, processor: Any) -> dict[str, Any]:
        return {
            "inputs": text_inputs(directory, processor, self._reads_pairs, self.config.max_length),
            "outputs": head_outputs(directory),
        }

    def verify_bundle(self, directory: Path, processor: Any) -> dict[str, Any]:
        probes = text_probes(processor, self._reads_pairs, self.config.max_length)
        return verify_predictor(directory, self, processor, probes, self.data.splits["validation"])

    @property
    def _reads_pairs(self) -> bool:
        return self.config.text_pair_column is not None


def of_decoder(tokenizer: Any) -> bool:
    """Whether a tokenizer is that of a decoder, which has no [CLS] token to read."""
    return tokenizer.cls_token is None


def _give_padding(tokenizer: Any, config: Any, source: str) -> None:
    """Let a tokenizer pad with the padding token of the model's config, or else with its own end token."""
    padding = config.get_text_config().pad_token_id
    known = padding is not None and 0 <= padding < len(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding) if known else tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError(
            f"expected a tokenizer with a padding token or an end token at {source}, found neither. Set pad_token and save it."
        )


def _collate_both(
    collate: Collate, teacher_collate: Collate, ids: Tensor, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """A batch with what a teacher reads of it besides, whose id for the student's token i is `ids[i]`."""
    teachers = teacher_collate(rows)
    teachers["input_ids"] = ids[teachers["input_ids"]]
    return {f"teacher_{name}": values for name, values in teachers.items() if name != "labels"} | collate(rows)


def _halves(column: list[Any]) -> list[list[int]]:
    """The first half of each text's tokens, of rows that may have several: a word that is cut at the end may be of other tokens for a
    student with fewer."""
    texts = [text for row in column for text in (row if row and isinstance(row[0], list) else [row])]
    return [text[: len(text) // 2] for text in texts]


def onnx_code(
    report: dict[str, Any],
    directory: str,
    *then: str,
    texts: str | None = None,
    output: str = "logits",
    imports: Sequence[str] = (),
    reads_config: bool = False,
) -> str:
    """Code that runs an ONNX directory without torch, and lines that do something with its `output` and `config`."""
    given = texts or ('["A first text."], ["A second text."]' if is_pair(report) else '["A text."]')
    reading = [f"with open({json.dumps(directory + '/config.json')}) as file:", "    config = json.load(file)"]
    return "\n".join(
        [
            *(["import json", ""] if reads_config else []),
            *(f"import {name}" for name in (*imports, "onnxruntime")),
            "from transformers import AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(directory)})",
            f'inputs = tokenizer({given}, truncation=True, max_length={token_limit(report)}, return_tensors="np")',
            f"session = onnxruntime.InferenceSession({json.dumps(directory + '/model.onnx')})",
            f'[{output}] = session.run(["{output}"], {{node.name: inputs[node.name] for node in session.get_inputs()}})',
            *(reading if reads_config else []),
            *then,
        ]
    )


def javascript_code(
    report: dict[str, Any],
    repo_id: str,
    dtype: str,
    texts: str | None = None,
    kind: str = "AutoModelForSequenceClassification",
    output: str = "logits",
) -> str:
    """Code that prints an output of a published model, for what transformers.js's own pipelines do not do."""
    name = json.dumps(repo_id)
    given = texts or ('"A first text.", { text_pair: "A second text." }' if is_pair(report) else '"A text."')
    return f"""
        import {{ {kind} as Model, AutoTokenizer }} from "@huggingface/transformers";
        const tokenizer = await AutoTokenizer.from_pretrained({name}), model = await Model.from_pretrained({name}, {{ dtype: "{dtype}" }});
        console.log((await model(tokenizer({given}))).{output}.tolist());
    """


def python_text(report: dict[str, Any]) -> str:
    """What transformers' pipeline is given."""
    return '{"text": "A first text.", "text_pair": "A second text."}' if is_pair(report) else '"A text."'


def is_pair(report: dict[str, Any]) -> bool:
    return bool(report["config"].get("text_pair_column"))


def token_limit(report: dict[str, Any]) -> int:
    return int(report["config"].get("max_length", DataConfig.max_length))
