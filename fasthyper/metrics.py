"""What a run remembers: the accuracy matrix, times and memory, and the field's summary numbers with their definitions.

``R[i][j]`` is the accuracy on task j after training task i, a fraction; entries that were not evaluated are NaN.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

Matrix = Sequence[Sequence[float]]

BWT_CONVENTIONS = {
    "gem": "mean over j<T of R[T,j] - R[j,j]",
    "pairs": "mean over all pairs i>j of R[i,j] - R[j,j]",
}
FORGETTING_CONVENTIONS = {
    "avalanche": "mean over j<T of R[j,j] - R[T,j]; can be negative",
    "chaudhry": "mean over j<T of max over j<=l<T of R[l,j], minus R[T,j]; can be negative",
}


def acc(matrix: Matrix) -> float:
    """Mean accuracy over all tasks after the last one: mean over j of R[T,j]. NaN where the last row has gaps."""
    return _mean(matrix[-1][: len(matrix)]) if matrix else math.nan


def bwt(matrix: Matrix, convention: str = "gem") -> float:
    """Backward transfer, as a fraction; ``convention`` is a key of ``BWT_CONVENTIONS``. NaN for fewer than two tasks.

    Raises:
        ValueError: unknown convention.
    """
    last = len(matrix) - 1
    if convention == "gem":
        return _mean([matrix[last][j] - matrix[j][j] for j in range(last)])
    if convention == "pairs":
        return _mean([matrix[i][j] - matrix[j][j] for i in range(len(matrix)) for j in range(i)])
    raise ValueError(f"unknown BWT convention {convention!r}; choose from {', '.join(BWT_CONVENTIONS)}")


def forgetting(matrix: Matrix, convention: str = "avalanche") -> float:
    """Mean loss of accuracy on old tasks, as a fraction; ``convention`` is a key of ``FORGETTING_CONVENTIONS``.

    Raises:
        ValueError: unknown convention.
    """
    last = len(matrix) - 1
    if convention == "avalanche":
        return _mean([matrix[j][j] - matrix[last][j] for j in range(last)])
    if convention == "chaudhry":
        return _mean([max(matrix[i][j] for i in range(j, last)) - matrix[last][j] for j in range(last)])
    raise ValueError(f"unknown forgetting convention {convention!r}; choose from {', '.join(FORGETTING_CONVENTIONS)}")


def fwt(matrix: Matrix, baseline: Sequence[float]) -> float:
    """Forward transfer (GEM): mean over j>1 of R[j-1,j] - baseline[j]. NaN where a task was not evaluated before its turn.

    A task-conditioned network evaluates an untrained embedding there: near chance by construction.
    """
    return _mean([matrix[j - 1][j] - baseline[j] for j in range(1, len(matrix))])


def largest_drop(matrix: Matrix) -> float:
    """Largest fall of a task from just after it was learned to the end, as a fraction; 0 for one task, NaN for gaps."""
    last = len(matrix) - 1
    drops = [matrix[j][j] - matrix[last][j] for j in range(last)]
    return math.nan if any(map(math.isnan, drops)) else max(drops, default=0.0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def peak_memory() -> int:
    """Bytes: the most this process has held resident, or, once CUDA is in use, the most torch allocated there."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class TaskRecord:
    """How one task was trained. ``loss`` and ``drift`` are samples (step, value), evenly spaced; ``seconds`` wall time."""

    index: int
    name: str = ""
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    loss: list[tuple[int, float]] = field(default_factory=list)
    drift: list[tuple[int, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; ``from_json`` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TaskRecord:
        """The record that ``to_json`` wrote, exactly."""
        curves = {key: [(int(step), value) for step, value in data[key]] for key in ("loss", "drift")}
        return cls(**{**data, **curves})


@dataclass
class Results:
    """Everything measured in a run; grows as tasks are trained and evaluated.

    ``forgotten``: each task that ``Trainer.forget`` made the network forget, and the task last trained by then.
    """

    tasks: list[TaskRecord] = field(default_factory=list)
    accuracy: dict[int, dict[int, float]] = field(default_factory=dict)
    peak_memory: int = 0
    forgotten: dict[int, int] = field(default_factory=dict)

    @property
    def held(self) -> list[int]:
        """The tasks trained and not forgotten on purpose."""
        return [task for task in range(len(self.tasks)) if task not in self.forgotten]

    @property
    def matrix(self) -> list[list[float]]:
        """R, square over the trained tasks, NaN where nothing was evaluated."""
        size = len(self.tasks)
        return [[self.accuracy.get(i, {}).get(j, math.nan) for j in range(size)] for i in range(size)]

    @property
    def samples_per_second(self) -> float:
        seconds = sum(task.seconds for task in self.tasks)
        return sum(task.samples for task in self.tasks) / seconds if seconds else math.nan

    @property
    def seconds_per_task(self) -> float:
        return _mean([task.seconds for task in self.tasks])

    def scores(self) -> dict[str, float]:
        """ACC, BWT, forgetting, largest drop (fractions; NaN = not measured), s/task, samples/s, peak memory in bytes.

        Accuracies are those of tasks that were not forgotten on purpose.
        """
        full, held = self.matrix, self.held
        rows = [*held[:-1], len(full) - 1] if held else []  # the last is what came of them all
        matrix = [[full[i][j] for j in held] for i in rows]
        return {
            "acc": acc(matrix),
            "bwt": bwt(matrix),
            "forgetting": forgetting(matrix),
            "fwt": math.nan,  # needs an evaluation of untrained embeddings, near chance by construction: not run
            "largest_drop": largest_drop(matrix),
            "seconds_per_task": self.seconds_per_task,
            "samples_per_second": self.samples_per_second,
            "peak_memory": self.peak_memory,
        }

    def summary(self) -> str:
        """The accuracy matrix in percent and the scores, as plain text; each score names its definition."""
        scores = self.scores()
        lines = [*self._matrix_lines(), ""]
        if self.forgotten:
            lines.append(f"forgotten on purpose, not in the scores: {', '.join(map(str, sorted(self.forgotten)))}")
        for label, key, definition in (
            ("ACC", "acc", "mean accuracy after the last task"),
            ("BWT", "bwt", f"GEM: {BWT_CONVENTIONS['gem']}"),
            ("forgetting", "forgetting", f"Avalanche: {FORGETTING_CONVENTIONS['avalanche']}"),
            ("FWT", "fwt", "n/a: an untrained task embedding is near chance by construction"),
            ("largest drop", "largest_drop", "worst task, just after learning against at the end"),
        ):
            lines.append(f"{label:<13}{_percent(scores[key]):>9}   {definition}")
        lines.append(f"{'s/task':<13}{scores['seconds_per_task']:>9.1f}   wall time of training")
        lines.append(f"{'samples/s':<13}{scores['samples_per_second']:>9.0f}   training throughput")
        lines.append(f"{'peak memory':<13}{scores['peak_memory'] / 2**20:>6.0f}MiB   of the whole process")
        return "\n".join(lines)

    def _matrix_lines(self, most: int = 20) -> list[str]:
        size = len(self.tasks)
        shown = range(size) if size <= most else [*range(most // 2), *range(size - most // 2, size)]
        lines = ["accuracy in % (row: after training task, column: evaluated on task)"]
        lines.append("      " + "".join(f"{j:>7}" for j in shown))
        for i in shown:
            cells = (self.accuracy.get(i, {}).get(j, math.nan) for j in shown)
            lines.append(f"{i:>6}" + "".join(f"{'' if math.isnan(x) else f'{100 * x:.2f}':>7}" for x in cells))
        if len(shown) < size:
            lines.append(f"({size - len(shown)} tasks in the middle not shown)")
        return lines

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; ``from_json`` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Results:
        """The results that ``to_json`` wrote, exactly."""
        tasks = [TaskRecord.from_json(task) for task in data["tasks"]]
        accuracy = {int(i): {int(j): x for j, x in row.items()} for i, row in data["accuracy"].items()}
        forgotten = {int(task): last for task, last in data.get("forgotten", {}).items()}  # older files have none
        return cls(tasks, accuracy, data["peak_memory"], forgotten)


def _percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{100 * value:.2f} %"
