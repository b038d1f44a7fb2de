"""The whole regularizer, trunk included, against the slow way: loop over tasks, make weights, subtract, square, autograd."""

import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch

import fasthyper as fh
from fasthyper.activations import ACTIVATIONS


def moved(hnet, step=0.1, seed=0):
    """theta and the past embeddings, a step away from where they are, as leaves."""
    generator = torch.Generator().manual_seed(seed)

    def away(p):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        return (p.detach() + step * noise).requires_grad_()

    return [away(p) for p in hnet.theta], [away(e) for e in hnet.task_embeddings]


def slow_penalty(hnet, theta, embeddings, tasks, scaling=None):
    """What ``penalty`` must give; the snapshot is where ``hnet`` is."""
    activation = hnet.activation.value

    def features(theta, embedding):
        return oracle.features(theta, embedding, activation)

    total = 0 * sum(p.sum() for p in (*theta, *embeddings))  # differentiable also without a task
    for t in tasks:
        now = oracle.laid_weights(hnet.layout, features(theta, embeddings[t]), theta[-1])
        then = oracle.laid_weights(hnet.layout, features(hnet.theta, hnet.embedding(t)), hnet.basis).detach()
        factor = 1 if scaling is None else scaling[t]
        held = oracle.held(hnet.target.num_weights, hnet.target.heads, t).to(now)
        total = total + factor / len(tasks) * (held * (now - then) ** 2).sum()
    return total


def assert_same_value_and_gradients(value, slow_value, leaves, tolerance):
    assert value.item() >= 0
    assert oracle.relative_error(value.detach(), slow_value.detach()) < tolerance
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(slow_value, leaves, allow_unused=True, materialize_grads=True)
    for have, want in zip(grads, wanted, strict=True):
        assert oracle.relative_error(have, want) < tolerance


def six_tasks(heads, **options):
    outputs = 2 if heads else None
    return fh.ChunkedHypernet(
        fh.nets.MLP(4, (5,), 12), 6, task_dim=3, chunk_dim=2, outputs_per_task=outputs, dtype=torch.float64, **options
    )


@hypothesis.given(
    hidden=st.lists(st.integers(1, 6), max_size=3),
    chunk_size=st.one_of(st.none(), st.integers(1, 150)),
    num_past=st.integers(0, 5),
    heads=st.booleans(),
    plastic=st.booleans(),
    subset=st.integers(0, 5),
    scaled=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    form=st.sampled_from(["auto", "gram", "direct"]),
    layout=st.sampled_from(["flat", "aligned"]),
)
def test_penalty_over_random_shapes(hidden, chunk_size, num_past, heads, plastic, subset, scaled, activation, form, layout):
    hnet = six_tasks(heads, chunk_size=chunk_size, hidden=hidden, layout=layout, activation=activation)
    regularizer = fh.OutputRegularizer(hnet, form)
    regularizer.snapshot(num_past)
    theta, embeddings = moved(hnet)
    past = embeddings[:num_past] if plastic else [e.detach() for e in hnet.task_embeddings][:num_past]
    tasks = torch.randperm(num_past, generator=torch.Generator().manual_seed(subset)).tolist()[:subset] or None
    scaling = torch.linspace(0.5, 2, num_past, dtype=torch.float64) if scaled else None
    table = (torch.stack(past) if past else hnet.basis.new_empty(0, 3)) if plastic else None
    value = regularizer.penalty(theta, table, tasks=tasks, scaling=scaling)
    slow = slow_penalty(hnet, theta, past, range(num_past) if tasks is None else tasks, scaling)
    assert_same_value_and_gradients(value, slow, [*theta, *(past if plastic else [])], 1e-10)


def slow_penalty_of_chunks(hnet, theta, embeddings, tasks):
    """The same for tasks ``[k, N]``: chunk n of row j is that of task ``tasks[j, n]``, and holds of heads that task's."""
    layout, activation = hnet.layout, hnet.activation.value
    chunk_of = oracle.chunk_of_weights(layout)
    held = torch.stack([oracle.held(layout.num_weights, hnet.target.heads, t) for t in range(len(embeddings))])

    def row(theta, embeddings, j):
        features = [oracle.features(theta, embeddings[t], activation)[n] for n, t in enumerate(tasks[j].tolist())]
        return oracle.laid_weights(layout, torch.stack(features), theta[-1])

    total = 0 * sum(p.sum() for p in (*theta, *embeddings))
    for j in range(len(tasks)):
        moved = row(theta, embeddings, j) - row(hnet.theta, [e.detach() for e in hnet.task_embeddings], j).detach()
        total = total + (held[tasks[j][chunk_of], torch.arange(layout.num_weights)] * moved**2).sum() / len(tasks)
    return total


@hypothesis.given(
    hidden=st.lists(st.integers(1, 6), max_size=3),
    chunk_size=st.integers(1, 60),
    num_past=st.integers(2, 6),
    count=st.integers(1, 5),
    heads=st.booleans(),
    plastic=st.booleans(),
    form=st.sampled_from(["auto", "gram", "direct"]),
    layout=st.sampled_from(["flat", "aligned"]),
    budget=st.sampled_from([None, 0]),
)
def test_penalty_with_tasks_of_each_chunk(hidden, chunk_size, num_past, count, heads, plastic, form, layout, budget):
    hnet = six_tasks(heads, chunk_size=chunk_size, hidden=hidden, layout=layout)
    regularizer = fh.OutputRegularizer(hnet, form, memory_budget=budget)
    regularizer.snapshot(num_past)
    hypothesis.assume(count < num_past)
    theta, embeddings = moved(hnet)
    past = embeddings[:num_past] if plastic else [e.detach() for e in hnet.task_embeddings][:num_past]
    tasks = torch.stack([torch.randperm(num_past)[:count] for _ in range(hnet.layout.num_chunks)], 1)
    table = torch.stack(past) if plastic else None
    leaves = [*theta, *(past if plastic else [])]
    value, slow = regularizer.penalty(theta, table, tasks=tasks), slow_penalty_of_chunks(hnet, theta, past, tasks)
    wanted = torch.autograd.grad(slow, leaves, allow_unused=True, materialize_grads=True)
    of_graph = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    value_too, grads, grad_table = regularizer.value_and_grad(theta, table, tasks=tasks)
    assert value.item() >= 0 and torch.equal(value.detach(), value_too)
    assert oracle.relative_error(value_too, slow.detach()) < 1e-10
    for found in (of_graph, [*grads, *([] if grad_table is None else grad_table)]):
        for have, want in zip(found, wanted, strict=True):
            assert oracle.relative_error(have, want) < 1e-10


@pytest.mark.parametrize("hidden", [(4, 5), (4,), ()], ids=str)
def test_tasks_of_each_chunk_make_an_unbiased_estimate(hidden):
    """Each pair of task and chunk taken once in T draws: their mean is what all tasks give."""
    hnet = fh.ChunkedHypernet(
        fh.nets.MLP(4, (5,), 15), 5, chunk_size=9, hidden=hidden, outputs_per_task=3, dtype=torch.float64
    )
    regularizer, num_chunks = fh.OutputRegularizer(hnet), hnet.layout.num_chunks
    regularizer.snapshot(5)
    theta, _ = moved(hnet)
    draws = [(torch.arange(num_chunks)[None] * 2 + shift) % 5 for shift in range(5)]
    found = [regularizer.value_and_grad(theta, tasks=tasks) for tasks in draws]
    value, grads, _ = regularizer.value_and_grad(theta)
    assert oracle.relative_error(sum(value for value, _, _ in found) / 5, value) < 1e-12
    for i, grad in enumerate(grads):
        assert oracle.relative_error(sum(grads[i] for _, grads, _ in found) / 5, grad) < 1e-12


@pytest.mark.parametrize(("num_past", "count"), [(7, 1), (7, 3), (7, 6), (100, 1), (2, 1)])
def test_tasks_are_drawn_uniformly_and_each_about_as_often(num_past, count):
    hnet = fh.ChunkedHypernet(fh.nets.MLP(4, (5,), 3), num_past, chunk_size=2, hidden=(4,))
    regularizer, num_chunks, draws = fh.OutputRegularizer(hnet), hnet.layout.num_chunks, 4000
    regularizer.snapshot(num_past)
    generator, seen = torch.Generator().manual_seed(1), torch.zeros(num_chunks, num_past)
    for _ in range(draws):
        tasks = regularizer.draw(count, per_chunk=True, generator=generator)
        assert tasks.shape == (count, num_chunks) and tasks.dtype == torch.int64
        assert all(len(set(column)) == count for column in tasks.T.tolist())
        often = tasks.flatten().bincount(minlength=num_past)
        assert often.max() <= -(-num_chunks // (num_past // count))
        seen += torch.nn.functional.one_hot(tasks, num_past).sum(0)
    share = count / num_past  # of the draws, for each chunk and task
    assert ((seen / draws - share).abs() < 5 * (share * (1 - share) / draws) ** 0.5).all()
    again = [regularizer.draw(count, per_chunk=True, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)
    assert regularizer.draw(num_past, per_chunk=True) is None and regularizer.draw(num_past + 1) is None
    alike = regularizer.draw(count, generator=torch.Generator().manual_seed(3))
    assert torch.equal(alike, torch.randperm(num_past, generator=torch.Generator().manual_seed(3))[:count])


def test_tasks_of_one_chunk_are_drawn_as_tasks():
    hnet = fh.ChunkedHypernet(fh.nets.MLP(4, (5,), 3), 4, chunk_size=None, hidden=(4,))
    regularizer = fh.OutputRegularizer(hnet)
    regularizer.snapshot(4)
    assert regularizer.draw(2, per_chunk=True).shape == (2,)
    with pytest.raises(ValueError, match="^count must be at least 1, got 0$"):
        regularizer.draw(0)


def test_tasks_of_each_chunk_name_what_is_wrong():
    hnet = fh.ChunkedHypernet(fh.nets.MLP(4, (5,), 3), 3, chunk_size=9, hidden=(4,))
    regularizer = fh.OutputRegularizer(hnet)
    regularizer.snapshot(3)
    tasks, targets = regularizer.draw(1, per_chunk=True), torch.zeros(3, hnet.layout.num_weights)
    with pytest.raises(ValueError, match=r"tasks \[k, N\] need N = 5 chunks and no scaling, got \[1, 4\]$"):
        regularizer.penalty(tasks=tasks[:, 1:])
    with pytest.raises(ValueError, match=r"and no scaling, got \[1, 5\] and scaling$"):
        regularizer.value_and_grad(tasks=tasks, scaling=torch.ones(3))
    for given in ("targets", "importance"):
        with pytest.raises(ValueError, match="targets and importance are of whole tasks"):
            regularizer.penalty(tasks=tasks, **{given: targets})


def test_penalty_at_the_parameters_themselves_and_after_a_new_snapshot():
    hnet = fh.ChunkedHypernet(fh.nets.MLP(4, (5,), 3), 3, chunk_size=9, hidden=(4,), dtype=torch.float64)
    regularizer = fh.OutputRegularizer(hnet)
    regularizer.snapshot(2)
    assert regularizer.penalty().item() == 0
    with torch.no_grad():
        for p in hnet.theta:
            p += 0.1
    value = regularizer.penalty()
    assert value.item() > 0
    value.backward()
    assert all(p.grad is not None for p in hnet.theta) and hnet.embedding(0).grad is None
    regularizer.snapshot(3)
    assert regularizer.penalty().item() == 0


@pytest.mark.parametrize("hidden", [(4,), ()], ids=str)
@pytest.mark.parametrize("heads", [False, True])
def test_a_snapshot_of_some_tasks_holds_these(heads, hidden):
    hnet = fh.ChunkedHypernet(
        fh.nets.MLP(4, (5,), 15 if heads else 3), 5, chunk_size=9, hidden=hidden, dtype=torch.float64,
        outputs_per_task=3 if heads else None,
    )  # fmt: skip
    every, some = fh.OutputRegularizer(hnet), fh.OutputRegularizer(hnet)
    every.snapshot(4)
    some.snapshot([3, 0, 2])
    theta, _ = moved(hnet)
    assert some.num_past == 3
    for positions, tasks in ((None, [3, 0, 2]), ([2, 0], [2, 3]), (torch.tensor([1]), [0])):
        have, want = (r.value_and_grad(theta, tasks=t) for r, t in ((some, positions), (every, tasks)))
        assert oracle.relative_error(have[0], want[0]) < 1e-12
        assert all(oracle.relative_error(a, b) < 1e-12 for a, b in zip(have[1], want[1], strict=True))
    again = fh.OutputRegularizer(hnet)
    again.restore([3, 0, 2], some.state())
    assert again.penalty(theta) == some.penalty(theta)
    with pytest.raises(IndexError, match="task index 5 out of range"):
        some.snapshot([0, 5])


def test_penalty_names_what_is_wrong():
    hnet = fh.ChunkedHypernet(fh.nets.MLP(4, (5,), 3), 3, chunk_size=9, hidden=(4,))
    regularizer = fh.OutputRegularizer(hnet)
    with pytest.raises(RuntimeError, match="no snapshot to hold to"):
        regularizer.penalty()
    with pytest.raises(ValueError, match="snapshot of 4 past tasks, but the hypernetwork has 3"):
        regularizer.snapshot(4)
    regularizer.snapshot(2)
    with pytest.raises(IndexError, match=r"must be in 0 .. 1, got \[2\]"):
        regularizer.penalty(tasks=[2])
    with pytest.raises(ValueError, match=r"must be distinct, got \[1, 1\]"):
        regularizer.penalty(tasks=[1, 1])


# Precision: float32 against float64, ours and the slow way's, on the same float32 states.


def float32_errors(hnet, theta0, embeddings, theta, precision="highest"):
    """Errors of value and gradient (all of theta's as one vector) against float64: (ours, the slow way's)."""

    def with_state(dtype):
        other = hnet.to(dtype)
        for p, value in zip(other.theta, theta0, strict=True):
            p.data = value.to(dtype)
        for p, value in zip(other.task_embeddings, embeddings, strict=True):
            p.data = value.to(dtype)
        return other, [t.detach().to(dtype).requires_grad_() for t in theta]

    def value_and_grad(dtype, slow):
        other, leaves = with_state(dtype)
        num_past = len(embeddings) - 1
        if slow:
            value = slow_penalty(other, leaves, [e.detach() for e in other.task_embeddings], range(num_past))
        else:
            regularizer = fh.OutputRegularizer(other, precision=precision)
            regularizer.snapshot(num_past)
            value = regularizer.penalty(leaves)
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves)])
        return value.detach(), grad

    want = value_and_grad(torch.float64, slow=True)
    found, slow = value_and_grad(torch.float32, slow=False), value_and_grad(torch.float32, slow=True)
    assert found[0].item() >= 0
    names = ("value", "gradient")
    return [dict(zip(names, map(oracle.relative_error, pair, want), strict=True)) for pair in (found, slow)]


STEPS = (1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
STATES = {
    "wide": {"chunk_size": 300, "hidden": (20, 40)},
    "narrow": {"chunk_size": 200, "hidden": (10, 10)},
    "few rows": {"chunk_size": 2000, "hidden": (10, 10)},  # which take the direct form
}


def random_state(name, step, seed=3):
    """(hnet, theta0, embeddings, theta) with ||theta - theta0|| / ||theta0|| = step, parameter by parameter."""
    hnet = fh.ChunkedHypernet(fh.nets.MLP(20, (60,), 10), 6, task_dim=8, chunk_dim=4, activation="elu", **STATES[name])
    theta0 = [p.detach().clone() for p in hnet.theta]
    generator, theta = torch.Generator().manual_seed(seed), []
    for p in theta0:  # biases start at 0 and move by the step itself
        noise = torch.randn(p.shape, generator=generator)
        theta.append(p + step * noise * (p.norm() / noise.norm() if p.any() else 1))
    return hnet, theta0, [e.detach().clone() for e in hnet.task_embeddings], theta


def trained_state():
    """The same after ten tasks of permuted digits: from where the tenth began to its end."""
    stream = fh.streams.permuted_digits(10)
    hnet = fh.ChunkedHypernet(
        fh.nets.MLP(64, (60, 60), 10), 10, chunk_size=1000, hidden=(25, 25), task_dim=24, chunk_dim=8, activation="elu"
    )
    trainer = fh.Trainer(hnet, lr=1e-3, beta=0.1, progress=False)
    for task in stream:
        theta0 = [p.detach().clone() for p in hnet.theta]
        trainer.fit(task, steps=120, batch_size=64)
    assert min(trainer.evaluate(stream)) > 0.5  # it has learned something, and kept it
    return hnet, theta0, [e.detach().clone() for e in hnet.task_embeddings], [p.detach().clone() for p in hnet.theta]


def assert_as_exact_as_the_slow_way(states, reached):
    """The bound of the project, for the first state and on average, and below it what is reached."""
    ours, slow = zip(*(float32_errors(*state) for state in states), strict=True)
    for errors in ours:
        assert errors["value"] < 1e-4 and max(errors.values()) < reached
    assert ours[0]["gradient"] <= 1.5 * slow[0]["gradient"]
    assert sum(errors["gradient"] for errors in ours) <= 1.5 * sum(errors["gradient"] for errors in slow)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", STATES)
def test_float32_is_as_exact_as_the_slow_way_in_random_states(name, step):
    assert_as_exact_as_the_slow_way([random_state(name, step, seed) for seed in range(3, 11)], reached=1e-6)


def test_float32_is_as_exact_as_the_slow_way_in_a_trained_state():
    pytest.importorskip("sklearn")
    assert_as_exact_as_the_slow_way([trained_state()], reached=1e-5)


@pytest.mark.parametrize("outputs_per_task", [None, 2])
def test_regularizer_without_stored_pre_activations(monkeypatch, outputs_per_task):
    """A snapshot stores pre-activations of as many layers as fit its memory budget: values and gradients are the same."""
    monkeypatch.setattr("fasthyper.regularizer._BYTES_AT_ONCE", 500)  # a few tasks at a time
    hnet = fh.ChunkedHypernet(
        fh.nets.MLP(5, (6,), 8), 4, chunk_size=17, hidden=(5, 7, 4), task_dim=3, chunk_dim=2, activation="elu",
        outputs_per_task=outputs_per_task, dtype=torch.float64,
    )  # fmt: skip
    second, third = (4 * hnet.layout.num_chunks * width * 8 for width in (7, 4))  # bytes of a layer
    ahead = [p.detach() + 0.1 * torch.randn_like(p) for p in hnet.theta]
    results = []
    for budget, stored in ((None, 2), (second + third, 2), (second + third - 1, 1), (third, 1), (third - 1, 0), (0, 0)):
        regularizer = fh.OutputRegularizer(hnet, memory_budget=budget)
        regularizer.snapshot(4)
        assert len(regularizer._pre0) == stored
        value, grads, grad_embeddings = regularizer.value_and_grad(ahead, regularizer.embeddings0)
        some = regularizer.penalty(ahead, tasks=[2, 0])
        weighed = regularizer.penalty(ahead, importance=torch.ones(4, hnet.layout.num_weights, dtype=torch.float64))
        results.append([value, *grads, grad_embeddings, some, weighed])
    for first, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-10, atol=1e-12)


def test_regularizer_names_unknown_precision():
    with pytest.raises(ValueError, match="precision must be one of highest, high, medium"):
        fh.OutputRegularizer(None, precision="half")
    with pytest.raises(ValueError, match="^memory_budget must not be negative, got -1$"):
        fh.OutputRegularizer(None, memory_budget=-1)
