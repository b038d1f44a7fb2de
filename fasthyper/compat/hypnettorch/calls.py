"""Which way each call went, and its time: what a person reads to see whether their script is served fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

FAST, GENERAL = "fast", "general"


@dataclass
class Count:
    """Calls of one function that went one way."""

    calls: int = 0
    seconds: float = 0.0


_counts: dict[tuple[str, str], Count] = {}


@contextmanager
def record(function: str, path: str) -> Iterator[None]:
    """Counts a call of ``function`` that goes ``path``, and the seconds spent in the block, also where it raises."""
    start = perf_counter()
    try:
        yield
    finally:
        count = _counts.setdefault((function, path), Count())
        count.calls += 1
        count.seconds += perf_counter() - start


def summary() -> dict[tuple[str, str], Count]:
    """``{(function, path): Count}`` of all calls since the start or ``reset``, in the order of first calls."""
    return dict(_counts)


def reset() -> None:
    """Forgets all calls."""
    _counts.clear()
