"""The convolutional targets of the MNIST experiments, and their large relative for CIFAR."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# side of the images, channels, feature maps of the two convolutions, width of the hidden layer
_SIZES = {"mnist_small": (28, 1, 10, 20, 50), "mnist_large": (28, 1, 20, 50, 500), "cifar": (32, 3, 192, 192, 1000)}


class LeNet(nn.Module):
    """Two 5 x 5 convolutions without padding, each with 2 x 2 pooling and ReLU, one hidden layer, one head.

    Parameters and their order are those of hypnettorch's ``LeNet``: 21,840, 431,080 and 5,747,394 of them at ten outputs.

    Args:
        num_outputs: output features, logits.
        arch: ``"mnist_small"``, ``"mnist_large"`` or ``"cifar"``.
        dropout: probability, of whole feature maps after the convolutions and of features after the hidden layer.

    Raises:
        ValueError: unknown ``arch``.
    """

    def __init__(self, num_outputs: int = 10, *, arch: str = "mnist_large", dropout: float = 0.0):
        super().__init__()
        if arch not in _SIZES:
            raise ValueError(f"unknown LeNet {arch!r}; choose from {', '.join(_SIZES)}")
        self.config: dict[str, Any] = {"num_outputs": num_outputs, "arch": arch, "dropout": dropout}
        side, channels, maps1, maps2, width = _SIZES[arch]
        self.image_shape = (channels, side, side)
        self.conv1 = nn.Conv2d(channels, maps1, 5)
        self.conv2 = nn.Conv2d(maps1, maps2, 5)
        self.hidden = nn.Linear(maps2 * ((side - 4) // 2 // 2 - 2) ** 2, width)
        self.head = nn.Linear(width, num_outputs)
        self.drop_maps, self.drop = nn.Dropout2d(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_outputs]`` for images ``[B, C, H, W]`` of 28 x 28 or 32 x 32 pixels, or the same flattened."""
        x = x.view(len(x), *self.image_shape)
        for convolution in (self.conv1, self.conv2):
            x = F.max_pool2d(self.drop_maps(convolution(x)), 2).relu()
        return self.head(self.drop(self.hidden(x.flatten(1)).relu()))
