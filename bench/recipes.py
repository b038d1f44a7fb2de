"""Gathers finished runs of recipes into ``bench/results/recipes.json``, which README and ``fasthyper list`` show.

    fasthyper run split-mnist-cl1-ent --seeds 3 --out runs/a
    python bench/recipes.py runs/a/seed-*                       # one entry for each recipe among them, one number a seed
    python bench/recipes.py --of split-mnist-cl3-ent runs/a/seed-*   # of a recipe that only evaluates these runs another way
    python bench/recipes.py --add runs/a/seed-45                # to the seeds that the entry has

Without ``--add`` an entry is replaced. A run must be finished and of the recipe's own settings, but for the seed and where
the data lie.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fasthyper.checkpoint import read_results
from fasthyper.metrics import MEASURES, Results
from fasthyper.recipes import RECIPES, Recipe, evaluate, settings
from fasthyper.recipes.run import class_of
from fasthyper.trainer import Trainer

FILE = Path(__file__).parent / "results" / "recipes.json"
FREE = ("seed", "data_dir", "about", "source")  # settings that do not change what is measured
REPLAY = ("replay_hidden", "replay_chunk_size", "replay_beta")
# nor, of a trainer alone, what is trained
EVALUATED = (*FREE, *REPLAY, "name", "scenario", "method", "temperature", "evaluate_every")


def entry(name: str, directories: Sequence[Path], again: bool = False) -> dict[str, Any]:
    """What is kept of the runs of one recipe; or, of a recipe that trains the same, ``again`` evaluated in its way.

    Raises:
        ValueError: a run that is not finished, or of other settings.
    """
    wanted = settings(RECIPES[name])
    if again and class_of(RECIPES[name]) is not Trainer:
        raise ValueError(f"{name} trains more than a hypernetwork: run it")
    runs: dict[int, tuple[Results, dict[str, Any]]] = {}
    for directory in directories:
        content = read_results(directory)
        config, results = settings(Recipe("", "", "")) | content["config"], Results.from_json(content["results"])
        for key in wanted.keys() - (EVALUATED if again else FREE):
            if config.get(key) != wanted[key]:
                raise ValueError(f"{directory}: {key} is {config.get(key)}, in the recipe {wanted[key]}")
        if len(results.tasks) != wanted["num_tasks"] or math.isnan(score(results)):
            raise ValueError(f"{directory}: {len(results.tasks)} of {wanted['num_tasks']} tasks are trained and evaluated")
        if again:
            told = wanted["scenario"] == "task"
            found = evaluate(directory, *((False,) if told else (wanted["method"], wanted["temperature"])))
            results = replace(results, accuracy={len(found) - 1: dict(enumerate(found.values()))})
        runs[config["seed"]] = results, content["environment"]
    seeds = sorted(runs)
    scores, environment = {seed: runs[seed][0].scores() for seed in seeds}, runs[seeds[0]][1]
    threads = int(environment["threads"])
    return {
        "seeds": seeds,
        "score": [score(runs[seed][0]) for seed in seeds],
        "largest_drop": None if again else [scores[seed]["largest_drop"] for seed in seeds],
        "forgetting": None if again else [scores[seed]["forgetting"] for seed in seeds],
        "peak_memory": [runs[seed][0].peak_memory for seed in seeds],
        "lowest": None if again else [min(runs[seed][0].accuracy[wanted["num_tasks"] - 1].values()) for seed in seeds],
        "slowdown": None if again else [slowdown(runs[seed][0]) for seed in seeds],
        "seconds": [sum(task.seconds for task in runs[seed][0].tasks) for seed in seeds],
        "measure": runs[seeds[0]][0].measure,
        "where": f"{threads} thread{'s' if threads > 1 else ''} of {environment['machine'].split(',')[0]}",
        "steps": sum(task.steps for task in runs[seeds[0]][0].tasks),
        "environments": [runs[seed][1] for seed in seeds],
    }


def joined(earlier: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Both entries of a recipe in one; of a seed that both have, the one found now."""
    kept = [i for i, seed in enumerate(earlier["seeds"]) if seed not in found["seeds"]]
    seeds = [*(earlier["seeds"][i] for i in kept), *found["seeds"]]
    places = sorted(range(len(seeds)), key=seeds.__getitem__)

    def both(key: str) -> list[Any] | None:
        if earlier.get(key) is None:
            return None
        numbers = [*(earlier[key][i] for i in kept), *found[key]]
        return [numbers[place] for place in places]

    where = " and ".join(dict.fromkeys([*(earlier["where"].split(" and ") if kept else ()), found["where"]]))
    return found | {key: both(key) for key, of_seeds in found.items() if isinstance(of_seeds, list)} | {"where": where}


def score(results: Results) -> float:
    """Mean accuracy, or error, over all tasks after the last one."""
    return results.scores()[MEASURES[results.measure].key]


def slowdown(results: Results) -> float:
    """Seconds of a task, the median of the last tenth of them over that of as many from the second on."""
    seconds = [task.seconds for task in results.tasks]
    tenth = max(1, len(seconds) // 10)
    return statistics.median(seconds[-tenth:]) / statistics.median(seconds[1 : 1 + tenth])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--of", choices=[*RECIPES], metavar="RECIPE", help="that trains as these runs do")
    parser.add_argument("--add", action="store_true", help="to the seeds that were measured before")
    parser.add_argument("--disturbed", action="store_true", help="by other work: slowdowns say nothing and are not kept")
    args = parser.parse_args()
    found: dict[str, list[Path]] = defaultdict(list)
    for directory in args.directories:
        found[args.of or read_results(directory)["name"]].append(directory)
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, directories in found.items():
        new = entry(name, directories, again=args.of is not None)
        if args.disturbed:
            new["slowdown"] = [None] * len(new["seeds"])
        kept[name] = joined(kept[name], new) if args.add and name in kept else new
    FILE.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    for name in found:
        print(f"{name}: {kept[name]['score']}")


if __name__ == "__main__":
    main()
