"""The whole training step, look-ahead on, against the paper's loop and the other peers; parity before a time counts."""

import pytest

from fasthyper.bench.workloads import CASES, WORKLOADS

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own


@pytest.mark.parametrize(("workload", "past"), CASES["step"], ids=lambda case: getattr(case, "name", case))
def bench_step(against, workload, past):
    against(workload, past, "step")


@pytest.mark.parametrize("past", [10, 100])
def bench_step_aligned(against, past):
    against(WORKLOADS["p100"], past, "step", layout="aligned")
