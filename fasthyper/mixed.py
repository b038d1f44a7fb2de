"""A batch whose examples belong to several tasks: each task's part is run with its weights, many tasks' parts at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fasthyper.target import Target


class MixedBatch:
    """Examples sorted by task, and tasks by their number of examples.

    Tasks with as many examples each run at once by ``torch.func.vmap``, so that nothing is padded and a layer that looks
    across its batch sees one task's examples. A batch of B examples has fewer than sqrt(2 B) such groups.

    Args:
        args: positional inputs; tensors have one row per example, what is no tensor goes to every task.
        task: int64 ``[B]``.

    Raises:
        ValueError: no examples, or tensors of another length.  TypeError: ``task`` is not int64.
    """

    def __init__(self, args: tuple[Any, ...], task: Tensor):
        if task.dtype != torch.int64:
            raise TypeError(f"task must be a number or an int64 tensor [B], got {task.dtype}")
        lengths = {arg.shape[0] if arg.ndim else 0 for arg in args if isinstance(arg, Tensor)}
        if task.ndim != 1 or not len(task) or lengths != {len(task)}:
            shapes = [list(arg.shape) for arg in args if isinstance(arg, Tensor)]
            raise ValueError(f"task must hold one number per example, got {list(task.shape)} for inputs of shape {shapes}")
        numbers, count_of = task.unique(return_counts=True)
        counted = list(zip(count_of.tolist(), numbers.tolist(), strict=True))  # the one read from the device
        self.groups: dict[int, list[int]] = {}  # number of examples -> tasks that have as many
        for count, number in sorted(counted):
            self.groups.setdefault(count, []).append(number)
        count_by_example = count_of[torch.searchsorted(numbers, task)]
        self._order = task.argsort(stable=True)
        self._order = self._order[count_by_example[self._order].argsort(stable=True)]
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        self._order = self._order.to(device)
        self._args = tuple(arg.index_select(0, self._order) if isinstance(arg, Tensor) else arg for arg in args)

    @property
    def tasks(self) -> list[int]:
        return [task for tasks in self.groups.values() for task in tasks]

    def run(
        self,
        target: Target,
        run_one: Callable[[int, tuple[Any, ...]], Any],
        generate: Callable[[Sequence[int]], dict[str, Tensor]] | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Outputs ``[B, ...]``, in the order of the examples.

        Args:
            target: which runs several tasks at once where it can.
            run_one: outputs of one task for its positional inputs.
            generate: stacked weights of several tasks; ``None``: tasks are run one by one.
            options: keyword inputs.

        Raises:
            TypeError: outputs that are no tensor with one row per example.
        """
        sizes = [count * len(tasks) for count, tasks in self.groups.items()]
        outputs = []
        for start, (count, tasks) in zip(accumulate(sizes, initial=0), self.groups.items(), strict=False):
            parts = [_rows(self._args, start + i * count, count) for i in range(len(tasks))]
            found, may_vmap = None, generate is not None and len(tasks) > 1 and _may_vmap(target)
            if generate is not None and may_vmap:
                stacked = _rows(self._args, start, count * len(tasks), (len(tasks), count))
                found = _run_together(target, generate(tasks), tasks, stacked, options)
            if found is None:
                found = [run_one(task, part) for task, part in zip(tasks, parts, strict=True)]
            if may_vmap:  # known once the inputs turned out to be sound
                target.vmaps.setdefault(_mode(target), False)
            for part in found:
                if not isinstance(part, Tensor) or part.ndim < 1 or part.shape[0] != count:
                    raise TypeError("a batch of several tasks needs a target whose output is one tensor, a row per example")
            outputs += found
        y = torch.cat(outputs)
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(len(back), device=back.device)
        return y.index_select(0, back)


def _may_vmap(target: Target) -> bool:
    """Statistics are written where they lie, which a stacked copy of them would miss."""
    return target.vmaps.get(_mode(target), True) and not (target.module.training and target.statistics is not None)


def _mode(target: Target) -> tuple[bool, bool]:
    return target.module.training, torch.is_grad_enabled()


def _run_together(
    target: Target, weights: dict[str, Tensor], tasks: Sequence[int], args: tuple[Any, ...], options: dict[str, Any]
) -> list[Any] | None:
    """Outputs of each task, or ``None`` where ``vmap`` cannot run the target."""
    if target.statistics is not None:
        weights = {**weights, **target.statistics.stacked(tasks)}
    dims = tuple(0 if isinstance(arg, Tensor) else None for arg in args)

    def run(weights: dict[str, Tensor], *args: Any) -> Any:
        return torch.func.functional_call(target.module, weights, args, options)

    together = torch.func.vmap(run, in_dims=(0, *dims), randomness="different")
    if target.vmaps.get(_mode(target)):
        return target.own_outputs(together(weights, *args), tasks)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*batching rule")  # vmap would do those one by one
            outputs = together(weights, *args)
    except Exception:  # of any kind: vmap refuses in many ways, and a fault of the inputs is named by running task by task
        return None
    if not isinstance(outputs, Tensor):
        return None
    target.vmaps[_mode(target)] = True
    return target.own_outputs(outputs, tasks)


def _rows(args: tuple[Any, ...], start: int, count: int, shape: tuple[int, ...] | None = None) -> tuple[Any, ...]:
    """``count`` rows of the tensors among ``args``, as ``shape``."""
    rows = (arg.narrow(0, start, count) if isinstance(arg, Tensor) else arg for arg in args)
    return tuple(arg.unflatten(0, shape) if isinstance(arg, Tensor) and shape else arg for arg in rows)
