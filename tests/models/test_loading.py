"""Checkpoints as people have them: what is wrong is one message before any training, and what can be used is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from conftest import WORDS, make_texts, make_tokenizer, tiny_config, tiny_language_model, tiny_model, write_csv
from pipelines.core.config import DataConfig, DistillConfig, StudentConfig, TeacherConfig
from pipelines.core.errors import InputError
from pipelines.core.sources import model_fingerprint
from pipelines.data.windows import train_tokenizer
from pipelines.models.loading import has_tokenizer, load_config
from pipelines.models.removal import load_model
from pipelines.onnx.export import export_onnx
from pipelines.tasks.text_classification import TextClassification
from pipelines.training.distill import distill_student
from pipelines.training.fine_tune import fine_tune


def save(directory: Path, model: Any, processor: Any | None = None, **config: Any) -> str:
    """The model and its tokenizer in a directory, whose config.json is changed as `config` says."""
    model.save_pretrained(directory)
    (processor or make_tokenizer()).save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(directory)


def rename_weights(directory: Path, name: Any) -> None:
    file = directory / "model.safetensors"
    save_file({name(key): weights for key, weights in load_file(file).items()}, file, {"format": "pt"})


def quick(training: Any) -> Any:
    training.max_steps, training.per_device_train_batch_size = 2, 8
    training.eval_strategy, training.save_strategy, training.load_best_model_at_end = "no", "no", False
    return training


# ---- Weights


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.module.", "student."])
def test_weights_of_a_wrapper_are_named_with_a_command_that_mends_them(wrapper, task, tmp_path):
    source = save(tmp_path, tiny_model("distilbert"))
    expected = load_file(tmp_path / "model.safetensors")
    rename_weights(tmp_path, lambda name: wrapper + name)
    for load in (lambda: task.load_model(source, "new if other"), lambda: load_model(source)):
        with pytest.raises(InputError, match=f"begin with '{wrapper}'.*python -c ") as error:
            load()
    exec(str(error.value).split('python -c "')[1].removesuffix('"'))
    assert load_file(tmp_path / "model.safetensors").keys() == expected.keys()
    task.load_model(source)


def test_the_command_mends_a_model_in_shards(task, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for file in {*content["weight_map"].values()}:
        weights = {f"module.{name}": tensor for name, tensor in load_file(tmp_path / file).items()}
        save_file(weights, tmp_path / file, {"format": "pt"})
    content["weight_map"] = {f"module.{name}": file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"begin with 'module\.'") as error:
        task.load_model(str(tmp_path))
    exec(str(error.value).split('python -c "')[1].removesuffix('"'))
    task.load_model(str(tmp_path))


def test_a_classifier_without_a_base_model_has_a_head_and_an_encoder(image_task, tmp_path):
    from transformers import CLIPConfig, CLIPForImageClassification, ViTImageProcessorPil

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = CLIPConfig(
        vision_config={**sizes, "image_size": 8, "patch_size": 4}, text_config={**sizes, "vocab_size": 9}
    )
    config.id2label = dict(enumerate(reversed(image_task.label_names)))
    config.label2id = {name: row for row, name in config.id2label.items()}
    model = CLIPForImageClassification(config)
    source = save(tmp_path, model, ViTImageProcessorPil(size={"height": 8, "width": 8}))
    turned = image_task.load_model(source)
    assert torch.equal(turned.classifier.weight, model.classifier.weight.flip(0))
    image_task.align_labels(load_model(source), source)
    rename_weights(tmp_path, lambda name: name.replace("vision_model", "other"))
    with pytest.raises(InputError, match=r"such as vision_model\."):
        image_task.load_model(source, "new if other")


def test_a_head_that_is_missing_or_of_another_shape_is_made_anew_where_it_is_trained(task, tmp_path):
    (tmp_path / "shape").mkdir()
    names = {"id2label": dict(enumerate(WORDS)), "label2id": {name: i for i, name in enumerate(WORDS)}}
    save(tmp_path / "shape", tiny_model(id2label=dict(enumerate("abcde")), label2id=None), **names)
    save(tmp_path / "missing", tiny_model())
    rename_weights(tmp_path / "missing", lambda name: name.replace("classifier", "old_head"))
    for name in ("shape", "missing"):
        assert task.load_model(str(tmp_path / name), "new if other").classifier.out_features == 3
        with pytest.raises(InputError, match=r"expected (the weights of a whole|a model's weights).*classifier"):
            task.load_model(str(tmp_path / name))


def test_quantized_and_other_directories_are_named(task, tmp_path):
    source = save(tmp_path / "run" / "checkpoint-500", tiny_model())
    (tmp_path / "run" / "checkpoint-500" / "optimizer.pt").write_bytes(b"a Trainer's")
    task.load_model(source)
    with pytest.raises(InputError, match=r"give .*checkpoint-500"):
        task.load_model(str(tmp_path / "run"))
    save(tmp_path / "four_bits", tiny_model(), quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(InputError, match="quantized by awq"):
        task.load_model(str(tmp_path / "four_bits"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="merge_and_unload"):
        task.load_processor(str(tmp_path / "adapter"))
    with pytest.raises(InputError, match=r"give .*checkpoint-500"):
        model_fingerprint(str(tmp_path / "run"))
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    (tmp_path / "adapter" / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="merge_and_unload"):
        task.load_processor(str(tmp_path / "adapter"))
    save(tmp_path / "pointers", tiny_model())
    (tmp_path / "pointers" / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n"
    )
    with pytest.raises(InputError, match=r"in place of tokenizer\.json; run 'git lfs pull'"):
        task.load_processor(str(tmp_path / "pointers"))
    for classes, found in (
        ([], "found none"),
        (["BertForSequenceClassificaton"], "found 'BertForSequenceClassificaton'"),
    ):
        save(tmp_path / "classes", tiny_model(), architectures=classes)
        with pytest.raises(InputError, match=found):
            load_model(tmp_path / "classes")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"model-Q4_K_M\.gguf.*GGUF or ONNX file alone"):
        task.load_model(str(tmp_path / "gguf"))


@pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states", "tuples"])
def test_what_a_config_asks_for_beside_logits_is_not_given(asked, task, tmp_path):
    changes = {"return_dict": False} if asked == "tuples" else {asked: True}
    model = task.load_model(save(tmp_path, tiny_model(), **changes), "new if other")
    assert list(model(torch.tensor([[1, 2, 3]])).keys()) == ["logits"]


@pytest.mark.parametrize("asked", [{"chunk_size_feed_forward": 8}, {"_attn_implementation": "flash_attention_2"}])
def test_how_a_config_would_compute_changes_nothing(asked, task, tmp_path):
    inputs = torch.tensor([[1, 2, 3]])
    plain = load_model(save(tmp_path / "plain", tiny_model(num_hidden_layers=1)))
    source = shutil.copytree(tmp_path / "plain", tmp_path / "asked")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | asked))
    for model in (load_model(source), task.load_model(str(source), "new if none").eval()):
        torch.testing.assert_close(model(inputs).logits, plain(inputs).logits)
    export_onnx(str(source), tmp_path, task)


def test_the_ends_of_a_generation_config_are_those_of_the_model(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2", eos_token_id=1))
    assert load_model(save(tmp_path / "one", model)).config.eos_token_id == 1
    model.generation_config.eos_token_id = [1, 2]
    assert load_model(save(tmp_path / "two", model)).config.eos_token_id == [1, 2]
    # A config.json that was corrected, beside an older generation_config.json.
    assert load_model(save(tmp_path / "corrected", model, eos_token_id=7)).config.eos_token_id == [7, 1, 2]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"early_stopping": True, "repetition_penalty": 1.2, "eos_token_id": [0, 2]}, {"repetition_penalty": 1.2}),
    ],
)
def test_settings_of_generation_that_are_ignored_do_not_end_a_training(
    settings, kept, language_task, language_teacher, training, tmp_path
):
    """Here the padding that the Trainer adds; transformers saves settings that were changed only if all of them are of use."""
    source = shutil.copytree(language_teacher, tmp_path / "source")
    ends = {"eos_token_id": 0, "pad_token_id": None}
    (source / "generation_config.json").write_text(json.dumps(ends | settings))
    (tmp_path / "tuned").mkdir()
    brief = TeacherConfig(teacher_epochs=0.05)
    fine_tune(str(source), tmp_path / "tuned", language_task, brief, quick(training))
    saved = json.loads((tmp_path / "tuned" / "generation_config.json").read_text())
    assert saved["pad_token_id"] == 0
    assert saved["eos_token_id"] == settings.get("eos_token_id", 0)
    assert {name: saved[name] for name in settings if saved.get(name) is not None and "eos" not in name} == kept


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}),
        ("gemma3_text", {"full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}),
    ],
)
def test_rotary_positions_that_follow_the_length_of_the_text_are_named(model_type, rope, tmp_path):
    model = tiny_language_model(model_type, rope_parameters=rope)
    source = save(tmp_path, model)
    with pytest.raises(InputError, match=r"rope_type 'dynamic'.*\(64\) tokens it equals 'default'"):
        load_config(source)
    config = json.loads((tmp_path / "config.json").read_text())
    for one in (config["rope_parameters"], *config["rope_parameters"].values()):
        if isinstance(one, dict) and one.get("rope_type") == "dynamic":
            one["rope_type"] = "default"
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.arange(64)[None]
    torch.testing.assert_close(load_model(tmp_path)(ids).logits, model(ids).logits)


def test_a_family_without_a_head_for_the_task_is_named(task, language_task, tmp_path):
    save(tmp_path / "granite", tiny_language_model("granite"))
    save(tmp_path / "distilbert", tiny_model("distilbert", vocab_size=300), train_tokenizer(["a text"], 300))
    for one, name, found in (
        (task, "granite", "AutoModelForSequenceClassification for, .* found GraniteConfig"),
        (language_task, "distilbert", "AutoModelForCausalLM for, .* found DistilBertConfig"),
    ):
        with pytest.raises(InputError, match=f"{found} .*another --task"):
            one.load_model(str(tmp_path / name))


def test_weights_that_are_no_numbers_are_refused(task, tmp_path):
    source = save(tmp_path, tiny_model())
    weights = load_file(tmp_path / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][5] = float("nan")  # of a token that few texts have
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="found NaN or infinity in bert.embeddings.word_embeddings.weight"):
        task.load_model(source, "new if other")


def test_a_tokenizer_without_a_vocabulary_is_refused(task, tmp_path):
    source = save(tmp_path, tiny_model())
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="found 5 special tokens alone. Copy the rest"):
        task.load_processor(source)


def test_an_encoder_with_a_decoder_is_refused(task, tmp_path):
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "num_layers": 2, "d_ff": 32}
    source = save(tmp_path, tiny_model("t5", decoder_start_token_id=0, **sizes))
    with pytest.raises(InputError, match="'t5'.*which has both"):
        task.load_model(source, "new if other")


# ---- Labels


@pytest.mark.parametrize(
    "labels",
    [
        {"id2label": {"0": "sport", "2": "tech", "4": "trade"}},
        {"label2id": {"sport": 2, "tech": 1, "trade": 0}},
        {"id2label": {"0": "sport", "1": "sport", "2": "tech"}},
    ],
)
def test_labels_that_say_no_order_are_one_message_or_a_fresh_head(labels, task, tmp_path):
    source = save(tmp_path, tiny_model(), **labels)
    with pytest.raises(InputError, match="found id2label"):
        task.load_model(source)
    model = task.load_model(source, "new if other")
    assert model.config.id2label == dict(enumerate(task.label_names))
    with pytest.raises(InputError, match="found id2label"):
        task.align_labels(load_model(source), source)


@pytest.mark.parametrize(
    "labels",
    [
        {"id2label": {"sport": 0, "tech": 1, "trade": 2}},
        {"id2label": ["sport", "tech", "trade"]},
        {"label2id": {"sport": "LABEL_0", "tech": "LABEL_1", "trade": "LABEL_2"}},
        {"label2id": ["sport", "tech", "trade"]},
    ],
)
def test_labels_without_rows_are_named(labels, task, tmp_path):
    source = save(tmp_path, tiny_model(), **labels)
    with pytest.raises(InputError, match=f"expected {next(iter(labels))} in .*found .*sport"):
        task.load_processor(source)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_the_problem_type_of_another_task_does_not_survive(problem, task, tmp_path):
    source = save(tmp_path, tiny_model("roberta", pad_token_id=0), problem_type=problem)
    assert task.load_model(source).config.problem_type is None
    model = load_model(source)
    task.align_labels(model, source)
    assert model.config.problem_type is None


def test_labels_without_names_in_another_order_are_refused(trained_teacher, task, training, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(trained_teacher)
    with torch.no_grad():  # each class in the place of the next
        model.classifier.weight.copy_(model.classifier.weight.roll(1, 0))
        model.classifier.bias.copy_(model.classifier.bias.roll(1, 0))
    generic = {f"LABEL_{index}": index for index in range(3)}
    source = save(tmp_path / "m", model, id2label={str(i): name for name, i in generic.items()}, label2id=generic)
    with pytest.raises(InputError, match=r"another order: of .* training examples 'sport' is predicted as 'tech'"):
        fine_tune(source, tmp_path, task, TeacherConfig(teacher_epochs=0), training)
    with pytest.raises(InputError, match="another order"):
        export_onnx(source, tmp_path, task)
    (tmp_path / "right").mkdir()
    fine_tune(str(trained_teacher), tmp_path / "right", task, TeacherConfig(teacher_epochs=0), training)


# ---- What a model takes


@pytest.mark.parametrize(
    ("model_type", "changes", "limit"),
    [
        ("bert", {}, 64),
        ("xlm-roberta", {"pad_token_id": 1}, 62),
        ("mpnet", {}, 62),
        ("camembert", {"pad_token_id": 4}, 59),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 0}, 64),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}, 64),
        ("llama", {}, None),
        ("deberta-v2", {"relative_attention": True, "position_biased_input": False, "pooler_hidden_size": 32}, None),
    ],
)
def test_positions_are_counted_as_the_model_does(model_type, changes, limit, csv_file, tmp_path):
    source = save(tmp_path, tiny_model(model_type, **changes))
    for length in (limit or 1000, (limit or 1000) + 1):
        task = TextClassification(DataConfig(dataset=str(csv_file), max_length=length))
        if limit is None or length == limit:
            model = task.load_model(source)
            tokens = torch.full((2, length), 6)
            assert model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.isfinite().all()
        else:
            with pytest.raises(InputError, match=f"at most {limit}, the positions"):
                task.load_model(source)


def test_a_padding_token_that_the_embeddings_lack_is_named(csv_file, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    source = save(tmp_path, tiny_model(vocab_size=len(tokenizer) - 1), tokenizer)
    task = TextClassification(DataConfig(dataset=str(csv_file), max_length=32))
    with pytest.raises(InputError, match=r"input_ids below .*resize_token_embeddings"):
        task.load_model(source)


def test_a_tokenizer_file_of_a_newer_library_is_named(task, tmp_path):
    source = save(tmp_path, tiny_model())
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"decoder": {"type": "Later"}}))
    with pytest.raises(InputError, match=r"a tokenizer \(tokenizer\.json\).*newer library.*pip install -U"):
        task.load_model(source)


def pairs(directory: Path) -> TextClassification:
    rows = [(text, "said the new one", label) for text, label in make_texts(120)]
    file = write_csv(directory / "pairs.csv", rows, ("text", "other", "label"))
    return TextClassification(DataConfig(dataset=str(file), text_pair_column="other", max_length=32))


@pytest.mark.parametrize(
    ("model_type", "changes", "has_types"),
    [
        ("bert", {}, True),
        ("bert", {"type_vocab_size": 1}, False),
        ("deberta", {"type_vocab_size": 0, "pooler_hidden_size": 32}, False),
        ("mpnet", {}, False),
    ],
)
def test_token_types_are_given_to_models_that_have_them(model_type, changes, has_types, tmp_path):
    task = pairs(tmp_path)
    source = save(tmp_path / "m", tiny_model(model_type, **changes))
    processor, model = task.load_processor(source), task.load_model(source)
    batch = task.collate(processor)(task.features(processor)["train"].select(range(2)).to_list())
    assert ("token_type_ids" in batch) == has_types
    del batch["labels"]
    assert model(**batch).logits.shape == (2, 3)
    processor.save_pretrained(tmp_path / "saved")
    assert ("token_type_ids" in AutoTokenizer.from_pretrained(tmp_path / "saved")("a", "b")) == has_types


@pytest.mark.parametrize("kinds", [("bert", "distilbert"), ("distilbert", "bert")])
def test_only_one_of_teacher_and_student_has_token_types(kinds, tmp_path, training):
    """Of pairs, in the loop: the teacher reads what it reads alone."""
    task = pairs(tmp_path)
    teacher, student = (save(tmp_path / kind, tiny_model(kind)) for kind in kinds)
    task.check_teacher = lambda *_: None  # it is not trained
    task.check_label_order = lambda *_: None
    seen = []
    original = task.load_model

    def load(source: str, *arguments: Any, **keywords: Any) -> Any:
        model = original(source, *arguments, **keywords)
        if source == teacher:
            model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs), with_kwargs=True)
        return model

    task.load_model = load
    distill = DistillConfig(hidden_state_weight=1.0)
    distill_student(teacher, tmp_path / "out", task, StudentConfig(student_model=student), distill, quick(training))
    assert all(("token_type_ids" in inputs) == (kinds[0] == "bert") for inputs in seen)
    assert kinds[0] != "bert" or seen[-1]["token_type_ids"].max() == 1


# ---- Decoders


@pytest.mark.parametrize("padded_by", ["end token", pytest.param("token of its own", marks=pytest.mark.slow)])
def test_a_decoder_reads_the_last_token_before_the_padding_everywhere(padded_by, task, training, tmp_path):
    tokenizer = train_tokenizer(task.splits["train"]["text"], 300)
    tokenizer.pad_token = None if padded_by == "end token" else tokenizer.convert_ids_to_tokens(7)
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=300, bos_token_id=0, eos_token_id=0)
    source = save(tmp_path / "m", model, tokenizer)
    for name in ("teacher", "onnx"):
        (tmp_path / name).mkdir()
    task.check_teacher = lambda *_: None
    try:
        fine_tune(source, tmp_path / "teacher", task, TeacherConfig(teacher_epochs=1), quick(training))
    finally:
        del task.check_teacher
    export_onnx(str(tmp_path / "teacher"), tmp_path / "onnx", task)
    padding = 0 if padded_by == "end token" else 7
    for name in ("teacher", "onnx"):
        assert json.loads((tmp_path / name / "config.json").read_text())["pad_token_id"] == padding
        stock = AutoTokenizer.from_pretrained(tmp_path / name)
        assert (stock.pad_token_id, stock.padding_side) == (padding, "right")
    texts = ["the new chip", "a market and the price of shares in the economy said the bank today", "goal"]
    inputs = stock(texts, padding=True, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher")
    with torch.no_grad():
        alone = torch.cat([model(**stock(text, return_tensors="pt")).logits for text in texts])
        torch.testing.assert_close(model(**inputs).logits, alone, atol=1e-4, rtol=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    feed = {node.name: inputs[node.name].numpy() for node in session.get_inputs()}
    np.testing.assert_allclose(session.run(["logits"], feed)[0], alone.numpy(), atol=1e-4)


def test_a_decoder_whose_texts_end_with_its_padding_is_refused(task, tmp_path):
    tokenizer = train_tokenizer(task.splits["train"]["text"], 300)
    end = tokenizer.convert_ids_to_tokens(0)
    template = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 0)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.eos_token = tokenizer.pad_token = end
    ids = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
    source = save(tmp_path / "other", tiny_model("llama", pad_token_id=7, **ids), tokenizer)
    with pytest.raises(InputError, match=f"its padding '{end}', which was none .pad_token_id 7 in"):
        task.load_model(source)
    # A model that was trained so, or will be, reads what it was trained with.
    source = save(tmp_path / "same", tiny_model("llama", pad_token_id=0, **ids), tokenizer)
    assert task.load_model(source, "new if other").config.pad_token_id == 0
    source = save(tmp_path / "base", AutoModelForCausalLM.from_config(tiny_config("llama", **ids)), tokenizer)
    assert task.load_model(source, "new if other").config.pad_token_id == 0


def test_a_slow_tokenizer_says_at_once_that_there_will_be_no_bundle(task, tmp_path):
    from transformers import PhobertTokenizer

    words = sorted({word for text, _ in make_texts(60) for word in text.split()})
    (tmp_path / "vocab.txt").write_text("".join(f"{word} 1\n" for word in words))
    (tmp_path / "bpe.codes").write_text("#version: 0.2\n")
    tokenizer = PhobertTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / "bpe.codes"))
    source = save(tmp_path / "m", tiny_model("roberta", vocab_size=len(tokenizer), pad_token_id=1), tokenizer)
    assert "slow" in task.bundle_obstacle(source)
    (tmp_path / "onnx").mkdir()
    export_onnx(source, tmp_path / "onnx", task)
    shutil.rmtree(tmp_path / "m")
    save(tmp_path / "m", tiny_model())
    assert task.bundle_obstacle(source) is None


@pytest.mark.parametrize("name", ["spm.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt"])
def test_a_vocabulary_alone_is_a_tokenizer(name, tmp_path):
    (tmp_path / "config.json").touch()
    assert not has_tokenizer(str(tmp_path))
    (tmp_path / name).touch()
    assert has_tokenizer(str(tmp_path))
