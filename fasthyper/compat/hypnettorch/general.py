"""The regularizer for any hypernetwork of hypnettorch's interface, through its own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper.compat.hypnettorch.network import plain_activation
from fasthyper.compat.hypnettorch.terms import Terms, masks

Weights = Sequence[Tensor]
TargetOf = Callable[[int], Weights] | dict[str, Any]


def drift(hnet: Any, terms: Terms, weights: dict[str, Any], target_of: TargetOf) -> Tensor:
    """Mean over tasks of the squared distance of their weights from targets, differentiable in all that takes part.

    Args:
        weights: what ``hnet.forward`` is given to make the weights now.
        target_of: a task's target; or what ``hnet.forward`` is given to make all targets, in evaluation mode.

    Where the forward pass is known to treat tasks apart and to draw nothing at random, all tasks go through it at once. Else
    they go one by one in the order in which hypnettorch takes them, so that it draws the same random numbers.
    """
    total: Any = 0
    steps = _at_once if _goes_at_once(hnet) else _one_by_one
    for task, now, then in steps(hnet, terms.tasks, weights, target_of):
        keep = None if terms.heads is None else masks(terms.mnet, len(now), terms.heads[task])
        have, want = flatten(now, keep), flatten(then, keep)
        if have.shape != want.shape:
            raise ValueError(f"the target of task {task} has {len(want)} weights, but {len(have)} are generated")
        squares = (want - have).pow(2)
        if terms.importance is not None:
            squares = flatten(terms.importance[task], keep) * squares
        total = total + (squares.sum() if terms.scaling is None else terms.scaling[task] * squares.sum())
    return total / len(terms.tasks)


def flatten(weights: Sequence[Tensor], keep: Sequence[Tensor | None] | None) -> Tensor:
    """Weights end to end, those alone that ``keep`` masks, where it has a mask."""
    if keep is None:
        return torch.cat([w.reshape(-1) for w in weights])
    return torch.cat([w.flatten() if mask is None else w[mask].flatten() for w, mask in zip(weights, keep, strict=True)])


@torch.no_grad()
def outputs(hnet: Any, tasks: Sequence[int]) -> list[list[Tensor]]:
    """The weights of these tasks in evaluation mode, without a graph."""
    with _mode(list(_modules(hnet)), False):
        return [[w.detach() for w in ws] for ws in hnet.forward(cond_id=list(tasks), ret_format="sequential")]


Step = Iterator[tuple[int, Weights, Weights]]


def _at_once(hnet: Any, tasks: Sequence[int], weights: dict[str, Any], target_of: TargetOf) -> Step:
    with _mode(_hidden(hnet), hnet.training):
        now = hnet.forward(cond_id=list(tasks), weights=weights, ret_format="sequential")
    if isinstance(target_of, dict):
        with _mode(list(_modules(hnet)), False), torch.no_grad():
            then = hnet.forward(cond_id=list(tasks), weights=target_of, ret_format="sequential")
        yield from zip(tasks, now, then, strict=True)
    else:
        yield from ((task, ws, target_of(task)) for task, ws in zip(tasks, now, strict=True))


def _one_by_one(hnet: Any, tasks: Sequence[int], weights: dict[str, Any], target_of: TargetOf) -> Step:
    for task in tasks:
        with _mode(_hidden(hnet), hnet.training):
            now = hnet.forward(cond_id=task, weights=weights)
        if isinstance(target_of, dict):
            with _mode(list(_modules(hnet)), False), torch.no_grad():
                then: Weights = [w.clone() for w in hnet.forward(cond_id=task, weights=target_of)]
        else:
            then = target_of(task)
        yield task, now, then


def _goes_at_once(hnet: Any) -> bool:
    """Whether tasks do not meet in a forward pass and nothing in it is random: classes known to be so, in such a state."""
    from hypnettorch.hnets import HyperNetInterface

    return all(
        _is_known(network)
        and plain_activation(getattr(network, "_act_fn", None))
        and not (network.training and (getattr(network, "_use_batch_norm", False) or getattr(network, "_dropout", None)))
        for network in _modules(hnet)
        if isinstance(network, HyperNetInterface)
    )


def check(hnet: Any, num_tasks: int) -> None:
    """Raises where a forward pass of hypnettorch's own would fail an assertion for want of something."""
    if not _is_known(hnet):
        return
    if getattr(hnet, "_uncond_in_size", 0):
        raise ValueError(
            f"hnet takes an unconditional input of size {hnet._uncond_in_size}, which the regularizer has none to give; "
            "regularize a subclass, or a wrapper, whose forward supplies it"
        )
    check_inside(hnet, "unconditional")
    check_inside(hnet, "conditional")
    if num_tasks > hnet.num_known_conds:
        raise ValueError(f"{num_tasks} past tasks, but hnet knows {hnet.num_known_conds} conditions (num_cond_embs)")


def check_inside(hnet: Any, kind: str) -> None:
    """Raises where a hypernetwork does not hold all its ``kind`` of parameters."""
    if len(getattr(hnet, f"{kind}_params") or ()) != len(getattr(hnet, f"{kind}_param_shapes")):
        raise ValueError(
            f"the hypernetwork must hold its {kind} parameters inside (no_{kind.removesuffix('itional')}_weights=False)"
        )


def _is_known(hnet: Any) -> bool:
    from hypnettorch import hnets

    known = (hnets.HMLP, hnets.ChunkedHMLP, hnets.StructuredHMLP, hnets.HContainer)
    return type(hnet).forward in [network.forward for network in known] and "forward" not in vars(hnet)


def _modules(hnet: Any) -> Iterator[nn.Module]:
    """All modules, also those of hypernetworks that structured ones and containers keep in a plain list."""
    for module in hnet.modules():
        yield module
        for inner in getattr(module, "_hnets", ()):
            yield from _modules(inner)


def _hidden(hnet: Any) -> list[nn.Module]:
    """Modules that ``hnet.train()`` and ``hnet.eval()`` miss."""
    seen = set(hnet.modules())
    return [module for module in _modules(hnet) if module not in seen]


@contextmanager
def _mode(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    """Modules in training or evaluation mode; afterwards each is as it was."""
    before = [module.training for module in modules]
    for module in modules:
        module.training = training
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.training = was
