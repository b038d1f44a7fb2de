"""hypnettorch's hypernetworks under ``accelerate()``: weights, gradients, random numbers and statistics as without it."""

import copy

import oracle
import pytest
import torch

from fasthyper.compat.hypnettorch import accelerate, calls

pytest.importorskip("hypnettorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own, from numpy and matplotlib

from hypnettorch.hnets import HMLP, ChunkedHMLP, HyperNetInterface  # noqa: E402

SHAPES = [[7, 5], [7], [3, 7], [3], [2, 3, 2, 2], []]
CONDS = 4


def make(chunk_size=None, cls=None, **options):
    torch.manual_seed(0)
    options = {"layers": (9, 8), "cond_in_size": 6, "num_cond_embs": CONDS, "verbose": False, **options}
    if chunk_size is None:
        return (cls or HMLP)(SHAPES, **options).double()
    return (cls or ChunkedHMLP)(SHAPES, chunk_size, chunk_emb_size=4, **options).double()


def rand(*shape, requires_grad=True, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def tensors(found):
    """All tensors of what forward returns or is given, in their order."""
    if isinstance(found, torch.Tensor):
        return [found]
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ()
    return [t for part in parts for t in tensors(part)]


def run(hnet, arguments, skipped=()):
    """What forward returns, gradients of a sum that weighs every element in a way of its own, buffers, a random number."""
    torch.manual_seed(1)
    wanted = [p for p in [*hnet.parameters(), *tensors(arguments)] if p.requires_grad]
    found = hnet.forward(**arguments)
    generator = torch.Generator().manual_seed(2)
    used = [w for i, w in enumerate(tensors(found)) if i not in skipped]
    loss = sum((w.square() * torch.randn(w.shape, generator=generator, dtype=w.dtype)).sum() for w in used)
    grads = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else []
    return found, list(grads), list(hnet.buffers()), torch.rand(3)


def assert_same(have, want):
    assert type(have) is type(want)
    if isinstance(have, (list, tuple)):
        assert len(have) == len(want)
        for h, w in zip(have, want, strict=True):
            assert_same(h, w)
    elif want is not None:
        assert (have.shape, have.dtype, have.requires_grad) == (want.shape, want.dtype, want.requires_grad)
        assert torch.equal(have, want) or oracle.relative_error(have.detach().double(), want.detach().double()) < 1e-12


def check(hnet, arguments, path=calls.FAST, **options):
    want = run(copy.deepcopy(hnet), arguments, **options)
    calls.reset()
    with accelerate():
        assert_same(run(hnet, arguments, **options), want)
    ways = {path for (function, path) in calls.summary() if function == f"{base_of(hnet)}.forward"}
    assert ways == {path}


def base_of(hnet):
    return "ChunkedHMLP" if isinstance(hnet, ChunkedHMLP) else "HMLP"


NETS = {
    "plain": {},
    "linear": {"layers": ()},
    "no bias": {"use_bias": False},
    "no activation": {"activation_fn": None},
    "elu": {"activation_fn": torch.nn.ELU()},
    "dropout": {"dropout_rate": 0.3},
    "batch norm": {"use_batch_norm": True},
    "everything": {"use_batch_norm": True, "dropout_rate": 0.5, "use_bias": False, "activation_fn": torch.tanh},
}
CHUNKS = {"full": None, "cut short": 11, "even": 13, "one": 91, "too long": 200}  # of 91 weights


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", NETS.values(), ids=NETS)
@pytest.mark.parametrize("chunk_size", CHUNKS.values(), ids=CHUNKS)
def test_every_network(chunk_size, options, training):
    hnet = make(chunk_size, **options).train(training)
    many, single = {"cond_id": [2, 0, 2]}, {"cond_id": 1}
    if training and options.get("use_batch_norm") and chunk_size not in (11, 13):
        single = {"cond_id": [1, 1]}  # a batch of one has no variance
    for ret_format in ("squeezed", "sequential", "flattened"):
        for arguments in (single, many):
            check(hnet, {**arguments, "ret_format": ret_format})


@pytest.mark.parametrize("chunk_size", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("layers", [(), (9, 8)], ids=["linear", "trunk"])
def test_every_way_to_give_inputs(chunk_size, layers):
    hnet = make(chunk_size, layers=layers)
    check(hnet, {"cond_input": rand(3, 6)})
    check(hnet, {"cond_input": rand(1, 6)})
    check(hnet, {"cond_id": [3]})
    hnet = make(chunk_size, layers=layers, uncond_in_size=5)
    check(hnet, {"cond_id": [0, 1], "uncond_input": rand(2, 5)})
    check(hnet, {"cond_id": 1, "uncond_input": rand(3, 5)})
    check(hnet, {"cond_input": rand(2, 6, seed=5), "uncond_input": rand(1, 5)})
    hnet = make(chunk_size, layers=layers, uncond_in_size=5, cond_in_size=0, num_cond_embs=0)
    check(hnet, {"uncond_input": rand(2, 5)})


@pytest.mark.parametrize("options", [{}, {"use_bias": False}, {"use_batch_norm": True}], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 11])
def test_every_way_to_give_weights(chunk_size, options):
    hnet = make(chunk_size, **options)
    uncond, cond, every = (
        [rand(*p.shape, seed=i) for i, p in enumerate(ps)]
        for ps in (hnet.unconditional_params, hnet.conditional_params, hnet.internal_params)
    )
    for weights in (
        {"uncond_weights": uncond},
        {"cond_weights": cond},
        {"uncond_weights": uncond, "cond_weights": cond},
        every,
    ):
        check(hnet, {"cond_id": [1, 3], "weights": weights})
    outside = {"no_uncond_weights": True, "no_cond_weights": True}
    for empty, inputs in (
        (make(chunk_size, **options, **outside), {"cond_id": [1, 3]}),
        (make(chunk_size, **options, **outside, num_cond_embs=0), {"cond_input": rand(2, 6)}),
    ):
        given = [rand(*shape, seed=i) for i, shape in enumerate(empty.hyper_shapes_learned)]
        check(empty, {**inputs, "weights": given})


@pytest.mark.parametrize("cond_in_size", [0, 6])
@pytest.mark.parametrize("uncond_in_size", [0, 5])
def test_chunk_embeddings_of_each_condition(cond_in_size, uncond_in_size):
    hnet = make(11, cond_chunk_embs=True, cond_in_size=cond_in_size, uncond_in_size=uncond_in_size)
    inputs = {"uncond_input": rand(2, 5)} if uncond_in_size else {}
    check(hnet, {"cond_id": [1, 3], **inputs})
    if not uncond_in_size:
        check(hnet, {"cond_id": 2})
    given = {"chunk_embs": rand(2, 9, 4), "uncond_weights": [rand(*p.shape) for p in hnet.unconditional_params]}
    more = {"cond_input": rand(2, 6)} if cond_in_size else {}
    if cond_in_size or uncond_in_size:
        for keys in (("chunk_embs",), ("chunk_embs", "uncond_weights")):
            weights = {key: given[key] for key in keys}
            want = run(copy.deepcopy(hnet), {**inputs, **more, "weights": dict(weights)})
            with accelerate():
                assert_same(run(hnet, {**inputs, **more, "weights": weights}), want)
            assert set(weights) == set(keys)  # hypnettorch takes a key away from its caller


@pytest.mark.parametrize("chunk_size", [None, 11])
def test_some_weights_unused_frozen_or_without_a_graph(chunk_size):
    hnet = make(chunk_size)
    check(hnet, {"cond_id": [0, 1]}, skipped=(0, 3, 4, 5, 6, 7, 8, 9, 10, 11))
    for parameter in (hnet.internal_params[CONDS + 4], hnet.internal_params[CONDS + 5]):  # of the output layer
        parameter.requires_grad_(False)
        check(hnet, {"cond_id": 1})
    hnet.requires_grad_(False)
    check(hnet, {"cond_id": [0, 1]})
    with torch.no_grad():
        check(make(chunk_size), {"cond_id": [0, 1]})


@pytest.mark.parametrize("chunk_size", [None, 11])
def test_second_derivatives(chunk_size):
    hnet = make(chunk_size, activation_fn=torch.tanh)

    def curvature():
        weights = hnet.forward(cond_id=1)
        grads = torch.autograd.grad(
            sum(w.pow(3).sum() for w in weights), hnet.internal_params[1:], create_graph=True, allow_unused=True
        )
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads if g is not None), hnet.unconditional_params))

    want = curvature()
    with accelerate():
        assert_same(curvature(), want)


def test_gradcheck():
    hnet = make(11, activation_fn=torch.tanh)
    theta = [p.detach().clone().requires_grad_() for p in hnet.unconditional_params]
    with accelerate():
        assert torch.autograd.gradcheck(
            lambda *theta: tuple(
                hnet.forward(cond_id=[0, 2], weights={"uncond_weights": list(theta)}, ret_format="sequential")[1]
            ),
            theta,
        )


class Same(ChunkedHMLP):
    """Keeps the forward pass."""


class Wrapped(HMLP):
    """Calls it."""

    def forward(self, *args, **kwargs):
        return [2 * w for w in super().forward(*args, **kwargs)]


class OwnFormat(ChunkedHMLP):
    """Has a way of its own to hand out weights."""

    def _flat_to_ret_format(self, flat_out, ret_format):
        return super()._flat_to_ret_format(flat_out + 1, ret_format)


def test_subclasses():
    check(make(11, Same), {"cond_id": 1})
    check(make(None, Wrapped), {"cond_id": 1})
    check(make(11, OwnFormat), {"cond_id": 1}, path=calls.GENERAL)


@pytest.mark.parametrize("chunk_size", [None, 11])
def test_what_autograd_does_not_record_goes_the_general_way(chunk_size):
    hnet, theta = make(chunk_size), [p.detach() for p in make(chunk_size).unconditional_params]

    def generate(theta):
        return hnet.forward(cond_id=1, weights={"uncond_weights": theta}, ret_format="flattened")

    def loss(theta):
        return sum(w.square().sum() for w in hnet.forward(cond_id=1, weights={"uncond_weights": theta}))

    step = [torch.ones_like(p) for p in theta]
    want = [torch.func.jvp(generate, (theta,), (step,)), torch.func.grad(loss)(theta)]
    calls.reset()
    with accelerate():
        assert_same([torch.func.jvp(generate, (theta,), (step,)), torch.func.grad(loss)(theta)], want)
        assert all(path == calls.GENERAL for (name, path) in calls.summary() if name == f"{base_of(hnet)}.forward")
        hnet.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert hnet.forward(cond_id=1)[0].dtype == torch.bfloat16
        torch.compile(lambda: hnet.forward(cond_id=1), backend="eager")()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"cond_id": CONDS},
        {"cond_id": -1},
        {"cond_id": 1.0},
        {"cond_id": 1, "cond_input": torch.zeros(1, 6)},
        {"cond_input": torch.zeros(6)},
        {"cond_input": torch.zeros(2, 7)},
        {"cond_id": 1, "uncond_input": torch.zeros(1, 5)},
        {"cond_id": 1, "ret_format": "other"},
        {"cond_id": 1, "weights": [torch.zeros(1)]},
        {"cond_id": 1, "weights": {}},
        {"cond_id": 1, "weights": {"chunk_embs": torch.zeros(1, 9, 4)}},
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 11}, {"chunk_size": 11, "cond_chunk_embs": True}], ids=str)
def test_wrong_arguments_raise_as_there(options, arguments):
    hnet = make(**options)
    with pytest.raises(Exception) as theirs:
        hnet.forward(**copy.deepcopy(arguments))
    with accelerate(), pytest.raises(type(theirs.value)) as ours:
        hnet.forward(**copy.deepcopy(arguments))
    assert str(ours.value) == str(theirs.value)


def test_properties_are_the_same_lists():
    hnets = [make(), make(11), make(11, cond_chunk_embs=True), make(no_uncond_weights=True, no_cond_weights=True)]
    names = ("unconditional_params", "conditional_params", "conditional_param_shapes_ref", "conditional_param_shapes")

    def values():
        found = [getattr(hnet, name) for hnet in hnets for name in names]
        return [value and [id(v) if isinstance(v, torch.Tensor) else v for v in value] for value in found]

    want = values()
    with accelerate():
        assert values() == want


def test_undoing_leaves_hypnettorch_as_it_was():
    from hypnettorch.utils import hnet_regularizer, optim_step

    def held():
        owners = (HMLP, ChunkedHMLP, HyperNetInterface, hnet_regularizer, optim_step)
        return [dict(vars(owner)) for owner in owners]

    before = held()
    with accelerate():
        assert HMLP.forward.__doc__ == before[0]["forward"].__doc__
        between = held()
        with accelerate():
            assert held() == between
        assert held() == between != before
    assert held() == before
    undo = accelerate()
    assert held() != before
    undo.close()
    assert held() == before
