"""Which form the drift takes over which rectangles: a pure function of shapes, by counted multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fasthyper.layout import Layout, Rectangle, by_columns

PLAN_COLUMNS = ("task_lo", "task_hi", "chunk_lo", "chunk_hi", "col_lo", "col_hi", "direct")


# beside multiply-adds, in units of those that narrow Gram matrices take, in registers (fitted; bench/bench_planner.py shows
# how well): a wide one, through memory; a direct one, in thin products; each element of rows and columns, read, packed,
# added up; each of a Gram matrix, summed in float64
GRAM_ELEMENT, GRAM_SUM = 650, 3000
NARROW, WIDE = 71, 1.3  # of at most this width rows and columns fit the registers; else all costs so many times as much
DIRECT_MAC, DIRECT_ELEMENT = 2.1, 500
FEW_ROWS, FEW_MAC, FEW_ELEMENT, FEW_WIDTH = 32, 6, 40, 16  # for so few nothing is packed; widths are filled up to lanes


def gram_macs(rows: int, cols: int, width: int) -> int:
    """Multiply-adds of E2: each row and each column costs 2 H^2 for its Gram matrices and 2 H^2 for its gradient.

    Without a trunk each task and each chunk costs that, instead of each pair of them.
    """
    return 4 * (rows + cols) * width * width


def direct_macs(cells: int, width: int) -> int:
    """Multiply-adds of the tiled direct form over rows x columns: residual from 2H factors, and two products."""
    return 4 * cells * width


def gram_cost(rows: int, cols: int, width: int) -> float:
    """What E2 takes, in multiply-adds."""
    cost = gram_macs(rows, cols, width) + GRAM_ELEMENT * (rows + cols) * width + GRAM_SUM * width * width
    return cost if width <= NARROW else WIDE * cost


def direct_cost(cells: int, rows: int, cols: int, width: int) -> float:
    """What the direct form takes, in the same units, over ``cells`` of these rows and columns."""
    if rows <= FEW_ROWS:
        return FEW_MAC * direct_macs(cells, max(width, FEW_WIDTH)) + FEW_ELEMENT * (rows + cols) * width
    return DIRECT_MAC * direct_macs(cells, width) + DIRECT_ELEMENT * (rows + cols) * width


def is_affine(layout: Layout, chunk_dim: int, layers: Sequence[object]) -> bool:
    """Whether all weights are one affine map of a task's embedding, V [e | 1], and all of them are held for all tasks."""
    is_one = layout.num_chunks == 1 and layout.chunk_size == layout.num_weights
    return is_one and not layout.heads and chunk_dim == 0 and not layers


def by_moments(num_tasks: int, width: int) -> bool:
    """Whether an affine drift is cheaper by one product with sum w x x' than by two with the rows x = [e | 1].

    By multiply-adds it is from half as many rows as columns on; but the two read the basis, or as much, several times more.
    """
    return 4 * num_tasks > width + 1


def default_budget(device: torch.device) -> int:
    """Bytes of pre-activations that a snapshot may store, unless told otherwise: a CPU makes them again for little."""
    return 1 << 28 if device.type == "cuda" else 3 << 24


def stored_bytes(num_tasks: int, num_chunks: int, widths: Sequence[int], itemsize: int, budget: int) -> list[int]:
    """Of the pre-activations that a snapshot stores: of the trunk's last layer, the one before, ... while the budget lasts.

    Never of the first, which is cheap. Later layers come first because they are mostly wider: their products cost most.
    """
    sizes = [num_tasks * num_chunks * width * itemsize for width in reversed(widths[1:])]
    return [size for size, total in zip(sizes, accumulate(sizes), strict=True) if total <= budget]


def drift_plan(
    layout: Layout, tasks: Sequence[int | Sequence[int]], width: int, form: str = "auto", *, trunk: bool = True
) -> Tensor:
    """The rectangles of the drift over these past tasks, one int64 row ``PLAN_COLUMNS`` each, on the CPU.

    All shared weights take one form: their rectangles meet the same columns, which are passed once for all of them. Each
    task's head takes its own, by multiply-adds alone: passes are shared with the other heads.

    Args:
        layout: the chunk grid; its shared ranges are held for all ``tasks``, each head for its own task.
        tasks: past tasks, in the order of the rows of the features; -1 in ``task_hi`` stands for all of them. In place of
            a task N of them, one for each chunk: the features of that row's chunks are those of these tasks.
        width: H.
        form: ``auto`` picks the cheaper form; ``gram`` or ``direct`` forces one.
        trunk: whether features are made by layers; without, they are pairs of a task's and a chunk's embedding.

    Raises:
        ValueError: unknown ``form``, or a task without a head in a layout that has heads.
    """
    if form not in ("auto", "gram", "direct"):
        raise ValueError(f"form must be 'auto', 'gram' or 'direct', got {form!r}")

    def rows(rectangles: Sequence[Rectangle], task_lo: int, task_hi: int, num_tasks: int) -> list[list[int]]:
        cells = num_tasks * sum(r.num_chunks * r.num_cols for r in rectangles)
        chunks, cols = sum(r.num_chunks for r in rectangles), _union(rectangles)
        num_rows = num_tasks * chunks if trunk else num_tasks + chunks
        if task_hi < 0:
            is_cheaper = direct_cost(cells, num_tasks * chunks, cols, width) < gram_cost(num_rows, cols, width)
        else:
            is_cheaper = direct_macs(cells, width) < gram_macs(num_rows, cols, width)
        is_direct = form == "direct" or (form == "auto" and is_cheaper)
        # Gram matrices add up over chunks; the direct form reads the columns of each rectangle
        return [[task_lo, task_hi, *r, int(is_direct)] for r in (by_columns(rectangles) if is_direct else rectangles)]

    plan = rows([r for span in layout.shared for r in layout.rectangles(span)], 0, -1, len(tasks))
    if layout.heads:
        for position, task in enumerate(tasks):
            for rectangles in _heads(layout, task):
                plan += rows(rectangles, position, position + 1, 1)
    return torch.tensor(plan, dtype=torch.int64).reshape(-1, len(PLAN_COLUMNS))


def _heads(layout: Layout, task: int | Sequence[int]) -> list[list[Rectangle]]:
    """Where the weights of this task's head lie, range by range; of N tasks, of each what lies in its own chunks."""
    found = []
    for one in {task} if isinstance(task, int) else sorted(set(task)):
        if one >= len(layout.heads):
            raise ValueError(f"task {one} has no output head: the target has {len(layout.heads)} of them")
        for span in layout.heads[one]:
            rectangles = layout.rectangles(span)
            if not isinstance(task, int):
                rectangles = [
                    Rectangle(chunk, chunk + 1, r.col_lo, r.col_hi)
                    for r in rectangles
                    for chunk in range(r.chunk_lo, r.chunk_hi)
                    if task[chunk] == one
                ]
            found.append(rectangles)
    return found


def _union(rectangles: Sequence[Rectangle]) -> int:
    """Number of different columns in the rectangles."""
    count, reached = 0, 0
    for lo, hi in sorted((r.col_lo, r.col_hi) for r in rectangles):
        count += max(0, hi - max(lo, reached))
        reached = max(reached, hi)
    return count


def factorises(batch: int, inputs: int, rows: int, chunks: int, width: int, with_grad: bool, with_grad_x: bool) -> bool:
    """Whether a linear layer of ``chunks`` chunks of ``rows`` rows is cheaper factorised, its weight never formed (E3)."""
    generated, factorised = linear_costs(batch, inputs, rows, chunks, width + 1)
    steps = [True, with_grad, with_grad and with_grad_x]
    return sum(c for c, taken in zip(factorised, steps, strict=True) if taken) < sum(
        c for c, taken in zip(generated, steps, strict=True) if taken
    )


def linear_costs(batch: int, inputs: int, rows: int, chunks: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Multiply-adds of the generated and of the factorised order: forward, backward, and what grad x adds to it.

    Of W = Ha V' and y = x W': dW = dy' x, dHa = dW V, dV = dW' Ha; W again and dx = dy W.
    Of u = x V and y = u Ha': du = dy Ha, dHa = dy' u, dV = x' du; dx = du V'.
    """
    make, use = chunks * rows * inputs * k, batch * chunks * rows * inputs
    inner, outer = batch * rows * inputs * k, batch * rows * chunks * k
    return (make + use, use + 2 * make, make + use), (inner + outer, 2 * outer + inner, inner)
