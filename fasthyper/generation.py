"""From features to a target's weights (DESIGN E3): one task's as views, copies or products, several tasks' stacked."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper import ops
from fasthyper.layout import Block, Layout
from fasthyper.planner import factorises
from fasthyper.target import Product, Target


class Generator:
    """Hands the weights that a layout's blocks hold to the target's parameters.

    ``fused`` names the weights that may be products, never stored. Blocks ``[:num_base]`` were there when this was made; a
    later one is a task's own output head, the next rows of the parameters of the last layer.
    """

    def __init__(self, layout: Layout, target: Target):
        self.layout, self.target = layout, target
        self._parts = [self._parts_of(block) for block in layout.blocks]
        self._base, self.num_base, self.num_base_chunks = list(layout.blocks), len(layout.blocks), layout.num_chunks
        self._grown: set[str] = set()
        in_rows = {parts[0][0] for b, parts in zip(layout.blocks, self._parts, strict=True) if b.rows}
        self.fused = target.take_products(in_rows)

    def add_block(self, block: Block) -> None:
        """Takes in what the layout and the target have grown by."""
        self._parts.append(self._parts_of(block))
        self._grown |= {name for name, _ in self._parts[-1]}

    def own_head(self, task: int) -> tuple[Sequence[int], int | None]:
        """The number of the later block that is the task's own head, if one is, and where its outputs then begin."""
        heads, num_later = self.target.num_heads, len(self._parts) - self.num_base
        if not num_later or heads is None or task < heads - num_later:
            return (), None
        later = task - (heads - num_later)
        return [self.num_base + later], (task - later) * (self.target.outputs_per_task or 0)

    def weights(
        self, h: Tensor, basis: Tensor, fused: Container[str] = (), heads: Sequence[tuple[int, Tensor]] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Product]]:
        """A task's weights from its features ``[N, H]``, and in their place products for those in ``fused``.

        ``heads``: of later blocks, which are to be made, their numbers and the features of their chunks.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in self.target.shapes_by_name}
        products: dict[str, Product] = {}
        names, blocks = [], []
        for block, parts in zip(self._base, self._parts, strict=False):
            if block.rows and parts[0][0] in fused:
                products[parts[0][0]] = _Rows(h[block.chunk_lo : block.chunk_hi], basis, block)
            else:
                names += [name for name, _ in parts]
                columns = (block.col_lo, block.col_lo + block.size)
                blocks.append(((block.chunk_lo, block.chunk_hi), columns, [shape for _, shape in parts]))
        for name, weight in zip(names, ops.generate_blocks(h, basis, blocks) if blocks else (), strict=True):
            found[name].append(weight)
        for number, own in heads:
            block, parts = self.layout.blocks[number], self._parts[number]
            columns = (block.col_lo, block.col_lo + block.size)
            made = ops.generate_blocks(own, basis, [((0, len(own)), columns, [shape for _, shape in parts])])
            for (name, _), weight in zip(parts, made, strict=True):
                found[name].append(weight)
        weights = {}
        for name, shape in self.target.shapes_by_name.items():
            if name in products:
                products[name].rest = _join(found[name], (-1, shape[1])) if found[name] else None
            else:
                weights[name] = _join(found[name], (-1, *shape[1:]) if name in self._grown else shape)
        return weights, products

    def stacked(self, h: Tensor, basis: Tensor) -> dict[str, Tensor]:
        """The weights of K tasks, each ``[K, ...]``, from their features ``[K, N, H]``: one product for each block."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.target.shapes_by_name}
        for block, parts in zip(self.layout.blocks, self._parts, strict=True):
            rows = h[:, block.chunk_lo : block.chunk_hi].flatten(0, 1)
            columns, width = (block.col_lo, block.col_lo + block.size), len(rows) // len(h) * block.size
            (flat,) = ops.generate_blocks(rows, basis, [((0, len(rows)), columns, [(len(h), width)])])
            sizes = [shape.numel() for _, shape in parts]
            *weights, _ = flat.split([*sizes, width - sum(sizes)], 1)
            for (name, _), weight in zip(parts, weights, strict=True):
                found[name].append(weight)
        return {
            name: (found[name][0] if len(found[name]) == 1 else torch.cat(found[name], 1)).view(len(h), *shape)
            for name, shape in self.target.shapes_by_name.items()
        }

    def _parts_of(self, block: Block) -> list[tuple[str, torch.Size]]:
        return [part for span in block.ranges for part in self.target.parts(span)]


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
