"""hypnettorch 0.0.4 set up to compute what fasthyper computes: the same parameters, the same step of the paper's code."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import fasthyper as fh


def peer_of(hnet: fh.ChunkedHypernet):
    """Its network and hypernetwork, holding the parameters of ``hnet``, whose target is an ``fh.nets.MLP``.

    Its first layer takes [chunk embedding, task embedding], ours the other way round; its output layer is our basis.
    """
    from hypnettorch.hnets import ChunkedHMLP
    from hypnettorch.mnets import MLP

    config, target = hnet.config, hnet.target.module.config
    mnet = MLP(target["num_inputs"], target["num_outputs"], target["hidden"], no_weights=True, verbose=False)
    peer = ChunkedHMLP(
        mnet.param_shapes,
        config["chunk_size"],
        chunk_emb_size=config["chunk_dim"],
        cond_in_size=config["task_dim"],
        layers=config["hidden"],
        activation_fn={"elu": torch.nn.ELU(), "relu": torch.nn.ReLU()}[config["activation"]],
        num_cond_embs=hnet.num_tasks,
        verbose=False,
    ).to(hnet.basis.dtype)
    values = [*(e.detach() for e in hnet.task_embeddings), *in_its_order(hnet, [p.detach() for p in hnet.theta])]
    assert [list(p.shape) for p in values] == [list(p.shape) for p in peer.internal_params]
    for theirs, value in zip(peer.internal_params, values, strict=True):
        theirs.data = value.clone()
    return mnet, peer


def in_its_order(hnet: fh.ChunkedHypernet, theta: list[Tensor]) -> list[Tensor]:
    """Tensors shaped like our theta as its ``unconditional_params``."""
    chunk_embeddings, first, *layers, basis = theta
    task_dim = hnet.config["task_dim"]
    first = torch.cat([first[:, task_dim:], first[:, :task_dim]], 1)
    return [first, *layers, basis[:, :-1].contiguous(), basis[:, -1].contiguous(), chunk_embeddings]


class PeerTrainer:
    """The task-incremental loop of the paper's code over its parts, look-ahead on, targets stored."""

    def __init__(self, hnet: fh.ChunkedHypernet, *, lr: float, beta: float, eps: float = 1e-8):
        self.mnet, self.peer = peer_of(hnet)
        self.settings = {"lr": lr, "eps": eps}
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
