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
SLABS = 264  # programs that a product down columns should have: two for each multiprocessor of an H100


def parts(precision: int) -> int:
    """``precision`` of an op, or less where torch's own switch allows it."""
    allowed = {"highest": 3, "high": 2, "medium": 1}[torch.get_float32_matmul_precision()]
    return min(precision, allowed)


@triton.jit
def dot(x, y, acc, P: tl.constexpr):
    if P == "bf16":
        return tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16), acc)
    return tl.dot(x, y, acc, input_precision=P)


@triton.jit
def dot_along(acc, a, lda, rows, num_rows, b, ldb, cols, num_cols, depth, BK: tl.constexpr, P: tl.constexpr):
    """acc + a[rows, :depth] b[cols, :depth]'."""
    k = tl.arange(0, BK)
    at = a + rows[:, None].to(tl.int64) * lda + k[None, :]
    bt = b + cols[None, :] * ldb + k[:, None]
    for lo in range(0, depth, BK):
        x = tl.load(at + lo, mask=(rows[:, None] < num_rows) & (k[None, :] + lo < depth), other=0.0)
        y = tl.load(bt + lo, mask=(cols[None, :] < num_cols) & (k[:, None] + lo < depth), other=0.0)
        acc = dot(x, y, acc, P)
    return acc


@triton.jit
def _along(a, lda, b, ldb, out, ldo, num_rows, num_cols, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, P: tl.constexpr):
    rows = (tl.program_id(0) // tl.cdiv(num_cols, BN)) * BM + tl.arange(0, BM)
    cols = (tl.program_id(0) % tl.cdiv(num_cols, BN)) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    acc = dot_along(acc, a, lda, rows, num_rows, b, ldb, cols, num_cols, depth, BK, P)
    at = out + rows[:, None].to(tl.int64) * ldo + cols[None, :]
    tl.store(at, acc, mask=(rows[:, None] < num_rows) & (cols[None, :] < num_cols))


@triton.jit
def _down(
    a, lda, b, ldb, weight, out, num_rows, num_a, num_b, per_slab, num_tasks,
    WEIGHTED: tl.constexpr, UPPER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    slab = tl.program_id(1)
    i = (tl.program_id(0) // tl.cdiv(num_b, BN)) * BM + tl.arange(0, BM)
    j = (tl.program_id(0) % tl.cdiv(num_b, BN)) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    if UPPER and (tl.program_id(0) % tl.cdiv(num_b, BN) + 1) * BN <= (tl.program_id(0) // tl.cdiv(num_b, BN)) * BM:
        return
    acc = tl.zeros((BM, BN), tl.float32)
    for lo in range(slab * per_slab, min(slab * per_slab + per_slab, num_rows), BK):
        r = lo + k
        x = tl.load(a + r[None, :].to(tl.int64) * lda + i[:, None], mask=(r[None, :] < num_rows) & (i[:, None] < num_a), other=0.0)
        y = tl.load(b + r[:, None].to(tl.int64) * ldb + j[None, :], mask=(r[:, None] < num_rows) & (j[None, :] < num_b), other=0.0)
        if WEIGHTED:
            y *= tl.load(weight + r % num_tasks)[:, None]
        acc = dot(x, y, acc, P)
    at = out + slab.to(tl.int64) * num_a * num_b + i[:, None] * num_b + j[None, :]
    tl.store(at, acc, mask=(i[:, None] < num_a) & (j[None, :] < num_b))


def along(a: Tensor, b: Tensor, out: Tensor, parts: int) -> None:
    """out = a b' for ``a`` [R, D], ``b`` [C, D], all with rows that lie together."""
    (rows, depth), cols = a.shape, len(b)
    if not rows or not cols:
        return
    grid = (triton.cdiv(rows, 128) * triton.cdiv(cols, 128),)
    strides = a, a.stride(0), b, b.stride(0), out, out.stride(0)
    _along[grid](*strides, rows, cols, depth, BM=128, BN=128, BK=32, P=ALONG[parts], num_warps=8, num_stages=3)


def down(a: Tensor, b: Tensor, parts: int, weight: Tensor | None = None, *, upper: bool = False) -> Tensor:
    """a' b in slabs of rows, ``[slabs, I, J]``, to be summed: for ``a`` [R, I], ``b`` [R, J] with rows that lie together.

    ``weight`` [T]: row r of ``b`` counts ``weight[r % T]`` times. ``upper``: what lies below the diagonal need not be made.
    """
    (rows, num_a), num_b, (bm, bn, bk) = a.shape, b.shape[1], (128, 64, 32)
    tiles = triton.cdiv(num_a, bm) * triton.cdiv(num_b, bn)
    slabs = max(1, min(triton.cdiv(rows, 4 * bk), triton.cdiv(SLABS, max(1, tiles))))
    per_slab = triton.cdiv(triton.cdiv(rows, slabs), bk) * bk
    slabs = max(1, triton.cdiv(rows, max(1, per_slab)))
    out = a.new_empty(slabs, num_a, num_b)
    settings = {"WEIGHTED": weight is not None, "UPPER": upper, "BM": bm, "BN": bn, "BK": bk, "P": DOWN[parts]}
    _down[(tiles, slabs)](
        *(a, a.stride(0), b, b.stride(0), weight, out, rows, num_a, num_b, per_slab, 1 if weight is None else len(weight)),
        **settings,
        num_warps=4,
        num_stages=3,
    )
    return out
