"""Which parameters of a module are generated: a small grammar of patterns."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn


def choose(module: nn.Module, patterns: str | Sequence[str]) -> frozenset[str]:
    """The names, of ``module.named_parameters()``, that the patterns choose.

    A pattern is a shell glob of parameter names, ``"layer4.*"``, or, after ``@``, of the classes of the layer that holds the
    parameter, ``"@*Norm*"`` (its base classes count). ``!`` before it takes out what it matches. Patterns are read in order
    and the last one that matches a parameter decides; if the first takes out, all parameters are in before. A parameter of
    several names is matched by any of them.

    Raises:
        ValueError: no pattern, one that matches no parameter, or none chosen.
    """
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    keys = _keys(module)
    if not listed or not all(isinstance(pattern, str) and pattern.removeprefix("!") for pattern in listed):
        raise ValueError(f"generate must be a pattern or patterns of parameter names, got {patterns!r}")
    chosen = set(keys) if listed[0].startswith("!") else set()
    for pattern in listed:
        glob = pattern.removeprefix("!")
        matched = {name for name, own in keys.items() if any(fnmatchcase(key, glob) for key in own)}
        if not matched:
            known = ", ".join(list(keys)[:8]) + (", ..." if len(keys) > 8 else "")
            raise ValueError(f"generate={pattern!r} matches no parameter of the target {type(module).__name__}: {known}")
        chosen = chosen - matched if pattern.startswith("!") else chosen | matched
    if not chosen:
        raise ValueError(f"generate={patterns!r} leaves no parameter of the target {type(module).__name__} to generate")
    return frozenset(chosen)


def _keys(module: nn.Module) -> dict[str, list[str]]:
    """Of each parameter, all that a glob may match: its names, and ``@`` and the classes of the layers that hold it."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    keys: dict[str, list[str]] = {name: [] for name in first.values()}
    for layer_name, layer in module.named_modules(remove_duplicate=False):
        classes = [f"@{base.__name__}" for base in type(layer).__mro__ if base not in (nn.Module, object)]
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            keys[first[id(parameter)]] += [f"{layer_name}.{name}".removeprefix("."), *classes]
    return keys
