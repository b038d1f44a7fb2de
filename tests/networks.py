"""Networks of many kinds, for the tests of targets: name -> (build, shape of a batch without its first dimension)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fasthyper as fh


class TiedMLP(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


class LastOutput(nn.Module):
    """What a recurrent layer gives after the last of a sequence's items."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM):
        super().__init__()
        self.recurrent, self.head = kind(6, 5, num_layers=2, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class TwoInputs(nn.Module):
    """Two positional inputs, and one by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(3, 4, bias=False)

    def forward(self, x: Tensor, z: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.left(x) * scale + self.right(z)


class Scaled(nn.Module):
    """A buffer that all tasks share, and one that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("shift", torch.tensor([1, 2, 3, 4]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x) + self.shift


class OwnNorm(nn.Module):
    """A norm written by hand: it replaces its statistics, and a count that all tasks share, rather than write to them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.training:
            self.calls = self.calls + 1
            self.running_mean = 0.9 * self.running_mean + 0.1 * x.detach().mean(0)
        return x - self.running_mean


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class DecidesByItsInput(nn.Module):
    """A branch that depends on numbers, which ``vmap`` refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.sum() > 0 else self.second(x)


def conv_with_norm(**options: object) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.BatchNorm2d(3, **options),  # type: ignore[arg-type]
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.BatchNorm1d(5, affine=False, **options),  # type: ignore[arg-type]
        nn.Linear(5, 4),
    )


def resnet(track_running_stats: bool = True) -> nn.Module:
    net = fh.nets.ResNet(4, n=1, widths=(2, 2, 3, 4), num_channels=1)
    for norm in net.norms if track_running_stats else ():
        norm.__init__(norm.num_features)
    return net


NETWORKS = {
    "mlp": (lambda: fh.nets.MLP(6, (5,), 4), (6,)),
    "tied": (TiedMLP, (6,)),
    "buffers": (Scaled, (6,)),
    "convolutions-and-batch-norm": (conv_with_norm, (1, 4, 4)),
    "own-norm": (OwnNorm, (6,)),
    "layer-norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4)), (6,)),
    "instance-norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Flatten()),
        (2, 4),
    ),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(18, 4)
        ),
        (3, 6),
    ),
    "attention": (Attention, (3, 6)),
    "lstm": (LastOutput, (3, 6)),
    "gru": (lambda: LastOutput(nn.GRU), (3, 6)),
    "resnet": (resnet, (1, 8, 8)),
    "resnet-of-batch-statistics": (lambda: resnet(False), (1, 8, 8)),
    "branch": (DecidesByItsInput, (6,)),
}


def make(target: nn.Module, num_tasks: int = 3, **options: object) -> fh.ChunkedHypernet:
    settings = {"chunk_size": 17, "hidden": (5, 4), "task_dim": 3, "chunk_dim": 2, "dtype": torch.float64, **options}
    return fh.ChunkedHypernet(target, num_tasks, **settings)  # type: ignore[arg-type]


def batch(shape: tuple[int, ...], size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
