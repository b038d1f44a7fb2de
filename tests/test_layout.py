"""Rectangles hold every real weight once; the planner's choices at and around its crossovers."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from fasthyper.layout import Layout, Matrix
from fasthyper.planner import direct_cost, drift_plan, gram_cost

spans = st.tuples(st.integers(0, 59), st.integers(1, 60)).map(lambda s: (s[0], min(60, s[0] + s[1])))


@hypothesis.given(chunk=st.integers(1, 70), span=spans)
def test_rectangles_hold_each_weight_of_a_range_once(chunk, span):
    layout = Layout(60, chunk)
    count = torch.zeros(layout.num_chunks, chunk, dtype=torch.int64)
    for r in layout.rectangles(span):
        count[r.chunk_lo : r.chunk_hi, r.col_lo : r.col_hi] += 1
    want = torch.zeros(layout.num_chunks * chunk, dtype=torch.int64)
    want[span[0] : span[1]] = 1
    assert torch.equal(count.flatten(), want)
    assert len(layout.rectangles(span)) <= 3


@hypothesis.given(chunk=st.integers(1, 70), sizes=st.lists(st.integers(1, 40), max_size=4), in_new_columns=st.booleans())
def test_heads_that_are_added_hold_each_weight_once_and_move_none(chunk, sizes, in_new_columns):
    layout = Layout(60, 60 if in_new_columns else chunk, [[(50, 60)]], [Matrix(0, 5, 6)])
    before = [(layout.rectangles(span), span) for span in layout.shared + layout.heads[0]]
    for size in sizes:
        block = layout.add_head(size, in_new_columns=in_new_columns)
        assert block.ranges == ((layout.num_weights - size, layout.num_weights),) and block.num_chunks * block.size >= size
    count = torch.zeros(layout.num_chunks, layout.chunk_size, dtype=torch.int64)
    for span in layout.shared + [span for head in layout.heads for span in head]:
        for r in layout.rectangles(span):
            count[r.chunk_lo : r.chunk_hi, r.col_lo : r.col_hi] += 1
    assert count.max() == 1 and count.sum() == layout.num_weights == 60 + sum(sizes)
    assert all(layout.rectangles(span) == rectangles for rectangles, span in before)


@hypothesis.given(
    chunk=st.integers(1, 70),
    shapes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=4),
    trailing=st.integers(0, 5),
)
def test_aligned_blocks_hold_each_weight_once_in_whole_rows(chunk, shapes, trailing):
    matrices, position = [], 0
    for gap, num_rows, row_size in shapes:
        matrices.append(Matrix(position + gap, num_rows, row_size))
        position += gap + num_rows * row_size
    layout = Layout(position + trailing, chunk, [[(0, 1)]], matrices)
    cells = torch.full((layout.num_chunks, layout.chunk_size), -1)
    for block in layout.blocks:
        laid = torch.cat([torch.arange(*span) for span in block.ranges])
        for n, row in enumerate(laid.split(block.size)):
            assert block.chunk_lo + n < block.chunk_hi
            assert (cells[block.chunk_lo + n, block.col_lo : block.col_lo + len(row)] == -1).all()
            cells[block.chunk_lo + n, block.col_lo : block.col_lo + len(row)] = row
        assert block.chunk_hi == block.chunk_lo + n + 1
        if block.rows:
            (start, stop) = block.ranges[0]
            (matrix,) = [m for m in matrices if m.start == start]
            assert block.size == block.rows * matrix.row_size and (block.size <= chunk or block.rows == 1)
            assert (stop - start) % block.size == 0 and n >= 1
            assert start + matrix.num_rows * matrix.row_size - stop < block.size  # less than a chunk is left over
    assert sorted(cells[cells >= 0].tolist()) == list(range(layout.num_weights))
    flat = Layout(position + trailing, chunk)
    has_rows = any(block.rows for block in layout.blocks)
    assert not has_rows or layout.num_chunks * layout.chunk_size <= 1.25 * flat.num_chunks * flat.chunk_size
    held = torch.zeros_like(cells)
    for span in layout.shared + layout.heads[0]:
        for r in layout.rectangles(span):
            held[r.chunk_lo : r.chunk_hi, r.col_lo : r.col_hi] += 1
    assert torch.equal(held, (cells >= 0).long())
    ((head,),) = layout.heads
    (cell,) = layout.rectangles(head)
    assert cells[cell.chunk_lo, cell.col_lo] == 0 and (cell.num_chunks, cell.num_cols) == (1, 1)


def test_a_matrix_whose_rows_half_fill_a_chunk_is_laid_flat():
    """MLP 1024-100-100-10 in chunks of 2000: one row of 1024 each would take 100 chunks more."""
    first, second, last = Matrix(0, 100, 1024), Matrix(102_500, 100, 100), Matrix(112_600, 10, 100)
    layout = Layout(113_610, 2000, (), [first, second, last])
    assert [block.rows for block in layout.blocks] == [20, 0] and layout.num_chunks == Layout(113_610, 2000).num_chunks


def test_what_is_left_over_makes_one_rectangle_of_blocks_of_different_sizes():
    """MLP 1024-1000-1000-10 in chunks of 7500: 142 chunks of 7 x 1024, and 142 of 7 x 1000, which leave 168 columns."""
    first, second, last = Matrix(0, 1000, 1024), Matrix(1_025_000, 1000, 1000), Matrix(2_026_000, 10, 1000)
    layout = Layout(2_036_010, 7500, (), [first, second, last])
    assert (layout.num_chunks, layout.chunk_size) == (285, 7168)
    ((span),) = layout.shared
    assert layout.rectangles(span) == [(0, 284, 0, 7168), (284, 285, 0, 298)]


def test_heads_are_held_for_their_own_task_only():
    heads = [[(20, 24), (30, 31)], [(24, 28), (31, 32)]]
    layout = Layout(32, 5, heads)
    assert layout.shared == [(0, 20), (28, 30)]
    plan = drift_plan(layout, [1, 0], width=4)
    cells = torch.zeros(2, layout.num_chunks, 5, dtype=torch.int64)
    for task_lo, task_hi, chunk_lo, chunk_hi, col_lo, col_hi, _ in plan.tolist():
        cells[task_lo : 2 if task_hi < 0 else task_hi, chunk_lo:chunk_hi, col_lo:col_hi] += 1
    held = cells.flatten(1)[:, :32]
    assert held[0].tolist() == [1] * 20 + [0] * 4 + [1] * 4 + [1, 1, 0, 1]  # the first row is task 1
    assert held[1].tolist() == [1] * 24 + [0] * 4 + [1, 1, 1, 0]


def test_layout_and_plan_name_what_is_wrong():
    with pytest.raises(ValueError, match="at least 1, got 0 and 5"):
        Layout(0, 5)
    with pytest.raises(ValueError, match="overlap"):
        Layout(10, 5, [[(0, 4)], [(3, 6)]])
    with pytest.raises(ValueError, match="form must be"):
        drift_plan(Layout(10, 5), [0], 3, "fast")
    with pytest.raises(ValueError, match="task 2 has no output head"):
        drift_plan(Layout(10, 5, [[(0, 4)], [(4, 6)]]), [0, 2], 3)


def test_planner_takes_the_cheaper_form_on_either_side_of_its_crossover():
    width, cols = 50, 1000
    rows = next(r for r in range(1, 1000) if direct_cost(r * cols, r, cols, width) > gram_cost(r, cols, width))
    assert direct_cost((rows - 1) * cols, rows - 1, cols, width) <= gram_cost(rows - 1, cols, width)
    layout = Layout(cols, cols)  # one chunk: as many rows as tasks
    assert drift_plan(layout, range(rows - 1), width)[:, 6].tolist() == [1]
    assert drift_plan(layout, range(rows), width)[:, 6].tolist() == [0]
    assert drift_plan(layout, range(rows), width, "direct")[:, 6].tolist() == [1]
    assert drift_plan(layout, range(1), width, "gram")[:, 6].tolist() == [0]


def test_planner_counts_columns_that_rectangles_share_once():
    """The tail's columns are among the whole chunks' own, so the tail is no reason to leave the Gram form."""
    plan = drift_plan(Layout(2_036_010, 7500), range(100), 350)
    assert plan[:, 2:].tolist() == [[0, 271, 0, 7500, 0], [271, 272, 0, 3510, 0]]


def test_planner_takes_the_direct_form_for_a_head_of_one_row():
    heads = [[(2_026_000 + 100 * t, 2_026_100 + 100 * t)] for t in range(10)]
    plan = drift_plan(Layout(2_027_000, 7500, heads), range(10), 350)
    assert plan[:, 1].tolist() == [-1, -1, *range(1, 11)]
    assert plan[:, 6].tolist() == [0, 0, *[1] * 10]


def test_planner_counts_tasks_and_chunks_instead_of_their_pairs_without_a_trunk():
    """The Gram form costs the same at 6 and at 6,000 tasks, so it is taken as soon as rows are twice as many as features."""
    layout, width = Layout(468_540, 7000), 64
    for tasks in (2, 6, 6000):
        assert drift_plan(layout, range(tasks), width, trunk=False)[:, 6].tolist() == [0, 0]
    one_chunk, cols = Layout(1000, 1000), 1000
    rows = next(r for r in range(1, 1000) if direct_cost(r * cols, r, cols, width) > gram_cost(r + 1, cols, width))
    assert drift_plan(one_chunk, range(rows - 1), width, trunk=False)[:, 6].tolist() == [1]
    assert drift_plan(one_chunk, range(rows), width, trunk=False)[:, 6].tolist() == [0]
    heads = Layout(468_540, 7000, [[(1000 * t, 1000 * t + 640)] for t in range(6)])
    assert drift_plan(heads, range(6), width, trunk=False)[-6:, 6].tolist() == [1] * 6
