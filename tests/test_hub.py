"""Publishing a run: the real client of the Hub against a server on this machine that speaks its protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from hub_server import HubServer
from pipelines.errors import InputError
from pipelines.hub import check_access, check_run, push
from pipelines.run import RECORD, fingerprint, hash_file, sealed

REPOSITORY = Path(__file__).parents[1]
TOKEN, READ_TOKEN = "hf_ThisIsTheSecret", "hf_ThisIsAnotherSecret_read"
REPORT = {"README.md", "report.json", "report.md", "report.png"}
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
GRAPHS = {"onnx/model.onnx", "onnx/model_quantized.onnx"}
READ_BACK = """
import json, sys
import onnxruntime
from huggingface_hub import hf_hub_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer

name, text = sys.argv[1:]
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(name), AutoTokenizer.from_pretrained(name)
inputs = tokenizer([text], return_tensors="pt")
logits = {"torch": model(**inputs).logits.tolist(), "labels": list(model.config.label2id)}
for file in ("model", "model_quantized"):
    session = onnxruntime.InferenceSession(hf_hub_download(name, f"onnx/{file}.onnx"))
    feed = {node.name: inputs[node.name].numpy() for node in session.get_inputs()}
    logits[file] = session.run(["logits"], feed)[0].tolist()
print(json.dumps(logits))
"""

IN_NODE = """
import { env, pipeline } from "@huggingface/transformers";
const [remoteHost, name, text] = process.argv.slice(1);
Object.assign(env, { remoteHost, allowLocalModels: false, cacheDir: "cache" });
const scores = {};
for (const [file, dtype] of [["model", "fp32"], ["model_quantized", "q8"]]) {
    const classify = await pipeline("text-classification", name, { dtype });
    scores[file] = (await classify(text, { top_k: null })).map(({ label, score }) => [label, score]);
}
console.log(JSON.stringify(scores));
"""
IN_OPTIMUM = """
import json, sys
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline

name, text = sys.argv[1:]
scores = {}
for file in ("model", "model_quantized"):
    model = ORTModelForSequenceClassification.from_pretrained(name, subfolder="onnx", file_name=f"{file}.onnx")
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(name), top_k=None)
    scores[file] = [[answer["label"], answer["score"]] for answer in classify([text], truncation=True)[0]]
print(json.dumps(scores))
"""
# The newest of both. optimum-onnx stops at this transformers, and all of it goes beside the tests' own torch and ONNX Runtime.
TRANSFORMERS_JS = "@huggingface/transformers@4.3.1"
OPTIMUM = [
    "optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2"
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher: Path, task: Any) -> Path:
    """A verified run with its report: a teacher, cut to half its heads and neurons, exported and quantized."""
    from pipelines.config import DistillConfig, PruneConfig, QuantizeConfig, ReportConfig, TeacherConfig
    from pipelines.export import export_onnx
    from pipelines.prune import prune_and_recover
    from pipelines.quantize import quantize_onnx
    from pipelines.results import report_run
    from pipelines.run import Run
    from pipelines.training import TrainingArguments, fine_tune

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
    # What is timed costs a fresh process a stage, and is of no interest here.
    timing = {
        "latency_ms": {"p50": 2.0, "p95": 3.0, "batch_size": 1, "shape": [1, 32]},
        "samples_per_second": 500.0,
        "peak_memory_bytes": 50_000_000,
        "threads": 1,
        "rounds": [{"p50": 2.0}],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.results.measure", lambda subjects, **_: {subject.name: timing for subject in subjects})
        report_run(run, "distill_bert", ReportConfig(benchmark_rounds=1, benchmark_seconds=0.1), {"max_length": 32})
    run._lock.release()
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


def add_bundle(run: Path, source: str = "quantized") -> None:
    """A bundle as its builder leaves it: files, some in folders, and a record of what it was made from."""
    bundle = run / "bundle"
    (bundle / "assets").mkdir(parents=True)
    (bundle / "infer.py").write_text("print('negative')\n")
    (bundle / "index.html").write_text("<!doctype html>\n")
    (bundle / "assets" / "page.js").write_text("// the page\n")
    made_from = fingerprint(json.loads((run / source / RECORD).read_text()))
    files = {name: hash_file(bundle / name) for name in ("infer.py", "index.html", "assets/page.js")}
    record = {"stage": "bundle", "format": "bundle", "made_by": {"source_fingerprint": made_from}, "files": files}
    record |= {"metrics": {}, "bytes": 0, "seconds": 0, "versions": {}, "details": {"verification": {"examples": 32}}}
    (bundle / RECORD).write_text(json.dumps(sealed(record)))


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
    add_bundle(a_run)
    (a_run / "pruned" / "notes.txt").write_text("mine, and no part of the stage")
    address = push(a_run, "ann/small", token=TOKEN)

    repository = hub.repository("ann/small")
    assert repository is not None
    assert repository["private"] is True
    assert len(repository["commits"]) == 2, "the Hub's own first commit, and the push"
    assert address.endswith(repository["commits"][-1]["oid"])
    files = hub.files("ann/small")
    assert set(files) == REPORT | MODEL | GRAPHS | {
        f"bundle/{name}" for name in ("infer.py", "index.html", "assets/page.js")
    } | {".gitattributes"}
    sources = {
        "config.json": "pruned/config.json",
        "model.safetensors": "pruned/model.safetensors",
        "onnx/model.onnx": "onnx/model.onnx",
        "onnx/model_quantized.onnx": "quantized/model.onnx",
        "report.json": "report.json",
        "bundle/assets/page.js": "bundle/assets/page.js",
    }
    for name, source in sources.items():
        assert hub.content(files[name]) == (a_run / source).read_bytes(), name
    tokenizer = json.loads((a_run / "pruned" / "tokenizer_config.json").read_text())
    published = json.loads(hub.content(files["tokenizer_config.json"]))
    assert published == tokenizer | {"model_max_length": 32} != tokenizer
    large = {name for name, file in files.items() if "lfs" in file}
    assert large == {"model.safetensors", *GRAPHS, "report.png"}
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
    for path in a_run.rglob("*"):
        assert not path.is_file() or b"Secret" not in path.read_bytes(), path


def test_the_same_push_again_makes_no_second_commit(a_run: Path, hub: HubServer, capsys: Any) -> None:
    assert push(a_run, "ann/small", token=TOKEN) == push(a_run, "ann/small", token=TOKEN)
    assert len(hub.repository("ann/small")["commits"]) == 2
    assert "push: ann/small is as this run already" in capsys.readouterr().out


def test_a_changed_run_replaces_what_an_earlier_one_left(a_run: Path, hub: HubServer) -> None:
    add_bundle(a_run)
    push(a_run, "ann/small", token=TOKEN)
    shutil.rmtree(a_run / "bundle")
    push(a_run, "ann/small", token=TOKEN)
    assert set(hub.files("ann/small")) == REPORT | MODEL | GRAPHS | {".gitattributes"}
    assert len(hub.repository("ann/small")["commits"]) == 3


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


def test_the_published_model_is_loaded_by_its_name(a_run: Path, hub: HubServer, tmp_path: Path) -> None:
    import onnxruntime
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    environment, text = client_environment(hub, tmp_path), "the goal of the match 7 and the bank"
    pushed = subprocess.run(
        push_command(a_run, "ann/small"), env=environment, capture_output=True, text=True, check=False, cwd="/"
    )
    assert pushed.returncode == 0, pushed.stderr
    assert "push: http" in pushed.stdout
    assert "Secret" not in pushed.stdout + pushed.stderr
    argv = [sys.executable, "-c", READ_BACK, "ann/small", text]
    process = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, cwd="/")
    assert process.returncode == 0, process.stderr[-3000:]
    read = json.loads(process.stdout.splitlines()[-1])

    model = AutoModelForSequenceClassification.from_pretrained(a_run / "pruned")
    inputs = AutoTokenizer.from_pretrained(a_run / "pruned")([text], return_tensors="pt")
    assert read["labels"] == list(model.config.label2id) == ["sport", "tech", "trade"]
    np.testing.assert_allclose(read["torch"], model(**inputs).logits.detach().numpy(), atol=1e-6)
    for name, stage in (("model", "onnx"), ("model_quantized", "quantized")):
        session = onnxruntime.InferenceSession(a_run / stage / "model.onnx")
        feed = {node.name: inputs[node.name].numpy() for node in session.get_inputs()}
        np.testing.assert_allclose(read[name], session.run(["logits"], feed)[0], atol=1e-6)
    without = {**environment, "HF_TOKEN": "", "HF_HOME": str(tmp_path / "stranger")}
    argv = [sys.executable, "-c", "import sys, huggingface_hub as h; h.hf_hub_download(sys.argv[1], 'config.json')"]
    assert subprocess.run([*argv, "ann/small"], env=without, capture_output=True, check=False).returncode != 0


@pytest.mark.packages
@pytest.mark.parametrize("reader", ["transformers.js", "optimum"])
def test_others_open_it_by_name_and_cut_texts_where_it_does(
    reader: str, a_run: Path, hub: HubServer, tmp_path: Path
) -> None:
    import onnxruntime
    from transformers import AutoTokenizer

    push(a_run, "ann/small", private=False, token=TOKEN)
    folder, text = tmp_path / "reader", "the goal of the match 7 and the bank " * 20
    folder.mkdir()
    if reader == "optimum":
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OPTIMUM]
        command = [sys.executable, "-c", IN_OPTIMUM]
    else:
        install = ["npm", "install", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", TRANSFORMERS_JS]
        command = ["node", "--input-type=module", "--eval", IN_NODE, f"{hub.address}/"]
    subprocess.run(install, cwd=folder, check=True)
    environment = client_environment(hub, tmp_path) | {"PYTHONPATH": str(folder)}
    process = subprocess.run(
        [*command, "ann/small", text], env=environment, capture_output=True, text=True, check=False, cwd=folder
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])

    inputs = AutoTokenizer.from_pretrained(a_run / "pruned")(
        [text], truncation=True, max_length=32, return_tensors="np"
    )
    for name, stage in (("model", "onnx"), ("model_quantized", "quantized")):
        session = onnxruntime.InferenceSession(a_run / stage / "model.onnx")
        logits = session.run(["logits"], {node.name: inputs[node.name] for node in session.get_inputs()})[0][0]
        expected = dict(zip(["sport", "tech", "trade"], np.exp(logits) / np.exp(logits).sum(), strict=True))
        assert dict(found[name]) == pytest.approx(expected, abs=1e-3)


# The card


def test_the_cards_metadata_is_valid_and_says_what_the_report_says(a_run: Path, hub: HubServer) -> None:
    add_bundle(a_run)
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
        'hf download ann/small --include "bundle/*" --local-dir .',
    ):
        assert line in text
    codes = [block.split("```")[0].splitlines()[1:] for block in text.split("## Results")[0].split("\n```")[1::2]]
    assert [len(code) for code in codes] == [3, 3, 3]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"task": "image-classification"}, ['print(classify("image.png"))', 'await classify("image.png")']),
        ({"config": {"text_pair_column": "b"}}, ['"text_pair": "A second text."', '{ text_pair: "A second text." }']),
    ],
)
def test_the_cards_lines_fit_the_task(finished: Path, changes: dict[str, Any], lines: list[str]) -> None:
    from pipelines.hub import usage_section

    report, files = check_run(finished)
    text = usage_section(report | changes, "ann/small", {**files, "bundle/infer.py": finished})
    assert all(line in text for line in lines)
    assert len([line for line in text.splitlines() if line.startswith("```")]) == 6


# Interruptions


def test_a_push_that_is_killed_in_an_upload_is_repeated(a_run: Path, hub: HubServer, tmp_path: Path) -> None:
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
    assert len(hub.uploads) == len(set(hub.uploads)) == 4, "what had arrived was not sent again"


def test_a_connection_that_drops_once_is_taken_up_again(a_run: Path, hub: HubServer, monkeypatch: Any) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.drop_uploads = 2
    push(a_run, "ann/small", token=TOKEN)
    assert len(hub.repository("ann/small")["commits"]) == 2


def test_a_network_that_stays_away_is_one_message(a_run: Path, hub: HubServer, monkeypatch: Any) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.drop_uploads = 1000
    message = refusal(a_run)
    assert f"python -m pipelines push --output_dir {a_run} --hub_model_id ann/small" in message
    hub.drop_uploads = 0
    push(a_run, "ann/small", token=TOKEN)
    assert len(hub.repository("ann/small")["commits"]) == 2


# What is refused


@pytest.mark.parametrize(
    "file",
    [
        "pruned/model.safetensors", "pruned/tokenizer.json", "onnx/model.onnx", "quantized/model.onnx",
        "quantized/config.json", "teacher/config.json", "report.json", "report.md", "report.png", "README.md",
        "bundle/infer.py",
    ],
)  # fmt: skip
def test_a_file_that_changed_is_refused_by_name(file: str, a_run: Path, hub: HubServer) -> None:
    add_bundle(a_run)
    content = (a_run / file).read_bytes()
    # One character of a figure in the report, and one byte anywhere in the others.
    (a_run / file).write_bytes(
        content.replace(b'"accuracy": 0.', b'"accuracy": 1.', 1)
        if file == "report.json"
        else content[:-1] + bytes([content[-1] ^ 1])
    )
    assert file in refusal(a_run)
    (a_run / file).unlink()
    assert file in refusal(a_run)
    assert not hub.requests


def test_an_unfinished_run_is_refused(a_run: Path, hub: HubServer, tmp_path: Path) -> None:
    assert "no report.json" in refusal(tmp_path / "nowhere")
    (a_run / "report.json").unlink()
    assert "no report.json" in refusal(a_run)
    assert not hub.requests


def change_record(run: Path, stage: str, change: Any) -> None:
    path = run / stage / RECORD
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(sealed(record)))


@pytest.mark.parametrize("stage", ["onnx", "quantized", "bundle"])
def test_an_unverified_run_is_refused(stage: str, a_run: Path, hub: HubServer) -> None:
    add_bundle(a_run)
    change_record(a_run, stage, lambda record: record["details"].pop("verification"))
    assert f"{stage}/record.json" in refusal(a_run)
    assert not hub.requests


def test_a_report_that_changed_is_written_again(a_run: Path) -> None:
    from pipelines.results import _finished

    made_by = json.loads((a_run / "report.json").read_text())["made_by"]
    assert _finished(a_run, made_by) is not None
    (a_run / "README.md").write_text("mine")
    assert _finished(a_run, made_by) is None


def test_stages_that_do_not_belong_together_are_refused(a_run: Path, hub: HubServer) -> None:
    config = a_run / "pruned" / "config.json"
    config.write_text(config.read_text() + "\n")
    change_record(a_run, "pruned", lambda record: record["files"].update({"config.json": hash_file(config)}))
    assert "'pruned'" in refusal(a_run), "a stage made anew after the report"
    shutil.rmtree(a_run / "pruned")
    assert "pruned/record.json" in refusal(a_run)
    assert not hub.requests


def test_a_graph_verified_against_another_model_is_refused(a_run: Path, hub: HubServer) -> None:
    change_record(a_run, "onnx", lambda record: record["made_by"].update(source_fingerprint="0" * 64))
    assert "another model" in refusal(a_run)
    assert not hub.requests


def test_a_bundle_of_another_model_is_refused(a_run: Path, hub: HubServer) -> None:
    add_bundle(a_run, source="onnx")
    assert "bundle/" in refusal(a_run)
    assert not hub.requests


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
    from pipelines.training import TrainingArguments

    run = RecipesRun(tmp_path / "new")
    training = TrainingArguments(output_dir=str(run.directory), push_to_hub=True, hub_token=TOKEN, use_cpu=True)
    check_access(run, training)
    training.hub_token = "hf_WrongSecret"
    with pytest.raises(InputError, match="401"):
        check_access(run, training)


def test_a_recipe_that_is_finished_is_published(finished: Path, hub: HubServer) -> None:
    from pipelines.hub import push_run
    from pipelines.training import TrainingArguments

    training = TrainingArguments(
        output_dir=str(finished), push_to_hub=True, hub_token=TOKEN, hub_model_id="ann/of_recipe", use_cpu=True
    )
    push_run(RecipesRun(finished), training)
    assert hub.repository("ann/of_recipe")["private"] is True


@pytest.mark.parametrize("recipe", ["distill_bert", "distill_vit"])
def test_a_recipe_without_a_token_says_so_at_once(
    recipe: str, tmp_path: Path, hub: HubServer, csv_file: Path, image_folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    import runpy

    data = csv_file if recipe == "distill_bert" else image_folder
    path = REPOSITORY / "recipes" / f"{recipe}.py"
    argv = [str(path), "--dataset", str(data), "--output_dir", str(tmp_path / "run"), "--push_to_hub", "true"]
    monkeypatch.setattr(sys, "argv", [*argv, "--use_cpu", "true"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert captured.err.count("error: ") == 1
    assert "hf auth login" in captured.err
    assert "started" not in captured.out


def test_flags_of_publishing_are_not_recorded() -> None:
    from pipelines.config import RunConfig, parse_config
    from pipelines.training import TrainingArguments

    flags = ["--push_to_hub", "true", "--hub_model_id", "ann/x", "--hub_token", TOKEN, "--hub_private_repo", "false"]
    command, training = parse_config([RunConfig, TrainingArguments], argv=[*flags, "--use_cpu", "true"])
    assert command.given == {"use_cpu": True}
    assert (training.hub_model_id, training.hub_private_repo) == ("ann/x", False)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["push"], "--output_dir"),
        (["push", "--output_dir", "/nowhere/at/all"], "/nowhere/at/all"),
        (["distill", "--push_to_hub", "true"], "--push_to_hub"),
    ],
)
def test_bad_input_on_the_command_line(argv: list[str], named: str, monkeypatch: Any, capsys: Any) -> None:
    from pipelines.__main__ import main
    from pipelines.config import run_main

    monkeypatch.setattr(sys, "argv", ["pipelines", *argv])
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == 1
    assert named in capsys.readouterr().err


def test_a_run_at_work_is_not_published(a_run: Path, hub: HubServer, monkeypatch: Any, capsys: Any) -> None:
    from pipelines.__main__ import main
    from pipelines.config import run_main
    from pipelines.run import lock

    held = lock(a_run / ".lock")
    monkeypatch.setattr(sys, "argv", ["pipelines", "push", "--output_dir", str(a_run)])
    with pytest.raises(SystemExit):
        run_main(main)
    held.release()
    assert "no other run at work" in capsys.readouterr().err
    assert not hub.requests
