"""Which examples make up the batch of a step: a pure function of (seed, task, step), so that a run resumes anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Batches:
    """Shuffled epochs without replacement; what does not fill a batch is left out of its epoch.

    Args:
        num_examples: size of the training set.
        batch_size: examples per batch; more than ``num_examples`` means all of them.
        seed, task: of the shuffle.
        device: of the indices.
        choices: for each thing drawn anew for an example whenever it is trained on, in how many ways it can turn out.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        seed: int,
        task: int,
        device: torch.device | str = "cpu",
        choices: Sequence[int] = (),
    ):
        if num_examples < 1 or batch_size < 1:
            raise ValueError(
                f"need at least one example and a batch size of at least 1, got {num_examples} and {batch_size}"
            )
        self.num_examples, self.batch_size = num_examples, min(batch_size, num_examples)
        self._seed, self._device, self._choices, self._epoch = (seed, task), device, choices, -1

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return self.num_examples // self.batch_size

    def indices(self, step: int) -> Tensor:
        """int64 ``[batch_size]``, the examples of step ``step`` (counted from 0); with ``choices``, ``[batch_size, 1 + k]``,
        and after each example what was drawn for it, number j from 0 to below ``choices[j]``."""
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derived_seed(*self._seed, epoch))
            order = torch.randperm(self.num_examples, generator=generator)
            if self._choices:
                drawn = (torch.randint(ways, order.shape, generator=generator) for ways in self._choices)
                order = torch.stack([order, *drawn], 1)
            self._order = to_device(order, self._device)
            self._epoch = epoch
        return self._order[batch * self.batch_size : (batch + 1) * self.batch_size]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor``, of the CPU, on ``device``; the host does not wait for the copy."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from several integers, without the collisions of adding them up; the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
