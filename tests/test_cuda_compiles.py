"""Every CUDA source compiles for all architectures that are served, without spills, and needs only C functions of torch."""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SPILLED: dict[str, int] = {}  # kernel -> bytes that it may spill, stores and loads together; others none

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="nvcc is absent: no CUDA source was compiled")]


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_cuda_source_compiles_without_spills(source, architecture, tmp_path):
    flags = [*COMMON_NVCC_FLAGS, *runpy.run_path(str(ROOT / "setup.py"))["NVCC"], "-Xcompiler=-fPIC", "-Werror=all-warnings"]
    flags += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v"]
    includes = [part for path in include_paths() for part in ("-isystem", path)]
    said = run(NVCC, "-c", source, "-o", tmp_path / "object", *flags, *includes)
    found = re.findall(r"Function properties for (\S+)\s+.* (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert found, said
    for mangled, stored, loaded in found:
        kernel = re.search(r"::(\w+)[<(]", run("c++filt", mangled))
        assert kernel, mangled
        spilled = int(stored) + int(loaded)
        assert spilled <= SPILLED.get(kernel[1], 0), f"{kernel[1]} spills {spilled} bytes on sm_{architecture}: {mangled}"
    undefined = run("nm", "-uC", tmp_path / "object")
    assert not re.search(r"\b(at|c10|torch)::", undefined), undefined
