"""Many tasks in one go against one after the other: accuracies, and the task that is inferred."""

import oracle
import pytest
import torch
from networks import NETWORKS, batch, make
from test_trainer import toy_hnet, toy_stream

import fasthyper as fh
from fasthyper import inference
from fasthyper.streams import Task, TaskData

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
HEADS = [{}, {"layout": "aligned"}, {"grow_heads": True}]


def tasks_of(shape, sizes, classes=4):
    return [TaskData(batch(shape, n, seed=t).float(), torch.arange(n) % classes) for t, n in enumerate(sizes)]


def accuracy(hnet, task, data):
    right = []
    for indices in torch.arange(len(data)).split(inference.BATCH):
        x, y = data.to(hnet.basis.device).batch(indices)
        right.append(hnet.eval()(x.to(hnet.basis.dtype), task).argmax(1) == y)
    return torch.cat(right).double().mean().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(50, 50, 50, 50, 50), (50, 50, 20, 33, 50)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:RNN module weights")
def test_accuracies_are_those_of_one_task_after_the_other(name, sizes, device, monkeypatch):
    monkeypatch.setattr(inference, "BATCH", 16)
    build, shape = NETWORKS[name]
    hnet = make(build(), 5).to(device)
    for seed in range(2):
        hnet(batch(shape, seed=seed).to(device), seed)  # statistics of their own
    data = tasks_of(shape, sizes)
    found = fh.Trainer(hnet, progress=False).evaluate(data)
    assert found == [accuracy(hnet, task, part) for task, part in enumerate(data)]


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_each_task_is_evaluated_with_its_own_head(options):
    hnet = make(fh.nets.MLP(6, (5,), 4 if "grow_heads" in options else 10), 5, outputs_per_task=2, **options)
    data = tasks_of((6,), [30] * 5, classes=2)
    found = fh.Trainer(hnet, progress=False).evaluate(data)
    assert found == [accuracy(hnet, task, part) for task, part in enumerate(data)]


def test_groups_fit_in_memory_and_the_device_is_read_once(monkeypatch):
    hnet = toy_hnet(7)
    trainer = fh.Trainer(hnet, progress=False)
    tasks, calls, reads = list(toy_stream(7)), [], []
    want = [accuracy(hnet, task.index, task.test) for task in tasks]
    generate, tolist = fh.ChunkedHypernet.generate, torch.Tensor.tolist
    monkeypatch.setattr(fh.ChunkedHypernet, "generate", lambda self, task: calls.append(task) or generate(self, task))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    assert trainer.evaluate(tasks) == want
    assert calls == [list(range(7))] and len(reads) == 1
    calls.clear()
    monkeypatch.setattr(inference, "MEMORY", 3 * 8 * (3 * hnet.target.num_weights + 4 * 90 * 6))
    assert trainer.evaluate(tasks[::-1]) == want[::-1]
    assert calls == [[6, 5, 4], [3, 2, 1], 0]
    calls.clear()
    monkeypatch.setattr(inference, "MOST_WEIGHTS", 10)  # moving all weights would cost more on a CPU
    assert trainer.evaluate(tasks) == want
    assert calls == list(range(7))
    with pytest.raises(IndexError, match="task index 9 out of range"):
        trainer.evaluate([tasks[0], Task(9, tasks[0].train, tasks[0].test, 4)])
    assert trainer.evaluate([]) == []


def by_entropy(hnet, x, tasks):
    """The slow, obvious way."""
    outputs = [hnet.eval()(x, task) for task in tasks]
    entropies = torch.stack([torch.distributions.Categorical(logits=y).entropy() for y in outputs])
    best = entropies.argmin(0)
    return torch.tensor(tasks)[best.cpu()], torch.stack([outputs[k][b] for b, k in enumerate(best.tolist())]), entropies


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at_once", [1, 2, 9])
@pytest.mark.parametrize("tasks", [None, [3, 0, 4]], ids=["all", "some"])
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_inferred_task_is_that_of_least_entropy(options, tasks, at_once, device, monkeypatch):
    monkeypatch.setattr(inference, "_tasks_at_once", lambda *_: at_once)
    hnet = make(fh.nets.MLP(6, (5,), 4 if "grow_heads" in options else 10), 5, outputs_per_task=2, **options).to(device)
    x = batch((6,), 40).to(device)
    found, want = fh.infer_tasks(hnet, x, tasks), by_entropy(hnet, x, tasks or range(5))
    assert found[0].dtype == torch.int64 and torch.equal(found[0].cpu(), want[0]) and len(want[0].unique()) > 1
    assert oracle.relative_error(found[1], want[1].detach()) < 1e-12
    assert oracle.relative_error(found[2], want[2].detach()) < 1e-12


@pytest.mark.parametrize("name", ["convolutions-and-batch-norm", "branch", "lstm"])
def test_inference_leaves_the_hypernetwork_as_it_was(name):
    build, shape = NETWORKS[name]
    hnet = make(build(), 3)
    before, x = [b.clone() for b in hnet.buffers()], batch(shape, 10)
    found = fh.infer_tasks(hnet, x.float())
    assert hnet.training and all(torch.equal(b, old) for b, old in zip(hnet.buffers(), before, strict=True))
    assert torch.equal(found[0], by_entropy(hnet, x.float().double(), range(3))[0])


def test_certain_outputs_have_no_entropy():
    hnet = make(fh.nets.MLP(6, (), 4), 2)
    assert fh.infer_tasks(hnet, 1e9 * batch((6,), 4))[2].eq(0).all()
    with pytest.raises(ValueError, match="infer_tasks needs at least one task"):
        fh.infer_tasks(hnet, batch((6,), 4), [])
    with pytest.raises(IndexError, match="task index 2 out of range"):
        fh.infer_tasks(hnet, batch((6,), 4), [0, 2])


@pytest.mark.parametrize("heads", [False, True])
def test_accuracy_without_being_told_the_task(heads):
    trainer, stream = fh.Trainer(toy_hnet(3, heads=heads), lr=0.01, beta=0.5, progress=False), toy_stream(3)
    for task in stream[:2]:
        trainer.fit(task, steps=60, batch_size=32)
    told = trainer.evaluate(stream[:2])
    kept = dict(trainer.results.accuracy)
    for task, found, known in zip(stream[:2], trainer.evaluate(stream[:2], infer=True), told, strict=True):
        x, y = task.test.batch(torch.arange(90))
        tasks, outputs, _ = by_entropy(trainer.hnet, x.double(), range(2))
        right = (outputs.argmax(1) == y) & ((tasks == task.index) | (not heads))
        assert found == right.double().mean().item() <= known
    assert trainer.results.accuracy == kept
