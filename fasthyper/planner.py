"""Which form the drift takes over which rectangles: a pure function of shapes, by counted multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasthyper.layout import Layout, Rectangle

MEMORY_BUDGET = 1 << 28  # bytes of pre-activations that a snapshot stores, unless told otherwise
PLAN_COLUMNS = ("task_lo", "task_hi", "chunk_lo", "chunk_hi", "col_lo", "col_hi", "direct")


def gram_cost(rows: int, cols: int, width: int) -> int:
    """Multiply-adds of E2: each row and each column costs 2 H^2 for its Gram matrices and 2 H^2 for its gradient.

    Without a trunk each task and each chunk costs that, instead of each pair of them.
    """
    return 4 * (rows + cols) * width * width


def direct_cost(rows: int, cols: int, width: int) -> int:
    """Multiply-adds of the tiled direct form: the residual from 2H factors, then one product for each gradient."""
    return 4 * rows * cols * width


def snapshot_bytes(num_tasks: int, num_chunks: int, widths: Sequence[int], itemsize: int) -> int:
    """Memory of a snapshot's pre-activations, one of each trunk layer for each chunk of each task."""
    return num_tasks * num_chunks * sum(widths) * itemsize


def drift_plan(layout: Layout, tasks: Sequence[int], width: int, form: str = "auto", *, trunk: bool = True) -> Tensor:
    """The rectangles of the drift over these past tasks, one int64 row ``PLAN_COLUMNS`` each, on the CPU.

    All shared weights take one form: their rectangles meet the same columns, which are passed once for all of them. Each
    task's head takes its own.

    Args:
        layout: the chunk grid; its shared ranges are held for all ``tasks``, each head for its own task.
        tasks: past tasks, in the order of the rows of the features; -1 in ``task_hi`` stands for all of them.
        width: H.
        form: ``auto`` picks the cheaper form; ``gram`` or ``direct`` forces one.
        trunk: whether features are made by layers; without, they are pairs of a task's and a chunk's embedding.

    Raises:
        ValueError: unknown ``form``, or a task without a head in a layout that has heads.
    """
    if form not in ("auto", "gram", "direct"):
        raise ValueError(f"form must be 'auto', 'gram' or 'direct', got {form!r}")

    def rows(rectangles: Sequence[Rectangle], task_lo: int, task_hi: int, num_tasks: int) -> list[list[int]]:
        areas = [(num_tasks * r.num_chunks, r.num_cols) for r in rectangles]
        num_rows = sum(rows for rows, _ in areas) if trunk else num_tasks + sum(r.num_chunks for r in rectangles)
        gram = gram_cost(num_rows, _union(rectangles), width)
        direct = sum(direct_cost(*area, width) for area in areas)
        is_direct = form == "direct" or (form == "auto" and direct < gram)
        return [[task_lo, task_hi, *r, int(is_direct)] for r in rectangles]

    plan = rows([r for span in layout.shared for r in layout.rectangles(span)], 0, -1, len(tasks))
    if layout.heads:
        for position, task in enumerate(tasks):
            if task >= len(layout.heads):
                raise ValueError(f"task {task} has no output head: the target has {len(layout.heads)} of them")
            for span in layout.heads[task]:
                plan += rows(layout.rectangles(span), position, position + 1, 1)
    return torch.tensor(plan, dtype=torch.int64).reshape(-1, len(PLAN_COLUMNS))


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
