"""Steps as a graph: the numbers of plain steps, with nothing read in a step; on the CPU, emulated, and on a GPU."""

import contextlib
import copy
import math
import os
import signal

import pytest
import torch
from emulated_graph import EmulatedGraphs
from networks import NETWORKS, batch, make
from test_loggers import Memory
from test_trainer import toy_hnet, toy_stream
from torch import nn

import fasthyper as fh
from fasthyper import graph
from fasthyper.graph import WARM_UP

UNCAPTURED = 1 + WARM_UP  # the first makes the optimizers' state
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def as_given(x, y):
    return x, y


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def device(request, monkeypatch):
    """The CPU, whose graphs are emulated, and a GPU."""
    if request.param == "cpu":
        monkeypatch.setitem(graph.RUNTIMES, "cpu", EmulatedGraphs)
    return request.param


def trained(device, graph, *, hnet=None, tasks=3, steps=40, heads=False, fit=None, **options):
    layout = {key: options.pop(key) for key in ("layout", "chunk_size", "hidden") if key in options}
    hnet = copy.deepcopy(hnet) if hnet is not None else toy_hnet(tasks, heads=heads, **layout)
    trainer = fh.Trainer(hnet, device=device, graph=graph, **{"lr": 0.02, "beta": 0.3, "progress": False, **options})
    torch.manual_seed(0)
    for task in toy_stream(tasks):
        (fit or fh.Trainer.fit)(trainer, task, steps=steps, batch_size=16)
    return trainer


def same(a, b):
    """Bit for bit on the CPU; on a GPU sums may be taken in another order from run to run."""
    if a.device.type == "cpu":
        assert all(
            torch.equal(x, y) for x, y in zip(a.hnet.state_dict().values(), b.hnet.state_dict().values(), strict=True)
        )
    for x, y in zip(a.hnet.state_dict().values(), b.hnet.state_dict().values(), strict=True):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-9)
    for mine, other in zip(a.results.tasks, b.results.tasks, strict=True):
        assert (mine.steps, mine.samples) == (other.steps, other.samples)
        for curve in ("loss", "drift"):
            steps, numbers = zip(*getattr(mine, curve), strict=True) if getattr(mine, curve) else ((), ())
            other_steps, others = zip(*getattr(other, curve), strict=True) if getattr(other, curve) else ((), ())
            assert steps == other_steps and numbers == (others if a.device.type == "cpu" else pytest.approx(others, 1e-6))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "aligned"},
        {"reg_tasks": 1},
        {"reg_tasks": 1, "reg_per_chunk": True},
        {"plastic": True},
        {"plastic": True, "reg_tasks": 1, "layout": "aligned"},
        {"optimizer": "adamw", "optimizer_options": {"weight_decay": 0.1}},
        {"optimizer_options": {"amsgrad": True}},
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "lr": 1e-3, "optimizer_options": {"momentum": 0.9, "dampening": 0.1}},
        {"optimizer": "rmsprop", "optimizer_options": {"momentum": 0.5, "centered": True}},
        {"lookahead": False},
        {"schedule": "cosine"},
        {"schedule": "warmup-cosine", "optimizer": "adamw", "lr_embedding": 0.1},
        {"beta": 0},
        {"heads": True},
        {"hidden": (), "plastic": True},
        {"chunk_size": None},
    ],
    ids=str,
)
def test_numbers_are_those_of_plain_steps(device, options):
    captured = trained(device, None, **options)
    same(captured, trained(device, False, **options))
    if device == "cpu":
        runtime = captured._runtime
        assert (runtime.warm_ups, runtime.captures, runtime.replays) == (3 * WARM_UP, 3, 3 * (40 - UNCAPTURED))


@pytest.mark.filterwarnings("ignore:RNN module weights")  # cuDNN's, of weights that are made
@pytest.mark.parametrize("layout", ["flat", "aligned"])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_target(device, name, layout):
    """Captured where it can be; else run as it is."""
    build, shape = NETWORKS[name]
    data = batch(shape, 64), torch.arange(64) % 4

    def fit(trainer, task, **sizes):
        trainer.fit(data, **sizes)

    hnet = make(build(), 2, layout=layout)
    obstacles = {"branch": "waits for the device", **({"lstm": "captur", "gru": "captur"} if device == "cuda" else {})}
    obstacle = obstacles.get(name)
    expected = pytest.warns(UserWarning, match=obstacle) if obstacle else contextlib.nullcontext()
    with expected:
        captured = trained(device, None, hnet=hnet, tasks=2, steps=8, fit=fit)
    same(captured, trained(device, False, hnet=hnet, tasks=2, steps=8, fit=fit))
    if device == "cpu":
        assert captured._runtime.captures == (0 if name in ("branch", "own-norm") else 2)


def test_a_step_that_cannot_be_captured_is_run_as_it_is(device, monkeypatch):
    class Refusing(graph.RUNTIMES[device]):
        def __init__(self, device):
            super().__init__(device)
            self.capture = self.refuse

        def refuse(self, run):
            raise RuntimeError("operation not permitted\nand more")

    monkeypatch.setitem(graph.RUNTIMES, device, Refusing)
    with pytest.warns(UserWarning, match="no CUDA graph of a step: operation not permitted;") as seen:
        captured = trained(device, None)
    assert len(seen) == 1
    same(captured, trained(device, False))


def test_dropout_draws_anew_in_each_step(device):
    hnet = make(nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Dropout(0.5), nn.Linear(50, 4)), 2)
    runs = [trained(device, graph, hnet=hnet, tasks=2, steps=12, optimizer="sgd", lr=1e-9) for graph in (None, False)]
    losses = [loss for _, loss in runs[0].results.tasks[0].loss]
    assert len(set(losses)) == 12  # 5 batches an epoch: some examples come again, masks do not
    if device == "cpu":
        same(*runs)


@pytest.mark.parametrize("case", ["hook", "heads and sampled tasks", "off"])
def test_what_is_not_captured(device, case):
    options = {"heads and sampled tasks": {"heads": True, "reg_tasks": 1}}.get(case, {})
    hnet = toy_hnet(3, heads=options.pop("heads", False))
    seen = []
    if case == "hook":
        hnet.target.module.layers[0].register_forward_hook(lambda *_: seen.append(1))
    trainer = trained(device, False if case == "off" else None, hnet=hnet, steps=6, **options)
    if device == "cpu":  # of the first two tasks all are sampled
        assert getattr(trainer._runtime, "captures", 0) == (2 if case == "heads and sampled tasks" else 0)
    if case == "hook":
        assert len(trainer.hnet.target.module.layers[0]._forward_hooks) == 1
    same(trainer, trained(device, False, hnet=hnet, steps=6, **options))


@pytest.mark.parametrize("at", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}}], ids=["adam", "sgd"])
def test_a_step_that_is_not_finite_changes_nothing(device, options, at, monkeypatch):
    """Found only later; then all is as before it, and a fit on other data goes on from there."""
    monkeypatch.setattr(EmulatedGraphs, "prompt", False)
    norm = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    hnet, runs = make(norm, 2), []
    inputs, labels = batch((6,), 32), torch.arange(32) % 4
    for captures in (None, False):
        torch.manual_seed(0)
        trainer = fh.Trainer(
            copy.deepcopy(hnet), device=device, graph=captures, lr=0.02, beta=0.3, progress=False, **options
        )
        trainer.fit((inputs, labels), steps=5, batch_size=32)
        trainer.begin_task(steps=12)
        for _ in range(at):
            trainer._advance(trainer._current, as_given, inputs.to(device), labels.to(device))
        with pytest.raises(fh.NonFiniteLossError, match=f"loss is nan at task 1, step {at}: lower lr"):
            for step in range(at, 12):
                x = torch.full_like(inputs, math.inf) if step == at else inputs
                trainer._advance(trainer._current, as_given, x.to(device), labels.to(device))
            trainer.end_task()
        assert trainer.current_step == at and trainer._current.record.samples == at * 32
        kept = copy.deepcopy({**trainer.hnet.state_dict(), **trainer._current.tensors()})
        runs.append((trainer, kept))
        trainer.fit((inputs, labels), steps=12, batch_size=32)
    (captured, mine), (plain, other) = runs
    assert mine.keys() == other.keys() and all(torch.allclose(mine[key], other[key], rtol=1e-9) for key in mine)
    same(captured, plain)


def test_a_drift_that_is_not_finite_is_named(device):
    for captures in (None, False):
        trainer = fh.Trainer(toy_hnet(2), device=device, graph=captures, lr=0.01, beta=0.2, progress=False)
        stream = toy_stream(2)
        trainer.fit(stream[0], steps=5, batch_size=16)
        trainer.begin_task(steps=20)
        x, y = stream[1].train.to(device).batch(torch.arange(16))
        for _ in range(6):
            trainer.step(x, y)
        trainer.regularizer.embeddings0[:] = math.nan
        with pytest.raises(fh.NonFiniteLossError, match="drift is nan at task 1, step 6: lower lr"):
            trainer.step(x, y)
        assert all(p.isfinite().all() for p in trainer.hnet.parameters())


@pytest.mark.parametrize("capacity", [1, 4, 7, 1024])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("read_every", [0, 100])
def test_every_step_is_heard_of_in_order(device, capacity, prompt, read_every, monkeypatch):
    monkeypatch.setattr(graph, "CAPACITY", capacity)
    monkeypatch.setattr(graph, "READ_EVERY", read_every)
    monkeypatch.setattr(EmulatedGraphs, "prompt", prompt)
    memories = [Memory(), Memory()]
    runs = [trained(device, None if m is memories[0] else False, loggers=[m], tasks=2, steps=30) for m in memories]
    same(*runs)
    assert [entry[:3] for entry in memories[0].steps] == [entry[:3] for entry in memories[1].steps]
    losses = [[entry[3] for entry in memory.steps] for memory in memories]
    assert losses[0] == (losses[1] if device == "cpu" else pytest.approx(losses[1], 1e-6))
    assert all(record.seconds > 0 for record in runs[0].results.tasks)
    if device == "cpu" and capacity == 1024 and read_every:
        assert runs[0]._runtime.waits == 2  # at the end of each task


def test_a_run_that_is_cut_goes_on_bit_for_bit(device, tmp_path, foreground, monkeypatch):
    monkeypatch.setattr(EmulatedGraphs, "prompt", False)
    options = {"reg_tasks": 1, "plastic": True}
    whole, stream = trained(device, None, **options), toy_stream()

    cut = fh.Trainer(toy_hnet(), device=device, out=tmp_path, lr=0.02, beta=0.3, progress=False, **options)
    advance = cut._advance

    def slowly(now, *args):
        advance(now, *args)
        if now.steps == 11:
            os.kill(os.getpid(), signal.SIGINT)

    for task in stream[:2]:
        cut.fit(task, steps=40, batch_size=16)
    cut._advance = slowly
    with pytest.raises(KeyboardInterrupt):
        cut.fit(stream[2], steps=40, batch_size=16)
    resumed = fh.Trainer.load(tmp_path, device=device, progress=False)
    for trainer in (cut, resumed):  # in this process, and in another
        assert trainer.current_step == 11
        trainer.fit(stream[2], steps=40, batch_size=16)
        same(whole, trainer)


def test_a_loop_of_ones_own_with_batches_of_several_sizes(device):
    sizes = [16, 16, 16, 16, 16, 5, 16, 5, 7, 5, 5, 16, 3, 2, 4, 4, 4, 4, 16]

    def fit(trainer, task, steps, batch_size):
        trainer.begin_task(steps=len(sizes))
        for size in sizes:
            x, y = task.train.to(trainer.device).batch(torch.arange(size))
            loss, drift = trainer.step(x, y)
            assert math.isfinite(loss) and math.isnan(drift) == (task.index == 0)
            assert trainer._current.record.steps == trainer.current_step
        trainer.end_task()

    captured = trained(device, None, tasks=2, fit=fit)
    same(captured, trained(device, False, tasks=2, fit=fit))
    if device == "cpu":
        assert captured._runtime.captures == 2 * 2  # of 16 and of 5 examples


def test_what_changes_between_steps_is_heeded(device):
    def fit(trainer, task, steps, batch_size):
        trainer.begin_task(steps=24)
        x, y = task.train.to(trainer.device).batch(torch.arange(16))
        for step in range(24):
            trainer.beta, trainer.lookahead = (0.3, 0.0, 2.0)[step // 8], step < 20
            trainer.step(x, y)
        trainer.evaluate(task)  # leaves evaluation mode
        trainer.end_task()

    same(trained(device, None, fit=fit), trained(device, False, fit=fit))


def test_evaluation_in_a_task_sees_all_steps_launched(device, monkeypatch):
    monkeypatch.setattr(EmulatedGraphs, "prompt", False)
    found = []
    for captures in (None, False):
        trainer = fh.Trainer(toy_hnet(2), device=device, graph=captures, lr=0.02, progress=False)
        trainer.begin_task(steps=10)
        for step in range(10):
            indices = torch.arange(step, step + 16, device=trainer.device)
            trainer._advance(trainer._current, toy_stream(2)[0].train.to(device).batch, indices)
        found.append(trainer.evaluate(toy_stream(2)[0]))
    assert found[0] == found[1]


def test_a_graph_needs_cuda():
    with pytest.raises(ValueError, match="graph=True needs a CUDA device, the hypernetwork is on cpu"):
        fh.Trainer(toy_hnet(), graph=True)
    assert fh.Trainer(toy_hnet(), progress=False)._begin(0, "").graph is None


def test_a_replayed_step_waits_for_nothing(device, monkeypatch):
    """What may take its time is the first steps of a task, and reading at its end."""
    monkeypatch.setattr(EmulatedGraphs, "prompt", False)
    monkeypatch.setattr(graph, "READ_EVERY", 0)
    trainer = fh.Trainer(toy_hnet(2), device=device, lr=0.01, beta=0.2, reg_tasks=1, progress=False)
    stream = toy_stream(2)
    trainer.fit(stream[0], steps=5, batch_size=16)
    trainer.begin_task(steps=40)
    data, order = stream[1].train.to(device), torch.arange(90, device=device)
    batch = data.batch
    for step in range(40):
        if step == UNCAPTURED + 1 and device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        if step == UNCAPTURED + 1 and device == "cpu":
            for name in ("item", "__float__", "__int__", "__bool__", "__index__", "numpy"):
                monkeypatch.setattr(torch.Tensor, name, None)
        trainer._advance(trainer._current, batch, order[step : step + 16])
    monkeypatch.undo()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    assert trainer._current.record.steps < 40  # nothing was waited for
    assert trainer.end_task().steps == 40


def test_a_schedule_of_what_torch_steps_switches_graphs_off_and_forgetting_does_not(device):
    def fit_and_forget(trainer, task, **options):
        fh.Trainer.fit(trainer, task, **options)
        if task.index == 1:
            trainer.forget(0, steps=3)

    for options in ({"schedule": "cosine", "optimizer": "sgd"}, {"fit": fit_and_forget, "plastic": True}):
        same(trained(device, None, **options), trained(device, False, **options))
    for optimizer, has_graph in (("sgd", False), ("adamw", True)):
        trainer = fh.Trainer(toy_hnet(), device=device, schedule="cosine", optimizer=optimizer, progress=False)
        trainer.begin_task(steps=1)
        assert (trainer._current.graph is not None) == has_graph
