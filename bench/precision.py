"""Errors of the float32 regularizer against float64, ours at each precision and the loop's, over the size of a step and in a
trained state.

python bench/precision.py     writes bench/results/precision.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_regularizer import STATES, STEPS, float32_errors, random_state, trained_state  # noqa: E402

from fasthyper.environment import environment  # noqa: E402


def main() -> int:
    states = [(f"random, {name}", step, random_state(name, step)) for name in STATES for step in STEPS]
    rows = []
    for name, step, state in [*states, ("trained, ten tasks", None, trained_state())]:
        ours, loop = float32_errors(*state)
        lower = {precision: float32_errors(*state, precision)[0] for precision in ("high", "medium")}
        rows.append({"state": name, "step": step, "ours": ours, "loop": loop, **lower})
    record = {"environment": environment(), "errors": rows}
    (ROOT / "bench" / "results" / "precision.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
