"""From text to the fields of a recipe, as command lines have them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from fasthyper.recipes.recipe import Recipe

FIXED = ("name", "about", "source", "published")  # what a recipe is, rather than what it does
HINTS = typing.get_type_hints(Recipe)
FIELDS = tuple(field.name for field in dataclasses.fields(Recipe) if field.name not in FIXED)


def kind(name: str) -> tuple[type, bool]:
    """The type of a field, ``tuple`` for one of integers, and whether it may be ``None``."""
    hint = HINTS[name]
    options = typing.get_args(hint)
    inner = next(option for option in options if option is not type(None)) if type(None) in options else hint
    return typing.get_origin(inner) or inner, type(None) in options


def converter(name: str) -> Callable[[str], Any]:
    """From text to a value of this field; its ``__name__`` is what help and errors show. What is none is a ValueError."""
    inner, optional = kind(name)

    def convert(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        if inner is bool:
            return {"true": True, "false": False}[text.lower()]
        if inner is tuple:
            return tuple(int(part) for part in text.split(",") if part)
        return inner(text)

    def checked(text: str) -> Any:
        try:
            return convert(text)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{text!r} is not {checked.__name__}") from error

    shown = "true|false" if inner is bool else "int,int,..." if inner is tuple else inner.__name__
    checked.__name__ = f"{shown}|none" if optional else shown
    return checked


def text(value: Any) -> str:
    """A field's value as ``converter`` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
