"""The protocol of a task: all that the stages may ask of a job, and nothing else.

Stages see a task only through this protocol. The implementations stand in `pipelines/tasks/`, one file each, above all other rooms,
so that no stage can ask which one it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

    from pipelines.core.config import DataConfig, DistillConfig, TransferConfig

IGNORED = -100  # a label that takes no part in the loss, as everywhere in transformers
UNLABELLED = -101  # the label of what counts in the loss against the teacher alone: the transfer set
TRANSFER = "transfer"  # its split

# What becomes of a checkpoint's head: it must be for exactly the task's labels, or a fresh one is made where the checkpoint has
# none, or also where it has one for other labels.
Head = Literal["required", "new if none", "new if other"]

Arrays = dict[str, np.ndarray]
Tensors = dict[str, "Tensor"]
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
# From training inputs and labels (examples,) to what a baseline is chosen from: features, and the estimators that read them, of scikit-learn.
Candidates = Callable[[Any, np.ndarray], Iterable[tuple[Any, Sequence[Any]]]]
# Predictions for features, in their order: a torch model or an ONNX file with everything but the data filled in.
Predict = Callable[..., np.ndarray]


@dataclass
class Graph:
    """What the ONNX export traces: a module, a sample of its inputs, and the names of inputs, outputs and dynamic axes.

    `inputs` are keyed by the module's own parameter names, nested where a parameter is (a past of keys and values); `dynamic_axes` has
    an entry for each of their tensors, in their order, by the name that it gets in the graph. Every dynamic axis of the sample has at
    least 2 entries, since the exporter takes sizes 0 and 1 for constants.
    """

    module: nn.Module
    inputs: dict[str, Any]
    dynamic_axes: dict[str, dict[int, str]]
    outputs: list[str]


@dataclass
class TransferSet:
    """Unlabelled examples that the teacher labels for the student, read when somebody first asks for them."""

    identity: Callable[[], str]  # a hash of the examples
    load: Callable[[], Any]  # the examples (pipelines.data.examples.Examples) with the one split TRANSFER
    ratio: float | None = None  # how many of them in an epoch for each labelled example; None: all
    # Where the teacher's, or each teacher's, are stored; None: it runs along.
    soft_targets: Path | list[Path] | None = None

    def describe(self) -> dict[str, Any]:
        return {"examples": self.identity()} | ({} if self.ratio is None else {"transfer_ratio": self.ratio})


@dataclass
class Workload:
    """What is timed of a model directory: a worker module (`python -m module spec.json`) and its orders.

    The worker writes the figures of one round, `p50`, `p95` (milliseconds; no p95 of fewer than 20 numbers), `samples_per_second`,
    `peak_memory_bytes` and whatever else the task times, to result.json; all are reported as medians over the rounds, memory as the
    largest. The module has a function `work(spec_file)`, too, which is what a fork of a process with torch calls.
    """

    module: str
    settings: dict[str, Any] = field(default_factory=dict)  # ready for JSON
    feeds: dict[str, Arrays] = field(default_factory=dict)  # written beside the spec as NAME.npz
    shape: list[int] = field(default_factory=list)  # of one call


@dataclass
class StageResult:
    """A stage as the report sees it: its record, its predictions for the test split (see Task.predictions), its timing."""

    name: str
    format: str
    predictions: np.ndarray
    record: dict[str, Any]
    timing: dict[str, Any]


@dataclass
class Comparison:
    """What the predictions of all stages say of the test split; all but `samples` and `metric` is ready for JSON.

    A sample is what the primary metric of a stage is computed from: arrays (units,), a unit being what is independent of the others,
    such as an example or a whole document. `metric(*sample)` works over the last axis, so that many resamples are scored at once.
    """

    # By name: `metrics`, `agreement` with the teacher, and whatever else the task compares.
    stages: dict[str, dict[str, Any]]
    report: dict[str, Any]  # of all stages together, `test_examples` among it
    samples: Mapping[str, tuple[np.ndarray, ...]]
    metric: Callable[..., np.ndarray]


class Presentation(Protocol):
    """A task in words and code for people; what a report says is taken from the report as JSON, so that it can be written again later."""

    unit: str  # what the test split holds: "examples", "documents"
    digits: int  # decimals of the primary metric
    latency_digits: int
    latency_of: str  # what a latency is the time of: "one example", "one token"
    speed_unit: str  # "samples/s"
    hub_metrics: Mapping[str, str]  # our metrics and the names that the Hub gives them
    hub_task: str | None  # the Hub's name of the task, where it has another
    hub_library: str  # that opens the model
    limitations: Sequence[str]

    def kind(self, report: dict[str, Any]) -> str:
        """The job in a few words for the model card: "text-classification with 5 labels (…)"."""

    def columns(self, stage: dict[str, Any]) -> dict[str, str]:
        """The cells of a stage's row that only this task has, by their titles."""

    def how_scored(self, report: dict[str, Any]) -> str: ...

    def how_timed(self, report: dict[str, Any]) -> str: ...

    def what_was_lost(self, report: dict[str, Any], shipped: dict[str, Any], listed: int) -> str:
        """The section on what compression broke, with at most `listed` examples."""

    def in_python(self, report: dict[str, Any], model: str) -> str:
        """Code that runs `model`, a transformers directory or repository, in three lines."""

    def in_onnx_runtime(self, report: dict[str, Any], directory: str) -> str:
        """Code that runs an ONNX directory without torch."""

    def in_javascript(self, report: dict[str, Any], repo_id: str, dtype: str) -> str:
        """Code that runs a published repository with transformers.js, in three lines."""

    def in_shell(self, report: dict[str, Any]) -> str:
        """What the bundle's infer.py is called with, such as '"A text."'; of the report its `config` is enough."""

    def remarks(self, files: Mapping[str, Path]) -> list[str]:
        """What a user of the published `files` must know besides."""

    def tokenizer_settings(self, report: dict[str, Any]) -> dict[str, Any]:
        """What the published tokenizer_config.json must say for others to prepare inputs as this task does."""


class Task(Protocol):
    """One job: its data, its losses, its scores, its graph, its words."""

    name: str  # as the Hub names it: "text-classification"
    primary_metric: str
    greater_is_better: bool
    metrics: Mapping[str, bool]  # its scores that are one number each, and whether greater is better
    config: DataConfig
    presentation: Presentation
    allow_weak_teacher: bool  # whether a teacher that check_teacher refuses may go on

    def describe(self) -> dict[str, Any]:
        """What of the data a stage's result depends on, as JSON."""

    # ---- Data

    @property
    def splits(self) -> Mapping[str, Any]:
        """The data sets train, validation and test, as a person reads them."""

    @property
    def details(self) -> dict[str, Any]:
        """How the splits came about, for the report, ready for JSON."""

    def transfer_set(self, transfer: TransferConfig) -> TransferSet | None:
        """The unlabelled examples that the settings name, None where they name none."""

    def features(self, processor: Any, data: Any = None) -> Mapping[str, Any]:
        """The splits, or those of other `data`, as a model of this processor reads them; column `labels` holds the references, `length`
        (texts) the tokens."""

    def collate(self, processor: Any) -> Collate:
        """What makes a batch of rows of the features: tensors, `labels` among them."""

    def training_collate(self, processor: Any, teacher_processor: Any = None, augment: bool = False) -> Collate:
        """The collator for training: augmented if asked, with the inputs of an online teacher where that reads others."""

    # ---- Models

    lora_settings: dict[str, Any]
    student_head: Head  # what becomes of the head of a --student_model
    student_kinds: Mapping[str, Any]  # the configs' classes of students of another kind, by their names

    def input_sizes(self, source: str) -> dict[str, Any]:
        """What of such a config follows from the inputs, which the processor of the model in `source` prepares."""

    def load_processor(self, source: str) -> Any:
        """The tokenizer or image processor of a model. Raises InputError where there is none that can be used."""

    def load_config(self, source: str) -> Any: ...

    def load_model(self, source: str, head: Head = "required", from_scratch: bool = False) -> Any:
        """The model in `source`, in float32, with a head for this task."""

    def checked_config(self, source: str, from_scratch: bool) -> Any:
        """The config of a model that can be loaded for this task; raises InputError for another."""

    def check_config(self, config: Any, source: str) -> None:
        """Raise InputError unless a model with the config that `source` has takes this task's inputs; give `config` their padding."""

    def check_teacher_fits(self, teacher_source: str, student: Any, processor: Any, online: bool) -> None:
        """Raise InputError unless the student can learn from this teacher: the same labels or tokens, online the same inputs."""

    def check_teacher(self, metrics: dict[str, Any], config: Any) -> None:
        """Raise InputError for a teacher whose scores on the validation split are no better than guessing."""

    def check_label_order(self, processor: Any, predict: Predict) -> None:
        """Raise InputError for a model used as it is whose labels are in another order than the data's; `predict` is its own."""

    def align_labels(self, model: Any, source: str) -> None:
        """Put the head of the model that was loaded from `source` in the data's order; raises InputError for other labels."""

    def config_entries(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What the config.json of a model with these scores on the validation split says besides: what its outputs are read by."""

    def fit_outputs(self, student: Any, teacher_source: str) -> None:
        """Let the outputs of a student that is not yet trained have the teacher's shape, where no labels say which they have."""

    # ---- Losses: sums over examples (or tokens), so that the trainer can divide by the count of the global batch

    @property
    def loss_details(self) -> dict[str, Any]:
        """What of the data the loss against the labels depends on, for the record."""

    def outputs(self, model_output: Any) -> Tensors:
        """The tensors of a model's output that matter, by the names of the ONNX graph's outputs."""

    def label_loss(self, outputs: Tensors, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """The loss against the labels, summed, and the number of labels that it is a sum over."""

    has_distributions: bool  # whether the teacher's outputs are logits, which --temperature softens
    soft_target_settings: Sequence[str]  # the fields of DistillConfig that stored soft targets depend on

    def soft_target_features(self, processor: Any, distill: DistillConfig) -> Any:
        """The training examples that soft targets are stored of: those of `features`, or so many augmented views of each."""

    def soft_targets(self, outputs: Tensors, distill: DistillConfig) -> Tensors:
        """What is stored of a teacher's outputs: columns `teacher_…`, whose first axis is the examples."""

    def with_soft_targets(self, read: Callable[[Any], Any], features: Any, directory: Path, suffix: str) -> Any:
        """The student's `features`, each with what is stored in `directory` as further columns, whose names end in `suffix`. `read` makes
        the features of these examples with any processor; the teacher's is beside its soft targets."""

    def check_soft_loss(self, distill: DistillConfig, teachers: int = 1) -> None:
        """Raise InputError for settings of the soft targets, or a number of teachers, that this task's loss cannot do."""

    def soft_loss(self, outputs: Tensors, teacher: Tensors, labels: Tensor, distill: DistillConfig) -> Tensor:
        """The loss against the teacher, summed: `teacher` are its outputs (online), `teacher_` before their names, or its stored soft
        targets."""

    def token_weights(self, inputs: Tensors, labels: Tensor, tokens: int) -> Tensor:
        """What each token (batch, tokens) counts in the losses of hidden states and attention: together 1 an example, or 1 each where the
        labels are tokens; 0 for padding."""

    # ---- Scores

    def predictions(self, outputs: Tensors, labels: Tensor) -> Tensor:
        """What is kept of a batch's outputs to score it, first axis examples: all, or what fits into memory."""

    def scores(self, predictions: np.ndarray, references: Any, split: str | None = None) -> dict[str, Any]:
        """The scores of predictions against references; of a whole `split` also those that need its text.

        A task with classes has `recall_per_class` and `examples_per_class` among them, by the names of the classes.
        """

    least: Mapping[str, float]  # what nearness() may not be below

    def nearness(self, predictions: np.ndarray, exact: np.ndarray) -> dict[str, float]:
        """How near the predictions of a converted model are to those that it should have, where its scores do not say that."""

    # ---- Baselines

    @property
    def baselines(self) -> Mapping[str, Candidates]:
        """What a user would try first, by name; the first of them fits any data."""

    def baseline_inputs(self, examples: Dataset) -> Any:
        """Examples of a split as the baselines read them: a list of texts, or numbers (examples, values)."""

    def baseline_predictions(self, estimator: Any, inputs: Any) -> np.ndarray:
        """What a fitted estimator predicts for inputs, in the form of `predictions`."""

    # ---- ONNX

    quantization_schemes: Sequence[str]  # that --quantization auto tries; the names of pipelines/onnx/quantize.py
    default_quantization: str

    def graph(self, model: Any, processor: Any) -> Graph: ...

    def verification_feeds(self, processor: Any) -> list[Arrays]:
        """Real validation batches of several sizes, ragged ones among them."""

    def run_model(self, model: Any, feed: Arrays) -> Arrays:
        """The outputs of a torch model for one of the verification feeds, without those of padding."""

    def run_graph(self, session: Any, feed: Arrays) -> Arrays:
        """The same of an ONNX Runtime session."""

    def verify_behaviour(self, directory: Path, model: Any, processor: Any) -> dict[str, Any]:
        """Compare what an exported directory does beyond single calls (generation) with the torch model; raises VerificationError."""

    def check_graph(self, source: str) -> None:
        """Raise InputError unless the ONNX model in `source` takes this task's inputs and predicts in the data's order."""

    def lengths_alone(self, split: str) -> list[float] | None:
        """How long the examples are that are asked one at a time, the first ones of a split, whatever a tokenizer makes of them: all models are
        timed on the longest. None: each on what is longest for itself."""

    def workload(self, directory: Path, split: str) -> Workload:
        """What is timed of the model in `directory`, on examples of a split."""

    # ---- Report

    def compare(self, stages: list[StageResult], processor: Any, shipped: str, split: str = "test") -> Comparison:
        """Score all stages on a split and compare them with the teacher, whose `processor` it is; raises where predictions do not fit
        the split, or are not finite."""

    # ---- Bundle

    def bundle_obstacle(self, source: str) -> str | None:
        """Why there can be no bundle of the model in `source`, in a few words; None where there can."""

    def bundle_settings(self, directory: Path, processor: Any) -> dict[str, Any]:
        """The part of a bundle's manifest that is this task's: how inputs are prepared and outputs read. See pipelines/edge/settings.py."""

    def verify_bundle(self, directory: Path, processor: Any) -> dict[str, Any]:
        """Compare the bundle's own runtime with the pipeline; raises VerificationError."""
