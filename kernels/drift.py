"""The drift's Gram form behind given features (DESIGN E2): columns, rows, and what ties them.

Features of R rows are a factor X of L = 2 P + 16 columns, [dH | H* | 1 0 ...]: each half filled up from H to P columns with
zeros, both multiples of 16, which Triton wants to know before it loads 16 bytes at a time. A task's rows are multiplied by
the root of its weight. Row r is chunk r // T of task r % T, so that chunks that follow each other are rows that do. Of a
hidden layer the second half is the features now. The basis is a factor Y of as many columns: [V_H | dV | bias of dV 0 ...].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasthyper.kernels.direct import direct_rectangles, rectangles_of
from fasthyper.kernels.products import Factor, Right, along, down, padded, raise_peaks, scale_for, store_parts, strides

Range = tuple[int, int]
END = 16  # columns after both halves: a one, and zeros


class Plan(NamedTuple):
    """Rectangles in Gram form, each with its row of the plan; and direct ones."""

    gram: list[tuple[int, Range, Range]]  # row of the plan, chunks, columns
    direct: list[list[int]]

    @staticmethod
    def of(plan: Tensor, num_tasks: int, num_chunks: int, num_cols: int) -> Plan:
        """A rectangle of some tasks only, a head's, is direct: its rows do not lie together."""
        found = Plan([], [])
        rectangles = rectangles_of(plan, num_tasks, num_chunks, num_cols)
        for i, (rectangle, direct) in enumerate(zip(rectangles, plan[:, 6].tolist(), strict=True)):
            task_lo, task_hi, chunk_lo, chunk_hi, col_lo, col_hi = rectangle
            if task_lo == task_hi or chunk_lo == chunk_hi or col_lo == col_hi:
                continue
            if direct or task_hi - task_lo < num_tasks:
                found.direct.append(list(rectangle))
            else:
                found.gram.append((i, (chunk_lo, chunk_hi), (col_lo, col_hi)))
        return found

    def cuts(self, which: int) -> list[tuple[Range, list[int]]]:
        """The ranges of chunks (1) or columns (2) that no edge of a rectangle cuts, and the rectangles over each."""
        spans = [(chunks, cols)[which - 1] for _, chunks, cols in self.gram]
        ranges = list(pairwise(sorted({edge for span in spans for edge in span})))
        over = [[k for k, span in enumerate(spans) if span[0] <= lo and hi <= span[1]] for lo, hi in ranges]
        return [(span, found) for span, found in zip(ranges, over, strict=True) if found]


@triton.jit
def _basis_rows(
    basis, basis0, peaks, scales, out, part, L, num_rows, width, P, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    cols = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    at = tl.where(cols < P, cols, cols - P)
    is_bias = cols == 2 * P
    source = tl.where(is_bias, width, at)
    live = (rows < num_rows) & (is_bias | ((cols < 2 * P) & (at < width)))
    now = tl.load(basis + rows.to(tl.int64) * (width + 1) + source, mask=live, other=0.0)
    before = tl.load(basis0 + rows.to(tl.int64) * (width + 1) + source, mask=live & (cols >= P), other=0.0)
    of_weights, of_drift = scale_for(tl.load(peaks)), scale_for(tl.load(peaks + 1))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scales, of_weights)
        tl.store(scales + 1, of_drift)
    value = (now - before) * tl.where(cols < P, of_weights, of_drift)
    store_parts(out + rows.to(tl.int64) * L + cols, part, value, (rows < num_rows) & (cols < L), PARTS)


def basis_rows(basis_SK: Tensor, basis0_SK: Tensor, parts: int) -> Factor:
    """The factor Y."""
    (rows, k), p = basis_SK.shape, padded(basis_SK.shape[1] - 1)
    numbers = basis_SK.new_zeros(4)
    peaks, scales = numbers.split(2)
    out = torch.empty(parts, rows, 2 * p + END, dtype=torch.float16, device=basis_SK.device)
    if rows:
        raise_peaks(basis_SK, basis0_SK, peaks, difference=True)
        grid = (triton.cdiv(rows, 16), triton.cdiv(2 * p + END, 128))
        tensors = basis_SK, basis0_SK, peaks, scales
        _basis_rows[grid](*tensors, *strides(out), rows, k - 1, p, PARTS=parts, BM=16, BN=128)
    return Factor(out, scales, p)


@triton.jit
def _right(
    matrix, lda, scales, half, peaks, bound, out, part, ldo, inverse, length, width, P,
    SUMS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0), tl.arange(0, BLOCK)
    mask, first = j < length, i
    if SUMS:
        first = tl.where(i < width, i + P, 2 * P)
    value = tl.load(matrix + first * lda + j, mask=mask, other=0.0)
    if SUMS:
        value += tl.load(matrix + i * lda + j, mask=mask & (i < width), other=0.0)
    is_left = j < half
    value = (2 * value).to(tl.float32)
    if bound is not None:
        peak = tl.where(is_left, tl.load(peaks), tl.load(peaks + 1))
        tl.atomic_max(bound, tl.sum(tl.abs(value) * peak, 0), sem="relaxed")
    value /= tl.where(is_left, tl.load(scales), tl.load(scales + 1))
    scale = scale_for(tl.max(tl.abs(value), 0))
    store_parts(out + i * ldo + j, part, value * scale, mask, PARTS)
    tl.store(inverse + i, 1 / scale)


def right(
    gram_LL: Tensor,
    left: Factor,
    width: int,
    *,
    sums: bool = False,
    bound: Tensor | None = None,
    peaks: Tensor | None = None,
) -> Right:
    """What ``left``, of L columns, is multiplied by: twice the first ``width`` rows of a symmetric matrix, float64.

    Args:
        sums: [dH | H* | 1]'s Gram matrix: to each row is added the one of the other half, and the last one comes behind.
        bound: 1 number, raised to what no product of a row with ``left`` exceeds, whose two halves nowhere exceed ``peaks``.
    """
    length, rows = gram_LL.shape[1], width + sums
    out = torch.empty(len(left.parts), rows, length, dtype=torch.float16, device=gram_LL.device)
    inverse_J = torch.empty(rows, device=gram_LL.device)
    sizes = length, width, padded(width)
    _right[(rows,)](
        *(gram_LL, gram_LL.stride(0), left.scales, left.half, peaks, bound, *strides(out), inverse_J, *sizes),
        **{"SUMS": sums, "PARTS": len(out), "BLOCK": triton.next_power_of_2(length)},
    )
    return Right(out, inverse_J)


@triton.jit
def _symmetric(slabs, num_slabs, num_top, constant, out, width, P, L, BLOCK: tl.constexpr):
    """A program takes a tile on or above the diagonal, and writes it below, too."""
    if tl.program_id(1) < tl.program_id(0):
        return
    i0, j0 = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    down, right = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    i, j = i0 + down, j0 + right
    total = tl.zeros((BLOCK, BLOCK), tl.float64)
    slabs += i * L + j
    for _ in range(num_slabs):
        total += tl.load(slabs, mask=(i < num_top) & (j < L), other=0.0).to(tl.float64)
        slabs += num_top * L
    if constant is not None:
        row, col = tl.where(i == 2 * P, width, i - P), tl.where(j == 2 * P, width, j - P)
        known = (
            (i >= num_top) & ((i == 2 * P) | (row < width)) & ((j == 2 * P) | (col < width)) & (i <= 2 * P) & (j <= 2 * P)
        )
        total += tl.load(constant + row * (width + 1) + col, mask=known & (j >= i), other=0.0)
    tl.store(out + i * L + j, total, mask=(j >= i) & (j < L))
    mirrored_i, mirrored_j = j0 + down, i0 + right
    tl.store(out + mirrored_i * L + mirrored_j, tl.trans(total), mask=(mirrored_i > mirrored_j) & (mirrored_i < L))


def symmetric(slabs: Tensor, width: int, constant: Tensor | None = None) -> Tensor:
    """The sum of slabs ``[n, I, L]``, float64 ``[L, L]``, from what they hold on and above the diagonal.

    ``constant``, ``[H+1, H+1]``, holds the block below row I = P: of [H* | 1] with itself.
    """
    num_slabs, num_top, length = slabs.shape
    out = torch.empty(length, length, dtype=torch.float64, device=slabs.device)
    grid = (triton.cdiv(length, 32),) * 2
    _symmetric[grid](slabs, num_slabs, num_top, constant, out, width, padded(width), length, BLOCK=32)
    return out


def row_grams(x: Factor, width: int, num_tasks: int, plan: Plan, gram0: Tensor) -> list[Tensor]:
    """X'X of each rectangle in Gram form, float64 ``[L, L]``; one tensor where rectangles have the same chunks."""
    found: dict[Range, Tensor] = {}
    for i, chunks, _ in plan.gram:
        if chunks not in found:
            rows = x.rows(chunks[0] * num_tasks, chunks[1] * num_tasks)
            known = gram0[i] if len(gram0) else None
            top = rows if known is None else rows.columns(0, padded(width))
            found[chunks] = symmetric(down(top, rows, upper=True), width, known)
    return [found[chunks] for _, chunks, _ in plan.gram]


def gram_form(
    y: Factor, width: int, plan: Plan, rows: Sequence[Tensor]
) -> tuple[Tensor, list[tuple[Range, Tensor]], Tensor]:
    """From the Gram matrices of the rows: the value, the columns' Gram matrices, and the gradient of the basis.

    The matrices of the columns, float64 ``[L, L]``, are those that meet each range of chunks.
    """
    num_cols, device, cols = y.parts.shape[1], y.parts.device, plan.cuts(2)
    values: list[Tensor] = []
    covered = sum(hi - lo for (lo, hi), _ in cols)
    grad_basis_SK = (torch.empty if covered == num_cols else torch.zeros)(num_cols, width + 1, device=device)
    of_columns: list[list[Tensor]] = [[] for _ in plan.gram]
    for (lo, hi), over in cols:
        some = y.rows(lo, hi)
        cols_LL = symmetric(down(some, some, upper=True), width)
        rows_LL = _sum([rows[k] for k in over])
        values.append(torch.dot(rows_LL.view(-1), cols_LL.view(-1)))
        along(some, right(rows_LL, y, width, sums=True), grad_basis_SK[lo:hi])  # X'X Ha = X'X [H* | 1] + X'X [dH | 0]
        for k in over:
            of_columns[k].append(cols_LL)
    met = [(chunks, _sum([c for k in over for c in of_columns[k]])) for chunks, over in plan.cuts(1)]
    return _sum(values) if values else torch.zeros((), dtype=torch.float64, device=device), met, grad_basis_SK


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def direct_part(
    x_RL: Tensor, y: Factor, width: int, roots_T: Tensor, plan: Plan, grad_basis_SK: Tensor
) -> tuple[Tensor, Tensor]:
    """Value over direct rectangles, and gradient ``[T, N, H]`` of features as x holds them; adds to that of the basis."""
    scale = torch.where(roots_T > 0, roots_T, 1)
    x_TNL = (x_RL.float().view(-1, len(roots_T), x_RL.shape[1]) / scale[:, None]).transpose(0, 1)
    grad_h_TNH = x_TNL.new_zeros(*x_TNL.shape[:2], width)
    value = torch.zeros((), dtype=torch.float64, device=x_RL.device)
    direct_rectangles(x_TNL, roots_T**2, y.whole(), width, plan.direct, grad_h_TNH, grad_basis_SK, value, padded(width))
    return value, grad_h_TNH / scale[:, None, None]
