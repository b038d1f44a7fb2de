"""How weights begin: variances by layer, measured; what passes through the target; the scaling of rows and chunks."""

import itertools
import math

import pytest
import torch
from torch import nn

import fasthyper as fh
from fasthyper.init import INITS, fit, starts
from fasthyper.layout import Layout, Matrix
from fasthyper.nets import MLP, LeNet

TASKS = 24


def variances(hnet):
    """Mean square of the weights of each parameter, over all tasks."""
    with torch.no_grad():
        tasks = [hnet.generate(task) for task in range(hnet.num_tasks)]
    return {name: sum(w[name].double().square().mean().item() for w in tasks) / len(tasks) for name in tasks[0]}


def make(net, init="hyperfan", seed=0, **options):
    return fh.ChunkedHypernet(net, TASKS, **{"task_dim": 16, "chunk_dim": 8, "init": init, "seed": seed, **options})


CHUNKED = {
    "flat": (lambda: MLP(64, (60, 60, 60), 20), {"chunk_size": 1500, "hidden": (25, 25), "activation": "elu"}),
    "across": (lambda: LeNet(arch="mnist_small"), {"chunk_size": 2000, "hidden": (40,), "activation": "silu"}),
    "aligned": (lambda: MLP(64, (60, 30, 60), 20), {"chunk_size": 600, "hidden": (40, 40), "layout": "aligned"}),
    "linear": (lambda: MLP(50, (100, 20), 50), {"chunk_size": 1700}),
    "one chunk of many": (lambda: MLP(30, (40,), 50), {"chunk_size": 10_000, "hidden": (30,)}),
}


@pytest.mark.parametrize("init", INITS[1:])
@pytest.mark.parametrize("name", CHUNKED)
def test_weights_of_each_layer_have_the_variance_it_asks_for(name, init):
    net, options = CHUNKED[name]
    sums, seeds = {}, 3
    for seed in range(seeds):
        for key, value in variances(make(net(), init, seed, **options)).items():
            sums[key] = sums.get(key, 0) + value / seeds
    for key, p in net().named_parameters():
        if p.numel() > 200:  # few weights vary too much to be measured
            fan_in, fan_out = p[0].numel(), p.shape[0] * p[0, 0].numel()
            if name == "one chunk of many":
                forward, backward = 2 / (2 * fan_in), 2 / fan_out
            else:
                forward, backward = 2 / (fan_in + 1), 2 / fan_out
            wanted = {"hyperfan": forward, "hyperfan-out": backward}.get(init, 2 / (1 / forward + 1 / backward))
            assert sums[key] == pytest.approx(wanted, rel=0.2), key


def test_bias_in_a_chunk_of_its_layer_begins_like_the_weights():
    found = variances(make(MLP(50, (300, 300), 10), chunk_size=15_300, hidden=(30,)))
    for layer, fan_in in (("layers.0", 50), ("layers.1", 300)):
        assert found[f"{layer}.bias"] == pytest.approx(2 / (fan_in + 1), rel=0.4)
        assert found[f"{layer}.weight"] == pytest.approx(2 / (fan_in + 1), rel=0.2)


MOMENTS = [{"chunk_size": 1500}, {"chunk_size": 1500, "layout": "aligned"}, {"chunk_size": None}]


@pytest.mark.parametrize("options", MOMENTS, ids=["flat", "aligned", "whole"])
def test_second_moments_pass_through_the_target(options):
    """After each of six ReLUs the second moment is that of the input (geometric mean over tasks); with Xavier it is not."""
    x, seeds, tasks, layers = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)), 8, 6, 6

    def moments(init):
        logs = torch.zeros(layers)
        for seed in range(seeds):
            hnet = make(MLP(64, (64,) * layers, 10), init, seed, hidden=(100,), chunk_dim=64, **options)
            for task in range(tasks):
                hidden, weights = x, hnet.generate(task)
                for layer in range(layers):
                    hidden = (hidden @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]).relu()
                    logs[layer] += hidden.square().mean().log() / (seeds * tasks)
        return logs.exp()

    with torch.no_grad():
        kept, lost = moments("hyperfan"), moments("xavier")[-1].item()
    assert kept.min() > 0.6 and kept.max() < 1.6
    assert lost < 0.1 or lost > 10


def test_whole_hypernetwork_begins_as_in_the_paper():
    """Weights 1 / fan-in and biases 1 (half of 2), norms as identity; and hypnettorch's own agrees on average."""
    net = nn.Sequential(nn.Linear(30, 300), nn.BatchNorm1d(300, track_running_stats=False), nn.ReLU(), nn.Linear(300, 200))
    hnet = make(net, chunk_size=None, hidden=(60,))
    found = variances(hnet)
    for name, wanted in {"0.weight": 1 / 30, "0.bias": 1, "3.weight": 1 / 300, "3.bias": 1}.items():
        assert found[name] == pytest.approx(wanted, rel=0.3), name
    weights = hnet.generate(3)
    assert torch.equal(weights["1.weight"], torch.ones(300)) and torch.equal(weights["1.bias"], torch.zeros(300))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("init", "method"), [("hyperfan", "in"), ("hyperfan-out", "out")])
def test_whole_hypernetwork_begins_as_hypnettorchs(init, method):
    pytest.importorskip("hypnettorch")
    from hypnettorch.hnets import HMLP

    net = MLP(60, (40, 80), 30)
    shapes = [list(p.shape) for p in net.parameters()]
    torch.manual_seed(0)
    peer = HMLP(shapes, cond_in_size=16, layers=(60,), num_cond_embs=TASKS, verbose=False)
    peer.apply_hyperfan_init(method=method)
    with torch.no_grad():
        of_tasks = [torch.stack(list(w)) for w in zip(*peer.forward(cond_id=list(range(TASKS))), strict=True)]
    for have, want in zip(variances(make(net, init, chunk_size=None, hidden=(60,))).values(), of_tasks, strict=True):
        assert have == pytest.approx(want.square().mean().item(), rel=0.5, abs=1e-12)


def test_harmonic_mean_is_the_harmonic_mean_and_survives_zeros():
    """hypnettorch takes 2 (1/a + 1/b) and divides by the zero of a bias."""
    net = nn.Linear(30, 10)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    a, b, both = (starts(init, net, shapes, in_chunks=False) for init in INITS[1:])
    assert [s.variance for s in a] == [2 / 60, 1] and [s.variance for s in b] == [2 / 10, 0]
    assert both[0].variance == pytest.approx(2 / (1 / a[0].variance + 1 / b[0].variance)) and both[1].variance == 0


def test_fans_of_other_layers():
    net = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(6, 9, 3, groups=3),
            "transposed": nn.ConvTranspose2d(6, 4, 2, bias=False),
            "embedding": nn.Embedding(5, 7),
            "norm": nn.LayerNorm([3, 4]),
            "gru": nn.GRU(3, 5),
            "group": nn.GroupNorm(2, 4),
        }
    )
    shapes = {name: p.shape for name, p in net.named_parameters()}
    found = dict(zip(shapes, starts("hyperfan", net, shapes, in_chunks=True), strict=True))
    assert found["grouped.weight"].variance == found["grouped.bias"].variance == 2 / (2 * 9 + 1)
    assert found["transposed.weight"].variance == 2 / (6 * 4)
    assert found["embedding.weight"].variance == 1
    assert found["gru.weight_ih_l0"].variance == found["gru.bias_ih_l0"].variance == 2 / (3 + 1)
    assert found["gru.weight_hh_l0"].variance == 2 / (5 + 1)
    assert {found[f"{name}.{key}"].layer for name in ("norm", "group") for key in ("weight", "bias")} == {""}


@pytest.mark.parametrize("aligned", [False, True])
def test_fit_is_exact_where_it_can_be(aligned):
    """Five layers that share chunks with one another, thirty times apart in variance."""
    net = LeNet(arch="mnist_small")
    shapes = {name: p.shape for name, p in net.named_parameters()}
    begins = list(itertools.accumulate((s.numel() for s in shapes.values()), initial=0))
    matrices = [Matrix(lo, s[0], s[1:].numel()) for lo, s in zip(begins, shapes.values(), strict=False) if len(s) > 1]
    layout = Layout(begins[-1], 900, matrices=matrices if aligned else [])
    places = [layout.places((lo, lo + s.numel())) for lo, s in zip(begins, shapes.values(), strict=False)]
    wanted = starts("hyperfan", net, shapes, in_chunks=True)
    chunks, cols = fit(places, wanted, layout.num_chunks, layout.chunk_size)
    assert chunks.min() > 0 and cols.min() > 0 and len(cols) == layout.chunk_size
    for layer in {start.layer for start in wanted}:
        spans = [r for rs, s in zip(places, wanted, strict=True) if s.layer == layer for r in rs]
        total = sum(chunks[r.chunk_lo : r.chunk_hi].sum() * cols[r.col_lo : r.col_hi].sum() for r in spans)
        cells = sum(r.num_chunks * r.num_cols for r in spans)
        variance = next(start.variance for start in wanted if start.layer == layer)
        assert (total / cells).item() == pytest.approx(variance, rel=1e-2), layer


def test_embeddings_have_the_standard_deviation_asked_for():
    options = {"chunk_size": 20, "task_dim": 500, "chunk_dim": 100}
    hnet = fh.ChunkedHypernet(MLP(10, (20,), 10), 2, embedding_std=0.1, **options)
    assert hnet.embedding(hnet.add_task()).std().item() == pytest.approx(0.1, rel=0.2)
    assert hnet.chunk_embeddings.std().item() == pytest.approx(0.1, rel=0.1)
    found = variances(fh.ChunkedHypernet(MLP(40, (40,), 40), TASKS, chunk_size=400, init="hyperfan", embedding_std=0.1))
    assert found["layers.0.weight"] == pytest.approx(2 / 41, rel=0.3)


def test_init_is_kept_in_a_checkpoint_and_does_not_touch_the_global_generator(tmp_path):
    net, state = MLP(6, (10,), 4), torch.get_rng_state()
    hnet = make(net, "hyperfan-harmonic", chunk_size=50, hidden=(8,), embedding_std=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    trainer = fh.Trainer(hnet, progress=False)
    trainer.fit((torch.randn(8, 6), torch.arange(8) % 4), steps=1, batch_size=4)
    trainer.save(tmp_path / "run")
    again = fh.Trainer.load(tmp_path / "run", progress=False).hnet
    assert again.config == hnet.config and again.config["init"] == "hyperfan-harmonic"
    assert torch.equal(again.embedding(again.add_task()), hnet.embedding(hnet.add_task()))


def test_init_names_what_is_wrong():
    with pytest.raises(ValueError, match="init must be one of xavier, hyperfan, hyperfan-out, hyperfan-harmonic"):
        make(MLP(4, (5,), 3), "fan", chunk_size=9)
    with pytest.raises(ValueError, match="embedding_std positive"):
        make(MLP(4, (5,), 3), chunk_size=9, embedding_std=0.0)
    with pytest.raises(
        ValueError, match="cannot make chunks of variances .* times apart; use an activation without an upper"
    ):
        make(MLP(4, (400,), 10), chunk_size=400, hidden=(20,), activation="tanh")
    assert math.isfinite(
        variances(make(MLP(50, (50,), 50), chunk_size=400, hidden=(20,), activation="tanh"))["layers.0.weight"]
    )
