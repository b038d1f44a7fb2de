"""One row of the benchmark: parity first, then ours and its peers timed in turn, then memory, then the ceiling."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fasthyper.bench import machine as machines
from fasthyper.bench.costs import Shapes, Work, drift_work, step_work
from fasthyper.bench.machine import Machine
from fasthyper.bench.memory import peak_memory
from fasthyper.bench.peers import OURS, SIDES, missing
from fasthyper.bench.predict import Predictor
from fasthyper.bench.workloads import Workload
from fasthyper.errors import FasthyperError

ROUNDS = (3, 41)  # fewest and most
SLOW = 10.0  # seconds: a peer whose call is predicted to take longer is not run
FLOAT64_TASKS = 10  # parity in float64 takes no more tasks than this, in float32 all of them
# float64 shows that all compute the same; float32, that what is timed is right: there two networks of relu may fall on
# either side of a kink, and a step of a thousandth costs both three digits
PARITY = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-4, 1e-3)}
STEPS, STEP_PARITY = 3, {torch.float64: 1e-9, torch.float32: 1e-3}  # losses and drifts; float32: losses
TINY_EPS = 1e-20  # hypnettorch's look-ahead adds Adam's eps before the bias correction, Adam after it


class ParityError(FasthyperError):
    """A peer computes something else: a time beside it would mean nothing."""


def work_of(shapes: Shapes, past: int, what: str) -> Work:
    """Counted work of ours."""
    return (step_work if what == "step" else drift_work)(shapes, past)


def measure(
    workload: Workload,
    past: int,
    what: str,
    *,
    against: Iterable[str],
    seconds: float,
    machine: Machine,
    layout: str = "flat",
    memory: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """A JSON-ready row: times with quartiles, ratios, memory, counted work and the share of the machine's ceiling.

    Args:
        against: names of peers; one that cannot be run is in the row with the reason.
        seconds: about how long the timed part may take.
        layout: of our weights in what is timed. No peer lays them aligned: parity is that of the flat layout.
        memory: whether to measure memory, each side in a process of its own.
        say: told what is being done.

    Raises:
        ParityError: a peer's value, gradients or losses are not ours.
    """
    predictor, laid = Predictor(workload), workload.with_layout(layout)
    peers: dict[str, dict[str, Any]] = {}
    for name in against:
        say(f"checking {name}")
        reason = reason_not_to(predictor, past, what, name)
        if reason is None:
            try:
                check_parity(workload, past, what, name)
            except RuntimeError as error:  # out of memory, no compiler for torch.compile
                reason = f"fails here: {' '.join(str(error).split())[:200]}"
        peers[name] = {"skipped": reason} if reason else {}
    runnable = [name for name, entry in peers.items() if not entry]

    say("setting up")
    timed = {OURS: laid, **dict.fromkeys(runnable, workload)}
    calls = {name: SIDES[name](its, past).prepare(what) for name, its in timed.items()}
    say("timing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own
        times = interleaved(calls, seconds)
    del calls
    ours = quartiles(times[OURS])
    work = work_of(predictor.shapes, past, what)
    row: dict[str, Any] = {
        "what": what,
        "workload": laid.name,
        "past": past,
        "ours": ours,
        "rounds": len(times[OURS]),
        "macs": work.macs,
        "bytes": work.num_bytes,
        "gflops": 2e-9 * work.macs / ours["median"],
        "ceiling_seconds": machine.ceiling_seconds(work),
        "ceiling_share": machine.ceiling_seconds(work) / ours["median"],
        "peers": peers,
    }
    for name in runnable:
        peers[name].update(compared(times[OURS], times[name]))
    if memory:
        for name, its in timed.items():
            say(f"memory of {name}")
            entry = row if name == OURS else peers[name]
            entry["memory"] = peak_memory(its, past, what, name, torch.get_num_threads())
    return row


def reason_not_to(predictor: Predictor, past: int, what: str, name: str) -> str | None:
    """Why a side cannot or should not be run on this machine; ``None`` if it may."""
    reason = missing(name)
    if reason:
        return reason
    needed = int(SIDES[name].stored_per_weight * 4 * past * predictor.shapes.num_weights)
    free = machines.available_memory()
    if free is not None and needed > 0.8 * free:
        return f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    if name == "hypnettorch":
        seconds = predictor.seconds(name, past, what)
        if seconds > SLOW:
            return f"a call would take about {seconds:.0f} s"
    return None


def check_parity(workload: Workload, past: int, what: str, name: str, device: torch.device | str = "cpu") -> None:
    """Ours against one peer, float64 and float32 (``compile``, which is ``eager``'s code, in float32 only).

    Raises:
        ParityError: they differ.
    """
    check = _step_differences if what == "step" else _drift_differences
    for dtype in (torch.float64, torch.float32):
        if dtype == torch.float64 and name == "compile":
            continue
        tasks = min(past, FLOAT64_TASKS) if dtype == torch.float64 else past
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for quantity, error, bound in check(workload, tasks, name, dtype, device):
                if not error < bound:
                    raise ParityError(
                        f"{name} disagrees on {workload.name}, {tasks} past tasks, {what}: {quantity} in "
                        f"{str(dtype).removeprefix('torch.')} differs by {error:.1e}, more than {bound:.0e}"
                    )


Differences = Iterable[tuple[str, float, float]]  # what differs, by how much, and by how much it may


def _drift_differences(
    workload: Workload, past: int, name: str, dtype: torch.dtype, device: torch.device | str
) -> Differences:
    ours, peer = (SIDES[side](workload, past, dtype, device=device) for side in (OURS, name))
    (value, grads), (peer_value, peer_grads) = ours.prepare("regularizer")(), peer.prepare("regularizer")()
    yield "the value", _difference(value, peer_value), PARITY[dtype][0]
    yield "the gradient", _difference(ours.comparable(grads), peer.comparable(peer_grads)), PARITY[dtype][1]


def _step_differences(
    workload: Workload, past: int, name: str, dtype: torch.dtype, device: torch.device | str
) -> Differences:
    steps = [SIDES[side](workload, past, dtype, TINY_EPS, device).prepare("step") for side in (OURS, name)]
    found, wanted = (torch.tensor([step() for _ in range(STEPS)], dtype=torch.float64) for step in steps)
    yield "the loss", _difference(found[:, 0], wanted[:, 0]), STEP_PARITY[dtype]
    if dtype == torch.float64:
        yield "the drift", _difference(found[:, 1], wanted[:, 1]), STEP_PARITY[dtype]


def _difference(found: Tensor, wanted: Tensor) -> float:
    norm = wanted.double().norm().item()
    difference = (found.double() - wanted.double()).norm().item()
    return difference / norm if norm else difference


def turn(call: Callable[[], object]) -> float:
    """Seconds of a call that follows one of its own kind, as in training: the first finds what others left in the caches."""
    call()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def interleaved(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, in turns (A, B, A, B, ...) after a round that does not count."""
    began = time.perf_counter()
    for call in calls.values():
        turn(call)
    rounds = int(seconds / (time.perf_counter() - began))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(max(ROUNDS[0], min(ROUNDS[1], rounds))):
        for name, call in calls.items():
            times[name].append(turn(call))
    return times


def quartiles(values: list[float]) -> dict[str, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": median, "high": high}


def compared(ours: list[float], peer: list[float]) -> dict[str, Any]:
    """A peer's times, the ratio of medians, and the quartiles of the ratios round by round."""
    ratios = quartiles([theirs / mine for mine, theirs in zip(ours, peer, strict=True)])
    ratio = statistics.median(peer) / statistics.median(ours)
    return {**quartiles(peer), "ratio": ratio, "ratio_quartiles": [ratios["low"], ratios["high"]]}
