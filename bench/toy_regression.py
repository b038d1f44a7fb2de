"""The recipe ``toy-regression`` beside the same loop with hypnettorch: same initial weights, same batches, several seeds.

python bench/toy_regression.py [--seeds 42,43,44,45,46]     writes bench/results/toy_regression.json

The published errors are of one seed. Both ways do the same arithmetic; what rounding does over 12,000 steps with a constant
learning rate is theirs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

import fasthyper as fh
from fasthyper.environment import environment
from fasthyper.recipes import RECIPES, Recipe
from fasthyper.recipes.run import STREAMS, TRAINER, build
from fasthyper.streams.batches import Batches

FILE = Path(__file__).parent / "results" / "toy_regression.json"
PUBLISHED = (0.0041877, 0.0023879, 0.0060715)  # the test of the paper's code


def ours(recipe: Recipe, stream: fh.streams.Stream) -> list[float]:
    """Errors of all tasks after the last."""
    options = {key: getattr(recipe, key) for key in TRAINER}
    trainer = fh.Trainer(build(recipe, 1, 1), **options, progress=False)
    for task in stream:
        trainer.fit(task, steps=recipe.steps, batch_size=recipe.batch_size)
    return trainer.evaluate(stream)


def theirs(recipe: Recipe, stream: fh.streams.Stream) -> list[float]:
    """The same by hypnettorch's networks, regularizer and look-ahead."""
    from hypnettorch.mnets import MLP
    from hypnettorch.utils import hnet_regularizer as hreg
    from hypnettorch.utils.optim_step import calc_delta_theta

    hnet, _ = fh.to_hypnettorch(build(recipe, 1, 1))
    mnet = MLP(1, 1, list(recipe.target_hidden), activation_fn=torch.nn.Sigmoid(), no_weights=True, verbose=False)
    for task in stream:
        theta = torch.optim.Adam(hnet.unconditional_params, lr=recipe.lr)
        embedding = torch.optim.Adam([hnet.conditional_params[task.index]], lr=recipe.lr)
        targets = hreg.get_current_targets(task.index, hnet) if task.index else None
        batches = Batches(len(task.train), recipe.batch_size, seed=recipe.seed, task=task.index)
        for step in range(recipe.steps):
            x, y = task.train.batch(batches.indices(step))
            theta.zero_grad()
            embedding.zero_grad()
            F.mse_loss(mnet.forward(x, weights=hnet.forward(cond_id=task.index)), y).backward()
            if targets is not None:
                delta = calc_delta_theta(theta, False, lr=recipe.lr)
                penalty = hreg.calc_fix_target_reg(hnet, task.index, targets=targets, dTheta=delta)
                (recipe.beta * penalty).backward()
            theta.step()
            embedding.step()
    errors = []
    with torch.no_grad():
        for task in stream:
            x, y = task.test.batch(torch.arange(len(task.test)))
            errors.append(F.mse_loss(mnet.forward(x, weights=hnet.forward(cond_id=task.index)), y).item())
    return errors


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="42,43,44,45,46")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # hypnettorch's own, and torch's about it
    torch.set_num_threads(1)
    record = {
        "environment": environment() | {"hypnettorch": version("hypnettorch")},
        "published": PUBLISHED,
        "runs": [],
    }
    for seed in map(int, args.seeds.split(",")):
        recipe = dataclasses.replace(RECIPES["toy-regression"], seed=seed)
        stream = STREAMS[recipe.stream](recipe)
        record["runs"].append({"seed": seed, "fasthyper": ours(recipe, stream), "hypnettorch": theirs(recipe, stream)})
        print(record["runs"][-1], flush=True)
    FILE.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
