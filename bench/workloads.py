"""The workloads that every number is measured on (DESIGN, Workloads)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import fasthyper as fh


@dataclass(frozen=True)
class Workload:
    """A target and a hypernetwork; ``tasks``: numbers of past tasks to measure at."""

    name: str
    target: tuple[int, tuple[int, ...], int]
    hnet: dict[str, Any]
    beta: float
    tasks: tuple[int, ...] = (2, 10, 50, 100)
    batch_size: int = 128

    def build(self, past: int) -> fh.ChunkedHypernet:
        """A hypernetwork with ``past`` past tasks and a current one."""
        return fh.ChunkedHypernet(fh.nets.MLP(*self.target), past + 1, **self.hnet)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of random examples: its time does not depend on what they show."""
        num_inputs, _, num_outputs = self.target
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(self.batch_size, num_inputs, generator=generator)
        return x, torch.randint(num_outputs, (self.batch_size,), generator=generator)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "small",
            (1024, (100, 100), 10),
            {"chunk_size": 2000, "hidden": (100, 75, 50), "task_dim": 64, "chunk_dim": 12, "activation": "elu"},
            beta=0.05,
        ),
        Workload(
            "p10",
            (1024, (1000, 1000), 10),
            {"chunk_size": 78_000, "hidden": (25, 25), "task_dim": 24, "chunk_dim": 8, "activation": "elu"},
            beta=0.1,
        ),
        Workload(
            "p100",
            (1024, (1000, 1000), 10),
            {"chunk_size": 7500, "hidden": (200, 250, 350), "task_dim": 128, "chunk_dim": 12, "activation": "relu"},
            beta=0.01,
        ),
    )
}
CASES = [(workload, past) for workload in WORKLOADS.values() for past in workload.tasks]
