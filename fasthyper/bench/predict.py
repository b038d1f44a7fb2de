"""What a step would cost with T past tasks: counted work over this machine's rates, measured at these shapes."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from statistics import median

import torch

from fasthyper.bench import machine
from fasthyper.bench.costs import FLOAT, Shapes, Work, drift_work, loop_work, task_work
from fasthyper.bench.workloads import Workload
from fasthyper.planner import MEMORY_BUDGET, snapshot_bytes

# host time, in small calls under autograd: of the regularizer; of a step and per tensor of the target; of an old task in the
# loop and per tensor: there 75 + 13 calls were counted, and the Python around one takes five times as long as the call
DRIFT_CALLS, STEP_CALLS, LOOP_CALLS = 300, (600, 50), (5 * 75, 5 * 13)
ROW_TILE, COLUMN_TILE = 1024, 4096  # of the C++ kernels at their largest


class Predictor:
    """Times and memory of ours and of the loop over tasks; rates are measured when first needed."""

    def __init__(self, workload: Workload):
        self.workload, self.shapes = workload, Shapes.of(workload)

    def seconds(self, side: str, past: int, what: str) -> float:
        """Of one call: multiply-adds, bytes and host calls one after the other, each at its measured rate."""
        shapes = self.shapes
        if side == "hypnettorch":
            work, rate, calls = loop_work(shapes, past), self.chunk_rate, past * self._calls(LOOP_CALLS)
        else:
            work, rate, calls = drift_work(shapes, past), self.gram_rate, DRIFT_CALLS
        seconds = self._seconds(work, rate) + calls * self.call_seconds
        if what == "step":
            seconds += self._seconds(task_work(replace(shapes, target_macs=0)), self.chunk_rate) + self.target_seconds
            seconds += self._calls(STEP_CALLS) * self.call_seconds
        return seconds

    def memory(self, side: str, past: int) -> int:
        """Bytes that holding the past tasks takes: what is stored, and what one call holds at its worst moment.

        Ours stores theta and the trunk's pre-activations, makes two tensors of theta's size, and packs tiles of rows and
        columns per thread. The loop stores all weights, its graph holds as many differences and the trunk's activations, and
        one task under way takes some tensors of the size of its weights and of theta.
        """
        shapes, full = self.shapes, 2 * self.shapes.width + 1
        if side == "hypnettorch":
            features = past * shapes.num_chunks * sum(shapes.hidden)
            return FLOAT * (2 * past * shapes.num_weights + 2 * features + 4 * shapes.num_weights + 6 * shapes.num_theta)
        tiles = 2 * COLUMN_TILE * full + ROW_TILE * (3 * full + sum(2 * width + 1 for width in shapes.hidden)) + 8 * full**2
        stored = min(snapshot_bytes(past, shapes.num_chunks, shapes.hidden, FLOAT), MEMORY_BUDGET)  # at most
        return stored + FLOAT * (3 * shapes.num_theta + torch.get_num_threads() * tiles)

    @cached_property
    def chunk_rate(self) -> float:
        """Flops per second of the product that makes a task's chunks."""
        rows, width, size = self.shapes.num_chunks, self.shapes.width, self.shapes.chunk_size
        return machine.gemm_rate(rows, width, size, median)

    @cached_property
    def gram_rate(self) -> float:
        """Flops per second of a tall, thin product, as in E2."""
        full = 2 * self.shapes.width + 1
        return machine.gemm_rate(full, 4096, full, median)

    @cached_property
    def copy_rate(self) -> float:
        """Bytes per second of copying something of the size of a task's weights, or of theta if that is larger."""
        return machine.fresh_copy_rate(FLOAT * max(self.shapes.num_weights, self.shapes.num_theta), median)

    @cached_property
    def target_seconds(self) -> float:
        """Of the target's forward and backward pass over a batch."""
        (x, _), target = self.workload.batch(), self.workload.build_target()
        parameters = list(target.parameters())
        return machine.timed(lambda: torch.autograd.grad(target(x).sum(), parameters), median)

    @cached_property
    def call_seconds(self) -> float:
        return machine.call_seconds(median)

    def _calls(self, counts: tuple[int, int]) -> int:
        return counts[0] + counts[1] * self.shapes.num_tensors

    def _seconds(self, work: Work, rate: float) -> float:
        return 2 * work.macs / rate + work.num_bytes / self.copy_rate
