"""Stands in for ``hypnettorch.utils.optim_step``: what an optimizer would do next, without doing it.

Where hypnettorch 0.0.4 errs, this gives the step that ``optimizer.step()`` then takes:

- Adam with ``weight_decay``: there the decay is computed and dropped. AdamW: there it passes for Adam, its decay is lost.
- Adam's ``eps``: there it is added before the bias correction, as torch once did; here after it.
- A parameter without a gradient: there it is left out, so that the list does not match the parameters; here it changes by 0.
- ``maximize``: there it is ignored.
- SGD with momentum and ``detach_dt=False``: there the first step is detached nevertheless; and Adam with ``amsgrad`` raises.
- Other optimizers: there an AttributeError, here a TypeError that says which will do.
"""

from __future__ import annotations

from torch import Tensor, optim

from fasthyper.compat.hypnettorch import calls
from fasthyper.lookahead import candidate_step


def calc_delta_theta(
    optimizer: optim.Optimizer, use_sgd_change: bool, lr: float | None = None, detach_dt: bool = True
) -> list[Tensor]:
    """The change that the next ``optimizer.step()`` would make to each of its parameters, from their gradients.

    Args:
        optimizer: Adam, AdamW, SGD or RMSprop, with any of their options.
        use_sgd_change: the change that plain SGD with rate ``lr`` would make instead, for any optimizer.
        lr: needed for it.
        detach_dt: without a graph; ``False``: differentiable in gradients made with ``create_graph=True``. As in
            hypnettorch, what weight decay adds is not differentiated.

    Returns:
        One tensor per parameter of all groups, in their order.

    Raises:
        ValueError: ``use_sgd_change`` without ``lr``.  TypeError: another optimizer, or a sparse gradient.
    """
    with calls.record("calc_delta_theta", calls.FAST):
        if not use_sgd_change:
            return candidate_step(optimizer, differentiable=not detach_dt)
        if lr is None:
            raise ValueError("use_sgd_change needs lr")
        params = [p for group in optimizer.param_groups for p in group["params"]]
        changes = [p.new_zeros(p.shape) if p.grad is None else -lr * p.grad for p in params]
        return [change.detach() for change in changes] if detach_dt else changes


def sgd_step(optimizer: optim.SGD, detach_dp: bool = True) -> list[Tensor]:
    """``calc_delta_theta`` for SGD."""
    return _step(optimizer, optim.SGD, detach_dp)


def adam_step(optimizer: optim.Adam, detach_dp: bool = True) -> list[Tensor]:
    """``calc_delta_theta`` for Adam and AdamW."""
    return _step(optimizer, optim.Adam, detach_dp)


def rmsprop_step(optimizer: optim.RMSprop, detach_dp: bool = True) -> list[Tensor]:
    """``calc_delta_theta`` for RMSprop."""
    return _step(optimizer, optim.RMSprop, detach_dp)


def _step(optimizer: optim.Optimizer, kind: type, detach: bool) -> list[Tensor]:
    if not isinstance(optimizer, kind):
        raise TypeError(f"the optimizer must be {kind.__name__}, got {type(optimizer).__name__}")
    return calc_delta_theta(optimizer, False, detach_dt=detach)
