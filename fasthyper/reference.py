"""The specification: every op in plain PyTorch, with the equations of DESIGN.md by number.

Shape suffixes: T past tasks, N chunks, S chunk size, E task-embedding size, Z chunk-embedding size, H trunk width, P target
weights, R rows of a rectangle (tasks x chunks), C columns of a rectangle, K = H + 1 (features and the bias), M = 2H + 1
(drifted features, snapshot features, the bias), O and I outputs and inputs of a layer, B batch, r rows of a layer's weight
in a chunk.
The ops are not differentiable; the autograd Functions around them are in ``ops.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper.activations import BY_CODE

GRAM_TILE = 4096  # rows that are multiplied in float64 at a time
DIRECT_TILE = 1 << 20  # elements of the residual that the direct form holds at a time
MOST_KNOWN = 1 << 21  # elements of the basis' Gram matrices, which a task with many heads has many of


def output_drift_fwd(
    dh_TNH: Tensor,
    basis_SK: Tensor,
    h0_TNH: Tensor,
    basis0_SK: Tensor,
    weight_T: Tensor,
    plan: Tensor,
    precision: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value of the drift and its gradients for the (drift of the) features and the basis, rectangle by rectangle (E2).

    The residual of a rectangle is one thin product: D = X Y', X = [dH | H* | 1], Y = [V_H | dV]. With W the task weights:
    |D|^2 = <X'WX, Y'Y>,  d/dH = 2 W D V_H = 2 WX (Y'V_H),  d/dV = 2 D'W Ha = 2 Y (X'W Ha),  Ha = [H | 1].
    A lower ``precision`` is leave that is not taken here.
    """
    num_tasks, num_chunks, width = dh_TNH.shape
    value = torch.zeros((), dtype=torch.float64, device=dh_TNH.device)
    grad_h_TNH, grad_basis_SK = torch.zeros_like(dh_TNH), torch.zeros_like(basis_SK)
    one_TN1 = dh_TNH.new_ones(num_tasks, num_chunks, 1)
    x_TNM = torch.cat([dh_TNH, h0_TNH, one_TN1], -1)
    y_SM = torch.cat([basis_SK[:, :width], basis_SK - basis0_SK], -1)
    for task_lo, task_hi, chunk_lo, chunk_hi, col_lo, col_hi, direct in plan.tolist():
        tasks = slice(task_lo, num_tasks if task_hi < 0 else task_hi)
        _check_rectangle(task_lo, tasks.stop, num_tasks, chunk_lo, chunk_hi, num_chunks, col_lo, col_hi, len(y_SM))
        chunks = slice(chunk_lo, chunk_hi)
        x_RM, y_CM = x_TNM[tasks, chunks].flatten(0, 1), y_SM[col_lo:col_hi]
        w_R1 = weight_T[tasks].repeat_interleave(chunk_hi - chunk_lo)[:, None]
        form = _direct if direct else _gram
        value_block, grad_h_RH, grad_basis_CK = form(x_RM, w_R1, y_CM, width)
        value += value_block
        grad_h_TNH[tasks, chunks] += grad_h_RH.view_as(dh_TNH[tasks, chunks])
        grad_basis_SK[col_lo:col_hi] += grad_basis_CK
    return value.clamp(min=0).to(dh_TNH.dtype), grad_h_TNH, grad_basis_SK


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
    """Value of the drift and its gradients for the task embeddings and all of theta, trunk included (E2 behind E5).

    A difference goes through the trunk, da = W dx + dW x0 + db and dx = act(a0 + da) - act(a0), so that a small step keeps
    its digits. ``pre0`` and ``gram0_BKK`` only spare work: pre-activations are made from the snapshot else; Gram matrices
    are not read here.
    """
    (z_NZ, *layers, basis_SK), (z0_NZ, *layers0, basis0_SK) = theta, theta0
    split, act = [embeddings_TE.shape[1]], BY_CODE[activation]
    de_TE, dz_NZ = embeddings_TE - embeddings0_TE, z_NZ - z0_NZ
    now, slopes = [], []  # inputs of the second layer and on, slopes of each layer's activation
    if not layers:
        dx, x0 = pairs(de_TE, dz_NZ), pairs(embeddings0_TE, z0_NZ)
    lacking = len(layers) // 2 - len(pre0)
    for i in range(len(layers) // 2):
        weight_OI, bias_O, weight0_OI, bias0_O = *layers[2 * i : 2 * i + 2], *layers0[2 * i : 2 * i + 2]
        a0 = pre0[i - lacking] if i >= lacking else F.linear(x0 if i else pairs(embeddings0_TE, z0_NZ), weight0_OI, bias0_O)
        if i == 0:
            (we, wz), (we0, wz0) = weight_OI.tensor_split(split, 1), weight0_OI.tensor_split(split, 1)
            da_e = linear_drift(de_TE, we, bias_O, embeddings0_TE, we0, bias0_O)
            da = da_e[:, None] + linear_drift(dz_NZ, wz, 0 * bias_O, z0_NZ, wz0, 0 * bias_O)
        else:
            now.append(x0 + dx)
            da = linear_drift(dx, weight_OI, bias_O, x0, weight0_OI, bias0_O)
        x0 = act.value(a0)
        dx, slope = act.drift(a0, da)
        slopes.append(slope)

    value, grad, grad_basis_SK = output_drift_fwd(dx, basis_SK, x0, basis0_SK, weight_T, plan)

    grads: list[Tensor] = [grad_basis_SK]
    if not layers:
        grad_e_TE, grad_z_NZ = grad[..., : split[0]].sum(1), grad[..., split[0] :].sum(0)
    for i in reversed(range(len(layers) // 2)):
        weight_OI, grad = layers[2 * i], grad * slopes[i]
        if i == 0:
            grad_t, grad_n = grad.sum(1), grad.sum(0)
            we, wz = weight_OI.tensor_split(split, 1)
            grad_e_TE, grad_z_NZ = grad_t @ we, grad_n @ wz
            grads = [torch.cat([grad_t.T @ embeddings_TE, grad_n.T @ z_NZ], 1), grad_t.sum(0), *grads]
        else:
            grads = [grad.flatten(0, 1).T @ now[i - 1].flatten(0, 1), grad.sum((0, 1)), *grads]
            grad = grad @ weight_OI
    return value, grad_e_TE, [grad_z_NZ, *grads]


def pairs(rows_TE: Tensor, rows_NZ: Tensor) -> Tensor:
    """[e_t, z_n] for all t and n: ``[T, N, E + Z]``; of ``[T, N, E]``, where each chunk has embeddings of its own, too."""
    rows_TNE = rows_TE[:, None] if rows_TE.dim() == 2 else rows_TE
    return torch.cat([rows_TNE.expand(-1, len(rows_NZ), -1), rows_NZ.expand(len(rows_TE), -1, -1)], -1)


def linear_drift(dx: Tensor, weight: Tensor, bias: Tensor, x0: Tensor, weight0: Tensor, bias0: Tensor) -> Tensor:
    """(W x + b) - (W0 x0 + b0) for x = x0 + dx."""
    return F.linear(dx, weight, bias - bias0) + F.linear(x0, weight - weight0)


def affine_drift_fwd(basis_PK: Tensor, basis0_PK: Tensor, moments_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Value of ``<D, D moments> / 2``, ``D = basis - basis0``, and its gradient ``D moments``."""
    moved_PK = basis_PK - basis0_PK
    grad_PK = moved_PK @ moments_KK
    return (moved_PK.mul_(grad_PK).sum() / 2).clamp_(min=0), grad_PK


def target_drift_fwd(
    h_TNH: Tensor,
    basis_SK: Tensor,
    snapshot: Sequence[Tensor],
    targets: Sequence[Tensor],
    importance: Sequence[Tensor],
    weight_T: Tensor,
    plan: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value of the drift with an importance F of each weight, or to given targets, and its gradients, tile by tile.

    With ``snapshot`` = [h0, basis0], h is dh and d = X Y' as in ``output_drift_fwd``; without, d = [H | 1] V' - targets.
    ``targets`` and ``importance`` are empty, one tensor ``[T, P]``, or T tensors ``[P]``.
    sum w F d^2,  d/dH = 2 (w F d) V_H,  d/dV = 2 (w F d)' [H | 1].
    """
    (num_tasks, num_chunks, width), chunk_size = h_TNH.shape, len(basis_SK)
    value = torch.zeros((), dtype=torch.float64, device=h_TNH.device)
    grad_h_TNH, grad_basis_SK = torch.zeros_like(h_TNH), torch.zeros_like(basis_SK)
    x_TND = ha_TNK = torch.cat([h_TNH, h_TNH.new_ones(num_tasks, num_chunks, 1)], -1)
    y_SD = basis_SK
    if snapshot:
        h0_TNH, basis0_SK = snapshot
        x_TND = torch.cat([h_TNH, h0_TNH, ha_TNK[..., width:]], -1)
        ha_TNK = torch.cat([h_TNH + h0_TNH, ha_TNK[..., width:]], -1)
        y_SD = torch.cat([basis_SK[:, :width], basis_SK - basis0_SK], -1)
    for task_lo, task_hi, chunk_lo, chunk_hi, col_lo, col_hi, _ in plan.tolist():
        task_hi = num_tasks if task_hi < 0 else task_hi
        _check_rectangle(task_lo, task_hi, num_tasks, chunk_lo, chunk_hi, num_chunks, col_lo, col_hi, chunk_size)
        if col_lo == col_hi:
            continue
        step = max(1, DIRECT_TILE // (col_hi - col_lo))
        for task in range(task_lo, task_hi):
            for lo in range(chunk_lo, chunk_hi, step):
                hi = min(lo + step, chunk_hi)
                chunks, cols, tile = slice(lo, hi), slice(col_lo, col_hi), (task, lo, hi, col_lo, col_hi, chunk_size)
                d_NC = x_TND[task, chunks] @ y_SD[cols].T
                if targets:
                    d_NC = d_NC - _cells("targets", targets, *tile)
                wd_NC = weight_T[task] * (d_NC * _cells("importance", importance, *tile) if importance else d_NC)
                value += (wd_NC * d_NC).sum(dtype=torch.float64)
                grad_h_TNH[task, chunks] += 2 * wd_NC @ basis_SK[cols, :width]
                grad_basis_SK[cols] += 2 * wd_NC.T @ ha_TNK[task, chunks]
    return value.to(h_TNH.dtype), grad_h_TNH, grad_basis_SK


def _cells(
    name: str, rows: Sequence[Tensor], task: int, lo: int, hi: int, col_lo: int, col_hi: int, chunk_size: int
) -> Tensor:
    """Of one task, the numbers of chunks ``[lo, hi)`` and columns ``[col_lo, col_hi)``, as they lie end to end."""
    row_P = rows[0][task] if rows[0].dim() == 2 else rows[task]
    start, stop = lo * chunk_size + col_lo, (hi - 1) * chunk_size + col_hi
    if stop > len(row_P):
        raise RuntimeError(f"target_drift: the plan reaches {stop} weights of a task, {name} has {len(row_P)}")
    return row_P[start:stop].unfold(0, col_hi - col_lo, chunk_size)


def gram0(h0_TNH: Tensor, weight_T: Tensor, plan: Tensor) -> Tensor:
    """H*'W H* with H* = [H* | 1] for each rectangle in Gram form, float64 ``[B, K, K]``: a constant of a task."""
    ha0_TNK = torch.cat([h0_TNH, h0_TNH.new_ones(*h0_TNH.shape[:2], 1)], -1)
    grams = torch.zeros(len(plan), ha0_TNK.shape[-1], ha0_TNK.shape[-1], dtype=torch.float64, device=h0_TNH.device)
    for gram, (task_lo, task_hi, chunk_lo, chunk_hi, *_, direct) in zip(grams, plan.tolist(), strict=True):
        if not direct:
            tasks = slice(task_lo, len(h0_TNH) if task_hi < 0 else task_hi)
            ha0 = ha0_TNK[tasks, chunk_lo:chunk_hi]
            gram += _tall_product((weight_T[tasks, None, None] * ha0).flatten(0, 1), ha0.flatten(0, 1))
    return grams


def column_ranges(plan: Tensor) -> list[tuple[int, int]]:
    """The columns of all rectangles of a plan, cut where one begins or ends."""
    cuts = sorted({cut for *_, col_lo, col_hi, _ in plan.tolist() if col_lo < col_hi for cut in (col_lo, col_hi)})
    return list(pairwise(cuts))


def basis_gram0(basis0_SK: Tensor, plan: Tensor) -> Tensor:
    """V*'V* of each of ``column_ranges``, float64 ``[C, K, K]``: a constant of a task, too."""
    ranges = [basis0_SK[lo:hi] for lo, hi in column_ranges(plan)]
    width = basis0_SK.shape[1]
    grams = [_tall_product(columns, columns) for columns in ranges]
    return torch.stack(grams) if grams else torch.zeros(0, width, width, dtype=torch.float64, device=basis0_SK.device)


def with_basis_gram0(gram0_BKK: Tensor, basis0_SK: Tensor, plan: Tensor) -> Tensor:
    """``gram0`` and behind it ``basis_gram0``, where kernels read that, those of the CPU, and it takes little memory."""
    is_little = len(column_ranges(plan)) * basis0_SK.shape[1] ** 2 <= MOST_KNOWN
    if basis0_SK.device.type != "cpu" or not is_little:
        return gram0_BKK
    return torch.cat([gram0_BKK, basis_gram0(basis0_SK, plan)])


def _check_rectangle(*bounds: int) -> None:
    for lo, hi, size in zip(bounds[::3], bounds[1::3], bounds[2::3], strict=True):
        if not 0 <= lo <= hi <= size:
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
    """a'b in float64, over tiles of rows."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for rows_a, rows_b in zip(a.split(GRAM_TILE), b.split(GRAM_TILE), strict=True):
        total += rows_a.double().T @ rows_b.double()
    return total


def generate_fwd(h_NH: Tensor, basis_SK: Tensor, num_weights: int) -> Tensor:
    """All target weights, flat: chunk n is V [h_n | 1]; the last chunk is cut short (E3)."""
    width = h_NH.shape[1]
    return torch.addmm(basis_SK[:, width], h_NH, basis_SK[:, :width].T).flatten()[:num_weights]


def generate_bwd(grads: list[Tensor], h_NH: Tensor, basis_SK: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of E3 for the features, (dW) V_H, and for the basis, (dW)' [h | 1]; dW lies in parts, end to end."""
    grad_P = torch.cat([grad.flatten() for grad in grads])
    (num_chunks, width), chunk_size = h_NH.shape, basis_SK.shape[0]
    padding = num_chunks * chunk_size - grad_P.numel()
    grad_NS = torch.nn.functional.pad(grad_P, (0, padding)).view(num_chunks, chunk_size)
    grad_basis_SK = torch.cat([grad_NS.T @ h_NH, grad_NS.sum(0)[:, None]], 1)
    return grad_NS @ basis_SK[:, :width], grad_basis_SK


def hyper_linear_fwd(
    x_BI: Tensor, h_NH: Tensor, basis_SK: Tensor, rows: int, num_outputs: int, factorised: bool
) -> tuple[Tensor, Tensor]:
    """y = x W' for the weight of E3 whose chunks hold r rows, in columns 0 .. r I: row n r + j is chunk n's slot j.

    Either W is made and used, or y = u Ha' with u_j = x V_j; u is returned for the backward pass, empty where there is none.
    """
    num_inputs, k = x_BI.shape[1], basis_SK.shape[1]
    if not factorised:
        w_OI = generate_fwd(h_NH, basis_SK[: rows * num_inputs], num_outputs * num_inputs).view(num_outputs, -1)
        return x_BI @ w_OI.T, x_BI.new_empty(0, rows, k)
    u_BrK = torch.einsum("bi,rik->brk", x_BI, basis_SK[: rows * num_inputs].view(rows, num_inputs, k))
    y_BrN = u_BrK @ _with_ones(h_NH).T
    return y_BrN.mT.flatten(1)[:, :num_outputs].contiguous(), u_BrK.contiguous()


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
    """Gradients of ``hyper_linear_fwd`` for x (no rows of it where it is not needed), the features and the basis."""
    (num_inputs, num_outputs), (num_chunks, width) = (x_BI.shape[1], grad_BO.shape[1]), h_NH.shape
    used_CK = basis_SK[: rows * num_inputs]
    grad_basis_SK, grad_x_BI = torch.zeros_like(basis_SK), x_BI.new_empty(0, num_inputs)
    if not factorised:
        grad_h_NH, grad_basis_SK[: len(used_CK)] = generate_bwd([grad_BO.T @ x_BI], h_NH, used_CK)
        if needs_x:
            grad_x_BI = grad_BO @ generate_fwd(h_NH, used_CK, num_outputs * num_inputs).view(num_outputs, num_inputs)
        return grad_x_BI, grad_h_NH, grad_basis_SK
    padded_BNr = F.pad(grad_BO, (0, num_chunks * rows - num_outputs)).view(-1, num_chunks, rows)
    du_BrK = padded_BNr.mT @ _with_ones(h_NH)
    grad_h_NH = torch.einsum("bnr,brh->nh", padded_BNr, u_BrK[..., :width])
    grad_basis_SK[: len(used_CK)] = torch.einsum("bi,brk->rik", x_BI, du_BrK).flatten(0, 1)
    if needs_x:
        grad_x_BI = torch.einsum("brk,rik->bi", du_BrK, used_CK.view(rows, num_inputs, -1))
    return grad_x_BI, grad_h_NH, grad_basis_SK


def _with_ones(h_NH: Tensor) -> Tensor:
    return torch.cat([h_NH, h_NH.new_ones(len(h_NH), 1)], 1)


def adam_delta_fwd(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> Tensor:
    """The step that Adam (``decoupled``: AdamW) would take from these moments, which stay as they are (E4)."""
    lr = lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=grad.dtype, device=grad.device)  # the same bits
    if not decoupled and weight_decay:
        grad = grad + weight_decay * param
    m = beta1 * exp_avg + (1 - beta1) * grad
    v = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    bias1, bias2 = _bias_corrections(step, beta1, beta2, grad.dtype)
    delta = -(lr / bias1) * m / ((v / bias2).sqrt() + eps)
    return delta - lr * weight_decay * param if decoupled and weight_decay else delta


def adam_ahead(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    rate: Tensor | None = None,
) -> list[Tensor]:
    """E4 for many parameters, each with its step added. ``rate``, one number, multiplies ``lr``."""
    lr_of_all = lr if rate is None or not params else lr * rate.to(params[0].dtype)
    states = zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    return [state[0] + adam_delta_fwd(*state, lr_of_all, beta1, beta2, eps, weight_decay, decoupled) for state in states]


def adam_step_(
    params: list[Tensor],
    grads: list[Tensor],
    more_grads: list[Tensor],
    scale: float,
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    healthy: Tensor | None = None,
    rate: Tensor | None = None,
) -> None:
    """The step of E4 on ``grads + scale * more_grads``, taken: parameters, moments and counts change in place.

    Nothing changes where ``healthy``, one bool, is false. ``rate`` is as in ``adam_ahead``.
    """
    lr_of_all = lr if rate is None or not params else lr * rate.to(params[0].dtype)
    if more_grads:
        grads = [g + scale * more for g, more in zip(grads, more_grads, strict=True)]
    for param, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        l2 = grad if decoupled or not weight_decay else grad + weight_decay * param
        delta = adam_delta_fwd(param, grad, exp_avg, exp_avg_sq, step, lr_of_all, beta1, beta2, eps, weight_decay, decoupled)
        after = param + delta, beta1 * exp_avg + (1 - beta1) * l2, beta2 * exp_avg_sq + (1 - beta2) * l2 * l2, step + 1
        for old, new in zip((param, exp_avg, exp_avg_sq, step), after, strict=True):
            old.copy_(new if healthy is None else torch.where(healthy, new, old))


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


def packed_parts(like: Tensor) -> int:
    """How the device of ``like`` multiplies float32: 3, on tile units for bfloat16, so that it heeds ``precision``; 4, in
    AVX-512 registers; 5, in AVX2 registers; 0, as torch does.
    """
    return 0


def _bias_corrections(step: Tensor, beta1: float, beta2: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    after = step.to(torch.float64) + 1
    return (1 - beta1**after).to(dtype), (1 - beta2**after).to(dtype)
