"""Candidate steps: what an optimizer would do next, without doing it (DESIGN E4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasthyper import ops

_UNSUPPORTED = ("amsgrad", "maximize", "centered")


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
    rule = next((rule for optimizer_class, rule in _RULES.items() if isinstance(optimizer, optimizer_class)), None)
    if rule is None:
        known = ", ".join(optimizer_class.__name__ for optimizer_class in _RULES)
        raise TypeError(f"no candidate step for {type(optimizer).__name__}; use one of {known}, or lookahead=False")
    for group in optimizer.param_groups:
        for option in _UNSUPPORTED:
            if group.get(option):
                raise ValueError(f"no candidate step for {type(optimizer).__name__} with {option}=True")
    with torch.no_grad():
        return [
            torch.zeros_like(p) if p.grad is None else rule(p, p.grad, optimizer.state.get(p, {}), group)
            for group in optimizer.param_groups
            for p in group["params"]
        ]


def _adam(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    state = state or {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param), "step": torch.zeros(())}
    return ops.adam_delta(
        param,
        grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        state["step"],
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=group["decoupled_weight_decay"],
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
