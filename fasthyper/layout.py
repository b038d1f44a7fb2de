"""Where the target's weights lie in the N x S grid of chunks and columns, as rectangles of real weights.

Weights are laid end to end: weight p is column p % S of chunk p // S. A tail, padding, or a task's own head is then a range
of flat positions, and every range is a few rectangles. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Range = tuple[int, int]  # [start, stop) in the flat vector of target weights


class Rectangle(NamedTuple):
    """Chunks ``[chunk_lo, chunk_hi)`` x columns ``[col_lo, col_hi)``; every cell holds a weight."""

    chunk_lo: int
    chunk_hi: int
    col_lo: int
    col_hi: int

    @property
    def num_chunks(self) -> int:
        return self.chunk_hi - self.chunk_lo

    @property
    def num_cols(self) -> int:
        return self.col_hi - self.col_lo


class Layout:
    """The chunk grid of ``num_weights`` weights, and which of them are held fast for whom.

    Args:
        num_weights: P, at least 1.
        chunk_size: S, at least 1; may exceed P.
        heads: per task, the flat ranges of its own output head. Weights in no head are held for every task; weights of a
            head only for its task. Empty: all weights are shared.
    """

    def __init__(self, num_weights: int, chunk_size: int, heads: Sequence[Sequence[Range]] = ()):
        if num_weights < 1 or chunk_size < 1:
            raise ValueError(f"num_weights and chunk_size must be at least 1, got {num_weights} and {chunk_size}")
        self.num_weights = num_weights
        self.chunk_size = chunk_size
        self.num_chunks = -(-num_weights // chunk_size)
        self.heads = [list(ranges) for ranges in heads]
        self.shared = _complement([r for ranges in self.heads for r in ranges], num_weights)

    def rectangles(self, span: Range) -> list[Rectangle]:
        """The range as: its first, partial chunk; the whole chunks; its last, partial chunk."""
        (start, stop), size = span, self.chunk_size
        first, last = start // size, (stop - 1) // size
        if first == last:
            return _non_empty([Rectangle(first, first + 1, start - first * size, stop - first * size)])
        whole_lo = first if start % size == 0 else first + 1
        whole_hi = last + 1 if stop % size == 0 else last
        return _non_empty(
            [
                Rectangle(first, whole_lo, start % size, size),
                Rectangle(whole_lo, whole_hi, 0, size),
                Rectangle(whole_hi, last + 1, 0, stop - last * size),
            ]
        )


def _non_empty(rectangles: list[Rectangle]) -> list[Rectangle]:
    return [r for r in rectangles if r.num_chunks > 0 and r.num_cols > 0]


def _complement(ranges: Sequence[Range], stop: int) -> list[Range]:
    gaps, position = [], 0
    for lo, hi in sorted(ranges):
        if lo < position or hi > stop or lo > hi:
            raise ValueError(f"head ranges overlap or leave [0, {stop}): {sorted(ranges)}")
        gaps.append((position, lo))
        position = hi
    return [gap for gap in [*gaps, (position, stop)] if gap[0] < gap[1]]
