"""The whole training step, look-ahead on, against the paper's loop and the other peers; parity before a time counts."""

import dataclasses

import pytest
import torch

from fasthyper.bench.memory import peak_memory
from fasthyper.bench.workloads import CASES, WORKLOADS

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own

MEMORY = ("p100", 100)  # where the memory of a step is measured too


@pytest.mark.parametrize(("workload", "past"), CASES["step"], ids=lambda case: getattr(case, "name", case))
def bench_step(against, benchmark, workload, past):
    against(workload, past, "step")
    if (workload.name, past) == MEMORY:
        benchmark.extra_info["memory"] = {
            side: peak_memory(workload, past, "step", side, torch.get_num_threads()) for side in ("fasthyper", "hypnettorch")
        }


@pytest.mark.parametrize("past", [10, 100])
def bench_step_aligned(against, past):
    flat = WORKLOADS["p100"]
    aligned = dataclasses.replace(flat, name="p100-aligned", hnet=flat.hnet | {"layout": "aligned"})
    against(flat, past, "step", ours=aligned)
