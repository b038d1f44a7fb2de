"""What a configuration costs with T past tasks: predicted, and measured where that takes seconds."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fasthyper.bench.measure import interleaved, reason_not_to
from fasthyper.bench.memory import peak_memory
from fasthyper.bench.peers import OURS, SIDES, missing
from fasthyper.bench.predict import Predictor
from fasthyper.bench.show import megabytes, milliseconds
from fasthyper.bench.workloads import Workload

BOTH = (OURS, "hypnettorch")
COLUMNS = ["", f"{OURS}: step", "memory", "hypnettorch: step", "memory", "ratio"]


def compare(
    workload: Workload, past: int, predictor: Predictor, *, seconds: float | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """A JSON-ready row: for both sides what a step is predicted to take, and what it was measured to, with the error.

    ``seconds``: about how long measuring may take; a side whose step is predicted to take more than a sixth of it is not
    measured. ``None`` measures nothing.
    """
    row: dict[str, Any] = {"past": past, **{side: {} for side in BOTH}}
    there = [side for side in BOTH if missing(side) is None]
    for side in BOTH:
        if side not in there:
            row[side]["skipped"] = missing(side)
            continue
        row[side]["predicted"] = {"seconds": predictor.seconds(side, past, "step"), "memory": predictor.memory(side, past)}
    if len(there) == len(BOTH):
        row["ratio"] = row["hypnettorch"]["predicted"]["seconds"] / row[OURS]["predicted"]["seconds"]
    if seconds is None:
        return row
    calls = {}
    for side in there:
        slow = row[side]["predicted"]["seconds"] > seconds / 6
        reason = reason_not_to(predictor, past, "step", side) or ("a step is predicted to take too long" if slow else None)
        if reason:
            row[side]["skipped"] = reason
            continue
        say(f"{past} past tasks: setting up {side}")
        calls[side] = SIDES[side](workload, past).prepare("step")
    say(f"{past} past tasks: timing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer's own
        times = interleaved(calls, seconds) if calls else {}
    calls.clear()
    for side, taken in times.items():
        say(f"{past} past tasks: memory of {side}")
        memory = peak_memory(workload, past, "regularizer", side, torch.get_num_threads())
        total = None if memory is None else memory["kept"] + memory["step"]
        median = statistics.median(taken)
        error = row[side]["predicted"]["seconds"] / median - 1
        row[side]["measured"] = {"seconds": median, "memory": total, "error": error}
    if len(times) == len(BOTH):
        row["measured_ratio"] = row["hypnettorch"]["measured"]["seconds"] / row[OURS]["measured"]["seconds"]
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table under ``COLUMNS``."""
    shown = [f"{row['past']} past tasks"]
    for side in BOTH:
        entry = row[side]
        if "predicted" not in entry:
            shown += [entry["skipped"], ""]
            continue
        predicted = entry["predicted"]
        step, memory = milliseconds(predicted["seconds"]), _size(predicted["memory"])
        if "measured" in entry:
            found = entry["measured"]
            step += f"\nmeasured {milliseconds(found['seconds'])}: {100 * found['error']:+.0f} % off"
            memory += f"\nmeasured {_size(found['memory'])}"
        elif "skipped" in entry:
            step += f"\nnot measured: {entry['skipped']}"
        shown += [step, memory]
    measured = f"\nmeasured {row['measured_ratio']:.1f}×" if "measured_ratio" in row else ""
    return [*shown, f"{row['ratio']:.1f}×{measured}" if "ratio" in row else ""]


def _size(num_bytes: int | None) -> str:
    return "not known here" if num_bytes is None else megabytes(num_bytes)


def compare_all(
    workload: Workload,
    tasks: Sequence[int],
    *,
    seconds: float | None,
    say: Callable[[str], None],
    add: Callable[[Any], None],
) -> list[dict[str, Any]]:
    """A row for each number of past tasks, each given to ``add`` when it is there."""
    say("measuring this machine")
    predictor, rows = Predictor(workload), []
    for past in tasks:
        rows.append(compare(workload, past, predictor, seconds=seconds, say=say))
        add(rows[-1])
    return rows
