"""torchvision, also where a wheel linked against CUDA sits beside a CPU-only torch and ``import torchvision`` fails."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

_kept: list[Any] = []  # operators live as long as their library


def import_torchvision() -> ModuleType:
    """Imports torchvision. Where its compiled operators do not load, declares those that its Python code registers for: data
    sets, transforms and models work, calling the operators (``nms``) raises.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    _kept.append(library)
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")
