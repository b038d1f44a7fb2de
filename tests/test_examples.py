"""Examples run: each in a process of its own, as a person starts it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_lightning_loop():
    for module in ("lightning", "sklearn"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import lightning_loop; lightning_loop.main(2, epochs=10)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr
    accuracies = [float(line.split()[-2]) for line in done.stdout.splitlines() if line.startswith("task")]
    assert len(accuracies) == 2 and min(accuracies) > 80, done.stdout
