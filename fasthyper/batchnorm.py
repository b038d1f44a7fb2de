"""Batch norm in a target: running statistics of each task's own, and a running mean that needs no read from the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class TaskStatistics(nn.Module):
    """Running statistics of all norm layers of a target, for each task one row of numbers and one of counts.

    A task begins with those that the module had. Adding one adds a row and moves none.

    Args:
        buffers: the module's own, under their full names; shape and first value of each task's.
    """

    first_values: Tensor
    first_counts: Tensor

    def __init__(self, buffers: Mapping[str, Tensor]):
        super().__init__()
        values = {name: tensor for name, tensor in buffers.items() if tensor.is_floating_point()}
        counts = {name: tensor for name, tensor in buffers.items() if name not in values}
        self._names, self._shapes = tuple(values), tuple(tensor.shape for tensor in values.values())
        self._sizes = [shape.numel() for shape in self._shapes]
        self._count_names = tuple(counts)
        self.num_tasks = 0
        self.register_buffer("first_values", torch.cat([tensor.detach().flatten() for tensor in values.values()]))
        empty = torch.zeros(0, dtype=torch.int64)
        self.register_buffer("first_counts", torch.stack(list(counts.values())) if counts else empty)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the buffers, as in the module."""
        return self._names + self._count_names

    def add_task(self) -> None:
        """Gives the next task its statistics."""
        self.register_buffer(f"values_{self.num_tasks}", self.first_values.clone())
        self.register_buffer(f"counts_{self.num_tasks}", self.first_counts.clone())
        self.num_tasks += 1

    def rows(self, task: int) -> tuple[Tensor, Tensor]:
        """All numbers and all counts of ``task``; written to as it trains."""
        return self.get_buffer(f"values_{task}"), self.get_buffer(f"counts_{task}")

    @torch.no_grad()
    def reset(self, task: int) -> None:
        """Takes ``task`` back to the statistics that a new task gets."""
        for row, first in zip(self.rows(task), (self.first_values, self.first_counts), strict=True):
            row.copy_(first)

    def of(self, task: int) -> dict[str, Tensor]:
        """The buffers of ``task``, views of its rows."""
        return self._named(*self.rows(task), batch=())

    def stacked(self, tasks: Sequence[int]) -> dict[str, Tensor]:
        """The buffers ``[K, ...]`` of several tasks, copies."""
        values, counts = zip(*(self.rows(task) for task in tasks), strict=True)
        return self._named(torch.stack(values), torch.stack(counts), batch=(len(tasks),))

    def _named(self, values: Tensor, counts: Tensor, batch: tuple[int, ...]) -> dict[str, Tensor]:
        parts = [part.view(batch + shape) for part, shape in zip(values.split(self._sizes, -1), self._shapes, strict=True)]
        return dict(zip(self.names, [*parts, *counts.unbind(-1)], strict=True))


def statistics_names(module: nn.Module) -> list[str]:
    """Full names of the running statistics in a module, of any layer that keeps some."""
    return [
        f"{layer_name}.{name}".removeprefix(".")
        for layer_name, layer in module.named_modules()
        if layer._buffers.get("running_mean") is not None
        for name in STATISTICS
        if layer._buffers.get(name) is not None
    ]


def average_on_device(module: nn.Module) -> None:
    """Makes batch norms that average over all batches (``momentum=None``) do so without reading their count."""
    for layer in module.modules():
        if type(layer) in _AVERAGING and layer.momentum is None:
            layer.__class__ = _AVERAGING[type(layer)]


class _Averaging(nn.modules.batchnorm._BatchNorm):
    """Statistics of batch n move the running ones by 1/n of the way, n a tensor."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return super().forward(input)
        self._check_input_dim(input)
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(input, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        self.num_batches_tracked.add_(1)
        share = self.num_batches_tracked.to(mean.dtype).reciprocal()
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var, share)
        return y


class _Averaging1d(_Averaging, nn.BatchNorm1d):
    pass


class _Averaging2d(_Averaging, nn.BatchNorm2d):
    pass


class _Averaging3d(_Averaging, nn.BatchNorm3d):
    pass


_AVERAGING: dict[type[nn.Module], type[_Averaging]] = {
    nn.BatchNorm1d: _Averaging1d,
    nn.BatchNorm2d: _Averaging2d,
    nn.BatchNorm3d: _Averaging3d,
}
