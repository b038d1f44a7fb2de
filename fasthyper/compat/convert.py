"""Hypernetworks of hypnettorch and hypercl as ours, and back: every parameter keeps its bits.

Parameters are told by order and shape: hypnettorch has task embeddings, layers, chunk embeddings, and its first layer takes
``[chunk embedding, task embedding]``; hypercl has chunk embeddings, layers, and apart from them task embeddings, which its
first layer takes first, as ours does. Their output layer is our basis; a full hypernetwork of hypercl has one per tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fasthyper import nets
from fasthyper.activations import ACTIVATIONS
from fasthyper.hypernet import ChunkedHypernet

MODULES = {"relu": nn.ReLU, "elu": nn.ELU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU}

Peer = TypeVar("Peer")


def from_hypnettorch(hnet: Any, mnet: nn.Module, *, outputs_per_task: int | None = None) -> ChunkedHypernet:
    """hypnettorch's ``ChunkedHMLP`` or ``HMLP`` as a ``ChunkedHypernet`` that generates the same weights.

    Args:
        hnet: the hypernetwork; its parameters are copied.
        mnet: the network whose ``param_shapes`` it generates, made a module by ``as_module``; or any module with such
            parameters, in the order of ``named_parameters()``.
        outputs_per_task: size of each task's own output head, as in ``ChunkedHypernet``.

    Raises:
        ValueError: another kind of hypernetwork, an option that ours does not have, or an ``mnet`` that does not fit.
    """
    from hypnettorch.hnets import HMLP, ChunkedHMLP

    chunked = isinstance(hnet, ChunkedHMLP)
    if type(hnet).forward not in (ChunkedHMLP.forward, HMLP.forward):
        raise ValueError(
            f"{type(hnet).__name__} has no counterpart here; ChunkedHMLP and HMLP have, with their own forward()"
        )
    _refuse(
        no_uncond_weights=hnet._no_uncond_weights,
        **{"num_cond_embs=0": hnet.num_known_conds == 0},
        cond_chunk_embs=chunked and hnet.cond_chunk_embs,
        use_batch_norm=hnet.batchnorm_layers is not None,
        **{"use_bias=False": not hnet.has_bias},
        dropout_rate=any(isinstance(module, nn.Dropout) for module in hnet.modules()),
    )
    values = [parameter.detach() for parameter in hnet.internal_params]
    embeddings, layers = values[: hnet.num_known_conds], values[hnet.num_known_conds :]
    chunk_embeddings = layers.pop() if chunked else None
    task_dim, own = len(embeddings[0]), layers[0].shape[1] - (0 if chunk_embeddings is None else chunk_embeddings.shape[1])
    _refuse(uncond_in_size=task_dim != own)
    layers[0] = layers[0].roll(task_dim, 1)
    function = (hnet._hnet if chunked else hnet)._act_fn
    ours = _build(embeddings, chunk_embeddings, layers, function, _target(hnet, mnet), outputs_per_task)
    return _checked(ours, ours, hnet.forward(cond_id=ours.num_tasks - 1))


def to_hypnettorch(hnet: ChunkedHypernet) -> tuple[Any, Any]:
    """``hnet`` as hypnettorch's ``ChunkedHMLP``, or ``HMLP`` where all weights are made at once, and the network for it.

    The network holds no weights of its own; it is ``None`` unless the target is a ``fh.nets.MLP`` or was made by
    ``as_module``. Output heads are for the caller to slice.

    Raises:
        ValueError: hypnettorch has nothing like it: ``layout="aligned"``.
    """
    from hypnettorch.hnets import HMLP, ChunkedHMLP

    config = _flat(hnet)
    options = {
        "cond_in_size": hnet.task_dim,
        "layers": config["hidden"],
        "activation_fn": MODULES[config["activation"]](),
        "num_cond_embs": hnet.num_tasks,
        "verbose": False,
    }
    shapes, chunk_size = [list(shape) for shape in hnet.target.shapes], config["chunk_size"]
    with torch.random.fork_rng(devices=[]):  # its constructor draws weights
        if chunk_size is None:
            peer = HMLP(shapes, **options)
        else:
            peer = ChunkedHMLP(shapes, chunk_size, chunk_emb_size=config["chunk_dim"], **options)
    peer = peer.to(hnet.basis)
    _copy([*hnet.task_embeddings, *in_hypnettorch_order(hnet, hnet.theta)], peer.internal_params)
    _checked(peer, hnet, peer.forward(cond_id=hnet.num_tasks - 1) if hnet.num_tasks else None)
    return peer, _network(hnet.target.module)


def in_hypnettorch_order(hnet: ChunkedHypernet, theta: Sequence[Tensor]) -> list[Tensor]:
    """Tensors shaped like ``hnet.theta`` as hypnettorch's ``unconditional_params``."""
    chunk_embeddings, *layers, basis = theta
    layers = [*layers, basis[:, :-1], basis[:, -1]]
    layers[0] = layers[0].roll(-hnet.task_dim, 1)
    return [layer.contiguous() for layer in layers] + ([] if hnet.config["chunk_size"] is None else [chunk_embeddings])


def from_hypercl(
    hnet: Any, mnet: nn.Module, *, activation: str | None = None, outputs_per_task: int | None = None
) -> ChunkedHypernet:
    """hypercl's ``ChunkedHyperNetworkHandler`` or ``HyperNetwork`` as a ``ChunkedHypernet`` that generates the same weights.

    Args:
        hnet: the hypernetwork; its parameters are copied.
        mnet, outputs_per_task: as in ``from_hypnettorch``.
        activation: of its hidden layers, where it keeps none as ``_act_fn``; a key of ``activations.ACTIVATIONS``.

    Raises:
        ValueError: as ``from_hypnettorch``.
    """
    chunked = hasattr(hnet, "chunk_embeddings")
    _refuse(
        no_weights=not hnet.has_theta,
        no_te_embs=not hnet.has_task_embs or not len(hnet.get_task_embs()),
        ce_dim=not chunked and hnet.requires_ext_input,
        dropout_rate=any(isinstance(module, nn.Dropout) for module in hnet.modules()),
        **{"use_bias=False": all(parameter.dim() > 1 for parameter in hnet.theta)},
    )
    layers, chunk_embeddings = [parameter.detach() for parameter in hnet.theta], None
    if chunked:
        chunk_embeddings = layers.pop(0)
    else:
        _check_layers(layers, len(hnet.target_shapes))
        first = len(layers) - 2 * len(hnet.target_shapes)
        layers[first:] = [torch.cat(layers[first::2]), torch.cat(layers[first + 1 :: 2])]
    embeddings = [embedding.detach() for embedding in hnet.get_task_embs()]
    num_inputs = len(embeddings[0]) + (0 if chunk_embeddings is None else chunk_embeddings.shape[1])
    _refuse(noise_dim=layers[0].shape[1] != num_inputs)
    functions = [module._act_fn for module in hnet.modules() if hasattr(module, "_act_fn")]
    if activation is not None:
        functions = [ACTIVATIONS[activation].value]
    elif not functions and len(layers) > 2:
        raise ValueError(f"{type(hnet).__name__} does not tell its activation; pass activation=")
    ours = _build(embeddings, chunk_embeddings, layers, functions and functions[0], _target(hnet, mnet), outputs_per_task)
    return _checked(ours, ours, hnet.forward(ours.num_tasks - 1))


def to_hypercl(hnet: ChunkedHypernet, kind: type[Peer]) -> Peer:
    """``hnet`` as hypercl's ``kind``: the class ``ChunkedHyperNetworkHandler``, or ``HyperNetwork`` if it makes all at once.

    Raises:
        ValueError: hypercl has nothing like it: ``layout="aligned"``; or ``kind`` is another class than it should be.
    """
    config = _flat(hnet)
    options = {
        "layers": config["hidden"],
        "te_dim": hnet.task_dim,
        "activation_fn": MODULES[config["activation"]](),
        **({"verbose": False} if config["chunk_size"] is None else {"chunk_dim": len(hnet.basis)}),
        **({} if config["chunk_size"] is None else {"ce_dim": config["chunk_dim"]}),
    }
    with torch.random.fork_rng(devices=[]):
        peer: Any = kind([list(shape) for shape in hnet.target.shapes], hnet.num_tasks, **options)  # type: ignore[call-arg]
    peer = peer.to(hnet.basis)
    chunk_embeddings, *layers, basis = hnet.theta
    if config["chunk_size"] is None:
        sizes = [shape.numel() for shape in hnet.target.shapes]
        heads = [part for rows in basis.split(sizes) for part in (rows[:, :-1], rows[:, -1])]
        theta = [*layers, *heads]
    else:
        theta = [chunk_embeddings, *layers, basis[:, :-1], basis[:, -1]]
    _copy([*hnet.task_embeddings, *theta], [*peer.get_task_embs(), *peer.theta])
    return _checked(peer, hnet, peer.forward(hnet.num_tasks - 1) if hnet.num_tasks else None)


class MainNet(nn.Module):
    """A network of hypnettorch or hypercl as a plain module: its parameters are ``param_shapes`` in order, all 0 at first.

    ``forward(x)`` is ``mnet.forward(x, weights=...)``, of a copy whose own weights are not kept; where an ``out_fn`` makes
    that a pair, the output alone.

    Raises:
        ValueError: running batch-norm statistics, which one set of cannot serve several tasks.
    """

    def __init__(self, mnet: nn.Module):
        super().__init__()
        shapes: Any = mnet.param_shapes
        if any(int(getattr(module, "num_stats", 0)) for module in mnet.modules()):
            raise ValueError(
                "the network keeps running batch-norm statistics, which would be shared by all tasks; "
                "build it with bn_track_stats=False"
            )
        self.weights = nn.ParameterList(torch.zeros(*shape) for shape in shapes)
        self.mnet = copy.deepcopy(mnet, {id(parameter): parameter.detach().to("meta") for parameter in mnet.parameters()})
        for module in self.mnet.modules():  # what is no parameter of it must not be generated
            module.__dict__.update(module._parameters)
            module._parameters.clear()

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.mnet.forward(x, weights=list(self.weights))
        return outputs[0] if isinstance(outputs, tuple) else outputs


def as_module(mnet: Any) -> nn.Module:
    """A network of hypnettorch or hypercl as a module: a ``fh.nets.MLP`` where it is just that, else a ``MainNet``."""
    if type(mnet).__module__ == "hypnettorch.mnets.mlp" and type(mnet).__name__ == "MLP":
        special = mnet._use_batch_norm or mnet._use_context_mod or mnet._dropout_rate != -1 or mnet._out_fn is not None
        if not special and _activation(mnet._a_fun) == "relu":
            return _mlp(mnet.param_shapes)
    return MainNet(mnet)


def _refuse(**options: bool) -> None:
    """Raises a ValueError that names the first option which is set."""
    for name, is_set in options.items():
        if is_set:
            raise ValueError(f"the hypernetwork cannot be converted: ChunkedHypernet has nothing like its option {name}")


def _build(
    embeddings: list[Tensor],
    chunk_embeddings: Tensor | None,
    layers: list[Tensor],
    function: Any,
    target: nn.Module,
    outputs_per_task: int | None,
) -> ChunkedHypernet:
    """Ours with these parameters, ``layers`` being weight and bias of each layer, the first with task columns first."""
    _check_layers(layers)
    weights, biases = layers[::2], layers[1::2]
    hidden, dtype = [len(bias) for bias in biases[:-1]], weights[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the hypernetwork is of {dtype}; make it float32 or float64 first")
    ours = ChunkedHypernet(
        target,
        len(embeddings),
        chunk_size=None if chunk_embeddings is None else len(weights[-1]),
        hidden=hidden,
        task_dim=len(embeddings[0]),
        chunk_dim=1 if chunk_embeddings is None else chunk_embeddings.shape[1],
        activation=_activation(function) if hidden else "relu",
        outputs_per_task=outputs_per_task,
        dtype=dtype,
    )
    basis = torch.cat([weights[-1], biases[-1][:, None]], 1)
    first = ours.chunk_embeddings if chunk_embeddings is None else chunk_embeddings
    _copy([first, *layers[:-2], basis, *embeddings], [*ours.theta, *ours.task_embeddings])
    return ours.to(weights[0].device)


def _check_layers(layers: Sequence[Tensor], num_heads: int = 1) -> None:
    """Weight ``[o, i]`` and bias ``[o]`` of each layer, one after the other, and of ``num_heads`` output layers."""
    weights, shapes = layers[::2], [list(layer.shape) for layer in layers]
    fits = bool(layers) and shapes == [s for w in weights for s in ([len(w), w.shape[-1]], [len(w)])]
    if fits:
        widths = [weights[0].shape[1], *(len(weight) for weight in weights[:-num_heads])]
        fits = [weight.shape[1] for weight in weights] == widths[:-1] + [widths[-1]] * num_heads
    if not fits:
        raise ValueError(f"the shared parameters are not weight and bias of each layer in turn, they are of shapes {shapes}")


def _flat(hnet: ChunkedHypernet) -> dict[str, Any]:
    """Its configuration, if it is one that the others can have."""
    if hnet.config["layout"] != "flat":
        raise ValueError(f"the hypernetwork cannot be converted: only layout='flat' can, not {hnet.config['layout']!r}")
    if list(hnet.rest) or hnet.statistics is not None or len(hnet.layout.blocks) > 1:
        left = "parameters it does not generate, batch-norm statistics of each task or heads that were added"
        raise ValueError(f"the hypernetwork cannot be converted: it has {left}, which would be left behind")
    return hnet.config


def _copy(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (values, into)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"parameters of shapes {shapes[0]} do not fit into {shapes[1]}")
    for own, value in zip(into, values, strict=True):
        own.data.copy_(value.detach())


@torch.no_grad()
def _checked(result: Peer, hnet: ChunkedHypernet, weights: Any) -> Peer:
    """``result``, if the weights that the other one generated for the last task are those that ours does, up to rounding."""
    if hnet.num_tasks:
        ours, theirs = (torch.cat([w.flatten() for w in ws]) for ws in (hnet.generate(hnet.num_tasks - 1).values(), weights))
        if not (ours - theirs).norm() <= torch.finfo(ours.dtype).eps ** 0.25 * theirs.norm():  # TF32 has 1e-3
            raise ValueError(
                "the other hypernetwork does more than its parameters say: it generates other weights with them"
            )
    return result


def _activation(function: Callable[[Tensor], Tensor] | None) -> str:
    """Which of ours a function is, by what it does."""
    x = torch.linspace(-8, 8, 257, dtype=torch.float64)
    for name, activation in ACTIVATIONS.items():
        if function is not None and torch.equal(function(x.clone()), activation.value(x)):
            return name
    raise ValueError(f"activation_fn={function} has no counterpart here; choose from {', '.join(ACTIVATIONS)}")


def _target(hnet: Any, mnet: nn.Module) -> nn.Module:
    target = as_module(mnet) if hasattr(mnet, "param_shapes") else mnet
    theirs, ours = [list(s) for s in hnet.target_shapes], [list(p.shape) for p in target.parameters()]
    if theirs != ours:
        raise ValueError(
            f"the hypernetwork generates tensors of shapes {theirs}, the target has parameters of shapes {ours}"
        )
    return target


def _mlp(shapes: Sequence[Sequence[int]]) -> nets.MLP:
    weights = [shape for shape in shapes if len(shape) > 1]
    hidden, bias = [shape[0] for shape in weights[:-1]], len(weights) < len(shapes)
    return nets.MLP(weights[0][1], hidden, weights[-1][0], bias=bias)


def _network(module: nn.Module) -> Any:
    """What ``as_module`` made a module of."""
    if isinstance(module, MainNet):
        return copy.deepcopy(module.mnet)
    if not isinstance(module, nets.MLP):
        return None
    from hypnettorch.mnets import MLP

    c = module.config
    options = {"activation_fn": MODULES[c["activation"]](), "use_bias": c["bias"], "no_weights": True, "verbose": False}
    return MLP(c["num_inputs"], c["num_outputs"], c["hidden"], **options)
