"""Named experiments: a stream, a target, a hypernetwork and how to train it, as small frozen dataclasses."""

from fasthyper.recipes.catalogue import RECIPES
from fasthyper.recipes.recipe import Recipe, run

__all__ = ["RECIPES", "Recipe", "run"]
