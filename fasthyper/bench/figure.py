"""Figures: time of a call against past tasks, ours and the peers; and what a configuration would cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fasthyper.bench.peers import OURS
from fasthyper.bench.workloads import WHATS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {OURS: "#0a9396", "hypnettorch": "#ca6702", "eager": "#7b5ea7", "compile": "#c2185b"}
INK = "#24292f"


def times_figure(rows: Sequence[dict[str, Any]], machine: str, ink: str = INK) -> Figure:
    """Time against past tasks, a column per workload, a row for each of ``what`` that was measured; bands are quartiles."""
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    whats = [what for what in WHATS if any(row["what"] == what for row in rows)]
    figure = Figure(figsize=(max(5.6, 3.2 * len(workloads)), 3.2 * len(whats)), layout="constrained")
    grid = figure.subplots(len(whats), len(workloads), sharey="row", squeeze=False)
    for what, line in zip(whats, grid, strict=True):
        for workload, axes in zip(workloads, line, strict=True):
            points = [row for row in rows if (row["workload"], row["what"]) == (workload, what)]
            _times(axes, sorted(points, key=lambda row: row["past"]), workload, ink)
        line[0].set_ylabel("ms per training step" if what == "step" else "ms per value and gradient", color=ink)
    drawn = [side for side in COLOURS if side == OURS or any(side in row["peers"] for row in rows)]
    for side in drawn:
        grid[0][0].plot([], [], color=COLOURS[side], marker="o", markersize=4, linewidth=2, label=side)
    figure.legend(loc="outside upper left", ncols=len(drawn), frameon=False, labelcolor=ink, fontsize=9)
    figure.supxlabel(machine, color=ink, fontsize=8, alpha=0.7)
    return figure


def _times(axes: Axes, points: Sequence[dict[str, Any]], workload: str, ink: str) -> None:
    for side in COLOURS:
        entries = [(row["past"], row["ours"] if side == OURS else row["peers"].get(side, {})) for row in points]
        measured = [(past, entry) for past, entry in entries if "median" in entry]
        if measured:
            past = [past for past, _ in measured]
            low, median, high = ([1e3 * entry[key] for _, entry in measured] for key in ("low", "median", "high"))
            axes.fill_between(past, low, high, color=COLOURS[side], alpha=0.25, linewidth=0)
            axes.plot(past, median, color=COLOURS[side], marker="o", markersize=4, linewidth=2)
    ratios = [(row["past"], row["peers"]["hypnettorch"]) for row in points if "hypnettorch" in row["peers"]]
    ratios = [(past, entry["ratio"]) for past, entry in ratios if "ratio" in entry]
    most = f": {ratios[-1][1]:.0f}× at {ratios[-1][0]} tasks" if ratios else ""
    axes.set_title(f"{workload}{most}", color=ink, fontsize=11)
    counts = [row["past"] for row in points]
    if counts and max(counts) > 100:
        axes.set_xscale("log")
    _frame(axes, counts, ink)


def costs_figure(rows: Sequence[dict[str, Any]], title: str, machine: str, ink: str = INK) -> Figure:
    """Predicted time and memory against past tasks as lines, what was measured as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    past = [row["past"] for row in rows]
    for axes, key, unit, label in zip(
        figure.subplots(1, 2),
        ("seconds", "memory"),
        (1e3, 1e-6),
        ("ms per training step", "MB for the past tasks"),
        strict=True,
    ):
        for side in (OURS, "hypnettorch"):
            predicted = [(row["past"], row[side].get("predicted", {}).get(key)) for row in rows]
            predicted = [(t, unit * value) for t, value in predicted if value is not None]
            if predicted:
                axes.plot(*zip(*predicted, strict=True), color=COLOURS[side], linewidth=2, label=f"{side}, predicted")
            points = [(row["past"], row[side]["measured"][key]) for row in rows if row[side].get("measured")]
            points = [(t, unit * value) for t, value in points if value is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o", color=COLOURS[side], label=f"{side}, measured")
        axes.set_xscale("log")
        axes.set_ylabel(label, color=ink)
        _frame(axes, past, ink)
    figure.axes[0].legend(frameon=False, labelcolor=ink, fontsize=9)
    figure.suptitle(title, color=ink, fontsize=11)
    figure.supxlabel(machine, color=ink, fontsize=8, alpha=0.7)
    return figure


def _frame(axes: Axes, counts: Sequence[int], ink: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.1, 0.15)
    axes.set_xticks(counts, [f"{count}" for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("past tasks", color=ink)
    axes.tick_params(colors=ink, which="both")
    axes.grid(axis="y", color=ink, alpha=0.15)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
