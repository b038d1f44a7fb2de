"""Writes the measured parts of README.md and DESIGN.md, and the figure, from bench/results/*.json; none is typed by hand.

python bench/report.py            rewrite both and bench/figures
python bench/report.py --check    exit 1 if they are not what the results say
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fasthyper.metrics import Results

ROOT = Path(__file__).parent.parent
RESULTS, FIGURES = ROOT / "bench" / "results", ROOT / "bench" / "figures"
README, DESIGN = ROOT / "README.md", ROOT / "DESIGN.md"
OURS, PEER = "fasthyper", "hypnettorch"
COLOURS = {OURS: "#0a9396", PEER: "#ca6702"}


def main() -> int:
    measured, commands, precision = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("cpu", "commands", "precision")
    )
    rows = [entry["extra_info"] for entry in measured["benchmarks"]]
    rows = [row for row in rows if row["what"] in ("regularizer", "step")]
    parts = {
        README: {
            "headline": headline(rows),
            "figure": figure_link(),
            "times": times(commands),
            "table": table(rows, measured),
        },
        DESIGN: {"precision": precision_table(precision)},
    }
    for path, contents in parts.items():
        found = wanted = path.read_text()
        for name, text in contents.items():
            wanted = between_markers(wanted, name, text)
        if "--check" not in sys.argv[1:]:
            path.write_text(wanted)
        elif wanted != found:
            print(f"{path.name} is not what bench/results says: run `python bench/report.py`", file=sys.stderr)
            return 1
    if "--check" not in sys.argv[1:]:
        draw(rows, measured)
    return 0


def between_markers(text: str, name: str, content: str) -> str:
    """Replaces what stands between ``<!-- name -->`` and ``<!-- /name -->``, or puts both where the first one stands."""
    start, stop = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = text.partition(start)
    tail = rest.partition(stop)[2] if stop in rest else rest
    return f"{head}{start}{content}{stop}{tail}"


def headline(rows: list[dict[str, Any]]) -> str:
    steps = [row for row in rows if row["what"] == "step" and row["past"] == 100]
    low, high = min(row["ratio"] for row in steps), max(row["ratio"] for row in steps)
    return f" {low:.0f} to {high:.0f} times faster than\n{PEER} after 100 tasks,"


def figure_link() -> str:
    alt = "Seconds per training step against the number of past tasks, fasthyper and hypnettorch"
    return (
        f'\n<picture><source media="(prefers-color-scheme: dark)" srcset="bench/figures/step-dark.svg">'
        f'<img alt="{alt}" src="bench/figures/step-light.svg"></picture>\n'
    )


def times(commands: dict[str, Any]) -> str:
    seconds, demo = commands["seconds"], commands["demo"]
    results = Results.from_json(demo["results"])
    scores, config = results.scores(), demo["config"]
    training, drop = sum(task.seconds for task in results.tasks), 100 * scores["largest_drop"]
    lines = [
        "",
        f"On {commands['environment']['machine']}, from a clean clone:",
        f"`make demo` {seconds['demo'] / 60:.1f} minutes, of which the ten tasks took {training / 60:.1f}; "
        f"`make test` {seconds['test'] / 60:.1f} minutes more.",
        f"The demo ends at {100 * scores['acc']:.2f} % mean accuracy, no task more than {drop:.2f} points",
        f"under what it had when it was learned ({config['steps']} steps a task, seed {config['seed']}).",
        "",
    ]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]], measured: dict[str, Any]) -> str:
    machine = measured["machine_info"]
    lines = [
        "",
        "| workload | past tasks | regularizer | whole step |",
        "|---|---|---|---|",
    ]
    for workload, past in dict.fromkeys((row["workload"], row["past"]) for row in rows):
        cells = []
        for what in ("regularizer", "step"):
            row = next(r for r in rows if (r["what"], r["workload"], r["past"]) == (what, workload, past))
            low, high = row["ratio_quartiles"]
            cells.append(f"{row['ratio']:.1f}× ({low:.1f} to {high:.1f})")
        lines.append(f"| `{workload}` | {past} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Times of {PEER} {machine['hypnettorch']} over ours, medians (quartiles) of alternating runs:",
        f"{machine['machine']}, {machine['threads']} threads,",
        f"torch {machine['torch']}, commit {machine['commit']}, {machine['date']}.",
        "",
    ]
    return "\n".join(lines)


def precision_table(precision: dict[str, Any]) -> str:
    lines = ["", "| state | step | value: ours | loop | gradient: ours | loop | high | medium |", f"|{'---|' * 8}"]
    for row in precision["errors"]:
        errors = [f"{row[who][what]:.0e}" for what in ("value", "gradient") for who in ("ours", "loop")]
        errors += [f"{row[precision]['gradient']:.0e}" for precision in ("high", "medium")]
        step = "" if row["step"] is None else f"{row['step']:.0e}"
        lines.append(f"| {row['state']} | {step} | {' | '.join(errors)} |")
    return "\n".join([*lines, ""])


def draw(rows: list[dict[str, Any]], measured: dict[str, Any]) -> None:
    """Step time against past tasks, a panel per workload, for a light and a dark page."""
    from matplotlib.figure import Figure

    FIGURES.mkdir(exist_ok=True)
    steps = [row for row in rows if row["what"] == "step"]
    workloads = list(dict.fromkeys(row["workload"] for row in steps))
    for theme, ink in (("light", "#24292f"), ("dark", "#d0d7de")):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        for axes, workload in zip(figure.subplots(1, len(workloads), sharey=True), workloads, strict=True):
            points = sorted((row for row in steps if row["workload"] == workload), key=lambda row: row["past"])
            past = [row["past"] for row in points]
            for side, label in (("peer", PEER), ("ours", OURS)):
                medians = [1e3 * row[side]["median"] for row in points]
                axes.fill_between(
                    past,
                    [1e3 * row[side]["low"] for row in points],
                    [1e3 * row[side]["high"] for row in points],
                    color=COLOURS[label],
                    alpha=0.25,
                    linewidth=0,
                )
                axes.plot(past, medians, color=COLOURS[label], marker="o", markersize=4, linewidth=2)
                if workload == workloads[0]:
                    axes.annotate(label, (past[-1], medians[-1]), (-4, 6), textcoords="offset points", color=COLOURS[label],
                                  ha="right", va="bottom", fontweight="bold")  # fmt: skip
            last = points[-1]
            axes.set_title(f"{workload}: {last['ratio']:.0f}× at {last['past']} tasks", color=ink, fontsize=11)
            axes.set_yscale("log")
            axes.set_xlabel("past tasks", color=ink)
            axes.set_xticks(past)
            axes.tick_params(colors=ink, which="both")
            axes.grid(axis="y", color=ink, alpha=0.15)
            for side, spine in axes.spines.items():
                spine.set_visible(side in ("left", "bottom"))
                spine.set_color(ink)
        figure.axes[0].set_ylabel("ms per training step", color=ink)
        machine = measured["machine_info"]
        figure.supxlabel(f"{machine['machine']}, {machine['threads']} threads", color=ink, fontsize=8, alpha=0.7)
        metadata = {"Date": None, "Creator": None}
        figure.savefig(FIGURES / f"step-{theme}.svg", transparent=True, metadata=metadata)


if __name__ == "__main__":
    sys.exit(main())
