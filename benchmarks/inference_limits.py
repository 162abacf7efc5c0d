"""What ONNX Runtime could reach on this machine: a model's matrix products alone, one at a time, and the memory's bandwidth.

A model's limit is the time of its products and nothing else: those with weights as MatMul (fp32) or MatMulInteger (int8, u8 by s8),
those inside attention as fp32 MatMul, each measured in a session of its own at the very sizes that the model has.
`python -m benchmarks.inference_limits SPEC` is the worker.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# (how often, matrices, rows, inner size, columns); more than one matrix: both sides change from call to call, as in attention.
Product = tuple[int, int, int, int, int]
BANDWIDTH_WIDTH = 8192  # a weight of 256 MB, read once a call


def products_of(model: Any, feed: dict[str, Any], first_token_only: bool = False) -> list[Product]:
    """The matrix products of one call of a torch model, each size once.

    With `first_token_only` the last layer has one query, and no other tokens behind its attention: all that a classifier that reads
    the first token needs, and that our graphs compute.
    """
    from collections import Counter

    import torch
    from transformers.pytorch_utils import Conv1D

    from pipelines.models.families import groups_of, layers_of, unit_width

    found: Counter[tuple[int, int, int, int]] = Counter()
    heads, last = groups_of(model.config)["heads"], list(layers_of(model))[-1]
    size = unit_width(last, heads)
    packed = len(heads.outputs) == 1
    queries = {layer.get_submodule(heads.outputs[0].path) for layer in layers_of(model)}
    keys_and_values = {last.get_submodule(outputs.path) for outputs in heads.outputs[1:]}
    of_one_token = set(last.modules()) - keys_and_values if first_token_only else set()

    def note(module: Any, inputs: tuple[Any, ...]) -> None:
        columns, inner = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        batch, tokens = inputs[0].shape[0], inputs[0].numel() // inner // inputs[0].shape[0]
        seen = 1 if module in of_one_token else tokens
        found[1, batch * seen, inner, columns] += 1
        if module in queries:
            heads = columns // size // (3 if packed else 1)
            found[batch * heads, seen, size, tokens] += 1
            found[batch * heads, seen, tokens, size] += 1

    modules = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    hooks = [module.register_forward_pre_hook(note) for module in modules]
    with torch.inference_mode():
        model(**{name: torch.from_numpy(array) for name, array in feed.items()})
    for hook in hooks:
        hook.remove()
    return [(count, *sizes) for sizes, count in sorted(found.items())]


def operations(products: list[Product]) -> int:
    """Multiplications and additions."""
    return sum(2 * count * matrices * rows * inner * columns for count, matrices, rows, inner, columns in products)


def product_seconds(sizes: tuple[int, int, int, int], kind: str, threads: int, seconds: float) -> float:
    """The shortest time of one product in ONNX Runtime; `kind` is "fp32" or "int8"."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    matrices, rows, inner, columns = sizes
    random = np.random.default_rng(0)
    integers = kind == "int8"
    left_shape, right_shape = [rows, inner], [inner, columns]
    if matrices > 1:
        left_shape, right_shape = [matrices, *left_shape], [matrices, *right_shape]
    if integers:
        left = random.integers(0, 255, left_shape, np.uint8)
        right = random.integers(-127, 127, right_shape, np.int8)
        zeros = [
            numpy_helper.from_array(np.zeros((), kind.dtype), name) for name, kind in (("zl", left), ("zr", right))
        ]
        node = helper.make_node("MatMulInteger", ["left", "right", "zl", "zr"], ["product"])
        types = TensorProto.UINT8, TensorProto.INT32
    else:
        left, right = (random.standard_normal(shape, np.float32) for shape in (left_shape, right_shape))
        zeros = []
        node = helper.make_node("MatMul", ["left", "right"], ["product"])
        types = TensorProto.FLOAT, TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("left", types[0], left_shape)]
    feed = {"left": left}
    if matrices > 1:
        inputs.append(helper.make_tensor_value_info("right", types[0], right_shape))
        feed["right"] = right
    else:
        zeros.append(numpy_helper.from_array(right, "right"))
    product = helper.make_tensor_value_info("product", types[1], [*left_shape[:-1], columns])
    graph = helper.make_graph([node], "product", inputs, [product], zeros)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    # Buffers that stay: the time is that of the product, not of finding room for it.
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_cpu_input(name, array)
    output = np.empty([*left_shape[:-1], columns], np.int32 if integers else np.float32)
    binding.bind_output("product", "cpu", 0, output.dtype.type, output.shape, output.ctypes.data)
    best, calls, end = float("inf"), 0, time.perf_counter() + seconds
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best


def measure_limits(sizes: list[tuple[int, int, int, int]], threads: int, seconds: float) -> dict[str, Any]:
    """Seconds of each product of these sizes, and the bandwidths in bytes a second."""
    kinds = ("fp32", "int8")
    timed = {
        # Attention's own products are fp32 in every row.
        kind: [product_seconds(tuple(one), kind if one[0] == 1 else "fp32", threads, seconds) for one in sizes]
        for kind in kinds
    }
    large = (1, 1, BANDWIDTH_WIDTH, BANDWIDTH_WIDTH)
    bandwidth = 4 * BANDWIDTH_WIDTH**2 / product_seconds(large, "fp32", threads, 1.0)
    return timed | {"batch_1_bandwidth": bandwidth}


def limit_seconds(products: list[Product], sizes: list[tuple[int, int, int, int]], seconds: list[float]) -> float:
    """The time of a model's products, one after another."""
    each = {tuple(one): time for one, time in zip(sizes, seconds, strict=True)}
    return sum(count * each[tuple(size)] for count, *size in products)


def work(spec_file: Path) -> None:
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    result = measure_limits([tuple(one) for one in spec["sizes"]], spec["threads"], spec["seconds"])
    (spec_file.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
