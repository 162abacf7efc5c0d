"""Language models in ONNX: one graph with a KV cache, the torch-free loop around it, and its quantized forms."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoTokenizer

from conftest import tiny_language_model
from pipelines.core.config import DataConfig, GateConfig, LanguageConfig, QuantizeConfig
from pipelines.core.errors import InputError, VerificationError
from pipelines.models.removal import cut, load_model, shape_of, with_stock_shapes
from pipelines.onnx import file as onnx_file
from pipelines.onnx.export import export_graph, export_onnx
from pipelines.onnx.file import OLDER
from pipelines.onnx.fuse import fuse_for_onnxruntime
from pipelines.onnx.measure import Subject, measure, paired_ratios
from pipelines.onnx.predict import empty_cache, score_beside
from pipelines.onnx.quantize import SCHEMES, quantize_onnx
from pipelines.onnx.runtimes import needed_versions
from pipelines.onnx.verify import verify_against_torch, verify_directory, verify_same_graph
from pipelines.runtime.generate import LanguageModel, Sampling, choose, keep_likely, penalize
from pipelines.runtime.infer import open_session
from pipelines.tasks.text_generation.export import graph_with_cache, torch_greedy, verify_generation
from pipelines.tasks.text_generation.measure import time_generation
from pipelines.tasks.text_generation.task import LanguageModeling
from pipelines.training.fine_tune import validation_metrics

# Bits of the embeddings, and of a head tied to them.
TABLE_BITS = {"dynamic_int8": 8, "int8_blocks": 8, "int4_blocks": 4, "int4_blocks_int8_embeddings": 8}


@pytest.fixture(scope="module")
def exported(language_task, language_model_dir, tmp_path_factory):
    """A GPT-2 whose layers keep 4, 1 and 3 heads and 128, 20 and 64 neurons, exported."""
    source, directory = tmp_path_factory.mktemp("pruned"), tmp_path_factory.mktemp("onnx")
    model = language_task.load_model(str(language_model_dir)).eval()
    cut(
        model,
        [np.arange(4), np.array([2]), np.array([0, 1, 3])],
        [np.arange(128), np.arange(20) * 5, np.arange(64)],
    )
    with_stock_shapes(model).save_pretrained(source)
    language_task.load_processor(str(language_model_dir)).save_pretrained(source)
    outcome = export_onnx(str(source), directory, language_task)
    return source, directory, outcome


def test_windows_beyond_the_models_positions_are_refused(language_text, language_model_dir, tmp_path):
    task = LanguageModeling(DataConfig(dataset=str(language_text), max_length=65), LanguageConfig())
    with pytest.raises(InputError, match="--max_length of at most 64"):
        export_onnx(str(language_model_dir), tmp_path, task)


def test_weights_that_one_file_cannot_hold_go_beside_it(tmp_path, monkeypatch):
    """ONNX files are protobuf messages, which end at 2 GB."""
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    model = tiny_language_model(n_layer=1)
    export_graph(graph_with_cache(model), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").is_file()
    session, ids = open_session(tmp_path / "model.onnx"), np.arange(3, 11).reshape(1, 8)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)} | empty_cache(session, 1)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(session.run(["logits"], feed)[0], expected, rtol=1e-3, atol=1e-3)


def test_the_graph_is_the_model_with_and_without_a_past_and_generates_what_torch_generates(exported):
    _, directory, outcome = exported
    assert outcome.details["verification"]["largest_difference"] < 1e-4
    assert outcome.details["verification"]["padded_tokens"] == 5 + 4
    generation = outcome.details["verification"]["generation"]
    assert generation["prompts"] == 20
    assert generation["tokens"] == 2 * 20 * 16
    assert generation["ties"] == 0
    graph = onnx.load(directory / "model.onnx").graph
    assert {node.domain for node in graph.node} == {""}
    heads = [value.type.tensor_type.shape.dim[1].dim_value for value in graph.input if value.name.endswith(".key")]
    assert heads == [4, 1, 3]
    tables = [tensor for tensor in graph.initializer if 300 in tensor.dims]
    assert len(tables) == 1  # the head is tied to the embeddings, and stored once


def test_a_llama_style_model_exports_the_same_way(language_task, language_model_dir, tmp_path):
    tiny_language_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    language_task.load_processor(str(language_model_dir)).save_pretrained(tmp_path / "llama")
    (tmp_path / "onnx").mkdir()
    outcome = export_onnx(str(tmp_path / "llama"), tmp_path / "onnx", language_task)
    assert outcome.details["verification"]["generation"]["ties"] == 0


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("mistral", {"sliding_window": 24}, marks=pytest.mark.slow),
        ("gemma3_text", {"sliding_window": 3, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
        pytest.param("gpt_neox", {"rotary_pct": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_rotary_positions_and_sliding_windows_are_fused_and_hold_beyond_the_traced_length(family, settings, tmp_path):
    """The graph is traced with 8 tokens: fewer than one window, more than the other."""
    model = tiny_language_model(family, num_hidden_layers=2, **settings)
    if family == "mistral":  # two queries share each key
        cut(model, [np.arange(2), np.array([1])], [np.arange(64), np.arange(20)])
    export_graph(graph_with_cache(model), tmp_path / "model.onnx")
    counts = fuse_for_onnxruntime(tmp_path / "model.onnx", tmp_path / "fused.onnx")
    assert counts["attention"] == counts["attention_blocks"] == 2
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
    assert operators["RotaryEmbedding"] == 4
    assert operators["RMSNormalization"] == {"mistral": 5, "gemma3_text": 13, "gpt_neox": 0}[family]
    ids = np.random.default_rng(0).integers(1, 300, (2, 60))
    mask = np.ones_like(ids)
    mask[1, :7] = 0
    with torch.inference_mode():
        positions = torch.from_numpy((mask.cumsum(1) - 1).clip(0))
        expected = model(torch.from_numpy(ids), torch.from_numpy(mask), position_ids=positions).logits.numpy()
    for session in map(open_session, (tmp_path / "model.onnx", tmp_path / "fused.onnx")):
        cache, names = empty_cache(session, 2), [value.name for value in session.get_outputs()]
        for start, stop in [(0, 10), *((token, token + 1) for token in range(10, 60))]:
            feed = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
            outputs = dict(zip(names, session.run(names, feed | cache), strict=True))
            cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
            seen = mask[:, start:stop].astype(bool)
            np.testing.assert_allclose(outputs["logits"][seen], expected[:, start:stop][seen], rtol=1e-3, atol=1e-3)


def test_a_continuation_passes_the_length_from_which_phi3_turns_all_tokens_otherwise(
    language_task, language_model_dir, tmp_path
):
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 10000.0}
    model = tiny_language_model(
        "phi3", num_hidden_layers=1, original_max_position_embeddings=16, rope_parameters=longrope
    )
    export_graph(graph_with_cache(model), tmp_path / "model.onnx")
    model.config.save_pretrained(tmp_path)
    edge = LanguageModel(tmp_path, open_session(tmp_path / "model.onnx", 1))
    edge.end_tokens = []
    tokenizer = language_task.load_processor(str(language_model_dir))
    prompts = [list(range(5, 5 + length)) for length in (1, 7, 15, 16, 17, 20)]
    for group in [*([prompt] for prompt in prompts), prompts[:3]]:
        found = edge.generate_tokens(group, Sampling(max_new_tokens=24))
        assert found == torch_greedy(model, tokenizer, group, 24), list(map(len, group))


def test_onnx_and_torch_score_text_alike(exported, language_task):
    source, directory, _ = exported
    processor = language_task.load_processor(str(source))
    from_torch = validation_metrics(load_model(source), language_task, processor)
    from_onnx, _ = score_beside(directory / "model.onnx", language_task, processor)
    assert from_onnx["tokens"] == from_torch["tokens"]
    for name in ("perplexity", "bits_per_byte", "next_token_accuracy"):
        assert from_onnx[name] == pytest.approx(from_torch[name], rel=1e-4)


def test_every_layer_becomes_one_attention_with_its_own_heads_and_cache(exported, language_task, tmp_path):
    source, directory, _ = exported
    original, fused = directory / "model.onnx", tmp_path / "model.onnx"
    counts = fuse_for_onnxruntime(original, fused)
    assert counts == {"attention_blocks": 3, "attention": 3, "residual": 0, "first_token": 0}
    graph = onnx.load(fused).graph
    attention = [node for node in graph.node if node.op_type == "Attention"]
    heads = [next(one.i for one in node.attribute if one.name == "q_num_heads") for node in attention]
    assert heads == [4, 1, 3]
    assert {"Softmax", "Gemm", "GatherND"}.isdisjoint(node.op_type for node in graph.node)
    names = [value.name for value in onnx.load(original).graph.output]
    assert [value.name for value in graph.output] == names
    processor = language_task.load_processor(str(source))
    assert verify_same_graph(fused, original, language_task, processor)["largest_difference"] < 1e-4
    verify_against_torch(fused, load_model(source), language_task, processor)
    sessions = [open_session(path) for path in (original, fused)]
    generator = np.random.default_rng(0)
    for batch, past, new, padding in ((1, 0, 1, 0), (1, 9, 1, 0), (3, 9, 1, 4), (2, 5, 3, 2)):
        feed = {
            "input_ids": generator.integers(5, 300, (batch, new)),
            "attention_mask": (np.arange(past + new) >= padding * np.arange(batch)[:, None] / batch).astype(np.int64),
        }
        for name, empty in empty_cache(sessions[0], batch).items():
            feed[name] = generator.standard_normal((batch, empty.shape[1], past, empty.shape[3]), np.float32)
        for expected, found in zip(*(session.run(names, feed) for session in sessions), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_graph_that_is_another_model_is_refused(exported, language_task, tmp_path):
    source, directory, _ = exported
    processor = language_task.load_processor(str(source))
    other = load_model(source)
    with torch.no_grad():
        other.transformer.h[2].mlp.c_proj.weight.mul_(-1)
    with pytest.raises(VerificationError, match="expected the logits"):
        verify_against_torch(directory / "model.onnx", other, language_task, processor)
    with pytest.raises(VerificationError, match="another token"):
        verify_generation(directory, other, language_task, processor)


# ---- The loop


def test_the_loop_needs_neither_torch_nor_this_library(exported, tmp_path):
    _, directory, _ = exported
    # Its files stand side by side in a bundle, too.
    runtime = Path(__file__).resolve().parents[2] / "pipelines" / "runtime"
    script = (
        f"import sys; sys.path.insert(0, {str(runtime)!r})\n"
        "from pathlib import Path; from generate import LanguageModel, Sampling; from infer import open_session\n"
        f"directory = Path({str(directory)!r})\n"
        "model = LanguageModel(directory, open_session(directory / 'model.onnx'))\n"
        "pieces = model.stream('team', Sampling(sampling_temperature=5.0))\n"
        "print('team', *pieces, sep='')\n"
        "assert not {'torch', 'transformers', 'pipelines', 'onnx'} & set(sys.modules), sorted(sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith("team")
    assert len(ran.stdout) > len("team\n")


def test_streamed_pieces_are_the_generated_text_and_stop_tokens_stop(exported):
    _, directory, _ = exported
    model = LanguageModel(directory, open_session(directory / "model.onnx", 1))
    sampling = Sampling(max_new_tokens=20, sampling_temperature=5.0, seed=3)  # hot enough to break characters apart
    whole = model.generate(["the team"], sampling)[0]
    assert "".join(model.stream("the team", sampling)) == whole
    assert model.generate(["the team"], sampling)[0] == whole
    assert model.generate(["the team"], Sampling(max_new_tokens=20, sampling_temperature=5.0, seed=4))[0] != whole
    tokens = model.generate_tokens([model.encode("the team")], sampling)[0]
    stop = tokens[5]
    stopped = Sampling(max_new_tokens=20, sampling_temperature=5.0, seed=3, stop_tokens=[stop])
    assert model.generate_tokens([model.encode("the team")], stopped)[0] == tokens[: tokens.index(stop)]


def test_generation_ends_where_the_model_has_no_position_left(exported):
    source, directory, _ = exported
    model = LanguageModel(directory, open_session(directory / "model.onnx", 1))
    model.end_tokens = []
    prompt = list(range(1, 61))
    assert len(model.generate_tokens([prompt], Sampling(max_new_tokens=50))[0]) == 64 - 60 + 1
    with pytest.raises(ValueError, match="fewer than 64"):
        model.generate_tokens([list(range(64))])
    expected = torch_greedy(load_model(source), AutoTokenizer.from_pretrained(source), [prompt], 5)
    assert model.generate_tokens([prompt], Sampling(max_new_tokens=5)) == expected


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.5, 20, 0.4)]
)
def test_what_may_be_sampled_is_what_transformers_would_sample_from(temperature, top_k, top_p):
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = np.random.default_rng(0).normal(size=100).astype(np.float32) * 4
    seen = [3, 7, 50]
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7), TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(torch.tensor([seen]), torch.from_numpy(logits.copy())[None])[0].numpy()
    found = keep_likely(penalize(logits, set(seen), 1.7) / temperature, top_k, top_p)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    generator = np.random.default_rng(0)
    sampling = Sampling(sampling_temperature=1.0, top_p=0.9)
    drawn = np.bincount([choose(logits, set(), sampling, generator) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(drawn, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)
    assert choose(logits, {0}, Sampling(repetition_penalty=3.0), generator) == 1


# ---- Quantization


@pytest.mark.parametrize("name", TABLE_BITS)
def test_quantized_weights_are_those_of_the_blocks_and_tables_are_stored_once(exported, name, tmp_path):
    _, directory, _ = exported
    fused, target = tmp_path / "fused.onnx", tmp_path / "model.onnx"
    fuse_for_onnxruntime(directory / "model.onnx", fused)
    SCHEMES[name](fused, target, QuantizeConfig(block_size=16), list)
    graph = onnx.load(target).graph
    tables = [tensor for tensor in graph.initializer if list(tensor.dims)[:1] == [300]]
    assert sorted(tensor.data_type for tensor in tables) == [
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.UINT8,
    ]  # scales, blocks
    operators = Counter(node.op_type for node in graph.node)
    assert operators["GatherBlockQuantized"] == 2  # tokens and positions
    assert operators["MatMulNBits"] == (1 if name == "dynamic_int8" else 13)
    assert operators["MatMulInteger"] == (12 if name == "dynamic_int8" else 0)
    assert operators["Attention"] == 3
    assert target.stat().st_size < (directory / "model.onnx").stat().st_size * 0.6

    # The embedding rows that the graph reads, against the rounding written out.
    bits = TABLE_BITS[name]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    blocks = next(array for array in constants.values() if array.dtype == np.uint8 and len(array) == 300)
    scales = next(array for array in constants.values() if array.dtype == np.float32 and array.shape == (300, 2))
    codes = blocks.astype(np.int64) if bits == 8 else np.stack([blocks & 15, blocks >> 4], axis=-1).astype(np.int64)
    table = (codes.reshape(300, 2, 16) - 2 ** (bits - 1)) * scales[:, :, None]
    original = next(
        numpy_helper.to_array(tensor)
        for tensor in onnx.load(directory / "model.onnx").graph.initializer
        if list(tensor.dims) == [300, 32]
    )
    assert (np.abs(table.reshape(300, 32) - original) <= np.abs(scales).repeat(16, axis=1) * 1.01).all()

    import onnxruntime

    probe = onnx.load(tmp_path / "model.onnx")
    gathers = [node for node in probe.graph.node if node.op_type == "GatherBlockQuantized"]
    gather = next(node for node in gathers if constants[node.input[2]].shape == (300, 2))
    probe.graph.output.append(onnx.helper.make_tensor_value_info(gather.output[0], onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(probe.SerializeToString())
    ids = np.array([[0, 5, 299]])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed |= {
        value.name: np.zeros((1, value.shape[1], 0, 8), np.float32)
        for value in session.get_inputs()
        if "past" in value.name
    }
    rows = session.run([gather.output[0]], feed)[0]
    np.testing.assert_allclose(rows[0], table.reshape(300, 32)[ids[0]], rtol=1e-5, atol=1e-6)


def fake_measure(subjects, seconds):
    """A model that is twice as large is twice as slow."""
    size = {subject.name: (subject.path / "model.onnx").stat().st_size / 1000 for subject in subjects}
    return {name: {"latency_ms": {"p50": milliseconds}} for name, milliseconds in size.items()}


def test_the_fastest_scheme_within_the_limit_is_shipped(exported, language_task, tmp_path, monkeypatch):
    _, directory, _ = exported
    monkeypatch.setattr("pipelines.onnx.quantize.measure", fake_measure)
    outcome = quantize_onnx(
        str(directory), tmp_path, language_task, QuantizeConfig(block_size=16, max_quality_drop=0.2)
    )
    assert outcome.details["fused_nodes"]["attention"] == 3
    tried = outcome.details["candidates"]
    assert list(tried) == list(TABLE_BITS)  # auto is what a language model is quantized by
    assert all(
        found["within_limit"] == (found["quality_lost"] <= 0.2) == ("p50_ms" in found) for found in tried.values()
    )
    allowed = {name: found["p50_ms"] for name, found in tried.items() if found["within_limit"]}
    assert len(allowed) > 1
    as_fast = [name for name in allowed if allowed[name] <= 1.05 * min(allowed.values())]
    assert outcome.details["scheme"] == min(as_fast, key=lambda name: tried[name]["quality_lost"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.onnx",
        "onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = LanguageModel(tmp_path, open_session(tmp_path / "model.onnx"))
    assert model.generate(["the team"], Sampling(max_new_tokens=3))
    # For older runtimes: neither newer operators nor embeddings in blocks.
    assert outcome.details["older_runtimes"]["kept"]
    needs = {name: found["onnxruntime"] for name, found in needed_versions(tmp_path).items()}
    assert needs["model.onnx"] == "1.23.0"
    assert needs[OLDER] < "1.20.1"
    session = open_session(tmp_path / OLDER)
    assert [value.name for value in session.get_outputs()] == [value.name for value in model.session.get_outputs()]
    json.dumps(outcome.details, allow_nan=False)
    verified = verify_directory(tmp_path, directory, language_task, GateConfig(max_quality_drop=0.2))
    assert verified["quality_lost"] == tried[outcome.details["scheme"]]["quality_lost"]
    (tmp_path / "none").mkdir()
    none = QuantizeConfig(quantization="int4_blocks", block_size=16, max_quality_drop=0.0)
    with pytest.raises(VerificationError, match="int4_blocks.*max_quality_drop"):
        quantize_onnx(str(directory), tmp_path / "none", language_task, none)


@pytest.mark.parametrize("name", ["dynamic_int8", "int8_blocks", "static_int8_minmax", "fp32"])
def test_a_model_above_what_one_file_holds_is_quantized_to_the_same(
    exported, language_task, name, tmp_path, monkeypatch
):
    _, directory, _ = exported
    quantize = QuantizeConfig(
        quantization=name.removesuffix("_minmax"), calibration="minmax", max_quality_drop=9.0, calibration_samples=8
    )
    scores = []
    for limit in (onnx_file.LARGEST_FILE, 1000):
        monkeypatch.setattr(onnx_file, "LARGEST_FILE", limit)
        target = tmp_path / str(limit)
        target.mkdir()
        outcome = quantize_onnx(str(directory), target, language_task, quantize)
        assert list(outcome.details["candidates"]) == [name]
        assert (target / "model.onnx.data").exists() == (limit == 1000)
        scores.append(outcome.metrics["validation"]["perplexity"])
    assert scores[0] == pytest.approx(scores[1])


def test_decoding_is_timed_in_fresh_processes(exported, language_task):
    source, directory, _ = exported
    workload = language_task.workload(directory, "test")
    assert workload.settings == {"prompt_tokens": 8, "new_tokens": 16}
    workload.settings["new_tokens"] = 8
    subjects = [
        Subject("torch", source, "transformers", workload),
        Subject("onnx", directory, "onnx", workload),
    ]
    found = measure(subjects, rounds=1, threads=1, seconds=0.1)
    for result in found.values():
        assert result["latency_ms"]["shape"] == [1, 8]
        assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p95"]
        assert result["time_to_first_token_ms"] > 0
        assert result["samples_per_second"] == result["tokens_per_second"] > 0
    assert found["onnx"]["peak_memory_bytes"] < found["torch"]["peak_memory_bytes"]
    assert paired_ratios(found, "torch", "onnx")["median"] > 1
    assert shape_of(load_model(source))["heads"] == [4, 1, 3]


def test_percentiles_are_of_tokens_and_none_is_taken_of_a_few():
    def generate(prompt, new):
        """The prompt takes 5 seconds, then every token 1, the last one 3."""
        return (4 + np.arange(1, new + 1) + np.eye(new)[-1] * 2 + start).tolist()

    start = 0.0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("time.perf_counter", lambda: start)
        found = time_generation(generate, 4, 4, seconds=0.0)
        assert found["time_to_first_token_ms"] == pytest.approx(5000)
        assert found["p50"] == pytest.approx(2000)  # of 5, 1, 1, 3, over and over
        assert found["p95"] == pytest.approx(5000)
        assert found["tokens_per_second"] == pytest.approx(0.4)
        assert "p95" not in time_generation(generate, 4, 3, seconds=0.0)  # 15 numbers


def test_fp32_is_the_same_text_of_one_attention_operator_a_layer(exported, language_task, tmp_path):
    _, directory, _ = exported
    outcome = quantize_onnx(str(directory), tmp_path, language_task, QuantizeConfig(quantization="fp32"))
    assert outcome.details["scheme"] == "fp32"
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert operators["Attention"] == 3
    assert not operators.keys() & {"MatMulNBits", "MatMulInteger", "GatherBlockQuantized", "Softmax"}
    prompts, sampling = ["the team", "shares"], Sampling(max_new_tokens=8)
    here, there = (LanguageModel(path, open_session(path / "model.onnx")) for path in (tmp_path, directory))
    assert here.generate(prompts, sampling) == there.generate(prompts, sampling)


@pytest.mark.slow
def test_a_slow_tokenizer_ends_in_an_onnx_file_without_a_bundle(language_task, tmp_path):
    from transformers import ByT5Tokenizer

    source, target = tmp_path / "model", tmp_path / "onnx"
    tiny_language_model(vocab_size=400).save_pretrained(source)
    assert language_task.bundle_obstacle(str(source)) is None  # a tokenizer is trained, and that is fast
    ByT5Tokenizer().save_pretrained(source)
    assert "slow" in language_task.bundle_obstacle(str(source))
    target.mkdir()
    outcome = export_onnx(str(source), target, language_task)
    assert outcome.details["verification"]["generation"]["tokens"] > 0
    subject = Subject("onnx", target, "onnx", language_task.workload(target, "validation"))
    assert measure([subject], rounds=1, seconds=0.1)["onnx"]["tokens_per_second"] > 0
