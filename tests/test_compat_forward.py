"""hypnettorch's hypernetworks under ``accelerate()``: the same weights, gradients, random numbers and statistics as without."""

import copy

import oracle
import pytest
import torch

pytest.importorskip("hypnettorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # hypnettorch's own

from fasthyper.compat.hypnettorch import accelerate, calls  # noqa: E402

SHAPES = [[7, 5], [7], [3, 7], [3], [2, 3, 2, 2]]
NUM_WEIGHTS = 35 + 7 + 21 + 3 + 24
TASKS = 4


def make(chunk_size=None, **options):
    from hypnettorch.hnets import HMLP, ChunkedHMLP

    torch.manual_seed(0)
    options = {"layers": (9, 8), "cond_in_size": 6, "num_cond_embs": TASKS, "verbose": False, **options}
    if chunk_size is None:
        return HMLP(SHAPES, **options).double()
    return ChunkedHMLP(SHAPES, chunk_size, chunk_emb_size=4, **options).double()


def flat(weights):
    """Whatever forward returns, as one list of tensors."""
    return [weights] if isinstance(weights, torch.Tensor) else [t for part in weights for t in flat(part)]


def run(hnet, inputs=(), **arguments):
    """What forward returns, and the gradients of a sum that weighs every element differently."""
    torch.manual_seed(1)
    weights = hnet.forward(**arguments)
    generator = torch.Generator().manual_seed(2)
    factors = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in flat(weights)]
    loss = sum((w.square() * f).sum() for w, f in zip(flat(weights), factors, strict=True))
    wanted = [p for p in [*hnet.parameters(), *inputs] if p.requires_grad]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return weights, grads, [*hnet.buffers(), torch.rand(3)]


def assert_same(have, want):
    assert type(have) is type(want)
    if isinstance(have, (list, tuple)):
        assert len(have) == len(want)
        for h, w in zip(have, want, strict=True):
            assert_same(h, w)
    elif want is not None:
        assert (have.shape, have.dtype, have.requires_grad) == (want.shape, want.dtype, want.requires_grad)
        assert oracle.relative_error(have.detach(), want.detach()) < 1e-12 or torch.equal(have, want)


def check(hnet, inputs=(), **arguments):
    other = copy.deepcopy(hnet)
    want = run(other, inputs, **arguments)
    calls.reset()
    with accelerate():
        have = run(hnet, inputs, **arguments)
    assert_same(have, want)
    name = type(hnet).__mro__[-4 if type(hnet).__mro__[0].__module__.startswith("hypnettorch") else -5].__name__ or ""
    assert name and not any(path == calls.GENERAL for _, path in calls.summary())
    assert any(path == calls.FAST for _, path in calls.summary())
