"""What is summed: over which past tasks, over which of their weights, weighed by what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasthyper.compat.hypnettorch.network import Network
from fasthyper.layout import Layout, Range
from fasthyper.planner import drift_plan


class Terms(NamedTuple):
    """The options of the regularizer that say what is summed."""

    tasks: list[int]
    mnet: Any
    heads: Sequence[Sequence[int]] | None  # per past task, its outputs
    importance: Sequence[Sequence[Tensor]] | None  # per past task, shaped like the generated weights
    scaling: Sequence[Any] | None  # per past task


class Held:
    """Ranges of the flat vector of generated weights: ``shared``, held for every task, and ``own[i]``, for task i alone.

    Args:
        shapes: of the generated tensors.
        mnet: the target; its ``get_output_weight_mask`` says which weights make given outputs.
        heads: per past task, its outputs.

    Raises:
        ValueError: the generated tensors are not the target's parameters.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], mnet: Any, heads: Sequence[Sequence[int]]):
        self.mnet, self.heads = mnet, _as_ints(heads)
        known: dict[tuple[int, ...], tuple[list[Range], list[Range]]] = {}
        self.own: list[list[Range]] = []
        self.shared: list[Range] = []
        for head in self.heads:
            if head not in known:
                known[head] = _ranges(shapes, mnet, list(head))
            self.shared, own = known[head]
            self.own.append(own)

    def fits(self, mnet: Any, heads: Sequence[Sequence[int]]) -> bool:
        """Whether these ranges are those of the target and heads that are given."""
        return self.mnet is mnet and self.heads == _as_ints(heads)

    def plan(self, network: Network, tasks: Sequence[int]) -> Tensor:
        """The plan of the drift over these past tasks, as the ops take it."""
        own = [self.own[task] for task in tasks]
        if all(ranges == own[0] for ranges in own):
            return _plan(network, [*self.shared, *own[0]], len(own))
        plans, lo = [_plan(network, self.shared, len(own))], 0
        for hi in range(1, len(own) + 1):
            if hi == len(own) or own[hi] != own[lo]:
                plan = _plan(network, own[lo], hi - lo)
                plan[:, 0], plan[:, 1] = lo, hi
                plans.append(plan)
                lo = hi
        return torch.cat(plans)


def plan_of_all(network: Network, num_tasks: int) -> Tensor:
    """The plan where every weight is held for every task."""
    return _plan(network, [(0, network.num_weights)], num_tasks)


def masks(mnet: Any, num_tensors: int, outputs: Sequence[int]) -> list[Tensor | None]:
    """For each of the generated tensors, which of its weights make these outputs; None where that is no question."""
    found = mnet.get_output_weight_mask(out_inds=outputs)
    if num_tensors == len(mnet.param_shapes):
        return found
    learned = mnet.hyper_shapes_learned_ref
    if learned is None:
        raise NotImplementedError("heads cannot be masked: mnet.hyper_shapes_learned_ref is None")
    if num_tensors != len(learned):
        raise ValueError(
            f"{num_tensors} generated tensors are neither all {len(mnet.param_shapes)} parameters of mnet nor its "
            f"{len(learned)} learned ones"
        )
    return [found[ref] for ref in learned]


def _ranges(shapes: Sequence[Sequence[int]], mnet: Any, head: list[int]) -> tuple[list[Range], list[Range]]:
    shared: list[Range] = []
    own: list[Range] = []
    start = 0
    for shape, mask in zip(shapes, masks(mnet, len(shapes), head), strict=True):
        stop = start + math.prod(shape)
        if mask is None:
            shared.append((start, stop))
        elif list(mask.shape) != list(shape):
            raise ValueError(
                f"mnet masks a parameter of shape {list(mask.shape)}, but {list(shape)} is generated in its place"
            )
        else:
            flat = mask.flatten().to("cpu", torch.int8)
            edge = flat.new_zeros(1)
            edges = torch.diff(flat, prepend=edge, append=edge).nonzero().view(-1, 2) + start
            own += [(lo, hi) for lo, hi in edges.tolist()]
        start = stop
    return _joined(shared), own


def _as_ints(heads: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    return [tuple(map(int, head)) for head in heads]


def _joined(ranges: list[Range]) -> list[Range]:
    joined: list[Range] = []
    for lo, hi in ranges:
        if joined and joined[-1][1] == lo:
            lo, _ = joined.pop()
        joined.append((lo, hi))
    return joined


def _plan(network: Network, ranges: Sequence[Range], num_tasks: int) -> Tensor:
    """The plan where these ranges are held for every task; all else belongs to a head of nobody."""
    edges = [0, *(edge for span in sorted(ranges) for edge in span), network.num_weights]
    rest = [(lo, hi) for lo, hi in zip(edges[::2], edges[1::2], strict=True) if lo < hi]
    layout = Layout(network.num_weights, network.chunk_size, [[], rest] if rest else [])
    return drift_plan(layout, [0] * num_tasks, network.width, trunk=len(network.hidden) > 0)
