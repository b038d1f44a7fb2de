"""The residual target of the papers' CIFAR experiments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.nets.channels_last import channels_last


class ResNet(nn.Module):
    """A CIFAR ResNet of 6n + 2 layers: 3 x 3 convolutions, each with batch norm, shortcuts without parameters, one head.

    Parameters are ordered as in hypnettorch: scale and shift of every norm, then weight and bias of every convolution, then
    the head.

    Args:
        num_outputs: output features, logits.
        n: blocks of two convolutions in each of the three groups; 5 makes a ResNet-32.
        widths: feature maps of the first convolution and of the three groups, none smaller than the one before.
        num_channels: of the images.
        bias: whether the convolutions have biases.
        running_stats: whether norms keep running statistics; else they take those of the batch, in evaluation too.

    Raises:
        ValueError: not four widths, or one smaller than that before it.
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        n: int = 5,
        widths: Sequence[int] = (16, 16, 32, 64),
        num_channels: int = 3,
        bias: bool = True,
        running_stats: bool = False,
    ):
        super().__init__()
        if len(widths) != 4 or any(after < before for before, after in pairwise(widths)):
            raise ValueError(f"widths must be four numbers, none smaller than that before it, got {tuple(widths)}")
        self.config: dict[str, Any] = {
            "num_outputs": num_outputs,
            "n": n,
            "widths": list(widths),
            "num_channels": num_channels,
            "bias": bias,
            "running_stats": running_stats,
        }
        self.n = n
        maps = [num_channels, widths[0], *(width for width in widths[1:] for _ in range(2 * n))]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, track_running_stats=running_stats) for width in maps[1:])
        strides = [2 if index in (1 + 2 * n, 1 + 4 * n) else 1 for index in range(len(maps) - 1)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride, padding=1, bias=bias) for (i, o), stride in zip(pairwise(maps), strides, strict=True)
        )
        self.head = nn.Linear(widths[-1], num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_outputs]`` for images ``[B, num_channels, height, width]``."""
        x = self._layer(0, channels_last(x)).relu()
        for first in range(1, 6 * self.n, 2):
            hidden = self._layer(first, x).relu()
            x = (self._layer(first + 1, hidden) + self._shortcut(first, x)).relu()
        return self.head(x.mean((2, 3)))

    def _layer(self, index: int, x: Tensor) -> Tensor:
        return self.norms[index](self.convolutions[index](x))

    def _shortcut(self, index: int, x: Tensor) -> Tensor:
        """``x`` with every second pixel and, on both sides, empty maps added where the block changes its shape."""
        convolution: Any = self.convolutions[index]
        if convolution.stride == (1, 1) and convolution.in_channels == convolution.out_channels:
            return x
        more = convolution.out_channels - convolution.in_channels
        down = x[:, :, :: convolution.stride[0], :: convolution.stride[1]]
        return F.pad(down, (0, 0, 0, 0, more // 2, more - more // 2))


def resnet20(num_outputs: int = 10, **options: Any) -> ResNet:
    """``ResNet`` of 20 layers; ``options`` are its arguments."""
    return ResNet(num_outputs, n=3, **options)


def resnet32(num_outputs: int = 10, **options: Any) -> ResNet:
    """``ResNet`` of 32 layers, that of the hypernetwork paper."""
    return ResNet(num_outputs, n=5, **options)


def resnet56(num_outputs: int = 10, **options: Any) -> ResNet:
    """``ResNet`` of 56 layers."""
    return ResNet(num_outputs, n=9, **options)
