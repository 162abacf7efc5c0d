"""report.png: quality against size and against latency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.core.task import Presentation
from pipelines.report.pages import metric_name, tested_on

# Okabe and Ito's colours, which colour-blind people tell apart; the light yellow is left out.
COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
# An open square around a filled circle: both are seen where torch and ONNX coincide.
MARKERS = {
    "onnx": {"marker": "s", "markersize": 11, "fillstyle": "none", "markeredgewidth": 2, "zorder": 4},
    "transformers": {"marker": "o", "markersize": 7, "zorder": 3},
    "sklearn": {"marker": "^", "markersize": 8, "fillstyle": "none", "markeredgewidth": 2, "zorder": 4},
}


def two_panels(labels: Sequence[str]) -> tuple[Any, Any]:
    """A matplotlib figure and its two panels, one for each label of their axes below."""
    from matplotlib.figure import Figure

    # Without pyplot: no global state, and no display is looked for.
    figure = Figure(figsize=(11, 5.5), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xlabel(f"{label}, smaller is better, log scale")
        axes.grid(color="#e4e4e4", linewidth=0.7)
    return figure, panels


def draw_report(report: dict[str, Any], presentation: Presentation) -> Any:
    """The matplotlib figure of report.png."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    metric, busy = metric_name(report), ", timed on a busy machine" if report.get("busy") else ""
    # What predicts the same for every example is so far below that the others would lie on one line.
    stages = [stage for stage in report["stages"] if not stage.get("constant")]
    size = [stage["bytes"] / 1e6 for stage in stages]
    latency = [stage["latency_ms"]["p50"] for stage in stages]
    figure, panels = two_panels(("shipped size (MB)", f"median latency of {presentation.latency_of} (ms)"))
    for axes, values in zip(panels, (size, latency), strict=True):
        for index, (stage, value) in enumerate(zip(stages, values, strict=True)):
            score, delta = stage["metrics"][report["primary_metric"]], stage["delta"]
            color = COLORS[index % len(COLORS)]
            axes.semilogx(value, score, color=color, linestyle="none", label=stage["name"], **MARKERS[stage["format"]])
            if delta["low"] is not None and delta["low"] < delta["high"]:
                spread = [[delta["value"] - delta["low"]], [delta["high"] - delta["value"]]]
                axes.errorbar(value, score, yerr=spread, color=color, linewidth=1.2, capsize=3, alpha=0.7)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.15, y=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    better = "larger" if report["greater_is_better"] else "smaller"
    panels[0].set_ylabel(f"{metric} on the test split, {better} is better")
    figure.suptitle(f"{report['name']}: {metric} on {tested_on(report, presentation)}{busy}", parse_math=False)
    handles = [line for line in panels[0].lines if line.get_label() in {stage["name"] for stage in stages}]
    title = "circles: torch, squares: ONNX Runtime, triangles: scikit-learn, bars: 95 % interval of the delta to the teacher (paired bootstrap)"
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, title=title)
    return figure
