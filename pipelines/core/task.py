"""What the stages may ask of a task."""

from __future__ import annotations

from typing import Literal

IGNORED = -100  # a label that takes no part in the loss, as everywhere in transformers

# What becomes of a checkpoint's head: it must be for exactly the task's labels, or a fresh one is made where the checkpoint has
# none, or also where it has one for other labels.
Head = Literal["required", "new if none", "new if other"]
