"""What this machine can do at best, measured in the same run as everything that is compared with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fasthyper.bench.costs import Work

GEMM_SIZE, COPY_BYTES = 2048, 256 << 20  # a product that pays for its packing; arrays well beyond any cache

Pick = Callable[[list[float]], float]

CEILING = (
    f"the larger of counted flops / best rate of a float32 product of {GEMM_SIZE}^3 and counted bytes / best rate of a copy "
    f"of {COPY_BYTES >> 20} MB (read and write)"
)


@dataclass(frozen=True)
class Machine:
    """Rates per second: ``gemm`` flops (two per multiply-add), ``copy`` bytes read and written."""

    gemm: float
    copy: float

    @staticmethod
    def measure() -> Machine:
        """Best of a few runs each, in about a second."""
        return Machine(gemm_rate(GEMM_SIZE, GEMM_SIZE, GEMM_SIZE), copy_rate(COPY_BYTES))

    def ceiling_seconds(self, work: Work) -> float:
        """The time that counted work cannot be done faster than, but for what stays in caches: see ``CEILING``."""
        return max(2 * work.macs / self.gemm, work.num_bytes / self.copy)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ceiling": CEILING}


@dataclass(frozen=True)
class Link:
    """What a ring of ranks, each linked to the next, needs to sum a message.

    In 2 (K-1) rounds each rank passes on a K-th of it: ``latency``, seconds of a round; ``rate``, bytes a second.
    """

    latency: float
    rate: float

    @staticmethod
    def of_two(seconds: Mapping[int, float]) -> Link:
        """From the time of messages of so many bytes, a short and a long one, between two ranks."""
        short, long = min(seconds), max(seconds)
        return Link(seconds[short] / 2, long / (seconds[long] - seconds[short]))

    def seconds(self, num_bytes: int, ranks: int) -> float:
        """Of a message."""
        return 2 * (ranks - 1) * (self.latency + num_bytes / ranks / self.rate)


def gemm_rate(m: int, k: int, n: int) -> float:
    """Flops per second of ``[m, k] @ [k, n]`` in float32."""
    a, b, out = torch.rand(m, k), torch.rand(k, n), torch.empty(m, n)
    return 2 * m * k * n / timed(lambda: torch.mm(a, b, out=out))


def copy_rate(num_bytes: int) -> float:
    """Bytes per second, read and written, of copying an array of that size onto another."""
    source, out = torch.rand(max(1, num_bytes // 4)), torch.empty(max(1, num_bytes // 4))
    return 2 * 4 * len(source) / timed(lambda: out.copy_(source))


def timed(function: Callable[[], object], pick: Pick = min, seconds: float = 0.3) -> float:
    """Shortest (or median, ...) of as many calls as go into ``seconds``, at least three."""
    function()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return pick(times)


def available_memory() -> int | None:
    """Bytes that can be had without swapping; ``None`` where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None
