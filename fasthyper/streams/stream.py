"""What a task and a stream of tasks are, and how tasks are made of one data set: other pixels, other labels."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fasthyper.streams.batches import derived_seed

Device = torch.device | str
SCENARIOS = ("task", "domain", "class")
_KEPT = 1000  # tasks that a stream keeps


class TaskData:
    """Labelled examples that stay on one device, where batches are cut from them.

    Args:
        inputs: ``[n, F...]``, uint8 (0..255, becomes 0..1 in a batch) or floating point.
        labels: integer ``[n]``, class numbers from 0, kept as int64; or floating point ``[n, O]``, targets of a regression,
            kept as float32 (``[n]`` means ``[n, 1]``).
        columns: int64 ``[C]``, numbers of flattened input features; a batch holds these, in this order, as ``[B, C]``.
        classes: int64 ``[K]``, what the class numbers 0..K-1 are called here: label y becomes ``classes[y]``.

    Raises:
        TypeError: dtypes other than these.  ValueError: shapes disagree, nothing to learn from, numbers out of range.
    """

    choices: tuple[int, ...] = ()  # what a training step draws for each example, and gives ``batch`` (``Batches``)

    def __init__(self, inputs: Tensor, labels: Tensor, columns: Tensor | None = None, classes: Tensor | None = None):
        _check(inputs, labels)
        numbers = labels.to(inputs.device, torch.float32 if labels.is_floating_point() else torch.int64)
        self.inputs, self._numbers = inputs, numbers[:, None] if labels.is_floating_point() and labels.ndim == 1 else numbers
        self.columns: Tensor | None = None
        self.classes: Tensor | None = None
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] | None = None  # of inputs and numbers, once shared
        self._moved: dict[torch.device, TaskData] = {}  # of views of shared data
        if columns is not None:
            self.columns = _checked_columns(columns, inputs)
        if classes is not None:
            self.classes = _checked_classes(classes, self._numbers)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def labels(self) -> Tensor:
        """As batches hold them: int64 ``[n]``, or float32 targets ``[n, O]``."""
        return self._numbers if self.classes is None else self.classes[self._numbers]

    @property
    def is_regression(self) -> bool:
        """Whether there are targets in the place of class numbers."""
        return self._numbers.is_floating_point()

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
            self._copies = {self.device: (self.inputs, self._numbers)}
            self._moved = {self.device: self}
        return self

    def with_columns(self, columns: Tensor | None, classes: Tensor | None = None) -> TaskData:
        """The same examples with other ``columns`` and ``classes``; both share tensors, and later their copies elsewhere."""
        other = copy.copy(self.share())
        other.columns = None if columns is None else _checked_columns(columns, self.inputs)
        other.classes = None if classes is None else _checked_classes(classes, self._numbers)
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
            copies[device] = self.inputs.to(device), self._numbers.to(device)
        moved = copy.copy(self)
        moved.inputs, moved._numbers = copies[device]
        moved.columns = None if self.columns is None else self.columns.to(device)
        moved.classes = None if self.classes is None else self.classes.to(device)
        if self._copies is not None:
            self._moved[device] = moved
        return moved

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs, float32 ``[B, F...]`` or ``[B, C]``, and labels, int64 ``[B]`` or float32 ``[B, O]``, of the examples
        ``indices`` (int64)."""
        indices = indices.to(self.device)
        rows = self.inputs.index_select(0, indices)
        if self.columns is not None:
            # rows first, then columns while they are still bytes: a quarter of the time of indexing both at once
            rows = rows.flatten(1).gather(1, self.columns.expand(len(rows), -1))
        x, y = rows.float(), self._numbers.index_select(0, indices)
        return x.div_(255) if rows.dtype == torch.uint8 else x, y if self.classes is None else self.classes[y]


def _check(inputs: Tensor, labels: Tensor) -> None:
    if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
        raise TypeError(f"inputs must be uint8 or floating point, got {inputs.dtype}")
    if labels.dtype == torch.bool or labels.is_complex():
        raise TypeError(f"labels must be integers or, as targets, floating point, got {labels.dtype}")
    is_target = labels.is_floating_point()
    if inputs.ndim < 2 or labels.ndim not in ((1, 2) if is_target else (1,)) or len(inputs) != len(labels):
        shapes = f"got {list(inputs.shape)} and {list(labels.shape)}"
        raise ValueError(f"inputs must be [n, ...] and labels [n], or targets [n, O], {shapes}")
    if inputs.numel() == 0 or labels.numel() == 0:
        raise ValueError(f"inputs of shape {list(inputs.shape)}, labels {list(labels.shape)} hold no examples")
    if not is_target and labels.min() < 0:
        raise ValueError(f"labels must not be negative, got {int(labels.min())}")


def _checked_columns(columns: Tensor, inputs: Tensor) -> Tensor:
    size = inputs[0].numel()
    if columns.dtype != torch.int64 or columns.ndim != 1 or len(columns) == 0:
        raise ValueError(f"columns must be int64 [C] with C >= 1, got {columns.dtype} {list(columns.shape)}")
    if columns.min() < 0 or columns.max() >= size:
        raise ValueError(f"columns must lie in 0..{size - 1}, got {int(columns.min())}..{int(columns.max())}")
    return columns.to(inputs.device)


def _checked_classes(classes: Tensor, numbers: Tensor) -> Tensor:
    if numbers.is_floating_point():
        raise ValueError("the targets of a regression have no classes")
    if classes.dtype != torch.int64 or classes.ndim != 1 or len(classes) <= numbers.max() or classes.min() < 0:
        what = f"{classes.dtype} {list(classes.shape)}"
        raise ValueError(
            f"classes must be int64 [K], none negative, K above the largest label {int(numbers.max())}, got {what}"
        )
    return classes.to(numbers.device)


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
    """One task of a stream: its place there (from 0), what to train on, what to test on, and a bound on its labels.

    ``num_classes``: labels lie below it; 0 for a regression.
    ``validation``: data set apart from those to train on, where the data set has some.
    """

    index: int
    train: TaskData
    test: TaskData
    num_classes: int
    name: str = ""
    validation: TaskData | None = None


class Stream(Sequence[Task]):
    """A sequence of tasks; each is made when it is first asked for; the last thousand made are kept.

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
            if len(self._tasks) >= _KEPT:
                del self._tasks[next(iter(self._tasks))]
            self._tasks[index] = self._make_task(index)
        return self._tasks[index]

    def __iter__(self) -> Iterator[Task]:
        return (self[position] for position in range(len(self)))

    def __repr__(self) -> str:
        return f"Stream({self.name!r}, {len(self)} tasks)"


def permuted_stream(
    name: str,
    num_tasks: int,
    seed: int,
    train: TaskData,
    test: TaskData,
    num_classes: int,
    *,
    permutations: Sequence[Any] | None = None,
    permute_labels: bool = False,
    scenario: str = "task",
) -> Stream:
    """Tasks that differ in the order of the input features; the first has the original order. The data are shared.

    Args:
        permutations: the order of each task's features, int64 ``[C]``, looked up when the task is made; ``None``: random.
        permute_labels, scenario: as ``task_classes`` takes them.
    """
    size = train.inputs[0].numel()
    check_scenario(scenario)
    if permutations is not None and len(permutations) != num_tasks:
        raise ValueError(f"permutations must hold one for each of the {num_tasks} tasks, got {len(permutations)}")
    train.share(), test.share()

    def make_task(index: int) -> Task:
        columns, classes = None, task_classes(num_classes, index, seed, permute_labels, scenario)
        if permutations is not None:
            columns = _checked_permutation(permutations[index], size, index).to(train.device)
        elif index > 0:
            columns = pixel_permutation(size, seed, index).to(train.device)
        views = train, test
        if columns is not None or classes is not None:
            views = train.with_columns(columns, classes), test.with_columns(columns, classes)
        bound = num_classes * (index + 1 if scenario == "class" else 1)
        return Task(index, *views, bound, f"{name}/{index}")

    return Stream(name, num_tasks, make_task)


def _checked_permutation(permutation: Any, size: int, index: int) -> Tensor:
    order = torch.as_tensor(permutation)
    if order.dtype != torch.int64 or not torch.equal(order.sort().values.cpu(), torch.arange(size)):
        got = f"{order.dtype} {list(order.shape)}"
        raise ValueError(f"permutations[{index}] must be int64 [{size}], each of 0..{size - 1} once, got {got}")
    return order


def check_scenario(scenario: str) -> None:
    """Raises a ValueError if it is none."""
    if scenario not in SCENARIOS:
        raise ValueError(f"unknown scenario {scenario!r}; choose from {', '.join(SCENARIOS)}")


def task_classes(num_classes: int, index: int, seed: int, permute: bool, scenario: str) -> Tensor | None:
    """What labels 0..C-1 of task t, ``index``, are called there, int64 ``[C]`` on the CPU; ``None``: what they are.

    Args:
        permute: whether they are permuted at random, with ``seed``, in each task but the first.
        scenario: ``"class"`` counts on from task to task, ``t*C .. t*C + C-1``; ``"task"`` and ``"domain"`` do not.
    """
    if index == 0 or not (permute or scenario == "class"):
        return None
    classes = torch.arange(num_classes)
    if permute:
        classes = torch.randperm(num_classes, generator=torch.Generator().manual_seed(derived_seed(seed, index)))
    return classes + (index * num_classes if scenario == "class" else 0)


def pixel_permutation(size: int, seed: int, index: int) -> Tensor:
    """The permutation of task ``index``, int64 ``[size]`` on the CPU: a function of its arguments only."""
    # torch keeps 32 bits of a seed; an odd factor spreads seeds far apart, so no two (seed, index) of one study share them
    generator = torch.Generator().manual_seed((seed * 2_654_435_761 + index) % 2**32)
    return torch.randperm(size, generator=generator)
