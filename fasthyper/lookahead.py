"""Candidate steps: what an optimizer would do next, without doing it, and then the step itself (DESIGN E4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasthyper import ops

_UNSUPPORTED = ("amsgrad", "maximize", "centered")
_ZERO = torch.zeros(())


def candidate_step(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The change that ``optimizer.step()`` would make to each of its parameters, from their ``.grad`` as it stands.

    Neither the parameters nor the optimizer's state change. A parameter whose ``.grad`` is ``None`` is left out by
    ``step()``: its change is 0.

    Args:
        optimizer: ``torch.optim`` Adam, AdamW, SGD (momentum, dampening, Nesterov) or RMSprop (momentum), weight decay
            included.

    Returns:
        One detached tensor per parameter, in the order of the parameter groups, shaped like the parameter.

    Raises:
        TypeError: another optimizer.  ValueError: amsgrad, maximize or centered.
    """
    rule = _rule(optimizer)
    with torch.no_grad():
        return [
            torch.zeros_like(p) if p.grad is None else rule(p, p.grad, optimizer.state.get(p, {}), group)
            for group in optimizer.param_groups
            for p in group["params"]
        ]


@torch.no_grad()
def look_ahead(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Where ``optimizer.step()`` would take its parameters: ``p + candidate_step(optimizer)``, for Adam in one pass.

    Arguments and errors are those of ``candidate_step``; the tensors are new, but for parameters without a gradient.
    """
    _rule(optimizer)
    if not _takes_ops(optimizer):
        return [p + delta for p, delta in zip(_parameters(optimizer), candidate_step(optimizer), strict=True)]
    ahead = {}
    for group in optimizer.param_groups:
        params, grads = _with_grads(group)
        states = [optimizer.state.get(p) for p in params]
        moments: list[list[Tensor]] = [[], []]
        steps = [_ZERO if state is None else state["step"] for state in states]
        if any(states):
            moments = [
                [torch.zeros_like(p) if state is None else state[key] for p, state in zip(params, states, strict=True)]
                for key in ("exp_avg", "exp_avg_sq")
            ]
        ahead |= zip(params, ops.adam_ahead(params, grads, *moments, steps, **_adam_settings(group)), strict=True)
    return [ahead.get(p, p.detach()) for p in _parameters(optimizer)]


@torch.no_grad()
def take_step(optimizer: torch.optim.Optimizer, more_grads: Sequence[Tensor] = (), scale: float = 1.0) -> None:
    """``optimizer.step()`` on ``p.grad + scale * more_grads``, for Adam in one pass over gradients, moments and parameters.

    Args:
        optimizer: any of ``torch.optim``; its state is what ``step()`` would leave.
        more_grads: one per parameter, all of which then have a ``.grad``; or none at all.
        scale: factor of ``more_grads``.
    """
    if not _takes_ops(optimizer):
        if more_grads:
            torch._foreach_add_([p.grad for p in _parameters(optimizer)], more_grads, alpha=scale)
        optimizer.step()
        return
    more = dict(zip(_parameters(optimizer), more_grads, strict=True)) if more_grads else {}
    for group in optimizer.param_groups:
        params, grads = _with_grads(group)
        for p in params:
            if not optimizer.state[p]:
                zeros = torch.zeros_like(p), torch.zeros_like(p)
                optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
        moments = [[optimizer.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step")]
        more_grads = [more[p] for p in params] if more else []
        ops.adam_step_(params, grads, more_grads, scale, *moments, **_adam_settings(group))


def _takes_ops(optimizer: torch.optim.Optimizer) -> bool:
    """Adam or AdamW itself, on the CPU, without the options that the ops do not know."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and all(
        not any(group[option] for option in ("amsgrad", "maximize", "capturable", "differentiable"))
        and all(p.device.type == "cpu" and p.is_contiguous() for p in group["params"])
        for group in optimizer.param_groups
    )


def _rule(optimizer: torch.optim.Optimizer) -> Callable[..., Tensor]:
    """How this optimizer steps; raises as ``candidate_step`` says."""
    rule = next((rule for optimizer_class, rule in _RULES.items() if isinstance(optimizer, optimizer_class)), None)
    if rule is None:
        known = ", ".join(optimizer_class.__name__ for optimizer_class in _RULES)
        raise TypeError(f"no candidate step for {type(optimizer).__name__}; use one of {known}, or lookahead=False")
    for group in optimizer.param_groups:
        for option in _UNSUPPORTED:
            if group.get(option):
                raise ValueError(f"no candidate step for {type(optimizer).__name__} with {option}=True")
    return rule


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _with_grads(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    params = [p for p in group["params"] if p.grad is not None]
    return params, [p.grad for p in params]


def _adam_settings(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options as the ops name them."""
    options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    return {**options, "decoupled": group["decoupled_weight_decay"]}


def _adam(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    state = state or {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param), "step": torch.zeros(())}
    return ops.adam_delta(
        param,
        grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        state["step"],
        **_adam_settings(group),
    )


def _sgd(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    grad = grad + group["weight_decay"] * param if group["weight_decay"] else grad
    momentum, buffer = group["momentum"], state.get("momentum_buffer")
    if momentum:
        buffer = grad if buffer is None else momentum * buffer + (1 - group["dampening"]) * grad
        grad = grad + momentum * buffer if group["nesterov"] else buffer
    return -group["lr"] * grad


def _rmsprop(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    grad = grad + group["weight_decay"] * param if group["weight_decay"] else grad
    alpha, momentum = group["alpha"], group["momentum"]
    square = (alpha * state["square_avg"] if state else 0) + (1 - alpha) * grad * grad
    change = grad / (square.sqrt() + group["eps"])
    if momentum and "momentum_buffer" in state:
        change = momentum * state["momentum_buffer"] + change
    return -group["lr"] * change


_RULES = {torch.optim.Adam: _adam, torch.optim.SGD: _sgd, torch.optim.RMSprop: _rmsprop}
