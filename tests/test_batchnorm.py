"""Batch norm in a target: each task's running statistics are what a network of its own would have."""

import copy

import oracle
import pytest
import torch
from networks import OwnNorm, batch, conv_with_norm, make, resnet
from test_any_network import norm_mlp, plain
from test_trainer import toy_stream
from torch import nn

import fasthyper as fh

SHAPES = {"convolutions": (conv_with_norm, (1, 4, 4)), "resnet": (resnet, (1, 8, 8)), "mlp": (norm_mlp, (6,))}
MOMENTA = {"exponential": {}, "momentum": {"momentum": 0.3}, "average": {"momentum": None}}


def statistics(module):
    return {name: buffer for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("name", SHAPES)
def test_statistics_are_those_of_a_network_per_task(name, momentum):
    build, shape = SHAPES[name]

    def built():
        module = build()
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.momentum = MOMENTA[momentum].get("momentum", layer.momentum)
        return module

    hnet = make(built())
    networks = [plain(built, hnet, task) for task in range(3)]
    for step, task in enumerate([0, 2, 0, 1, 0, 2]):
        x = batch(shape, seed=step)
        assert oracle.relative_error(hnet(x, task).detach(), networks[task](x).detach()) < 1e-12
    hnet.eval()
    for task, network in enumerate(networks):
        network.eval()
        own = hnet.task_state_dict(task)
        for key, buffer in statistics(network).items():
            assert own[key].dtype == buffer.dtype and own[key].shape == buffer.shape
            assert oracle.relative_error(own[key], buffer) < 1e-12, key
        before = {key: value.clone() for key, value in hnet.state_dict().items()}
        assert oracle.relative_error(hnet(x, task).detach(), network(x).detach()) < 1e-11
        assert all(torch.equal(value, before[key]) for key, value in hnet.state_dict().items())
    assert {key: int(n) for key, n in hnet.task_state_dict(0).items() if "num_batches" in key and n != 3} == {}


@pytest.mark.parametrize("momentum", MOMENTA)
def test_a_training_step_reads_nothing_from_the_device(momentum, monkeypatch):
    hnet, x = make(conv_with_norm(**MOMENTA[momentum])), batch((1, 4, 4))

    def refuse(*_):
        raise AssertionError("a number was read")

    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    hnet(x, 1).square().sum().backward()
    hnet.eval()(x, 1)


def test_a_layer_used_twice_and_one_without_numbers_to_learn():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=None, affine=False)

        def forward(self, x):
            return self.norm(self.linear(self.norm(x)))

    hnet = make(Twice())
    network = plain(Twice, hnet, 0)
    for seed in range(3):
        x = batch((6,), seed=seed)
        y = hnet(x, 0)
        assert oracle.relative_error(y.detach(), network(x).detach()) < 1e-12
    y.square().sum().backward()
    own = hnet.task_state_dict(0)
    assert own["norm.num_batches_tracked"] == 6
    assert oracle.relative_error(own["norm.running_var"], network.norm.running_var) < 1e-12


def test_statistics_and_buffers_that_a_layer_replaces_are_kept():
    hnet = make(OwnNorm())
    networks = [plain(OwnNorm, hnet, task) for task in range(2)]
    for step, task in enumerate([0, 1, 0]):
        x = batch((6,), seed=step)
        assert oracle.relative_error(hnet(x, task).detach(), networks[task](x).detach()) < 1e-12
    for task in range(2):
        assert oracle.relative_error(hnet.task_state_dict(task)["running_mean"], networks[task].running_mean) < 1e-12
    hnet.to(torch.float32)
    assert hnet.state_dict()["target/calls"] == hnet.task_state_dict(0)["calls"] == 3


def test_a_task_begins_with_what_the_module_had():
    module = norm_mlp()
    for seed in range(3):
        module(batch((6,), seed=seed).float())
    hnet = make(module, 1)
    hnet(batch((6,)), 0)
    assert hnet.add_task() == 1
    for key, buffer in statistics(module).items():
        assert torch.equal(hnet.task_state_dict(1)[key], buffer.to(hnet.task_state_dict(1)[key]))
    assert hnet.task_state_dict(0)["1.num_batches_tracked"] == 4
    assert not torch.equal(hnet.task_state_dict(0)["1.running_mean"], hnet.task_state_dict(1)["1.running_mean"])


def test_adding_a_task_moves_no_other_statistics():
    hnet = make(norm_mlp())
    rows = [tensor.data_ptr() for task in range(3) for tensor in hnet.statistics.rows(task)]
    hnet.add_task()
    assert rows == [tensor.data_ptr() for task in range(3) for tensor in hnet.statistics.rows(task)]


def test_norms_that_keep_no_statistics_leave_nothing_in_the_state():
    hnet = make(resnet(False))
    assert hnet.statistics is None and not any("statistics" in key for key in hnet.state_dict())
    x = batch((1, 8, 8))
    assert not hnet(x, 0).allclose(hnet(x[:4], 0).repeat(2, 1))  # of the batch, in evaluation too


def test_state_is_saved_bit_for_bit(tmp_path):
    trainer = fh.Trainer(make(norm_mlp(), dtype=torch.float32), lr=0.02, out=tmp_path, progress=False)
    for task in toy_stream()[:2]:
        trainer.fit(task, steps=5, batch_size=16)
    other = fh.Trainer.load(tmp_path, target=norm_mlp(), progress=False)
    names = [name for name in trainer.hnet.state_dict() if name.startswith("statistics.")]
    assert len(names) == 2 + 2 * 3
    assert all(torch.equal(trainer.hnet.state_dict()[name], other.hnet.state_dict()[name]) for name in names)
    assert trainer.hnet.task_state_dict(1)["1.num_batches_tracked"] == 5
    for one in (trainer, other):
        one.hnet.add_task()
        one.fit(toy_stream()[2], steps=5, batch_size=16)
    assert all(torch.equal(a, b) for a, b in zip(trainer.hnet.buffers(), other.hnet.buffers(), strict=True))


def test_evaluation_uses_the_statistics_of_its_task():
    stream, trainer = toy_stream(), fh.Trainer(make(norm_mlp()), lr=0.02, beta=0.1, progress=False)
    for task in stream:
        trainer.fit(task, steps=40, batch_size=32)
    accuracies = trainer.evaluate(stream)
    data = stream[0].test
    x, y = data.batch(torch.arange(len(data)))
    network = plain(norm_mlp, trainer.hnet, 0)
    assert accuracies[0] == (network(x.double()).argmax(1) == y).double().mean().item() > 0.9


def test_a_step_that_is_not_finite_leaves_statistics_as_they_were():
    trainer = fh.Trainer(make(norm_mlp()), lr=0.02, progress=False)
    inputs, labels = torch.randn(32, 6), torch.arange(32) % 4
    trainer.fit((inputs, labels), steps=2, batch_size=8)
    before = copy.deepcopy(trainer.hnet.state_dict())
    inputs[:] = torch.inf
    with pytest.raises(fh.NonFiniteLossError, match="loss is nan at task 1, step 0"):
        trainer.fit((inputs, labels), steps=2, batch_size=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.hnet.state_dict().items())


def test_statistics_move_between_dtypes():
    hnet = make(norm_mlp(), dtype=torch.float32).to(torch.float64)
    hnet(batch((6,)), 2)
    state = hnet.task_state_dict(2)
    assert state["1.running_mean"].dtype == torch.float64 and state["1.num_batches_tracked"].dtype == torch.int64
    hnet.add_task()
    assert hnet(batch((6,)), 3).dtype == torch.float64
