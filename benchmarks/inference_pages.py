"""The figures of `inference.py` as Markdown tables and one plot, from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.onnx.measure import paired_ratios
from pipelines.report.markdown import markdown_table
from pipelines.report.plot import COLORS

# Rows that ONNX Runtime runs: what ours must never be slower than.
ENGINE = ("exporters", "optimum")


def write(measured: dict[str, Any], directory: Path) -> None:
    """Write inference.md and inference.png into `directory`."""
    (directory / "inference.md").write_text(markdown(measured), encoding="utf-8")
    draw(measured).savefig(directory / "inference.png")


def markdown(measured: dict[str, Any]) -> str:
    """Every figure as a table, model by model."""
    parts = ["# Inference against peers", machine(measured)]
    for model in measured["models"]:
        parts += [f"## {model['name']}", described(model)]
        for threads in model["timings"]:
            title = f"### {counted(threads)}: "
            parts += [title + "milliseconds a call, and the share of the limit", times_table(model, threads)]
            parts += [title + "how many times the time of ours in the same precision", ratios_table(model, threads)]
            parts += [title + "against the best", best_table(model, threads)]
            if model["limits"]:
                parts += [f"### {counted(threads)}: the limit", limits_table(model, threads)]
        if model["profile"]:
            parts += [f"### Where the time of `{model['shipped']}` goes", profile_table(model)]
        if model["failed"]:
            parts.append(
                "Not measured: " + "; ".join(f"`{row}` ({said[-300:]})" for row, said in model["failed"].items())
            )
    return "\n\n".join(parts) + "\n"


def counted(threads: str) -> str:
    return "1 thread" if threads == "1" else f"{threads} threads"


def machine(measured: dict[str, Any]) -> str:
    found = measured["environment"]
    packages = ("onnxruntime", "torch", "transformers", "onnx", "numpy")
    versions = ", ".join(f"{name} {found['packages'][name]}" for name in packages if name in found["packages"])
    others = [
        f"{key.removesuffix('_environment')}'s environment: "
        + ", ".join(f"{name} {version}" for name, version in value.items())
        for key, value in found.items()
        if key.endswith("_environment")
    ]
    hidden = f" {found['hidden']}" if found["hidden"] else ""
    return (
        f"{found['cpu']}, {found['cores']} cores, {', '.join(found['instruction_sets'])}.{hidden} {versions}. {'. '.join(others)}. "
        f"Seed {found['seed']}. Each figure is the median of {measured['rounds']} rounds of fresh processes in turn, each repeating "
        f"its call for {measured['seconds']:g} s; ratios are taken within a round, least and largest in brackets."
    )


def described(model: dict[str, Any]) -> str:
    shape = model["shape"]
    text = (
        f"{len(shape['heads'])} layers of {shape['heads']} heads and {shape['neurons']} neurons, where the zeros of pruning are removed. "
        f"{model['primary_metric']} on {model['test_examples']} test examples, one at a time."
    )
    if model["mix_lengths"]:
        text += f" The mix has {sorted(model['mix_lengths'])} tokens; its time is that of a text."
    return text


def share_of_limit(model: dict[str, Any], threads: str, shape: str, row: str) -> str:
    """The time of the row's matmuls alone, as a share of its time; nothing for a language model, nor for what may be bfloat16."""
    precision = model["rows"][row]["precision"]
    if not model["limits"] or precision not in ("fp32", "int8"):
        return ""
    limits = model["limits"][threads]["shapes"][shape]
    # Of ours, which do without the matmuls that nobody reads, those that are left.
    limit = limits.get(f"ours_{precision}_ms" if row.startswith("ours") else "", limits[f"{precision}_ms"])
    return f" ({limit / model['timings'][threads][shape][row]['p50']:.0%})"


def times_table(model: dict[str, Any], threads: str) -> str:
    timings = model["timings"][threads]
    header = ["row", "precision", model["primary_metric"], "MB", *timings]
    rows = []
    for row, found in model["rows"].items():
        cells = [
            f"{at_shape[row]['p50']:.2f}{share_of_limit(model, threads, shape, row)}"
            for shape, at_shape in timings.items()
        ]
        score = f"{found['metrics'][model['primary_metric']]:.4f}"
        rows.append([row, found["precision"], score, f"{found['bytes'] / 1e6:.1f}", *cells])
    return markdown_table(header, rows, text_columns=2)


def ratio(timings: dict[str, Any], slow: str, fast: str) -> str:
    found = paired_ratios(timings, slow, fast)
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def ours_for(model: dict[str, Any], row: str) -> str:
    return "ours_int8" if model["rows"][row]["precision"] == "int8" else "ours"


def ratios_table(model: dict[str, Any], threads: str) -> str:
    timings = model["timings"][threads]
    rows = [
        [row, ours_for(model, row), *(ratio(at_shape, row, ours_for(model, row)) for at_shape in timings.values())]
        for row in model["rows"]
        if ours_for(model, row) in model["rows"] and row != ours_for(model, row)
    ]
    return markdown_table(["row", "over", *timings], rows, text_columns=2)


def best_table(model: dict[str, Any], threads: str) -> str:
    """Ours against the fastest of each kind of row at each shape, whichever that is there."""
    timings = model["timings"][threads]
    kinds = {
        "optimum's best preset over ours_int8": ("optimum_int8", "ours_int8"),
        "exporters' default over ours": ("exporters", "ours"),
        "exporters' default over ours_standard": ("exporters", "ours_standard"),
        "the fastest other fp32 of ONNX Runtime over ours": ("fp32", "ours"),
        "the fastest other int8 of ONNX Runtime over ours_int8": ("int8", "ours_int8"),
    }
    rows = []
    for label, (kind, ours) in kinds.items():
        engine = {row: found["precision"] for row, found in model["rows"].items() if row.startswith(ENGINE)}
        presets = () if kind == "exporters" else tuple(row for row in engine if row.startswith(f"{kind}_"))
        candidates = [row for row in engine if row == kind or row in presets or engine[row] == kind]
        if not candidates or ours not in model["rows"]:
            continue
        cells = []
        for at_shape in timings.values():
            fastest = min(candidates, key=lambda row: at_shape[row]["p50"])
            cells.append(ratio(at_shape, fastest, ours) + (f" {fastest}" if len(candidates) > 1 else ""))
        rows.append([label, *cells])
    return markdown_table(["times the time", *timings], rows)


def limits_table(model: dict[str, Any], threads: str) -> str:
    limits = model["limits"][threads]
    rows = [
        [shape, f"{one['operations'] / 1e9:.2f}"]
        + [
            cell
            for precision in ("fp32", "int8")
            for cell in (f"{one[f'{precision}_ms']:.2f}", f"{one[f'{precision}_operations_per_second'] / 1e9:.0f}")
        ]
        for shape, one in limits["shapes"].items()
    ]
    header = ["shape", "GOP of matmuls", "fp32 ms", "fp32 GOP/s", "int8 ms", "int8 GOP/s"]
    bandwidth = limits["bytes_per_second"]
    return markdown_table(header, rows) + (
        f"\n\nMemory: {bandwidth['batch_1_bandwidth'] / 1e9:.1f} GB/s by a matmul of batch 1 with a weight of 256 MB. Int8 matmuls are "
        "those with weights; the matmuls inside attention are fp32 in every row."
    )


def profile_table(model: dict[str, Any]) -> str:
    """Shares of the time inside operators, at every shape, the largest first."""
    profile = model["profile"]
    names = sorted(
        {name for one in profile.values() for name in one["operators"]},
        key=lambda name: (
            -sum(one["operators"].get(name, 0) / sum(one["operators"].values()) for one in profile.values())
        ),
    )
    shown, rest = names[:12], names[12:]

    def share(one: dict[str, Any], several: list[str]) -> str:
        return f"{sum(one['operators'].get(name, 0) for name in several) / sum(one['operators'].values()):.0%}"

    rows = [[name, *(share(one, [name]) for one in profile.values())] for name in shown]
    if rest:
        rows.append([f"{len(rest)} others", *(share(one, rest) for one in profile.values())])
    return markdown_table(["operator", *profile], rows)


def draw(measured: dict[str, Any]) -> Any:
    """The matplotlib figure: every row's time over that of the shipped model, a panel for each model, on all threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    models = [model for model in measured["models"] if model["shipped"]]
    names = list(dict.fromkeys(row for model in models for row in model["rows"]))[::-1]
    figure = Figure(figsize=(3 + 3.6 * len(models), 1.6 + 0.36 * len(names)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    shapes = list(dict.fromkeys(shape for model in models for shape in next(iter(model["timings"].values()))))
    for axes, model in zip(panels, models, strict=True):
        threads = list(model["timings"])[-1]
        for place, shape in enumerate(shapes):
            at_shape = model["timings"][threads].get(shape)
            if at_shape is None:
                continue
            offset = 0.3 - 0.6 * place / max(1, len(shapes) - 1)
            color = COLORS[place % len(COLORS)]
            for row, found in model["rows"].items():
                times = paired_ratios(at_shape, row, model["shipped"])
                height = names.index(row) + offset
                axes.plot([times["low"], times["high"]], [height, height], color=color, linewidth=1, zorder=2)
                filled = color if found["precision"] == "int8" else "white"
                axes.plot(times["median"], height, "o", color=color, markerfacecolor=filled, markersize=5, zorder=3)
        axes.axvline(1, color="#555555", linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(model["name"], fontsize=10, parse_math=False)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_ylim(-0.6, len(names) - 0.4)
        for height in range(len(names) - 1):
            axes.axhline(height + 0.5, color="#e4e4e4", linewidth=0.7, zorder=1)
        axes.set_xlabel(f"times the time of {model['shipped']}, {counted(threads)}, log scale", fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    markers = [
        Line2D([], [], marker="o", linestyle="none", color=COLORS[i % len(COLORS)], label=one)
        for i, one in enumerate(shapes)
    ]
    markers.append(
        Line2D([], [], marker="o", linestyle="none", color="#555555", markerfacecolor="white", label="not int8")
    )
    figure.legend(handles=markers, loc="outside lower center", ncols=len(markers), frameon=False, fontsize=9)
    return figure
