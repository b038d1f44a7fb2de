"""hypernet_drift without a trunk, where features are pairs [e_t, z_n]: against the oracle."""

import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
from conftest import IMPLEMENTATIONS, TOL
from hypothesis import assume

import fasthyper as fh
from fasthyper import ops, regularizer
from fasthyper.layout import Layout
from fasthyper.planner import drift_plan


def arguments(layout, tasks, task_dim, chunk_dim, dtype=torch.float64, step=0.1):
    """theta, theta0, embeddings, embeddings0; the first and third a ``step`` away from the snapshot."""
    generator = torch.Generator().manual_seed(5)

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    theta0 = [random(layout.num_chunks, chunk_dim), random(layout.chunk_size, task_dim + chunk_dim + 1)]
    embeddings0 = random(tasks, task_dim)
    theta, embeddings = ([p + step * random(*p.shape) for p in ps] for ps in (theta0, [embeddings0]))
    return theta, theta0, embeddings[0], embeddings0


def drift(implementation, theta, theta0, embeddings, embeddings0, weight, plan):
    width = theta[-1].shape[1]
    no_gram0 = embeddings.new_empty(0, width, width, dtype=torch.float64)
    return implementation.hypernet_drift_fwd(theta, theta0, embeddings, embeddings0, [], no_gram0, weight, plan, 0)


def oracle_value_and_grads(theta, theta0, embeddings, embeddings0, weight, layout, tasks):
    leaves = [t.double().requires_grad_() for t in (*theta, embeddings)]

    def features(chunks, embeddings):
        rows = [oracle.features([chunks, None], e, None) for e in embeddings]
        return torch.stack(rows) if rows else chunks.new_empty(0, layout.num_chunks, theta[-1].shape[1] - 1)

    h, h0 = features(leaves[0], leaves[2]), features(theta0[0].double(), embeddings0.double())
    basis, basis0 = leaves[1], theta0[1].double()
    heads = layout.heads
    value = oracle.drift(h, basis, h0, basis0, layout.num_weights, heads=heads, tasks=tasks, weight=weight.double())
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return value.detach(), grads


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@hypothesis.given(
    tasks=st.sampled_from([0, 1, 2, 3, 7, 40]),
    weights=st.integers(1, 90),
    chunk=st.integers(1, 100),
    task_dim=st.integers(1, 6),
    chunk_dim=st.integers(0, 6),
    head=st.integers(0, 3),
    form=st.sampled_from(["auto", "gram", "direct"]),
    seed=st.integers(0, 99),
)
def test_pair_drift_over_random_shapes(name, tasks, weights, chunk, task_dim, chunk_dim, head, form, seed):
    """With heads the past tasks are a random subset of those that have one, in a random order."""
    assume(head * (tasks + 1) <= weights)
    heads = [[(weights - head * (t + 1), weights - head * t)] for t in range(tasks + 1)] if head else ()
    layout, generator = Layout(weights, chunk, heads), torch.Generator().manual_seed(seed)
    past = torch.randperm(tasks + 1, generator=generator)[:tasks].tolist()
    weight = torch.rand(tasks, generator=generator, dtype=torch.float64)
    args = arguments(layout, tasks, task_dim, chunk_dim)
    plan = drift_plan(layout, past, task_dim + chunk_dim, form, trunk=False)
    value, grad_embeddings, grad_theta = drift(IMPLEMENTATIONS[name], *args, weight, plan)
    want_value, want_grads = oracle_value_and_grads(*args, weight, layout, past)
    assert oracle.relative_error(value, want_value) < TOL["drift", torch.float64]
    for have, want in zip([*grad_theta, grad_embeddings], want_grads, strict=True):
        assert have.shape == want.shape and oracle.relative_error(have, want) < TOL["drift", torch.float64]


@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("step", [1, 1e-2, 1e-4, 1e-6])
def test_pair_drift_keeps_its_digits_at_small_steps(implementation, form, step):
    layout, weight = Layout(200 * 9 - 7, 200), torch.linspace(0.5, 2, 20)
    args = arguments(layout, 20, 8, 4, torch.float32, step)
    plan = drift_plan(layout, range(20), 12, form, trunk=False)
    value, grad_embeddings, grad_theta = drift(implementation, *args, weight, plan)
    want_value, want_grads = oracle_value_and_grads(*args, weight, layout, range(20))
    assert value.dtype == torch.float32 and value >= 0
    assert oracle.relative_error(value, want_value) < 1e-6
    for have, want in zip([*grad_theta, grad_embeddings], want_grads, strict=True):
        assert have.dtype == torch.float32 and oracle.relative_error(have, want) < 1e-6


@pytest.mark.parametrize("form", ["gram", "direct"])
def test_pair_drift_of_many_equal_tasks_is_that_of_one_with_their_weight(implementation, form):
    layout, copies = Layout(6 * 9 - 4, 6), 3000
    theta, theta0, embedding, embedding0 = arguments(layout, 1, 5, 3)
    plan = drift_plan(layout, range(1), 8, form, trunk=False)
    one = drift(implementation, theta, theta0, embedding, embedding0, torch.ones(1, dtype=torch.float64), plan)
    weight = torch.rand(copies, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    many = drift(implementation, theta, theta0, embedding.expand(copies, -1), embedding0.expand(copies, -1), weight, plan)
    assert oracle.relative_error(many[0], weight.sum() * one[0]) < 1e-12
    assert oracle.relative_error(many[1], weight[:, None] * one[1]) < 1e-12
    for have, want in zip(many[2], one[2], strict=True):
        assert oracle.relative_error(have, weight.sum() * want) < 1e-12


def test_pair_drift_repeats_bit_for_bit():
    layout = Layout(3000 * 40 - 5, 3000, [[(t * 50, (t + 1) * 50)] for t in range(4)])
    theta, theta0, embeddings, embeddings0 = arguments(layout, 4, 8, 8, torch.float32)
    for form in ("gram", "direct"):
        plan = drift_plan(layout, range(4), 16, form, trunk=False)
        runs = [
            ops.hypernet_drift_value_and_grad(theta, theta0, embeddings, embeddings0, [], plan, activation=0)
            for _ in range(2)
        ]
        first, second = ([value, *grads, grad] for value, grads, grad in runs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_regularizer_without_a_trunk_makes_no_features(monkeypatch):
    monkeypatch.setattr(regularizer, "run_trunk", None)
    hnet = fh.ChunkedHypernet(fh.nets.MLP(4, (5,), 12), 6, chunk_size=9, hidden=(), outputs_per_task=2)
    held = fh.OutputRegularizer(hnet)
    held.snapshot(5)
    ahead = [p + 0.1 for p in hnet.theta]
    assert held.penalty(ahead) > 0 and held.penalty(ahead, tasks=[3, 1], scaling=torch.ones(5)) > 0
