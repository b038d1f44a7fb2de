"""How much memory a side needs: measured in a process of its own, because a peak cannot be taken back.

``python -m fasthyper.bench.memory`` (started by ``measure``) runs something small, for what libraries keep is no side's.
Then it sets one side up, gives free memory back to the system, resets the kernel's high-water mark
(``/proc/self/clear_refs``), calls the side six times and reads the mark (``VmHWM``; ``ru_maxrss`` of a child starts at what
its parent held, and cannot be reset). ``kept`` is what setting up added to a process that holds the hypernetwork: snapshot
or stored targets. ``step`` is the mark less what was resident after that: what calls hold, and what they leave for the next,
be it moments or scratch.
glibc is told to take every large block from the system and to give it back at once, so that the mark counts what is held and
not how a heap happens to be cut: without that a loop over tasks is seen to take up to three times as much.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from fasthyper.bench.peers import SIDES
from fasthyper.bench.workloads import Workload, mlp
from fasthyper.errors import FasthyperError

CALLS = 6
SMALL = Workload(
    "small",
    mlp(16, (16,), 4),
    {"chunk_size": 64, "hidden": (8,), "task_dim": 4, "chunk_dim": 4, "activation": "elu"},
    tasks=(1,),
)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(workload: Workload, past: int, what: str, side: str, threads: int) -> dict[str, int] | None:
    """Bytes ``kept`` and of a ``step``, from a fresh process; ``None`` where the system does not tell them.

    Raises:
        FasthyperError: the process failed.
    """
    if not STATUS.exists():
        return None
    command = [sys.executable, "-m", "fasthyper.bench.memory", workload.to_json(), str(past), what, side, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MALLOC})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise FasthyperError(f"measuring the memory of {side} on {workload.name} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def main(workload: str, past: str, what: str, side: str, threads: str) -> None:
    """The fresh process: prints ``kept`` and ``step`` as JSON."""
    torch.set_num_threads(int(threads))
    warnings.simplefilter("ignore")
    call = SIDES[side](SMALL, 1).prepare(what)
    if side != "compile":
        call()
    del call
    contender = SIDES[side](Workload.from_json(workload), int(past))
    empty = _resident()
    call = contender.prepare(what)
    ready = _resident()
    CLEAR.write_text("5")
    for _ in range(CALLS):
        call()
    print(json.dumps({"kept": max(0, ready - empty), "step": max(0, _status("VmHWM") - ready)}))


def _resident() -> int:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _status("VmRSS")


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
