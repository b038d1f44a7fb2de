"""Where the target's weights lie in the N x S grid of chunks and columns, as rectangles of real weights.

Weights lie end to end: position p of a block is column p % size of its chunk p // size. A tail or a task's own head is then
a range of positions, and every range is a few rectangles. Laid flat, all weights are one block. Laid aligned, a matrix is a
block whose chunks hold whole rows of it, and what is not laid so fills the columns that such blocks leave. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

Range = tuple[int, int]  # [start, stop), in the flat vector of target weights or in the order in which they are laid
_Whole = tuple[int, int, Range]  # of a matrix that chunks hold by whole rows: a block's size, rows in a chunk, the range


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
    """Ranges of the flat vector, laid end to end in ``size`` columns from ``col_lo`` of chunks ``[chunk_lo, chunk_hi)``.

    ``rows``: how many whole rows of one matrix each chunk holds; 0 in a block of anything else.
    """

    chunk_lo: int
    chunk_hi: int
    col_lo: int
    size: int
    rows: int
    ranges: tuple[Range, ...]

    @property
    def num_chunks(self) -> int:
        return self.chunk_hi - self.chunk_lo

    @property
    def num_weights(self) -> int:
        return sum(hi - lo for lo, hi in self.ranges)


class Layout:
    """The chunk grid of ``num_weights`` weights, and which of them are held fast for whom.

    Args:
        num_weights: P, at least 1.
        chunk_size: S, at least 1; may exceed P.
        heads: per task, the flat ranges of its own output head. Weights in no head are held for every task; weights of a
            head only for its task. Empty: all weights are shared.
        matrices: to be laid aligned: each that fills at least two chunks of whole rows (one row, where rows are wider than
            ``chunk_size``) is a block of its own, but for the rows that are left over, unless the grid would then have over
            a quarter more cells than with all laid flat. S is then the widest block's size.
            All else fills the columns that narrower blocks leave, then more chunks. Empty: one block of all, laid flat.
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
        self.chunk_size = max(block.col_lo + block.size for block in self.blocks)
        self.num_chunks = max(block.chunk_hi for block in self.blocks)
        self.heads = [[laid for span in ranges for laid in self._laid(span)] for ranges in heads]
        self.shared = _complement([r for ranges in self.heads for r in ranges], num_weights)

    def add_head(self, size: int, *, in_new_columns: bool) -> Block:
        """Lays ``size`` more weights, the next task's own head, in new chunks or in new columns of the first; none moves."""
        position, span = sum(block.num_weights for block in self.blocks), (self.num_weights, self.num_weights + size)
        if in_new_columns:
            block = Block(0, 1, self.chunk_size, size, 0, (span,))
        else:
            block = Block(self.num_chunks, self.num_chunks - (-size // self.chunk_size), 0, self.chunk_size, 0, (span,))
        self.blocks.append(block)
        self.heads.append([(position, position + size)])
        self.num_weights, self.num_chunks = span[1], max(self.num_chunks, block.chunk_hi)
        self.chunk_size = max(self.chunk_size, block.col_lo + block.size)
        return block

    def to_json(self) -> list[list[Any]]:
        """The blocks, as JSON has them."""
        return [[*block[:-1], [list(span) for span in block.ranges]] for block in self.blocks]

    def places(self, span: Range) -> list[Rectangle]:
        """Where weights ``span`` of the flat vector lie."""
        return [r for laid in self._laid(span) for r in self.rectangles(laid)]

    def rectangles(self, span: Range) -> list[Rectangle]:
        """Where weights ``span`` lie, in the order in which they are laid; at most three rectangles in a block."""
        rectangles, start = [], 0
        for block in self.blocks:
            lo, hi = max(span[0] - start, 0), min(span[1] - start, block.num_weights)
            if lo < hi:
                rectangles += _rectangles(lo, hi, block)
            start += block.num_weights
        return rectangles if len(self.blocks) == 1 else _union(rectangles)

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
    """Those of as many matrices as leave the grid about as full as when all is laid flat; the narrowest go first."""
    whole: list[_Whole] = []
    for start, num_rows, row_size in matrices:
        rows = max(1, chunk_size // row_size)
        if num_rows >= 2 * rows:
            whole.append((rows * row_size, rows, (start, start + num_rows // rows * rows * row_size)))
    whole.sort(key=lambda entry: -entry[0])
    flat = -(-num_weights // chunk_size) * chunk_size
    while True:
        blocks = _lay(num_weights, chunk_size, whole)
        cells = max(b.chunk_hi for b in blocks) * max(b.col_lo + b.size for b in blocks)
        if not whole or 4 * cells <= 5 * flat:
            return blocks
        whole.pop()


def _lay(num_weights: int, chunk_size: int, whole: Sequence[_Whole]) -> list[Block]:
    """Wide blocks first, so that what fills the columns left by others continues them."""
    blocks: list[Block] = []
    for size, rows, span in whole:
        chunk = blocks[-1].chunk_hi if blocks else 0
        blocks.append(Block(chunk, chunk + (span[1] - span[0]) // size, 0, size, rows, (span,)))
    widest, last = (blocks[0].size, blocks[-1].chunk_hi) if blocks else (chunk_size, 0)
    rest = _complement([span for *_, span in whole], num_weights)
    room = [(b.chunk_lo, b.chunk_hi, b.size) for b in blocks if b.size < widest] + [(last, last + num_weights, 0)]
    for chunk, stop, col in room:
        taken, rest = _split(rest, (stop - chunk) * (widest - col))
        if taken:
            num_chunks = -(sum(lo - hi for lo, hi in taken) // (widest - col))
            blocks.append(Block(chunk, chunk + num_chunks, col, widest - col, 0, tuple(taken)))
    return blocks


def _split(ranges: Sequence[Range], length: int) -> tuple[list[Range], list[Range]]:
    """The first ``length`` positions of the ranges, and the others."""
    taken, rest = [], []
    for lo, hi in ranges:
        cut = min(hi, lo + length)
        length -= cut - lo
        taken += [(lo, cut)] if lo < cut else []
        rest += [(cut, hi)] if cut < hi else []
    return taken, rest


def _rectangles(start: int, stop: int, block: Block) -> list[Rectangle]:
    """Positions of a block: their first, partial chunk; the whole chunks; their last, partial chunk."""
    size, (first, last) = block.size, (start // block.size, (stop - 1) // block.size)

    def place(chunk_lo: int, chunk_hi: int, lo: int, hi: int) -> Rectangle:
        return Rectangle(block.chunk_lo + chunk_lo, block.chunk_lo + chunk_hi, block.col_lo + lo, block.col_lo + hi)

    if first == last:
        return _non_empty([place(first, first + 1, start - first * size, stop - first * size)])
    whole_lo = first if start % size == 0 else first + 1
    whole_hi = last + 1 if stop % size == 0 else last
    return _non_empty(
        [
            place(first, whole_lo, start % size, size),
            place(whole_lo, whole_hi, 0, size),
            place(whole_hi, last + 1, 0, stop - last * size),
        ]
    )


def by_columns(rectangles: Sequence[Rectangle]) -> list[Rectangle]:
    """The same cells, no column in two rectangles unless its chunks do not follow each other."""
    return [Rectangle(*r[2:], *r[:2]) for r in _union([Rectangle(*r[2:], *r[:2]) for r in rectangles])]


def _union(rectangles: Sequence[Rectangle]) -> list[Rectangle]:
    """The same cells, chunks that follow each other and have the same columns taken together."""
    cuts = sorted({cut for r in rectangles for cut in (r.chunk_lo, r.chunk_hi)})
    groups: list[tuple[int, int, list[Range]]] = []  # chunks, and their columns
    for lo, hi in pairwise(cuts):
        columns: list[Range] = []
        for col_lo, col_hi in sorted(r[2:] for r in rectangles if r.chunk_lo <= lo and hi <= r.chunk_hi):
            if columns and columns[-1][1] == col_lo:
                col_lo, _ = columns.pop()
            columns.append((col_lo, col_hi))
        if groups and groups[-1][1:] == (lo, columns):
            lo, *_ = groups.pop()
        groups.append((lo, hi, columns))
    return [Rectangle(lo, hi, *span) for lo, hi, columns in groups for span in columns]


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
