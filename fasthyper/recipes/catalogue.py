"""The recipes by name. Each names its source."""

from __future__ import annotations

from fasthyper.recipes.recipe import Recipe

_PAPER = "von Oswald et al., Continual learning with hypernetworks, ICLR 2020"

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="demo",
            about="PermutedMNIST, 10 tasks, minutes on 2 cores",
            source="fasthyper",
            steps=800,
            lr=5e-4,
        ),
        Recipe(
            name="permuted-mnist-10",
            about="PermutedMNIST, 10 tasks, the paper's settings, one shared output head",
            source=_PAPER,
        ),
        Recipe(
            name="permuted-mnist-100",
            about="PermutedMNIST, 100 tasks, the paper's settings, one shared output head",
            source=_PAPER,
            num_tasks=100,
            chunk_size=7500,
            hidden=(200, 250, 350),
            task_dim=128,
            chunk_dim=12,
            activation="relu",
            beta=0.01,
        ),
        Recipe(
            name="split-mnist",
            about="SplitMNIST, 5 tasks of 2 digits with a head each, the paper's settings",
            source=_PAPER,
            stream="split-mnist",
            num_tasks=5,
            num_inputs=784,
            target_hidden=(400, 400),
            outputs_per_task=2,
            chunk_size=42_000,
            hidden=(10, 10),
            task_dim=96,
            chunk_dim=96,
            activation="relu",
            steps=2000,
            lr=1e-3,
            beta=0.01,
        ),
        Recipe(
            name="permuted-digits",
            about="permuted 8x8 digits, 10 tasks, nothing to download, seconds",
            source="fasthyper",
            stream="permuted-digits",
            num_inputs=64,
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
    )
}
