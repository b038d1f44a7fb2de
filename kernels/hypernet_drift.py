"""The drift with the trunk before it (DESIGN E2 behind E5): rows go forward through the trunk, meet columns, and go back.

Each layer is one product with what follows it done before a tile leaves its program. Beside its numbers a layer has a few
that bring them into float16's range: what bounds them is known before they are made, from the largest of the layer before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasthyper.kernels.activation import RELU, drift
from fasthyper.kernels.drift import END, Plan, basis_rows, direct_part, gram_form, right, row_grams
from fasthyper.kernels.products import (
    Factor,
    Right,
    collapse,
    deep,
    dot_along,
    down,
    num_parts,
    num_tiles,
    padded,
    scale_for,
    store_parts,
    strides,
    tile,
)

LAYER_TILE = {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}
TWO_PRODUCTS_TILE = {"BM": 64, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 3}  # whose sums take registers
BACK_TILE = {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 3}
SIZES = "num_tasks", "num_chunks"  # a size of 1 would be a constant, which has no type to cast

# Numbers of a layer. Peaks are the largest absolute values that there are, bounds what they cannot exceed.
PEAK_DX, PEAK_X, SCALE_DX, SCALE_X = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
BOUND_DA, BOUND_A0 = tl.constexpr(4), tl.constexpr(5)  # pre-activations, of the first layer the tasks' part
BOUND_DA_N, BOUND_A0_N = tl.constexpr(6), tl.constexpr(7)  # and the chunks' part
PEAK_GRAD, SCALE_GRAD = tl.constexpr(8), tl.constexpr(9)
BOUND_GRAD = tl.constexpr(10)  # of the last layer, before its slope and root
BOUND_EXTRA = tl.constexpr(11)  # what else comes to it
GAIN = tl.constexpr(12)  # largest sum of a row of |W'|
ROOT = tl.constexpr(13)  # largest root of a task's weight: of the last layer
NUMBERS = 14
STEEPEST = tl.constexpr(2.0)  # no activation's slope, nor its quotient of differences, is above


@triton.jit
def _store_features(
    dx, x0, slope, root, x, part, L, here, slopes, num_rows, col0, width, P, is_first_program,
    LAST: tl.constexpr, ACT: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of a tile, the drift in the first half of x, in the second the features at the snapshot (LAST) or now."""
    row, col = tl.arange(0, BM)[:, None], col0 + tl.arange(0, BN)[None, :]
    live, mask = (row < num_rows) & (col < width), (row < num_rows) & (col < P)
    bound_dx = STEEPEST * (tl.load(here + BOUND_DA) + tl.load(here + BOUND_DA_N))
    bound_x = tl.load(here + BOUND_A0) + tl.load(here + BOUND_A0_N)
    if not LAST:
        bound_x += bound_dx
    if (ACT == 2) | (ACT == 3):  # from -1, or 0, to 1
        bound_dx, bound_x = tl.minimum(bound_dx, 2.0), tl.minimum(bound_x, 1.0)
    bound_x = tl.maximum(bound_x, 1.0)
    if LAST:
        bound_dx *= tl.load(here + ROOT)
        bound_x *= tl.load(here + ROOT)
    scale_dx, scale_x = scale_for(bound_dx), scale_for(bound_x)
    if is_first_program:
        tl.store(here + SCALE_DX, scale_dx)
        tl.store(here + SCALE_X, scale_x)
    other = x0 if LAST else x0 + dx
    dx, other = tl.where(live, dx * root[:, None], 0.0), tl.where(live, other * root[:, None], 0.0)
    tl.atomic_max(here + PEAK_DX, tl.max(tl.max(tl.abs(dx), 1), 0), sem="relaxed")
    tl.atomic_max(here + PEAK_X, tl.maximum(tl.max(tl.max(tl.abs(other), 1), 0), tl.max(root, 0)), sem="relaxed")
    store_parts(x + row * L + col, part, dx * scale_dx, mask, PARTS)
    store_parts(x + P + row * L + col, part, other * scale_x, mask, PARTS)
    tl.store(slopes + row * P + col, slope, mask=mask)
    if col0 == 0:
        end = tl.arange(0, 16)[None, :]
        ones = tl.where(end == 0, root[:, None] * scale_x, 0.0)
        store_parts(x + 2 * P + row * L + end, part, ones, row < num_rows, PARTS)


@triton.jit
def _task_and_chunk(row0, num_tasks, BM: tl.constexpr):
    """Of rows from ``row0`` on; divided in 32 bits, but for the first."""
    row = (row0 % num_tasks).to(tl.int32) + tl.arange(0, BM)
    return row % num_tasks, row0 // num_tasks + row // num_tasks


@triton.jit
def _roots(roots, row0, num_rows, num_tasks, LAST: tl.constexpr, BM: tl.constexpr):
    """The factor of each row: 1 but in the last layer."""
    if LAST:
        task, _ = _task_and_chunk(row0, num_tasks, BM)
        root = tl.load(roots + task, mask=tl.arange(0, BM) < num_rows, other=0.0)
    else:
        root = tl.full((BM,), 1.0, tl.float32)
    return root


@triton.jit
def _load_pre(pre, of_task, of_chunk, columns, row0, num_rows, col0, num_tasks, BM: tl.constexpr, BN: tl.constexpr):
    """A tile of ``pre`` [T, N, columns], of these strides, whose rows are of x."""
    row, col = tl.arange(0, BM), col0 + tl.arange(0, BN)[None, :]
    task, chunk = _task_and_chunk(row0, num_tasks, BM)
    at = task.to(tl.int64) * of_task + chunk * of_chunk
    return tl.load(pre + at[:, None] + col, mask=(row[:, None] < num_rows) & (col < columns), other=0.0)


@triton.jit
def _raise(to, values, live):
    """Raises a number to the largest absolute one of a tile."""
    tl.atomic_max(to, tl.max(tl.max(tl.abs(tl.where(live, values, 0.0)), 1), 0), sem="relaxed")


@triton.jit
def _first_sums(
    e, e0, z, z0, weight, weight0, bias, bias0, roots, of_tasks, of_chunks, pre_tasks, pre_chunks, first, last,
    num_tasks, num_chunks, E, Z, width, programs_tasks, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What a task, and what a chunk, adds to the first layer's da and a0; bounds of these, and of the roots."""
    is_task = tl.program_id(0) < programs_tasks
    if is_task:
        x, x0, depth, num_rows, out, out0, bounds = e, e0, E, num_tasks, of_tasks, pre_tasks, first + BOUND_DA
        rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    else:
        x, x0, depth, num_rows, out, out0, bounds = z, z0, Z, num_chunks, of_chunks, pre_chunks, first + BOUND_DA_N
        rows = (tl.program_id(0) - programs_tasks) * BM + tl.arange(0, BM)[:, None]
        weight += E
        weight0 += E
    cols, k = tl.program_id(1) * BN + tl.arange(0, BN)[None, :], tl.arange(0, BK)
    da, a0 = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for lo in range(0, depth, BK):
        in_x, in_w = (rows < num_rows) & (k[None, :] + lo < depth), (cols < width) & (k[:, None] + lo < depth)
        at_x, at_w = rows * depth + k[None, :] + lo, cols * (E + Z) + k[:, None] + lo
        before, w0 = tl.load(x0 + at_x, mask=in_x, other=0.0), tl.load(weight0 + at_w, mask=in_w, other=0.0)
        dx = tl.load(x + at_x, mask=in_x, other=0.0) - before
        w = tl.load(weight + at_w, mask=in_w, other=0.0)
        da = tl.dot(dx, w, da, input_precision="tf32x3")
        da = tl.dot(before, w - w0, da, input_precision="tf32x3")
        a0 = tl.dot(before, w0, a0, input_precision="tf32x3")
    if is_task:
        b0 = tl.load(bias0 + cols, mask=cols < width, other=0.0)
        da += tl.load(bias + cols, mask=cols < width, other=0.0) - b0
        a0 += b0
    live, at = (rows < num_rows) & (cols < width), rows * width + cols
    tl.store(out + at, da, mask=live)
    tl.store(out0 + at, a0, mask=live)
    _raise(bounds, da, live)
    _raise(bounds + 1, a0, live)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        task = tl.arange(0, 128)
        for lo in range(0, num_tasks, 128):
            some = tl.load(roots + lo + task, mask=lo + task < num_tasks, other=0.0)
            tl.atomic_max(last + ROOT, tl.max(some, 0), sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def _first_layer(
    of_tasks, of_chunks, pre_tasks, pre_chunks, roots, x, part, L, here, slopes, num_tasks, num_chunks, width, P,
    LAST: tl.constexpr, ACT: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """da = da_t + da_n; the snapshot's pre-activations likewise."""
    row0, col0 = tl.program_id(0).to(tl.int64) * BM, tl.program_id(1) * BN
    task, chunk = _task_and_chunk(row0, num_tasks, BM)
    col = col0 + tl.arange(0, BN)[None, :]
    left = (num_tasks.to(tl.int64) * num_chunks - row0).to(tl.int32)
    mask = (tl.arange(0, BM)[:, None] < left) & (col < width)
    at_task, at_chunk = task[:, None] * width + col, chunk[:, None] * width + col
    da = tl.load(of_tasks + at_task, mask=mask, other=0.0) + tl.load(of_chunks + at_chunk, mask=mask, other=0.0)
    a0 = tl.load(pre_tasks + at_task, mask=mask, other=0.0) + tl.load(pre_chunks + at_chunk, mask=mask, other=0.0)
    dx, x0, slope = drift(a0, da, ACT)
    root = _roots(roots, row0, left, num_tasks, LAST, BM)
    x += row0 * L
    slopes += row0 * P
    is_first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    _store_features(
        dx, x0, slope, root, x, part, L, here, slopes, left, col0, width, P, is_first, LAST, ACT, PARTS, BM, BN
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _layer(
    x_in, part_in, L_in, weights, weights_part, weights_L, inverse, weights0, weights0_part, weights0_L, inverse0,
    pre, of_task, of_chunk, pre_columns, roots, x, part, L, here, slopes, num_tasks, num_chunks, width, P,
    HAS_PRE: tl.constexpr, LAST: tl.constexpr, ACT: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """da = W0 dx + dW x + db, one product with x_in; then the activation's drift."""
    row0, col0 = tile(P, BM, BN)
    left = (num_tasks.to(tl.int64) * num_chunks - row0).to(tl.int32)
    x_in += row0 * L_in
    weights += col0 * weights_L
    col = col0 + tl.arange(0, BN)[None, :]
    if HAS_PRE:  # on its way while the product is made
        a0 = _load_pre(pre, of_task, of_chunk, pre_columns, row0, left, col0, num_tasks, BM, BN)
    da = tl.zeros((BM, BN), tl.float32)
    da = dot_along(da, x_in, part_in, L_in, left, weights, weights_part, weights_L, width - col0, L_in, BM, BN, BK, PARTS)
    da *= tl.load(inverse + col, mask=col < width, other=0.0)
    if not HAS_PRE:
        weights0 += col0 * weights0_L
        a0 = tl.zeros((BM, BN), tl.float32)
        a0 = dot_along(
            a0, x_in, part_in, L_in, left, weights0, weights0_part, weights0_L, width - col0, L_in, BM, BN, BK, PARTS
        )
        a0 *= tl.load(inverse0 + col, mask=col < width, other=0.0)
    dx, x0, slope = drift(a0, da, ACT)
    root = _roots(roots, row0, left, num_tasks, LAST, BM)
    x += row0 * L
    slopes += row0 * P
    is_first = tl.program_id(0) == 0
    _store_features(
        dx, x0, slope, root, x, part, L, here, slopes, left, col0, width, P, is_first, LAST, ACT, PARTS, BM, BN
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _back(
    a, a_part, lda, b, b_part, ldb, inverse, depth, above, extra, of_task, of_chunk, extra_columns, roots, slopes,
    out, out_part, here, row_lo, row_hi, num_tasks, num_chunks, width, P,
    HAS_EXTRA: tl.constexpr, LAST: tl.constexpr, FIRST: tl.constexpr,
    PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(a b' + extra) root slope, of rows [row_lo, row_hi); whole (FIRST) or in parts."""
    row0, col0 = tile(P, BM, BN)
    row0 += row_lo
    left = (row_hi - row0).to(tl.int32)
    a += row0 * lda
    b += col0 * ldb
    grad = tl.zeros((BM, BN), tl.float32)
    grad = dot_along(grad, a, a_part, lda, left, b, b_part, ldb, width - col0, depth, BM, BN, BK, PARTS)
    row, col = tl.arange(0, BM)[:, None], col0 + tl.arange(0, BN)[None, :]
    mask = (row < left) & (col < P)
    grad *= tl.load(inverse + col, mask=col < width, other=0.0)
    if LAST:
        bound = STEEPEST * tl.load(here + ROOT) * (tl.load(here + BOUND_GRAD) + tl.load(here + BOUND_EXTRA))
    else:
        grad /= tl.load(above + SCALE_GRAD)
        bound = STEEPEST * tl.load(above + PEAK_GRAD) * tl.load(above + GAIN)
    root = _roots(roots, row0, left, num_tasks, LAST, BM)[:, None]
    if HAS_EXTRA:
        grad += _load_pre(extra, of_task, of_chunk, extra_columns, row0, left, col0, num_tasks, BM, BN)
    grad *= tl.load(slopes + row0 * P + row * P + col, mask=mask, other=0.0).to(tl.float32) * root
    grad = tl.where(col < width, grad, 0.0)
    if FIRST:
        tl.store(out + row0 * P + row * P + col, grad, mask=mask)
    else:
        scale = scale_for(bound)
        tl.store(here + SCALE_GRAD, scale)
        tl.atomic_max(here + PEAK_GRAD, tl.max(tl.max(tl.abs(grad), 1), 0), sem="relaxed")
        store_parts(out + row0 * P + row * P + col, out_part, grad * scale, mask, PARTS)


@triton.jit
def _store_row(first, second, last, at, part, inverse, col, P, in_row, in_cols, PARTS: tl.constexpr):
    """Rows [first | second | last 0 ...] of what is multiplied from the right."""
    peak = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))[:, None]
    scale, end = scale_for(tl.maximum(peak, tl.abs(last))), tl.arange(0, 16)[None, :]
    store_parts(at + col, part, first * scale, in_cols, PARTS)
    store_parts(at + P + col, part, second * scale, in_cols, PARTS)
    store_parts(at + 2 * P + end, part, tl.where(end == 0, last * scale, 0.0), in_row, PARTS)
    tl.store(inverse, 1 / scale, mask=in_row)


@triton.jit
def _pack(
    weight, weight0, bias, bias0, below, here, pair, pair_part, L_in, pair_inverse,
    single, single_part, single_L, single_inverse, turned, turned_part, P_out, turned_inverse,
    num_out, num_in, P_in, programs_out,
    HAS_PRE: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """[W0 | dW | db 0 ...], of which x takes da; [-W0 | W0 | b0 0 ...], of which it takes a0; and W'. And bounds of them."""
    if tl.program_id(0) < programs_out:
        o, i = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None], tl.arange(0, BN)[None, :]
        live, in_row, in_cols = (o < num_out) & (i < num_in), o < num_out, (o < num_out) & (i < P_in)
        w0 = tl.load(weight0 + o * num_in + i, mask=live, other=0.0)
        dw = tl.load(weight + o * num_in + i, mask=live, other=0.0) - w0
        b0 = tl.load(bias0 + o, mask=in_row, other=0.0)
        db = tl.load(bias + o, mask=in_row, other=0.0) - b0
        peak_dx, peak_x = tl.load(below + PEAK_DX), tl.load(below + PEAK_X)
        sum_w0 = tl.sum(tl.abs(w0), 1)[:, None]
        bound_da = sum_w0 * peak_dx + tl.sum(tl.abs(dw), 1)[:, None] * peak_x + tl.abs(db)
        tl.atomic_max(here + BOUND_DA, tl.max(tl.max(bound_da, 1), 0), sem="relaxed")
        bound_a0 = sum_w0 * (peak_x + peak_dx) + tl.abs(b0)
        tl.atomic_max(here + BOUND_A0, tl.max(tl.max(bound_a0, 1), 0), sem="relaxed")
        dx_unit, x_unit = 1 / tl.load(below + SCALE_DX), 1 / tl.load(below + SCALE_X)
        _store_row(
            w0 * dx_unit, dw * x_unit, db * x_unit, pair + o * L_in, pair_part, pair_inverse + o, i, P_in,
            in_row, in_cols, PARTS,
        )  # fmt: skip
        if not HAS_PRE:
            _store_row(
                -w0 * dx_unit, w0 * x_unit, b0 * x_unit, single + o * L_in, single_part, single_inverse + o, i, P_in,
                in_row, in_cols, PARTS,
            )  # fmt: skip
    else:
        of, by = ((tl.program_id(0) - programs_out) * BM + tl.arange(0, BM))[:, None], tl.arange(0, BN)[None, :]
        w = tl.load(weight + by * num_in + of, mask=(by < num_out) & (of < num_in), other=0.0)
        tl.atomic_max(here + GAIN, tl.max(tl.sum(tl.abs(w), 1), 0), sem="relaxed")
        scale = scale_for(tl.max(tl.abs(w), 1))[:, None]
        store_parts(turned + of * P_out + by, turned_part, w * scale, (by < P_out) & (of < num_in), PARTS)
        tl.store(turned_inverse + of, 1 / scale, mask=of < num_in)


def hypernet_drift_fwd(
    theta: Sequence[Tensor],
    theta0: Sequence[Tensor],
    embeddings_TE: Tensor,
    embeddings0_TE: Tensor,
    pre0: Sequence[Tensor],
    gram0_BKK: Tensor,
    weight_T: Tensor,
    plan: Tensor,
    activation: int,
    precision: int = 3,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """E2 behind E5. Of all rows, features are kept from forward to backward; pre-activations are not."""
    theta, theta0 = [p.contiguous() for p in theta], [p.contiguous() for p in theta0]
    (z_NZ, *layers, basis_SK), (z0_NZ, *layers0, basis0_SK) = theta, theta0
    num_tasks, num_chunks, width = len(embeddings_TE), len(z_NZ), basis_SK.shape[1] - 1
    rectangles = Plan.of(plan, num_tasks, num_chunks, len(basis_SK))
    if not rectangles.gram and not rectangles.direct:
        return embeddings_TE.new_zeros(()), torch.zeros_like(embeddings_TE), [torch.zeros_like(p) for p in theta]
    parts = num_parts(precision)
    y = basis_rows(basis_SK, basis0_SK, parts)
    if not layers:
        return without_trunk(z_NZ, z0_NZ, embeddings_TE, embeddings0_TE, y, weight_T, rectangles)

    trunk = Trunk(layers, layers0, pre0, weight_T, num_chunks, activation, parts)
    trunk.forward(embeddings_TE, embeddings0_TE, z_NZ, z0_NZ)
    rows = row_grams(trunk.x[-1], width, num_tasks, rectangles, gram0_BKK)
    value, met, grad_basis_SK = gram_form(y, width, rectangles, rows)
    extra = None
    if rectangles.direct:
        more, extra = direct_part(trunk.x[-1].whole(), y, width, trunk.roots, rectangles, grad_basis_SK)
        value = value + more
    trunk.meet(met, extra)
    grad_e_TE, grads = trunk.backward(embeddings_TE, z_NZ)
    return value.clamp(min=0).to(basis_SK.dtype), grad_e_TE, [*grads, grad_basis_SK]


def _rows_of(pre: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """What kernels are told of ``[T, N, H]``, whose last stride is 1: strides, and columns, where there are more up to P."""
    if pre is None:
        return None, 0, 0, 0
    of_task, of_chunk, _ = pre.stride()
    is_padded = of_task % 16 == of_chunk % 16 == 0 and min(of_task, of_chunk) >= padded(pre.shape[2])
    return pre, of_task, of_chunk, padded(pre.shape[2]) if is_padded else pre.shape[2]


class Trunk:
    """Rows on their way through the trunk: ``x`` holds each layer's features, as ``drift.py`` lays them."""

    def __init__(
        self,
        layers: Sequence[Tensor],
        layers0: Sequence[Tensor],
        pre0: Sequence[Tensor],
        weight_T: Tensor,
        num_chunks: int,
        activation: int,
        parts: int,
    ):
        self.weights, self.biases, self.weights0, self.biases0 = layers[::2], layers[1::2], layers0[::2], layers0[1::2]
        self.pre0, self.roots = [a if a.stride(2) == 1 else a.contiguous() for a in pre0], weight_T.sqrt()
        self.sizes, self.parts = (len(weight_T), num_chunks), parts
        self.num_rows, self.settings = len(weight_T) * num_chunks, {"ACT": activation, "PARTS": parts}
        self.widths = [len(weight) for weight in self.weights]
        device = self.roots.device
        self.numbers = torch.zeros(len(self.widths), NUMBERS, device=device)
        self.x = [
            Factor(self._parts(self.num_rows, 2 * padded(width) + END), numbers[SCALE_DX.value :], padded(width))
            for width, numbers in zip(self.widths, self.numbers, strict=True)
        ]
        dtype = torch.float16 if activation == RELU else torch.float32  # of what is 0 or 1, and of what is not
        self.slopes = [torch.empty(self.num_rows, padded(w), dtype=dtype, device=device) for w in self.widths]
        self.turned: list[Right] = []  # W' of each layer but the first

    def _parts(self, rows: int, columns: int) -> Tensor:
        return torch.empty(self.parts, rows, columns, dtype=torch.float16, device=self.roots.device)

    def _right(self, rows: int, columns: int) -> Right:
        return Right(self._parts(rows, columns), self.roots.new_empty(rows))

    def _of(self, i: int) -> tuple[object, ...]:
        """What kernels are told of layer i."""
        return *self.sizes, self.widths[i], padded(self.widths[i])

    def forward(self, e_TE: Tensor, e0_TE: Tensor, z_NZ: Tensor, z0_NZ: Tensor) -> None:
        """Fills ``x``."""
        last, (num_tasks, num_chunks), width = len(self.weights) - 1, self.sizes, self.widths[0]
        sums = [self.roots.new_empty(rows, width) for rows in (num_tasks, num_chunks) * 2]  # da of both, a0 of both
        programs, columns = [triton.cdiv(rows, 16) for rows in self.sizes], max(1, triton.cdiv(width, 32))
        _first_sums[(sum(programs), columns)](
            *(e_TE.contiguous(), e0_TE.contiguous(), z_NZ, z0_NZ, self.weights[0], self.weights0[0]),
            *(self.biases[0], self.biases0[0], self.roots, *sums, self.numbers[0], self.numbers[-1]),
            *(*self.sizes, e_TE.shape[1], z_NZ.shape[1], width, programs[0]),
            **{"BM": 16, "BN": 32, "BK": 32},
        )
        grid = (triton.cdiv(self.num_rows, 16), max(1, triton.cdiv(padded(self.widths[0]), 128)))
        _first_layer[grid](
            *(*sums, self.roots, *strides(self.x[0].parts), self.numbers[0], self.slopes[0], *self._of(0)),
            **self.settings,
            **{"LAST": last == 0, "BM": 16, "BN": 128},
        )
        for i in range(1, last + 1):
            has_pre = i > last - len(self.pre0)
            pair, single = self._pack(i, has_pre)
            a0 = self.pre0[i - last - 1] if has_pre else None
            tile_of = LAYER_TILE if has_pre else TWO_PRODUCTS_TILE
            _layer[(num_tiles(self.num_rows, padded(self.widths[i]), tile_of),)](
                *(*strides(self.x[i - 1].parts), *strides(pair.parts), pair.inverse_J),
                *(*strides(single.parts), single.inverse_J, *_rows_of(a0), self.roots),
                *(*strides(self.x[i].parts), self.numbers[i], self.slopes[i], *self._of(i)),
                **self.settings,
                **{"HAS_PRE": has_pre, "LAST": i == last},
                **tile_of,
            )

    def _pack(self, i: int, has_pre: bool) -> tuple[Right, Right]:
        num_out, num_in = self.weights[i].shape
        p_in, p_out = padded(num_in), padded(num_out)
        pair, turned = self._right(num_out, 2 * p_in + END), self._right(num_in, p_out)
        single = pair if has_pre else self._right(num_out, 2 * p_in + END)
        self.turned.append(turned)
        widest = triton.next_power_of_2(max(p_in, p_out, 16))
        rows = max(1, min(16, 4096 // widest))
        programs = triton.cdiv(num_out, rows), triton.cdiv(num_in, rows)
        _pack[(sum(programs),)](
            *(self.weights[i], self.weights0[i], self.biases[i], self.biases0[i], self.numbers[i - 1], self.numbers[i]),
            *(*strides(pair.parts), pair.inverse_J, *strides(single.parts), single.inverse_J),
            *(*strides(turned.parts), turned.inverse_J, num_out, num_in, p_in, programs[0]),
            **{"HAS_PRE": has_pre, "PARTS": self.parts, "BM": rows, "BN": widest},
        )
        return pair, single

    def meet(self, met: Sequence[tuple[tuple[int, int], Tensor]], extra_TNH: Tensor | None) -> None:
        """The gradient before the last activation, from the columns that meet each range of chunks."""
        last, (num_tasks, num_chunks), at = len(self.x) - 1, self.sizes, 0
        x, width, (peaks, bound) = self.x[-1], self.widths[-1], (self.numbers[-1], self.numbers[-1, BOUND_GRAD.value :])
        ranges = [(span, right(cols_LL, x, width, bound=bound, peaks=peaks)) for span, cols_LL in met]
        if extra_TNH is not None and extra_TNH.numel():
            self.numbers[-1, BOUND_EXTRA.value] = extra_TNH.abs().amax()
        self.grad = self._grad(last)
        nothing = Right(x.parts[:, :0], self.roots.new_zeros(width))
        for (lo, hi), b in [*ranges, ((num_chunks, num_chunks), nothing)]:
            if at < lo:
                self._back(last, x.parts, nothing, 0, extra_TNH, (at * num_tasks, lo * num_tasks))
            if lo < hi:
                self._back(last, x.parts, b, b.parts.shape[2], extra_TNH, (lo * num_tasks, hi * num_tasks))
            at = hi

    def _grad(self, i: int) -> Tensor:
        """Of the first layer's pre-activations, which no product takes, whole."""
        columns = padded(self.widths[i])
        return self._parts(self.num_rows, columns) if i else self.roots.new_empty(1, self.num_rows, columns)

    def _back(self, i: int, a: Tensor, b: Right, depth: int, extra: Tensor | None, rows: tuple[int, int]) -> None:
        is_last = i == len(self.x) - 1
        _back[(num_tiles(rows[1] - rows[0], padded(self.widths[i]), BACK_TILE),)](
            *(*strides(a), *strides(b.parts), b.inverse_J, depth, None if is_last else self.numbers[i + 1]),
            *(
                *_rows_of(extra),
                self.roots,
                self.slopes[i],
                self.grad,
                self.grad.stride(0),
                self.numbers[i],
                *rows,
                *self._of(i),
            ),
            **{"PARTS": self.parts, "HAS_EXTRA": extra is not None, "LAST": is_last, "FIRST": i == 0},
            **deep(BACK_TILE, self.parts),
        )

    def backward(self, e_TE: Tensor, z_NZ: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the task embeddings; of the chunk embeddings and each layer's weight and bias."""
        grads: list[Tensor] = []
        for i in reversed(range(1, len(self.weights))):
            (num_out, num_in), x = self.weights[i].shape, self.x[i - 1]
            after = Factor(self.grad, self.numbers[i, SCALE_GRAD.value :], self.grad.shape[2])
            grads = [*collapse(down(after, x.columns(x.half, x.parts.shape[2])), num_out, num_in), *grads]
            self.grad = self._grad(i - 1)
            self._back(i - 1, after.parts, self.turned[i - 1], after.parts.shape[2], None, (0, self.num_rows))
        num_tasks, num_chunks = self.sizes
        grad_NTh = self.grad.view(num_chunks, num_tasks, -1)[..., : self.widths[0]]
        grad_t, grad_n = grad_NTh.sum(0), grad_NTh.sum(1)
        we, wz = self.weights[0].tensor_split([e_TE.shape[1]], 1)
        grad_w = torch.cat([grad_t.T @ e_TE, grad_n.T @ z_NZ], 1)
        return grad_t @ we, [grad_n @ wz, grad_w, grad_t.sum(0), *grads]


def without_trunk(
    z_NZ: Tensor,
    z0_NZ: Tensor,
    e_TE: Tensor,
    e0_TE: Tensor,
    y: Factor,
    weight_T: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A row is the sum of a part of its task's and one of its chunk's, and no row is made; in float64."""
    (num_tasks, e), (num_chunks, z) = e_TE.shape, z_NZ.shape
    width, p, length, weight = e + z, padded(e + z), y.parts.shape[2], weight_T.double()[:, None]
    task_TL, chunk_NL = (torch.zeros(n, length, dtype=torch.float64, device=e_TE.device) for n in (num_tasks, num_chunks))
    task_TL[:, :e], task_TL[:, p : p + e] = e_TE.double() - e0_TE.double(), e0_TE
    chunk_NL[:, e:width], chunk_NL[:, p + e : p + width] = z_NZ.double() - z0_NZ.double(), z0_NZ
    chunk_NL[:, 2 * p] = 1
    all_tasks_L, total = (weight * task_TL).sum(0), weight.sum()
    rows = []
    for _, (lo, hi), _ in plan.gram:
        some = chunk_NL[lo:hi]
        both = torch.outer(all_tasks_L, some.sum(0))
        rows.append((hi - lo) * (weight * task_TL).T @ task_TL + both + both.T + total * some.T @ some)
    value, met, grad_basis_SK = gram_form(y, width, plan, rows)
    grad_e, grad_z = torch.zeros_like(task_TL[:, :e]), torch.zeros_like(chunk_NL[:, :z])
    for (lo, hi), cols_LL in met:
        some = chunk_NL[lo:hi]
        grad_e += 2 * weight * (((hi - lo) * task_TL + some.sum(0)) @ cols_LL[:, :e])
        grad_z[lo:hi] = 2 * (all_tasks_L + total * some) @ cols_LL[:, e:width]
    if plan.direct:
        x_RL = (weight.sqrt() * (chunk_NL[:, None] + task_TL)).flatten(0, 1)
        more, grad_TNH = direct_part(x_RL, y, width, weight_T.sqrt(), plan, grad_basis_SK)
        grad_TNH = weight.sqrt()[:, None] * grad_TNH
        value, grad_e, grad_z = value + more, grad_e + grad_TNH[..., :e].sum(1), grad_z + grad_TNH[..., e:].sum(0)
    dtype = e_TE.dtype
    return value.clamp(min=0).to(dtype), grad_e.to(dtype), [grad_z.to(dtype), grad_basis_SK]
