"""Every family: what is cut is what was meant, in memory, on disk, with padding and with a cache."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import example_inputs, tiny_model
from pipelines.core.errors import InputError
from pipelines.models.families import (
    FAMILIES,
    config_changes,
    depths_of,
    family_of,
    groups_of,
    layer_count,
    layers_of,
    queries_keys_values,
    removable,
    unit_count,
    unit_width,
)
from pipelines.models.removal import cut, load_model, remove_zeros, shape_of, with_stock_shapes
from pipelines.models.students import student_from_layers

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import families as tiny  # noqa: E402

HEADS = [np.array([0, 3]), np.array([1]), np.array([0, 1, 2, 3]), np.array([2, 3])]
NEURONS = [np.arange(10), np.arange(5, 64), np.array([1, 4, 9, 63]), np.arange(64)]
NOT_REMOVABLE = {
    ("mpnet", "heads"),
    *((name, "heads") for name in ("convnext", "convnextv2", "resnet")),
    *((name, "neurons") for name in ("convnextv2", "resnet")),
}
DECODERS = [name for name in FAMILIES if tiny.task_of(name) == "text-generation"]


def make(model_type: str, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of 4 layers with 4 units of heads and 64 neurons or more each, and a batch of inputs, padded where it is text.

    Its weights are large enough that every part of it shows in the logits.
    """
    model = tiny.tiny_model(model_type, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.dim() > 1 else 0.1) * torch.randn_like(parameter))
    if tiny.task_of(model_type) == "image-classification":
        return model, {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    inputs = example_inputs()
    # Decoders are padded on the left.
    return model, {name: values.flip(1) for name, values in inputs.items()} if model_type in DECODERS else inputs


def silence(model: Any, kind: str, kept: list[np.ndarray]) -> None:
    """Set to zero, by hand and in stock shapes, what reads the units that are not kept."""
    group = groups_of(model.config)[kind]
    for layer, units in zip(layers_of(model), kept, strict=True):
        linear = layer.get_submodule(group.input)
        weight = linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data
        width = unit_width(layer, group)
        for unit in set(range(unit_count(layer, group))) - set(units.tolist()):
            weight[:, unit * width : (unit + 1) * width] = 0


def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits where there is no padding."""
    with torch.inference_mode():
        logits = model(**inputs).logits
    return logits[inputs["attention_mask"].bool()] if logits.dim() == 3 else logits


def check_cut(model: Any, inputs: dict[str, torch.Tensor], tmp_path: Any) -> Any:
    """Cut `model` unevenly and check it against one that is silenced, in memory and from disk; return both."""
    kinds = groups_of(model.config)
    choices, layers = {"heads": HEADS, "neurons": NEURONS}, len(layers_of(model))
    kept = {kind: choices[kind][:layers] for kind in kinds}
    before = logits_of(model, inputs)
    silenced = copy.deepcopy(model)
    for kind in kinds:
        silence(silenced, kind, kept[kind])
    expected = logits_of(silenced, inputs)
    assert (before - expected).abs().max() > 1e-2  # what was removed did matter
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cut(model, **kept)
    assert shape_of(model) == {kind: [len(units) for units in kept[kind]] for kind in kinds}
    assert sum(parameter.numel() for parameter in model.parameters()) < parameters
    torch.testing.assert_close(logits_of(model, inputs), expected, atol=1e-5, rtol=1e-5)
    for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
        assert (linear.out_features, linear.in_features) == linear.weight.shape

    with_stock_shapes(model).save_pretrained(tmp_path)
    stock, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits_of(stock.eval(), inputs), expected, atol=1e-5, rtol=1e-5)
    small = load_model(tmp_path)
    assert shape_of(small) == shape_of(model)
    torch.testing.assert_close(logits_of(small, inputs), expected, atol=1e-5, rtol=1e-5)
    return silenced


@pytest.mark.parametrize("model_type", sorted({*FAMILIES} - {"convnextv2", "resnet"}))
def test_a_cut_model_equals_the_silenced_one_in_memory_and_from_disk(model_type, tmp_path):
    model, inputs = make(model_type)
    kinds = set(removable(model.config)) - {
        kind for kind, found in removable(model.config).items() if isinstance(found, str)
    }
    assert kinds == {"heads", "neurons"} - {kind for name, kind in NOT_REMOVABLE if name == model_type}
    silenced = check_cut(model, inputs, tmp_path)
    if "attention_mask" in inputs:
        assert inputs["attention_mask"].min() == 0
    if model_type in DECODERS:
        options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        for generated in (model, load_model(tmp_path)):
            found, expected = (each.generate(**inputs, **options) for each in (generated, silenced))
            assert found.sequences.tolist() == expected.sequences.tolist()
            torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
        # As an export does: the implementation of attention is set after the cut.
        model.set_attn_implementation("eager")
        silenced.set_attn_implementation("eager")
        torch.testing.assert_close(logits_of(model, inputs), logits_of(silenced, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_heads_and_neurons_are_cut_apart_from_one_another(model_type):
    for kind, kept in (("heads", HEADS), ("neurons", NEURONS)):
        model, inputs = make(model_type)
        silenced, whole = copy.deepcopy(model), shape_of(model)
        silence(silenced, kind, kept)
        cut(model, **{kind: kept})
        assert shape_of(model) == whole | {kind: [len(units) for units in kept]}
        torch.testing.assert_close(logits_of(model, inputs), logits_of(silenced, inputs), atol=1e-5, rtol=1e-5)


def test_a_model_is_cut_again():
    model, inputs = make("qwen3")
    silenced = copy.deepcopy(model)
    silence(silenced, "heads", [np.array([3])] * 4)
    cut(model, heads=[np.array([0, 3])] * 4)
    cut(model, heads=[np.array([1])] * 4)
    assert shape_of(model)["heads"] == [1] * 4
    torch.testing.assert_close(logits_of(model, inputs), logits_of(silenced, inputs), atol=1e-5, rtol=1e-5)


def test_a_dense_model_has_nothing_to_remove():
    model, inputs = make("bert")
    expected = logits_of(model, inputs)
    assert shape_of(remove_zeros(model)) == {"heads": [4] * 4, "neurons": [64] * 4}
    torch.testing.assert_close(logits_of(model, inputs), expected)


def test_a_layer_keeps_one_unit_though_all_are_zero():
    model, inputs = make("bert")
    silence(model, "heads", [np.array([], dtype=int), *[np.arange(4)] * 3])
    expected = logits_of(model, inputs)
    assert shape_of(remove_zeros(model))["heads"] == [1, 4, 4, 4]
    torch.testing.assert_close(logits_of(model, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_is_loaded_in_float32(dtype, tmp_path):
    model, inputs = make("llama")
    cut(model, HEADS, NEURONS)
    with_stock_shapes(model).to(dtype).save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).dtype == dtype
    small = load_model(tmp_path)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}
    assert shape_of(small) == shape_of(model)
    assert logits_of(small, inputs).numpy().dtype == np.float32
    with_stock_shapes(small).save_pretrained(tmp_path / "again")
    assert type(model).from_pretrained(tmp_path / "again").dtype == torch.float32


def test_what_a_family_does_not_allow():
    model = tiny_model("squeezebert")
    assert all("not known" in str(reason) for reason in removable(model.config).values())
    assert remove_zeros(model) is model
    with pytest.raises(InputError, match="found 'squeezebert'"):
        family_of(model.config)
    shared = make("beit", use_relative_position_bias=False, use_shared_relative_position_bias=True)[0]
    mixed = make("deberta", talking_head=True)[0]
    for model in (shared, mixed):
        assert {kind for kind, found in removable(model.config).items() if isinstance(found, str)} == {"heads"}
    with pytest.raises(InputError, match="--hidden_state_weight 0"):
        layer_count(make("swin")[0].config)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("modernbert", {"classifier_pooling": "cls", "layer_types": ["full_attention", *["sliding_attention"] * 3]}),
        ("deberta", {"talking_head": True}),
        ("deberta-v2", {"share_att_key": False, "conv_kernel_size": 3}),
        ("albert", {"num_hidden_groups": 2, "inner_group_num": 2}),
        ("dinov2", {"use_swiglu_ffn": True, "mlp_ratio": 3}),
        ("beit", {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
        ("gpt_neox", {"use_parallel_residual": False}),
    ],
)
def test_variants_of_a_family_are_cut_as_well(model_type, changes, tmp_path):
    model, inputs = make(model_type, **changes)
    check_cut(model, inputs, tmp_path)


# ---- Students


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_student_of_all_layers_is_the_teacher_and_one_of_some_is_what_is_left_of_it(model_type, tmp_path):
    teacher, inputs = make(model_type)
    depths = depths_of(teacher.config)
    everything = student_from_layers(teacher, list(range(sum(depths)))).eval()
    torch.testing.assert_close(logits_of(everything, inputs), logits_of(teacher, inputs))
    kept = [0, 2] if len(depths) == 1 else [0, 2, 3]  # one of the first stage, both of the second
    student = student_from_layers(teacher, kept).eval()
    assert sum(depths_of(student.config)) == len(kept)
    if model_type == "albert":
        expected = make("albert", num_hidden_layers=2)[0]
    else:
        assert len(layers_of(student)) == len(kept)
        expected = remove_layers(copy.deepcopy(teacher), kept)
    torch.testing.assert_close(logits_of(student, inputs), logits_of(expected, inputs))
    student.save_pretrained(tmp_path)
    reread = type(student).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(reread, inputs), logits_of(student, inputs))


def remove_layers(model: Any, kept: list[int]) -> Any:
    """Make `model` pass the others by: by hand, in its lists of modules."""
    for index, layer in reversed(list(enumerate(layers_of(model)))):
        for modules in [one for one in model.modules() if isinstance(one, nn.ModuleList | nn.Sequential)]:
            place = next((place for place, one in enumerate(modules) if one is layer), None)
            if place is not None and index not in kept:
                del modules[place]
    for number, layer in enumerate(layers_of(model)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # where the cache has it
    for name, values in config_changes(model.config, kept).items():
        setattr(model.config, name, values)
    return model


@pytest.mark.parametrize(
    ("model_type", "kind"), [("modernbert", "full_attention"), ("gemma3_text", "sliding_attention")]
)
def test_layers_keep_their_kind_of_attention(model_type, kind):
    teacher = make(model_type)[0]
    kinds = teacher.config.layer_types
    student = student_from_layers(teacher, [0, 2, 3])
    assert student.config.layer_types == [kinds[0], kinds[2], kinds[3]]
    assert kinds[0] == kind
    assert len(set(kinds)) == 2


def test_layers_without_rotary_positions_stay_without():
    teacher = make("smollm3", no_rope_layer_interval=2)[0]
    assert teacher.config.no_rope_layers == [1, 0, 1, 0]
    student = student_from_layers(teacher, [1, 2])
    assert [layer.self_attn.use_rope for layer in layers_of(student)] == [0, 1]


@pytest.mark.parametrize("kept", [[0, 3], [1, 2]])
def test_layers_whose_scores_are_divided_by_their_number_keep_their_attention(kept):
    """transformers counts the layers of the student anew."""
    teacher, inputs = make("gpt2", scale_attn_by_inverse_layer_idx=True)
    student = student_from_layers(teacher, kept).eval()
    expected = logits_of(remove_layers(copy.deepcopy(teacher), kept), inputs)
    torch.testing.assert_close(logits_of(student, inputs), expected, atol=1e-5, rtol=1e-5)


# Queries and keys in these are compared as the maps give them, once rotary positions are all 0.
PLAIN = {"bert", "distilbert", "albert", "modernbert", "gpt2", "gptj", "gpt_neox", "opt", "llama", "phi3", "vit"}


@pytest.mark.parametrize(
    "model_type", sorted({*FAMILIES} - {"mpnet", "convnext", "convnextv2", "resnet", "swin", "deberta"})
)
def test_queries_keys_and_values_are_those_that_attention_is_computed_from(model_type):
    """Of the last layer: the values that the maps weigh are what the output map reads, and the maps follow from queries and keys."""
    model, inputs = make(model_type)
    inputs.pop("attention_mask", None)
    if "rope" in str(model.config) or model_type in ("gptj", "gpt_neox"):
        inputs["position_ids"] = torch.zeros_like(inputs["input_ids"])
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    layer = layers_of(model)[-1]
    group: Any = family_of(model.config).heads
    read: list[torch.Tensor] = []
    layer.get_submodule(group.input).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad(), queries_keys_values(model, 3) as found:
        maps = model(**inputs, output_attentions=True).attentions[3]
    queries, keys, values = found
    heads, units = maps.shape[1], unit_count(layer, group)
    width = queries.shape[-1] // heads

    def split(vectors: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, width); query heads that share a key are beside one another."""
        own = vectors.unflatten(-1, (-1, width)).transpose(1, 2)
        assert own.shape[1] in (heads, units)
        return own.repeat_interleave(heads // own.shape[1], dim=1)

    torch.testing.assert_close((maps @ split(values)).transpose(1, 2).flatten(-2), read[-1].view(queries.shape))
    if model_type in PLAIN:
        scores = split(queries) @ split(keys).transpose(-1, -2) / width**0.5
        if model_type in DECODERS:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), maps, atol=1e-5, rtol=1e-4)
    assert not layer.get_submodule(group.outputs[0].path)._forward_hooks
