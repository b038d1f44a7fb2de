"""Accuracy of the two layouts: the demo recipe under each, over seeds.

python bench/layouts.py [--seeds 1,2,3] [--runs DIR]     writes bench/results/layouts.json; a run that was cut short goes on
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from fasthyper.environment import environment
from fasthyper.recipes import RECIPES, run

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "layouts")
    args = parser.parse_args()
    rows = []
    for seed in map(int, args.seeds.split(",")):
        for layout in ("flat", "aligned"):
            recipe = dataclasses.replace(RECIPES["demo"], seed=seed, layout=layout)
            results = run(recipe, args.runs / f"{layout}-{seed}", progress=False).results
            seconds = sum(task.seconds for task in results.tasks)
            row = {"layout": layout, "seed": seed, "steps": recipe.steps, "training_seconds": seconds}
            rows.append(row | {"scores": results.scores()})
            record = {"recipe": "demo", "environment": environment(), "runs": rows}
            (ROOT / "bench" / "results" / "layouts.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
