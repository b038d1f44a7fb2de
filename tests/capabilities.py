"""Prints the values of ATEN_CPU_CAPABILITY under which this machine multiplies float32 otherwise than without it."""

import torch

import fasthyper

VALUES = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}  # torch does not ask the machine again
SERVES = {"avx512": "AVX-512 products", "avx2": "AVX2 products"}

bound = fasthyper.backends()["cpu"]
values = VALUES.get(torch.backends.cpu.get_cpu_capability(), ())
print(*(value for value in values if SERVES.get(value, "other") not in bound))
