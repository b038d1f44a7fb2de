"""The drift of a hypernetwork that is one affine map: against the oracle, and against the form that knows no such thing."""

import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
from conftest import TOL
from test_pair_drift import arguments, oracle_value_and_grads

import fasthyper as fh
from fasthyper import ops
from fasthyper.affine import AffineDrift, sigma_points
from fasthyper.layout import Layout


@hypothesis.given(
    tasks=st.integers(0, 12),
    weights=st.integers(1, 40),
    task_dim=st.integers(1, 9),
    is_weighed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_affine_drift_over_random_shapes(tasks, weights, task_dim, is_weighed, seed):
    layout, generator = Layout(weights, weights), torch.Generator().manual_seed(seed)
    theta, theta0, _, embeddings = arguments(layout, tasks, task_dim, 0)
    weight = torch.rand(tasks, generator=generator, dtype=torch.float64) if is_weighed else None
    mean = torch.full((tasks,), 1 / max(1, tasks), dtype=torch.float64) if weight is None else weight
    want_value, want_grads = oracle_value_and_grads(theta, theta0, embeddings, embeddings, mean, layout, range(tasks))
    drift = AffineDrift(theta0[1], embeddings)
    for given in (embeddings,) if is_weighed else (embeddings, None):
        value, grad = drift.value_and_grad(theta[1], given, weight)
        assert oracle.relative_error(value, want_value) < TOL["drift", torch.float64]
        assert oracle.relative_error(grad, want_grads[1]) < TOL["drift", torch.float64]
        leaf = theta[1].detach().clone().requires_grad_()
        (3 * drift.penalty(leaf, given, weight)).backward()
        assert oracle.relative_error(leaf.grad, 3 * want_grads[1]) < TOL["drift", torch.float64]


@pytest.mark.parametrize("tasks", [3, 40])  # below and above a quarter of the embedding's size
@pytest.mark.parametrize("step", [1, 1e-2, 1e-4, 1e-6])
def test_affine_drift_keeps_its_digits_at_small_steps(tasks, step):
    layout, mean = Layout(200, 200), torch.full((tasks,), 1 / tasks)
    theta, theta0, _, embeddings = arguments(layout, tasks, 20, 0, torch.float32, step)
    want_value, want_grads = oracle_value_and_grads(theta, theta0, embeddings, embeddings, mean, layout, range(tasks))
    value, grad = AffineDrift(theta0[1], embeddings).value_and_grad(theta[1])
    assert value.dtype == grad.dtype == torch.float32 and value >= 0
    assert oracle.relative_error(value, want_value) < 1e-6 and oracle.relative_error(grad, want_grads[1]) < 1e-6


@pytest.mark.parametrize("past", [2, 7])
@pytest.mark.parametrize("scaling", [None, torch.linspace(0.5, 2, 7)])
def test_regularizer_takes_it_where_past_embeddings_are_held(monkeypatch, past, scaling):
    hnet = fh.ChunkedHypernet(fh.nets.MLP(3, (4,), 2), 7, chunk_size=None, hidden=(), task_dim=6, dtype=torch.float64)
    ahead = [p.detach() + 0.1 * torch.randn_like(p) for p in hnet.theta]
    affine, general = fh.OutputRegularizer(hnet), fh.OutputRegularizer(hnet, form="direct")
    affine.snapshot(past)
    general.snapshot(past)
    scaling = None if scaling is None else scaling[:past].double()
    called = []
    monkeypatch.setattr("fasthyper.ops.hypernet_drift", lambda **_: called.append(1))
    taken = [affine.penalty(ahead, tasks=tasks, scaling=scaling) for tasks in (None, [1, 0])]
    assert not called
    affine.penalty(ahead, hnet.embeddings(range(past)), scaling=scaling)
    assert called, "moving embeddings are the general form's"
    monkeypatch.undo()
    for penalty, tasks in zip(taken, (None, [1, 0]), strict=True):
        torch.testing.assert_close(penalty, general.penalty(ahead, tasks=tasks, scaling=scaling), rtol=1e-10, atol=0)
        have, want = (r.value_and_grad(ahead, tasks=tasks, scaling=scaling) for r in (affine, general))
        assert have[2] is want[2] is None
        torch.testing.assert_close(have[:2], want[:2], rtol=1e-10, atol=1e-14)
        moving = general.value_and_grad(ahead, general.embeddings0, tasks=tasks, scaling=scaling)
        torch.testing.assert_close(moving[:2], want[:2], rtol=0, atol=0)
        assert moving[2].shape == (past if tasks is None else 2, 6)


@hypothesis.given(tasks=st.integers(0, 60), dim=st.integers(1, 9), rank=st.integers(1, 9), seed=st.integers(0, 99))
def test_few_points_have_the_moments_of_many(tasks, dim, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(size, generator=generator, dtype=torch.float64) for size in [(tasks, rank), (rank, dim), (dim,)]]
    many = made[0] @ made[1] + made[2]
    few = sigma_points(many)
    assert len(few) == min(tasks, 2 * dim)
    for rows, count in [(many, tasks), (few, len(few))]:
        ones = torch.cat([rows, rows.new_ones(count, 1)], 1)
        moments = ones.T @ ones / max(1, count)
        if rows is many:
            want = moments
    torch.testing.assert_close(moments, want, rtol=1e-10, atol=1e-10)


def test_many_held_tasks_without_a_trunk_are_few_points(monkeypatch):
    hnet = fh.ChunkedHypernet(fh.nets.MLP(3, (4,), 2), 30, chunk_size=7, hidden=(), task_dim=6, dtype=torch.float64)
    ahead = [p.detach() + 0.1 * torch.randn_like(p) for p in hnet.theta]
    few, all_ = fh.OutputRegularizer(hnet), fh.OutputRegularizer(hnet, form="gram")
    rows, op = [], ops.hypernet_drift_value_and_grad
    monkeypatch.setattr(ops, "hypernet_drift_value_and_grad", lambda **a: rows.append(len(a["embeddings"])) or op(**a))
    for past, taken in [(5, 5), (12, 12), (13, 12), (30, 12)]:
        few.snapshot(past)
        all_.snapshot(past)
        have, want = (r.value_and_grad(ahead) for r in (few, all_))
        assert rows[-2:] == [taken, past]
        torch.testing.assert_close(have[:2], want[:2], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(few.penalty(ahead), all_.penalty(ahead), rtol=1e-10, atol=0)
    scaling = torch.linspace(0.5, 2, 30, dtype=torch.float64)  # then, or of some tasks, each counts by itself
    for given in ({"scaling": scaling}, {"tasks": list(range(20))}, {"embeddings": hnet.embeddings(range(30)) + 0.1}):
        have, want = (r.value_and_grad(ahead, **given) for r in (few, all_))
        torch.testing.assert_close(have[:2], want[:2], rtol=1e-10, atol=1e-13)
        assert rows[-2] == len(given.get("tasks", range(30)))


@pytest.mark.parametrize("past", [2, 7])
def test_a_step_with_it_compiles(past):
    hnet = fh.ChunkedHypernet(fh.nets.MLP(3, (4,), 2), 8, chunk_size=None, hidden=(), task_dim=6, dtype=torch.float64)
    regularizer = fh.OutputRegularizer(hnet)
    regularizer.snapshot(past)
    with torch.no_grad():
        hnet.basis.add_(0.1)
    x = torch.randn(5, 3, dtype=torch.float64)

    def loss():
        return hnet(x, past).square().mean() + regularizer.penalty()

    leaves = [hnet.basis, hnet.embedding(past)]
    want = torch.autograd.grad(loss(), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(), leaves)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [{"chunk_size": 7}, {"hidden": (3,)}, {"outputs_per_task": 1}],
    ids=["chunks", "trunk", "heads"],
)
def test_no_other_hypernetwork_is_taken_for_affine(options):
    options = {"chunk_size": None, "hidden": ()} | options
    hnet = fh.ChunkedHypernet(fh.nets.MLP(3, (4,), 2), 2, task_dim=6, **options)
    regularizer = fh.OutputRegularizer(hnet)
    regularizer.snapshot(2)
    assert regularizer._affine is None


@pytest.mark.parametrize("reg_tasks", [None, 1])
def test_a_sequence_trains_as_with_the_general_form(reg_tasks):
    from fasthyper.streams import toy_regression

    ends = []
    for form in ("auto", "direct"):
        hnet = fh.ChunkedHypernet(
            fh.nets.MLP(1, (5,), 1), 3, chunk_size=None, hidden=(), task_dim=2, seed=3, dtype=torch.float64
        )
        trainer = fh.Trainer(hnet, loss="mse", lr=1e-2, beta=1.0, reg_tasks=reg_tasks, progress=False)
        trainer.regularizer.form = form
        for task in toy_regression(3, 1):
            trainer.fit(task, steps=20, batch_size=8)
        ends.append([p.detach().clone() for p in hnet.parameters()])
    for affine, general in zip(*ends, strict=True):
        torch.testing.assert_close(affine, general, rtol=1e-6, atol=1e-9)
