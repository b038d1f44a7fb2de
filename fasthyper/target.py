"""Any ``torch.nn.Module`` as a target network: its parameters as slices of one flat vector, its heads, its forward pass."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Container, Mapping
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.layout import Matrix, Range


class Product(Protocol):
    """A weight that need not be made to be used."""

    def weight(self) -> Tensor:
        """The weight itself, ``[O, I]``."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear`` of ``x`` ``[..., I]`` with it."""


class ProductLinear(nn.Linear):
    """An ``nn.Linear`` of a target whose weight is a ``Product`` during a forward pass; read as ``.weight``, it is made."""

    product: Product | None = None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        made = self._parameters["weight"] if self.product is None else self.product.weight()
        assert made is not None
        return made

    def forward(self, x: Tensor) -> Tensor:
        if self.product is None:
            return F.linear(x, self.weight, self.bias)
        return self.product.linear(x, self.bias)


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
        self._starts = tuple(accumulate((shape.numel() for shape in self.shapes), initial=0))
        self.num_weights = self._starts[-1]
        self.outputs_per_task = outputs_per_task
        self.module = _without_storage(module)
        self.heads = self._head_ranges() if outputs_per_task else []
        self._linears: dict[str, ProductLinear] = {}

    def __call__(
        self, weights: dict[str, Tensor], inputs: Tensor, task: int, products: Mapping[str, Product] | None = None
    ) -> Tensor:
        """Outputs ``[B, num_classes]`` of task ``task`` for ``inputs`` ``[B, ...]``, under these weights.

        ``products`` stand in for weights that ``take_products`` prepared for.
        """
        for name, product in (products or {}).items():
            self._linears[name].product = product
        try:
            outputs = torch.func.functional_call(self.module, weights, (inputs,))
        finally:
            for name in products or {}:
                self._linears[name].product = None
        if self.outputs_per_task is None:
            return outputs
        first = task * self.outputs_per_task
        return outputs[:, first : first + self.outputs_per_task]

    def matrices(self) -> list[Matrix]:
        """The weights of linear and convolutional layers, a row per output (or per input, where they are transposed)."""
        layers = (nn.Linear, nn.modules.conv._ConvNd)
        weights = {
            f"{name}.weight".removeprefix(".") for name, layer in self.module.named_modules() if isinstance(layer, layers)
        }
        sizes = zip(self.names, self._starts, self.shapes, strict=False)
        return [Matrix(start, s[0], s[1:].numel()) for name, start, s in sizes if name in weights and s.numel()]

    def parts(self, span: Range) -> list[tuple[str, torch.Size]]:
        """The parameters that a range of the flat vector meets, each with its shape or, of part of it, number of weights."""
        parts = []
        for name, start, shape in zip(self.names, self._starts, self.shapes, strict=False):
            size = min(span[1], start + shape.numel()) - max(span[0], start)
            if size == shape.numel() and span[0] <= start:
                parts.append((name, shape))
            elif size > 0:
                parts.append((name, torch.Size([size])))
        return parts

    def take_products(self, names: Container[str]) -> frozenset[str]:
        """Prepares layers for a ``Product`` in place of their weight, and names the weights, of ``names``, that may be one.

        They are those of plain ``nn.Linear`` layers, shared with no other layer.
        """
        uses = Counter(id(p) for layer in self.module.modules() for p in layer._parameters.values())
        for layer_name, layer in self.module.named_modules():
            name = f"{layer_name}.weight".removeprefix(".")
            if name in names and type(layer) is nn.Linear and uses[id(layer.weight)] == 1:
                layer.__class__ = ProductLinear
                self._linears[name] = layer  # type: ignore[assignment]
        return frozenset(self._linears)

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
