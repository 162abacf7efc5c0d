"""What made a stage: the part of its settings that its result depends on, and how two of them differ."""

from __future__ import annotations

import re
from dataclasses import asdict, is_dataclass
from typing import Any

# Settings of TrainingArguments that say how a training is run, watched or stored. A change of one of them leaves the trained weights
# what they are, so it redoes nothing. All other fields are part of what made a stage: whatever a newer transformers adds, too.
# Checkpoints (save_steps) stay, since the best of them is kept; so do workers (dataloader_num_workers), whose number decides their draws.
_NAMES = """
    output_dir logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica
    log_on_each_node report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    disable_tqdm push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    dataloader_pin_memory dataloader_prefetch_factor dataloader_multiprocessing_context resume_from_checkpoint
    restore_callback_states_from_checkpoint enable_jit_checkpoint save_only_model save_on_each_node save_total_limit
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_static_graph ddp_backend ddp_timeout per_device_eval_batch_size
    eval_accumulation_steps eval_on_start include_for_metrics include_num_input_tokens_seen skip_memory_metrics
    local_rank do_train do_eval do_predict
"""
NOT_IN_RESULT = frozenset(_NAMES.split())


def describe(value: Any) -> Any:
    """The part of a stage's argument that its result depends on, as JSON: the key under which a finished stage is found again."""
    from transformers import TrainingArguments  # and torch with it, which many who read a record have no use for

    if isinstance(value, TrainingArguments):
        settings = value.to_dict()
        return {name: settings[name] for name in sorted(settings) if name not in NOT_IN_RESULT}
    if hasattr(value, "describe"):
        return value.describe()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    return value


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The leaves in which two JSON values differ, one short phrase each."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            phrase
            for key in sorted(old.keys() | new.keys())
            for phrase in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    if old == new:
        return []
    # Hashes tell a person nothing; that the thing behind them changed does.
    hashed = any(isinstance(value, str) and re.fullmatch("[0-9a-f]{40,64}", value) for value in (old, new))
    return [f"{path.removesuffix('_fingerprint')} changed" + ("" if hashed else f" from {old!r} to {new!r}")]
