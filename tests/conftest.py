"""Tolerances with their reasons, NaN-filled scratch memory, and the implementations that every op test goes through."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import hypothesis
import pytest
import torch

from fasthyper import ops, reference

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS warns of what is set below

# the same examples each time; --hypothesis-profile=long draws new ones
PROFILE = hypothesis.settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
hypothesis.settings.register_profile("fasthyper", PROFILE)
hypothesis.settings.register_profile("long", PROFILE, derandomize=False, max_examples=500)
hypothesis.settings.load_profile("fasthyper")

# Relative error against the float64 oracle, norm over norm.
TOL = {
    ("drift", torch.float64): 1e-10,  # the project's bound; 1e-13 is reached
    ("drift", torch.float32): 2e-5,  # a difference of float32 products at a step of a tenth
    ("drift, high", torch.float32): 1e-5,  # two bfloat16 parts of each factor, 16 bits; 5e-6 is reached in random states
    ("drift, medium", torch.float32): 1e-2,  # one part, 8 bits; 3e-3 is reached in random states
    ("generate", torch.float64): 1e-12,
    ("generate", torch.float32): 1e-6,
    ("hyper_linear", torch.float64): 1e-12,
    ("hyper_linear", torch.float32): 1e-6,
    ("adam_delta", torch.float64): 1e-12,
    ("adam_delta", torch.float32): 1e-5,  # moments cancel
}


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Uninitialised memory holds NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _registered(name):
    return getattr(torch.ops.fasthyper, f"_{name}").default


IMPLEMENTATIONS = {
    "reference": SimpleNamespace(**{name: getattr(reference, name) for name in ops.OPS}),
    "bound": SimpleNamespace(**{name: _registered(name) for name in ops.OPS}),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """The plain reference, and whatever is bound for the CPU (C++ where it is built); same names, same signatures."""
    return IMPLEMENTATIONS[request.param]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["f64", "f32"])
def dtype(request):
    return request.param


@pytest.fixture
def foreground():
    """Ctrl-C interrupts, as at a terminal; in a background job it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
