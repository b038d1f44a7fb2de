"""The whole training step, look-ahead on, against the paper's loop and the other peers; parity before a time counts."""

import pytest
import torch

from fasthyper.bench.memory import peak_memory
from fasthyper.bench.workloads import CASES

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own

MEMORY = ("p100", 100)  # where the memory of a step is measured too


@pytest.mark.parametrize(("workload", "past"), CASES["step"], ids=lambda case: getattr(case, "name", case))
def bench_step(against, benchmark, workload, past):
    against(workload, past, "step")
    if (workload.name, past) == MEMORY:
        benchmark.extra_info["memory"] = {
            side: peak_memory(workload, past, "step", side, torch.get_num_threads()) for side in ("fasthyper", "hypnettorch")
        }
