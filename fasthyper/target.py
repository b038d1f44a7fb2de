"""Any ``torch.nn.Module`` as a target network: which of it is generated, as slices of one flat vector; its forward pass."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.batchnorm import TaskStatistics, average_on_device, statistics_names
from fasthyper.heads import Heads, Piece
from fasthyper.layout import Matrix, Range
from fasthyper.patterns import choose


class Product(Protocol):
    """A weight that need not be made to be used; ``rest``: its last rows, made already."""

    rest: Tensor | None

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
    """A module some or all of whose parameters are generated; of those it keeps none.

    Args:
        module: any module; it is not changed: a copy in which generated parameters have no storage serves for the forward
            pass.
        outputs_per_task: number of outputs of each task's own head: task t uses outputs ``[t*k, (t+1)*k)`` of the last
            layer. ``None``: all tasks share all outputs.
        generate: which parameters are generated, as ``patterns.choose`` reads it, in the order of ``named_parameters()``.
        rest: ``"frozen"`` or ``"trained"``: what becomes of the other parameters, which all tasks share.
        dtype: of the copy's parameters and floating-point buffers; ``None`` keeps each one's own.

    Raises:
        ValueError: no parameters to generate, or some not yet initialized; patterns that choose none; an output layer whose
            size is not a multiple of ``outputs_per_task``.
    """

    def __init__(
        self,
        module: nn.Module,
        outputs_per_task: int | None = None,
        *,
        generate: str | Sequence[str] = "*",
        rest: str = "frozen",
        dtype: torch.dtype | None = None,
    ):
        named = dict(module.named_parameters())
        if not named:
            raise ValueError(f"the target {type(module).__name__} has no parameters to generate")
        if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in named.values()):
            raise ValueError(f"the target {type(module).__name__} is lazy: call it once, so that its parameters have shapes")
        chosen = choose(module, generate)
        self.shapes_by_name = {name: parameter.shape for name, parameter in named.items() if name in chosen}
        starts = accumulate((shape.numel() for shape in self.shapes_by_name.values()), initial=0)
        self.pieces = [Piece(name, start, s) for (name, s), start in zip(self.shapes_by_name.items(), starts, strict=False)]
        self.outputs_per_task = outputs_per_task
        self._layer_heads: Heads | None = None
        self.heads: list[list[Range]] = []
        if outputs_per_task is not None:
            self._layer_heads = Heads({name: parameter.shape for name, parameter in named.items()}, outputs_per_task)
            self.heads = self._layer_heads.ranges({piece.name: piece for piece in self.pieces})
        self.module = _copy(module, chosen, rest == "trained", dtype)
        own = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        statistics = statistics_names(self.module)
        self.statistics = TaskStatistics({name: own[name] for name in statistics}) if statistics else None
        average_on_device(self.module)
        homes: dict[int, list[tuple[nn.Module, str]]] = {}
        for layer in self.module.modules():
            for key, tensor in (*layer._parameters.items(), *layer._buffers.items()):
                homes.setdefault(id(tensor), []).append((layer, key))
        shared = {name: tensor for name, tensor in own.items() if name not in chosen and name not in statistics}
        self._homes = {f"target/{name.replace('.', '/')}": homes[id(tensor)] for name, tensor in shared.items()}
        self._linears: dict[str, ProductLinear] = {}
        self.vmaps: dict[tuple[bool, bool], bool] = {}  # (training, with gradients) -> whether vmap can run it

    @property
    def names(self) -> tuple[str, ...]:
        """Of the generated parameters."""
        return tuple(self.shapes_by_name)

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of the generated parameters."""
        return tuple(self.shapes_by_name.values())

    @property
    def num_weights(self) -> int:
        """P: generated weights of a task."""
        return self.pieces[-1].stop

    @property
    def mixes_examples(self) -> bool:
        """Whether an example's outputs, in training, or what is kept of them, depend on the rest of the batch."""
        norms = (isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in self.module.modules())
        return self.statistics is not None or any(norms)

    @property
    def num_heads(self) -> int | None:
        """Tasks that have an output head; ``None`` where all share the outputs."""
        return None if self._layer_heads is None else self._layer_heads.count

    def __call__(
        self,
        weights: dict[str, Tensor],
        inputs: Tensor | tuple[Any, ...],
        task: int,
        products: Mapping[str, Product] | None = None,
        *,
        options: dict[str, Any] | None = None,
        first_output: int | None = None,
    ) -> Any:
        """Outputs ``[B, num_classes]`` of task ``task`` for ``inputs``, under these weights; batch norm with its statistics.

        Args:
            weights: the generated parameters.
            inputs: a tensor ``[B, ...]``, or a tuple of all positional arguments.
            task: whose head and statistics are used.
            products: stand in for weights that ``take_products`` prepared for.
            options: keyword arguments of the module's ``forward``.
            first_output: where the task's head begins; ``None``: where it does when all heads are there.
        """
        for name, product in (products or {}).items():
            self._linears[name].product = product
        own = {} if self.statistics is None else self.statistics.of(task)
        weights = {**weights, **own} if own else weights
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        try:
            outputs = torch.func.functional_call(self.module, weights, args, options)
        finally:
            for name in products or {}:
                self._linears[name].product = None
        for name, buffer in own.items():
            if weights[name] is not buffer:  # the layer put another in its place, which functional_call hands back
                buffer.copy_(weights[name].detach())
        if self.outputs_per_task is None:
            return outputs
        first = task * self.outputs_per_task if first_output is None else first_output
        return outputs[:, first : first + self.outputs_per_task]

    def own_outputs(self, outputs: Tensor, tasks: Sequence[int]) -> Tensor:
        """Of outputs ``[K, B, ...]`` of K tasks, made with all heads, each task's own."""
        if self.outputs_per_task is None:
            return outputs
        own = torch.tensor(tasks, device=outputs.device)
        return outputs.unflatten(2, (-1, self.outputs_per_task))[torch.arange(len(own), device=own.device), :, own]

    def with_own_head_first(self, weights: dict[str, Tensor], task: int) -> dict[str, Tensor]:
        """A task's weights, made with all heads, its own head in the place of the first one."""
        if self._layer_heads is None:
            return weights
        own = slice(task * self._layer_heads.per_task, (task + 1) * self._layer_heads.per_task)
        moved = {
            name: torch.cat([weights[name][own], weights[name][own.stop - own.start :]]) for name in self._layer_heads.layer
        }
        return {**weights, **moved}

    def own_labels(self, labels: Tensor, task: int) -> Tensor:
        """Class numbers ``[...]`` as the task's own head of C outputs counts them, from 0.

        Those of class-incremental data, ``task * C + c``, become c; those that count from 0 stay, as all do without heads,
        and as targets of a regression do.
        """
        first = task * (self.outputs_per_task or 0)
        return torch.where(labels >= first, labels - first, labels) if first and not labels.is_floating_point() else labels

    def matrices(self) -> list[Matrix]:
        """The weights of linear and convolutional layers, a row per output (or per input, where they are transposed)."""
        layers = (nn.Linear, nn.modules.conv._ConvNd)
        weights = {
            f"{name}.weight".removeprefix(".") for name, layer in self.module.named_modules() if isinstance(layer, layers)
        }
        return [Matrix(start, s[0], s[1:].numel()) for name, start, s in self.pieces if name in weights and s.numel()]

    def parts(self, span: Range) -> list[tuple[str, torch.Size]]:
        """The parameters that a range of the flat vector meets, each with its shape or, of part of it, number of weights."""
        parts = []
        for name, start, shape in self.pieces:
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
        """Names and shapes of the generated parameters, JSON-ready."""
        return {name: list(shape) for name, shape in self.shapes_by_name.items()}

    @property
    def generates_heads(self) -> bool:
        """Whether tasks have heads, and all of the last layer is generated."""
        return self._layer_heads is not None and set(self._layer_heads.layer) <= set(self.shapes_by_name)

    def add_head(self) -> int:
        """One output head more, its weights at the end of the flat vector; returns how many they are."""
        assert self._layer_heads is not None
        start = self.num_weights
        for piece in self._layer_heads.grow(start):
            self.pieces.append(piece)
            rows, *others = self.shapes_by_name[piece.name]
            self.shapes_by_name[piece.name] = torch.Size([rows + piece.shape[0], *others])
        self.heads.append([(start, self.num_weights)])
        return self.num_weights - start

    def shared(self) -> dict[str, Tensor]:
        """What all tasks share: parameters that are not generated, and buffers that are not a task's own.

        They go by names without dots, ``target/layer4/bias``, as any module may register them.
        """
        return {name: getattr(layer, key) for name, ((layer, key), *_) in self._homes.items()}

    def is_persistent(self, shared_buffer: str) -> bool:
        """Whether a buffer belongs in a ``state_dict``."""
        return all(key not in layer._non_persistent_buffers_set for layer, key in self._homes[shared_buffer])

    def place_shared(self, name: str, tensor: Tensor) -> None:
        """Puts another tensor in the place of a shared one."""
        for layer, key in self._homes[name]:
            setattr(layer, key, tensor)

    def train(self, mode: bool = True) -> None:
        """Dropout and the like on or off, as in ``nn.Module.train``."""
        self.module.train(mode)

    def state_dict(self, weights: Mapping[str, Tensor], task: int) -> dict[str, Tensor]:
        """Copies of all that the module of its own class loads to be the target of ``task``, under these weights."""
        own = {**weights, **(self.statistics.of(task) if self.statistics is not None else {})}
        named = chain(self.module.named_parameters(), self.module.named_buffers())
        made = {id(tensor): own[name] for name, tensor in named if name in own}
        tensors = self.module.state_dict(keep_vars=True)  # a shared parameter by every name
        return {name: made.get(id(tensor), tensor).detach().clone() for name, tensor in tensors.items()}


def _copy(module: nn.Module, generated: Container[str], trained: bool, dtype: torch.dtype | None) -> nn.Module:
    """A copy whose generated parameters hold no memory."""
    memo: dict[int, object] = {}
    for name, parameter in module.named_parameters():
        values = parameter.detach()
        kept = values.to("meta") if name in generated else values.to(dtype or values.dtype, copy=True)
        memo[id(parameter)] = nn.Parameter(kept, requires_grad=trained and parameter.requires_grad and name not in generated)
    for buffer in module.buffers():
        to = dtype if buffer.is_floating_point() and dtype is not None else buffer.dtype
        memo[id(buffer)] = buffer.detach().to(to, copy=True)
    return copy.deepcopy(module, memo)
