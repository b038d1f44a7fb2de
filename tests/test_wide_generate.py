"""Generation from wide features as Triton makes it, against the reference in float64: tails, parts, ranges of magnitude."""

import importlib.util
import os

import hypothesis
import hypothesis.strategies as st
import oracle
import pytest
import torch
from conftest import TOL

from fasthyper import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs Triton and TRITON_INTERPRET=1, or a CUDA device", allow_module_level=True)
pytestmark = [] if INTERPRETED else pytest.mark.gpu

from fasthyper.kernels import generate  # noqa: E402


def inputs(chunks, chunk_size, width, weights, h_size=1.0, grad_size=1.0):
    generator = torch.Generator().manual_seed(chunks * width + weights)
    h, basis, grad = (
        torch.randn(size, generator=generator).to(DEVICE) for size in ((chunks, width), (chunk_size, width + 1), (weights,))
    )
    return h_size * h, basis, grad_size * grad


def check(h, basis, grad, parts=1):
    """Of each number, relative to the sum of what is added up in it."""
    grads, weights = grad.tensor_split(parts), len(grad)
    found = generate.generate_fwd(h, basis, weights), *generate.generate_bwd(grads, h, basis)
    exact = [t.double() for t in (h, basis, grad)]
    whole, sizes = ((t[0], t[1], [t[2]]) for t in (exact, [t.abs() for t in exact]))
    for have, want, size in zip(found, *(_both(*t, weights) for t in (whole, sizes)), strict=True):
        assert have.dtype == torch.float32 and have.shape == want.shape and have.is_contiguous()
        assert oracle.relative_error(have, want, size) < TOL["generate", torch.float32]


def _both(h, basis, grads, weights):
    return reference.generate_fwd(h, basis, weights), *reference.generate_bwd(grads, h, basis)


@hypothesis.given(
    chunks=st.integers(1, 70),
    chunk_size=st.integers(1, 80),
    width=st.integers(1, 90),
    missing=st.floats(0, 1, exclude_max=True),
    parts=st.integers(1, 3),
)
def test_generates_over_random_shapes(chunks, chunk_size, width, missing, parts):
    check(*inputs(chunks, chunk_size, width, chunks * chunk_size - int(missing * chunk_size)), parts)


@pytest.mark.parametrize("h_size, grad_size", [(1e-9, 1e-12), (1e6, 1e8), (1.0, 1e-30), (0.0, 0.0)])
def test_generates_of_any_magnitude(h_size, grad_size):
    check(*inputs(5, 40, 70, 190, h_size, grad_size))


def test_what_is_not_finite_stays_so():
    h, basis, grad = inputs(3, 20, 64, 55)
    h[1, 2], grad[7] = torch.inf, torch.nan
    assert not generate.generate_fwd(h, basis, 55)[20:40].isfinite().any()
    assert not all(t.isfinite().all() for t in generate.generate_bwd([grad], h, basis))
