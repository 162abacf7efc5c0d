"""The command `pocketformers <verb> …` (or `python -m pipelines <verb> …`): transformers that fit in a pocket.

the whole chain, from a model and a data set to a small, verified, measured model
    compress      all stages below, in one directory        --task T --dataset D --output_dir RUN, or --demo
    fit           the model that meets a budget             D --teacher_model M --within 1 --under 10MB --under 5ms
    take          another model of what fit has tried       RUN ROW
    doctor        what can be done with a model             MODEL

train
    fine-tune     a pretrained model -> a teacher           --teacher_model M --dataset D --output_dir OUT
    soft-targets  a teacher -> its stored logits            --teacher_model M --dataset D --output_dir OUT
    distill       a teacher -> a small student              --teacher_model M --dataset D --output_dir OUT
    prune         a student -> a smaller student            --model M --teacher_model M --dataset D --output_dir OUT

convert
    export        a model directory -> verified fp32 ONNX   --model M --dataset D --output_dir OUT
    quantize      an ONNX directory -> verified int8 ONNX   --model M --dataset D --output_dir OUT
    verify        an ONNX directory against its source      --model M --reference M --dataset D
    benchmark     time directories against one another      --models M N … --dataset D

ship
    bundle        an ONNX directory -> files without torch  --model M --dataset D --output_dir OUT
    report        score and time a run's stages again       --output_dir RUN --dataset D, or --again: time only
    push          publish a verified run on the Hub         --output_dir RUN --hub_model_id NAME

`pocketformers <verb> --help` lists the flags of a verb. On several processes: accelerate launch -m pipelines <verb> …
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipelines.core.command import parse_config, run_main
from pipelines.core.config import Settings
from pipelines.core.errors import InputError

# What the words before the first flag are.
POSITIONAL = {"fit": ("dataset",), "take": ("output_dir", "row")}


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print(__doc__)
        return
    from pipelines.verbs import VERBS  # and torch with them, which the list above has no need of

    if verb not in VERBS:
        print(f"error: expected one of the verbs {', '.join(VERBS)}, found {verb!r}.", file=sys.stderr)
        sys.exit(2)
    result = VERBS[verb][0](read_settings(verb, sys.argv[2:]))
    if result is not None and not isinstance(result, Path):
        print(result if isinstance(result, str) else json.dumps(result, indent=2, default=str))


def read_settings(verb: str, argv: list[str]) -> Settings:
    """The settings of a verb. Which flags there are depends on the task, so that is looked up first."""
    from pipelines.chain import demo_config
    from pipelines.tasks import DEFAULT_TASK, TaskConfig, task_class, task_of_model
    from pipelines.verbs import DemoConfig, ModelConfig, ModelsConfig, OutputConfig, kinds_of

    program = f"pocketformers {verb}"
    for place, name in enumerate(POSITIONAL.get(verb, ("model",))):  # pocketformers doctor MODEL
        if argv[2 * place :] and not argv[2 * place].startswith("-"):
            argv = [*argv[: 2 * place], f"--{name}", *argv[2 * place :]]
    kinds = [TaskConfig, ModelConfig, ModelsConfig, OutputConfig, DemoConfig]
    first = parse_config(kinds, argv=argv, program=program, only=True)
    run = Path(first.output.output_dir or "", "teacher") if verb == "report" else None
    models = [first.model.model, *first.models.models, run]
    task = first.task.task or next(filter(None, map(task_of_model, models)), DEFAULT_TASK)
    demo = demo_config(task) if first.demo.demo and verb == "compress" else None
    settings = parse_config(kinds_of(verb, task), demo, argv, program, defaults=task_class(task).defaults)
    settings.task = TaskConfig(task)
    if verb not in ("compress", "fit", "push") and any(
        getattr(one, "push_to_hub", False) for one in vars(settings).values()
    ):
        raise InputError(
            f"expected no --push_to_hub for the single stage {verb}, found it set. Only a whole verified run is published: pass it to "
            "'compress' or a recipe, or use 'pocketformers push'."
        )
    return settings


def run() -> None:
    """The console script."""
    run_main(main)
