"""Every Triton kernel compiles for the GPUs that are supported, in a process of its own, where none is interpreted."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {80: 166_912, 90: 232_448}  # that a program may have
SPILLED_BYTES = 64  # of a thread, more than which nothing here needs


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
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
