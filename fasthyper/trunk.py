"""The trunk: from task and chunk embeddings to the features of every chunk.

theta = chunk embeddings ``[N, Z]``, then weight ``[o, i]`` and bias ``[o]`` of each layer, then the basis (not used here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper.activations import Activation
from fasthyper.reference import linear_drift, pairs


class Trunk(NamedTuple):
    """What the trunk made of T embeddings: ``pre`` activations ``[T, N, h]`` of each layer, ``features`` ``[T, N, H]``."""

    pre: list[Tensor]
    features: Tensor


T = TypeVar("T")


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products on GPUs as exact as float32, whatever torch's switch allows elsewhere."""
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


def in_own_dtype(function: Callable[..., T]) -> Callable[..., T]:
    """``function`` in the dtype of ``theta``, its first argument, also where the caller has autocast on, as ops are."""

    @wraps(function)
    def run(theta: Sequence[Tensor], *args: Any, **kwargs: Any) -> T:
        with torch.autocast(theta[0].device.type, enabled=False):
            return function(theta, *args, **kwargs)

    return run


@in_own_dtype
def run_trunk(theta: Sequence[Tensor], embeddings: Tensor, activation: Activation) -> Trunk:
    """Runs all chunks of all tasks, ``embeddings`` ``[T, E]``, through the trunk; without layers a feature is [e_t, z_n]."""
    chunk_embeddings, *layers, _ = theta
    if not layers:
        return Trunk([], pairs(embeddings, chunk_embeddings))
    # the first layer separates, [e_t, z_n] W = e_t W_e + z_n W_z: T + N products instead of T * N
    weight_e, weight_z = layers[0].tensor_split([embeddings.shape[1]], 1)
    pre = [F.linear(embeddings, weight_e, layers[1])[:, None] + F.linear(chunk_embeddings, weight_z)]
    for weight, bias in zip(layers[2::2], layers[3::2], strict=True):
        pre.append(F.linear(activation.value(pre[-1]), weight, bias))
    return Trunk(pre, activation.value(pre[-1]))


@in_own_dtype
def trunk_drift(
    theta: Sequence[Tensor],
    theta0: Sequence[Tensor],
    embeddings: Tensor,
    embeddings0: Tensor,
    pre0: Sequence[Tensor],
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """Drift of the features ``[T, N, H]`` since a snapshot, and the features there, without loss of digits (DESIGN E5).

    ``embeddings`` are ``[T, E]``, or ``[T, N, E]`` where each chunk has some of its own. ``pre0`` is what ``run_trunk`` made
    of the snapshot for the last layers, the first one excepted; for layers that it lacks it is made again. The drift is
    differentiable in ``theta`` and ``embeddings``.
    """
    (z, *layers, _), (z0, *layers0, _) = theta, theta0
    if embeddings.dim() == 2:
        embeddings, embeddings0 = embeddings[:, None], embeddings0[:, None]
    de, dz = embeddings - embeddings0, z - z0
    if not layers:
        return pairs(de, dz), pairs(embeddings0, z0)
    (we, wz), (we0, wz0) = (w.tensor_split([embeddings.shape[-1]], 1) for w in (layers[0], layers0[0]))
    of_tasks = linear_drift(de, we, layers[1], embeddings0, we0, layers0[1])
    da = of_tasks + F.linear(dz, wz) + F.linear(z0, wz - wz0)
    dx, x0 = _drift(activation, F.linear(embeddings0, we0, layers0[1]) + F.linear(z0, wz0), da)
    lacking = len(layers) // 2 - len(pre0)
    for i in range(1, len(layers) // 2):
        (weight, bias), (weight0, bias0) = layers[2 * i : 2 * i + 2], layers0[2 * i : 2 * i + 2]
        a0 = pre0[i - lacking] if i >= lacking else F.linear(x0, weight0, bias0)
        dx, x0 = _drift(activation, a0, linear_drift(dx, weight, bias, x0, weight0, bias0))
    return dx, x0


def _drift(activation: Activation, a0: Tensor, da: Tensor) -> tuple[Tensor, Tensor]:
    dx, slope = activation.drift(a0, da.detach())
    return dx + slope * (da - da.detach()), activation.value(a0)  # the added 0 carries the gradient
