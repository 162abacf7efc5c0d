"""Publish a finished, verified run on the Hub: one commit, in the layout that other tools look for.

- config.json, model.safetensors, tokenizer or image processor: of the last torch stage, for `from_pretrained`
- onnx/model.onnx and onnx/model_quantized.onnx: of the stages onnx and quantized, for transformers.js and others
- README.md, report.json, report.md, report.png: the model card, which speaks of the repository, and the report
- bundle/: what runs without torch, where the run has it
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pipelines
from pipelines.core.config import DataConfig
from pipelines.core.errors import InputError
from pipelines.core.run import damaged_files, fingerprint, read_record
from pipelines.report.card import format_model_card
from pipelines.report.markdown import fence
from pipelines.report.report import REPORT_FILES, changed_report_files

MODEL_CARD = "README.md"
TOKENIZER_CONFIG = "tokenizer_config.json"
BUNDLE = "bundle"
# Where a graph of a stage is published, after the names that transformers.js and optimum look for.
GRAPHS = {"onnx": "onnx/{name}.onnx", "quantized": "onnx/{name}_quantized.onnx"}
AGAIN = "Run the recipe's command again: it makes anew what is missing or changed, and nothing else."


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
    repo_id = repo_id or directory.resolve().name
    token = find_token(repo_id, token)
    api = HfApi(token=token, library_name="pocketformers", library_version=pipelines.__version__)
    with explained(repo_id, token, f"python -m pipelines push --output_dir {directory} --hub_model_id {repo_id}"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        before = api.model_info(repo_id)
        # An existing repository keeps its visibility whatever was asked for.
        if before.private != private:
            asked, found = ("private", "public") if private else ("public", "private")
            raise InputError(
                f"expected {repo_id} to be {asked}, found that it exists and is {found}. Pass --hub_private_repo "
                f"{str(not private).lower()}, another --hub_model_id, or change its visibility on its settings page. Nothing was uploaded."
            )
        held = [sibling.rfilename for sibling in before.siblings or []]
        # These two folders are ours: a graph or a page of an earlier push was never verified with this run.
        stale = [name for name in held if name.startswith(("onnx/", f"{BUNDLE}/")) and name not in files]
        card = format_model_card(report | {"name": repo_id.split("/")[-1]}, usage_section(report, repo_id, files))
        content: dict[str, Path | bytes] = {**files, MODEL_CARD: card.encode(), **readable_tokenizer(report, files)}
        operations: list[Any] = [CommitOperationAdd(name, data) for name, data in content.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        message = f"{report['recipe']} by Pocketformers {pipelines.__version__}"
        # What came in between was not looked at: the Hub refuses a commit on another parent.
        commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=before.sha)
    print(
        f"push: {repo_id} is as this run already" if commit.oid == before.sha else f"push: {commit.commit_url}",
        flush=True,
    )
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


def check_run(directory: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """The report of the run in `directory`, and its files by their names in the repository, without the model card.

    Raises InputError, naming the file, unless the run has its report, every stage in the report is what it was then, and each
    ONNX graph was verified against the very model it is published with.
    """
    if not (directory / "report.json").is_file():
        raise InputError(
            f"expected a finished run in {directory}, found no report.json there. Run a recipe to its end, and pass its --output_dir."
        )
    changed = changed_report_files(directory)
    if changed:
        raise InputError(
            f"expected the report in {directory} as it was written, found {', '.join(changed)} changed or missing. {AGAIN}"
        )
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    reported_stages = report.get("made_by", {}).get("stages", {})
    records = {name: check_stage(directory, name, reported) for name, reported in reported_stages.items()}
    files = {name: directory / name for name in REPORT_FILES if name != MODEL_CARD}
    source = check_verified(directory, records)
    # Adapters and the like lie in sub-folders of a stage; what `from_pretrained` reads does not.
    files |= {name: directory / source / name for name in records[source]["files"] if "/" not in name}
    for stage, pattern in GRAPHS.items():
        for name in records[stage]["files"] if stage in records else ():
            if name.endswith(".onnx"):
                files[pattern.format(name=name.removesuffix(".onnx"))] = directory / stage / name
            elif ".onnx" in name:  # weights above 2 GB, which the graph finds by this name
                files[f"onnx/{name}"] = directory / stage / name
    bundle = read_record(directory / BUNDLE)
    if bundle is None and (directory / BUNDLE).exists():
        raise InputError(f"expected {BUNDLE}/record.json in {directory}, found {BUNDLE}/ without it. {AGAIN}")
    if bundle is not None:
        check_files(directory, BUNDLE, bundle)
        check_evidence(directory, BUNDLE, bundle)
        if bundle["made_by"].get("source_fingerprint") != fingerprint(records[report["shipped"]]):
            raise InputError(f"expected {BUNDLE}/ to be made from {report['shipped']}/, found one of another. {AGAIN}")
        files |= {f"{BUNDLE}/{name}": directory / BUNDLE / name for name in bundle["files"]}
    return report, files


def check_stage(directory: Path, name: str, reported: str) -> dict[str, Any]:
    """The record of a stage, whose files are unchanged and whose fingerprint is the one `reported`."""
    record = read_record(directory / name)
    if record is None:
        raise InputError(
            f"expected the stage {name!r} of the report in {directory}, found no {name}/record.json. {AGAIN}"
        )
    check_files(directory, name, record)
    if fingerprint(record) != reported:
        raise InputError(
            f"expected report.json to be of the stage {name!r} in {directory}, found that {name}/ was made anew after it. {AGAIN}"
        )
    return record


def check_files(directory: Path, name: str, record: dict[str, Any]) -> None:
    changed = damaged_files(directory / name, record)
    if changed:
        named = ", ".join(f"{name}/{file}" for file in changed)
        raise InputError(
            f"expected the files of {directory} as they were verified, found {named} changed or missing. {AGAIN}"
        )


def check_evidence(directory: Path, name: str, record: dict[str, Any]) -> None:
    if not record["details"].get("verification"):
        raise InputError(
            f"expected {name}/record.json in {directory} to tell how {name}/model.onnx was verified, found nothing about it. "
            f"Delete {directory / name} and run the recipe's command again."
        )


def check_verified(directory: Path, records: dict[str, dict[str, Any]]) -> str:
    """The torch stage that the ONNX graphs were verified against, once it is clear that they were."""
    if "onnx" not in records:
        raise InputError(
            f"expected a verified ONNX model in {directory}, found a report without the stage 'onnx'. Export the model, "
            "and report the run again."
        )
    for name in GRAPHS:
        if name in records:
            check_evidence(directory, name, records[name])
    torch_stages = {fingerprint(record): name for name, record in records.items() if record["format"] == "transformers"}
    sources = {"onnx": torch_stages, "quantized": {fingerprint(records["onnx"]): "onnx"}}
    for name, allowed in sources.items():
        if name in records and records[name]["made_by"]["source_fingerprint"] not in allowed:
            raise InputError(
                f"expected {name}/ to be made from {' or '.join(allowed.values())}/ as it is in {directory}, found that it was "
                f"verified against another model. {AGAIN}"
            )
    return torch_stages[records["onnx"]["made_by"]["source_fingerprint"]]


def readable_tokenizer(report: dict[str, Any], files: dict[str, Path]) -> dict[str, bytes]:
    """The tokenizer_config.json as others need it: transformers.js cuts texts at its limit, transformers 4 asks for its class."""
    if TOKENIZER_CONFIG not in files:
        return {}
    settings = json.loads(files[TOKENIZER_CONFIG].read_text(encoding="utf-8"))
    if report["task"] == "text-classification":
        settings["model_max_length"] = report["config"].get("max_length", DataConfig.max_length)
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
    status = answered.response.status_code if answered is not None else None
    told = " ".join(str(answered.server_message or answered if answered is not None else chain[-1]).split())[
        :500
    ].rstrip(".")
    host = constants.ENDPOINT
    if status == 401:
        return (
            f"expected a token that {host} accepts, found that it refuses this one (401: {told}). Log in again with "
            f"'hf auth login', or set HF_TOKEN, then repeat: {again}"
        )
    if status in (402, 403):
        return (
            f"expected write access to {repo_id} on {host}, found that it is refused ({status}: {told}). Use a token with write "
            f"permission and a --hub_model_id in a namespace of yours, then repeat: {again}"
        )
    if status is not None and status != 429 and status < 500:
        return (
            f"expected {host} to take {repo_id}, found that it does not ({status}: {told}). Mend what it names, then "
            f"repeat: {again}"
        )
    found = f"status {status} ({told})" if status is not None else f"{type(chain[-1]).__name__}: {told}"
    return (
        f"expected {host} to answer, found {found}. The run is whole on disk: check the network (and that HF_HUB_OFFLINE is "
        f"not set), or wait, then repeat: {again}"
    )


# The model card


def has_other_heads(files: dict[str, Path]) -> bool:
    """Whether a layer of a language model's graph has not as many heads as config.json says, which has one number for all."""
    import onnx

    config = json.loads(files["config.json"].read_text(encoding="utf-8"))
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or config.get("n_head")
    inputs = onnx.load(files["onnx/model.onnx"], load_external_data=False).graph.input
    caches = [value for value in inputs if value.name.startswith("past_key_values.")]
    return heads is not None and any(value.type.tensor_type.shape.dim[1].dim_value != heads for value in caches)


def usage_section(report: dict[str, Any], repo_id: str, files: dict[str, Path]) -> str:
    """How to use the published model, in three lines each: in Python, in a browser, and from the bundle where there is one."""
    name, task = json.dumps(repo_id), json.dumps(report["task"])
    of_images, is_pair = report["task"] == "image-classification", bool(report["config"].get("text_pair_column"))
    writes = report["task"] == "text-generation"
    limit = report["config"].get("max_length", DataConfig.max_length)
    example = '"image.png"' if of_images else '"A text."'
    pair = '{"text": "A first text.", "text_pair": "A second text."}'
    function = "write" if writes else "classify"
    in_python = (
        f"{example}, max_new_tokens=40"
        if writes
        else example
        if of_images
        else f"{pair if is_pair else example}, truncation=True, max_length={limit}"
    )
    in_shell = '--pair "A first text." "A second text."' if is_pair else example
    dtype = "q8" if "onnx/model_quantized.onnx" in files else "fp32"
    browser = f"""
        import {{ pipeline }} from "@huggingface/transformers";
        const {function} = await pipeline({task}, {name}, {{ dtype: "{dtype}" }});
        console.log(await {function}({example}{", { max_new_tokens: 40 }" if writes else ""}));
    """
    if is_pair:  # transformers.js's own pipeline takes single texts
        browser = f"""
            import {{ AutoModelForSequenceClassification as Model, AutoTokenizer }} from "@huggingface/transformers";
            const tokenizer = await AutoTokenizer.from_pretrained({name}), model = await Model.from_pretrained({name}, {{ dtype: "{dtype}" }});
            console.log((await model(tokenizer("A first text.", {{ text_pair: "A second text." }}))).logits.tolist());
        """
    parts = [
        "In Python, with transformers (`hf auth login` first while the repository is private):",
        fence(
            f"""
            from transformers import pipeline
            {function} = pipeline({task}, model={name})
            print({function}({in_python}))
            """,
            "python",
        ),
        "In a browser, where the repository is public, or in Node (`HF_TOKEN` where it is private), with transformers.js "
        "(`npm install @huggingface/transformers`), which needs no torch:",
        fence(browser, "js"),
    ]
    if any(file.startswith(f"{BUNDLE}/") for file in files):
        shell = f"""
            python3 -m venv .venv && . .venv/bin/activate && pip install huggingface_hub
            hf download {repo_id} --include "{BUNDLE}/*" --local-dir . && pip install -r {BUNDLE}/requirements.txt
            python {BUNDLE}/infer.py {in_shell}
        """
        from pipelines.edge.bundle import PYTHON

        python = PYTHON["image" if of_images else "text"]
        parts += [
            f"From the bundle, on a small computer without torch (64-bit, Python {python} or newer; `hf auth login` before the "
            "second line while the repository is private):",
            fence(shell, "bash"),
        ]
        if f"{BUNDLE}/index.html" in files:
            server = f"python -m http.server --bind 127.0.0.1 --directory {BUNDLE} 8000"
            parts.append(f"`{server}` serves the bundle's page at http://127.0.0.1:8000.")
    if "onnx/model_quantized.onnx" in files:
        parts.append(
            "`onnx/model_quantized.onnx` is the shipped model of the results below; it has operators of ONNX Runtime's own. "
            "`onnx/model.onnx` keeps to standard ones."
        )
    if writes and has_other_heads(files):
        parts.append(
            "Pruning left layers with fewer heads than `config.json` says. transformers.js takes each layer's from the graph; optimum-onnx "
            "0.1.0 takes the config's for all, and cannot run the ONNX files."
        )
    if any(stage["name"] == "pruned" for stage in report["stages"]):
        parts.append("What was pruned is zeros in `model.safetensors`, and gone from the ONNX files.")
    return "\n\n".join(parts)
