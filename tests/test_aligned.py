"""The aligned layout: any target gives the same outputs and gradients with its weights made and with them never stored."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fasthyper as fh
from fasthyper import ops


class ReadsItsWeights(nn.Module):
    """Uses weights in other ways than through ``nn.Linear.forward``, too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        x = F.linear(self.first(x).tanh(), self.first.weight.T)
        return self.second(F.linear(x, self.second.weight.T)) + 0.1 * self.second.weight.norm()


class Tied(nn.Module):
    """One weight in two layers, and one layer called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.c(self.b(self.a(x).tanh())).tanh())


class Hooked(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
        self[0].register_forward_hook(lambda layer, inputs, output: output * layer.weight.mean())


class SomeWithoutGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        x = self.layers[0](x).tanh()
        with torch.no_grad():
            gate = self.layers[1](x)
        return self.layers[2](x * gate)


TARGETS = {  # name: (target, shape of a batch, weights never stored at chunk_size 20)
    "mlp": (lambda: fh.nets.MLP(6, (9, 8), 4), (5, 6), 3),
    "no-bias": (lambda: fh.nets.MLP(6, (9, 8), 4, bias=False), (5, 6), 3),
    "rows-longer-than-a-chunk": (lambda: fh.nets.MLP(30, (7,), 4), (5, 30), 2),
    "a-linear-layer-alone": (lambda: nn.Linear(6, 9), (5, 6), 1),
    "more-dimensions": (lambda: nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)), (3, 2, 6), 2),
    "empty-batch": (lambda: fh.nets.MLP(6, (9, 8), 4), (0, 6), 3),
    "one-example": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), (6,), 2),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 2, 2), nn.Flatten(), nn.Linear(18, 6), nn.Linear(6, 3)
        ),
        (5, 1, 4, 4),
        1,  # the last, with less than two chunks of rows, is laid with the rest
    ),
    "reads-its-weights": (ReadsItsWeights, (5, 6), 2),
    "tied": (Tied, (5, 6), 1),
    "hooked": (Hooked, (5, 6), 2),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 9)), nn.Tanh(), nn.Linear(9, 4)),
        (5, 6),
        1,
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(6, 2, 16, dropout=0.0, batch_first=True), (3, 4, 6), 2),
    "some-without-gradient": (SomeWithoutGradient, (5, 6), 3),
}


def make(target, layout="aligned", **options):
    options = {"chunk_size": 20, "hidden": (5, 4), "task_dim": 3, "chunk_dim": 2, "dtype": torch.float64, **options}
    return fh.ChunkedHypernet(target, 3, layout=layout, **options)


def outputs_and_gradients(run, leaves):
    y = run()
    grads = torch.autograd.grad((y**2).sum(), leaves, allow_unused=True, materialize_grads=True)
    return [y.detach(), *grads]


@pytest.mark.parametrize("hidden", [(), (5, 4), (40,)], ids=["linear", "narrow", "wide"])  # wide: never factorised
@pytest.mark.parametrize("name", TARGETS)
def test_a_target_gives_what_its_generated_weights_give(name, hidden):
    build, batch, num_fused = TARGETS[name]
    hnet, plain = make(build(), hidden=hidden), build().double()
    assert len(hnet._generator.fused) == num_fused
    for x in (torch.randn(batch, dtype=torch.float64), torch.randn(batch, dtype=torch.float64, requires_grad=True)):
        leaves = [*hnet.theta, hnet.embedding(1), *([x] if x.requires_grad else [])]
        found = outputs_and_gradients(lambda x=x: hnet(x, 1), leaves)
        wanted = outputs_and_gradients(lambda x=x: torch.func.functional_call(plain, hnet.generate(1), (x,)), leaves)
        for have, want in zip(found, wanted, strict=True):
            assert oracle.relative_error(have, want) < 1e-10
        with torch.no_grad():
            assert oracle.relative_error(hnet(x, 1), found[0]) < 1e-12


def test_parameters_read_in_a_forward_pass_raise():
    class ReadsParameters(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + sum(p.square().sum() for p in self.parameters())

    with pytest.raises(RuntimeError, match="meta"):
        make(ReadsParameters(nn.Linear(6, 9)))(torch.randn(5, 6, dtype=torch.float64), 0)


@pytest.mark.parametrize("name", TARGETS)
def test_generates_what_the_slow_way_makes(name):
    target = TARGETS[name][0]()
    hnet = make(target)
    found = hnet.generate(task=1)
    assert {n: w.shape for n, w in found.items()} == {n: w.shape for n, w in target.named_parameters()}
    h = oracle.features(hnet.theta, hnet.embedding(1), hnet.activation.value)
    wanted = oracle.laid_weights(hnet.layout, h, hnet.basis).split([w.numel() for w in found.values()])
    for have, want in zip(found.values(), wanted, strict=True):
        assert oracle.relative_error(have.detach().flatten(), want.detach()) < 1e-12


@pytest.mark.parametrize("chunk_size", [None, 1, 9, 33, 500], ids=str)
def test_row_of_a_chunk_is_its_part_of_the_basis_times_its_features(chunk_size):
    hnet = make(fh.nets.MLP(6, (9, 8), 4), chunk_size=chunk_size)
    h = hnet.features(hnet.embedding(2)[None])[0]
    for block, parts in zip(hnet.layout.blocks, hnet._generator._parts, strict=True):
        if block.rows:
            weight = hnet.generate(2)[parts[0][0]]
            for row in range((block.chunk_hi - block.chunk_lo) * block.rows):
                n, j = divmod(row, block.rows)
                part = hnet.basis[j * weight.shape[1] : (j + 1) * weight.shape[1]]
                assert weight[row].allclose(part[:, :-1] @ h[block.chunk_lo + n] + part[:, -1])
    x = torch.randn(5, 6, dtype=torch.float64)
    assert hnet(x, 2).allclose(hnet.target(hnet.generate(2), x, 2))


def test_weights_of_linear_layers_are_never_generated_in_a_forward_pass(monkeypatch):
    hnet, made = make(fh.nets.MLP(60, (90, 80), 40), chunk_size=500), []
    generate = ops.generate_blocks

    def record(h, basis, blocks):
        made.extend(shape for *_, shapes in blocks for shape in shapes)
        return generate(h, basis, blocks)

    monkeypatch.setattr(ops, "generate_blocks", record)
    hnet(torch.randn(5, 60, dtype=torch.float64), 0)
    assert 0 < sum(shape.numel() for shape in made) < 500 * 4 < hnet.target.num_weights / 5
    assert all(linear.product is None for linear in hnet.target._linears.values())


def test_heads_give_each_task_its_own_outputs():
    hnet = make(fh.nets.MLP(6, (5,), 30), outputs_per_task=10, chunk_size=12)
    assert len(hnet._generator.fused) == 2
    x = torch.randn(3, 6, dtype=torch.float64)
    full = torch.func.functional_call(hnet.target.module, hnet.generate(1), (x,))
    assert hnet(x, 1).allclose(full[:, 10:20])
    positions = [p for ranges in hnet.layout.heads for span in ranges for p in range(*span)]
    assert len(positions) == 30 * 5 + 30 == len(set(positions))


def test_chunks_are_as_many_and_as_wide_as_when_laid_flat():
    target = fh.nets.MLP(1024, (1000, 1000), 10)
    for chunk_size in (7500, 78_000):
        flat, aligned = (make(target, layout, chunk_size=chunk_size, hidden=(3,)).layout for layout in ("flat", "aligned"))
        assert aligned.chunk_size <= flat.chunk_size and aligned.num_chunks <= 1.05 * flat.num_chunks


def test_inputs_of_a_wrong_shape_are_named_and_leave_the_target_as_it_was():
    hnet = make(fh.nets.MLP(6, (9, 8), 4))
    with pytest.raises(ValueError, match=r"takes inputs of shape \[..., 6\], got \[5, 3\]"):
        hnet(torch.randn(5, 3, dtype=torch.float64), 0)
    assert hnet(torch.randn(5, 6, dtype=torch.float64), 0).shape == (5, 4)
    assert all(linear.product is None for linear in hnet.target._linears.values())


def test_a_saved_run_goes_on_bit_for_bit(tmp_path):
    def train(trainer, tasks):
        for index in tasks:
            generator = torch.Generator().manual_seed(index)
            trainer.fit((torch.randn(40, 6, generator=generator), torch.arange(40) % 4), steps=4, batch_size=8)
        return [p.detach().clone() for p in trainer.hnet.parameters()]

    hnet = make(fh.nets.MLP(6, (9, 8), 4), dtype=torch.float32)
    trainer = fh.Trainer(hnet, progress=False)
    train(trainer, range(2))
    trainer.save(tmp_path)
    loaded = fh.Trainer.load(tmp_path, progress=False)
    assert loaded.hnet.config["layout"] == "aligned"
    assert all(torch.equal(a, b) for a, b in zip(train(trainer, [2]), train(loaded, [2]), strict=True))
