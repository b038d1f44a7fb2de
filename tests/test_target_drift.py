"""target_drift: drift with an importance of each weight, and to given targets, against the oracle; contracts, bad input."""

import cases
import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
from conftest import IMPLEMENTATIONS, TOL

import fasthyper as fh
from fasthyper import ops
from fasthyper.activations import ACTIVATIONS
from fasthyper.planner import drift_plan
from fasthyper.trunk import run_trunk, trunk_drift

all_cases = pytest.mark.parametrize("case", cases.DRIFT_CASES, ids=lambda case: case.name)
all_kinds = pytest.mark.parametrize("kind", ["targets", "importance", "both"])


def per_weight(case, kind, dtype=torch.float64):
    """(targets, importance) ``[T, P]``, or None for the one that ``kind`` leaves out."""
    generator = torch.Generator().manual_seed(11)
    targets = torch.randn(case.tasks, case.weights, generator=generator, dtype=torch.float64).to(dtype)
    importance = torch.rand(case.tasks, case.weights, generator=generator, dtype=torch.float64).to(dtype)
    return targets if kind != "importance" else None, importance if kind != "targets" else None


def plan_of(case):
    return drift_plan(case.layout, range(case.tasks), case.width)


def raw_arguments(case, kind, tensors, weight):
    """h is the features where targets are given, else their drift since the snapshot."""
    dh, basis, h0, basis0 = tensors
    targets, importance = per_weight(case, kind, dh.dtype)
    given = [[t] if t is not None and len(t) else [] for t in (targets, importance)]
    h, snapshot = (dh, [h0, basis0]) if targets is None else (h0 + dh, [])
    return h, basis, snapshot, *given, weight, plan_of(case)


def oracle_value_and_grads(case, kind, tensors, weight):
    dh, basis, h0, basis0 = (t.double() for t in tensors)
    targets, importance = (None if t is None else t.double() for t in per_weight(case, kind, tensors[0].dtype))
    h, basis = (h0 + dh).requires_grad_(), basis.requires_grad_()
    if targets is not None:
        h = (tensors[2] + tensors[0]).double().requires_grad_()  # as it was rounded
    value = 0 * (h.sum() + basis.sum())
    for t in range(case.tasks):
        target = oracle.all_weights(h0[t], basis0, case.weights) if targets is None else targets[t]
        square = (oracle.all_weights(h[t], basis, case.weights) - target) ** 2
        mask = oracle.held(case.weights, case.layout.heads, t).double()
        value = value + weight[t].double() * (mask * (square if importance is None else importance[t] * square)).sum()
    return [value.detach(), *torch.autograd.grad(value, [h, basis])]


@all_cases
@all_kinds
def test_target_drift_forward_backward(implementation, case, kind, dtype):
    tensors, weight = case.tensors(dtype), torch.linspace(0.5, 2, case.tasks, dtype=dtype)
    found = implementation.target_drift_fwd(*raw_arguments(case, kind, tensors, weight))
    for have, want in zip(found, oracle_value_and_grads(case, kind, tensors, weight), strict=True):
        assert have.dtype == dtype and have.shape == want.shape
        assert oracle.relative_error(have, want) < TOL["drift", dtype]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@hypothesis.given(
    tasks=st.integers(0, 5),
    weights=st.integers(1, 60),
    chunk=st.integers(1, 70),
    width=st.integers(1, 9),
    head=st.integers(0, 4),
    kind=st.sampled_from(["targets", "importance", "both"]),
)
def test_target_drift_random_shapes(name, tasks, weights, chunk, width, head, kind):
    case = cases.DriftCase("random", tasks, weights, chunk, width, head if head * tasks <= weights else 0)
    tensors, weight = case.tensors(), torch.linspace(0.5, 2, tasks, dtype=torch.float64)
    found = IMPLEMENTATIONS[name].target_drift_fwd(*raw_arguments(case, kind, tensors, weight))
    for have, want in zip(found, oracle_value_and_grads(case, kind, tensors, weight), strict=True):
        assert oracle.relative_error(have, want) < TOL["drift", torch.float64]


@all_kinds
def test_target_drift_tiles(implementation, kind):
    """Sizes beyond one tile of rows, of columns and of the reference's residual."""
    case = cases.DriftCase("tiles", 3, 1500 * 400 - 17, 1500, 3)
    tensors, weight = case.tensors(), torch.ones(3, dtype=torch.float64)
    found = implementation.target_drift_fwd(*raw_arguments(case, kind, tensors, weight))
    for have, want in zip(found, oracle_value_and_grads(case, kind, tensors, weight), strict=True):
        assert oracle.relative_error(have, want) < 1e-12


def test_target_drift_is_output_drift_where_every_importance_is_one(implementation):
    case = cases.DriftCase("ones", 4, 53, 7, 3, head=6)
    tensors, weight = case.tensors(), torch.rand(4, dtype=torch.float64)
    dh, basis, h0, basis0 = tensors
    ones = torch.ones(case.tasks, case.weights, dtype=torch.float64)
    for importance in ([], [ones], list(ones)):
        found = implementation.target_drift_fwd(dh, basis, [h0, basis0], [], importance, weight, plan_of(case))
        wanted = implementation.output_drift_fwd(*tensors, weight, plan_of(case))
        for have, want in zip(found, wanted, strict=True):
            assert oracle.relative_error(have, want) < 1e-12


@pytest.mark.parametrize("step", [1, 1e-2, 1e-4, 1e-6])
def test_target_drift_keeps_its_digits_at_small_steps(implementation, step):
    case = cases.DriftCase("steps", 4, 53, 7, 5)
    tensors, weight = case.tensors(torch.float32, step), torch.ones(4)
    dh, basis, h0, basis0 = (t.double() for t in tensors)
    _, importance = per_weight(case, "importance", torch.float32)
    found = implementation.target_drift_fwd(*raw_arguments(case, "importance", tensors, weight))
    args = dh, basis, [h0, basis0], [], [importance.double()], weight.double(), plan_of(case)
    for have, want in zip(found, IMPLEMENTATIONS["reference"].target_drift_fwd(*args), strict=True):
        assert oracle.relative_error(have, want) < 2e-6


def test_target_drift_reads_any_strides_and_lists(implementation):
    case, kind = cases.DriftCase("strides", 3, 25, 6, 3), "both"
    weight = torch.ones(3, dtype=torch.float64)
    h, basis, _, [targets], [importance], *rest = raw_arguments(case, kind, case.tensors(), weight)
    plain = implementation.target_drift_fwd(h, basis, [], [targets], [importance], *rest)

    def strided(t):
        return torch.stack([t, t], -1)[..., 1]

    for ts, fs in (([targets.T.contiguous().T], list(importance)), ([strided(t) for t in targets], [strided(importance)])):
        found = implementation.target_drift_fwd(strided(h), strided(basis), [], ts, fs, *rest)
        for have, want in zip(found, plain, strict=True):
            assert torch.allclose(have, want, rtol=1e-13)
    same = targets[:1].expand(3, -1)
    expanded = implementation.target_drift_fwd(h, basis, [], [same], [importance], *rest)
    dense = implementation.target_drift_fwd(h, basis, [], [same.contiguous()], [importance], *rest)
    assert all(torch.allclose(have, want, rtol=1e-13) for have, want in zip(expanded, dense, strict=True))


def public_arguments(case, kind):
    """Positional and keyword arguments of the public function, and the leaves among them."""
    dh, basis, h0, basis0 = case.tensors()
    targets, importance = per_weight(case, kind)
    h = (dh if targets is None else h0 + dh).requires_grad_()
    snapshot = {"h0": h0, "basis0": basis0} if targets is None else {}
    return (h, basis.requires_grad_(), plan_of(case)), {"targets": targets, "importance": importance, **snapshot}


@all_cases
@all_kinds
def test_target_drift_autograd_scales_and_averages(case, kind):
    args, options = public_arguments(case, kind)
    value = ops.target_drift(*args, **options)
    (3 * value).backward()
    mean = torch.full((case.tasks,), 1 / max(1, case.tasks), dtype=torch.float64)
    want, want_h, want_basis = oracle_value_and_grads(case, kind, case.tensors(), mean)
    for have, wanted in ((value.detach(), want), (args[0].grad, 3 * want_h), (args[1].grad, 3 * want_basis)):
        assert oracle.relative_error(have, wanted) < TOL["drift", torch.float64]


@all_kinds
def test_target_drift_gradcheck(kind):
    (h, basis, plan), options = public_arguments(cases.DriftCase("gradcheck", 3, 25, 6, 3), kind)
    assert torch.autograd.gradcheck(lambda h, basis: ops.target_drift(h, basis, plan, **options), (h, basis))


@all_cases
@all_kinds
def test_target_drift_opcheck(case, kind, dtype):
    raw = raw_arguments(case, kind, case.tensors(dtype), torch.ones(case.tasks, dtype=dtype))
    torch.library.opcheck(torch.ops.fasthyper._target_drift_fwd.default, raw)


@all_kinds
def test_target_drift_compiles_in_one_graph(kind):
    args, options = public_arguments(cases.DriftCase("compile", 3, 25, 6, 4), kind)
    compiled = torch.compile(ops.target_drift, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(ops.target_drift(*args, **options), args[:2])
    for have, wanted in zip(torch.autograd.grad(compiled(*args, **options), args[:2]), want, strict=True):
        assert oracle.relative_error(have, wanted) < 1e-12


def test_target_drift_repeats_and_does_not_depend_on_the_number_of_threads():
    case = cases.DriftCase("repeat", 5, 9000 * 12 - 5, 9000, 20)
    raw = raw_arguments(case, "both", case.tensors(), torch.ones(5, dtype=torch.float64))
    threads, results = torch.get_num_threads(), {}
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results[count] = [torch.ops.fasthyper._target_drift_fwd(*raw) for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    for first, second in results.values():
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for one, two in zip(results[1][0], results[2][0], strict=True):
        assert oracle.relative_error(two, one) < 1e-13


def test_target_drift_names_what_is_wrong():
    case = cases.DriftCase("bad", 3, 25, 6, 3)
    (h, basis, plan), options = public_arguments(case, "both")
    targets, importance = options["targets"], options["importance"]
    for changed, error, message in (
        ({"targets": None}, ValueError, "target_drift: give either targets, or both h0 and basis0"),
        ({"h0": h, "basis0": basis}, ValueError, "give either targets, or both h0 and basis0"),
        ({"targets": None, "h0": h}, ValueError, "give either targets, or both h0 and basis0"),
        ({"targets": None, "h0": h[:2], "basis0": basis}, ValueError, r"h0 must have shape \[3, 5, 3\], got \[2, 5, 3\]"),
        ({"targets": targets[:2]}, ValueError, r"targets must have shape \[3, P\], got \[2, 25\]"),
        ({"targets": list(targets)[:2]}, ValueError, r"targets must be one tensor \[T, P\] or 3 tensors \[P\], got 2"),
        ({"importance": [importance] * 3}, ValueError, r"importance\[0\] must have shape \[P\], got \[3, 25\]"),
        ({"importance": importance.float()}, TypeError, "importance is torch.float32, h is torch.float64"),
        ({"weight": torch.ones(2, dtype=torch.float64)}, ValueError, r"weight must have shape \[3\], got \[2\]"),
    ):
        with pytest.raises(error, match=message):
            ops.target_drift(h, basis, plan, **{**options, **changed})
    half = {"targets": targets.half(), "importance": importance.half()}
    with pytest.raises(TypeError, match="computes in float32 or float64, got torch.float16"):
        ops.target_drift(h.half(), basis.half(), plan, **half)


@pytest.mark.parametrize("name", ["targets", "importance"])
@pytest.mark.parametrize("as_list", [False, True], ids=["tensor", "list"])
def test_target_drift_refuses_a_plan_that_reaches_beyond_what_is_given(implementation, name, as_list):
    case = cases.DriftCase("bad", 3, 25, 6, 3)
    h, basis, _, [targets], [importance], *rest = raw_arguments(case, "both", case.tensors(), torch.ones(3).double())
    given = {"targets": [targets], "importance": [importance]}
    given[name] = list(given[name][0][:, :24]) if as_list else [given[name][0][:, :24]]
    with pytest.raises(RuntimeError, match=f"the plan reaches 25 weights of a task, {name} has 24"):
        implementation.target_drift_fwd(h, basis, [], given["targets"], given["importance"], *rest)


# In the regularizer


def make_hnet(hidden=(5, 4), chunk_size=9, heads=False, activation="elu", dtype=torch.float64):
    options = {"hidden": hidden, "task_dim": 3, "chunk_dim": 2, "activation": activation}
    heads = {"outputs_per_task": 2 if heads else None}
    return fh.ChunkedHypernet(fh.nets.MLP(4, (5,), 12), 6, chunk_size=chunk_size, dtype=dtype, **options, **heads)


def flat_weights(hnet, theta, embedding):
    h = oracle.features(theta, embedding, hnet.activation.value)
    return oracle.all_weights(h, theta[-1], hnet.target.num_weights)


@hypothesis.given(
    hidden=st.lists(st.integers(1, 6), max_size=3),
    chunk_size=st.one_of(st.none(), st.integers(1, 150)),
    num_past=st.integers(0, 5),
    heads=st.booleans(),
    subset=st.integers(0, 5),
    scaled=st.booleans(),
    as_list=st.booleans(),
    kind=st.sampled_from(["targets", "importance", "both"]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_penalty_to_targets_and_with_importance(
    hidden, chunk_size, num_past, heads, subset, scaled, as_list, kind, activation
):
    hnet = make_hnet(hidden, chunk_size, heads, activation)
    held, generator = fh.OutputRegularizer(hnet), torch.Generator().manual_seed(subset)
    held.snapshot(num_past)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    theta = [(p.detach() + 0.1 * random(*p.shape)).requires_grad_() for p in hnet.theta]
    embeddings = (held.embeddings0 + 0.1 * random(*held.embeddings0.shape)).requires_grad_()
    targets, importance = random(num_past, hnet.target.num_weights), random(num_past, hnet.target.num_weights) ** 2
    tasks = torch.randperm(num_past, generator=generator).tolist()[:subset] or None
    scaling = torch.linspace(0.5, 2, num_past, dtype=torch.float64) if scaled else None
    given = {"targets": None if kind == "importance" else targets, "importance": None if kind == "targets" else importance}
    value = held.penalty(
        theta,
        embeddings,
        tasks=tasks,
        scaling=scaling,
        **{name: list(rows) if as_list and rows is not None else rows for name, rows in given.items()},
    )

    slow, taken = 0 * sum(p.sum() for p in [*theta, embeddings]), range(num_past) if tasks is None else tasks
    for t in taken:
        target = targets[t] if kind != "importance" else flat_weights(hnet, hnet.theta, hnet.embedding(t)).detach()
        square = (flat_weights(hnet, theta, embeddings[t]) - target) ** 2
        mask = oracle.held(hnet.target.num_weights, hnet.layout.heads, t).double()
        factor = (1 if scaling is None else scaling[t]) / len(taken)
        slow = slow + factor * (mask * (square if kind == "targets" else importance[t] * square)).sum()
    assert oracle.relative_error(value.detach(), slow.detach()) < 1e-10
    leaves = [*theta, embeddings]
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    for have, want in zip(grads, torch.autograd.grad(slow, leaves), strict=True):
        assert oracle.relative_error(have, want) < 1e-10


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(), (4,), (5, 4, 3)], ids=str)
def test_trunk_drift_is_the_difference_of_two_trunks(activation, hidden):
    hnet, generator = make_hnet(hidden), torch.Generator().manual_seed(1)
    theta0, embeddings0 = [p.detach() for p in hnet.theta], torch.stack(list(hnet.task_embeddings)).detach()
    made, h0 = run_trunk(theta0, embeddings0, activation)
    leaves = [p + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in (*theta0, embeddings0)]
    *theta, embeddings = (p.requires_grad_() for p in leaves)
    drift, features = trunk_drift(theta, theta0, embeddings, embeddings0, made[1:], activation)
    again, _ = trunk_drift(theta, theta0, embeddings, embeddings0, [], activation)
    assert oracle.relative_error(again.detach(), drift.detach()) < 1e-13
    plain = run_trunk(theta, embeddings, activation).features
    assert torch.equal(features, h0) and oracle.relative_error(drift.detach(), (plain - h0).detach()) < 1e-13
    pull = torch.randn(h0.shape, generator=generator, dtype=h0.dtype)
    grads = (torch.autograd.grad(h, leaves, pull, allow_unused=True, materialize_grads=True) for h in (drift, plain))
    for have, want in zip(*grads, strict=True):
        assert oracle.relative_error(have, want) < 1e-12


@pytest.mark.parametrize("step", [1, 1e-3, 1e-6])
def test_penalty_with_importance_keeps_its_digits_at_small_steps(step):
    """Rounding of the step itself aside, which float32 theta near theta0 holds exactly: it is subtracted first."""
    hnet, generator = make_hnet((8, 8), 30, dtype=torch.float32), torch.Generator().manual_seed(2)
    theta = [(p + step * torch.randn(p.shape, generator=generator)).detach() for p in hnet.theta]
    importance = torch.rand(5, hnet.target.num_weights, generator=generator)

    def value_and_grad(dtype):
        held = fh.OutputRegularizer(hnet.to(dtype))
        held.snapshot(5)
        leaves = [p.to(dtype).requires_grad_() for p in theta]
        value = held.penalty(leaves, importance=importance.to(dtype))
        return value.detach(), torch.autograd.grad(value, leaves)[-1]

    for have, want in zip(value_and_grad(torch.float32), value_and_grad(torch.float64), strict=True):
        assert oracle.relative_error(have, want) < 2e-6


def test_penalty_names_wrong_targets_and_importance():
    hnet = make_hnet()
    held, num_weights = fh.OutputRegularizer(hnet), hnet.target.num_weights
    held.snapshot(3)
    rows = torch.ones(3, num_weights, dtype=torch.float64)
    for given, error, message in (
        ({"targets": rows[:2]}, ValueError, rf"targets must have shape \[3, {num_weights}\], got \[2, {num_weights}\]"),
        ({"importance": list(rows[:2])}, ValueError, "importance must hold 3 tensors, one per past task, got 2"),
        ({"importance": list(rows[:, 1:])}, ValueError, rf"importance must have shape \[{num_weights}\], got"),
        ({"targets": rows.float()}, TypeError, "targets is torch.float32, h is torch.float64"),
        ({"importance": rows, "tasks": [3]}, IndexError, r"must be in 0 .. 2, got \[3\]"),
    ):
        with pytest.raises(error, match=message):
            held.penalty(**given)
