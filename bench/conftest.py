"""How a peer is timed beside us, and what every results file says about its machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest

import fasthyper.environment

ROUNDS, SECONDS = (7, 41), 40.0  # fewest and most rounds, and the time after which no more are added


@pytest.fixture
def against(benchmark):
    """``against(ours, peer, **facts)``: times both in turn in one run, and keeps the ratio of medians with its spread."""

    def run(ours: Callable[[], object], peer: Callable[[], object], **facts: object) -> None:
        peer_seconds: list[float] = []

        def peer_goes_first() -> None:
            began = time.perf_counter()
            peer()
            peer_seconds.append(time.perf_counter() - began)

        began = time.perf_counter()
        for function in (peer, ours, peer, ours):  # warm
            function()
        rounds = max(ROUNDS[0], min(ROUNDS[1], int(SECONDS / (time.perf_counter() - began) * 2)))
        benchmark.pedantic(ours, setup=peer_goes_first, rounds=rounds)
        our_seconds = list(benchmark.stats.stats.data)
        ratios = sorted(theirs / mine for theirs, mine in zip(peer_seconds, our_seconds, strict=True))
        benchmark.extra_info.update(
            facts,
            ours=_quartiles(our_seconds),
            peer=_quartiles(peer_seconds),
            ratio=statistics.median(peer_seconds) / statistics.median(our_seconds),
            ratio_quartiles=[ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        )

    return run


def _quartiles(seconds: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"low": low, "median": median, "high": high}


def pytest_benchmark_update_machine_info(config, machine_info):
    from importlib.metadata import version

    machine_info.clear()
    machine_info.update(fasthyper.environment.environment(), hypnettorch=version("hypnettorch"))


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        entry.pop("params", None)
