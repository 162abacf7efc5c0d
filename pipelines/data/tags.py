"""Tags of spans, in whatever form a data set has them, as IOB2."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

from pipelines.core.errors import InputError
from pipelines.data.references import tell_of_alike
from pipelines.runtime.spans import OUTSIDE

logger = logging.getLogger(__name__)

PREFIXES = "BIESLUM"
PREFIXED = re.compile(rf"(?P<prefix>[{PREFIXES}])-(?P<kind>.+)", re.DOTALL)
UNTYPED = "span"  # the type of spans whose tags are prefixes alone
# B-PER, B_PER, PER-B and B: how all tags of a data set may be written.
FORMS = (
    PREFIXED,
    re.compile(rf"(?P<prefix>[{PREFIXES}])[_:./|](?P<kind>.+)", re.DOTALL),
    re.compile(rf"(?P<kind>.+)[-_:./|](?P<prefix>[{PREFIXES}])", re.DOTALL),
    re.compile(rf"(?P<prefix>[{PREFIXES}])(?P<kind>)"),
)


def to_iob2(tags: Sequence[str]) -> list[str]:
    """Tags of spans as IOB2. A span ends before O, before another type, behind E-, L-, S- and U-, and before B-, S- and U-; of tags without
    prefixes (IO) neighbours of one type are one span."""
    found: list[str] = []
    before, ended = "", True
    for tag in tags:
        match = PREFIXED.fullmatch(tag)
        prefix, kind = match.groups() if match else ("I", "" if tag == OUTSIDE else tag)
        begins = ended or prefix in "BSU" or kind != before
        found.append(f"{'B' if begins else 'I'}-{kind}" if kind else OUTSIDE)
        before, ended = kind, not kind or prefix in "ESLU"
    return found


def names_and_tags(
    by_split: dict[str, list[list[str]]], declared: list[str] | None, column: str
) -> tuple[list[str], dict[str, list[list[str]]]]:
    """The names of all tags, those of the training split (the first) or those that it declares, and every row's; tags of spans as IOB2."""
    known = set(declared or chain.from_iterable(next(iter(by_split.values()))))
    usual = _usual_form(known)
    declared, known = declared and [*map(usual, declared)], {*map(usual, known)}
    by_split = {name: [[*map(usual, tags)] for tags in split] for name, split in by_split.items()}
    if OUTSIDE in known:  # else every word has a tag of its own, such as its part of speech
        by_split = {name: [to_iob2(tags) for tags in split] for name, split in by_split.items()}
        kinds = sorted({tag[2:] for known_tag in known for tag in to_iob2([known_tag]) if tag != OUTSIDE})
        names = [OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]
        known = {*names}
    else:
        names = kinds = sorted(known)
        _tell_of_no_outside(Counter(chain.from_iterable(next(iter(by_split.values())))))
    tell_of_alike(kinds, "tags")
    if declared is not None and {*declared} == known:
        names = declared
    if len(names) < 2:
        raise InputError(
            f"expected tags of at least two kinds in the column {column!r}, found {', '.join(names) or 'none'}; name the column of "
            "tags with --label_column"
        )
    for name, split in by_split.items():
        if unknown := sorted({*chain.from_iterable(split)} - known):
            raise InputError(
                f"expected the tags of the training split ({', '.join(names[:20])}) in every split, found also {', '.join(unknown[:5])} in "
                f"{name!r}; add training examples of it, or correct the tags"
            )
    return names, by_split


def _usual_form(tags: set[str]) -> Callable[[str], str]:
    """From a tag to the same as B-PER or O, where O and all other `tags` are written in another of FORMS, or their prefixes and O in lower
    case. Else they stay, and so do types that only look like it (vitamin_B, e-mail, or E among other letters), which have no beginnings
    and insides: B and I, or one of them where prefixes stand alone, since long spans may be rare."""
    for case in (str.upper, str.lower):
        outside = case(OUTSIDE)
        for pattern in FORMS if outside in tags else ():
            form = re.compile(pattern.pattern.replace(PREFIXES, case(PREFIXES)), re.DOTALL)
            is_usual = form.pattern == PREFIXED.pattern
            found = [form.fullmatch(tag) for tag in tags - {outside}]
            begun = {*case("BI")} & {match["prefix"] for match in found if match}
            if all(found) and len(begun) >= (0 if is_usual else 1 if pattern == FORMS[-1] else 2):
                usual = partial(_as_usual, form, outside)
                if not is_usual:
                    example = min(tags - {outside})
                    logger.warning("the tags are read as spans: %s is %s", example, usual(example))
                return usual
    return lambda tag: tag


def _as_usual(form: re.Pattern[str], outside: str, tag: str) -> str:
    match = form.fullmatch(tag)
    if match:
        return f"{match['prefix'].upper()}-{match['kind'] or UNTYPED}"
    return OUTSIDE if tag == outside else tag


def _tell_of_no_outside(counts: Counter[str]) -> None:
    """Say which tag seems to stand for O, where there are beginnings and insides of spans, but none is O."""
    plain = [tag for tag, _ in counts.most_common() if not PREFIXED.fullmatch(tag)]
    if plain and {"B-", "I-"} <= {tag[:2] for tag in counts}:
        logger.warning(
            "expected the tag O at words outside of spans, found none: every tag is one of its own, not of spans; write O in place of %r if "
            "that stands for it",
            plain[0],
        )


def is_of_span(tag: str) -> bool:
    """Whether a tag may be one of a span, in any form."""
    tag = tag.upper()
    return tag == OUTSIDE or any(form.fullmatch(tag) for form in FORMS)
