"""Tiny models of every family through the chain: what works, and why the rest does not. It writes the table of docs/models.md.

    python benchmarks/families.py --output docs/models.md        # all, about fifteen minutes on two cores
    python benchmarks/families.py modernbert swin                # only these, printed

Each has four layers, four heads and random weights; it is fine-tuned, distilled into half of its layers, pruned by a quarter, exported,
quantized and bundled.
"""

from __future__ import annotations

import argparse
import csv
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WORDS = {
    "sport": "goal match team coach league striker".split(),
    "tech": "chip software code server phone network".split(),
    "trade": "market profit shares bank price economy".split(),
}
FILLER = "the a of and in on said new today year with for".split()

_SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {**_SIZES, "max_position_embeddings": 66}
# Two query heads for each of four keys.
_DECODER = {**_TEXT, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6}
_IMAGE = {**_SIZES, "image_size": 16, "patch_size": 4}
_DEBERTA = {
    **_TEXT,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "type_vocab_size": 0,
    "position_buckets": 16,
}
_STAGES = {"depths": [2, 2], "hidden_sizes": [16, 32]}
SHAPES: dict[str, dict[str, Any]] = {
    "bert": _TEXT,
    "roberta": {**_TEXT, "pad_token_id": 0},
    "xlm-roberta": {**_TEXT, "pad_token_id": 0},
    "camembert": {**_TEXT, "pad_token_id": 0},
    "electra": {**_TEXT, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 66},
    "mpnet": {**_TEXT, "pad_token_id": 0},
    "deberta": _DEBERTA,
    "deberta-v2": {**_DEBERTA, "position_biased_input": False, "share_att_key": True},
    "albert": {**_TEXT, "embedding_size": 16},
    "modernbert": {
        **_TEXT,
        "pad_token_id": 0,
        "global_attn_every_n_layers": 3,
        "local_attention": 8,
        "classifier_pooling": "mean",
    },
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 64},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 64, "rotary_dim": 4},
    "gpt_neox": _TEXT,
    "opt": {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32},
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma", "granite"), _DECODER),
    "qwen2": {name: size for name, size in _DECODER.items() if name != "head_dim"},
    **dict.fromkeys(("gemma2", "gemma3_text"), {**_DECODER, "sliding_window": 8, "sliding_window_pattern": 2}),
    "smollm3": {name: size for name, size in _DECODER.items() if name != "head_dim"},
    "phi": {name: size for name, size in _DECODER.items() if name != "head_dim"},
    "phi3": {name: size for name, size in _DECODER.items() if name != "head_dim"},
    **dict.fromkeys(("vit", "deit"), _IMAGE),
    "beit": {**_IMAGE, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), {**_IMAGE, "mlp_ratio": 2}),
    "swin": {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [4, 4],
        "window_size": 4,
    },
    **dict.fromkeys(("convnext", "convnextv2"), {**_STAGES, "num_stages": 2, "image_size": 16}),
    "resnet": {**_STAGES, "embedding_size": 16, "layer_type": "basic"},
}


def task_of(model_type: str) -> str:
    if {"image_size", "layer_type"} & SHAPES[model_type].keys():
        return "image-classification"
    decoders = [*SHAPES][[*SHAPES].index("gpt2") : [*SHAPES].index("vit")]
    return "text-generation" if model_type in decoders else "text-classification"


def tiny_model(model_type: str, **changes: Any) -> Any:
    """A model of the family with its task's head, in evaluation, with the random weights of seed 0."""
    import torch
    from transformers import AutoConfig

    from pipelines.tasks import task_class

    torch.manual_seed(0)
    task, settings = task_of(model_type), dict(SHAPES[model_type])
    if task == "text-generation":
        settings |= {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    else:
        settings |= {
            "vocab_size": 80,
            "id2label": dict(enumerate(WORDS)),
            "label2id": {word: i for i, word in enumerate(WORDS)},
        }
    config = AutoConfig.for_model(model_type, **{"architectures": [], **settings, **changes})
    return task_class(task).auto_class.from_config(config).eval()


def write_model(model_type: str, directory: Path) -> Path:
    """A tiny model with a tokenizer or an image processor."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast, ViTImageProcessorPil

    from pipelines.data.windows import train_tokenizer

    processors: dict[str, Any] = {
        "text-generation": lambda: train_tokenizer([text for text, _ in make_texts(240)], 300),
        "image-classification": lambda: ViTImageProcessorPil(size={"height": 16, "width": 16}),
        "text-classification": lambda: BertTokenizerFast(
            tokenizer_object=BertWordPieceTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})._tokenizer,
            model_input_names=["input_ids", "attention_mask"],
        ),
    }
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
    tiny_model(model_type).save_pretrained(directory)
    processors[task_of(model_type)]().save_pretrained(directory)
    return directory


def make_texts(count: int) -> list[tuple[str, str]]:
    """Texts whose class shows in a few of their words."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        label = list(WORDS)[index % len(WORDS)]
        words = [
            *generator.choice(FILLER, generator.integers(2, 12)),
            *generator.choice(WORDS[label], generator.integers(2, 5)),
        ]
        rows.append((" ".join(generator.permutation(words)) + f" {index}", label))
    return rows


def write_data(task: str, directory: Path) -> Path:
    from PIL import Image

    if task == "image-classification":
        generator = np.random.default_rng(0)
        for index in range(150):
            folder = directory / "images" / list(WORDS)[index % len(WORDS)]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 60, (16, 16, 3)) + 90 * (index % len(WORDS))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        return directory / "images"
    rows = make_texts(240)
    if task == "text-generation":
        path = directory / "texts.txt"
        path.write_text("\n\n".join(". ".join(text for text, _ in rows[at : at + 6]) for at in range(0, 240, 4)))
        return path
    path = directory / "texts.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def try_family(model_type: str, directory: Path) -> dict[str, str]:
    """What each stage says of a tiny model of the family: "yes", or the reason why not."""
    from pipelines.cli import read_settings
    from pipelines.core.errors import InputError, VerificationError
    from pipelines.core.records import read_record
    from pipelines.onnx.fuse import NOT_FUSED
    from pipelines.verbs import VERBS

    task, model = task_of(model_type), write_model(model_type, directory / "model")
    data = write_data(task, directory)
    rate = ["--per_device_train_batch_size", 8, "--learning_rate", "2e-3", "--disable_tqdm", "true"]
    teacher = ["--teacher_model", directory / "teacher", *rate]
    prune = ["--prune_heads", 0.25, "--prune_ffn", 0.25, "--prune_steps", 1, "--prune_epochs", 1]
    layers = 1 if "depths" in SHAPES[model_type] else 2
    stages: dict[str, list[Any]] = {
        "fine-tune": ["--teacher_model", model, "--teacher_epochs", 6, "--teacher_learning_rate", "3e-3", *rate],
        "distill": [*teacher, "--student_layers", layers, "--num_train_epochs", 2],
        "prune": ["--model", None, *teacher, *prune],
        "export": ["--model", None],
        "quantize": ["--model", None, "--max_quality_drop", 0.9],
        "bundle": ["--model", None, "--web", "false"],
    }
    found, newest = {}, model
    for stage, flags in stages.items():
        target = directory / {"fine-tune": "teacher"}.get(stage, stage)
        argv = ["--task", task, "--dataset", data, "--max_length", 32, *flags, "--output_dir", target]
        try:
            VERBS[stage][0](read_settings(stage, [str(newest if flag is None else flag) for flag in argv]))
        except (InputError, VerificationError) as error:
            found[stage] = f"no: {error}"
            continue
        except Exception as error:  # a fault of ours, which the table should show
            found[stage] = f"fails: {type(error).__name__}: {error}"
            continue
        found[stage], newest = "yes", target
    record = read_record(directory / "prune")
    if record is not None:
        found["prune"] = ", ".join(kind for kind in ("heads", "neurons") if record["details"].get(f"{kind}_removed"))
    record = read_record(directory / "quantize")
    nodes = record["details"]["fused_nodes"] if record else {"attention": 0, "attention_blocks": 0}
    blocks, fused = nodes["attention_blocks"], nodes["attention"]
    found["fused attention"] = (
        "yes"
        if fused == blocks > 0
        else f"{fused} of {blocks} blocks: {NOT_FUSED.get(model_type, 'the others are slower')}"
        if blocks
        else "no attention"
    )
    return found


def table(found: dict[str, dict[str, str]]) -> list[str]:
    """The rows as Markdown; a reason is one sentence of the message."""
    from pipelines.models.families import removable

    lines = [
        "| family | trained | fewer layers | pruned | exported | fused attention | int8 | bundle |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model_type, stages in found.items():
        pruned = [stages["prune"]] if not stages["prune"].startswith("no") else []
        reasons = {kind: why for kind, why in removable(tiny_model(model_type).config).items() if isinstance(why, str)}
        pruned += [f"no {kind}: {why}" for kind, why in reasons.items()]
        order = [stages[stage] for stage in ("fine-tune", "distill")] + ["; ".join(pruned)]
        order += [stages[stage] for stage in ("export", "fused attention", "quantize", "bundle")]
        cells = [re.split(r"(?<=[a-z)])\. ", cell)[0].replace("|", "/").replace("\n", " ")[:200] for cell in order]
        lines.append(f"| {model_type} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="Left out: all.")
    parser.add_argument("--output", type=Path, help="The page whose table is replaced.")
    flags = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    for model_type in flags.families or SHAPES:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            found[model_type] = try_family(model_type, Path(directory))
        print(f"{model_type}: {found[model_type]} ({time.perf_counter() - start:.0f} s)", flush=True)
    lines = "\n".join(table(found))
    print(lines)
    if flags.output:
        page = flags.output.read_text(encoding="utf-8")
        flags.output.write_text(
            re.sub(r"^\| family \|(?:.*\n)+?(?=\n|\Z)", lambda _: f"{lines}\n", page, flags=re.MULTILINE),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
