"""Streams out of data that other libraries hold, by what their objects look like; none of these libraries is imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fasthyper.streams.images import ImageData
from fasthyper.streams.stream import Stream, Task, TaskData, as_task_data


def from_datasets(pairs: Sequence[tuple[Any, Any]], *, name: str = "datasets", relabel: bool = False) -> Stream:
    """A task for each pair (data to train on, data to test on).

    Args:
        pairs: of data as ``Trainer.fit`` takes them: a pair of tensors, a ``TensorDataset``, a map-style dataset. An item of
            a dataset may hold more than input and label; the rest is not used.
        name: of the stream.
        relabel: give each task's classes, in ascending order, the labels 0, 1, ... of its own, as separate heads need.

    A dataset is read item by item when its task is first asked for, and kept: a random transform is drawn once.

    Raises:
        ValueError: no pairs; and what ``as_task_data`` raises, when a task is made.
    """
    return _stream(name, len(pairs), lambda index: pairs[index], relabel)


def from_avalanche(
    benchmark: Any, *, train: str = "train_stream", test: str = "test_stream", relabel: bool = False
) -> Stream:
    """A task for each experience of an Avalanche benchmark.

    Args:
        benchmark: with streams of experiences, each of which has a ``dataset`` with items (input, label, ...).
        train, test: names of the streams to train and to test on, of the same length.
        relabel: as for ``from_datasets``; a benchmark made with ``class_ids_from_zero_in_each_exp=True`` needs it not.

    Data to train on come with the training transforms, data to test on with those of evaluation; see ``from_datasets``.

    Raises:
        ValueError: the streams have different lengths.
    """
    trains, tests = getattr(benchmark, train), getattr(benchmark, test)
    _same_length(f"{train} and {test}", trains, tests)

    def pair(index: int) -> tuple[Any, Any]:
        parts = trains[index].dataset, tests[index].dataset
        return getattr(parts[0], "train", lambda: parts[0])(), getattr(parts[1], "eval", lambda: parts[1])()

    return _stream(getattr(benchmark, "name", "avalanche"), len(trains), pair, relabel)


def from_continuum(train: Any, test: Any, *, relabel: bool = False) -> Stream:
    """A task for each task set of a pair of Continuum scenarios, one of the training and one of the test data.

    Args:
        train, test: scenarios of the same length: ``scenario[t]`` is a map-style dataset with items (input, label, task).
        relabel: as for ``from_datasets``.

    Raises:
        ValueError: the scenarios have different lengths.
    """
    _same_length("the scenarios", train, test)
    return _stream("continuum", len(train), lambda index: (train[index], test[index]), relabel)


def read(dataset: Any) -> TaskData:
    """What ``as_task_data`` takes, or a map-style dataset whose items begin with (input, label); read once.

    Raises:
        As ``as_task_data`` does.
    """
    plain = isinstance(dataset, (TaskData, Tensor, TensorDataset, tuple, list, dict, str))
    return as_task_data(dataset if plain or not hasattr(dataset, "__getitem__") else _Pairs(dataset))


class _Pairs:
    """The first two parts of each item."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x, y, *_ = self.dataset[index]
        return x, y


def _stream(name: str, num_tasks: int, pair: Callable[[int], tuple[Any, Any]], relabel: bool) -> Stream:
    def make_task(index: int) -> Task:
        train, test = (read(part) for part in pair(index))
        if relabel:
            train, test = _relabelled(train, test)
        num_classes = 0 if train.is_regression else 1 + int(max(train.labels.max(), test.labels.max()))
        return Task(index, train, test, num_classes, f"{name}/{index}")

    return Stream(name, num_tasks, make_task)


def _relabelled(*parts: TaskData) -> list[TaskData]:
    if any(part.is_regression for part in parts):
        raise ValueError("relabel=True needs class numbers, the labels are floating-point targets")
    classes: Tensor = torch.cat([part.labels for part in parts]).unique()  # ascending
    labels = [torch.searchsorted(classes, part.labels) for part in parts]
    return [
        part.view(torch.arange(len(part)), own) if isinstance(part, ImageData) else TaskData(part.inputs, own, part.columns)
        for part, own in zip(parts, labels, strict=True)
    ]


def _same_length(what: str, train: Any, test: Any) -> None:
    if len(train) != len(test):
        raise ValueError(f"{what} must have the same length, got {len(train)} and {len(test)}")
