"""How many past tasks a step should hold: all, or 1, 8, 32 sampled ones, at equal steps and at equal time.

python bench/ablation.py [--tasks 50] [--seeds 42,43,44] [--runs DIR]   writes bench/results/ablation.json; can go on

The recipe is ``permuted-mnist-1000``, of fewer tasks. Equal time: each seed's runs that sample take as many more steps as
theirs are faster than those that hold all tasks. Time is that of the processor, of one thread: other work does not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fasthyper.environment import environment
from fasthyper.recipes import RECIPES, run

ROOT = Path(__file__).parent.parent
FILE = ROOT / "bench" / "results" / "ablation.json"
SAMPLED = (None, 32, 8, 1)  # past tasks of a step; None: all


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = dataclasses.replace(RECIPES["permuted-mnist-1000"], num_tasks=args.tasks, evaluate_every=args.tasks)
    rows: list[dict[str, Any]] = []

    def measure(equal: str, sampled: int | None, seed: int, steps: int) -> dict[str, Any]:
        name = f"{equal}-{sampled or 'all'}-{seed}"
        kept = args.runs / f"{name}.json"
        if not kept.exists():
            own, began = dataclasses.replace(recipe, reg_tasks=sampled, seed=seed, steps=steps), time.process_time()
            trainer = run(own, args.runs / name, progress=False, log=lambda line: None)
            seconds, scores = time.process_time() - began, trainer.results.scores()
            row = {"equal": equal, "sampled": sampled, "seed": seed, "steps": steps, "seconds": seconds}
            kept.write_text(json.dumps(row | {key: scores[key] for key in ("acc", "forgetting", "largest_drop")}))
        rows.append(json.loads(kept.read_text()))
        print(rows[-1], flush=True)
        return rows[-1]

    for seed in map(int, args.seeds.split(",")):
        at_equal_steps = [measure("steps", sampled, seed, recipe.steps) for sampled in SAMPLED]
        for row in at_equal_steps[1:]:
            measure("time", row["sampled"], seed, round(recipe.steps * at_equal_steps[0]["seconds"] / row["seconds"]))
        record = {
            "recipe": recipe.name,
            "tasks": args.tasks,
            "steps": recipe.steps,
            "environment": environment(),
            "runs": rows,
        }
        FILE.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
