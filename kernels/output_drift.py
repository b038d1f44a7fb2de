"""The drift behind features that are given (DESIGN E2): they are laid as ``drift.py`` wants them, and meet the columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasthyper.kernels.drift import END, Plan, basis_rows, direct_part, gram_form, right, row_grams
from fasthyper.kernels.products import Factor, along, num_parts, padded, raise_peaks, scale_for, store_parts, strides


@triton.jit
def _feature_rows(
    dh, h0, roots, peaks, scales, x, part, L, num_tasks, num_chunks, width, P,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, col = (
        tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None],
        tl.program_id(1) * BN + tl.arange(0, BN)[None, :],
    )
    task, chunk = row % num_tasks, row // num_tasks
    at = (task * num_chunks + chunk) * width + tl.where(col < P, col, col - P)
    exists, drifts = chunk < num_chunks, col < width
    value = tl.load(dh + at, mask=exists & drifts, other=0.0)
    value += tl.load(h0 + at, mask=exists & (col >= P) & (col - P < width), other=0.0)
    value = tl.where(col == 2 * P, 1.0, value) * tl.load(roots + task)
    of_drift, of_features = scale_for(tl.load(peaks)), scale_for(tl.load(peaks + 1))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scales, of_drift)
        tl.store(scales + 1, of_features)
    value *= tl.where(drifts, of_drift, of_features)
    store_parts(x + row * L + col, part, value, exists & (col < L), PARTS)


def output_drift_fwd(
    dh_TNH: Tensor,
    basis_SK: Tensor,
    h0_TNH: Tensor,
    basis0_SK: Tensor,
    weight_T: Tensor,
    plan: Tensor,
    precision: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """E2, the Gram matrix of H* made anew."""
    (num_tasks, num_chunks, width), parts = dh_TNH.shape, num_parts(precision)
    rectangles = Plan.of(plan, num_tasks, num_chunks, len(basis_SK))
    if not rectangles.gram and not rectangles.direct:
        return dh_TNH.new_zeros(()), torch.zeros_like(dh_TNH), torch.zeros_like(basis_SK)
    p, rows = padded(width), num_tasks * num_chunks
    dh_TNH, h0_TNH, roots = dh_TNH.contiguous(), h0_TNH.contiguous(), weight_T.sqrt()
    numbers = roots.new_zeros(4)
    peaks, scales = numbers.split(2)
    raise_peaks(dh_TNH, h0_TNH, peaks)
    peaks[1].clamp_(min=1)
    peaks *= roots.max()
    x = Factor(torch.empty(parts, rows, 2 * p + END, dtype=torch.float16, device=dh_TNH.device), scales, p)
    grid = (triton.cdiv(rows, 16), triton.cdiv(2 * p + END, 128))
    sizes = num_tasks, num_chunks, width, p
    tensors = dh_TNH, h0_TNH, roots, peaks, scales
    _feature_rows[grid](*tensors, *strides(x.parts), *sizes, PARTS=parts, BM=16, BN=128)
    y = basis_rows(basis_SK.contiguous(), basis0_SK.contiguous(), parts)
    grams = row_grams(x, width, num_tasks, rectangles, weight_T.new_empty(0))
    value, met, grad_basis_SK = gram_form(y, width, rectangles, grams)
    grad_RH = dh_TNH.new_zeros(rows, width)
    for (lo, hi), cols_LL in met:
        lo, hi = lo * num_tasks, hi * num_tasks
        along(x.rows(lo, hi), right(cols_LL, x, width), grad_RH[lo:hi])
    grad_TNH = grad_RH.view(num_chunks, num_tasks, width).transpose(0, 1)
    if rectangles.direct:
        more, extra_TNH = direct_part(x.whole(), y, width, roots, rectangles, grad_basis_SK)
        value, grad_TNH = value + more, grad_TNH + extra_TNH
    return value.clamp(min=0).to(dh_TNH.dtype), (roots[:, None, None] * grad_TNH).contiguous(), grad_basis_SK
