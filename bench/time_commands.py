"""Times README's two commands as a newcomer meets them: a clean clone of HEAD, an empty home, no caches.

python bench/time_commands.py     writes bench/results/commands.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fasthyper.environment import environment

ROOT = Path(__file__).parent.parent


def main() -> int:
    cloned = environment()
    with tempfile.TemporaryDirectory() as scratch:
        clone, home = Path(scratch) / "clone", Path(scratch) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        dropped = ("VIRTUAL_ENV", "PYTHONPATH", "FASTHYPER_BACKEND", "FASTHYPER_BUILD")
        env = {name: value for name, value in os.environ.items() if name not in dropped}
        env |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "PIP_NO_CACHE_DIR": "1"}
        env["PATH"] = os.pathsep.join(p for p in env["PATH"].split(os.pathsep) if not p.startswith(str(ROOT)))
        seconds = {}
        for target in ("demo", "test"):
            began = time.perf_counter()
            subprocess.run(["make", target], cwd=clone, env=env, check=True)
            seconds[target] = time.perf_counter() - began
        run = json.loads((clone / "runs" / "demo" / "results.json").read_text())
    record = {"environment": cloned, "seconds": seconds, "demo": run}
    for task in run["results"]["tasks"]:
        task["loss"], task["drift"] = [], []  # curves are not needed here
    (ROOT / "bench" / "results" / "commands.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
