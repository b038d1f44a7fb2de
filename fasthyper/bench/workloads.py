"""The workloads that every number is measured on (DESIGN, Workloads)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from fasthyper import nets
from fasthyper.hypernet import ChunkedHypernet

WHATS = ("regularizer", "step")  # what is measured


@dataclass(frozen=True)
class Workload:
    """A target and a hypernetwork.

    ``target`` is as ``nets.build`` takes it, ``hnet`` the keyword arguments of ``ChunkedHypernet``. ``tasks``: numbers of
    past tasks to measure at; ``regularizer_tasks``: more of them, for the regularizer alone.
    """

    name: str
    target: dict[str, Any]
    hnet: dict[str, Any]
    tasks: tuple[int, ...]
    regularizer_tasks: tuple[int, ...] = ()
    beta: float = 0.01
    batch_size: int = 128

    def build(self, past: int) -> ChunkedHypernet:
        """A hypernetwork with ``past`` past tasks and a current one; the same numbers every time."""
        return ChunkedHypernet(self.build_target(), past + 1, **self.hnet)

    def with_layout(self, layout: str) -> Workload:
        """The same, its weights laid ``"flat"`` or ``"aligned"``; it has a name of its own where that is another layout."""
        if layout == self.hnet.get("layout", "flat"):
            return self
        return replace(self, name=f"{self.name}-{layout}", hnet=self.hnet | {"layout": layout})

    def build_target(self) -> nn.Module:
        """The target network."""
        return nets.build(self.target)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Of one input of the target."""
        config = self.target["config"]
        return (config["num_inputs"],) if "num_inputs" in config else (config.get("num_channels", 3), 32, 32)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of random examples: its time does not depend on what they show."""
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(self.batch_size, *self.example_shape, generator=generator)
        return x, torch.randint(self.target["config"]["num_outputs"], (self.batch_size,), generator=generator)

    def tasks_for(self, what: str) -> tuple[int, ...]:
        """Numbers of past tasks at which ``what`` is measured."""
        return self.tasks + self.regularizer_tasks if what == "regularizer" else self.tasks

    def to_json(self) -> str:
        """What ``from_json`` reads, on one line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Workload:
        """The workload that ``to_json`` wrote."""
        return Workload(**json.loads(text))


def mlp(num_inputs: int, hidden: tuple[int, ...], num_outputs: int) -> dict[str, Any]:
    """Description of a fully connected target."""
    return {"class": "MLP", "config": {"num_inputs": num_inputs, "hidden": hidden, "num_outputs": num_outputs}}


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "split",
            mlp(784, (400, 400), 10),
            {"chunk_size": 42_000, "hidden": (10, 10), "task_dim": 96, "chunk_dim": 96, "activation": "relu"},
            tasks=(5,),
        ),
        Workload(
            "small",
            mlp(1024, (100, 100), 10),
            {"chunk_size": 2000, "hidden": (100, 75, 50), "task_dim": 64, "chunk_dim": 12, "activation": "elu"},
            tasks=(10, 100, 1000),
            beta=0.05,
        ),
        Workload(
            "p10",
            mlp(1024, (1000, 1000), 10),
            {"chunk_size": 78_000, "hidden": (25, 25), "task_dim": 24, "chunk_dim": 8, "activation": "elu"},
            tasks=(10, 100, 1000),
            beta=0.1,
        ),
        Workload(
            "p100",
            mlp(1024, (1000, 1000), 10),
            {"chunk_size": 7500, "hidden": (200, 250, 350), "task_dim": 128, "chunk_dim": 12, "activation": "relu"},
            tasks=(2, 10, 50, 100),
        ),
        Workload(
            "resnet",
            {"class": "ResNet", "config": {"num_outputs": 60}},
            {"chunk_size": 7000, "hidden": (), "task_dim": 32, "chunk_dim": 32},
            tasks=(6,),
            regularizer_tasks=(600, 6000),
            beta=0.05,
            batch_size=32,
        ),
        Workload(
            "full",
            mlp(1024, (100, 100), 10),
            {"chunk_size": None, "hidden": (50, 50), "task_dim": 24, "activation": "elu"},
            tasks=(10, 100),
        ),
    )
}
CASES = {what: [(w, past) for w in WORKLOADS.values() for past in w.tasks_for(what)] for what in WHATS}
