"""The runs of a report: read from their directories, grouped by seed, and their scores with definitions."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fasthyper import metrics
from fasthyper.checkpoint import RESULTS, read_results
from fasthyper.errors import FasthyperError
from fasthyper.metrics import BWT_CONVENTIONS, FORGETTING_CONVENTIONS, Results
from fasthyper.recipes import RECIPES, settings

ACCURACY = "accuracy"
NEVER = "n/a"


@dataclass(frozen=True)
class Run:
    """One run read from its directory. ``config`` and ``environment`` hold whatever was recorded, by name.

    ``baseline`` is what was measured of each task learned alone, if known.
    """

    directory: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    results: Results
    baseline: tuple[float, ...] | None = None

    @property
    def measure(self) -> str:
        """What the matrix holds: ``accuracy``, or an error such as ``mse``, of which less is better."""
        return self.results.measure

    @cached_property
    def matrix(self) -> list[list[float]]:
        """R, as ``Results.matrix``."""
        return self.results.matrix

    @cached_property
    def scores(self) -> dict[str, float]:
        """As ``Results.scores()``, of errors ``acc`` their mean, and ``anterograde``, of minus the error where it is one."""
        scores, measure, alone = self.results.scores(), metrics.MEASURES[self.measure], math.nan
        if self.baseline is not None:
            alone = metrics.anterograde_forgetting(self.matrix, self.baseline) * (-1 if measure.is_error else 1)
        return scores | {"acc": scores[measure.key], "anterograde": alone}

    @property
    def seed(self) -> Any:
        """``None`` where none was recorded."""
        return self.config.get("seed")

    @property
    def command(self) -> str | None:
        """What makes this run again, if a recipe made it."""
        recipe = settings(RECIPES[self.name]) if self.name in RECIPES else {}
        if self.config.keys() != recipe.keys():
            return None
        words = ["fasthyper", "run", self.name, "--out", self.directory.resolve().name]
        for key, value in self.config.items():
            if key not in ("about", "source") and plain(value) != plain(recipe[key]):
                words += [f"--{key.replace('_', '-')}", plain(value)]
        return shlex.join(words)


@dataclass(frozen=True)
class Score:
    """How ``scores[key]`` is shown: times ``scale``, with so many ``digits``; in the unit of ``R`` where ``of_measure``."""

    key: str
    label: str
    unit: str
    scale: float
    digits: int
    definition: str

    @property
    def of_measure(self) -> bool:
        return self.scale == 100

    def unit_of(self, measure: str) -> str:
        return self.unit if measure == ACCURACY or not self.of_measure else measure

    def label_of(self, measure: str) -> str:
        """An error is no accuracy, so that ACC and AIA have another name there."""
        return (
            self.label if measure == ACCURACY else {"acc": "Final error", "aia": "Average error"}.get(self.key, self.label)
        )

    def definition_of(self, measure: str) -> str:
        if measure == ACCURACY or not self.of_measure:
            return self.definition
        text = (
            self.definition.replace("average incremental accuracy: ", "")
            .replace("accuracy", measure)
            .replace("ACC", "that mean")
        )
        return text if self.key in ("acc", "aia") else f"{text.partition(';')[0]}; R: minus the {measure}"

    def of(self, value: float, measure: str, digits: int | None = None) -> str:
        """The number without its unit; an error with so many significant ``digits``."""
        if math.isnan(value):
            return NEVER
        if measure != ACCURACY and self.of_measure:
            return f"{value:.{3 if digits is None else digits}g}".replace("-", "\N{MINUS SIGN}")
        rounded = round(self.scale * value, self.digits) + 0.0  # no minus zero
        return f"{rounded:,.{self.digits}f}".replace("-", "\N{MINUS SIGN}")


SCORES = (
    Score("acc", "ACC", "%", 100, 2, "mean accuracy over all tasks after the last one"),
    Score("aia", "AIA", "%", 100, 2, "average incremental accuracy: mean over i of ACC after task i"),
    Score("bwt", "BWT", "points", 100, 2, f"backward transfer, GEM: {BWT_CONVENTIONS['gem']}"),
    Score("forgetting", "Forgetting", "points", 100, 2, f"Avalanche: {FORGETTING_CONVENTIONS['avalanche']}"),
    Score("largest_drop", "Largest drop", "points", 100, 2, "worst task, just after learning against at the end"),
    Score(
        "fwt",
        "FWT",
        "points",
        100,
        2,
        "forward transfer, GEM: mean over j>1 of R[j-1,j] - b[j], b untrained; near chance here, so not run",
    ),
    Score("anterograde", "Anterograde forgetting", "points", 100, 2, "mean over j of accuracy learned alone, minus R[j,j]"),
    Score("seconds_per_task", "Time per task", "s", 1, 1, "wall time of training, mean"),
    Score("samples_per_second", "Throughput", "samples/s", 1, 0, "training samples per second of training"),
    Score("peak_memory", "Peak memory", "MiB", 2**-20, 0, "most the process held resident; on a GPU, most allocated there"),
)
RAW_UNITS = {"seconds_per_task": "s", "samples_per_second": "samples/s", "peak_memory": "bytes"}


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with the same settings but for the seed. ``settings`` tell it from others of the same name."""

    runs: tuple[Run, ...]
    settings: str

    @property
    def name(self) -> str:
        return self.runs[0].name

    @property
    def measure(self) -> str:
        return self.runs[0].measure

    @property
    def size(self) -> int:
        """How many tasks were learned."""
        return len(self.runs[0].results.tasks)

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.seed) for run in self.runs)

    def mean(self, key: str) -> float:
        """Of ``scores[key]`` over the runs; NaN where one of them has none."""
        return sum(run.scores[key] for run in self.runs) / len(self.runs)

    def sem(self, key: str) -> float:
        """Standard error of that mean; NaN for one run."""
        return metrics.sem([run.scores[key] for run in self.runs])

    def shown(self, score: Score) -> str:
        """Mean ± SEM without the unit."""
        mean, sem = score.of(self.mean(score.key), self.measure), score.of(self.sem(score.key), self.measure, 2)
        return mean if NEVER in (mean, sem) else f"{mean}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{sem}"

    @property
    def headline(self) -> str:
        """The outcome in one sentence."""
        final, drop = self.mean("acc"), self.mean("largest_drop")
        tasks = "1 task" if self.size == 1 else f"{self.size:,} tasks in a row"
        if len(self.runs) > 1:
            tasks += f", {len(self.runs)} seeds"
        if math.isnan(final):
            return f"{tasks}: not evaluated after the last one"
        one = Score("acc", "", "%", 100, 1 if len(self.runs) == 1 else 2, "")
        what = f"{self.shown(one)}\N{NO-BREAK SPACE}% {'mean ' * (self.size > 1)}accuracy"
        by = f"lost {SCORES[4].of(drop, ACCURACY)} points"
        none = "no task lost accuracy"
        if self.measure != ACCURACY:
            what = f"{'mean ' * (self.size > 1)}{self.measure} of {self.shown(one)}"
            by, none = f"rose by {SCORES[4].of(drop, self.measure)}", "of no task did it rise"
        if self.size == 1:
            return f"{tasks}: {what}"
        lost = "" if math.isnan(drop) else f", worst task {by}" if drop > 0 else f", {none}"
        return f"{tasks}: {what} at the end{lost}"


def load_run(directory: str | Path, baseline: Run | None = None) -> Run:
    """The run that ``directory`` holds in its ``results.json``.

    Its baseline is the list ``baseline`` there, or else what the run ``baseline`` reached on each task just after
    learning it: one whose tasks were each trained by themselves.

    Raises:
        FasthyperError: there is none, or it is damaged, of another format, without a finished task, or the baseline has
            fewer tasks or another measure.
    """
    directory = Path(directory)
    path, content = directory / RESULTS, read_results(directory)
    try:
        name, config, environment = str(content["name"]), dict(content["config"]), dict(content["environment"])
        results = Results.from_json(content["results"])
        alone = None
        if results.baseline is not None:
            alone = tuple(float(x) for x in results.baseline)
        elif baseline is not None:
            alone = tuple(row[j] for j, row in enumerate(baseline.matrix))
        run = Run(directory, name, config, environment, results, alone)
        if alone is None or len(alone) >= len(results.tasks):
            _ = run.scores
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FasthyperError(
            f"{path} is damaged ({error!r:.200}): `fasthyper run RECIPE --out DIR` makes a new one"
        ) from error
    if not results.tasks:
        raise FasthyperError(f"{path} holds no finished task yet: go on with `fasthyper run RECIPE --out {directory}`")
    if alone is not None and len(alone) < len(results.tasks):
        raise FasthyperError(f"{path} has {len(results.tasks)} tasks, its baseline {len(alone)}: give one of as many")
    if baseline is not None and baseline.measure != run.measure:
        raise FasthyperError(
            f"{path} is in {run.measure}, the baseline {baseline.directory} in {baseline.measure}: give one in {run.measure}"
        )
    return run


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in nothing but their seed together, in the order given; a directory given twice counts once.

    A seed that a group has already begins another group, and so does a run without one: neither is a new sample.
    """
    found: list[list[Run]] = []
    once: dict[Path, Run] = {}
    for run in runs:
        once.setdefault(run.directory.resolve(), run)
    for run in once.values():
        for group in found:
            seeds = [other.seed for other in group]
            if _same(run) == _same(group[0]) and None not in (run.seed, *seeds) and run.seed not in seeds:
                group.append(run)
                break
        else:
            found.append([run])
    return [Group(tuple(group), _settings(group[0], [other[0] for other in found])) for group in found]


def _same(run: Run) -> str:
    settings = {key: value for key, value in run.config.items() if key != "seed"}
    return json.dumps([run.name, run.measure, len(run.results.tasks), settings], sort_keys=True)


def _settings(run: Run, runs: Sequence[Run]) -> str:
    """The settings in which runs of that name differ."""
    named = [other.config for other in runs if other.name == run.name]
    keys = [key for key in run.config if key != "seed" and len({plain(config.get(key)) for config in named}) > 1]
    return ", ".join(f"{key}={plain(run.config[key])}" for key in keys)


def plain(value: Any) -> str:
    """As the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def as_json(groups: Sequence[Group]) -> dict[str, Any]:
    """All scores of all runs, with their definitions; what was not measured is ``None``."""
    return {
        "format": "fasthyper-report-1",
        "definitions": {
            score.key: {
                "label": score.label,
                "definition": score.definition,
                "unit": RAW_UNITS.get(score.key, "of the measure"),
            }
            for score in SCORES
        },
        "notation": "R[i,j]: on task j after task i; accuracies are fractions; differences of an error are of minus R",
        "groups": [
            {
                "name": group.name,
                "settings": group.settings,
                "measure": group.measure,
                "tasks": group.size,
                "scores": {s.key: {"mean": _known(group.mean(s.key)), "sem": _known(group.sem(s.key))} for s in SCORES},
                "runs": [_run_json(run) for run in group.runs],
            }
            for group in groups
        ],
    }


def _run_json(run: Run) -> dict[str, Any]:
    lags = metrics.memory_lifetime(run.matrix)
    return {
        "directory": str(run.directory),
        "name": run.name,
        "seed": run.seed,
        "scores": {score.key: _known(run.scores[score.key]) for score in SCORES},
        "just_after_learning": [_known(row[j]) for j, row in enumerate(run.matrix)],
        "at_the_end": [_known(x) for x in run.matrix[-1]],
        "average_so_far": [_known(x) for x in metrics.average_so_far(run.matrix)],
        "memory_lifetime": [sum(values) / len(values) if values else None for values in lags],
        "learned_alone": None if run.baseline is None else [_known(x) for x in run.baseline],
        "seconds": [task.seconds for task in run.results.tasks],
        "config": run.config,
        "environment": run.environment,
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
