"""What a kind of task needs that another does not: how its data is loaded, prepared, batched and scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines import data as data_module
from pipelines.config import DataConfig
from pipelines.errors import InputError
from pipelines.metrics import PRIMARY_METRIC, classification_metrics
from pipelines.predict import Answers
from pipelines.sources import check_model, check_onnx_directory, resolve

# What becomes of a checkpoint's head: it must be for exactly the task's labels, or a fresh one is made where the checkpoint has
# none, or also where it has one for other labels.
Head = Literal["required", "new if none", "new if other"]
GENERIC_LABEL = "LABEL_"  # transformers' names for labels nobody has named


class Task(ABC):
    """What is the same for every kind of task."""

    name: str
    primary_metric: str
    greater_is_better = True
    causal = False  # whether logits at one token are about the next, so that losses shift labels by one
    answers: Answers = None  # what is kept of a batch's logits, where all of them would fill the memory
    config: DataConfig

    @property
    def trust_remote_code(self) -> bool:
        return self.config.trust_remote_code

    def permissions(self) -> dict[str, Any]:
        """What of describe() says that code from elsewhere was let in."""
        return {"trust_remote_code": True} if self.trust_remote_code else {}

    def load_config(self, source: str) -> Any:
        """The config of a model."""
        from transformers import AutoConfig

        return load(
            AutoConfig.from_pretrained,
            resolve(source),
            "a model's config.json",
            trust_remote_code=self.trust_remote_code,
        )

    @abstractmethod
    def check_config(self, config: Any, source: str) -> None:
        """Raise InputError unless a model with the config that `source` has takes this task's inputs."""

    @abstractmethod
    def features(self, processor: Any) -> Any:
        """The splits as a model of this processor reads them."""

    @abstractmethod
    def collate(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What makes a batch of rows of the features."""

    @abstractmethod
    def metrics(self, answers: np.ndarray, references: Any) -> dict[str, Any]:
        """Scores of a model's answers against the references."""

    def numbers(self, answers: np.ndarray, references: Any) -> dict[str, float]:
        """The scores that are single numbers, for the Trainer's log."""
        return {name: value for name, value in self.metrics(answers, references).items() if isinstance(value, float)}

    def score(self, predict: Callable[..., np.ndarray], processor: Any, split: str) -> dict[str, Any]:
        """The scores on a split of `predict(features, collate, answers=…)`, a torch model or an ONNX file."""
        features = self.features(processor)[split]
        return self.metrics(predict(features, self.collate(processor), answers=self.answers), features["labels"])


class Classification(Task):
    """One label out of several, whatever the example is: how answers are scored."""

    primary_metric = PRIMARY_METRIC
    data: data_module.ClassificationData

    @property
    def label_names(self) -> list[str]:
        return self.data.label_names

    def metrics(self, logits: np.ndarray, references: Any) -> dict[str, Any]:
        """Scores of logits (examples, labels) against label ids (examples)."""
        return classification_metrics(np.argmax(logits, axis=-1), np.asarray(references), self.label_names)

    def order_labels(self, model: Any, source: str) -> None:
        """Put the head of the model that was loaded from `source` in the data's order; raises InputError for other labels."""
        order = label_order(model.config, self.label_names)
        if order is None:
            raise InputError(
                f"expected a model for the labels {self.label_names}, found {list(model.config.id2label.values())} in {source}. Fine-tune "
                "it on this data set, or use the data set it was fine-tuned on."
            )
        reorder_labels(model, order, self.label_names)

    def check_graph(self, source: str) -> None:
        """Raise InputError unless the ONNX model in `source` takes this task's inputs and answers in the data's order.

        A graph keeps the order of its export.
        """
        check_onnx_directory(Path(source))
        config = self.load_config(source)
        self.check_config(config, source)
        if label_order(config, self.label_names) != list(range(len(self.label_names))):
            raise InputError(
                f"expected an ONNX model for the labels {self.label_names}, in this order, found {list(config.id2label.values())} in "
                f"{source}. Export its model again with this data set (python -m pipelines export)."
            )

    def agreement(self, logits: np.ndarray, reference_logits: np.ndarray) -> float:
        """Share of examples that two models answer alike."""
        return float(np.mean(np.argmax(logits, axis=-1) == np.argmax(reference_logits, axis=-1)))


class TextClassification(Classification):
    """One text, or a pair of texts, and one label out of several."""

    name = "text-classification"
    # The adapter's task type trains a new head along with it.
    lora_settings: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": "all-linear"}
    student_head: Head = "new if none"

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.data = data_module.load_classification(config)
        self._features: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """What of the data a stage's result depends on."""
        return {
            "name": self.name,
            "data": self.data.fingerprint,
            "max_length": self.config.max_length,
            **self.permissions(),
        }

    def load_processor(self, source: str) -> Any:
        """The tokenizer of a model."""
        return load_tokenizer(source, self.trust_remote_code)

    def load_model(self, source: str, head: Head = "required", from_scratch: bool = False) -> Any:
        """The model with a head for this task's labels; see load_classifier."""
        from transformers import AutoModelForSequenceClassification

        return load_classifier(
            AutoModelForSequenceClassification,
            "ForSequenceClassification",
            source,
            self.label_names,
            head,
            from_scratch,
            check_config=lambda config: self.check_config(config, source),
            trust_remote_code=self.trust_remote_code,
        )

    def features(self, processor: Any) -> Any:
        """The tokenized splits; the same tokenizer tokenizes once in a process."""
        key = _tokenizer_key(processor)
        if key not in self._features:
            self._features[key] = data_module.tokenize(self.data, processor, self.config.max_length)
        return self._features[key]

    def collate(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return data_module.collate(processor)

    def training_collate(
        self, processor: Any, teacher_processor: Any = None, augment: bool = False
    ) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """The collator for training, where a teacher in the loop, if there is one, reads the student's own tokens.

        Raises InputError where the teacher's tokenizer would have made others of the same text. Texts are not augmented.
        """
        if teacher_processor is not None:
            teacher = self.features(teacher_processor)["validation"][:32]
            if teacher != self.features(processor)["validation"][:32]:
                raise InputError(
                    "expected teacher and student to read the same tokens, found that their tokenizers differ; a teacher in the loop "
                    "then reads nonsense. Use stored soft targets (--soft_targets stored, --hidden_state_weight 0)."
                )
        return self.collate(processor)

    def test_texts(self) -> list[str]:
        """The test examples as a person reads them."""
        test = self.data.splits["test"]
        if "text_pair" in test.column_names:
            return [f"{text} ‖ {pair}" for text, pair in zip(test["text"], test["text_pair"], strict=True)]
        return list(test["text"])

    def export_sample(self, processor: Any) -> dict[str, Any]:
        """Two real examples of different length as a batch, so that the export sees padding and no axis of size 1."""
        features = self.features(processor)["train"]
        lengths = np.asarray(features["length"])
        batch = self.collate(processor)([features[int(np.argmin(lengths))], features[int(np.argmax(lengths))]])
        batch.pop("labels")
        return dict(batch)

    def dynamic_axes(self, sample: dict[str, Any]) -> dict[str, dict[int, str]]:
        """The axes of the inputs that vary from call to call."""
        return {name: {0: "batch", 1: "sequence"} for name in sample}

    def check_config(self, config: Any, source: str) -> None:
        """Raise InputError unless the model has a position for every token."""
        limit = getattr(config, "max_position_embeddings", None)
        # RoBERTa and its kin number positions from the padding index on, so two positions are not for tokens.
        offset = 2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        if limit and self.config.max_length > limit - offset:
            raise InputError(
                f"expected --max_length of at most {limit - offset}, the positions that {source} has, found {self.config.max_length}. "
                "Pass a smaller --max_length."
            )


def load_classifier(
    model_class: Any, suffix: str, source: str, label_names: list[str], head: Head, from_scratch: bool,
    check_config: Callable[[Any], None], trust_remote_code: bool = False,
) -> Any:  # fmt: skip
    """The model in `source`, by an Auto class, with a head for `label_names` in their order.

    A head for exactly these labels, in any order, is kept, and its rows are put in the data's order. Where the checkpoint has
    none, or one for other labels, `head` says whether it gets a fresh one; raises InputError where it may not. `suffix` ends, or
    is part of, the names of classes with such a head. With `from_scratch` all weights are random and `source` need have none.
    """
    from transformers import AutoConfig

    located = resolve(source)
    if not from_scratch:
        check_model(located)
    code = {"trust_remote_code": trust_remote_code}
    config = load(AutoConfig.from_pretrained, located, "a model's config.json", **code)
    check_config(config)
    labels = dict(enumerate(label_names))
    names = {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    if from_scratch:
        shape = load(
            AutoConfig.from_pretrained, located, "a model's config.json", num_labels=len(labels), **names, **code
        )
        shape.architectures = shape.architectures or []  # from_config cannot do without
        return load(lambda _: model_class.from_config(shape, **code), located, "the shape of a model")
    has_head = any(suffix in name for name in config.architectures or [])
    order = label_order(config, label_names) if has_head else None
    if order is None and (head == "required" or (head == "new if none" and has_head)):
        found = f"the labels {list(config.id2label.values())}" if has_head else "no classification head"
        raise InputError(
            f"expected a model for the labels {label_names}, found {found} in {source}; teacher and student need the same "
            "labels. Fine-tune it on this data set (a teacher: --teacher_epochs above 0), or use the data set it was fine-tuned on."
        )
    keep = order is not None
    model, info = load(
        model_class.from_pretrained,
        located,
        "a model's weights",
        output_loading_info=True,
        use_safetensors=True,  # a pickle runs whatever code is in it
        **code,
        ignore_mismatched_sizes=not keep,
        **({} if keep else {"num_labels": len(labels), **names}),
    )
    check_only_head_is_new(model, info, source, head_may_be_new=not keep)
    if order is not None:
        reorder_labels(model, order, label_names)
    return model


def label_order(config: Any, label_names: list[str]) -> list[int] | None:
    """For each label of the data its row in the model's head, or None where the head is for other labels.

    Labels are compared by name, or else without case, since the same data set is spelt differently on different hubs. A head whose
    labels have no names (LABEL_0, …) is taken to be in the data's order where their number agrees.
    """
    names = [str(config.id2label[index]) for index in range(len(config.id2label))]
    spellings: tuple[Callable[[str], str], ...] = (str, str.casefold)
    for spelling in spellings:
        found, wanted = [spelling(name) for name in names], [spelling(name) for name in label_names]
        # Names that differ in nothing but case say no order without it.
        if sorted(found) == sorted(wanted) and len({*found}) == len(found):
            return [found.index(name) for name in wanted]
    generic = all(name.startswith(GENERIC_LABEL) for name in names)
    return list(range(len(names))) if generic and len(names) == len(label_names) else None


def reorder_labels(model: Any, order: list[int], label_names: list[str]) -> None:
    """Put the head's rows in the data's order, so that a logit means the same in teacher, student and report."""
    import torch

    from pipelines.architectures import head_output

    if order != list(range(len(order))):
        head = head_output(model)
        with torch.no_grad():
            head.weight.copy_(head.weight[order].clone())
            if head.bias is not None:
                head.bias.copy_(head.bias[order].clone())
    model.config.id2label = dict(enumerate(label_names))
    model.config.label2id = {name: index for index, name in enumerate(label_names)}


def check_only_head_is_new(model: Any, info: dict[str, Any], source: str, head_may_be_new: bool) -> None:
    """Refuse weights that leave part of the encoder at random, which transformers reports only in a log line."""
    prefix = f"{model.base_model_prefix}."
    # The pooler belongs to the head where it is trained with it: a masked language model has none.
    fresh = [str(name) for name in [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]]
    encoder = [name for name in fresh if name.startswith(prefix) and ".pooler." not in name]
    if encoder or (fresh and not head_may_be_new):
        missing = encoder or fresh
        raise InputError(
            f"expected the weights of a whole {type(model).__name__} in {source}, found none for {len(missing)} of its tensors, such as "
            f"{missing[0]}. Use a checkpoint of that architecture, or save it again with save_pretrained."
        )


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer in `source`. Raises InputError where there is none."""
    from transformers import AutoTokenizer

    tokenizer = load(AutoTokenizer.from_pretrained, resolve(source), "a tokenizer", trust_remote_code=trust_remote_code)
    # Without its files transformers makes one of special tokens alone, and says nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(
            f"expected a tokenizer beside the model in {source}, found none. Save the one that the model was trained with there "
            "(save_pretrained)."
        )
    return tokenizer


def load(loader: Callable[..., Any], source: str, what: str, **arguments: Any) -> Any:
    """`loader(source, …)`, with one message for the many ways in which that fails."""
    try:
        return loader(source, **arguments)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        summary = " ".join(str(error).split())[:400]
        if "trust_remote_code" in str(error):
            raise InputError(
                f"expected {what} of transformers' own classes at {source}, found one that brings code of its own, which was not run. "
                "Read that code; where you trust it, pass --trust_remote_code true, or take another model."
            ) from error
        raise InputError(
            f"expected {what} at {source}, found: {summary}. Check the path or the Hub id; a gated or private model needs HF_TOKEN, and "
            "without a network only a local directory or package:// path works."
        ) from error


def _tokenizer_key(processor: Any) -> str:
    return processor.backend_tokenizer.to_str() if hasattr(processor, "backend_tokenizer") else repr(processor)
