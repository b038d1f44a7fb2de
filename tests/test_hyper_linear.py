"""hyper_linear against the oracle in both orders: outputs, gradients, tiles, contracts, bad input; the planner's pick."""

import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import TOL

from fasthyper import ops
from fasthyper.planner import factorises, linear_costs

# batch, inputs, rows in a chunk, features, outputs
SHAPES = {
    "tail": (3, 5, 4, 3, 11),
    "whole-chunks": (3, 5, 4, 3, 12),
    "one-chunk": (2, 4, 3, 5, 2),
    "one-row-in-a-chunk": (2, 4, 1, 5, 3),
    "one-of-everything": (1, 1, 1, 1, 1),
    "empty-batch": (0, 5, 4, 3, 11),
    "many-slots": (2, 30, 1000, 2, 20_500),  # more than one tile of whole slots
    "blocks": (70, 70, 5, 70, 340),  # a GPU's blocks of examples, inputs, slots, features and chunks, more than one of each
    "few-features": (70, 70, 5, 20, 338),  # more than one panel, or block, of all but features
    "many-inputs": (37, 2100, 2, 5, 39),  # more than one tile of a slot's inputs
    "large-slots": (2, 500, 2, 2, 1101),  # a slot's weights do not fit one tile
}
LARGE = ("blocks", "few-features", "many-inputs")
orders = pytest.mark.parametrize("factorised", [False, True], ids=["generated", "factorised"])


def inputs(batch, num_inputs, rows, width, num_outputs, dtype=torch.float64, unused=0):
    """x, h, basis; with some columns of the basis that are not used"""
    generator = torch.Generator().manual_seed(1)
    shapes = (batch, num_inputs), (-(-num_outputs // rows), width), (rows * num_inputs + unused, width + 1)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def slow(x, h, basis, rows, num_outputs):
    """The weight, chunk by chunk, then F.linear."""
    weight = [(basis[:, :-1] @ row + basis[:, -1])[: rows * x.shape[1]].view(rows, x.shape[1]) for row in h]
    return F.linear(x, torch.cat(weight)[:num_outputs])


def assert_forward_and_backward(implementation, dtype, shape, factorised, needs_x=True, unused=0):
    leaves, rows, num_outputs = inputs(*shape, dtype, unused), shape[2], shape[-1]
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(shape[0], num_outputs, generator=generator, dtype=torch.float64).to(dtype)
    exact = [t.double().requires_grad_() for t in leaves]
    want = slow(*exact, rows, num_outputs)
    wanted = torch.autograd.grad(want, exact, grad.double())
    magnitudes = [t.detach().abs().requires_grad_() for t in exact]
    scale = slow(*magnitudes, rows, num_outputs)
    scales = torch.autograd.grad(scale, magnitudes, grad.double().abs())
    y, u = implementation.hyper_linear_fwd(*leaves, rows, num_outputs, factorised)
    assert y.shape == want.shape and y.dtype == dtype and y.is_contiguous()
    assert len(u) == (len(y) if factorised else 0)
    assert oracle.relative_error(y, want.detach(), scale.detach()) < TOL["hyper_linear", dtype]
    found = implementation.hyper_linear_bwd(grad, *leaves, u, rows, factorised, needs_x)
    assert len(found[0]) == (len(y) if needs_x else 0)
    for have, want, scale in list(zip(found, wanted, scales, strict=True))[0 if needs_x else 1 :]:
        assert have.shape == want.shape
        assert oracle.relative_error(have, want, scale) < TOL["hyper_linear", dtype]


@orders
@hypothesis.given(
    batch=st.integers(1, 5),
    num_inputs=st.integers(1, 9),
    rows=st.integers(1, 6),
    width=st.integers(1, 7),
    num_outputs=st.integers(1, 40),
    needs_x=st.booleans(),
    unused=st.integers(0, 5),
)
def test_hyper_linear_over_random_shapes(
    implementation, dtype, factorised, batch, num_inputs, rows, width, num_outputs, needs_x, unused
):
    shape = batch, num_inputs, rows, width, num_outputs
    assert_forward_and_backward(implementation, dtype, shape, factorised, needs_x, unused)


@orders
@pytest.mark.parametrize("name", [name for name in SHAPES if name not in LARGE])
def test_hyper_linear_forward_backward(implementation, factorised, name):
    assert_forward_and_backward(implementation, torch.float64, SHAPES[name], factorised)


@orders
@pytest.mark.parametrize("name", LARGE)
def test_hyper_linear_in_either_dtype(implementation, dtype, factorised, name):
    assert_forward_and_backward(implementation, dtype, SHAPES[name], factorised)


@orders
@pytest.mark.parametrize("name", ["tail", "one-chunk", "one-row-in-a-chunk"])
def test_hyper_linear_gradcheck(factorised, name):
    leaves = [t.requires_grad_() for t in inputs(*SHAPES[name], unused=2)]
    settings = {"rows": SHAPES[name][2], "num_outputs": SHAPES[name][-1], "factorised": factorised}
    assert torch.autograd.gradcheck(lambda *t: ops.hyper_linear(*t, **settings), leaves)


@orders
@pytest.mark.parametrize("name", ["tail", "whole-chunks", "one-of-everything"])
def test_hyper_linear_opcheck(factorised, name, dtype):
    leaves, (*_, rows, _, num_outputs) = inputs(*SHAPES[name], dtype), SHAPES[name]
    torch.library.opcheck(torch.ops.fasthyper._hyper_linear_fwd.default, (*leaves, rows, num_outputs, factorised))
    _, u = torch.ops.fasthyper._hyper_linear_fwd(*leaves, rows, num_outputs, factorised)
    grad = torch.ones(len(leaves[0]), num_outputs, dtype=dtype)
    for needs_x in (True, False):
        torch.library.opcheck(torch.ops.fasthyper._hyper_linear_bwd.default, (grad, *leaves, u, rows, factorised, needs_x))


@orders
def test_hyper_linear_compiles_in_one_graph(factorised):
    def loss(x, h, basis):
        return ops.hyper_linear(x.sin(), h, basis, rows=4, num_outputs=11, factorised=factorised).square().sum()

    leaves = [t.requires_grad_() for t in inputs(*SHAPES["tail"])]
    want = torch.autograd.grad(loss(*leaves), leaves)
    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for have, wanted in zip(found, want, strict=True):
        assert oracle.relative_error(have, wanted) < 1e-12


@orders
def test_hyper_linear_strides_and_an_expanded_gradient(implementation, factorised):
    leaves = inputs(*SHAPES["tail"])
    strided = [torch.stack([t, t], -1)[..., 0] for t in leaves[:2]] + [leaves[2].T.contiguous().T]
    grad = torch.ones(1, dtype=torch.float64).expand(3, 11)
    y, u = implementation.hyper_linear_fwd(*leaves, 4, 11, factorised)
    have_y, have_u = implementation.hyper_linear_fwd(*strided, 4, 11, factorised)
    assert have_y.allclose(y)
    found = implementation.hyper_linear_bwd(grad, *strided, have_u, 4, factorised, True)
    for have, want in zip(
        found, implementation.hyper_linear_bwd(grad.contiguous(), *leaves, u, 4, factorised, True), strict=True
    ):
        assert have.allclose(want)


@orders
def test_hyper_linear_makes_no_gradient_of_x_where_none_is_needed(factorised):
    x, h, basis = inputs(*SHAPES["tail"])
    h.requires_grad_(), basis.requires_grad_()
    found = torch.autograd.grad(
        ops.hyper_linear(x, h, basis, rows=4, num_outputs=11, factorised=factorised).sum(), [h, basis]
    )
    wanted = torch.autograd.grad(slow(x, h, basis, 4, 11).sum(), [h, basis])
    for have, want in zip(found, wanted, strict=True):
        assert oracle.relative_error(have, want) < 1e-12


def test_hyper_linear_names_what_is_wrong():
    x, h, basis = inputs(*SHAPES["tail"])
    sizes = {"rows": 4, "num_outputs": 11}
    with pytest.raises(ValueError, match="5 rows of 5 inputs do not fit a basis of 20 columns"):
        ops.hyper_linear(x, h, basis, rows=5, num_outputs=11)
    with pytest.raises(ValueError, match="4 rows of 0 inputs do not fit"):
        ops.hyper_linear(x[:, :0], h, basis, **sizes)
    with pytest.raises(ValueError, match="0 chunks of 4 rows do not make exactly 0 outputs"):
        ops.hyper_linear(x, h[:0], basis, rows=4, num_outputs=0)
    for wrong in (8, 13):
        with pytest.raises(ValueError, match=f"3 chunks of 4 rows do not make exactly {wrong} outputs"):
            ops.hyper_linear(x, h, basis, rows=4, num_outputs=wrong)
    with pytest.raises(ValueError, match=r"hyper_linear: basis must have shape \[S, 4\], got \[20, 3\]"):
        ops.hyper_linear(x, h, basis[:, :3], **sizes)
    with pytest.raises(TypeError, match="h is torch.float32, x is torch.float64"):
        ops.hyper_linear(x, h.float(), basis, **sizes)
    assert ops.hyper_linear(x.bfloat16(), h.bfloat16(), basis.bfloat16(), **sizes).dtype == torch.float32


def test_planner_counts_the_products_of_either_order():
    """Shapes of the products as the equations have them, counted one by one."""
    b, i, r, n, k = 3, 5, 4, 2, 7
    w, u = (n, r * i, k), (b, r * k, i)  # W = Ha V', u = x V: outputs' sizes and what is summed over
    y = (b, n * r, i)

    def count(*products):
        return sum(m * n * k for m, n, k in products)

    generated, factorised = linear_costs(b, i, r, n, k)
    assert generated == (count(w, y), count((n * r, i, b), (n, k, r * i), (r * i, k, n)), count(w, (b, i, n * r)))
    outer = (b * r, k, n)
    assert factorised == (count(u, (b * r, n, k)), count(outer, (n, k, b * r), (i, r * k, b)), count((b, i, r * k)))


def test_planner_takes_the_cheaper_order_on_either_side_of_its_crossover():
    shape = {"inputs": 1000, "rows": 7, "width": 100, "with_grad": False, "with_grad_x": False}
    batch = 128  # forward: (K + B) N I against B K (I + N), for I = 1000 equal at N = 59.8...
    first = next(n for n in range(1, 1000) if factorises(batch, chunks=n, **shape))
    cost = {n: linear_costs(batch, 1000, 7, n, 101) for n in (first - 1, first)}
    assert cost[first][1][0] < cost[first][0][0] and cost[first - 1][1][0] >= cost[first - 1][0][0]
    assert not factorises(batch, chunks=first - 1, **shape)


def test_planner_counts_only_what_will_be_done():
    wide = {"batch": 128, "inputs": 1024, "rows": 7, "chunks": 142, "width": 350}
    narrow = {"batch": 128, "inputs": 1024, "rows": 76, "chunks": 13, "width": 25}
    for steps in ((False, False), (True, False), (True, True)):
        assert factorises(**wide, with_grad=steps[0], with_grad_x=steps[1])
        assert not factorises(**narrow, with_grad=steps[0], with_grad_x=steps[1])
    between = {"batch": 128, "inputs": 1000, "rows": 7, "width": 350}
    picks = {
        steps: [factorises(**between, chunks=n, with_grad=steps[0], with_grad_x=steps[1]) for n in range(1, 200)].index(True)
        for steps in ((False, False), (True, False))
    }
    assert picks[True, False] < picks[False, False]  # backward gains more by it than forward
