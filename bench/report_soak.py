"""What DESIGN says about 10,000 tasks in one process, from what bench/soak.py wrote, if it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = 5  # of the table


def load(folder: Path) -> dict[str, Any] | None:
    path = folder / "soak.json"
    return json.loads(path.read_text()) if path.exists() else None


def text(soak: dict[str, Any] | None) -> str:
    if soak is None:
        return "\nIt has not been run yet.\n"
    windows, saves = ({row["tasks"]: row for row in soak[key]} for key in ("windows", "saves"))
    lines = ["", "| tasks | a step, ms | a task, ms | resident, MB | of it records, MB | open files | threads | a save, s |"]
    lines += [f"|{'---|' * 8}"]
    shown = list(saves)
    for tasks in [shown[0], *(shown[len(shown) * i // (ROWS - 1) - 1] for i in range(1, ROWS))]:
        row, save = windows[tasks], saves[tasks]
        times, sizes = (1e3 * row["step"], 1e3 * row["task"]), (1e-6 * row["resident"], 1e-6 * row["records"])
        cells = [f"{times[0]:.2f}", f"{times[1]:.1f}", f"{sizes[0]:.0f}", f"{sizes[1]:.1f}", row["handles"], row["threads"]]
        lines.append(f"| {tasks:,} | {' | '.join(map(str, cells))} | {save['save']:.2f} |")
    settings, found = soak["settings"], soak["environment"]
    alt = "Time of a step and of a task, and resident memory, against the tasks learned"
    lines += [
        "",
        f"{settings['steps']} steps a task, {settings['reg_tasks']} past tasks sampled a step; CPU time, medians of "
        f"{settings['window']} tasks,",
        f"on one thread of {found['machine']}, commit {found['commit']}, {found['date']}.",
        "",
        '<picture><source media="(prefers-color-scheme: dark)" srcset="bench/figures/soak-dark.svg">'
        f'<img alt="{alt}" src="bench/figures/soak-light.svg"></picture>',
    ]
    return "\n".join([*lines, ""])


def figure(soak: dict[str, Any], ink: str) -> Any:
    """Times, and memory with and without the records, which are what a run is for, against the tasks learned."""
    from matplotlib.figure import Figure

    windows = soak["windows"]
    done = [row["tasks"] for row in windows]
    drawn = Figure(figsize=(9.6, 3.2), layout="constrained")
    times, memory = drawn.subplots(1, 2)
    times.plot(done, [1e3 * row["task"] for row in windows], color="#ca6702", label="a task")
    times.plot(done, [1e3 * row["step"] for row in windows], color="#0a9396", label="a step")
    times.set_ylabel("ms of CPU time", color=ink)
    memory.plot(done, [1e-6 * row["resident"] for row in windows], color="#ca6702", label="resident")
    without = [1e-6 * (row["resident"] - row["records"]) for row in windows]
    memory.plot(done, without, color="#0a9396", label="without the records of tasks")
    memory.set_ylabel("MB", color=ink)
    for axes in (times, memory):
        axes.set_ylim(0)
        axes.set_xlabel("tasks learned", color=ink)
        axes.tick_params(colors=ink)
        axes.grid(axis="y", color=ink, alpha=0.15)
        axes.legend(frameon=False, labelcolor=ink, fontsize=9)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(ink)
    return drawn
