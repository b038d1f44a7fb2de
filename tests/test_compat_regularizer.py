"""``compat.hypnettorch.hnet_regularizer`` against hypnettorch 0.0.4: options, their combinations, hypernets of all sorts."""

import copy
import inspect
import itertools
import random
import subprocess
import sys

import oracle
import pytest
import torch
from conftest import TOL
from hypothesis import given
from hypothesis import strategies as st

from fasthyper.compat.hypnettorch import calls, optim_step
from fasthyper.compat.hypnettorch import hnet_regularizer as hreg
from fasthyper.compat.hypnettorch.targets import Targets

pytest.importorskip("hypnettorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own, from numpy and matplotlib

import numpy as np  # noqa: E402
from hypnettorch.hnets import HMLP, ChunkedHMLP, HContainer, HPerturbWrapper, StructuredHMLP  # noqa: E402
from hypnettorch.mnets.mlp import MLP  # noqa: E402
from hypnettorch.utils import hnet_regularizer as original  # noqa: E402
from hypnettorch.utils import optim_step as original_step  # noqa: E402

SHAPES = [[6, 5], [6], [6, 6], [6], [8, 6], [8]]
CONDS, PAST = 5, 4
ELU, GELU = torch.nn.ELU(), torch.nn.GELU()


class Same(ChunkedHMLP):
    """A subclass that keeps the forward pass."""

    def greet(self):
        return "hello"


class Doubled(ChunkedHMLP):
    """One that does not."""

    def forward(self, *args, ret_format="squeezed", **kwargs):
        return self._flat_to_ret_format(2 * super().forward(*args, ret_format="flattened", **kwargs), ret_format)


def full(**options):
    return HMLP(SHAPES, cond_in_size=3, num_cond_embs=CONDS, verbose=False, **{"layers": (7, 6), **options})


def chunked(cls=ChunkedHMLP, **options):
    options = {"chunk_size": 23, "chunk_emb_size": 4, "cond_in_size": 3, "layers": (7, 6), **options}
    return cls(SHAPES, num_cond_embs=CONDS, verbose=False, **options)


def structured(dropout=-1, **options):
    def assemble(chunks):
        (w1, b1), (left, low), (right, high), (w3, b3) = chunks
        return [w1, b1, torch.cat([left, right], 1), torch.cat([low, high]), w3, b3]

    chunk_shapes = [[[6, 5], [6]], [[6, 3], [3]], [[8, 6], [8]]]
    hmlp = {"layers": (7,), "dropout_rate": dropout}
    options = {"cond_in_size": 3, "num_cond_embs": CONDS, "verbose": False, **options}
    return StructuredHMLP(SHAPES, chunk_shapes, [1, 2, 1], 4, hmlp, assemble, **options)


def container(dropout=-1):
    inner = HMLP(SHAPES[:4], cond_in_size=3, num_cond_embs=CONDS, layers=(7,), dropout_rate=dropout, verbose=False)
    return HContainer(
        SHAPES,
        lambda generated, uncond, cond: [*generated[0], *uncond, *cond],
        hnets=[inner],
        uncond_param_shapes=[SHAPES[4]],
        cond_param_shapes=[SHAPES[5]],
        num_cond_embs=CONDS,
    )


def bare():
    """Tensors as they are, those of a task not inside."""
    shapes = {"uncond_param_shapes": SHAPES[:5], "cond_param_shapes": SHAPES[5:]}
    return HContainer(SHAPES, lambda _, uncond, cond: [*uncond, *cond], no_cond_weights=True, num_cond_embs=CONDS, **shapes)


def perturbed():
    """Noise that a forward pass draws itself."""

    def noise(cond_input=None, cond_id=None, **_):
        return torch.randn(1, 2, dtype=torch.float64), cond_input, cond_id

    def add(out, **_):
        return out + 0.1 * torch.randn_like(out)

    return HPerturbWrapper(full(uncond_in_size=2), input_handler=noise, output_handler=add, verbose=False)


FAST = {
    "full": full,
    "full-linear": lambda: full(layers=()),
    "full-no-bias": lambda: full(use_bias=False),
    "full-one-layer-tanh": lambda: full(layers=(5,), activation_fn=torch.tanh),
    "chunked": chunked,
    "chunked-elu": lambda: chunked(activation_fn=ELU),
    "chunked-linear": lambda: chunked(layers=()),
    "chunked-no-bias": lambda: chunked(use_bias=False, activation_fn=torch.nn.Sigmoid()),
    "chunked-one": lambda: chunked(chunk_size=500),
    "chunked-gelu": lambda: chunked(activation_fn=GELU),
    "chunked-no-activation": lambda: chunked(activation_fn=None),
    "chunked-own": lambda: chunked(cond_chunk_embs=True),
    "chunked-own-gelu": lambda: chunked(cond_chunk_embs=True, activation_fn=GELU),
    "chunked-own-only": lambda: chunked(cond_chunk_embs=True, cond_in_size=0),
    "chunked-own-linear": lambda: chunked(cond_chunk_embs=True, layers=()),
    "subclass": lambda: chunked(Same),
    "dropout-eval": lambda: chunked(dropout_rate=0.3).eval(),
    "dropout-train": lambda: chunked(dropout_rate=0.3),
    "dropout-train-own": lambda: chunked(dropout_rate=0.3, cond_chunk_embs=True),
    "dropout-train-full": lambda: full(dropout_rate=0.3),
}
GENERAL = {
    "structured": structured,
    "structured-own": lambda: structured(cond_chunk_embs=True),
    "container": container,
    "perturbed": perturbed,
    "forward-of-its-own": lambda: chunked(Doubled),
    "batchnorm-train": lambda: chunked(use_batch_norm=True),
    "batchnorm-eval": lambda: chunked(use_batch_norm=True).eval(),
    "prelu": lambda: chunked(activation_fn=torch.nn.PReLU()),
    "leaky-function-of-ones-own": lambda: chunked(activation_fn=lambda a: 0.9 * a.abs()),
}
HNETS = FAST | GENERAL
HEADS = {
    None: None,
    "own": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "shared": [[1, 3, 4]] * PAST,
    "growing": [[0], [0, 2], [0, 2, 3], [0, 2, 3, 7]],
    "some": [[5], [], [5], [1]],
}
OPTIONS = {
    "source": ["snapshot", "list", "online"],
    "step": [None, "constant", "leaf"],
    "moves": [None, "constant", "leaf"],
    "heads": list(HEADS),
    "fisher": [False, True],
    "batch": [None, -1, 2, 9],
    "scaling": [False, True],
}


def combination(values):
    return dict(zip(OPTIONS, values, strict=True))


def build(name):
    torch.manual_seed(1)
    return HNETS[name]().double()


def mnet(n_out=8):
    return MLP(n_in=5, n_out=n_out, hidden_layers=(6, 6), no_weights=True, verbose=False)


def randn(shapes, seed, scale=1.0, leaf=False):
    generator = torch.Generator().manual_seed(seed)
    found = [scale * torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.requires_grad_() for t in found] if leaf else found


def arguments(hnet, source, step, moves, heads, fisher, batch, scaling):
    """Of the call, and the tensors of it that have gradients."""
    given, leaves = {}, []
    if source == "online":
        given["prev_theta"] = [p.detach() + d for p, d in _shifts(hnet.unconditional_params, 11)]
        given["prev_task_embs"] = [p.detach() + d for p, d in _shifts(hnet.conditional_params, 12)]
    for name, how, params, seed in (
        ("dTheta", step, hnet.unconditional_params, 13),
        ("dTembs", moves, hnet.conditional_params, 14),
    ):
        if how:
            given[name] = randn([p.shape for p in params], seed, 0.1, how == "leaf")
            leaves += given[name] if how == "leaf" else []
    if heads:
        given |= {"mnet": mnet(), "inds_of_out_heads": HEADS[heads]}
    if fisher:
        given["fisher_estimates"] = [[f.square() for f in randn(SHAPES, 20 + task)] for task in range(PAST)]
    if scaling:
        given["reg_scaling"] = [0.5, 2.0, 0.0, torch.tensor(1.5, dtype=torch.float64)]
    return given | {"batch_size": batch}, leaves


def _shifts(params, seed):
    return zip(params, randn([p.shape for p in params], seed, 0.1), strict=True)


def outcome(module, hnet, targets, given, leaves):
    """Value, gradients of everything, and where the random streams are afterwards."""
    np.random.seed(3)
    torch.manual_seed(4)
    value = module.calc_fix_target_reg(hnet, PAST, targets=targets, **given)
    grads = torch.autograd.grad(value, [*hnet.parameters(), *leaves], allow_unused=True)
    return value.detach(), grads, torch.rand(1), np.random.rand()


def assert_same(have, want, tolerance=1e-10):
    (value, grads, *streams), (wanted, wanted_grads, *wanted_streams) = have, want
    assert streams == wanted_streams
    assert value.shape == wanted.shape and oracle.relative_error(value, wanted) < tolerance
    largest = max(grad.norm() for grad in wanted_grads if grad is not None)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert (grad is None) == (wanted_grad is None)
        if grad is not None:
            assert (grad - wanted_grad).norm() <= tolerance * largest


def compare(hnet, **options):
    given, leaves = arguments(hnet, **options)
    theirs = ours = None
    if options["source"] != "online":
        hnet_then = copy.deepcopy(hnet)
        with torch.no_grad():
            for p in hnet_then.parameters():
                p *= 1.05
        torch.manual_seed(2)
        theirs = original.get_current_targets(PAST, hnet_then)
        torch.manual_seed(2)
        ours = hreg.get_current_targets(PAST, hnet_then) if options["source"] == "snapshot" else theirs
    twin, state = copy.deepcopy(hnet), [m.training for m in hnet.modules()]  # running statistics change
    want = outcome(original, twin, theirs, given, leaves)
    assert_same(outcome(hreg, hnet, ours, given, leaves), want)
    assert state == [m.training for m in hnet.modules()]
    for have, wanted in zip(hnet.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(have, wanted)


def served():
    return {path for function, path in calls.summary() if function == "calc_fix_target_reg"}


def test_every_combination_of_options():
    hnet = build("chunked")
    calls.reset()
    fewer = {"step": [None, "leaf"], "moves": [None, "leaf"], "heads": [None, "own", "growing"], "batch": [None, 2]}
    for values in itertools.product(*(OPTIONS | fewer).values()):
        compare(hnet, **combination(values))
    assert served() == {"fast"}


@pytest.mark.parametrize("name", HNETS)
def test_every_hypernetwork(name):
    hnet, chooser = build(name), random.Random(name)
    every = list(itertools.product(*OPTIONS.values()))
    calls.reset()
    for values in chooser.sample(every, 30):
        compare(hnet, **combination(values))
    assert served() == {"fast" if name in FAST else "general"}


@given(data=st.data())
def test_any_shape(data):
    def draw(lo, hi):
        return data.draw(st.integers(lo, hi))

    shapes = [[draw(1, 4), draw(1, 4)], [draw(1, 4)], [8, draw(1, 4)], [8]]
    layers = data.draw(st.lists(st.integers(1, 6), max_size=3))
    options = {"cond_in_size": draw(1, 4), "layers": layers, "use_bias": data.draw(st.booleans())}
    options |= {"activation_fn": data.draw(st.sampled_from([torch.nn.ReLU(), torch.nn.Tanh(), GELU, None]))}
    options |= {"num_cond_embs": 5, "verbose": False}
    torch.manual_seed(draw(0, 99))
    if data.draw(st.booleans()):
        hnet = HMLP(shapes, **options)
    else:
        options |= {"chunk_size": draw(1, 60), "chunk_emb_size": draw(1, 4), "cond_chunk_embs": data.draw(st.booleans())}
        hnet = ChunkedHMLP(shapes, **options)
    hnet, past = hnet.double(), draw(1, 5)
    network = MLP(n_in=1, n_out=8, hidden_layers=(), no_weights=True, verbose=False)
    network._param_shapes = shapes
    given = {"mnet": network, "dTheta": randn([p.shape for p in hnet.unconditional_params], 5, 0.1)}
    heads = st.lists(st.integers(0, 7), unique=True, max_size=8)
    given["inds_of_out_heads"] = data.draw(st.none() | st.lists(heads, min_size=past, max_size=past))
    if data.draw(st.booleans()):
        given["fisher_estimates"] = [[f.square() for f in randn(shapes, task)] for task in range(past)]
    theirs, ours = original.get_current_targets(past, hnet), hreg.get_current_targets(past, hnet)
    found = []
    for module, targets in ((original, theirs), (hreg, ours)):
        value = module.calc_fix_target_reg(hnet, past, targets=targets, **given)
        grads = torch.autograd.grad(value, hnet.internal_params, allow_unused=True, materialize_grads=True)
        found.append(torch.cat([value.detach()[None], *(grad.flatten() for grad in grads)]))
    assert (found[1] - found[0]).norm() <= 1e-10 * (1e-6 + found[0].norm())


@pytest.mark.parametrize("name", ["chunked", "chunked-elu", "chunked-own", "full", "structured"])
def test_float32_is_as_close_to_float64_as_rounding(name):
    hnet = build(name)
    given, _ = arguments(hnet, "snapshot", "constant", None, "own", False, None, True)
    want = outcome(original, hnet, original.get_current_targets(PAST, hnet), given, [])
    small = copy.deepcopy(hnet).float()
    given["dTheta"] = [d.float() for d in given["dTheta"]]
    given["reg_scaling"] = [float(s) for s in given["reg_scaling"]]
    value, grads, *_ = outcome(hreg, small, hreg.get_current_targets(PAST, small), given, [])
    assert value.dtype == torch.float32 and oracle.relative_error(value, want[0]) < TOL["drift", torch.float32]
    have, wanted = (torch.cat([g.double().flatten() for g in gs if g is not None]) for gs in (grads, want[1]))
    assert oracle.relative_error(have, wanted) < TOL["drift", torch.float32]


@pytest.mark.parametrize("name", HNETS)
def test_targets_are_a_snapshot(name):
    hnet = build(name)
    torch.manual_seed(2)
    theirs = original.get_current_targets(PAST, hnet)
    torch.manual_seed(2)
    ours = hreg.get_current_targets(PAST, hnet)
    assert isinstance(ours, Targets) == (name in FAST)
    with torch.no_grad():
        for p in hnet.parameters():
            p.mul_(2)
    assert len(ours) == PAST
    for have, want in zip(ours, theirs, strict=True):
        assert all(oracle.relative_error(h, w) < 1e-12 and not h.requires_grad for h, w in zip(have, want, strict=True))
    assert torch.equal(ours[-1][0], ours[PAST - 1][0])
    assert [len(weights) for weights in ours[1:3]] == [len(SHAPES)] * 2
    with pytest.raises(IndexError):
        ours[PAST]


def test_there_are_no_targets_of_no_tasks():
    assert len(hreg.get_current_targets(0, build("chunked"))) == 0


@pytest.mark.parametrize("name", ["chunked", "full", "chunked-linear", "chunked-own", "chunked-gelu", "dropout-train"])
@pytest.mark.parametrize("heads", HEADS)
def test_past_weights_are_never_made_from_a_snapshot(name, heads, monkeypatch):
    hnet = build(name)
    targets = hreg.get_current_targets(PAST, copy.deepcopy(hnet))
    monkeypatch.setattr(Targets, "flat", None)
    monkeypatch.setattr(type(hnet), "_flat_to_ret_format", None)
    for batch in (None, 2):
        given, _ = arguments(hnet, "snapshot", "constant", None, heads, False, batch, False)
        hreg.calc_fix_target_reg(hnet, PAST, targets=targets, **given).backward()


def test_a_snapshot_serves_other_heads_and_weights_in_turn():
    """What it keeps from one call to the next is for the same plan and weights only."""
    hnet = build("chunked")
    theirs, ours = original.get_current_targets(PAST, hnet), hreg.get_current_targets(PAST, hnet)
    ours.held(mnet(), [range(2), torch.arange(3), np.array([4]), []])
    for heads, scaling, batch in itertools.product([*HEADS, "own", None], [False, True], [None, 2]):
        given, leaves = arguments(hnet, "snapshot", "constant", None, heads, False, batch, scaling)
        assert_same(outcome(hreg, hnet, ours, given, leaves), outcome(original, hnet, theirs, given, leaves))


@pytest.mark.parametrize("case", ["targets", "fisher", "scaling", "negative", "vector", "half"])
def test_what_the_fast_way_cannot_do_goes_the_general_way(case):
    hnet = build("chunked")
    given, leaves = arguments(hnet, "list", "constant", None, "own", True, None, True)
    targets = [randn(SHAPES, 30 + task) for task in range(PAST)]
    if case == "targets":
        targets = [[t.requires_grad_() for t in weights] for weights in targets]
        leaves = [t for weights in targets for t in weights]
    elif case == "fisher":
        leaves = [f.requires_grad_() for estimates in given["fisher_estimates"] for f in estimates]
    elif case == "scaling":
        leaves = [given["reg_scaling"][-1].requires_grad_()]
    elif case == "negative":
        given["reg_scaling"] = [1.0, -2.0, 0.5, 0.1]
    elif case == "vector":
        given["reg_scaling"] = [torch.tensor([1.0], dtype=torch.float64)] * PAST
    elif case == "half":
        targets = [[t.float() for t in weights] for weights in targets]
    calls.reset()
    have = outcome(hreg, hnet, targets, given, leaves)
    assert served() == {"general"}
    assert_same(have, outcome(original, hnet, targets, given, leaves))


def test_targets_of_another_network_are_made_and_held():
    hnet, other = build("chunked"), build("full")
    given, leaves = arguments(hnet, "snapshot", "constant", None, "own", False, 2, True)
    want = outcome(original, hnet, original.get_current_targets(PAST, other), given, leaves)
    assert_same(outcome(hreg, hnet, hreg.get_current_targets(PAST, other), given, leaves), want)


def test_dropout_of_hidden_hypernetworks_follows_the_whole():
    """hypnettorch's ``eval()`` misses them, and its targets come out at random."""
    for hnet in (structured(dropout=0.5).double(), container(dropout=0.5).double()):
        first, second = (hreg.get_current_targets(PAST, hnet) for _ in range(2))
        assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))
        hnet.eval()
        assert hreg.calc_fix_target_reg(hnet, PAST, targets=first) < 1e-20
        hnet.train()
        assert hreg.calc_fix_target_reg(hnet, PAST, targets=first) > 1e-3
        assert all(inner.training for inner in hnet.internal_hnets)


def test_embeddings_of_past_tasks_are_enough():
    hnet = build("chunked")
    given, _ = arguments(hnet, "online", "constant", "constant", None, False, None, False)
    want = outcome(original, hnet, None, given, [])
    for name in ("prev_task_embs", "dTembs"):
        given[name] = given[name][:PAST]
    assert_same(outcome(hreg, hnet, None, given, []), want)


def losses(regularizer, optim_step, online):
    """Of a loop over four tasks with heads, look-ahead and subsets of past tasks, as scripts for hypnettorch have it."""
    hnet, target, generator, found = build("chunked-elu"), mnet(), torch.Generator().manual_seed(0), []
    np.random.seed(0)
    for task in range(PAST):
        x = torch.randn(32, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(2, (32,), generator=generator)
        where = {"targets": regularizer.get_current_targets(task, hnet)} if task and not online else {}
        if online:
            where["prev_theta"] = [p.detach().clone() for p in hnet.unconditional_params]
            where["prev_task_embs"] = [p.detach().clone() for p in hnet.conditional_params]
        theta = torch.optim.Adam(hnet.unconditional_params, lr=1e-2, eps=1e-20)
        embedding = torch.optim.Adam([hnet.conditional_params[task]], lr=1e-2)
        for _ in range(15):
            theta.zero_grad()
            embedding.zero_grad()
            logits = target.forward(x, weights=hnet.forward(cond_id=task))[:, 2 * task : 2 * task + 2]
            loss = torch.nn.functional.cross_entropy(logits, y)
            loss.backward()
            found.append(loss.detach())
            if task:
                ahead = optim_step.calc_delta_theta(theta, False)
                heads = {"mnet": target, "inds_of_out_heads": HEADS["own"][:task]}
                reg = regularizer.calc_fix_target_reg(hnet, task, dTheta=ahead, batch_size=2, **heads, **where)
                (0.5 * reg).backward()
                found.append(reg.detach())
            theta.step()
            embedding.step()
    return torch.stack(found)


@pytest.mark.parametrize("online", [False, True])
def test_a_training_loop_gives_the_same_losses(online):
    have, want = losses(hreg, optim_step, online), losses(original, original_step, online)
    assert torch.allclose(have, want, rtol=1e-9, atol=1e-13)


def test_out_heads_are_flattened_alike():
    for hyper_shapes in (None, [4, 5]):
        target, weights = mnet(), randn(SHAPES, 1)
        if hyper_shapes:
            target._hyper_shapes_learned_ref, weights = hyper_shapes, weights[4:]
        for allowed in ([], [1, 5], list(range(8))):
            have, want = (module.flatten_and_remove_out_heads(target, weights, allowed) for module in (hreg, original))
            assert torch.equal(have, want)


def test_a_call_is_counted_with_its_way_and_time():
    calls.reset()
    for name in ("chunked", "structured"):
        hnet = build(name)
        hreg.calc_fix_target_reg(hnet, 2, targets=hreg.get_current_targets(2, hnet))
    found = calls.summary()
    assert found.keys() == set(itertools.product(["get_current_targets", "calc_fix_target_reg"], ["fast", "general"]))
    assert all(count.calls == 1 and count.seconds > 0 for count in found.values())


def regularize(hnet=None, task_id=2, **given):
    hnet = hnet or build("chunked")
    if not given.keys() & {"targets", "prev_theta", "prev_task_embs"}:
        given["targets"] = hreg.get_current_targets(2, hnet)
    return hreg.calc_fix_target_reg(hnet, task_id, **given)


WRONG = {
    "no hypernetwork": (lambda: hreg.get_current_targets(1, torch.nn.ReLU()), TypeError, "HyperNetInterface, got ReLU"),
    "task": (lambda: regularize(task_id=0), ValueError, "task_id must be at least 1"),
    "negative": (lambda: hreg.get_current_targets(-1, build("full")), ValueError, "must not be negative, got -1"),
    "tasks": (lambda: hreg.get_current_targets(9, build("full")), ValueError, "9 past tasks, but hnet knows 5 conditions"),
    "nothing": (lambda: regularize(targets=None), ValueError, "give targets, or prev_theta and prev_task_embs"),
    "half": (lambda: regularize(prev_theta=[]), ValueError, "give targets, or prev_theta and prev_task_embs"),
    "both": (lambda: regularize(targets=[1, 2], prev_theta=[]), ValueError, "not both"),
    "length": (lambda: regularize(targets=[[]]), ValueError, "targets must hold 2 entries, one per past task, got 1"),
    "numel": (lambda: regularize(targets=[[torch.ones(3).double()]] * 2), ValueError, "task 0 has 3 weights, but 134 are"),
    "other": (
        lambda: regularize(targets=hreg.get_current_targets(2, HMLP([[3]], num_cond_embs=2, verbose=False).double())),
        ValueError,
        "task 0 has 3 weights, but 134 are",
    ),
    "mnet": (lambda: regularize(inds_of_out_heads=[[0], [1]]), ValueError, "inds_of_out_heads need mnet"),
    "heads": (
        lambda: regularize(inds_of_out_heads=[[0]], mnet=mnet()),
        ValueError,
        "inds_of_out_heads must hold at least 2",
    ),
    "target": (
        lambda: regularize(inds_of_out_heads=[[0]] * 2, mnet=mnet(9)),
        ValueError,
        r"mnet masks a parameter of shape \[9, 6\], but \[8, 6\]",
    ),
    "scaling": (lambda: regularize(reg_scaling=[1.0]), ValueError, "reg_scaling must hold at least 2 entries"),
    "fisher": (lambda: regularize(fisher_estimates=[[torch.ones(1)]] * 2), ValueError, r"fisher_estimates\[0\] must have"),
    "dTheta": (
        lambda: regularize(dTheta=[torch.ones(1)]),
        ValueError,
        "dTheta must hold one tensor per parameter, 7, got 1",
    ),
    "dTembs": (
        lambda: regularize(dTembs=[torch.ones(3)]),
        ValueError,
        "dTembs must hold one tensor per parameter, 5, got 1",
    ),
    "prev": (
        lambda: regularize(prev_theta=[torch.ones(1)], prev_task_embs=[]),
        ValueError,
        "prev_theta must hold 7 tensors and prev_task_embs 5",
    ),
    "outside": (
        lambda: regularize(full(no_uncond_weights=True, no_cond_weights=True), targets=[[], []]),
        ValueError,
        "must hold its unconditional parameters inside \\(no_uncond_w",
    ),
    "embeddings outside": (
        lambda: regularize(bare(), targets=[[], []]),
        ValueError,
        "must hold its conditional parameters inside",
    ),
    "input": (
        lambda: hreg.get_current_targets(2, full(uncond_in_size=2)),
        ValueError,
        "takes an unconditional input of size 2, which the regularizer has none to give",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_a_line(what):
    call, error, words = WRONG[what]
    with pytest.raises(error, match=words) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_imports_need_torch_only():
    code = "import sys; sys.modules.update(dict.fromkeys(('hypnettorch', 'numpy')))\n"
    code += "from fasthyper.compat.hypnettorch import hnet_regularizer, optim_step"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_signatures_are_the_originals():
    for name in ("get_current_targets", "calc_fix_target_reg", "flatten_and_remove_out_heads"):
        have, want = (inspect.signature(getattr(module, name)).parameters for module in (hreg, original))
        assert [(p.name, p.default) for p in have.values()] == [(p.name, p.default) for p in want.values()]
