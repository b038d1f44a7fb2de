"""Puts the fast functions in the place of hypnettorch's, so that code written for it runs them unchanged."""

from __future__ import annotations

import importlib
import sys
from contextlib import ExitStack
from types import FunctionType, ModuleType
from typing import Any

from fasthyper.compat.hypnettorch import forward
from fasthyper.errors import FasthyperError

MODULES = ("hnet_regularizer", "optim_step")  # of hypnettorch.utils, and here
_active: list[ExitStack] = []


def accelerate() -> ExitStack:
    """From now on code that calls hypnettorch runs fasthyper's functions; ``close()``, or the end of a ``with``, undoes it.

    Those of ``hypnettorch.utils.hnet_regularizer`` and ``hypnettorch.utils.optim_step``, also where a module has imported
    them by name before, and the ``forward`` of ``HMLP`` and ``ChunkedHMLP``. Calling it again meanwhile changes nothing.

    Raises:
        FasthyperError: hypnettorch is not installed.
    """
    undo = ExitStack()
    if _active:
        return undo
    hnets, *theirs = map(_import, ("hypnettorch.hnets", *(f"hypnettorch.utils.{name}" for name in MODULES)))
    faster_functions = {}
    for name, module in zip(MODULES, theirs, strict=True):
        ours = importlib.import_module(f"fasthyper.compat.hypnettorch.{name}")
        for function, original in vars(module).items():
            if isinstance(original, FunctionType) and original.__module__ == module.__name__ and hasattr(ours, function):
                faster_functions[original] = getattr(ours, function)
    _replace_everywhere(undo, faster_functions)
    interface = hnets.HyperNetInterface
    for name in ("unconditional_params", "conditional_params", "conditional_param_shapes_ref"):
        faster = property(getattr(forward, name), doc=getattr(interface, name).__doc__)
        _replace(undo, interface, name, faster)
    _replace(undo, hnets.HMLP, "forward", forward.fast_hmlp(hnets.HMLP.forward))
    _replace(undo, hnets.ChunkedHMLP, "forward", forward.fast_chunked_hmlp(hnets.ChunkedHMLP.forward))
    _active.append(undo)
    undo.callback(_active.clear)
    return undo


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FasthyperError(f"hypnettorch cannot be imported ({error}): pip install 'fasthyper[bench]'") from error


def _replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, vars(owner)[name])
    setattr(owner, name, value)


def _replace_everywhere(undo: ExitStack, values: dict[FunctionType, Any]) -> None:
    """Wherever a module holds one under any name."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and not module.__name__.startswith("fasthyper."):
            for name, held in list(vars(module).items()):
                if type(held) is FunctionType and held in values:
                    _replace(undo, module, name, values[held])
