"""The oldest ONNX Runtime and transformers.js that run a graph, by its opset and its operators."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime

from pipelines.runtime.infer import version_key

# By the highest opset that each reads, found by running graphs on the first release of every version.
RUNTIMES = {21: "1.18.0", 22: "1.21.0", 23: "1.23.0", 25: "1.24.0", 26: "1.25.0"}
OLDER_RUNTIME = "1.20.0"  # that a quantized model should open in, if need be in a form of its own
# Each is built on this ONNX Runtime, the older of that for the browser and that for Node.
TRANSFORMERS_JS = {"3.0.0": "1.19.2", "3.1.0": "1.20.1", "3.5.0": "1.21.0", "4.0.0": "1.24.3", "4.3.0": "1.30.0"}


def oldest_runtime(model: onnx.ModelProto) -> str:
    """The oldest ONNX Runtime that runs the model; its weights need not be loaded."""
    opset = next(opset.version for opset in model.opset_import if opset.domain == "")
    needed = [
        next(
            (version for limit, version in RUNTIMES.items() if opset <= limit),
            onnxruntime.__version__,
        ),
        "1.23.0" if model.ir_version > 10 else "1.18.0",
    ]
    for node in model.graph.node:
        bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), None)
        if node.op_type == "GatherBlockQuantized":  # the attribute `bits` is for weights of whole bytes
            needed.append("1.20.0" if bits is None else "1.23.0")
        elif node.op_type == "MatMulNBits" and bits == 8:
            needed.append("1.22.0")
        elif node.domain == "com.microsoft":
            needed.append("1.19.0")
    return max(needed, key=version_key)


def needed_versions(directory: Path) -> dict[str, dict[str, str | None]]:
    """Of each graph in a directory the oldest `onnxruntime`, and the oldest `transformers.js`, None where none was released yet."""
    found: dict[str, dict[str, str | None]] = {}
    for file in sorted(directory.rglob("*.onnx")):
        runtime = oldest_runtime(onnx.load(file, load_external_data=False))
        builds = (build for build, built_on in TRANSFORMERS_JS.items() if version_key(built_on) >= version_key(runtime))
        found[file.relative_to(directory).as_posix()] = {"onnxruntime": runtime, "transformers.js": next(builds, None)}
    return found
