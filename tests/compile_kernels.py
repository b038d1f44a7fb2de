"""Compiles, without a GPU, the Triton kernels that calls of ops would launch: ``compile_kernels.py ARCH``.

Tensors are on the meta device, so kernels get the shapes, blocks and options that they have on a GPU. Prints one JSON line
for each of them.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fasthyper import kernels


def hyper_linear(batch, num_inputs, rows, width, num_outputs, factorised):
    x, grad = torch.empty(batch, num_inputs), torch.empty(batch, num_outputs)
    h, basis = torch.empty(-(-num_outputs // rows), width), torch.empty(rows * num_inputs, width + 1)
    u = torch.empty(batch if factorised else 0, rows, width + 1)
    kernels.IMPLEMENTATIONS["hyper_linear_fwd"](x, h, basis, rows, num_outputs, factorised)
    kernels.IMPLEMENTATIONS["hyper_linear_bwd"](grad, x, h, basis, u, rows, factorised, True)


def hypernet_drift(tasks, chunks, chunk_size, task_dim, chunk_dim, hidden, activation, with_pre0, form):
    if torch.get_default_dtype() != torch.float32:
        return  # float64 goes by the reference
    widths = task_dim + chunk_dim, *hidden
    layers = [t for i, o in pairwise(widths) for t in (torch.empty(o, i), torch.empty(o))]
    theta = [torch.empty(chunks, chunk_dim), *layers, torch.empty(chunk_size, widths[-1] + 1)]
    pre0 = [torch.empty(tasks, chunks, o) for o in hidden[1:]] if with_pre0 else []
    gram0 = torch.empty(1 if with_pre0 else 0, widths[-1] + 1, widths[-1] + 1, dtype=torch.float64)
    plan = torch.tensor([[0, -1, 0, chunks, 0, chunk_size, form]], device="cpu")
    e = torch.empty(tasks, task_dim)
    kernels.IMPLEMENTATIONS["hypernet_drift_fwd"](theta, theta, e, e, pre0, gram0, torch.empty(tasks), plan, activation)
    h = torch.empty(tasks, chunks, widths[-1])
    kernels.IMPLEMENTATIONS["output_drift_fwd"](h, theta[-1], h, theta[-1], torch.empty(tasks), plan)


def generate(chunks, chunk_size, width, num_weights):
    if torch.get_default_dtype() == torch.float32:
        h, basis = torch.empty(chunks, width), torch.empty(chunk_size, width + 1)
        kernels.IMPLEMENTATIONS["generate_fwd"](h, basis, num_weights)
        kernels.IMPLEMENTATIONS["generate_bwd"]([torch.empty(num_weights)], h, basis)


CALLS = {  # name: calls of ops in the default dtype
    "hyper_linear p10": lambda: hyper_linear(128, 1024, 76, 25, 1000, False),
    "hyper_linear p100": lambda: hyper_linear(128, 1000, 7, 350, 1000, True),
    "hyper_linear small": lambda: hyper_linear(128, 100, 20, 50, 100, False),
    "hyper_linear large": lambda: hyper_linear(128, 4096, 16, 350, 4096, False),
    "hyper_linear one, generated": lambda: hyper_linear(1, 1, 1, 1, 1, False),
    "generate p100": lambda: generate(272, 7500, 350, 2_036_010),
    "generate one": lambda: generate(1, 1, 1, 1),
    "hypernet_drift p100": lambda: hypernet_drift(99, 272, 7500, 128, 12, (200, 250, 350), 0, True, 0),
    "hypernet_drift p10, streamed": lambda: hypernet_drift(9, 27, 78000, 24, 8, (25, 25), 1, False, 0),
    "hypernet_drift, one of everything": lambda: hypernet_drift(1, 1, 1, 1, 1, (1, 1), 0, True, 0),
    "hypernet_drift, one of everything, streamed, direct": lambda: hypernet_drift(1, 1, 1, 1, 1, (1, 1), 0, False, 1),
    "hyper_linear one, factorised": lambda: hyper_linear(1, 1, 1, 1, 1, True),
}
SETTINGS = {  # dtype, torch's precision of float32 products
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bfloat16 factors": (torch.float32, "medium"),
    "float64": (torch.float64, "highest"),
}


class Device:
    """What a launch asks of a GPU's driver before it compiles."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def resources(cubin):
    """Registers of a thread, and bytes of its stack, where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        found = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", found)[1]) for name in ("REG", "STACK"))


def main(arch):
    driver.set_active(Device(arch))
    torch.set_default_device("meta")
    launch, compiled = JITFunction.run, {}

    def compile_only(self, *args, warmup, **options):
        kernel = launch(self, *args, warmup=True, **options)
        compiled[kernel.hash] = self.__name__, kernel

    JITFunction.run = compile_only
    for setting, (dtype, precision) in SETTINGS.items():
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        for call, run in CALLS.items():
            run()
            for name, kernel in compiled.values():
                registers, stack = resources(kernel.asm["cubin"])
                numbers = {"registers": registers, "stack": stack, "shared": kernel.metadata.shared}
                print(json.dumps({"call": call, "setting": setting, "kernel": name, **numbers}), flush=True)
            compiled.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]))
