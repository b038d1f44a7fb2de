"""What the recipes reached when they were run (``bench/recipes.py`` writes it)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from fasthyper.metrics import MEASURES, sem

FILE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Measured:
    """Runs of a recipe, one number for each seed: ``score`` (ACC, a fraction, or the mean error where ``measure`` is one),
    ``largest_drop``, if it was seen, and ``seconds`` of training. ``steps``: of all tasks.  ``where``: threads and machine.
    """

    seeds: Sequence[int]
    score: Sequence[float]
    largest_drop: Sequence[float] | None
    seconds: Sequence[float]
    measure: str
    steps: int
    where: str

    @property
    def mean_and_error(self) -> str:
        """Of ``score``, with its unit."""
        return with_error(self.score, self.measure)

    def __str__(self) -> str:
        minutes = statistics.median(self.seconds) / 60  # other work may have stopped one of them
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        return f"{self.mean_and_error} ({seeds}, {minutes:.1f} minutes each on {self.where})"


def with_error(values: Sequence[float], measure: str = "accuracy") -> str:
    """Mean, and its standard error where there are several."""
    write = MEASURES[measure].text
    if len(values) == 1:
        return write(values[0])
    return f"{write(statistics.mean(values), False)} ± {write(sem(values))}"


@cache
def measured() -> dict[str, Measured]:
    """By name of the recipe; recipes that were not run are not there."""
    entries, keys = json.loads(FILE.read_text()), [field.name for field in fields(Measured)]
    return {name: Measured(**{key: entry[key] for key in keys}) for name, entry in entries.items()}
