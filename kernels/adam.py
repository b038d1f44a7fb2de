"""Adam and AdamW (E4), one launch per tensor: the step, parameters after it, and the step taken.

Settings are float64 arguments, so that float64 tensors get all their digits; the bias corrections are made in float64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _adam_kernel(
    param,
    grad,
    more,  # None where there are no more gradients
    exp_avg,
    exp_avg_sq,
    step,  # pointer, or the number itself
    healthy,  # None: it is
    rate,  # of lr; None: 1
    out,  # None: the step is taken
    size,
    scale: tl.float64,
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    L2: tl.constexpr,
    DECOUPLED: tl.constexpr,
    WHOLE: tl.constexpr,  # out is the parameter after the step, otherwise the step
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements. ``step`` is only read here, and counts go up after all programs have read it."""
    dtype: tl.constexpr = grad.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < size
    if healthy is not None:
        here = here & (tl.load(healthy) != 0)

    if rate is not None:
        lr *= tl.load(rate)
    before = tl.load(step) if step.dtype.is_ptr() else step
    after = before.to(tl.float64) + 1
    step_size = (lr / (1 - tl.exp(after * log_beta1))).to(dtype)
    root_scale = (1 / tl.sqrt(1 - tl.exp(after * log_beta2))).to(dtype)
    rest1, rest2 = tl.full((), 1 - beta1, dtype), tl.full((), 1 - beta2, dtype)
    beta1, beta2, eps = tl.full((), beta1, dtype), tl.full((), beta2, dtype), tl.full((), eps, dtype)

    g = tl.load(grad + i, here)
    if more is not None:
        g += tl.full((), scale, dtype) * tl.load(more + i, here)
    if WHOLE or L2 or DECOUPLED:
        p = tl.load(param + i, here)
    if L2:
        g += tl.full((), weight_decay, dtype) * p
    m = beta1 * tl.load(exp_avg + i, here) + rest1 * g
    v = beta2 * tl.load(exp_avg_sq + i, here) + rest2 * g * g
    change = -step_size * m / (tl.sqrt(v) * root_scale + eps)
    if DECOUPLED:
        change -= tl.full((), lr * weight_decay, dtype) * p
    if WHOLE:
        change += p
    if out is not None:
        tl.store(out + i, change, here)
    else:
        tl.store(param + i, change, here)
        tl.store(exp_avg + i, m, here)
        tl.store(exp_avg_sq + i, v, here)


def _launch(param, grad, more, exp_avg, exp_avg_sq, step, healthy, rate, out, scale, settings, whole=True):
    lr, beta1, beta2, eps, weight_decay, decoupled = settings
    if param.numel() == 0:
        return
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    _adam_kernel[(triton.cdiv(param.numel(), BLOCK),)](
        *(param, grad, more, exp_avg, exp_avg_sq, _counted(step, param), healthy, rate, out, param.numel()),
        *(scale, lr, beta1, beta2, *logs, eps, weight_decay),
        L2=weight_decay != 0 and not decoupled,
        DECOUPLED=weight_decay != 0 and decoupled,
        WHOLE=whole,
        BLOCK=BLOCK,
    )


def _counted(step: Tensor, param: Tensor) -> Tensor | float:
    """A count for the kernel: on the device the tensor itself; on the CPU, a number, right each time that a call is made."""
    return step if step.device == param.device else float(step)


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
    param, grad, exp_avg, exp_avg_sq = (t.contiguous() for t in (param, grad, exp_avg, exp_avg_sq))
    settings, out = (lr, beta1, beta2, eps, weight_decay, decoupled), torch.empty_like(param)
    _launch(param, grad, None, exp_avg, exp_avg_sq, step, None, None, out, 0.0, settings, whole=False)
    return out


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
    settings, outs = (lr, beta1, beta2, eps, weight_decay, decoupled), []
    for *tensors, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        param, grad, exp_avg, exp_avg_sq = (t.contiguous() for t in tensors)
        outs.append(torch.empty_like(param))
        _launch(param, grad, None, exp_avg, exp_avg_sq, step, None, rate, outs[-1], 0.0, settings)
    return outs


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
    settings = lr, beta1, beta2, eps, weight_decay, decoupled
    more: list[Tensor | None] = [t.contiguous() for t in more_grads] or [None] * len(params)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        state = exp_avgs[i], exp_avg_sqs[i], steps[i]
        _launch(param, grad.contiguous(), more[i], *state, healthy, rate, None, scale, settings)
    if steps:
        torch._foreach_add_(steps, 1 if healthy is None else [healthy.to(steps[0].dtype)] * len(steps))
