"""Unlearning without data: the step against a loop written out by hand, what is kept, and what comes after."""

import copy
import os
import signal

import oracle
import pytest
import torch
from networks import NETWORKS, make
from test_trainer import OPTIMIZERS, recorded_losses, slow_loop, toy_hnet, toy_stream

import fasthyper as fh
from fasthyper.streams.batches import derived_seed

NUM_TASKS = 4


def trained(num_tasks=NUM_TASKS, steps=5, fit=NUM_TASKS - 1, hnet=None, **options):
    options = {"lr": 0.02, "beta": 0.3, "progress": False, **options}
    trainer = fh.Trainer(toy_hnet(num_tasks) if hnet is None else hnet, **options)
    for task in toy_stream(num_tasks)[:fit]:
        trainer.fit(task, steps=steps, batch_size=16)
    return trainer


def slow_forget(hnet, task, others, *, steps, gamma, lr, num_noises, optimizer="adam", lookahead=True, reg_tasks=None):
    """UnCLe's objective from its definition, noise by noise; the look-ahead is a real step of a copied optimizer."""
    optimizer_class, options = OPTIMIZERS[optimizer]
    theta, activation, trained = list(hnet.theta), hnet.activation.value, len(others) + 1

    def weights_of(theta, t):
        return oracle.laid_weights(hnet.layout, oracle.features(theta, hnet.embedding(t).detach(), activation), theta[-1])

    snapshot, now, curve = {t: weights_of(theta, t).detach() for t in others}, optimizer_class(theta, lr=lr, **options), []
    for step in range(steps):
        seed = derived_seed(0, trained, task, step)
        weights = weights_of(theta, task)
        mean = torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed), dtype=weights.dtype)
        noises = mean / num_noises**0.5 + torch.linspace(-1, 1, num_noises)[:, None]  # any with this mean
        now.zero_grad()
        (gamma * (weights - noises).square().sum(1).mean()).backward()
        ahead = [p.detach().clone().requires_grad_() for p in theta]
        if lookahead:
            rehearsal = optimizer_class(ahead, lr=lr, **options)
            rehearsal.load_state_dict(copy.deepcopy(now.state_dict()))
            for a, p in zip(ahead, theta, strict=True):
                a.grad = p.grad.clone()
            rehearsal.step()
            rehearsal.zero_grad()
        some = others
        if reg_tasks is not None and reg_tasks < len(others):
            order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
            some = [others[i] for i in order[:reg_tasks]]
        drift = 0
        for t in some:
            held = oracle.held(hnet.target.num_weights, hnet.target.heads, t)
            drift = drift + (held * (weights_of(ahead, t) - snapshot[t]) ** 2).sum() / len(some)
        drift.backward()
        for p, a in zip(theta, ahead, strict=True):
            p.grad += 0 if a.grad is None else a.grad
        now.step()
        curve.append((weights.detach().square().mean().item(), drift.item()))
    return curve


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "adamw"},
        {"optimizer": "sgd"},
        {"optimizer": "rmsprop"},
        {"lookahead": False},
        {"reg_tasks": 1},
        {"reg_tasks": 2, "plastic": True},
        {"heads": True},
        {"heads": True, "layout": "aligned"},
        {"hidden": ()},
        {"chunk_size": None, "reg_tasks": 1},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "default",
)
def test_forgetting_is_the_slow_loop_in_float64(options):
    options = dict(options)
    hnet = toy_hnet(NUM_TASKS, **{k: options.pop(k) for k in ("heads", "layout", "hidden", "chunk_size") if k in options})
    trainer = trained(hnet=hnet, optimizer_options=OPTIMIZERS[options.get("optimizer", "adam")][1], **options)
    slow = copy.deepcopy(trainer.hnet)
    settings = {"steps": 12, "gamma": 0.05, "lr": 0.01, "num_noises": 4}
    found = trainer.forget(1, **settings)
    options.pop("plastic", None)
    want = slow_forget(slow, 1, [0, 2], **settings, **options)
    assert torch.allclose(torch.tensor(found), torch.tensor(want), rtol=1e-9, atol=1e-12)
    for have, wanted in zip(trainer.hnet.parameters(), slow.parameters(), strict=True):
        assert oracle.relative_error(have.detach(), wanted.detach()) < 1e-9


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"plastic": True},
        {"reg_tasks": 1, "plastic": True},
        {"reg_tasks": 1, "lookahead": False, "schedule": "cosine"},
        {"embedding_init": "previous"},
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("forgotten", [1, 2])
def test_later_tasks_hold_only_what_was_not_forgotten(heads, forgotten, options, tmp_path):
    trainer = trained(hnet=toy_hnet(NUM_TASKS, heads=heads), **options)
    trainer.forget(forgotten, steps=3)
    slow, stream = copy.deepcopy(trainer.hnet), toy_stream(NUM_TASKS)[3:]
    trainer.save(tmp_path)
    settings = {"lr": 0.02, "beta": 0.3, **options}
    want = slow_loop(slow, stream, steps=6, batch_size=16, forgotten=(forgotten,), **settings)
    for going_on in (trainer, fh.Trainer.load(tmp_path, progress=False)):
        found = recorded_losses(going_on, stream, 6, 16)
        assert torch.allclose(torch.tensor(found), torch.tensor(want), rtol=1e-9, atol=1e-12)
        for have, wanted in zip(going_on.hnet.parameters(), slow.parameters(), strict=True):
            assert oracle.relative_error(have.detach(), wanted.detach()) < 1e-9
        assert going_on.results.forgotten == {forgotten: 2} and forgotten not in going_on.results.held


def test_resumes_bit_for_bit_in_the_middle_of_a_task_after_one_was_forgotten(tmp_path):
    task, ends = toy_stream(NUM_TASKS)[3], []
    for cut in (False, True):
        trainer = trained(plastic=True, reg_tasks=1, embedding_init="previous", schedule="cosine")
        trainer.forget(0, steps=3)
        trainer.begin_task(steps=6)
        for step in range(6):
            if cut and step == 3:
                trainer.save(tmp_path)
                trainer = fh.Trainer.load(tmp_path, progress=False)
                assert trainer.begin_task(steps=6) == 3
            trainer.step(*task.train.batch(torch.arange(step, step + 20)))
        ends.append([p.detach().clone() for p in trainer.hnet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_task_is_forgotten_and_the_others_are_not(tmp_path):
    stream = fh.streams.permuted_digits(num_tasks=5)
    hnet = fh.ChunkedHypernet(fh.nets.MLP(64, (40,), 10), 5, chunk_size=300, hidden=(25, 25), task_dim=12, chunk_dim=12)
    # with a constant rate one rounding in three ends in a task that is hardly learned
    trainer = fh.Trainer(hnet, lr=6e-3, beta=1.0, schedule="warmup-cosine", progress=False)
    for task in stream[:4]:
        trainer.fit(task, steps=250, batch_size=64)
    before = trainer.evaluate(stream[:4])
    curve = trainer.forget(1)
    after, scores = trainer.evaluate(stream[:4]), trainer.results.scores()
    assert min(before) > 0.75 and after[1] < 0.2 and all(after[t] > before[t] - 0.03 for t in (0, 2, 3))
    assert curve[-1][0] < 0.02 * curve[0][0]
    assert scores["acc"] == pytest.approx((after[0] + after[2] + after[3]) / 3)
    found, _, _ = fh.infer_tasks(hnet, stream[0].test.batch(torch.arange(90))[0], trainer.results.held)
    assert trainer.results.held == [0, 2, 3] and 1 not in found
    trainer.save(tmp_path)
    trainer = fh.Trainer.load(tmp_path, progress=False)
    trainer.fit(stream[4], steps=250, batch_size=64)  # it does not come back
    later = trainer.evaluate(stream)
    assert later[1] < 0.25 and later[4] > 0.75 and all(later[t] > before[t] - 0.05 for t in (0, 2, 3))
    assert trainer.evaluate(stream[1], infer=True)[0] < 0.25


@pytest.mark.parametrize("how", ["interrupt", "infinite"])
def test_forgetting_that_fails_changes_nothing(how, foreground, monkeypatch, tmp_path):
    trainer = trained(out=tmp_path)
    trainer.flush()
    before, saved = copy.deepcopy(trainer.hnet.state_dict()), (tmp_path / "checkpoint.safetensors").read_bytes()
    step, taken = trainer._forgetting_step, []

    def stepped(*args):
        taken.append(1)
        if len(taken) == 3:
            if how == "infinite":
                monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: torch.tensor(float("inf")))
            else:
                os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(trainer, "_forgetting_step", stepped)
    with pytest.raises(KeyboardInterrupt if how == "interrupt" else fh.NonFiniteLossError):
        trainer.forget(1, steps=9)
    assert len(taken) >= 3 and trainer.results.forgotten == {}
    assert all(torch.equal(value, before[name]) for name, value in trainer.hnet.state_dict().items())
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == saved
    monkeypatch.undo()
    trainer.forget(1, steps=9)
    assert fh.Trainer.load(tmp_path).results.forgotten == {1: 2}


def test_statistics_of_a_forgotten_task_are_those_of_a_new_one():
    build, shape = NETWORKS["convolutions-and-batch-norm"]
    trainer = fh.Trainer(make(build(), 3), progress=False)
    for seed in range(2):
        x = torch.randn(20, *shape, generator=torch.Generator().manual_seed(seed))
        trainer.fit((x, torch.arange(20) % 2), steps=3, batch_size=10)
    rows = trainer.hnet.statistics.rows
    kept = [row.clone() for row in rows(1)]
    trainer.forget(0, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(rows(0), rows(2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(rows(1), kept, strict=True)) and not torch.equal(rows(0)[0], rows(1)[0])


def test_the_only_task_and_all_tasks_may_be_forgotten():
    trainer = trained(fit=2)
    trainer.forget(0, steps=2)
    trainer.forget(1, steps=2)
    assert trainer.results.held == [] and trainer.results.forgotten == {0: 1, 1: 1}
    record = trainer.fit(toy_stream(NUM_TASKS)[2], steps=3, batch_size=16)
    assert record.index == 2 and record.drift == []


def test_names_what_cannot_be_forgotten():
    trainer = trained(fit=2)
    trainer.forget(0, steps=1)
    for task in (0, 2, -1):
        with pytest.raises(ValueError, match=rf"task {task} cannot be forgotten, only trained tasks that were not: \[1\]"):
            trainer.forget(task)
    for wrong in ({"steps": 0}, {"num_noises": 0}, {"gamma": 0}, {"lr": -1.0}):
        with pytest.raises(ValueError, match="steps and num_noises must be at least 1, gamma and lr positive"):
            trainer.forget(1, **wrong)
    trainer.begin_task(steps=2)
    with pytest.raises(RuntimeError, match="task 2 is under way: end it before another is forgotten"):
        trainer.forget(1)
