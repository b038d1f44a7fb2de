"""What follows each trunk layer: its value, and its drift from a snapshot without loss of digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Drifted = tuple[Tensor, Tensor]


class Activation(NamedTuple):
    """``value(a)``, and ``drift(a0, da)``: value(a0 + da) - value(a0) with the slope at a0 + da; ``code`` is for kernels."""

    code: int
    value: Callable[[Tensor], Tensor]
    drift: Callable[[Tensor, Tensor], Drifted]


# Each drift is a product or a sum in which every term carries da: the plain difference of two values would lose all digits
# that a small step leaves in common.


def _relu_drift(a0: Tensor, da: Tensor) -> Drifted:
    floor = -a0.clamp(min=0)
    dx = torch.maximum(da + a0.clamp(max=0), floor)
    return dx, (dx > floor).to(da.dtype)


def _elu_drift(a0: Tensor, da: Tensor) -> Drifted:
    above, slope_above = _relu_drift(a0, da)  # elu(a) = max(a, 0) + expm1(min(a, 0)), drift by drift
    low = a0.clamp(max=0)
    d_low = torch.minimum(da - above, -low)  # rounding may not carry it above 0
    below = torch.exp(low)
    far = d_low > 80  # from where exp is 0 it would be 0 times infinity
    d_below = torch.where(far, torch.exp(low + d_low), below * torch.expm1(torch.where(far, 0, d_low)))
    return above + d_below, torch.where(slope_above > 0, slope_above, below + d_below)


def _tanh_drift(a0: Tensor, da: Tensor) -> Drifted:
    now = torch.tanh(a0 + da)
    return torch.tanh(da) * (1 - now * torch.tanh(a0)), 1 - now * now


def _sigmoid_drift(a0: Tensor, da: Tensor) -> Drifted:
    dx, slope = _tanh_drift(a0 / 2, da / 2)  # sigmoid(a) = (1 + tanh(a / 2)) / 2
    return dx / 2, slope / 4


def _silu_drift(a0: Tensor, da: Tensor) -> Drifted:
    d_gate, slope_gate = _sigmoid_drift(a0, da)
    now = torch.sigmoid(a0 + da)
    return da * now + a0 * d_gate, now + (a0 + da) * slope_gate


ACTIVATIONS = {
    "relu": Activation(0, F.relu, _relu_drift),
    "elu": Activation(1, F.elu, _elu_drift),
    "tanh": Activation(2, torch.tanh, _tanh_drift),
    "sigmoid": Activation(3, torch.sigmoid, _sigmoid_drift),
    "silu": Activation(4, F.silu, _silu_drift),
}
BY_CODE = {activation.code: activation for activation in ACTIVATIONS.values()}
