"""Continuations keep their spaces and characters, whatever the tokenizer: in generate.py, and in the page's model.mjs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipelines.edge.web import HERE, LIBRARIES, TOKENIZER_LIBRARY
from pipelines.runtime.generate import LanguageModel, Sampling

TEXTS = ["the team said goal", "the coach of the team said no", "said the league", "a new goal today"] * 5
PROMPT, CONTINUATION = "the team", " said 東🙂 no goal"
KINDS = ["llama", "gemma", "t5", "gpt2"]


def make_tokenizer(kind: str) -> Any:
    """Tokens as a family makes them: pieces that begin with ▁ and bytes of what has no piece, or bytes alone (GPT-2)."""
    made = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "gpt2" else []
    made.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False) if kind == "gpt2" else pre_tokenizers.Metaspace()
    )
    trainer = trainers.BpeTrainer(vocab_size=60 + len(alphabet), initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    if kind == "gpt2":
        made.decoder = decoders.ByteLevel()
        return made
    learnt = json.loads(made.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    if kind == "t5":
        scores = [(piece, -float(rank)) for rank, piece in enumerate(pieces)]
        made = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        merges = [tuple(merge) for merge in learnt["merges"]]
        made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        spaces = normalizers.Replace(" ", "▁")
        if kind == "llama":
            steps.append(decoders.Strip(" ", 1, 0))
            spaces = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        made.normalizer, made.decoder = spaces, decoders.Sequence(steps)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


class Scripted:
    """A session whose model continues with the given tokens."""

    def __init__(self, tokens: list[int], vocabulary: int) -> None:
        self.left, self.vocabulary = list(tokens), vocabulary

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="logits")]

    def get_inputs(self) -> list[Any]:
        return []

    def run_with_ort_values(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        logits = np.zeros((1, 1, self.vocabulary), np.float32)
        logits[..., self.left.pop(0)] = 1
        return [onnxruntime.OrtValue.ortvalue_from_numpy(logits)]


def continued(kind: str, directory: Path) -> tuple[Any, list[int], list[int]]:
    """A tokenizer in a directory, the tokens of a prompt and those that continue it."""
    tokenizer = make_tokenizer(kind)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text("{}")
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    whole = tokenizer.encode(PROMPT + CONTINUATION, add_special_tokens=False).ids
    assert whole[: len(prompt)] == prompt
    return tokenizer, prompt, whole[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_keeps_its_spaces_and_characters(kind, tmp_path):
    tokenizer, _, new = continued(kind, tmp_path)
    expected = CONTINUATION
    if kind == "t5":  # its decoder writes bytes as they are spelt
        expected = expected.replace("東🙂", "".join(f"<0x{byte:02X}>" for byte in "東🙂".encode()))

    def model() -> LanguageModel:
        return LanguageModel(tmp_path, Scripted(new, tokenizer.get_vocab_size()))

    sampling = Sampling(max_new_tokens=len(new))
    assert model().generate([PROMPT], sampling) == [expected]
    pieces = list(model().stream(PROMPT, sampling))
    assert "".join(pieces) == expected
    assert len(list(filter(None, pieces))) > 3
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node.js and npm on the PATH")
def test_the_page_continues_alike(tmp_path):
    package = f"{TOKENIZER_LIBRARY}@{LIBRARIES[TOKENIZER_LIBRARY][0]}"
    command = ["npm", "install", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", package]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("needs npm to reach its registry")
    library = tmp_path / "node_modules" / TOKENIZER_LIBRARY / "dist" / "tokenizers.min.mjs"
    given, expected = [], []
    for kind in KINDS:
        tokenizer, prompt, new = continued(kind, tmp_path)
        model = LanguageModel(tmp_path, Scripted([], 1))
        given.append({"tokenizer": json.loads(tokenizer.to_str()), "prompt": prompt, "tokens": new})
        expected.append([model.continuation(prompt, new[:end]) for end in range(len(new) + 1)])
    script = f"""
        import {{continuation}} from {json.dumps((HERE / "model.mjs").as_uri())};
        import {{Tokenizer}} from {json.dumps(library.as_uri())};
        import {{readFileSync}} from "node:fs";
        console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(({{tokenizer, prompt, tokens}}) => {{
            const made = new Tokenizer(tokenizer, {{}});
            return [...tokens, 0].map((_, end) => continuation(made, prompt, tokens.slice(0, end)));
        }})));
    """
    node = ["node", "--input-type=module", "--eval", script]
    done = subprocess.run(node, input=json.dumps(given), capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for kind, found, here in zip(KINDS, json.loads(done.stdout), expected, strict=True):
        # Half a character looks otherwise here and there, until its last byte comes.
        whole = [(text, other) for text, other in zip(found, here, strict=True) if "\ufffd" not in other]
        assert len(whole) >= 4, kind
        assert all(text == other for text, other in whole), (kind, whole)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js on the PATH")
def test_the_page_begins_its_cache_anew_where_it_does_not_hold_any_longer():
    script = f"""
        import {{continueText}} from {json.dumps((HERE / "model.mjs").as_uri())};
        const ort = {{Tensor: class {{ constructor(type, data, dims) {{ Object.assign(this, {{data, dims}}); }} }}}};
        const fed = [], name = "past_key_values.0.key";
        const run = (feeds) => {{
            const [, read] = feeds.input_ids.dims, past = feeds[name].dims[2], total = feeds.attention_mask.dims[1];
            fed.push([read, past, total]);
            const present = new ort.Tensor("float32", [], [1, 1, past + read, 1]);
            return {{logits: new ort.Tensor("float32", new Float32Array(2 * read), [1, read, 2]), "present.0.key": present}};
        }};
        const tokenizer = {{encode: () => ({{ids: [1, 1, 1]}}), decode: (ids) => "a".repeat(ids.length)}};
        const outputs = {{end_tokens: [], context: null, cache: {{[name]: [1, 1]}}, cache_until: 4}};
        const model = {{manifest: {{outputs}}, ort, session: {{run}}, tokenizer}};
        for await (const step of continueText(model, "aaa", {{choose: () => 1, limit: 4}}));
        console.log(JSON.stringify(fed));
    """
    done = subprocess.run(["node", "--input-type=module", "--eval", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[3, 0, 3], [1, 3, 4], [5, 0, 5], [1, 5, 6]]
