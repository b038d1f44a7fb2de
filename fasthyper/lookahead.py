"""Candidate steps: what an optimizer would do next, without doing it, and then the step itself (DESIGN E4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasthyper import ops


def candidate_step(optimizer: torch.optim.Optimizer, *, differentiable: bool = False) -> list[Tensor]:
    """The change that ``optimizer.step()`` would make to each of its parameters, from their ``.grad`` as it stands.

    Neither the parameters nor the optimizer's state change. A parameter whose ``.grad`` is ``None`` is left out by
    ``step()``: its change is 0.

    Args:
        optimizer: ``torch.optim`` Adam or AdamW (amsgrad), SGD (momentum, dampening, Nesterov) or RMSprop (momentum,
            centered), weight decay and ``maximize`` included.
        differentiable: in the gradients, where they were made with ``create_graph=True``; not through weight decay.

    Returns:
        One tensor per parameter, in the order of the parameter groups, shaped like the parameter; detached unless
        ``differentiable``.

    Raises:
        TypeError: another optimizer, or a sparse gradient.
    """
    rule = _rule(optimizer)
    with torch.set_grad_enabled(differentiable):
        return [
            torch.zeros_like(p) if p.grad is None else _change(rule, p, p.grad, optimizer.state.get(p, {}), group)
            for group in optimizer.param_groups
            for p in group["params"]
        ]


@torch.no_grad()
def look_ahead(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Where ``optimizer.step()`` would take its parameters: ``p + candidate_step(optimizer)``, for Adam in one pass.

    Arguments and errors are those of ``candidate_step``. Adam's moments are made, as zeros, where there are none yet.
    """
    _rule(optimizer)
    if not _takes_ops(optimizer):
        return [p + delta for p, delta in zip(_parameters(optimizer), candidate_step(optimizer), strict=True)]
    ahead = {p: p.detach() for p in _parameters(optimizer)}
    for group in optimizer.param_groups:
        params, grads, *state = _adam_lists(optimizer, group)
        ahead |= zip(params, ops.adam_ahead(params, grads, *state, **_adam_settings(group)), strict=True)
    return list(ahead.values())


@torch.no_grad()
def take_step(
    optimizer: torch.optim.Optimizer,
    more_grads: Sequence[Tensor] = (),
    scale: float = 1.0,
    healthy: Tensor | None = None,
) -> None:
    """``optimizer.step()`` on ``p.grad + scale * more_grads``, for Adam in one pass over gradients, moments and parameters.

    Args:
        optimizer: any of ``torch.optim``; its state is what ``step()`` would leave.
        more_grads: one per parameter, all of which then have a ``.grad``; or none at all.
        scale: factor of ``more_grads``.
        healthy: bool ``[]`` on the parameters' device; where it is false nothing changes. It is not read. The optimizer must
            have taken a step before, which makes its state.
    """
    if not _takes_ops(optimizer):
        if more_grads:
            for p, more in zip(_parameters(optimizer), more_grads, strict=True):
                p.grad.add_(more, alpha=scale)  # type: ignore[union-attr]
        changing = [] if healthy is None else _changing(optimizer)
        before = [t.clone() for t in changing]
        optimizer.step()
        for t, old in zip(changing, before, strict=True):
            t.copy_(torch.where(healthy, t, old))  # type: ignore[arg-type]
        return
    more_of = dict(zip(_parameters(optimizer), more_grads, strict=True)) if more_grads else {}
    for group in optimizer.param_groups:
        params, grads, *state = _adam_lists(optimizer, group)
        more_in_group = [more_of[p] for p in params] if more_of else []
        ops.adam_step_(params, grads, more_in_group, scale, *state, **_adam_settings(group), healthy=healthy)


def make_capturable(optimizer: torch.optim.Optimizer, *, schedule: bool = False) -> bool:
    """Lets a CUDA graph capture the steps of an optimizer that has taken none yet, also those that torch itself takes.

    With a ``schedule`` learning rates become tensors, to be filled. Only Adam's ops read them there: whether it is so.
    """
    takes_ops = _takes_ops(optimizer)
    if schedule and takes_ops:
        for group in optimizer.param_groups:
            lr, like = group["lr"], group["params"][0]
            group |= {"initial_lr": lr, "lr": torch.tensor(lr, dtype=torch.float64, device=like.device)}
    if not takes_ops:
        for group in optimizer.param_groups:
            if "capturable" in group and all(p.is_cuda for p in group["params"]):
                group["capturable"] = True
        optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are not
    return takes_ops or not schedule


def _takes_ops(optimizer: torch.optim.Optimizer) -> bool:
    """Adam or AdamW itself, a group on one device, without the options that the ops do not know."""

    def serves(group: dict[str, Any]) -> bool:
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        unknown = ("amsgrad", "maximize", "differentiable", *(() if device.type == "cuda" else ("capturable",)))
        return (
            device.type in ("cpu", "cuda")
            and not any(group[option] for option in unknown)
            and all(p.device == device and p.is_contiguous() for p in group["params"])
        )

    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and all(map(serves, optimizer.param_groups))


def _rule(optimizer: torch.optim.Optimizer) -> Callable[..., Tensor]:
    """How this optimizer steps; raises as ``candidate_step`` says."""
    rule = next((rule for optimizer_class, rule in _RULES.items() if isinstance(optimizer, optimizer_class)), None)
    if rule is None:
        known = ", ".join(optimizer_class.__name__ for optimizer_class in _RULES)
        raise TypeError(f"no candidate step for {type(optimizer).__name__}; use one of {known}, or lookahead=False")
    return rule


def _change(
    rule: Callable[..., Tensor], param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> Tensor:
    if grad.is_sparse:
        raise TypeError("no candidate step for a sparse gradient")
    return rule(param.detach(), -grad if group["maximize"] else grad, state, group)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _changing(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, and all tensors of the state."""
    state = (value for entries in optimizer.state.values() for value in entries.values())
    return [*_parameters(optimizer), *(value for value in state if isinstance(value, Tensor))]


def _adam_lists(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[list[Tensor], ...]:
    """Of a group's parameters that have a gradient: they, the gradients, moments and counts of steps, for the ops.

    Counts lie with the parameters, as torch has them where Adam is fused or capturable, and takes them anywhere.
    """
    params = [p for p in group["params"] if p.grad is not None]
    for p in params:
        state = optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state |= {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        if state["step"].device != p.device:
            state["step"] = state["step"].to(p.device)
    states = [optimizer.state[p] for p in params]
    lists = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    return params, [p.grad for p in params], *lists


def _adam_settings(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options as the ops name them."""
    options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    return {**options, "decoupled": group["decoupled_weight_decay"]}


def _adam(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    zeros = torch.zeros_like(param)
    state = state or {"exp_avg": zeros, "exp_avg_sq": zeros, "max_exp_avg_sq": zeros, "step": torch.zeros(())}
    if group["amsgrad"]:
        return _amsgrad(param, grad, state, group)
    return ops.adam_delta(
        param,
        grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        state["step"],
        **_adam_settings(group),
    )


def _amsgrad(param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """E4 with the largest second moment so far in place of the second moment."""
    lr, decay, (beta1, beta2), after = group["lr"], group["weight_decay"], group["betas"], state["step"].double() + 1
    decoupled = group["decoupled_weight_decay"]
    grad = grad + decay * param if decay and not decoupled else grad
    m = beta1 * state["exp_avg"] + (1 - beta1) * grad
    v = torch.maximum(state["max_exp_avg_sq"], beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad)
    root = (v / (1 - beta2**after)).sqrt()
    delta = -lr / (1 - beta1**after) * m / (root + group["eps"])
    return delta - lr * decay * param if decay and decoupled else delta


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
    if group["centered"]:
        mean = (alpha * state["grad_avg"] if state else 0) + (1 - alpha) * grad
        square = square - mean * mean
    change = grad / (square.sqrt() + group["eps"])
    if momentum and "momentum_buffer" in state:
        change = momentum * state["momentum_buffer"] + change
    return -group["lr"] * change


_RULES = {torch.optim.Adam: _adam, torch.optim.SGD: _sgd, torch.optim.RMSprop: _rmsprop}
