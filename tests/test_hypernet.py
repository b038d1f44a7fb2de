"""The hypernetwork: what it generates, its embeddings, its targets, bad input."""

import oracle
import pytest
import torch
from torch import nn

import fasthyper as fh
from fasthyper.activations import ACTIVATIONS


def make(target=None, num_tasks=3, **options):
    options = {"chunk_size": 7, "hidden": (5, 4), "task_dim": 3, "chunk_dim": 2, "dtype": torch.float64, **options}
    return fh.ChunkedHypernet(target or fh.nets.MLP(6, (5,), 4), num_tasks, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(), (4,), (5, 4)], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 500], ids=str)
def test_generate_is_what_the_slow_way_makes(activation, hidden, chunk_size):
    hnet = make(activation=activation, hidden=hidden, chunk_size=chunk_size)
    h = oracle.features(hnet.theta, hnet.embedding(1), ACTIVATIONS[activation].value)
    flat = oracle.all_weights(h, hnet.basis, hnet.target.num_weights)
    found = torch.cat([w.flatten() for w in hnet.generate(task=1).values()])
    assert oracle.relative_error(found.detach(), flat.detach()) < 1e-12
    leaves = [*hnet.theta, hnet.embedding(1)]
    grads = torch.autograd.grad((found**2).sum(), leaves, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad((flat**2).sum(), leaves, allow_unused=True, materialize_grads=True)
    for have, want in zip(grads, wanted, strict=True):
        assert oracle.relative_error(have, want) < 1e-12


def test_generate_names_weights_as_state_dict_does():
    target = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    hnet = make(target)
    weights = hnet.generate(task=2)
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in target.state_dict().items()}
    target.double().load_state_dict(weights)
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    assert target(x).allclose(hnet(x, 2))


def test_target_is_left_alone_and_holds_no_memory():
    target = fh.nets.MLP(6, (5,), 4)
    before = {name: w.clone() for name, w in target.state_dict().items()}
    hnet = make(target)
    assert all(p.device.type == "meta" for p in hnet.target.module.parameters())
    assert all(torch.equal(w, before[name]) for name, w in target.state_dict().items())
    assert sum(p.numel() for p in hnet.parameters()) == sum(p.numel() for p in hnet.theta) + 3 * 3


def test_embeddings_depend_on_seed_and_index_only():
    few, many, other = make(num_tasks=1), make(num_tasks=4), make(num_tasks=4, seed=1)
    rng = torch.get_rng_state()
    assert [few.add_task() for _ in range(3)] == [1, 2, 3]
    assert torch.equal(torch.get_rng_state(), rng)
    assert few.num_tasks == 4
    assert all(torch.equal(a, b) for a, b in zip(few.parameters(), many.parameters(), strict=True))
    assert not torch.equal(many.embedding(2), other.embedding(2))


def test_heads_give_each_task_its_own_outputs():
    hnet = make(fh.nets.MLP(6, (5,), 6), outputs_per_task=2)
    x = torch.randn(3, 6, dtype=torch.float64)
    full = torch.func.functional_call(hnet.target.module, hnet.generate(1), (x,))
    assert torch.equal(hnet(x, 1), full[:, 2:4])
    # weights 0..34 are the hidden layer's, 35..64 the head's rows of five, 65..70 its biases
    assert hnet.layout.heads == [[(65, 67), (35, 45)], [(67, 69), (45, 55)], [(69, 71), (55, 65)]]
    with pytest.raises(ValueError, match="3 output heads, no room for task 3"):
        hnet.add_task()


def test_dropout_in_the_target_follows_train_and_eval():
    hnet = make(nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 2)))
    x = torch.randn(2, 6, dtype=torch.float64)
    hnet.eval()
    assert torch.equal(hnet(x, 0), hnet(x, 0))
    hnet.train()
    assert not torch.equal(hnet(x, 0), hnet(x, 0))


def test_moves_between_dtypes_with_its_buffers():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 2)
            self.register_buffer("scale", torch.tensor(3.0))

        def forward(self, x):
            return self.scale * self.linear(x)

    hnet = make(Scaled()).to(torch.float32)
    assert hnet(torch.randn(2, 6), 0).dtype == torch.float32


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation": "swish"}, "unknown activation 'swish'; choose from relu"),
        ({"layout": "diagonal"}, "unknown layout 'diagonal'"),
        ({"chunk_size": 0}, "chunk_size, hidden, task_dim and chunk_dim must be at least 1"),
        ({"hidden": (5, 0)}, "must be at least 1"),
        ({"outputs_per_task": 3}, "outputs_per_task=3 does not divide the 4 outputs"),
        ({"target": nn.ReLU()}, "the target ReLU has no parameters"),
        ({"target": nn.LazyLinear(4)}, "the target LazyLinear is lazy: call it once"),
        ({"rest": "thawed"}, "rest must be 'frozen' or 'trained', got 'thawed'"),
        ({"grow_heads": True}, "grow_heads needs outputs_per_task, and a last layer that is generated"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_task_out_of_range_is_named():
    hnet = make()
    for task in (3, -1):
        with pytest.raises(IndexError, match=f"task index {task} out of range: the hypernetwork has 3 tasks"):
            hnet.generate(task)
