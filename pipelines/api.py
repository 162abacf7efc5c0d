"""Single stages as functions of paths, for a script or a notebook; what `pocketformers prune`, `export`, `quantize` and `verify` do.

Every setting of a stage, of its data and of its training is a keyword, by the name of the flag:

    from pipelines import export, quantize

    data = {"dataset": "reviews.csv", "text_column": "review"}
    export("runs/x/student", "out/onnx", **data)
    quantize("out/onnx", "out/int8", **data, max_quality_drop=0.02)

`task` is read from the model's config.json where it is left out. A finished stage is not rebuilt. Raises InputError for
settings that cannot be used, VerificationError for a model that is not what it was made from or lost more than its gate allows.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from pipelines.core.config import did_you_mean, make_settings
from pipelines.core.errors import InputError
from pipelines.tasks import DEFAULT_TASK, TASKS, task_of_model
from pipelines.verbs import VERBS, kinds_of


def prune(model: str | Path, output_dir: str | Path, *, teacher: str | Path, **settings: Any) -> Path:
    """Remove the least important heads and neurons of `model`, let it recover with the help of its teacher; return the new directory."""
    return _run("prune", model=model, output_dir=output_dir, teacher_model=teacher, **settings)


def export(model: str | Path, output_dir: str | Path, **settings: Any) -> Path:
    """Export a model directory as an ONNX directory in fp32, verified against it on validation examples; return the new directory."""
    return _run("export", model=model, output_dir=output_dir, **settings)


def quantize(model: str | Path, output_dir: str | Path, **settings: Any) -> Path:
    """Quantize the ONNX directory `model`, within `max_quality_drop` on validation examples; return the new directory."""
    return _run("quantize", model=model, output_dir=output_dir, **settings)


def verify(model: str | Path, reference: str | Path, **settings: Any) -> dict[str, Any]:
    """Verify the ONNX directory `model` against the directory that it was exported or quantized from; return what was compared."""
    return _run("verify", model=model, reference=reference, **settings)


def _run(verb: str, task: str | None = None, **settings: Any) -> Any:
    name = task or task_of_model(settings["model"]) or DEFAULT_TASK
    if name not in TASKS:
        raise InputError(f"expected a task out of {', '.join(TASKS)}, found {name!r}.{did_you_mean([name], TASKS)}")
    kinds = kinds_of(verb, name)
    known = {one.name for kind in kinds for one in fields(kind) if one.init}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise InputError(
            f"expected settings of {verb}, found {', '.join(unknown)}.{did_you_mean(unknown, known)} "
            f"'pocketformers {verb} --help' lists them all."
        )
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    return VERBS[verb][0](make_settings(kinds, {**plain, "task": name}))
