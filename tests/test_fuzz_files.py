"""A short run of ``fuzz_files.py``, which also finds what it is for; and that nothing but safetensors and JSON is read."""

import ast
import json
import os
import pickle
import subprocess
from pathlib import Path

import fuzz_files
import pytest

from fasthyper.errors import FasthyperError

ROOT = Path(__file__).parent.parent
NAMES = [
    *("checkpoint of trainer", "checkpoint of replay model", "checkpoint of HNET+TIR", "checkpoint of HNET+R", "export"),
    *("fasthyper export", "samples", "results", "fasthyper eval", "recipe", "IDX", "CIFAR-10", "CIFAR-100", "tar", "tar.gz"),
    *("zip", "deb", "LEAF", "JPEG", "log.csv"),
]
COUNT = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def readers(folder):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    return fuzz_files.readers(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_are_read_or_refused_in_one_line(readers, folder, name):
    assert list(readers) == NAMES
    found = fuzz_files.fuzz(name, readers[name], folder, seed=1, count=COUNT)
    assert found["failures"] == [] and found["inputs"] == COUNT
    assert found["refused"] > 0


def two_lines(path):
    raise FasthyperError("one\ntwo")


def fails(path):
    return {}["absent"]


def hangs(path):
    while True:
        pass


def grows(path):
    return bytearray(1 << 31)


def runs(path):
    return subprocess.run(["true"])


def unpickles(path):
    return pickle.loads(pickle.dumps(os.getcwd))


def writes(path):
    with open(Path(path.anchor) / "tmp" / f"fuzz-{os.getpid()}", "w"):
        return os.remove(Path(path.anchor) / "tmp" / f"fuzz-{os.getpid()}")


@pytest.mark.parametrize("read", [two_lines, fails, hangs, grows, runs, unpickles, writes], ids=lambda read: read.__name__)
def test_the_fuzzer_notices(tmp_path, monkeypatch, read):
    monkeypatch.setattr(fuzz_files, "SECONDS", 0.05)
    path = tmp_path / "file"
    path.touch()
    reader = fuzz_files.Reader([b""], fuzz_files.in_bytes, "file", read)
    with fuzz_files.limits():
        assert fuzz_files.attempt(reader, path)[1] != ""
        assert fuzz_files.attempt(reader._replace(read=Path.read_bytes), path) == (True, "")


def test_the_long_run_found_nothing():
    found = json.loads((ROOT / "bench" / "results" / "fuzz_files.json").read_text())
    assert list(found["readers"]) == NAMES
    assert found["inputs"] == sum(own["inputs"] for own in found["readers"].values()) >= 100_000
    assert not any(own["failures"] for own in found["readers"].values())


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("path", [*ROOT.glob("fasthyper/**/*.py"), *ROOT.glob("kernels/*.py")], ids=lambda path: path.stem)
def test_no_reader_can_run_code(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {node.module or ""} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
            assert not UNSAFE & {name.partition(".")[0] for name in names}, f"{path}:{node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in CALLS, f"{path}:{node.lineno}"
            assert called not in ("torch.load", "np.load", "numpy.load"), f"{path}:{node.lineno}"
            assert not called.endswith((".extractall", ".extract", ".unpack_archive")), f"{path}:{node.lineno}"
            assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
