"""Recipes from TOML files, and settings of recipes from JSON: every value of the type that the field has."""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasthyper.errors import RecipeError, one_line
from fasthyper.recipes.catalogue import RECIPES
from fasthyper.recipes.fields import HINTS, kind
from fasthyper.recipes.recipe import Recipe

LARGEST = 1 << 13  # bytes of a file; all settings there are take a quarter of it


def read(path: Path) -> Recipe:
    """The recipe of a TOML file: settings by name, of the recipe named by ``recipe``, or of defaults; none is ``"none"``.

    Raises:
        RecipeError: unreadable, no TOML, an unknown recipe or setting, or a value of another type.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes, too many for a recipe")
        found = tomllib.loads(raw.decode())
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise RecipeError(f"cannot read {path} ({one_line(why)}): it should hold lines such as `beta = 0.01`") from error
    base = found.pop("recipe", None)
    if base is not None and base not in list(RECIPES):
        raise RecipeError(f"{path}: unknown recipe {one_line(reprlib.repr(base))}; {nearest(reprlib.repr(base), RECIPES)}")
    known = dataclasses.asdict(RECIPES[base]) if base is not None else {"about": str(path), "source": ""}
    optional = {key for key in HINTS if kind(key)[1]}
    changed = {key: None if value == "none" and key in optional else value for key, value in found.items()}
    recipe = of(str(path), {**known, "name": path.stem, "published": "", **changed})
    if not re.fullmatch(r"\w[\w.-]*", recipe.name):  # runs/NAME is where it is trained
        raise RecipeError(
            f"{path}: name must be of letters, digits, `-`, `_` and `.`, got {one_line(reprlib.repr(recipe.name))}"
        )
    return recipe


def of(where: str, values: Mapping[str, Any]) -> Recipe:
    """The recipe of these values, lists where fields are tuples.

    Raises:
        RecipeError: an unknown name, which ``where`` has, or a value of another type.
    """
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in HINTS:
            raise RecipeError(f"{where}: unknown setting {one_line(reprlib.repr(key))}; {nearest(key, HINTS)}")
        inner, optional = kind(key)
        if value is None and optional:
            checked[key] = None
        elif inner is tuple and isinstance(value, (list, tuple)) and all(map(_is_int, value)):
            checked[key] = tuple(value)
        elif inner is float and _is_int(value):
            checked[key] = float(value)
        elif (inner is int and _is_int(value)) or (inner in (float, str, bool) and type(value) is inner):
            checked[key] = value
        else:
            wanted = "a list of integers" if inner is tuple else f"of type {inner.__name__}"
            raise RecipeError(f"{where}: {key} must be {wanted}, got {one_line(reprlib.repr(value))}")
    return Recipe(**checked)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """What may have been meant, or where all are listed."""
    close = difflib.get_close_matches(name[:100], known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(close)}?" if close else "`fasthyper list` shows them"


def _is_int(value: Any) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63
