"""Per-task output heads: which outputs are a task's own, and which weights make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from fasthyper.layout import Range


class Piece(NamedTuple):
    """Rows of a parameter that lie end to end in the flat vector of generated weights, from ``start``."""

    name: str
    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()


class Heads:
    """Task t uses outputs ``[t*k, (t+1)*k)`` of the last layer: the last weight among the parameters and, if any, its bias.

    Args:
        shapes: of all parameters of the module, by name, in order.
        per_task: k.

    Raises:
        ValueError: k does not divide the outputs of the last layer.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], per_task: int):
        self.per_task, self.layer = per_task, dict[str, torch.Size]()
        for name, shape in reversed(list(shapes.items())):
            self.layer[name] = shape
            if len(shape) > 1:
                break
        num_outputs = shape[0] if shape else 0
        if per_task < 1 or num_outputs % per_task or any(s[:1] != (num_outputs,) for s in self.layer.values()):
            raise ValueError(f"outputs_per_task={per_task} does not divide the {num_outputs} outputs of the last layer")
        self.built = self.count = num_outputs // per_task

    def ranges(self, pieces: Mapping[str, Piece]) -> list[list[Range]]:
        """Per task, where the generated weights of its own head lie; empty where the last layer is not generated."""
        own = [pieces[name] for name in self.layer if name in pieces]
        if not own:
            return []
        rows = [(piece.start, self.per_task * piece.shape[1:].numel()) for piece in own]
        return [[(start + task * size, start + (task + 1) * size) for start, size in rows] for task in range(self.built)]

    def grow(self, start: int) -> list[Piece]:
        """One head more: the rows that it adds to each parameter of the last layer, from ``start`` in the flat vector."""
        pieces = []
        for name, shape in self.layer.items():
            pieces.append(Piece(name, start, torch.Size([self.per_task, *shape[1:]])))
            start = pieces[-1].stop
        self.count += 1
        return pieces
