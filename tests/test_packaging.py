"""Fresh processes: what is bound, what a missing or forced part says, what an import needs."""

import importlib.util
import os
import subprocess
import sys

import pytest

HAS_EXTENSION = importlib.util.find_spec("fasthyper._C") is not None


def python(code, *, backend="auto", **env):
    """Runs ``code`` in a new process."""
    env = {**os.environ, "FASTHYPER_BACKEND": backend, **env}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)


TRAIN = """
import torch, fasthyper as fh
hnet = fh.ChunkedHypernet(fh.nets.MLP(6, (5,), 4), 2, chunk_size=9, hidden=(4,))
trainer = fh.Trainer(hnet, progress=False)
for _ in range(2):
    trainer.fit((torch.randn(16, 6), torch.arange(16) % 4), steps=3, batch_size=8)
print(fh.backends()['cpu'])
"""


def test_import_and_training_need_torch_only():
    others = (
        "rich",
        "safetensors",
        "matplotlib",
        "sklearn",
        "hypnettorch",
        "avalanche",
        "tensorboard",
        "torchvision",
        "wandb",
    )
    done = python(f"import sys\nsys.modules.update(dict.fromkeys({others}))\n{TRAIN}")
    assert done.returncode == 0, done.stderr


def test_a_bridge_to_a_library_that_is_missing_names_the_extra():
    done = python("import sys\nsys.modules['avalanche'] = None\nimport fasthyper.compat.avalanche")
    wanted = (
        "ModuleNotFoundError: avalanche-lib 0.6.0 is not installed: pip install -c constraints.txt 'fasthyper[avalanche]'"
    )
    assert done.stderr.splitlines()[-1] == wanted


def test_reference_is_bound_when_asked_for():
    assert python(TRAIN, backend="reference").stdout.startswith("reference (FASTHYPER_BACKEND=reference)")


@pytest.mark.skipif(not HAS_EXTENSION, reason="the extension is not built")
def test_extension_is_bound():
    assert python(TRAIN).stdout.startswith("cpp")
    assert python(TRAIN, backend="cpp").stdout.startswith("cpp")


def test_without_the_extension_the_reference_runs_and_says_so():
    hide = "import importlib.util as u; find = u.find_spec\n"
    hide += "u.find_spec = lambda n, *a: None if n == 'fasthyper._C' else find(n, *a)"
    done = python(f"{hide}\n{TRAIN}")
    assert done.returncode == 0 and "the C++ extension is not built: pip install" in done.stdout
    forced = python(f"{hide}\n{TRAIN}", backend="cpp")
    assert forced.returncode == 1 and "FASTHYPER_BACKEND=cpp, but the C++ extension is not built" in forced.stderr


@pytest.mark.skipif(not HAS_EXTENSION, reason="the extension is not built")
def test_an_extension_that_does_not_load_warns_or_raises():
    code = """
import importlib
load = importlib.import_module
def failing(name, package=None):
    if name == "fasthyper._C":
        raise OSError("undefined symbol: torch_future_call")
    return load(name, package)
importlib.import_module = failing
"""
    done = python(f"{code}\n{TRAIN}")
    assert done.returncode == 0 and "C++ extension does not load" in done.stderr and done.stdout.startswith("reference")
    forced = python(f"{code}\n{TRAIN}", backend="cpp")
    assert forced.returncode == 1 and "FASTHYPER_BACKEND=cpp, but the C++ extension does not load" in forced.stderr


@pytest.mark.parametrize(
    "backend, message",
    [
        ("fast", "FASTHYPER_BACKEND='fast' is not known; set it to one of auto"),
        ("triton", "needs a CUDA device, or TRITON_INTERPRET=1"),
    ],
)
def test_backends_that_cannot_be_had_raise(backend, message):
    done = python("import fasthyper", backend=backend)
    assert done.returncode == 1 and message in done.stderr


OLD_TORCH = "import torch; torch.__version__ = '2.4.1+cpu'\n"


def test_a_torch_that_is_too_old_is_named():
    done = python(f"{OLD_TORCH}import fasthyper")
    assert done.returncode == 1 and "needs torch 2.11 or later, found 2.4.1+cpu" in done.stderr


def test_the_command_says_in_one_line_why_it_cannot_start():
    done = python(f"{OLD_TORCH}import sys, fasthyper_cli; sys.exit(fasthyper_cli.main())")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("fasthyper: fasthyper 0.1.0 needs torch 2.11") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_call_may_be_the_very_first(backend):
    code = f"""
import torch
from fasthyper import ops
def loss(h, v):
    first, second = ops.generate(h, v, [(2, 5), (10,)])
    return (first.sin().sum() * second).sum()
compiled = torch.compile(loss, fullgraph=True, backend="{backend}")
leaves = torch.randn(4, 3).requires_grad_(), torch.randn(6, 4).requires_grad_()
found = torch.autograd.grad(compiled(*leaves), leaves)
for have, want in zip(found, torch.autograd.grad(loss(*leaves), leaves)):
    torch.testing.assert_close(have, want)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
