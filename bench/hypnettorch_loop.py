"""``bench/split_loop.py``, a loop over tasks written for hypnettorch, run as it is and accelerated, in turn.

python bench/hypnettorch_loop.py [--rounds N] [--tasks N] [--steps N]     writes bench/results/hypnettorch_loop.json

Before anything is timed, the loop in float64 has to have the same losses both ways.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

from fasthyper.bench.measure import compared, quartiles
from fasthyper.environment import environment

ROOT = Path(__file__).parent.parent
LOOP = ROOT / "bench" / "split_loop.py"
WAYS = {"plain": [str(LOOP)], "accelerated": ["-m", "fasthyper.compat.hypnettorch", str(LOOP)]}
PARITY = 1e-9  # of losses and penalties in float64
# eps: hypnettorch's look-ahead adds it before Adam's bias correction, Adam itself after it
FLOAT64 = ["--dtype", "float64", "--eps", "1e-20"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50, help="per task")
    args = parser.parse_args()
    size = ["--tasks", str(args.tasks)]
    plain, accelerated = (run(way, [*size, "--steps", "5", *FLOAT64]) for way in WAYS)
    difference = max(largest_difference(accelerated[key], plain[key]) for key in ("losses", "penalties"))
    if not difference < PARITY:
        print(f"the losses differ by {difference:.1e}, more than {PARITY:.0e}", file=sys.stderr)
        return 1
    rounds = [{way: run(way, [*size, "--steps", str(args.steps)]) for way in WAYS} for _ in range(args.rounds)]
    record = {
        "environment": environment() | {"hypnettorch": version("hypnettorch")},
        "tasks": args.tasks,
        "steps": args.steps,
        "parity": difference,
        "loop": times(rounds, sum),
        "by_task": [times(rounds, itemgetter(task)) for task in range(args.tasks)],
        "calls": rounds[-1]["accelerated"]["calls"],
    }
    out = ROOT / "bench" / "results" / "hypnettorch_loop.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    loop, last = record["loop"], record["by_task"][-1]
    print(f"losses within {difference:.0e}; loop {loop['ratio']:.1f}x, its last task {last['ratio']:.1f}x as fast")
    return 0


def run(way: str, options: list[str]) -> dict[str, Any]:
    """What the loop writes, and from the runner's summary calls and seconds, fast and general, of each function."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        command = [sys.executable, *WAYS[way], *options, "--out", str(out)]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
        calls = re.findall(r"^  (\S+) +(\d+) +([\d.]+) +(\d+) +([\d.]+)$", done.stderr, re.M)
        return {**json.loads(out.read_text()), "calls": {name: list(map(float, numbers)) for name, *numbers in calls}}


def times(rounds: list[dict[str, Any]], part: Callable[[list[float]], float]) -> dict[str, Any]:
    """Seconds both ways, and how many times as fast the accelerated way is, with quartiles."""
    plain, accelerated = ([part(found[way]["seconds"]) for found in rounds] for way in WAYS)
    return {"accelerated": quartiles(accelerated), "plain": quartiles(plain)} | {
        key: value for key, value in compared(accelerated, plain).items() if key.startswith("ratio")
    }


def largest_difference(have: list[float], want: list[float]) -> float:
    """Relative, but for values far below 1."""
    return max(abs(h - w) / max(abs(w), 1e-3) for h, w in zip(have, want, strict=True))


if __name__ == "__main__":
    sys.exit(main())
