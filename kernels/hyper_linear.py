"""A linear layer whose weight W is generated row by row and never stored, forward and backward (DESIGN E3).

Row n r + j of W [O, I] is slot j of chunk n: W_j = Ha V_j' for all chunks, Ha = [h | 1], V_j = rows [j I, (j + 1) I) of the
basis. Generated: tiles of W or its gradient are made, used and dropped. Factorised: y = u Ha' with u_j = x V_j.
What several programs add to is made by each in a part of its own, and the parts are added afterwards: results repeat bit for
bit. In kernels i_ is an index, o_ are offsets, p_ pointers, m_ a mask, b_ a block of values; where a block begins is int64,
offsets within it are int32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasthyper.kernels.precision import dot, factor_precision

PROCESSORS = 132  # of an H100: sums are parted until there are about as many programs


@triton.jit
def _ha_tile(h, o_n, o_k, num_chunks, width):
    """[h | 1] of chunks ``o_n`` and features ``o_k``; 0 beyond them."""
    m_n = (o_n < num_chunks)[:, None]
    b_h = tl.load(h + o_n[:, None] * width + o_k[None, :], mask=m_n & (o_k < width)[None, :], other=0.0)
    return tl.where(m_n & (o_k == width)[None, :], 1.0, b_h)


@triton.jit
def _int64(i):
    return tl.full([], 0, tl.int64) + i


@triton.jit
def _basis_cells(basis, i_j, i_i, o_k, num_inputs, rows, width, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr):
    """Pointers and mask of slots x inputs x features of the basis: [BLOCK_J * BLOCK_I, BLOCK_K]."""
    o_s = tl.arange(0, BLOCK_J * BLOCK_I)
    o_j, o_i = o_s // BLOCK_I, o_s % BLOCK_I
    mask = ((i_j + o_j < rows) & (i_i + o_i < num_inputs))[:, None] & (o_k <= width)[None, :]
    first = basis + (_int64(i_j) * num_inputs + i_i) * (width + 1)
    return first + ((o_j * num_inputs + o_i)[:, None] * (width + 1) + o_k[None, :]), mask


@triton.jit
def _output_cells(y, i_b, o_b, o_j, o_n, batch, num_outputs, num_chunks, rows):
    """Pointers and mask of outputs of examples i_b + o_b; examples, slots and chunks broadcast."""
    o_o = o_n * rows + o_j
    mask = (i_b + o_b < batch) & (o_j < rows) & (o_n < num_chunks) & (o_o < num_outputs)
    return y + _int64(i_b) * num_outputs + (o_b * num_outputs + o_o), mask


@triton.jit
def _slot_outputs(y, i_m, o_m, o_n, batch, num_outputs, num_chunks, rows):
    """The same, row i_m + o_m standing for an example and a slot."""
    i_b, o_m = i_m // rows, i_m % rows + o_m
    return _output_cells(y, i_b, o_m // rows, o_m % rows, o_n, batch, num_outputs, num_chunks, rows)


@triton.jit
def _matrix_cells(matrix, i_row, o_row, o_col, num_rows, num_cols):
    """Pointers and mask of rows i_row + o_row of a matrix."""
    mask = (i_row + o_row < num_rows)[:, None] & (o_col < num_cols)[None, :]
    return matrix + _int64(i_row) * num_cols + (o_row[:, None] * num_cols + o_col[None, :]), mask


@triton.jit
def _swap(b_abc, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """[A, B, C] in any two dimensions -> [B, A, C]"""
    return tl.permute(tl.reshape(b_abc, [A, B, C]), (1, 0, 2))


@triton.jit
def _weight_tile(
    h, basis, i_j, i_n, i_i, num_inputs, num_chunks, rows, width,
    BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, NUM_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W' of inputs x (slots, chunks): [BLOCK_I, BLOCK_J * BLOCK_N]."""
    o_n = i_n + tl.arange(0, BLOCK_N)
    b_w = tl.zeros([BLOCK_J * BLOCK_I, BLOCK_N], h.dtype.element_ty)
    for i_k in range(0, NUM_K * BLOCK_K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        p_v, m_v = _basis_cells(basis, i_j, i_i, o_k, num_inputs, rows, width, BLOCK_J, BLOCK_I)
        b_v = tl.load(p_v, mask=m_v, other=0.0)
        b_w = dot(b_v, tl.trans(_ha_tile(h, o_n, o_k, num_chunks, width)), b_w, PRECISION)
    return tl.reshape(_swap(b_w, BLOCK_J, BLOCK_I, BLOCK_N), [BLOCK_I, BLOCK_J * BLOCK_N])


@triton.jit
def _generated_fwd_kernel(
    x, h, basis, y, batch, num_inputs, num_outputs, num_chunks, rows, width, share,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr, NUM_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y_j = x W_j' over ``share`` inputs; a program has a tile of examples x (slots, chunks)."""
    num_b, num_n = tl.cdiv(batch, BLOCK_B), tl.cdiv(num_chunks, BLOCK_N)
    i_b, i_tile, i_part = tl.program_id(0) % num_b * BLOCK_B, tl.program_id(0) // num_b, tl.program_id(1)
    i_n, i_j = i_tile % num_n * BLOCK_N, i_tile // num_n * BLOCK_J
    o_b, o_c = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_J * BLOCK_N)
    b_y = tl.zeros([BLOCK_B, BLOCK_J * BLOCK_N], y.dtype.element_ty)
    for i_i in range(i_part * share, min((i_part + 1) * share, num_inputs), BLOCK_I):
        b_w = _weight_tile(
            h, basis, i_j, i_n, i_i, num_inputs, num_chunks, rows, width,
            BLOCK_J, BLOCK_N, BLOCK_I, BLOCK_K, NUM_K, PRECISION,
        )  # fmt: skip
        p_x, m_x = _matrix_cells(x, i_b, o_b, i_i + tl.arange(0, BLOCK_I), batch, num_inputs)
        b_y = dot(tl.load(p_x, mask=m_x, other=0.0), b_w, b_y, PRECISION)
    y += _int64(i_part) * batch * num_outputs
    o_j, o_n = (i_j + o_c // BLOCK_N)[None, :], (i_n + o_c % BLOCK_N)[None, :]
    p_y, m_y = _output_cells(y, i_b, o_b[:, None], o_j, o_n, batch, num_outputs, num_chunks, rows)
    tl.store(p_y, b_y, mask=m_y)


@triton.jit
def _generated_dx_kernel(
    d_y, h, basis, d_x, batch, num_inputs, num_outputs, num_chunks, rows, width, share,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr, NUM_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = sum_j dy_j W_j over ``share`` tiles of (slots, chunks); a program has a tile of examples x inputs."""
    num_b, num_n = tl.cdiv(batch, BLOCK_B), tl.cdiv(num_chunks, BLOCK_N)
    i_b, i_i, i_part = tl.program_id(0) % num_b * BLOCK_B, tl.program_id(0) // num_b * BLOCK_I, tl.program_id(1)
    o_b, o_c = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_J * BLOCK_N)
    b_dx = tl.zeros([BLOCK_B, BLOCK_I], d_x.dtype.element_ty)
    for i_tile in range(i_part * share, min((i_part + 1) * share, num_n * tl.cdiv(rows, BLOCK_J))):
        i_n, i_j = i_tile % num_n * BLOCK_N, i_tile // num_n * BLOCK_J
        b_w = _weight_tile(
            h, basis, i_j, i_n, i_i, num_inputs, num_chunks, rows, width,
            BLOCK_J, BLOCK_N, BLOCK_I, BLOCK_K, NUM_K, PRECISION,
        )  # fmt: skip
        o_j, o_n = (i_j + o_c // BLOCK_N)[None, :], (i_n + o_c % BLOCK_N)[None, :]
        p_y, m_y = _output_cells(d_y, i_b, o_b[:, None], o_j, o_n, batch, num_outputs, num_chunks, rows)
        b_dx = dot(tl.load(p_y, mask=m_y, other=0.0), tl.trans(b_w), b_dx, PRECISION)
    d_x += _int64(i_part) * batch * num_inputs
    p_x, m_x = _matrix_cells(d_x, i_b, o_b, i_i + tl.arange(0, BLOCK_I), batch, num_inputs)
    tl.store(p_x, b_dx, mask=m_x)


@triton.jit
def _generated_bwd_kernel(
    d_y, x, h, basis, d_h, d_basis, batch, num_inputs, num_outputs, num_chunks, rows, width,
    WITH_H: tl.constexpr, WITH_BASIS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW_j = dy_j' x, tile by tile, into dV_j = dW_j' Ha and dH = sum_j dW_j V_j, BLOCK_K features of them.

    Programs on axis 0 share the tiles of (slots, inputs), those on axis 1 have a block of features. WITH_H they leave a part
    of dH each, and have one block of chunks, by axis 2; without, they pass all chunks.
    """
    num_i, i_part, i_k = tl.cdiv(num_inputs, BLOCK_I), tl.program_id(0), tl.program_id(1) * BLOCK_K
    o_b, o_c, o_k = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_J * BLOCK_N), i_k + tl.arange(0, BLOCK_K)
    i_first, i_last = 0, num_chunks
    if WITH_H:
        i_first = tl.program_id(2) * BLOCK_N
        i_last = i_first + BLOCK_N
    b_dh = tl.zeros([BLOCK_N, BLOCK_K], h.dtype.element_ty)
    for i_tile in range(i_part, num_i * tl.cdiv(rows, BLOCK_J), tl.num_programs(0)):
        i_i, i_j = i_tile % num_i * BLOCK_I, i_tile // num_i * BLOCK_J
        b_dv = tl.zeros([BLOCK_J * BLOCK_I, BLOCK_K], h.dtype.element_ty)
        for i_n in range(i_first, i_last, BLOCK_N):
            o_j, o_n = (i_j + o_c // BLOCK_N)[None, :], (i_n + o_c % BLOCK_N)[None, :]
            b_dw = tl.zeros([BLOCK_I, BLOCK_J * BLOCK_N], h.dtype.element_ty)
            for i_b in range(0, batch, BLOCK_B):
                p_x, m_x = _matrix_cells(x, i_b, o_b, i_i + tl.arange(0, BLOCK_I), batch, num_inputs)
                p_y, m_y = _output_cells(d_y, i_b, o_b[:, None], o_j, o_n, batch, num_outputs, num_chunks, rows)
                b_x, b_dy = tl.load(p_x, mask=m_x, other=0.0), tl.load(p_y, mask=m_y, other=0.0)
                b_dw = dot(tl.trans(b_x), b_dy, b_dw, PRECISION)
            b_dw = tl.reshape(_swap(b_dw, BLOCK_I, BLOCK_J, BLOCK_N), [BLOCK_J * BLOCK_I, BLOCK_N])
            if WITH_BASIS:
                b_ha = _ha_tile(h, i_n + tl.arange(0, BLOCK_N), o_k, num_chunks, width)
                b_dv = dot(b_dw, b_ha, b_dv, PRECISION)
            if WITH_H:
                p_v, m_v = _basis_cells(basis, i_j, i_i, o_k, num_inputs, rows, width, BLOCK_J, BLOCK_I)
                b_dh = dot(tl.trans(b_dw), tl.load(p_v, mask=m_v, other=0.0), b_dh, PRECISION)
        if WITH_BASIS:
            p_v, m_v = _basis_cells(d_basis, i_j, i_i, o_k, num_inputs, rows, width, BLOCK_J, BLOCK_I)
            tl.store(p_v, b_dv, mask=m_v)
    if WITH_H:
        d_h += _int64(i_part) * num_chunks * width
        p_h, m_h = _matrix_cells(d_h, i_first, tl.arange(0, BLOCK_N), o_k, num_chunks, width)
        tl.store(p_h, b_dh, mask=m_h)


@triton.jit
def _factorised_fwd_kernel(
    u, h, y, batch, num_outputs, num_chunks, rows, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = u Ha'; a program has a tile of (examples, slots) x chunks."""
    i_m, o_m = tl.program_id(0) * BLOCK_M, tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_y = tl.zeros([BLOCK_M, BLOCK_N], y.dtype.element_ty)
    for i_k in range(0, width + 1, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        p_u, m_u = _matrix_cells(u, i_m, o_m, o_k, batch * rows, width + 1)
        b_ha = _ha_tile(h, o_n, o_k, num_chunks, width)
        b_y = dot(tl.load(p_u, mask=m_u, other=0.0), tl.trans(b_ha), b_y, PRECISION)
    p_y, m_y = _slot_outputs(y, i_m, o_m[:, None], o_n[None, :], batch, num_outputs, num_chunks, rows)
    tl.store(p_y, b_y, mask=m_y)


@triton.jit
def _factorised_du_kernel(
    d_y, h, d_u, batch, num_outputs, num_chunks, rows, width, share,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du = dy Ha over ``share`` chunks; a program has a tile of (examples, slots) x features."""
    i_m, o_m = tl.program_id(0) * BLOCK_M, tl.arange(0, BLOCK_M)
    o_k, i_part = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K), tl.program_id(2)
    b_du = tl.zeros([BLOCK_M, BLOCK_K], d_u.dtype.element_ty)
    for i_n in range(i_part * share, min((i_part + 1) * share, num_chunks), BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        p_y, m_y = _slot_outputs(d_y, i_m, o_m[:, None], o_n[None, :], batch, num_outputs, num_chunks, rows)
        b_ha = _ha_tile(h, o_n, o_k, num_chunks, width)
        b_du = dot(tl.load(p_y, mask=m_y, other=0.0), b_ha, b_du, PRECISION)
    d_u += _int64(i_part) * batch * rows * (width + 1)
    p_u, m_u = _matrix_cells(d_u, i_m, o_m, o_k, batch * rows, width + 1)
    tl.store(p_u, b_du, mask=m_u)


@triton.jit
def _factorised_dh_kernel(
    d_y, u, d_h, batch, num_outputs, num_chunks, rows, width, share,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dH = dy' u over ``share`` rows (example, slot); a program has a tile of chunks x features."""
    i_n, o_n, o_m = tl.program_id(0) * BLOCK_N, tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    o_k, i_part = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K), tl.program_id(2)
    b_dh = tl.zeros([BLOCK_N, BLOCK_K], d_h.dtype.element_ty)
    for i_m in range(i_part * share, min((i_part + 1) * share, batch * rows), BLOCK_M):
        p_y, m_y = _slot_outputs(d_y, i_m, o_m[None, :], (i_n + o_n)[:, None], batch, num_outputs, num_chunks, rows)
        p_u, m_u = _matrix_cells(u, i_m, o_m, o_k, batch * rows, width + 1)
        b_dy, b_u = tl.load(p_y, mask=m_y, other=0.0), tl.load(p_u, mask=m_u, other=0.0)
        b_dh = dot(b_dy, b_u, b_dh, PRECISION)
    d_h += _int64(i_part) * num_chunks * width
    p_h, m_h = _matrix_cells(d_h, i_n, o_n, o_k, num_chunks, width)
    tl.store(p_h, b_dh, mask=m_h)


@triton.jit
def _factorised_dx_kernel(
    d_u, basis, d_x, batch, num_inputs, rows, width, share,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, NUM_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = sum_j du_j V_j' over ``share`` slots; a program has a tile of examples x inputs."""
    i_b, o_b, i_i = tl.program_id(0) * BLOCK_B, tl.arange(0, BLOCK_B), tl.program_id(1) * BLOCK_I
    i_part = tl.program_id(2)
    b_dx = tl.zeros([BLOCK_B, BLOCK_I], d_x.dtype.element_ty)
    for i_step in range(i_part * share * NUM_K, min((i_part + 1) * share, rows) * NUM_K):
        i_j, o_k = i_step // NUM_K, i_step % NUM_K * BLOCK_K + tl.arange(0, BLOCK_K)
        p_v, m_v = _basis_cells(basis, i_j, i_i, o_k, num_inputs, rows, width, 1, BLOCK_I)
        p_u = d_u + (_int64(i_b) * rows + i_j) * (width + 1) + (o_b[:, None] * rows * (width + 1) + o_k[None, :])
        m_u = (i_b + o_b < batch)[:, None] & (o_k <= width)[None, :]
        b_du, b_v = tl.load(p_u, mask=m_u, other=0.0), tl.load(p_v, mask=m_v, other=0.0)
        b_dx = dot(b_du, tl.trans(b_v), b_dx, PRECISION)
    d_x += _int64(i_part) * batch * num_inputs
    p_x, m_x = _matrix_cells(d_x, i_b, o_b, i_i + tl.arange(0, BLOCK_I), batch, num_inputs)
    tl.store(p_x, b_dx, mask=m_x)


def hyper_linear_fwd(
    x_BI: Tensor, h_NH: Tensor, basis_SK: Tensor, rows: int, num_outputs: int, factorised: bool
) -> tuple[Tensor, Tensor]:
    """``reference.hyper_linear_fwd`` in float32, its products by torch's own switch for TF32, or float64."""
    x_BI, h_NH, basis_SK = x_BI.contiguous(), h_NH.contiguous(), basis_SK.contiguous()
    (batch, num_inputs), (num_chunks, width) = x_BI.shape, h_NH.shape
    precision, most = _settings(x_BI)
    if not factorised:
        blocks = _weight_blocks(x_BI, h_NH, rows, most)
        programs = triton.cdiv(batch, blocks["BLOCK_B"]) * _num_weight_tiles(num_chunks, rows, blocks)
        share, num_parts = _shares(num_inputs, blocks["BLOCK_I"], programs)
        y_parts = x_BI.new_empty(num_parts, batch, num_outputs)
        tensors, sizes = (x_BI, h_NH, basis_SK, y_parts), (batch, num_inputs, num_outputs, num_chunks, rows, width)
        _generated_fwd_kernel[programs, num_parts](*tensors, *sizes, share, **blocks, **precision)
        return _sum(y_parts), x_BI.new_empty(0, rows, width + 1)
    u_BrK, y_BO = x_BI.new_empty(batch, rows, width + 1), x_BI.new_empty(batch, num_outputs)
    torch.bmm(x_BI.expand(rows, -1, -1), _slots(basis_SK, rows, num_inputs), out=u_BrK.transpose(0, 1))
    blocks = {"BLOCK_M": _block(batch * rows, most), "BLOCK_N": _block(num_chunks, most), "BLOCK_K": _block(width + 1, 32)}
    grid = triton.cdiv(batch * rows, blocks["BLOCK_M"]), triton.cdiv(num_chunks, blocks["BLOCK_N"])
    _factorised_fwd_kernel[grid](u_BrK, h_NH, y_BO, batch, num_outputs, num_chunks, rows, width, **blocks, **precision)
    return y_BO, u_BrK


def hyper_linear_bwd(
    grad_BO: Tensor,
    x_BI: Tensor,
    h_NH: Tensor,
    basis_SK: Tensor,
    u_BrK: Tensor,
    rows: int,
    factorised: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.hyper_linear_bwd``, of what ``hyper_linear_fwd`` takes."""
    grad_BO, x_BI, h_NH, basis_SK, u_BrK = (t.contiguous() for t in (grad_BO, x_BI, h_NH, basis_SK, u_BrK))
    grad_basis_SK = torch.empty_like(basis_SK)
    grad_basis_SK[rows * x_BI.shape[1] :] = 0
    if factorised:
        grad_h_NH, du_BrK = _factorised_bwd(grad_BO, x_BI, h_NH, u_BrK, rows, grad_basis_SK)
    else:
        grad_h_NH = _generated_bwd(grad_BO, x_BI, h_NH, basis_SK, rows, grad_basis_SK)
    if not needs_x:
        grad_x_BI = x_BI.new_empty(0, x_BI.shape[1])
    elif factorised:
        grad_x_BI = _factorised_dx(du_BrK, basis_SK, x_BI)
    else:
        grad_x_BI = _generated_dx(grad_BO, x_BI, h_NH, basis_SK, rows)
    return grad_x_BI, grad_h_NH, grad_basis_SK


def _generated_bwd(grad_BO: Tensor, x_BI: Tensor, h_NH: Tensor, basis_SK: Tensor, rows: int, out_SK: Tensor) -> Tensor:
    """Gradient of the features; that of the basis is written to ``out_SK``."""
    (batch, num_inputs), (num_chunks, width) = x_BI.shape, h_NH.shape
    precision, most = _settings(x_BI)
    block_n = _block(num_chunks, most)
    blocks = {
        "BLOCK_B": _block(batch, 32),
        "BLOCK_J": min(triton.next_power_of_2(rows), max(1, 32 // block_n)),
        "BLOCK_N": block_n,
        "BLOCK_I": _block(num_inputs, 32),
        "BLOCK_K": _block(width + 1, 2 * most if width >= most else most),
        "num_warps": 8,
    }
    tiles = triton.cdiv(rows, blocks["BLOCK_J"]) * triton.cdiv(num_inputs, blocks["BLOCK_I"])
    num_n, num_k = triton.cdiv(num_chunks, block_n), triton.cdiv(width + 1, blocks["BLOCK_K"])
    num_parts = min(tiles, max(1, PROCESSORS // (num_n * num_k)))
    h_parts = h_NH.new_empty(num_parts, num_chunks, width)

    def launch(programs: int, num_n: int, with_h: bool, with_basis: bool) -> None:
        tensors, sizes = (grad_BO, x_BI, h_NH, basis_SK, h_parts, out_SK), (batch, num_inputs, grad_BO.shape[1])
        _generated_bwd_kernel[programs, num_k, num_n](
            *tensors, *sizes, num_chunks, rows, width, with_h, with_basis, **blocks, **precision
        )

    if num_n == 1:
        launch(num_parts, 1, True, True)
    else:  # a program cannot hold the sums over all chunks and those over all tiles, so dW is made twice
        launch(num_parts, num_n, True, False)
        launch(tiles, 1, False, True)
    return _sum(h_parts)


def _generated_dx(grad_BO: Tensor, x_BI: Tensor, h_NH: Tensor, basis_SK: Tensor, rows: int) -> Tensor:
    (batch, num_inputs), (num_chunks, width) = x_BI.shape, h_NH.shape
    precision, most = _settings(x_BI)
    blocks = _weight_blocks(x_BI, h_NH, rows, most)
    programs = triton.cdiv(batch, blocks["BLOCK_B"]) * triton.cdiv(num_inputs, blocks["BLOCK_I"])
    share, num_parts = _shares(_num_weight_tiles(num_chunks, rows, blocks), 1, programs)
    x_parts = x_BI.new_empty(num_parts, batch, num_inputs)
    sizes = batch, num_inputs, grad_BO.shape[1], num_chunks, rows, width, share
    _generated_dx_kernel[programs, num_parts](grad_BO, h_NH, basis_SK, x_parts, *sizes, **blocks, **precision)
    return _sum(x_parts)


def _factorised_bwd(
    grad_BO: Tensor, x_BI: Tensor, h_NH: Tensor, u_BrK: Tensor, rows: int, out_SK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the features and of u; that of the basis is written to ``out_SK``."""
    (batch, num_inputs), (num_chunks, width) = x_BI.shape, h_NH.shape
    precision, most = _settings(x_BI)
    block_m, block_n, block_k = _block(batch * rows, most), _block(num_chunks, most), _block(width + 1, most)
    num_m, num_n, num_k = (
        triton.cdiv(batch * rows, block_m),
        triton.cdiv(num_chunks, block_n),
        triton.cdiv(width + 1, block_k),
    )
    sizes = batch, grad_BO.shape[1], num_chunks, rows, width
    share, num_parts = _shares(num_chunks, 32, num_m * num_k)
    u_parts = u_BrK.new_empty(num_parts, *u_BrK.shape)
    _factorised_du_kernel[num_m, num_k, num_parts](
        grad_BO, h_NH, u_parts, *sizes, share, BLOCK_M=block_m, BLOCK_N=32, BLOCK_K=block_k, **precision
    )
    share, num_parts = _shares(batch * rows, 32, num_n * num_k)
    h_parts = h_NH.new_empty(num_parts, num_chunks, width)
    _factorised_dh_kernel[num_n, num_k, num_parts](
        grad_BO, u_BrK, h_parts, *sizes, share, BLOCK_M=32, BLOCK_N=block_n, BLOCK_K=block_k, **precision
    )
    du_BrK = _sum(u_parts)
    torch.bmm(x_BI.T.expand(rows, -1, -1), du_BrK.transpose(0, 1), out=_slots(out_SK, rows, num_inputs))
    return _sum(h_parts), du_BrK


def _factorised_dx(du_BrK: Tensor, basis_SK: Tensor, x_BI: Tensor) -> Tensor:
    (batch, rows, k), num_inputs = du_BrK.shape, x_BI.shape[1]
    precision, most = _settings(x_BI)
    blocks = {"BLOCK_B": _block(batch, 2 * most), "BLOCK_I": _block(num_inputs, most), "BLOCK_K": _block(k, 32)}
    num_b, num_i = triton.cdiv(batch, blocks["BLOCK_B"]), triton.cdiv(num_inputs, blocks["BLOCK_I"])
    share, num_parts = _shares(rows, 1, num_b * num_i)
    x_parts, num_k = x_BI.new_empty(num_parts, batch, num_inputs), triton.cdiv(k, blocks["BLOCK_K"])
    _factorised_dx_kernel[num_b, num_i, num_parts](
        du_BrK, basis_SK, x_parts, batch, num_inputs, rows, k - 1, share, NUM_K=num_k, num_warps=8, **blocks, **precision
    )
    return _sum(x_parts)


def _settings(x: Tensor) -> tuple[dict[str, str], int]:
    """Precision of products, and how wide a block of an output may be, so that a tile fits registers."""
    return ({"PRECISION": "ieee"}, 32) if x.dtype == torch.float64 else ({"PRECISION": factor_precision()}, 64)


def _block(size: int, most: int) -> int:
    """Smallest block that holds ``size``, a power of two within what ``tl.dot`` takes."""
    return max(16, min(most, triton.next_power_of_2(size)))


def _weight_blocks(x_BI: Tensor, h_NH: Tensor, rows: int, most: int) -> dict[str, int]:
    """Tiles of W: where chunks are few, of several slots. All features at once, where they are few enough to be kept."""
    width, block_n = h_NH.shape[1], _block(len(h_NH), most)
    block_k = _block(width + 1, most if width < most else 32)
    return {
        "BLOCK_B": _block(len(x_BI), 2 * most),
        "BLOCK_J": min(triton.next_power_of_2(rows), most // block_n),
        "BLOCK_N": block_n,
        "BLOCK_I": _block(x_BI.shape[1], 32),
        "BLOCK_K": block_k,
        "NUM_K": triton.cdiv(width + 1, block_k),
        "num_warps": 8,
    }


def _num_weight_tiles(num_chunks: int, rows: int, blocks: dict[str, int]) -> int:
    return triton.cdiv(num_chunks, blocks["BLOCK_N"]) * triton.cdiv(rows, blocks["BLOCK_J"])


def _shares(size: int, block: int, programs: int) -> tuple[int, int]:
    """A sum over ``size`` terms in parts of whole blocks, as many as keep the processors busy: length of a part, number."""
    num_blocks = max(1, triton.cdiv(size, block))
    share = triton.cdiv(num_blocks, max(1, PROCESSORS // max(1, programs)))
    return share * block, triton.cdiv(num_blocks, share)


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _slots(basis_SK: Tensor, rows: int, num_inputs: int) -> Tensor:
    return basis_SK[: rows * num_inputs].view(rows, num_inputs, -1)
