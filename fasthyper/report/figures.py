"""The figures of a report: each draws one group of runs, or several over one another, on axes and returns its caption."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fasthyper.checkpoint import CHECKPOINT, SAMPLES, read_some
from fasthyper.errors import CheckpointError, FasthyperError
from fasthyper.metrics import average_so_far, memory_lifetime
from fasthyper.report.runs import ACCURACY, Group, Run

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

MOST_NUMBERS = 20  # tasks whose accuracies are written into the matrix, and whose embeddings are numbered
MOST_MARKS = 40  # tasks drawn in full in the other figures
MOST_CELLS = 500  # per side of a drawn matrix
MOST_POINTS = 600  # of a drawn curve
MOST_ROWS = 20  # of generated samples

PAGE, INK, MUTED, LINE, AFTER, END = "#fdfdfc", "#1b2229", "#626c77", "#e2e5e9", "#d0661b", "#2b6cb0"
COLORS = (END, AFTER, "#2a8256", "#b83280", "#7450c9", "#0e7f8a")  # of groups; beyond, dashed
CSS = {PAGE: "page", INK: "ink", MUTED: "muted", LINE: "line"} | {color: f"c{i}" for i, color in enumerate(COLORS)}
ON_LIGHT, ON_DARK = "#10222e", "#ffffff"  # numbers in cells, which look the same on every page
ORDER = ("#3f86d2", "#8c74cf", "#cf6aa0", "#dd7a32")  # first to last task, seen on light and dark pages
LOOK: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelpad": 6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    **{f"axes.spines.{side}": False for side in ("top", "left", "right")},
    **{f"{axis}tick.{which}.size": 0 for axis in "xy" for which in ("major", "minor")},
    **{f"{axis}tick.color": MUTED for axis in "xy"},
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.borderaxespad": 0,
    "legend.labelcolor": MUTED,
}


@dataclass(frozen=True)
class Figure:
    """``kind`` is its class on the page; ``height`` in inches, the width being 5."""

    title: str
    kind: str
    height: float
    draw: Callable[[Axes, Sequence[Group]], str]

    def title_of(self, group: Group) -> str:
        """Of a run in another measure than accuracy, in its words."""
        return (
            self.title if group.measure == ACCURACY else self.title.replace("Accuracy", "Error").replace("accuracy", "error")
        )


def _matrix(axes: Axes, groups: Sequence[Group]) -> str:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    (group,) = groups
    matrix = _scale(group) * np.mean([run.matrix for run in group.runs], axis=0)
    size, shades = len(matrix), np.linspace(0.06, 0.88, 256)
    if np.isnan(matrix).all():
        return _nothing(axes, "No task was evaluated.")
    low, high = float(np.nanmin(matrix)), float(np.nanmax(matrix))
    span = (low, high) if low < high else (low - 0.5, high + 0.5)
    look: Any = {"cmap": ListedColormap(colormaps["YlGnBu"](shades)), "norm": Normalize(*span)}
    if size <= MOST_NUMBERS:
        edges = np.arange(size + 1) - 0.5
        axes.pcolormesh(edges, edges, matrix, edgecolors=PAGE, linewidth=1.2, **look)
        axes.set(xticks=range(size), yticks=range(size))
        font = float(axes.xaxis.label.get_fontsize()) * min(0.85, 11.5 / size)
        for (i, j), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                light = np.power(look["cmap"](look["norm"](value))[:3], 2.2) @ (0.21, 0.72, 0.07) > 0.25
                digits = f".{2 if size <= 10 else 1}f" if group.measure == ACCURACY else f".{3 if size <= 10 else 2}g"
                color = ON_LIGHT if light else ON_DARK
                axes.text(j, i, f"{value:{digits}}", color=color, fontsize=font, ha="center", va="center")
    else:
        block = math.ceil(size / MOST_CELLS)
        padded = np.pad(matrix, (0, -size % block), constant_values=np.nan)
        end = len(padded) - 0.5
        cells = padded.reshape(len(padded) // block, block, -1, block)
        with np.errstate(invalid="ignore"):  # a block without any number is 0 / 0: blank
            means = np.nansum(cells, axis=(1, 3)) / (~np.isnan(cells)).sum(axis=(1, 3))
        axes.imshow(means, interpolation="none", extent=(-0.5, end, end, -0.5), **look)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set(xlabel="evaluated on task", ylabel="after training task", aspect="equal", anchor="NW")
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    bar = axes.inset_axes((0, 1.035, 1, 0.022))
    bar.imshow(np.linspace(*span, 256)[None], aspect="auto", extent=(*span, 0, 1), interpolation="none", **look)
    bar.grid(False)
    bar.spines["bottom"].set_visible(False)
    bar.set(yticks=[])
    bar.xaxis.tick_top()
    bar.xaxis.set_major_locator(MaxNLocator(5))
    bar.xaxis.set_major_formatter(f"{{x:g}}{' %' if group.measure == ACCURACY else ''}")
    ends = f"{low:.1f} % to {high:.1f} %" if group.measure == ACCURACY else f"{low:.3g} to {high:.3g}"
    return f"Row: after training that task. Column: evaluated on that task. From {ends}.{_over(group)}"


def _after_and_end(axes: Axes, groups: Sequence[Group]) -> str:
    import numpy as np

    (group,) = groups
    after = _per_run(group, lambda run: [row[j] for j, row in enumerate(run.matrix)])
    end = _per_run(group, lambda run: run.matrix[-1])
    alone = _per_run(
        group, lambda run: [math.nan] * group.size if run.baseline is None else list(run.baseline[: group.size])
    )
    if np.isnan(after).all() and np.isnan(end).all():
        return _nothing(axes, "No task was evaluated.")
    x, shrink = range(group.size), max(0.3, min(1, math.sqrt(MOST_MARKS / group.size)))
    gaps = np.stack([after.mean(0), end.mean(0), np.full(group.size, math.nan)], axis=1)
    axes.plot(np.repeat(x, 3), gaps.ravel(), color=MUTED, linewidth=shrink, alpha=shrink)
    look: Any = {"markersize": 5 * shrink, "markeredgewidth": shrink}
    if not np.isnan(alone).all():
        axes.plot(alone.mean(0), "_", color=MUTED, label="learned alone", **look | {"markersize": 9 * shrink})
    hollow = PAGE if shrink == 1 else AFTER
    for values, color, label, face in ((after, AFTER, "just after learning", hollow), (end, END, "at the end", END)):
        axes.fill_between(x, *_band(values), color=color, alpha=0.2, linewidth=0)
        axes.plot(values.mean(0), "o", color=color, markerfacecolor=face, label=label, **look)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3, columnspacing=1, handletextpad=0, markerscale=1 / shrink
    )
    axes.set(ylabel=_what(group))
    _count_tasks(axes, group.size)
    return (
        f"Each task just after it was learned, and after the last task. The gap is what was forgotten.{_over(group, True)}"
    )


def _lifetime(axes: Axes, groups: Sequence[Group]) -> str:
    import numpy as np

    found = False
    for group, color, style in _styled(groups):
        runs = [memory_lifetime(run.matrix) for run in group.runs]
        lags = [np.concatenate([run[k] for run in runs]) for k in range(group.size)]
        points = [(k, *np.quantile(lag, (0.1, 0.9)), lag.mean()) for k, lag in enumerate(lags) if len(lag)]
        found = found or bool(points)
        if points:
            x, low, high, mean = np.array(points).T
            low, high, mean = (_scale(group) * values for values in (low, high, mean))
            axes.fill_between(x, low, high, color=color, alpha=0.2 if len(groups) == 1 else 0.1, linewidth=0)
            axes.plot(x, mean, color=color, linestyle=style, linewidth=1.2, **_dots(len(points)))
    if not found:
        return _nothing(axes, "No task was evaluated.")
    axes.set(ylabel=_what(groups[0]))
    _count_tasks(axes, max(group.size for group in groups), "tasks learned since")
    return "By how many tasks were learned since. Line: mean over tasks; band: 80 % of them. Far right, few are left."


def _average(axes: Axes, groups: Sequence[Group]) -> str:
    import numpy as np

    found = False
    for group, color, style in _styled(groups):
        values = _per_run(group, lambda run: average_so_far(run.matrix))
        x = np.flatnonzero(~np.isnan(values).any(0))
        found = found or len(x) > 0
        low, high = _band(values)
        axes.fill_between(x, low[x], high[x], color=color, alpha=0.2, linewidth=0)
        axes.plot(x, values.mean(0)[x], color=color, linestyle=style, linewidth=1.2, **_dots(len(x)))
    if not found:
        return _nothing(axes, "No task was evaluated with all before it.")
    axes.set(ylabel=_what(groups[0]))
    _count_tasks(axes, max(group.size for group in groups), "after task")
    return f"Mean over the tasks learned so far; its own mean is the AIA.{_bands(groups)}"


def _learned(axes: Axes, groups: Sequence[Group]) -> str:
    import numpy as np

    block = math.ceil(max(group.size for group in groups) / MOST_MARKS)
    for group, color, style in _styled(groups):
        values = _per_run(group, lambda run: [row[j] for j, row in enumerate(run.matrix)])
        starts = np.arange(0, group.size, block)
        lengths = np.diff([*starts, group.size])
        means = np.add.reduceat(values, starts, axis=1) / lengths
        x = starts + (lengths - 1) / 2
        axes.fill_between(x, *_band(means), color=color, alpha=0.2, linewidth=0)
        axes.plot(x, means.mean(0), color=color, linestyle=style, linewidth=1.2, marker="o", markersize=4)
    axes.set(ylabel=_what(groups[0]))
    _count_tasks(axes, max(group.size for group in groups))
    of = f" Means of {block} tasks." if block > 1 else ""
    return f"Each task when it was new: how well tasks are still learned.{of}{_bands(groups)}"


def _seconds(axes: Axes, groups: Sequence[Group]) -> str:
    highest = 0.0
    for group, color, style in _styled(groups):
        seconds = _per_run(group, lambda run: [task.seconds for task in run.results.tasks], scale=1)
        low, high = _band(seconds)
        axes.fill_between(range(group.size), low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(seconds.mean(0), color=color, linestyle=style, linewidth=1.2, **_dots(group.size))
        highest = max(highest, high.max())
    axes.set(ylabel="seconds", ylim=(0, 1.15 * highest or 1))
    _count_tasks(axes, max(group.size for group in groups))
    if len(groups) > 1:
        return f"Wall time of training.{_bands(groups)}"
    first, last = seconds.mean(0)[[0, -1]]
    return f"Wall time of training. The first task took {first:,.1f} s, the last {last:,.1f} s.{_bands(groups)}"


def _curve(axes: Axes, groups: Sequence[Group], key: str, what: str) -> str:
    import numpy as np
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    (group,) = groups
    tasks = group.runs[0].results.tasks
    begins = np.cumsum([0, *(task.steps for task in tasks)])
    per_task = 1 if len(tasks) > MOST_MARKS else MOST_POINTS // len(tasks)
    points: list[Any] = []
    for j, begin in enumerate(begins[:-1]):
        samples = [sample for run in group.runs for sample in getattr(run.results.tasks[j], key)]
        kept = sorted((begin + step, value) for step, value in samples if 0 < value < math.inf)
        points += np.array_split(np.array(kept), min(len(kept), per_task)) if kept else []
    if not points:
        return _nothing(axes, "Nothing was recorded." if key == "loss" else "There was no past task to hold.")
    x, low, middle, high = np.array([(p[:, 0].mean(), p[:, 1].min(), np.median(p[:, 1]), p[:, 1].max()) for p in points]).T
    axes.fill_between(x, low, high, color=END, alpha=0.22, linewidth=0)
    axes.plot(x, middle, color=END, linewidth=1)
    every = 1
    while len(tasks) / every > MOST_MARKS:
        every *= 10
    axes.vlines(begins[every:-1:every], 0, 1, transform=axes.get_xaxis_transform(), color=LINE, linewidth=0.7, zorder=0)
    axes.set(xlabel="step", ylabel=key, yscale="log", xlim=(0, begins[-1]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high.max() > 100 * low.min() else (1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if y >= 0.01 else f"{y:.0e}".replace("e-0", "e\N{MINUS SIGN}"))
    of = " of a task" if per_task == 1 else ""
    lines = "" if len(tasks) == 1 else f" A vertical line: {'a new task' if every == 1 else f'{every} more tasks'}."
    seeds = ", of all seeds" if len(group.runs) > 1 else ""
    return f"{what}; log scale. Line: median{of}. Band: lowest to highest{seeds}.{lines}"


def _embeddings(axes: Axes, groups: Sequence[Group]) -> str:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    run = groups[0].runs[0]
    found: dict[str, Any] = {}
    with contextlib.suppress(CheckpointError):
        for network in ("", "labels.", "replay."):  # a trainer's; of HNET+TIR and HNET+R
            found = found or read_some(run.directory / CHECKPOINT, f"{network}hnet.task_embeddings.")
    size = min(len(found), groups[0].size)  # the last task is not replayed
    if not size:
        return _nothing(axes, f"Task embeddings are read from {CHECKPOINT}, which is not there or holds none.")
    embeddings = np.array([found[str(j)].double().numpy() for j in range(size)])
    if size < 3 or embeddings.ndim != 2 or not np.isfinite(embeddings).all():
        return _nothing(axes, "A map takes three tasks or more.")
    centred = embeddings - embeddings.mean(0)
    left, spread, _ = np.linalg.svd(centred, full_matrices=False)
    if not spread[0]:
        return _nothing(axes, "All task embeddings are the same.")
    flat = np.pad(left * spread, ((0, 0), (0, max(0, 2 - len(spread)))))[:, :2]
    flat *= np.where(flat[np.abs(flat).argmax(0), [0, 1]] < 0, -1, 1)  # the SVD leaves signs open
    share = np.pad(100 * spread**2 / (spread**2).sum(), (0, 1))
    shrink = max(0.35, min(1, math.sqrt(MOST_MARKS / size)))
    colormap = LinearSegmentedColormap.from_list("order", ORDER)
    axes.plot(*flat.T, color=LINE, linewidth=shrink, zorder=1)
    points = axes.scatter(flat[:, 0], flat[:, 1], c=range(size), cmap=colormap, s=42 * shrink**2, linewidth=0, zorder=2)
    if size <= MOST_NUMBERS:
        for j, place in enumerate(flat):
            axes.annotate(str(j), place, xytext=(5, 3), textcoords="offset points", fontsize="small", color=MUTED)
    axes.grid(axis="x")
    axes.margins(0.09)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xlabel=f"first component, {share[0]:.0f} %", ylabel=f"second component, {share[1]:.0f} %")
    bar = axes.inset_axes((0, 1.05, 1, 0.028))
    bar.imshow([range(256)], aspect="auto", extent=(-0.5, size - 0.5, 0, 1), cmap=points.cmap, interpolation="none")
    bar.grid(False)
    bar.spines["bottom"].set_visible(False)
    _count_tasks(bar, size, "")
    bar.set(yticks=[])
    bar.xaxis.tick_top()
    which = f" of seed {run.seed}" if len(groups[0].runs) > 1 else ""
    return f"Principal components of {size:,} embeddings{which}, with their shares of the variance. Colour: order of tasks."


def _samples(axes: Axes, groups: Sequence[Group]) -> str:
    import numpy as np
    from matplotlib.figure import Figure as Canvas

    run = next((run for run in groups[0].runs if (run.directory / SAMPLES).exists()), None)
    if run is None:
        return _nothing(axes, "")
    images = read_samples(run)
    tasks = np.unique(np.linspace(0, len(images) - 1, min(len(images), MOST_ROWS)).round().astype(int))
    chosen = np.pad(images[tasks, :MOST_ROWS], ((0, 0), (0, 0), (0, 2), (0, 2)))
    rows, columns, height, width = chosen.shape
    sheet = np.ma.array(chosen, mask=True)
    sheet.mask[..., :-2, :-2] = False
    sheet = sheet.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)[:-2, :-2]
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=255, interpolation="none")
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set(xticks=[], ylabel="task", yticks=height * np.arange(rows) + (height - 2) / 2, yticklabels=tasks)
    axes.set_anchor("NW")
    figure = axes.get_figure()
    if isinstance(figure, Canvas):  # and no part of a poster
        figure.set_figheight(0.3 + rows * min(0.5, 4.4 * height / width / columns))
    left_out = f" {rows} of {len(images):,} tasks are shown." if rows < len(images) else ""
    return f"What the replay model generates: a row for each task.{left_out}"


def read_samples(run: Run) -> np.ndarray:
    """The images ``[T, k, H, W]`` in ``samples.safetensors`` of a run.

    Raises:
        FasthyperError: damaged, or without a tensor ``samples`` of type uint8 and shape ``[T, k, H, W]``, or ``[T, k, F]``
            with F a square number.
    """
    path = run.directory / SAMPLES
    samples = read_some(path, "samples").get("")
    side = math.isqrt(samples.shape[-1]) if samples is not None and samples.ndim else 0
    if samples is not None and samples.ndim == 3 and side * side == samples.shape[-1]:
        samples = samples.unflatten(-1, (side, side))
    if samples is None or samples.ndim != 4 or not samples.numel() or samples.dtype != torch.uint8:
        found = "no such tensor" if samples is None else f"{samples.dtype} of shape {list(samples.shape)}"
        raise FasthyperError(f"{path}: `samples` must be uint8 of shape [tasks, images, height, width], got {found}")
    return samples.numpy()


def _nothing(axes: Axes, why: str) -> str:
    axes.set_axis_off()
    axes.text(0, 0.5, why, color=MUTED, transform=axes.transAxes)
    return why


def _count_tasks(axes: Axes, size: int, label: str = "task") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=label, xlim=(-0.5, size - 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


def _styled(groups: Sequence[Group]) -> Iterator[tuple[Group, str, str]]:
    """Each group with its colour and line style."""
    for i, group in enumerate(groups):
        yield group, COLORS[i % len(COLORS)], ("-", "--", ":", "-.")[i // len(COLORS) % 4]


def _dots(count: int) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if count <= MOST_MARKS else {}


def _scale(group: Group) -> int:
    return 100 if group.measure == ACCURACY else 1


def _what(group: Group) -> str:
    return "accuracy in %" if group.measure == ACCURACY else group.measure


def _per_run(group: Group, values: Callable[[Run], Sequence[float]], scale: float | None = None) -> np.ndarray:
    """``[runs, tasks]``, in percent where it is an accuracy."""
    import numpy as np

    return (_scale(group) if scale is None else scale) * np.array([values(run) for run in group.runs], dtype=float)


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean - SEM and mean + SEM over the rows; for a single row, itself twice."""
    mean, count = values.mean(0), len(values)
    sem = values.std(0, ddof=1) / math.sqrt(count) if count > 1 else 0 * mean
    return mean - sem, mean + sem


def _over(group: Group, band: bool = False) -> str:
    if len(group.runs) == 1:
        return ""
    return f" Mean over {len(group.runs)} seeds{'; bands: ± SEM' if band else ''}."


def _bands(groups: Sequence[Group]) -> str:
    return " Bands: ± SEM over seeds." if any(len(group.runs) > 1 for group in groups) else ""


COMPARED = (
    Figure("Average accuracy so far", "", 2.4, _average),
    Figure("Memory lifetime", "", 2.4, _lifetime),
    Figure("Accuracy just after learning", "", 2.4, _learned),
    Figure("Seconds per task", "", 2.4, _seconds),
)
FIGURES = (
    Figure("Accuracy matrix", "tall", 5.6, _matrix),
    Figure("Accuracy after learning and at the end", "", 2.6, _after_and_end),
    Figure("Memory lifetime", "", 2.6, _lifetime),
    Figure("Task embeddings", "tall", 5.3, _embeddings),
    COMPARED[0],
    COMPARED[3],
    Figure("Loss", "", 2.4, partial(_curve, key="loss", what="Loss of the task being learned")),
    Figure("Drift", "", 2.4, partial(_curve, key="drift", what="How far the weights of past tasks moved, squared")),
    Figure("Generated samples", "", 4, _samples),
)
POSTER_LEFT = (FIGURES[0], FIGURES[3], FIGURES[8])  # the first two that have something to show
POSTER_RIGHT = (*FIGURES[1:3], *FIGURES[6:8], *FIGURES[4:6])  # the first four
