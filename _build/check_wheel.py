"""Builds a source archive, a wheel from it, and tries the wheel where nothing but torch is installed: ``make wheel``.

``python _build/check_wheel.py FOLDER [RESULT.json]``: FOLDER is emptied, gets both archives and an environment of its own, in
whose PATH no compiler is. FASTHYPER_BUILD says what the wheel holds, as ever. The first thing that is wrong ends it with status 1.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRIAL = """
import pathlib, sys, torch, fasthyper as fh
assert pathlib.Path(fh.__file__).is_relative_to(sys.prefix), fh.__file__
x, y = torch.rand(40, 6), torch.arange(40) % 4
trainer = fh.Trainer(fh.ChunkedHypernet(fh.nets.MLP(6, (5,), 4), 2, chunk_size=9, hidden=(4,)), progress=False)
for _ in range(2):
    trainer.fit((x, y), steps=5, batch_size=8)
    trainer.evaluate([(x, y)] * len(trainer.results.tasks))
trainer.save("run")
assert torch.equal(fh.Trainer.load("run", progress=False).hnet.basis, trainer.hnet.basis)
print(fh.backends()["cpu"])
"""


def run(*command: object, **options: object) -> str:
    """Output of a command, which must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def sources() -> set[str]:
    """The files of the package, as a wheel names them."""
    tracked = run("git", "ls-files", "fasthyper", "kernels", cwd=ROOT).splitlines()
    own = {name for name in tracked if name.startswith("fasthyper/")} - {"fasthyper/kernels"}
    return own | {f"fasthyper/{name}" for name in tracked if name.startswith("kernels/")} | {"fasthyper_cli.py"}


def check(found: set[str], wanted: set[str], what: str) -> None:
    if found != wanted:
        raise SystemExit(f"{what} lacks {sorted(wanted - found)} and has {sorted(found - wanted)} too much")


def built(folder: Path) -> tuple[Path, Path]:
    """The source archive, and a wheel built from what it holds."""
    code = "import sys; sys.path.insert(0, '_build'); import backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, source)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def tried(wheel: Path, folder: Path) -> dict[str, object]:
    """What serves the CPU, which torch is there, and how many packages each extra would add, in an environment with the wheel
    and its dependencies alone."""
    run(sys.executable, "-m", "venv", folder / "venv")
    env = {"PATH": str(folder / "venv" / "bin"), "HOME": str(folder), "FASTHYPER_BACKEND": "auto"}
    env |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "OMP_"))}
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    run(*pip, "torch", env=env)
    before = run(folder / "venv" / "bin" / "python", "-c", "import torch; print(torch.__version__)", env=env)
    run(*pip, wheel, env=env)
    assert shutil.which("g++", path=env["PATH"]) is None and shutil.which("nvcc", path=env["PATH"]) is None
    place = folder / "elsewhere"
    place.mkdir()
    served = run(folder / "venv" / "bin" / "python", "-c", TRIAL, env=env, cwd=place)
    for arguments in (("--version",), ("list",), ("doctor",), ("export", "run", "hnet.safetensors"), ("data",)):
        run(folder / "venv" / "bin" / "fasthyper", *arguments, env=env, cwd=place)
    after = run(folder / "venv" / "bin" / "python", "-c", "import torch; print(torch.__version__)", env=env)
    check({after}, {before}, "torch")
    extras = {}
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    for extra in (line.partition(": ")[2] for line in lines if line.startswith("Provides-Extra: ")):
        report = run(*pip, "--dry-run", "--report", "-", f"{wheel}[{extra}]", env=env)
        added = {entry["metadata"]["name"].lower() for entry in json.loads(report)["install"]}
        check({name for name in added if name == "torch" or name.startswith("nvidia-")}, set(), f"fasthyper[{extra}]")
        extras[extra] = len(added - {"fasthyper"})
    return {"served by": served, "torch": after, "packages that extras add": extras}


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sdist, wheel = built(folder)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    meta = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE", "licenses/THIRD_PARTY.md"}
    compiled = {name for name in names if name == "fasthyper/_C.abi3.so"}
    check(names, sources() | compiled | {f"{info}/{name}" for name in meta}, wheel.name)
    result = {"wheel": wheel.name, "bytes": wheel.stat().st_size, "files": len(names), "sdist": sdist.name}
    result |= {"python": platform.python_version(), "commit": run("git", "rev-parse", "HEAD", cwd=ROOT)[:12]}
    result |= tried(wheel, folder)
    print(json.dumps(result, indent=1))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
