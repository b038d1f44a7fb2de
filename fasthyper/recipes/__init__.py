"""Named experiments: a stream, a target, a hypernetwork and how to train it, as small frozen dataclasses."""

from fasthyper.recipes.catalogue import RECIPES
from fasthyper.recipes.file import nearest, read
from fasthyper.recipes.measured import measured, with_error
from fasthyper.recipes.recipe import Recipe
from fasthyper.recipes.run import Runner, differences, evaluate, run, settings

__all__ = [
    "RECIPES",
    "Recipe",
    "Runner",
    "differences",
    "evaluate",
    "measured",
    "nearest",
    "read",
    "run",
    "settings",
    "with_error",
]
