"""The trunk: from task and chunk embeddings to features, and how far features have drifted from a snapshot.

theta = chunk embeddings ``[N, Z]``, then weight ``[o, i]`` and bias ``[o]`` of each layer, then the basis (not used here).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Drifted = tuple[Tensor, Tensor]


class Activation(NamedTuple):
    """``value(a)``; ``drift(a0, da)``: value(a0 + da) - value(a0) and the slope at a0 + da."""

    value: Callable[[Tensor], Tensor]
    drift: Callable[[Tensor, Tensor], Drifted]


# Each drift is a product or a sum in which every term carries da: the plain difference of two values would lose all digits
# that a small step leaves in common.


def _relu_drift(a0: Tensor, da: Tensor) -> Drifted:
    floor = a0.clamp(min=0).neg_()
    d = torch.maximum(da + a0.clamp(max=0), floor)
    return d, (d > floor).to(da.dtype)


def _elu_drift(a0: Tensor, da: Tensor) -> Drifted:
    above, slope_above = _relu_drift(a0, da)  # elu(a) = max(a, 0) + expm1(min(a, 0)), drift by drift
    below = torch.exp(a0.clamp(max=0))
    d_below = below * torch.expm1(da - above)
    return above + d_below, torch.where(slope_above > 0, slope_above, below + d_below)


def _tanh_drift(a0: Tensor, da: Tensor) -> Drifted:
    now = torch.tanh(a0 + da)
    return torch.tanh(da) * (1 - now * torch.tanh(a0)), 1 - now * now


def _sigmoid_drift(a0: Tensor, da: Tensor) -> Drifted:
    d, slope = _tanh_drift(a0 / 2, da / 2)  # sigmoid(a) = (1 + tanh(a / 2)) / 2
    return d / 2, slope / 4


def _silu_drift(a0: Tensor, da: Tensor) -> Drifted:
    d_gate, slope_gate = _sigmoid_drift(a0, da)
    now = torch.sigmoid(a0 + da)
    return da * now + a0 * d_gate, now + (a0 + da) * slope_gate


ACTIVATIONS = {
    "relu": Activation(F.relu, _relu_drift),
    "elu": Activation(F.elu, _elu_drift),
    "tanh": Activation(torch.tanh, _tanh_drift),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_drift),
    "silu": Activation(F.silu, _silu_drift),
}


def features(theta: Sequence[Tensor], embeddings: Tensor, activation: Activation) -> Tensor:
    """Features ``[T, N, H]`` of all chunks for task embeddings ``[T, E]``."""
    return layers(theta, embeddings, activation)[-1]


def layers(theta: Sequence[Tensor], embeddings: Tensor, activation: Activation) -> list[Tensor]:
    """Input of the second layer, its pre-activation, its output, ... : a1, x1, a2, x2, ..., the last one the features."""
    chunk_embeddings, *trunk, _ = theta
    if not trunk:
        return [_pairs(embeddings, chunk_embeddings)]
    weight_e, weight_z = _split(trunk[0], embeddings)
    a = F.linear(embeddings, weight_e, trunk[1])[:, None] + F.linear(chunk_embeddings, weight_z)
    made = [a, activation.value(a)]
    for weight, bias in zip(trunk[2::2], trunk[3::2], strict=True):
        a = F.linear(made[-1], weight, bias)
        made += [a, activation.value(a)]
    return made


class TrunkSnapshot:
    """The trunk as it was, and what its layers gave for some tasks.

    Args:
        theta: parameters then.  embeddings: ``[T, E]`` then.
    """

    def __init__(self, theta: Sequence[Tensor], embeddings: Tensor, activation: Activation):
        self.theta, self.embeddings, self.activation = theta, embeddings, activation
        self._layers = layers(theta, embeddings, activation)

    def features(self, tasks: Tensor | None = None) -> Tensor:
        """Features ``[T, N, H]`` then, of these rows of ``embeddings`` (all by default)."""
        return self._layers[-1] if tasks is None else self._layers[-1][tasks]

    def drift(self, theta: Sequence[Tensor], embeddings: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Features now minus then, ``[T, N, H]``, for the same rows; exact to rounding however small the step.

        Each layer passes on a difference: da = W dx + dW x0 + db, dx = act(a0 + da) - act(a0).
        """
        then = self._layers if tasks is None else [layer[tasks] for layer in self._layers]
        embeddings0 = self.embeddings if tasks is None else self.embeddings[tasks]
        chunk_embeddings, *trunk, _ = theta
        chunk_embeddings0, *trunk0, _ = self.theta
        if not trunk:
            return _pairs(embeddings - embeddings0, chunk_embeddings - chunk_embeddings0)
        (weight_e, weight_z), (weight_e0, weight_z0) = _split(trunk[0], embeddings), _split(trunk0[0], embeddings)
        da_e = _LinearDrift.apply(embeddings - embeddings0, weight_e, trunk[1], embeddings0, weight_e0, trunk0[1])
        no_bias = torch.zeros_like(trunk0[1])
        da_z = _LinearDrift.apply(
            chunk_embeddings - chunk_embeddings0, weight_z, no_bias, chunk_embeddings0, weight_z0, no_bias
        )
        dx = _ActivationDrift.apply(da_e[:, None] + da_z, then[0], self.activation)
        for layer, (weight, bias, weight0, bias0) in enumerate(
            zip(trunk[2::2], trunk[3::2], trunk0[2::2], trunk0[3::2], strict=True)
        ):
            da = _LinearDrift.apply(dx, weight, bias, then[2 * layer + 1], weight0, bias0)
            dx = _ActivationDrift.apply(da, then[2 * layer + 2], self.activation)
        return dx


class _LinearDrift(torch.autograd.Function):
    """(W x + b) - (W0 x0 + b0) for x = x0 + dx; its backward is that of W x + b."""

    @staticmethod
    def forward(ctx, dx, weight, bias, x0, weight0, bias0):
        ctx.save_for_backward(dx, weight, x0)
        return F.linear(dx, weight, bias - bias0) + F.linear(x0, weight - weight0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, weight, x0 = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_weight = flat.T @ (x0 + dx).flatten(0, -2)
        return grad @ weight, grad_weight, flat.sum(0), None, None, None


class _ActivationDrift(torch.autograd.Function):
    """act(a0 + da) - act(a0)."""

    @staticmethod
    def forward(ctx, da, a0, activation):
        d, slope = activation.drift(a0, da)
        ctx.save_for_backward(slope)
        return d

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def _pairs(embeddings: Tensor, chunk_embeddings: Tensor) -> Tensor:
    """``[e_t, z_n]`` for all t and n: ``[T, N, E + Z]``."""
    num_tasks, num_chunks = len(embeddings), len(chunk_embeddings)
    return torch.cat([embeddings[:, None].expand(-1, num_chunks, -1), chunk_embeddings.expand(num_tasks, -1, -1)], -1)


def _split(weight: Tensor, embeddings: Tensor) -> tuple[Tensor, ...]:
    """The first layer separates, [e_t, z_n] W = e_t W_e + z_n W_z: T + N products instead of T * N."""
    task_dim = embeddings.shape[1]
    return weight.split([task_dim, weight.shape[1] - task_dim], 1)
