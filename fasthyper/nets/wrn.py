"""Wide residual networks (Zagoruyko and Komodakis, 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn


class WRN(nn.Module):
    """A wide residual network of depth 6n + 4: blocks of norm, ReLU, 3 x 3 convolution, twice; 1 x 1 convolutions where a
    block changes its shape; a last norm, and a head.

    Parameters and their order are those of hypnettorch's ``WRN``: scale and shift of every norm, the 1 x 1 convolutions
    (which have no bias), weight and bias of every other convolution, the head. Without biases WRN-28-10 has the paper's
    36.5 million.

    Args:
        num_outputs: output features, logits.
        n: blocks in each of the three groups; 4 makes a WRN-28.
        k: factor of the groups' widths.
        widths: feature maps of the first convolution and, before ``k``, of the three groups.
        num_channels: of the images.
        bias: whether the 3 x 3 convolutions have biases.
        dropout: probability, of features between the two convolutions of a block.
        activated_shortcut: whether a 1 x 1 convolution is given the block's input after its norm and ReLU, as in the
            paper's code; else the input itself, as in hypnettorch.
        running_stats: whether norms keep running statistics; else they take those of the batch, in evaluation too.

    Raises:
        ValueError: not four widths.
    """

    def __init__(
        self,
        num_outputs: int = 10,
        *,
        n: int = 4,
        k: int = 10,
        widths: Sequence[int] = (16, 16, 32, 64),
        num_channels: int = 3,
        bias: bool = True,
        dropout: float = 0.0,
        activated_shortcut: bool = False,
        running_stats: bool = False,
    ):
        super().__init__()
        if len(widths) != 4:
            raise ValueError(f"widths must be four numbers, got {tuple(widths)}")
        self.config: dict[str, Any] = {
            "num_outputs": num_outputs,
            "n": n,
            "k": k,
            "widths": list(widths),
            "num_channels": num_channels,
            "bias": bias,
            "dropout": dropout,
            "activated_shortcut": activated_shortcut,
            "running_stats": running_stats,
        }
        self.n, self.activated_shortcut = n, activated_shortcut
        groups = [widths[0], *(k * width for width in widths[1:])]
        maps = [groups[0], *(width for width in groups[1:] for _ in range(2 * n))]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, track_running_stats=running_stats) for width in maps)
        changes = [(i, o, stride) for (i, o), stride in zip(pairwise(groups), (1, 2, 2), strict=True)]
        self.shortcuts = nn.ModuleList(
            nn.Identity() if (i, stride) == (o, 1) else nn.Conv2d(i, o, 1, stride, bias=False) for i, o, stride in changes
        )
        strides = [2 if index in (1 + 2 * n, 1 + 4 * n) else 1 for index in range(len(maps))]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride, padding=1, bias=bias)
            for (i, o), stride in zip(pairwise([num_channels, *maps]), strides, strict=True)
        )
        self.head = nn.Linear(groups[-1], num_outputs)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_outputs]`` for images ``[B, num_channels, height, width]``."""
        x = self.convolutions[0](x)
        for first in range(1, 6 * self.n, 2):
            active = self.norms[first - 1](x).relu()
            group, later = divmod(first // 2, self.n)
            if not later:
                changes = not isinstance(self.shortcuts[group], nn.Identity)
                x = self.shortcuts[group](active if changes and self.activated_shortcut else x)
            hidden = self.norms[first](self.drop(self.convolutions[first](active))).relu()
            x = x + self.convolutions[first + 1](hidden)
        return self.head(self.norms[-1](x).relu().mean((2, 3)))


def wrn_28_10(num_outputs: int = 10, **options: Any) -> WRN:
    """``WRN`` of depth 28 and ten times the width; ``options`` are its arguments."""
    return WRN(num_outputs, n=4, k=10, **options)
