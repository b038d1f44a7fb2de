"""Batches of several tasks: outputs and gradients are those of one call per task."""

import oracle
import pytest
import torch
from networks import NETWORKS, TwoInputs, batch, conv_with_norm, make
from test_any_network import gradients
from torch import nn

import fasthyper as fh
from fasthyper import mixed
from fasthyper.mixed import MixedBatch

TASKS = torch.tensor([3, 0, 3, 2, 0, 4, 3, 0, 4, 3, 2])  # as many examples of 2 as of 4; of 0 and 3 others
EQUAL = torch.tensor([1, 4, 0, 4, 0, 1, 1, 0, 4, 2, 2, 2])


def by_task(hnet, x, tasks):
    """The slow, obvious way."""
    rows = [(tasks == task).nonzero()[:, 0] for task in tasks.unique()]
    outputs = torch.cat([hnet(x[index], int(tasks[index[0]])) for index in rows])
    return outputs[torch.cat(rows).argsort()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("tasks", [TASKS, EQUAL], ids=["unequal", "equal"])
@pytest.mark.parametrize("options", [{}, {"layout": "aligned"}, {"generate": ["*", "!*bias*"], "rest": "trained"}], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_mixed_is_one_call_per_task(name, options, tasks, training):
    build, shape = NETWORKS[name]
    hnet, other = make(build(), 5, **options).train(training), make(build(), 5, **options).train(training)
    other.load_state_dict(hnet.state_dict())
    x = batch(shape, len(tasks))
    for _ in range(2):  # the first call finds out what vmap can run
        found, wanted = hnet(x, tasks), by_task(other, x, tasks)
        assert oracle.relative_error(found.detach(), wanted.detach()) < 1e-12
        leaves = [[*h.theta, *h.task_embeddings, *(p for p in h.rest if p.requires_grad)] for h in (hnet, other)]
        have, want = gradients(found, leaves[0]), gradients(wanted, leaves[1])
        scale = torch.cat([grad.flatten() for grad in want])  # of a bias before a batch norm it is 0 but for rounding
        assert all(oracle.relative_error(*pair, scale) < 1e-12 for pair in zip(have, want, strict=True))
        with torch.no_grad():
            assert oracle.relative_error(hnet(x, tasks), by_task(other, x, tasks)) < 1e-12
    for have, want in zip(hnet.buffers(), other.buffers(), strict=True):
        assert oracle.relative_error(have, want) < 1e-12  # statistics, each moved by its task's examples


@pytest.mark.parametrize(
    "name, training, together",
    [
        ("mlp", True, True),
        ("transformer", True, False),
        ("lstm", True, False),
        ("resnet", False, True),
        ("resnet-of-batch-statistics", True, True),
        ("convolutions-and-batch-norm", True, False),  # its statistics are written to
        ("branch", True, False),
    ],
)
def test_tasks_of_as_many_examples_run_at_once(name, training, together, monkeypatch):
    build, shape = NETWORKS[name]
    hnet, calls = make(build(), 5).train(training), []
    hnet(batch(shape, 12), EQUAL)
    assert hnet.target.vmaps == ({(training, True): together} if name != "convolutions-and-batch-norm" else {})
    call = torch.func.functional_call
    monkeypatch.setattr(torch.func, "functional_call", lambda *args: calls.append(1) or call(*args))
    hnet(batch(shape, 12), EQUAL)
    assert len(calls) == (1 if together else 4)


def test_a_hook_may_look_across_a_task():
    net = fh.nets.MLP(6, (5,), 4)
    net.layers[0].register_forward_hook(lambda layer, inputs, output: output - output.mean(0))
    hnet, x = make(net, 5), batch((6,), len(TASKS))
    assert oracle.relative_error(hnet(x, TASKS).detach(), by_task(hnet, x, TASKS).detach()) < 1e-12


def test_large_targets_are_run_task_by_task(monkeypatch):
    monkeypatch.setattr(mixed, "MOST_WEIGHTS", 59)
    for width, together in ((5, True), (6, False)):
        hnet, x = make(fh.nets.MLP(6, (width,), 4), 5, layout="aligned"), batch((6,), 12)
        assert oracle.relative_error(hnet(x, EQUAL).detach(), by_task(hnet, x, EQUAL).detach()) < 1e-12
        assert (hnet.target.vmaps != {}) == together


def test_a_lone_example_of_a_task_cannot_be_normalised():
    hnet = make(conv_with_norm(), 5)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        hnet(batch((1, 4, 4), 3), torch.tensor([0, 1, 0]))
    hnet.eval()(batch((1, 4, 4), 3), torch.tensor([0, 1, 0]))


def test_a_fault_of_the_inputs_is_not_one_of_vmap():
    hnet = make(fh.nets.MLP(6, (5,), 4), 5)
    with pytest.raises(RuntimeError, match="shape"):
        hnet(batch((7,), 12), EQUAL)
    hnet(batch((6,), 12), EQUAL)
    assert hnet.target.vmaps == {(True, True): True}


@pytest.mark.parametrize("options", [{}, {"layout": "aligned"}, {"grow_heads": True}], ids=str)
def test_each_example_gets_the_outputs_of_its_task(options):
    hnet = make(fh.nets.MLP(6, (5,), 4 if "grow_heads" in options else 10), 5, outputs_per_task=2, **options)
    for tasks in (TASKS, EQUAL):
        x = batch((6,), len(tasks))
        y = hnet(x, tasks)
        assert y.shape == (len(tasks), 2)
        assert oracle.relative_error(y.detach(), by_task(hnet, x, tasks).detach()) < 1e-12


def test_dropout_differs_between_examples_and_tasks():
    hnet = make(nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 2)), 5)
    x = batch((6,), 1).expand(12, -1)
    y = hnet(x, EQUAL)
    assert len(y.unique(dim=0)) == 12
    hnet.eval()
    assert oracle.relative_error(hnet(x, EQUAL).detach(), by_task(hnet, x, EQUAL).detach()) < 1e-12


def test_several_inputs_and_options_for_all():
    hnet, x, z = make(TwoInputs(), 5), batch((6,), 12), batch((3,), 12)
    y = hnet((x, z), EQUAL, scale=2.0)
    for i, task in enumerate(EQUAL.tolist()):
        assert oracle.relative_error(y[i].detach(), hnet((x[i : i + 1], z[i : i + 1]), task, scale=2.0)[0].detach()) < 1e-12


def test_one_task_given_as_a_tensor():
    hnet, x = make(fh.nets.MLP(6, (5,), 4)), batch((6,))
    assert torch.equal(hnet(x, torch.tensor(2)), hnet(x, 2))
    assert torch.equal(hnet(x, torch.full((8,), 2)), hnet(x, 2))
    assert hnet.generate(torch.tensor(1))["layers.0.weight"].shape == (5, 6)


def test_what_cannot_be_told_apart_raises():
    hnet, x = make(fh.nets.MLP(6, (5,), 4)), batch((6,))
    with pytest.raises(TypeError, match="task must be a number or an int64 tensor"):
        hnet(x, torch.zeros(8))
    for tasks in (torch.zeros(7, dtype=torch.int64), torch.zeros(8, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"one number per example, got \[\d.*\] for inputs of shape \[\[8, 6\]\]"):
            hnet(x, tasks)
    with pytest.raises(ValueError, match="one number per example"):
        hnet(x[:0], torch.zeros(0, dtype=torch.int64))
    for task in (-1, 3):
        with pytest.raises(IndexError, match=f"task index {task} out of range"):
            hnet(x, torch.tensor([0, 1, task, 0, 0, 0, 0, 0]))
    lstm = make(nn.LSTM(6, 4, batch_first=True), 5)
    with pytest.raises(TypeError, match="whose output is one tensor, a row per example"):
        lstm(batch((2, 6), 12), EQUAL)
    mean = nn.Sequential(nn.Linear(6, 4), nn.Flatten(0))
    with pytest.raises(TypeError, match="whose output is one tensor, a row per example"):
        make(mean, 5)(batch((6,), 12), EQUAL)


def test_a_batch_has_few_groups():
    def groups(tasks, fill):
        parts = MixedBatch((batch((2,), len(tasks)),), tasks)
        return [[(parts.tasks[i], parts.counts[i]) for i in group] for group in parts.groups(fill)]

    tasks = torch.cat([torch.full((n,), task) for task, n in enumerate([1, 2, 9, 2, 4, 1])]).roll(5)
    assert groups(tasks, False) == [[(2, 9)], [(4, 4)], [(1, 2), (3, 2)], [(0, 1), (5, 1)]]
    assert groups(tasks, True) == [[(2, 9), (4, 4), (1, 2)], [(3, 2), (0, 1), (5, 1)]]
    tasks = torch.randint(100, (128,), generator=torch.Generator().manual_seed(0))
    assert len(groups(tasks, False)) <= 16 and len(groups(tasks, True)) <= 3
    wanted = list(zip(*(t.tolist() for t in tasks.unique(return_counts=True)), strict=True))
    assert all(sorted(entry for group in groups(tasks, fill) for entry in group) == wanted for fill in (False, True))


# weights of several tasks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "aligned"},
        {"chunk_size": None},
        {"hidden": ()},
        {"generate": "!@*Norm*"},
        {"outputs_per_task": 1, "grow_heads": True},
        {"outputs_per_task": 1, "grow_heads": True, "chunk_size": None},
    ],
    ids=str,
)
def test_weights_of_several_tasks_are_stacked(options):
    hnet = make(conv_with_norm(), 6 if "grow_heads" in options else 4, **options)
    leaves = [*hnet.theta, *hnet.task_embeddings]
    for tasks in ([2, 0, 3], range(3), torch.tensor([1]), [2, 2]):
        stacked, single = hnet.generate(tasks), [hnet.generate(int(task)) for task in tasks]
        assert list(stacked) == list(single[0])
        for name, w in stacked.items():
            assert w.shape == (len(tasks), *single[0][name].shape)
            assert oracle.relative_error(w.detach(), torch.stack([weights[name] for weights in single]).detach()) < 1e-12
        found = gradients(torch.cat([w.flatten(1) for w in stacked.values()], 1), leaves)
        wanted = gradients(torch.cat([w.flatten() for weights in single for w in weights.values()]), leaves)
        for have, want in zip(found, wanted, strict=True):
            assert oracle.relative_error(have, want) < 1e-11
    with pytest.raises(ValueError, match="at least one"):
        hnet.generate([])
    with pytest.raises(IndexError, match="task index 9 out of range"):
        hnet.generate([0, 9])


def test_all_tasks_see_a_batch():
    hnet, x = make(fh.nets.MLP(6, (5,), 4), 5).eval(), batch((6,))
    run = torch.func.vmap(lambda weights: hnet.target(weights, x, 0))
    y = run(hnet.generate(range(5)))
    assert oracle.relative_error(y.detach(), torch.stack([hnet(x, t) for t in range(5)]).detach()) < 1e-12
