"""What is the same for every kind of task."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from pipelines.core.config import DataConfig, DistillConfig, TransferConfig
from pipelines.core.errors import InputError, VerificationError
from pipelines.core.sources import resolve
from pipelines.core.task import Arrays, Candidates, Collate, Head, Predict, StageResult, Task, TransferSet, Workload
from pipelines.data.examples import Examples
from pipelines.data.kinds import Kind
from pipelines.data.remembered import remembered, remembered_fingerprint, state_of
from pipelines.data.sources import check_model, check_onnx_directory
from pipelines.data.text import TEXTS
from pipelines.data.transfer import load_transfer
from pipelines.models.loading import has_tokenizer, load_classifier, load_config
from pipelines.onnx.measure import encoder_workload, timing_feeds
from pipelines.onnx.predict import run_session
from pipelines.onnx.verify import verification_batches
from pipelines.report.markdown import CLIPPED_TEXT, clip, markdown_table, number
from pipelines.report.pages import TEACHER
from pipelines.training.soft_targets import WithSoftTargets

LISTED_EXAMPLES = 50  # in report.json
LEARNED_FROM = "It learned from its teacher and its data, errors and biases included."  # a limitation of every model


def changed_settings(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as they are by default."""
    usual = asdict(type(settings)())
    return {name: value for name, value in asdict(settings).items() if value != usual[name]}


def check_predictions(
    stages: list[StageResult], shape: tuple[int, ...] | Mapping[str, tuple[int, ...]], meaning: str
) -> None:
    """Refuse stages without a teacher to compare with, with predictions of another shape, or with such as are not finite.

    `shape` is that of all stages, or of each by its name.
    """
    names = [stage.name for stage in stages]
    if names.count(TEACHER) != 1 or len(set(names)) < len(names):
        raise InputError(
            f"expected different stages, one of them the teacher that the others are compared with, found {names}. "
            "Run the missing stages first."
        )
    for stage in stages:
        expected = shape[stage.name] if isinstance(shape, Mapping) else shape
        if stage.predictions.shape != expected:
            raise InputError(
                f"expected predictions of shape {expected} ({meaning}) from {stage.name}, found {stage.predictions.shape}. Run it over the "
                "whole test split of the data that the teacher was trained on; it must have the teacher's labels or vocabulary."
            )
        infinite = ~np.isfinite(stage.predictions).reshape(len(stage.predictions), -1).all(axis=1)
        if infinite.any():
            raise VerificationError(
                f"expected finite predictions from {stage.name}, found NaN or infinity in {infinite.sum()} of {len(infinite)} rows of the "
                "test split. Do not use this model; export or quantize it again, in fp32 if need be."
            )


def mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, as the metric of a Comparison."""
    return np.asarray(values.mean(axis=-1))


def listed_examples(order: np.ndarray, texts: list[str], **columns: np.ndarray) -> list[dict[str, Any]]:
    """The first of the test examples in this order, as report.json lists them: number, text, and the value of each column."""
    return [
        {"index": int(index), "text": clip(texts[index], CLIPPED_TEXT)}
        | {name: values[index].item() for name, values in columns.items()}
        for index in order[:LISTED_EXAMPLES]
    ]


def worse_examples(loss: np.ndarray, texts: list[str], **columns: np.ndarray) -> dict[str, Any]:
    """How many test examples have a `loss` (examples,) above 0, and the largest ones, as report.json lists them."""
    order = np.argsort(-loss, kind="stable")
    return {"total": int((loss > 0).sum()), "examples": listed_examples(order[loss[order] > 0], texts, **columns)}


def examples_section(
    sentence: str,
    which: str,
    examples: list[dict[str, Any]],
    header: list[str],
    cells: Callable[[dict[str, Any]], list[str]],
    text_columns: int = 2,
) -> list[str]:
    """Paragraphs on what was lost: a sentence on how much, and a table of examples; `which` says which ones these are."""
    if not examples:
        return [sentence]
    table = markdown_table(header, [cells(one) for one in examples], text_columns)
    return [f"{sentence} The {len(examples)} {which}:", table]


class BasePresentation:
    """What a report says of a task on examples, each of which is read once."""

    unit = "examples"
    digits = 3
    latency_digits = 1
    latency_of = "one example"
    speed_unit = "samples/s"
    shown: Mapping[str, str] = {}  # metrics besides the primary one that have a column, and its title
    hub_task: str | None = None
    hub_library = "transformers"
    javascript: tuple[str, str]  # a name for the task's pipeline of transformers.js, and what it is given

    def columns(self, stage: dict[str, Any]) -> dict[str, str]:
        metrics = stage["metrics"]
        return {title: number(metrics[name], ".3f") for name, title in self.shown.items() if name in metrics}

    def how_timed(self, report: dict[str, Any]) -> str:
        shape = " x ".join(str(size) for size in report["stages"][0]["latency_ms"]["shape"])
        return (
            f"*p50*, *p95*: one call with an input of shape {shape}. *samples/s*: over batches of 16 test examples, texts together with "
            "others of their length."
        )

    def in_javascript(self, report: dict[str, Any], repo_id: str, dtype: str) -> str:
        name, given = self.javascript
        return f"""
            import {{ pipeline }} from "@huggingface/transformers";
            const {name} = await pipeline("{report["task"]}", {json.dumps(repo_id)}, {{ dtype: "{dtype}" }});
            console.log(await {name}({given}));
        """

    def remarks(self, files: Mapping[str, Path]) -> list[str]:
        return []

    def tokenizer_settings(self, report: dict[str, Any]) -> dict[str, Any]:
        return {}


class BaseTask(Task):
    """What is the same for every kind of task."""

    settings: tuple[type, ...] = (DataConfig,)  # the dataclasses that it is made of
    defaults: Mapping[str, Any] = {}  # flags of the chain whose defaults are other ones for it
    auto_class: Any  # of transformers, for a model with its head
    examples_of: Kind = TEXTS
    document_start: str | None = None  # what begins a document where rows are less than one
    architectures: tuple[str, ...]  # how the names of its models' classes end
    no_transfer = ""  # why there is no --transfer_dataset, or what to do instead; empty where there may be one
    reads_parts = True  # whether --text_part may name a part of each text
    demo: str  # the YAML file of its offline demo
    greater_is_better = True
    allow_weak_teacher = False
    teacher_metric: str | None = None  # that tells whether a teacher knows the task; None: the primary one
    better_teacher = (
        "Train it longer or slower (--teacher_epochs, --teacher_learning_rate), or check that it is for such data: that its "
        "outputs mean what the data set's labels do."
    )
    student_kinds: Mapping[str, Any] = {}

    @classmethod
    def recognizes(cls, config: dict[str, Any]) -> bool:
        """Whether a model with this content of config.json was made for the task."""
        return str((config.get("architectures") or [""])[0]).endswith(cls.architectures)

    @property
    def trust_remote_code(self) -> bool:
        return self.config.trust_remote_code

    # ---- Data

    @abstractmethod
    def load_data(self) -> Examples:
        """The examples: read, checked and split."""

    @cached_property
    def data(self) -> Examples:
        """The examples, read when somebody first asks for them: a finished run never does."""
        return self.load_data()

    @property
    def read_as(self) -> str:
        """What the examples depend on besides the flags of the data."""
        return self.name

    def describe(self) -> dict[str, Any]:
        """What of the data a stage's result depends on."""
        fingerprint = remembered_fingerprint(self.config, self.read_as, lambda: self.data.fingerprint)
        permissions = {"trust_remote_code": True} if self.trust_remote_code else {}
        return {"name": self.name, "data": fingerprint, **permissions}

    def transfer_set(self, transfer: TransferConfig) -> TransferSet | None:
        """The unlabelled examples that the settings name, None where they name none."""
        if transfer.transfer_dataset is None:
            return None
        if self.no_transfer:
            raise InputError(f"expected no --transfer_dataset for --task {self.name}, found one. {self.no_transfer}")
        load = cache(lambda: load_transfer(transfer, self.config, self.examples_of, self.data, self.document_start))
        settings = {name: value for name, value in asdict(transfer).items() if name != "transfer_ratio"}

        def identity() -> str:
            key = ["transfer", settings, asdict(self.config), self.read_as, BaseTask.describe(self)]
            return str(remembered(state_of(transfer.transfer_dataset), key, lambda: np.array(load().fingerprint)))

        return TransferSet(identity, load, transfer.transfer_ratio)

    @property
    def splits(self) -> Mapping[str, Any]:
        """The data sets train, validation and test, as a person reads them."""
        return self.data.splits

    @property
    def label_names(self) -> list[str]:
        """What the rows of a model's head are for."""
        return self.data.label_names

    @property
    def details(self) -> dict[str, Any]:
        """How the splits came about, for the report, ready for JSON."""
        return self.data.details

    @property
    def loss_details(self) -> dict[str, Any]:
        return {}

    def input_sizes(self, source: str) -> dict[str, Any]:
        return {}  # of a task without such students

    def load_config(self, source: str) -> Any:
        """The config of a model."""
        return load_config(source, trust_remote_code=self.trust_remote_code)

    def load_model(self, source: str, head: Head = "required", from_scratch: bool = False) -> Any:
        """The model with a head for this task's labels; see load_classifier."""
        config = self.checked_config(source, from_scratch)
        code = {"trust_remote_code": self.trust_remote_code}
        return load_classifier(self.auto_class, source, config, self.label_names, head, from_scratch, **code)

    def checked_config(self, source: str, from_scratch: bool) -> Any:
        """The config of a model that can be loaded for this task: its weights are whole, its inputs are the task's."""
        if not from_scratch:
            check_model(resolve(source))
        config = self.load_config(source)
        self.check_config(config, source)
        return config

    def training_collate(self, processor: Any, teacher_processor: Any = None, augment: bool = False) -> Collate:
        """The collator for training, where an online teacher reads the student's own inputs. Nothing is augmented."""
        return self.collate(processor)

    def soft_target_features(self, processor: Any, distill: DistillConfig) -> Any:
        """The training examples as they are."""
        return self.features(processor)["train"]

    least: Mapping[str, float] = {}

    def nearness(self, predictions: np.ndarray, exact: np.ndarray) -> dict[str, float]:
        return {}

    def with_soft_targets(self, read: Callable[[Any], Any], features: Any, directory: Path, suffix: str) -> Any:
        return WithSoftTargets(features, directory, suffix=suffix)

    def check_config(self, config: Any, source: str) -> None:
        """Raise InputError unless the model has a position for every token of a text."""
        self.check_length(getattr(config, "max_position_embeddings", None), source)

    def check_tokens(self, tokenizer: Any, column: str, size: float, source: str) -> None:
        """Raise InputError unless all numbers in this column of the tokens are below `size`, the embeddings of the model in `source`."""
        numbers = [
            pc.max(pc.list_flatten(split.data.column(column), recursive=True)).as_py()
            for split in self.features(tokenizer).values()
        ]
        if column == "input_ids":
            numbers.append(tokenizer.pad_token_id)
        if max(numbers) >= size:
            raise InputError(
                f"expected {column} below {size:,}, the embeddings that {source} has for them, found {max(numbers):,}: the tokenizer is of "
                "another model, or was given tokens (added_tokens) that the model was not. Use the model's own tokenizer, or call "
                "model.resize_token_embeddings(len(tokenizer)) and save both."
            )

    def check_length(self, limit: int | None, source: str) -> None:
        """Raise InputError for texts longer than the `limit` of the model in `source`."""
        if limit and self.config.max_length > limit:
            raise InputError(
                f"expected --max_length of at most {limit}, the positions that {source} has, found {self.config.max_length}. "
                "Pass a smaller --max_length."
            )

    def config_entries(self, metrics: dict[str, Any]) -> dict[str, Any]:
        return {}

    def guess(self, config: Any) -> float:
        """What guessing scores on the validation split, for a model with this config."""
        return 0.0

    def check_teacher(self, metrics: dict[str, Any], config: Any) -> None:
        """Raise InputError for a teacher that does no better on the validation split than guessing."""
        metric, guess = self.teacher_metric or self.primary_metric, self.guess(config)
        score = metrics[metric]
        if not (score > guess if self.greater_is_better else score < guess):  # nor is what is no number
            raise InputError(
                f"expected a teacher that knows the task, found one whose {metric} on the validation split is {score:,.4f}, "
                f"no better than guessing ({guess:,.4f}). {self.better_teacher}"
            )

    def check_label_order(self, processor: Any, predict: Predict) -> None:
        """Nothing: only classes have an order that can be wrong."""

    def fit_outputs(self, student: Any, teacher_source: str) -> None:
        """Nothing: a head is for the data's labels."""

    def bundle_obstacle(self, source: str) -> str | None:
        """Why there can be no bundle: a tokenizer that the runtime does not read."""
        if not has_tokenizer(source) or self.load_processor(source).is_fast:
            return None
        return f"the tokenizer of {source} is in Python alone (slow) and writes no tokenizer.json, which a bundle needs"

    # ---- Baselines

    @property
    def baselines(self) -> Mapping[str, Candidates]:
        return {}

    def baseline_inputs(self, examples: Dataset) -> Any:
        raise NotImplementedError  # of a task without baselines

    def baseline_predictions(self, estimator: Any, inputs: Any) -> np.ndarray:
        return np.asarray(estimator.predict(inputs))

    # ---- ONNX

    quantization_schemes: Sequence[str] = (
        "dynamic_int8",
        "static_int8_minmax",
        "static_int8_entropy",
        "static_int8_percentile",
    )
    default_quantization = "dynamic_int8"

    def verification_feeds(self, processor: Any) -> list[Arrays]:
        """Real validation batches of several sizes, ragged ones among them."""
        return list(verification_batches(self.features(processor)["validation"], self.collate(processor)))

    def run_model(self, model: Any, feed: Arrays) -> Arrays:
        """The outputs of a torch model for one of the verification feeds."""
        import torch

        with torch.inference_mode():
            found = self.outputs(model(**{name: torch.from_numpy(array) for name, array in feed.items()}))
        return self.without_padding({name: values.numpy() for name, values in found.items()}, feed)

    def run_graph(self, session: Any, feed: Arrays) -> Arrays:
        """The same of an ONNX Runtime session."""
        return self.without_padding(run_session(session, feed), feed)

    def without_padding(self, outputs: Arrays, feed: Arrays) -> Arrays:
        """The outputs as they are: an example has one."""
        return outputs

    def verify_behaviour(self, directory: Path, model: Any, processor: Any) -> dict[str, Any]:
        """Nothing: a model that only predicts does nothing beyond single calls."""
        return {}

    def check_graph(self, source: str) -> None:
        """Raise InputError unless the ONNX model in `source` takes this task's inputs."""
        check_onnx_directory(Path(source))
        self.check_config(self.load_config(source), source)

    def lengths_alone(self, split: str) -> list[float] | None:
        return None

    def workload(self, directory: Path, split: str) -> Workload:
        """The longest example of a split alone, and a sample of it in batches."""
        processor = self.load_processor(str(directory))
        features, collate = self.features(processor)[split], self.collate(processor)
        return encoder_workload(*timing_feeds(features, collate, alone=self.lengths_alone(split)))
