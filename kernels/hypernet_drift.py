"""The drift with the trunk before it (DESIGN E2 behind E5): rows go forward through the trunk, meet columns, and go back.

Each layer is one product with what follows it done before a tile leaves its program.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fasthyper.kernels.activation import RELU, drift
from fasthyper.kernels.drift import END, Plan, basis_rows, direct_part, gram_form, padded, row_grams
from fasthyper.kernels.products import (
    collapse,
    dot_along,
    down,
    factor,
    num_parts,
    num_tiles,
    split,
    store_parts,
    tile,
)

LAYER_TILE = {"BM": 128, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3}
TWO_PRODUCTS_TILE = {"BM": 64, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 3}  # whose sums take registers
BACK_TILE = {"BM": 128, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3}
SIZES = "num_tasks", "num_chunks"  # a size of 1 would be a constant, which has no type to cast


@triton.jit
def _store_features(
    dx, x0, slope, root, x, part, L, slopes, num_rows, col0, width, P,
    LAST: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of a tile, the drift in the first half of x, in the second the features at the snapshot (LAST) or now."""
    row, col = tl.arange(0, BM)[:, None], col0 + tl.arange(0, BN)[None, :]
    live, mask = col < width, (row < num_rows) & (col < P)
    other = x0 if LAST else x0 + dx
    store_parts(x + row * L + col, part, tl.where(live, dx * root[:, None], 0.0), mask, PARTS)
    store_parts(x + P + row * L + col, part, tl.where(live, other * root[:, None], 0.0), mask, PARTS)
    tl.store(slopes + row * P + col, slope, mask=mask)
    if col0 == 0:
        end = tl.arange(0, 16)[None, :]
        store_parts(x + 2 * P + row * L + end, part, tl.where(end == 0, root[:, None], 0.0), row < num_rows, PARTS)


@triton.jit
def _roots(roots, row0, num_rows, num_tasks, LAST: tl.constexpr, BM: tl.constexpr):
    """The factor of each row: 1 but in the last layer."""
    row = tl.arange(0, BM)
    if LAST:
        root = tl.load(roots + (row0 + row) % num_tasks, mask=row < num_rows, other=0.0)
    else:
        root = tl.full((BM,), 1.0, tl.float32)
    return root


@triton.jit
def _load_pre(pre, row0, num_rows, col0, num_tasks, num_chunks, width, BM: tl.constexpr, BN: tl.constexpr):
    """A tile of ``pre`` [T, N, width], whose rows are of x."""
    row, col = tl.arange(0, BM), col0 + tl.arange(0, BN)[None, :]
    at = ((row0 + row) % num_tasks) * num_chunks + (row0 + row) // num_tasks
    return tl.load(pre + at.to(tl.int64)[:, None] * width + col, mask=(row[:, None] < num_rows) & (col < width), other=0.0)


@triton.jit(do_not_specialize=SIZES)
def _first_layer(
    of_tasks, of_chunks, pre_tasks, pre_chunks, roots, x, part, L, slopes, num_tasks, num_chunks, width, P,
    LAST: tl.constexpr, ACT: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """da = da_t + da_n; the snapshot's pre-activations likewise."""
    row0, col0 = tl.program_id(0).to(tl.int64) * BM, tl.program_id(1) * BN
    rows, col = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN)[None, :]
    left = (num_tasks.to(tl.int64) * num_chunks - row0).to(tl.int32)
    mask = (tl.arange(0, BM)[:, None] < left) & (col < width)
    at_task, at_chunk = (rows % num_tasks)[:, None] * width + col, (rows // num_tasks)[:, None] * width + col
    da = tl.load(of_tasks + at_task, mask=mask, other=0.0) + tl.load(of_chunks + at_chunk, mask=mask, other=0.0)
    a0 = tl.load(pre_tasks + at_task, mask=mask, other=0.0) + tl.load(pre_chunks + at_chunk, mask=mask, other=0.0)
    dx, x0, slope = drift(a0, da, ACT)
    root = _roots(roots, row0, left, num_tasks, LAST, BM)
    x += row0 * L
    slopes += row0 * P
    _store_features(dx, x0, slope, root, x, part, L, slopes, left, col0, width, P, LAST, PARTS, BM, BN)


@triton.jit(do_not_specialize=SIZES)
def _layer(
    x_in, part_in, L_in, weights, weights_part, weights_L, weights0, weights0_part, weights0_L, pre, roots,
    x, part, L, slopes, num_tasks, num_chunks, width, P,
    HAS_PRE: tl.constexpr, LAST: tl.constexpr, ACT: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """da = W0 dx + dW x + db, one product with x_in; then the activation's drift."""
    row0, col0 = tile(P, BM, BN)
    left = (num_tasks.to(tl.int64) * num_chunks - row0).to(tl.int32)
    x_in += row0 * L_in
    weights += col0 * weights_L
    da = tl.zeros((BM, BN), tl.float32)
    da = dot_along(da, x_in, part_in, L_in, left, weights, weights_part, weights_L, width - col0, L_in, BM, BN, BK, PARTS)
    if HAS_PRE:
        a0 = _load_pre(pre, row0, left, col0, num_tasks, num_chunks, width, BM, BN)
    else:
        weights0 += col0 * weights0_L
        a0 = tl.zeros((BM, BN), tl.float32)
        a0 = dot_along(
            a0, x_in, part_in, L_in, left, weights0, weights0_part, weights0_L, width - col0, L_in, BM, BN, BK, PARTS
        )
    dx, x0, slope = drift(a0, da, ACT)
    root = _roots(roots, row0, left, num_tasks, LAST, BM)
    x += row0 * L
    slopes += row0 * P
    _store_features(dx, x0, slope, root, x, part, L, slopes, left, col0, width, P, LAST, PARTS, BM, BN)


@triton.jit(do_not_specialize=SIZES)
def _back(
    a, a_part, lda, b, b_part, ldb, depth, extra, roots, slopes, out, out_part, row_lo, row_hi,
    num_tasks, num_chunks, width, P,
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
    root = _roots(roots, row0, left, num_tasks, LAST, BM)[:, None]
    if HAS_EXTRA:
        grad += _load_pre(extra, row0, left, col0, num_tasks, num_chunks, width, BM, BN)
    grad *= tl.load(slopes + row0 * P + row * P + col, mask=mask, other=0.0).to(tl.float32) * root
    grad = tl.where(col < width, grad, 0.0)
    if FIRST:
        tl.store(out + row0 * P + row * P + col, grad, mask=mask)
    else:
        store_parts(out + row0 * P + row * P + col, out_part, grad, mask, PARTS)


@triton.jit
def _pack(
    weight, weight0, bias, bias0, pair, pair_part, L_in, single, single_part, single_L, turned, turned_part, P_out,
    num_out, num_in, P_in,
    HAS_PRE: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """[W0 | dW | db 0 ...], of which x takes da; [-W0 | W0 | b0 0 ...], of which it takes a0; and W'."""
    o = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    i = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    live = (o < num_out) & (i < num_in)
    w = tl.load(weight + o * num_in + i, mask=live, other=0.0)
    w0 = tl.load(weight0 + o * num_in + i, mask=live, other=0.0)
    store_parts(turned + i * P_out + o, turned_part, w, (o < P_out) & (i < num_in), PARTS)
    mask = (o < num_out) & (i < P_in)
    store_parts(pair + o * L_in + i, pair_part, w0, mask, PARTS)
    store_parts(pair + o * L_in + P_in + i, pair_part, w - w0, mask, PARTS)
    if not HAS_PRE:
        store_parts(single + o * L_in + i, single_part, -w0, mask, PARTS)
        store_parts(single + o * L_in + P_in + i, single_part, w0, mask, PARTS)
    if tl.program_id(1) == 0:
        end = tl.arange(0, 16)[None, :]
        b = tl.load(bias + o, mask=o < num_out, other=0.0)
        b0 = tl.load(bias0 + o, mask=o < num_out, other=0.0)
        store_parts(pair + o * L_in + 2 * P_in + end, pair_part, tl.where(end == 0, b - b0, 0.0), o < num_out, PARTS)
        if not HAS_PRE:
            store_parts(single + o * L_in + 2 * P_in + end, single_part, tl.where(end == 0, b0, 0.0), o < num_out, PARTS)


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
        more, extra = direct_part(trunk.x[-1], y, width, trunk.roots, rectangles, grad_basis_SK)
        value = value + more
    trunk.meet(met, extra)
    grad_e_TE, grads = trunk.backward(embeddings_TE, z_NZ)
    return value.clamp(min=0).to(basis_SK.dtype), grad_e_TE, [*grads, grad_basis_SK]


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
        self.pre0, self.roots = [a.contiguous() for a in pre0], weight_T.sqrt()
        self.sizes, self.parts = (len(weight_T), num_chunks), parts
        self.num_rows, self.settings = len(weight_T) * num_chunks, {"ACT": activation, "PARTS": parts}
        self.widths = [len(weight) for weight in self.weights]
        self.x = [self._factor(self.num_rows, 2 * padded(width) + END) for width in self.widths]
        dtype = torch.bfloat16 if activation == RELU else torch.float32  # of what is 0 or 1, and of what is not
        self.slopes = [torch.empty(self.num_rows, padded(w), dtype=dtype, device=self.roots.device) for w in self.widths]
        self.turned: list[Tensor] = []  # W' of each layer but the first

    def _factor(self, rows: int, columns: int) -> Tensor:
        return torch.empty(self.parts, rows, columns, dtype=torch.bfloat16, device=self.roots.device)

    def _of(self, i: int) -> tuple[object, ...]:
        """What kernels are told of layer i."""
        return *self.sizes, self.widths[i], padded(self.widths[i])

    def forward(self, e_TE: Tensor, e0_TE: Tensor, z_NZ: Tensor, z0_NZ: Tensor) -> None:
        """Fills ``x``."""
        last, has_pre = len(self.weights) - 1, bool(self.pre0)
        (we, wz), (we0, wz0) = (w[0].tensor_split([e_TE.shape[1]], 1) for w in (self.weights, self.weights0))
        bias, bias0 = self.biases[0], self.biases0[0]
        of_tasks = F.linear(torch.cat([e_TE - e0_TE, e0_TE], 1), torch.cat([we, we - we0], 1), bias - bias0)
        of_chunks = F.linear(torch.cat([z_NZ - z0_NZ, z0_NZ], 1), torch.cat([wz, wz - wz0], 1))
        pre = F.linear(e0_TE, we0, bias0), F.linear(z0_NZ, wz0)
        grid = (triton.cdiv(self.num_rows, 16), max(1, triton.cdiv(padded(self.widths[0]), 128)))
        _first_layer[grid](
            *(of_tasks, of_chunks, *pre, self.roots, *factor(self.x[0]), self.slopes[0], *self._of(0)),
            **self.settings,
            **{"LAST": last == 0, "BM": 16, "BN": 128},
        )
        for i in range(1, last + 1):
            pair, single = self._pack(i)
            tile_of = LAYER_TILE if has_pre else TWO_PRODUCTS_TILE
            _layer[(num_tiles(self.num_rows, padded(self.widths[i]), tile_of),)](
                *(*factor(self.x[i - 1]), *factor(pair), *factor(single), self.pre0[i - 1] if has_pre else None, self.roots),
                *(*factor(self.x[i]), self.slopes[i], *self._of(i)),
                **self.settings,
                **{"HAS_PRE": has_pre, "LAST": i == last},
                **tile_of,
            )

    def _pack(self, i: int) -> tuple[Tensor, Tensor]:
        num_out, num_in = self.weights[i].shape
        p_in, p_out, has_pre = padded(num_in), padded(num_out), bool(self.pre0)
        pair, turned = self._factor(num_out, 2 * p_in + END), self._factor(num_in, p_out)
        single = pair if has_pre else torch.empty_like(pair)
        self.turned.append(turned)
        grid = (max(1, triton.cdiv(p_out, 32)), max(1, triton.cdiv(p_in, 32)))
        _pack[grid](
            *(self.weights[i], self.weights0[i], self.biases[i], self.biases0[i]),
            *(*factor(pair), *factor(single), *factor(turned), num_out, num_in, p_in),
            **{"HAS_PRE": has_pre, "PARTS": self.parts, "BM": 32, "BN": 32},
        )
        return pair, single

    def meet(self, met: Sequence[tuple[tuple[int, int], Tensor]], extra_TNH: Tensor | None) -> None:
        """The gradient before the last activation, from the columns that meet each range of chunks."""
        last, (num_tasks, num_chunks), at = len(self.x) - 1, self.sizes, 0
        self.grad = self._grad(last)
        for (lo, hi), cols_LL in [*met, ((num_chunks, num_chunks), None)]:
            if at < lo:
                self._back(last, self.x[-1], self.x[-1], 0, extra_TNH, (at * num_tasks, lo * num_tasks))
            if cols_LL is not None:
                b = split(2 * cols_LL[: self.widths[-1]], self.parts)
                self._back(last, self.x[-1], b, b.shape[2], extra_TNH, (lo * num_tasks, hi * num_tasks))
            at = hi

    def _grad(self, i: int) -> Tensor:
        """Of the first layer's pre-activations, which no product takes, whole."""
        columns = padded(self.widths[i])
        return self._factor(self.num_rows, columns) if i else self.roots.new_empty(1, self.num_rows, columns)

    def _back(self, i: int, a: Tensor, b: Tensor, depth: int, extra: Tensor | None, rows: tuple[int, int]) -> None:
        _back[(num_tiles(rows[1] - rows[0], padded(self.widths[i]), BACK_TILE),)](
            *(*factor(a), *factor(b), depth, extra, self.roots, self.slopes[i]),
            *(self.grad, self.grad.stride(0), *rows, *self._of(i)),
            **{"PARTS": self.parts, "HAS_EXTRA": extra is not None, "LAST": i == len(self.x) - 1, "FIRST": i == 0},
            **BACK_TILE,
        )

    def backward(self, e_TE: Tensor, z_NZ: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the task embeddings; of the chunk embeddings and each layer's weight and bias."""
        grads: list[Tensor] = []
        for i in reversed(range(1, len(self.weights))):
            num_out, num_in = self.weights[i].shape
            made = collapse(down(self.grad, self.x[i - 1][..., padded(num_in) :]))
            weight_and_bias = made[:num_out, :num_in], made[:num_out, padded(num_in)]
            grads = [*(grad.clone(memory_format=torch.contiguous_format) for grad in weight_and_bias), *grads]
            after, self.grad = self.grad, self._grad(i - 1)
            self._back(i - 1, after, self.turned[i - 1], after.shape[2], None, (0, self.num_rows))
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
    y: Tensor,
    weight_T: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A row is the sum of a part of its task's and one of its chunk's, and no row is made; in float64."""
    (num_tasks, e), (num_chunks, z) = e_TE.shape, z_NZ.shape
    width, p, length, weight = e + z, padded(e + z), y.shape[2], weight_T.double()[:, None]
    task_TL, chunk_NL = (torch.zeros(n, length, dtype=torch.float64, device=y.device) for n in (num_tasks, num_chunks))
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
        more, grad_TNH = direct_part(x_RL[None], y, width, weight_T.sqrt(), plan, grad_basis_SK)
        grad_TNH = weight.sqrt()[:, None] * grad_TNH
        value, grad_e, grad_z = value + more, grad_e + grad_TNH[..., :e].sum(1), grad_z + grad_TNH[..., e:].sum(0)
    dtype = e_TE.dtype
    return value.clamp(min=0).to(dtype), grad_e.to(dtype), [grad_z.to(dtype), grad_basis_SK]
