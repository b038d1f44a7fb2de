"""What a task and a stream of tasks are, and how a stream of permuted tasks is made from one data set."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

Device = torch.device | str


class TaskData:
    """Labelled examples that stay on one device, where batches are cut from them.

    Args:
        inputs: ``[n, F...]``, uint8 (0..255, becomes 0..1 in a batch) or floating point.
        labels: ``[n]``, class numbers from 0; kept as int64.
        columns: int64 ``[C]``, numbers of flattened input features; a batch holds these, in this order, as ``[B, C]``.

    Raises:
        TypeError: dtypes other than these.  ValueError: shapes disagree, nothing to learn from, numbers out of range.
    """

    choices: tuple[int, ...] = ()  # what a training step draws for each example, and gives ``batch`` (``Batches``)

    def __init__(self, inputs: Tensor, labels: Tensor, columns: Tensor | None = None):
        _check(inputs, labels)
        self.inputs, self.labels, self.columns = inputs, labels.to(inputs.device, torch.int64), None
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] | None = None  # of inputs and labels, once they are shared
        self._moved: dict[torch.device, TaskData] = {}  # of views of shared data
        if columns is not None:
            self.columns = _checked_columns(columns, inputs)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> torch.Size:
        """Of all inputs, as batches hold them."""
        return self.inputs.shape if self.columns is None else torch.Size([len(self), len(self.columns)])

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    def share(self) -> TaskData:
        """Keeps its copies on other devices, for itself and for what ``with_columns`` makes of it."""
        if self._copies is None:
            self._copies = {self.device: (self.inputs, self.labels)}
            self._moved = {self.device: self}
        return self

    def with_columns(self, columns: Tensor) -> TaskData:
        """The same examples seen through other ``columns``; both share the tensors, and later their copies elsewhere."""
        other = copy.copy(self.share())
        other.columns = _checked_columns(columns, self.inputs)
        other._moved = {self.device: other}
        return other

    def to(self, device: Device) -> TaskData:
        """The same examples on ``device``; ``self`` if they are there already."""
        device = torch.empty(0, device=device).device  # "cuda" means "cuda:0", and tensors say so
        if device == self.device:
            return self
        if device in self._moved:
            return self._moved[device]
        copies = {} if self._copies is None else self._copies
        if device not in copies:
            copies[device] = self.inputs.to(device), self.labels.to(device)
        moved = copy.copy(self)
        moved.inputs, moved.labels = copies[device]
        moved.columns = None if self.columns is None else self.columns.to(device)
        if self._copies is not None:
            self._moved[device] = moved
        return moved

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs, float32 ``[B, F...]`` or ``[B, C]``, and labels, int64 ``[B]``, of the examples ``indices`` (int64)."""
        indices = indices.to(self.device)
        rows = self.inputs.index_select(0, indices)
        if self.columns is not None:
            # rows first, then columns while they are still bytes: a quarter of the time of indexing both at once
            rows = rows.flatten(1).gather(1, self.columns.expand(len(rows), -1))
        x = rows.float()
        return x.div_(255) if rows.dtype == torch.uint8 else x, self.labels.index_select(0, indices)


def _check(inputs: Tensor, labels: Tensor) -> None:
    if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
        raise TypeError(f"inputs must be uint8 or floating point, got {inputs.dtype}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if inputs.ndim < 2 or labels.ndim != 1 or len(inputs) != len(labels):
        raise ValueError(f"inputs must be [n, ...] and labels [n], got {list(inputs.shape)} and {list(labels.shape)}")
    if inputs.numel() == 0:
        raise ValueError(f"inputs of shape {list(inputs.shape)} hold no examples")
    if labels.min() < 0:
        raise ValueError(f"labels must not be negative, got {int(labels.min())}")


def _checked_columns(columns: Tensor, inputs: Tensor) -> Tensor:
    size = inputs[0].numel()
    if columns.dtype != torch.int64 or columns.ndim != 1 or len(columns) == 0:
        raise ValueError(f"columns must be int64 [C] with C >= 1, got {columns.dtype} {list(columns.shape)}")
    if columns.min() < 0 or columns.max() >= size:
        raise ValueError(f"columns must lie in 0..{size - 1}, got {int(columns.min())}..{int(columns.max())}")
    return columns.to(inputs.device)


def as_task_data(data: Any) -> TaskData:
    """``data`` as a ``TaskData``: one already, a pair of tensors (inputs, labels), a ``TensorDataset`` of these, or any
    map-style dataset of pairs (x, y), whose items are read once and stacked.

    Raises:
        TypeError: something else.  ValueError: items of different shapes; and what ``TaskData`` raises.
    """
    if isinstance(data, TaskData):
        return data
    pair = data.tensors if isinstance(data, TensorDataset) else data
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair):
        return TaskData(*pair)
    map_style = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not map_style or isinstance(data, (Tensor, TensorDataset, tuple, dict, str)):
        raise TypeError(f"got {_kind(data)}; {_ACCEPTED}")
    return TaskData(*_stacked(data))


_ACCEPTED = (
    "accepted are a TaskData, a pair of tensors (inputs, labels), a TensorDataset of two tensors, "
    "and a map-style dataset with items (input, label)"
)


def _kind(data: Any) -> str:
    if isinstance(data, (tuple, list)):
        return f"a {type(data).__name__} of {', '.join(type(part).__name__ for part in data[:3]) or 'nothing'}"
    if isinstance(data, TensorDataset):
        return f"a TensorDataset of {len(data.tensors)} tensor(s)"
    return f"a {type(data).__name__}"


def _stacked(dataset: Any) -> tuple[Tensor, Tensor]:
    if len(dataset) == 0:
        raise ValueError(f"{_kind(dataset)} holds no examples")
    inputs, labels = [], []
    for i in range(len(dataset)):
        item = dataset[i]
        try:
            x, y = item
            inputs.append(torch.as_tensor(x))
            labels.append(torch.as_tensor(y))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"item {i} of {_kind(dataset)} is no pair of tensors, arrays or numbers; {_ACCEPTED}") from error
    try:
        return torch.stack(inputs), torch.stack(labels)
    except RuntimeError as error:
        raise ValueError(f"items of {_kind(dataset)} cannot be stacked: {error}") from error


@dataclass(frozen=True)
class Task:
    """One task of a stream: its place there (from 0), what to train on, what to test on, and labels 0..num_classes-1.

    ``validation``: data set apart from those to train on, where the data set has some.
    """

    index: int
    train: TaskData
    test: TaskData
    num_classes: int
    name: str = ""
    validation: TaskData | None = None


class Stream(Sequence[Task]):
    """A sequence of tasks; each is made when it is first asked for, then kept.

    Args:
        name: for messages and records.
        num_tasks: at least 1.
        make_task: makes the task with a given index, 0..num_tasks-1.

    A slice is a stream too. It shares the tasks, which keep their own ``index``.
    """

    def __init__(self, name: str, num_tasks: int, make_task: Callable[[int], Task]):
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
        self.name = name
        self._make_task = make_task
        self._indices = range(num_tasks)
        self._tasks: dict[int, Task] = {}

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, position: int) -> Task: ...
    @overload
    def __getitem__(self, position: slice) -> Stream: ...
    def __getitem__(self, position: int | slice) -> Task | Stream:
        if isinstance(position, slice):
            part = copy.copy(self)
            part._indices = self._indices[position]
            return part
        position = operator.index(position)
        if not -len(self) <= position < len(self):
            raise IndexError(f"task index {position} out of range: the stream {self.name!r} has {len(self)} tasks")
        index = self._indices[position]
        if index not in self._tasks:
            self._tasks[index] = self._make_task(index)
        return self._tasks[index]

    def __iter__(self) -> Iterator[Task]:
        return (self[position] for position in range(len(self)))

    def __repr__(self) -> str:
        return f"Stream({self.name!r}, {len(self)} tasks)"


def permuted_stream(name: str, num_tasks: int, seed: int, train: TaskData, test: TaskData, num_classes: int) -> Stream:
    """Tasks that differ in the order of the input features only; the first has the original order. The data are shared."""

    train.share(), test.share()

    def make_task(index: int) -> Task:
        views = train, test
        if index > 0:
            columns = pixel_permutation(train.inputs[0].numel(), seed, index).to(train.device)
            views = train.with_columns(columns), test.with_columns(columns)
        return Task(index, *views, num_classes, f"{name}/{index}")

    return Stream(name, num_tasks, make_task)


def pixel_permutation(size: int, seed: int, index: int) -> Tensor:
    """The permutation of task ``index``, int64 ``[size]`` on the CPU: a function of its arguments only."""
    # torch keeps 32 bits of a seed; an odd factor spreads seeds far apart, so no two (seed, index) of one study share them
    generator = torch.Generator().manual_seed((seed * 2_654_435_761 + index) % 2**32)
    return torch.randperm(size, generator=generator)
