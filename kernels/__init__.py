"""Triton kernels: ops of ``fasthyper.ops`` on NVIDIA GPUs, and under ``TRITON_INTERPRET=1`` on the CPU.

They import torch and triton only. Each function has the name, the arguments and the results of its namesake in
``reference.py``, the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fasthyper.kernels import adam

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "adam_delta_fwd": adam.adam_delta_fwd,
    "adam_ahead": adam.adam_ahead,
    "adam_step_": adam.adam_step_,
}
