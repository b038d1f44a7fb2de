"""Products of float32 matrices on tensor cores, along rows and down columns, from factors split in float16 parts.

Two float16, the second the rounded rest of the first, hold 22 bits of a float32, and three of their products reach its last
bit; one holds the 11 bits of TF32. float16 lacks float32's range: a factor is multiplied by a power of two that brings what
bounds it just under 2^15. What lies 2^-18 under that keeps all its bits, and nothing is off by more than 2^-39 of it, so
bounds may be loose. A factor of R rows lies as its parts, ``[parts, R, C]``, split once, where it is made, and read as
tensor cores take it, along either dimension. Sums are in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasthyper.kernels.precision import factor_precision

ALONG_TILE = {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 3}
DOWN_TILE = {"BM": 128, "BN": 128, "num_warps": 8, "num_stages": 3}
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # its products are as rounded as their factors
PROGRAMS = 264  # that a product down columns should have at most: two for each multiprocessor of an H100


class Factor(NamedTuple):
    """A matrix ``[R, C]`` in parts; columns left of ``half`` are multiplied by the first scale, the others by the second."""

    parts: Tensor  # float16 [parts, R, C]
    scales: Tensor  # float32 [2], powers of two
    half: int

    def rows(self, lo: int, hi: int) -> Factor:
        return self._replace(parts=self.parts[:, lo:hi])

    def columns(self, lo: int, hi: int) -> Factor:
        return self._replace(parts=self.parts[..., lo:hi], half=max(0, self.half - lo))

    def whole(self) -> Tensor:
        """The matrix in float32."""
        total = self.parts.float().sum(0)
        total[:, : self.half] /= self.scales[0]
        total[:, self.half :] /= self.scales[1]
        return total


class Right(NamedTuple):
    """What a factor is multiplied by along rows, ``[J, C]``, each row by a power of two of its own.

    In its columns the scales of the factor that it meets are undone.
    """

    parts: Tensor  # float16 [parts, J, C]
    inverse_J: Tensor  # of the scales, float32


def padded(width: int) -> int:
    """P of H: whole 16 columns, which Triton wants to know before it loads 16 bytes at a time."""
    return -(-width // 16) * 16


def num_parts(precision: int) -> int:
    """Two for float32 and for what is asked to keep 16 bits; one where ``precision``, or torch's own switch, allows less."""
    return min(2 if precision > 1 else 1, {"tf32x3": 2, "tf32": 1, "bf16": 1}[factor_precision()])


def deep(tile: Mapping[str, int], parts: int) -> dict[str, int]:
    """A tile whose factors take the same memory in one part as in two: twice the depth at a time."""
    return {**tile, "BK": 64 // parts}


@triton.jit
def scale_for(bound):
    """The power of two that brings ``bound``, 0 or more, to 2^14 or more, and under 2^15."""
    exponent = 268 - ((bound.to(tl.int32, bitcast=True) >> 23) & 255)
    return (tl.minimum(tl.maximum(exponent, 27), 227) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_parts(at, part, value, mask, PARTS: tl.constexpr):
    for i in tl.static_range(PARTS):
        rounded = value.to(tl.float16)
        tl.store(at + i * part, rounded, mask=mask)
        value -= rounded.to(tl.float32)


@triton.jit
def _dot(x, y, acc):
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc)


@triton.jit
def _add_product(acc, a, a_part, a_mask, b, b_part, b_mask, PARTS: tl.constexpr):
    """acc + a b, of the parts' products that of the first bits last."""
    x0, y0 = tl.load(a, mask=a_mask, other=0.0), tl.load(b, mask=b_mask, other=0.0)
    if PARTS > 1:
        x1, y1 = tl.load(a + a_part, mask=a_mask, other=0.0), tl.load(b + b_part, mask=b_mask, other=0.0)
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
    a, a_part, lda, b, b_part, ldb, inverse, out, ldo, num_rows, num_cols, depth,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row0, col0 = tile(num_cols, BM, BN)
    num_rows, num_cols = (num_rows - row0).to(tl.int32), num_cols - col0
    a, b = a + row0 * lda, b + col0 * ldb
    acc = tl.zeros((BM, BN), tl.float32)
    acc = dot_along(acc, a, a_part, lda, num_rows, b, b_part, ldb, num_cols, depth, BM, BN, BK, PARTS)
    row, col = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    acc *= tl.load(inverse + col0 + col, mask=col < num_cols, other=0.0)
    tl.store(out + row0 * ldo + col0 + row * ldo + col, acc, mask=(row < num_rows) & (col < num_cols))


@triton.jit
def _unscale(scales, half, at):
    """The inverse of the scale of column ``at``."""
    return 1 / tl.where(at < half, tl.load(scales), tl.load(scales + 1))


@triton.jit
def _down(
    a, a_part, lda, a_scales, a_half, b, b_part, ldb, b_scales, b_half, out, num_rows, num_a, num_b, per_slab,
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
    acc *= _unscale(a_scales, a_half, i) * _unscale(b_scales, b_half, j)
    at = out + tl.program_id(1).to(tl.int64) * num_a * num_b + i * num_b + j
    tl.store(at, acc, mask=(i < num_a) & (j < num_b))


def strides(parts: Tensor) -> tuple[Tensor, int, int]:
    """What kernels are told of parts ``[parts, R, C]``."""
    return parts, parts.stride(0), parts.stride(1)


def num_tiles(rows: int, cols: int, tile: Mapping[str, int]) -> int:
    """Programs of a product along rows, at least one for each tile of rows."""
    return triton.cdiv(rows, tile["BM"]) * max(1, triton.cdiv(cols, tile["BN"]))


def along(a: Factor, b: Right, out: Tensor) -> None:
    """out = a b' for factors of ``[R, D]`` and ``[C, D]``."""
    (parts, rows, depth), cols = a.parts.shape, b.parts.shape[1]
    if rows and cols:
        sizes = b.inverse_J, out, out.stride(0), rows, cols, depth
        grid = (num_tiles(rows, cols, ALONG_TILE),)
        _along[grid](*strides(a.parts), *strides(b.parts), *sizes, PARTS=parts, **deep(ALONG_TILE, parts))


def down(a: Factor, b: Factor, *, upper: bool = False) -> Tensor:
    """a' b of slabs of rows, float32 ``[slabs, I, J]``, to be summed, for factors of ``[R, I]`` and ``[R, J]``.

    Tensor cores cut off what they add: few rows are several slabs, too.

    ``upper``: what lies below the diagonal need not be made.
    """
    (parts, rows, num_a), num_b = a.parts.shape, b.parts.shape[2]
    tiles = triton.cdiv(num_a, DOWN_TILE["BM"]) * triton.cdiv(num_b, DOWN_TILE["BN"])
    slabs = max(1, min(triton.cdiv(rows, 128), PROGRAMS // max(1, tiles)))
    per_slab = max(64, triton.cdiv(triton.cdiv(rows, slabs), 64) * 64)
    slabs = max(1, triton.cdiv(rows, per_slab))
    out = torch.empty(slabs, num_a, num_b, device=a.parts.device)
    if tiles:
        _down[(tiles, slabs)](
            *(*strides(a.parts), *a[1:], *strides(b.parts), *b[1:], out, rows, num_a, num_b, per_slab),
            **{"UPPER": upper, "PARTS": parts},
            **deep(DOWN_TILE, parts),
        )
    return out


@triton.jit
def _peaks(source, other, out, size, other_size, DIFFERENCE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first, second = tl.load(source + at, mask=at < size, other=0.0), tl.load(other + at, mask=at < other_size, other=0.0)
    if DIFFERENCE:
        second = first - second
    tl.atomic_max(out, tl.max(tl.abs(first), 0), sem="relaxed")
    tl.atomic_max(out + 1, tl.max(tl.abs(second), 0), sem="relaxed")


def raise_peaks(source: Tensor, other: Tensor, out: Tensor, *, difference: bool = False) -> None:
    """Raises two numbers to the largest absolute ones of ``source`` and of ``other``, or of ``source - other``."""
    sizes = source.numel(), other.numel()
    _peaks[(triton.cdiv(max(sizes), 4096),)](source, other, out, *sizes, DIFFERENCE=difference, BLOCK=4096)


@triton.jit
def _collapse(slabs, num_slabs, weight, bias, rows, columns, num_out, num_in, BS: tl.constexpr, BLOCK: tl.constexpr):
    at, size = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :], rows * columns
    slab = tl.arange(0, BS)[:, None]
    total = tl.zeros((BLOCK,), tl.float64)
    for lo in range(0, num_slabs, BS):
        some = tl.load(slabs + (lo + slab).to(tl.int64) * size + at, mask=(lo + slab < num_slabs) & (at < size), other=0.0)
        total += tl.sum(some.to(tl.float64), 0)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // columns, at % columns
    tl.store(weight + row * num_in + column, total.to(tl.float32), mask=(at < num_out * columns) & (column < num_in))
    tl.store(bias + row, total.to(tl.float32), mask=(at < num_out * columns) & (column == columns - 16))


def collapse(slabs: Tensor, num_out: int, num_in: int) -> tuple[Tensor, Tensor]:
    """The sum of ``[slabs, >= O, P + 16]``: the columns of a weight ``[O, I]``, and column P, a bias ``[O]``."""
    weight, bias = slabs.new_empty(num_out, num_in), slabs.new_empty(num_out)
    num_slabs, _, columns = slabs.shape
    if num_out:
        sizes = slabs.shape[1], columns, num_out, num_in
        _collapse[(triton.cdiv(num_out * columns, 128),)](slabs, num_slabs, weight, bias, *sizes, BS=16, BLOCK=128)
    return weight, bias
