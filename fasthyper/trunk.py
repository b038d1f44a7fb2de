"""The trunk: from task and chunk embeddings to the features of every chunk.

theta = chunk embeddings ``[N, Z]``, then weight ``[o, i]`` and bias ``[o]`` of each layer, then the basis (not used here).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper.activations import Activation


class Trunk(NamedTuple):
    """What the trunk made of T embeddings: ``pre`` activations ``[T, N, h]`` of each layer, ``features`` ``[T, N, H]``."""

    pre: list[Tensor]
    features: Tensor


def run_trunk(theta: Sequence[Tensor], embeddings: Tensor, activation: Activation) -> Trunk:
    """Runs all chunks of all tasks, ``embeddings`` ``[T, E]``, through the trunk; without layers a feature is [e_t, z_n]."""
    chunk_embeddings, *layers, _ = theta
    if not layers:
        num_tasks, num_chunks = len(embeddings), len(chunk_embeddings)
        rows = embeddings[:, None].expand(-1, num_chunks, -1), chunk_embeddings.expand(num_tasks, -1, -1)
        return Trunk([], torch.cat(rows, -1))
    # the first layer separates, [e_t, z_n] W = e_t W_e + z_n W_z: T + N products instead of T * N
    weight_e, weight_z = layers[0].tensor_split([embeddings.shape[1]], 1)
    pre = [F.linear(embeddings, weight_e, layers[1])[:, None] + F.linear(chunk_embeddings, weight_z)]
    for weight, bias in zip(layers[2::2], layers[3::2], strict=True):
        pre.append(F.linear(activation.value(pre[-1]), weight, bias))
    return Trunk(pre, activation.value(pre[-1]))
