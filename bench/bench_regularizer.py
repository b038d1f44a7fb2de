"""The regularizer alone, value and gradient, against hypnettorch on the same parameters; parity before a time counts."""

import oracle
import pytest
import torch
from peer import in_its_order, peer_of
from workloads import CASES

import fasthyper as fh

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

PARITY = {"value": 1e-4, "gradient": 1e-3}  # float32 on both sides, at a step of a thousandth


@pytest.mark.parametrize(("workload", "past"), CASES, ids=lambda case: getattr(case, "name", case))
def bench_regularizer(against, workload, past):
    from hypnettorch.utils import hnet_regularizer as hreg

    hnet = workload.build(past)
    _, peer = peer_of(hnet)
    regularizer = fh.OutputRegularizer(hnet)
    regularizer.snapshot(past)
    targets = hreg.get_current_targets(past, peer)
    generator = torch.Generator().manual_seed(1)
    step = [1e-3 * torch.randn(p.shape, generator=generator) for p in hnet.theta]
    ahead = [p.detach() + d for p, d in zip(hnet.theta, step, strict=True)]
    peer_step = in_its_order(hnet, step)

    def ours():
        value, grads, _ = regularizer.value_and_grad(ahead)
        return value, grads

    def theirs():
        value = hreg.calc_fix_target_reg(peer, past, targets=targets, dTheta=peer_step)
        return value, torch.autograd.grad(value, peer.unconditional_params)

    (value, grads), (peer_value, peer_grads) = ours(), theirs()
    assert oracle.relative_error(value.detach(), peer_value.detach()) < PARITY["value"]
    for have, want in zip(in_its_order(hnet, grads), peer_grads, strict=True):
        assert oracle.relative_error(have, want) < PARITY["gradient"]
    del value, grads, peer_value, peer_grads
    against(ours, theirs, what="regularizer", workload=workload.name, past=past)
