"""Many tasks in one go against one after the other: accuracies, and the task that is inferred."""

import decimal
import math

import hypothesis
import hypothesis.strategies as st
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
    return torch.cat(right).sum().item() / len(data)


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
    monkeypatch.setattr(inference, "CACHED", 3 * 8 * (3 * hnet.target.num_weights + 4 * 90 * 6))
    assert trainer.evaluate(tasks[::-1]) == want[::-1]
    assert calls == [[6, 5, 4], [3, 2, 1], 0]
    calls.clear()
    monkeypatch.setattr(inference, "MOST_WEIGHTS", 10)  # moving all weights would cost more on a CPU
    assert trainer.evaluate(tasks) == want
    assert calls == list(range(7))
    with pytest.raises(IndexError, match="task index 9 out of range"):
        trainer.evaluate([tasks[0], Task(9, tasks[0].train, tasks[0].test, 4)])
    assert trainer.evaluate([]) == []


def by_entropy(hnet, x, tasks, temperature=1.0):
    """The slow, obvious way."""
    outputs = [hnet.eval()(x, task) for task in tasks]
    entropies = torch.stack([torch.distributions.Categorical(logits=y / temperature).entropy() for y in outputs])
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


def by_gradient(hnet, x, tasks, temperature=1.0):
    """All weights superposed under one leaf a, an example's entropy differentiated at a time."""
    a = torch.full((len(tasks),), 1 / len(tasks), dtype=x.dtype, device=x.device, requires_grad=True)
    heads = [2 * t for t in tasks] if hnet.target.num_heads else [0] * len(tasks)

    def own(k, name, weight):
        is_last = hnet.target.num_heads and name.startswith("layers.1")
        return weight[heads[k] : heads[k] + 2] if is_last else weight

    each = [hnet.generate(t) for t in tasks]
    superposed = {name: sum(a[k] * own(k, name, each[k][name].detach()) for k in range(len(tasks))) for name in each[0]}
    p = (torch.func.functional_call(hnet.target.module, superposed, (x,)) / temperature).softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    slopes = torch.stack([torch.autograd.grad(h, a, retain_graph=True)[0] for h in entropy], 1)
    best = slopes.argmin(0)
    outputs = [hnet.eval()(x[b : b + 1], tasks[k])[0] for b, k in enumerate(best.tolist())]
    return torch.tensor(tasks)[best.cpu()], torch.stack(outputs), slopes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("tasks", [None, [3, 0, 4]], ids=["all", "some"])
@pytest.mark.parametrize("options", [*HEADS, {"heads": False}], ids=str)
def test_scores_are_those_of_autograd_at_any_temperature(options, tasks, temperature, device, monkeypatch):
    monkeypatch.setattr(inference, "BATCH", 16)
    options = dict(options)
    heads = {"outputs_per_task": 2} if options.pop("heads", True) else {}
    hnet = make(fh.nets.MLP(6, (5,), 4 if "grow_heads" in options else 10), 5, **heads, **options).to(device)
    x = batch((6,), 40).to(device)
    for method, slow in (("gradient", by_gradient), ("entropy", by_entropy)):
        found = fh.infer_tasks(hnet, x, tasks, method=method, temperature=temperature)
        want = slow(hnet, x, tasks or list(range(5)), temperature)
        assert torch.equal(found[0].cpu(), want[0]) and found[1].shape == want[1].shape
        assert oracle.relative_error(found[1], want[1].detach()) < 1e-12
        assert oracle.relative_error(found[2], want[2].detach()) < 1e-10


def test_weights_of_a_task_are_made_once_for_all_batches(monkeypatch):
    monkeypatch.setattr(inference, "BATCH", 8)
    monkeypatch.setattr(inference, "_tasks_at_once", lambda *_: 2)
    hnet, calls, generate = make(fh.nets.MLP(6, (5,), 4), 5), [], fh.ChunkedHypernet.generate
    monkeypatch.setattr(fh.ChunkedHypernet, "generate", lambda self, task: calls.append(task) or generate(self, task))
    fh.infer_tasks(hnet, batch((6,), 40))
    assert calls == [[0, 1], [2, 3], 4]


def exact_log_entropy(logits):
    """In 400 digits, more than the exponents of float64 reach."""
    with decimal.localcontext(prec=400):
        powers = [decimal.Decimal(y).exp() for y in logits]
        shares = [power / sum(powers) for power in powers]
        return float((-sum(p * p.ln() for p in shares)).ln())


@hypothesis.given(st.lists(st.floats(-300, 300), min_size=2, max_size=5))
@hypothesis.settings(max_examples=40)
def test_log_of_the_entropy_is_exact_also_where_the_entropy_underflows(logits):
    want = exact_log_entropy(logits)
    assert inference.log_entropy(torch.tensor(logits, dtype=torch.float64)).item() == pytest.approx(want, 1e-12, 1e-12)
    in_single = torch.tensor(logits)
    want = exact_log_entropy(in_single.tolist())
    assert inference.log_entropy(in_single).item() == pytest.approx(want, 1e-5, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_and_huge_outputs_have_an_entropy(dtype):
    big, inf = torch.finfo(dtype).max, math.inf
    rows = [[inf, 0, 1], [-inf, 0, 0], [-inf] * 3, [inf, inf, 0], [big, -big, 0], [-inf, 0, -inf], [-big, -big, -big]]
    found = inference.log_entropy(torch.tensor(rows, dtype=dtype))
    assert found.isfinite().all()
    want = torch.tensor([0, math.log(2), math.log(3), math.log(2), 0, 0, math.log(3)], dtype=dtype)
    assert torch.allclose(found.exp(), want)


@pytest.mark.parametrize("method", ["entropy", "gradient"])
def test_sure_tasks_are_told_apart_where_their_entropies_are_nought(method):
    hnet = make(fh.nets.MLP(6, (), 4), 5, dtype=torch.float32)
    x = batch((6,), 60).float()
    found, _, scores = fh.infer_tasks(hnet, 1e6 * x, method=method)
    assert scores.eq(0).all() and len(found.unique()) > 2
    if method == "entropy":
        gaps = torch.stack([hnet(1e6 * x, t).topk(2).values.diff().squeeze(1).neg() for t in range(5)])
        assert torch.equal(found, gaps.argmax(0))


def test_inference_names_what_is_wrong():
    hnet, x = make(fh.nets.MLP(6, (5,), 4), 2), batch((6,), 4)
    for wrong in ({"method": "agreement"}, {"temperature": 0}):
        with pytest.raises(ValueError, match="method must be one of entropy, gradient and temperature above 0"):
            fh.infer_tasks(hnet, x, **wrong)
    build, shape = NETWORKS["convolutions-and-batch-norm"]
    fixed = make(fh.nets.MLP(6, (5,), 4), 2, outputs_per_task=2, generate="layers.0.*")
    for other, inputs in ((make(build(), 2), batch(shape, 4)), (fixed, x)):
        with pytest.raises(ValueError, match="method='gradient' superposes generated weights"):
            fh.infer_tasks(other, inputs, method="gradient")
        assert other.training and fh.infer_tasks(other, inputs)[0].shape == (4,)


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
@pytest.mark.parametrize("infer", [True, "entropy", "gradient"])
def test_accuracy_without_being_told_the_task(infer, heads):
    trainer, stream = fh.Trainer(toy_hnet(3, heads=heads), lr=0.01, beta=0.5, progress=False), toy_stream(3)
    for task in stream[:2]:
        trainer.fit(task, steps=60, batch_size=32)
    told = trainer.evaluate(stream[:2])
    kept = dict(trainer.results.accuracy)
    for task, found, known in zip(stream[:2], trainer.evaluate(stream[:2], infer=infer), told, strict=True):
        x, y = task.test.batch(torch.arange(90))
        if infer == "gradient":
            tasks, outputs, _ = fh.infer_tasks(trainer.hnet, x, range(2), method=infer)
        else:
            tasks, outputs, _ = by_entropy(trainer.hnet, x.double(), range(2))
        right = (outputs.argmax(1) == y) & ((tasks == task.index) | (not heads))
        assert found == right.double().mean().item() <= known
    assert trainer.results.accuracy == kept


def test_the_temperature_of_evaluation_is_that_of_inference(tmp_path):
    stream = toy_stream(4)
    trainer = fh.Trainer(toy_hnet(4), lr=0.01, beta=0.5, infer="entropy", temperature=20.0, progress=False)
    for task in stream:
        trainer.fit(task, steps=60, batch_size=32)

    def accuracies(temperature):
        found = []
        for task in stream:
            x, y = task.test.batch(torch.arange(90))
            _, outputs, _ = by_entropy(trainer.hnet, x.double(), range(4), temperature)
            found.append((outputs.argmax(1) == y).double().mean().item())
        return found

    row = trainer.evaluate(stream)
    assert row == accuracies(20.0) != accuracies(1.0)
    assert trainer.evaluate(stream, temperature=1.0) == accuracies(1.0)
    assert trainer.results.matrix[3] == row  # evaluated otherwise, results stay as they are
    trainer.save(tmp_path)
    assert fh.Trainer.load(tmp_path, progress=False).evaluate(stream) == row
    with pytest.raises(ValueError, match="a temperature is of inferred tasks, here they are told"):
        trainer.evaluate(stream, infer=False, temperature=2.0)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        fh.Trainer(toy_hnet(2), temperature=0)
