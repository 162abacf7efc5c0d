"""What is written weight by weight is the file that onnx_ir writes at once."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from pipelines.core.config import QuantizeConfig
from pipelines.onnx import file as onnx_file
from pipelines.onnx.predict import predict_onnx
from pipelines.onnx.quantize import quantize_onnx


def test_the_file_is_the_one_that_is_written_at_once(text_onnx, tmp_path, monkeypatch):
    model = ir.load(text_onnx / "onnx" / "model.onnx")
    ir.save(model, tmp_path / "at_once.onnx")
    onnx_file.save(model, tmp_path / "in_parts.onnx")
    expected, found = onnx.load(tmp_path / "at_once.onnx"), onnx.load(tmp_path / "in_parts.onnx")
    onnx.checker.check_model(found, full_check=True)
    assert list(found.graph.initializer) == list(expected.graph.initializer)
    assert len(found.graph.initializer) > 10
    assert list(found.graph.node) == list(expected.graph.node)
    assert found.opset_import == expected.opset_import
    # The model that was written is still whole.
    onnx_file.save(model, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "in_parts.onnx").read_bytes()

    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    onnx_file.save(model, tmp_path / "large.onnx")
    assert (tmp_path / "large.onnx.data").is_file()
    assert (tmp_path / "large.onnx").stat().st_size < (tmp_path / "again.onnx").stat().st_size / 2
    onnxruntime.InferenceSession(str(tmp_path / "large.onnx"), providers=["CPUExecutionProvider"])


def test_a_graph_whose_weights_are_beside_it_is_quantized_to_the_same_file(text_onnx, task, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    quantize_onnx(str(text_onnx / "onnx"), tmp_path, task, QuantizeConfig(max_quality_drop=1.0))
    expected = text_onnx / "quantized"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in expected.iterdir())
    processor = task.load_processor(str(expected))
    features, collate = task.features(processor)["validation"], task.collate(processor)
    answers = [predict_onnx(path / "model.onnx", features, collate) for path in (tmp_path, expected)]
    np.testing.assert_array_equal(*answers)
