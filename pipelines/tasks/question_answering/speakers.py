"""Questions made from plain texts for demonstrations: who said what is quoted. The answer is the speaker's name, found by pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pipelines.data.text import lines_of, sentences_of

PASSAGE = 420  # characters of a context, at most; so much is a window of 128 tokens
SAID = r"(?:said|says|added|adds|explained|insisted|warned|claimed|argued)"
TITLE = r"(?:Mr|Mrs|Ms|Dr|Sir|Lord|Lady|Professor|Prof|President|Judge) "
NAME = rf"(?P<name>(?:{TITLE})?[A-Z][\w'-]+(?: (?:(?:de|der|da|di|van|von|bin|al) )?[A-Z][\w'-]+){{0,2}})"
QUOTE = r'"(?P<words>[^"]{25,300}?)[,.?!]*"'
# "…," said Mr Blair.   Mr Blair said: "…"   Mr Blair said that …
STATEMENTS = (
    re.compile(rf"{QUOTE},? {SAID} {NAME}"),
    re.compile(rf"(?:(?<=^)|(?<=[.!?\"] )){NAME} {SAID}[:,] {QUOTE}"),
    re.compile(rf"(?:(?<=^)|(?<=[.!?\"] )){NAME} {SAID} (?:that )?(?P<words>[^.\"?!]{{25,300}})"),
)
# What the same speaker goes on to say, where nobody else is named for it: "…," said Mr Blair. "…"
CONTINUED = re.compile(rf'[^."]{{0,60}}\. {QUOTE}(?!,? (?:[\w\'-]+ ){{0,4}}{SAID})')
# What begins with a capital letter and is no speaker.
NO_NAMES = set(
    """He She It They We I You There This That These Those His Her Its Their Our My One Some Many Most Others Both All Each
    The A An But And Or If So Yet In On At For From To By As With After Before When While Although However Also Now Then Earlier Last
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August September October November
    December Having Analysts Critics Experts Officials Researchers Sources Reports Who What""".split()
)
WORDS = 14  # of what was said, that a question has at most


def passages(text: str) -> Iterator[str]:
    """The text in parts of whole sentences, of at most PASSAGE characters where no sentence is longer; without its headline."""
    part = ""
    for sentence in sentences_of("\n".join(lines_of(text)[1:])):
        if part and len(part) + len(sentence) >= PASSAGE:
            yield part
            part = ""
        part = f"{part} {sentence}".strip()
    if part:
        yield part


def statements(passage: str) -> Iterator[tuple[str, int, int]]:
    """What is said in a passage, and where the name of its speaker begins and ends; where that cannot be told it is left out."""
    for pattern in STATEMENTS:
        for found in pattern.finditer(passage):
            start, end = found.span("name")
            if NO_NAMES & set(found["name"].split()):
                continue
            yield found["words"], start, end
            if (more := CONTINUED.match(passage, found.end())) is not None:
                yield more["words"], start, end


def questions_of_speakers(texts: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of questions (see data.py): each of a passage in which another name stands, too."""
    rows = []
    for text in texts:
        for passage in passages(text):
            names = {one["name"] for one in re.finditer(NAME, passage) if not NO_NAMES & set(one["name"].split())}
            for words, start, end in statements(passage):
                speaker = passage[start:end]
                others = [name for name in names if not {*name.split()} & {*speaker.split()}]
                if others:
                    said = " ".join(words.split()[:WORDS]).rstrip(" ,;:-")
                    question = f"Who said {said[0].lower() + said[1:]}?"
                    rows.append({"question": question, "context": passage, "answers": [speaker], "starts": [start]})
    return rows
