"""Static quantization: the ranges of activations are measured once, on training examples, and written into the graph (QDQ)."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from pipelines.onnx.export import quiet_exporters

# How a range is chosen: all that was seen; the range that keeps the distribution closest; all but the outermost values, since a
# few activations of a vision transformer are far larger than all others.
CALIBRATIONS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
_BATCH = 16
# The quantizer's own 99.999 leaves nothing out where a tensor has fewer than a hundred thousand values.
_PERCENTILE = 99.99


class _Feeds(CalibrationDataReader):
    """Batches by number, so that the calibrator can take them one at a time: it keeps every activation of those it takes."""

    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self.feeds = feeds
        self.set_range(0, len(feeds))

    def __len__(self) -> int:
        return len(self.feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.feeds[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)


def calibration_feeds(task: Any, processor: Any, samples: int) -> list[dict[str, np.ndarray]]:
    """The first `samples` training examples, which are in random order, or all there are, in batches."""
    features, collate = task.features(processor)["train"], task.collate(processor)
    count = min(samples, len(features))
    feeds = []
    for start in range(0, count, _BATCH):
        batch = collate([features[index] for index in range(start, min(start + _BATCH, count))])
        feeds.append({name: value.numpy() for name, value in batch.items() if name != "labels"})
    return feeds


def quantize_static_int8(
    source: Path, target: Path, feeds: list[dict[str, np.ndarray]], calibration: str, reduce_range: bool
) -> dict[str, Any]:
    """Quantize products and convolutions of `source`, weights for each output channel, into the one file `target`.

    `calibration` is one of CALIBRATIONS; `reduce_range` as for quantize_dynamic_int8. Convolutions that read the graph's input
    stay in fp32: the patches of a ViT, the stem of a convolutional network. So does attention between its projections.
    Returns "quantized" (how many of each type have int8 weights), "bytes_before" and "bytes_after".
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".quantize-") as scratch, quiet_exporters():
        prepared = Path(scratch) / "model.onnx"
        # Folds batch normalization into the convolutions before them.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        inputs = {value.name for value in graph.input}
        names = [value.name for value in graph.input]
        quantize_static(
            prepared,
            target,
            _Feeds([{name: feed[name] for name in names} for feed in feeds]),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            nodes_to_exclude=[node.name for node in graph.node if node.op_type == "Conv" and inputs & {*node.input}],
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CALIBRATIONS[calibration],
            extra_options={
                "CalibStridedMinMax": 1,
                "CalibPercentile": _PERCENTILE,
                # Their results go on in fp32, to an addition or an activation; a convolution's kernel wants both ends in int8.
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            },
        )
    quantized = onnx.load(target).graph
    int8 = {tensor.name for tensor in quantized.initializer if tensor.data_type == onnx.TensorProto.INT8}
    weights = {
        node.output[0] for node in quantized.node if node.op_type == "DequantizeLinear" and node.input[0] in int8
    }
    counts = Counter(node.op_type for node in quantized.node if weights & {*node.input})
    return {
        "quantized": dict(counts),
        "calibration_samples": sum(len(next(iter(feed.values()))) for feed in feeds),
        "bytes_before": source.stat().st_size,
        "bytes_after": target.stat().st_size,
    }
