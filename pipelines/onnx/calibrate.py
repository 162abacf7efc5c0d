"""Static quantization: the ranges of activations are measured once, on training examples, and written into the graph (QDQ).

transformers.exporters' OnnxRuntimeQuantizer would calibrate on all batches at once, and so keep every activation of all of them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from pipelines.core.task import Arrays, Task
from pipelines.onnx.export import quiet_exporters
from pipelines.onnx.file import data_beside
from pipelines.onnx.predict import complete_feed, feed_of
from pipelines.runtime.infer import open_session

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

    def __init__(self, feeds: list[Arrays]) -> None:
        self.feeds = feeds
        self.set_range(0, len(feeds))

    def __len__(self) -> int:
        return len(self.feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.feeds[start_index:end_index])

    def get_next(self) -> Arrays | None:
        return next(self.left, None)


def calibration_feeds(task: Task, processor: Any, samples: int) -> list[Arrays]:
    """The first `samples` training examples, which are in random order, or all there are, in batches."""
    features, collate = task.features(processor)["train"], task.collate(processor)
    rows = range(min(samples, len(features)))
    return [feed_of(features, rows[start : start + _BATCH], collate) for start in rows[::_BATCH]]


def quantize_static_int8(source: Path, target: Path, feeds: list[Arrays], calibration: str, reduce_range: bool) -> None:
    """Quantize matmuls and convolutions of `source`, weights for each output channel, into the one file `target`.

    `calibration` is one of CALIBRATIONS; `reduce_range` as for quantize_dynamic_int8. Convolutions that read the graph's input
    stay in fp32: the patches of a ViT, the stem of a convolutional network. So does attention between its projections.
    """
    large = data_beside(source).exists()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".quantize-") as scratch, quiet_exporters():
        prepared = Path(scratch) / "model.onnx"
        # Folds batch normalization into the convolutions before them.
        quant_pre_process(source, prepared, skip_symbolic_shape=True, save_as_external_data=large)
        session = open_session(prepared)
        complete = [complete_feed(session, feed) for feed in feeds]
        del session
        graph = onnx.load(prepared, load_external_data=False).graph
        inputs = {value.name for value in graph.input}
        quantize_static(
            prepared,
            target,
            _Feeds(complete),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            nodes_to_exclude=[node.name for node in graph.node if node.op_type == "Conv" and inputs & {*node.input}],
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=large,
            calibrate_method=CALIBRATIONS[calibration],
            extra_options={
                "CalibStridedMinMax": 1,
                "CalibPercentile": _PERCENTILE,
                # Their results go on in fp32, to an addition or an activation; a convolution's kernel wants both ends in int8.
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            },
        )
