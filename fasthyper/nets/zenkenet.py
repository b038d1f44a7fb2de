"""The convolutional target of the CIFAR experiments of Zenke et al. (2017), also used in the hypernetwork paper."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.nets.channels_last import channels_last


class ZenkeNet(nn.Module):
    """Two pairs of 3 x 3 convolutions, the second of each without padding and followed by pooling; one hidden layer, a head.

    Parameters and their order are those of hypnettorch's ``ZenkeNet``: 1,276,508 at 60 outputs.

    Args:
        num_outputs: output features, logits.
        dropout: probability, of whole feature maps after each pair; twice that of features after the hidden layer.

    Raises:
        ValueError: a ``dropout`` above a half.
    """

    def __init__(self, num_outputs: int = 10, *, dropout: float = 0.25):
        super().__init__()
        if not 0 <= dropout <= 0.5:
            raise ValueError(f"dropout must be in 0..0.5, twice that follows the hidden layer; got {dropout}")
        self.config: dict[str, Any] = {"num_outputs": num_outputs, "dropout": dropout}
        maps = ((3, 32, 1), (32, 32, 0), (32, 64, 1), (64, 64, 0))
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, 3, padding=padding) for i, o, padding in maps)
        self.hidden = nn.Linear(64 * 6 * 6, 512)
        self.head = nn.Linear(512, num_outputs)
        self.drop_maps, self.drop = nn.Dropout2d(dropout), nn.Dropout(2 * dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_outputs]`` for images ``[B, 3, 32, 32]``."""
        x = channels_last(x)
        for index, convolution in enumerate(self.convolutions):
            x = convolution(x).relu()
            if index % 2:
                x = self.drop_maps(F.max_pool2d(x, 2))
        return self.head(self.drop(self.hidden(x.flatten(1)).relu()))
