"""Which versions of other tools run a graph."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from pipelines.onnx.runtimes import needed_versions, oldest_runtime
from pipelines.report.card import versions_section


def make_graph(opset: int, operator: str = "Relu", ir_version: int = 10, **attributes: int) -> onnx.ModelProto:
    node = helper.make_node(operator, ["x"], ["y"], domain="com.microsoft" if attributes else "", **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph([node], "graph", values[:1], values[1:])
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid("com.microsoft", 1)] if attributes else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


@pytest.mark.parametrize(
    ("model", "runtime"),
    [
        (make_graph(18), "1.18.0"),
        (make_graph(18, ir_version=11), "1.23.0"),
        (make_graph(21), "1.18.0"),
        (make_graph(22), "1.21.0"),
        (make_graph(23), "1.23.0"),
        (make_graph(24), "1.24.0"),
        (make_graph(21, "MultiHeadAttention", num_heads=2), "1.19.0"),
        (make_graph(21, "GatherBlockQuantized", block_size=16), "1.20.0"),
        (make_graph(21, "GatherBlockQuantized", block_size=16, bits=8), "1.23.0"),
        (make_graph(21, "MatMulNBits", bits=4), "1.19.0"),
        (make_graph(21, "MatMulNBits", bits=8), "1.22.0"),
        (make_graph(23, "MatMulNBits", bits=4), "1.23.0"),
    ],
)
def test_the_oldest_runtime_follows_from_opset_and_operators(model, runtime):
    assert oldest_runtime(model) == runtime


def test_the_card_names_them_for_each_file(tmp_path):
    onnx.save(make_graph(23), tmp_path / "model.onnx")
    onnx.save(make_graph(21, "MatMulNBits", bits=4), tmp_path / "model_opset21.onnx")
    needs = needed_versions(tmp_path)
    assert needs["model.onnx"] == {"onnxruntime": "1.23.0", "transformers.js": "4.0.0"}
    report = {
        "stages": [
            {"name": "teacher", "path": "teacher", "needs": {}},
            {"name": "quantized", "path": "quantized", "needs": needs},
        ]
    }
    assert versions_section(report).splitlines()[2:] == [
        "- `quantized/model.onnx`: onnxruntime 1.23.0 or transformers.js 4.0.0, or newer",
        "- `quantized/model_opset21.onnx`: onnxruntime 1.19.0 or transformers.js 3.0.0, or newer",
    ]
    published = versions_section(report, {"quantized/model.onnx": "onnx/model_quantized.onnx"})
    assert "`onnx/model_quantized.onnx`: onnxruntime 1.23.0" in published
    assert versions_section({"stages": report["stages"][:1]}) == ""
