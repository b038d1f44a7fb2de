"""One list of shapes that drives forward, backward, opcheck and compile of every op, in tests and in bench."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fasthyper.layout import Layout


@dataclass(frozen=True)
class DriftCase:
    """T past tasks, P target weights in chunks of S, H features; ``head``: outputs-per-task ranges at the end of P."""

    name: str
    tasks: int
    weights: int
    chunk: int
    width: int
    head: int = 0

    @property
    def layout(self) -> Layout:
        heads = []
        if self.head:
            first = self.weights - self.head * self.tasks
            heads = [[(first + t * self.head, first + (t + 1) * self.head)] for t in range(self.tasks)]
        return Layout(self.weights, self.chunk, heads)

    def tensors(self, dtype: torch.dtype = torch.float64, step: float = 0.1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dh, basis, h0, basis0: random; drift and basis are a ``step`` away from the snapshot."""
        generator = torch.Generator().manual_seed(len(self.name))
        layout = self.layout

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        h0 = random(self.tasks, layout.num_chunks, self.width)
        basis0 = random(self.chunk, self.width + 1)
        dh, basis = step * random(*h0.shape), basis0 + step * random(*basis0.shape)
        return dh.to(dtype), basis.to(dtype), h0.to(dtype), basis0.to(dtype)


DRIFT_CASES = [
    DriftCase("no-past-task", 0, 24, 6, 3),
    DriftCase("one-task", 1, 24, 6, 3),
    DriftCase("divisible", 3, 24, 6, 3),
    DriftCase("tail", 3, 25, 6, 3),
    DriftCase("one-chunk", 4, 11, 11, 5),
    DriftCase("chunk-larger-than-target", 2, 7, 11, 5),
    DriftCase("one-weight", 2, 1, 1, 1),
    DriftCase("chunks-of-one", 2, 5, 1, 2),
    DriftCase("wide", 2, 40, 9, 17),
    DriftCase("many-tasks", 37, 33, 8, 4),
    DriftCase("heads", 4, 53, 7, 3, head=6),
    DriftCase("heads-in-one-chunk", 3, 40, 40, 3, head=2),
    DriftCase("head-over-three-chunks", 2, 60, 7, 3, head=20),
]
