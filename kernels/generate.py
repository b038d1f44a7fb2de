"""Weights from features and back (DESIGN E3), where they are wide: [h | 1] meets the basis, both split in float16 parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasthyper.kernels.products import (
    Factor,
    Right,
    dot_along,
    down,
    num_parts,
    num_tiles,
    padded,
    raise_peaks,
    scale_for,
    store_parts,
    strides,
    tile,
)

TILE = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3}
NARROWEST, FEWEST = 64, 1 << 18  # features, weights: fewer are left to cuBLAS


def is_wide(h_NH: Tensor, basis_SK: Tensor) -> bool:
    """Whether float32 parts cost less than they save."""
    return h_NH.dtype == torch.float32 and h_NH.shape[1] >= NARROWEST and len(h_NH) * len(basis_SK) >= FEWEST


@triton.jit
def _rows(
    source, size, lds, peak, scales, out, part, ldo, inverse, num_rows, width, columns,
    ONES: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows of ``source``, which ends after ``size`` numbers; all by one power of two, or (no ``peak``) each by its own."""
    row = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    col = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    at = row.to(tl.int64) * lds + col
    value = tl.load(source + at, mask=(row < num_rows) & (col < width) & (at < size), other=0.0)
    if ONES:
        value = tl.where((col == width) & (row < num_rows), 1.0, value)
    if peak is None:
        scale = scale_for(tl.max(tl.abs(value), 1))[:, None]
        tl.store(inverse + row, 1 / scale, mask=row < num_rows)
    else:
        bound = tl.load(peak)
        if ONES:
            bound = tl.maximum(bound, 1.0)
        scale = scale_for(bound)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(scales, scale)
            tl.store(scales + 1, scale)
    store_parts(out + row.to(tl.int64) * ldo + col, part, value * scale, (row < num_rows) & (col < columns), PARTS)


def _each_row(matrix: Tensor, parts: int, *, ones: bool) -> Right:
    """Rows ``[R, C]``, or with a one behind, each by a power of two of its own."""
    (rows, width), columns = matrix.shape, padded(matrix.shape[1] + ones)
    out = torch.empty(parts, rows, columns, dtype=torch.float16, device=matrix.device)
    inverse_R = matrix.new_empty(rows)
    block = triton.next_power_of_2(columns)
    at_once = max(1, 4096 // block)
    _rows[(triton.cdiv(rows, at_once), 1)](
        *(matrix, matrix.numel(), width, None, None, *strides(out), inverse_R, rows, width, columns),
        **{"ONES": ones, "PARTS": parts, "BM": at_once, "BN": block},
    )
    return Right(out, inverse_R)


def _all_rows(flat: Tensor, rows: int, width: int, parts: int, peak: Tensor, *, ones: bool) -> Factor:
    """Rows ``[R, C]`` that may end early, or with a one behind; none of their numbers is above ``peak``."""
    columns = padded(width + ones)
    out = torch.empty(parts, rows, columns, dtype=torch.float16, device=flat.device)
    scales = flat.new_empty(2)
    grid = (triton.cdiv(rows, 8), triton.cdiv(columns, 256))
    _rows[grid](
        *(flat, flat.numel(), width, peak, scales, *strides(out), None, rows, width, columns),
        **{"ONES": ones, "PARTS": parts, "BM": 8, "BN": 256},
    )
    return Factor(out, scales, columns)


@triton.jit
def _generate(
    h, h_part, ldh, h_inverse, basis, basis_part, ldb, basis_inverse, out, size, num_rows, num_cols, depth,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row0, col0 = tile(num_cols, BM, BN)
    left, num_left = (num_rows - row0).to(tl.int32), num_cols - col0
    acc = tl.zeros((BM, BN), tl.float32)
    h += row0 * ldh
    basis += col0 * ldb
    acc = dot_along(acc, h, h_part, ldh, left, basis, basis_part, ldb, num_left, depth, BM, BN, BK, PARTS)
    row, col = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    acc *= tl.load(h_inverse + row0 + row, mask=row < left, other=0.0)
    acc *= tl.load(basis_inverse + col0 + col, mask=col < num_left, other=0.0)
    at = (row0 + row) * num_cols + col0 + col
    tl.store(out + at, acc, mask=(row < left) & (col < num_left) & (at < size))


def generate_fwd(h_NH: Tensor, basis_SK: Tensor, num_weights: int) -> Tensor:
    """One product, cut short where the last chunk is."""
    parts, (rows, cols) = num_parts(3), (len(h_NH), len(basis_SK))
    h, basis = _each_row(h_NH.contiguous(), parts, ones=True), _each_row(basis_SK.contiguous(), parts, ones=False)
    out = h_NH.new_empty(num_weights)
    _generate[(num_tiles(rows, cols, TILE),)](
        *(*strides(h.parts), h.inverse_J, *strides(basis.parts), basis.inverse_J),
        *(out, num_weights, rows, cols, basis.parts.shape[2]),
        **{"PARTS": parts},
        **TILE,
    )
    return out


def generate_bwd(grads: Sequence[Tensor], h_NH: Tensor, basis_SK: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the basis is a product down the rows; that of the features, few numbers of long sums, is cuBLAS's."""
    (num_chunks, width), chunk_size, parts = h_NH.shape, len(basis_SK), num_parts(3)
    missing = num_chunks * chunk_size - sum(grad.numel() for grad in grads)
    flat = torch.cat([*(grad.flatten() for grad in grads), h_NH.new_zeros(missing)])
    peaks = flat.new_zeros(2)
    h_NH = h_NH.contiguous()
    raise_peaks(flat, h_NH.flatten(), peaks)
    grad = _all_rows(flat, num_chunks, chunk_size, parts, peaks, ones=False).columns(0, chunk_size)
    made = down(grad, _all_rows(h_NH, num_chunks, width, parts, peaks[1:], ones=True))  # rows of whole 64 bytes
    whole = made[0] if len(made) == 1 else made.sum(0)
    return flat.view(num_chunks, chunk_size) @ basis_SK[:, :width], whole[:, : width + 1].contiguous()
