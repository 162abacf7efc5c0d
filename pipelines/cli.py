"""`python -m pipelines <stage> …`: any one stage on any one directory. It reads and writes what the recipes do.

    fine-tune   a pretrained model -> a teacher             --teacher_model M --dataset D --output_dir OUT
    distill     a teacher -> a student                      --teacher_model M --dataset D --output_dir OUT
    prune       a student -> a smaller student              --model M --teacher_model M --dataset D --output_dir OUT
    export      a model directory -> fp32 ONNX, verified    --model M --dataset D --output_dir OUT
    quantize    an ONNX directory -> int8 ONNX, verified    --model M --dataset D --output_dir OUT
    bundle      an ONNX directory -> what runs it, no torch --model M --dataset D --output_dir OUT
    verify      an ONNX directory against its source        --model M --reference M --dataset D
    benchmark   time directories against one another        --models M N … --dataset D
    report      score and time a run's stages again         --output_dir RUN --dataset D
    push        publish a verified run on the Hub           --output_dir RUN --hub_model_id NAME

`python -m pipelines <stage> --help` lists its flags.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.core.config import (
    AugmentConfig,
    BundleConfig,
    DataConfig,
    DistillConfig,
    LanguageConfig,
    LanguageQuantizeConfig,
    PruneConfig,
    QuantizeConfig,
    ReportConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    parse_config,
    peek,
    run_main,
    training_arguments,
)
from pipelines.core.errors import InputError


@dataclass
class ModelConfig:
    model: str | None = field(default=None, metadata={"help": "The model directory to work on."})

    @property
    def source(self) -> str:
        if self.model is None:
            raise InputError("expected a model directory, found none. Pass --model.")
        return self.model


@dataclass
class ReferenceConfig:
    reference: str | None = field(default=None, metadata={"help": "The directory the ONNX model was made from."})


@dataclass
class ModelsConfig:
    models: list[str] = field(
        default_factory=list, metadata={"help": "The stage directories to time against one another."}
    )


@dataclass
class TaskConfig(DataConfig):
    task: str = field(
        default="text-classification",
        metadata={
            "help": "What the model does.",
            "choices": ["text-classification", "image-classification", "text-generation"],
        },
    )


# What a task is made of: these flags come first, and go to `task_of`.
TASK = (TaskConfig, AugmentConfig, LanguageConfig)


@dataclass
class OutputConfig:
    output_dir: str | None = field(default=None, metadata={"help": "The directory to write."})
    seed: int = field(default=42, metadata={"help": "Random seed."})


@dataclass
class PushConfig:
    output_dir: str | None = field(default=None, metadata={"help": "The directory of the finished run."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "The repository: name or organisation/name. Left out: the directory's name."}
    )
    hub_private_repo: bool = field(default=True, metadata={"help": "Whether only you can see it."})
    hub_token: str | None = field(
        default=None, metadata={"help": "A token with write access. Left out: HF_TOKEN, or that of 'hf auth login'."}
    )


def stage(
    output_dir: str | None, task: Any, seed: int, function: Callable[..., Any], source: str, **arguments: Any
) -> None:
    """Run one stage function into `output_dir`, with the record, the resuming and the safety of a recipe's stage."""
    from pipelines.core.run import Run

    if output_dir is None:
        raise InputError("expected a directory to write, found none. Pass --output_dir.")
    target = Path(output_dir).absolute()
    run = Run(target.parent, task, seed, only_stage=target.name)
    run.stage(target.name, function, source, **arguments)


def fine_tune() -> None:
    _, *data, teacher, training = parse("fine-tune", *TASK, TeacherConfig, training_arguments)

    from pipelines.training.fine_tune import fine_tune
    from pipelines.training.trainer import arguments_for

    stage(
        training.output_dir, task_of(*data), training.seed, fine_tune, teacher.teacher_model, distributed=True, teacher=teacher,
        training=arguments_for(training, teacher.teacher_learning_rate, teacher.teacher_epochs),
    )  # fmt: skip


def distill() -> None:
    kinds = (*TASK, TeacherConfig, StudentConfig, DistillConfig, training_arguments)
    _, *data, teacher, student, distill, training = parse("distill", *kinds)

    from pipelines.training.distill import distill_student

    stage(
        training.output_dir, task_of(*data), training.seed, distill_student, teacher.teacher_model, distributed=True,
        student=student, distill=distill, training=training,
    )  # fmt: skip


def prune() -> None:
    kinds = (ModelConfig, *TASK, TeacherConfig, PruneConfig, DistillConfig, training_arguments)
    _, model, *data, teacher, prune, distill, training = parse("prune", *kinds)

    from pipelines.data.sources import resolve
    from pipelines.training.prune import prune_and_recover

    stage(
        training.output_dir, task_of(*data), training.seed, prune_and_recover, model.source, distributed=True,
        teacher=Path(resolve(teacher.teacher_model)), prune=prune, distill=distill, training=training,
    )  # fmt: skip


def export() -> None:
    _, model, *data, output = parse("export", ModelConfig, *TASK, OutputConfig)

    from pipelines.onnx.export import export_onnx
    from pipelines.tasks.text_generation.export import export_language_model

    task = task_of(*data)
    function = export_language_model if task.causal else export_onnx
    stage(output.output_dir, task, output.seed, function, model.source)


def quantize() -> None:
    _, model, *data, quantize, output = parse("quantize", ModelConfig, *TASK, quantize_kind(), OutputConfig)

    from pipelines.onnx.quantize import quantize_onnx
    from pipelines.tasks.text_generation.quantize import quantize_language_model

    if quantize.quantization == "none":
        raise InputError(
            "expected a way to quantize, found --quantization none. Leave this stage out: bundle and ship the exported directory itself."
        )
    task = task_of(*data)
    function = quantize_language_model if task.causal else quantize_onnx
    stage(output.output_dir, task, output.seed, function, model.source, quantize=quantize)


def bundle() -> None:
    _, model, *data, bundle, output = parse("bundle", ModelConfig, *TASK, BundleConfig, OutputConfig)

    from pipelines.edge.bundle import build_bundle

    stage(output.output_dir, task_of(*data), output.seed, build_bundle, model.source, bundle=bundle)


def verify() -> None:
    _, model, reference, *data, quantize = parse("verify", ModelConfig, ReferenceConfig, *TASK, quantize_kind())

    from pipelines.onnx.verify import verify_directory
    from pipelines.tasks.text_generation.quantize import verify_language_directory

    if reference.reference is None:
        raise InputError("expected the directory the model was made from, found none. Pass --reference.")
    task = task_of(*data)
    check = verify_language_directory if task.causal else verify_directory
    print(check(Path(model.source), Path(reference.reference), task, quantize.max_quality_drop))


def benchmark() -> None:
    _, models, *data, report = parse("benchmark", ModelsConfig, *TASK, ReportConfig)

    from pipelines.report.results import benchmark_directories

    if not models.models:
        raise InputError("expected the directories to time, found none. Pass --models with one or more.")
    print(benchmark_directories([Path(model) for model in models.models], task_of(*data), report))


def report() -> None:
    run_config, *data, settings, output = parse("report", *TASK, ReportConfig, OutputConfig)

    from pipelines.core.run import Run
    from pipelines.report.results import finished_stages, report_run

    if output.output_dir is None or not Path(output.output_dir).is_dir():
        raise InputError(f"expected the directory of a run, found {output.output_dir!r}. Pass --output_dir.")
    run = Run(output.output_dir, task_of(*data), output.seed)
    run.stages = finished_stages(run)
    report_run(run, "report", settings, run_config.given)


def push() -> None:
    _, settings = parse("push", PushConfig)

    from pipelines.core.run import MARKER, lock
    from pipelines.hub import push

    if settings.output_dir is None or not Path(settings.output_dir).is_dir():
        raise InputError(f"expected the directory of a run, found {settings.output_dir!r}. Pass --output_dir.")
    directory = Path(settings.output_dir)
    # No run changes these files between their check and their upload.
    held = lock(directory / ".lock") if (directory / MARKER).exists() else None
    push(directory, settings.hub_model_id, settings.hub_private_repo, settings.hub_token)
    if held is not None:
        held.release()


STAGE_COMMANDS: dict[str, Callable[[], None]] = {
    "fine-tune": fine_tune,
    "distill": distill,
    "prune": prune,
    "export": export,
    "quantize": quantize,
    "bundle": bundle,
    "verify": verify,
    "benchmark": benchmark,
    "report": report,
    "push": push,
}


def parse(name: str, *kinds: Any) -> list[Any]:
    parsed = parse_config([RunConfig, *kinds], argv=sys.argv[2:], program=f"python -m pipelines {name}")
    if any(getattr(settings, "push_to_hub", False) for settings in parsed):
        raise InputError(
            f"expected no --push_to_hub for the single stage {name}, found it set. Only a whole verified run is published: "
            "pass it to a recipe, or use 'python -m pipelines push'."
        )
    return parsed


def quantize_kind() -> type:
    """The flags of quantization, which are others for a language model."""
    return LanguageQuantizeConfig if peek("task", sys.argv[2:]) == "text-generation" else QuantizeConfig


def task_of(data: TaskConfig, augmentation: AugmentConfig, language: LanguageConfig) -> Any:
    from pipelines.tasks.image_classification import ImageClassification
    from pipelines.tasks.text_classification import TextClassification
    from pipelines.tasks.text_generation.task import LanguageModeling

    if data.task == LanguageModeling.name:
        return LanguageModeling(data, language)

    if data.task == ImageClassification.name:
        return ImageClassification(data, augmentation)
    return TextClassification(data)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
    elif name in STAGE_COMMANDS:
        STAGE_COMMANDS[name]()
    else:
        print(f"error: expected one of the stages {', '.join(STAGE_COMMANDS)}, found {name!r}.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_main(main)
