"""torchvision, also where its wheel was built for CUDA and torch was not."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_stand_ins: list[torch.library.Library] = []  # must stay alive


def torchvision() -> ModuleType:
    """The ``torchvision`` package: models, data sets and transforms, and its own ops where they were built for this torch.

    A wheel built for CUDA cannot load its library beside a torch for the CPU, and its import then fails on a missing op:
    such ops get a schema without an implementation, and the import is tried once more.

    Raises:
        ImportError: it is not installed.  RuntimeError: it cannot be imported for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise ImportError("torchvision is not installed: pip install 'fasthyper[vision]'") from error
    except RuntimeError as error:
        if _stand_ins or "operator torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    _stand_ins.append(library)
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    return importlib.import_module("torchvision")


def trouble() -> str:
    """What is wrong with the ``torchvision`` that is installed, in a line; empty where nothing is."""
    try:
        torchvision()
    except (ImportError, RuntimeError) as error:
        return str(error).partition("\n")[0]
    return "built for another torch: import it by fasthyper.vision.torchvision()" if _stand_ins else ""
