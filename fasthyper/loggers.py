"""Where a trainer's numbers go while it runs: CSV, TensorBoard, Weights & Biases, or a ``Logger`` of one's own."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fasthyper.errors import MissingPackageError
from fasthyper.metrics import TaskRecord


class Logger:
    """What ``fh.Trainer(loggers=[...])`` calls; override what you need. ``total`` counts the steps of all tasks so far.

    Args:
        every: steps between calls of ``on_step``.

    ``measure``: what evaluations hold, ``"accuracy"`` or ``"mse"``; the trainer sets it.

    Numbers arrive as Python floats that are read from the device anyway; from a GPU some steps late, but all in order.

    Raises:
        ValueError: ``every`` below 1.
    """

    measure = "accuracy"

    def __init__(self, every: int = 10):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every

    def on_step(self, task: int, step: int, total: int, loss: float, drift: float) -> None:
        """After step ``step`` (from 0) of a task: its task loss and drift, NaN without past tasks."""

    def on_task_end(self, record: TaskRecord, total: int) -> None:
        """After the last step of a task."""

    def on_evaluate(self, trained: int, accuracies: Mapping[int, float], total: int) -> None:
        """After an evaluation: accuracies, fractions, or errors, by task, once ``trained`` was the last task trained."""

    def close(self) -> None:
        """Writes what is left; nothing is called afterwards."""


class CSVLogger(Logger):
    """One CSV file, a row per ``event`` (``step``, ``task_end`` or ``evaluate``); what an event has no value for is empty.

    An evaluation fills ``accuracy``, or ``loss`` where it measures errors.

    Args:
        path: of the file; its folder is made. A run that goes on appends, so a step that is taken again has two rows.
        every: steps between rows.

    Raises:
        ValueError: the file is there and is not one of ours.
    """

    COLUMNS = ("event", "task", "step", "total_step", "loss", "drift", "evaluated", "accuracy", "seconds", "samples")

    def __init__(self, path: str | os.PathLike[str], every: int = 10):
        super().__init__(every)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = ",".join(self.COLUMNS)
        if path.exists() and path.stat().st_size > 0:
            with path.open() as file:
                if file.readline(len(header) + 2).strip() != header:
                    raise ValueError(f"{path} has other columns than {header}; name another file")
        self._file = path.open("a", newline="", buffering=1)
        self._rows = csv.DictWriter(self._file, self.COLUMNS, lineterminator="\n")
        if path.stat().st_size == 0:
            self._rows.writeheader()

    def on_step(self, task: int, step: int, total: int, loss: float, drift: float) -> None:
        row = {"event": "step", "task": task, "step": step, "total_step": total, "loss": loss}
        self._rows.writerow(row if math.isnan(drift) else {**row, "drift": drift})

    def on_task_end(self, record: TaskRecord, total: int) -> None:
        row = {"event": "task_end", "task": record.index, "step": record.steps, "total_step": total}
        self._rows.writerow({**row, "seconds": record.seconds, "samples": record.samples})

    def on_evaluate(self, trained: int, accuracies: Mapping[int, float], total: int) -> None:
        for task, accuracy in accuracies.items():
            row = {"event": "evaluate", "task": trained, "total_step": total}
            column = "accuracy" if self.measure == "accuracy" else "loss"
            self._rows.writerow({**row, "evaluated": task, column: accuracy})

    def close(self) -> None:
        self._file.close()


class TensorBoardLogger(Logger):
    """TensorBoard event files with ``train/loss``, ``train/drift``, ``task/seconds``, ``accuracy/mean`` and
    ``accuracy/task_NNN``, over the steps of all tasks.

    Args:
        directory: for the event files.
        every: steps between points.

    Raises:
        MissingPackageError: tensorboard is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str], every: int = 10):
        super().__init__(every)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingPackageError("tensorboard is not installed: pip install 'fasthyper[tb]'") from error
        self._writer = SummaryWriter(str(directory))

    def on_step(self, task: int, step: int, total: int, loss: float, drift: float) -> None:
        self._add(_of_step(loss, drift), total)

    def on_task_end(self, record: TaskRecord, total: int) -> None:
        self._add({"task/seconds": record.seconds}, total)
        self._writer.flush()

    def on_evaluate(self, trained: int, accuracies: Mapping[int, float], total: int) -> None:
        self._add(_of_evaluation(accuracies, self.measure), total)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, values: Mapping[str, float], total: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, total)


class WandbLogger(Logger):
    """A run of Weights & Biases with the names of ``TensorBoardLogger``.

    Args:
        project: to log to.
        every: steps between points.
        options: more arguments of ``wandb.init`` (``name``, ``config``, ``mode="offline"``, ``dir``, ...).

    Raises:
        MissingPackageError: wandb is not installed.
    """

    def __init__(self, project: str = "fasthyper", every: int = 10, **options: Any):
        super().__init__(every)
        try:
            import wandb
        except ImportError as error:
            raise MissingPackageError("wandb is not installed: pip install 'fasthyper[wandb]'") from error
        self._run = wandb.init(project=project, **options)

    def on_step(self, task: int, step: int, total: int, loss: float, drift: float) -> None:
        self._run.log(_of_step(loss, drift), step=total)

    def on_task_end(self, record: TaskRecord, total: int) -> None:
        self._run.log({"task/seconds": record.seconds}, step=total)

    def on_evaluate(self, trained: int, accuracies: Mapping[int, float], total: int) -> None:
        self._run.log(_of_evaluation(accuracies, self.measure), step=total)

    def close(self) -> None:
        self._run.finish()


def _of_step(loss: float, drift: float) -> dict[str, float]:
    return {"train/loss": loss} if math.isnan(drift) else {"train/loss": loss, "train/drift": drift}


def _of_evaluation(accuracies: Mapping[int, float], measure: str) -> dict[str, float]:
    each = {f"{measure}/task_{task:03}": accuracy for task, accuracy in accuracies.items()}
    return {f"{measure}/mean": sum(accuracies.values()) / len(accuracies), **each} if each else {}


# where a run's directory keeps its logs, and what writes them there: (that place, name of the run, its settings) -> logger
KINDS: dict[str, tuple[str, Callable[[Path, str, dict[str, Any]], Logger]]] = {
    "csv": ("log.csv", lambda place, name, config: CSVLogger(place)),
    "tensorboard": ("tensorboard", lambda place, name, config: TensorBoardLogger(place)),
    "wandb": ("wandb", lambda place, name, config: WandbLogger(name=name, config=config, dir=str(place.parent))),
}


def open_logger(kind: str, directory: Path, name: str, config: dict[str, Any]) -> Logger:
    """A logger, of a key of ``KINDS``, that writes into the directory of a run.

    Raises:
        MissingPackageError: its package is not installed.
    """
    place, make = KINDS[kind]
    return make(directory / place, name, config)
