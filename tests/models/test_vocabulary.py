"""Students with the part of their teacher's vocabulary that the corpus needs."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizerFast, CanineTokenizer, PreTrainedTokenizerFast

from conftest import make_image_processor, make_texts, tiny_config, tiny_model, write_csv
from pipelines import load
from pipelines.cli import main
from pipelines.core.command import run_main
from pipelines.core.config import DataConfig, DistillConfig, StudentConfig, TransferConfig
from pipelines.core.errors import InputError
from pipelines.core.identity import describe
from pipelines.models import vocabulary
from pipelines.models.students import build_student
from pipelines.models.vocabulary import checked_content, tokens_to_keep, trim_model, trim_tokenizer
from pipelines.onnx.measure import timing_feeds
from pipelines.tasks.text_classification import TextClassification
from pipelines.training.distill import check_distillation

KINDS = ["WordPiece", "BPE of bytes", "BPE with bytes to fall back on", "Unigram"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # in RoBERTa's order
OTHER_TEXTS = Path(argparse.__file__).read_text(encoding="utf-8").splitlines()
RANGES = [
    (32, 127),
    (160, 592),
    (768, 880),
    (1040, 1104),
    (12352, 12544),
    (19968, 20480),
    (128512, 128592),
    (1, 0xD7FF),
]


def template(cls: str, sep: str, tokenizer: Tokenizer):
    special = [(token, tokenizer.token_to_id(token)) for token in (cls, sep)]
    return processors.TemplateProcessing(f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1", special_tokens=special)


def trained(kind: str):
    """A tokenizer of some hundred tokens, most of which are for other texts than the task's."""
    texts = OTHER_TEXTS + [text for text, _ in make_texts(240)] * 2
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    names |= {"cls_token": "<s>", "sep_token": "</s>"}
    if kind == "WordPiece":
        own = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        own.normalizer, own.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        own.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=700, special_tokens=special))
        own.post_processor, own.decoder = template("[CLS]", "[SEP]", own), decoders.WordPiece()
        own.enable_padding(pad_id=own.token_to_id("[PAD]"))  # as a published tokenizer.json may have it
        return BertTokenizerFast(tokenizer_object=own)
    if kind == "BPE of bytes":
        own = Tokenizer(models.BPE())
        own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        own.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet)
        )
        ends = [(token, own.token_to_id(token)) for token in ("</s>", "<s>")]
        own.post_processor = processors.Sequence([processors.ByteLevel(), processors.RobertaProcessing(*ends)])
    elif kind == "Unigram":
        own = Tokenizer(models.Unigram())
        own.normalizer = normalizers.NFKC()
        own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        own.train_from_iterator(
            texts, trainers.UnigramTrainer(vocab_size=700, special_tokens=SPECIAL, unk_token="<unk>")
        )
        own.post_processor = template("<s>", "</s>", own)
    else:
        own = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
        own.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
        own.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, special_tokens=special))
        own.pre_tokenizer = None
        written = json.loads(own.to_str())
        written["added_tokens"] = written["added_tokens"][: len(SPECIAL)]  # bytes are none that a text spells out
        own = Tokenizer.from_str(json.dumps(written))
        own.post_processor = template("<s>", "</s>", own)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, **names)
    tokenizer.add_tokens("[new]")  # beyond the vocabulary of the model
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: trained(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def texts_task(csv_file):
    return TextClassification(DataConfig(dataset=str(csv_file), max_length=64, validation_size=0.2, test_size=0.2))


@pytest.fixture
def teacher_of(tokenizers, tmp_path):
    """A function that writes a teacher of a family with one of the tokenizers."""

    def write(model_type: str, kind: str) -> str:
        tokenizer, directory = tokenizers[kind], tmp_path / model_type
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        tiny_model(model_type, vocab_size=len(tokenizer) + 3, max_position_embeddings=70, **ids).save_pretrained(
            directory
        )
        tokenizer.save_pretrained(directory)
        return str(directory)

    return write


def random_texts(count: int = 1000):
    """Texts of characters from all over Unicode, and among them words that the tokenizers know."""
    generator = np.random.default_rng(0)
    words = [word for text, _ in make_texts(30) for word in text.split()] + " ".join(OTHER_TEXTS[:60]).split()
    for number in range(count):
        low, high = RANGES[number % len(RANGES)]
        characters = "".join(map(chr, generator.integers(low, high, generator.integers(0, 20))))
        yield " ".join([characters, *generator.choice(words, 3)][number % 3 :])


def pieces(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_the_corpus_keep_their_tokens_and_any_other_can_be_read(kind, tokenizers, texts_task, tmp_path):
    whole = tokenizers[kind]
    kept = tokens_to_keep("corpus", whole, texts_task)
    trimmed = trim_tokenizer(whole, kept)
    assert len(trimmed) == len(kept) < 0.8 * len(whole)
    assert trimmed.convert_ids_to_tokens(range(len(kept))) == whole.convert_ids_to_tokens(kept)
    trimmed.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened.special_tokens_map == whole.special_tokens_map
    assert opened.get_vocab() == trimmed.get_vocab()
    pair = texts_task.splits["train"]["text"][:2]
    assert opened.convert_ids_to_tokens(opened(*pair)["input_ids"]) == whole.convert_ids_to_tokens(
        whole(*pair)["input_ids"]
    )
    for text in texts_task.splits["train"]["text"]:
        assert pieces(opened, text) == pieces(whole, text)

    same, vocabulary = 0, opened.get_vocab().keys()
    for text in random_texts():
        own, before = pieces(opened, text), pieces(whole, text)
        if {*before} <= vocabulary:
            assert own == before
            same += 1
        if "BPE" in kind or {*before} <= vocabulary:  # no byte is lost
            ids = opened(text)["input_ids"], whole(text)["input_ids"]
            assert opened.decode(ids[0]) == whole.decode(ids[1])
    assert same > 300


def test_the_corpus_keeps_a_share_of_the_tokens_of_the_validation_split(tokenizers, texts_task, monkeypatch):
    whole = tokenizers["WordPiece"]
    counts = Counter(token for ids in texts_task.features(whole)["validation"]["input_ids"][:] for token in ids)
    sizes = []
    for share in (0.0, 0.9, 1.0):
        monkeypatch.setattr(vocabulary, "COVERED", share)
        kept = tokens_to_keep("corpus", whole, texts_task)
        assert sum(counts[token] for token in kept) >= share * counts.total()
        sizes.append(len(kept))
    assert sizes[0] <= sizes[1] <= sizes[2]
    assert {*counts} <= {*kept}


def test_models_of_other_tokens_are_timed_on_the_same_text(tokenizers, texts_task, tmp_path):
    """The longest for the smaller vocabulary may be another one, of rare words: then two texts would be compared, not two models."""
    texts = texts_task.splits["test"]["text"][:]
    longest = max(texts, key=lambda text: (len(text.split()), len(text)))  # these have no marks
    whole = tokenizers["WordPiece"]
    single = [token for token, number in whole.get_vocab().items() if len(token.removeprefix("##")) == 1 or number < 5]
    small = trim_tokenizer(whole, sorted(whole.get_vocab()[token] for token in single))
    assert len(small(longest)["input_ids"]) > len(whole(longest)["input_ids"])
    for tokenizer in (whole, small):
        features, alone = texts_task.features(tokenizer)["test"], texts_task.lengths_alone("test")
        feed, _ = timing_feeds(features, texts_task.collate(tokenizer), alone=alone)
        assert feed["input_ids"].tolist() == [tokenizer(longest, truncation=True, max_length=64)["input_ids"]]


def test_a_number_adds_the_first_tokens_of_the_vocabulary(tokenizers, texts_task):
    whole = tokenizers["WordPiece"]
    corpus = tokens_to_keep("corpus", whole, texts_task)
    more = tokens_to_keep(str(len(corpus) + 50), whole, texts_task)
    others = [number for number in range(len(whole)) if number not in corpus]
    assert more == sorted([*corpus, *others[:50]])
    assert tokens_to_keep("100000", whole, texts_task) == list(range(len(whole)))
    with pytest.raises(InputError, match=f"of {len(corpus)} tokens or more"):
        tokens_to_keep(str(len(corpus) - 1), whole, texts_task)


def test_a_transfer_set_has_its_tokens_too(tokenizers, texts_task, tmp_path):
    texts = [(line, "any") for line in OTHER_TEXTS if len(line) > 30][:200]
    data = write_csv(tmp_path / "more.csv", texts)
    transfer = texts_task.transfer_set(TransferConfig(transfer_dataset=str(data)))
    whole = tokenizers["WordPiece"]
    trimmed = trim_tokenizer(whole, tokens_to_keep("corpus", whole, texts_task, transfer))
    assert len(trimmed) > len(tokens_to_keep("corpus", whole, texts_task))
    assert all(pieces(trimmed, text) == pieces(whole, text) for text, _ in texts if len(whole(text)["input_ids"]) < 64)


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("bert", "WordPiece"), ("roberta", "BPE of bytes"), ("modernbert", "BPE of bytes"), ("electra", "Unigram")],
)
def test_a_student_predicts_as_before_with_fewer_token_vectors(model_type, kind, teacher_of, texts_task):
    teacher = teacher_of(model_type, kind)
    whole, own_processor, _ = build_student(StudentConfig(student_layers="2"), teacher, texts_task)
    settings = StudentConfig(student_layers="2", student_vocabulary="corpus")
    model, processor, layers = build_student(settings, teacher, texts_task)
    assert len(layers) == model.config.num_hidden_layers == 2
    assert len(model.get_input_embeddings().weight) == model.config.vocab_size == len(processor) < len(own_processor)
    assert model.get_input_embeddings().padding_idx in (None, processor.pad_token_id)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(model.config, name) == getattr(processor, name)
    batches = []
    for tokenizer in (processor, own_processor):
        batches.append(texts_task.collate(tokenizer)(list(texts_task.features(tokenizer)["train"].select(range(40)))))
        batches[-1].pop("labels")
    assert batches[0]["attention_mask"].min() == 0
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(**batches[0]).logits, whole.eval()(**batches[1]).logits)

    # What a teacher beside the student is given are its own ids of the student's tokens.
    collate = texts_task.training_collate(processor, own_processor)
    both = collate(list(texts_task.features(processor)["train"].select(range(40))))
    assert torch.equal(both["teacher_input_ids"], batches[1]["input_ids"])
    assert torch.equal(both["input_ids"], batches[0]["input_ids"])
    texts_task.check_teacher_fits(teacher, model, processor, online=True)


def test_positions_that_are_counted_from_padding_move_with_it(tmp_path):
    """Of a RoBERTa whose tokens before the padding are not kept, in memory and from disk."""
    model = tiny_model("roberta", vocab_size=40, pad_token_id=3, max_position_embeddings=20)
    kept = [1, *range(3, 40)]
    ids = torch.tensor([[5, 8, 4, 6, 3, 3], [5, 7, 8, 9, 7, 6]])
    mask = (ids != 3).long()
    expected = model.eval()(input_ids=ids, attention_mask=mask).logits
    trim_model(model, kept)
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.as_tensor(np.searchsorted(kept, ids)), "attention_mask": mask}
    for trimmed in (model, type(model).from_pretrained(tmp_path)):
        torch.testing.assert_close(trimmed.eval()(**inputs).logits, expected)
    assert model.config.max_position_embeddings == 20 - 2


def test_a_student_of_another_kind_starts_from_the_vectors_that_are_kept(teacher_of, texts_task):
    teacher = teacher_of("bert", "WordPiece")
    model, processor, _ = build_student(StudentConfig("static", student_vocabulary="corpus"), teacher, texts_task)
    kept = tokens_to_keep("corpus", texts_task.load_processor(teacher), texts_task)
    vectors = texts_task.load_model(teacher).get_input_embeddings().weight[kept]
    own = model.get_input_embeddings().weight
    assert len(own) == model.config.vocab_size == len(processor) == len(kept)
    torch.testing.assert_close(own[:, :32] * vectors.std(unbiased=False), vectors)


def test_what_cannot_be_trimmed_is_refused_before_the_first_step(task, language_task, language_model_dir):
    settings = StudentConfig(student_vocabulary="corpus")
    with pytest.raises(InputError, match="text-generation. Leave --student_vocabulary out"):
        check_distillation(settings, DistillConfig(), str(language_model_dir), language_task)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, "<unk>"))
    for other in (PreTrainedTokenizerFast(tokenizer_object=words), CanineTokenizer(), make_image_processor()):
        with pytest.raises(InputError, match="WordPiece, BPE, Unigram"):
            checked_content(other, task)
    for wrong in ("all", "-3"):
        with pytest.raises(InputError, match="'corpus' or a number"):
            StudentConfig(student_vocabulary=wrong)
    with pytest.raises(InputError, match="found 'org/name'"):
        StudentConfig("org/name", student_vocabulary="corpus")
    assert describe(settings)["student_vocabulary"] == "corpus"


@pytest.mark.slow
def test_the_chain_ships_the_smaller_vocabulary(tokenizers, csv_file, tmp_path, monkeypatch):
    """With a teacher beside the student, in its pruning, too."""
    from transformers import AutoModel

    shape, run, tokenizer = tmp_path / "shape", tmp_path / "run", tokenizers["WordPiece"]
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config("bert", vocab_size=len(tokenizer), initializer_range=0.1)).save_pretrained(shape)
    tokenizer.save_pretrained(shape)
    flags = f"""
        --dataset {csv_file} --teacher_model {shape} --teacher_epochs 6 --teacher_learning_rate 3e-3 --student_layers 2
        --student_vocabulary corpus --hidden_state_weight 0.5 --max_length 32 --num_train_epochs 3 --learning_rate 3e-3 --per_device_train_batch_size 8
        --prune_steps 1 --prune_epochs 2 --max_quality_drop 1 --use_cpu --baselines false --benchmark_rounds 1
        --benchmark_seconds 0.05 --web false --output_dir {run}
    """
    monkeypatch.setattr(sys, "argv", ["pocketformers", "compress", *flags.split()])
    run_main(main)
    report = json.loads((run / "report.json").read_text())
    found = report["data"]["vocabulary"]
    assert found["tokens"] < 0.8 * found["of_teacher"] == 0.8 * len(tokenizer)
    for page in ("README.md", "report.md"):
        assert f"vocabulary: {{tokens: {found['tokens']}" in (run / page).read_text()
    for stage in ("student", "pruned", "onnx", "quantized", "bundle"):
        assert len(AutoTokenizer.from_pretrained(run / stage)) == found["tokens"]
    graph = onnx.load(run / "onnx" / "model.onnx").graph
    assert [found["tokens"], 32] in [list(table.dims) for table in graph.initializer]
    assert report["stages"][-1]["metrics"]["accuracy"] > 0.6  # of three classes
    assert load(run / "bundle")("Ünïcödé 🙂 東京 argparse")["label"] in ("sport", "tech", "trade")
