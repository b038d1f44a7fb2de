"""hypernet_drift: the trunk and the drift in one op, against the oracle and autograd; contracts of the op, bad input."""

from itertools import pairwise

import oracle
import pytest
import torch
from conftest import TOL

import fasthyper as fh
from fasthyper import ops, reference
from fasthyper.activations import ACTIVATIONS
from fasthyper.layout import Layout
from fasthyper.planner import drift_plan
from fasthyper.trunk import run_trunk

# past tasks, target weights, chunk size, task and chunk embedding sizes, hidden widths
SHAPES = {
    "no-past-task": (0, 25, 6, 3, 2, (4,)),
    "one-task": (1, 25, 6, 3, 2, (4,)),
    "linear": (3, 25, 6, 3, 2, ()),
    "one-layer": (3, 24, 6, 3, 2, (4,)),
    "two-layers": (3, 25, 6, 3, 2, (5, 4)),
    "three-layers": (2, 25, 6, 3, 2, (4, 7, 5)),
    "full": (4, 11, 11, 3, 0, (5, 2)),
    "full-linear": (4, 11, 15, 3, 0, ()),
    "no-width": (3, 25, 6, 3, 2, (0, 0)),
    "tiles": (30, 50 * 90 - 3, 50, 3, 2, (5, 4)),
}
all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
all_activations = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


def arguments(shape, activation, dtype=torch.float64, step=0.1, form="auto"):
    """Keyword arguments of the public function; theta and embeddings a ``step`` away from the snapshot."""
    tasks, weights, chunk, task_dim, chunk_dim, hidden = shape
    generator = torch.Generator().manual_seed(7)
    layout, widths = Layout(weights, chunk), (task_dim + chunk_dim, *hidden)
    sizes = [(layout.num_chunks, chunk_dim)]
    for i, o in pairwise(widths):
        sizes += [(o, i), (o,)]
    sizes.append((chunk, widths[-1] + 1))

    def random(size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    theta0, embeddings0 = [random(size) for size in sizes], random((tasks, task_dim))
    return {
        "theta": [p + step * random(p.shape) for p in theta0],
        "theta0": theta0,
        "embeddings": embeddings0 + step * random(embeddings0.shape),
        "embeddings0": embeddings0,
        "pre0": run_trunk(theta0, embeddings0, activation).pre[1:],
        "plan": drift_plan(layout, range(tasks), widths[-1], form),
        "activation": activation.code,
    }


def raw_arguments(args, weight, gram0):
    keys = ("theta", "theta0", "embeddings", "embeddings0", "pre0")
    return *(args[key] for key in keys), gram0, weight, args["plan"], args["activation"]


def oracle_value_and_grads(shape, activation, args, weight):
    tensors = [t.double().requires_grad_() for t in (*args["theta"], args["embeddings"])]
    *theta, embeddings = tensors
    theta0, embeddings0 = [p.double() for p in args["theta0"]], args["embeddings0"].double()
    h = run_trunk(theta, embeddings, activation).features
    h0 = run_trunk(theta0, embeddings0, activation).features
    value = oracle.drift(h, theta[-1], h0, theta0[-1], shape[1], weight=weight.double())
    return value.detach(), torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)


@all_shapes
@all_activations
@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("given", ["", "gram0", "gram0 of columns, too"])
def test_hypernet_drift_forward_backward(implementation, shape, activation, form, given, dtype):
    args = arguments(shape, activation, dtype, form=form)
    weight, width = torch.linspace(0.5, 2, shape[0], dtype=dtype), args["theta"][-1].shape[1]
    gram0 = torch.empty(0, width, width, dtype=torch.float64)
    if given:
        gram0 = reference.gram0(run_trunk(args["theta0"], args["embeddings0"], activation).features, weight, args["plan"])
    if "columns" in given:
        gram0 = torch.cat([gram0, reference.basis_gram0(args["theta0"][-1], args["plan"])])
    value, grad_embeddings, grad_theta = implementation.hypernet_drift_fwd(*raw_arguments(args, weight, gram0))
    want_value, want_grads = oracle_value_and_grads(shape, activation, args, weight)
    assert value.dtype == dtype and value >= 0
    assert oracle.relative_error(value, want_value) < TOL["drift", dtype]
    for have, want in zip([*grad_theta, grad_embeddings], want_grads, strict=True):
        assert have.shape == want.shape and oracle.relative_error(have, want) < TOL["drift", dtype]


@all_activations
@pytest.mark.parametrize("step", [1, 1e-2, 1e-4, 1e-6])
def test_hypernet_drift_keeps_its_digits_at_small_steps(implementation, activation, step):
    """In float32 a plain difference of features would be wrong by 10 % at the last step."""
    shape = SHAPES["two-layers"]
    args = arguments(shape, activation, torch.float32, step)
    weight, width = torch.ones(shape[0]), args["theta"][-1].shape[1]
    gram0 = torch.empty(0, width, width, dtype=torch.float64)
    value, grad_embeddings, grad_theta = implementation.hypernet_drift_fwd(*raw_arguments(args, weight, gram0))
    want_value, want_grads = oracle_value_and_grads(shape, activation, args, weight)
    assert oracle.relative_error(value, want_value) < 3e-6
    assert oracle.relative_error(grad_theta[-1], want_grads[-2]) < 3e-6
    assert oracle.relative_error(grad_embeddings, want_grads[-1]) < 3e-6


@pytest.mark.parametrize("step", [4, 1, 1e-3, 1e-6])
@pytest.mark.parametrize("hidden", [(25, 25), (16, 7), (50, 33)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["", "pre0"])
def test_hypernet_drift_of_elu_in_float32(implementation, hidden, step, given):
    """Rows of several vectors and of less than one; pre-activations far below 0 and above, crossing either way."""
    shape = (3, 500, 50, 3, 2, hidden)
    args = arguments(shape, ACTIVATIONS["elu"], torch.float32, step)
    args["pre0"] = args["pre0"] if given else []
    weight, width = torch.ones(shape[0]), args["theta"][-1].shape[1]
    gram0 = torch.empty(0, width, width, dtype=torch.float64)
    value, grad_embeddings, grad_theta = implementation.hypernet_drift_fwd(*raw_arguments(args, weight, gram0))
    want_value, want_grads = oracle_value_and_grads(shape, ACTIVATIONS["elu"], args, weight)
    for have, want in zip([value, *grad_theta, grad_embeddings], [want_value, *want_grads], strict=True):
        assert oracle.relative_error(have, want) < 3e-6


@all_activations
@pytest.mark.parametrize("stored", [0, 1, 2])
def test_hypernet_drift_makes_again_what_is_not_stored(implementation, activation, stored, dtype):
    """Pre-activations of the last layers are given, those of layers before them are not."""
    shape = (3, 83, 20, 3, 2, (6, 9, 4))
    args = arguments(shape, activation, dtype)
    args["pre0"] = args["pre0"][2 - stored :]
    weight, width = torch.ones(shape[0], dtype=dtype), args["theta"][-1].shape[1]
    no_gram0 = torch.empty(0, width, width, dtype=torch.float64)
    value, grad_embeddings, grad_theta = implementation.hypernet_drift_fwd(*raw_arguments(args, weight, no_gram0))
    want_value, want_grads = oracle_value_and_grads(shape, activation, args, weight)
    for have, want in zip([value, *grad_theta, grad_embeddings], [want_value, *want_grads], strict=True):
        assert oracle.relative_error(have, want) < TOL["drift", dtype]


@pytest.mark.parametrize("name", ["two-layers", "linear", "full"])
def test_hypernet_drift_gradcheck(name):
    args = arguments(SHAPES[name], ACTIVATIONS["elu"])
    theta, embeddings = [p.requires_grad_() for p in args["theta"]], args["embeddings"].requires_grad_()

    def function(embeddings, *theta):
        return ops.hypernet_drift(**{**args, "theta": theta, "embeddings": embeddings})

    assert torch.autograd.gradcheck(function, (embeddings, *theta))


@all_shapes
def test_hypernet_drift_opcheck(shape, dtype):
    args = arguments(shape, ACTIVATIONS["tanh"], dtype)
    width = args["theta"][-1].shape[1]
    raw = raw_arguments(args, torch.ones(shape[0], dtype=dtype), torch.empty(0, width, width, dtype=torch.float64))
    torch.library.opcheck(torch.ops.fasthyper._hypernet_drift_fwd.default, raw)


def test_hypernet_drift_compiles_in_one_graph():
    args = arguments(SHAPES["two-layers"], ACTIVATIONS["relu"])
    leaves = [p.requires_grad_() for p in args["theta"]]
    compiled = torch.compile(ops.hypernet_drift, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(ops.hypernet_drift(**args), leaves)
    for have, wanted in zip(torch.autograd.grad(compiled(**args), leaves), want, strict=True):
        assert oracle.relative_error(have, wanted) < 1e-12


def test_hypernet_drift_strides(implementation):
    args = arguments(SHAPES["two-layers"], ACTIVATIONS["silu"])
    width = args["theta"][-1].shape[1]
    rest = torch.ones(3, dtype=torch.float64), torch.empty(0, width, width, dtype=torch.float64)
    plain = implementation.hypernet_drift_fwd(*raw_arguments(args, *rest))
    for key in ("theta", "theta0", "pre0"):
        args[key] = [torch.stack([t, t], -1)[..., 1] for t in args[key]]
    args["embeddings"] = args["embeddings"].T.contiguous().T
    strided = implementation.hypernet_drift_fwd(*raw_arguments(args, *rest))
    for have, want in zip([*strided[:2], *strided[2]], [*plain[:2], *plain[2]], strict=True):
        assert torch.allclose(have, want, rtol=1e-12)


def test_hypernet_drift_repeats_and_does_not_depend_on_the_number_of_threads():
    args = arguments(SHAPES["tiles"], ACTIVATIONS["elu"])
    threads = torch.get_num_threads()
    results = {}
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results[count] = [ops.hypernet_drift_value_and_grad(**args) for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    flat = {count: [[v, *g, e] for v, g, e in runs] for count, runs in results.items()}
    for first, second in flat.values():
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for one, two in zip(flat[1][0], flat[2][0], strict=True):
        assert oracle.relative_error(two, one) < 1e-13


def test_hypernet_drift_of_layers_without_width_reads_nothing_that_an_earlier_call_left():
    args = arguments(SHAPES["no-width"], ACTIVATIONS["relu"], torch.float32)
    values = set()
    for scale in (1, 1e3, 1e6):
        ops.output_drift(scale * torch.rand(3, 5, 1), torch.rand(6, 2), torch.rand(3, 5, 1), torch.rand(6, 2), args["plan"])
        values.add(ops.hypernet_drift(**args).item())
    (value,) = values
    assert value == pytest.approx(ops.hypernet_drift(**arguments(SHAPES["no-width"], ACTIVATIONS["relu"])).item(), rel=1e-5)


@pytest.mark.skipif(not fh.backends()["cpu"].startswith("cpp"), reason="other kernels take all widths alike")
@pytest.mark.parametrize("hidden", [True, False], ids=["trunk", "no-trunk"])
@pytest.mark.parametrize("given", ["", "gram0 of columns, too"])
def test_hypernet_drift_at_every_width_of_products_in_registers(hidden, given):
    """Up to 71 features, whose columns fill whole vectors or leave some over; and the next wider ones."""
    for width in range(1, 74):
        shape = (3, 7 * 130 - 5, 130, width - width // 2, width // 2, (3, width) if hidden else ())
        args = arguments(shape, ACTIVATIONS["elu"], torch.float32, form="gram")
        weight, gram0 = torch.full((3,), 1 / 3), None
        if given:
            h0 = run_trunk(args["theta0"], args["embeddings0"], ACTIVATIONS["elu"]).features
            of_rows = reference.gram0(h0, weight, args["plan"])
            gram0 = torch.cat([of_rows, reference.basis_gram0(args["theta0"][-1], args["plan"])])
        value, grads, grad_embeddings = ops.hypernet_drift_value_and_grad(**args, weight=weight, gram0=gram0)
        want_value, want_grads = oracle_value_and_grads(shape, ACTIVATIONS["elu"], args, weight)
        for have, want in zip([value, *grads, grad_embeddings], [want_value, *want_grads], strict=True):
            assert oracle.relative_error(have, want) < 1e-5, width


def test_hypernet_drift_without_a_trunk_reads_no_gram_matrix_of_rows(implementation, dtype):
    shape = SHAPES["linear"]
    args = arguments(shape, ACTIVATIONS["relu"], dtype, form="gram")
    weight, of_columns = torch.ones(shape[0], dtype=dtype), reference.basis_gram0(args["theta0"][-1], args["plan"])
    unread = torch.full((len(args["plan"]), *of_columns.shape[1:]), torch.nan, dtype=torch.float64)
    raw = raw_arguments(args, weight, torch.cat([unread, of_columns]))
    value, grad_embeddings, grad_theta = implementation.hypernet_drift_fwd(*raw)
    want_value, want_grads = oracle_value_and_grads(shape, ACTIVATIONS["relu"], args, weight)
    for have, want in zip([value, *grad_theta, grad_embeddings], [want_value, *want_grads], strict=True):
        assert oracle.relative_error(have, want) < TOL["drift", dtype]


def test_hypernet_drift_names_what_is_wrong():
    args = arguments(SHAPES["two-layers"], ACTIVATIONS["elu"])
    for changed, error, message in (
        ({"theta": args["theta"][1:]}, ValueError, "need 2 tensors and 2 per layer each, got 5"),
        ({"embeddings": args["embeddings"][:2]}, ValueError, r"embeddings0 must have shape \[2, 3\], got \[3, 3\]"),
        ({"pre0": 2 * args["pre0"]}, ValueError, "pre0 may hold 1 pre-activations of 2 layers, got 2"),
        ({"pre0": [args["pre0"][0].mT]}, ValueError, r"pre0\[0\] must have shape \[3, 5, 4\], got \[3, 4, 5\]"),
        ({"theta0": [t.float() for t in args["theta0"]]}, TypeError, r"theta0\[0\] is torch.float32"),
        ({"plan": args["plan"].int()}, TypeError, "plan must be int64 on the CPU"),
        ({"weight": torch.ones(2, dtype=torch.float64)}, ValueError, r"weight must have shape \[3\], got \[2\]"),
        ({"gram0": torch.ones(1, 5, 5, dtype=torch.float64)}, ValueError, r"gram0 must have shape \[2, 5, 5\]"),
        ({"gram0": torch.ones(2, 5, 5)}, TypeError, "gram0 must be float64 on cpu, got torch.float32"),
    ):
        with pytest.raises(error, match=message):
            ops.hypernet_drift(**{**args, **changed})


@pytest.mark.skipif(not fh.backends()["cpu"].startswith("cpp"), reason="other kernels do not read them")
def test_hypernet_drift_names_how_many_gram_matrices_there_may_be():
    args, gram0 = arguments(SHAPES["two-layers"], ACTIVATIONS["elu"]), torch.ones(4, 5, 5, dtype=torch.float64)
    for count in (3, 5):
        with pytest.raises(RuntimeError, match=f"gram0 holds {count} matrices, neither 2 of rectangles nor these and 2 of"):
            ops.hypernet_drift(**args, gram0=gram0[:1].expand(count, 5, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_hypernet_drift_of_elu_from_far_below(implementation, dtype):
    """Pre-activations rise from hundreds below 0 to about 0: exp of where they start is next to nothing."""
    shape = (2, 3, 20, 3, 2, (17, 18))
    args = arguments(shape, ACTIVATIONS["elu"], dtype)
    for start in (-30.0, -50, -300, -650, -1000):
        for key, bias in (("theta", 0), ("theta0", start)):
            args[key] = [p.detach() if i != 4 else torch.full_like(p, bias) for i, p in enumerate(args[key])]
        args["pre0"] = run_trunk(args["theta0"], args["embeddings0"], ACTIVATIONS["elu"]).pre[1:]
        weight, width = torch.ones(2, dtype=dtype), args["theta"][-1].shape[1]
        gram0 = torch.empty(0, width, width, dtype=torch.float64)
        value, grad_embeddings, grad_theta = implementation.hypernet_drift_fwd(*raw_arguments(args, weight, gram0))
        want_value, want_grads = oracle_value_and_grads(shape, ACTIVATIONS["elu"], args, weight)
        for have, want in zip([value, *grad_theta, grad_embeddings], [want_value, *want_grads], strict=True):
            assert oracle.relative_error(have, want) < {torch.float64: 1e-12, torch.float32: 1e-4}[dtype], start


def test_elu_from_far_below():
    """Where exp(a0) is 0 and expm1 of the way up is infinite; and where it is rounded by thousands."""
    a0 = torch.tensor([-1000.0, -1000.0, -200.0, -1.0, -7682217984.0])
    da = torch.tensor([2000.0, 500.0, 199.0, 1.5, 57046220800.0])
    dx, slope = ACTIVATIONS["elu"].drift(a0, da)
    want = torch.nn.functional.elu(a0.double() + da) - torch.nn.functional.elu(a0.double())
    assert oracle.relative_error(dx, want) < 1e-6 and slope.isfinite().all()
