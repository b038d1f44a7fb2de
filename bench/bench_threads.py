"""The regularizer at one thread and at all of them, in turn."""

import statistics
import time

import pytest
import torch

from fasthyper.bench.peers import OURS, SIDES
from fasthyper.bench.workloads import WORKLOADS

ROUNDS = 15


@pytest.mark.parametrize(("name", "past"), [("p10", 100), ("p100", 10), ("p100", 100)])
def bench_threads(benchmark, name, past):
    ours, most = SIDES[OURS](WORKLOADS[name], past).prepare("regularizer"), torch.get_num_threads()
    times = {1: [], most: []}

    def round_of_all():
        for threads, taken in times.items():
            torch.set_num_threads(threads)
            began = time.perf_counter()
            ours()
            taken.append(time.perf_counter() - began)

    try:
        benchmark.pedantic(round_of_all, rounds=ROUNDS, warmup_rounds=2)
    finally:
        torch.set_num_threads(most)
    medians = {threads: statistics.median(taken[2:]) for threads, taken in times.items()}
    benchmark.extra_info.update(
        what="threads", workload=name, past=past, seconds=medians, threads=most, speedup=medians[1] / medians[most]
    )
