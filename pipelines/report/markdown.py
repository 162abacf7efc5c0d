"""Text and figures as Markdown: whatever others wrote shows as they wrote it, and nothing of it takes effect."""

from __future__ import annotations

import html
import re
import textwrap
from typing import Any

from pipelines.core.task import Presentation
from pipelines.onnx.measure import carries

CLIPPED_TEXT = 200


def clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def escape(text: str, length: int | None = CLIPPED_TEXT) -> str:
    """Somebody's text as one line that Markdown and HTML take literally."""
    folded = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    clipped = folded if length is None else clip(folded, length)
    # An underscore inside a word is literal already; escaped, it would only make the source hard to read.
    escaped = re.sub(r"([\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", html.escape(clipped, quote=False))
    # GitHub makes links of bare addresses.
    return re.sub(r"(?i)\b(https?|ftp)://", r"\1&#58;//", escaped)


def fence(text: str, language: str) -> str:
    """A code block of text that may be indented, whose fence is longer than any run of backticks inside."""
    code = textwrap.dedent(text).strip()
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{code}\n{ticks}"


def markdown_table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """A table whose first columns hold text and whose others hold figures."""
    lines = [[escape(cell) for cell in line] for line in [header, *rows]]
    lines.insert(1, ["---"] * text_columns + ["---:"] * (len(header) - text_columns))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings(values: dict[str, Any], inline: bool | None = None) -> str:
    """Names and values as a block of YAML, where a list or mapping of single values is one line unless it must not be."""
    import yaml

    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=inline)
    return fence(text, "yaml")


def number(value: float | None, specification: str) -> str:
    return "n/a" if value is None else format(value, specification)


def figure(value: float | None, digits: int) -> str:
    """A number with so many decimals, or with its first digit where all of these are 0."""
    return number(value, f".{digits}f" if not value or value >= 10**-digits else ".1g")


def count(value: int | None) -> str:
    if value is None:
        return "n/a"
    return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value:,}"


def interval(delta: dict[str, Any], digits: int = 3, prefix: str = "") -> str:
    """A delta with its interval, or without where it has none."""
    value, low, high = (number(delta[key], f"+.{digits}f") for key in ("value", "low", "high"))
    return value if delta["low"] is None else f"{value} ({prefix}{low} to {high})"


def describe_delta(delta: dict[str, Any], report: dict[str, Any], presentation: Presentation) -> str:
    """A delta with its interval, and what that means."""
    if delta["low"] is None:
        verdict = f"too few test {presentation.unit} to tell whether it is more than chance"
    elif delta["low"] <= 0 <= delta["high"]:
        verdict = "no measurable difference"
    else:
        verdict = "a measurable gain" if (delta["low"] > 0) == report["greater_is_better"] else "a measurable loss"
    return f"{interval(delta, presentation.digits, '95 % interval ')}: {verdict}"


def spread(ratio: dict[str, float]) -> str:
    """A ratio with its least and largest, unless they are too far apart to say anything."""
    return "busy" if not carries(ratio) else f"{ratio['median']:.1f} ({ratio['low']:.1f}-{ratio['high']:.1f})"
