"""The direct form as Triton makes it, against the reference's: tails, heads, rectangles that overlap, strides."""

import importlib.util
import os

import oracle
import pytest
import torch

from fasthyper import reference
from fasthyper.layout import Layout
from fasthyper.planner import drift_plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs Triton and TRITON_INTERPRET=1, or a CUDA device", allow_module_level=True)

from fasthyper.kernels import direct  # noqa: E402

TOL = {torch.float32: 3e-6}  # three products of TF32 parts have about 21 bits
HEADS = [
    (t, t + 1, n, n + 1, lo, hi) for t in range(20) for n, lo, hi in [(t % 3, 17 * (t % 2), 60), (t % 3 + 1, 0, 31 + t)]
]


@pytest.fixture
def dtype():
    return torch.float32


def one_rectangle(x_RM, w_R, y_CM, width):
    """Value and gradients over all rows and columns."""
    rows, cols = len(x_RM), len(y_CM)
    value = torch.zeros((), dtype=torch.float64, device=DEVICE)
    grad_h, grad_basis = x_RM.new_zeros(rows, 1, width), y_CM.new_zeros(cols, width + 1)
    direct.direct_rectangles(x_RM[:, None], w_R, y_CM, width, [(0, rows, 0, 1, 0, cols)], grad_h, grad_basis, value)
    return value, grad_h[:, 0], grad_basis


def random(*size, dtype=torch.float64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64).to(dtype).to(DEVICE)


def factors(rows, cols, width, dtype):
    """X = [dH | H* | 1] and Y = [V_H | dV]."""
    x = random(*rows, 2 * width + 1, dtype=dtype)
    x[..., 2 * width] = 1
    return x, random(cols, 2 * width + 1, dtype=dtype)


def expected(x_TNM, weight_T, y_SM, width, rectangles):
    """In float64."""
    x_TNM, weight_T, y_SM = x_TNM.double(), weight_T.double(), y_SM.double()
    value, grad_h = x_TNM.new_zeros(()), x_TNM.new_zeros(*x_TNM.shape[:2], width)
    grad_basis = y_SM.new_zeros(len(y_SM), width + 1)
    for task_lo, task_hi, chunk_lo, chunk_hi, col_lo, col_hi in rectangles:
        rows = slice(task_lo, task_hi), slice(chunk_lo, chunk_hi)
        w_R1 = weight_T[rows[0]].repeat_interleave(chunk_hi - chunk_lo)[:, None]
        more, grad_h_RH, grad_basis_CK = reference._direct(x_TNM[rows].flatten(0, 1), w_R1, y_SM[col_lo:col_hi], width)
        value += more
        grad_h[rows] += grad_h_RH.view_as(grad_h[rows])
        grad_basis[col_lo:col_hi] += grad_basis_CK
    return value, grad_h, grad_basis


def assert_close(found, wanted, tolerance):
    for have, want in zip(found, wanted, strict=True):
        assert have.shape == want.shape
        assert oracle.relative_error(have, want) < tolerance


@pytest.mark.parametrize(
    "rows, cols, width", [(1, 1, 1), (5, 130, 3), (16, 64, 16), (17, 65, 33), (150, 7, 9), (70, 40, 200)]
)
def test_direct(rows, cols, width, dtype):
    x, y = factors((rows,), cols, width, dtype)
    w = random(rows, dtype=dtype).abs()
    found = one_rectangle(x, w, y, width)
    assert found[0].dtype == torch.float64 and found[1].dtype == found[2].dtype == dtype
    assert_close(found, reference._direct(x.double(), w.double()[:, None], y.double(), width), TOL[dtype])


@pytest.mark.parametrize(
    "tasks, chunks, cols, rectangles",
    [
        (3, 4, 70, [(0, 3, 0, 3, 0, 70), (0, 3, 3, 4, 0, 41)]),
        (20, 4, 60, HEADS),
        (20, 4, 60, [(0, 20, 0, 4, 0, 60), *HEADS]),
        (30, 1, 500, [(t, t + 1, 0, 1, 100 + 13 * t, 113 + 13 * t) for t in range(30)]),
        (3, 2, 10, [(0, 2, 0, 2, 2, 9), (0, 2, 0, 2, 2, 9), (1, 3, 1, 2, 0, 5)]),
        (3, 2, 10, [(0, 0, 0, 2, 2, 9), (0, 2, 1, 1, 2, 9), (1, 3, 1, 2, 5, 5)]),
        (3, 2, 10, []),
    ],
    ids=["tail", "heads", "heads-over-shared", "one-chunk", "twice", "empty", "none"],
)
def test_direct_rectangles(tasks, chunks, cols, rectangles, dtype):
    width = 5
    x, y = factors((tasks, chunks), cols, width, dtype)
    weight = random(tasks, dtype=dtype).abs()
    begun = random(1).sum(), random(tasks, chunks, width, dtype=dtype), random(cols, width + 1, dtype=dtype)
    wanted = [a.double() + b for a, b in zip(begun, expected(x, weight, y, width, rectangles), strict=True)]
    results = []
    for _ in range(2):
        value, grad_h, grad_basis = (t.clone() for t in begun)
        direct.direct_rectangles(x, weight, y, width, rectangles, grad_h, grad_basis, value)
        results.append([value, grad_h, grad_basis])
    assert_close(results[0], wanted, TOL[dtype])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_direct_rectangles_takes_padded_rows_laid_chunk_by_chunk(dtype):
    tasks, chunks, cols, width, padded = 3, 5, 20, 6, 8
    x, y = factors((tasks, chunks), cols, width, dtype)
    x_NTL, y_SL = x.new_zeros(chunks, tasks, 2 * padded + 4), y.new_full((cols, 2 * padded + 4), torch.nan)
    y_SL[:, : 2 * padded] = 0
    for at, start, size in ((0, 0, width), (padded, width, width), (2 * padded, 2 * width, 1)):
        x_NTL[..., at : at + size] = x[..., start : start + size].transpose(0, 1)
        y_SL[:, at : at + size] = y[:, start : start + size]
    weight, rectangles = random(tasks, dtype=dtype), [(0, 3, 0, 4, 0, 20), (1, 2, 2, 5, 3, 9)]
    grad_NTH, grad_basis = x.new_zeros(chunks, tasks, width), y.new_zeros(cols, width + 1)
    value = torch.zeros((), dtype=torch.float64, device=DEVICE)
    direct.direct_rectangles(
        x_NTL.transpose(0, 1), weight, y_SL, width, rectangles, grad_NTH.transpose(0, 1), grad_basis, value, padded
    )
    found = value, grad_NTH.transpose(0, 1), grad_basis
    assert_close(found, expected(x, weight, y, width, rectangles), TOL[dtype])


def test_direct_of_many_rows_and_columns_is_split():
    """More programs than one for each tile of columns and of rows, several groups of features."""
    x, y = factors((300,), 200, 400, torch.float32)
    w = random(300, dtype=torch.float32).abs()
    wanted = reference._direct(x.double(), w.double()[:, None], y.double(), 400)
    assert_close(one_rectangle(x, w, y, 400), wanted, TOL[torch.float32])


@pytest.mark.parametrize("listed", [False, True], ids=["tensor", "list"])
@pytest.mark.parametrize("kind", ["targets", "importance", "both"])
def test_target_drift_of_many_tiles(kind, listed):
    tasks, width, size = 40, 21, 700
    layout = Layout(size, 150, [[(500 + 5 * t, 505 + 5 * t)] for t in range(tasks)])
    plan = drift_plan(layout, range(tasks), width, "direct")
    h, h0 = random(tasks, layout.num_chunks, width), random(width, tasks, layout.num_chunks).permute(1, 2, 0)
    basis, basis0 = random(150, width + 1), random(width + 1, 150).T
    per_weight = [[] if kind == other else [random(tasks, size).abs()] for other in ("importance", "targets")]
    if listed:  # of one stride, and of several
        per_weight = [[*rows[0][1:], rows[0].T.contiguous().T[0]] if rows else [] for rows in per_weight]
        per_weight[0] = [torch.stack([row, row], 1)[:, 1] for row in per_weight[0]]
    args = h, basis, [h0, basis0] if kind == "importance" else [], *per_weight, random(tasks).abs()
    in_float32 = [[t.float() for t in a] if isinstance(a, list) else a.float() for a in args]
    wanted = reference.target_drift_fwd(*args, plan)
    assert_close(direct.target_drift_fwd(*in_float32, plan), wanted, TOL[torch.float32])
