"""A batch whose examples belong to several tasks: each task's part is run with its weights, many tasks' parts at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper import nets
from fasthyper.target import ProductLinear, Target

MOST_WEIGHTS = 1 << 16  # of a target, up to which the overhead of a call per task outweighs moving all weights once more


class MixedBatch:
    """The examples of each task, and which tasks are run at once, by ``torch.func.vmap``.

    They are tasks of as many examples each, so that a layer that looks across its batch sees one task's examples; a batch of
    B has fewer than sqrt(2 B) such groups. Where all layers go by example, parts of different sizes are filled up instead,
    with examples that are dropped again, at most as many as there are.

    Args:
        args: positional inputs; tensors have one row per example, what is no tensor goes to every task.
        task: int64 ``[B]``.

    Raises:
        ValueError: no examples, or tensors of another length.  TypeError: ``task`` is not int64.
    """

    def __init__(self, args: tuple[Any, ...], task: Tensor):
        if task.dtype != torch.int64:
            raise TypeError(f"task must be a number or an int64 tensor [B], got {task.dtype}")
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if task.ndim != 1 or not len(task) or not tensors or any(arg.shape[:1] != task.shape for arg in tensors):
            shapes = [list(arg.shape) for arg in tensors]
            raise ValueError(f"task must hold one number per example, got {list(task.shape)} for inputs of shape {shapes}")
        numbers, counts = task.unique(return_counts=True)
        self.tasks, self.counts = torch.stack([numbers, counts]).tolist()  # the one read from the device
        self._starts = list(accumulate(self.counts, initial=0))
        self._args, self._order = args, task.argsort(stable=True).to(tensors[0].device)

    def groups(self, fill: bool) -> list[list[int]]:
        """Positions in ``tasks`` of those that are run at once, the larger parts first."""
        groups: list[list[int]] = []
        largest = real = 0  # examples of the last group's largest part, and of all its parts
        for i in sorted(range(len(self.tasks)), key=lambda i: -self.counts[i]):
            count = self.counts[i]
            if count == largest or (fill and groups and (len(groups[-1]) + 1) * largest <= 2 * (real + count)):
                groups[-1].append(i)
            else:
                groups.append([i])
                largest = real = 0
            largest, real = max(largest, count), real + count
        return groups

    def run(
        self,
        target: Target,
        run_one: Callable[[int, tuple[Any, ...]], Any],
        generate: Callable[[list[int]], dict[str, Tensor]],
        options: dict[str, Any],
    ) -> Tensor:
        """Outputs ``[B, ...]``, in the order of the examples.

        Args:
            target: which runs several tasks at once where it can.
            run_one: outputs of the task at a position in ``tasks``, for its positional inputs.
            generate: stacked weights of the tasks at these positions.
            options: keyword inputs.

        Raises:
            TypeError: outputs that are no tensor with one row per example.
        """
        found, rows = [], []
        for group in self.groups(fill=goes_by_example(target.module)):
            y, tried = None, len(group) > 1 and target.num_weights <= MOST_WEIGHTS and may_vmap(target)
            if tried:
                y = self._run_together(target, generate(group), group, options)
            if y is None:
                y = torch.cat([self._checked(run_one(i, self._part(i)), self.counts[i]) for i in group])
            if tried:
                remember_vmap(target)
            found.append(y)
            rows += [self._rows(i) for i in group]
        order = torch.cat(rows)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return torch.cat(found).index_select(0, back)

    def _rows(self, i: int) -> Tensor:
        """Which examples are of the task at position ``i``."""
        return self._order[self._starts[i] : self._starts[i + 1]]

    def _part(self, i: int) -> tuple[Any, ...]:
        rows = self._rows(i)
        return tuple(arg.index_select(0, rows) if isinstance(arg, Tensor) else arg for arg in self._args)

    def _run_together(
        self, target: Target, weights: dict[str, Tensor], group: list[int], options: dict[str, Any]
    ) -> Tensor | None:
        """Outputs of a group one after the other, or ``None`` where ``vmap`` cannot run the target."""
        tasks, counts = [self.tasks[i] for i in group], torch.tensor([self.counts[i] for i in group])
        place = torch.arange(int(counts[0]))  # the last example of a smaller part stands in for those that it lacks
        starts = torch.tensor([self._starts[i] for i in group])
        index = (starts[:, None] + place.minimum(counts[:, None] - 1)).to(self._order.device)
        args = tuple(arg[self._order[index]] if isinstance(arg, Tensor) else arg for arg in self._args)
        dims = tuple(0 if isinstance(arg, Tensor) else None for arg in args)
        y = run_together(target, weights, tasks, args, dims, options)
        if y is None:
            return None
        y = target.own_outputs(self._checked(y, len(group), len(place)), tasks).flatten(0, 1)
        return y[(place < counts[:, None]).flatten().to(y.device)] if min(counts) < len(place) else y

    @staticmethod
    def _checked(y: Any, *shape: int) -> Tensor:
        if not isinstance(y, Tensor) or y.shape[: len(shape)] != shape:
            raise TypeError("a batch of several tasks needs a target whose output is one tensor, a row per example")
        return y


def run_together(
    target: Target,
    weights: dict[str, Tensor],
    tasks: Sequence[int],
    args: tuple[Any, ...],
    dims: tuple[int | None, ...],
    options: dict[str, Any] | None = None,
) -> Tensor | None:
    """Outputs ``[K, ...]`` of K tasks, made with all heads, or ``None`` where ``vmap`` cannot run the target.

    Args:
        weights: of the tasks, stacked.
        args: positional inputs; those whose ``dims`` is 0 hold one for each task, others go to every task.
        options: keyword inputs.
    """
    if target.statistics is not None:
        weights = {**weights, **target.statistics.stacked(tasks)}
    shared = {name: buffer for name, buffer in target.module.named_buffers() if name not in weights}

    def run(weights: dict[str, Tensor], *args: Any) -> Any:
        given = {**shared, **weights}
        y = torch.func.functional_call(target.module, given, args, options)
        if any(given[name] is not buffer for name, buffer in shared.items()):
            raise RuntimeError("a buffer that all tasks share was replaced: it would hold what vmap made")
        return y

    together = torch.func.vmap(run, in_dims=(0, *dims), randomness="different")
    if target.vmaps.get(_mode(target)):
        return together(weights, *args)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*batching rule")  # vmap would do those one by one
            y = together(weights, *args)
    except Exception:  # vmap refuses in many ways; what is wrong with the inputs is said when each task is run alone
        return None
    if not isinstance(y, Tensor):
        return None
    target.vmaps[_mode(target)] = True
    return y


def goes_by_example(module: nn.Module) -> bool:
    """Whether a module is known to treat each example of a batch by itself, and a few more cost it next to nothing."""
    return not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules()) and all(
        type(layer) in _BY_EXAMPLE
        or (type(layer) is nn.BatchNorm1d and not layer.training and layer.running_mean is not None)
        or (type(layer) is nn.Flatten and layer.start_dim > 0)
        for layer in module.modules()
    )


_BY_EXAMPLE = {
    *(nn.Sequential, nn.ModuleList, nn.Identity, nets.MLP, nn.Linear, ProductLinear, nn.LayerNorm, nn.Dropout),
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus),
}


def may_vmap(target: Target) -> bool:
    """Not where it was found that it cannot, nor where statistics are written to: a stacked copy of them would be."""
    writes = target.module.training and target.statistics is not None
    return not writes and target.vmaps.get(_mode(target), True)


def remember_vmap(target: Target) -> None:
    """That ``vmap`` cannot run it, if it has not: known once each task was run alone, so that inputs are sound."""
    target.vmaps.setdefault(_mode(target), False)


def _mode(target: Target) -> tuple[bool, bool]:
    return target.module.training, torch.is_grad_enabled()
