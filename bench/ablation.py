"""How many past tasks a step should hold: all, or sampled ones, the same for all chunks or drawn for each by itself.

python bench/ablation.py [--recipe permuted-mnist-1000] [--tasks 50] [--steps 80] [--seeds 42,43,44] [--runs DIR]

writes its recipe's entry of bench/results/ablation.json; it can go on. The recipe is cut to so many tasks and steps a task.
Equal time (``--equal steps,time``): each seed's runs that sample take as many more steps as theirs are faster than those
that hold all tasks. Time is that of the processor, of one thread: other work does not count.
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
SAMPLED = {  # past tasks of a step, None: all; and whether each chunk has its own
    "permuted-mnist-1000": ((None, False), (32, False), (8, False), (1, False)),
    "permuted-mnist-100-gahaalt": ((None, False), (8, False), (1, False), (1, True)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=[*SAMPLED], default="permuted-mnist-1000")
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--steps", type=int, help="of a task (default: the recipe's)")
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--equal", default="steps,time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = dataclasses.replace(RECIPES[args.recipe], num_tasks=args.tasks, evaluate_every=args.tasks)
    recipe = dataclasses.replace(recipe, steps=args.steps or recipe.steps)
    rows: list[dict[str, Any]] = []

    def measure(equal: str, sampled: int | None, per_chunk: bool, seed: int, steps: int) -> dict[str, Any]:
        name = f"{args.recipe}-{equal}-{sampled or 'all'}{'-per-chunk' * per_chunk}-{seed}"
        kept = args.runs / f"{name}.json"
        if not kept.exists():
            own = dataclasses.replace(recipe, reg_tasks=sampled, reg_per_chunk=per_chunk, seed=seed, steps=steps)
            began = time.process_time()
            trainer = run(own, args.runs / name, progress=False, log=lambda line: None)
            row = {"equal": equal, "sampled": sampled, "per_chunk": per_chunk, "seed": seed, "steps": steps}
            row["seconds"], scores = time.process_time() - began, trainer.results.scores()
            kept.write_text(json.dumps(row | {key: scores[key] for key in ("acc", "forgetting", "largest_drop")}))
        rows.append(json.loads(kept.read_text()))
        print(rows[-1], flush=True)
        return rows[-1]

    for seed in map(int, args.seeds.split(",")):
        whole, *sampling = [measure("steps", *some, seed, recipe.steps) for some in SAMPLED[args.recipe]]
        for row in sampling if "time" in args.equal.split(",") else ():
            steps = round(recipe.steps * whole["seconds"] / row["seconds"])
            measure("time", row["sampled"], row["per_chunk"], seed, steps)
        record = {"tasks": args.tasks, "steps": recipe.steps, "environment": environment(), "runs": rows}
        records = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps(records | {args.recipe: record}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
