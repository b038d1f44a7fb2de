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


def average_so_far(matrix: Matrix) -> list[float]:
    """ACC after each task i: mean over j<=i of R[i,j]. NaN where the row has gaps."""
    return [_mean(row[: i + 1]) for i, row in enumerate(matrix)]


def aia(matrix: Matrix) -> float:
    """Average incremental accuracy: mean over i of the mean over j<=i of R[i,j]. NaN where a row has gaps."""
    return _mean(average_so_far(matrix))


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


def anterograde_forgetting(matrix: Matrix, baseline: Sequence[float]) -> float:
    """Mean over j of baseline[j] - R[j,j]: what a task loses by being learned in the sequence and not alone.

    Args:
        baseline: accuracy of each task when it is the only one that is learned, as a fraction.

    Raises:
        ValueError: the baseline has fewer tasks than the matrix.
    """
    if len(baseline) < len(matrix):
        raise ValueError(f"the baseline has {len(baseline)} tasks, the run {len(matrix)}")
    return _mean([baseline[j] - matrix[j][j] for j in range(len(matrix))])


def memory_lifetime(matrix: Matrix) -> list[list[float]]:
    """For each number k of tasks learned since, R[j+k,j] of all tasks j that were evaluated then."""
    size = len(matrix)
    return [[x for j in range(size - k) if not math.isnan(x := matrix[j + k][j])] for k in range(size)]


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

    ``baseline``: the accuracy of each task learned alone, if it is known; reports then have anterograde forgetting.
    """

    tasks: list[TaskRecord] = field(default_factory=list)
    accuracy: dict[int, dict[int, float]] = field(default_factory=dict)
    peak_memory: int = 0
    baseline: list[float] | None = None

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
        """ACC, AIA, BWT, forgetting, largest drop (fractions; NaN: not measured), s/task, samples/s, peak memory (bytes)."""
        matrix = self.matrix
        return {
            "acc": acc(matrix),
            "aia": aia(matrix),
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
        for label, key, definition in (
            ("ACC", "acc", "mean accuracy after the last task"),
            ("AIA", "aia", "mean over i of ACC after task i"),
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
        return cls(tasks, accuracy, data["peak_memory"], baseline=data.get("baseline"))


def _percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{100 * value:.2f} %"
