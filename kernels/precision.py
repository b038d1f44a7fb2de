"""The precision of float32 products."""

from __future__ import annotations

import torch


def dot_precision() -> str:
    """``input_precision`` of ``tl.dot``: "tf32" where torch's switch allows it, else "tf32x3", as exact as float32."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
