"""Tiny real models, a real tokenizer and a data set that can be learnt, all made here: no network, no downloads."""

from __future__ import annotations

import csv
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

# Models this small are slower on two threads than on one, and threads of two test processes that wait for one another on the same
# cores are slower by far: each process of pytest-xdist, and what it starts, keeps to a core of its own.
torch.set_num_threads(1)
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})

# The files that take longest come first, so that no process is left alone with one of them in the end.
LONGEST = (
    "test_recipes.py",
    "test_fit.py",
    "test_hub.py",
    "test_benchmark_training.py",
    "test_recipe_gpt2.py",
    "test_recipe_vit.py",
    "test_seeds.py",
    "test_inference_benchmark.py",
    "test_other_kinds.py",
    "test_export_language.py",
    "test_edge.py",
    "test_processes.py",
    "test_search.py",
    "test_training.py",
    "test_teachers.py",
    "test_main.py",
    "test_text_regression.py",
    "test_soft_targets.py",
    "test_page.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def what_is_imported_is_no_garbage() -> None:
    """Every training and every conversion collects garbage, which would look through all modules for a third of a second each time."""
    gc.collect()
    gc.freeze()


WORDS = {
    "sport": ["goal", "match", "team", "coach", "league", "striker"],
    "tech": ["chip", "software", "code", "server", "phone", "network"],
    "trade": ["market", "profit", "shares", "bank", "price", "economy"],
}
FILLER = ["the", "a", "of", "and", "in", "on", "said", "new", "today", "year", "with", "for"]


def make_texts(examples: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of 3 to 25 words whose class shows in a few of them."""
    generator = np.random.default_rng(seed)
    labels = list(WORDS)
    rows = []
    for index in range(examples):
        label = labels[index % len(labels)]
        words = list(generator.choice(FILLER, generator.integers(2, 16)))
        words += list(generator.choice(WORDS[label], generator.integers(2, 6)))
        rows.append((" ".join(generator.permutation(words)) + f" {index}", label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, str]], columns: tuple[str, str] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def make_tokenizer() -> Any:
    """A WordPiece tokenizer of 80 or so pieces: the words above, and digits to spell numbers with."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *FILLER,
        *(word for words in WORDS.values() for word in words),
    ]
    pieces += [str(digit) for digit in range(10)] + [f"##{digit}" for digit in range(10)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return BertTokenizerFast(tokenizer_object=BertWordPieceTokenizer(vocab=vocabulary)._tokenizer)


def write_byte_encoder(directory: Path, texts: Sequence[str], vocabulary: int) -> Path:
    """A RoBERTa without a head, whose byte-level BPE was trained on the texts: other tokens, and as many of them, than BERT's."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModel, RobertaTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=special)
    tokenizer.save_model(str(directory))
    RobertaTokenizerFast(str(directory / "vocab.json"), str(directory / "merges.txt")).save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": 66, "num_hidden_layers": 2, "initializer_range": 0.1}
    AutoModel.from_config(tiny_config("roberta", pad_token_id=1, **sizes)).save_pretrained(directory)
    return directory


IMAGE_FAMILIES = ("vit", "deit")


def make_image(label: str, generator: np.random.Generator, size: int = 8) -> np.ndarray:
    """A noisy picture (size, size, 3) whose class shows in where it is bright: the left half, the upper half, or all of it."""
    pixels = generator.integers(0, 100, (size, size, 3))
    bright = {"sport": np.s_[:, : size // 2], "tech": np.s_[: size // 2], "trade": np.s_[:]}[label]
    pixels[bright] += 120
    return pixels.astype(np.uint8)


def write_image_folder(folder: Path, examples: int = 120, seed: int = 0, size: int = 8) -> Path:
    """Images in one sub-folder per class."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    for index in range(examples):
        label = list(WORDS)[index % len(WORDS)]
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_image(label, generator, size)).save(folder / label / f"{index:03}.png")
    return folder


def make_image_processor(size: int = 8, mean: float = 0.5) -> Any:
    from transformers import ViTImageProcessorPil

    sides = {"height": size, "width": size}
    return ViTImageProcessorPil(size=sides, image_mean=[mean] * 3, image_std=[0.5] * 3)


def example_inputs(model_type: str = "bert") -> dict[str, torch.Tensor]:
    """A batch of 3: ragged texts, or images."""
    generator = torch.Generator().manual_seed(0)
    if model_type in IMAGE_FAMILIES:
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
    tokens = torch.randint(5, 50, (3, 12), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    mask[2, 3:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def tiny_config(model_type: str = "bert", **changes: Any) -> Any:
    """A config of 4 layers, 4 heads, 32 hidden and 64 feed-forward units, without dropout; of two stages for a ResNet."""
    from transformers import AutoConfig

    sizes: dict[str, Any] = {"vocab_size": 80, "max_position_embeddings": 64}
    if model_type in IMAGE_FAMILIES:
        sizes = {"image_size": 8, "patch_size": 4, "num_channels": 3}
    if model_type == "resnet":
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    elif model_type == "distilbert":
        sizes |= {"dim": 32, "hidden_dim": 64, "n_layers": 4, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
        sizes |= {"seq_classif_dropout": 0.0}
    else:
        sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "embedding_size": 32}
    if model_type == "electra":
        sizes["summary_last_dropout"] = 0.0
    labels = dict(enumerate(WORDS))
    names = {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    return AutoConfig.for_model(model_type, **{**sizes, **names, **changes})


def tiny_model(model_type: str = "bert", seed: int = 0, **changes: Any) -> Any:
    """A classifier with weights large enough that every part of it shows in the logits."""
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = tiny_config(model_type, architectures=[], **changes)
    of_images = model_type in (*IMAGE_FAMILIES, "resnet")
    model_class = AutoModelForImageClassification if of_images else AutoModelForSequenceClassification
    model = model_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def csv_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "articles.csv", make_texts(240))


@pytest.fixture(scope="session")
def task(csv_file: Path) -> Any:
    from pipelines.core.config import DataConfig
    from pipelines.tasks.text_classification import TextClassification

    return TextClassification(DataConfig(dataset=str(csv_file), max_length=32, validation_size=0.2, test_size=0.2))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def image_task(image_folder: Path) -> Any:
    from pipelines.core.config import DataConfig
    from pipelines.tasks.image_classification import ImageClassification

    return ImageClassification(DataConfig(dataset=str(image_folder), validation_size=0.2, test_size=0.2))


@pytest.fixture(scope="session")
def image_processor() -> Any:
    return make_image_processor()


@pytest.fixture
def task_and_processor(request: pytest.FixtureRequest, model_type: str) -> tuple[Any, Any]:
    """The task, and a tokenizer or an image processor, for the family that a test is for."""
    of_images = model_type in IMAGE_FAMILIES
    names = ("image_task", "image_processor") if of_images else ("task", "tokenizer")
    return request.getfixturevalue(names[0]), request.getfixturevalue(names[1])


def write_pretrained(directory: Path, tokenizer: Any, layers: int) -> Path:
    """A model directory without a head, as a pretrained encoder is published."""
    from transformers import AutoModel

    torch.manual_seed(0)
    config = tiny_config("bert", num_hidden_layers=layers, initializer_range=0.1)
    AutoModel.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Of two layers, which whole chains begin with: to export a layer takes more than a second."""
    return write_pretrained(tmp_path_factory.mktemp("pretrained"), tokenizer, 2)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model directory with a head for the labels of the csv file."""
    directory = tmp_path_factory.mktemp("teacher")
    tiny_model().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def quick_arguments(directory: Path, **changes: Any) -> Any:
    """Of a training without evaluations and checkpoints that logs each step."""
    from pipelines.training.arguments import TrainingArguments

    settings = {"use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3, "logging_steps": 1}
    settings |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    return TrainingArguments(str(directory), **settings | changes)


@contextmanager
def killed_after(epochs: float) -> Iterator[None]:
    """A training in here is killed: after so many epochs its next step raises KeyboardInterrupt."""
    from transformers import Trainer

    real = Trainer.training_step

    def step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.state.epoch >= epochs:
            raise KeyboardInterrupt
        return real(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture
def training(tmp_path: Path) -> Any:
    from pipelines.training.arguments import TrainingArguments

    return TrainingArguments(
        output_dir=str(tmp_path / "training"), num_train_epochs=1, learning_rate=1e-3, disable_tqdm=True, use_cpu=True
    )


@pytest.fixture
def timed_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmark's workers are no processes of their own, whose imports take seconds; tests/report/test_benchmark.py has those."""
    from processes import time_here

    monkeypatch.setattr("pipelines.onnx.measure.run_worker", time_here)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained_teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, task: Any) -> Path:
    """A teacher of four layers that knows the task of the csv file."""
    return write_teacher(tmp_path_factory, tokenizer, task, 4)


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, task: Any) -> Path:
    """As trained_teacher, of three layers."""
    return write_teacher(tmp_path_factory, tokenizer, task, 3)


def write_teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, task: Any, layers: int) -> Path:
    from pipelines.core.config import TeacherConfig
    from pipelines.training.fine_tune import fine_tune

    directory = tmp_path_factory.mktemp("teacher")
    pretrained = write_pretrained(tmp_path_factory.mktemp("pretrained"), tokenizer, layers)
    training = quick_arguments(directory, per_device_train_batch_size=8)
    torch.manual_seed(0)
    outcome = fine_tune(
        str(pretrained), directory, task, TeacherConfig(teacher_epochs=8, teacher_learning_rate=3e-3), training
    )
    assert outcome.metrics["validation"]["accuracy"] > 0.8
    return directory


def tiny_language_model(model_type: str = "gpt2", seed: int = 0, **changes: Any) -> Any:
    """A causal model of 3 layers, 4 heads and 300 tokens whose attention and positions show in the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 64}
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**tokens, **sizes, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(2 if "wte" in name or "embed" in name else 6)
            elif "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def language_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of a few sentences."""
    texts = [" ".join(text for text, _ in make_texts(6, seed)) + "." for seed in range(40)]
    path = tmp_path_factory.mktemp("text") / "documents.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def language_task(language_text: Path) -> Any:
    from pipelines.core.config import DataConfig, LanguageConfig
    from pipelines.tasks.text_generation.task import LanguageModeling

    return LanguageModeling(DataConfig(dataset=str(language_text), max_length=32), LanguageConfig(vocabulary_size=300))


@pytest.fixture(scope="session")
def language_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that only says what shape a GPT-2 has."""
    directory = tmp_path_factory.mktemp("language_shape")
    tiny_language_model(n_layer=2).config.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def language_model_dir(tmp_path_factory: pytest.TempPathFactory, language_task: Any) -> Path:
    """A GPT-2 with a tokenizer trained on the documents; its weights are large, but random."""
    from pipelines.data.windows import train_tokenizer

    directory = tmp_path_factory.mktemp("language_model")
    train_tokenizer(language_task.data.splits["train"]["text"], 300).save_pretrained(directory)
    tiny_language_model().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def language_teacher(tmp_path_factory: pytest.TempPathFactory, language_model_dir: Path, language_task: Any) -> Path:
    """The same model after a few steps, so that it is better than guessing."""
    directory = tmp_path_factory.mktemp("language_teacher")
    tokenizer = language_task.load_processor(str(language_model_dir))
    model = language_task.load_model(str(language_model_dir))
    batch = language_task.collate(tokenizer)(list(language_task.features(tokenizer)["train"].select(range(16))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(10):
        model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_bundle(source: Path, directory: Path, task: Any) -> Path:
    """The bundle of the ONNX directory `source`, without a page."""
    from pipelines.core.config import BundleConfig
    from pipelines.edge.bundle import build_bundle

    directory.mkdir()
    build_bundle(str(source), directory, task, BundleConfig(web=False))
    return directory


@pytest.fixture(scope="session")
def text_onnx(tmp_path_factory: pytest.TempPathFactory, teacher: Path, task: Any) -> Path:
    """A classifier of texts, exported and quantized."""
    from pipelines.core.config import QuantizeConfig
    from pipelines.onnx.export import export_onnx
    from pipelines.onnx.quantize import quantize_onnx

    directory = tmp_path_factory.mktemp("text")
    for name in ("onnx", "quantized"):
        (directory / name).mkdir()
    export_onnx(str(teacher), directory / "onnx", task)
    quantize_onnx(str(directory / "onnx"), directory / "quantized", task, QuantizeConfig(max_quality_drop=1.0))
    return directory


@pytest.fixture(scope="session")
def text_bundle(text_onnx: Path, task: Any) -> Path:
    return make_bundle(text_onnx / "quantized", text_onnx / "bundle", task)


@pytest.fixture(scope="session")
def image_onnx(tmp_path_factory: pytest.TempPathFactory, image_task: Any) -> Path:
    """A classifier of images, exported."""
    from pipelines.onnx.export import export_onnx

    directory = tmp_path_factory.mktemp("image")
    model = tiny_model("vit", image_size=8)
    model.save_pretrained(directory / "model")
    make_image_processor().save_pretrained(directory / "model")
    (directory / "onnx").mkdir()
    export_onnx(str(directory / "model"), directory / "onnx", image_task)
    return directory / "onnx"


@pytest.fixture(scope="session")
def image_bundle(image_onnx: Path, image_task: Any) -> Path:
    return make_bundle(image_onnx, image_onnx.parent / "bundle", image_task)


@pytest.fixture(scope="session")
def language_bundle(tmp_path_factory: pytest.TempPathFactory, language_model_dir: Path, language_task: Any) -> Path:
    from pipelines.onnx.export import export_onnx

    directory = tmp_path_factory.mktemp("language")
    # With these random weights the likeliest token is not the end.
    tiny_language_model(seed=1).save_pretrained(directory / "model")
    language_task.load_processor(str(language_model_dir)).save_pretrained(directory / "model")
    (directory / "onnx").mkdir()
    export_onnx(str(directory / "model"), directory / "onnx", language_task)
    return make_bundle(directory / "onnx", directory / "bundle", language_task)
