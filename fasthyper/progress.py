"""Progress on the terminal: a live bar for a task being trained, and a line when it is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Update(Protocol):
    def __call__(self, step: int, loss: float, drift: float) -> None: ...


@contextmanager
def training_bar(title: str, start: int, steps: int, enabled: bool) -> Iterator[Update]:
    """A bar from ``start`` to ``steps``; call what it yields with the step, loss and drift (NaN: no past task).

    Without a terminal, or without rich, only the closing line is printed.
    """
    if not enabled:
        yield lambda step, loss, drift: None
        return
    last = (start, float("nan"), float("nan"))
    began = shown = time.perf_counter()
    bar, row = _rich_bar(title, start, steps)

    def update(step: int, loss: float, drift: float) -> None:
        nonlocal last, shown
        last = (step, loss, drift)
        now = time.perf_counter()
        if bar is not None and now - shown > 0.1:
            shown = now
            shown_drift = "none yet" if drift != drift else f"{drift:.1e}"
            bar.update(row, completed=step, loss=loss, drift=shown_drift, rate=(step - start) / (now - began))

    try:
        yield update
    finally:
        if bar is not None:
            bar.stop()
        step, loss, drift = last
        seconds = time.perf_counter() - began
        held = "" if drift != drift else f"  drift {drift:.2e}"
        rate = (step - start) / seconds
        print(f"{title}  step {step}/{steps}  loss {loss:.4f}{held}  {rate:.0f} steps/s  {seconds:.1f} s", flush=True)


def _rich_bar(title: str, start: int, steps: int):  # type: ignore[no-untyped-def]
    """A started rich bar and its row, or (None, None) where there is no terminal or no rich."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None, None
    console = Console()
    if not console.is_terminal:
        return None, None
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  drift {task.fields[drift]}  {task.fields[rate]:.0f} steps/s  ETA"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
    bar.live.auto_refresh = True
    bar.start()
    return bar, bar.add_task(title, completed=start, total=steps, loss=float("nan"), drift="none yet", rate=0.0)
