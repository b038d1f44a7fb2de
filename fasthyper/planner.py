"""Which rectangles the drift is summed over and in which form: a pure function of shapes, by counted multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fasthyper.layout import Layout, Range, Rectangle

PLAN_COLUMNS = ("task_lo", "task_hi", "chunk_lo", "chunk_hi", "col_lo", "col_hi", "direct")


def gram_cost(rows: int, cols: int, width: int) -> int:
    """Multiply-adds of E2: a side of length L costs 3 L H^2 for its Grams and 2 L H^2 for its gradient."""
    return 5 * (rows + cols) * width * width


def direct_cost(rows: int, cols: int, width: int) -> int:
    """Multiply-adds of the tiled direct form: the residual from M = 2H + 1 factors, then one product for each gradient."""
    return 4 * rows * cols * width


def drift_plan(layout: Layout, tasks: Sequence[int], width: int, form: str = "auto") -> Tensor:
    """The rectangles of the drift over these past tasks, one int64 row ``PLAN_COLUMNS`` each, on the CPU.

    Args:
        layout: the chunk grid; its shared ranges are held for all ``tasks``, each head for its own task.
        tasks: past tasks, in the order of the rows of the features; -1 in ``task_hi`` stands for all of them.
        width: H.
        form: ``auto`` picks the cheaper of Gram and direct form per rectangle; ``gram`` or ``direct`` forces one.

    Raises:
        ValueError: unknown ``form``, or a task without a head in a layout that has heads.
    """
    if form not in ("auto", "gram", "direct"):
        raise ValueError(f"form must be 'auto', 'gram' or 'direct', got {form!r}")

    def cost(rectangle: Rectangle, num_tasks: int) -> tuple[int, bool]:
        shape = num_tasks * rectangle.num_chunks, rectangle.num_cols, width
        costs = {"gram": (gram_cost(*shape), False), "direct": (direct_cost(*shape), True)}
        return min(costs.values()) if form == "auto" else costs[form]

    def rows(span: Range, task_lo: int, task_hi: int, num_tasks: int) -> list[list[int]]:
        covers = layout.by_chunks(span), layout.by_columns(span)
        cover = min(covers, key=lambda rectangles: sum(cost(r, num_tasks)[0] for r in rectangles))
        return [[task_lo, task_hi, *r, int(cost(r, num_tasks)[1])] for r in cover]

    plan = [row for span in layout.shared for row in rows(span, 0, -1, len(tasks))]
    if layout.heads:
        for position, task in enumerate(tasks):
            if task >= len(layout.heads):
                raise ValueError(f"task {task} has no output head: the target has {len(layout.heads)} of them")
            plan += [row for span in layout.heads[task] for row in rows(span, position, position + 1, 1)]
    return torch.tensor(plan, dtype=torch.int64).reshape(-1, len(PLAN_COLUMNS))
