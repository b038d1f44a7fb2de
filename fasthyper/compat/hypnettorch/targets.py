"""Targets that are not stored: a snapshot of the parameters, from which each is made when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper import reference
from fasthyper.compat.hypnettorch.network import Network
from fasthyper.compat.hypnettorch.terms import Held, plan_of_all
from fasthyper.planner import default_budget, stored_bytes
from fasthyper.trunk import run_trunk


class Targets(Sequence[list[Tensor]]):
    """What ``get_current_targets`` returns: ``targets[i]`` is the list of weights that were generated for task i.

    Holds a copy of the hypernetwork's parameters, and constants of the drift within ``planner.default_budget``.
    """

    @torch.no_grad()
    def __init__(self, network: Network, uncond: Sequence[Tensor], cond: Sequence[Tensor], num_tasks: int):
        self.network, self.num_tasks = network, num_tasks
        self.theta = [p.detach().clone() for p in network.theta(uncond)]
        self.embeddings = network.embeddings(cond, range(num_tasks)).detach().clone()
        self._held: Held | None = None  # the last one asked for
        self._plan_for: Held | None = None
        self._plan: Tensor | None = None
        self._gram0: Tensor | None = None
        self._pre: list[Tensor] | None = None

    def __len__(self) -> int:
        return self.num_tasks

    @overload
    def __getitem__(self, index: int) -> list[Tensor]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[Tensor]]: ...

    def __getitem__(self, index: int | slice) -> list[Tensor] | list[list[Tensor]]:
        if isinstance(index, slice):
            return [self[task] for task in range(self.num_tasks)[index]]
        shapes = [torch.Size(shape) for shape in self.network.shapes]
        parts = self.flat(index).split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @torch.no_grad()
    def flat(self, task: int) -> Tensor:
        """The weights of a task end to end, ``[P]``."""
        if not -len(self) <= task < len(self):
            raise IndexError(f"target {task} out of range: there are {len(self)} past tasks")
        h, basis = self.network.features(self.theta, self.embeddings[task][None])[0], self.theta[-1]
        return F.linear(h, basis[:, :-1], basis[:, -1]).flatten()[: self.network.num_weights]

    def held(self, mnet: Any, heads: Sequence[Sequence[int]]) -> Held:
        """``Held`` for a target and its heads, made once for as long as they are the same."""
        if self._held is None or not self._held.fits(mnet, heads):
            self._held = Held(self.network.shapes, mnet, heads)
        return self._held

    def constants(self, held: Held | None, weight: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """For the drift over all tasks: plan, pre-activations (none where the budget does not hold them), Gram matrices
        (for equal weights of the tasks)."""
        if self._plan is None or held is not self._plan_for:
            self._plan_for, self._gram0 = held, None
            self._plan = held.plan(self.network, range(len(self))) if held else plan_of_all(self.network, len(self))
        may_hold = self._is_ours and (len(self.network.hidden) == 1 or self._num_stored > 0)  # features of all tasks at once
        if may_hold and self._gram0 is None and weight is None:
            h0 = self.network.features(self.theta, self.embeddings)
            of_rows = reference.gram0(h0, h0.new_full((len(self),), 1 / len(self)), self._plan)
            self._gram0 = reference.with_basis_gram0(of_rows, self.theta[-1], self._plan)
        return self._plan, self.pre(), None if weight is not None else self._gram0

    @torch.no_grad()
    def pre(self) -> list[Tensor]:
        """Pre-activations ``[T, N, h]`` of each of the last trunk layers within the budget."""
        if self._pre is None:
            stored = self._num_stored
            self._pre = run_trunk(self.theta, self.embeddings, self.network.activation).pre[-stored:] if stored else []
        return self._pre

    @property
    def _num_stored(self) -> int:
        """Of how many layers the pre-activations fit the budget, of a trunk of ours."""
        network, like = self.network, self.theta[0]
        sizes = len(self), network.num_chunks, network.hidden, like.element_size()
        return len(stored_bytes(*sizes, default_budget(like.device))) if self._is_ours else 0

    @property
    def _is_ours(self) -> bool:
        """Whether there is a trunk that the kernels know."""
        network = self.network
        return bool(network.hidden and network.activation) and not network.own_chunks
