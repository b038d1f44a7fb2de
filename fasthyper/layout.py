"""Where the target's weights lie in the N x S grid of chunks and columns, as rectangles of real weights.

Weights lie end to end: position p of a block is column p % size of its chunk p // size. A tail or a task's own head is then
a range of positions, and every range is a few rectangles. Laid flat, all weights are one block. Laid aligned, a matrix is a
block whose chunks hold whole rows of it; nothing is padded, for a block of narrower rows leaves the last columns alone.
Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Range = tuple[int, int]  # [start, stop), in the flat vector of target weights or in the order in which they are laid


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


class Matrix(NamedTuple):
    """Where a matrix lies in the flat vector of target weights, row after row."""

    start: int
    num_rows: int
    row_size: int


class Block(NamedTuple):
    """Ranges of the flat vector, laid end to end in columns ``[0, size)`` of chunks ``[chunk_lo, chunk_hi)``.

    ``rows``: how many whole rows of one matrix each chunk holds; 0 in the block of all else.
    """

    chunk_lo: int
    chunk_hi: int
    size: int
    rows: int
    ranges: tuple[Range, ...]


class Layout:
    """The chunk grid of ``num_weights`` weights, and which of them are held fast for whom.

    Args:
        num_weights: P, at least 1.
        chunk_size: S, at least 1; may exceed P.
        heads: per task, the flat ranges of its own output head. Weights in no head are held for every task; weights of a
            head only for its task. Empty: all weights are shared.
        matrices: to be laid aligned: each that fills at least two chunks of whole rows (one row, where rows are wider than
            ``chunk_size``) is a block of its own, but for the rows that are left over. All else is one block, the last. S is
            then the widest block's size. Empty: all weights are one block, laid flat.
    """

    def __init__(
        self,
        num_weights: int,
        chunk_size: int,
        heads: Sequence[Sequence[Range]] = (),
        matrices: Sequence[Matrix] = (),
    ):
        if num_weights < 1 or chunk_size < 1:
            raise ValueError(f"num_weights and chunk_size must be at least 1, got {num_weights} and {chunk_size}")
        self.num_weights = num_weights
        self.blocks = _blocks(num_weights, chunk_size, matrices)
        self.chunk_size = max(block.size for block in self.blocks)
        self.num_chunks = self.blocks[-1].chunk_hi
        self._runs = self._equal_runs()
        self.heads = [[laid for span in ranges for laid in self._laid(span)] for ranges in heads]
        self.shared = _complement([r for ranges in self.heads for r in ranges], num_weights)

    def rectangles(self, span: Range) -> list[Rectangle]:
        """Where weights ``span`` lie, in the order in which they are laid: at most three rectangles in chunks of a size."""
        rectangles = []
        for start, stop, size, chunk in self._runs:
            lo, hi = max(span[0], start) - start, min(span[1], stop) - start
            if lo < hi:
                rectangles += [
                    Rectangle(r.chunk_lo + chunk, r.chunk_hi + chunk, r.col_lo, r.col_hi) for r in _rectangles(lo, hi, size)
                ]
        return rectangles

    def _equal_runs(self) -> list[tuple[int, int, int, int]]:
        """Start, stop, size, first chunk. Neighbouring blocks of a size are one run: all but the last fill their chunks."""
        runs: list[tuple[int, int, int, int]] = []
        position = 0
        for block in self.blocks:
            stop = position + sum(hi - lo for lo, hi in block.ranges)
            start, chunk = position, block.chunk_lo
            if runs and runs[-1][2] == block.size:
                start, _, _, chunk = runs.pop()
            runs.append((start, stop, block.size, chunk))
            position = stop
        return runs

    def _laid(self, span: Range) -> list[Range]:
        """A range of the flat vector, in the order in which weights are laid."""
        laid, position = [], 0
        for start, stop in (r for block in self.blocks for r in block.ranges):
            lo, hi = max(span[0], start), min(span[1], stop)
            if lo < hi:
                laid.append((position + lo - start, position + hi - start))
            position += stop - start
        return laid


def _blocks(num_weights: int, chunk_size: int, matrices: Sequence[Matrix]) -> list[Block]:
    """Smaller sizes first: what is left over takes the widest, and continues the blocks that have it too."""
    aligned: list[tuple[int, int, Range]] = []
    for start, num_rows, row_size in matrices:
        rows = max(1, chunk_size // row_size)
        whole = num_rows // rows
        if whole >= 2:
            aligned.append((rows * row_size, rows, (start, start + whole * rows * row_size)))
    aligned.sort()
    blocks, chunk = [], 0
    for size, rows, span in aligned:
        blocks.append(Block(chunk, chunk + (span[1] - span[0]) // size, size, rows, (span,)))
        chunk = blocks[-1].chunk_hi
    rest = _complement([span for *_, span in aligned], num_weights)
    if rest:
        size = aligned[-1][0] if aligned else chunk_size
        length = sum(hi - lo for lo, hi in rest)
        blocks.append(Block(chunk, chunk - (-length // size), size, 0, tuple(rest)))
    return blocks


def _rectangles(start: int, stop: int, size: int) -> list[Rectangle]:
    """A range laid in chunks of a size: its first, partial chunk; the whole chunks; its last, partial chunk."""
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
