"""The recipes by name. Each names its source, and what that published."""

from __future__ import annotations

from dataclasses import replace

from fasthyper.recipes.recipe import Recipe

_PAPER = "von Oswald et al., Continual learning with hypernetworks, ICLR 2020"
_POSTERIOR = "Henning et al., Posterior meta-replay for continual learning, NeurIPS 2021 (its code's README)"
_SCENARIOS = {"cl1": "task", "cl2": "domain", "cl3": "class"}
_METHODS = {"ent": "entropy", "tir": "tir", "r": "replay"}
_METHOD_NAMES = {"ent": "HNET+ENT", "tir": "HNET+TIR", "r": "HNET+R"}
_TABLE_1 = {  # of the paper: mean and standard error of the mean over 20 runs
    "permuted-mnist-10": {
        "cl1": {"ent": "97.57 ± 0.02", "tir": "97.57 ± 0.02", "r": "97.87 ± 0.01"},
        "cl2": {"ent": "92.80 ± 0.15", "tir": "97.58 ± 0.02", "r": "97.60 ± 0.01"},
        "cl3": {"ent": "91.75 ± 0.21", "tir": "97.59 ± 0.01", "r": "97.76 ± 0.01"},
    },
    "split-mnist": {
        "cl1": {"ent": "99.79 ± 0.01", "tir": "99.79 ± 0.01", "r": "99.83 ± 0.01"},
        "cl2": {"ent": "87.01 ± 0.47", "tir": "94.43 ± 0.28", "r": "98.00 ± 0.03"},
        "cl3": {"ent": "69.48 ± 0.80", "tir": "89.59 ± 0.59", "r": "95.30 ± 0.13"},
    },
}

_PERMUTED = Recipe(name="permuted-mnist-10", about="PermutedMNIST, 10 tasks", source=_PAPER, heads=True)
_SPLIT = Recipe(
    name="split-mnist",
    about="SplitMNIST, 5 tasks of 2 digits",
    source=_PAPER,
    stream="split-mnist",
    num_tasks=5,
    target_hidden=(400, 400),
    heads=True,
    chunk_size=42_000,
    hidden=(10, 10),
    task_dim=96,
    chunk_dim=96,
    activation="relu",
    steps=2000,
    lr=1e-3,
    beta=0.01,
)


def _of_table_1(base: Recipe) -> list[Recipe]:
    """The scenarios and methods of the paper's Table 1 on one stream."""
    return [
        replace(
            base,
            name=f"{base.name}-{scenario}-{method}",
            about=f"{base.about}, {scenario.upper()}, {_METHOD_NAMES[method]}, the paper's settings",
            published=figure,
            scenario=_SCENARIOS[scenario],
            method=_METHODS[method],
            heads=scenario != "cl2",
        )
        for scenario, figures in _TABLE_1[base.name].items()
        for method, figure in figures.items()
    ]


_ALL = (
    Recipe(
        name="demo",
        about="PermutedMNIST, 10 tasks, minutes on 2 cores",
        source="fasthyper",
        steps=800,
        lr=5e-4,
    ),
    Recipe(
        name="permuted-digits",
        about="permuted 8x8 digits, 10 tasks, nothing to download, seconds",
        source="fasthyper",
        stream="permuted-digits",
        target_hidden=(100, 100),
        chunk_size=2000,
        hidden=(50, 50),
        task_dim=32,
        chunk_dim=12,
        steps=400,
        batch_size=64,
        lr=1e-3,
        beta=0.1,
    ),
    *_of_table_1(_SPLIT),
    *_of_table_1(_PERMUTED),
    Recipe(
        name="permuted-mnist-100",
        about="PermutedMNIST, 100 tasks, the paper's settings",
        source=_PAPER,
        published="96.78 ± 0.09",
        num_tasks=100,
        heads=True,
        chunk_size=7500,
        hidden=(200, 250, 350),
        task_dim=128,
        chunk_dim=12,
        activation="relu",
        beta=0.01,
    ),
)
RECIPES = {recipe.name: recipe for recipe in _ALL}
