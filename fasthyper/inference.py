"""Many tasks in one go: accuracies or errors of several, and which task an example is of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fasthyper.hypernet import ChunkedHypernet
from fasthyper.losses import targets_for
from fasthyper.mixed import MOST_WEIGHTS, may_vmap, remember_vmap, run_together
from fasthyper.streams.batches import to_device
from fasthyper.streams.stream import TaskData

BATCH = 2048  # examples of a task that are evaluated at once
MEMORY = 1 << 30  # bytes, about, that the tasks run at once may take

Pair = tuple[int, TaskData]


@torch.no_grad()
def infer_tasks(hnet: ChunkedHypernet, x: Tensor, tasks: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The task of each example: that under whose weights the target is least in doubt.

    ``task_b = argmin_k H_kb``, ``H_kb = -sum_c p_kbc log p_kbc``, ``p_kb = softmax(outputs of task k for example b)``. All
    tasks are run at once, in groups that fit in memory; the target as in evaluation, whatever its mode.

    Args:
        hnet: the hypernetwork.
        x: ``[B, ...]``, on its device.
        tasks: K different ones to choose from; ``None``: all that have an embedding.

    Returns:
        int64 ``[B]``, the tasks; ``[B, C]``, the outputs of each example's task (those of its own head, if it has one);
        ``[K, B]``, all entropies, in nats.

    Raises:
        IndexError: no such task.  ValueError: no tasks.
    """
    tasks = list(range(hnet.num_tasks) if tasks is None else tasks)
    if not tasks:
        raise ValueError("infer_tasks needs at least one task to choose from")
    x, was_training, example = x.to(hnet.basis.dtype), hnet.training, torch.arange(len(x), device=x.device)
    size, outputs, entropies = _tasks_at_once(hnet, x.numel()), [], []
    hnet.eval()
    try:
        for lo in range(0, len(tasks), size):
            y_KBC = _Together(hnet, tasks[lo : lo + size])(x)
            entropies.append(torch.special.entr(y_KBC.softmax(-1)).sum(-1))
            outputs.append(y_KBC[entropies[-1].argmin(0), example])  # of the group's best only
    finally:
        hnet.train(was_training)
    entropy_KB = torch.cat(entropies)
    best = entropy_KB.argmin(0)
    return to_device(torch.tensor(tasks), x.device)[best], torch.stack(outputs)[best // size, example], entropy_KB


@torch.no_grad()
def accuracies_on(hnet: ChunkedHypernet, pairs: Sequence[Pair], among: Sequence[int] | None = None) -> list[float]:
    """Accuracy, a fraction, on the data of each (task, data); the device is read once. Leaves ``hnet`` in evaluation mode.

    ``among``: the task of each example is inferred among these; with heads of the tasks' own it must be right, too.
    """
    hnet.eval()
    if among is None:
        hits = _sums(hnet, pairs, _hits)
    else:
        hits = [_inferred_hits(hnet, task, data.to(hnet.basis.device), among) for task, data in pairs]
    return _means(hits, pairs)


@torch.no_grad()
def errors_on(hnet: ChunkedHypernet, pairs: Sequence[Pair]) -> list[float]:
    """Mean squared error on the data of each (task, data), summed in float64; otherwise as ``accuracies_on``.

    Raises:
        ValueError: there are not as many targets as outputs.
    """
    hnet.eval()
    return _means(_sums(hnet, pairs, _squares), pairs)


def _hits(outputs_KBC: Tensor, labels_KB: Tensor) -> Tensor:
    """How many examples of each task are right, int64 ``[K]``."""
    return (outputs_KBC.argmax(2) == labels_KB).sum(1)


def _squares(outputs_KBO: Tensor, targets_KBO: Tensor) -> Tensor:
    """Squared errors, means over outputs, summed over the examples of each task, float64 ``[K]``."""
    return (outputs_KBO - targets_for(outputs_KBO, targets_KBO)).double().square().flatten(2).mean(2).sum(1)


def _means(sums: Sequence[Tensor], pairs: Sequence[Pair]) -> list[float]:
    numbers = torch.stack(list(sums)).tolist() if sums else []
    return [number / len(data) for number, (_, data) in zip(numbers, pairs, strict=True)]


def _groups(hnet: ChunkedHypernet, pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Neighbours that are run at once: as many examples of as many features, moved to where ``hnet`` is."""
    group: list[Pair] = []
    for task, data in pairs:
        alike = group and group[0][1].shape == data.shape
        if group and not (alike and len(group) < _tasks_at_once(hnet, min(len(data), BATCH) * data.shape[1:].numel())):
            yield group
            group = []
        group.append((task, data.to(hnet.basis.device)))
    if group:
        yield group


def _sums(hnet: ChunkedHypernet, pairs: Sequence[Pair], add: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """``add`` of outputs and labels of each task, ``[]``, summed over batches."""
    sums: list[Tensor] = []
    for group in _groups(hnet, pairs):
        together = _Together(hnet, [task for task, _ in group])
        parts = []
        for indices in torch.arange(len(group[0][1]), device=hnet.basis.device).split(BATCH):
            x, labels = zip(*(data.batch(indices) for _, data in group), strict=True)
            parts.append(add(together([part.to(hnet.basis.dtype) for part in x]), torch.stack(labels)))
        sums += torch.stack(parts).sum(0).unbind()
    return sums


def _inferred_hits(hnet: ChunkedHypernet, task: int, data: TaskData, among: Sequence[int]) -> Tensor:
    hits = torch.zeros((), dtype=torch.int64, device=data.device)
    for indices in torch.arange(len(data), device=data.device).split(BATCH):
        x, labels = data.batch(indices)
        found, outputs, _ = infer_tasks(hnet, x, among)
        right = outputs.argmax(1) == labels
        hits += (right if hnet.target.outputs_per_task is None else right & (found == task)).sum()
    return hits


class _Together:
    """The target under the weights of K tasks: of all at once where it can be, else of one after the other."""

    def __init__(self, hnet: ChunkedHypernet, tasks: Sequence[int]):
        self.target, self.tasks = hnet.target, tasks
        if len(tasks) > 1:
            self.stacked = hnet.generate(tasks)
        else:
            self.stacked = {name: weight[None] for name, weight in hnet.generate(tasks[0]).items()}

    def __call__(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Outputs ``[K, B, C]`` for inputs ``[B, ...]``, the same or each task's own."""
        tried = len(self.tasks) > 1 and may_vmap(self.target)
        if tried:
            args, dims = ((x,), (None,)) if isinstance(x, Tensor) else ((torch.stack(list(x)),), (0,))
            y = run_together(self.target, self.stacked, self.tasks, args, dims)
            if y is not None:
                return self.target.own_outputs(y, self.tasks)
        xs = [x] * len(self.tasks) if isinstance(x, Tensor) else x
        weights = ({name: weight[k] for name, weight in self.stacked.items()} for k in range(len(self.tasks)))
        outputs = torch.stack([self.target(*given) for given in zip(weights, xs, self.tasks, strict=True)])
        if tried:
            remember_vmap(self.target)
        return outputs


def _tasks_at_once(hnet: ChunkedHypernet, numbers: int) -> int:
    """How many tasks with inputs of so many numbers each; one where all weights would be moved for nothing."""
    weights = hnet.target.num_weights
    if not may_vmap(hnet.target) or (hnet.basis.is_cpu and weights > MOST_WEIGHTS):
        return 1
    return max(1, MEMORY // (hnet.basis.element_size() * (3 * weights + 4 * numbers)))  # with copies and activations
