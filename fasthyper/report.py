"""What a run looks like: a self-contained HTML page, a poster and the accuracy matrix as CSV, made from ``results.json``."""

from __future__ import annotations

import io
import math
import os
import re
import shlex
import string
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasthyper.checkpoint import RESULTS, read_results
from fasthyper.errors import FasthyperError
from fasthyper.metrics import BWT_CONVENTIONS, FORGETTING_CONVENTIONS, Results
from fasthyper.recipes import RECIPES
from fasthyper.version import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = Path(__file__).with_name("report.html")
MOST_NUMBERS = 20  # tasks whose accuracies are written into the matrix
MOST_MARKS = 40  # tasks drawn in full in the other figures
MOST_CELLS = 500  # per side of a drawn matrix
MOST_POINTS = 600  # of a drawn curve

PAGE, INK, MUTED, LINE, AFTER, END = "#fdfdfc", "#1b2229", "#626c77", "#e2e5e9", "#d0661b", "#2b6cb0"
CSS = dict(zip((PAGE, INK, MUTED, LINE, AFTER, END), ("page", "ink", "muted", "line", "after", "end"), strict=True))
ON_LIGHT, ON_DARK = "#10222e", "#ffffff"  # numbers in cells, which look the same on every page
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
class Run:
    """One run read from its directory. ``config`` and ``environment`` hold whatever was recorded, by name."""

    directory: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    results: Results

    @cached_property
    def scores(self) -> dict[str, float]:
        """As ``Results.scores()`` gives them."""
        return self.results.scores()

    @property
    def headline(self) -> str:
        """The outcome in one sentence."""
        scores, size = self.scores, len(self.results.tasks)
        tasks = "1 task" if size == 1 else f"{size:,} tasks in a row"
        if math.isnan(scores["acc"]):
            return f"{tasks}: not evaluated after the last one"
        if size == 1:
            return f"{tasks}: {100 * scores['acc']:.1f} % accuracy"
        drop, lost = 100 * scores["largest_drop"], ""
        if not math.isnan(drop):
            lost = f", worst task lost {drop:.2f} points" if drop > 0 else ", no task lost accuracy"
        return f"{tasks}: {100 * scores['acc']:.1f} % mean accuracy at the end{lost}"

    @property
    def command(self) -> str | None:
        """What makes this run again, if a recipe made it."""
        recipe = asdict(RECIPES[self.name]) if self.name in RECIPES else {}
        if self.config.keys() != recipe.keys():
            return None
        words = ["fasthyper", "run", self.name, "--out", self.directory.resolve().name]
        for key, value in self.config.items():
            if _plain(value) != _plain(recipe[key]):
                words += [f"--{key.replace('_', '-')}", _plain(value)]
        return shlex.join(words)


@dataclass(frozen=True)
class Score:
    """How ``scores[key]`` is shown: times ``scale``, with so many ``digits``."""

    key: str
    label: str
    unit: str
    scale: float
    digits: int
    definition: str

    def of(self, run: Run) -> str:
        """The number without its unit."""
        value = run.scores[self.key]
        if math.isnan(value):
            return "n/a"
        rounded = round(self.scale * value, self.digits) + 0.0  # no minus zero
        return f"{rounded:,.{self.digits}f}".replace("-", "\N{MINUS SIGN}")


SCORES = (
    Score("acc", "ACC", "%", 100, 2, "mean accuracy over all tasks after the last one"),
    Score("bwt", "BWT", "points", 100, 2, f"backward transfer, GEM: {BWT_CONVENTIONS['gem']}"),
    Score("forgetting", "Forgetting", "points", 100, 2, f"Avalanche: {FORGETTING_CONVENTIONS['avalanche']}"),
    Score("largest_drop", "Largest drop", "points", 100, 2, "worst task, just after learning against at the end"),
    Score("seconds_per_task", "Time per task", "s", 1, 1, "wall time of training, mean"),
    Score("samples_per_second", "Throughput", "samples/s", 1, 0, "training samples per second of training"),
    Score("peak_memory", "Peak memory", "MiB", 2**-20, 0, "most the process held resident; on a GPU, most allocated there"),
)


def load_run(directory: str | Path) -> Run:
    """The run that ``directory`` holds in its ``results.json``.

    Raises:
        FasthyperError: there is none, or it is damaged, of another format, or without a finished task.
    """
    directory = Path(directory)
    path, content = directory / RESULTS, read_results(directory)
    try:
        name, config, environment = str(content["name"]), dict(content["config"]), dict(content["environment"])
        run = Run(directory, name, config, environment, Results.from_json(content["results"]))
        _ = run.scores
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FasthyperError(f"{path} is damaged ({error!r}): `fasthyper run RECIPE --out DIR` makes a new one") from error
    if not run.results.tasks:
        raise FasthyperError(f"{path} holds no finished task yet: go on with `fasthyper run RECIPE --out {directory}`")
    return run


def write_report(directories: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes ``report.html`` on all runs, ``report.png`` and ``accuracy.csv`` on the first; returns the page's path.

    Args:
        directories: of the runs, at least one.
        out: where to write; ``None``: the first directory.

    Raises:
        FasthyperError: a run cannot be read, the report cannot be written, or matplotlib is missing.
        ValueError: no directory is given.
    """
    if not directories:
        raise ValueError("a report needs at least one run directory")
    runs = [load_run(directory) for directory in directories]
    try:
        import matplotlib
    except ImportError as error:
        raise FasthyperError("the report needs matplotlib: pip install 'fasthyper[plot]'") from error
    with matplotlib.rc_context(LOOK):
        page, poster = _page(runs), _poster(runs[0])
    out = runs[0].directory if out is None else Path(out)
    _write(out / "accuracy.csv", _csv(runs[0]).encode())
    _write(out / "report.png", poster)
    _write(out / "report.html", page.encode())
    return out / "report.html"


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FasthyperError(f"cannot write {path}: {error.strerror}") from error


def _csv(run: Run) -> str:
    matrix = run.results.matrix
    rows = [[i, *("" if math.isnan(x) else x for x in row)] for i, row in enumerate(matrix)]
    return "".join(",".join(map(str, row)) + "\n" for row in [["after_task", *range(len(matrix))], *rows])


def _plain(value: Any) -> str:
    """As the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# Figures: each draws a run on axes and returns its caption.


def _draw_matrix(axes: Axes, run: Run) -> str:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    matrix = 100 * np.array(run.results.matrix)
    size = len(matrix)
    if np.isnan(matrix).all():
        return _draw_nothing(axes, "No task was evaluated.")
    low, high = float(np.nanmin(matrix)), float(np.nanmax(matrix))
    span = (low, high) if low < high else (low - 0.5, high + 0.5)
    look: Any = {"cmap": ListedColormap(colormaps["YlGnBu"](np.linspace(0.06, 0.88, 256))), "norm": Normalize(*span)}
    if size <= MOST_NUMBERS:
        edges = np.arange(size + 1) - 0.5
        axes.pcolormesh(edges, edges, matrix, edgecolors=PAGE, linewidth=1.2, **look)
        axes.set(xticks=range(size), yticks=range(size))
        font = float(axes.xaxis.label.get_fontsize()) * min(0.85, 11.5 / size)
        for (i, j), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                light = np.power(look["cmap"](look["norm"](value))[:3], 2.2) @ (0.21, 0.72, 0.07) > 0.25
                text = f"{value:.{2 if size <= 10 else 1}f}"
                axes.text(j, i, text, color=ON_LIGHT if light else ON_DARK, fontsize=font, ha="center", va="center")
    else:
        block = math.ceil(size / MOST_CELLS)
        padded = np.pad(matrix, (0, -size % block), constant_values=np.nan)
        end = len(padded) - 0.5
        cells = padded.reshape(len(padded) // block, block, -1, block)
        with np.errstate(invalid="ignore"):  # a block without any number is 0 / 0: blank
            means = np.nansum(cells, axis=(1, 3)) / (~np.isnan(cells)).sum(axis=(1, 3))
        axes.imshow(means, interpolation="none", extent=(-0.5, end, end, -0.5), **look)
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
    bar.xaxis.set_major_formatter("{x:g} %")
    return f"Row: after training that task. Column: evaluated on that task. From {low:.1f} % to {high:.1f} %."


def _draw_accuracy(axes: Axes, run: Run) -> str:
    matrix = run.results.matrix
    size = len(matrix)
    after, end = [100 * matrix[j][j] for j in range(size)], [100 * x for x in matrix[-1]]
    if all(map(math.isnan, after + end)):
        return _draw_nothing(axes, "No task was evaluated.")
    shrink = max(0.4, min(1, math.sqrt(MOST_MARKS / size)))
    axes.vlines(range(size), after, end, color=MUTED, linewidth=shrink, alpha=shrink)
    look: Any = {"markersize": 5 * shrink, "markeredgewidth": shrink}
    hollow = PAGE if shrink > 0.5 else AFTER
    axes.plot(after, "o", color=AFTER, markerfacecolor=hollow, label="just after learning", **look)
    axes.plot(end, "o", color=END, label="at the end", **look)
    look = {"ncols": 2, "columnspacing": 1, "handletextpad": 0, "markerscale": 1 / shrink}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), **look)
    axes.set(ylabel="accuracy in %")
    _count_tasks(axes, size)
    return "Each task just after it was learned, and after the last task. The gap is what was forgotten."


def _draw_seconds(axes: Axes, run: Run) -> str:
    seconds = [task.seconds for task in run.results.tasks]
    axes.plot(seconds, color=END, linewidth=1.2, marker="o" if len(seconds) <= MOST_MARKS else "", markersize=4)
    axes.set(ylabel="seconds", ylim=(0, 1.15 * max(seconds) or 1))
    _count_tasks(axes, len(seconds))
    return f"Wall time of training. The first task took {seconds[0]:,.1f} s, the last {seconds[-1]:,.1f} s."


def _draw_curve(axes: Axes, run: Run, key: str, what: str) -> str:
    import numpy as np
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    tasks = run.results.tasks
    begins = np.cumsum([0, *(task.steps for task in tasks)])
    per_task = 1 if len(tasks) > MOST_MARKS else MOST_POINTS // len(tasks)
    groups = []
    for begin, task in zip(begins, tasks, strict=False):
        points = np.array([(begin + step, value) for step, value in getattr(task, key) if 0 < value < math.inf])
        groups += np.array_split(points, min(len(points), per_task)) if len(points) else []
    if not groups:
        return _draw_nothing(axes, "Nothing was recorded." if key == "loss" else "There was no past task to hold.")
    x, low, middle, high = np.array([(g[:, 0].mean(), g[:, 1].min(), np.median(g[:, 1]), g[:, 1].max()) for g in groups]).T
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
    return f"{what}; log scale. Line: median{of}. Band: lowest to highest.{lines}"


def _draw_nothing(axes: Axes, why: str) -> str:
    axes.set_axis_off()
    axes.text(0, 0.5, why, color=MUTED, transform=axes.transAxes)
    return why


def _count_tasks(axes: Axes, size: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="task", xlim=(-0.5, size - 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))


FIGURES: tuple[tuple[str, float, Callable[[Axes, Run], str]], ...] = (  # title, height in inches
    ("Accuracy matrix", 5.9, _draw_matrix),
    ("Accuracy after learning and at the end", 2.6, _draw_accuracy),
    ("Seconds per task", 2.1, _draw_seconds),
    ("Loss", 2.4, partial(_draw_curve, key="loss", what="Cross-entropy of the task being learned")),
    ("Drift", 2.4, partial(_draw_curve, key="drift", what="How far the weights of past tasks moved, squared")),
)


def _figure(run: Run, anchor: str, title: str, height: float, draw: Callable[[Axes, Run], str]) -> str:
    """The figure as SVG with the page's colours and fonts, under its caption."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = f"{anchor} {title}"  # ids that no other figure has, the same every time
    figure = Figure(figsize=(5.3, height), layout="constrained")
    axes = figure.add_subplot()
    caption = draw(axes, run)
    top = f"<figure><figcaption><strong>{title}</strong>{escape(caption)}</figcaption>"
    if not axes.axison:
        return f"{top}</figure>"
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| id="[A-Za-z][\w.]*_\d+"|(?<=<svg) width="[^"]*" height="[^"]*"', "", svg)
    svg = re.sub(r"font: [^;\"]*?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub("|".join(CSS), lambda match: f"var(--{CSS[match[0]]})", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}. {escape(caption)}"', 1)
    return f'{top}\n<div class="scroll">{svg}</div></figure>'


def _poster(run: Run) -> bytes:
    """The headline, the numbers and the figures as a PNG of 1600 x 1700 pixels, on a light ground."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 17), dpi=100, facecolor=PAGE, layout="constrained")
    tasks, _, outcome = run.headline.partition(": ")
    margin = 0.5 / 16
    figure.text(margin, 0.968, run.name, va="top", fontsize=15, color=MUTED, parse_math=False)
    figure.text(margin, 0.95, tasks, va="top", fontsize=34, fontweight="bold")
    figure.text(margin, 0.91, outcome, va="top", fontsize=22)
    for i, score in enumerate(SCORES):
        x = margin + i * (1 - margin) / len(SCORES)
        figure.text(x, 0.872, score.label, va="top", fontsize=13, color=MUTED)
        figure.text(x, 0.855, f"{score.of(run)} {score.unit}", va="top", fontsize=16)
    grid = figure.add_gridspec(6, 5, width_ratios=(0.5, 7.2, 0.6, 7.2, 0.5), height_ratios=(3, 8, 0.5, 2.5, 2.5, 0.5))
    cells = (grid[1, 1], grid[1, 3], grid[3:5, 3], grid[3, 1], grid[4, 1])
    with matplotlib.rc_context({"font.size": 13}):
        for (title, _, draw), cell in zip(FIGURES, cells, strict=True):
            panel = figure.add_subfigure(cell)
            panel.suptitle(title, x=0, ha="left", fontsize=17, fontweight="bold")
            draw(panel.add_subplot(), run)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


# The page, filled into report.html.


def _page(runs: Sequence[Run]) -> str:
    several = len(runs) > 1
    title = f"{len(runs)} runs compared" if several else f"{runs[0].name}: {runs[0].headline}"
    sections = [_section(run, f"run-{i}", 2 if several else 1) for i, run in enumerate(runs, start=1)]
    body = "\n".join([_comparison(runs), *sections] if several else sections)
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body=body, version=escape(__version__))


def _comparison(runs: Sequence[Run]) -> str:
    head = "".join(f'<th scope="col">{score.label} <small>{score.unit}</small></th>' for score in SCORES)
    rows = "".join(
        f'<tr><th scope="row"><a href="#run-{i}">{escape(run.name)}</a> ({escape(run.directory.name)})</th>'
        f"<td>{len(run.results.tasks):,}</td>{''.join(f'<td>{score.of(run)}</td>' for score in SCORES)}</tr>\n"
        for i, run in enumerate(runs, start=1)
    )
    return f"""<h1>{len(runs)} runs compared</h1>
<div class="comparison scroll" role="region" aria-label="Comparison" tabindex="0"><table>
<thead><tr><th scope="col">Run</th><th scope="col">Tasks</th>{head}</tr></thead>
<tbody>{rows}</tbody></table></div>"""


def _section(run: Run, anchor: str, level: int) -> str:
    facts = (run.config.get("about"), *(run.environment.get(key) for key in ("machine", "backend", "date")))
    about = "\N{NO-BREAK SPACE}· ".join(escape(str(fact)) for fact in facts if fact)
    tiles = "".join(
        f'<div><dt>{score.label}</dt><dd class="value">{score.of(run)}<small>{score.unit}</small></dd>'
        f'<dd class="definition">{escape(score.definition)}</dd></div>\n'
        for score in SCORES
    )
    dense = " dense" if MOST_NUMBERS // 2 < len(run.results.tasks) <= MOST_NUMBERS else ""
    heading = f"h{level + 1}"
    again = f'<{heading}>Run it again</{heading}><pre tabindex="0">{escape(run.command or "")}</pre>'
    return f"""<section id="{anchor}" aria-labelledby="{anchor}-title">
<p class="name">{escape(run.name)}</p>
<h{level} id="{anchor}-title">{run.headline}</h{level}>
<p class="about">{about}</p>
<dl class="tiles">{tiles}</dl>
<div class="figures{dense}">{"".join(_figure(run, anchor, *figure) for figure in FIGURES)}</div>
<div class="facts">{f'<div class="wide">{again}</div>' if run.command else ""}
{_table("Settings", run.config, heading)}{_table("Environment", run.environment, heading)}</div>
</section>"""


def _table(title: str, facts: dict[str, Any], heading: str) -> str:
    cells = ((escape(str(key)), escape(_plain(value))) for key, value in facts.items())
    rows = "".join(f'<tr><th scope="row">{key}</th><td>{value}</td></tr>\n' for key, value in cells)
    return f'<div><{heading}>{title}</{heading}><div class="scroll"><table><tbody>{rows}</tbody></table></div></div>'
