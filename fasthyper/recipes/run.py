"""Runs recipes: makes stream and trainer, or finds the trainer in its directory; trains, and evaluates as it goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from torch import nn

from fasthyper import nets, streams
from fasthyper.checkpoint import CHECKPOINT, claim
from fasthyper.errors import CheckpointError
from fasthyper.hypernet import ChunkedHypernet
from fasthyper.loggers import Logger
from fasthyper.recipes.recipe import Recipe
from fasthyper.streams.fetch import fetch
from fasthyper.trainer import Trainer

STREAMS: dict[str, Callable[[Recipe], streams.Stream]] = {
    "permuted-mnist": lambda r: streams.permuted_mnist(r.num_tasks, r.seed, base=r.base, pool=r.pool, data_dir=r.data_dir),
    "split-mnist": lambda r: streams.split_mnist(r.num_tasks, r.seed, base=r.base, pool=r.pool, data_dir=r.data_dir),
    "permuted-digits": lambda r: streams.permuted_digits(r.num_tasks, r.seed),
}
TARGETS: dict[str, Callable[[Recipe, int, int], nn.Module]] = {
    "mlp": lambda r, num_inputs, num_outputs: nets.MLP(num_inputs, r.target_hidden, num_outputs),
    "resnet32": lambda r, num_inputs, num_outputs: nets.resnet32(num_outputs),
    "zenkenet": lambda r, num_inputs, num_outputs: nets.ZenkeNet(num_outputs),
}


def run(
    recipe: Recipe,
    out: Path,
    progress: bool = True,
    log: Callable[[str], None] = print,
    loggers: Callable[[], Sequence[Logger]] = list,
) -> Trainer:
    """Trains ``recipe`` into ``out``, or goes on with it; evaluates the tasks so far after each one.

    ``loggers`` makes the trainer's loggers, once ``out`` is known to be ours; they are closed at the end.

    Raises:
        ValueError: a setting that cannot be.  DataError: the data cannot be had.
        CheckpointError: ``out`` holds something else, or the same recipe with other settings.
    """
    for what, table in (("stream", STREAMS), ("target", TARGETS)):
        if getattr(recipe, what) not in table:
            raise ValueError(f"unknown {what} {getattr(recipe, what)!r}; choose from {', '.join(table)}")
    claim(out, recipe.name)
    if recipe.stream.endswith("-mnist"):
        fetch(recipe.base, recipe.data_dir, log)  # a first download takes a while, and says what it does
    stream = STREAMS[recipe.stream](recipe)
    trainer = _trainer(recipe, stream, out, progress)
    done = len(trainer.results.tasks)
    if done == len(stream):
        log(f"{out} holds all {done} tasks already; nothing to train")
    elif done or trainer.current_step:
        log(f"going on in {out}: {done} of {len(stream)} tasks are done, {trainer.current_step} steps into the next")
    trainer.loggers = list(loggers()) if done < len(stream) else []
    try:
        if done and (done - 1) not in trainer.results.accuracy:
            trainer.evaluate(_due(recipe, stream, done))
        for task in stream[done:]:
            steps = recipe.steps if recipe.epochs is None else recipe.epochs * max(1, len(task.train) // recipe.batch_size)
            trainer.fit(task, steps=steps, batch_size=recipe.batch_size)
            accuracies = trainer.evaluate(_due(recipe, stream, task.index + 1))
            mean = sum(accuracies) / len(accuracies)
            over = f", mean over {len(accuracies)} tasks {100 * mean:.2f} %" if len(accuracies) > 1 else ""
            log(f"    accuracy {100 * accuracies[-1]:.2f} %{over}")
    finally:
        for logger in trainer.loggers:
            logger.close()
    return trainer


def _due(recipe: Recipe, stream: streams.Stream, done: int) -> streams.Stream:
    """The tasks to evaluate when so many are done."""
    return stream[:done] if done % recipe.evaluate_every == 0 or done == len(stream) else stream[done - 1 : done]


def _trainer(recipe: Recipe, stream: streams.Stream, out: Path, progress: bool) -> Trainer:
    """The trainer saved in ``out`` if there is one, of the same settings; else a new one."""
    settings = json.loads(json.dumps({key: value for key, value in asdict(recipe).items() if key != "published"}))
    if (out / CHECKPOINT).exists():
        trainer = Trainer.load(out, out=out, progress=progress)
        found = trainer.config["settings"] or {}
        other = [f"{key} is {found.get(key)} there, {new} here" for key, new in settings.items() if found.get(key) != new]
        if other:
            raise CheckpointError(f"{out} holds a run with other settings ({'; '.join(other)}); name another directory")
        return trainer
    hnet = build(recipe, stream[0].train.shape[1:].numel(), stream[0].num_classes)
    return Trainer(
        hnet,
        out=out,
        name=recipe.name,
        settings=settings,
        progress=progress,
        infer=None if recipe.scenario == "task" else recipe.method,
        **{key: getattr(recipe, key) for key in TRAINER},
    )


def build(recipe: Recipe, num_inputs: int, num_classes: int) -> ChunkedHypernet:
    """The hypernetwork of a recipe, for examples of so many numbers, each task of so many classes (or values to predict)."""
    num_outputs = num_classes * (recipe.num_tasks if recipe.heads else 1)
    return ChunkedHypernet(
        TARGETS[recipe.target](recipe, num_inputs, num_outputs),
        recipe.num_tasks,
        outputs_per_task=num_classes if recipe.heads else None,
        **{key: getattr(recipe, key) for key in HNET},
    )


HNET = ("chunk_size", "hidden", "task_dim", "chunk_dim", "activation", "layout", "seed")
TRAINER = (*("lr", "schedule", "beta", "lookahead", "reg_tasks", "plastic", "embedding_init", "optimizer", "seed"),)
