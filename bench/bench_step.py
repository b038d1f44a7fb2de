"""The whole training step, look-ahead on, against the paper's loop and the other peers; parity before a time counts."""

import dataclasses

import pytest

from fasthyper.bench.workloads import CASES, WORKLOADS

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own


@pytest.mark.parametrize(("workload", "past"), CASES["step"], ids=lambda case: getattr(case, "name", case))
def bench_step(against, workload, past):
    against(workload, past, "step")


@pytest.mark.parametrize("past", [10, 100])
def bench_step_aligned(against, past):
    flat = WORKLOADS["p100"]
    aligned = dataclasses.replace(flat, name="p100-aligned", hnet=flat.hnet | {"layout": "aligned"})
    against(flat, past, "step", ours=aligned)
