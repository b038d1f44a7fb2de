"""How products of float32 tiles are taken: by torch's own switch, and never below float32 where that is off."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def dot_precision() -> str:
    """``input_precision`` of ``tl.dot`` for float32: "tf32" where torch allows it, else "tf32x3", as exact as float32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def factor_precision() -> str:
    """``dot_precision``, or "bf16" at torch's "medium": for ``dot``. The interpreter has no bfloat16 products."""
    precision = dot_precision()
    if precision == "tf32x3" or triton.knobs.runtime.interpret:
        return precision
    try:
        return "bf16" if torch.get_float32_matmul_precision() == "medium" else precision
    except RuntimeError:  # set through torch.backends.*.fp32_precision, which has no such level, and not to be asked then
        return precision


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, in the dtype of acc; at "bf16" of factors rounded to bfloat16."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:  # compiled in the other's stead
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
