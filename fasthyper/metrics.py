"""What a run remembers: the accuracy matrix, times and memory, and the field's summary numbers with their definitions.

``R[i][j]`` is the accuracy on task j after training task i, a fraction; entries that were not evaluated are NaN. Where a run
measures an error, its negative stands in for the accuracy: a drop above 0 is then a rise of the error.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, stdev
from typing import Any, NamedTuple

import torch

Matrix = Sequence[Sequence[float]]


class Measure(NamedTuple):
    """What an evaluation measures: what the matrix and its mean are called, whether less is better, how it is written."""

    title: str
    key: str
    definition: str
    is_error: bool
    scale: float
    digits: str
    unit: str

    def text(self, value: float, unit: bool = True) -> str:
        return "n/a" if math.isnan(value) else f"{self.scale * value:{self.digits}}{self.unit if unit else ''}"


MEASURES = {
    "accuracy": Measure("accuracy in %", "acc", "mean accuracy after the last task", False, 100, ".2f", " %"),
    "mse": Measure("mean squared error", "mse", "mean squared error after the last task", True, 1, ".3g", ""),
}

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
    total = 0.0
    for i, row in enumerate(matrix):
        total += _mean(row[: i + 1])
        if math.isnan(total):  # a long sequence has many rows, and most of them gaps
            break
    return total / len(matrix) if matrix else math.nan


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


def accuracy_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of an accuracy: the chances p at which ``correct`` of ``total`` are not surprising.

    Both ends of ``|correct / total - p| <= z sqrt(p (1 - p) / total)``, z the normal quantile of ``(1 + confidence) / 2``.

    Raises:
        ValueError: not ``0 <= correct <= total`` with ``total >= 1``, or ``confidence`` not between 0 and 1.
    """
    if not (0 <= correct <= total and total >= 1 and 0 < confidence < 1):
        raise ValueError(f"need 0 <= correct <= total >= 1 and a confidence within 0..1, got {(correct, total, confidence)}")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    middle = (correct + z2 / 2) / (total + z2)
    reach = math.sqrt(z2 * (correct * (total - correct) / total + z2 / 4)) / (total + z2)
    share = correct / total  # lies within, also where rounding would leave it out
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))


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


def sem(values: Sequence[float]) -> float:
    """Standard error of the mean: standard deviation (n - 1) over the square root of n; NaN for fewer than two, or gaps."""
    if len(values) < 2 or any(map(math.isnan, values)):
        return math.nan
    return stdev(values) / math.sqrt(len(values))


def peak_memory() -> int:
    """Bytes: the most this process has held resident, or, once CUDA is in use, the most torch allocated there."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_sampled(step: int, steps: int, num_tasks: int) -> bool:
    """Whether the curves keep this step, of so many planned: of a task at most 200, of a long sequence 20,000."""
    per_task = max(10, min(200, 20_000 // max(1, num_tasks)))
    return step % max(1, -(-steps // per_task)) == 0 or step + 1 == steps


@dataclass
class TaskRecord:
    """How one task was trained. ``loss`` and ``drift`` are samples (step, value), evenly spaced; ``seconds`` wall time;
    ``skipped`` of the steps changed nothing, since a number was not finite."""

    index: int
    name: str = ""
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    loss: list[tuple[int, float]] = field(default_factory=list)
    drift: list[tuple[int, float]] = field(default_factory=list)
    skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; ``from_json`` reads it back."""
        return {**vars(self), "loss": list(self.loss), "drift": list(self.drift)}  # asdict copies every number

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TaskRecord:
        """The record that ``to_json`` wrote, exactly.

        Raises:
            ValueError, TypeError, KeyError: it is none.
        """
        curves = {key: [(_integer(step), _number(value)) for step, value in data[key]] for key in ("loss", "drift")}
        record = cls(**{**data, **curves})
        for count in (record.index, record.steps, record.samples):
            _integer(count)
        _number(record.seconds)
        if not isinstance(record.name, str):
            raise TypeError(f"the name of task {record.index} is no text")
        return record


class _Row(Sequence[float]):
    """A row of R, NaN where nothing was evaluated."""

    def __init__(self, found: dict[int, float], size: int):
        self._found, self._size = found, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, j: Any) -> Any:
        places = range(self._size)[j]
        return self._found.get(places, math.nan) if isinstance(places, int) else [self[place] for place in places]

    def __iter__(self) -> Iterator[float]:
        return (self._found.get(j, math.nan) for j in range(self._size))


@dataclass
class Results:
    """Everything measured in a run; grows as tasks are trained and evaluated.

    ``accuracy[i][j]`` is R of ``measure``, a key of ``MEASURES``.
    ``forgotten``: each task that ``Trainer.forget`` made the network forget, and the task last trained by then.
    ``baseline``: the accuracy of each task learned alone, if it is known; reports then have anterograde forgetting.
    """

    tasks: list[TaskRecord] = field(default_factory=list)
    accuracy: dict[int, dict[int, float]] = field(default_factory=dict)
    peak_memory: int = 0
    measure: str = "accuracy"
    forgotten: dict[int, int] = field(default_factory=dict)
    baseline: list[float] | None = None

    @property
    def held(self) -> list[int]:
        """The tasks trained and not forgotten on purpose."""
        tasks = range(len(self.tasks))
        return [task for task in tasks if task not in self.forgotten] if self.forgotten else list(tasks)

    @property
    def matrix(self) -> list[list[float]]:
        """R, square over the trained tasks, NaN where nothing was evaluated."""
        tasks = range(len(self.tasks))
        return [list(row) for row in self._rows(tasks, tasks)]

    def _rows(self, rows: Sequence[int], columns: Sequence[int], sign: int = 1) -> list[_Row]:
        """These rows and columns of R, times ``sign``; what was not evaluated takes no memory."""
        place = {task: j for j, task in enumerate(columns)}
        found = (self.accuracy.get(i, {}) for i in rows)
        return [_Row({place[j]: sign * x for j, x in row.items() if j in place}, len(columns)) for row in found]

    @property
    def samples_per_second(self) -> float:
        seconds = sum(task.seconds for task in self.tasks)
        return sum(task.samples for task in self.tasks) / seconds if seconds else math.nan

    @property
    def seconds_per_task(self) -> float:
        return _mean([task.seconds for task in self.tasks])

    def scores(self) -> dict[str, float]:
        """ACC, AIA, BWT, forgetting, largest drop (fractions; NaN: not measured), s/task, samples/s, peak memory (bytes).

        All are of the tasks that were not forgotten on purpose. Of errors, ACC is NaN and ``"mse"`` the mean after the last
        task; the others are of their negatives.
        """
        measure, held = MEASURES[self.measure], self.held
        rows = [*held[:-1], len(self.tasks) - 1] if held else []  # the last is what came of them all
        matrix = self._rows(rows, held)
        mean = {"acc": math.nan, measure.key: acc(matrix), "aia": aia(matrix)}
        if measure.is_error:
            matrix = self._rows(rows, held, -1)
        return {
            **mean,
            "bwt": bwt(matrix),
            "forgetting": forgetting(matrix),
            "fwt": math.nan,  # needs an evaluation of untrained embeddings, near chance by construction: not run
            "largest_drop": largest_drop(matrix),
            "seconds_per_task": self.seconds_per_task,
            "samples_per_second": self.samples_per_second,
            "peak_memory": self.peak_memory,
        }

    def summary(self) -> str:
        """The matrix, in percent where it holds accuracies, and the scores, as plain text; each names its definition."""
        scores, measure = self.scores(), MEASURES[self.measure]
        of = ", of the error's negative" if measure.is_error else ""
        lines = [*self._matrix_lines(), ""]
        if self.forgotten:
            lines.append(f"forgotten on purpose, not in the scores: {', '.join(map(str, sorted(self.forgotten)))}")
        for label, key, definition in (
            (measure.key.upper(), measure.key, measure.definition),
            ("AIA", "aia", f"mean over i of {measure.key.upper()} after task i"),
            ("BWT", "bwt", f"GEM: {BWT_CONVENTIONS['gem']}{of}"),
            ("forgetting", "forgetting", f"Avalanche: {FORGETTING_CONVENTIONS['avalanche']}{of}"),
            ("FWT", "fwt", "n/a: an untrained task embedding is near chance by construction"),
            ("largest drop", "largest_drop", "worst task, just after learning against at the end"),
        ):
            lines.append(f"{label:<13}{measure.text(scores[key]):>9}   {definition}")
        lines.append(f"{'s/task':<13}{scores['seconds_per_task']:>9.1f}   wall time of training")
        lines.append(f"{'samples/s':<13}{scores['samples_per_second']:>9.0f}   training throughput")
        lines.append(f"{'peak memory':<13}{scores['peak_memory'] / 2**20:>6.0f}MiB   of the whole process")
        return "\n".join(lines)

    def _matrix_lines(self, most: int = 20) -> list[str]:
        size = len(self.tasks)
        shown = range(size) if size <= most else [*range(most // 2), *range(size - most // 2, size)]
        measure = MEASURES[self.measure]
        width = 10 if measure.is_error else 7
        lines = [f"{measure.title} (row: after training task, column: evaluated on task)"]
        lines.append("      " + "".join(f"{j:>{width}}" for j in shown))
        for i in shown:
            cells = (self.accuracy.get(i, {}).get(j, math.nan) for j in shown)
            lines.append(
                f"{i:>6}" + "".join(f"{'' if math.isnan(x) else measure.text(x, unit=False):>{width}}" for x in cells)
            )
        if len(shown) < size:
            lines.append(f"({size - len(shown)} tasks in the middle not shown)")
        return lines

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy; ``from_json`` reads it back."""
        accuracy = {trained: dict(row) for trained, row in self.accuracy.items()}
        forgotten, tasks = dict(self.forgotten), [task.to_json() for task in self.tasks]
        return {**vars(self), "tasks": tasks, "accuracy": accuracy, "forgotten": forgotten}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Results:
        """The results that ``to_json`` wrote, exactly.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: they are none.
        """
        tasks = [TaskRecord.from_json(task) for task in data["tasks"]]
        accuracy = {int(i): {int(j): _number(x) for j, x in row.items()} for i, row in data["accuracy"].items()}
        measure = data.get("measure", "accuracy")  # runs of before there were others have none
        if measure not in MEASURES:
            raise ValueError(f"unknown measure {measure!r:.100}; choose from {', '.join(MEASURES)}")
        forgotten = {int(task): _integer(last) for task, last in data.get("forgotten", {}).items()}
        baseline = None if data.get("baseline") is None else [_number(x) for x in data["baseline"]]
        return cls(tasks, accuracy, _integer(data["peak_memory"]), measure, forgotten, baseline)


def _number(value: Any) -> float:
    """``value``, unless it is no number."""
    return value if isinstance(value, float) else _integer(value)


def _integer(value: Any) -> int:
    """``value``, unless it is no integer of 64 bits."""
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        raise TypeError(f"{str(value)[:40]!r} is no number, or too large a one")
    return value
