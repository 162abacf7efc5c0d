"""The doctor says what can be done with a model, known or not, without weights and data."""

from __future__ import annotations

import sys

import pytest

from conftest import make_image_processor, make_tokenizer, tiny_config
from pipelines import cli
from pipelines.core.errors import InputError
from pipelines.doctor import diagnose


def lines_of(text: str) -> dict[str, str]:
    return {label.strip(): found for label, found in ((line[:16], line[17:]) for line in text.splitlines())}


def test_a_known_family(tmp_path, capsys, monkeypatch):
    layers = ["full_attention", "sliding_attention"]
    config = tiny_config("modernbert", pad_token_id=0, num_hidden_layers=2, layer_types=layers)
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pocketformers", "doctor", str(tmp_path)])
    cli.main()
    found = lines_of(capsys.readouterr().out)
    assert found["task"] == "text-classification"
    assert (found["family"], found["layers"]) == ("modernbert", "2")
    assert (found["heads"], found["neurons"]) == ("4 in a layer", "64 in a layer")
    assert found["students"].startswith("yes: --student_layers 1 to 2")
    assert found["pruning"] == "heads yes; neurons yes"
    assert found["export"] == "yes"
    assert found["fused attention"].startswith(("yes", "0 of 2", "2 of 2", "1 of 2"))  # a layer of each kind
    assert found["bundle"].startswith("yes")


def test_an_unknown_family_with_a_slow_tokenizer(tmp_path):
    from transformers import ByT5Tokenizer

    tiny_config("squeezebert", vocab_size=400, num_hidden_layers=1).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    found = lines_of(diagnose(str(tmp_path)))
    assert "not in the table" in found["family"]
    assert found["students"].startswith("no: ")
    assert found["pruning"].startswith("heads no: ")
    assert found["export"] == "yes"
    assert found["bundle"].startswith("no: it has only a slow tokenizer")


def test_images_and_what_has_no_task(tmp_path):
    resnet, sound = tmp_path / "resnet", tmp_path / "sound"
    tiny_config("resnet").save_pretrained(resnet)
    make_image_processor().save_pretrained(resnet)
    found = lines_of(diagnose(str(resnet)))
    assert (found["task"], found["layers"]) == ("image-classification", "1 + 1")
    assert (
        found["pruning"]
        == "heads no: it has no attention; neurons no: its layers are convolutions without dense neurons"
    )
    assert found["fused attention"] == "it has none"
    tiny_config("hubert").save_pretrained(sound)
    with pytest.raises(InputError, match="found 'hubert'"):
        diagnose(str(sound))
    with pytest.raises(InputError, match=r"config\.json"):
        diagnose(str(tmp_path))


def test_what_has_no_tokenizer_yet(tmp_path):
    tiny_config(
        "deberta-v2", num_hidden_layers=1, relative_attention=True, pos_att_type=["c2p", "p2c"]
    ).save_pretrained(tmp_path / "new")
    found = lines_of(diagnose(str(tmp_path / "new")))
    assert found["export"] == "yes"
    assert "blocks: its scores are sums of three matmuls" in found["fused attention"]
    assert found["bundle"].startswith("not yet: expected a tokenizer")


def test_what_cannot_be_exported(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    tiny_config("bart", **sizes).save_pretrained(tmp_path / "bart")
    with pytest.raises(InputError, match="'bart'.*which has both"):
        diagnose(str(tmp_path / "bart"))
    tiny_config("mamba", state_size=4, architectures=["MambaForCausalLM"]).save_pretrained(tmp_path / "mamba")
    make_tokenizer().save_pretrained(tmp_path / "mamba")
    assert lines_of(diagnose(str(tmp_path / "mamba")))["export"].startswith("no: ")


def test_images_whose_size_is_that_of_a_part(tmp_path):
    from transformers import CLIPConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(vision_config=vision, text_config=sizes, architectures=["CLIPForImageClassification"])
    config.save_pretrained(tmp_path)
    make_image_processor().save_pretrained(tmp_path)
    assert lines_of(diagnose(str(tmp_path)))["export"] == "yes"
