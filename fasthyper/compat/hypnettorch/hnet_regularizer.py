"""Stands in for ``hypnettorch.utils.hnet_regularizer``: the same functions, values and gradients, without the loop.

Where hypnettorch 0.0.4 fails or errs, this does what was meant:

- ``get_current_targets(0, hnet)`` is empty; there it raises.
- ``prev_theta`` and ``prev_task_embs`` have to come together, and one of them or ``targets`` has to come: said in words.
- ``dTembs`` and ``prev_task_embs`` may hold one entry per past task, not only one per conditional parameter, where each
  condition has one parameter: its embedding.
- ``StructuredHMLP`` and ``HContainer`` keep their hypernetworks where ``eval()`` misses them. Here these are in evaluation
  mode when targets are made, and in the mode of the whole when weights are; afterwards every module is in the mode it was.
- Wrong arguments raise ValueError, TypeError or IndexError with a line on what is wrong; there they are bare assertions.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

from torch import Tensor

from fasthyper.compat.hypnettorch import calls, fast, general
from fasthyper.compat.hypnettorch.network import read
from fasthyper.compat.hypnettorch.targets import Targets
from fasthyper.compat.hypnettorch.terms import Terms, masks


def get_current_targets(task_id: int, hnet: Any) -> Sequence[list[Tensor]]:
    """What ``hnet`` generates now, in evaluation mode, for tasks ``0 .. task_id-1``: targets for ``calc_fix_target_reg``.

    Returns:
        A sequence of ``task_id`` lists of tensors, detached. For an ``HMLP`` or ``ChunkedHMLP`` that goes the fast way it
        holds a copy of the parameters, not T x P weights, and makes an entry when it is indexed; for others, a list.

    Raises:
        ValueError: ``task_id`` is negative, or exceeds the number of conditions that ``hnet`` knows.
    """
    task_id = index(task_id)
    _check_tasks(hnet, task_id)
    network = read(hnet) if task_id else None
    with calls.record("get_current_targets", calls.FAST if network or not task_id else calls.GENERAL):
        if not task_id:
            return []
        if network:
            return Targets(network, _uncond(hnet), _cond(hnet), task_id)
        return general.outputs(hnet, range(task_id))


def calc_fix_target_reg(
    hnet: Any,
    task_id: int,
    targets: Sequence[Sequence[Tensor]] | None = None,
    dTheta: Sequence[Tensor] | None = None,
    dTembs: Sequence[Tensor] | None = None,
    mnet: Any = None,
    inds_of_out_heads: Sequence[Sequence[int]] | None = None,
    fisher_estimates: Sequence[Sequence[Tensor]] | None = None,
    prev_theta: Sequence[Tensor] | None = None,
    prev_task_embs: Sequence[Tensor] | None = None,
    batch_size: int | None = None,
    reg_scaling: Sequence[Any] | None = None,
) -> Tensor:
    """Mean over past tasks of the squared distance of the weights generated for them from where they are to stay.

    ``1/n sum_i s_i sum_k F_ik (target_ik - h(e_i + dTembs_i; theta + dTheta)_k)^2`` over the n past tasks that take part.

    Args:
        hnet: the hypernetwork, with its parameters inside.
        task_id: of the current task, 1 or more: the number of past tasks.
        targets: per past task, a list of tensors to hold to; best what ``get_current_targets`` returned.
        dTheta: added to ``hnet.unconditional_params`` (a look-ahead, see ``optim_step``); not detached.
        dTembs: added to ``hnet.conditional_params``; not detached.
        mnet, inds_of_out_heads: the target network and, per past task, the outputs that are its own: weights of its output
            layer that make other outputs are left out.
        fisher_estimates: per past task, a list of tensors F, shaped like the generated weights.
        prev_theta, prev_task_embs: in place of ``targets``, the unconditional and conditional parameters that make them.
        batch_size: n at most; which tasks is drawn with NumPy's global generator. ``None``, 0 and below: all.
        reg_scaling: per past task, a factor s.

    Returns:
        Scalar, differentiable in the parameters of ``hnet``, ``dTheta`` and ``dTembs``, and in ``targets``,
        ``fisher_estimates`` and ``reg_scaling`` where they require it.

    Raises:
        ValueError: lengths, shapes or options that do not go together; parameters that ``hnet`` does not hold inside.
        TypeError: ``hnet`` is no hypernetwork of hypnettorch's interface.

    The fast way serves an ``HMLP`` or ``ChunkedHMLP``, or a subclass that keeps its forward pass, in float32 or float64,
    without batch normalization and with an activation known to be plain. There second derivatives raise. Past tasks' weights
    are never stored; with ``targets`` of ``get_current_targets`` or ``prev_theta`` and without ``fisher_estimates`` they are
    never made either. All else, and what requires gradients of targets, estimates or scaling, or scales by less than 0, goes
    through ``hnet.forward``. With dropout in training mode the same masks are drawn as there.
    """
    task_id = index(task_id)
    _check(hnet, task_id, targets, mnet, inds_of_out_heads, fisher_estimates, prev_theta, prev_task_embs, reg_scaling)
    uncond, cond = _uncond(hnet), _cond(hnet)
    # where each condition has one parameter, its embedding, those of the past tasks will do
    least = task_id if len(cond) == hnet.num_known_conds else len(cond)
    uncond, cond = _plus("dTheta", hnet, uncond, dTheta, len(uncond)), _plus("dTembs", hnet, cond, dTembs, least)
    then = None if prev_theta is None or prev_task_embs is None else _then(hnet, prev_theta, prev_task_embs, least)
    terms = Terms(_draw(task_id, batch_size), mnet, inds_of_out_heads, fisher_estimates, reg_scaling)
    network = fast.network_for(hnet, terms, uncond, cond, targets, then)
    with calls.record("calc_fix_target_reg", calls.FAST if network else calls.GENERAL):
        if network:
            return fast.drift(network, terms, task_id, uncond, cond, targets if then is None else then)  # type: ignore[arg-type]
        weights = {"uncond_weights": uncond} | ({} if dTembs is None else {"cond_weights": cond})
        if then is None:
            return general.drift(hnet, terms, weights, lambda task: targets[task])  # type: ignore[index]
        return general.drift(hnet, terms, weights, {"uncond_weights": then[0], "cond_weights": then[1]})


def flatten_and_remove_out_heads(mnet: Any, weights: Sequence[Tensor], allowed_outputs: Sequence[int]) -> Tensor:
    """The target network's weights end to end, without those of its output layer that make outputs that are not allowed.

    Args:
        mnet: the target network, with a fully connected output layer.
        weights: all its parameters, or its ``hyper_shapes_learned``.
        allowed_outputs: indices of outputs.

    Raises:
        ValueError: ``weights`` are neither.  NotImplementedError: ``mnet`` cannot mask its outputs.
    """
    return general.flatten(weights, masks(mnet, len(weights), allowed_outputs))


def _draw(task_id: int, batch_size: int | None) -> list[int]:
    """The past tasks that take part; a subset is drawn as hypnettorch draws it, with NumPy's global generator."""
    if batch_size is None or batch_size <= 0 or task_id <= batch_size:
        return list(range(task_id))
    import numpy

    return numpy.random.choice(task_id, size=batch_size, replace=False).tolist()


def _uncond(hnet: Any) -> list[Tensor]:
    general.check_inside(hnet, "unconditional")
    return hnet.unconditional_params or []


def _cond(hnet: Any) -> list[Tensor]:
    return hnet.conditional_params or []


def _plus(name: str, hnet: Any, params: list[Tensor], delta: Sequence[Tensor] | None, least: int) -> list[Tensor]:
    """Parameters with ``delta`` added; the last ones may stay as they are, after the ``least`` that must not."""
    if delta is None:
        return params
    if not least <= len(delta) <= len(params):
        raise ValueError(f"{name} must hold one tensor per parameter, {len(params)}, got {len(delta)}")
    return hnet.add_to_uncond_params(list(delta), params=params[: len(delta)]) + params[len(delta) :]


def _then(hnet: Any, theta: Sequence[Tensor], embeddings: Sequence[Tensor], least: int) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters that make the targets, as many as ``hnet.forward`` takes."""
    num_theta, num_cond = len(hnet.unconditional_param_shapes), len(hnet.conditional_param_shapes)
    if len(theta) != num_theta or not least <= len(embeddings) <= num_cond:
        raise ValueError(
            f"prev_theta must hold {num_theta} tensors and prev_task_embs {num_cond}, one per unconditional and conditional "
            f"parameter, got {len(theta)} and {len(embeddings)}"
        )
    return [p.detach() for p in theta], [p.detach() for p in (*embeddings, *_cond(hnet)[len(embeddings) :])]


def _check(
    hnet: Any,
    task_id: int,
    targets: Sequence[Any] | None,
    mnet: Any,
    heads: Sequence[Any] | None,
    importance: Sequence[Any] | None,
    prev_theta: Sequence[Tensor] | None,
    prev_task_embs: Sequence[Tensor] | None,
    scaling: Sequence[Any] | None,
) -> None:
    if task_id < 1:
        raise ValueError(f"task_id must be at least 1: without past tasks there is nothing to hold, got {task_id}")
    _check_tasks(hnet, task_id)
    if targets is None and (prev_theta is None or prev_task_embs is None):
        raise ValueError("give targets, or prev_theta and prev_task_embs")
    if targets is not None and not (prev_theta is None and prev_task_embs is None):
        raise ValueError("give either targets, or prev_theta and prev_task_embs, not both")
    if targets is not None and len(targets) != task_id:
        raise ValueError(f"targets must hold {task_id} entries, one per past task, got {len(targets)}")
    if heads is not None and mnet is None:
        raise ValueError("inds_of_out_heads need mnet, the target network")
    entries = {"inds_of_out_heads": heads, "fisher_estimates": importance, "reg_scaling": scaling}
    for name, given in entries.items():
        if given is not None and len(given) < task_id:
            raise ValueError(f"{name} must hold at least {task_id} entries, one per past task, got {len(given)}")
    if importance is not None:
        want = [list(shape) for shape in hnet.target_shapes]
        for task, estimates in enumerate(importance[:task_id]):
            have = [list(f.shape) for f in estimates]
            if have != want:
                raise ValueError(
                    f"fisher_estimates[{task}] must have the shapes of the generated weights, {want}, got {have}"
                )


def _check_tasks(hnet: Any, num_tasks: int) -> None:
    from hypnettorch.hnets import HyperNetInterface

    if not isinstance(hnet, HyperNetInterface):
        raise TypeError(f"hnet must be a hypnettorch.hnets.HyperNetInterface, got {type(hnet).__name__}")
    if num_tasks < 0:
        raise ValueError(f"task_id must not be negative, got {num_tasks}")
    if num_tasks:
        general.check(hnet, num_tasks)
