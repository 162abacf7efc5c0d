"""The settings of every stage: dataclasses, whose fields are the flags of the command line and the keys of a YAML file."""

from __future__ import annotations

import argparse
import codecs
import difflib
import math
import operator
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Annotated, Any, get_type_hints

from pipelines.core.divergences import DIVERGENCES
from pipelines.core.errors import InputError
from pipelines.core.sources import model_fingerprint


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field whose help text and default are written once, here."""
    return field(default=default, metadata={"help": help, **metadata})


def _check(condition: bool, expected: str, found: Any) -> None:
    if not condition:
        raise InputError(f"expected {expected}, found {found!r}")


# What a number must be stands beside its type, in these words; it is at least 0 in any case, but where its default is below.
COMPARISONS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
Count = Annotated[int, "at least 1"]
Positive = Annotated[float, "above 0"]
Share = Annotated[float, "below 1"]
SEEDS = ("seed", "split_seed", "data_seed")


def check_values(settings: Any) -> None:
    """Raise InputError for a value of a dataclass that is none of its choices, or a number that it cannot be."""
    hints = get_type_hints(type(settings), include_extras=True)
    for one in fields(settings):
        value, choices = getattr(settings, one.name), one.metadata.get("choices")
        if isinstance(value, str) and choices:
            _check(value in choices, f"--{one.name} out of {', '.join(choices)}", value)
        elif isinstance(value, (int, float)):
            _check(math.isfinite(value), f"a finite --{one.name}", value)
            negative = isinstance(one.default, int) and one.default < 0
            least = () if negative else ("at least 0",)
            most = (f"below {2**32}",) if one.name in SEEDS else ()
            for condition in (*getattr(hints[one.name], "__metadata__", ()), *least, *most):
                words, bound = condition.rsplit(" ", 1)
                _check(COMPARISONS[words](value, float(bound)), f"--{one.name} {condition}", value)


class Checked:
    """What dataclasses of settings inherit: their values are checked as soon as they are made."""

    def __post_init__(self) -> None:
        check_values(self)


class OneOrMore(argparse.Action):
    """One value stays what it was before there could be several of them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


@dataclass
class DataConfig(Checked):
    dataset: str | None = flag(
        None,
        "The data set: a Hub id, a csv, tsv, json, jsonl or parquet file, a folder of such files or with one sub-folder per "
        "class, or package://<installed package>/<path inside it>.",
    )
    dataset_config: str | None = flag(None, "The Hub data set's configuration, such as sst2 for glue.")
    train_split: str = flag("train", "The split to train on.")
    validation_split: str | None = flag(
        None,
        "The split every choice is made on. Left out: 'validation' if it has labels and is not the test split, else cut from the "
        "training split.",
    )
    test_split: str | None = flag(
        None,
        "The split only the report reads. Left out: 'test' if it has labels; else 'validation' if it has and --validation_split is left "
        "out too; else cut from the training split.",
    )
    text_column: str = flag("text", "The column with the text.")
    text_pair_column: str | None = flag(None, "The column with the second text, for sentence pairs.")
    text_part: str = flag(
        "whole",
        "What of each text is read: all of it, or its first line that is not blank, such as the headline of an article.",
        choices=["whole", "first_line"],
    )
    image_column: str = flag("image", "The column with the image.")
    label_column: str = flag(
        "label",
        "The column with the class, with the score where the task is one of scores, or with the list of labels where a text has several; "
        "then also several columns, each with a 1 where the label that it is called after fits.",
        nargs="+",
        action=OneOrMore,
    )
    more_label_columns: list[str] = field(default_factory=list, init=False)  # those after the first of --label_column
    separator: str | None = flag(
        None,
        "The character between the columns of csv and tsv files ('\\t' for a tab). Left out: found from the first line.",
    )
    encoding: str | None = flag(
        None,
        "The encoding of tables and text files, such as cp1252. Left out: UTF-8 or UTF-16, else a guess that is printed.",
    )
    missing: str = flag(
        "error",
        "What becomes of rows without a label, a text or a readable image: error names them, drop leaves them out and counts them.",
        choices=["error", "drop"],
    )
    max_length: Annotated[int, "at least 2"] = flag(
        128, "Texts are cut to this many tokens; for a language model they are joined and cut into blocks of this many."
    )
    max_train_samples: Annotated[int | None, "at least 1"] = flag(None, "Use at most this many training examples.")
    max_eval_samples: Annotated[int | None, "at least 1"] = flag(
        None, "Use at most this many validation and this many test examples."
    )
    max_samples_per_class: Annotated[int | None, "at least 1"] = flag(
        None,
        "Use at most this many training and this many validation examples of each class, chosen at random by --split_seed; one of several "
        "labels counts for the rarest of them. The others can be a transfer set.",
    )
    validation_size: Annotated[float, "above 0", "below 0.9"] = flag(
        0.1, "Share of the examples cut off for validation where the data set has no such split."
    )
    test_size: Annotated[float, "above 0", "below 0.9"] = flag(
        0.2, "Share of the examples cut off for the test where the data set has no such split."
    )
    split_seed: int = flag(
        0, "Seed of the split and of the choice of samples; apart from --seed, so that seeds share a split."
    )
    trust_remote_code: bool = flag(
        False,
        "Run the Python code that a model or tokenizer brings along, with all that you may do on this machine. Read it first; every "
        "record and the report say that it was run.",
    )

    def __post_init__(self) -> None:
        if isinstance(self.label_column, list):
            self.label_column, *self.more_label_columns = self.label_column
        super().__post_init__()
        self.separator = "\t" if self.separator in ("\\t", "tab") else self.separator
        _check(self.separator is None or len(self.separator) == 1, "one character as --separator", self.separator)
        try:
            if self.encoding and codecs.lookup(self.encoding).name == "utf-8":
                self.encoding = "utf-8-sig"  # the same, with or without a byte order mark
        except LookupError as error:
            raise InputError(f"expected an encoding of Python as --encoding, such as cp1252, found: {error}") from error


@dataclass
class TransferConfig(Checked):
    transfer_dataset: str | None = flag(
        None,
        "Unlabelled examples that the teacher labels for the student, beside the labelled ones: whatever --dataset takes, also a text file "
        "or a folder of texts or images without classes. Labels in it are not read.",
    )
    transfer_dataset_config: str | None = flag(None, "The configuration of the Hub data set --transfer_dataset.")
    transfer_column: str | None = flag(
        None, "Its column with the text or image. Left out: that of --text_column or --image_column."
    )
    transfer_sentences: Annotated[int | None, "at least 1"] = flag(
        None,
        "Cut each of its texts into sentences, and take at most this many of it: the first ones of 20 characters and more; a headline is "
        "one. Left out: its texts are read as --text_part says.",
    )
    transfer_ratio: Annotated[float | None, "above 0"] = flag(
        None, "Its examples in an epoch, other ones each time, for each labelled example. Left out: all in every epoch."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = [name for name, value in asdict(self).items() if value is not None and self.transfer_dataset is None]
        _check(not alone, f"--transfer_dataset with --{' --'.join(alone)}", "none")


@dataclass
class LabelConfig(Checked):
    class_weights: str = flag(
        "none",
        "'balanced' gives every class the same weight in the loss against the labels, however rare it is (scikit-learn's formula: "
        "examples / (classes * examples of the class), of the training split), and in the score that checkpoints, pruned and quantized "
        "models are chosen by: balanced accuracy, the mean recall of the classes. Where a text has several labels, those that have a label weigh "
        "what those without it do, and the score is macro F1.",
        choices=["none", "balanced"],
    )


@dataclass
class LanguageConfig(Checked):
    document_start: str | None = flag(
        None,
        "A regular expression: rows (of a text file: lines) in which it is found begin a document, the others belong to the one "
        "before. Left out: every row is a document, and blank lines part those of a text file.",
    )
    stride: Annotated[int | None, "at least 1"] = flag(
        None,
        "Step of the window that scores held-out text; every token sees at least --max_length minus this many before it. "
        "Left out: half of --max_length.",
    )
    vocabulary_size: Annotated[int, "at least 257"] = flag(
        4096,
        "Tokens of the tokenizer that is trained where --teacher_from_scratch takes a shape without one: 256 bytes, the end token, and "
        "more.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.document_start or "")
        except re.error as error:
            raise InputError(f"expected a regular expression for --document_start, found: {error}") from error


@dataclass
class AugmentConfig(Checked):
    random_shift: Annotated[float, "below 0.5"] = flag(
        0.0,
        "Shift every training image by up to this share of its sides at random. This and the next two serve in the teacher's "
        "fine-tuning, and in the student's training with --augmented_views or --soft_targets online.",
    )
    random_crop: Annotated[float, "below 0.5"] = flag(
        0.0, "Crop up to this share of every training image's sides at random."
    )
    random_flip: bool = flag(False, "Mirror half of the training images left to right; wrong for digits and letters.")

    @property
    def any(self) -> bool:
        return self.random_shift > 0 or self.random_crop > 0 or self.random_flip


@dataclass
class TeacherConfig(Checked):
    teacher_model: str = flag(
        "google-bert/bert-base-uncased",
        "The model to fine-tune, or one already fine-tuned on this task. Several: a student of all of them, which is made of the first one's "
        "layers; their tokenizers may differ.",
        nargs="+",
        action=OneOrMore,
        aliases=["--teacher"],
    )
    teacher_epochs: float = flag(
        3.0, "Epochs of fine-tuning; 0 uses the teacher as it is, which needs a head for exactly these labels."
    )
    teacher_learning_rate: Positive = flag(3e-5, "Peak learning rate of the fine-tuning.")
    teacher_from_scratch: bool = flag(
        False,
        "Start from random weights in the shape of --teacher_model, which may then be a directory without weights: a "
        "config.json and the settings of the tokenizer or image processor.",
    )
    lora_rank: int = flag(0, "Train a LoRA adapter of this rank instead of all weights; 0 trains all.")
    allow_weak_teacher: bool = flag(
        False,
        "Go on with a teacher that does no better than guessing, for a smoke run: such a teacher has nothing to teach.",
    )
    more_teachers: list[str] = field(default_factory=list, init=False)  # the models after the first of --teacher_model

    def __post_init__(self) -> None:
        if isinstance(self.teacher_model, list):
            self.teacher_model, *self.more_teachers = self.teacher_model
        _check(len(self.more_teachers) < 9, "at most nine models as --teacher_model", 1 + len(self.more_teachers))
        super().__post_init__()
        _check(
            self.teacher_epochs > 0 or not self.teacher_from_scratch,
            "--teacher_epochs above 0 with --teacher_from_scratch, since random weights know nothing",
            self.teacher_epochs,
        )

    def each(self) -> dict[str, TeacherConfig]:
        """The settings of each of several teachers, by how the names of its stages end: the second one's in _2."""
        models = (self.teacher_model, *self.more_teachers)
        return {f"_{n}" if n > 1 else "": replace(self, teacher_model=one) for n, one in enumerate(models, start=1)}

    def describe(self) -> dict[str, Any]:
        """What a teacher depends on: neither on others, nor on whether a weak one is allowed."""
        return {
            name: value for name, value in asdict(self).items() if name not in ("allow_weak_teacher", "more_teachers")
        }


STUDENT_KINDS = ("lstm", "cnn", "static")


@dataclass
class StudentConfig:
    student_model: str | None = flag(
        None,
        "A checkpoint to start the student from; or a small model of another kind, for which the teacher prepares the inputs: 'lstm' (texts), "
        "'cnn' (texts or images) or 'static', the mean of a text's token vectors. A directory of such a name is ./lstm. Left out: some of "
        "the teacher's own layers.",
    )
    student_from_scratch: bool = flag(
        False,
        "Start the student from random weights in the shape of --student_model, as for --teacher_from_scratch; of another kind, from "
        "random token vectors instead of the teacher's.",
    )
    student_width: Annotated[int | None, "at least 1"] = flag(
        None,
        "Width of the token vectors of a student of another kind, or channels of its first convolution. Left out: 128, or 16 channels.",
    )
    student_hidden: Annotated[int | None, "at least 1"] = flag(
        None,
        "Hidden units of a student of another kind: of an LSTM in each direction, of filters of each size, of a dense layer. Left out: 128.",
    )
    student_layers: str = flag(
        "3",
        "Teacher layers the student keeps: a count spreads them over the depth, a list such as 0,2,5 names them.",
        metavar="0,2,5",
    )
    student_vocabulary: str | None = flag(
        None,
        "Tokens that the student keeps of its teacher's: those that the training examples and the transfer set need, and the first ones of the "
        "vocabulary besides, as many as this number, or with 'corpus' until 97 per cent of the tokens of the validation split are kept. Any text can be read with either. Left out: all.",
        metavar="corpus",
    )

    def __post_init__(self) -> None:
        _check(
            self.student_model is not None or not self.student_from_scratch,
            "--student_model, whose shape --student_from_scratch takes",
            None,
        )
        _check(
            self.kind is not None or self.student_width is self.student_hidden is None,
            f"--student_model {', '.join(STUDENT_KINDS)} with --student_width and --student_hidden",
            self.student_model,
        )
        if self.student_vocabulary is not None:
            known = self.student_vocabulary == "corpus" or self.student_vocabulary.isdecimal()
            _check(known, "'corpus' or a number of tokens as --student_vocabulary", self.student_vocabulary)
            _check(
                self.checkpoint is None,
                f"a student of the teacher's layers, or --student_model {', '.join(STUDENT_KINDS)}, with --student_vocabulary",
                self.student_model,
            )

    @property
    def kind(self) -> str | None:
        """What the student is, where it is of another kind than its teacher."""
        return self.student_model if self.student_model in STUDENT_KINDS else None

    @property
    def checkpoint(self) -> str | None:
        """The model that the student starts from, where it is not made of its teacher."""
        return self.student_model if self.kind is None else None

    def describe(self) -> dict[str, Any]:
        """What a student is made of: another model under the same name is another."""
        of = {} if self.checkpoint is None else {"student_model_fingerprint": model_fingerprint(self.checkpoint)}
        return asdict(self) | of


@dataclass
class DistillConfig(Checked):
    temperature: Positive = flag(2.0, "Temperature of the soft targets.")
    soft_target_weight: Annotated[float, "at most 1"] = flag(
        0.9, "Weight of the soft targets in [0, 1]; the labels get the rest."
    )
    hidden_state_weight: float = flag(
        0.0,
        "Weight of the hidden-state loss, added to the other two; above 0 the teacher runs along (online distillation).",
    )
    hidden_state_map: str | None = flag(
        None,
        "Which teacher hidden state each student hidden state is drawn to, such as 1:2,2:4,3:6; 0 is the embeddings. "
        "Left out: that of the layer it is a copy of; of another student, spread evenly.",
        metavar="1:2,2:4",
    )
    hidden_state_loss: str = flag(
        "squared_error",
        "The distance of two hidden states: their 'squared_error', a mean over the width, or 1 minus their 'cosine'.",
        choices=["squared_error", "cosine"],
    )
    attention_weight: float = flag(
        0.0,
        "Weight of the squared distance of attention maps, of the layers that --hidden_state_map pairs; above 0 the teacher runs along.",
    )
    relation_weight: float = flag(
        0.0,
        "Weight of the MiniLMv2 loss: of the relations among all queries, among all keys and among all values, of the last pair of layers of "
        "--hidden_state_map; above 0 the teacher runs along.",
    )
    relation_heads: Annotated[int | None, "at least 1"] = flag(
        None,
        "Heads that queries, keys and values are cut into for --relation_weight, whatever heads the models have. Left out: those of the "
        "teacher, or as many of them as divide the widths of both.",
    )
    soft_targets: str = flag(
        "stored",
        "Where the teacher's logits come from: 'stored' computes them once, 'online' at every step (online distillation).",
        choices=["stored", "online"],
    )
    soft_target_top_k: Count = flag(
        32,
        "Likeliest tokens whose probabilities are stored for each token of text, with the tail mass; for language models.",
    )
    augmented_views: int = flag(
        0,
        "Augmented views of each training image that soft targets are stored of, for --random_shift, --random_crop and --random_flip: the "
        "student sees one in each epoch, in turn. 0 stores those of the images as they are.",
    )
    divergence: str = flag(
        "forward_kl",
        "How far the student's distribution is from the teacher's. "
        + " ".join(f"'{name}': {one.__doc__}" for name, one in DIVERGENCES.items()),
        choices=list(DIVERGENCES),
    )
    beta: Annotated[float, "above 0", "below 1"] = flag(
        0.5,
        "The β of --divergence, in (0, 1): of jensen_shannon the teacher's weight in the mixture, of decoupled that of the other classes.",
    )
    standardize_logits: bool = flag(
        False,
        "Give the logits of teacher and student a mean of 0 and a standard deviation of 1 over the classes first (Sun et al., 2024).",
    )
    combine_teachers: str = flag(
        "mean",
        "What several teachers teach: the 'mean' of their logits, or 'each' its own, the mean of the losses; with forward_kl that is the mean "
        "of their probabilities.",
        choices=["mean", "each"],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self.augmented_views == 0 or (self.soft_targets == "stored" and not self.needs_teacher),
            "stored soft targets with --augmented_views, since an online teacher sees every image augmented anew",
            "an online teacher",
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher runs along, since what is inside it is not stored."""
        return max(self.hidden_state_weight, self.attention_weight, self.relation_weight) > 0

    @property
    def needs_stored_targets(self) -> bool:
        """Whether the teacher's logits are read from disk: one that runs along gives them itself."""
        return self.soft_targets == "stored" and self.soft_target_weight > 0 and not self.needs_teacher

    def labels_only(self) -> DistillConfig:
        """The same training without a teacher."""
        # All else of a teacher left out, so that it changes nothing here; but images are augmented as the student's are.
        stored = self.soft_targets == "stored" and not self.needs_teacher
        return DistillConfig(
            soft_target_weight=0.0,
            soft_targets="stored" if stored else "online",
            augmented_views=self.augmented_views,
        )

    def only(self, names: Iterable[str]) -> DistillConfig:
        """These settings, all others left at their defaults."""
        return DistillConfig(**{name: getattr(self, name) for name in names})


@dataclass
class PruneConfig(Checked):
    prune_heads: Share = flag(
        0.25,
        "Share of the attention heads to remove, over all layers together. Query heads that share a key and a value go together.",
    )
    prune_ffn: Share = flag(0.5, "Share of the feed-forward neurons to remove, over all layers together.")
    prune_steps: Count = flag(2, "Remove them in this many steps, and recover after each.")
    prune_epochs: float = flag(
        2.0,
        "Epochs of recovery by distillation after each step. 0 trains nothing: what is left is scaled, so that each layer's outputs come "
        "closest to those before.",
    )
    prune_learning_rate: Annotated[float | None, "above 0"] = flag(
        None, "Peak learning rate of the recovery. Left out: --learning_rate."
    )
    prune_samples: Count = flag(512, "Training examples that heads and neurons are chosen, and scaled, by.")


@dataclass
class GateConfig(Checked):
    gate: str | None = flag(
        None,
        "The metric that a student, a pruned and a quantized model are checked by on the validation split, such as macro_f1 or "
        "spearman. Left out: the task's primary metric. The recall of every class is checked besides.",
    )
    max_quality_drop: float = flag(
        0.01,
        "Largest share of the --gate metric that quantization may lose: 0.01 allows an accuracy of 0.90 to fall to 0.891, a perplexity of "
        "20 to rise to 20.2. A student and a pruned model may lose a half of it, and no class a half of its recall, unless this is more; "
        "1 goes on whatever was lost.",
    )


QUANTIZATIONS = "auto dynamic_int8 int8_int4_embeddings mixed_int8 static_int8 int8_blocks int4_blocks int4_blocks_int8_embeddings fp32 none"


@dataclass
class QuantizeConfig(GateConfig):
    target_cpu: str = flag(
        "any",
        "The CPU the model will run on. Without VNNI, x86 needs int8 weights within seven bits: 'any' and 'avx2' use them, 'avx512_vnni' "
        "and 'arm64' use all eight.",
        choices=["any", "avx2", "avx512_vnni", "arm64"],
    )
    quantization: str | None = flag(
        None,
        "How the shipped model is quantized: 'dynamic_int8' measures the ranges of activations on every call, 'static_int8' once, on "
        "training examples; 'int8_int4_embeddings' is dynamic_int8 with embeddings in blocks of int4, 'mixed_int8' dynamic_int8 but for the "
        "matmuls that lose most by it, a tenth of the weights, which stay in fp32; '…_blocks' give every few weights a scale of their own; "
        "'auto' tries the task's schemes and ships the fastest "
        "within --max_quality_drop; 'fp32' fuses operators for ONNX Runtime and quantizes nothing; 'none' ships the exported graph. Left "
        "out: the task's own choice, 'dynamic_int8' for classification, 'auto' for text generation.",
        choices=QUANTIZATIONS.split(),
    )
    block_size: int = flag(32, "Weights that share a scale in the '…_blocks' schemes: a power of 2 from 16 on.")
    calibration: str = flag(
        "percentile",
        "How static_int8 chooses an activation's range: 'minmax' of all that was seen, 'entropy', the range that keeps "
        "the distribution closest, or 'percentile', all but the outermost values.",
        choices=["minmax", "entropy", "percentile"],
    )
    calibration_samples: Count = flag(256, "Training examples that static_int8 measures activations on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_power = self.block_size >= 16 and self.block_size & (self.block_size - 1) == 0
        _check(is_power, "a power of 2 from 16 on for --block_size", self.block_size)

    @property
    def reduce_range(self) -> bool:
        return self.target_cpu in ("any", "avx2")


@dataclass
class BundleConfig:
    web: bool | None = flag(
        None,
        "Add a page that runs the model in a browser to the bundle; npm fetches its libraries, 33 MB. Left out: where npm can.",
    )
    web_assets: str | None = flag(
        None, "A node_modules directory that has the page's libraries, instead of npm; adds the page."
    )

    @property
    def page(self) -> bool | None:
        """None: where its libraries are to be had."""
        return self.web_assets is not None or self.web

    def describe(self) -> dict[str, Any]:
        """What a bundle depends on: wherever the libraries come from, they are the same files."""
        return {"page": self.page}


@dataclass
class ReportConfig(Checked):
    baselines: bool = flag(
        True,
        "Also fit and report what one would try before a student: TF-IDF or pixels with linear models, nearest neighbours, the teacher "
        "quantized.",
    )
    # What the report compares changes nothing in what is compared: not a setting of the distillation.
    label_baseline: bool = flag(False, "Also train the same student on the labels alone and report it.")
    benchmark_rounds: Count = flag(
        3, "Rounds of the latency measurement; every stage runs in a fresh process once a round."
    )
    benchmark_threads: Annotated[int | None, "at least 1"] = flag(
        None, "Threads of each measurement. Left out: every core this process may use."
    )
    benchmark_seconds: Positive = flag(
        1.0, "Seconds that one measurement repeats its calls for, and 20 of them at least."
    )

    def timing(self) -> dict[str, Any]:
        """What `measure` is told."""
        return {"rounds": self.benchmark_rounds, "threads": self.benchmark_threads, "seconds": self.benchmark_seconds}


@dataclass
class RepeatConfig(Checked):
    # What is repeated changes nothing in a stage: not a setting of the training.
    seeds: Count = flag(
        1,
        "Repeat all training with this many seeds, from --seed on, and report mean, deviation and intervals over them. The first is the "
        "run itself; the others, in the directory seeds/ of the run, are neither timed nor bundled.",
    )
    search_trials: int = flag(
        0,
        "Search for the student's --temperature, --soft_target_weight and --learning_rate by training so many students first, by their score "
        "on the validation split, and use the best (pip install 'pocketformers[search]'). Soft targets are stored once for all of them.",
    )


# The settings of the whole chain, in the order of the flags that --help lists.
OF_STAGES = (
    TeacherConfig,
    StudentConfig,
    DistillConfig,
    TransferConfig,
    PruneConfig,
    QuantizeConfig,
    BundleConfig,
    ReportConfig,
    RepeatConfig,
)


# Where it was done and published, what the report names anyway, and a secret: not among the flags that the report lists.
NOT_RECORDED = ("config", "debug", "demo", "hub_", "output_dir", "push_to_hub", "task", "web_assets")


class Settings(SimpleNamespace):
    """The settings of one command: an object of each of its dataclasses, by name. `settings.data` is the DataConfig."""

    # Every flag that was given a value other than its default, in the file or on the command line: enough to run again.
    given: dict[str, Any]
    named: dict[str, Any]  # every flag that was given, whatever its value
    data: DataConfig
    teacher: TeacherConfig
    student: StudentConfig
    distill: DistillConfig
    transfer: TransferConfig
    prune: PruneConfig
    quantize: QuantizeConfig
    bundle: BundleConfig
    report: ReportConfig
    repeat: RepeatConfig
    training: Any  # of the class TrainingArguments


def settings_name(kind: type) -> str:
    """The name of a dataclass among the settings: "data" for DataConfig, "training" for TrainingArguments."""
    return kind.__name__.removesuffix("Config").removesuffix("Arguments").lower()


def make_settings(kinds: Iterable[type], values: dict[str, Any]) -> Settings:
    """One object of each dataclass in `kinds` from the `values` of its fields; the dataclasses check them."""
    # A shell expands --output_dir ~/run, but neither --output_dir=~/run nor a line of a YAML file.
    home = (name for name, value in values.items() if isinstance(value, str) and value.startswith("~/"))
    values = values | {name: os.path.expanduser(values[name]) for name in home}
    settings = Settings(given={})
    for kind in kinds:
        own = {one.name: values[one.name] for one in fields(kind) if one.init and one.name in values}
        try:
            made = kind(**own)
        except InputError:
            raise
        except Exception as error:  # transformers' own arguments refuse a value by whatever error it leads to
            raise InputError(f"expected settings that go together on this machine, found: {error}") from error
        check_values(made)
        setattr(settings, settings_name(kind), made)
    return settings


# What earlier versions of transformers, and its example scripts, call some of our flags.
OTHER_NAMES = {
    **{"no_cuda": "use_cpu", "group_by_length": "train_sampling_strategy", "warmup_ratio": "warmup_steps"},
    **{"evaluation_strategy": "eval_strategy", "model_name_or_path": "teacher_model", "config_name": "teacher_model"},
    **{"train_file": "dataset", "dataset_name": "dataset", "task_name": "dataset_config", "lora_r": "lora_rank"},
    **{"lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"},
}


def did_you_mean(unknown: Iterable[str], known: Iterable[str]) -> str:
    """A sentence that names what is close to the `unknown` names, empty where nothing is."""
    unknown = list(unknown)
    known = [name for name in known if name not in unknown]
    close: set[str] = set()
    for name in unknown:
        bare = name.lstrip("-")
        other = name.removesuffix(bare) + OTHER_NAMES.get(bare, "")
        longer = [one for one in known if one.startswith(f"{name}_")]
        close.update([other] if other in known else longer[:3] or difflib.get_close_matches(name, known, n=2))
    return f" Did you mean {', '.join(sorted(close))}?" if close else ""
