"""The chunked hypernetwork: task and chunk embeddings, trunk, basis; from a task's embedding to a target's weights."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper import ops
from fasthyper.activations import ACTIVATIONS
from fasthyper.init import INITS, hyperfan_, xavier
from fasthyper.layout import Block, Layout
from fasthyper.planner import factorises
from fasthyper.streams.batches import derived_seed
from fasthyper.target import Target
from fasthyper.trunk import run_trunk


class ChunkedHypernet(nn.Module):
    """Makes all P weights of ``target`` for a task, N chunks of S weights at a time (DESIGN E3).

    Chunk n of task t is ``basis @ [trunk([e_t, z_n]) | 1]``: a small MLP shared by all chunks, then one linear basis.

    Args:
        target: the network whose weights are generated; any module whose parameters may all be generated.
        num_tasks: tasks to begin with; ``add_task`` makes more.
        chunk_size: S; ``None`` makes all weights at once (the full hypernetwork, N = 1, no chunk embedding).
        hidden: widths of the trunk's layers; empty for a linear hypernetwork. H is the last one, or E + Z.
        task_dim: E.  chunk_dim: Z, ignored when ``chunk_size`` is ``None``.
        activation: after each trunk layer; a key of ``activations.ACTIVATIONS``.
        outputs_per_task: size of each task's own output head, a slice of the target's last layer; ``None``: shared outputs.
        layout: how weights are laid over the chunks. ``"flat"``: end to end. ``"aligned"``: chunks hold whole rows of the
            weights of linear and convolutional layers, and linear layers run without their weight ever being stored, with
            fewer multiply-adds where H and the chunks of a layer are many. S is then at most ``chunk_size``, or the longest
            row where one is longer, and N about as many as when laid flat. The target's ``forward`` may read such a layer's
            ``weight``, which makes it; going through ``parameters()`` there raises.
        init: how trunk and basis begin. ``"xavier"``: as in the papers' experiments. ``"hyperfan"``: so that the target's
            weights have the variances that keep the second moment of what passes through its layers, taken to be followed
            by ReLU; ``"hyperfan-out"``: that of gradients; ``"hyperfan-harmonic"``: the harmonic mean of both (DESIGN E6).
        embedding_std: of the normal distribution of task and chunk embeddings; with hyperfan, of the chunk embeddings whose
            weights are the smallest.
        seed: of the initial weights and of every task embedding, also of tasks added later; the global generator is not
            touched.
        dtype: ``torch.float32`` or ``torch.float64``.

    Raises:
        ValueError: a size below 1, an unknown activation, layout or init, or a target that cannot be generated.
    """

    def __init__(
        self,
        target: nn.Module,
        num_tasks: int,
        *,
        chunk_size: int | None,
        hidden: Sequence[int] = (),
        task_dim: int = 32,
        chunk_dim: int = 32,
        activation: str = "relu",
        outputs_per_task: int | None = None,
        layout: str = "flat",
        init: str = "xavier",
        embedding_std: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
        if layout not in ("flat", "aligned"):
            raise ValueError(f"unknown layout {layout!r}; choose from flat, aligned")
        if init not in INITS or embedding_std <= 0:
            raise ValueError(f"init must be one of {', '.join(INITS)} and embedding_std positive, got {init!r}")
        if min([task_dim, *hidden, *([] if chunk_size is None else [chunk_size, chunk_dim])]) < 1 or num_tasks < 0:
            raise ValueError("chunk_size, hidden, task_dim and chunk_dim must be at least 1, num_tasks at least 0")
        self.target = Target(target, outputs_per_task)
        matrices = self.target.matrices() if layout == "aligned" else []
        self.layout = Layout(self.target.num_weights, chunk_size or self.target.num_weights, self.target.heads, matrices)
        self._parts = [[p for span in b.ranges for p in self.target.parts(span)] for b in self.layout.blocks]
        in_rows = {parts[0][0] for b, parts in zip(self.layout.blocks, self._parts, strict=True) if b.rows}
        self._fused = self.target.take_products(in_rows)
        self.config: dict[str, Any] = {
            "chunk_size": chunk_size,
            "hidden": list(hidden),
            "task_dim": task_dim,
            "chunk_dim": chunk_dim,
            "activation": activation,
            "outputs_per_task": outputs_per_task,
            "layout": layout,
            "init": init,
            "embedding_std": embedding_std,
            "seed": seed,
            "dtype": str(dtype).removeprefix("torch."),
        }
        self.seed, self.task_dim, self.embedding_std = seed, task_dim, embedding_std
        self.activation = ACTIVATIONS[activation]

        generator = torch.Generator().manual_seed(seed)
        chunk_dim = chunk_dim if chunk_size is not None else 0
        widths = (task_dim + chunk_dim, *hidden)
        self.chunk_embeddings = nn.Parameter(
            embedding_std * torch.randn(self.layout.num_chunks, chunk_dim, generator=generator, dtype=dtype)
        )
        self.trunk_weights = nn.ParameterList(xavier(o, i, generator, dtype) for i, o in pairwise(widths))
        self.trunk_biases = nn.ParameterList(torch.zeros(o, dtype=dtype) for o in widths[1:])
        basis = xavier(self.layout.chunk_size, widths[-1], generator, dtype)
        self.basis = nn.Parameter(torch.cat([basis, basis.new_zeros(len(basis), 1)], 1))  # last column: the bias
        if init != "xavier":
            shapes = dict(zip(self.target.names, self.target.shapes, strict=True))
            module, settings = self.target.module, (self.activation, embedding_std, generator)
            hyperfan_(init, self.theta, self.layout, module, shapes, *settings)
        self.task_embeddings = nn.ParameterList()
        for _ in range(num_tasks):
            self.add_task()

    @property
    def num_tasks(self) -> int:
        """Tasks that have an embedding."""
        return len(self.task_embeddings)

    @property
    def width(self) -> int:
        """H: features per chunk."""
        return self.basis.shape[1] - 1

    @property
    def theta(self) -> list[nn.Parameter]:
        """What all tasks share: chunk embeddings, trunk weights and biases layer by layer, basis."""
        layers = zip(self.trunk_weights, self.trunk_biases, strict=True)
        return [self.chunk_embeddings, *(parameter for layer in layers for parameter in layer), self.basis]

    def add_task(self) -> int:
        """Gives a new task its embedding and returns its index. Which one depends on ``seed`` and the index alone.

        Raises:
            ValueError: the target has no output head left for it.
        """
        index = self.num_tasks
        if self.target.heads and index >= len(self.target.heads):
            raise ValueError(f"the target has {len(self.target.heads)} output heads, no room for task {index}")
        generator = torch.Generator().manual_seed(derived_seed(self.seed, index))
        embedding = self.embedding_std * torch.randn(self.task_dim, generator=generator, dtype=self.basis.dtype)
        self.task_embeddings.append(nn.Parameter(embedding.to(self.basis.device)))
        return index

    def features(self, embeddings: Tensor, theta: Sequence[Tensor] | None = None) -> Tensor:
        """Trunk features ``[T, N, H]`` of all chunks for task embeddings ``[T, E]``.

        ``theta`` stands in for ``self.theta``, in the same order.
        """
        return run_trunk(self.theta if theta is None else theta, embeddings, self.activation).features

    def generate(self, task: int) -> dict[str, Tensor]:
        """The target's weights for ``task``, named and shaped as in its ``state_dict()``: views of one buffer.

        Raises:
            IndexError: no such task.
        """
        return self._weights(task)[0]

    def embedding(self, task: int) -> nn.Parameter:
        """Task embedding ``[E]``.

        Raises:
            IndexError: no such task.
        """
        if not 0 <= task < self.num_tasks:
            raise IndexError(
                f"task index {task} out of range: the hypernetwork has {self.num_tasks} tasks; add_task() makes more"
            )
        return self.task_embeddings[task]

    def forward(self, inputs: Tensor, task: int) -> Tensor:
        """The target's outputs ``[B, num_classes]`` for ``inputs`` ``[B, ...]``, with the weights of ``task``."""
        weights, products = self._weights(task, self._fused)
        return self.target(weights, inputs, task, products)

    def _weights(self, task: int, fused: Container[str] = ()) -> tuple[dict[str, Tensor], dict[str, _Rows]]:
        """The target's weights, and in their place products for those in ``fused``."""
        h = self.features(self.embedding(task)[None])[0]
        found: dict[str, list[Tensor]] = {name: [] for name in self.target.names}
        products, made = {}, []
        for block, parts in zip(self.layout.blocks, self._parts, strict=True):
            if block.rows and parts[0][0] in fused:
                products[parts[0][0]] = _Rows(h[block.chunk_lo : block.chunk_hi], self.basis, block)
            else:
                made.append((block, parts))
        blocks = [((b.chunk_lo, b.chunk_hi), (b.col_lo, b.col_lo + b.size), [s for _, s in parts]) for b, parts in made]
        names = [name for _, parts in made for name, _ in parts]
        for name, weight in zip(names, ops.generate_blocks(h, self.basis, blocks) if blocks else (), strict=True):
            found[name].append(weight)
        weights = {}
        for name, shape in zip(self.target.names, self.target.shapes, strict=True):
            if name in products:
                products[name].rest = _join(found[name], (-1, shape[1])) if found[name] else None
            else:
                weights[name] = _join(found[name], shape)
        return weights, products

    def train(self, mode: bool = True) -> ChunkedHypernet:
        self.target.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ChunkedHypernet:
        super()._apply(fn, recurse)
        self.target.convert_buffers(fn)
        return self


class _Rows:
    """A linear layer's weight, never stored: rows that the chunks of a block generate, and ``rest``, rows laid elsewhere."""

    def __init__(self, h: Tensor, basis: Tensor, block: Block):
        self.h, self.basis, self.rows = h, basis, block.rows
        self.shape = torch.Size([len(h) * block.rows, block.size // block.rows])
        self.rest: Tensor | None = None

    def weight(self) -> Tensor:
        (weight,) = ops.generate(self.h, self.basis[: self.rows * self.shape[1]], [self.shape])
        return weight if self.rest is None else torch.cat([weight, self.rest])

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        num_outputs, num_inputs = self.shape
        if x.shape[-1:] != (num_inputs,):
            raise ValueError(f"a linear layer of the target takes inputs of shape [..., {num_inputs}], got {list(x.shape)}")
        flat, with_grad = x.reshape(-1, num_inputs), torch.is_grad_enabled() and self.h.requires_grad
        (chunks, width), with_grad_x = self.h.shape, with_grad and x.requires_grad
        factorised = factorises(len(flat), num_inputs, self.rows, chunks, width, with_grad, with_grad_x)
        y = ops.hyper_linear(flat, self.h, self.basis, rows=self.rows, num_outputs=num_outputs, factorised=factorised)
        y = y if self.rest is None else torch.cat([y, F.linear(flat, self.rest)], 1)
        y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], y.shape[1])


def _join(parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    if len(parts) == 1:
        return parts[0].view(shape)
    return torch.cat([part.flatten() for part in parts]).view(shape)
