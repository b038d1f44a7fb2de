"""The whole training step, look-ahead on, against the paper's loop over hypnettorch; parity before a time counts."""

import pytest
from peer import PeerTrainer
from workloads import CASES

import fasthyper as fh

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

PARITY_STEPS, PARITY = 3, 1e-2  # losses and drifts of the first steps; float32, and two Adams that round differently


@pytest.mark.parametrize(("workload", "past"), CASES, ids=lambda case: getattr(case, "name", case))
def bench_step(against, workload, past):
    settings = {"lr": 1e-4, "beta": workload.beta}
    x, y = workload.batch()
    peer = PeerTrainer(workload.build(past), **settings)
    peer.begin(past)
    trainer = fh.Trainer(workload.build(past), progress=False, **settings)
    current = trainer._begin(past, "")

    for _ in range(PARITY_STEPS):
        ours, theirs = trainer._step(current, x, y), peer.step(x, y)
        assert ours == pytest.approx(theirs, rel=PARITY, abs=1e-12)
    against(lambda: trainer._step(current, x, y), lambda: peer.step(x, y), what="step", workload=workload.name, past=past)
