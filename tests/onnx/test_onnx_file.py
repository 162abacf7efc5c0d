"""A model is one file, or, above what a file can hold, one with its weights beside it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from pipelines.core.config import QuantizeConfig
from pipelines.onnx import file as onnx_file
from pipelines.onnx.predict import predict_onnx
from pipelines.onnx.quantize import quantize_onnx


def test_weights_that_one_file_cannot_hold_go_beside_it(text_onnx, tmp_path, monkeypatch):
    """ONNX files are protobuf messages, which end at 2 GB."""
    source = text_onnx / "onnx" / "model.onnx"
    onnx_file.save(ir.load(source), tmp_path / "small.onnx")
    onnx.checker.check_model(tmp_path / "small.onnx", full_check=True)
    assert onnx_file.size_of(tmp_path / "small.onnx") == pytest.approx(source.stat().st_size, rel=0.01)

    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    onnx_file.save(ir.load(source), tmp_path / "large.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data", "small.onnx"]
    assert (tmp_path / "large.onnx").stat().st_size < source.stat().st_size / 2
    assert onnx_file.size_of(tmp_path / "large.onnx") == pytest.approx(source.stat().st_size, rel=0.05)
    onnxruntime.InferenceSession(str(tmp_path / "large.onnx"), providers=["CPUExecutionProvider"])


def test_a_graph_whose_weights_are_beside_it_is_quantized_to_the_same_file(text_onnx, task, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    quantize_onnx(str(text_onnx / "onnx"), tmp_path, task, QuantizeConfig(max_quality_drop=1.0))
    expected = text_onnx / "quantized"
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == names | {"model.onnx.data"}
    processor = task.load_processor(str(expected))
    features, collate = task.features(processor)["validation"], task.collate(processor)
    answers = [predict_onnx(path / "model.onnx", features, collate, task) for path in (tmp_path, expected)]
    np.testing.assert_array_equal(*answers)
