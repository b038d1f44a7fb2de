"""The regularizer alone, value and gradient, against hypnettorch on the same parameters; parity before a time counts."""

import oracle
import pytest
import torch
from peer import in_its_order, peer_of
from workloads import CASES

import fasthyper as fh

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

# float64 shows that both compute the same; float32, that what is timed is right: there two networks of relu may fall on
# either side of a kink, and a step of a thousandth costs both three digits
PARITY = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-4, 1e-3)}


def both_sides(workload, past, dtype):
    """(ours, the peer's): functions that return the value and the gradient of all of theta, tensor by tensor."""
    from hypnettorch.utils import hnet_regularizer as hreg

    hnet = workload.build(past).to(dtype)
    _, peer = peer_of(hnet)
    regularizer = fh.OutputRegularizer(hnet)
    regularizer.snapshot(past)
    targets = hreg.get_current_targets(past, peer)
    generator = torch.Generator().manual_seed(1)
    step = [1e-3 * torch.randn(p.shape, generator=generator).to(dtype) for p in hnet.theta]
    ahead = [p.detach() + d for p, d in zip(hnet.theta, step, strict=True)]
    peer_step = in_its_order(hnet, step)

    def ours():
        value, grads, _ = regularizer.value_and_grad(ahead)
        return value, in_its_order(hnet, grads)

    def theirs():
        value = hreg.calc_fix_target_reg(peer, past, targets=targets, dTheta=peer_step)
        return value.detach(), torch.autograd.grad(value, peer.unconditional_params)

    return ours, theirs


def assert_parity(ours, theirs, dtype):
    (value, grads), (peer_value, peer_grads) = ours(), theirs()
    flat, peer_flat = (torch.cat([g.flatten() for g in side]) for side in (grads, peer_grads))
    assert oracle.relative_error(value, peer_value) < PARITY[dtype][0]
    assert oracle.relative_error(flat, peer_flat) < PARITY[dtype][1]


@pytest.mark.parametrize(("workload", "past"), CASES, ids=lambda case: getattr(case, "name", case))
def bench_regularizer(against, workload, past):
    assert_parity(*both_sides(workload, past, torch.float64), torch.float64)
    ours, theirs = both_sides(workload, past, torch.float32)
    assert_parity(ours, theirs, torch.float32)
    against(ours, theirs, what="regularizer", workload=workload.name, past=past)
