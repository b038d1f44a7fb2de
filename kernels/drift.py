"""The drift's Gram form behind given features (DESIGN E2): columns, rows, and what ties them.

Features of R rows lie as X [R, L], L = 2 P + 16: [dH | H* | 1 0 ...], each half filled up from H to P columns with zeros, both
multiples of 16, which Triton wants to know before it loads 16 bytes at a time. Row r is chunk r // T of task r % T: chunks that follow each other are rows that do. Of a
hidden layer the second half is the features now. The basis lies as Y [S, L]: [V_H | dV | bias of dV 0 ...].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasthyper.kernels.direct import direct_rectangles
from fasthyper.kernels.products import along, down

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
        for i, (task_lo, task_hi, *bounds, direct) in enumerate(plan.tolist()):
            task_hi = num_tasks if task_hi < 0 else task_hi
            chunk_lo, chunk_hi, col_lo, col_hi = bounds
            for lo, hi, size in (task_lo, task_hi, num_tasks), (chunk_lo, chunk_hi, num_chunks), (col_lo, col_hi, num_cols):
                if not 0 <= lo <= hi <= size:
                    raise RuntimeError(f"output_drift: a rectangle of the plan, [{lo}, {hi}), leaves the grid [0, {size})")
            if task_lo == task_hi or chunk_lo == chunk_hi or col_lo == col_hi:
                continue
            if direct or task_hi - task_lo < num_tasks:
                found.direct.append([task_lo, task_hi, *bounds])
            else:
                found.gram.append((i, (chunk_lo, chunk_hi), (col_lo, col_hi)))
        return found

    def cuts(self, which: int) -> list[tuple[Range, list[int]]]:
        """The ranges of chunks (1) or columns (2) that no edge of a rectangle cuts, and the rectangles over each."""
        edges = sorted({edge for rectangle in self.gram for edge in rectangle[which]})
        ranges = list(zip(edges, edges[1:]))
        over = [[k for k, r in enumerate(self.gram) if r[which][0] <= lo and hi <= r[which][1]] for lo, hi in ranges]
        return [(span, found) for span, found in zip(ranges, over) if found]


def padded(width: int) -> int:
    """P of H."""
    return -(-width // 16) * 16


@triton.jit
def _basis_rows(basis, basis0, out, num_rows, width, P, L, BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    cols = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    at = tl.where(cols < P, cols, cols - P)
    is_bias = cols == 2 * P
    source = tl.where(is_bias, width, at)
    live = (rows < num_rows) & (is_bias | ((cols < 2 * P) & (at < width)))
    now = tl.load(basis + rows * (width + 1) + source, mask=live, other=0.0)
    before = tl.load(basis0 + rows * (width + 1) + source, mask=live & (cols >= P), other=0.0)
    tl.store(out + rows.to(tl.int64) * L + cols, now - before, mask=(rows < num_rows) & (cols < L))


def basis_rows(basis_SK: Tensor, basis0_SK: Tensor) -> Tensor:
    """Y ``[S, L]``."""
    (rows, k), p = basis_SK.shape, padded(basis_SK.shape[1] - 1)
    out = basis_SK.new_empty(rows, 2 * p + END)
    grid = (triton.cdiv(rows, 16), triton.cdiv(2 * p + END, 128))
    _basis_rows[grid](basis_SK.contiguous(), basis0_SK.contiguous(), out, rows, k - 1, p, 2 * p + END, BM=16, BN=128)
    return out


@triton.jit
def _symmetric(parts, num_parts, num_top, constant, out, width, P, L, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i, j = at // L, at % L
    row, col = tl.minimum(i, j), tl.maximum(i, j)
    made = (at < L * L) & (row < num_top)
    total = tl.zeros((BLOCK,), tl.float64)
    cell = parts + row * L + col
    for _ in range(num_parts):
        total += tl.load(cell, mask=made, other=0.0).to(tl.float64)
        cell += num_top * L
    if constant is not None:
        row0, col0 = tl.where(row == 2 * P, width, row - P), tl.where(col == 2 * P, width, col - P)
        known = (at < L * L) & (row >= num_top)
        known = known & ((row == 2 * P) | (row - P < width)) & ((col == 2 * P) | (col - P < width)) & (col <= 2 * P)
        total += tl.load(constant + row0 * (width + 1) + col0, mask=known, other=0.0)
    tl.store(out + at, total, mask=at < L * L)


def symmetric(parts: Tensor, width: int, constant: Tensor | None = None) -> Tensor:
    """The sum of parts ``[n, I, L]``, float64 ``[L, L]``, from what they hold on and above the diagonal.

    ``constant``, ``[H+1, H+1]``, holds the block below row I = P: of [H* | 1] with itself.
    """
    num_parts, num_top, length = parts.shape
    out = torch.empty(length, length, dtype=torch.float64, device=parts.device)
    grid = (triton.cdiv(length * length, 512),)
    _symmetric[grid](parts, num_parts, num_top, constant, out, width, padded(width), length, BLOCK=512)
    return out


def row_grams(x_RL: Tensor, width: int, weight_T: Tensor, plan: Plan, gram0: Tensor, parts: int) -> list[Tensor]:
    """X'WX of each rectangle in Gram form, float64 ``[L, L]``; one tensor where rectangles have the same chunks."""
    found: dict[Range, Tensor] = {}
    for i, chunks, _ in plan.gram:
        if chunks not in found:
            rows = x_RL[chunks[0] * len(weight_T) : chunks[1] * len(weight_T)]
            known = gram0[i] if len(gram0) else None
            top = rows if known is None else rows[:, : padded(width)]
            found[chunks] = symmetric(down(top, rows, parts, weight_T, upper=True), width, known)
    return [found[chunks] for _, chunks, _ in plan.gram]


def gram_form(
    y_SL: Tensor, width: int, plan: Plan, rows: Sequence[Tensor], parts: int
) -> tuple[Tensor, list[tuple[Range, Tensor]], Tensor]:
    """From the Gram matrices of the rows: the value, the columns' Gram matrices, and the gradient of the basis.

    The matrices of the columns, float64 ``[L, L]``, are those that meet each range of chunks.
    """
    value = torch.zeros((), dtype=torch.float64, device=y_SL.device)
    p, cols = padded(width), plan.cuts(2)
    covered = sum(hi - lo for (lo, hi), _ in cols)
    grad_basis_SK = (torch.empty if covered == len(y_SL) else torch.zeros)(len(y_SL), width + 1, device=y_SL.device)
    of_columns: list[list[Tensor]] = [[] for _ in plan.gram]
    for (lo, hi), over in cols:
        some = y_SL[lo:hi]
        cols_LL = symmetric(down(some, some, parts, upper=True), width)
        rows_LL = _sum([rows[k] for k in over])
        value = value + (rows_LL * cols_LL).sum()
        # X'W Ha = X'W [H* | 1] + X'W [dH | 0]
        factor_KL = 2 * torch.cat([rows_LL[p : p + width] + rows_LL[:width], rows_LL[2 * p : 2 * p + 1]])
        along(some, factor_KL.float(), grad_basis_SK[lo:hi], parts)
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
    x_RL: Tensor, y_SL: Tensor, width: int, plan: Plan, weight_T: Tensor, grad_basis_SK: Tensor
) -> tuple[Tensor, Tensor]:
    """Value and gradient of the features ``[T, N, H]`` over direct rectangles; adds to the gradient of the basis."""
    p, num_tasks = padded(width), len(weight_T)
    x_NTM, y_SM = (torch.cat([m[:, :width], m[:, p : p + width], m[:, 2 * p : 2 * p + 1]], 1) for m in (x_RL, y_SL))
    x_TNM = x_NTM.view(-1, num_tasks, 2 * width + 1).transpose(0, 1).contiguous()
    grad_h_TNH = x_TNM.new_zeros(*x_TNM.shape[:2], width)
    value = torch.zeros((), dtype=torch.float64, device=x_RL.device)
    direct_rectangles(x_TNM, weight_T, y_SM, width, plan.direct, grad_h_TNH, grad_basis_SK, value)
    return value, grad_h_TNH
