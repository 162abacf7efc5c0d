"""The settings of every stage, and how they are read: --config YAML first, then flags; unknown keys are errors."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pipelines.core.errors import InputError, VerificationError
from pipelines.core.help import print_help, training_flags
from pipelines.core.processes import end, first_failure, lost_process
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
        "The data set: a Hub id, a csv, json, jsonl or parquet file, a folder of such files or with one sub-folder per "
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


@dataclass
class DistillConfig:
    temperature: float = _flag(2.0, "Temperature of the soft targets.")
    soft_target_weight: float = _flag(0.9, "Weight of the soft targets in [0, 1]; the labels get the rest.")
    hidden_state_weight: float = _flag(
        0.0, "Weight of the hidden-state loss, added to the other two; above 0 the teacher runs in the loop."
    )
    hidden_state_map: str | None = _flag(
        None,
        "Which teacher hidden state each student hidden state is drawn to, such as 1:2,2:4,3:6; 0 is the embeddings. "
        "Left out: spread evenly.",
    )
    soft_targets: str = _flag(
        "stored",
        "Where the teacher's logits come from: 'stored' computes them once, 'online' runs the teacher in the loop.",
        choices=["stored", "online"],
    )
    soft_target_top_k: int = _flag(
        32, "Tokens whose probabilities are stored for each token of text, the rest as one; for language models."
    )
    divergence: str = _flag(
        "forward_kl",
        "How far the student's answers are from the teacher's: 'forward_kl' (teacher ‖ student), 'reverse_kl' (student ‖ teacher) or "
        "'jensen_shannon', the generalized one of Agarwal et al. (2024).",
        choices=["forward_kl", "reverse_kl", "jensen_shannon"],
    )
    teacher_share: float = _flag(0.5, "Share of the teacher in the mixture of --divergence jensen_shannon, in (0, 1).")

    def __post_init__(self) -> None:
        _check(self.temperature > 0, "a --temperature above 0", self.temperature)
        _check(0 <= self.soft_target_weight <= 1, "--soft_target_weight in [0, 1]", self.soft_target_weight)
        _check(self.hidden_state_weight >= 0, "--hidden_state_weight of 0 or more", self.hidden_state_weight)
        _check(self.soft_target_top_k >= 1, "--soft_target_top_k of 1 or more", self.soft_target_top_k)
        kinds = ("forward_kl", "reverse_kl", "jensen_shannon")
        _check(self.divergence in kinds, f"--divergence out of {', '.join(kinds)}", self.divergence)
        _check(0 < self.teacher_share < 1, "--teacher_share between 0 and 1", self.teacher_share)
        _check(self.soft_targets in ("stored", "online"), "--soft_targets stored or online", self.soft_targets)

    @property
    def needs_stored_targets(self) -> bool:
        """Whether the teacher's logits are read from disk: hidden states need the teacher in the loop, which then gives both."""
        return self.soft_targets == "stored" and self.soft_target_weight > 0 and self.hidden_state_weight == 0

    def labels_only(self) -> DistillConfig:
        """The same training without a teacher."""
        # All else of a teacher left out, so that it changes nothing here.
        return DistillConfig(soft_target_weight=0.0, hidden_state_weight=0.0, soft_targets=self.soft_targets)


@dataclass
class PruneConfig:
    prune_heads: float = _flag(0.25, "Share of the attention heads to remove, over all layers together.")
    prune_ffn: float = _flag(0.5, "Share of the feed-forward neurons to remove, over all layers together.")
    prune_steps: int = _flag(2, "Cut in this many steps, recovering after each.")
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
        "The CPU the model will run on. Without VNNI, x86 needs the int8 weights of products within seven bits: 'any' and 'avx2' use "
        "them, 'avx512_vnni' and 'arm64' use all eight.",
        choices=["any", "avx2", "avx512_vnni", "arm64"],
    )

    @property
    def reduce_range(self) -> bool:
        return self.target_cpu in ("any", "avx2")


@dataclass
class QuantizeConfig(TargetConfig):
    quantization: str = _flag(
        "dynamic_int8",
        "How the shipped model is quantized: 'dynamic_int8' measures activations as they come, 'static_int8' once, on "
        "training examples; 'auto' makes every kind and ships the fastest of those within --max_quality_drop; 'fp32' "
        "fuses operators for ONNX Runtime and quantizes nothing; 'none' ships the exported graph.",
        choices=["dynamic_int8", "static_int8", "auto", "fp32", "none"],
    )
    calibration: str = _flag(
        "percentile",
        "How static_int8 chooses an activation's range: 'minmax' of all that was seen, 'entropy', the range that keeps "
        "the distribution closest, or 'percentile', all but the outermost values.",
        choices=["minmax", "entropy", "percentile"],
    )
    calibration_samples: int = _flag(256, "Training examples that static_int8 measures activations on.")
    max_quality_drop: float = _flag(
        0.01, "Largest loss of the primary metric, on the validation split, that quantization may cost."
    )

    def __post_init__(self) -> None:
        kinds = ("dynamic_int8", "static_int8", "auto", "fp32", "none")
        _check(self.quantization in kinds, f"--quantization out of {', '.join(kinds)}", self.quantization)
        calibrations = ("minmax", "entropy", "percentile")
        _check(self.calibration in calibrations, f"--calibration out of {', '.join(calibrations)}", self.calibration)
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
class LanguageQuantizeConfig(TargetConfig):
    quantization: str = _flag(
        "auto",
        "How the shipped language model is quantized: blocks of int8 or int4 weights, or int8 products; 'auto' tries all and ships the "
        "one that decodes fastest within --max_quality_drop; 'fp32' fuses operators for ONNX Runtime and quantizes nothing; 'none' ships "
        "the exported graph.",
        choices=["auto", "dynamic_int8", "int8_blocks", "int4_blocks", "int4_blocks_int8_embeddings", "fp32", "none"],
    )
    block_size: int = _flag(32, "Weights that share a scale: a power of 2 from 16 on.")
    max_quality_drop: float = _flag(0.03, "Largest share by which quantization may raise the validation perplexity.")

    def __post_init__(self) -> None:
        is_power = self.block_size >= 16 and self.block_size & (self.block_size - 1) == 0
        _check(is_power, "a power of 2 from 16 on for --block_size", self.block_size)
        _check(self.max_quality_drop >= 0, "--max_quality_drop of 0 or more", self.max_quality_drop)


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
        1.0, "Seconds that one measurement repeats its calls for, and ten of them at least."
    )

    def __post_init__(self) -> None:
        _check(self.benchmark_rounds >= 1, "--benchmark_rounds of 1 or more", self.benchmark_rounds)
        _check(self.benchmark_seconds > 0, "--benchmark_seconds above 0", self.benchmark_seconds)

    def timing(self) -> dict[str, Any]:
        """What `measure` and `measure_decoding` are told."""
        return {"rounds": self.benchmark_rounds, "threads": self.benchmark_threads, "seconds": self.benchmark_seconds}


# Where it was done and published, and a secret: never written anywhere.
NOT_RECORDED = ("config", "output_dir", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_token", "web_assets")


@dataclass
class RunConfig:
    config: str | None = _flag(None, "A YAML file of flags; flags on the command line override it.")
    # Every flag that was given a value other than its default, in the file or on the command line: enough to run again.
    given: dict[str, Any] = field(default_factory=dict, init=False)


def training_arguments() -> type:
    """The class of the training settings. Named by this function, it is imported, and torch with it, only when flags are parsed."""
    from pipelines.training.trainer import TrainingArguments

    return TrainingArguments


def parse_config(
    kinds: list[Any], default_config: Path | None = None, argv: list[str] | None = None, program: str | None = None
) -> list[Any]:
    """Read one object of each dataclass in `kinds` (or training_arguments) from `--config` (else `default_config`), then from the flags.

    The YAML file is turned into flags that stand before those of the command line, so both are parsed, and refused, by the
    same code. Raises InputError for a file that is missing or malformed, an unknown key or a bad value; a bad flag exits
    with status 2 as argparse does.
    """

    def read(flags: list[str]) -> list[Any]:
        found = list(parser.parse_args_into_dataclasses(flags))
        for settings in found:
            _check_numbers(settings)
        return found

    argv = _without_bare_debug(sys.argv[1:] if argv is None else argv)
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    named = only_config.parse_known_args(argv)[0].config
    path = Path(named) if named else default_config

    epilog = "--debug without a value shows the traceback of an error in the input."
    usage = "%(prog)s [--config FILE.yaml] [--flag value …]; --help lists every flag"
    texts: dict[str, Any] = {"allow_abbrev": False, "prog": program, "usage": usage, "epilog": epilog}
    if {"-h", "--help"} & set(argv):
        if os.environ.get("RANK", "0") == "0":
            print_help([training_flags() if kind is training_arguments else kind for kind in kinds], **texts)
        sys.exit(0)

    from transformers import HfArgumentParser

    classes: list[Any] = [kind() if kind is training_arguments else kind for kind in kinds]
    parser: Any = HfArgumentParser(classes, **texts)
    parser.error = partial(_refuse_flags, parser)
    from_file = _read_yaml(path, parser) if path is not None else []
    try:
        parsed = read(from_file + argv)
    except Exception as error:  # transformers' own arguments refuse a value by whatever error it leads to
        # The dataclasses check their values as they are made. A bad value in the file is bad input (status 1), a bad flag is
        # a usage error (status 2): which of the two it is shows when the file is read alone.
        try:
            read(from_file)
        except InputError as in_file:
            raise InputError(f"{in_file} (in {path})") from in_file
        except Exception as in_file:
            raise InputError(f"expected settings that can be used in {path}, found: {in_file}") from in_file
        parser.error(str(error))
    given, defaults = vars(parser.parse_args(from_file + argv)), vars(parser.parse_args([]))
    for settings in parsed:
        if isinstance(settings, RunConfig):
            settings.given = {
                flag: value for flag, value in given.items() if value != defaults[flag] and flag not in NOT_RECORDED
            }
    return parsed


def _check_numbers(settings: Any) -> None:
    """Raise InputError for what no setting can be: a number that is not finite, a seed below 0, an empty batch."""
    for name, value in vars(settings).items():
        if isinstance(value, float):
            _check(math.isfinite(value), f"a finite --{name}", value)
        if name in ("seed", "split_seed", "data_seed"):
            _check(value is None or 0 <= value < 2**32, f"--{name} from 0 to 2^32 - 1", value)
        if name.endswith("_batch_size") and name.startswith("per_device"):
            _check(value >= 1, f"--{name} of 1 or more", value)


def peek(flag: str, argv: list[str]) -> Any:
    """The value of one flag in `argv`, or in its --config file, for a command whose other flags depend on it; None where it is not given.

    What is wrong with either is left to parse_config to say.
    """
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    only.add_argument(f"--{flag}")
    only.add_argument("--config")
    try:
        given = only.parse_known_args(argv)[0]
        content = _load_yaml(Path(given.config)) if given.config else {}
    except (argparse.ArgumentError, OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    in_file = content.get(flag) if isinstance(content, dict) else None
    return getattr(given, flag) or in_file


def _without_bare_debug(argv: list[str]) -> list[str]:
    """Drop our --debug; one with a value, such as underflow_overflow, is transformers' own."""
    followed = [not word.startswith("-") for word in argv[1:]] + [False]
    return [word for word, has_value in zip(argv, followed, strict=False) if word != "--debug" or has_value]


class _Loader(yaml.SafeLoader):
    """YAML without references to other places, of which a few lines can make a value of gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"a reference (*{self.peek_event().anchor}), where only values are read")
        return super().compose_node(parent, index)


def _load_yaml(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)


def _read_yaml(path: Path, parser: Any) -> list[str]:
    try:
        content = _load_yaml(path)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"expected a YAML file at {path}, found: {error}. Check the path given to --config."
        ) from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise InputError(f"expected lines of 'flag: value' in {path}, found a {type(content).__name__}.")
    known = {action.dest for action in parser._actions} - {"help", "config"}
    unknown = sorted(str(key) for key in content if key not in known)
    if unknown:
        close = {match for key in unknown for match in difflib.get_close_matches(key, known, n=2)}
        hint = f" Did you mean {', '.join(sorted(close))}?" if close else ""
        raise InputError(
            f"expected only known flags as keys in {path}, found {', '.join(unknown)}.{hint} --help lists every flag."
        )
    flags: list[str] = []
    for key, value in content.items():
        if value is None:
            continue
        # Written as ./ or ../, a path is the file's own neighbour, from wherever the command is run.
        if isinstance(value, str) and value.startswith(("./", "../")):
            value = str((path.parent / value).resolve())
        values = value if isinstance(value, list) else [value]
        written = [json.dumps(item) if isinstance(item, (dict, bool)) else str(item) for item in values]
        flags += [f"--{key}", *written]

    def refuse(text: str) -> NoReturn:
        raise InputError(f"expected flags that parse in {path}, found: {text}. --help lists every flag.")

    original, parser.error = parser.error, refuse
    try:
        parser.parse_args(flags)
    finally:
        parser.error = original
    return flags


def run_main(main: Callable[[], None]) -> None:
    """Run a command: errors in the input become one message and exit status 1, with a traceback only under --debug.

    Any other error shows its traceback. Of several processes the first to fail is heard, whichever it is; the others end in silence.
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
        end(f"error: {text}", 1)


def _refuse_flags(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """What argparse does with a bad flag; of several processes one says it."""
    end(f"{parser.format_usage()}{parser.prog}: error: {message}", 2)
