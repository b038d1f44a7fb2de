"""The fully connected target of the papers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from fasthyper.activations import ACTIVATIONS


class MLP(nn.Module):
    """Linear layers with a nonlinearity between them; inputs are flattened.

    Args:
        num_inputs: input features; images are flattened to that many.
        hidden: widths of the hidden layers; may be empty.
        num_outputs: output features, logits or, in a regression, values.
        bias: whether the layers have biases.
        activation: a key of ``activations.ACTIVATIONS``.

    Raises:
        ValueError: unknown ``activation``.
    """

    def __init__(
        self, num_inputs: int, hidden: Sequence[int], num_outputs: int, *, bias: bool = True, activation: str = "relu"
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
        self.config: dict[str, Any] = {
            "num_inputs": num_inputs,
            "hidden": list(hidden),
            "num_outputs": num_outputs,
            "bias": bias,
            "activation": activation,
        }
        self.activation = ACTIVATIONS[activation].value
        widths = (num_inputs, *hidden, num_outputs)
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=bias) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[B, num_outputs]`` for ``x`` ``[B, ...]`` with ``num_inputs`` values per example."""
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)
