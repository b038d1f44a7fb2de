"""The task that a trainer is at: what moves, what moves it, and how far it has come."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

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


def set_rates(optimizer: torch.optim.Optimizer, schedule: str, done: float) -> None:
    """Gives ``optimizer`` its learning rates where this part of a task is done; constant ones are left as they are."""
    if schedule == "constant":
        return
    factor = SCHEDULES[schedule](done)
    for group in optimizer.param_groups:
        rate = factor * group.setdefault("initial_lr", group["lr"])
        if isinstance(group["lr"], Tensor):  # where a graph reads it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


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
        before: int = 0,
    ):
        self.record, self.held, self.free = record, held, free
        self.embeddings0 = embeddings0  # of all past tasks, when it began
        self.held_optimizer, self.free_optimizer = held_optimizer, free_optimizer
        self.planned, self.clock = 0, 0.0  # steps to come in all; when the last one was noted
        self.before = before  # steps of the tasks before it
        self.latest = math.nan, math.nan  # loss and drift last read
        self.graph: StepGraph | None = None
        self.steady = False  # a first step has made the optimizers' state
        self.unread: deque[tuple[int, bool]] = deque()  # of each step launched: how many examples, whether it has a drift
        self.failed = 0  # last steps, in a row, that were not finite

    @property
    def steps(self) -> int:
        """Taken or launched; ``record`` holds what was read."""
        return self.record.steps + len(self.unread)

    def set_rates(self, schedule: str) -> None:
        """Gives the optimizers the learning rates of the next step; constant ones are left as they are."""
        for optimizer in self._optimizers().values():
            set_rates(optimizer, schedule, self.steps / max(1, self.planned))

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


def total(grads: Sequence[Tensor]) -> Tensor:
    """A number ``[]`` that is finite where all of them are, in one pass and without a read from the device."""
    some = [grad for grad in grads if grad.numel()]  # of an empty one there is no largest
    parts = torch._foreach_norm(some, math.inf) if grads[0].is_cuda else [grad.sum() for grad in some]
    return torch.stack([part.to(grads[0].dtype) for part in parts]).sum()


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators, from which dropout draws, named ``rng.DEVICE``."""
    there = {"rng.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"rng.cpu": torch.get_rng_state(), **there}


def restore_rng(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Takes over what ``rng_tensors`` gave, if anything, but of a device that is no longer used."""
    if "rng.cpu" in tensors:
        torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)


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
