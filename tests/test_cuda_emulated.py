"""The CUDA kernels of the drift behind a small trunk, compiled for the CPU, where threads take turns at barriers."""

import ctypes
import pathlib
import shutil
import subprocess
from types import SimpleNamespace

import oracle
import pytest
import torch
from conftest import TOL
from test_hypernet_drift import SHAPES, all_activations, arguments, oracle_value_and_grads, raw_arguments

from fasthyper import reference
from fasthyper.activations import ACTIVATIONS

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED_MEMORY = 232448  # of a block on sm_90
FITTING = {name: shape for name, shape in SHAPES.items() if all(shape[5]) and shape[5]}
WIDER = {
    "odd-widths": (3, 40 * 30 - 7, 40, 5, 3, (27, 33, 18)),
    "rows-of-many-tiles": (5, 700 * 11 - 3, 700, 4, 2, (12, 25)),
    "wide": (2, 90 * 20 - 3, 90, 64, 12, (100, 75, 50)),
    "widest": (2, 70 * 5 - 3, 70, 3, 2, (128,)),
}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The ops, and ``emulate(processors, shared_memory, is_reversed)``."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    torch_dir = pathlib.Path(torch.__file__).parent
    flags = ["-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-DFASTHYPER_EMULATED"]
    stable_abi = "-DTORCH_TARGET_VERSION=0x020b000000000000"
    includes = [f"-I{torch_dir / 'include'}", f"-I{ROOT / 'tests'}"]
    source, torch_lib = str(ROOT / "csrc/cuda/hypernet_drift.cu"), torch_dir / "lib"
    libraries = [f"-L{torch_lib}", "-ltorch", "-ltorch_cpu", f"-Wl,-rpath,{torch_lib}"]
    command = [compiler, *flags, stable_abi, *includes, source, "-o", str(library), *libraries]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    torch.ops.load_library(library)
    ops = torch.ops.fasthyper_emulated
    return SimpleNamespace(
        fwd=ops._small_hypernet_drift_fwd, fits=ops._small_hypernet_drift_fits, emulate=ctypes.CDLL(str(library)).emulate
    )


@pytest.fixture(autouse=True)
def usual_device(emulated):
    emulated.emulate(3, SHARED_MEMORY, False)


def with_weight(args):
    num_tasks, width = args["embeddings"].shape[0], args["theta"][-1].shape[1]
    weight = torch.linspace(0.5, 2, num_tasks, dtype=args["embeddings"].dtype)
    return raw_arguments(args, weight, torch.empty(0, width, width, dtype=torch.float64))


def flat(result):
    value, grad_embeddings, grad_theta = result
    return [value, grad_embeddings, *grad_theta]


def assert_close(have, want, dtype):
    for a, b in zip(flat(have), flat(want), strict=True):
        assert a.shape == b.shape and a.dtype == dtype and oracle.relative_error(a, b) < TOL["drift", dtype]


@pytest.mark.parametrize("shape", (FITTING | WIDER).values(), ids=FITTING | WIDER)
@all_activations
@pytest.mark.parametrize("given", [False, True], ids=["", "pre0"])
def test_emulated_drift_forward_backward(emulated, shape, activation, given, dtype):
    args = arguments(shape, activation, dtype, form="gram")
    if not given:
        args["pre0"] = []
    raw = with_weight(args)
    emulated.emulate(3, 2 * SHARED_MEMORY, False)  # in float64 wide layers need more than there is
    assert emulated.fits(args["theta"], args["plan"], shape[0])
    value, grad_embeddings, grad_theta = emulated.fwd(*raw)
    want_value, want_grads = oracle_value_and_grads(shape, activation, args, raw[6])
    assert value.dtype == dtype and value >= 0
    assert oracle.relative_error(value, want_value) < TOL["drift", dtype]
    for have, want in zip([*grad_theta, grad_embeddings], want_grads, strict=True):
        assert have.shape == want.shape and oracle.relative_error(have, want) < TOL["drift", dtype]


@pytest.mark.parametrize("stored", [0, 1, 2])
def test_emulated_drift_makes_again_what_is_not_stored(emulated, stored, dtype):
    shape = (3, 83, 20, 3, 2, (6, 9, 4))
    args = arguments(shape, ACTIVATIONS["elu"], dtype, form="gram")
    args["pre0"] = args["pre0"][2 - stored :]
    raw = with_weight(args)
    emulated.emulate(3, 2 * SHARED_MEMORY, False)
    assert emulated.fits(args["theta"], args["plan"], shape[0])
    want_value, want_grads = oracle_value_and_grads(shape, ACTIVATIONS["elu"], args, raw[6])
    value, grad_embeddings, grad_theta = emulated.fwd(*raw)
    for have, want in zip([value, *grad_theta, grad_embeddings], [want_value, *want_grads], strict=True):
        assert oracle.relative_error(have, want) < TOL["drift", dtype]


@all_activations
@pytest.mark.parametrize("step", [1, 1e-2, 1e-4, 1e-6])
def test_emulated_drift_keeps_its_digits_at_small_steps(emulated, activation, step):
    shape = SHAPES["two-layers"]
    args = arguments(shape, activation, torch.float32, step, "gram")
    raw = with_weight(args)
    want_value, want_grads = oracle_value_and_grads(shape, activation, args, raw[6])
    value, grad_embeddings, grad_theta = emulated.fwd(*raw)
    for have, want in zip([value, *grad_theta, grad_embeddings], [want_value, *want_grads], strict=True):
        assert oracle.relative_error(have, want) < 3e-6


# of 5 chunks and 6 columns; a task_hi of 3 is all of them
PLANS = {
    "gaps": [(0, -1, 1, 2, 1, 3), (0, -1, 3, 4, 4, 5)],
    "same-chunks": [(0, -1, 0, 3, 0, 2), (0, 3, 0, 3, 2, 6), (0, -1, 3, 5, 1, 4)],
    "overlap": [(0, -1, 0, 4, 0, 4), (0, -1, 2, 5, 1, 6), (0, -1, 0, 5, 0, 6)],
    "without-cells": [(0, -1, 2, 2, 0, 6), (0, -1, 0, 5, 3, 3)],
    "nothing": [],
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("processors", [1, 100])
def test_emulated_drift_of_plans(emulated, plan, processors, dtype):
    args = arguments(SHAPES["two-layers"], ACTIVATIONS["elu"], dtype)
    args["plan"] = torch.tensor([[*row, 0] for row in plan], dtype=torch.int64).reshape(-1, 7)
    raw = with_weight(args)
    emulated.emulate(processors, SHARED_MEMORY, False)
    assert emulated.fits(args["theta"], args["plan"], 3)
    assert_close(emulated.fwd(*raw), reference.hypernet_drift_fwd(*raw), dtype)


@pytest.mark.parametrize("shape", [WIDER["odd-widths"], WIDER["wide"], SHAPES["tiles"]], ids=["odd-widths", "wide", "tiles"])
@pytest.mark.parametrize("processors", [1, 7, 1000])
@pytest.mark.parametrize("shared_memory", [SHARED_MEMORY, 166912, 150000])
def test_emulated_drift_repeats_on_devices_of_all_sizes(emulated, shape, processors, shared_memory):
    """In either order of threads, bit for bit: no barrier is missing."""
    args = arguments(shape, ACTIVATIONS["elu"], torch.float32, form="gram")
    args["pre0"] = []
    raw = with_weight(args)
    emulated.emulate(processors, shared_memory, False)
    assert emulated.fits(args["theta"], args["plan"], shape[0])
    first = emulated.fwd(*raw)
    emulated.emulate(processors, shared_memory, True)
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(emulated.fwd(*raw)), strict=True))
    want_value, want_grads = oracle_value_and_grads(shape, ACTIVATIONS["elu"], args, raw[6])
    assert_close(first, (want_value, want_grads[-1], want_grads[:-1]), torch.float32)


def test_emulated_drift_strides(emulated):
    args = arguments(SHAPES["two-layers"], ACTIVATIONS["silu"], form="gram")
    plain = emulated.fwd(*with_weight(args))
    for key in ("theta", "theta0", "pre0"):
        args[key] = [torch.stack([t, t], -1)[..., 1] for t in args[key]]
    args["embeddings"] = args["embeddings"].T.contiguous().T
    assert all(torch.equal(a, b) for a, b in zip(flat(emulated.fwd(*with_weight(args))), flat(plain), strict=True))


def test_what_fits(emulated):
    def fits(shape, dtype=torch.float32, shared_memory=SHARED_MEMORY, **changed):
        emulated.emulate(132, shared_memory, False)
        args = arguments(shape, ACTIVATIONS["elu"], dtype, form="gram")
        return emulated.fits(args["theta"], changed.get("plan", args["plan"]), shape[0])

    def plan(*rows):
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 7)

    two, small = SHAPES["two-layers"], (2, 57 * 40 - 3, 40, 64, 12, (100, 75, 50))
    assert fits(two) and fits(two, torch.float64) and fits(small) and fits(small, shared_memory=166912)
    assert not fits(small, torch.float64)
    assert not fits(SHAPES["linear"]) and not fits(SHAPES["no-width"])
    assert fits((2, 25, 6, 3, 2, (128,))) and not fits((2, 25, 6, 3, 2, (129,)))
    assert not fits(two, torch.bfloat16)
    assert fits(two, plan=plan((0, 3, 0, 4, 0, 6, 0))) and not fits(two, plan=plan((0, -1, 0, 4, 0, 6, 1)))
    assert not fits(two, plan=plan((0, 2, 0, 4, 0, 6, 0))) and not fits(two, plan=plan((1, -1, 0, 4, 0, 6, 0)))


def test_emulated_drift_names_what_is_wrong(emulated):
    args = arguments(SHAPES["two-layers"], ACTIVATIONS["elu"])
    for row, message in (
        ((0, -1, 0, 9, 0, 6, 0), r"chunks \[0, 9\), which leaves the grid \[0, 5\)"),
        ((0, 1, 0, 4, 0, 6, 0), "do not fit"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulated.fwd(*with_weight({**args, "plan": torch.tensor([row])}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, id=f"{name}-{dtype}")
        for name, shape in (FITTING | WIDER).items()
        for dtype in (torch.float32, torch.float64)
        if name != "wide" or dtype == torch.float32
    ],
)
@all_activations
@pytest.mark.parametrize("given", [False, True], ids=["", "pre0"])
def test_small_drift_on_a_gpu(shape, activation, given, dtype):
    args = arguments(shape, activation, dtype, form="gram")
    if not given:
        args["pre0"] = []
    raw = with_weight(args)
    want_value, want_grads = oracle_value_and_grads(shape, activation, args, raw[6])
    on_gpu = [[t.cuda() for t in a] if isinstance(a, list) else a.cuda() for a in raw[:-2]]
    small = torch.ops.fasthyper._small_hypernet_drift_fwd
    if not torch.ops.fasthyper._small_hypernet_drift_fits(on_gpu[0], raw[-2], shape[0]):
        pytest.skip("the trunk does not fit this device")
    value, grad_embeddings, grad_theta = small(*on_gpu, *raw[-2:])
    again = small(*on_gpu, *raw[-2:])
    assert all(torch.equal(a, b) for a, b in zip(flat((value, grad_embeddings, grad_theta)), flat(again), strict=True))
    for have, want in zip([value, *grad_theta, grad_embeddings], [want_value, *want_grads], strict=True):
        assert oracle.relative_error(have.cpu(), want) < TOL["drift", dtype]
