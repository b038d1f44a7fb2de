"""Products of float32 matrices on tensor cores, along rows and down columns, from factors split in bfloat16 parts.

A float32 is the sum of three bfloat16, each the rounded rest of those before. A factor of R rows lies as its parts,
``[parts, R, C]``, each in float32's range and half its size; of three parts six products reach the last bit of a float32,
of two, three products 16 bits. Factors are split once, where they are made, and read as tensor cores take them, along
either dimension. Sums are in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasthyper.kernels.precision import factor_precision

ALONG_TILE = {"BM": 128, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3}
DOWN_TILE = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3}
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # its products do not know bfloat16
PROGRAMS = 1056  # that a product down columns should have at most: eight for each multiprocessor of an H100


def num_parts(precision: int) -> int:
    """The parts of ``precision``, as ops name it, or fewer where torch's own switch allows it."""
    return min(precision, {"tf32x3": 3, "tf32": 2, "bf16": 1}[factor_precision()])


@triton.jit
def store_parts(at, part, value, mask, PARTS: tl.constexpr):
    for i in tl.static_range(PARTS):
        rounded = value.to(tl.bfloat16)
        tl.store(at + i * part, rounded, mask=mask)
        value -= rounded.to(tl.float32)


@triton.jit
def _dot(x, y, acc):
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc)


@triton.jit
def _add_product(acc, a, a_part, a_mask, b, b_part, b_mask, PARTS: tl.constexpr):
    """acc + a b, of the parts' products those of the first bits last."""
    x0, y0 = tl.load(a, mask=a_mask, other=0.0), tl.load(b, mask=b_mask, other=0.0)
    if PARTS > 1:
        x1, y1 = tl.load(a + a_part, mask=a_mask, other=0.0), tl.load(b + b_part, mask=b_mask, other=0.0)
        if PARTS > 2:
            x2, y2 = tl.load(a + 2 * a_part, mask=a_mask, other=0.0), tl.load(b + 2 * b_part, mask=b_mask, other=0.0)
            acc = _dot(x2, y0, acc)
            acc = _dot(x0, y2, acc)
            acc = _dot(x1, y1, acc)
        acc = _dot(x1, y0, acc)
        acc = _dot(x0, y1, acc)
    return _dot(x0, y0, acc)


@triton.jit
def dot_along(
    acc, a, a_part, lda, num_rows, b, b_part, ldb, num_cols, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """acc + a[:BM, :depth] b[:BN, :depth]', of which there are ``num_rows`` and ``num_cols``."""
    row, col, k = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :], tl.arange(0, BK)
    at, bt = row * lda + k[None, :], col * ldb + k[:, None]
    for lo in range(0, depth, BK):
        x_mask, y_mask = (row < num_rows) & (k[None, :] + lo < depth), (col < num_cols) & (k[:, None] + lo < depth)
        acc = _add_product(acc, a + at, a_part, x_mask, b + bt, b_part, y_mask, PARTS)
        a += BK
        b += BK
    return acc


@triton.jit
def tile(num_cols, BM: tl.constexpr, BN: tl.constexpr):
    """First row (64 bits, for what is multiplied by it) and column of a program's tile, column tiles next to each other."""
    tiles = tl.maximum(tl.cdiv(num_cols, BN), 1)
    return (tl.program_id(0) // tiles).to(tl.int64) * BM, (tl.program_id(0) % tiles) * BN


@triton.jit
def _along(
    a, a_part, lda, b, b_part, ldb, out, ldo, num_rows, num_cols, depth,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row0, col0 = tile(num_cols, BM, BN)
    num_rows, num_cols = (num_rows - row0).to(tl.int32), num_cols - col0
    a, b = a + row0 * lda, b + col0 * ldb
    acc = tl.zeros((BM, BN), tl.float32)
    acc = dot_along(acc, a, a_part, lda, num_rows, b, b_part, ldb, num_cols, depth, BM, BN, BK, PARTS)
    row, col = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    tl.store(out + row0 * ldo + col0 + row * ldo + col, acc, mask=(row < num_rows) & (col < num_cols))


@triton.jit
def _down(
    a, a_part, lda, b, b_part, ldb, out, num_rows, num_a, num_b, per_slab,
    UPPER: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i0, j0 = tile(num_b, BM, BN)
    if UPPER and j0 + BN <= i0:
        return
    first = tl.program_id(1).to(tl.int64) * per_slab
    i, j, k = (i0 + tl.arange(0, BM)).to(tl.int32)[:, None], j0 + tl.arange(0, BN)[None, :], tl.arange(0, BK)
    at, bt = k[None, :] * lda + i, k[:, None] * ldb + j
    a += first * lda
    b += first * ldb
    left = tl.minimum(num_rows - first, per_slab).to(tl.int32)
    acc = tl.zeros((BM, BN), tl.float32)
    for lo in range(0, left, BK):
        x_mask, y_mask = (k[None, :] + lo < left) & (i < num_a), (k[:, None] + lo < left) & (j < num_b)
        acc = _add_product(acc, a + at, a_part, x_mask, b + bt, b_part, y_mask, PARTS)
        a += BK * lda
        b += BK * ldb
    at = out + tl.program_id(1).to(tl.int64) * num_a * num_b + i * num_b + j
    tl.store(at, acc, mask=(i < num_a) & (j < num_b))


def factor(t: Tensor) -> tuple[Tensor, int, int]:
    """What kernels are told of a factor ``[parts, R, C]``."""
    return t, t.stride(0), t.stride(1)


def num_tiles(rows: int, cols: int, tile: Mapping[str, int]) -> int:
    """Programs of a product along rows, at least one for each tile of rows."""
    return triton.cdiv(rows, tile["BM"]) * max(1, triton.cdiv(cols, tile["BN"]))


def along(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b' for factors of ``[R, D]`` and ``[C, D]``."""
    (parts, rows, depth), cols = a.shape, b.shape[1]
    if rows and cols:
        sizes = out, out.stride(0), rows, cols, depth
        _along[(num_tiles(rows, cols, ALONG_TILE),)](*factor(a), *factor(b), *sizes, PARTS=parts, **ALONG_TILE)


def down(a: Tensor, b: Tensor, *, upper: bool = False) -> Tensor:
    """a' b of slabs of rows, float32 ``[slabs, I, J]``, to be summed, for factors of ``[R, I]`` and ``[R, J]``.

    ``upper``: what lies below the diagonal need not be made.
    """
    (parts, rows, num_a), num_b, (bm, bn, bk, *_) = a.shape, b.shape[2], DOWN_TILE.values()
    tiles = triton.cdiv(num_a, bm) * triton.cdiv(num_b, bn)
    slabs = max(1, min(triton.cdiv(rows, 8 * bk), PROGRAMS // max(1, tiles)))
    per_slab = max(bk, triton.cdiv(triton.cdiv(rows, slabs), bk) * bk)
    slabs = max(1, triton.cdiv(rows, per_slab))
    out = torch.empty(slabs, num_a, num_b, device=a.device)
    if tiles:
        sizes = out, rows, num_a, num_b, per_slab
        _down[(tiles, slabs)](*factor(a), *factor(b), *sizes, UPPER=upper, PARTS=parts, **DOWN_TILE)
    return out


@triton.jit
def _split(source, out, part, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + at, mask=at < size, other=0.0).to(tl.float32)
    store_parts(out + at, part, value, at < size, PARTS)


def split(matrix: Tensor, parts: int) -> Tensor:
    """A factor of a small matrix."""
    matrix = matrix.contiguous()
    out = torch.empty(parts, *matrix.shape, dtype=torch.bfloat16, device=matrix.device)
    if matrix.numel():
        _split[(triton.cdiv(matrix.numel(), 1024),)](matrix, out, matrix.numel(), matrix.numel(), PARTS=parts, BLOCK=1024)
    return out


@triton.jit
def _collapse(slabs, num_slabs, out, size, BS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    slab = tl.arange(0, BS)[:, None]
    total = tl.zeros((BLOCK,), tl.float64)
    for lo in range(0, num_slabs, BS):
        some = tl.load(slabs + (lo + slab).to(tl.int64) * size + at, mask=(lo + slab < num_slabs) & (at < size), other=0.0)
        total += tl.sum(some.to(tl.float64), 0)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, total.to(tl.float32), mask=at < size)


def collapse(slabs: Tensor) -> Tensor:
    """The sum of ``[slabs, I, J]``."""
    if len(slabs) == 1:
        return slabs[0]
    out = torch.empty_like(slabs[0])
    if out.numel():
        _collapse[(triton.cdiv(out.numel(), 128),)](slabs, len(slabs), out, out.numel(), BS=16, BLOCK=128)
    return out
