"""The training step against a loop written out by hand; what a run records; bad input."""

import copy
import math
import runpy
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F

import fasthyper as fh
from fasthyper.streams.batches import Batches, derived_seed


def toy_stream(num_tasks=3, n=90, features=6, classes=4, dtype=torch.float32):
    """Separable blobs, the centres moved for each task."""

    def make_task(index):
        generator = torch.Generator().manual_seed(index)
        centres = 2 * torch.randn(classes, features, generator=generator)
        labels = torch.arange(n) % classes
        inputs = (centres[labels] + 0.3 * torch.randn(n, features, generator=generator)).to(dtype)
        data = fh.streams.TaskData(inputs, labels)
        return fh.streams.Task(index, data, data, classes)

    return fh.streams.Stream("toy", num_tasks, make_task)


def toy_hnet(num_tasks=3, heads=False, dtype=torch.float64, **options):
    options = {"chunk_size": 13, "hidden": (6, 5), "task_dim": 4, "chunk_dim": 3, "activation": "elu", **options}
    outputs = {"outputs_per_task": 4} if heads else {}
    return fh.ChunkedHypernet(
        fh.nets.MLP(6, (7,), 4 * (num_tasks if heads else 1)), num_tasks, dtype=dtype, **options, **outputs
    )


OPTIMIZERS = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5}),
}


def draw_per_chunk(hnet, num_past, count, task, step):
    regularizer, generator = fh.OutputRegularizer(hnet), torch.Generator()
    regularizer.snapshot(num_past)
    return regularizer.draw(count, per_chunk=True, generator=generator.manual_seed(derived_seed(0, task, step)))


def slow_loop(
    hnet, stream, *, lr, beta, steps, batch_size, optimizer="adam", lookahead=True, plastic=False, reg_tasks=None,
    reg_per_chunk=False, schedule="constant", embedding_init="normal", forgotten=(),
):  # fmt: skip
    """The update of DESIGN 2.6, from its definition: the look-ahead is a real step of a copied optimizer."""
    optimizer_class, options = OPTIMIZERS[optimizer]

    def cosine(step):
        return (1 + math.cos(math.pi * step / steps)) / 2

    factor = {
        "constant": lambda s: 1,
        "cosine": cosine,
        "warmup-cosine": lambda s: min(1, s / (0.1 * steps)) * cosine(s),
    }[schedule]
    losses, num_weights = [], hnet.target.num_weights

    def weights_of(theta, embedding):
        return oracle.laid_weights(hnet.layout, oracle.features(theta, embedding, hnet.activation.value), theta[-1])

    for task in stream:
        held = [t for t in range(task.index) if t not in forgotten]
        theta, old = list(hnet.theta), [hnet.embedding(t) for t in held]
        if embedding_init == "previous" and held:
            hnet.embedding(task.index).data = hnet.embedding(held[-1]).detach().clone()
        if embedding_init == "mean" and held:
            hnet.embedding(task.index).data = sum(hnet.embedding(t).detach() for t in held) / len(held)
        snapshot = [weights_of(theta, e).detach() for e in old]
        moving = theta + (old if plastic else [])
        now = optimizer_class(moving, lr=lr, **options)
        own = optimizer_class([hnet.embedding(task.index)], lr=lr, **options)
        schedulers = [torch.optim.lr_scheduler.LambdaLR(each, factor) for each in (now, own)]
        batches = Batches(len(task.train), batch_size, seed=0, task=task.index)
        for step in range(steps):
            x, y = task.train.batch(batches.indices(step))
            flat = weights_of(theta, hnet.embedding(task.index))
            named = dict(zip(hnet.target.names, flat.split([s.numel() for s in hnet.target.shapes]), strict=True))
            named = {name: named[name].view(s) for name, s in zip(hnet.target.names, hnet.target.shapes, strict=True)}
            logits = torch.func.functional_call(hnet.target.module, named, (x.double(),))
            if hnet.target.heads:
                logits = logits[:, 4 * task.index : 4 * task.index + 4]
            loss = F.cross_entropy(logits, y)
            now.zero_grad()
            own.zero_grad()
            loss.backward()
            for p in moving:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            drift = torch.zeros(())
            if task.index > 0 and beta > 0:
                ahead = [p.detach().clone().requires_grad_() for p in moving]
                if lookahead:
                    rehearsal = optimizer_class(ahead, lr=lr, **options)
                    rehearsal.load_state_dict(copy.deepcopy(now.state_dict()))
                    for a, p in zip(ahead, moving, strict=True):
                        a.grad = p.grad.clone()
                    rehearsal.step()
                    rehearsal.zero_grad()
                tasks, takes = range(len(held)), torch.ones(len(held), num_weights)  # how often each weight is taken
                if reg_tasks is not None and reg_tasks < len(held):
                    generator = torch.Generator().manual_seed(derived_seed(0, task.index, step))
                    tasks = torch.randperm(len(held), generator=generator)[:reg_tasks].tolist()
                    if reg_per_chunk:
                        drawn, tasks = draw_per_chunk(hnet, len(held), reg_tasks, task.index, step), range(len(held))
                        takes = torch.stack([(drawn == t).sum(0)[oracle.chunk_of_weights(hnet.layout)] for t in tasks])
                embeddings = ahead[len(theta) :] if plastic else [e.detach() for e in old]
                for t in tasks:
                    difference = weights_of(ahead[: len(theta)], embeddings[t]) - snapshot[t]
                    counted = oracle.held(num_weights, hnet.target.heads, held[t]) * takes[t]
                    drift = drift + (counted * difference**2).sum() / (reg_tasks if reg_per_chunk else len(tasks))
                (beta * drift).backward()
                for p, a in zip(moving, ahead, strict=True):
                    p.grad += 0 if a.grad is None else a.grad
            now.step()
            own.step()
            for scheduler in schedulers:
                scheduler.step()
            losses.append((loss.item(), drift.item() if task.index > 0 and beta > 0 else math.nan))
    return losses


def recorded_losses(trainer, stream, steps, batch_size):
    losses = []
    original = trainer._step
    trainer._step = lambda *args: losses.append(original(*args)) or losses[-1]
    for task in stream:
        trainer.fit(task, steps=steps, batch_size=batch_size)
    return losses


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "adamw"},
        {"optimizer": "sgd"},
        {"optimizer": "rmsprop"},
        {"lookahead": False},
        {"plastic": True},
        {"plastic": True, "optimizer": "sgd", "lookahead": False},
        {"reg_tasks": 1},
        {"reg_tasks": 1, "plastic": True},
        {"reg_tasks": 1, "reg_per_chunk": True},
        {"reg_tasks": 1, "reg_per_chunk": True, "plastic": True, "layout": "aligned", "heads": True},
        {"schedule": "cosine"},
        {"schedule": "warmup-cosine"},
        {"schedule": "cosine", "optimizer": "adamw", "reg_tasks": 1},
        {"schedule": "cosine", "optimizer": "sgd", "plastic": True},
        {"schedule": "cosine", "optimizer": "rmsprop"},
        {"embedding_init": "previous"},
        {"embedding_init": "mean", "plastic": True},
        {"embedding_init": "previous", "plastic": True, "reg_tasks": 1},
        {"beta": 0},
        {"heads": True},
        {"heads": True, "chunk_size": None},
        {"heads": True, "hidden": (), "plastic": True},
        {"layout": "aligned"},
        {"layout": "aligned", "chunk_size": 5, "plastic": True},
        {"layout": "aligned", "heads": True, "reg_tasks": 1},
        {"layout": "aligned", "heads": True, "hidden": (), "optimizer": "sgd"},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "default",
)
def test_training_is_the_slow_loop_in_float64(options):
    options = dict(options)
    hnet_options = {key: options.pop(key) for key in ("heads", "chunk_size", "hidden", "layout") if key in options}
    settings = {"lr": 0.02, "beta": 0.3, **options}
    stream, steps = toy_stream(), 12
    fast, slow = toy_hnet(**hnet_options), toy_hnet(**hnet_options)
    optimizer_options = OPTIMIZERS[settings.get("optimizer", "adam")][1]
    trainer = fh.Trainer(fast, progress=False, optimizer_options=optimizer_options, **settings)
    found = torch.tensor(recorded_losses(trainer, stream, steps, 16), dtype=torch.float64)
    want = torch.tensor(slow_loop(slow, stream, steps=steps, batch_size=16, **settings), dtype=torch.float64)
    assert torch.allclose(found, want, rtol=1e-9, atol=1e-12, equal_nan=True)
    for have, wanted in zip(fast.parameters(), slow.parameters(), strict=True):
        assert oracle.relative_error(have.detach(), wanted.detach()) < 1e-9


def test_remembers_what_it_has_learned():
    """Forgets without the drift, does not with it."""
    stream = toy_stream(4)
    kept = {}
    for beta in (0.0, 1.0):
        trainer = fh.Trainer(toy_hnet(4, dtype=torch.float32), lr=0.01, beta=beta, progress=False)
        for task in stream:
            trainer.fit(task, steps=150, batch_size=32)
            trainer.evaluate(stream[: task.index + 1])
        kept[beta] = trainer.results
    assert kept[1.0].scores()["acc"] > 0.95 and kept[1.0].scores()["largest_drop"] < 0.05
    assert kept[0.0].scores()["forgetting"] > 0.2


def class_incremental(stream, classes=4):
    def shifted(task):
        train, test = (
            fh.streams.TaskData(data.inputs, data.labels + classes * task.index) for data in (task.train, task.test)
        )
        return fh.streams.Task(task.index, train, test, classes)

    return fh.streams.Stream("class", len(stream), lambda index: shifted(stream[index]))


def test_labels_may_count_over_all_heads():
    own, all_heads, stream = fh.Trainer(toy_hnet(heads=True), lr=0.01, progress=False), fh.Trainer(
        toy_hnet(heads=True), lr=0.01, progress=False
    ), toy_stream()  # fmt: skip
    incremental = class_incremental(stream)
    for task, shifted in zip(stream, incremental, strict=True):
        own.fit(task, steps=30, batch_size=16)
        all_heads.fit(shifted, steps=30, batch_size=16)
    assert all(torch.equal(a, b) for a, b in zip(own.hnet.parameters(), all_heads.hnet.parameters(), strict=True))
    for infer in (False, True, "gradient"):
        assert own.evaluate(stream, infer=infer) == all_heads.evaluate(incremental, infer=infer)
        assert max(all_heads.evaluate(incremental, infer=infer)) > 0.3
    foreign = fh.Trainer(toy_hnet(heads=True), progress=False)
    foreign.fit(stream[0], steps=1)
    with pytest.raises(IndexError, match="out of bounds"):
        foreign.fit((incremental[2].train.inputs, incremental[2].train.labels), steps=1)  # of head 2, given as task 1


def test_one_head_takes_class_incremental_labels_as_they_are():
    hnet, incremental = toy_hnet(3), class_incremental(toy_stream(3))
    wide = fh.ChunkedHypernet(fh.nets.MLP(6, (7,), 12), 3, chunk_size=13, hidden=(6, 5), task_dim=4, dtype=torch.float64)
    trainer = fh.Trainer(wide, lr=0.03, beta=0.1, progress=False)
    for task in incremental:
        trainer.fit(task, steps=120, batch_size=32)
    assert min(trainer.evaluate(incremental)) > 0.9
    x, labels = incremental[1].test.batch(torch.arange(90))
    _, outputs, _ = fh.infer_tasks(wide, x)
    assert trainer.evaluate(incremental[1], infer=True) == [(outputs.argmax(1) == labels).double().mean().item()]
    with pytest.raises(IndexError, match="out of bounds"):
        narrow = fh.Trainer(hnet, progress=False)
        narrow.fit(incremental[0], steps=1)
        narrow.fit(incremental[1], steps=1)


def test_results_hold_what_was_measured():
    stream = toy_stream(2)
    trainer = fh.Trainer(toy_hnet(2), lr=0.01, beta=0.1, progress=False)
    for task in stream:
        record = trainer.fit(task, steps=7, batch_size=16)
        assert (record.index, record.steps, record.samples) == (task.index, 7, 112) and record.seconds > 0
        accuracies = trainer.evaluate(stream[: task.index + 1])
        assert trainer.results.matrix[task.index][: task.index + 1] == accuracies
    assert [len(t.loss) for t in trainer.results.tasks] == [7, 7]
    assert [len(t.drift) for t in trainer.results.tasks] == [0, 7]
    summary = trainer.results.summary()
    assert all(word in summary for word in ("ACC", "BWT", "forgetting", "FWT", "s/task", "samples/s", "peak memory"))


def test_takes_plain_data_and_more_tasks_than_it_began_with():
    inputs, labels = torch.randn(40, 6), torch.arange(40) % 4
    trainer = fh.Trainer(toy_hnet(2, dtype=torch.float32), progress=False)
    dataset = torch.utils.data.TensorDataset(inputs, labels)
    trainer.fit((inputs, labels), steps=2, batch_size=8)
    trainer.fit(dataset, steps=2, batch_size=8)
    with pytest.raises(IndexError, match="task index 2 out of range: the hypernetwork has 2 tasks"):
        trainer.fit(dataset, steps=2)
    assert trainer.hnet.add_task() == 2
    trainer.fit([(x, int(y)) for x, y in dataset], steps=2, batch_size=100)  # a batch holds no more than there is
    assert len(trainer.evaluate([dataset, (inputs, labels)])) == 2


def test_names_what_is_wrong():
    stream, trainer = toy_stream(), fh.Trainer(toy_hnet(), progress=False)
    with pytest.raises(ValueError, match="task 1 is not next: 0 tasks were trained so far, so task 0 is"):
        trainer.fit(stream[1], steps=1)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        trainer.fit(stream[0], steps=0)
    with pytest.raises(ValueError, match="batch size of at least 1"):
        trainer.fit(stream[0], steps=1, batch_size=0)
    with pytest.raises(TypeError, match="got a str"):
        trainer.fit("mnist", steps=1)
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; choose from adam"):
        fh.Trainer(toy_hnet(), optimizer="lion")
    with pytest.raises(ValueError, match="unknown schedule 'step'; choose from constant, cosine"):
        fh.Trainer(toy_hnet(), schedule="step")
    with pytest.raises(ValueError, match="embedding_init must be 'normal', 'previous' or 'mean', got 'zero'"):
        fh.Trainer(toy_hnet(), embedding_init="zero")
    for bad in ({"lr": 0}, {"beta": -1}, {"reg_tasks": 0}, {"lr_embedding": -1.0}, {"seed": -1}):
        with pytest.raises(ValueError, match="must be positive"):
            fh.Trainer(toy_hnet(), **bad)
    with pytest.raises(RuntimeError, match="shape"):
        trainer.fit((torch.randn(8, 5), torch.zeros(8, dtype=torch.int64)), steps=1)


def test_stops_at_a_loss_that_is_not_finite_and_keeps_parameters(tmp_path):
    inputs, labels = torch.randn(32, 6), torch.arange(32) % 4
    trainer = fh.Trainer(toy_hnet(2, dtype=torch.float32), out=tmp_path, progress=False)
    trainer.fit((inputs, labels), steps=3, batch_size=8)
    inputs[5] = math.nan
    with pytest.raises(fh.NonFiniteLossError, match=r"loss is nan at task 1, step \d+: lower lr") as caught:
        trainer.fit((inputs, labels), steps=8, batch_size=8)
    assert all(p.isfinite().all() for p in trainer.hnet.parameters())
    assert f"the state before it is saved in {tmp_path}; its batch: {caught.value.indices}" in str(caught.value)
    assert 5 in caught.value.indices and len(caught.value.indices) == 8
    saved = fh.Trainer.load(tmp_path, progress=False)
    assert saved.current_step == trainer.current_step and len(saved.results.tasks) == 1
    assert all(torch.equal(a, b) for a, b in zip(saved.hnet.parameters(), trainer.hnet.parameters(), strict=True))


@pytest.mark.parametrize("what", ["loss", "drift"])
def test_a_step_that_is_not_finite_changes_nothing(what, monkeypatch):
    stream, trainer = toy_stream(), fh.Trainer(toy_hnet(), lr=0.01, beta=0.2, progress=False)
    trainer.fit(stream[0], steps=3, batch_size=8)
    step, kept = trainer._step, {}

    def spoiled(now, x, y):
        if now.record.steps == 2:
            kept.update(parameters=copy.deepcopy(list(trainer.hnet.parameters())), state=copy.deepcopy(now.tensors()))
            if what == "loss":
                x = torch.full_like(x, math.inf)
            else:
                drift = trainer._drift
                monkeypatch.setattr(trainer, "_drift", lambda *args: (torch.tensor(math.nan), drift(*args)[1]))
        return step(now, x, y)

    monkeypatch.setattr(trainer, "_step", spoiled)
    with pytest.raises(fh.NonFiniteLossError, match=f"{what} is nan at task 1, step 2: lower lr"):
        trainer.fit(stream[1], steps=5, batch_size=8)
    assert all(torch.equal(p, k) for p, k in zip(trainer.hnet.parameters(), kept["parameters"], strict=True))
    state = trainer._current.tensors()
    assert state.keys() == kept["state"].keys() and all(torch.equal(state[k], kept["state"][k]) for k in state)


def test_quick_start_of_the_readme_runs_verbatim(tmp_path, monkeypatch):
    """The code block as it stands; only the data and the number of steps are made small."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    block = next(part for part in readme.split("```python\n")[1:] if "fh.streams.permuted_mnist" in part).split("```")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        fh.streams, "permuted_mnist", lambda num_tasks, seed: toy_stream(num_tasks, features=1024, classes=10)
    )
    fit = fh.Trainer.fit
    monkeypatch.setattr(fh.Trainer, "fit", lambda self, task, steps, batch_size: fit(self, task, steps=1, batch_size=4))
    Path("quick_start.py").write_text(block)
    names = runpy.run_path("quick_start.py")
    assert names["weights"].keys() == names["target"].state_dict().keys()
    assert names["hnet"].num_tasks == 11
    assert fh.Trainer.load("runs/p10").results == names["trainer"].results


def test_a_loop_of_ones_own_takes_the_steps_of_fit():
    fitted, stepped = (fh.Trainer(toy_hnet(2), lr=0.01, beta=0.1, progress=False) for _ in range(2))
    for task in toy_stream(2):
        fitted.fit(task, steps=6, batch_size=16)
        batches = Batches(len(task.train), 16, seed=0, task=task.index)
        assert stepped.begin_task(steps=6, name=task.name) == 0
        for step in range(6):
            assert stepped.current_step == step
            stepped.step(*task.train.batch(batches.indices(step)))
        assert stepped.begin_task(steps=6) == 6  # still the same task
        record = stepped.end_task()
        assert record.seconds > 0 and (record.steps, record.samples) == (6, 96)
        assert (record.loss, record.drift) == (fitted.results.tasks[-1].loss, fitted.results.tasks[-1].drift)
    assert all(torch.equal(a, b) for a, b in zip(fitted.hnet.parameters(), stepped.hnet.parameters(), strict=True))
    for call in (lambda: stepped.step(torch.ones(1, 6), torch.zeros(1)), stepped.end_task):
        with pytest.raises(RuntimeError, match="no task is under way: call begin_task first"):
            call()
