"""Products of float32 matrices on tensor cores, as other kernels need them: over rows with an epilogue, and down columns.

Precisions: ``"high"`` follows TF32; ``"highest"`` has the errors of float32, by three products of TF32 parts, or six of
bfloat16 parts where factors are laid down columns: tensor cores take float32 factors along rows only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# input precisions of tl.dot, by parts: factors along rows, and down columns; the interpreter has the last only
ALONG = {3: "tf32x3", 2: "tf32", 1: "bf16"}
DOWN = {3: "bf16x6", 2: "bf16x3", 1: "bf16"}
if triton.knobs.runtime.interpret:
    ALONG = DOWN = dict.fromkeys(ALONG, "ieee")
ALONG_TILE = {"BM": 128, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3}
DOWN_TILE = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3}
PROGRAMS = 1056  # that a product down columns should have at most: eight for each multiprocessor of an H100


def parts(precision: int) -> int:
    """``precision`` of an op, or less where torch's own switch allows it."""
    allowed = {"highest": 3, "high": 2, "medium": 1}[torch.get_float32_matmul_precision()]
    return min(precision, allowed)


@triton.jit
def dot(x, y, acc, P: tl.constexpr):
    if P == "bf16":
        acc = tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16), acc)
    else:
        acc = tl.dot(x, y, acc, input_precision=P)
    return acc


@triton.jit
def dot_along(
    acc, a, lda, num_rows, b, ldb, num_cols, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, P: tl.constexpr
):
    """acc + a[:BM, :depth] b[:BN, :depth]', of which there are ``num_rows`` and ``num_cols``."""
    row, col, k = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :], tl.arange(0, BK)
    at, bt = row * lda + k[None, :], col * ldb + k[:, None]
    for lo in range(0, depth, BK):
        x = tl.load(a + at, mask=(row < num_rows) & (k[None, :] + lo < depth), other=0.0)
        y = tl.load(b + bt, mask=(col < num_cols) & (k[:, None] + lo < depth), other=0.0)
        acc = dot(x, y, acc, P)
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
    a, lda, b, ldb, out, ldo, num_rows, num_cols, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row0, col0 = tile(num_cols, BM, BN)
    num_rows, num_cols = (num_rows - row0).to(tl.int32), num_cols - col0
    acc = tl.zeros((BM, BN), tl.float32)
    acc = dot_along(acc, a + row0 * lda, lda, num_rows, b + col0 * ldb, ldb, num_cols, depth, BM, BN, BK, P)
    row, col = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    tl.store(out + row0 * ldo + col0 + row * ldo + col, acc, mask=(row < num_rows) & (col < num_cols))


@triton.jit
def _down(
    a, lda, b, ldb, weight, out, num_rows, num_a, num_b, per_slab, num_tasks,
    WEIGHTED: tl.constexpr, UPPER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, P: tl.constexpr,
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
        x = tl.load(a + at, mask=(k[None, :] + lo < left) & (i < num_a), other=0.0)
        y = tl.load(b + bt, mask=(k[:, None] + lo < left) & (j < num_b), other=0.0)
        if WEIGHTED:
            y *= tl.load(weight + (first + lo + k) % num_tasks)[:, None]
        acc = dot(x, y, acc, P)
        a += BK * lda
        b += BK * ldb
    at = out + tl.program_id(1).to(tl.int64) * num_a * num_b + i * num_b + j
    tl.store(at, acc, mask=(i < num_a) & (j < num_b))


def along(a: Tensor, b: Tensor, out: Tensor, parts: int) -> None:
    """out = a b' for ``a`` [R, D], ``b`` [C, D], all with rows that lie together."""
    (rows, depth), cols = a.shape, len(b)
    if not rows or not cols:
        return
    strides = a, a.stride(0), b, b.stride(0), out, out.stride(0)
    _along[(num_tiles(rows, cols),)](*strides, rows, cols, depth, **ALONG_TILE, P=ALONG[parts])


def num_tiles(rows: int, cols: int) -> int:
    """Programs of a product along rows, at least one for each tile of rows."""
    return triton.cdiv(rows, ALONG_TILE["BM"]) * max(1, triton.cdiv(cols, ALONG_TILE["BN"]))


def down(a: Tensor, b: Tensor, parts: int, weight: Tensor | None = None, *, upper: bool = False) -> Tensor:
    """a' b in slabs of rows, ``[slabs, I, J]``, to be summed: for ``a`` [R, I], ``b`` [R, J] with rows that lie together.

    ``weight`` [T]: row r of ``b`` counts ``weight[r % T]`` times. ``upper``: what lies below the diagonal need not be made.
    """
    (rows, num_a), num_b, (bm, bn, bk, *_) = a.shape, b.shape[1], DOWN_TILE.values()
    tiles = triton.cdiv(num_a, bm) * triton.cdiv(num_b, bn)
    slabs = max(1, min(triton.cdiv(rows, 8 * bk), PROGRAMS // max(1, tiles)))
    per_slab = triton.cdiv(triton.cdiv(rows, slabs), bk) * bk
    slabs = max(1, triton.cdiv(rows, max(1, per_slab)))
    out = a.new_empty(slabs, num_a, num_b)
    _down[(tiles, slabs)](
        *(a, a.stride(0), b, b.stride(0), weight, out, rows, num_a, num_b, per_slab, 1 if weight is None else len(weight)),
        **{"WEIGHTED": weight is not None, "UPPER": upper, "P": DOWN[parts]},
        **DOWN_TILE,
    )
    return out
