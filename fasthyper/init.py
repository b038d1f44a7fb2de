"""How a hypernetwork begins: Xavier as in the papers' experiments, or so that the target's weights have the variances that
its layers ask for (Chang et al., Principled weight initialization for hypernetworks, ICLR 2020; DESIGN E6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasthyper.activations import Activation
from fasthyper.layout import Layout, Rectangle
from fasthyper.trunk import run_trunk

INITS = ("xavier", "hyperfan", "hyperfan-out", "hyperfan-harmonic")
_GAIN = 2.0  # what layers followed by ReLU ask for
_FEATURES_AT_ONCE = 1 << 21  # over which the trunk is measured


class Start(NamedTuple):
    """With which mean and variance the weights of a target's parameter begin, and the layer whose mean variance that is."""

    mean: float
    variance: float
    layer: str


def xavier(num_outputs: int, num_inputs: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Uniform ``[o, i]`` of variance 2 / (o + i)."""
    bound = math.sqrt(6 / (num_inputs + num_outputs))
    return torch.empty(num_outputs, num_inputs, dtype=dtype).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def hyperfan_(
    init: str,
    theta: Sequence[Tensor],
    layout: Layout,
    module: nn.Module,
    shapes: dict[str, torch.Size],
    activation: Activation,
    embedding_std: float,
    generator: torch.Generator,
) -> None:
    """Scales the draws in ``theta`` so that the weights generated for a new task begin as ``starts`` asks for.

    The weight in chunk n, column s has the variance of row s of the basis times the energy (squared norm) of chunk n's
    features, which grows with the chunk's embedding.

    Args:
        theta: as ``hnet.theta``: Xavier's draws, chunk embeddings of the same variance as those of tasks, biases 0.
        module, shapes: the target, and the parameters of it that are generated.

    Raises:
        ValueError: the trunk cannot give chunks energies as different as that (bounded activations).
    """
    z, *layers, basis = theta
    wanted = starts(init, module, shapes, in_chunks=layout.num_chunks > 1)
    begins = accumulate((shape.numel() for shape in shapes.values()), initial=0)
    places = [layout.places((lo, lo + shape.numel())) for lo, shape in zip(begins, shapes.values(), strict=False)]
    task_dim = (layers[0] if layers else basis[:, :-1]).shape[1] - z.shape[1]
    _scale_trunk(layers, activation, embedding_std)
    pairs = max(2, min(32, _FEATURES_AT_ONCE // (2 * len(z) * max([basis.shape[1], *map(len, layers)]))))
    draws = embedding_std * torch.randn(pairs, task_dim, generator=generator, dtype=z.dtype)

    def energies(factors: Tensor) -> Tensor:
        trunk = run_trunk([factors[:, None].to(z.dtype) * z, *layers, basis], torch.cat([draws, -draws]), activation)
        return trunk.features.square().sum(2).mean(0).double()

    chunks, rows = torch.ones(len(z), dtype=torch.float64), torch.ones(len(basis), dtype=torch.float64)
    if len(z) > 1:
        chunks, rows = fit(places, wanted, len(z), len(basis))
        z *= _factors(energies, chunks)[:, None].to(z.dtype)
    else:
        for start, rectangles in zip(wanted, places, strict=True):
            for r in rectangles:
                rows[r.col_lo : r.col_hi], basis[r.col_lo : r.col_hi, -1] = start.variance, start.mean
    rows *= chunks.sum() / energies(torch.ones(len(z))).sum()
    basis[:, :-1] *= (rows * sum(basis[:, :-1].shape) / 2).sqrt().to(basis.dtype)[:, None]


def starts(init: str, module: nn.Module, shapes: dict[str, torch.Size], *, in_chunks: bool) -> list[Start]:
    """How the weights of each parameter are to begin, in the order of ``shapes``; biases are those of ReLU layers.

    ``"hyperfan"`` keeps the second moment of what passes forward, ``"hyperfan-out"`` that of gradients;
    ``"hyperfan-harmonic"`` is the harmonic mean of both variances, 0 where one is.

    Chunks share rows of the basis, so that a few weights cannot differ in variance from all those around them. ``in_chunks``
    a bias is the weight of one more input, 1, and norms, whose layer is ``""``, begin as what is around them. Otherwise a
    bias has half of the second moment, as in the paper, and norms begin as identity.
    """
    roles = _roles(module)
    found = []
    for name in shapes:
        fan_in, fan_out, kind, has_bias = roles[name]
        if kind in ("scale", "shift"):
            found.append(Start(0.0, 1.0, "") if in_chunks else Start(float(kind == "scale"), 0.0, ""))
            continue
        if in_chunks:
            forward, backward = _GAIN / (fan_in + has_bias), _GAIN / fan_out
        elif kind == "bias":
            forward, backward = _GAIN / 2, _GAIN * max(0.0, 1 - fan_in / fan_out)
        else:
            forward, backward = _GAIN / (fan_in * (1 + has_bias)), _GAIN / fan_out
        harmonic = 2 / (1 / forward + 1 / backward) if backward else 0.0
        variance = {"hyperfan": forward, "hyperfan-out": backward}.get(init, harmonic)
        found.append(Start(0.0, variance, name.rpartition(".")[0] or name))
    return found


def fit(
    places: Sequence[Sequence[Rectangle]], wanted: Sequence[Start], num_chunks: int, num_cols: int
) -> tuple[Tensor, Tensor]:
    """Factors of chunks ``[N]`` and columns ``[S]`` whose products have, over each layer's cells, its variance as mean.

    Starts from the mean of each chunk and equal columns and changes, in the logarithm and weighed by cells, as little as it
    can, by Newton's method. Where layers lie so that no such factors exist, it comes as near as it can.

    Args:
        places: of each parameter.  wanted: ``starts`` of it; those of layer ``""`` count in chunks without another.
    """
    layers = list(dict.fromkeys(wanted))
    spans = torch.tensor([(*r, layers.index(s)) for rs, s in zip(places, wanted, strict=True) for r in rs])
    variances = torch.tensor([start.variance for start in layers], dtype=torch.float64)
    chunk_lo, chunk_hi, col_lo, col_hi, owner = spans.split(1, 1)
    cuts = torch.cat([col_lo, col_hi, torch.tensor([[0], [num_cols]])]).unique()
    numbers, widths = torch.arange(num_chunks), cuts.diff()
    in_chunk = ((chunk_lo <= numbers) & (numbers < chunk_hi)).double()  # rectangles x chunks
    in_cols = ((col_lo <= cuts[:-1]) & (cuts[:-1] < col_hi)) * widths.double()  # rectangles x ranges of columns
    owner = owner.flatten()
    free = torch.tensor([start.layer == "" for start in layers])

    def shares(chunks: Tensor, cols: Tensor) -> Tensor:
        """Sum of each layer, as parts in chunks and, again, in ranges of columns."""
        by_chunk, by_cols = in_chunk * chunks, in_cols * cols
        parts = torch.cat([by_chunk * by_cols.sum(1, keepdim=True), by_cols * by_chunk.sum(1, keepdim=True)], 1)
        return parts.new_zeros(len(layers), parts.shape[1]).index_add_(0, owner, parts)

    cols = torch.ones(len(widths), dtype=torch.float64)
    cells = shares(torch.ones(num_chunks, dtype=torch.float64), cols)
    weight = torch.where(free, 1e-9, 1.0)[:, None] * cells[:, :num_chunks]
    chunks = (weight * variances[:, None]).sum(0) / weight.sum(0)
    count = cells.sum(0).clamp(min=1)
    for _ in range(50):
        parts = shares(chunks, cols)[~free]
        total = parts[:, :num_chunks].sum(1, keepdim=True)
        rest = (variances[~free, None] * cells[~free, :num_chunks].sum(1, keepdim=True) / total).log()
        if not len(rest) or rest.abs().max() < 1e-6:
            break
        slopes = parts / total
        change = slopes.T @ torch.linalg.pinv(slopes / count @ slopes.T, rtol=1e-9, hermitian=True) @ rest
        step = (change.flatten() / count).clamp(-1, 1).exp()
        chunks, cols = chunks * step[:num_chunks], cols * step[num_chunks:]
    return chunks, cols.repeat_interleave(widths)


def _factors(energies: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """Factors of the chunk embeddings with which ``energies`` are in proportion to ``wanted``; the smallest are about 1."""
    low, high = torch.zeros_like(wanted), torch.ones_like(wanted)  # between them, squared, lies the factor
    below, above = energies(low), energies(high)
    wanted = wanted * (torch.maximum(above.mean(), 1.02 * below.mean()) / wanted.min())
    for _ in range(12):
        if (above >= wanted).all():
            break
        low, below = torch.where(above < wanted, high, low), torch.where(above < wanted, above, below)
        high = torch.where(above < wanted, 4 * high, high)
        above = energies(high.sqrt())
    else:
        raise ValueError(
            f"hyperfan: this trunk cannot make chunks of variances {(wanted.max() / wanted.min()).item():.3g} times apart; "
            "use an activation without an upper bound (relu, elu, silu), a wider trunk, or init='xavier'"
        )
    for _ in range(20):
        share = ((wanted - below) / (above - below)).clamp(0.1, 0.9)  # energies are nearly linear in the square
        middle = low + share * (high - low)
        have = energies(middle.sqrt())
        if (have / wanted - 1).abs().max() < 5e-3:
            break
        low, below = torch.where(have < wanted, middle, low), torch.where(have < wanted, have, below)
        high, above = torch.where(have < wanted, high, middle), torch.where(have < wanted, above, have)
    return middle.sqrt()


def _scale_trunk(layers: Sequence[Tensor], activation: Activation, embedding_std: float) -> None:
    """Pre-activations of variance 1 from Xavier's draws, where embeddings have ``embedding_std``."""
    normal = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-normal.square() / 2)
    moment = ((activation.value(normal).square() * density).sum() / density.sum()).item()
    for index, weight in enumerate(layers[::2]):
        variance = 1 / (weight.shape[1] * (moment if index else embedding_std**2))
        weight *= math.sqrt(variance * sum(weight.shape) / 2)


def _roles(module: nn.Module) -> dict[str, tuple[int, int, str, bool]]:
    """Of each parameter: fan-in, fan-out, whether it is a weight, a bias, a norm's scale or shift, and if there is bias."""
    roles = {}
    for prefix, layer in module.named_modules():
        own = {key: p for key, p in layer._parameters.items() if p is not None}
        fans = {} if isinstance(layer, nn.LayerNorm) else {key: _fans(layer, p) for key, p in own.items() if p.dim() > 1}
        for key, p in own.items():
            mates = [fan for mate, fan in fans.items() if fan[2] == len(p)] if p.dim() == 1 else []
            if key in fans:
                biases = [bias for bias, q in own.items() if q.dim() == 1 and len(q) == fans[key][2]]
                role = (*fans[key][:2], "weight", bool(biases))
            elif mates:
                role = (*mates[0][:2], "bias", True)
            else:
                role = (1, 1, "shift" if "bias" in key else "scale", True)
            roles[f"{prefix}.{key}".removeprefix(".")] = role
    return roles


def _fans(layer: nn.Module, p: Tensor) -> tuple[int, int, int]:
    """Fan-in, fan-out and number of outputs of a layer's weight."""
    if isinstance(layer, nn.Embedding):
        return 2, 2, -1  # of variance 1
    field, groups = math.prod(p.shape[2:]), getattr(layer, "groups", 1)
    rows, others = max(1, p.shape[0] // groups * field), max(1, p.shape[1] * field)
    return (rows, others, p.shape[1] * groups) if getattr(layer, "transposed", False) else (others, rows, p.shape[0])
