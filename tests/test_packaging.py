"""Fresh processes: what is bound, what a missing or forced part says, what an import needs."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


def test_import_leaves_torch_s_compiler_out():
    """Which takes longer to import than the rest of the package."""
    done = python("import sys, fasthyper, fasthyper.cli\nassert 'torch._dynamo' not in sys.modules")
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


@pytest.fixture(scope="module")
def third_party():
    pytest.importorskip("packaging")
    spec = importlib.util.spec_from_file_location("third_party", ROOT / "_build" / "third_party.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_licences_of_all_that_is_needed_are_listed(third_party):
    listed = dict(re.findall(r"^\| ([\w.-]+) \| (.*) \|$", (ROOT / "THIRD_PARTY.md").read_text(), re.MULTILINE))
    found = third_party.needed("fasthyper", frozenset({"dev"}))
    assert {"torch", "rich", "safetensors", "numpy"} <= third_party.needed("fasthyper").keys()
    assert found.keys() <= listed.keys(), f"`make lock` lists {found.keys() - listed.keys()}"
    assert all(listed.values())


EXTRAS = distribution("fasthyper").metadata.get_all("Provides-Extra")


@pytest.mark.parametrize("extra", EXTRAS)
def test_no_extra_needs_another_torch_than_the_pinned_one(third_party, extra):
    """As the pinned versions say; ``make wheel`` asks pip itself."""
    from packaging.requirements import Requirement

    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name, found in third_party.needed("fasthyper", frozenset({extra})).items():
        for requirement in map(Requirement, found.requires or ()):
            if requirement.name in ("torch", "torchvision") and requirement.marker is None:
                assert pins[requirement.name] in requirement.specifier, f"{name} needs {requirement}"
                assert name in pins or not str(requirement.specifier).startswith("=="), f"{name} is not pinned"


@pytest.mark.parametrize("path", sorted((ROOT / "lock").glob("*.txt")), ids=lambda path: path.stem)
def test_locks_pin_what_constraints_do_and_no_torch(path):
    pins = re.findall(
        r"^([\w.-]+)==([^\s;]+)(?:; python_version (<|>=) \"3.11\")?$", (ROOT / "constraints.txt").read_text(), re.M
    )
    new = int(re.match(r"cp3(\d+)", path.stem)[1]) >= 11
    pinned = {name.replace("_", "-"): version for name, version, when in pins if when in ("", ">=" if new else "<")}
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    locked = dict(line.partition(" ")[0].split("==") for line in lines)
    assert all(re.fullmatch(r"[\w.-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines) and "torch" not in locked
    assert {name: locked[name] for name in pinned.keys() & locked.keys()} == {
        n: pinned[n] for n in pinned.keys() & locked.keys()
    }
    assert pinned.keys() - locked.keys() <= {"torch"}


def test_the_installed_metadata_names_the_licence():
    data = distribution("fasthyper").metadata
    assert data["License-Expression"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
