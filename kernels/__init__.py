"""Triton kernels: ops of ``fasthyper.ops`` on NVIDIA GPUs, and under ``TRITON_INTERPRET=1`` on the CPU.

They import torch and triton only. Each function has the name, the arguments and the results of its namesake in
``reference.py``, the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fasthyper.kernels.adam import adam_ahead, adam_delta_fwd, adam_step_
from fasthyper.kernels.direct import target_drift_fwd
from fasthyper.kernels.generate import generate_bwd, generate_fwd
from fasthyper.kernels.hyper_linear import hyper_linear_bwd, hyper_linear_fwd
from fasthyper.kernels.hypernet_drift import hypernet_drift_fwd
from fasthyper.kernels.output_drift import output_drift_fwd

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "adam_ahead": adam_ahead,
    "adam_delta_fwd": adam_delta_fwd,
    "adam_step_": adam_step_,
    "generate_bwd": generate_bwd,
    "generate_fwd": generate_fwd,
    "hyper_linear_bwd": hyper_linear_bwd,
    "hyper_linear_fwd": hyper_linear_fwd,
    "hypernet_drift_fwd": hypernet_drift_fwd,
    "output_drift_fwd": output_drift_fwd,
    "target_drift_fwd": target_drift_fwd,
}
FLOAT32_ONLY = ("hypernet_drift_fwd", "output_drift_fwd", "target_drift_fwd")
