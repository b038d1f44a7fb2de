"""The specification: every op in plain PyTorch, with the equations of DESIGN.md by number.

Shape suffixes: T past tasks, N chunks, S chunk size, H trunk width, P target weights, R rows of a block (tasks x chunks),
C columns of a block, K = H + 1 (features and the bias), M = 2H + 1 (drifted features, snapshot features, the bias).
These functions are not differentiable; the autograd Functions around them are in ``ops.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRAM_TILE = 4096  # rows whose Gram is summed in the working precision before it is added up in float64
DIRECT_TILE = 1 << 20  # elements of the residual that the direct form holds at a time


def output_drift_fwd(
    dh_TNH: Tensor, basis_SK: Tensor, h0_TNH: Tensor, basis0_SK: Tensor, weight_T: Tensor, plan: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Value of the drift and its gradients for the (drift of the) features and the basis, rectangle by rectangle (E2).

    The residual of a rectangle is one thin product: D = X Y', X = [dH | H* | 1], Y = [V_H | dV]. With W the task weights:
    |D|^2 = <X'WX, Y'Y>,  d/dH = 2 W D V_H = 2 WX (Y'V_H),  d/dV = 2 D'W Ha = 2 Y (X'W Ha),  Ha = [H | 1].
    """
    num_tasks, num_chunks, width = dh_TNH.shape
    value = torch.zeros((), dtype=torch.float64, device=dh_TNH.device)
    grad_h_TNH, grad_basis_SK = torch.zeros_like(dh_TNH), torch.zeros_like(basis_SK)
    one_TN1 = torch.ones_like(dh_TNH[..., :1])
    x_TNM = torch.cat([dh_TNH, h0_TNH, one_TN1], -1)
    y_SM = torch.cat([basis_SK[:, :width], basis_SK - basis0_SK], -1)
    for task_lo, task_hi, chunk_lo, chunk_hi, col_lo, col_hi, direct in plan.tolist():
        _check_rectangle(task_lo, task_hi, num_tasks, chunk_lo, chunk_hi, num_chunks, col_lo, col_hi, len(y_SM))
        tasks = slice(task_lo, num_tasks if task_hi < 0 else task_hi)
        chunks = slice(chunk_lo, chunk_hi)
        x_RM, y_CM = x_TNM[tasks, chunks].flatten(0, 1), y_SM[col_lo:col_hi]
        w_R1 = weight_T[tasks].repeat_interleave(chunk_hi - chunk_lo)[:, None]
        form = _direct if direct else _gram
        value_block, grad_h_RH, grad_basis_CK = form(x_RM, w_R1, y_CM, width)
        value += value_block
        grad_h_TNH[tasks, chunks] += grad_h_RH.view_as(dh_TNH[tasks, chunks])
        grad_basis_SK[col_lo:col_hi] += grad_basis_CK
    return value.clamp(min=0).to(dh_TNH.dtype), grad_h_TNH, grad_basis_SK


def _check_rectangle(*bounds: int) -> None:
    for lo, hi, size in zip(bounds[::3], bounds[1::3], bounds[2::3], strict=True):
        if not 0 <= lo <= (size if hi < 0 else hi) <= size:
            raise RuntimeError(f"output_drift: a rectangle of the plan, [{lo}, {hi}), leaves the grid [0, {size})")


def _gram(x_RM: Tensor, w_R1: Tensor, y_CM: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The residual never exists: two M x M Gram matrices tie rows and columns."""
    wx_RM = w_R1 * x_RM
    rows_MM, cols_MM = _tall_product(wx_RM, x_RM), _tall_product(y_CM, y_CM)
    value = (rows_MM * cols_MM).sum()
    rows_MK = rows_MM[:, width:].clone()  # X'W Ha = X'W [H* | 1] + X'W [dH | 0]
    rows_MK[:, :width] += rows_MM[:, :width]
    grad_h_RH = 2 * wx_RM @ cols_MM[:, :width].to(x_RM.dtype)
    return value, grad_h_RH, 2 * y_CM @ rows_MK.to(y_CM.dtype)


def _direct(x_RM: Tensor, w_R1: Tensor, y_CM: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A tile of the residual is made, weighed, squared, contracted into the gradients and dropped."""
    value = torch.zeros((), dtype=torch.float64, device=x_RM.device)
    grad_h_RH, grad_basis_CK = torch.empty_like(x_RM[:, :width]), torch.zeros_like(y_CM[:, width:])
    step = max(1, DIRECT_TILE // max(1, y_CM.shape[0]))
    for row in range(0, x_RM.shape[0], step):
        rows = slice(row, row + step)
        d_RC = x_RM[rows] @ y_CM.T
        wd_RC = w_R1[rows] * d_RC
        ha_RK = x_RM[rows, width:].clone()
        ha_RK[:, :width] += x_RM[rows, :width]
        value += (wd_RC * d_RC).sum(dtype=torch.float64)
        grad_h_RH[rows] = 2 * wd_RC @ y_CM[:, :width]
        grad_basis_CK += 2 * wd_RC.T @ ha_RK
    return value, grad_h_RH, grad_basis_CK


def _tall_product(a: Tensor, b: Tensor) -> Tensor:
    """a'b in float64, summed over tiles of rows that are multiplied in the working precision."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for rows_a, rows_b in zip(a.split(GRAM_TILE), b.split(GRAM_TILE), strict=True):
        total += rows_a.T @ rows_b
    return total


def generate_fwd(h_NH: Tensor, basis_SK: Tensor, num_weights: int) -> Tensor:
    """All target weights, flat: chunk n is V [h_n | 1]; the last chunk is cut short (E3)."""
    width = h_NH.shape[1]
    return torch.addmm(basis_SK[:, width], h_NH, basis_SK[:, :width].T).flatten()[:num_weights]


def generate_bwd(grad_P: Tensor, h_NH: Tensor, basis_SK: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of E3 for the features, (dW) V_H, and for the basis, (dW)' [h | 1]."""
    (num_chunks, width), chunk_size = h_NH.shape, basis_SK.shape[0]
    padding = num_chunks * chunk_size - grad_P.numel()
    grad_NS = torch.nn.functional.pad(grad_P, (0, padding)).view(num_chunks, chunk_size)
    grad_basis_SK = torch.cat([grad_NS.T @ h_NH, grad_NS.sum(0)[:, None]], 1)
    return grad_NS @ basis_SK[:, :width], grad_basis_SK


def adam_delta_fwd(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> Tensor:
    """The step that Adam (``decoupled``: AdamW) would take from these moments, which stay as they are (E4)."""
    if not decoupled and weight_decay:
        grad = grad + weight_decay * param
    m = beta1 * exp_avg + (1 - beta1) * grad
    v = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    bias1, bias2 = _bias_corrections(step, beta1, beta2, grad.dtype)
    delta = -(lr / bias1) * m / ((v / bias2).sqrt() + eps)
    return delta - lr * weight_decay * param if decoupled and weight_decay else delta


def adam_delta_bwd(
    grad_delta: Tensor,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of E4 for the parameter and its gradient; the moments are state, not inputs."""
    if not decoupled and weight_decay:
        grad = grad + weight_decay * param
    m = beta1 * exp_avg + (1 - beta1) * grad
    v = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    bias1, bias2 = _bias_corrections(step, beta1, beta2, grad.dtype)
    root = (v / bias2).sqrt()
    scale = -(lr / bias1) / (root + eps)
    # d root / d grad = (1 - beta2) grad / (bias2 root); where root is 0 so is grad, and the term vanishes
    d_root = torch.where(root > 0, (1 - beta2) * grad / (bias2 * root), 0)
    grad_grad = grad_delta * scale * ((1 - beta1) - m / (root + eps) * d_root)
    grad_param = -lr * weight_decay * grad_delta if decoupled else weight_decay * grad_grad
    return grad_param, grad_grad


def _bias_corrections(step: Tensor, beta1: float, beta2: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    after = step.to(torch.float64) + 1
    return (1 - beta1**after).to(dtype), (1 - beta2**after).to(dtype)
