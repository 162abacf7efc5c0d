"""Checkpoints of a training: which one it continues from after it was killed, and what tells whether one is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from pipelines.core.disk import write_json
from pipelines.core.records import damaged_files
from pipelines.runtime.infer import file_checksum

CHECKSUMS = "checksums.json"


class BestCheckpoint(transformers.TrainerCallback):
    """Finds the best checkpoint of a run that was moved since: the state of a checkpoint names it by its whole path."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)


class EarlyStopping(transformers.EarlyStoppingCallback):
    """Stops a training again that is resumed from a checkpoint of after its end."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        super().on_train_begin(args, state, control, **keywords)
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


def last_whole_checkpoint(directory: Path) -> str | None:
    """The latest checkpoint below `directory` that is whole, and so is the best one up to it; says why it passes one over.

    transformers' own get_last_checkpoint takes the latest folder, also one that a kill left half written, and a training whose best
    checkpoint is gone ends with the weights of the last.
    """
    from accelerate import PartialState

    found = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        damage = checkpoint_damage(checkpoint)
        if damage is None:
            best = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"]
            if best is None or checkpoint_damage(directory / Path(best).name) is None:
                return str(checkpoint)
            damage = f"the best one up to it, {Path(best).name}, is not whole"
        PartialState().print(f"{checkpoint.name}: not used, because {damage}", flush=True)
    return None


def write_checksums(checkpoint: Path) -> None:
    """Write what every file of a checkpoint hashes to: a checkpoint without that was not written to its end."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    hashes = {str(path.relative_to(checkpoint)): file_checksum(path) for path in files}
    write_json(checkpoint / CHECKSUMS, {"files": hashes})


def checkpoint_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint of the Trainer, None where every file of it has the bytes that were written."""
    if not (checkpoint / CHECKSUMS).is_file():
        return "it was not written to its end"
    try:
        changed = damaged_files(checkpoint, json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8")))
    except Exception:  # whatever a changed byte makes of it
        changed = [CHECKSUMS]
    return f"{changed[0]} is truncated, changed or missing" if changed else None
