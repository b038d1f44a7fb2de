"""The same numbers as hypnettorch 0.0.4: its hypernetwork, its regularizer, its look-ahead, its training loop."""

import oracle
import pytest
import torch
from test_trainer import recorded_losses, toy_stream

import fasthyper as fh
from fasthyper.bench.peers import PeerTrainer, peer_of
from fasthyper.compat.convert import in_hypnettorch_order
from fasthyper.streams.batches import Batches

pytest.importorskip("hypnettorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own, from numpy and matplotlib

TARGET = (6, (20, 15), 4)
OPTIONS = {"chunk_size": 60, "hidden": (12, 10), "task_dim": 8, "chunk_dim": 5, "activation": "elu"}


def make(num_tasks, dtype):
    return fh.ChunkedHypernet(fh.nets.MLP(*TARGET), num_tasks, dtype=dtype, **OPTIONS)


def test_generates_the_same_weights(dtype):
    hnet = make(3, dtype)
    _, peer = peer_of(hnet)
    for have, want in zip(hnet.generate(2).values(), peer.forward(cond_id=2), strict=True):
        assert oracle.relative_error(have.detach(), want.detach()) < {torch.float64: 1e-14, torch.float32: 1e-6}[dtype]


@pytest.mark.parametrize("targets", ["stored", "online"])
def test_regularizer_has_the_same_value_and_gradients(targets):
    from hypnettorch.utils import hnet_regularizer as hreg

    hnet = make(4, torch.float64)
    _, peer = peer_of(hnet)
    regularizer = fh.OutputRegularizer(hnet)
    regularizer.snapshot(3)
    where = (
        {"targets": hreg.get_current_targets(3, peer)}
        if targets == "stored"
        else {
            "prev_theta": [p.detach().clone() for p in peer.unconditional_params],
            "prev_task_embs": [p.detach().clone() for p in peer.conditional_params],
        }
    )
    generator = torch.Generator().manual_seed(0)
    step = [0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in hnet.theta]
    theirs = hreg.calc_fix_target_reg(peer, 3, dTheta=in_hypnettorch_order(hnet, step), **where)
    ours = regularizer.penalty([p + d for p, d in zip(hnet.theta, step, strict=True)])
    assert oracle.relative_error(ours.detach(), theirs.detach()) < 1e-12
    grads = in_hypnettorch_order(hnet, list(torch.autograd.grad(ours, hnet.theta)))
    for have, want in zip(grads, torch.autograd.grad(theirs, peer.unconditional_params), strict=True):
        assert oracle.relative_error(have, want) < 1e-10


@pytest.mark.parametrize("targets", ["snapshot", "given"])
def test_regularizer_with_fisher_estimates_has_the_same_value_and_gradients(targets):
    from hypnettorch.utils import hnet_regularizer as hreg

    hnet = make(4, torch.float64)
    _, peer = peer_of(hnet)
    regularizer = fh.OutputRegularizer(hnet)
    regularizer.snapshot(3)
    generator = torch.Generator().manual_seed(0)

    def random(shapes):
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    fisher = [[f**2 for f in random(peer.target_shapes)] for _ in range(3)]
    theirs_to = (
        hreg.get_current_targets(3, peer) if targets == "snapshot" else [random(peer.target_shapes) for _ in range(3)]
    )
    step = [0.1 * d for d in random([p.shape for p in hnet.theta])]
    peer_step, scaling = in_hypnettorch_order(hnet, step), [0.5, 1.0, 2.0]
    theirs = hreg.calc_fix_target_reg(
        peer, 3, targets=theirs_to, dTheta=peer_step, fisher_estimates=fisher, reg_scaling=scaling
    )
    ours_to, importance = ([torch.cat([w.flatten() for w in ws]) for ws in rows] for rows in (theirs_to, fisher))
    ours = regularizer.penalty(
        [p + d for p, d in zip(hnet.theta, step, strict=True)],
        importance=importance,
        targets=None if targets == "snapshot" else ours_to,
        scaling=torch.tensor(scaling, dtype=torch.float64),
    )
    assert oracle.relative_error(ours.detach(), theirs.detach()) < 1e-12
    grads = in_hypnettorch_order(hnet, list(torch.autograd.grad(ours, hnet.theta)))
    for have, want in zip(grads, torch.autograd.grad(theirs, peer.unconditional_params), strict=True):
        assert oracle.relative_error(have, want) < 1e-10


def peer_losses(hnet, stream, steps, batch_size, **settings):
    trainer, losses = PeerTrainer(hnet, **settings), []
    for task in stream:
        trainer.begin(task.index)
        batches = Batches(len(task.train), batch_size, seed=0, task=task.index)
        for step in range(steps):
            x, y = task.train.batch(batches.indices(step))
            losses.append(trainer.step(x.to(hnet.basis.dtype), y))
    return losses


@pytest.mark.parametrize(("dtype", "eps", "tolerance"), [(torch.float64, 1e-20, 1e-9), (torch.float32, 1e-8, 1e-3)], ids=str)
def test_200_steps_give_the_loss_curve_of_its_loop(dtype, eps, tolerance):
    """Float32 rounding, 1e-7 a step, grows along 200 steps of Adam; float64 shows that nothing else differs but ``eps``,
    which its look-ahead adds before the bias correction and Adam after it."""
    stream, settings = toy_stream(4), {"lr": 2e-3, "beta": 0.5}
    theirs = peer_losses(make(4, dtype), stream, 50, 16, eps=eps, **settings)
    trainer = fh.Trainer(make(4, dtype), optimizer_options={"eps": eps}, progress=False, **settings)
    ours = recorded_losses(trainer, stream, 50, 16)
    theirs, ours = torch.tensor(theirs, dtype=torch.float64), torch.tensor(ours, dtype=torch.float64)
    assert ours.shape == (200, 2) and torch.equal(ours.isnan(), theirs.isnan())
    assert torch.allclose(ours, theirs, rtol=tolerance, atol=0, equal_nan=True)
