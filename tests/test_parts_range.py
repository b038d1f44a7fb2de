"""float16 parts hold what float32 holds: the drift of trunks whose numbers are huge or tiny, as Triton makes it."""

import importlib.util
import os
from itertools import pairwise

import oracle
import pytest
import torch
from conftest import TOL

from fasthyper import reference
from fasthyper.activations import ACTIVATIONS
from fasthyper.trunk import run_trunk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs Triton and TRITON_INTERPRET=1, or a CUDA device", allow_module_level=True)
pytestmark = [] if INTERPRETED else pytest.mark.gpu

from fasthyper.kernels import IMPLEMENTATIONS  # noqa: E402

TASKS, CHUNKS, CHUNK_SIZE, DIMS = 7, 5, 40, (7, 20, 30, 24)  # embeddings of 4 and 3 numbers, then layers
SIZES = {  # of embeddings, and of each layer's weights
    "plain": (1, 1, 1, 1),
    "tiny, then huge": (1e-6, 1e-5, 1e8, 1),
    "huge, then tiny": (1e5, 1e4, 1e-8, 1e-6),
    "tiny features": (1, 1, 1e-4, 1e-7),
    "huge features": (1, 1, 1e4, 1e6),
    "nothing but biases": (0, 1, 1, 1),
}


def state(sizes, step, dtype):
    """theta, theta0 and embeddings, in float32 as they are given to kernels."""
    generator = torch.Generator().manual_seed(3)

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    embedding, *layers = sizes
    theta0 = [embedding * random(CHUNKS, 3)]
    for size, (i, o) in zip(layers, pairwise(DIMS), strict=True):
        theta0 += [size * random(o, i) / i**0.5, size * random(o) / 3]
    theta0.append(random(CHUNK_SIZE, DIMS[-1] + 1) / 5)
    theta = [p + step * p.abs().mean() * random(*p.shape) for p in theta0]
    embeddings = embedding * random(TASKS, 4)
    return *([t.float().to(DEVICE, dtype) for t in ts] for ts in (theta, theta0)), embeddings.float().to(DEVICE, dtype)


def drift(run, sizes, step, dtype, activation):
    theta, theta0, embeddings = state(sizes, step, dtype)
    weight = torch.linspace(0.5, 2, TASKS).to(DEVICE, dtype)
    plan = torch.tensor([[0, -1, 0, CHUNKS, 0, CHUNK_SIZE, 0]])
    no_gram0 = torch.empty(0, DIMS[-1] + 1, DIMS[-1] + 1, dtype=torch.float64, device=DEVICE)
    return run(theta, theta0, embeddings, embeddings, [], no_gram0, weight, plan, activation)


@pytest.mark.parametrize("step", [1, 1e-3, 1e-6])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("activation", ["relu", "elu", "sigmoid"])
def test_the_drift_keeps_its_digits_whatever_the_size_of_its_numbers(activation, sizes, step):
    code = ACTIVATIONS[activation].code
    value, grad_e, grads = drift(IMPLEMENTATIONS["hypernet_drift_fwd"], sizes, step, torch.float32, code)
    want, want_e, want_grads = drift(reference.hypernet_drift_fwd, sizes, step, torch.float64, code)
    _, plain_e, plain_grads = drift(reference.hypernet_drift_fwd, sizes, step, torch.float32, code)
    assert oracle.relative_error(value, want) < TOL["drift", torch.float32]
    for have, plain, wanted in zip([grad_e, *grads], [plain_e, *plain_grads], [want_e, *want_grads], strict=True):
        assert have.isfinite().all()
        if wanted.any():
            own = oracle.relative_error(plain, wanted)  # of float32 itself, where differences cancel
            assert oracle.relative_error(have, wanted) < max(TOL["drift", torch.float32], 4 * own)


def test_pre_activations_may_lie_in_padded_rows_chunk_by_chunk():
    theta, theta0, embeddings = state(SIZES["plain"], 0.1, torch.float32)
    pre0 = run_trunk(theta0, embeddings, ACTIVATIONS["relu"]).pre[1:]
    plan = torch.tensor([[0, -1, 0, CHUNKS, 0, CHUNK_SIZE, 0]])
    weight, no_gram0 = torch.ones(TASKS, device=DEVICE), torch.empty(0, 25, 25, dtype=torch.float64, device=DEVICE)

    def padded(pre):
        room = torch.full((CHUNKS, TASKS, 32), torch.nan, device=DEVICE).transpose(0, 1)[..., : pre.shape[2]]
        return room.copy_(pre)

    run = IMPLEMENTATIONS["hypernet_drift_fwd"]
    found, want = (
        run(theta, theta0, embeddings, embeddings, pre, no_gram0, weight, plan, 0) for pre in (list(map(padded, pre0)), pre0)
    )
    assert found[0].equal(want[0]) and found[1].equal(want[1])
    assert all(have.equal(wanted) for have, wanted in zip(found[2], want[2], strict=True))


def test_what_is_not_finite_stays_so():
    sizes = list(SIZES["plain"])
    theta, theta0, embeddings = state(sizes, 0.1, torch.float32)
    theta[3][0, 0] = torch.inf
    plan = torch.tensor([[0, -1, 0, CHUNKS, 0, CHUNK_SIZE, 0]])
    weight, no_gram0 = torch.ones(TASKS, device=DEVICE), torch.empty(0, 25, 25, dtype=torch.float64, device=DEVICE)
    run = IMPLEMENTATIONS["hypernet_drift_fwd"]
    value, _, _ = run(theta, theta0, embeddings, embeddings, [], no_gram0, weight, plan, 0)
    assert not value.isfinite()
