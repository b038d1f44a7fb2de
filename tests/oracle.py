"""What every fast path must agree with, written the slow, obvious way: loop over tasks, make weights, subtract, square."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Ranges = Sequence[tuple[int, int]]


def all_weights(h: Tensor, basis: Tensor, num_weights: int) -> Tensor:
    """Target weights ``[P]`` from one task's features ``[N, H]``."""
    chunks = [basis[:, :-1] @ row + basis[:, -1] for row in h]
    return torch.cat(chunks)[:num_weights]


def laid_weights(layout, h: Tensor, basis: Tensor) -> Tensor:
    """Target weights ``[P]``, in the order of the target's parameters, from one task's features, block by block."""
    flat = h.new_zeros(layout.num_weights)
    for block in layout.blocks:
        size = sum(stop - start for start, stop in block.ranges)
        columns = basis[block.col_lo : block.col_lo + block.size]
        laid = all_weights(h[block.chunk_lo : block.chunk_hi], columns, size)
        places = torch.cat([torch.arange(*span) for span in block.ranges])
        flat = flat.index_put((places,), laid)
    return flat


def chunk_of_weights(layout) -> Tensor:
    """Number of the chunk ``[P]`` that each weight lies in."""
    chunks, basis = torch.arange(layout.num_chunks)[:, None], torch.tensor([[1, 0]]).expand(layout.chunk_size, -1)
    return laid_weights(layout, chunks, basis)


def features(theta: Sequence[Tensor], embedding: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Trunk features ``[N, H]`` of one task; theta = chunk embeddings, (weight, bias) of each layer, basis."""
    rows = []
    for chunk_embedding in theta[0]:
        x = torch.cat([embedding, chunk_embedding])
        for weight, bias in zip(theta[1:-1:2], theta[2:-1:2], strict=True):
            x = activation(weight @ x + bias)
        rows.append(x)
    return torch.stack(rows)


def held(num_weights: int, heads: Sequence[Ranges], task: int) -> Tensor:
    """Mask ``[P]`` of the weights that are held for ``task``: all but the other tasks' heads."""
    mask = torch.ones(num_weights)
    for other, ranges in enumerate(heads):
        for start, stop in ranges:
            mask[start:stop] = other == task
    return mask


def drift(
    h: Tensor,
    basis: Tensor,
    h0: Tensor,
    basis0: Tensor,
    num_weights: int,
    *,
    heads: Sequence[Ranges] = (),
    tasks: Sequence[int] | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Sum over tasks (rows of ``h``) of the weighted squared difference of their weights; by default the mean."""
    total = 0 * (h.sum() + basis.sum())  # differentiable also without a task
    for row, task in enumerate(range(len(h)) if tasks is None else tasks):
        difference = all_weights(h[row], basis, num_weights) - all_weights(h0[row], basis0, num_weights)
        factor = 1 / len(h) if weight is None else weight[row]
        total = total + factor * (held(num_weights, heads, task).to(h) * difference**2).sum()
    return total


def relative_error(found: Tensor, wanted: Tensor, scale: Tensor | None = None) -> float:
    """Norm of the difference over that of what is wanted (or of ``scale``, where what is wanted may cancel), in float64."""
    difference = (found.double() - wanted.double()).norm().item()
    norm = (wanted if scale is None else scale).double().norm().item()
    return difference / norm if norm else difference
