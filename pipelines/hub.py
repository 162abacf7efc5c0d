"""Publish a finished, verified run on the Hub: one commit, in the layout that other tools look for.

- config.json, model.safetensors, tokenizer or image processor: of the last torch stage, for `from_pretrained`
- onnx/model.onnx and onnx/model_quantized.onnx: of the stages onnx and quantized, for transformers.js and others
- onnx/model_fused.onnx: the shipped model, where onnx/model_quantized.onnx is its form for older runtimes
- README.md, report.json, report.md, report.png: the model card, which speaks of the repository, and the report
- bundle/: what runs without torch, where the run has it
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx

import pipelines
from pipelines.core.errors import InputError
from pipelines.core.records import check_files, fingerprint, read_record
from pipelines.core.task import Presentation
from pipelines.onnx.file import OLDER
from pipelines.report.card import format_model_card, of_another_kind, python_code, versions_section
from pipelines.report.markdown import fence
from pipelines.report.report import REPORT_FILES, public_report, read_report
from pipelines.tasks import task_class

MODEL_CARD = "README.md"
TOKENIZER_CONFIG = "tokenizer_config.json"
BUNDLE = "bundle"
# What transformers.js and optimum look for after the name of a graph, before its ending; "_data" follows on that of its weights.
GRAPHS = {"onnx": "", "quantized": "_quantized"}
# What from_pretrained would read in place of our weights, or beside them.
OTHER_MODEL = re.compile(r"adapter_config\.json|modules\.json|[^/]*\.index\.json")
FUSED = "_fused"  # of a quantized graph where one for older runtimes has its place


def push(directory: Path, repo_id: str | None = None, private: bool = True, token: str | None = None) -> str:
    """Publish the run in `directory` as `repo_id` ('name' or 'namespace/name', else the directory's name); return the commit's address.

    All files arrive in one commit. A push that was interrupted can be repeated: what arrived is not sent again, and where
    nothing changed there is no second commit. The token is `token`, else that of HF_TOKEN or of `hf auth login`. Raises
    InputError for a run that is unfinished, unverified or changed since, a repository of the other visibility, and whatever the
    Hub or the network refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    directory = Path(directory)
    report, files = check_run(directory)
    presentation = task_class(report["task"]).presentation
    repo_id = repo_id or directory.resolve().name
    token = find_token(repo_id, token)
    api = HfApi(token=token, library_name="pocketformers", library_version=pipelines.__version__)
    command = shlex.join(["pocketformers", "push", "--output_dir", str(directory), "--hub_model_id", repo_id])
    with explained(repo_id, token, command + ("" if private else " --hub_private_repo false")):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        before = api.model_info(repo_id)
        # An existing repository keeps its visibility whatever was asked for.
        if before.private != private:
            asked, found = ("private", "public") if private else ("public", "private")
            raise InputError(
                f"expected {repo_id} to be {asked}, found that it exists and is {found}. Pass --hub_private_repo "
                f"{str(not private).lower()}, another --hub_model_id, or change its visibility on its settings page. Nothing was uploaded."
            )
        usage = usage_section(report, presentation, repo_id, files)
        card = format_model_card(report | {"name": repo_id.split("/")[-1]}, presentation, usage)
        changed = published_tokenizer(files, presentation.tokenizer_settings(report)) | published_graphs(files)
        changed["report.json"] = public_report(report)
        content: dict[str, Path | bytes] = {**files, MODEL_CARD: card.encode(), **changed}
        operations: list[Any] = [CommitOperationAdd(name, data) for name, data in content.items()]
        # These two folders are ours: a graph or a page of an earlier push was never verified with this run. The files would open another model.
        names = [one.rfilename for one in before.siblings or []]
        held = [name for name in names if name.startswith(("onnx/", f"{BUNDLE}/")) or OTHER_MODEL.fullmatch(name)]
        operations += [CommitOperationDelete(name) for name in held if name not in files]
        message = f"{report['recipe']} by Pocketformers {pipelines.__version__}"
        # What came in between was not looked at: the Hub refuses a commit on another parent.
        commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=before.sha)
    is_new = commit.oid != before.sha
    print(f"push: {commit.commit_url}" if is_new else f"push: {repo_id} is as this run already", flush=True)
    return commit.commit_url


def push_run(run: Any, training: Any) -> None:
    """The end of a recipe with --push_to_hub: publish its run, from the main process, in private unless --hub_private_repo is false."""
    if run.state.is_main_process:
        push(run.directory, training.hub_model_id, training.hub_private_repo is not False, training.hub_token)


def check_access(run: Any, training: Any) -> None:
    """Ask the Hub whether it accepts the token, from the main process: found out now, not after hours of training."""
    if run.state.is_main_process:
        from huggingface_hub import HfApi

        repo_id = training.hub_model_id or run.directory.name
        token = find_token(repo_id, training.hub_token)
        with explained(repo_id, token, "the same command"):
            HfApi(token=token).whoami()


# What may be published


def unfit(expected: str, found: str) -> InputError:
    return InputError(
        f"expected {expected}, found {found}. Run the recipe's command again: it rebuilds what is missing or changed, and nothing else."
    )


def check_run(directory: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """The report of the run in `directory`, and its files by their names in the repository, without the model card.

    Raises InputError, naming the file, unless the run has its report, every stage in the report is what it was then, and each
    ONNX graph was verified against the very model it is published with.
    """
    report, changed = read_report(directory)
    if changed:
        raise unfit(f"the report of a finished run in {directory}", f"{', '.join(changed)} changed or missing")
    reported, records = report["made_by"]["stages"], {}
    for name in [*reported, BUNDLE] if (directory / BUNDLE).exists() else reported:
        record = read_record(directory / name)
        if record is None:
            raise unfit(f"the stage {name!r} of the run in {directory}", f"no {name}/record.json")
        check_files(directory / name, record)
        records[name] = record
        if fingerprint(record) != reported.get(name, fingerprint(record)):
            raise unfit(f"report.json to be of the stage {name!r} in {directory}", f"that {name}/ was rebuilt after it")
    source = check_verified(directory, records, report["shipped"])
    files = {name: directory / name for name in REPORT_FILES if name != MODEL_CARD}
    # Adapters and the like lie in sub-folders of a stage; what `from_pretrained` reads does not, but for the numbered modules of an embedder.
    files |= {
        name: directory / source / name for name in records[source]["files"] if "/" not in name or name[0].isdigit()
    }
    for stage, suffix in GRAPHS.items():
        for name in records[stage]["files"] if stage in records else ():
            graph, dot, weights = name.partition(".onnx")
            if dot and "/" not in name:  # one for older runtimes has the name already that other tools look for
                graph = f"onnx/{graph}{FUSED if OLDER in records[stage]['files'] else suffix}"
            if dot:
                files[f"{graph}.onnx{'_data' if weights else ''}"] = directory / stage / name
    if BUNDLE in records:
        files |= {f"{BUNDLE}/{name}": directory / BUNDLE / name for name in records[BUNDLE]["files"]}
    return report, files


def check_verified(directory: Path, records: dict[str, dict[str, Any]], shipped: str) -> str:
    """The torch stage that the ONNX graphs were verified against, once it is clear that they were."""
    if "onnx" not in records:
        raise unfit(f"a verified ONNX model in {directory}", "a report without the stage 'onnx'")
    torch_stages = [name for name, record in records.items() if record["format"] == "transformers"]
    source = ""
    for name, sources in {BUNDLE: [shipped], "quantized": ["onnx"], "onnx": torch_stages}.items():
        if name not in records:
            continue
        if not records[name]["details"].get("verification"):
            how = f"{name}/record.json in {directory} to tell how {name}/model.onnx was verified"
            raise unfit(how, f"nothing about it: delete {directory / name}")
        found = {fingerprint(records[one]): one for one in sources}
        source = found.get(records[name]["made_by"].get("source_fingerprint"), "")
        if not source:
            made = f"{name}/ to be made from {' or '.join(sources)}/ as it is in {directory}"
            raise unfit(made, "that it was verified against another model")
    return source


def published_graphs(files: dict[str, Path]) -> dict[str, bytes]:
    """The graphs with weights beside them, which they find by the names that these are published under."""
    content = {}
    for name in [name for name in files if f"{name}_data" in files]:
        model = onnx.load(files[name], load_external_data=False)
        for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data):
            if entry.key == "location":
                entry.value = f"{Path(name).name}_data"
        content[name] = model.SerializeToString()
    return content


def published_tokenizer(files: dict[str, Path], changes: dict[str, Any]) -> dict[str, bytes]:
    """The tokenizer_config.json with a task's changes, and as transformers 4 can read it."""
    if TOKENIZER_CONFIG not in files:
        return {}
    settings = json.loads(files[TOKENIZER_CONFIG].read_text(encoding="utf-8")) | changes
    # Transformers 5's new name for a class whose old one it reads, too.
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    return {TOKENIZER_CONFIG: (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()}


# The Hub


def find_token(repo_id: str, token: str | None) -> str:
    """The token to use, once it and the repository's name look right; no message ever holds it."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(
            f"expected a repository's name such as 'name' or 'organisation/name', found {repo_id!r}. Pass --hub_model_id. ({error})"
        ) from error
    token = (token or get_token() or "").strip()
    if not token:
        raise InputError(
            "expected a Hub token, found none. Log in with 'hf auth login', set HF_TOKEN, or pass --hub_token; it needs write access."
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            f"expected a Hub token, found {len(token)} characters that cannot be one. Copy it again from the Hub's settings."
        )
    return token


@contextmanager
def explained(repo_id: str, token: str, again: str) -> Iterator[None]:
    """Turn what the Hub and the network raise into one InputError; `again` is the command that repeats the attempt."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the network fails in many ways, and each of them ends here
        raise InputError(explain(error, repo_id, again).replace(token, "<token>")) from error


def explain(error: BaseException, repo_id: str, again: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    # An upload wraps what happened to it.
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    answered = next((part for part in chain if isinstance(part, HfHubHTTPError)), None)
    cause, host = chain[-1] if answered is None else answered, constants.ENDPOINT
    status = 0 if answered is None else answered.response.status_code
    told = " ".join(str(getattr(cause, "server_message", None) or cause).split())[:500].rstrip(".")
    found = f"{status or type(cause).__name__}: {told}"
    if status == 401:
        expected, remedy = f"a token that {host} accepts", "Log in again with 'hf auth login', or set HF_TOKEN"
    elif status in (402, 403):
        expected = f"write access to {repo_id} on {host}"
        remedy = "Use a token with write permission and a --hub_model_id in a namespace of yours"
    elif 0 < status < 500 and status != 429:
        expected, remedy = f"{host} to accept {repo_id}", "Correct what it names"
    else:
        expected = f"{host} to respond"
        remedy = "The run is whole on disk: check the network (and that HF_HUB_OFFLINE is not set), or wait"
    return f"expected {expected}, found an error ({found}). {remedy}, then repeat: {again}"


# The model card


def usage_section(report: dict[str, Any], presentation: Presentation, repo_id: str, files: dict[str, Path]) -> str:
    """How to use the published model, in three lines each: in Python, in a browser, and from the bundle where there is one."""
    dtype = "q8" if "onnx/model_quantized.onnx" in files else "fp32"
    parts = [
        f"In Python, with {presentation.hub_library} (`hf auth login` first while the repository is private):",
        python_code(report, presentation, repo_id),
    ]
    if not of_another_kind(report):
        parts += [
            "In a browser, where the repository is public, or in Node (`HF_TOKEN` where it is private), with transformers.js "
            "(`npm install @huggingface/transformers`), which needs no torch:",
            fence(presentation.in_javascript(report, repo_id, dtype), "js"),
        ]
    if any(file.startswith(f"{BUNDLE}/") for file in files):
        shell = f"""
            python3 -m venv .venv && . .venv/bin/activate && pip install huggingface_hub
            hf download {repo_id} --include "{BUNDLE}/*" --local-dir . && pip install -r {BUNDLE}/requirements.txt
            python {BUNDLE}/infer.py {presentation.in_shell(report)}
        """
        parts += [
            f"From the bundle, on a small 64-bit computer without torch (`{BUNDLE}/requirements.txt` names the Python it needs; "
            "`hf auth login` before the second line while the repository is private):",
            fence(shell, "bash"),
        ]
        if f"{BUNDLE}/index.html" in files:
            server = f"python -m http.server --bind 127.0.0.1 --directory {BUNDLE} 8000"
            parts.append(f"`{server}` serves the bundle's page at http://127.0.0.1:8000.")
    if "onnx/model_fused.onnx" in files:
        parts.append(
            "`onnx/model_fused.onnx` is the shipped model of the results below, for ONNX Runtime from 1.23 on. "
            "`onnx/model_quantized.onnx` is the same model for older ones, and slower. `onnx/model.onnx` has standard operators only."
        )
    elif "onnx/model_quantized.onnx" in files:
        parts.append(
            "`onnx/model_quantized.onnx` is the shipped model of the results below, with operators of ONNX Runtime. "
            "`onnx/model.onnx` has standard operators only."
        )
    run = files["report.json"].parent
    names = {os.path.relpath(path, run): name for name, path in files.items()}
    parts += [versions_section(report, names), *presentation.remarks(files)]
    if any(stage["name"] == "pruned" for stage in report["stages"]):
        parts.append("The pruned weights are zeros in `model.safetensors`. The ONNX files do not have them.")
    return "\n\n".join(filter(None, parts))
