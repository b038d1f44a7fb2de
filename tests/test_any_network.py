"""Any module as a target: which parameters are generated, what becomes of the others, buffers, inputs, growing heads."""

import copy
import fnmatch
import pickle

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS, LastOutput, Scaled, TiedMLP, TwoInputs, batch, conv_with_norm, make
from test_trainer import toy_stream
from torch import nn

import fasthyper as fh
from fasthyper.patterns import choose


def gradients(y, leaves):
    return torch.autograd.grad((y**2).sum(), leaves, allow_unused=True, materialize_grads=True)


def plain(build, hnet, task):
    """The module itself, holding what the hypernetwork says is ``task``'s."""
    module = build().double()
    module.load_state_dict(hnet.task_state_dict(task))
    return module.train(hnet.training)


# which parameters


@pytest.mark.parametrize(
    "patterns, names",
    [
        ("*", {"0.weight", "1.weight", "1.bias", "4.weight", "4.bias", "6.weight", "6.bias"}),
        ("4.*", {"4.weight", "4.bias"}),
        (["4.*", "6.*"], {"4.weight", "4.bias", "6.weight", "6.bias"}),
        ("!@*Norm*", {"0.weight", "4.weight", "4.bias", "6.weight", "6.bias"}),
        (["*", "!*.bias"], {"0.weight", "1.weight", "4.weight", "6.weight"}),
        (["!*", "@Conv2d"], {"0.weight"}),
        (["@_ConvNd", "?.bias", "!1.*"], {"0.weight", "4.bias", "6.bias"}),
    ],
    ids=str,
)
def test_patterns_choose(patterns, names):
    assert choose(conv_with_norm(), patterns) == names
    hnet = make(conv_with_norm(), generate=patterns)
    assert set(hnet.generate(0)) == names
    assert len(hnet.rest) == 7 - len(names) and not any(p.requires_grad for p in hnet.rest)


def test_a_tied_parameter_goes_by_each_of_its_names():
    assert choose(TiedMLP(), "b.*") == {"a.weight"}
    assert choose(TiedMLP(), "!b.*") == {"a.bias", "c.weight", "c.bias"}


@pytest.mark.parametrize(
    "patterns, message",
    [
        ("head.*", "generate='head.*' matches no parameter of the target Sequential: 0.weight, 1.weight"),
        (["*", "!@Norm"], "generate='!@Norm' matches no parameter"),
        ("!*", "leaves no parameter of the target Sequential to generate"),
        ([], "must be a pattern or patterns"),
        ("!", "must be a pattern or patterns"),
        (["*", 3], "must be a pattern or patterns"),
    ],
    ids=str,
)
def test_patterns_that_choose_nothing_are_named(patterns, message):
    with pytest.raises(ValueError, match=message):
        make(conv_with_norm(), generate=patterns)


NAMES = [f"{block}.{layer}.{kind}" for block in "ab" for layer in "xy" for kind in ("weight", "bias")]
GLOBS = st.sampled_from(["*", "a.*", "b.*", "*.x.*", "*.bias", "?.y.weight", "[ab].x.bias", "a.x.weight", "@Linear", "nope"])


@given(st.lists(st.tuples(st.booleans(), GLOBS), min_size=1, max_size=5))
def test_the_last_pattern_that_matches_decides(listed):
    module = nn.ModuleDict({block: nn.ModuleDict({layer: nn.Linear(2, 2) for layer in "xy"}) for block in "ab"})
    patterns = ["!" * out + glob for out, glob in listed]
    wanted = set()
    for name in NAMES:
        verdicts = [not out for out, glob in listed if glob == "@Linear" or fnmatch.fnmatchcase(name, glob)]
        if verdicts[-1] if verdicts else listed[0][0]:
            wanted.add(name)
    if not wanted or any(glob == "nope" for _, glob in listed):
        with pytest.raises(ValueError, match="generate="):
            choose(module, patterns)
    else:
        assert choose(module, patterns) == wanted


# what runs


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"layout": "aligned"}, {"generate": "!*bias*", "rest": "trained"}], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_those_of_the_module_itself(name, options, training):
    build, shape = NETWORKS[name]
    hnet, x = make(build(), **options).train(training), batch(shape)
    module = plain(build, hnet, 1)
    rest = [p for p in hnet.rest if p.requires_grad]
    leaves = [*hnet.theta, hnet.embedding(1), *rest]
    y = hnet(x, 1)
    wanted = module(x)
    assert oracle.relative_error(y.detach(), wanted.detach()) < 1e-12
    with torch.no_grad():  # some layers then take another way
        assert oracle.relative_error(hnet(x, 1), module(x)) < 1e-12
    found = gradients(y, leaves)
    generated = hnet.generate(1)
    at_weights = dict(zip(dict(module.named_parameters()), gradients(wanted, list(module.parameters())), strict=True))
    through = sum((at_weights[n] * w).sum() for n, w in generated.items())
    for have, want in zip(found, torch.autograd.grad(through, leaves[: len(leaves) - len(rest)]), strict=False):
        assert oracle.relative_error(have, want) < 1e-10
    of_rest = [grad for n, grad in at_weights.items() if n not in generated]
    for have, want in zip(found[len(leaves) - len(rest) :], of_rest[: len(rest)], strict=True):
        assert oracle.relative_error(have, want) < 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_and_moves_take_everything_along(name):
    build, shape = NETWORKS[name]
    hnet = make(build(), generate=["*", "!*bias*"]).eval()
    x = batch(shape)
    other = copy.deepcopy(hnet)
    assert torch.equal(other(x, 2), hnet(x, 2))
    ours, theirs = ({id(t) for t in (*h.parameters(), *h.buffers())} for h in (hnet, other))
    assert not ours & theirs
    before = hnet(x, 2)
    with torch.no_grad():
        for p in other.rest:
            p.add_(1)
    assert torch.equal(hnet(x, 2), before)
    assert oracle.relative_error(hnet.to(torch.float32)(x.float(), 2), before) < 1e-4


@pytest.mark.parametrize("options", [{}, {"layout": "aligned"}], ids=str)
def test_a_hypernetwork_pickles(options):
    hnet, x = make(conv_with_norm(momentum=None), **options), batch((1, 4, 4))
    other = pickle.loads(pickle.dumps(hnet))
    assert torch.equal(other(x, 0), hnet(x, 0))
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), hnet.buffers(), strict=True))


def test_buffers_are_shared_and_saved():
    hnet = make(Scaled())
    assert "target/scale" in hnet.state_dict() and "target/shift" not in hnet.state_dict()
    assert hnet.get_buffer("target/scale").dtype == torch.float64 and hnet.get_buffer("target/shift").dtype == torch.int64
    other = make(Scaled(), seed=1)
    hnet.get_buffer("target/scale").fill_(5)
    other.load_state_dict(hnet.state_dict())
    x = batch((6,))
    assert torch.equal(other(x, 0), hnet(x, 0))
    state = {name: tensor.clone() for name, tensor in hnet.state_dict().items()}
    state["target/scale"].fill_(7)
    other.load_state_dict(state, assign=True)
    shift = torch.tensor([1, 2, 3, 4])
    assert oracle.relative_error(other(x, 0) - shift, 7 / 5 * (hnet(x, 0) - shift)) < 1e-12


def test_several_inputs_and_outputs():
    hnet, x, z = make(TwoInputs()), batch((6,)), batch((3,), seed=1)
    weights = hnet.generate(0)
    wanted = F.linear(x, weights["left.weight"], weights["left.bias"]) * 2 + F.linear(z, weights["right.weight"])
    assert oracle.relative_error(hnet((x, z), 0, scale=2.0).detach(), wanted.detach()) < 1e-12
    y, (h, c) = make(nn.LSTM(6, 4))(batch((2, 6)), 1)
    assert y.shape == (8, 2, 4) and h.shape == c.shape == (1, 2, 4)


def test_rest_is_what_it_was_in_the_module():
    module = conv_with_norm()
    hnet = make(module, generate="6.*", rest="trained")
    assert all(torch.equal(a, b.double()) for a, b in zip(hnet.rest, module.parameters(), strict=False))
    assert all(p.requires_grad for p in hnet.rest)
    module[1].requires_grad_(False)
    assert [p.requires_grad for p in make(module, generate="6.*", rest="trained").rest] == [True, False, False, True, True]
    assert not any(p is q for p in hnet.rest for q in module.parameters())


# in training


def test_the_regularizer_holds_what_is_generated():
    hnet = make(conv_with_norm(), generate="!@*Norm*", rest="trained")
    regularizer = fh.OutputRegularizer(hnet)
    regularizer.snapshot(2)
    before = [hnet.generate(t) for t in range(2)]
    with torch.no_grad():
        for p in (*hnet.theta, *hnet.rest):
            p.add_(0.01)
    wanted = sum((before[t][name] - w).square().sum() for t in range(2) for name, w in hnet.generate(t).items()) / 2
    assert oracle.relative_error(regularizer.penalty().detach(), wanted.detach()) < 1e-10


def norm_mlp():
    return nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4))


@pytest.mark.parametrize("rest", ["frozen", "trained"])
def test_trainer_moves_the_rest_on_the_task_loss_alone(rest):
    hnet = make(norm_mlp(), generate="!@*Norm*", rest=rest)
    slow = copy.deepcopy(hnet)
    trainer = fh.Trainer(hnet, lr=0.02, lr_embedding=0.01, beta=0.3, progress=False)
    for task in toy_stream()[:2]:
        trainer.fit(task, steps=6, batch_size=16)
    if rest == "frozen":
        assert all(torch.equal(a, b) for a, b in zip(hnet.rest, slow.rest, strict=True))
        return
    regularizer = fh.OutputRegularizer(slow)
    for task in toy_stream()[:2]:
        regularizer.snapshot(task.index)
        held = torch.optim.Adam(slow.theta, lr=0.02)
        free = torch.optim.Adam([{"params": [slow.embedding(task.index)], "lr": 0.01}, {"params": slow.rest}], lr=0.02)
        batches = fh.streams.batches.Batches(len(task.train), 16, seed=0, task=task.index)
        for step in range(6):
            x, y = task.train.batch(batches.indices(step))
            for optimizer in (held, free):
                optimizer.zero_grad()
            F.cross_entropy(slow(x.double(), task.index), y).backward()
            if task.index:
                ahead = [(p + d).requires_grad_() for p, d in zip(slow.theta, fh.candidate_step(held), strict=True)]
                for p, grad in zip(slow.theta, torch.autograd.grad(0.3 * regularizer.penalty(ahead), ahead), strict=True):
                    p.grad += grad
            held.step()
            free.step()
    for name, tensor in hnet.state_dict().items():
        assert oracle.relative_error(tensor, slow.state_dict()[name]) < 1e-9, name


@pytest.mark.parametrize(
    "options",
    [
        {"generate": "!@*Norm*", "rest": "trained"},
        {"generate": ["3.*"], "layout": "aligned"},
        {"outputs_per_task": 4, "grow_heads": True, "layout": "aligned"},
        {"outputs_per_task": 4, "grow_heads": True, "chunk_size": None, "generate": "!1.*", "rest": "trained"},
    ],
    ids=str,
)
def test_a_run_goes_on_bit_for_bit(tmp_path, options):
    def save_in_step(trainer, at):
        step = trainer._step

        def saving(now, x, y):
            if now.record.steps == at:
                trainer.save(tmp_path)
            return step(now, x, y)

        trainer._step = saving

    trainer = fh.Trainer(make(norm_mlp(), 1, dtype=torch.float32, **options), lr=0.02, beta=0.3, progress=False)
    stream = toy_stream()
    for task in stream:
        if task.index:
            trainer.hnet.add_task()
        if task.index == 2:
            save_in_step(trainer, 3)
        trainer.fit(task, steps=7, batch_size=16)
    resumed = fh.Trainer.load(tmp_path, target=norm_mlp(), progress=False)
    assert resumed.current_step == 3 and resumed.hnet.config == trainer.hnet.config
    resumed.fit(stream[2], steps=7, batch_size=16)
    found, wanted = resumed.hnet.state_dict(), trainer.hnet.state_dict()
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert resumed.evaluate(stream) == trainer.evaluate(stream)
    with pytest.raises(fh.CheckpointError, match="does not fit"):
        fh.Trainer.load(tmp_path, target=nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 5)))


# heads


GROWING = [
    {},
    {"layout": "aligned"},
    {"layout": "aligned", "chunk_size": 6},
    {"chunk_size": None},
    {"chunk_size": 1},
    {"hidden": ()},
    {"generate": "!layers.0.bias"},
]


@pytest.mark.parametrize("options", GROWING, ids=str)
def test_growing_heads_leave_old_tasks_as_they_were(options):
    hnet = make(fh.nets.MLP(6, (5,), 4), 2, outputs_per_task=2, grow_heads=True, dtype=torch.float32, **options)
    x = batch((6,)).float()
    rectangles = [[hnet.layout.rectangles(span) for span in hnet.layout.shared + hnet.layout.heads[t]] for t in range(2)]
    for count in range(2, 5):
        before, outputs = [hnet.generate(t) for t in range(count)], [hnet(x, t) for t in range(count)]
        assert hnet.add_task() == count and hnet.target.num_heads == count + 1
        for t in range(count):
            after = hnet.generate(t)
            assert after["layers.1.weight"].shape == (2 * (count + 1), 5) and after["layers.1.bias"].shape == (
                2 * (count + 1),
            )
            assert all(torch.equal(after[name][: len(w)], w) for name, w in before[t].items())
            assert torch.equal(hnet(x, t), outputs[t])
    assert rectangles == [[hnet.layout.rectangles(s) for s in hnet.layout.shared + hnet.layout.heads[t]] for t in range(2)]
    for t in range(5):
        weights = hnet.generate(t)
        full = torch.func.functional_call(fh.nets.MLP(6, (5,), 4), hnet.task_state_dict(t), (x,))
        assert oracle.relative_error(hnet(x, t).detach(), full[:, 2 * t : 2 * t + 2].detach()) < 1e-6
        assert torch.equal(hnet.target(weights, x, t), full[:, 2 * t : 2 * t + 2])
    built = make(fh.nets.MLP(6, (5,), 4), 5, outputs_per_task=2, grow_heads=True, dtype=torch.float32, **options)
    assert all(torch.equal(a, b) for a, b in zip(hnet.theta, built.theta, strict=True))  # however it came to five tasks
    columns = [(b.col_lo + b.size) * (b.chunk_hi - b.chunk_lo) for b in hnet.layout.blocks]
    assert hnet.layout.num_weights == hnet.target.num_weights <= sum(columns)


@pytest.mark.parametrize("options", GROWING, ids=str)
def test_grown_heads_are_held_for_their_own_tasks(options):
    hnet = make(fh.nets.MLP(6, (5,), 4), 5, outputs_per_task=2, grow_heads=True, **options)
    regularizer = fh.OutputRegularizer(hnet)
    regularizer.snapshot(4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = [hnet.generate(t) for t in range(4)]
        for p in hnet.theta:
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    wanted = 0
    for t in range(4):
        for name, w in hnet.generate(t).items():
            difference = before[t][name] - w
            difference = difference[2 * t : 2 * t + 2] if name.startswith("layers.1") else difference
            wanted = wanted + difference.square().sum() / 4
    value = regularizer.penalty()
    assert oracle.relative_error(value.detach(), wanted.detach()) < 1e-10
    for have, want in zip(torch.autograd.grad(value, hnet.theta), torch.autograd.grad(wanted, hnet.theta), strict=True):
        assert oracle.relative_error(have, want) < 1e-10
    hnet.add_task()
    with pytest.raises(RuntimeError, match=r"has grown since the snapshot: call snapshot\(num_past\) again"):
        regularizer.penalty()
    regularizer.snapshot(4)
    with pytest.raises(ValueError, match="or heads were added"):
        regularizer.penalty(targets=[torch.zeros(hnet.layout.num_weights, dtype=torch.float64)] * 4)


def test_growing_in_the_middle_of_a_task_is_refused(tmp_path):
    hnet = make(fh.nets.MLP(6, (5,), 4), 1, outputs_per_task=4, grow_heads=True, dtype=torch.float32)
    trainer, stream = fh.Trainer(hnet, progress=False), toy_stream()
    trainer.fit(stream[0], steps=2, batch_size=8)
    hnet.add_task()
    step = trainer._step

    def interrupted(now, x, y):
        if now.record.steps == 1:
            raise KeyboardInterrupt
        return step(now, x, y)

    trainer._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(stream[1], steps=3, batch_size=8)
    hnet.add_task()
    with pytest.raises(ValueError, match="has grown in the middle of task 1; add tasks between tasks"):
        trainer.fit(stream[1], steps=3, batch_size=8)


def test_heads_of_a_layer_that_is_not_generated_are_slices_of_it():
    hnet = make(fh.nets.MLP(6, (5,), 6), 3, outputs_per_task=2, generate="!layers.1.*", rest="trained")
    x = batch((6,))
    assert hnet.layout.heads == [] and hnet(x, 2).shape == (8, 2)
    hnet(x, 2).square().sum().backward()
    assert hnet.rest[0].grad[:4].count_nonzero() == 0 < hnet.rest[0].grad[4:].count_nonzero()
    for options in ({"generate": "!layers.1.bias"}, {"outputs_per_task": None}):
        with pytest.raises(ValueError, match="grow_heads needs outputs_per_task, and a last layer that is generated"):
            make(fh.nets.MLP(6, (5,), 6), 3, **{"outputs_per_task": 2, "grow_heads": True, **options})


def test_recurrent_layers_take_weights_of_each_task():
    hnet, x = make(LastOutput()), batch((3, 6))
    outputs = [hnet(x, t) for t in (0, 1, 0)]
    assert torch.equal(outputs[0], outputs[2]) and not outputs[0].allclose(outputs[1])
