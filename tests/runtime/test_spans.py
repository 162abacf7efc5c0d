"""Spans in any text at all: whole characters of it, in its order, which redact() replaces and nothing else."""

from __future__ import annotations

import unicodedata
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.runtime.infer import open_tokenizer, token_inputs
from pipelines.runtime.spans import Windows, find_spans, redact

LABELS = ["O", "B-A", "I-A", "B-B", "I-B"]


@pytest.fixture(scope="module")
def windows(tmp_path_factory, tokenizer) -> Windows:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return Windows(open_tokenizer(folder / "tokenizer.json"), partial(token_inputs, names=["input_ids"]), 12)


PIECES = ["🙂", "e\u0301", "👩\u200d👧", "\r\n", "\t", " ", "שלום", "نص", "नमस्ते", "goal", "12", ".", "[SEP]"]


@settings(deadline=None, max_examples=300)
@given(
    text=st.one_of(st.text(max_size=80), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)), data=st.data()
)
def test_every_span_is_its_part_of_the_text(windows, text, data):
    offsets = [place for _, _, places in windows(text) for place in places]
    numbers = data.draw(st.lists(st.integers(0, 4), min_size=len(offsets), max_size=len(offsets)))
    logits = np.eye(5)[np.array(numbers, int)]
    found = find_spans(text, offsets, logits, LABELS)
    expected, last = "", 0
    for one in found:
        assert text[one["start"] : one["end"]] == one["text"] == one["text"].strip() != ""
        assert one["start"] >= last
        assert unicodedata.category(text[one["end"] : one["end"] + 1] or " ")[0] != "M"
        expected += f"{text[last : one['start']]}[{one['label']}]"
        last = one["end"]
    assert redact(text, found) == expected + text[last:]
    # Every token counts once, however many windows there are.
    whole = windows.tokenizer.from_str(windows.tokenizer.to_str())
    whole.no_truncation()
    assert offsets == whole.encode(text, add_special_tokens=False).offsets
