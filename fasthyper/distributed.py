"""Several processes that train one hypernetwork: each takes its share of the work, and what they find is summed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fasthyper.errors import LostProcessError

TIMEOUT = timedelta(minutes=30)  # for a process that still runs but no longer answers; one that ended is noticed at once
_Item = TypeVar("_Item")

Part = tuple[Sequence[Tensor], float]  # tensors, and the factor that this process' are summed with


class Ranks:
    """This process, a rank, among the K of a job that train together on ``torch.distributed``; ``Ranks()``: alone.

    All ranks must call the same methods in the same order. Alone they return what they are given, at no cost.

    Args:
        group: the processes; ``None``: no others.
        device: where tensors are exchanged: with NCCL the GPU of this rank.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str | None = None):
        self._group, self.device = group, device
        self.rank, self.count = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._asks = False  # this rank, to stop
        self._asked: Tensor | None = None  # above 0: any rank, in the last sum

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def share(self, n: int) -> tuple[slice, float]:
        """Which of n things this rank takes, n/K or one more or less, and what part of all that is.

        Where n < K, some ranks take the first one, with weight 0: none has nothing to do, so that all do the same.
        """
        lo, hi = (n * rank // self.count for rank in (self.rank, self.rank + 1))
        return (slice(lo, hi), (hi - lo) / n) if hi > lo else (slice(0, 1), 0.0)

    @torch.no_grad()
    def sum_(self, *parts: Part) -> None:
        """Puts in the place of each tensor the sum over ranks of factor times tensor; all are one message.

        Every rank ends with the same bits. Tensors are floating-point and on one device.

        Raises:
            LostProcessError: another rank has ended; tensors are as they were.
        """
        if self.count == 1:
            return
        tensors = [tensor for part, _ in parts for tensor in part]
        pieces = [tensor.reshape(-1) for tensor in tensors]
        flat = torch.cat([*pieces, pieces[0].new_tensor([self._asks])])
        start = 0
        for part, factor in parts:
            stop = start + sum(tensor.numel() for tensor in part)
            flat[start:stop] *= factor
            start = stop
        self._exchange(lambda: dist.all_reduce(flat, group=self._group))
        self._asked = flat[-1]
        for tensor, total in zip(tensors, flat[:-1].split([piece.numel() for piece in pieces]), strict=True):
            tensor.copy_(total.view(tensor.shape))

    def stops(self, asks: bool) -> bool:
        """Whether to stop where this rank does or does not ask to: once a sum has told all that one of them did."""
        if self.count == 1:
            return asks
        self._asks = asks
        return self._asked is not None and bool(self._asked)

    def any(self, flag: bool) -> bool:
        """Whether a rank says so; all wait for each other."""
        if self.count == 1:
            return flag
        self._asks = flag
        self.sum_(([torch.zeros(0, device=self.device)], 1.0))
        self._asks = False
        return bool(self._asked)

    def spread(self, items: Sequence[_Item], work: Callable[[Sequence[_Item]], Sequence[float]]) -> list[float]:
        """``work(items)``, a number for each, where each rank has worked on its share."""
        if self.count == 1 or not items:
            return list(work(items))
        own, share = self.share(len(items))
        numbers = torch.zeros(len(items), dtype=torch.float64, device=self.device)
        if share:
            numbers[own] = torch.tensor(work(items[own]), dtype=torch.float64).to(numbers.device)
        self.sum_(([numbers], 1.0))
        return numbers.tolist()

    def first_then_others(self, make: Callable[[], _Item]) -> _Item:
        """What each rank makes, the others once the first has: so that it alone downloads."""
        made = [make()] if self.is_first else []
        self.any(False)
        return made[0] if made else make()

    def of_first(self, load: Callable[[], tuple[dict[str, Tensor], Any]]) -> tuple[dict[str, Tensor], Any]:
        """Named tensors, on the CPU, and what is JSON-ready, as the first rank loads them: others need not see its files."""
        if self.count == 1:
            return load()
        tensors, state = load() if self.is_first else ({}, None)
        layout = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in tensors.items()]
        text = torch.frombuffer(bytearray(json.dumps([layout, state]).encode()), dtype=torch.uint8)
        size = torch.tensor([len(text)])
        self.copy_first_([size])
        text = text if self.is_first else text.new_empty(int(size))
        self.copy_first_([text])
        layout, state = json.loads(bytes(text.tolist()))
        if not self.is_first:
            tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in layout}
        self.copy_first_(tensors.values())
        return tensors, state

    @torch.no_grad()
    def copy_first_(self, tensors: Iterable[Tensor]) -> None:
        """Makes tensors of any types, the same on all ranks, equal to the first one's, in one message."""
        tensors = list(tensors)
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([t.detach().reshape(-1).view(torch.uint8).to(self.device or t.device) for t in tensors])
        self._exchange(lambda: dist.broadcast(flat, group=self._group, group_src=0))
        if not self.is_first:
            for tensor, part in zip(tensors, flat.split([t.numel() * t.element_size() for t in tensors]), strict=True):
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))

    def _exchange(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise LostProcessError(
                f"process {self.rank} of {self.count} lost the others, one of which has ended: its own message says why, "
                "and the same command goes on from the last checkpoint"
            ) from error


@contextmanager
def join(device: str | None = None) -> Iterator[Ranks]:
    """Joins the job that ``torchrun`` started this process in, over NCCL where it trains on GPUs, else gloo; else alone.

    Args:
        device: ``"cpu"``, or ``"cuda"``: of this machine's GPUs the one of this rank; ``None``: a GPU, if there is one.

    Raises:
        ValueError: more processes on this machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"more processes here than the {gpus} GPUs: start at most {gpus} per node, or use --device cpu")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    yield Ranks(dist.group.WORLD, device)
    dist.destroy_process_group()  # not after an error, where the others may be gone: the process ends anyway
