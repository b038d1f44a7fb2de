"""What a call would cost with T past tasks: measured with few, continued along counted work and memory."""

from __future__ import annotations

import warnings
from functools import cache
from statistics import median
from typing import Any

import torch

from fasthyper.bench.costs import FLOAT, Shapes, drift_work
from fasthyper.bench.machine import timed
from fasthyper.bench.memory import peak_memory
from fasthyper.bench.peers import OURS, SIDES
from fasthyper.bench.workloads import Workload
from fasthyper.planner import MEMORY_BUDGET, snapshot_bytes

FEW, MORE = 2, {"hypnettorch": 10}  # past tasks that a loop is timed with
MOST = 256  # ours is timed with no more


class Predictor:
    """Times and memory of ours and of the loop over tasks; what is measured for it is measured when first needed."""

    def __init__(self, workload: Workload):
        self.workload, self.shapes = workload, Shapes.of(workload)
        self._timed, self._peak = cache(self._time), cache(self._memory)

    def seconds(self, side: str, past: int, what: str) -> float:
        """Of one call: linear in the past tasks for the loop, in counted multiply-adds for ours."""
        more = MORE.get(side) or self._more()
        first, last = self._timed(side, FEW, what), self._timed(side, more, what)
        slope = max(0.0, last - first) / (self._work(side, more) - self._work(side, FEW))
        return max(first + slope * (self._work(side, past) - self._work(side, FEW)), 0.0)

    def memory(self, side: str, past: int) -> int | None:
        """Bytes that holding the past tasks takes: with two tasks in a process of its own, and what is counted to be added.

        Ours stores the trunk's pre-activations, while they fit the budget. The loop stores all weights, and its graph holds
        as many differences and the trunk's activations. ``None`` where the system does not tell a process's memory.
        """
        found = self._peak(side)
        return None if found is None else found + self._stored(side, past) - self._stored(side, FEW)

    def _work(self, side: str, past: int) -> int:
        return drift_work(self.shapes, past).macs if side == OURS else past

    def _more(self) -> int:
        """As many past tasks as make three times the work of few, so that its growth is seen."""
        counts, least = [4, 16, 64, MOST], 3 * self._work(OURS, FEW)
        return next((past for past in counts if self._work(OURS, past) >= least), MOST)

    def _stored(self, side: str, past: int) -> int:
        shapes = self.shapes
        if side == OURS:
            return min(snapshot_bytes(past, shapes.num_chunks, shapes.hidden, FLOAT), MEMORY_BUDGET)
        return 2 * FLOAT * past * (shapes.num_weights + shapes.num_chunks * sum(shapes.hidden))

    def _time(self, side: str, past: int, what: str) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peer's own
            return timed(SIDES[side](self.workload, past).prepare(what), median)

    def _memory(self, side: str) -> int | None:
        found: dict[str, Any] | None = peak_memory(self.workload, FEW, "regularizer", side, torch.get_num_threads())
        return None if found is None else found["kept"] + found["step"]
