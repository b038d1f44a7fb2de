"""What a target's outputs are held against: classes, or numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Loss(NamedTuple):
    """``value(outputs, y)``, the mean over a batch, and the name of what an evaluation then measures."""

    value: Callable[[Tensor, Tensor], Tensor]
    measure: str


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of outputs ``[B, O]``; targets ``[B]`` mean ``[B, 1]``.

    Raises:
        ValueError: there are not as many targets as outputs.
    """
    return F.mse_loss(outputs, targets_for(outputs, targets))


def targets_for(outputs: Tensor, targets: Tensor) -> Tensor:
    """``targets`` in shape and dtype of ``outputs``.

    Raises:
        ValueError: as many as outputs are not there.
    """
    if targets.numel() != outputs.numel():
        raise ValueError(f"the target network puts out {list(outputs.shape)}, the data ask for {list(targets.shape)}")
    return targets.to(outputs.dtype).reshape(outputs.shape)


LOSSES = {"cross_entropy": Loss(F.cross_entropy, "accuracy"), "mse": Loss(mse, "mse")}
