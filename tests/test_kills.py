"""A run that is killed at any moment, also within a save, and gone on with, ends as one that is left alone: bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_bit_for_bit_as_one_left_alone(tmp_path, kills):
    pytest.importorskip("sklearn")
    out, path = tmp_path / "kills.json", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "bench" / "kills.py"), "--kills", str(kills), "--out", str(out)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(case["kills"] for case in json.loads(out.read_text())["cases"].values()) == kills
