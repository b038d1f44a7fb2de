"""Any ``torch.nn.Module`` as a target network: its parameters as slices of one flat vector, its heads, its forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fasthyper.layout import Range


class Target:
    """A module whose parameters are generated; it keeps none of its own.

    Args:
        module: any module; all its parameters are generated, in the order of ``named_parameters()``. The module is not
            changed: a copy without storage serves for the forward pass.
        outputs_per_task: number of outputs of each task's own head: task t uses outputs ``[t*k, (t+1)*k)`` of the last
            layer. ``None``: all tasks share all outputs.

    Raises:
        ValueError: no parameters; running batch-norm statistics (one set cannot serve several tasks); an output layer
            whose size is not a multiple of ``outputs_per_task``.
    """

    def __init__(self, module: nn.Module, outputs_per_task: int | None = None):
        named = dict(module.named_parameters())
        if not named:
            raise ValueError(f"the target {type(module).__name__} has no parameters to generate")
        for name, layer in module.named_modules():
            if getattr(layer, "running_mean", None) is not None:
                raise ValueError(
                    f"target layer {name!r} keeps running batch-norm statistics, which would be shared by all tasks; "
                    "build it with track_running_stats=False"
                )
        self.names = tuple(named)
        self.shapes = tuple(parameter.shape for parameter in named.values())
        self.num_weights = sum(shape.numel() for shape in self.shapes)
        self.outputs_per_task = outputs_per_task
        self.module = _without_storage(module)
        self.heads = self._head_ranges() if outputs_per_task else []

    def __call__(self, weights: dict[str, Tensor], inputs: Tensor, task: int) -> Tensor:
        """Outputs ``[B, num_classes]`` of task ``task`` for ``inputs`` ``[B, ...]``, under these weights."""
        outputs = torch.func.functional_call(self.module, weights, (inputs,))
        if self.outputs_per_task is None:
            return outputs
        first = task * self.outputs_per_task
        return outputs[:, first : first + self.outputs_per_task]

    def named_shapes(self) -> dict[str, list[int]]:
        """Parameter names and shapes, JSON-ready."""
        return {name: list(shape) for name, shape in zip(self.names, self.shapes, strict=True)}

    def train(self, mode: bool = True) -> None:
        """Dropout and the like on or off, as in ``nn.Module.train``."""
        self.module.train(mode)

    def convert_buffers(self, convert: Callable[[Tensor], Tensor]) -> None:
        """What ``nn.Module`` does to buffers when it is moved or cast."""
        for owner in self.module.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                setattr(owner, name, convert(buffer))

    def _head_ranges(self) -> list[list[Range]]:
        """Per task, where the rows of its own head lie; the last layer is the last weight and, if it has one, its bias."""
        per_task, stop, head = self.outputs_per_task or 0, self.num_weights, []
        for shape in reversed(self.shapes):
            head.append((stop - shape.numel(), stop, shape))
            stop -= shape.numel()
            if len(shape) > 1:
                break
        num_outputs = head[-1][2][0]
        if per_task < 1 or num_outputs % per_task or any(shape[0] != num_outputs for _, _, shape in head):
            raise ValueError(f"outputs_per_task={per_task} does not divide the {num_outputs} outputs of the last layer")
        ranges = []
        for task in range(num_outputs // per_task):
            rows = [(start, shape.numel() // num_outputs) for start, _, shape in head]  # where rows begin, and their size
            ranges.append([(start + task * per_task * row, start + (task + 1) * per_task * row) for start, row in rows])
        return ranges


def _without_storage(module: nn.Module) -> nn.Module:
    """A copy whose parameters hold no memory; buffers are kept, copied."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False) for parameter in module.parameters()
    }
    return copy.deepcopy(module, memo)
