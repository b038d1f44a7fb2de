"""Target networks, and how a checkpoint names them: a class of this package and its JSON-ready ``config``."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from fasthyper.nets.lenet import LeNet
from fasthyper.nets.mlp import MLP
from fasthyper.nets.resnet import ResNet, resnet20, resnet32, resnet56
from fasthyper.nets.vae import VAE
from fasthyper.nets.wrn import WRN, wrn_28_10
from fasthyper.nets.zenkenet import ZenkeNet

__all__ = [
    "MLP",
    "VAE",
    "WRN",
    "LeNet",
    "ResNet",
    "ZenkeNet",
    "build",
    "describe",
    "resnet20",
    "resnet32",
    "resnet56",
    "wrn_28_10",
    "xavier_",
]

_Net = TypeVar("_Net", bound=nn.Module)
_CLASSES: dict[str, type[nn.Module]] = {net.__name__: net for net in (MLP, VAE, LeNet, ZenkeNet, ResNet, WRN)}


@torch.no_grad()
def xavier_(net: _Net, seed: int) -> _Net:
    """Draws a network's parameters anew, from ``seed`` alone: Xavier-uniform weights, biases 0; returns the network."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter, generator=generator)
        else:
            parameter.zero_()
    return net


def describe(module: nn.Module) -> dict[str, Any]:
    """What ``build`` needs; for a module of another package only its name, for the error message."""
    name = type(module).__name__
    return {"class": name, "config": module.config if type(module) is _CLASSES.get(name) else None}


def build(description: dict[str, Any]) -> nn.Module:
    """The network that ``describe`` described, with fresh weights.

    Raises:
        ValueError: it is not a network of this package.
    """
    if description["config"] is None:
        raise ValueError(f"the target {description['class']} is not one of fasthyper.nets: pass it as target=")
    return _CLASSES[description["class"]](**description["config"])
