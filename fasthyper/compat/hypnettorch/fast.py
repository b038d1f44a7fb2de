"""The regularizer for networks that are read: features, basis and plan, and the ops that never store past tasks' weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasthyper import ops
from fasthyper.compat.hypnettorch.network import Network, read
from fasthyper.compat.hypnettorch.targets import Targets
from fasthyper.compat.hypnettorch.terms import Held, Terms, plan_of_all

Given = Sequence[Sequence[Tensor]]  # per past task, one tensor per tensor of the target
Params = tuple[list[Tensor], list[Tensor]]  # unconditional, conditional


def network_for(
    hnet: Any, terms: Terms, uncond: list[Tensor], cond: list[Tensor], targets: Given | None, then: Params | None
) -> Network | None:
    """The network of ``hnet``, where what is asked for can be had from it exactly."""
    network = read(hnet)
    if network is None or uncond[0].dtype not in (torch.float32, torch.float64):
        return None
    constants = [] if then is None else [*then[0], *then[1]]
    for given in (targets, terms.importance):
        if isinstance(given, Targets):
            constants += given.theta
        elif given is not None:
            constants += [t for task in terms.tasks for t in given[task]]
    like, scaling = uncond[0], [] if terms.scaling is None else [terms.scaling[task] for task in terms.tasks]
    exact = (
        all(t.dtype == like.dtype and t.device == like.device for t in (*uncond, *cond, *constants))
        and not any(t.requires_grad for t in constants)
        and all(not isinstance(s, Tensor) or (s.dim() == 0 and not s.requires_grad) for s in scaling)
        and all(s >= 0 for s in scaling)
    )
    if isinstance(targets, Targets):
        exact = exact and targets.network.num_weights == network.num_weights
    elif targets is not None:
        exact = exact and all(sum(t.numel() for t in targets[i]) == network.num_weights for i in terms.tasks)
    return network if exact else None


def drift(
    network: Network, terms: Terms, task_id: int, uncond: list[Tensor], cond: list[Tensor], where: Given | Params
) -> Tensor:
    """Mean over tasks of the squared distance of their weights from ``where``: targets, or parameters that make them."""
    tasks = terms.tasks
    theta, embeddings = network.theta(uncond), network.embeddings(cond, tasks)
    weight = importance = None
    if terms.scaling is not None:
        weight = embeddings.new_tensor([float(terms.scaling[task]) / len(tasks) for task in tasks])
    if terms.importance is not None:
        importance = [_flat(terms.importance[task]) for task in tasks]
    snapshot = where if isinstance(where, Targets) and where.network.is_like(network) else None
    heads = None if terms.heads is None else terms.heads[:task_id]
    held = None
    if heads is not None:
        held = snapshot.held(terms.mnet, heads) if snapshot else Held(network.shapes, terms.mnet, heads)
    if snapshot and len(tasks) == len(snapshot):
        plan, pre0, gram0 = snapshot.constants(held, weight)
        theta0, embeddings0 = snapshot.theta, snapshot.embeddings
    else:
        plan = held.plan(network, tasks) if held else plan_of_all(network, len(tasks))
        pre0, gram0 = [], None
        if snapshot:
            theta0, embeddings0, pre0 = snapshot.theta, snapshot.embeddings[tasks], [a[tasks] for a in snapshot.pre()]
        elif isinstance(where, tuple):
            with torch.no_grad():
                theta0, embeddings0 = network.theta(where[0]), network.embeddings(where[1], tasks)
        else:
            h = network.features(theta, embeddings, drops=network.dropout > 0)
            rows = [where.flat(task) if isinstance(where, Targets) else _flat(where[task]) for task in tasks]
            return ops.target_drift(h, theta[-1], plan, targets=rows, importance=importance, weight=weight)
    if importance is None and network.activation and not network.own_chunks and not network.dropout:
        code = network.activation.code
        snapshots = theta0, embeddings, embeddings0, pre0, plan
        return ops.hypernet_drift(theta, *snapshots, activation=code, weight=weight, gram0=gram0)
    if network.dropout:
        with torch.no_grad():
            h0 = network.features(theta0, embeddings0)
        dh = network.features(theta, embeddings, drops=True) - h0
    else:
        dh, h0 = network.features_drift(theta, embeddings, theta0, embeddings0)
    basis, basis0 = theta[-1], theta0[-1]
    if importance is None:
        return ops.output_drift(dh, basis, h0, basis0, plan, weight=weight)
    return ops.target_drift(dh, basis, plan, h0=h0, basis0=basis0, importance=importance, weight=weight)


def _flat(weights: Sequence[Tensor]) -> Tensor:
    """Weights end to end: a view where they lie so, else a copy."""
    first = weights[0].detach()
    storage, stop = first.untyped_storage().data_ptr(), first.storage_offset()
    for w in weights:
        if w.untyped_storage().data_ptr() != storage or w.storage_offset() != stop or not w.is_contiguous():
            return torch.cat([w.detach().reshape(-1) for w in weights])
        stop += w.numel()
    return first.as_strided((stop - first.storage_offset(),), (1,))
