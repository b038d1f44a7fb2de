"""Which implementation serves which device: bound once, at import. The only file that knows that backends exist."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fasthyper import ops, reference

CHOICES = ("auto", "reference", "cpp", "triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run on the CPU, for tests
SMALL_TRUNK_MACS = 130_000_000  # of all rows, beyond the first layer; with more, tensor cores win (gpu_first.json)
_bound: dict[str, str] = {}


def backends() -> dict[str, str]:
    """Device type -> the implementation that serves it and, where it is a fallback, why."""
    return dict(_bound)


def _bind(choice: str) -> None:
    if choice not in CHOICES:
        raise ImportError(f"FASTHYPER_BACKEND={choice!r} is not known; set it to one of {', '.join(CHOICES)}")
    for op in ops.OPS:
        ops.LIBRARY.impl(f"_{op}", _plain(getattr(reference, op)), "CompositeExplicitAutograd")
    _bound["cpu"] = _bind_cpu(choice)
    _bound["cuda"] = _bind_cuda(choice)


def _plain(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` without a graph, and in the dtypes that it is given also where the caller has autocast on."""

    @functools.wraps(op)
    def run(*args: Any) -> Any:
        flat = (t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]))
        device = next((t.device.type for t in flat if isinstance(t, torch.Tensor)), "cpu")
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return op(*args)

    return run


def _bind_cpu(choice: str) -> str:
    if choice == "reference":
        return "reference (FASTHYPER_BACKEND=reference)"
    if choice == "triton":
        if INTERPRETED:
            _bind_triton("CPU")
            return "triton (interpreted)"
        return "reference (FASTHYPER_BACKEND=triton)"
    if importlib.util.find_spec("fasthyper._C") is None:
        if choice == "cpp":
            raise ImportError(
                "FASTHYPER_BACKEND=cpp, but the C++ extension is not built: "
                "FASTHYPER_BUILD=cpu pip install --no-build-isolation -e ."
            )
        return "reference (the C++ extension is not built: pip install --no-build-isolation -e .)"
    try:
        importlib.import_module("fasthyper._C")  # its static initialisers register the key CPU
    except (ImportError, OSError) as error:
        if choice == "cpp":
            raise ImportError(f"FASTHYPER_BACKEND=cpp, but the C++ extension does not load: {error}") from error
        warnings.warn(
            f"fasthyper's C++ extension does not load ({error}); running the slow reference. "
            "Rebuild it: pip install --no-build-isolation -e .",
            stacklevel=2,
        )
        return f"reference (the C++ extension does not load: {error})"
    # csrc/cpu/output_drift.cpp; elsewhere torch does
    multiplies = {3: " (bfloat16 tile units)", 4: " (AVX-512 products)", 5: " (AVX2 products)"}
    return "cpp" + multiplies.get(ops._packed_parts(torch.empty(0)), "")


def _bind_cuda(choice: str) -> str:
    if choice == "reference":
        return "reference (FASTHYPER_BACKEND=reference)"
    has_triton = importlib.util.find_spec("triton") is not None
    if choice == "triton" and not (has_triton and (INTERPRETED or torch.cuda.is_available())):
        lacking = "a CUDA device, or TRITON_INTERPRET=1" if has_triton else "Triton: pip install triton"
        raise ImportError(f"FASTHYPER_BACKEND=triton needs {lacking}")
    if not torch.cuda.is_available():
        return "none (no CUDA device)"
    ours = (*ops.OPS, "small_hypernet_drift_fwd")  # of these, what the C++ extension has, where it was imported
    compiled = [op for op in ours if _has_kernel(op, "CUDA")]
    others = f", CUDA C++ for {', '.join(compiled)}" if compiled else ""
    if choice == "cpp":
        return f"reference (FASTHYPER_BACKEND=cpp){others}"
    if not has_triton:
        return f"reference (Triton is not installed){others}"
    _bind_triton("CUDA")
    return f"triton{others}"


def _has_kernel(op: str, key: str) -> bool:
    name = f"fasthyper::_{op}"  # the extension's own ops are not there without it
    return hasattr(torch.ops.fasthyper, f"_{op}") and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _bind_triton(key: str) -> None:
    """Triton's kernels where the C++ extension, if it was imported, has registered none."""
    kernels = importlib.import_module("fasthyper.kernels")
    for op, run in kernels.IMPLEMENTATIONS.items():
        if not _has_kernel(op, key):
            if op in kernels.FLOAT32_ONLY:
                run = _in_float32(run, getattr(reference, op))
            if op.startswith("generate"):
                run = _where_wide(run, getattr(reference, op))
            if op == "hypernet_drift_fwd" and _has_kernel(f"small_{op}", key):
                run = _where_it_fits(torch.ops.fasthyper._small_hypernet_drift_fwd, run)
            ops.LIBRARY.impl(f"_{op}", _plain(run), key)


def _in_float32(run: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, but ``otherwise`` in float64, which nobody trains in."""

    def pick(*args: Any) -> Any:
        flat = (t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]))
        first = next(t for t in flat if isinstance(t, torch.Tensor))
        return (otherwise if first.dtype == torch.float64 else run)(*args)

    return pick


def _where_wide(run: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """Generation from wide features, in float32; else ``otherwise``."""
    is_wide = importlib.import_module("fasthyper.kernels.generate").is_wide

    def pick(*args: Any) -> Any:
        matrices = [a for a in args if isinstance(a, torch.Tensor)]  # features and basis
        return (run if is_wide(*matrices) else otherwise)(*args)

    return pick


def _where_it_fits(small: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The drift behind a trunk whose weights fit a multiprocessor's memory, in C++; behind others, ``otherwise``."""
    fits = torch.ops.fasthyper._small_hypernet_drift_fits

    def pick(*args: Any) -> Any:
        theta, embeddings, plan = args[0], args[2], args[7]
        macs = len(embeddings) * len(theta[0]) * sum(weight.numel() for weight in theta[3:-1:2])
        is_small = macs < SMALL_TRUNK_MACS and fits(theta, plan, len(embeddings))
        return (small if is_small else otherwise)(*args)

    return pick


_bind(os.environ.get("FASTHYPER_BACKEND", "auto"))
