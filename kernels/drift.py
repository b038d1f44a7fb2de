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
from fasthyper.kernels.products import along, down, factor, split, store_parts

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


def padded(width: int) -> int:
    """P of H."""
    return -(-width // 16) * 16


@triton.jit
def _basis_rows(basis, basis0, out, part, L, num_rows, width, P, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    cols = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    at = tl.where(cols < P, cols, cols - P)
    is_bias = cols == 2 * P
    source = tl.where(is_bias, width, at)
    live = (rows < num_rows) & (is_bias | ((cols < 2 * P) & (at < width)))
    now = tl.load(basis + rows.to(tl.int64) * (width + 1) + source, mask=live, other=0.0)
    before = tl.load(basis0 + rows.to(tl.int64) * (width + 1) + source, mask=live & (cols >= P), other=0.0)
    store_parts(out + rows.to(tl.int64) * L + cols, part, now - before, (rows < num_rows) & (cols < L), PARTS)


def basis_rows(basis_SK: Tensor, basis0_SK: Tensor, parts: int) -> Tensor:
    """The factor Y."""
    (rows, k), p = basis_SK.shape, padded(basis_SK.shape[1] - 1)
    out = torch.empty(parts, rows, 2 * p + END, dtype=torch.bfloat16, device=basis_SK.device)
    grid = (triton.cdiv(rows, 16), triton.cdiv(2 * p + END, 128))
    _basis_rows[grid](basis_SK, basis0_SK, *factor(out), rows, k - 1, p, PARTS=parts, BM=16, BN=128)
    return out


@triton.jit
def _symmetric(slabs, num_slabs, num_top, constant, out, width, P, L, BS: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes part of a row on and above the diagonal, and writes it below, too."""
    i, first = tl.program_id(0), tl.program_id(1) * BLOCK
    if first + BLOCK > i:
        j = first + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float64)
        if i < num_top:
            slab = tl.arange(0, BS)[:, None]
            for lo in range(0, num_slabs, BS):
                at = slabs + (lo + slab).to(tl.int64) * num_top * L + i * L + j[None, :]
                some = tl.load(at, mask=(lo + slab < num_slabs) & (j[None, :] >= i) & (j[None, :] < L), other=0.0)
                total += tl.sum(some.to(tl.float64), 0)
        elif constant is not None:
            row, col = tl.where(i == 2 * P, width, i - P), tl.where(j == 2 * P, width, j - P)
            known = (i == 2 * P) | (row < width)
            known = known & (j >= i) & ((j == 2 * P) | (col < width)) & (j <= 2 * P)
            total += tl.load(constant + row * (width + 1) + col, mask=known, other=0.0)
        tl.store(out + i * L + j, total, mask=(j >= i) & (j < L))
        tl.store(out + j * L + i, total, mask=(j > i) & (j < L))


def symmetric(slabs: Tensor, width: int, constant: Tensor | None = None) -> Tensor:
    """The sum of slabs ``[n, I, L]``, float64 ``[L, L]``, from what they hold on and above the diagonal.

    ``constant``, ``[H+1, H+1]``, holds the block below row I = P: of [H* | 1] with itself.
    """
    num_slabs, num_top, length = slabs.shape
    out = torch.empty(length, length, dtype=torch.float64, device=slabs.device)
    grid = (length, triton.cdiv(length, 128))
    _symmetric[grid](slabs, num_slabs, num_top, constant, out, width, padded(width), length, BS=8, BLOCK=128)
    return out


def row_grams(x: Tensor, width: int, num_tasks: int, plan: Plan, gram0: Tensor) -> list[Tensor]:
    """X'X of each rectangle in Gram form, float64 ``[L, L]``; one tensor where rectangles have the same chunks."""
    found: dict[Range, Tensor] = {}
    for i, chunks, _ in plan.gram:
        if chunks not in found:
            rows = x[:, chunks[0] * num_tasks : chunks[1] * num_tasks]
            known = gram0[i] if len(gram0) else None
            top = rows if known is None else rows[..., : padded(width)]
            found[chunks] = symmetric(down(top, rows, upper=True), width, known)
    return [found[chunks] for _, chunks, _ in plan.gram]


def gram_form(
    y: Tensor, width: int, plan: Plan, rows: Sequence[Tensor]
) -> tuple[Tensor, list[tuple[Range, Tensor]], Tensor]:
    """From the Gram matrices of the rows: the value, the columns' Gram matrices, and the gradient of the basis.

    The matrices of the columns, float64 ``[L, L]``, are those that meet each range of chunks.
    """
    parts, num_cols, _ = y.shape
    value = torch.zeros((), dtype=torch.float64, device=y.device)
    p, cols = padded(width), plan.cuts(2)
    covered = sum(hi - lo for (lo, hi), _ in cols)
    grad_basis_SK = (torch.empty if covered == num_cols else torch.zeros)(num_cols, width + 1, device=y.device)
    of_columns: list[list[Tensor]] = [[] for _ in plan.gram]
    for (lo, hi), over in cols:
        some = y[:, lo:hi]
        cols_LL = symmetric(down(some, some, upper=True), width)
        rows_LL = _sum([rows[k] for k in over])
        value = value + torch.dot(rows_LL.view(-1), cols_LL.view(-1))
        # X'X Ha = X'X [H* | 1] + X'X [dH | 0]
        factor_KL = torch.cat([rows_LL[p : p + width] + rows_LL[:width], rows_LL[2 * p : 2 * p + 1]])
        along(some, split(2 * factor_KL, parts), grad_basis_SK[lo:hi])
        for k in over:
            of_columns[k].append(cols_LL)
    met = [(chunks, _sum([c for k in over for c in of_columns[k]])) for chunks, over in plan.cuts(1)]
    return value, met, grad_basis_SK


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def direct_part(
    x: Tensor, y: Tensor, width: int, roots_T: Tensor, plan: Plan, grad_basis_SK: Tensor
) -> tuple[Tensor, Tensor]:
    """Value over direct rectangles, and gradient ``[T, N, H]`` of features as x holds them; adds to that of the basis."""
    scale = torch.where(roots_T > 0, roots_T, 1)
    x_NTL, y_SL = x.float().sum(0).view(-1, len(roots_T), x.shape[2]), y.float().sum(0)
    x_TNL = (x_NTL / scale[:, None]).transpose(0, 1)
    grad_h_TNH = x_TNL.new_zeros(*x_TNL.shape[:2], width)
    value = torch.zeros((), dtype=torch.float64, device=x.device)
    direct_rectangles(x_TNL, roots_T**2, y_SL, width, plan.direct, grad_h_TNH, grad_basis_SK, value, padded(width))
    return value, grad_h_TNH / scale[:, None, None]
