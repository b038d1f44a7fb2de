"""generate against the oracle: weights, gradients, views, contracts of the op, bad input."""

import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
from conftest import TOL

from fasthyper import ops

# chunks, chunk size, features, target weights
SHAPES = {
    "tail": (4, 6, 3, 20),
    "divisible": (4, 6, 3, 24),
    "one-chunk": (1, 9, 5, 9),
    "chunk-larger-than-target": (1, 9, 5, 4),
    "chunks-of-one": (3, 1, 1, 3),
}


def inputs(chunks, chunk_size, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(chunks, width, generator=generator, dtype=torch.float64)
    return h.to(dtype), torch.randn(chunk_size, width + 1, generator=generator, dtype=torch.float64).to(dtype)


# over a tile of columns, and each number of vectors a row of the basis has, in blocks of chunks of several sizes
@hypothesis.example(chunk_size=131, width=15, weights=131 * 13)
@hypothesis.example(chunk_size=260, width=16, weights=260 * 4 - 7)
@hypothesis.example(chunk_size=131, width=25, weights=131 * 29 - 50)
@hypothesis.example(chunk_size=131, width=40, weights=131 * 9)
@hypothesis.example(chunk_size=131, width=63, weights=131 * 7)
@hypothesis.given(chunk_size=st.integers(1, 40), width=st.integers(1, 9), weights=st.integers(1, 90))
def test_generate_forward_backward(implementation, dtype, chunk_size, width, weights):
    h, basis = inputs(-(-weights // chunk_size), chunk_size, width, dtype)
    grad, cut = torch.linspace(-1, 2, weights, dtype=dtype), weights // 3
    h64, basis64 = h.double().requires_grad_(), basis.double().requires_grad_()
    want = oracle.all_weights(h64, basis64, weights)
    want_grads = torch.autograd.grad(want, [h64, basis64], grad.double())
    magnitudes = h64.detach().abs().requires_grad_(), basis64.detach().abs().requires_grad_()
    scale = oracle.all_weights(*magnitudes, weights)
    scales = torch.autograd.grad(scale, magnitudes, grad.double().abs())
    found = implementation.generate_fwd(h, basis, weights)
    assert found.shape == (weights,) and found.dtype == dtype and found.is_contiguous()
    assert oracle.relative_error(found, want.detach(), scale.detach()) < TOL["generate", dtype]
    for have, wanted, scale in zip(
        implementation.generate_bwd([grad[:cut], grad[cut:]], h, basis), want_grads, scales, strict=True
    ):
        assert oracle.relative_error(have, wanted, scale) < TOL["generate", dtype]


@pytest.mark.parametrize("name", SHAPES)
def test_generate_gives_views_of_one_buffer(name):
    chunks, chunk_size, width, weights = SHAPES[name]
    h, basis = inputs(chunks, chunk_size, width)
    shapes = [(1,), (weights - 2, 1), (1, 1)] if weights > 2 else [(weights,)]
    parts = ops.generate(h, basis, shapes)
    assert [tuple(part.shape) for part in parts] == shapes
    assert torch.cat([part.flatten() for part in parts]).equal(ops.generate(h, basis, [(weights,)])[0])
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


def test_generate_gathers_gradients_also_expanded_and_missing():
    h, basis = (t.requires_grad_() for t in inputs(4, 6, 3))
    first, _unused, last = ops.generate(h, basis, [(2, 5), (4,), (3, 2)])
    loss = first.sum() + (last.T * torch.arange(3)).sum()  # sum's gradient is expanded, that of a transpose strided
    grads = torch.autograd.grad(loss, [h, basis])
    flat = oracle.all_weights(h, basis, 20)
    want = torch.autograd.grad(flat[:10].sum() + (flat[14:].view(3, 2).T * torch.arange(3)).sum(), [h, basis])
    for have, wanted in zip(grads, want, strict=True):
        assert oracle.relative_error(have, wanted) < 1e-12


def test_generate_blocks_are_what_each_makes_alone():
    h, basis = (t.requires_grad_() for t in inputs(5, 6, 3))
    blocks = [((0, 2), (0, 6), [(4, 3)]), ((2, 5), (0, 4), [(2, 2), (7,)]), ((2, 4), (4, 6), [(3,)])]
    found = ops.generate_blocks(h, basis, blocks)
    alone = [ops.generate(h[slice(*n)], basis[slice(*s)], shapes) for n, s, shapes in blocks]
    wanted = [part for parts in alone for part in parts]

    def loss(parts):
        return sum((part**2).sum() for part in (parts[0], *parts[2:]))

    grads, wanted_grads = (torch.autograd.grad(loss(parts), [h, basis]) for parts in (found, wanted))
    for have, want in zip([*found, *grads], [*wanted, *wanted_grads], strict=True):
        assert have.shape == want.shape and oracle.relative_error(have.detach(), want.detach()) < 1e-12


def test_generate_gradcheck():
    leaves = tuple(t.requires_grad_() for t in inputs(4, 6, 3))
    assert torch.autograd.gradcheck(lambda h, basis: ops.generate(h, basis, [(2, 5), (4,), (3, 2)]), leaves)


@pytest.mark.parametrize("name", SHAPES)
def test_generate_opcheck(name, dtype):
    chunks, chunk_size, width, weights = SHAPES[name]
    h, basis = inputs(chunks, chunk_size, width, dtype)
    torch.library.opcheck(torch.ops.fasthyper._generate_fwd.default, (h, basis, weights))
    torch.library.opcheck(torch.ops.fasthyper._generate_bwd.default, ([torch.ones(weights, dtype=dtype)], h, basis))


def test_generate_compiles_in_one_graph():
    def loss(h, basis):
        first, second = ops.generate(h, basis, [(2, 5), (10,)])
        return (first.sin().sum() * second).sum()

    leaves = [t.requires_grad_() for t in inputs(4, 6, 3)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for have, wanted in zip(found, want, strict=True):
        assert oracle.relative_error(have, wanted) < 1e-12


def test_generate_strides(implementation):
    h, basis = inputs(4, 6, 3)
    strided_h, strided_basis = h.T.contiguous().T, torch.stack([basis, basis], -1)[..., 0]
    assert implementation.generate_fwd(strided_h, strided_basis, 20).allclose(implementation.generate_fwd(h, basis, 20))
    grad = torch.ones(1, dtype=torch.float64).expand(20)
    for have, want in zip(
        implementation.generate_bwd([grad], strided_h, strided_basis),
        implementation.generate_bwd([torch.ones(20, dtype=torch.float64)], h, basis),
        strict=True,
    ):
        assert have.allclose(want)


def test_generate_names_what_is_wrong():
    h, basis = inputs(4, 6, 3)
    with pytest.raises(ValueError, match="30 target weights in chunks of 6 need 5 chunks, got features of 4"):
        ops.generate(h, basis, [(30,)])
    with pytest.raises(ValueError, match=r"generate: basis must have shape \[S, 4\], got \[6, 3\]"):
        ops.generate(h, basis[:, :3], [(20,)])
    with pytest.raises(ValueError, match="generate: basis must have at least one row"):
        ops.generate(h, basis[:0], [(20,)])
    with pytest.raises(TypeError, match="basis is torch.float32, h is torch.float64"):
        ops.generate(h, basis.float(), [(20,)])
    assert ops.generate(h.bfloat16(), basis.bfloat16(), [(20,)])[0].dtype == torch.float32
