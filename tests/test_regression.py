"""Regression: the toys, mean squared error as loss and as measure, and what a run keeps of it."""

import csv
import json
import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from test_trainer import toy_hnet, toy_stream

import fasthyper as fh
from fasthyper import checkpoint
from fasthyper.losses import mse
from fasthyper.metrics import TaskRecord
from fasthyper.streams import gaussian_mixture, toy_regression
from fasthyper.streams.batches import Batches

TOY = {"chunk_size": None, "hidden": (10, 10), "task_dim": 2, "activation": "sigmoid"}


def hypernetwork(num_tasks=3, num_inputs=1, dtype=torch.float64, num_outputs=1, **options):
    target = fh.nets.MLP(num_inputs, (10, 10), num_outputs, activation="sigmoid")
    return fh.ChunkedHypernet(target, num_tasks, dtype=dtype, **{**TOY, **options})


def trainer_of(hnet, **options):
    return fh.Trainer(hnet, **{"lr": 0.01, "beta": 0.005, "loss": "mse", "progress": False, **options})


def error(hnet, task, data):
    """The slow, obvious way, in float64."""
    outputs = hnet.eval()(data.inputs.to(hnet.basis.dtype), task)
    return F.mse_loss(outputs.double(), data.labels.double()).item()


FUNCTIONS = ((lambda x: x + 3, -4, -2), (lambda x: 2 * x * x - 1, -1, 1), (lambda x: (x - 3) ** 3, 2, 4))


@pytest.mark.parametrize("seed", [42, 1])
def test_toy_regression_is_the_published_one(seed):
    stream = toy_regression(seed=seed)
    places = []
    for task, (function, low, high) in zip(stream, FUNCTIONS, strict=True):
        x, y = task.train.inputs.double(), task.train.labels.double()
        noise = y - function(x)
        assert x.shape == y.shape == (100, 1) and low <= x.min() < low + 0.1 and high - 0.1 < x.max() <= high
        assert abs(noise.mean()) < 0.02 and 0.035 < noise.std() < 0.065
        places.append(torch.cat([(x - low) / (high - low), noise], 1))
        x, y = task.test.inputs.double(), task.test.labels.double()
        torch.testing.assert_close(x[:, 0], torch.linspace(low, high, 50, dtype=torch.float64))
        torch.testing.assert_close(y, function(x), rtol=1e-6, atol=1e-6)
        assert (task.num_classes, task.name) == (0, f"toy-regression/{task.index}")
    assert (places[0] - places[1]).abs().max() < 1e-5 and (places[0] - places[2]).abs().max() < 1e-5  # one draw for all
    if seed == 42:
        assert places[0][0, 0].item() == pytest.approx(0.3745401, abs=1e-6)  # what numpy draws first from this seed


def test_gaussian_mixture_is_the_published_one():
    from numpy.random import RandomState

    means = [(i, j) for i in (-4.0, 0.0, 4.0) for j in (-4.0, 0.0, 4.0)]
    for task, mean in zip(gaussian_mixture(), means, strict=True):
        draws = RandomState(42)
        density = torch.distributions.MultivariateNormal(torch.tensor(mean).double(), 0.25 * torch.eye(2).double())
        for data, n in ((task.train, 1000), (task.test, 50)):
            points = torch.tensor(draws.multivariate_normal(mean, [[0.25, 0], [0, 0.25]], n))
            torch.testing.assert_close(data.inputs.double(), points, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(data.labels.double()[:, 0], density.log_prob(points).exp(), rtol=1e-5, atol=1e-7)
        assert (task.num_classes, task.name) == (0, f"gaussian-mixture/{task.index}")


@pytest.mark.parametrize(("make", "most"), [(toy_regression, 3), (gaussian_mixture, 9)])
def test_toys_have_so_many_tasks(make, most, monkeypatch):
    for wrong in (0, most + 1):
        with pytest.raises(ValueError, match=f"has 1 to {most} tasks, got num_tasks={wrong}"):
            make(wrong)
    assert len(make(2)) == 2
    monkeypatch.setitem(__import__("sys").modules, "numpy.random", None)
    with pytest.raises(fh.errors.DataError, match=r"^numpy is not installed: pip install numpy$"):
        make(1)[0]


def test_paper_s_toy_has_as_many_weights_learns_and_forgets_less_with_the_drift():
    stream, kept = toy_regression(), []
    for beta in (0, 1):
        hnet = hypernetwork(dtype=torch.float32)
        assert hnet.target.num_weights == 141 and sum(p.numel() for p in hnet.parameters()) == 1697
        trainer = trainer_of(hnet, beta=beta)
        before = trainer.evaluate(stream)
        for task in stream[:2]:
            trainer.fit(task, steps=200, batch_size=32)
            trainer.evaluate(stream[: task.index + 1])
        matrix = trainer.results.matrix
        assert matrix[0][0] < 0.05 * before[0]
        assert trainer.results.accuracy[1] == {t: pytest.approx(error(hnet, t, stream[t].test), rel=1e-5) for t in range(2)}
        kept.append(matrix[1][0])
    assert kept[1] < 0.05 * before[0] and kept[0] > 5 * kept[1]


@pytest.mark.parametrize("options", [{}, {"chunk_size": 20, "chunk_dim": 3}, {"outputs_per_task": 2, "num_outputs": 6}])
def test_steps_are_those_of_a_loop_by_hand(options):
    hnet = hypernetwork(**options)
    width = options.get("outputs_per_task", 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, generator=generator)
    data = fh.streams.TaskData(x, torch.cat([x.sin(), x.cos()], 1)[:, :width].squeeze(1))
    target, first = hnet.target.module, hnet.embedding(0)
    theta, losses = [*hnet.theta, first], []
    twins = [p.detach().clone().requires_grad_() for p in theta]
    adams = [torch.optim.Adam(twins[:-1], lr=0.01), torch.optim.Adam(twins[-1:], lr=0.01)]
    batches = Batches(64, 16, seed=0, task=0)
    names = dict(zip(hnet.target.names, hnet.target.shapes, strict=True))
    for step in range(12):
        rows = batches.indices(step)
        features = oracle.features(twins[:-1], twins[-1], torch.sigmoid)
        flat = oracle.laid_weights(hnet.layout, features, twins[-2])
        parts = flat.split([shape.numel() for shape in names.values()])
        named = {name: part.view(names[name]) for name, part in zip(names, parts, strict=True)}
        outputs = torch.func.functional_call(target, named, (data.inputs[rows].double(),))[:, :width]
        loss = ((outputs - data.labels[rows].double()) ** 2).mean()
        for adam in adams:
            adam.zero_grad()
        loss.backward()
        for adam in adams:
            adam.step()
        losses.append(loss.item())
    record = trainer_of(hnet).fit(data, steps=12, batch_size=16)
    assert [value for _, value in record.loss] == pytest.approx(losses, rel=1e-10)
    assert all(oracle.relative_error(p, twin.detach()) < 1e-9 for p, twin in zip(theta, twins, strict=True))


@pytest.mark.parametrize("batch", [7, 2048])
@pytest.mark.parametrize("options", [{}, {"outputs_per_task": 1, "num_outputs": 3}], ids=["shared", "heads"])
def test_errors_are_those_of_one_task_after_the_other(options, batch, monkeypatch):
    monkeypatch.setattr(fh.inference, "BATCH", batch)
    hnet, stream = hypernetwork(**options), toy_regression()
    found = trainer_of(hnet).evaluate(stream)
    assert found == pytest.approx([error(hnet, task.index, task.test) for task in stream], rel=1e-12)


def test_targets_are_shaped_like_outputs_or_refused():
    outputs, targets = torch.tensor([[1.0], [4.0]]), torch.tensor([0.0, 1.0])
    assert mse(outputs, targets).item() == mse(outputs, targets[:, None]).item() == 5.0  # no broadcast to [2, 2]
    with pytest.raises(ValueError, match=r"puts out \[2, 1\], the data ask for \[2, 2\]"):
        mse(outputs, torch.ones(2, 2))
    trainer = trainer_of(hypernetwork())
    with pytest.raises(ValueError, match=r"puts out \[.*1\], the data ask for \[.*2\]"):
        trainer.evaluate([(torch.ones(4, 1), torch.ones(4, 2))])


def test_loss_and_labels_must_go_together():
    classes, targets = (torch.ones(4, 1), torch.arange(4)), (torch.ones(4, 1), torch.ones(4))
    for loss, data, words in (
        ("mse", classes, r"class numbers, which loss='mse' is not for: Trainer\(loss='cross_entropy'\) is"),
        (
            "cross_entropy",
            targets,
            r"floating-point targets, which loss='cross_entropy' is not for: Trainer\(loss='mse'\) is",
        ),
    ):
        trainer = trainer_of(hypernetwork(), loss=loss)
        for call in (lambda: trainer.fit(data, steps=1), lambda: trainer.evaluate([data])):  # noqa: B023
            with pytest.raises(ValueError, match=words):
                call()
    with pytest.raises(ValueError, match="to infer tasks needs classes, loss='mse' has none"):
        trainer_of(hypernetwork()).evaluate([targets], infer=True)
    with pytest.raises(ValueError, match="unknown loss 'l1'; choose from cross_entropy, mse"):
        trainer_of(hypernetwork(), loss="l1")
    with pytest.raises(ValueError, match="relabel=True needs class numbers"):
        list(fh.streams.from_datasets([(targets, targets)], relabel=True))
    assert fh.streams.from_datasets([(targets, targets)])[0].num_classes == 0


def test_a_regression_goes_on_from_its_checkpoint_bit_for_bit(tmp_path):
    stream = toy_regression()

    def train(trainer, tasks):
        for task in tasks:
            trainer.fit(task, steps=8, batch_size=16)
            trainer.evaluate(stream[: task.index + 1])
        return trainer

    whole = train(trainer_of(hypernetwork()), stream)
    train(trainer_of(hypernetwork(), out=tmp_path / "run"), stream[:1])
    again = fh.Trainer.load(tmp_path / "run", progress=False)
    assert again.loss == again.config["loss"] == "mse" and again.hnet.target.module.config["activation"] == "sigmoid"
    train(again, stream[1:])
    assert again.results.accuracy == whole.results.accuracy and again.results.measure == "mse"
    for name, tensor in whole.hnet.state_dict().items():
        assert torch.equal(tensor, again.hnet.state_dict()[name])


def test_checkpoints_from_before_there_were_losses_are_classifications(tmp_path):
    trainer = fh.Trainer(toy_hnet(), progress=False, out=tmp_path)
    trainer.fit(toy_stream()[0], steps=2)
    trainer.evaluate(toy_stream()[:1])
    tensors, state = checkpoint.load(tmp_path)
    del state["trainer"]["loss"], state["results"]["measure"], state["target"]["config"]["activation"]
    checkpoint.save(tmp_path / "old", tensors, state, {"name": "run", "config": {}, "environment": {}, "results": {}})
    old = fh.Trainer.load(tmp_path / "old", progress=False)
    assert old.loss == "cross_entropy" and old.results == trainer.results
    assert old.evaluate(toy_stream()[:1]) == trainer.evaluate(toy_stream()[:1])


def results_of(measure, rows):
    accuracy = {i: dict(enumerate(row)) for i, row in enumerate(rows)}
    return fh.Results([TaskRecord(i) for i in range(len(rows))], accuracy, measure=measure)


def test_scores_of_an_error_have_the_signs_of_those_of_an_accuracy():
    results = results_of("mse", [[0.001], [0.004, 0.02], [0.003, 0.01, 0.0305]])
    scores = results.scores()
    assert math.isnan(scores["acc"]) and scores["mse"] == pytest.approx(0.0145)
    assert scores["forgetting"] == pytest.approx((0.002 - 0.01) / 2) == pytest.approx(-scores["bwt"])
    assert scores["largest_drop"] == pytest.approx(0.002)  # the first task's error rose
    summary = results.summary()
    assert summary.startswith("mean squared error (row") and "%" not in summary and "accuracy" not in summary
    assert f"{'MSE':<13}{'0.0145':>9}   mean squared error after the last task" in summary and "0.0305" in summary
    assert fh.Results.from_json(json.loads(json.dumps(results.to_json()))) == results
    plain = results_of("accuracy", [[0.5], [0.25, 1.0]])
    assert "mse" not in plain.scores() and "  62.50 %   mean accuracy" in plain.summary()
    with pytest.raises(ValueError, match="unknown measure 'mae'; choose from accuracy, mse"):
        fh.Results.from_json({**results.to_json(), "measure": "mae"})


def test_loggers_say_what_was_measured(tmp_path):
    class Memory(fh.loggers.Logger):
        def on_evaluate(self, trained, accuracies, total):
            self.seen = self.measure, accuracies

    memory, file = Memory(), fh.loggers.CSVLogger(tmp_path / "log.csv")
    trainer = trainer_of(hypernetwork(), loggers=[memory, file])
    trainer.fit(toy_regression()[0], steps=1)
    (found,) = trainer.evaluate(toy_regression()[:1])
    file.close()
    assert memory.seen == ("mse", {0: found})
    (row,) = [row for row in csv.DictReader((tmp_path / "log.csv").read_text().splitlines()) if row["event"] == "evaluate"]
    assert float(row["loss"]) == found and row["accuracy"] == ""
    assert fh.loggers._of_evaluation({0: 0.5}, "mse") == {"mse/mean": 0.5, "mse/task_000": 0.5}


@pytest.mark.parametrize("name", ["relu", "elu", "tanh", "sigmoid", "silu"])
def test_activations_of_the_mlp(name):
    net = fh.nets.MLP(3, (5, 4), 2, activation=name).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    layers, y = list(net.layers), x
    for layer in layers[:-1]:
        y = getattr(F, name)(y @ layer.weight.T + layer.bias)
    torch.testing.assert_close(net(x), y @ layers[-1].weight.T + layers[-1].bias)
    again = fh.nets.build(fh.nets.describe(net))
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.double()(x), net(x))


def test_unknown_activation_of_the_mlp():
    with pytest.raises(ValueError, match="unknown activation 'sign'; choose from relu, elu, tanh, sigmoid, silu"):
        fh.nets.MLP(1, (2,), 1, activation="sign")
