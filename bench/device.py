"""Measuring on one device: times between events, CUDA graphs, memory, the device's own rates, and which kernels run.

On the CPU the same functions take the wall clock, so that all of a benchmark runs, and is tested, without a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fasthyper.bench.costs import Work
from fasthyper.bench.measure import quartiles

Call = Callable[[], Any]

PRECISIONS = {"fp32": "highest", "tf32": "high"}  # as torch.set_float32_matmul_precision takes them
GEMM_SIZE, COPY_BYTES = 8192, 1 << 30
LEAST_SECONDS = 2e-3  # between two events, so that their resolution does not show
TOP_KERNELS = 12


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """float32 products, and convolutions, in float32 or with TF32 allowed."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(PRECISIONS[name])
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Device:
    """A device to measure on. ``quick`` takes as few rounds, and as small products, as show that everything runs."""

    def __init__(self, name: str, quick: bool = False):
        self.device, self.quick = torch.device(name), quick
        self.is_cuda = self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Call, calls: int = 1) -> float:
        """Of one of ``calls`` calls, between two events of the stream they are put in."""
        if not self.is_cuda:
            began = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - began) / calls
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        return 1e-3 * start.elapsed_time(stop) / calls

    def times(self, call: Call, rounds: tuple[int, int], budget: float) -> dict[str, Any]:
        """Quartiles of a call's seconds over as many rounds, within the bounds, as go into ``budget`` seconds."""
        call()
        once = max(self.seconds(call), 1e-6)
        calls = max(1, min(100, int(LEAST_SECONDS / once))) if self.is_cuda else 1
        fewest, most = (2, 2) if self.quick else rounds
        taken = [self.seconds(call, calls) for _ in range(max(fewest, min(most, int(budget / (calls * once)))))]
        return {**quartiles(taken), "rounds": len(taken), "calls": calls}

    def captured(self, call: Call) -> Call:
        """``call`` as one launch of a CUDA graph, its arguments and results at the addresses of the capture.

        Raises:
            RuntimeError: it reads from the device, or does something else that cannot be captured.
        """
        if not self.is_cuda:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay() -> Any:
            graph.replay()
            return kept

        return replay

    @contextlib.contextmanager
    def peak_memory(self, into: dict[str, Any]) -> Iterator[None]:
        """``into["memory"]``: most bytes of tensors at any time inside, beyond those that were there before."""
        gc.collect()
        before = 0
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        yield
        into["memory"] = torch.cuda.max_memory_allocated() - before if self.is_cuda else None

    def rates(self) -> dict[str, Any]:
        """Flops per second of a large product in each precision, bytes per second read and written by a large copy."""
        size, num_bytes = (64, 1 << 16) if self.quick else (GEMM_SIZE, COPY_BYTES)
        found: dict[str, Any] = {"gemm_size": size, "copy_bytes": num_bytes}
        for name, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
            a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            with matmul_precision("tf32" if name == "tf32" else "fp32"):
                found[name] = 2 * size**3 / self.times(lambda a=a, b=b: a @ b, (5, 10), 0.5)["low"]
        source = torch.randn(num_bytes // 4, device=self.device)
        out = torch.empty_like(source)
        found["copy"] = 2 * num_bytes / self.times(lambda: out.copy_(source), (5, 20), 0.3)["low"]
        return found

    def kernels(self, call: Call, calls: int) -> list[dict[str, Any]]:
        """Name, launches and seconds of each kernel in one of ``calls`` calls, the longest first."""
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA if self.is_cuda else ProfilerActivity.CPU]) as seen:
            for _ in range(calls):
                call()
            self.synchronize()
        found = []
        for event in seen.key_averages():
            if (event.device_type != torch.autograd.DeviceType.CPU) == self.is_cuda:
                total = event.self_device_time_total if self.is_cuda else event.self_cpu_time_total
                found.append({"name": event.key[:120], "launches": event.count / calls, "seconds": 1e-6 * total / calls})
        return sorted(found, key=lambda kernel: -kernel["seconds"])


def ceiling_seconds(work: Work, rates: dict[str, Any], precision: str) -> float:
    """The time that counted work cannot be done faster than at these rates, but for what stays in caches."""
    return max(2 * work.macs / rates[precision], work.num_bytes / rates["copy"])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()
