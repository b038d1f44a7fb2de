"""Every Triton kernel compiles for the GPUs that are supported, in a process of its own, where none is interpreted."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SHARED_BYTES = {80: 166_912, 90: 232_448}  # that a program may have
SPILLED_BYTES = 64  # of a thread, more than which nothing here needs
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("arch", SHARED_BYTES, ids="sm_{}".format)
def test_kernels_compile_and_fit(arch):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FASTHYPER_BACKEND")}
    run = subprocess.run([sys.executable, script, str(arch)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert compiled
    for kernel in compiled:
        assert kernel["shared"] <= SHARED_BYTES[arch] and kernel["stack"] <= SPILLED_BYTES, kernel


def test_products_follow_torchs_switch():
    from fasthyper.kernels.precision import dot_precision, factor_precision

    before = torch.get_float32_matmul_precision()
    try:
        for level, wanted in {"highest": "tf32x3", "high": "tf32", "medium": "tf32"}.items():
            torch.set_float32_matmul_precision(level)
            assert dot_precision() == wanted
            is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
            assert factor_precision() == ("bf16" if level == "medium" and not is_interpreted else wanted)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # the newer switch, beside which torch refuses to read the older
        assert dot_precision() == factor_precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision(before)
