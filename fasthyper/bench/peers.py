"""Ours and its peers, each as a pair of callables on the same parameters and the same batch.

``hypnettorch`` 0.0.4 runs the paper's code: a loop over old tasks. ``eager`` is what one writes in plain PyTorch without a
loop: all old tasks' weights ``[T, P]`` from batched products, subtracted from stored ones. ``compile`` is ``eager`` under
``torch.compile``. ``recompute`` is ours where a snapshot stores no pre-activations: less memory for more time.
"""

from __future__ import annotations

import abc
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper import nets
from fasthyper.bench.workloads import Workload
from fasthyper.compat.convert import in_hypnettorch_order, to_hypnettorch
from fasthyper.hypernet import ChunkedHypernet
from fasthyper.metrics import TaskRecord
from fasthyper.regularizer import OutputRegularizer
from fasthyper.trainer import Trainer

OURS = "fasthyper"
LR = 1e-4
AHEAD = 1e-3  # size of the look-ahead at which the regularizer is timed

Call = Callable[[], Any]


class Side(abc.ABC):
    """One contender. Of its two calls, ``regularizer`` returns the value and the gradients at a looked-ahead theta, ``step``
    takes a training step and returns loss and drift; ``prepare`` sets one of them up, snapshot or stored targets included.
    """

    name: str
    package: str | None = None  # what it needs beside torch
    stored_per_weight = 0.0  # copies of all old tasks' weights that it holds at its worst moment

    def __init__(
        self,
        workload: Workload,
        past: int,
        dtype: torch.dtype = torch.float32,
        eps: float = 1e-8,
        device: torch.device | str = "cpu",
    ):
        self.workload, self.past, self.dtype, self.eps, self.device = workload, past, dtype, eps, torch.device(device)
        self.hnet = workload.build(past).to(device, dtype)
        x, y = workload.batch()
        self.x, self.y = x.to(device, dtype), y.to(device)

    @abc.abstractmethod
    def prepare(self, what: str) -> Call:
        """What is timed, ready to be called again and again."""

    def comparable(self, grads: Sequence[Tensor]) -> Tensor:
        """Its gradients as one vector, in the order of our theta."""
        return torch.cat([grad.flatten() for grad in grads])

    def ahead(self) -> list[Tensor]:
        """The step of the look-ahead for each tensor of our theta: the same for every side."""
        generator = torch.Generator().manual_seed(1)
        return [AHEAD * torch.randn(p.shape, generator=generator).to(p) for p in self.hnet.theta]


class Ours(Side):
    name = OURS
    memory_budget: int | None = None

    def prepare(self, what: str) -> Call:
        if what == "step":
            options: dict[str, Any] = {"optimizer_options": {"eps": self.eps}, "memory_budget": self.memory_budget}
            trainer = Trainer(self.hnet, lr=LR, beta=self.workload.beta, progress=False, **options)
            trainer.results.tasks = [TaskRecord(task) for task in range(self.past)]
            current = trainer._begin(self.past, "")
            return lambda: trainer._step(current, self.x, self.y)
        regularizer = OutputRegularizer(self.hnet, memory_budget=self.memory_budget)
        regularizer.snapshot(self.past)
        ahead = [p.detach() + d for p, d in zip(self.hnet.theta, self.ahead(), strict=True)]
        return lambda: regularizer.value_and_grad(ahead)[:2]


class Recompute(Ours):
    name = "recompute"
    memory_budget = 0


class Hypnettorch(Side):
    name = package = "hypnettorch"
    stored_per_weight = 5.5

    def prepare(self, what: str) -> Call:
        from hypnettorch.utils import hnet_regularizer as hreg

        if what == "step":
            trainer = PeerTrainer(self.hnet, lr=LR, beta=self.workload.beta, eps=self.eps)
            trainer.begin(self.past)
            x = self.x if self.x.dim() == 2 else self.x.permute(0, 2, 3, 1).flatten(1)  # it takes flat rows of pixels
            return lambda: trainer.step(x, self.y)
        _, peer = peer_of(self.hnet)
        targets, ahead = hreg.get_current_targets(self.past, peer), in_hypnettorch_order(self.hnet, self.ahead())

        def regularizer() -> tuple[Tensor, Sequence[Tensor]]:
            value = hreg.calc_fix_target_reg(peer, self.past, targets=targets, dTheta=ahead)
            return value.detach(), torch.autograd.grad(value, peer.unconditional_params)

        return regularizer

    def comparable(self, grads: Sequence[Tensor]) -> Tensor:
        return super().comparable(in_our_order(self.hnet, grads))


class Eager(Side):
    """The weights of all old tasks at once, and autograd."""

    name = "eager"
    stored_per_weight = 4.5

    @staticmethod
    def compiled(function: Any) -> Any:
        return function

    def prepare(self, what: str) -> Call:
        chunk_embeddings, *layers, basis = (p.detach().clone() for p in self.hnet.theta)
        self.theta = [chunk_embeddings, *layers, basis[:, :-1].contiguous(), basis[:, -1].contiguous()]
        self.embeddings = torch.stack([e.detach() for e in self.hnet.task_embeddings])
        self.activation = getattr(F, self.hnet.config["activation"])
        self.module, self.names = self.hnet.target.module, self.hnet.target.names
        self.shapes, self.sizes = self.hnet.target.shapes, [shape.numel() for shape in self.hnet.target.shapes]
        with torch.no_grad():
            self.targets = self._weights(self.theta, self.embeddings[: self.past])
        self.penalty, self.task_loss, self.candidates = map(
            self.compiled, (self._penalty, self._task_loss, self._candidates)
        )
        return self._prepare_step() if what == "step" else self._prepare_regularizer()

    def comparable(self, grads: Sequence[Tensor]) -> Tensor:
        *others, weight, bias = grads
        return super().comparable([*others, torch.cat([weight, bias[:, None]], 1)])

    def _prepare_regularizer(self) -> Call:
        *steps, basis = self.ahead()
        steps = [*steps, basis[:, :-1], basis[:, -1]]
        ahead = [(p + d).requires_grad_() for p, d in zip(self.theta, steps, strict=True)]
        return lambda: self._value_and_grads(ahead)

    def _prepare_step(self) -> Call:
        theta, embedding = [p.requires_grad_() for p in self.theta], self.embeddings[self.past].clone().requires_grad_()
        optimizer = torch.optim.Adam(theta, lr=LR, eps=self.eps, fused=True)
        embedding_optimizer = torch.optim.Adam([embedding], lr=LR, eps=self.eps, fused=True)
        moments = [torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta]
        steps = 0

        def step() -> tuple[float, float]:
            nonlocal moments, steps
            loss = self.task_loss(theta, embedding, self.x, self.y)
            *grads, embedding.grad = torch.autograd.grad(loss, [*theta, embedding])
            steps += 1
            bias1, bias2 = (torch.tensor(1 - b**steps, dtype=self.dtype) for b in (0.9, 0.999))
            with torch.no_grad():
                ahead = self.candidates(theta, grads, *moments, bias1, bias2)
            value, held_grads = self._value_and_grads([p.requires_grad_() for p in ahead])
            torch._foreach_add_(grads, list(held_grads), alpha=self.workload.beta)
            for parameter, grad in zip(theta, grads, strict=True):
                parameter.grad = grad
            optimizer.step()
            embedding_optimizer.step()
            if steps == 1:
                moments = tuple([optimizer.state[p][key] for p in theta] for key in ("exp_avg", "exp_avg_sq"))  # type: ignore[assignment]
            return loss.item(), value.item()

        return step

    def _weights(self, theta: Sequence[Tensor], embeddings: Tensor) -> Tensor:
        """``[T, P]``."""
        chunk_embeddings, *layers, weight, bias = theta
        rows = embeddings[:, None].expand(-1, len(chunk_embeddings), -1)
        x = torch.cat([rows, chunk_embeddings.expand(len(embeddings), -1, -1)], -1)
        for w, b in zip(layers[::2], layers[1::2], strict=True):
            x = self.activation(F.linear(x, w, b))
        return F.linear(x, weight, bias).flatten(1)[:, : self.hnet.target.num_weights]

    def _penalty(self, theta: Sequence[Tensor]) -> Tensor:
        weights = self._weights(theta, self.embeddings[: self.past])
        return F.mse_loss(weights, self.targets, reduction="sum") / self.past

    def _value_and_grads(self, theta: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        value = self.penalty(theta)
        return value.detach(), torch.autograd.grad(value, list(theta), materialize_grads=True, allow_unused=True)

    def _task_loss(self, theta: Sequence[Tensor], embedding: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = self._weights(theta, embedding[None])[0].split(self.sizes)
        weights = {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(self.module, weights, (x,)), y)

    def _candidates(
        self,
        theta: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avg: Sequence[Tensor],
        exp_avg_sq: Sequence[Tensor],
        bias1: Tensor,
        bias2: Tensor,
    ) -> list[Tensor]:
        """Where Adam's next step would take theta."""
        ahead = []
        for p, g, m, v in zip(theta, grads, exp_avg, exp_avg_sq, strict=True):
            m, v = torch.lerp(m, g, 0.1), torch.lerp(v, g * g, 0.001)
            ahead.append(p - LR / bias1 * m / ((v / bias2).sqrt() + self.eps))
        return ahead


class Compiled(Eager):
    name = "compile"

    def prepare(self, what: str) -> Call:
        torch._dynamo.reset()  # each side compiles the same lines anew, and dynamo gives up after eight times
        return super().prepare(what)

    @staticmethod
    def compiled(function: Any) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False)


SIDES: dict[str, type[Side]] = {side.name: side for side in (Ours, Recompute, Hypnettorch, Eager, Compiled)}
OTHERS = tuple(name for name in SIDES if name != OURS)
PEERS = tuple(name for name, side in SIDES.items() if not issubclass(side, Ours))


def missing(name: str) -> str | None:
    """How to get what a side needs and does not find; ``None`` where it can run."""
    package = SIDES[name].package
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed: pip install 'fasthyper[bench]'"


def peer_of(hnet: ChunkedHypernet) -> tuple[Any, Any]:
    """hypnettorch's network and hypernetwork, holding the parameters of ``hnet``, whose target is one of ``fh.nets``."""
    from hypnettorch.mnets import ResNet

    peer, mnet = to_hypnettorch(hnet)
    if isinstance(hnet.target.module, nets.ResNet):
        target = nets.describe(hnet.target.module)["config"]
        settings = {"n": target["n"], "num_feature_maps": target["widths"], "use_bias": target["bias"], "verbose": False}
        shape = (32, 32, target["num_channels"])
        mnet = ResNet(shape, target["num_outputs"], no_weights=True, bn_track_stats=False, **settings)
    return mnet, peer


def in_our_order(hnet: ChunkedHypernet, theirs: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of ``in_hypnettorch_order``."""
    first, *rest = theirs
    chunk_embeddings = hnet.chunk_embeddings.detach() if hnet.config["chunk_size"] is None else rest.pop()
    *layers, weight, bias = [torch.roll(first, hnet.config["task_dim"], 1), *rest]
    return [chunk_embeddings, *layers, torch.cat([weight, bias[:, None]], 1)]


class PeerTrainer:
    """The task-incremental loop of the paper's code over hypnettorch's parts, look-ahead on, targets stored."""

    def __init__(self, hnet: ChunkedHypernet, *, lr: float, beta: float, eps: float = 1e-8):
        self.mnet, self.peer = peer_of(hnet)
        self.settings: dict[str, Any] = {"lr": lr, "eps": eps}
        self.beta = beta

    def begin(self, task: int) -> None:
        """New optimizers, and the weights of all past tasks, generated and kept."""
        from hypnettorch.utils import hnet_regularizer as hreg

        self.task = task
        self.theta_optimizer = torch.optim.Adam(self.peer.unconditional_params, **self.settings)
        self.embedding_optimizer = torch.optim.Adam([self.peer.conditional_params[task]], **self.settings)
        self.targets = hreg.get_current_targets(task, self.peer) if task else None

    def step(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """One update; returns the task loss and the drift (NaN without one) before it."""
        from hypnettorch.utils import hnet_regularizer as hreg
        from hypnettorch.utils import optim_step

        drift = math.nan
        self.theta_optimizer.zero_grad()
        self.embedding_optimizer.zero_grad()
        loss = F.cross_entropy(self.mnet.forward(x, weights=self.peer.forward(cond_id=self.task)), y)
        loss.backward()
        if self.task:
            ahead = optim_step.calc_delta_theta(self.theta_optimizer, False, lr=self.settings["lr"], detach_dt=True)
            penalty = hreg.calc_fix_target_reg(self.peer, self.task, targets=self.targets, dTheta=ahead)
            (self.beta * penalty).backward()
            drift = penalty.item()
        self.theta_optimizer.step()
        self.embedding_optimizer.step()
        return loss.item(), drift
