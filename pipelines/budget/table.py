"""The rows of a search for people: a live table in a terminal, lines elsewhere, and front.png."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipelines.budget.choice import Row
from pipelines.budget.words import Budget
from pipelines.report.markdown import interval
from pipelines.report.plot import COLORS, MARKERS, two_panels

FAR = 0.25  # of the teacher's score


def cells(row: Row, budget: Budget) -> dict[str, str]:
    """A row as a person reads it, by the titles of the columns; what is not known yet is empty."""

    def number(name: str, form: str, factor: float = 1) -> str:
        return "" if row.get(name) is None else format(row[name] * factor, form)

    state = "waiting"
    if "breaks" in row:
        state = "out: " + ", ".join(budget.words(name) for name in row["breaks"]) if row["breaks"] else "in"
    return {
        "row": number("number", "d"),
        # The other columns say which layers of the teacher a student has.
        "candidate": row.get("model") or row["name"],
        **{name: number(name, "d") for name in ("layers", "heads", "neurons", "vocabulary")},
        "precision": row.get("scheme") or "",
        "MB": number("bytes", ".3g", 1e-6),
        "ms": number("ms", ".3g"),
        "score": number("score", ".4f"),
        "to the teacher (90 %)": interval(row["delta"]) if "delta" in row else "",
        "budget": state,
    }


def _table(rows: Sequence[Row], budget: Budget) -> Any:
    """The cells of all rows, without empty columns."""
    from pandas import DataFrame

    table = DataFrame([cells(row, budget) for row in rows])
    return table.loc[:, (table != "").any()]


def format_rows(rows: Sequence[Row], budget: Budget) -> str:
    return str(_table(rows, budget).to_string(index=False))


@contextmanager
def live_table(budget: Budget, is_main_process: bool) -> Iterator[Callable[[Sequence[Row]], None]]:
    """What shows the rows so far: a table that stays below all other lines (rich), or else a line for the row that was added last."""
    if not is_main_process:
        yield lambda rows: None
    elif sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.live import Live
        from rich.table import Table

        def table(rows: Sequence[Row]) -> Any:
            shown = _table(rows, budget)
            made = Table(*shown.columns, box=None)
            for row in shown.itertuples(index=False):
                made.add_row(*row)
            return made

        with Live(auto_refresh=False) as live:
            yield lambda rows: live.update(table(rows), refresh=True)
    else:
        yield lambda rows: print(
            "candidate: " + ", ".join(f"{name} {cell}" for name, cell in cells(rows[-1], budget).items() if cell),
            flush=True,
        )


def draw_front(rows: Sequence[Row], budget: Budget, metric: str, teacher: float, answer: Row | None) -> Any:
    """The matplotlib figure of front.png: score against size and against latency, with the budget's bounds. Rows that are FAR would press
    all others together; the `answer` is there in any case."""
    known = [row for row in rows if row["score"] is not None]
    near = [row for row in known if row is answer or abs(row["score"] - teacher) <= FAR * abs(teacher)]
    figure, panels = two_panels(("size (MB)", "median latency (ms)"))
    for axes, (name, factor) in zip(panels, (("bytes", 1e-6), ("ms", 1.0)), strict=True):
        for row in near:
            style = MARKERS["sklearn" if row["kind"] == "estimator" else "onnx"]
            color = COLORS[0] if row["breaks"] else COLORS[3]
            axes.semilogx(row[name] * factor, row["score"], color=color, linestyle="none", **style)
            axes.annotate(
                str(row["number"]), (row[name] * factor, row["score"]), xytext=(9, 3), textcoords="offset points"
            )
        if getattr(budget, name) is not None:
            axes.axvline(getattr(budget, name) * factor, color=COLORS[4], linewidth=1)
        axes.axhline(teacher, color=COLORS[2], linewidth=1, linestyle="--")
    panels[0].set_ylabel(f"{metric.replace('_', ' ')} on the validation split")
    left_out = ", ".join(str(row["number"]) for row in rows if row not in near)
    figure.suptitle(
        "Rows of front.json by their number; green: inside the budget, dashed: the teacher"
        + (f"; far off and not shown: {left_out}" if left_out else "")
    )
    return figure
