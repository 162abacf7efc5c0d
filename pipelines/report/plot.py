"""report.png: quality against size and against latency, every point labelled and no label on another."""

from __future__ import annotations

import math
from typing import Any

from pipelines.report.pages import is_language, tested_on

# Okabe and Ito's colours, which colour-blind people tell apart; the light yellow is left out.
COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


def draw_report(report: dict[str, Any]) -> Any:
    """The matplotlib figure of report.png: quality against size and against latency, every point labelled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    stages, metric = report["stages"], report["primary_metric"].replace("_", " ")
    # Figure and canvas without pyplot: no global state, and no display is looked for.
    figure = Figure(figsize=(11, 5), dpi=150)
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.075, right=0.985, top=0.9, bottom=0.22, wspace=0.06)
    size = [stage["bytes"] / 1e6 for stage in stages]
    timed = "a token, batch 1, p50" if is_language(report) else "latency, batch 1, p50"
    latency = [stage["latency_ms"]["p50"] for stage in stages]
    for axes, values, label in zip(panels, (size, latency), ("shipped size (MB)", f"{timed} (ms)"), strict=True):
        _draw_points(axes, stages, values, report["primary_metric"])
        _scale_axis(axes, values)
        axes.set_xlabel(f"{label}, smaller is better" + (", log scale" if axes.get_xscale() == "log" else ""))
    direction = "" if report["greater_is_better"] else ", smaller is better"
    panels[0].set_ylabel(f"{metric} on the test split{direction}")
    figure.suptitle(f"{report['name']}: {metric} on {tested_on(report)}", parse_math=False)
    markers = [
        Line2D([], [], marker="o", linestyle="none", color="#555555", markersize=7, label="torch"),
        Line2D(
            [], [], marker="s", linestyle="none", color="#555555", markersize=10, fillstyle="none", label="ONNX Runtime"
        ),
        Line2D([], [], color="#555555", label="95 % interval of the difference from the teacher (paired bootstrap)"),
    ]
    figure.legend(handles=markers, loc="lower center", ncols=3, frameon=False)
    figure.draw_without_rendering()
    for axes, values in zip(panels, (size, latency), strict=True):
        _place_labels(axes, stages, values, report["primary_metric"], canvas.get_renderer())
    return figure


def _darker(color: str) -> tuple[float, float, float]:
    """The colour dark enough for text; a marker may be lighter."""
    from matplotlib.colors import to_rgb

    red, green, blue = (0.65 * part for part in to_rgb(color))
    return red, green, blue


def _draw_points(axes: Any, stages: list[dict[str, Any]], values: list[float], metric: str) -> None:
    for index, (stage, value) in enumerate(zip(stages, values, strict=True)):
        color, score, difference = COLORS[index % len(COLORS)], stage["metrics"][metric], stage["difference"]
        spread = [[difference["value"] - difference["low"]], [difference["high"] - difference["value"]]]
        if difference["low"] < difference["high"]:
            axes.errorbar(value, score, yerr=spread, color=color, linewidth=1.2, capsize=3, alpha=0.7, zorder=2)
        # An open square around a filled circle: both are seen where torch and ONNX coincide.
        if stage["format"] == "onnx":
            axes.scatter(value, score, s=110, marker="s", facecolors="none", edgecolors=color, linewidths=2, zorder=4)
        else:
            axes.scatter(value, score, s=45, marker="o", color=color, zorder=3)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _scale_axis(axes: Any, values: list[float]) -> None:
    """Room at both ends for labels; a log scale where the values differ by more than four times."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = min(values), max(values)
    if low > 0 and high / low > 4:
        room = (high / low) ** 0.25
        axes.set_xscale("log")
        axes.set_xlim(low / room, high * room)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.3 * (high - low) or 0.5 * high or 1.0
        axes.set_xlim(low - room, high + room)
    axes.margins(y=0.2)


def _place_labels(axes: Any, stages: list[dict[str, Any]], values: list[float], metric: str, renderer: Any) -> None:
    """Put every name at the nearest place where it covers no point, no interval and no other name."""
    from matplotlib.transforms import Bbox

    pixel = axes.figure.dpi / 72
    taken: list[Any] = []
    for stage, value in zip(stages, values, strict=True):
        score, difference = stage["metrics"][metric], stage["difference"]
        offset = score - difference["value"]
        x, y = axes.transData.transform((value, score))
        low, high = (axes.transData.transform((value, offset + difference[end]))[1] for end in ("low", "high"))
        taken.append(Bbox.from_extents(x - 7 * pixel, y - 7 * pixel, x + 7 * pixel, y + 7 * pixel))
        taken.append(Bbox.from_extents(x - 3 * pixel, low - 2 * pixel, x + 3 * pixel, high + 2 * pixel))
    directions = [math.radians(angle) for angle in (0, 35, -35, 180, 145, -145, 70, -70, 110, -110, 90, -90)]
    offsets = [(radius, direction) for radius in (11, 18, 26, 36, 48, 62, 78, 96) for direction in directions]
    for index, (stage, value) in enumerate(zip(stages, values, strict=True)):
        score, color = stage["metrics"][metric], COLORS[index % len(COLORS)]
        style = {"fontsize": 9, "color": _darker(color), "ha": "left", "va": "bottom", "parse_math": False}
        probe = axes.text(0, 0, stage["name"], **style)
        width, height = probe.get_window_extent(renderer).size
        probe.remove()
        x, y = axes.transData.transform((value, score))
        place = None
        for radius, direction in offsets:
            left = x + math.cos(direction) * (radius * pixel + width / 2) - width / 2
            bottom = y + math.sin(direction) * (radius * pixel + height / 2) - height / 2
            box = Bbox.from_bounds(left, bottom, width, height)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                place = radius, box
                break
        # Where nothing is free, a name on top of another is better than none.
        radius, box = place or (0, Bbox.from_bounds(x, y, width, height))
        taken.append(box)
        axes.annotate(
            stage["name"],
            (value, score),
            xytext=((box.x0 - x) / pixel, (box.y0 - y) / pixel),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 4} if radius > 18 else None,
            zorder=5,
            **style,
        )
