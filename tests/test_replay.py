"""The replay model and what learns with it, against the obvious loops in float64; resuming, counts, and what it is for."""

import copy
import math
import os
import signal

import oracle
import pytest
import torch
import torch.nn.functional as F
from emulated_graph import EmulatedGraphs
from test_loggers import Memory

import fasthyper as fh
from fasthyper import graph, replay_model
from fasthyper.replay import distillation_loss
from fasthyper.replay_model import Decoders, vae_loss
from fasthyper.streams.batches import Batches
from fasthyper.streams.stream import SCENARIOS

FEATURES, CLASSES = 8, 2


def toy_stream(num_tasks=3, n=60, classes=CLASSES):
    """Two kinds of images a task, each around a picture of its own."""

    def make_task(index):
        generator = torch.Generator().manual_seed(11 + index)  # pictures of three tasks then differ in three pixels
        pictures = torch.rand(classes, FEATURES, generator=generator).round()
        labels = torch.arange(n) % classes
        noise = 0.2 * torch.rand(n, FEATURES, generator=generator)
        data = fh.streams.TaskData((pictures[labels] - noise).abs(), labels)
        return fh.streams.Task(index, data, data, classes)

    return fh.streams.Stream("pictures", num_tasks, make_task)


def toy_replay(num_tasks=3, dtype=torch.float64, hidden=(9,), **options):
    vae = fh.nets.xavier_(fh.nets.VAE(FEATURES, hidden, hidden, latent=3, conditions=5), seed=1)
    hnet = fh.ChunkedHypernet(
        vae, num_tasks, chunk_size=40, hidden=(6, 5), task_dim=4, chunk_dim=3, activation="elu", generate="decoder.*",
        rest="trained", dtype=dtype,
    )  # fmt: skip
    return fh.ReplayModel(hnet, **{"lr": 0.01, "beta": 0.2, "progress": False, **options})


def toy_net(outputs, dtype=torch.float64, hidden=(9,)):
    return fh.nets.xavier_(fh.nets.MLP(FEATURES, hidden, outputs), seed=2).to(dtype)


def make_r(scenario="class", tasks=3, dtype=torch.float64, **options):
    net = toy_net(CLASSES if scenario == "domain" else CLASSES * tasks, dtype)
    options = {"lr": 0.01, "progress": False, **options}
    return fh.HnetR(toy_replay(tasks, dtype), net, scenario=scenario, classes=CLASSES, **options)


def make_tir(scenario="class", tasks=3, dtype=torch.float64, **options):
    heads = {} if scenario == "domain" else {"outputs_per_task": CLASSES}
    target = fh.nets.MLP(FEATURES, (7,), CLASSES * (tasks if heads else 1))
    hnet = fh.ChunkedHypernet(target, tasks, chunk_size=40, hidden=(6,), task_dim=4, chunk_dim=3, dtype=dtype, **heads)
    labels = fh.Trainer(hnet, lr=0.01, beta=0.2, progress=False)
    return fh.HnetTIR(
        toy_replay(tasks - 1, dtype), toy_net(tasks, dtype), labels, **{"lr": 0.01, "progress": False, **options}
    )


MAKE = {"r": make_r, "tir": make_tir}


def trained(method, stream, steps=4, batch_size=10):
    """On the tasks that it has not learned yet."""
    for task in stream[method.num_tasks :]:
        method.fit(task, steps=steps, batch_size=batch_size)
        method.evaluate(stream[: task.index + 1])
    return method


def parameters(method):
    """All that moves, of all parts."""
    hnets = [trainer.hnet for trainer in method._trainers().values()]
    return [p.detach() for module in (method.net, *hnets) for p in module.parameters()]


def seen_steps(method):
    """(record, x, y, images, teacher, loss) of each step of the plain classifier from now on."""
    seen, step = [], method._step

    def stepped(now, x, y, images):
        before = copy.deepcopy(method.net)
        loss = step(now, x, y, images)
        seen.append((now, x, y, images, before, loss))
        return loss

    method._step = stepped
    return seen


def test_vae_loss_is_cross_entropy_and_divergence_from_the_prior():
    generator = torch.Generator().manual_seed(0)
    logits, mean, log_variance = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 7), (5, 3), (5, 3))
    )
    x = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    want = 0
    for b in range(5):
        p = 1 / (1 + torch.exp(-logits[b]))
        want = want - (x[b] * p.log() + (1 - x[b]) * (1 - p).log()).sum() / 7 / 5
        posterior = torch.distributions.Normal(mean[b], torch.exp(log_variance[b]).sqrt())
        want = want + torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / 7 / 5
    found, leaves = vae_loss(logits, x, mean, log_variance), (logits, mean, log_variance)
    assert oracle.relative_error(found.detach(), want.detach()) < 1e-12
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert oracle.relative_error(a, b) < 1e-12


@pytest.mark.parametrize("known", [4, 6])
def test_distillation_is_cross_entropy_at_a_temperature(known):
    """Of classes that the teacher does not know the logits are 0."""
    student, teacher = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, known, dtype=torch.float64)
    want = 0.0
    for s, t in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        for c in range(6):
            p = torch.exp(t[c] / 2 if c < known else torch.zeros(())) / (torch.exp(t / 2).sum() + 6 - known)
            want -= 4 * p * torch.log(torch.exp(s[c] / 2) / torch.exp(s / 2).sum()) / 6
    assert oracle.relative_error(distillation_loss(student, teacher), want) < 1e-12


def decode(hnet, task, noise):
    """Images of a task, by its generated weights and F.linear."""
    weights = hnet.generate(task)
    one_hot = torch.eye(5, dtype=noise.dtype)[task].expand(len(noise), -1)
    hidden = torch.cat([noise, one_hot], 1)
    layers = len(weights) // 2
    for i in range(layers):
        hidden = F.linear(hidden, weights[f"decoder.layers.{i}.weight"], weights[f"decoder.layers.{i}.bias"])
        hidden = hidden.relu() if i < layers - 1 else hidden
    return hidden


def test_replay_model_trains_as_the_slow_loop_in_float64():
    """Decoders by hand, look-ahead by a real step of a copied optimizer, drift by all weights of all past tasks."""
    stream, steps, lr, beta = toy_stream(), 6, 0.01, 0.2
    fast, slow = toy_replay(), toy_replay().hnet
    encoder, losses = slow.target.module.encoder, []
    for task in stream:
        past = range(task.index)
        theta = list(slow.theta)
        snapshot = [{n: w.detach().clone() for n, w in slow.generate(t).items()} for t in past]
        groups = theta, list(encoder.parameters()), [slow.embedding(task.index)]
        optimizers = [torch.optim.Adam(group, lr=lr) for group in groups]
        batches = Batches(len(task.train), 10, seed=0, task=task.index)
        for step in range(steps):
            x = task.train.batch(batches.indices(step))[0].double()
            noise = fast._noise(10, 0, task.index, step, replay_model._OF_VAE)
            mean, log_variance = encoder(x).split(3, 1)
            logits = decode(slow, task.index, mean + (log_variance / 2).exp() * noise)
            loss = vae_loss(logits, x, mean, log_variance)
            slow.zero_grad()
            loss.backward()
            if task.index:
                kept = [p.detach().clone() for p in theta]
                rehearsal = torch.optim.Adam(theta, lr=lr)
                rehearsal.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
                rehearsal.step()
                drifts = [((slow.generate(t)[n] - w) ** 2).sum() for t in past for n, w in snapshot[t].items()]
                grads = torch.autograd.grad(beta * sum(drifts) / len(past), theta)
                for p, k, g in zip(theta, kept, grads, strict=True):
                    p.data.copy_(k)
                    p.grad += g
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item())
        record = fast.fit(task, steps=steps, batch_size=10)
        found = torch.tensor([loss for _, loss in record.loss], dtype=torch.float64)
        assert torch.allclose(found, torch.tensor(losses[-steps:], dtype=torch.float64), rtol=1e-9)
    for have, want in zip(fast.hnet.parameters(), slow.parameters(), strict=True):
        assert oracle.relative_error(have.detach(), want.detach()) < 1e-8


def test_decoders_together_are_each_task_s_own(monkeypatch):
    replay = toy_replay(4)
    noise = torch.randn(4, 5, 3, dtype=torch.float64)
    want = torch.stack([decode(replay.hnet, t, noise[t]).sigmoid() for t in range(4)])
    assert oracle.relative_error(Decoders(replay, range(4))(noise), want) < 1e-12
    weights = 8 * replay.hnet.target.num_weights
    for fit in (1, 3):  # that many tasks at once, made again in each call
        monkeypatch.setattr(replay_model, "MEMORY", fit * weights)
        assert oracle.relative_error(Decoders(replay, range(4))(noise), want) < 1e-12


def test_samples_are_bytes_that_depend_on_seed_and_task_alone():
    replay = toy_replay(4, torch.float32)
    images = replay.sample([0, 2, 3], 6, seed=3)
    assert (images.dtype, images.shape) == (torch.uint8, (3, 6, FEATURES)) and images.float().std() > 0
    assert torch.equal(replay.sample([3, 2], 6, seed=3), images[[2, 1]])
    assert not torch.equal(replay.sample([2], 6, seed=4), images[1:2])
    with pytest.raises(IndexError, match="task index 4 out of range"):
        replay.sample([4], 1)


@pytest.mark.parametrize("kind", MAKE)
def test_each_step_replays_as_many_images_of_every_past_task(kind):
    method = MAKE[kind](tasks=4)
    seen = seen_steps(method)
    trained(method, toy_stream(4), steps=3, batch_size=10)
    found = [(now.record.index, None if images is None else tuple(images.shape)) for now, *_, images, _, _ in seen]
    first = [(0, None)] * 3 if kind == "r" else []
    assert found == first + [(t, (t, n, FEATURES)) for t, n in ((1, 10), (2, 5), (3, 4)) for _ in range(3)]
    images = [images for *_, images, _, _ in seen if images is not None]
    assert not torch.equal(images[0], images[1])  # anew in each step
    assert all(batch.min() >= 0 and batch.max() <= 1 for batch in images)
    assert [record.steps for record in method.replay.results.tasks] == [3] * (4 if kind == "r" else 3)


@pytest.mark.parametrize("kind", MAKE)
def test_past_tasks_data_are_never_read_again(kind):
    class Gone:
        def __getattribute__(self, name):
            raise AssertionError("data of a past task were read")

    method, stream = MAKE[kind](), toy_stream()
    for task in stream:
        data = copy.copy(task.train)
        method.fit(fh.streams.Task(task.index, data, task.test, CLASSES), steps=3, batch_size=10)
        data.__class__ = Gone
    assert len(method.results.tasks) == 3


def test_the_teacher_is_the_classifier_before_the_task_and_stays():
    method, stream = make_r(), toy_stream()
    seen = seen_steps(method)
    method.fit(stream[0], steps=3, batch_size=10)
    assert all(now.teacher is None for now, *_ in seen)
    before = copy.deepcopy(method.net)
    method.fit(stream[1], steps=3, batch_size=10)
    (teacher,) = {now.teacher for now, *_ in seen[3:]}
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(method.net.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("weight", [0.5, 0.3])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_r_loss_is_the_obvious_one(scenario, weight):
    method = make_r(scenario, replay_weight=weight)
    seen = seen_steps(method)
    trained(method, toy_stream(), steps=3)
    for now, x, y, images, net, loss in seen:
        task, real, fake = now.record.index, [], []
        for row, label in zip(x.double(), y.tolist(), strict=True):
            z = net(row[None])[0]
            z = {"task": z[2 * task : 2 * task + 2], "domain": z, "class": z[: 2 * task + 2]}[scenario]
            real.append(F.cross_entropy(z, torch.tensor(label + (2 * task if scenario == "class" else 0))))
        want = sum(real) / len(real)
        if task:
            for r in range(task):
                for row in images[r]:
                    z, teach = net(row[None])[0], now.teacher(row[None])[0]
                    if scenario == "task":
                        z, teach = z[2 * r : 2 * r + 2], teach[2 * r : 2 * r + 2]
                    if scenario == "class":
                        z, teach = z[: 2 * task + 2], torch.cat([teach[: 2 * task], torch.zeros(2)])
                    p, log_q = torch.softmax(teach / 2, 0), torch.log_softmax(z / 2, 0)
                    fake.append(-4 * sum(p[c] * log_q[c] for c in range(len(p))))
            want = (1 - weight) * want + weight * sum(fake) / len(fake)
        assert loss == pytest.approx(want.item(), rel=1e-9)


def test_tir_loss_is_the_obvious_one():
    method = make_tir()
    seen = seen_steps(method)
    trained(method, toy_stream(), steps=3)
    assert len(seen) == 6
    for now, x, _, images, net, loss in seen:
        task = now.record.index
        real = [F.cross_entropy(net(row[None])[0, : task + 1], torch.tensor(task)) for row in x.double()]
        fake = [F.cross_entropy(net(row[None])[0, : task + 1], torch.tensor(r)) for r in range(task) for row in images[r]]
        assert loss == pytest.approx((sum(real) / len(real) + sum(fake) / len(fake)).item() / 2, rel=1e-9)


def right(method, kind, scenario, x, y, task, num_tasks):
    """Whether one example ``[1, F]`` is told right."""
    outputs = method.net(x.double())[0]
    if kind == "r":
        lo, hi = {"task": (2 * task, 2 * task + 2), "domain": (0, 2), "class": (0, 2 * num_tasks)}[scenario]
        return outputs[lo:hi].argmax().item() == y + (2 * task if scenario == "class" else 0)
    guess = outputs[:num_tasks].argmax().item()
    label = method.labels.hnet(x.double(), guess).argmax().item()
    return label == y and (scenario == "domain" or guess == task)


@pytest.mark.parametrize("kind, scenario", [("tir", "class"), ("tir", "domain"), *(("r", s) for s in SCENARIOS)])
def test_accuracies_are_those_of_one_example_after_the_other(kind, scenario, monkeypatch):
    monkeypatch.setattr(fh.replay, "BATCH", 16)
    method, blurred = MAKE[kind](scenario), []
    for task in toy_stream():
        method.fit(task, steps=15, batch_size=10)
        noise = torch.rand(len(task.test), FEATURES, generator=torch.Generator().manual_seed(task.index))
        blurred.append(fh.streams.TaskData((task.test.inputs + noise) / 2, task.test.labels))
        blurred[-1] = fh.streams.Task(task.index, task.train, blurred[-1], CLASSES)
        found = method.evaluate(blurred)
        want = []
        for past in blurred:
            x, y = past.test.batch(torch.arange(len(past.test)))
            told = [
                right(method, kind, scenario, x[i : i + 1], y[i].item(), past.index, task.index + 1) for i in range(len(y))
            ]
            want.append(sum(told) / len(told))
        assert found == want and method.results.matrix[task.index][: task.index + 1] == found
    assert 0 < sum(found) < 3  # some are right and some are wrong
    assert "ACC" in method.results.summary()


@pytest.mark.parametrize("kind, part", [("r", "net"), ("r", "replay"), ("tir", "net"), ("tir", "labels"), ("tir", "replay")])
def test_goes_on_bit_for_bit_after_an_interrupt_in_any_part(kind, part, tmp_path, foreground):
    stream, load = toy_stream(), {"r": fh.HnetR, "tir": fh.HnetTIR}[kind].load
    options = {"dtype": torch.float32, "schedule": "cosine"}
    whole, cut = trained(MAKE[kind](**options), stream), MAKE[kind](**options, out=tmp_path)
    trained(cut, stream[:1])
    owner = cut if part == "net" else cut._trainers()[part]
    step = owner._step

    def stepped(now, *args):
        if now.record.steps == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(now, *args)

    owner._step = stepped
    with pytest.raises(KeyboardInterrupt):
        cut.fit(stream[1], steps=4, batch_size=10)
    resumed = load(tmp_path, progress=False)
    assert resumed.num_tasks == 1 and not all(map(torch.equal, parameters(resumed), parameters(whole)))
    trained(resumed, stream)
    assert all(map(torch.equal, parameters(resumed), parameters(whole)))
    assert resumed.results.accuracy[2] == whole.results.accuracy[2]
    assert [record.loss for record in resumed.results.tasks] == [record.loss for record in whole.results.tasks]
    assert torch.equal(resumed.sample(2), whole.sample(2))
    resumed.save(tmp_path)
    assert all(map(torch.equal, parameters(load(tmp_path, progress=False)), parameters(whole)))


@pytest.mark.parametrize("kind", MAKE)
def test_runs_repeat_by_seed_and_leave_the_global_generator_alone(kind):
    torch.manual_seed(0)
    one = trained(MAKE[kind](), toy_stream())
    torch.manual_seed(1)
    two, other = MAKE[kind](), MAKE[kind](seed=1)
    before = torch.get_rng_state()
    trained(two, toy_stream())
    assert torch.equal(torch.get_rng_state(), before)
    trained(other, toy_stream())
    assert all(map(torch.equal, parameters(one), parameters(two)))
    assert not all(map(torch.equal, parameters(one), parameters(other)))


@pytest.mark.parametrize("kind", MAKE)
def test_past_classes_are_known_with_replay_and_not_without(kind):
    accuracies = {}
    for weight in (0.0, 0.5):
        method = MAKE[kind](dtype=torch.float32, replay_weight=weight)
        trained(method, toy_stream(), steps=150, batch_size=32)
        accuracies[weight] = method.results.scores()["acc"]
    assert accuracies[0.5] > 0.9 and accuracies[0.0] < 0.5


class OfImages(torch.nn.Module):
    """A classifier of another package, for images of two rows."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = torch.nn.Conv1d(2, 3, 3), torch.nn.Linear(6, 2 * CLASSES)

    def forward(self, x):
        return self.last(self.conv(x).relu().flatten(1))


def test_any_classifier_of_images_of_any_shape(tmp_path):
    def in_rows(data):
        return fh.streams.TaskData(data.inputs.unflatten(1, (2, 4)), data.labels)

    images = [fh.streams.Task(t.index, in_rows(t.train), in_rows(t.test), CLASSES) for t in toy_stream(2)]
    flat, method = (
        toy_replay(),
        fh.HnetR(toy_replay(), OfImages().double(), scenario="class", classes=CLASSES, progress=False),
    )
    trained(method, images)
    for task in toy_stream(2):
        flat.fit(task, steps=4, batch_size=10)
    assert all(map(torch.equal, method.replay.hnet.parameters(), flat.hnet.parameters()))
    method.save(tmp_path)
    with pytest.raises(fh.CheckpointError, match="OfImages is not one of fasthyper.nets"):
        fh.HnetR.load(tmp_path)
    loaded = fh.HnetR.load(tmp_path, net=OfImages(), progress=False)
    assert loaded.evaluate(images) == method.evaluate(images)
    assert all(map(torch.equal, parameters(loaded), parameters(method)))


def test_results_hold_all_parts_and_loggers_are_told():
    logger = Memory()
    method, stream = make_tir(loggers=[logger], name="toy"), toy_stream()
    trained(method, stream)
    record, parts = method.results.tasks[1], [method.labels.results.tasks[1], method.net_records[1]]
    parts.append(method.replay.results.tasks[1])
    assert record.seconds == sum(part.seconds for part in parts) > 0
    assert (record.steps, record.samples, record.loss, record.drift) == (4, 40, parts[0].loss, parts[0].drift)
    assert logger.tasks == [(t, 4, 4 * (t + 1)) for t in range(3)] and logger.steps == []
    assert [(trained, list(row.values())) for trained, row, _ in logger.rows] == [
        (t, method.results.matrix[t][: t + 1]) for t in range(3)
    ]


def test_on_a_graph_the_replay_model_has_the_numbers_of_plain_steps(monkeypatch):
    monkeypatch.setitem(graph.RUNTIMES, "cpu", EmulatedGraphs)
    plain, captured = toy_replay(graph=False), toy_replay(graph=True)
    for task in toy_stream():
        records = [replay.fit(task, steps=12, batch_size=10) for replay in (plain, captured)]
        assert records[0].loss == records[1].loss and records[0].drift == records[1].drift
    assert all(map(torch.equal, plain.hnet.parameters(), captured.hnet.parameters()))


def test_the_plain_classifier_s_learning_rate_follows_the_schedule():
    stream, rates = toy_stream(1), []
    scheduled, plain = make_r(schedule="warmup-cosine"), make_r()
    step = scheduled._step
    scheduled._step = lambda now, *args: rates.append(now.optimizer.param_groups[0]["lr"]) or step(now, *args)
    for method in (scheduled, plain):
        method.fit(stream[0], steps=20)
    want = [0.01 * min(1, 10 * s / 20) * (1 + math.cos(math.pi * s / 20)) / 2 for s in range(20)]
    assert rates == pytest.approx(want) and plain.net_records[0].loss != scheduled.net_records[0].loss


def test_names_what_is_wrong(tmp_path):
    stream, method = toy_stream(), make_r()
    with pytest.raises(ValueError, match="unknown schedule 'linear'; choose from constant, cosine, warmup-cosine"):
        make_r(schedule="linear")
    with pytest.raises(ValueError, match="no task was trained yet"):
        method.evaluate(stream)
    with pytest.raises(ValueError, match="task 1 is not next: 0 tasks were trained so far, so task 0 is"):
        method.fit(stream[1], steps=1)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        method.fit(stream[0], steps=0)
    with pytest.raises(ValueError, match="task 0 has label 2, but tasks have 2 classes, counted from 0 in each"):
        method.fit((torch.rand(6, FEATURES), torch.arange(6) % 3), steps=1)
    for bad in ({"lr": 0}, {"replay_weight": 1.5}, {"seed": -1}, {"classes": 0}, {"temperature": 0}, {"scenario": "all"}):
        options = {"scenario": "class", "classes": 2, **bad}
        with pytest.raises(ValueError, match="must be|unknown scenario 'all'; choose from task, domain, class"):
            fh.HnetR(method.replay, method.net, **options)
    short = make_tir(tasks=3)
    short.replay = toy_replay(1)
    trained(short, stream[:2])
    with pytest.raises(ValueError, match="no decoder was trained for task 1"):
        short.fit(stream[2], steps=1)
    narrow = make_tir()
    narrow.net = toy_net(1)
    narrow.fit(stream[0], steps=1)
    with pytest.raises(ValueError, match="the task classifier has 1 outputs, none for task 1"):
        narrow.fit(stream[1], steps=1)
    broken = make_r()
    broken.net.layers[0].weight.data.fill_(torch.inf)
    with pytest.raises(fh.NonFiniteLossError, match="the classifier's loss is .* at task 0, step 0: lower lr"):
        broken.fit(stream[0], steps=1)
    make_r().save(tmp_path)
    with pytest.raises(fh.CheckpointError, match="does not fit"):
        fh.HnetTIR.load(tmp_path)


def test_a_replay_model_names_what_is_wrong():
    replay, options = toy_replay(6), {"chunk_size": 9, "generate": "decoder.*"}
    with pytest.raises(TypeError, match="has no accuracy"):
        replay.evaluate(toy_stream())
    with pytest.raises(ValueError, match="images of values 0..1, those of task 0 go beyond"):
        replay.fit((torch.randn(20, FEATURES), torch.zeros(20, dtype=torch.int64)), steps=1)
    for task in toy_stream(5):
        replay.fit(task, steps=1)
    with pytest.raises(ValueError, match="the autoencoder has 5 conditions, none for task 5"):
        replay.fit((torch.rand(20, FEATURES), torch.zeros(20, dtype=torch.int64)), steps=1)
    with pytest.raises(ValueError, match="for an fh.nets.VAE, got one for a MLP"):
        fh.ReplayModel(fh.ChunkedHypernet(fh.nets.MLP(4, (3,), 2), 2, chunk_size=9))
    vae = fh.nets.VAE(4, (3,), (3,))
    for bad in (options, {"chunk_size": 9}):
        with pytest.raises(ValueError, match='generate="decoder.*" and rest="trained"'):
            fh.ReplayModel(fh.ChunkedHypernet(vae, 2, **bad))


def test_xavier_depends_on_its_seed_alone():
    nets = [fh.nets.xavier_(fh.nets.MLP(30, (40,), 2), seed) for seed in (3, 3, 4)]
    assert torch.equal(nets[0].layers[0].weight, nets[1].layers[0].weight)
    assert not torch.equal(nets[0].layers[0].weight, nets[2].layers[0].weight)
    weight, bias = nets[0].layers[0].weight, nets[0].layers[0].bias
    assert weight.square().mean().item() == pytest.approx(2 / 70, rel=0.1) and not bias.any()
