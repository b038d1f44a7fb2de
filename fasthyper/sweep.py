"""Settings tried one after the other by any number of processes that share a directory: Optuna, and an entry for Ray Tune.

A sweep's directory holds Optuna's journal, from which every worker knows the trials of all, and a run's directory for each
trial. Who runs a trial holds a lock that the kernel drops when its process ends, however it ends: so other workers see which
trials were left behind, and go on with them from their checkpoints.
"""

from __future__ import annotations

import fcntl
import math
import os
import shlex
import shutil
import signal
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasthyper.checkpoint import settle
from fasthyper.errors import CheckpointError, MissingPackageError, NonFiniteLossError
from fasthyper.loggers import Logger
from fasthyper.losses import LOSSES
from fasthyper.metrics import MEASURES, Results
from fasthyper.recipes import RECIPES, Recipe, differences, run, settings
from fasthyper.recipes.fields import FIELDS, converter, kind, text

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

JOURNAL, LOCKS = "journal.log", "locks"
_SHAPES = "log:LOW:HIGH, LOW:HIGH, int:LOW:HIGH or choice:A,B,..."
_STARTUP = 5  # trials that none is compared with before they are there
_SHOWN = 10  # trials in a summary


@dataclass(frozen=True)
class Parameter:
    """A field of a recipe and the values to try: numbers from ``low`` to ``high``, or ``choices``, as texts."""

    name: str
    range: str
    low: float = 0
    high: float = 0
    log: bool = False
    whole: bool = False
    choices: tuple[str, ...] = ()

    @classmethod
    def parse(cls, argument: str) -> Parameter:
        """From ``FIELD=RANGE``; a range is ``log:LOW:HIGH``, ``LOW:HIGH``, ``int:LOW:HIGH`` or ``choice:A,B,...``, with
        slashes in the place of commas where a value is a list itself: ``hidden=choice:25,25/50,50``.

        Raises:
            ValueError: no such field, no such range, or one that the field cannot have.
        """
        name, _, given = argument.partition("=")
        name = name.replace("-", "_")
        if name not in FIELDS:
            raise ValueError(f"unknown setting {name!r} to try; `fasthyper run --help` shows them")
        how, _, rest = given.partition(":")
        type_, _ = kind(name)
        if how == "choice":
            choices = tuple(filter(None, rest.split("/" if type_ is tuple else ",")))
            for choice in choices:
                converter(name)(choice)
            if not choices:
                raise ValueError(f"{argument!r} names no choices")
            return cls(name, given, choices=choices)
        if type_ not in (int, float):
            raise ValueError(f"{name} is no number: give choices, {name}=choice:...")
        whole = how == "int" or type_ is int
        bounds = (rest if how in ("log", "int") else given).split(":")
        try:
            low, high = (int(bound) if whole else float(bound) for bound in bounds)
        except ValueError as error:
            raise ValueError(f"{argument!r} is no range of {'integers' if whole else 'numbers'}: give {_SHAPES}") from error
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"{argument!r} must go from a lower to a higher number")
        if how == "log" and low <= 0:
            raise ValueError(f"{argument!r} must begin above 0 to be drawn by its logarithm")
        return cls(name, given, low, high, how == "log", whole)

    def draw(self, trial: Trial | FrozenTrial) -> Any:
        """What the trial has, or is given now. Numbers have four digits, so that a command line says all of them."""
        if self.choices:
            return converter(self.name)(trial.suggest_categorical(self.name, self.choices))
        if self.whole:
            return kind(self.name)[0](trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log))
        return float(f"{trial.suggest_float(self.name, self.low, self.high, log=self.log):.4g}")


class Sweep:
    """A sweep in its directory, new or gone on with; any number of processes may have it open.

    Its objective is the mean accuracy after the last task or, of a regression, the negative of the error.

    Args:
        recipe: what is trained.
        out: the directory; made if it is not there.
        parameters: what is tried.
        overrides: fields of the recipe that all trials share.
        prune: percent of the trials, the worst by the task just learned, that are given up after it; 0: none.

    Raises:
        MissingPackageError: Optuna is not installed.  ValueError: a parameter is given twice.
        CheckpointError: ``out`` holds something else, a sweep of something else, or is damaged.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        parameters: Sequence[Parameter],
        overrides: Mapping[str, Any] | None = None,
        *,
        prune: float = 25,
    ):
        self.overrides = dict(overrides or {})
        self.recipe, self.out, self.parameters = replace(recipe, **self.overrides), out, list(parameters)
        names = [parameter.name for parameter in parameters]
        if len(set(names)) < len(names) or set(names) & set(self.overrides):
            raise ValueError(f"each setting can be given once, got {', '.join([*names, *self.overrides])}")
        if out.is_dir() and any(out.iterdir()) and not (out / JOURNAL).exists():
            raise CheckpointError(f"{out} is not empty and holds no sweep; name another directory")
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._locks = _Locks(out / LOCKS)
        except OSError as error:
            raise CheckpointError(f"cannot write to {out}: {error.strerror}") from error
        self.measure = MEASURES[LOSSES[self.recipe.loss].measure] if self.recipe.loss in LOSSES else MEASURES["accuracy"]
        self._study = self._open(prune)

    @property
    def done(self) -> int:
        """Trials that have ended."""
        return sum(trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False))

    def work(
        self, trials: int, log: Callable[[str], None] = print, device: str | None = None, *, parent: int | None = None
    ) -> None:
        """Runs trials until there are as many in all, those of other workers among them, or the process ``parent`` ends.

        Raises:
            ValueError, FasthyperError: of a setting that cannot be, or of the data; the trial has failed, others are kept.
            KeyboardInterrupt: the trial is gone on with when the sweep is.
        """
        while parent in (None, os.getppid()) and (trial := self._next(trials)) is not None:
            try:
                log(f"trial {trial.number}: {self._run(trial, device, parent)}  {_listed(self._drawn(trial))}")
            finally:
                self._locks.free(trial.number + 1)

    def directory(self, number: int) -> Path:
        """Of the run of a trial."""
        return self.out / f"trial-{number:03}"

    def command(self, trial: FrozenTrial) -> str:
        """The command that trains what a trial trained."""
        given = {**self.overrides, **self._drawn(trial)}
        words = [f"--{name.replace('_', '-')} {shlex.quote(text(value))}" for name, value in given.items()]
        return " ".join(["fasthyper run", self.recipe.name, *words])

    def ranking(self) -> list[FrozenTrial]:
        """The trials that were trained to their end, the best first."""
        trials = [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
        return sorted(trials, key=lambda trial: -(trial.value or 0))

    def summary(self) -> str:
        """The best trials as a table, and the best one's command, as plain text."""
        counts = {
            "COMPLETE": "trained",
            "PRUNED": "given up",
            "FAIL": "failed",
            "RUNNING": "unfinished",
            "WAITING": "waiting",
        }
        states = [counts[trial.state.name] for trial in self._study.get_trials(deepcopy=False)]
        lines = [f"\n{', '.join(f'{states.count(state)} {state}' for state in counts.values() if state in states)}"]
        best = self.ranking()
        if not best:
            return "\n".join([*lines, "no trial was trained to its end"])
        names = [parameter.name for parameter in self.parameters]
        rows = [["trial", self.measure.key, *names]]
        for trial in best[:_SHOWN]:
            drawn = self._drawn(trial)
            rows.append([str(trial.number), self._text(trial.value), *(text(drawn[name]) for name in names)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, "", f"best, in {self.directory(best[0].number)}:", self.command(best[0])])

    def to_json(self) -> dict[str, Any]:
        """All trials that have ended, and the number, the objective and the command of the best."""
        best = self.ranking()[:1]
        return {
            "recipe": self.recipe.name,
            "measure": self.measure.key,
            "best": {"trial": best[0].number, "value": best[0].value, "command": self.command(best[0])} if best else None,
            "trials": [
                {
                    "number": trial.number,
                    "state": trial.state.name.lower(),
                    "value": trial.value,
                    "parameters": self._drawn(trial),
                    "directory": str(self.directory(trial.number)),
                }
                for trial in self._study.get_trials(deepcopy=False)
                if trial.state.is_finished()
            ],
        }

    def _open(self, prune: float) -> Study:
        optuna = _optuna()
        facts = {**settings(self.recipe), "parameters": {p.name: p.range for p in self.parameters}}
        pruner = (
            optuna.pruners.PercentilePruner(100 - prune, n_startup_trials=_STARTUP) if prune else optuna.pruners.NopPruner()
        )
        self._locks.hold(0)
        try:
            backend = optuna.storages.journal.JournalFileBackend(str((self.out / JOURNAL).resolve()))
            storage = optuna.storages.JournalStorage(backend)
            options = {"study_name": "fasthyper", "direction": "maximize", "load_if_exists": True}
            study = optuna.create_study(storage=storage, pruner=pruner, **options)
            found = study.user_attrs.get("sweep")
            if found is None:
                study.set_user_attr("sweep", facts)
        except (KeyError, ValueError, AssertionError) as error:
            raise CheckpointError(f"{self.out / JOURNAL} is damaged: {error}") from error
        finally:
            self._locks.free(0)
        if found is not None and (other := differences(found, facts)):
            raise CheckpointError(f"{self.out} holds another sweep ({other}); name another directory")
        return study

    def _next(self, trials: int) -> Trial | None:
        """A trial that its worker left behind, or a new one, its parameters drawn; its lock is held."""
        optuna = _optuna()
        self._locks.hold(0)
        try:
            known = self._study.get_trials(deepcopy=False)
            for left in known:
                if not left.state.is_finished() and self._locks.take(left.number + 1):
                    return optuna.Trial(self._study, left._trial_id)
            if len(known) >= trials:
                return None
            # of the number of trials, so that a sweep that was interrupted draws what it would have
            self._study.sampler = optuna.samplers.TPESampler(seed=self.recipe.seed + len(known), constant_liar=True)
            trial = self._study.ask()
            self._locks.take(trial.number + 1)
            self._drawn(trial)
            return trial
        finally:
            self._locks.free(0)

    def _drawn(self, trial: Trial | FrozenTrial) -> dict[str, Any]:
        return {parameter.name: parameter.draw(trial) for parameter in self.parameters}

    def _run(self, trial: Trial, device: str | None, parent: int | None) -> str:
        """Trains a trial, or goes on with it, and tells the study how it ended; also in words."""
        optuna = _optuna()
        recipe = replace(self.recipe, **self._drawn(trial))
        watch = _Watch(self._study, trial, self.measure.is_error, recipe.num_tasks, parent)
        options: dict[str, Any] = {"log": watch.saved, "loggers": lambda: [watch], "device": device}
        state = optuna.trial.TrialState
        try:
            results = run(recipe, self.directory(trial.number), progress=False, **options).results
        except optuna.TrialPruned:
            self._study.tell(trial, state=state.PRUNED)
            return f"given up after {watch.trained + 1} of {recipe.num_tasks} tasks"
        except NonFiniteLossError as error:
            trial.set_user_attr("error", str(error))
            self._study.tell(trial, state=state.FAIL)
            return f"failed: {error}"
        except Exception as error:
            trial.set_user_attr("error", str(error))
            self._study.tell(trial, state=state.FAIL)
            raise
        value = self._objective(results)
        self._study.tell(trial, value)
        return f"{self.measure.key} {self._text(value)}"

    def _objective(self, results: Results) -> float:
        value = results.scores()[self.measure.key]
        return -value if self.measure.is_error else value

    def _text(self, value: float | None) -> str:
        return self.measure.text(math.nan if value is None else abs(value))


class _Watch(Logger):
    """Reports the accuracy of each task just learned, gives up after it, and stops where the parent has ended."""

    def __init__(self, study: Study, trial: Trial, is_error: bool, num_tasks: int, parent: int | None):
        super().__init__(every=1)
        (self._known,) = (t.intermediate_values for t in study.get_trials(deepcopy=False) if t.number == trial.number)
        self._trial, self._sign, self._parent, self._due = trial, -1 if is_error else 1, parent, False
        self.trained, self._last = -1, num_tasks - 1

    def on_step(self, task: int, step: int, total: int, loss: float, drift: float) -> None:
        if self._parent not in (None, os.getppid()):
            os.kill(os.getpid(), signal.SIGINT)  # as one would: the state is saved

    def on_evaluate(self, trained: int, accuracies: Mapping[int, float], total: int) -> None:
        self.trained, self._due = trained, trained < self._last
        if trained not in self._known:
            self._trial.report(self._sign * accuracies[trained], trained)

    def saved(self, line: str) -> None:
        """``run`` says something: after an evaluation."""
        if self._due and self._trial.should_prune():
            raise _optuna().TrialPruned
        self._due = False


class _Locks:
    """A file whose bytes are locked: the first while a trial is chosen, byte n + 1 by who runs trial n."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT)
        weakref.finalize(self, os.close, self._file)

    def hold(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, byte)

    def take(self, byte: int) -> bool:
        """Whether it was free, and is held now."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def free(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)


def trainable(recipe: str | Recipe) -> Callable[[dict[str, Any]], None]:
    """What ``ray.tune.Tuner`` takes: trains a recipe with the fields that Ray draws, in the directory of Ray's trial.

    After each task Ray is told ``accuracy`` or ``mse``, the mean over the tasks evaluated, ``latest``, that of the task just
    learned, and ``tasks``, how many were learned; with it goes the run's directory as a checkpoint, from which the trial can
    go on on any machine.

    Raises:
        ValueError: there is no such recipe.
    """
    if isinstance(recipe, str) and recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; choose from {', '.join(RECIPES)}")
    base = RECIPES[recipe] if isinstance(recipe, str) else recipe

    def train(config: dict[str, Any]) -> None:
        from ray import tune

        directory = Path(tune.get_context().get_trial_dir()) / "run"
        if (kept := tune.get_checkpoint()) is not None and not directory.exists():
            with kept.as_directory() as found:
                shutil.copytree(found, directory)
        watch = _ForRay(directory)
        run(replace(base, **config), directory, progress=False, log=watch.saved, loggers=lambda: [watch])

    return train


class _ForRay(Logger):
    """Tells Ray Tune of each evaluation, once it is saved."""

    def __init__(self, directory: Path):
        super().__init__()
        self._directory, self._found = directory, dict[str, float]()

    def on_evaluate(self, trained: int, accuracies: Mapping[int, float], total: int) -> None:
        mean = sum(accuracies.values()) / len(accuracies)
        self._found = {self.measure: mean, "latest": accuracies[trained], "tasks": trained + 1}

    def saved(self, line: str) -> None:
        """As ``_Watch`` has it."""
        from ray import tune

        if self._found:
            settle(self._directory)  # Ray copies what lies there
            tune.report(self._found, checkpoint=tune.Checkpoint.from_directory(str(self._directory)))
            self._found = {}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {text(value)}" for name, value in values.items())


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingPackageError("optuna is not installed: pip install 'fasthyper[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
