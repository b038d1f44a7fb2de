"""The page, the poster, and the files beside them."""

from __future__ import annotations

import io
import json
import math
import os
import re
import string
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fasthyper.errors import FasthyperError
from fasthyper.report.figures import (
    COLORS,
    COMPARED,
    CSS,
    FIGURES,
    LOOK,
    MOST_NUMBERS,
    MUTED,
    PAGE,
    POSTER_LEFT,
    POSTER_RIGHT,
    Figure,
)
from fasthyper.report.runs import NEVER, SCORES, Group, Run, Score, as_json, grouped, load_run, plain
from fasthyper.version import __version__

TEMPLATE = Path(__file__).with_name("page.html")


def write_report(
    directories: Sequence[str | Path], out: str | Path | None = None, baseline: str | Path | None = None
) -> Path:
    """Writes ``report.html`` and ``report.json`` on all runs, ``report.png`` and ``accuracy.csv`` on the first one.

    Runs that differ in their seeds alone are shown as mean ± SEM. Returns the path of the page.

    Args:
        directories: of the runs, at least one.
        out: where to write; ``None``: the first directory.
        baseline: directory of a run whose tasks were each trained by themselves, for anterograde forgetting; a list
            ``baseline`` in the results of a run goes before it.

    Raises:
        FasthyperError: a run cannot be read, the report cannot be written, or matplotlib is missing.
        ValueError: no directory is given.
    """
    if not directories:
        raise ValueError("a report needs at least one run directory")
    alone = None if baseline is None else load_run(baseline)
    groups = grouped([load_run(directory, alone) for directory in directories])
    try:
        import matplotlib
    except ImportError as error:
        raise FasthyperError("the report needs matplotlib: pip install 'fasthyper[plot]'") from error
    with matplotlib.rc_context(LOOK):
        page, poster = _page(groups), _poster(groups[0])
    first = groups[0].runs[0]
    out = first.directory if out is None else Path(out)
    _write(out / "accuracy.csv", _csv(first).encode())
    _write(out / "report.json", json.dumps(as_json(groups), indent=1, default=str).encode())
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
    rows = [[i, *("" if math.isnan(x) else x for x in row)] for i, row in enumerate(run.matrix)]
    return "".join(",".join(map(str, row)) + "\n" for row in [["after_task", *range(len(rows))], *rows])


def _svg(figure: Figure, groups: Sequence[Group], anchor: str) -> str:
    """The figure under its caption, as SVG with the page's colours and fonts; empty if it has nothing to say."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    title = figure.title_of(groups[0])
    matplotlib.rcParams["svg.hashsalt"] = f"{anchor} {title}"  # ids that no other figure has, the same every time
    canvas = Canvas(figsize=(5, figure.height), layout="constrained")
    axes = canvas.add_subplot()
    caption = figure.draw(axes, groups)
    if not caption:
        return ""
    head = f"<figcaption><strong>{title}</strong>{escape(caption)}</figcaption>"
    if not axes.axison:
        return f"<figure>{head}</figure>"
    file = io.StringIO()
    canvas.savefig(file, format="svg", transparent=True)
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| id="[A-Za-z][\w.]*_\d+"|(?<=<svg) width="[^"]*" height="[^"]*"', "", svg)
    svg = re.sub(r"font: [^;\"]*?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub("|".join(CSS), lambda match: f"var(--{CSS[match[0]]})", svg)
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), svg)
    svg = re.sub(r'(<g clip-path="[^"]*")>((?:\s*<use [^>]*/>)+)', _style_once, re.sub(r"\n\s+", "\n", svg))
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}. {escape(caption)}"', 1)
    kind = f' class="{figure.kind}"' if figure.kind else ""
    return f'<figure{kind}>{head}\n<div class="scroll">{svg}</div></figure>'


def _style_once(marks: re.Match[str]) -> str:
    """Marks that look alike have their style from the group around them."""
    styles = set(re.findall(r' style="[^"]*"', marks[2]))
    if len(styles) != 1:
        return marks[0]
    (style,) = styles
    return f"{marks[1]}{style}>{marks[2].replace(style, '')}"


def _poster(group: Group) -> bytes:
    """The headline, the numbers and the figures as a PNG of 1600 x 2200 pixels, on a light ground."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(16, 22), dpi=100, facecolor=PAGE, layout="constrained")
    tasks, _, outcome = group.headline.partition(": ")
    margin, each = 0.5 / 16, (len(SCORES) + 1) // 2
    canvas.text(margin, 0.976, group.name, va="top", fontsize=15, color=MUTED, parse_math=False)
    canvas.text(margin, 0.963, tasks, va="top", fontsize=34, fontweight="bold", parse_math=False)
    canvas.text(margin, 0.932, outcome, va="top", fontsize=22, parse_math=False)
    for i, score in enumerate(SCORES):
        x, y = margin + i % each * (1 - margin) / each, 0.901 - i // each * 0.032
        value = group.shown(score)
        text = value if value == NEVER else f"{value} {score.unit_of(group.measure)}"
        canvas.text(x, y, score.label_of(group.measure), va="top", fontsize=13, color=MUTED)
        canvas.text(x, y - 0.0115, text, va="top", fontsize=16)
    grid = canvas.add_gridspec(
        6, 5, width_ratios=(0.5, 7.2, 0.6, 7.2, 0.5), height_ratios=(3.8, 4, 4, 3.6, 3.6, 0.3), hspace=0.02
    )
    left, right = (grid[1:3, 1], grid[3:5, 1]), (grid[1, 3], grid[2, 3], grid[3, 3], grid[4, 3])
    with matplotlib.rc_context({"font.size": 13}):
        for figures, cells in ((POSTER_LEFT, left), (POSTER_RIGHT, right)):
            waiting = iter(figures)
            for cell in cells:
                for figure in waiting:  # until one has something to show
                    panel = canvas.add_subfigure(cell)
                    axes = panel.add_subplot()
                    figure.draw(axes, [group])
                    if axes.axison:
                        panel.suptitle(figure.title_of(group), x=0, ha="left", fontsize=17, fontweight="bold")
                        break
                    panel.remove()
    file = io.BytesIO()
    canvas.savefig(file, format="png")
    return file.getvalue()


# The page, filled into page.html.


def _page(groups: Sequence[Group]) -> str:
    several = len(groups) > 1
    runs = sum(len(group.runs) for group in groups)
    title = f"{runs} runs compared" if several else f"{groups[0].name}: {groups[0].headline}"
    sections = [_section(group, f"run-{i}", 2 if several else 1) for i, group in enumerate(groups, start=1)]
    if several:
        measures = dict.fromkeys(group.measure for group in groups)
        anchors = {f"run-{i}": group for i, group in enumerate(groups, start=1)}
        alike = [{a: group for a, group in anchors.items() if group.measure == measure} for measure in measures]
        sections = [f"<h1>{title}</h1>", *map(_comparison, alike), *sections]
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(sections), version=escape(__version__))


def _comparison(groups: dict[str, Group]) -> str:
    """The groups, by anchor, of one measure."""
    shown = list(groups.values())
    measure = shown[0].measure
    rows = "".join(
        f'<tr><th scope="row"><i class="key" style="--key: var(--c{i % len(COLORS)})"></i>'
        f'<a href="#{anchor}">{escape(group.name)}</a>{_small(group.settings)}{_small(_where(group))}</th>'
        f"<td>{group.size:,}</td>{''.join(f'<td>{_value(group, score)}</td>' for score in SCORES)}</tr>\n"
        for i, (anchor, group) in enumerate(groups.items())
    )
    figures = "".join(_svg(figure, shown, f"compared {measure}") for figure in COMPARED) if len(groups) > 1 else ""
    return f"""<div class="comparison scroll" role="region" aria-label="Comparison in {escape(measure)}" tabindex="0">
<table><thead><tr><th scope="col">Run</th><th scope="col">Tasks</th>{_score_heads(measure)}</tr></thead>
<tbody>{rows}</tbody></table></div>
{f'<div class="figures compared">{figures}</div>' if figures else ""}"""


def _score_heads(measure: str) -> str:
    return "".join(f'<th scope="col">{s.label_of(measure)}{_small(s.unit_of(measure))}</th>' for s in SCORES)


def _small(text: str) -> str:
    return f" <small>{escape(text)}</small>" if text else ""


def _where(group: Group) -> str:
    names = ", ".join(run.directory.resolve().name for run in group.runs)
    return f"{len(group.runs)} seeds: {names}" if len(group.runs) > 1 else names


def _value(group: Group, score: Score) -> str:
    mean, plus, sem = group.shown(score).partition("\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return f"{mean}{_small(f'± {sem}' if plus else '')}"


def _section(group: Group, anchor: str, level: int) -> str:
    first = group.runs[0]
    facts = (first.config.get("about"), *(first.environment.get(key) for key in ("machine", "backend", "date")))
    about = "\N{NO-BREAK SPACE}· ".join(escape(str(fact)) for fact in facts if fact)
    dense = " dense" if MOST_NUMBERS // 2 < group.size <= MOST_NUMBERS else ""
    heading = f"h{level + 1}"
    commands = "\n".join(filter(None, (run.command for run in group.runs)))
    again = f'<{heading}>Run it again</{heading}><pre tabindex="0">{escape(commands)}</pre>'
    return f"""<section id="{anchor}" aria-labelledby="{anchor}-title">
<p class="name">{escape(group.name)}{f" · {escape(group.settings)}" if group.settings else ""}</p>
<h{level} id="{anchor}-title">{escape(group.headline)}</h{level}>
<p class="about">{about}</p>
<dl class="tiles">{"".join(_tile(group, score) for score in SCORES)}</dl>
<div class="figures{dense}">{"".join(_svg(figure, [group], anchor) for figure in FIGURES)}</div>
<div class="facts">{_seeds(group, heading) if len(group.runs) > 1 else ""}
{f'<div class="wide">{again}</div>' if commands else ""}
{_table("Settings", _joined([run.config for run in group.runs]), heading)}
{_table("Environment", _joined([run.environment for run in group.runs]), heading)}</div>
</section>"""


def _tile(group: Group, score: Score) -> str:
    mean, plus, sem = group.shown(score).partition("\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    unit = "" if mean == NEVER else _small(score.unit_of(group.measure))
    error = f'<dd class="sem">± {sem}</dd>' if plus else ""
    return f"""<div><dt>{score.label_of(group.measure)}</dt><dd class="value">{mean}{unit}</dd>{error}
<dd class="definition">{escape(score.definition_of(group.measure))}</dd></div>\n"""


def _seeds(group: Group, heading: str) -> str:
    """A table of the single runs of a group."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(run.seed))}{_small(run.directory.resolve().name)}</th>'
        f"{''.join(f'<td>{score.of(run.scores[score.key], group.measure)}</td>' for score in SCORES)}</tr>\n"
        for run in group.runs
    )
    return f"""<div class="wide comparison"><{heading}>Seeds</{heading}>
<div class="scroll" role="region" aria-label="Seeds" tabindex="0"><table>
<thead><tr><th scope="col">Seed</th>{_score_heads(group.measure)}</tr></thead><tbody>{rows}</tbody></table></div></div>"""


def _joined(facts: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What several runs recorded, each different value once."""
    keys = dict.fromkeys(key for some in facts for key in some)
    return {key: "; ".join(dict.fromkeys(plain(some[key]) for some in facts if key in some)) for key in keys}


def _table(title: str, facts: dict[str, str], heading: str) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(value)}</td></tr>\n' for key, value in facts.items()
    )
    return f'<div><{heading}>{title}</{heading}><div class="scroll"><table><tbody>{rows}</tbody></table></div></div>'
