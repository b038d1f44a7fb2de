"""How the peers are timed beside us, and what every results file says about its machine."""

from __future__ import annotations

import time

import pytest

import fasthyper.environment
from fasthyper.bench.costs import Shapes
from fasthyper.bench.measure import check_parity, compared, quartiles, reason_not_to, turn, work_of
from fasthyper.bench.peers import OURS, PEERS, SIDES
from fasthyper.bench.predict import Predictor


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, default=40.0, help="about how long each case is timed")
    parser.addoption("--against", default=",".join(PEERS), help=f"peers, of {','.join(PEERS)}")


ROUNDS = (7, 41)  # fewest, unless --seconds is short, and most


@pytest.fixture
def against(benchmark, request):
    """``against(workload, past, what)``: times ours and its peers in turn in one run, and keeps ratios with their spread.

    ``layout`` is that of our side: no peer lays weights aligned, whose exactness is the tests'.
    """
    seconds = request.config.getoption("--seconds")
    names = request.config.getoption("--against").split(",")

    def run(workload, past, what, layout="flat"):
        ours_built, predictor, peers = workload.with_layout(layout), Predictor(workload), {}
        for name in names:
            reason = reason_not_to(predictor, past, what, name)
            if name == "compile" and (what, past) != ("regularizer", min(workload.tasks)):
                reason = "compiling takes a minute: done for the regularizer at the fewest tasks"
            peers[name] = {"skipped": reason} if reason else {}
        runnable = [name for name, entry in peers.items() if not entry]
        for name in runnable if ours_built is workload else []:
            check_parity(workload, past, what, name)
        ours = SIDES[OURS](ours_built, past).prepare(what)
        others = [SIDES[name](workload, past).prepare(what) for name in runnable]
        times = {name: [] for name in runnable}

        def peers_go_first():
            for name, peer in zip(runnable, others, strict=True):
                times[name].append(turn(peer))
            ours()

        began = time.perf_counter()
        peers_go_first()  # warm
        ours()
        a_round = time.perf_counter() - began
        for taken in times.values():
            taken.clear()
        fewest = min(ROUNDS[0], max(2, int(seconds)))
        benchmark.pedantic(ours, setup=peers_go_first, rounds=max(fewest, min(ROUNDS[1], int(seconds / a_round))))
        our_seconds = list(benchmark.stats.stats.data)
        for name in runnable:
            peers[name] = compared(our_seconds, times[name])
        work = work_of(Shapes.of(workload), past, what)
        benchmark.extra_info.update(
            what=what,
            workload=ours_built.name,
            past=past,
            ours=quartiles(our_seconds),
            peers=peers,
            macs=work.macs,
            bytes=work.num_bytes,
        )
        if "median" in (loop := peers.get("hypnettorch", {})):
            benchmark.extra_info.update(
                peer={key: loop[key] for key in ("low", "median", "high")},
                ratio=loop["ratio"],
                ratio_quartiles=loop["ratio_quartiles"],
            )

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    from importlib.metadata import version

    from fasthyper.bench.machine import Machine

    machine_info.clear()
    machine_info.update(
        fasthyper.environment.environment(), hypnettorch=version("hypnettorch"), ceiling=Machine.measure().to_json()
    )


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        entry.pop("params", None)
