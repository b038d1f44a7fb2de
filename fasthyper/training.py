"""The task that a trainer is at: what moves, what moves it, and how far it has come."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fasthyper.export import with_prefix
from fasthyper.graph import StepGraph
from fasthyper.metrics import TaskRecord

SCHEDULES: dict[str, Callable[[float], float]] = {  # factor of the learning rates where this part of a task is done
    "constant": lambda _: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * min(done, 1))) / 2,
    "warmup-cosine": lambda done: min(1.0, 10 * done) * (1 + math.cos(math.pi * min(done, 1))) / 2,
}


class TaskInTraining:
    """The task under way: what moves, held by the drift or on the task loss alone, and the optimizers that move it."""

    def __init__(
        self,
        record: TaskRecord,
        held: list[nn.Parameter],
        free: list[nn.Parameter],
        held_optimizer: torch.optim.Optimizer,
        free_optimizer: torch.optim.Optimizer,
        embeddings0: Tensor,
    ):
        self.record, self.held, self.free = record, held, free
        self.embeddings0 = embeddings0  # of all past tasks, when it began
        self.held_optimizer, self.free_optimizer = held_optimizer, free_optimizer
        self.planned, self.clock = 0, 0.0  # steps to come in all; when the last one was noted
        self.latest = math.nan, math.nan  # loss and drift last read
        self.graph: StepGraph | None = None
        self.steady = False  # a first step has made the optimizers' state
        self.unread: deque[tuple[int, bool]] = deque()  # of each step launched: how many examples, whether it has a drift

    @property
    def steps(self) -> int:
        """Taken or launched; ``record`` holds what was read."""
        return self.record.steps + len(self.unread)

    def set_rates(self, schedule: str) -> None:
        """Gives the optimizers the learning rates of the next step; constant ones are left as they are."""
        if schedule == "constant":
            return
        factor = SCHEDULES[schedule](self.steps / max(1, self.planned))
        for optimizer in self._optimizers().values():
            for group in optimizer.param_groups:
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"held": self.held_optimizer, "free": self.free_optimizer}

    def tensors(self) -> dict[str, Tensor]:
        """The optimizers' state, named ``optimizer.WHICH.PARAMETER.KEY``."""
        return {
            f"optimizer.{which}.{name}": value
            for which, optimizer in self._optimizers().items()
            for name, value in optimizer_tensors(optimizer).items()
        }

    def restore(self, record: TaskRecord, tensors: dict[str, Tensor]) -> None:
        """Takes over what ``tensors`` wrote."""
        self.record = record
        for which, optimizer in self._optimizers().items():
            restore_optimizer(optimizer, with_prefix(tensors, f"optimizer.{which}."))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state, named ``PARAMETER.KEY``."""
    return {
        f"{i}.{key}": value
        for i, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Takes over what ``optimizer_tensors`` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        i, key = name.split(".", 1)
        state.setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
