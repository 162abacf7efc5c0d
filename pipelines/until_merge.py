"""MERGE: delete this file. What takes any task today only by asking which it is; the names and signatures are those of the rooms to be.

from pipelines.onnx.export import export_onnx
from pipelines.onnx.quantize import quantize_onnx
from pipelines.onnx.verify import verify_directory
from pipelines.training.soft_targets import compute_soft_targets
from pipelines.core.config import QuantizeConfig
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.core.config import DistillConfig, LanguageQuantizeConfig, QuantizeConfig
from pipelines.core.run import Outcome
from pipelines.onnx import export, quantize, verify
from pipelines.tasks.text_generation import export as language_export
from pipelines.tasks.text_generation import quantize as language_quantize
from pipelines.training import soft_targets


def quantize_config(task: str) -> type:
    """The kind of QuantizeConfig, by the name of the task."""
    return type("QuantizeConfig", (LanguageQuantizeConfig,), {}) if task == "text-generation" else QuantizeConfig


def stored_settings(distill: DistillConfig) -> DistillConfig:
    """The settings that stored soft targets depend on, the others left at their defaults, so that a change of these computes nothing."""
    return DistillConfig(temperature=distill.temperature, soft_target_top_k=distill.soft_target_top_k)


def compute_soft_targets(source: str, directory: Path, task: Any, distill: Any) -> Outcome:
    if task.causal:
        return soft_targets.compute_token_soft_targets(
            source, directory, task, distill.temperature, distill.soft_target_top_k
        )
    return soft_targets.compute_soft_targets(source, directory, task)


def export_onnx(source: str, directory: Path, task: Any) -> Outcome:
    return (language_export.export_language_model if task.causal else export.export_onnx)(source, directory, task)


def quantize_onnx(source: str, directory: Path, task: Any, quantize: Any) -> Outcome:
    if task.causal:
        return language_quantize.quantize_language_model(source, directory, task, quantize)
    return quantize_classifier(source, directory, task, quantize)


quantize_classifier = quantize.quantize_onnx


def verify_directory(directory: Path, reference: Path, task: Any, max_quality_drop: float) -> dict[str, Any]:
    check = language_quantize.verify_language_directory if task.causal else verify.verify_directory
    return check(directory, reference, task, max_quality_drop)
