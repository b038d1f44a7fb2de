"""Avalanche 0.6.0 itself: the strategy against the trainer, metrics against ours, the plugin against a loop by hand."""

import gzip
import io
import signal

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import fasthyper as fh
from fasthyper.streams.stream import pixel_permutation

bridge = pytest.importorskip("fasthyper.compat.avalanche", reason="avalanche-lib is not installed")

from avalanche.benchmarks import benchmark_from_datasets, nc_benchmark, tensors_benchmark  # noqa: E402
from avalanche.benchmarks.utils import as_classification_dataset  # noqa: E402
from avalanche.core import SupervisedPlugin  # noqa: E402
from avalanche.evaluation.metrics import accuracy_metrics, bwt_metrics, forgetting_metrics, loss_metrics  # noqa: E402
from avalanche.logging import TextLogger  # noqa: E402
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin  # noqa: E402
from avalanche.training.supervised import Naive  # noqa: E402

FEATURES, CLASSES = 9, 6


def examples(n, seed):
    """Separable blobs."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(CLASSES, FEATURES, generator=generator)
    labels = torch.arange(n) % CLASSES
    return centres[labels] + 0.3 * torch.randn(n, FEATURES, generator=generator.manual_seed(seed)), labels


def dataset(inputs, labels):
    data = TensorDataset(inputs, labels)
    data.targets = labels
    return data


def split(task_labels=True, from_zero=True):
    """Two of the six classes per experience, as Avalanche makes SplitMNIST."""
    return nc_benchmark(
        dataset(*examples(90, 1)),
        dataset(*examples(36, 2)),
        n_experiences=3,
        task_labels=task_labels,
        shuffle=False,
        class_ids_from_zero_in_each_exp=from_zero,
    )


def permuted(task_labels=True):
    """The features in another order in each experience, as Avalanche makes PermutedMNIST."""
    orders = [pixel_permutation(FEATURES, 0, task) for task in range(3)]
    train, test = ([dataset(x[:, order], y) for order in orders] for x, y in (examples(90, 1), examples(36, 2)))
    return nc_benchmark(
        train,
        test,
        n_experiences=3,
        task_labels=task_labels,
        shuffle=False,
        class_ids_from_zero_in_each_exp=True,
        one_dataset_per_exp=True,
    )


BENCHMARKS = {"split": split, "permuted": permuted}


def hnet(name="permuted", **options):
    heads = {"outputs_per_task": 2} if name == "split" else {}
    options = {"chunk_size": 23, "hidden": (8, 7), "task_dim": 6, "chunk_dim": 4, "activation": "elu", **heads, **options}
    return fh.ChunkedHypernet(fh.nets.MLP(FEATURES, (10,), CLASSES), 3, **options)


def trainer(name="permuted", **options):
    return fh.Trainer(hnet(name), **{"lr": 0.01, "beta": 1.0, "progress": False, **options})


def evaluator(out=None):
    return EvaluationPlugin(
        accuracy_metrics(minibatch=True, epoch=True, experience=True, stream=True),
        loss_metrics(epoch=True, experience=True),
        forgetting_metrics(experience=True, stream=True),
        bwt_metrics(experience=True, stream=True),
        loggers=[TextLogger(out or io.StringIO())],
    )


def strategy(trainer, **options):
    return bridge.HypernetStrategy(trainer=trainer, **{"train_mb_size": 16, "evaluator": evaluator(), **options})


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("task_labels", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_strategy_trains_as_fit_does_and_metrics_agree_with_ours(name, task_labels):
    benchmark = BENCHMARKS[name](task_labels)
    stream = fh.streams.from_avalanche(benchmark)
    ours, theirs, log = trainer(name), trainer(name), io.StringIO()
    run = strategy(theirs, train_epochs=8, evaluator=evaluator(log))
    for experience, task in zip(benchmark.train_stream, stream, strict=True):
        ours.fit(task, steps=8 * (len(task.train) // 16), batch_size=16)
        ours.evaluate(stream)  # the whole stream, as Avalanche's users do
        seen = run.train(experience)
        found = run.eval(benchmark.test_stream)
        label = task.index if task_labels else 0
        assert seen[f"Top1_Acc_Epoch/train_phase/train_stream/Task{label:03}"] > 0
        assert found[f"Loss_Epoch/train_phase/train_stream/Task{label:03}"] == pytest.approx(
            torch.tensor([loss for _, loss in ours.results.tasks[-1].loss])[-(len(task.train) // 16) :].mean().item()
        )
        for test in stream:
            key = f"Top1_Acc_Exp/eval_phase/test_stream/Task{test.index if task_labels else 0:03}/Exp{test.index:03}"
            assert found[key] == pytest.approx(ours.results.accuracy[task.index][test.index])
    assert equal(ours.hnet, theirs.hnet) and [r.loss for r in ours.results.tasks] == [r.loss for r in theirs.results.tasks]
    matrix = ours.results.matrix
    assert fh.metrics.acc(matrix) > 0.9
    assert found["StreamForgetting/eval_phase/test_stream"] == pytest.approx(fh.metrics.forgetting(matrix))
    assert found["StreamBWT/eval_phase/test_stream"] == pytest.approx(fh.metrics.bwt(matrix))
    assert "End of training phase" in log.getvalue() and "Top1_Acc_Stream" in log.getvalue()


class Events(SupervisedPlugin):
    """What is called, in order, and the state of an iteration."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.calls, self.stop_after = [], stop_after
        self.outputs = self.batch = None

    def after_training_iteration(self, strategy, **kwargs):
        self.calls.append("iteration")
        self.outputs, self.batch, self.loss = strategy.mb_output, strategy.mbatch, strategy.loss
        if len(self.calls) == self.stop_after:
            strategy.stop_training()


for event in ("training", "training_exp", "training_epoch", "eval", "eval_exp"):
    for when in ("before", "after"):
        name = f"{when}_{event}"
        setattr(Events, name, lambda self, strategy, name=name, **kwargs: self.calls.append(name))


def test_callbacks_come_in_avalanches_order():
    benchmark, events = permuted(), Events()
    run = strategy(trainer(), plugins=[events], train_epochs=2, train_mb_size=45, eval_every=1)
    run.train(benchmark.train_stream[0], eval_streams=[benchmark.test_stream[:1]])
    epoch = ["before_training_epoch", "iteration", "iteration", "after_training_epoch"]
    train = ["before_training", "before_training_exp", *epoch, *epoch, "after_training_exp", "after_training"]
    assert [call for call in events.calls if "eval" not in call] == train
    evaluation = ["before_eval", "before_eval_exp", "after_eval_exp", "after_eval"]
    assert [call for call in events.calls if "eval" in call] == 3 * evaluation  # before the first epoch, and after each
    assert events.calls[1:5] == evaluation and events.calls[10:14] == evaluation
    x, y, t = events.batch
    assert x.shape == (45, FEATURES) and t.tolist() == [0] * 45 and not events.outputs.requires_grad
    assert torch.allclose(F.cross_entropy(events.outputs, y), events.loss)
    assert run.clock.train_iterations == 4


def test_training_can_be_stopped():
    benchmark, events = permuted(), Events(stop_after=6)
    run = strategy(trainer(), plugins=[events], train_epochs=5)
    run.train(benchmark.train_stream[0])
    assert run.trainer.results.tasks[0].steps == events.calls.count("iteration") < 6
    run.train(benchmark.train_stream[1])
    assert [record.index for record in run.trainer.results.tasks] == [0, 1]


def test_batches_of_avalanches_loader():
    benchmark, run = permuted(), strategy(trainer(), in_memory=False, train_mb_size=40)
    run.train(benchmark.train_stream[0])
    assert run.trainer.results.tasks[0].steps == 3  # 40, 40, 10
    run.in_memory = True
    run.train(benchmark.train_stream[1], drop_last=True)
    assert run.trainer.results.tasks[1].steps == 2
    assert run.trainer.results.tasks[1].samples == 80


class OwnLoader(SupervisedPlugin):
    """Brings batches of its own, of a given task, as a replay plugin does."""

    def before_training_exp(self, strategy, **kwargs):
        strategy.dataloader = [[*examples(6, 0), torch.tensor([0, 0, 0, self.last, self.last, self.last])]] * 4


def test_a_plugins_own_batches_are_taken_and_must_be_of_one_task():
    plugin, benchmark = OwnLoader(), permuted()
    run, plugin.last = strategy(trainer(), plugins=[plugin]), 0
    run.train(benchmark.train_stream[0])
    assert run.trainer.results.tasks[0].steps == 4
    with pytest.raises(ValueError, match="a batch of experience 1 holds examples of other tasks than its own"):
        run.train(benchmark.train_stream[1])


def test_goes_on_from_a_checkpoint(tmp_path):
    benchmark, whole = permuted(), strategy(trainer())
    whole.train(benchmark.train_stream)
    first = strategy(trainer())
    first.train(benchmark.train_stream[:2])
    first.trainer.save(tmp_path / "run")
    second = strategy(fh.Trainer.load(tmp_path / "run", progress=False))
    second.train(benchmark.train_stream[2])
    assert equal(whole.trainer.hnet, second.trainer.hnet)


class Interrupts(SupervisedPlugin):
    """Presses Ctrl-C in the given iteration."""

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.trainer.current_step == self.at:
            signal.raise_signal(signal.SIGINT)


def test_goes_on_after_ctrl_c_in_the_middle_of_an_experience(tmp_path, foreground):
    benchmark, whole = permuted(), strategy(trainer(), train_epochs=3)
    whole.train(benchmark.train_stream[:2])
    keys = Interrupts()
    run = strategy(trainer(out=tmp_path / "run"), plugins=[keys], train_epochs=3)
    for at in (8, 3):
        keys.at = at  # 5 iterations an epoch
        with pytest.raises(KeyboardInterrupt):
            run.train(benchmark.train_stream[len(run.trainer.results.tasks)])
        assert run.trainer.current_step == at
        run = strategy(fh.Trainer.load(tmp_path / "run", out=tmp_path / "run", progress=False), train_epochs=3)
        assert run.trainer.current_step == at
        run.train(benchmark.train_stream[len(run.trainer.results.tasks)])
        run = strategy(run.trainer, plugins=[keys], train_epochs=3)
    assert equal(whole.trainer.hnet, run.trainer.hnet)
    assert [record.steps for record in run.trainer.results.tasks] == [15, 15]


def test_more_experiences_than_embeddings_and_data_without_labels():
    """A plain benchmark knows neither task labels nor classes; embeddings are made as they are needed."""
    parts = [[as_classification_dataset(dataset(*examples(36, 7 * t + u))) for t in range(4)] for u in range(2)]
    benchmark = benchmark_from_datasets(train=parts[0], test=parts[1])
    run = strategy(
        trainer(), evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[TextLogger(io.StringIO())])
    )
    for experience in benchmark.train_stream:
        run.train(experience)
    run.eval(benchmark.test_stream)
    assert run.trainer.hnet.num_tasks == 4 and len(run.trainer.results.tasks) == 4
    assert fh.streams.from_avalanche(benchmark)[3].num_classes == CLASSES


def test_strategy_names_what_is_wrong():
    with pytest.raises(TypeError, match="EWCPlugin acts in before_backward, which HypernetStrategy does not call"):
        strategy(trainer(), plugins=[EWCPlugin(0.1)])
    with pytest.raises(ValueError, match="experience 1 is not next: 0 were trained so far, so experience 0 is"):
        strategy(trainer()).train(permuted().train_stream[1])
    run = strategy(trainer("split"))
    run.train(split(from_zero=False).train_stream[0])
    with pytest.raises(ValueError, match="labels of experience 1 go to 3, but each task has 2 outputs: make the benchmark"):
        run.train(split(from_zero=False).train_stream[1])


def test_module_takes_batches_that_mix_tasks():
    module = bridge.HypernetModule(hnet())
    x, labels = torch.randn(7, FEATURES), torch.tensor([2, 0, 2, 1, 0, 2, 2])
    outputs = module(x, labels)
    for i, task in enumerate(labels.tolist()):
        torch.testing.assert_close(outputs[i : i + 1], module(x[i : i + 1], task))
    assert torch.equal(module(x, torch.full((7,), 1)), module(x, 1))
    module.adaptation(tensors_benchmark(train_tensors=[examples(6, 0)], test_tensors=[], task_labels=[4]).train_stream[0])
    assert module.hnet.num_tasks == 5 and module(x, None).keys() == {4}


def by_hand(benchmark, hypernet, beta, lookahead):
    """What Naive and the plugin do to a hypernetwork, written out."""
    optimizer = torch.optim.Adam(hypernet.parameters(), lr=0.01)
    regularizer, losses = fh.OutputRegularizer(hypernet), []
    for task, experience in enumerate(benchmark.train_stream):
        regularizer.snapshot(task)
        data = fh.streams.as_task_data([(x, y) for x, y, _ in experience.dataset])
        for rows in torch.arange(len(data)).split(16):
            x, y = data.batch(rows)
            optimizer.zero_grad()
            loss = F.cross_entropy(hypernet(x.to(hypernet.basis.dtype), task), y)
            if task > 0 and not lookahead:
                loss = loss + beta * regularizer.penalty()
            loss.backward()
            if task > 0 and lookahead:
                steps = dict(zip(hypernet.parameters(), fh.candidate_step(optimizer), strict=True))
                ahead = [(p.detach() + steps[p]).requires_grad_() for p in hypernet.theta]
                penalty = beta * regularizer.penalty(ahead)
                for p, grad in zip(hypernet.theta, torch.autograd.grad(penalty, ahead), strict=True):
                    p.grad += grad
                loss = loss + penalty
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("lookahead", [False, True])
def test_plugin_is_the_loop_by_hand(lookahead):
    benchmark = permuted()
    expected, model = hnet(dtype=torch.float64), bridge.HypernetModule(hnet(dtype=torch.float64))
    losses = by_hand(benchmark, expected, 0.5, lookahead)
    found = Recorded()
    run = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        train_mb_size=16,
        plugins=[bridge.HypernetRegularizerPlugin(0.5, lookahead=lookahead), found],
        evaluator=evaluator(),
    )
    for experience in benchmark.train_stream:
        run.train(experience, shuffle=False)
        run.eval(benchmark.test_stream)
    assert found.losses == pytest.approx(losses, rel=1e-6)  # Avalanche adds them up in float32
    for have, want in zip(model.hnet.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-10)


class Recorded(SupervisedPlugin):
    def __init__(self):
        super().__init__()
        self.losses = []

    def after_training_iteration(self, strategy, **kwargs):
        self.losses.append(strategy.loss.item())


def test_plugin_keeps_what_a_stock_strategy_forgets():
    benchmark, forgotten = split(), {}
    for beta in (0.0, 1.0):
        model = bridge.HypernetModule(hnet("split"))
        run = Naive(
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=0.02),
            train_mb_size=15,
            train_epochs=15,
            plugins=[bridge.HypernetRegularizerPlugin(beta)],
            evaluator=evaluator(),
        )
        for experience in benchmark.train_stream:
            run.train(experience)
            found = run.eval(benchmark.test_stream)
        forgotten[beta] = found["StreamForgetting/eval_phase/test_stream"]
        assert beta == 0 or found["Top1_Acc_Stream/eval_phase/test_stream/Task002"] > 0.9
    assert forgotten[1.0] < 0.05


def test_plugin_names_what_is_wrong():
    def naive(model):
        plugins = [bridge.HypernetRegularizerPlugin()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Naive(model=model, optimizer=optimizer, train_mb_size=30, plugins=plugins, evaluator=evaluator())

    with pytest.raises(TypeError, match="the strategy's model must be a HypernetModule, got MLP"):
        naive(fh.nets.MLP(FEATURES, (4,), CLASSES)).train(permuted().train_stream[0])
    run = naive(bridge.HypernetModule(hnet()))
    run.train(permuted(task_labels=False).train_stream[0])
    with pytest.raises(
        ValueError, match=r"experience 1 has task labels \[0\], but must have 1: make the benchmark with task"
    ):
        run.train(permuted(task_labels=False).train_stream[1])
    with pytest.raises(ValueError, match="beta must not be negative, got -1"):
        bridge.HypernetRegularizerPlugin(-1)


def test_mnist_comes_from_our_cache(tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    packed.mkdir()
    for name in ("train-images-idx3", "t10k-labels-idx1"):
        (packed / f"{name}-ubyte.gz").write_bytes(gzip.compress(name.encode()))
    monkeypatch.setattr(bridge, "fetch", lambda name, data_dir, log: packed)
    monkeypatch.setattr(bridge, "data_home", lambda: tmp_path / "cache")
    for _ in range(2):
        raw = bridge.mnist_root() / "MNIST" / "raw"
        assert {path.name: path.read_text() for path in raw.iterdir()} == {
            "train-images-idx3-ubyte": "train-images-idx3",
            "t10k-labels-idx1-ubyte": "t10k-labels-idx1",
        }
