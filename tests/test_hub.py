"""Publishing a run: the real client of the Hub against a server on this machine that speaks its protocol."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from huggingface_hub import ModelCard, constants

from conftest import quick_arguments
from hub_server import HubServer
from pipelines.core.errors import InputError
from pipelines.core.records import CHECKSUM, RECORD, checksum, fingerprint, with_checksum
from pipelines.data.images import read_image
from pipelines.hub import check_access, check_run, push
from pipelines.onnx.predict import predict_onnx, run_session
from pipelines.report.card import format_model_card
from pipelines.report.report import read_report
from pipelines.runtime import generate, infer
from pipelines.runtime.infer import file_checksum
from pipelines.tasks import task_class

REPOSITORY = Path(__file__).parents[1]
FLAGS = {"max_length": 32, "teacher_model": "/tmp/me/bert"}
TOKEN, READ_TOKEN = "hf_ThisIsTheSecret", "hf_ThisIsAnotherSecret_read"
REPORT = {"README.md", "report.json", "report.md", "report.png"}
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
GRAPHS = {"onnx/model.onnx", "onnx/model_fused.onnx", "onnx/model_quantized.onnx"}
IN_BUNDLE = "config.json infer.py manifest.json model.onnx requirements.txt tokenizer.json tokenizer_config.json"
BUNDLE = {f"bundle/{name}" for name in IN_BUNDLE.split()}
READ_BACK = """
import json, sys
import onnxruntime
from huggingface_hub import hf_hub_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer

name, texts = sys.argv[1], sys.argv[2:]
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(name), AutoTokenizer.from_pretrained(name)
inputs = [tokenizer([text], truncation=True, return_tensors="pt") for text in texts]
logits = {"pruned": [model(**one).logits[0].tolist() for one in inputs], "labels": list(model.config.label2id)}
for stage, file in (("onnx", "model"), ("quantized", "model_fused")):
    session = onnxruntime.InferenceSession(hf_hub_download(name, f"onnx/{file}.onnx"))
    names = [node.name for node in session.get_inputs()]
    logits[stage] = [session.run(["logits"], {name: one[name].numpy() for name in names})[0][0].tolist() for one in inputs]
print(json.dumps(logits))
"""

IN_NODE = """
import { env, pipeline } from "@huggingface/transformers";
const [remoteHost, name, task, input, options] = process.argv.slice(1);
Object.assign(env, { remoteHost, cacheDir: "cache" });
const answers = {};
for (const [stage, dtype] of [["onnx", "fp32"], ["quantized", "q8"]]) {
    const ask = await pipeline(task, name, { dtype });
    answers[stage] = await ask(input, JSON.parse(options));
}
console.log(JSON.stringify(answers));
"""
IN_OPTIMUM = """
import json, sys
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForImageClassification, ORTModelForSequenceClassification
from transformers import AutoImageProcessor, AutoTokenizer, pipeline

name, task, given, options = sys.argv[1:]
model_class, reader = {
    "text-classification": (ORTModelForSequenceClassification, {"tokenizer": AutoTokenizer}),
    "image-classification": (ORTModelForImageClassification, {"image_processor": AutoImageProcessor}),
    "text-generation": (ORTModelForCausalLM, {"tokenizer": AutoTokenizer}),
}[task]
reader = {kind: reads.from_pretrained(name) for kind, reads in reader.items()}
answers = {}
for stage, file in (("onnx", "model"), ("quantized", "model_quantized")):
    model = model_class.from_pretrained(name, subfolder="onnx", file_name=f"{file}.onnx")
    (answers[stage],) = pipeline(task, model=model, **reader)([given], **json.loads(options))
print(json.dumps(answers))
"""
# The newest of both. optimum-onnx stops at this transformers, and all of it goes beside the tests' own torch and ONNX Runtime.
TRANSFORMERS_JS = "@huggingface/transformers@4.3.1"
OPTIMUM = [
    "optimum-onnx==0.1.0",
    "optimum==2.1.0",
    "transformers==4.57.6",
    "huggingface_hub==0.36.2",
    "tokenizers==0.22.2",
]


def report_untimed(run: Any, recipe: str) -> None:
    """What is timed costs a fresh process a stage, and is of no interest here."""
    from pipelines.core.config import ReportConfig
    from pipelines.report.results import report_run

    timing = {
        "latency_ms": {"p50": 2.0, "p95": 3.0, "batch_size": 1, "shape": [1, 32]},
        "samples_per_second": 500.0,
        "time_to_first_token_ms": 2.0,
        "peak_memory_bytes": 50_000_000,
        "threads": 1,
        "rounds": [{"p50": 2.0}],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.report.results.measure", lambda subjects, **_: {one.name: timing for one in subjects})
        report_run(run, recipe, ReportConfig(benchmark_rounds=1, benchmark_seconds=0.1), FLAGS)
    run._lock.release()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher: Path, task: Any) -> Path:
    """A verified run with its report: a teacher, cut to half its heads and neurons, exported, quantized and bundled."""
    from pipelines.core.config import BundleConfig, DistillConfig, PruneConfig, QuantizeConfig, TeacherConfig
    from pipelines.core.run import Run
    from pipelines.edge.bundle import build_bundle
    from pipelines.onnx.export import export_onnx
    from pipelines.onnx.quantize import quantize_onnx
    from pipelines.training.arguments import TrainingArguments
    from pipelines.training.baselines import fit_baseline
    from pipelines.training.fine_tune import fine_tune
    from pipelines.training.prune import prune_and_recover

    directory = tmp_path_factory.mktemp("runs") / "small_bert"
    run = Run(directory, task, seed=0)
    training = TrainingArguments(output_dir=str(directory), use_cpu=True, disable_tqdm=True)
    learning = {"distributed": True, "training": training}
    run.stage("teacher", fine_tune, str(teacher), teacher=TeacherConfig(teacher_epochs=0), **learning)
    prune = PruneConfig(prune_heads=0.5, prune_steps=1, prune_epochs=0)
    distill = DistillConfig(soft_targets="online")
    teacher_stage = run.directory / "teacher"
    run.stage("pruned", prune_and_recover, "teacher", teacher=teacher_stage, prune=prune, distill=distill, **learning)
    run.stage("onnx", export_onnx, "pruned")
    run.stage("quantized", quantize_onnx, "onnx", quantize=QuantizeConfig(max_quality_drop=1))
    run.stage("bundle", build_bundle, "quantized", bundle=BundleConfig(web=False))
    # A pickle, which is not published.
    run.stage("tfidf_logistic_regression", fit_baseline, None, baseline="tfidf_logistic_regression")
    report_untimed(run, "distill_bert")
    return directory


@pytest.fixture
def a_run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "small_bert"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A Hub of one user, to which the client in this process is turned."""
    directory = tmp_path / "hub"
    directory.mkdir()
    server = HubServer(directory, {TOKEN: "ann", READ_TOKEN: "ann"})
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    yield server
    assert not server.unknown
    server.shutdown()
    server.server_close()


def client_environment(hub: HubServer, tmp_path: Path, token: str = TOKEN) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "huggingface")}
    return environment | {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(REPOSITORY)}


def push_command(run: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "pipelines", "push", "--output_dir", str(run), "--hub_model_id", name]


def refusal(run: Path, name: str = "ann/small", **arguments: Any) -> str:
    """The message with which a push is refused: what was expected, what was found, and no secret."""
    with pytest.raises(InputError) as raised:
        push(run, name, **({"token": TOKEN} | arguments))
    message = str(raised.value)
    assert "expected" in message
    assert "found" in message
    assert "Secret" not in message
    assert "\n" not in message
    return message


def test_one_private_commit_with_the_files_that_others_look_for(a_run: Path, hub: HubServer) -> None:
    (a_run / "pruned" / "notes.txt").write_text("mine, and no part of the stage")
    page = a_run / "bundle" / "web" / "library.mjs"
    page.parent.mkdir()
    page.write_text("// for a browser\n")
    change_record(a_run, "bundle", lambda record: record["files"].update({"web/library.mjs": file_checksum(page)}))
    address = push(a_run, "ann/small", token=TOKEN)

    repository = hub.repository("ann/small")
    assert repository is not None
    assert repository["private"] is True
    assert len(repository["commits"]) == 2, "the Hub's own first commit, and the push"
    assert address.endswith(repository["commits"][-1]["oid"])
    files = hub.files("ann/small")
    assert set(files) == REPORT | MODEL | GRAPHS | BUNDLE | {"bundle/web/library.mjs", ".gitattributes"}
    sources = {
        "config.json": "pruned/config.json",
        "model.safetensors": "pruned/model.safetensors",
        "onnx/model.onnx": "onnx/model.onnx",
        "onnx/model_fused.onnx": "quantized/model.onnx",
        "onnx/model_quantized.onnx": "quantized/onnx/model_quantized.onnx",
        "bundle/infer.py": "bundle/infer.py",
        "bundle/web/library.mjs": "bundle/web/library.mjs",
    }
    for name, source in sources.items():
        assert hub.content(files[name]) == (a_run / source).read_bytes(), name
    tokenizer = json.loads((a_run / "pruned" / "tokenizer_config.json").read_text())
    published = json.loads(hub.content(files["tokenizer_config.json"]))
    assert published == tokenizer | {"model_max_length": 32} != tokenizer
    large = {name for name, file in files.items() if "lfs" in file}
    assert large == {"model.safetensors", *GRAPHS, "bundle/model.onnx", "report.png"}
    (created,) = [sent for method, path, sent in hub.requests if path == "/api/repos/create"]
    assert created["visibility"] == "private"


def test_what_is_published_holds_no_secret_and_no_folder_of_this_machine(a_run: Path, hub: HubServer) -> None:
    push(a_run, "ann/small", token=TOKEN)
    checked = 0
    for name, file in hub.files("ann/small").items():
        assert b"Secret" not in hub.content(file), name
        assert str(a_run).encode() not in hub.content(file), name
        assert b"/tmp/" not in hub.content(file), name
        checked += 1
    assert checked >= 10
    pushed = json.loads(hub.content(hub.files("ann/small")["report.json"]))
    assert pushed["made_by"]["flags"] == FLAGS | {"teacher_model": "<local>/bert"}
    assert pushed[CHECKSUM] == checksum(pushed)
    pushed["made_by"]["flags"] = FLAGS
    assert pushed | {CHECKSUM: checksum(pushed)} == json.loads(
        (a_run / "report.json").read_text()
    )  # all else is the same
    for path in a_run.rglob("*"):
        assert not path.is_file() or b"Secret" not in path.read_bytes(), path


@pytest.mark.slow
def test_weights_beside_a_graph_are_published_under_a_name_of_their_own(
    tmp_path: Path, teacher: Path, task: Any, tokenizer: Any, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they lie beside graphs above 2 GB: those of both graphs have the same name in the run."""
    monkeypatch.setattr("pipelines.onnx.file.LARGEST_FILE", 1000)
    run = make_run(tmp_path / "large", task, teacher, "distill_bert")
    push(run, "ann/large", token=TOKEN)
    files = hub.files("ann/large")
    assert {name for name in files if name.startswith("onnx/")} == GRAPHS | {f"{name}_data" for name in GRAPHS}
    inputs = task.verification_feeds(tokenizer)[0]
    for name, graph in (
        ("model", "onnx/model.onnx"),
        ("model_fused", "quantized/model.onnx"),
        ("model_quantized", "quantized/onnx/model_quantized.onnx"),
    ):
        for file in (f"{name}.onnx", f"{name}.onnx_data"):
            (tmp_path / file).write_bytes(hub.content(files[f"onnx/{file}"]))
        found, expected = (
            run_session(infer.open_session(path), inputs)["logits"] for path in (tmp_path / f"{name}.onnx", run / graph)
        )
        assert np.array_equal(found, expected)


def test_the_same_push_again_makes_no_second_commit(a_run: Path, hub: HubServer, capsys: Any) -> None:
    assert push(a_run, "ann/small", token=TOKEN) == push(a_run, "ann/small", token=TOKEN)
    assert len(hub.repository("ann/small")["commits"]) == 2
    assert "push: ann/small is as this run already" in capsys.readouterr().out


def test_a_changed_run_replaces_what_an_earlier_one_left(a_run: Path, hub: HubServer) -> None:
    push(a_run, "ann/small", token=TOKEN)
    assert set(hub.files("ann/small")) > BUNDLE
    shutil.rmtree(a_run / "bundle")
    # What others would open in place of our weights goes, too; what is read by nobody stays.
    file = hub.files("ann/small")["config.json"]
    hub.commit("ann/small", "by hand", {"adapter_config.json": file, "model.safetensors.index.json": file})
    push(a_run, "ann/small", token=TOKEN)
    assert set(hub.files("ann/small")) == REPORT | MODEL | GRAPHS | {".gitattributes"}
    assert len(hub.repository("ann/small")["commits"]) == 4


def test_a_name_without_a_namespace_is_the_users_own(a_run: Path, hub: HubServer) -> None:
    push(a_run, token=TOKEN)
    card = hub.content(hub.files("ann/small_bert")["README.md"]).decode()
    assert '"ann/small_bert"' in card


def test_public_only_where_asked_and_never_by_surprise(a_run: Path, hub: HubServer) -> None:
    push(a_run, "ann/open", private=False, token=TOKEN)
    assert hub.repository("ann/open")["private"] is False
    message = refusal(a_run, "ann/open")
    assert "exists and is public" in message
    assert "--hub_private_repo false" in message


def test_the_published_model_is_loaded_by_its_name_and_scores_the_same(
    a_run: Path, hub: HubServer, tmp_path: Path, task: Any
) -> None:
    environment = client_environment(hub, tmp_path)
    pushed = subprocess.run(
        push_command(a_run, "ann/small"), env=environment, capture_output=True, text=True, check=False, cwd="/"
    )
    assert pushed.returncode == 0, pushed.stderr
    assert "push: http" in pushed.stdout
    assert "Secret" not in pushed.stdout + pushed.stderr
    argv = [sys.executable, "-c", READ_BACK, "ann/small", *task.texts_of()]
    process = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, cwd="/")
    assert process.returncode == 0, process.stderr[-3000:]
    read = json.loads(process.stdout.splitlines()[-1])

    assert read["labels"] == task.label_names == ["sport", "tech", "trade"]
    references = np.array(task.data.splits["test"]["label"])
    features = task.features(task.load_processor(str(a_run / "pruned")))["test"]
    report = {stage["name"]: stage for stage in json.loads((a_run / "report.json").read_text())["stages"]}
    for name in ("pruned", "onnx", "quantized"):
        accuracy = (np.argmax(read[name], axis=1) == references).mean()
        assert accuracy == pytest.approx(report[name]["metrics"]["accuracy"])
    collate = task.collate(task.load_processor(str(a_run / "pruned")))
    for name in ("onnx", "quantized"):
        expected = predict_onnx(a_run / name / "model.onnx", features, collate, task)
        np.testing.assert_allclose(read[name], expected, atol=1e-6)
    np.testing.assert_allclose(read["pruned"], read["onnx"], atol=1e-4)
    without = {**environment, "HF_TOKEN": "", "HF_HOME": str(tmp_path / "stranger")}
    argv = [sys.executable, "-c", "import sys, huggingface_hub as h; h.hf_hub_download(sys.argv[1], 'config.json')"]
    assert subprocess.run([*argv, "ann/small"], env=without, capture_output=True, check=False).returncode != 0


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory, image_onnx: Path, image_task: Any) -> Path:
    return make_run(
        tmp_path_factory.mktemp("runs") / "small_vit", image_task, image_onnx.parent / "model", "distill_vit"
    )


@pytest.fixture(scope="module")
def language_run(tmp_path_factory: pytest.TempPathFactory, language_bundle: Path, language_task: Any) -> Path:
    directory, model = tmp_path_factory.mktemp("runs") / "small_gpt2", language_bundle.parent / "model"
    # Random weights guess classes often enough, and words never.
    return make_run(directory, language_task, model, "distill_gpt2", epochs=1, quantization="int8_blocks")


def make_run(
    directory: Path, task: Any, teacher: Path, recipe: str, epochs: float = 0, quantization: str | None = None
) -> Path:
    """A verified run with its report: a teacher, exported and quantized."""
    from pipelines.core.config import QuantizeConfig, TeacherConfig
    from pipelines.core.run import Run
    from pipelines.onnx.export import export_onnx
    from pipelines.onnx.quantize import quantize_onnx
    from pipelines.training.fine_tune import fine_tune

    run = Run(directory, task, seed=0)
    config = TeacherConfig(teacher_epochs=epochs, teacher_learning_rate=1e-2)
    learning = {"teacher": config, "training": quick_arguments(directory)}
    run.stage("teacher", fine_tune, str(teacher), distributed=True, **learning)
    run.stage("onnx", export_onnx, "teacher")
    run.stage(
        "quantized", quantize_onnx, "onnx", quantize=QuantizeConfig(quantization=quantization, max_quality_drop=1)
    )
    report_untimed(run, recipe)
    return directory


@pytest.mark.parametrize(
    ("run", "metric", "line"),
    [
        ("image_run", "accuracy", 'const classify = await pipeline("image-classification", "ann/small"'),
        pytest.param(
            *("language_run", "perplexity", 'const generate = await pipeline("text-generation", "ann/small"'),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_of_another_task_is_reported_and_published_in_its_words(
    run: str, metric: str, line: str, hub: HubServer, request: Any
) -> None:
    directory = request.getfixturevalue(run)
    push(directory, "ann/small", token=TOKEN)
    text = hub.content(hub.files("ann/small")["README.md"]).decode()
    report = json.loads((directory / "report.json").read_text())
    shipped = report["stages"][-1]
    results = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert results[metric] == pytest.approx(shipped["metrics"][metric], abs=5e-5)
    assert line in text
    assert report["stages"][0]["agreement"] == report["stages"][0]["quality_retained"] == 1
    assert 0 < shipped["agreement"] <= 1


@pytest.fixture(scope="module", params=["transformers.js", "optimum"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder into which another reader of the layout was installed, and its name."""
    folder = tmp_path_factory.mktemp("reader")
    install = ["npm", "install", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", TRANSFORMERS_JS]
    if request.param == "optimum":
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OPTIMUM]
    subprocess.run(install, cwd=folder, check=True)
    return folder, request.param


@pytest.mark.packages
@pytest.mark.parametrize(
    ("run", "kind", "options"),
    [
        ("finished", "text-classification", {"top_k": None}),
        ("image_run", "image-classification", {}),
        ("language_run", "text-generation", {"max_new_tokens": 8, "do_sample": False}),
    ],
)
def test_others_open_it_by_name_and_cut_texts_where_it_does(
    reader: tuple[Path, str], run: str, kind: str, options: dict[str, Any], hub: HubServer, tmp_path: Path, request: Any
) -> None:
    directory = request.getfixturevalue(run)
    push(directory, "ann/small", private=False, token=TOKEN)
    given = "the goal of the match 7 and the bank " * (1 if kind == "text-generation" else 20)
    if kind == "image-classification":
        given = str(min(request.getfixturevalue("image_folder").rglob("*.png")))
    (folder, name), environment = reader, client_environment(hub, tmp_path)
    command = ["node", "--input-type=module", "--eval", IN_NODE, f"{hub.address}/"]
    if name == "optimum":
        command = [sys.executable, "-c", IN_OPTIMUM]
        environment["PYTHONPATH"] = str(folder)
        options = options | ({"truncation": True} if kind == "text-classification" else {})
    argv = [*command, "ann/small", kind, given, json.dumps(options)]
    process = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    shutil.rmtree(folder / "cache", ignore_errors=True)
    for stage in ("onnx", "quantized"):
        if kind == "text-generation":
            model = generate.LanguageModel(directory / stage, infer.open_session(directory / stage / "model.onnx"))
            (continued,) = model.generate([given], generate.Sampling(8))
            assert found[stage] == [{"generated_text": given + continued}]
        else:
            scores = {answer["label"]: answer["score"] for answer in found[stage]}
            assert scores == pytest.approx(probabilities(directory / stage, kind, given), abs=1e-3)


def probabilities(directory: Path, kind: str, given: str) -> dict[str, float]:
    """What the graph of a stage answers to a text or an image."""
    import onnxruntime
    from transformers import AutoImageProcessor, AutoTokenizer

    if kind == "image-classification":
        processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
        inputs = processor([read_image({"path": given})], return_tensors="np")
    else:
        inputs = AutoTokenizer.from_pretrained(directory)([given], truncation=True, max_length=32, return_tensors="np")
    session = onnxruntime.InferenceSession(directory / "model.onnx")
    logits = session.run(["logits"], {node.name: inputs[node.name] for node in session.get_inputs()})[0][0]
    return dict(zip(["sport", "tech", "trade"], np.exp(logits) / np.exp(logits).sum(), strict=True))


# The card


def test_the_card_says_what_the_report_says_and_its_lines_for_the_bundle_run(
    a_run: Path, hub: HubServer, tmp_path: Path
) -> None:
    push(a_run, "ann/small", token=TOKEN)
    text = hub.content(hub.files("ann/small")["README.md"]).decode()
    card = ModelCard(text)
    report = json.loads((a_run / "report.json").read_text())
    (shipped,) = [stage for stage in report["stages"] if stage["name"] == "quantized"]
    results = {result.metric_type: result for result in card.data.eval_results}
    assert card.data.model_name == "small"
    assert set(results) == {"accuracy", "f1", "matthews_correlation"}
    assert results["accuracy"].metric_value == pytest.approx(shipped["metrics"]["accuracy"], abs=5e-5)
    assert results["accuracy"].dataset_split == "test"
    assert card.data.pipeline_tag == results["f1"].task_type == "text-classification"
    assert card.data.library_name == "transformers"
    assert {"pocketformers", "onnx", "pruning", "int8"} <= set(card.data.tags)
    for section in ("How to use it", "Results", "What compression broke", "Data", "Limitations", "Licence"):
        assert f"\n## {section}\n" in text
    assert "![Quality against size and against latency](report.png)" in text
    for line in (
        'classify = pipeline("text-classification", model="ann/small")',
        'const classify = await pipeline("text-classification", "ann/small", { dtype: "q8" });',
        'hf download ann/small --include "bundle/*" --local-dir . && pip install -r bundle/requirements.txt',
    ):
        assert line in text
    row = f"| quantized | {shipped['metrics']['accuracy']:.3f} |"
    assert text.split("\n## Results\n")[1].count(row) == 1
    assert report["broken_examples"]["total"] > 0
    broken = report["broken_examples"]["examples"][0]
    assert f"| {broken['index']} | {broken['text']} | {broken['reference']} (" in text
    codes = [block.split("```")[0].splitlines()[1:] for block in text.split("## Results")[0].split("\n```")[1::2]]
    assert [len(code) for code in codes] == [3, 3, 3]

    # As they are written, in an environment that has their packages.
    folder = tmp_path / "device"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    environment = client_environment(hub, tmp_path)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    shell = "\n".join(["set -e", "python3() { :; }", "pip() { :; }", *codes[2]])
    done = subprocess.run(["bash", "-c", shell], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = infer.Predictor(a_run / "bundle").predict(("A text.",))
    assert done.stdout.splitlines()[-1] == f"{answer['label']}\t{answer['probability']:.4f}\tA text."

    code = 'import json; from pipelines.edge.load import load; print(json.dumps(load("ann/small")("A text.")))'
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == answer


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"task": "text-generation"},
            ['print(generate("A text", max_new_tokens=40)', 'generate("A text", { max_new_tokens: 40 })'],
        ),
        ({"task": "image-classification"}, ['print(classify("image.png"))', 'await classify("image.png")']),
        ({"config": {"text_pair_column": "b"}}, ['"text_pair": "A second text."', '{ text_pair: "A second text." }']),
    ],
)
def test_the_cards_lines_fit_the_task(finished: Path, changes: dict[str, Any], lines: list[str]) -> None:
    from pipelines.hub import usage_section

    report, files = check_run(finished)
    report |= changes
    files = {**files, "bundle/index.html": finished}
    text = usage_section(report, task_class(report["task"]).presentation, "ann/small", files)
    assert "at http://127.0.0.1:8000" in text
    assert all(line in text for line in lines)
    assert len([line for line in text.splitlines() if line.startswith("```")]) == 6
    assert "optimum" not in text


def test_the_card_says_who_cannot_open_a_language_model_without_some_heads(finished: Path, tmp_path: Path) -> None:
    from pipelines.hub import usage_section

    report, files = check_run(finished)
    graph, config = tmp_path / "model.onnx", tmp_path / "config.json"
    files |= {"onnx/model.onnx": graph, "config.json": config}
    config.write_text('{"n_head": 4}')
    for heads, told in ((4, False), (3, True)):
        cache = onnx.helper.make_tensor_value_info("past_key_values.1.key", 1, ["batch_size", heads, "past", 8])
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "cached", [cache], [])), graph)
        text = usage_section(report, task_class("text-generation").presentation, "ann/small", files)
        assert ("optimum-onnx 0.1.0" in text) is told


# Interruptions


def test_a_push_that_is_killed_in_an_upload_is_repeated(a_run: Path, hub: HubServer, tmp_path: Path) -> None:
    shutil.rmtree(a_run / "bundle")  # its model is another's twin, which the client sends once more in the same push
    hub.drop_uploads = 1
    command, environment = push_command(a_run, "ann/small"), client_environment(hub, tmp_path)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hub.dropping.wait(60)
    process.kill()
    process.wait()
    assert len(hub.repository("ann/small")["commits"]) == 1, "nothing half done is to be seen"
    push(a_run, "ann/small", token=TOKEN)
    assert len(hub.repository("ann/small")["commits"]) == 2
    assert set(hub.files("ann/small")) >= MODEL | GRAPHS
    assert len(hub.uploads) == len(set(hub.uploads)) == 5, "what had arrived was not sent again"


@pytest.mark.parametrize("headers", ["Content-Length: 10", "Transfer-Encoding: chunked"])
def test_the_server_forgives_a_client_that_is_killed_before_its_body(headers: str, hub: HubServer) -> None:
    with socket.create_connection(hub.server_address[:2]) as connection:
        request = f"POST /api/repos/create HTTP/1.1\r\nContent-Type: application/json\r\n{headers}\r\n\r\n"
        connection.sendall(request.encode())
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"", "there is nobody to answer"
    assert not hub.unknown
    assert not hub.requests


def test_a_connection_that_drops_once_is_taken_up_again(a_run: Path, hub: HubServer, monkeypatch: Any) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.drop_uploads = 2
    push(a_run, "ann/small", token=TOKEN)
    assert len(hub.repository("ann/small")["commits"]) == 2


def test_a_network_that_stays_away_is_one_message(a_run: Path, hub: HubServer, monkeypatch: Any) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.drop_uploads = 1000
    message = refusal(a_run)
    assert f"pocketformers push --output_dir {a_run} --hub_model_id ann/small" in message
    assert "--hub_private_repo" not in message
    assert "--hub_model_id ann/open --hub_private_repo false" in refusal(a_run, "ann/open", private=False)
    hub.drop_uploads = 0
    push(a_run, "ann/small", token=TOKEN)
    assert len(hub.repository("ann/small")["commits"]) == 2


# What is refused


@pytest.mark.parametrize(
    "file",
    [
        *("pruned/model.safetensors", "pruned/tokenizer.json", "onnx/model.onnx", "quantized/model.onnx"),
        *("quantized/config.json", "teacher/config.json", "report.json", "report.md", "report.png", "README.md"),
        "bundle/infer.py",
    ],
)
def test_a_file_that_changed_is_refused_by_name(file: str, a_run: Path, hub: HubServer) -> None:
    content = (a_run / file).read_bytes()
    # One character of a figure in the report, and one byte anywhere in the others.
    (a_run / file).write_bytes(
        content.replace(b'"accuracy": 0.', b'"accuracy": 1.', 1)
        if file == "report.json"
        else content[:-1] + bytes([content[-1] ^ 1])
    )
    for _ in range(2):
        message = refusal(a_run)
        assert str((a_run / file).parent) in message
        assert f"found {Path(file).name} changed or missing" in message
        (a_run / file).unlink(missing_ok=True)
    assert not hub.requests


def test_an_unfinished_run_is_refused(a_run: Path, hub: HubServer, tmp_path: Path) -> None:
    assert "report.json changed or missing" in refusal(tmp_path / "nowhere")
    (a_run / "report.json").unlink()
    assert "report.json changed or missing" in refusal(a_run)
    assert not hub.requests


def change_record(run: Path, stage: str, change: Any) -> None:
    path = run / stage / RECORD
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(with_checksum(record)))


@pytest.mark.parametrize("stage", ["onnx", "quantized", "bundle"])
def test_an_unverified_run_is_refused(stage: str, a_run: Path, hub: HubServer) -> None:
    change_record(a_run, stage, lambda record: record["details"].pop("verification"))
    assert f"{stage}/record.json" in refusal(a_run)
    assert not hub.requests


def test_a_finished_report_reads_no_data_and_no_model(
    a_run: Path, monkeypatch: pytest.MonkeyPatch, task: Any, capsys: Any
) -> None:
    from pipelines.core.config import ReportConfig
    from pipelines.core.run import Run
    from pipelines.report.results import finished_stages, report_run

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("a finished report needs none of it")

    class Described:
        """All that a finished report may ask of its task."""

        describe, presentation, baselines = task.describe, task.presentation, task.baselines

    run = Run(a_run, Described(), seed=0)
    run.stages = finished_stages(run)
    for name in ("predict_onnx", "predict_torch", "load_model", "measure", "write_report"):
        monkeypatch.setattr(f"pipelines.report.results.{name}", refuse)
    report_run(run, "distill_bert", ReportConfig(benchmark_rounds=1, benchmark_seconds=0.1), FLAGS)
    out = capsys.readouterr().out
    assert "report: finished already" in out
    assert "no measurable difference" in out or "too few test examples to tell" in out
    run._lock.release()


def test_a_report_that_changed_is_known_by_its_file(a_run: Path) -> None:
    report, changed = read_report(a_run)
    assert report["made_by"]["stages"].keys() == {stage["name"] for stage in report["stages"]}
    assert not changed
    (a_run / "README.md").write_text("mine")
    assert read_report(a_run)[1] == ["README.md"]


def test_stages_that_do_not_belong_together_are_refused(a_run: Path, hub: HubServer) -> None:
    config = a_run / "pruned" / "config.json"
    config.write_text(config.read_text() + "\n")
    change_record(a_run, "pruned", lambda record: record["files"].update({"config.json": file_checksum(config)}))
    assert "'pruned'" in refusal(a_run), "a stage made anew after the report"
    shutil.rmtree(a_run / "pruned")
    assert "pruned/record.json" in refusal(a_run)
    assert not hub.requests


def test_a_graph_verified_against_another_model_is_refused(a_run: Path, hub: HubServer) -> None:
    change_record(a_run, "onnx", lambda record: record["made_by"].update(source_fingerprint="0" * 64))
    assert "another model" in refusal(a_run)
    assert not hub.requests


def test_a_bundle_of_another_model_is_refused(a_run: Path, hub: HubServer) -> None:
    other = fingerprint(json.loads((a_run / "onnx" / RECORD).read_text()))
    change_record(a_run, "bundle", lambda record: record["made_by"].update(source_fingerprint=other))
    assert "bundle/" in refusal(a_run)
    (a_run / "bundle" / RECORD).unlink()
    assert "bundle/record.json" in refusal(a_run)
    assert not hub.requests


def test_a_push_in_between_is_not_overwritten(a_run: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def format_slowly(*arguments: Any) -> str:
        hub.commit("ann/small", "somebody else's", {"notes.txt": {"content": ""}})
        return format_model_card(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.hub.format_model_card", format_slowly)
        message = refusal(a_run)
    assert "A commit has happened since" in message
    assert f"repeat: pocketformers push --output_dir {a_run} --hub_model_id ann/small" in message
    assert set(hub.files("ann/small")) == {".gitattributes", "notes.txt"}
    push(a_run, "ann/small", token=TOKEN)
    assert len(hub.repository("ann/small")["commits"]) == 3


def test_tokens(a_run: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hf auth login" in refusal(a_run, token=None)
    assert "cannot be one" in refusal(a_run, token="Secret\nSecret")
    assert not hub.requests
    assert "401" in refusal(a_run, token="hf_WrongSecret")
    assert "write access" in refusal(a_run, token=READ_TOKEN)
    assert "namespace" in refusal(a_run, "somebody/small")
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")
    push(a_run, "ann/small")


@pytest.mark.parametrize("name", ["a/b/c", "-small", "sm all", "small.git"])
def test_a_name_that_cannot_be_a_repository(name: str, a_run: Path, hub: HubServer) -> None:
    assert repr(name) in refusal(a_run, name)
    assert not hub.requests


@pytest.mark.parametrize(("page", "status"), [("/repos/create", 503), ("/commit/main", 500), ("/preupload/main", 413)])
def test_a_hub_that_fails(page: str, status: int, a_run: Path, hub: HubServer) -> None:
    hub.statuses[page] = status
    message = refusal(a_run)
    assert str(status) in message
    assert "--hub_model_id ann/small" in message


def test_no_network(a_run: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "check the network" in refusal(a_run)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(a_run)


# In recipes and on the command line


class RecipesRun:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = type("State", (), {"is_main_process": True})


def test_a_recipe_asks_for_access_before_it_works(tmp_path: Path, hub: HubServer) -> None:
    from pipelines.training.arguments import TrainingArguments

    run = RecipesRun(tmp_path / "new")
    training = TrainingArguments(output_dir=str(run.directory), push_to_hub=True, hub_token=TOKEN, use_cpu=True)
    check_access(run, training)
    training.hub_token = "hf_WrongSecret"
    with pytest.raises(InputError, match="401"):
        check_access(run, training)


def test_a_recipe_that_is_finished_is_published(finished: Path, hub: HubServer) -> None:
    from pipelines.hub import push_run
    from pipelines.training.arguments import TrainingArguments

    training = TrainingArguments(
        output_dir=str(finished), push_to_hub=True, hub_token=TOKEN, hub_model_id="ann/of_recipe", use_cpu=True
    )
    push_run(RecipesRun(finished), training)
    assert hub.repository("ann/of_recipe")["private"] is True


@pytest.mark.parametrize(
    ("recipe", "data"),
    [("distill_bert", "csv_file"), ("distill_vit", "image_folder"), ("distill_gpt2", "language_text")],
)
def test_a_recipe_without_a_token_says_so_at_once(
    recipe: str, data: str, tmp_path: Path, hub: HubServer, request: Any, monkeypatch: Any, capsys: Any
) -> None:
    import runpy

    path = REPOSITORY / "recipes" / f"{recipe}.py"
    argv = [
        str(path),
        "--dataset",
        str(request.getfixturevalue(data)),
        "--output_dir",
        str(tmp_path / "run"),
        "--push_to_hub",
        "true",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, "--use_cpu", "true"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert captured.err.count("error: ") == 1
    assert "hf auth login" in captured.err
    assert "started" not in captured.out


def test_flags_of_publishing_are_not_recorded() -> None:
    from pipelines.core.command import parse_config
    from pipelines.training.arguments import TrainingArguments

    flags = ["--push_to_hub", "true", "--hub_model_id", "ann/x", "--hub_token", TOKEN, "--hub_private_repo", "false"]
    settings = parse_config([TrainingArguments], argv=[*flags, "--use_cpu", "true"])
    assert settings.given == {"use_cpu": True}
    assert (settings.training.hub_model_id, settings.training.hub_private_repo) == ("ann/x", False)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["push"], "--output_dir"),
        (["push", "--output_dir", "/nowhere/at/all"], "/nowhere/at/all"),
        (["distill", "--push_to_hub", "true"], "--push_to_hub"),
    ],
)
def test_bad_input_on_the_command_line(argv: list[str], named: str, monkeypatch: Any, capsys: Any) -> None:
    from pipelines.cli import main
    from pipelines.core.command import run_main

    monkeypatch.setattr(sys, "argv", ["pipelines", *argv])
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == 1
    assert named in capsys.readouterr().err


def test_a_run_at_work_is_not_published(a_run: Path, hub: HubServer, monkeypatch: Any, capsys: Any) -> None:
    from pipelines.cli import main
    from pipelines.core.command import run_main
    from pipelines.core.disk import lock

    held = lock(a_run / ".lock")
    monkeypatch.setattr(sys, "argv", ["pipelines", "push", "--output_dir", str(a_run)])
    with pytest.raises(SystemExit):
        run_main(main)
    held.release()
    assert "no other run at work" in capsys.readouterr().err
    assert not hub.requests
