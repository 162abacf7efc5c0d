"""The settings of every stage, and how they are read: a --config YAML first, then flags; unknown keys are errors."""

from __future__ import annotations

import argparse
import codecs
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import yaml

from pipelines.core.errors import InputError, VerificationError
from pipelines.core.processes import exit_with, first_failure, lost_process
from pipelines.core.sources import model_fingerprint


def _flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field whose help text and default are written once, here."""
    return field(default=default, metadata={"help": help, **metadata})


def _check(condition: bool, expected: str, found: Any) -> None:
    if not condition:
        raise InputError(f"expected {expected}, found {found!r}")


@dataclass
class DataConfig:
    dataset: str | None = _flag(
        None,
        "The data set: a Hub id, a csv, tsv, json, jsonl or parquet file, a folder of such files or with one sub-folder per "
        "class, or package://<installed package>/<path inside it>.",
    )
    dataset_config: str | None = _flag(None, "The Hub data set's configuration, such as sst2 for glue.")
    train_split: str = _flag("train", "The split to train on.")
    validation_split: str | None = _flag(
        None,
        "The split every choice is made on. Left out: 'validation' if it has labels and is not the test split, else cut from the "
        "training split.",
    )
    test_split: str | None = _flag(
        None,
        "The split only the report reads. Left out: 'test' if it has labels; else 'validation' if it has and --validation_split is left "
        "out too; else cut from the training split.",
    )
    text_column: str = _flag("text", "The column with the text.")
    text_pair_column: str | None = _flag(None, "The column with the second text, for sentence pairs.")
    image_column: str = _flag("image", "The column with the image.")
    label_column: str = _flag("label", "The column with the class, or with the score where the task is one of scores.")
    separator: str | None = _flag(
        None,
        "The character between the columns of csv and tsv files ('\\t' for a tab). Left out: found from the first line.",
    )
    encoding: str | None = _flag(
        None,
        "The encoding of tables and text files, such as cp1252. Left out: UTF-8 or UTF-16, else a guess that is printed.",
    )
    missing: str = _flag(
        "error",
        "What becomes of rows without a label, a text or a readable image: error names them, drop leaves them out and counts them.",
        choices=["error", "drop"],
    )
    max_length: int = _flag(
        128, "Texts are cut to this many tokens; for a language model they are joined and cut into blocks of this many."
    )
    max_train_samples: int | None = _flag(None, "Use at most this many training examples.")
    max_eval_samples: int | None = _flag(None, "Use at most this many validation and this many test examples.")
    validation_size: float = _flag(
        0.1, "Share of the examples cut off for validation where the data set has no such split."
    )
    test_size: float = _flag(0.2, "Share of the examples cut off for the test where the data set has no such split.")
    split_seed: int = _flag(
        0, "Seed of the split and of the choice of samples; apart from --seed, so that seeds share a split."
    )
    trust_remote_code: bool = _flag(
        False,
        "Run the Python code that a model or tokenizer brings along, with all that you may do on this machine. Read it first; every "
        "record and the report say that it was run.",
    )

    def __post_init__(self) -> None:
        _check(self.max_length >= 2, "--max_length of 2 or more", self.max_length)
        _check(self.missing in ("error", "drop"), "--missing error or drop", self.missing)
        self.separator = "\t" if self.separator in ("\\t", "tab") else self.separator
        _check(self.separator is None or len(self.separator) == 1, "one character as --separator", self.separator)
        if self.encoding is not None:
            try:
                codecs.lookup(self.encoding)
            except LookupError as error:
                raise InputError(
                    f"expected an encoding that Python knows as --encoding, such as cp1252, found: {error}"
                ) from error
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"--{name} of 1 or more", value)
        for name in ("validation_size", "test_size"):
            _check(0 < getattr(self, name) < 0.9, f"--{name} between 0 and 0.9", getattr(self, name))


@dataclass
class LanguageConfig:
    document_start: str | None = _flag(
        None,
        "A regular expression: rows (of a text file: lines) in which it is found begin a document, the others belong to the one "
        "before. Left out: every row is a document, and blank lines part those of a text file.",
    )
    stride: int | None = _flag(
        None,
        "Step of the window that scores held-out text; every token sees at least --max_length minus this many before it. "
        "Left out: half of --max_length.",
    )
    vocabulary_size: int = _flag(
        4096, "Tokens of the tokenizer that is trained where --teacher_from_scratch takes a shape without one."
    )

    def __post_init__(self) -> None:
        _check(self.stride is None or self.stride >= 1, "--stride of 1 or more", self.stride)
        _check(
            self.vocabulary_size >= 257,
            "--vocabulary_size of 257 (bytes and the end token) or more",
            self.vocabulary_size,
        )
        try:
            re.compile(self.document_start or "")
        except re.error as error:
            raise InputError(f"expected a regular expression for --document_start, found: {error}") from error


@dataclass
class AugmentConfig:
    random_shift: float = _flag(
        0.0,
        "Shift every training image by up to this share of its sides at random. This and the next two serve wherever the "
        "student's soft targets are not stored: in the teacher's fine-tuning, and with --soft_targets online.",
    )
    random_crop: float = _flag(0.0, "Crop up to this share of every training image's sides at random.")
    random_flip: bool = _flag(False, "Mirror half of the training images left to right; wrong for digits and letters.")

    def __post_init__(self) -> None:
        for name in ("random_shift", "random_crop"):
            _check(0 <= getattr(self, name) < 0.5, f"--{name} in [0, 0.5)", getattr(self, name))

    @property
    def any(self) -> bool:
        return self.random_shift > 0 or self.random_crop > 0 or self.random_flip


@dataclass
class TeacherConfig:
    teacher_model: str = _flag(
        "google-bert/bert-base-uncased", "The model to fine-tune, or one already fine-tuned on this task."
    )
    teacher_epochs: float = _flag(
        3.0, "Epochs of fine-tuning; 0 uses the teacher as it is, which needs a head for exactly these labels."
    )
    teacher_learning_rate: float = _flag(3e-5, "Peak learning rate of the fine-tuning.")
    teacher_from_scratch: bool = _flag(
        False,
        "Start from random weights in the shape of --teacher_model, which may then be a directory without weights: a "
        "config.json and the settings of the tokenizer or image processor.",
    )
    lora_rank: int = _flag(0, "Train a LoRA adapter of this rank instead of all weights; 0 trains all.")

    def __post_init__(self) -> None:
        _check(self.teacher_epochs >= 0, "--teacher_epochs of 0 or more", self.teacher_epochs)
        _check(
            self.teacher_epochs > 0 or not self.teacher_from_scratch,
            "--teacher_epochs above 0 with --teacher_from_scratch, since random weights know nothing",
            self.teacher_epochs,
        )
        _check(self.teacher_learning_rate > 0, "a --teacher_learning_rate above 0", self.teacher_learning_rate)
        _check(self.lora_rank >= 0, "--lora_rank of 0 or more", self.lora_rank)


@dataclass
class StudentConfig:
    student_model: str | None = _flag(
        None, "A checkpoint to start the student from. Left out: some of the teacher's own layers."
    )
    student_from_scratch: bool = _flag(
        False, "Start the student from random weights in the shape of --student_model, as for --teacher_from_scratch."
    )
    student_layers: str = _flag(
        "3", "Teacher layers the student keeps: a count spreads them over the depth, a list such as 0,2,5 names them."
    )

    def __post_init__(self) -> None:
        _check(
            self.student_model is not None or not self.student_from_scratch,
            "--student_model, whose shape --student_from_scratch takes",
            None,
        )

    def describe(self) -> dict[str, Any]:
        """What a student is made of: another model under the same name is another."""
        of = {} if self.student_model is None else {"student_model_fingerprint": model_fingerprint(self.student_model)}
        return asdict(self) | of


DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")  # what each is, stands in pipelines/training/losses.py


@dataclass
class DistillConfig:
    temperature: float = _flag(2.0, "Temperature of the soft targets.")
    soft_target_weight: float = _flag(0.9, "Weight of the soft targets in [0, 1]; the labels get the rest.")
    hidden_state_weight: float = _flag(
        0.0,
        "Weight of the hidden-state loss, added to the other two; above 0 the teacher runs along (online distillation).",
    )
    hidden_state_map: str | None = _flag(
        None,
        "Which teacher hidden state each student hidden state is drawn to, such as 1:2,2:4,3:6; 0 is the embeddings. "
        "Left out: that of the layer it is a copy of; of another student, spread evenly.",
    )
    soft_targets: str = _flag(
        "stored",
        "Where the teacher's logits come from: 'stored' computes them once, 'online' at every step (online distillation).",
        choices=["stored", "online"],
    )
    soft_target_top_k: int = _flag(
        32,
        "Likeliest tokens whose probabilities are stored for each token of text, with the tail mass; for language models.",
    )
    divergence: str = _flag(
        "forward_kl",
        "How far the student's distribution is from the teacher's: 'forward_kl' (teacher ‖ student), 'reverse_kl' (student ‖ teacher) or "
        "'jensen_shannon', the generalized one of Agarwal et al. (2024).",
        choices=list(DIVERGENCES),
    )
    beta: float = _flag(0.5, "Weight of the teacher in the mixture of --divergence jensen_shannon, in (0, 1).")

    def __post_init__(self) -> None:
        _check(self.temperature > 0, "a --temperature above 0", self.temperature)
        _check(0 <= self.soft_target_weight <= 1, "--soft_target_weight in [0, 1]", self.soft_target_weight)
        _check(self.hidden_state_weight >= 0, "--hidden_state_weight of 0 or more", self.hidden_state_weight)
        _check(self.soft_target_top_k >= 1, "--soft_target_top_k of 1 or more", self.soft_target_top_k)
        _check(self.divergence in DIVERGENCES, f"--divergence out of {', '.join(DIVERGENCES)}", self.divergence)
        _check(0 < self.beta < 1, "--beta between 0 and 1", self.beta)
        _check(self.soft_targets in ("stored", "online"), "--soft_targets stored or online", self.soft_targets)

    @property
    def needs_stored_targets(self) -> bool:
        """Whether the teacher's logits are read from disk: hidden states need the teacher itself, which then gives both."""
        return self.soft_targets == "stored" and self.soft_target_weight > 0 and self.hidden_state_weight == 0

    def labels_only(self) -> DistillConfig:
        """The same training without a teacher."""
        # All else of a teacher left out, so that it changes nothing here; but images are augmented as the student's are.
        stored = self.soft_targets == "stored" and self.hidden_state_weight == 0
        return DistillConfig(soft_target_weight=0.0, soft_targets="stored" if stored else "online")

    def for_soft_targets(self) -> DistillConfig:
        """The settings that stored soft targets depend on, all others left at their defaults: what their stage is keyed by."""
        return DistillConfig(temperature=self.temperature, soft_target_top_k=self.soft_target_top_k)


@dataclass
class PruneConfig:
    prune_heads: float = _flag(
        0.25,
        "Share of the attention heads to remove, over all layers together. Query heads that share a key and a value go together.",
    )
    prune_ffn: float = _flag(0.5, "Share of the feed-forward neurons to remove, over all layers together.")
    prune_steps: int = _flag(2, "Remove them in this many steps, and recover after each.")
    prune_epochs: float = _flag(2.0, "Epochs of recovery by distillation after each step.")
    prune_learning_rate: float | None = _flag(None, "Peak learning rate of the recovery. Left out: --learning_rate.")
    prune_samples: int = _flag(512, "Training examples that the importance of heads and neurons is measured on.")

    def __post_init__(self) -> None:
        for name in ("prune_heads", "prune_ffn"):
            _check(0 <= getattr(self, name) < 1, f"--{name} in [0, 1)", getattr(self, name))
        _check(self.prune_steps >= 1, "--prune_steps of 1 or more", self.prune_steps)
        _check(self.prune_epochs >= 0, "--prune_epochs of 0 or more", self.prune_epochs)
        _check(self.prune_samples >= 1, "--prune_samples of 1 or more", self.prune_samples)


@dataclass
class TargetConfig:
    target_cpu: str = _flag(
        "any",
        "The CPU the model will run on. Without VNNI, x86 needs int8 weights within seven bits: 'any' and 'avx2' use them, 'avx512_vnni' "
        "and 'arm64' use all eight.",
        choices=["any", "avx2", "avx512_vnni", "arm64"],
    )

    @property
    def reduce_range(self) -> bool:
        return self.target_cpu in ("any", "avx2")


QUANTIZATIONS = (
    "auto",
    "dynamic_int8",
    "static_int8",
    "int8_blocks",
    "int4_blocks",
    "int4_blocks_int8_embeddings",
    "fp32",
    "none",
)
CALIBRATIONS = ("minmax", "entropy", "percentile")


@dataclass
class QuantizeConfig(TargetConfig):
    quantization: str | None = _flag(
        None,
        "How the shipped model is quantized: 'dynamic_int8' measures the ranges of activations on every call, 'static_int8' once, on "
        "training examples; '…_blocks' give every few weights a scale of their own; 'auto' tries the task's schemes and ships the fastest "
        "within --max_quality_drop; 'fp32' fuses operators for ONNX Runtime and quantizes nothing; 'none' ships the exported graph. Left "
        "out: the task's own choice, 'dynamic_int8' for classification, 'auto' for text generation.",
        choices=list(QUANTIZATIONS),
    )
    block_size: int = _flag(32, "Weights that share a scale in the '…_blocks' schemes: a power of 2 from 16 on.")
    calibration: str = _flag(
        "percentile",
        "How static_int8 chooses an activation's range: 'minmax' of all that was seen, 'entropy', the range that keeps "
        "the distribution closest, or 'percentile', all but the outermost values.",
        choices=list(CALIBRATIONS),
    )
    calibration_samples: int = _flag(256, "Training examples that static_int8 measures activations on.")
    max_quality_drop: float = _flag(
        0.01,
        "Largest share of the primary metric that quantization may lose on the validation split: 0.01 allows an accuracy of 0.90 to fall "
        "to 0.891, a perplexity of 20 to rise to 20.2.",
    )

    def __post_init__(self) -> None:
        kinds, ranges = ", ".join(QUANTIZATIONS), ", ".join(CALIBRATIONS)
        _check(self.quantization in (None, *QUANTIZATIONS), f"--quantization out of {kinds}", self.quantization)
        _check(self.calibration in CALIBRATIONS, f"--calibration out of {ranges}", self.calibration)
        is_power = self.block_size >= 16 and self.block_size & (self.block_size - 1) == 0
        _check(is_power, "a power of 2 from 16 on for --block_size", self.block_size)
        _check(self.calibration_samples >= 1, "--calibration_samples of 1 or more", self.calibration_samples)
        _check(self.max_quality_drop >= 0, "--max_quality_drop of 0 or more", self.max_quality_drop)


@dataclass
class BundleConfig:
    web: bool | None = _flag(
        None,
        "Add a page that runs the model in a browser to the bundle; npm fetches its libraries, 33 MB. Left out: where npm can.",
    )
    web_assets: str | None = _flag(
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
class ReportConfig:
    # What the report compares changes nothing in what is compared: not a setting of the distillation.
    label_baseline: bool = _flag(False, "Also train the same student on the labels alone and report it.")
    benchmark_rounds: int = _flag(
        3, "Rounds of the latency measurement; every stage runs in a fresh process once a round."
    )
    benchmark_threads: int | None = _flag(
        None, "Threads of each measurement. Left out: every core this process may use."
    )
    benchmark_seconds: float = _flag(
        1.0, "Seconds that one measurement repeats its calls for, and 20 of them at least."
    )

    def __post_init__(self) -> None:
        _check(self.benchmark_rounds >= 1, "--benchmark_rounds of 1 or more", self.benchmark_rounds)
        _check(self.benchmark_seconds > 0, "--benchmark_seconds above 0", self.benchmark_seconds)

    def timing(self) -> dict[str, Any]:
        """What `measure` is told."""
        return {"rounds": self.benchmark_rounds, "threads": self.benchmark_threads, "seconds": self.benchmark_seconds}


# Where it was done and published, what the report names anyway, and a secret: not among the flags that the report lists.
NOT_RECORDED = ("config", "debug", "demo", "hub_", "output_dir", "push_to_hub", "task", "web_assets")


class Settings(SimpleNamespace):
    """The settings of one command: an object of each of its dataclasses, by name. `settings.data` is the DataConfig."""

    # Every flag that was given a value other than its default, in the file or on the command line: enough to run again.
    given: dict[str, Any]
    data: DataConfig
    teacher: TeacherConfig
    student: StudentConfig
    distill: DistillConfig
    prune: PruneConfig
    quantize: QuantizeConfig
    bundle: BundleConfig
    report: ReportConfig
    training: Any  # of the class TrainingArguments


def settings_name(kind: type) -> str:
    """The name of a dataclass among the settings: "data" for DataConfig, "training" for TrainingArguments."""
    return kind.__name__.removesuffix("Config").removesuffix("Arguments").lower()


def make_settings(kinds: Iterable[type], values: dict[str, Any]) -> Settings:
    """One object of each dataclass in `kinds` from the `values` of its fields; the dataclasses check them."""
    settings = Settings(given={})
    for kind in kinds:
        own = {one.name: values[one.name] for one in fields(kind) if one.init and one.name in values}
        made = kind(**own)
        _check_numbers(made)
        setattr(settings, settings_name(kind), made)
    return settings


def parse_config(
    kinds: Iterable[Any],
    default_config: Path | None = None,
    argv: list[str] | None = None,
    program: str | None = None,
    only: bool = False,
) -> Settings:
    """Read the dataclasses `kinds` from the YAML file named by `--config` (else `default_config`), then from the flags.

    The values of the file become the defaults of the flags. Raises InputError for a file that is missing or malformed, an unknown
    key or a bad value in it; a bad flag exits with status 2 as argparse does. With `only` these few settings are looked up ahead
    of the others, whose flags and keys are left alone.
    """
    kinds, argv = list(kinds), sys.argv[1:] if argv is None else argv
    parser = _make_parser(kinds, default_config, program, only)
    flags = {action.dest: action for action in reversed(parser._actions)}
    defaults, (named, unknown) = vars(parser.parse_known_args([])[0]), parser.parse_known_args(argv)
    if unknown and not only:
        hint = did_you_mean([word.partition("=")[0] for word in unknown], [f"--{flag}" for flag in flags])
        parser.error(f"unknown flags: {' '.join(unknown)}.{hint}")
    if named.config is not None:
        _set_defaults(parser, flags, Path(named.config), only)
    values = vars(parser.parse_known_args(argv)[0])
    try:
        settings = make_settings(kinds, values)
    except Exception as error:  # transformers' own arguments refuse a value by whatever error it leads to
        # A bad value in the file is bad input, a bad flag is a usage error: which of the two it is shows when the file is read alone.
        try:
            make_settings(kinds, vars(parser.parse_known_args([])[0]))
        except InputError as in_file:
            raise InputError(f"{in_file} (in {named.config})") from in_file
        except Exception as in_file:
            raise InputError(f"expected settings that can be used in {named.config}, found: {in_file}") from in_file
        parser.error(str(error))
    changed = {flag: value for flag, value in values.items() if value != defaults[flag]}
    settings.given = {flag: value for flag, value in changed.items() if not flag.startswith(NOT_RECORDED)}
    return settings


def _make_parser(kinds: list[Any], default_config: Path | None, program: str | None, only: bool) -> Any:
    from transformers import HfArgumentParser

    parser: Any = HfArgumentParser(
        kinds,
        prog=program,
        usage="%(prog)s [--config FILE.yaml] [--flag value …]; --help lists every flag",
        allow_abbrev=False,
        add_help=not only,
    )
    parser.error = partial(_refuse_flags, parser)
    if os.environ.get("RANK", "0") != "0":  # one of several processes prints the help
        parser.print_help = lambda: None
    of_file = "A YAML file of flags; those on the command line override it."
    parser.add_argument("--config", default=default_config, help=of_file)
    if "--debug" not in parser._option_string_actions:
        parser.add_argument("--debug")
    for action in parser._actions:
        if action.dest == "debug":  # ours without a value, transformers' with one, such as underflow_overflow
            action.nargs, action.help = "*", "Without a value: show the traceback of an error in the input."
        elif getattr(action.type, "__name__", "") == "string_to_bool":  # every switch can be given without a value
            action.nargs, action.const = "?", True
    return parser


def did_you_mean(unknown: Iterable[str], known: Iterable[str]) -> str:
    """A sentence that names what is close to the `unknown` names, empty where nothing is."""
    known = list(known)
    close = sorted({match for name in unknown for match in difflib.get_close_matches(name, known, n=2)})
    return f" Did you mean {', '.join(close)}?" if close else ""


def _check_numbers(settings: Any) -> None:
    """Raise InputError for what no setting can be: a number that is not finite, a seed below 0, an empty batch."""
    for name, value in vars(settings).items():
        if isinstance(value, float):
            _check(math.isfinite(value), f"a finite --{name}", value)
        if name in ("seed", "split_seed", "data_seed"):
            _check(value is None or 0 <= value < 2**32, f"--{name} from 0 to 2^32 - 1", value)
        if name.endswith("_batch_size") and name.startswith("per_device"):
            _check(value >= 1, f"--{name} of 1 or more", value)


def _set_defaults(parser: Any, flags: dict[str, argparse.Action], path: Path, only: bool) -> None:
    """Make the values of the YAML file at `path` the defaults of the flags that its keys name."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"expected a YAML file at {path}, found: {error}. Check the path given to --config."
        ) from error
    if not isinstance(content, dict | None):
        raise InputError(f"expected lines of 'flag: value' in {path}, found a {type(content).__name__}.")
    content = content or {}
    unknown = sorted(str(key) for key in content if key not in flags or key in ("help", "config"))
    if unknown and not only:
        raise InputError(
            f"expected only known flags as keys in {path}, found {', '.join(unknown)}.{did_you_mean(unknown, flags)} "
            "--help lists every flag."
        )
    for key, value in content.items():
        if key in flags and value is not None:
            # Written as ./ or ../, a path is the file's own neighbour, from wherever the command is run.
            if isinstance(value, str) and value.startswith(("./", "../")):
                value = str((path.parent / value).resolve())
            try:
                parser.set_defaults(**{key: _converted(parser, flags[key], value)})
            except argparse.ArgumentError as error:
                raise InputError(
                    f"expected flags that parse in {path}, found: {error}. --help lists every flag."
                ) from error


def _converted(parser: Any, action: argparse.Action, value: Any) -> Any:
    """A value of a YAML file as the flag would have read it."""

    def convert(item: Any) -> Any:
        text = json.dumps(item) if isinstance(item, (dict, bool)) else str(item)
        converted = parser._get_value(action, text)
        parser._check_value(action, converted)
        return converted

    if action.nargs in ("+", "*"):
        return [convert(item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        raise argparse.ArgumentError(action, f"one value is expected, not the list {value}")
    return convert(value)


def run_main(main: Callable[[], None]) -> None:
    """Run a command: errors in the input become one message and exit status 1, with a traceback only under --debug.

    Any other error shows its traceback. Of several processes only the first that fails prints its message.
    """
    try:
        main()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, (InputError, VerificationError)):
            text: str | None = str(error)
        elif isinstance(error, OSError):
            text = f"expected to be able to read and write every file of the run, found: {error}. Check its permissions and the disk."
        else:
            text = lost_process(error)
        if text is None:
            text = f"{type(error).__name__}: {error}"
            if first_failure(f"error: {text}")[0] == f"error: {text}":
                raise
        exit_with(f"error: {text}", 1)


def _refuse_flags(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """What argparse does with a bad flag; of several processes one prints it."""
    exit_with(f"{parser.format_usage()}{parser.prog}: error: {message}", 2)
