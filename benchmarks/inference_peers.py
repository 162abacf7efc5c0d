"""The peers' models, each made by the peer itself in an environment of its own; `inference.py` starts this, nobody else.

python -m benchmarks.inference_peers optimum MODEL OUTPUT          # optimum/ optimum_o2/ optimum_int8_avx2/ …
python -m benchmarks.inference_peers openvino ONNX_FILE FEEDS OUTPUT    # openvino/ openvino_int8/
"""

from __future__ import annotations

import sys
from pathlib import Path

PRESETS = ("avx2", "avx512_vnni")


def optimum(task: str, model: str, output: str) -> None:
    """Export with optimum-onnx, optimize at level O2, and quantize the export dynamically with the presets, all else as it comes."""
    from optimum.exporters.onnx import main_export
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    made = Path(output)
    main_export(model, made / "optimum", task=task, do_validation=False)
    main_export(model, made / "optimum_o2", task=task, optimize="O2", do_validation=False)
    # The presets are for the plain export: on an optimized one the quantizer stops ("Unable to find data type for weight_name").
    quantizer = ORTQuantizer.from_pretrained(made / "optimum", file_name="model.onnx")
    for preset in PRESETS:
        config = getattr(AutoQuantizationConfig, preset)(is_static=False)
        directory = made / f"optimum_int8_{preset}"
        quantizer.quantize(save_dir=directory, quantization_config=config)
        (directory / "model_quantized.onnx").rename(directory / "model.onnx")


def openvino(onnx_file: str, feeds_file: str, output: str) -> None:
    """Convert a plain fp32 ONNX file, and quantize it with NNCF on the feeds of training examples, as its guide for transformers says."""
    import nncf
    import openvino as ov

    from benchmarks.inference_worker import read_feeds

    for name in ("openvino", "openvino_int8"):
        (Path(output) / name).mkdir()
    model = ov.convert_model(onnx_file)
    ov.save_model(model, Path(output) / "openvino" / "model.xml", compress_to_fp16=False)
    names = {name for value in model.inputs for name in value.names}
    feeds = [{name: array for name, array in feed.items() if name in names} for feed in read_feeds(Path(feeds_file))]
    quantized = nncf.quantize(model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds))
    ov.save_model(quantized, Path(output) / "openvino_int8" / "model.xml", compress_to_fp16=False)


if __name__ == "__main__":
    {"optimum": optimum, "openvino": openvino}[sys.argv[1]](*sys.argv[2:])
