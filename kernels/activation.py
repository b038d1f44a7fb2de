"""What follows each trunk layer, by the codes of ``activations.py``: value, drift without loss of digits, and slope."""

from __future__ import annotations

import triton
import triton.language as tl

RELU, ELU, TANH, SIGMOID, SILU = range(5)


@triton.jit
def expm1(x):
    """To rounding also near 0, where exp(x) - 1 has no digits."""
    small = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(tl.abs(x) < 0.5, small, tl.exp(x) - 1)


@triton.jit
def tanh(x):
    e = expm1(2 * tl.minimum(tl.maximum(x, -20.0), 20.0))
    return e / (e + 2)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _relu_drift(a0, da):
    return tl.maximum(da + tl.minimum(a0, 0.0), -tl.maximum(a0, 0.0))


@triton.jit
def drift(a0, da, ACT: tl.constexpr):
    """act(a0 + da) - act(a0), act(a0), and the slope at a0 + da."""
    if ACT == 0:
        x0 = tl.maximum(a0, 0.0)
        dx = _relu_drift(a0, da)
        slope = tl.where(dx > -x0, 1.0, 0.0)
    elif ACT == 1:
        above = _relu_drift(a0, da)
        low = tl.minimum(a0, 0.0)
        d_low = tl.minimum(da - above, -low)  # rounding may not carry it above 0
        below = tl.exp(low)
        d_below = tl.where(d_low > 80, tl.exp(low + d_low), below * expm1(tl.minimum(d_low, 80.0)))
        dx = above + d_below
        x0 = tl.where(a0 > 0, a0, expm1(tl.minimum(a0, 0.0)))
        slope = tl.where(above > -tl.maximum(a0, 0.0), 1.0, below + d_below)
    elif ACT == 2:
        now = tanh(a0 + da)
        x0 = tanh(a0)
        dx = tanh(da) * (1 - now * x0)
        slope = 1 - now * now
    elif ACT == 3:
        now = tanh((a0 + da) / 2)
        before = tanh(a0 / 2)
        dx = tanh(da / 2) * (1 - now * before) / 2
        x0 = (1 + before) / 2
        slope = (1 - now * now) / 4
    else:
        now = tanh((a0 + da) / 2)
        before = tanh(a0 / 2)
        d_gate = tanh(da / 2) * (1 - now * before) / 2
        gate = (1 + now) / 2
        dx = da * gate + a0 * d_gate
        x0 = a0 * (1 + before) / 2
        slope = gate + (a0 + da) * (1 - now * now) / 4
    return dx, x0, slope
