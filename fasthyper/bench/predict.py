"""What a step would cost with T past tasks: counted work over this machine's rates, measured at these shapes."""

from __future__ import annotations

from functools import cached_property
from statistics import median

from fasthyper.bench import machine
from fasthyper.bench.costs import FLOAT, Shapes, Work, drift_work, loop_work, task_work

# host time, in small calls under autograd: of the regularizer; of a step and per tensor of the target; of an old task in the
# loop and per tensor: there 75 + 13 calls were counted, and the Python around one takes five times as long as the call
DRIFT_CALLS, STEP_CALLS, LOOP_CALLS = 300, (600, 50), (5 * 75, 5 * 13)


class Predictor:
    """Times and memory of ours and of the loop over tasks; rates are measured when first needed."""

    def __init__(self, shapes: Shapes):
        self.shapes = shapes

    def seconds(self, side: str, past: int, what: str) -> float:
        """Of one call: multiply-adds, bytes and host calls one after the other, each at its measured rate."""
        shapes = self.shapes
        if side == "hypnettorch":
            work, rate, calls = loop_work(shapes, past), self.chunk_rate, past * self._calls(LOOP_CALLS)
        else:
            work, rate, calls = drift_work(shapes, past), self.gram_rate, DRIFT_CALLS
        seconds = self._seconds(work, rate) + calls * self.call_seconds
        if what == "step":
            seconds += self._seconds(task_work(shapes), self.chunk_rate) + self._calls(STEP_CALLS) * self.call_seconds
        return seconds

    def memory(self, side: str, past: int) -> int:
        """Bytes that holding the past tasks takes: what is stored, and what one call holds at its worst moment.

        Ours stores theta and the trunk's pre-activations, and makes two tensors of theta's size; the loop stores all
        weights, and its graph holds them twice more (made, and less the stored ones), with the chunks' padding.
        """
        shapes = self.shapes
        if side == "hypnettorch":
            padded = shapes.num_chunks * shapes.chunk_size
            return FLOAT * (past * (2 * shapes.num_weights + padded) + 2 * shapes.num_theta)
        return FLOAT * (past * shapes.num_chunks * sum(shapes.hidden) + 3 * shapes.num_theta)

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
        """Bytes per second of copying a task's weights."""
        return machine.fresh_copy_rate(FLOAT * self.shapes.num_weights, median)

    @cached_property
    def call_seconds(self) -> float:
        return machine.call_seconds(median)

    def _calls(self, counts: tuple[int, int]) -> int:
        return counts[0] + counts[1] * self.shapes.num_tensors

    def _seconds(self, work: Work, rate: float) -> float:
        return 2 * work.macs / rate + work.num_bytes / self.copy_rate
