"""Counted work, multiply-adds and bytes of main memory, of our algorithm and of the loop over tasks: functions of shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fasthyper.bench.workloads import Workload
from fasthyper.layout import Layout
from fasthyper.planner import by_moments, default_budget, drift_plan, is_affine, stored_bytes

FLOAT = 4  # bytes
ROWS_KEPT = 4  # csrc/cpu/drift.h: columns for each row from which on rows are kept, and columns read once


class Work(NamedTuple):
    """Multiply-adds; bytes read and written, each once per pass over something too large for the caches."""

    macs: int
    num_bytes: int

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.macs + other.macs, self.num_bytes + other.num_bytes)


@dataclass(frozen=True)
class Shapes:
    """All that work depends on, but the number of past tasks: E, Z, the trunk's widths, the grid of chunks, the target.

    ``target_macs``: multiply-adds of the target's forward and backward pass over a batch. ``num_tensors``: of its weights.
    """

    task_dim: int
    chunk_dim: int
    hidden: tuple[int, ...]
    num_weights: int
    chunk_size: int
    num_tensors: int = 1
    target_macs: int = 0

    @property
    def layout(self) -> Layout:
        return Layout(self.num_weights, self.chunk_size)

    @property
    def num_chunks(self) -> int:
        return self.layout.num_chunks

    @property
    def width(self) -> int:
        """H."""
        return (self.task_dim + self.chunk_dim, *self.hidden)[-1]

    @property
    def num_theta(self) -> int:
        """Parameters that all tasks share."""
        layers = sum((i + 1) * o for i, o in pairwise((self.task_dim + self.chunk_dim, *self.hidden)))
        return self.num_chunks * self.chunk_dim + layers + self.chunk_size * (self.width + 1)

    @staticmethod
    def of(workload: Workload) -> Shapes:
        """Those of a workload."""
        target, hnet = workload.build_target(), workload.hnet
        sizes = [parameter.numel() for parameter in target.parameters()]
        chunked = hnet["chunk_size"] is not None
        return Shapes(
            task_dim=hnet["task_dim"],
            chunk_dim=hnet["chunk_dim"] if chunked else 0,
            hidden=tuple(hnet["hidden"]),
            num_weights=sum(sizes),
            chunk_size=hnet["chunk_size"] if chunked else sum(sizes),
            num_tensors=len(sizes),
            target_macs=target_macs(target, (workload.batch_size, *workload.example_shape)),
        )


def target_macs(target: nn.Module, batch_shape: Sequence[int]) -> int:
    """Multiply-adds of a forward and a backward pass, by running them on tensors without storage."""
    target, x = target.to("meta"), torch.empty(*batch_shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        target(x).sum().backward()
    return counter.get_total_flops() // 2


def drift_work(shapes: Shapes, past: int) -> Work:
    """Of E2 behind the trunk, value and gradients. A symmetric product counts once, constants of a task not at all.

    Rows: through each layer after the first, ``[dx | x0 | 1]`` forward and two products backward; the first has T + N rows
    instead of T N. Then dH'W[dH | H* | 1] above the diagonal, and 2 WX (Y'V_H). Columns: Y'Y, and 2 Y (X'W [H | 1]). Bytes:
    the basis and its snapshot are read, twice where rows are many, its gradient is written, what is stored of the snapshot
    is read. Without a trunk tasks and chunks are counted, not their pairs: moments of each, and its gradient.
    """
    rows = past * shapes.num_chunks
    width, full = shapes.width, 2 * shapes.width + 1
    if is_affine(shapes.layout, shapes.chunk_dim, shapes.hidden):  # D C in one pass, or D = V - V*, then D x', in two more
        products, passed = (width + 1, 3) if by_moments(past, width) else (2 * past, 7)
        return Work(shapes.chunk_size * (width + 1) * products, FLOAT * passed * shapes.chunk_size * (width + 1))
    macs = 0
    if shapes.hidden:
        first, *_ = shapes.hidden
        for count, size in ((past, shapes.task_dim), (shapes.num_chunks, shapes.chunk_dim)):
            macs += count * first * (2 * size + 2 * size)  # forward of dx and x0, gradients of weight and embedding
        lacking = len(shapes.hidden) - 1 - len(_stored(shapes, past))
        for layer, (i, o) in enumerate(pairwise(shapes.hidden)):
            again = int(layer < lacking)  # the snapshot's product, where it is not stored
            macs += rows * (((2 + again) * i + 1) * o + 2 * i * o)
    gram_columns, runs = set(), set()  # a run of tasks or chunks is counted once, however many rectangles it is in
    plan = drift_plan(shapes.layout, range(past), width, trunk=bool(shapes.hidden)).tolist()
    for task_lo, task_hi, chunk_lo, chunk_hi, col_lo, col_hi, direct in plan:
        num_tasks, num_chunks = (past if task_hi < 0 else task_hi) - task_lo, chunk_hi - chunk_lo
        num_rows = num_tasks * num_chunks
        if direct:
            macs += num_rows * (col_hi - col_lo) * (full + width + width + 1)
            continue
        gram_columns.add((col_lo, col_hi))
        if not shapes.hidden:
            runs |= {("tasks", task_lo, num_tasks, shapes.task_dim), ("chunks", chunk_lo, num_chunks, shapes.chunk_dim)}
        else:
            macs += num_rows * (width * (width + 1) // 2 + width * (width + 1) + full * width)
    macs += sum(count * (2 * size + 1) * (3 * size + 1) for *_, count, size in runs)
    of_column = full * (full + 1) // 2 + full * (width + 1)
    if shapes.hidden:  # of V'V all is known but what has changed
        of_column -= width * (width + 1) // 2
    macs += _covered(gram_columns) * of_column
    reads = 2 if shapes.hidden and gram_columns and ROWS_KEPT * rows > shapes.chunk_size else 1
    return Work(macs, FLOAT * (2 * reads + 1) * shapes.chunk_size * (width + 1) + kept(shapes, past))


def kept(shapes: Shapes, past: int) -> int:
    """Bytes of pre-activations that a snapshot stores on a CPU."""
    return sum(_stored(shapes, past))


def task_work(shapes: Shapes) -> Work:
    """Of a step's other half: the current task's weights and their gradient, the target, look-ahead and Adam.

    Bytes: the weights are written once and read twice, their gradient too; theta's first gradient is written, theta, its
    moments and that gradient are read for the look-ahead and again for the update, which writes three of them.
    """
    generate = 3 * shapes.num_chunks * (_layers(shapes) + shapes.chunk_size * (shapes.width + 1))
    return Work(generate + shapes.target_macs, FLOAT * (6 * shapes.num_weights + 12 * shapes.num_theta))


def step_work(shapes: Shapes, past: int) -> Work:
    """Of a whole step of ours."""
    return drift_work(shapes, past) + task_work(shapes)


def messages(shapes: Shapes, *, lookahead: bool = True, plastic: int = 0) -> list[int]:
    """Numbers in each message of a step of several ranks: gradients, loss and drift, and whether a rank asks to stop.

    The loss has a gradient of theta, of the task's embedding and of those of ``plastic`` past tasks, the drift all but one.
    """
    held = shapes.num_theta + plastic * shapes.task_dim
    loss, drift = 1 + held + shapes.task_dim, 1 + held
    return [loss + 1, drift + 1] if lookahead else [loss + drift + 1]


def _stored(shapes: Shapes, past: int) -> list[int]:
    return stored_bytes(past, shapes.num_chunks, shapes.hidden, FLOAT, default_budget(torch.device("cpu")))


def _layers(shapes: Shapes) -> int:
    """Multiply-adds of one row in the trunk."""
    return sum(i * o for i, o in pairwise((shapes.task_dim + shapes.chunk_dim, *shapes.hidden)))


def _covered(intervals: set[tuple[int, int]]) -> int:
    """Number of different positions in the intervals."""
    count, reached = 0, 0
    for lo, hi in sorted(intervals):
        count += max(0, hi - max(lo, reached))
        reached = max(reached, hi)
    return count
