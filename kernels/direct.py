"""The direct form of the drift: a tile of the residual is made, weighed, squared, contracted into a gradient and dropped.

    D = X Y',   value = sum w F D^2,   d/dH = 2 (w F D) V_H,   d/dV = 2 (w F D)' [H | 1]

A plan's rectangles are laid out as *entries*: one row (t, n) of the features with the columns ``[lo, hi)`` that it meets,
sorted by columns. So one tile of D serves rows of many rectangles, a hundred heads cost no more launches than one, and what
a row does not meet is masked. Gradients belong to somebody: programs of ``_rows_kernel`` own entries and pass over their
columns, programs of ``_columns_kernel`` own columns and pass over the entries that meet them; both make D. Where owners are
few, a pass is split among several programs, whose partial sums are added in a fixed order. Results repeat bit for bit.

Suffixes beyond ``reference.py``: G entries, D depth of the product. Rows are [dH | H*], H* beginning at ``HALF``, or H;
the 1 that ends them is not read: sums begin with the column of Y at ``DEPTH``. Strides of rows are given in ``UNIT``; where
that is 4, and the halves of a row are filled up with zeros, four numbers are read at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fasthyper.kernels.precision import dot_precision

FIELDS = tl.constexpr(7)  # of a rectangle in a table: its bounds and its first entry
PARTIAL_COLUMNS = 1 << 17  # programs of a pass, times the width of what each of them sums
MAX_PROGRAMS = 1024
BLOCK_C = 64


@triton.jit(do_not_specialize=["num_entries", "num_chunks"])
def _entries_kernel(table_ptr, entries_ptr, num_entries, num_chunks, BLOCK_G: tl.constexpr):
    """entries[0 .. 2] = row, lo, hi of the ``BLOCK_G`` entries that a program owns, of one rectangle."""
    table_ptr += tl.program_id(1) * FIELDS
    task_lo, task_hi, chunk_lo = tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2)
    chunks, first = tl.load(table_ptr + 3) - chunk_lo, tl.load(table_ptr + 6)
    i_G = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    m_G = i_G < (task_hi - task_lo) * chunks
    row_G = (task_lo + i_G // chunks) * num_chunks + chunk_lo + i_G % chunks
    o_ptr = entries_ptr + first + i_G
    tl.store(o_ptr, row_G, mask=m_G)
    tl.store(o_ptr + num_entries, tl.load(table_ptr + 4).to(tl.int32) + tl.zeros_like(row_G), mask=m_G)
    tl.store(o_ptr + 2 * num_entries, tl.load(table_ptr + 5).to(tl.int32) + tl.zeros_like(row_G), mask=m_G)


@triton.jit
def _product(d_AB, a_ptr, a_A, m_A, b_ptr, b_B, m_B, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """d + a b', rows of which begin at the offsets ``a_A`` and ``b_B``."""
    for lo in range(0, DEPTH, BLOCK_D):
        i_D = lo + tl.arange(0, BLOCK_D)
        a_AD = tl.load(a_ptr + a_A[:, None] + i_D[None, :], mask=m_A[:, None] & (i_D < DEPTH)[None, :], other=0.0)
        b_DB = tl.load(b_ptr + b_B[None, :] + i_D[:, None], mask=m_B[None, :] & (i_D < DEPTH)[:, None], other=0.0)
        d_AB = tl.dot(a_AD, b_DB, d_AB, input_precision=PRECISION)
    return d_AB


@triton.jit
def _weighed(
    d,
    inside,
    weight,
    task,
    cell,
    targets_ptr,
    targets_offset_ptr,
    targets_stride,
    importance_ptr,
    importance_offset_ptr,
    importance_stride,
    HAS_TARGETS: tl.constexpr,
    HAS_IMPORTANCE: tl.constexpr,
):
    """(d, w F d), both 0 outside."""
    if HAS_TARGETS:
        offset = tl.load(targets_offset_ptr + task)
        d -= tl.load(targets_ptr + offset + cell * targets_stride, mask=inside, other=0.0)
    d = tl.where(inside, d, 0.0)
    wd = weight * d
    if HAS_IMPORTANCE:
        offset = tl.load(importance_offset_ptr + task)
        wd *= tl.load(importance_ptr + offset + cell * importance_stride, mask=inside, other=0.0)
    return d, wd


@triton.jit(do_not_specialize=["num_entries", "num_chunks", "rows_per_weight", "x_task_stride", "x_chunk_stride"])
def _rows_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    entries_ptr,
    targets_ptr,
    targets_offset_ptr,
    importance_ptr,
    importance_offset_ptr,
    partial_ptr,
    value_ptr,
    num_entries,
    num_chunks,
    rows_per_weight,
    chunk_size,
    x_task_stride,
    x_chunk_stride,
    y_stride,
    targets_stride,
    importance_stride,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_IMPORTANCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NUM_H: tl.constexpr,
):
    """2 (wFD) V_H and sum wFD^2 of ``BLOCK_R`` entries over every s-th tile of their columns, for ``NUM_H`` blocks of H.

    Grid: tiles of entries, splits, groups of blocks of H. The value comes with the first group.
    """
    tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_R = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    m_R = i_R < num_entries
    row_R = tl.load(entries_ptr + i_R, mask=m_R, other=0)
    lo_R = tl.load(entries_ptr + num_entries + i_R, mask=m_R, other=2147483647)
    hi_R = tl.load(entries_ptr + 2 * num_entries + i_R, mask=m_R, other=0)
    w_R = tl.load(weight_ptr + row_R // rows_per_weight, mask=m_R, other=0.0)
    task_R, chunk_R = row_R // num_chunks, (row_R % num_chunks).to(tl.int64)
    x_R = (task_R.to(tl.int64) * x_task_stride + chunk_R * x_chunk_stride) * UNIT
    cell_R = chunk_R * chunk_size
    col_lo, col_hi = tl.min(lo_R, 0), tl.max(hi_R, 0)

    value_R = tl.zeros([BLOCK_R], tl.float64)
    sums: tl.tuple = ()
    for _ in tl.static_range(NUM_H):
        sums = sums + (tl.zeros([BLOCK_R, BLOCK_H], tl.float32),)  # noqa: RUF005
    for first in range(col_lo + split * BLOCK_C, col_hi, tl.num_programs(1) * BLOCK_C):
        i_C = first + tl.arange(0, BLOCK_C)
        m_C, y_C = i_C < col_hi, i_C.to(tl.int64) * y_stride * UNIT
        one_C = tl.load(y_ptr + y_C + DEPTH, mask=m_C, other=0.0)
        d_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32) + one_C[None, :]
        d_RC = _product(d_RC, x_ptr, x_R, m_R, y_ptr, y_C, m_C, DEPTH, BLOCK_D, PRECISION)
        d_RC, wd_RC = _weighed(
            d_RC,
            (i_C[None, :] >= lo_R[:, None]) & (i_C[None, :] < hi_R[:, None]),
            w_R[:, None],
            task_R[:, None],
            cell_R[:, None] + i_C[None, :],
            targets_ptr,
            targets_offset_ptr,
            targets_stride,
            importance_ptr,
            importance_offset_ptr,
            importance_stride,
            HAS_TARGETS,
            HAS_IMPORTANCE,
        )
        value_R += tl.sum(wd_RC * d_RC, 1).to(tl.float64)
        grown: tl.tuple = ()
        for i in tl.static_range(NUM_H):
            i_H = (group * NUM_H + i) * BLOCK_H + tl.arange(0, BLOCK_H)
            m_CH = m_C[:, None] & (i_H < HALF)[None, :]
            v_CH = tl.load(y_ptr + y_C[:, None] + i_H[None, :], mask=m_CH, other=0.0)
            grown = grown + (tl.dot(wd_RC, v_CH, sums[i], input_precision=PRECISION),)  # noqa: RUF005
        sums = grown

    o_R = (split * num_entries + i_R).to(tl.int64) * WIDTH
    for i in tl.static_range(NUM_H):
        i_H = (group * NUM_H + i) * BLOCK_H + tl.arange(0, BLOCK_H)
        tl.store(partial_ptr + o_R[:, None] + i_H[None, :], 2 * sums[i], mask=m_R[:, None] & (i_H < WIDTH)[None, :])
    if group == 0:
        tl.store(value_ptr + split * tl.num_programs(0) + tile, tl.sum(value_R, 0))


@triton.jit(
    do_not_specialize=[
        *("num_entries", "num_chunks", "rows_per_weight", "num_rectangles", "first_col", "num_cols"),
        *("x_task_stride", "x_chunk_stride"),
    ]
)
def _columns_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    entries_ptr,
    targets_ptr,
    targets_offset_ptr,
    importance_ptr,
    importance_offset_ptr,
    partial_ptr,
    table_ptr,
    num_entries,
    num_chunks,
    rows_per_weight,
    num_rectangles,
    first_col,
    num_cols,
    chunk_size,
    x_task_stride,
    x_chunk_stride,
    y_stride,
    targets_stride,
    importance_stride,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_IMPORTANCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NUM_H: tl.constexpr,
):
    """2 (wFD)' [H | 1] of ``BLOCK_C`` columns over every s-th tile of the entries that meet them, for ``NUM_H`` blocks of H.

    Grid: tiles of columns, splits, groups of blocks of H. The last column, of the bias, comes with the first group.
    """
    tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    col_lo = first_col + tile * BLOCK_C
    i_C = col_lo + tl.arange(0, BLOCK_C)
    m_C, y_C = i_C < first_col + num_cols, i_C.to(tl.int64) * y_stride * UNIT
    one_C = tl.load(y_ptr + y_C + DEPTH, mask=m_C, other=0.0)

    start, stop = num_entries, 0  # of the entries of all rectangles that meet these columns
    for first in range(0, num_rectangles, 128):
        i_B = first + tl.arange(0, 128)
        m_B = i_B < num_rectangles
        f_ptr = table_ptr + i_B * FIELDS
        lo_B, hi_B = tl.load(f_ptr + 4, mask=m_B, other=0), tl.load(f_ptr + 5, mask=m_B, other=0)
        m_B &= (lo_B < col_lo + BLOCK_C) & (hi_B > col_lo)
        rows_B = tl.load(f_ptr + 1, mask=m_B, other=0) - tl.load(f_ptr, mask=m_B, other=0)
        rows_B *= tl.load(f_ptr + 3, mask=m_B, other=0) - tl.load(f_ptr + 2, mask=m_B, other=0)
        start_B = tl.load(f_ptr + 6, mask=m_B, other=0)
        start = tl.minimum(start, tl.min(tl.where(m_B, start_B, num_entries), 0).to(tl.int32))
        stop = tl.maximum(stop, tl.max(tl.where(m_B, start_B + rows_B, 0), 0).to(tl.int32))

    bias_C = tl.zeros([BLOCK_C], tl.float32)
    sums: tl.tuple = ()
    for _ in tl.static_range(NUM_H):
        sums = sums + (tl.zeros([BLOCK_C, BLOCK_H], tl.float32),)  # noqa: RUF005
    for first in range(start + split * BLOCK_R, stop, tl.num_programs(1) * BLOCK_R):
        i_R = first + tl.arange(0, BLOCK_R)
        m_R = i_R < stop
        row_R = tl.load(entries_ptr + i_R, mask=m_R, other=0)
        lo_R = tl.load(entries_ptr + num_entries + i_R, mask=m_R, other=0)
        hi_R = tl.load(entries_ptr + 2 * num_entries + i_R, mask=m_R, other=0)
        w_R = tl.load(weight_ptr + row_R // rows_per_weight, mask=m_R, other=0.0)
        task_R, chunk_R = row_R // num_chunks, (row_R % num_chunks).to(tl.int64)
        x_R = (task_R.to(tl.int64) * x_task_stride + chunk_R * x_chunk_stride) * UNIT
        cell_R = chunk_R * chunk_size
        d_CR = tl.zeros([BLOCK_C, BLOCK_R], tl.float32) + one_C[:, None]
        d_CR = _product(d_CR, y_ptr, y_C, m_C, x_ptr, x_R, m_R, DEPTH, BLOCK_D, PRECISION)
        d_CR, wd_CR = _weighed(
            d_CR,
            (i_C[:, None] >= lo_R[None, :]) & (i_C[:, None] < hi_R[None, :]),
            w_R[None, :],
            task_R[None, :],
            cell_R[None, :] + i_C[:, None],
            targets_ptr,
            targets_offset_ptr,
            targets_stride,
            importance_ptr,
            importance_offset_ptr,
            importance_stride,
            HAS_TARGETS,
            HAS_IMPORTANCE,
        )
        bias_C += tl.sum(wd_CR, 1)
        grown: tl.tuple = ()
        for i in tl.static_range(NUM_H):
            i_H = (group * NUM_H + i) * BLOCK_H + tl.arange(0, BLOCK_H)
            m_RH = m_R[:, None] & (i_H < HALF)[None, :]
            x_RH = x_ptr + x_R[:, None] + i_H[None, :]
            h_RH = tl.load(x_RH, mask=m_RH, other=0.0)
            if HALF < DEPTH:  # H = dH + H*
                h_RH += tl.load(x_RH + HALF, mask=m_RH, other=0.0)
            grown = grown + (tl.dot(wd_CR, h_RH, sums[i], input_precision=PRECISION),)  # noqa: RUF005
        sums = grown

    o_C = (split * num_cols + tile * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64) * (WIDTH + 1)
    for i in tl.static_range(NUM_H):
        i_H = (group * NUM_H + i) * BLOCK_H + tl.arange(0, BLOCK_H)
        tl.store(partial_ptr + o_C[:, None] + i_H[None, :], 2 * sums[i], mask=m_C[:, None] & (i_H < WIDTH)[None, :])
    if group == 0:
        tl.store(partial_ptr + o_C + WIDTH, 2 * bias_C, mask=m_C)


@triton.jit(do_not_specialize=["num_tasks", "num_chunks", "task_stride", "chunk_stride"])
def _add_rows_kernel(
    grad_ptr,
    sums_ptr,
    table_ptr,
    lists_ptr,
    num_tasks,
    num_chunks,
    task_stride,
    chunk_stride,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """grad[t, n] += the sums of its entries, for ``BLOCK_N`` chunks of one task; an entry each of the task's rectangles."""
    tiles = tl.cdiv(num_chunks, BLOCK_N)
    task = tl.program_id(0) // tiles
    i_N, i_H = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_H)
    o_ptr = grad_ptr + task.to(tl.int64) * task_stride + i_N.to(tl.int64)[:, None] * chunk_stride + i_H[None, :]
    m_NH = (i_N < num_chunks)[:, None] & (i_H < WIDTH)[None, :]
    total_NH = tl.load(o_ptr, mask=m_NH, other=0.0)
    for i in range(tl.load(lists_ptr + task), tl.load(lists_ptr + task + 1)):
        f_ptr = table_ptr + tl.load(lists_ptr + num_tasks + 1 + i) * FIELDS
        chunk_lo, chunk_hi = tl.load(f_ptr + 2), tl.load(f_ptr + 3)
        first = tl.load(f_ptr + 6) + (task - tl.load(f_ptr)) * (chunk_hi - chunk_lo) - chunk_lo
        m_N = (i_N >= chunk_lo) & (i_N < chunk_hi)
        total_NH += tl.load(sums_ptr + (first + i_N)[:, None] * WIDTH + i_H[None, :], mask=m_N[:, None] & m_NH, other=0.0)
    tl.store(o_ptr, total_NH, mask=m_NH)


class _Schedule(NamedTuple):
    """A plan's rectangles as the kernels read them: plain numbers."""

    table: tuple[int, ...]  # FIELDS of each rectangle, sorted by columns
    lists: tuple[int, ...]  # where the list of each task begins and the last ends, then the lists: positions in the table
    num_entries: int
    max_rows: int
    col_lo: int
    col_hi: int


@functools.lru_cache(maxsize=64)
def _schedule(rectangles: tuple[tuple[int, ...], ...], num_tasks: int) -> _Schedule:
    table: list[int] = []
    by_task: list[list[int]] = [[] for _ in range(num_tasks)]
    first = 0
    taken = [r for r in rectangles if r[0] < r[1] and r[2] < r[3] and r[4] < r[5]]
    taken.sort(key=lambda r: (r[4], r[5]))
    for position, (task_lo, task_hi, chunk_lo, chunk_hi, *cols) in enumerate(taken):
        table += [task_lo, task_hi, chunk_lo, chunk_hi, *cols, first]
        first += (task_hi - task_lo) * (chunk_hi - chunk_lo)
        for own in by_task[task_lo:task_hi]:
            own.append(position)
    lists, at = [], 0
    for own in by_task:
        lists.append(at)
        at += len(own)
    lists += [at, *(position for own in by_task for position in own)]
    max_rows = max(((r[1] - r[0]) * (r[3] - r[2]) for r in taken), default=0)
    col_lo, col_hi = min((r[4] for r in taken), default=0), max((r[5] for r in taken), default=0)
    return _Schedule(tuple(table), tuple(lists), first, max_rows, col_lo, col_hi)


_captured: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}  # what CUDA graphs read for as long as they live


@functools.lru_cache(maxsize=256)
def _copy_to(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    table = torch.tensor(numbers, dtype=torch.int64)
    if device.type != "cuda":
        return table.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a plan, or a list of targets, must have been met once before it is captured in a CUDA graph")
    return table.pin_memory().to(device, non_blocking=True)


def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """``numbers`` as int64 on the device, made once and without a sync; kept for good where a CUDA graph reads them."""
    table = _copy_to(numbers, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[numbers, device] = table
    return table


class _Cells(NamedTuple):
    """A number for each weight of each task: weight p of task t lies ``offsets[t] + p stride`` elements after ``base``."""

    base: Tensor
    offsets: tuple[int, ...]
    stride: int

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> _Cells:
        """Of one tensor ``[T, P]``, or T tensors ``[P]``, which are copied if their strides differ."""
        if rows[0].dim() == 2:
            return cls(rows[0], tuple(t * rows[0].stride(0) for t in range(len(rows[0]))), rows[0].stride(1))
        if len({row.stride(0) for row in rows}) > 1:
            rows = torch.cat(list(rows)).split([len(row) for row in rows])
        first, size = rows[0].data_ptr(), rows[0].element_size()
        return cls(rows[0], tuple((row.data_ptr() - first) // size for row in rows), rows[0].stride(0))


def direct_rectangles(
    x_TNM: Tensor,
    weight_T: Tensor,
    y_SM: Tensor,
    width: int,
    rectangles: Sequence[Sequence[int]],
    grad_h_TNH: Tensor,
    grad_basis_SK: Tensor,
    value: Tensor,
    padded: int | None = None,
) -> None:
    """The same of all ``rectangles``, which may overlap, in a constant number of launches; adds to gradients and value.

    Args:
        x_TNM, y_SM: as in ``direct``, of any strides between rows; read fastest where these are multiples of 4.
        weight_T: weights of the tasks.
        width: H.
        rectangles: (task_lo, task_hi, chunk_lo, chunk_hi, col_lo, col_hi), within the grid. They are copied to the device
            when first met, without a sync, and must have been met before they are captured in a CUDA graph (RuntimeError).
        grad_h_TNH, grad_basis_SK, value: added to. Of any strides, but features adjacent; value is float64.
        padded: where H*, dV and twice that the bias begin, if not at H; zeros in between, in x and y. Columns after the bias
            are not read.
    """
    half = width if padded is None else padded
    factors = _Factors(x_TNM, y_SM, weight_T, x_TNM.shape[1], width, 2 * half, half)
    _add(factors, rectangles, grad_h_TNH, grad_basis_SK, value)


def target_drift_fwd(
    h_TNH: Tensor,
    basis_SK: Tensor,
    snapshot: Sequence[Tensor],
    targets: Sequence[Tensor],
    importance: Sequence[Tensor],
    weight_T: Tensor,
    plan: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Drift with an importance of each weight, or to given targets, which are read where they lie."""
    (num_tasks, num_chunks, width), chunk_size = h_TNH.shape, len(basis_SK)
    rectangles = rectangles_of(plan, num_tasks, num_chunks, chunk_size)
    for name, rows in (("targets", targets), ("importance", importance)):
        for task_lo, task_hi, chunk_lo, chunk_hi, col_lo, col_hi in rectangles if rows else ():
            if task_lo < task_hi and chunk_lo < chunk_hi and col_lo < col_hi:
                reach = (chunk_hi - 1) * chunk_size + col_hi
                size = rows[0].shape[1] if rows[0].dim() == 2 else min(len(row) for row in rows[task_lo:task_hi])
                if reach > size:
                    raise RuntimeError(f"target_drift: the plan reaches {reach} weights of a task, {name} has {size}")
    xs, ys, bias_S1 = [h_TNH], [basis_SK[:, :width]], basis_SK[:, width:]
    if snapshot:
        h0_TNH, basis0_SK = snapshot
        xs, ys, bias_S1 = [*xs, h0_TNH], [*ys, ys[0] - basis0_SK[:, :width]], bias_S1 - basis0_SK[:, width:]
    half = -(-width // 4) * 4
    x_TND = torch.cat([F.pad(x, (0, half - width)) for x in xs], -1)
    y_SD = torch.cat([*(F.pad(y, (0, half - width)) for y in ys), F.pad(bias_S1, (0, 3))], 1)
    factors = _Factors(x_TND, y_SD, weight_T, num_chunks, width, len(xs) * half, half)
    value = torch.zeros((), dtype=torch.float64, device=h_TNH.device)
    grad_h_TNH, grad_basis_SK = h_TNH.new_zeros(h_TNH.shape), basis_SK.new_zeros(basis_SK.shape)
    _add(factors, rectangles, grad_h_TNH, grad_basis_SK, value, targets, importance)
    return value.to(h_TNH.dtype), grad_h_TNH, grad_basis_SK


class _Factors(NamedTuple):
    x_TND: Tensor
    y_SD: Tensor  # its column ``depth`` is the bias
    weight: Tensor  # one for ``rows_per_weight`` rows of x
    rows_per_weight: int
    width: int
    depth: int
    half: int  # where H* begins, or the depth


def _add(
    factors: _Factors,
    rectangles: Sequence[Sequence[int]],
    grad_h_TNH: Tensor,
    grad_basis_SK: Tensor,
    value: Tensor,
    targets: Sequence[Tensor] = (),
    importance: Sequence[Tensor] = (),
) -> None:
    """The kernels in their order."""
    x_TND, y_SD, weight, rows_per_weight, width, depth, half = factors
    (num_tasks, num_chunks, _), chunk_size, device = x_TND.shape, len(y_SD), x_TND.device
    plan = _schedule(tuple(map(tuple, rectangles)), num_tasks)
    if not plan.num_entries:
        return None
    x_TND, y_SD = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_TND, y_SD))
    strides = x_TND.stride(0), x_TND.stride(1), y_SD.stride(0)
    unit = 1 if any(n % 4 for n in strides) or x_TND.data_ptr() % 16 or y_SD.data_ptr() % 16 else 4

    num_rectangles, num_cols = len(plan.table) // FIELDS.value, plan.col_hi - plan.col_lo
    table, lists = _on_device(plan.table, device), _on_device(plan.lists, device)
    entries = torch.empty(3, plan.num_entries, dtype=torch.int32, device=device)
    _entries_kernel[triton.cdiv(plan.max_rows, 1024), num_rectangles](
        table, entries, plan.num_entries, num_chunks, BLOCK_G=1024
    )

    block_r = 16 if plan.num_entries <= 16 else 64
    block_h = min(128, max(16, triton.next_power_of_2(width)))
    num_h = max(1, min(3, triton.cdiv(width, block_h)))
    groups = max(1, triton.cdiv(width, num_h * block_h))
    programs = min(MAX_PROGRAMS, PARTIAL_COLUMNS // (num_h * block_h))
    cells = [_Cells.of(rows) if rows else _Cells(x_TND, (0,), 1) for rows in (targets, importance)]
    (targets_ptr, importance_ptr), offsets = (c.base for c in cells), [_on_device(c.offsets, device) for c in cells]
    pointers = x_TND, y_SD, weight.contiguous(), entries, targets_ptr, offsets[0], importance_ptr, offsets[1]
    counts = plan.num_entries, num_chunks, rows_per_weight
    sizes = chunk_size, *(n // unit for n in strides), cells[0].stride, cells[1].stride
    options = {
        "WIDTH": width,
        "DEPTH": depth,
        "HALF": half,
        "UNIT": unit,
        "HAS_TARGETS": bool(targets),
        "HAS_IMPORTANCE": bool(importance),
        "PRECISION": dot_precision(),
        "BLOCK_R": block_r,
        "BLOCK_C": BLOCK_C,
        "BLOCK_D": max(16, triton.next_power_of_2(depth)) if depth <= 64 else 32,
        "BLOCK_H": block_h,
        "NUM_H": num_h,
        "num_warps": 8 if num_h > 1 else 4,
        "num_stages": 2,
    }

    tiles = triton.cdiv(plan.num_entries, block_r)
    splits = max(1, min(programs // tiles, triton.cdiv(num_cols, BLOCK_C)))
    partial = x_TND.new_empty(splits, plan.num_entries, width)
    values = value.new_empty(splits, tiles)
    _rows_kernel[tiles, splits, groups](*pointers, partial, values, *counts, *sizes, **options)
    value += values.sum()
    block_h = triton.next_power_of_2(max(1, width))
    block_n = max(1, 2048 // block_h)
    _add_rows_kernel[(num_tasks * triton.cdiv(num_chunks, block_n),)](
        grad_h_TNH,
        _total(partial),
        table,
        lists,
        num_tasks,
        num_chunks,
        *grad_h_TNH.stride()[:2],
        WIDTH=width,
        BLOCK_N=block_n,
        BLOCK_H=block_h,
    )

    tiles = triton.cdiv(num_cols, BLOCK_C)
    splits = max(1, min(programs // tiles, triton.cdiv(plan.num_entries, block_r)))
    partial = x_TND.new_empty(splits, num_cols, width + 1)
    extent = num_rectangles, plan.col_lo, num_cols
    _columns_kernel[tiles, splits, groups](*pointers, partial, table, *counts, *extent, *sizes, **options)
    grad_basis_SK[plan.col_lo : plan.col_hi] += _total(partial)
    return None


def _total(partial: Tensor) -> Tensor:
    return partial.sum(0) if len(partial) > 1 else partial[0]


def rectangles_of(plan: Tensor, num_tasks: int, num_chunks: int, chunk_size: int) -> list[tuple[int, ...]]:
    """The rectangles of a plan, -1 in ``task_hi`` resolved; a RuntimeError for one that leaves the grid."""
    rectangles = []
    for task_lo, task_hi, *rest, _ in plan.tolist():
        rectangle = (task_lo, num_tasks if task_hi < 0 else task_hi, *rest)
        for i, size in enumerate((num_tasks, num_chunks, chunk_size)):
            lo, hi = rectangle[2 * i : 2 * i + 2]
            if not 0 <= lo <= hi <= size:
                raise RuntimeError(f"output_drift: a rectangle of the plan, [{lo}, {hi}), leaves the grid [0, {size})")
        rectangles.append(rectangle)
    return rectangles
