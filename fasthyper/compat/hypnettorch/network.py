"""What a hypnettorch ``HMLP`` or ``ChunkedHMLP`` computes: from its parameters to features and basis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper.activations import ACTIVATIONS, Activation
from fasthyper.reference import linear_drift, pairs

_KEPT = (  # what makes a forward pass; a subclass that has its own of any of these goes the general way
    *("forward", "_preprocess_forward_args", "_flat_to_ret_format", "add_to_uncond_params"),
    *("unconditional_params", "conditional_params", "internal_params", "param_shapes_meta", "target_shapes"),
)
_KNOWN = {nn.ReLU: "relu", nn.ELU: "elu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.SiLU: "silu"}
_KNOWN |= {torch.relu: "relu", F.relu: "relu", F.elu: "elu", torch.tanh: "tanh", F.tanh: "tanh"}  # type: ignore[dict-item]
_KNOWN |= {torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.silu: "silu"}  # type: ignore[dict-item]
# without parameters, state or randomness, element by element
_PLAIN_CLASSES = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid),
    *(nn.Mish, nn.ReLU6, nn.SELU, nn.Softplus, nn.Softsign, nn.Tanhshrink),
)
_PLAIN_FUNCTIONS = (F.celu, F.gelu, F.hardswish, F.hardtanh, F.leaky_relu, F.mish, F.relu6, F.selu, F.softplus, torch.sin)


class Network(NamedTuple):
    """A full (N = 1) or chunked MLP hypernetwork. Letters are those of the design: N chunks, S chunk size, E, Z, H."""

    shapes: tuple[tuple[int, ...], ...]  # of the target's tensors
    num_chunks: int
    chunk_size: int
    task_dim: int  # E; 0 where chunk embeddings are all that tells tasks apart
    chunk_dim: int  # Z; 0 in a full hypernetwork
    hidden: tuple[int, ...]  # widths of the trunk's layers
    own_chunks: bool  # each task has chunk embeddings of its own
    num_tasks: int
    names: tuple[str, ...]  # "weight" or "bias", as they follow each other in the list of unconditional parameters
    activation: Activation | None  # None where it is none that the kernels know
    function: Callable[[Tensor], Tensor]  # the activation as such
    dropout: float  # rate, 0 where none is active

    @property
    def num_weights(self) -> int:
        """P."""
        return sum(map(math.prod, self.shapes))

    @property
    def width(self) -> int:
        """H."""
        return self.hidden[-1] if self.hidden else self.task_dim + self.chunk_dim

    def is_like(self, other: Network) -> bool:
        """Whether parameters of one are parameters of the other, for the same outputs."""
        (*mine, function, _), (*others, other_function, _) = self, other
        return mine == others and repr(function) == repr(other_function)  # modules show all their settings

    def theta(self, uncond: Sequence[Tensor]) -> list[Tensor]:
        """Its unconditional parameters as ``ops.hypernet_drift`` takes them, differentiable.

        Chunk embeddings ``[N, Z]`` (``[N, 0]`` where there are none, or each task has its own), weight and bias of each
        layer, basis ``[S, H+1]``. Columns of the first of these weights come as [task | chunk], not [chunk | task].
        """
        pieces: dict[str, list[Tensor]] = {"weight": [], "bias": []}
        for name, p in zip(self.names, uncond, strict=False):
            pieces[name].append(p)
        weights, first = pieces["weight"], pieces["weight"][0]
        biases = pieces["bias"] or [w.new_zeros(len(w)) for w in weights]
        if self.task_dim and self.chunk_dim:
            weights = [torch.cat([first[:, self.chunk_dim :], first[:, : self.chunk_dim]], 1), *weights[1:]]
        has_chunks = self.chunk_dim > 0 and not self.own_chunks
        z = uncond[-1] if has_chunks else first.new_empty(self.num_chunks, 0)
        layers = [p for layer in zip(weights[:-1], biases[:-1], strict=True) for p in layer]
        return [z, *layers, torch.cat([weights[-1], biases[-1][:, None]], 1)]

    def embeddings(self, cond: Sequence[Tensor], tasks: Sequence[int]) -> Tensor:
        """``[T, E]``, what tells these tasks apart; with chunk embeddings of their own ``[T, N, E + Z]``, all the input."""
        if not self.own_chunks:
            return torch.stack([cond[task] for task in tasks])
        chunks = torch.stack([cond[len(cond) - self.num_tasks + task] for task in tasks])
        if not self.task_dim:
            return chunks
        rows = torch.stack([cond[task] for task in tasks])[:, None]
        return torch.cat([rows.expand(-1, self.num_chunks, -1), chunks], 2)

    def inputs(self, theta: Sequence[Tensor], embeddings: Tensor) -> Tensor:
        """``[T, N, E + Z]``, what the first layer is given."""
        return embeddings if self.own_chunks else pairs(embeddings, theta[0])

    def features(self, theta: Sequence[Tensor], embeddings: Tensor, *, drops: bool = False) -> Tensor:
        """``[T, N, H]``; ``drops``: with dropout, drawn task by task as hypnettorch draws it."""
        if not drops:
            return self._run(theta, self.inputs(theta, embeddings))
        return torch.stack([self._run(theta, x, self.dropout) for x in self.inputs(theta, embeddings)])

    def features_drift(
        self, theta: Sequence[Tensor], embeddings: Tensor, theta0: Sequence[Tensor], embeddings0: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Drift of the features since a snapshot, and the features there: the difference goes through the trunk (E5)."""
        x0 = self.inputs(theta0, embeddings0)
        dx = self.inputs(theta, embeddings) - x0
        for weight, bias, weight0, bias0 in zip(theta[1:-1:2], theta[2:-1:2], theta0[1:-1:2], theta0[2:-1:2], strict=True):
            a0, da = F.linear(x0, weight0, bias0), linear_drift(dx, weight, bias, x0, weight0, bias0)
            if self.activation is None:
                now, x0 = self.function(a0 + da), self.function(a0)
                dx = now - x0
            else:
                dx, slope = self.activation.drift(a0, da.detach())
                dx, x0 = dx + slope * (da - da.detach()), self.activation.value(a0)  # the added 0 carries the gradient
        return dx, x0

    def _run(self, theta: Sequence[Tensor], x: Tensor, dropout: float = 0.0) -> Tensor:
        for weight, bias in zip(theta[1:-1:2], theta[2:-1:2], strict=True):
            x = F.linear(x, weight, bias)
            x = self.function(F.dropout(x, dropout) if dropout else x)
        return x


def read(hnet: Any) -> Network | None:
    """The network that ``hnet`` is, or None: of another class, with batch normalization, with an activation that may hold
    parameters, state or randomness, or with what a subclass has changed."""
    from hypnettorch.hnets.chunked_mlp_hnet import ChunkedHMLP
    from hypnettorch.hnets.mlp_hnet import HMLP

    if _is_plain(hnet, ChunkedHMLP) and _is_plain(hnet._hnet, HMLP):
        inner, chunk_dim, own_chunks = hnet._hnet, hnet.chunk_emb_size, hnet.cond_chunk_embs
        size = hnet.num_chunks, hnet._chunk_size
    elif _is_plain(hnet, HMLP):
        inner, chunk_dim, own_chunks = hnet, 0, False
        size = 1, hnet.num_outputs
    else:
        return None
    if inner._use_batch_norm or not plain_activation(inner._act_fn):
        return None
    name = _name_of(inner._act_fn) if inner._layers else "relu"  # any will do where there is no layer to follow
    names = [inner.param_shapes_meta[ref]["name"] for ref in inner.unconditional_param_shapes_ref]
    return Network(
        tuple(map(tuple, hnet.target_shapes)),
        *size,
        hnet._cond_in_size,
        chunk_dim,
        tuple(inner._layers),
        own_chunks,
        hnet.num_known_conds,
        tuple(names),
        ACTIVATIONS[name] if name else None,
        ACTIVATIONS[name].value if name else inner._act_fn or nn.Identity(),
        inner._dropout.p if inner._layers and inner._dropout is not None and inner._dropout.training else 0.0,
    )


def plain_activation(function: Any) -> bool:
    """Whether it is known to work element by element, without parameters, state or randomness."""
    if function is None or _name_of(function) is not None or function in _PLAIN_FUNCTIONS:
        return True
    return type(function) in _PLAIN_CLASSES and not _has_hooks(function)


def _name_of(function: Any) -> str | None:
    """The key in ``ACTIVATIONS`` of what the kernels know."""
    if isinstance(function, nn.Module):
        known = not _has_hooks(function) and not (isinstance(function, nn.ELU) and function.alpha != 1)
        return _KNOWN.get(type(function)) if known else None
    return _KNOWN.get(function) if callable(function) and function.__hash__ else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _is_plain(hnet: Any, base: type) -> bool:
    return isinstance(hnet, base) and all(
        getattr(type(hnet), name) is getattr(base, name) and name not in vars(hnet) for name in _KEPT
    )
