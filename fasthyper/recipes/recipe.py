"""What a recipe is, and how it is run or gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fasthyper import nets, streams
from fasthyper.checkpoint import CHECKPOINT, claim
from fasthyper.errors import CheckpointError
from fasthyper.hypernet import ChunkedHypernet
from fasthyper.loggers import Logger
from fasthyper.streams.fetch import fetch
from fasthyper.trainer import Trainer


@dataclass(frozen=True)
class Recipe:
    """One experiment. Every field but the first three can be set on the command line.

    ``outputs_per_task``: each task has its own output head of that size; ``None``: all share ``num_outputs``.
    """

    name: str
    about: str
    source: str
    stream: str = "permuted-mnist"
    num_tasks: int = 10
    data_dir: str | None = None
    num_inputs: int = 1024
    target_hidden: tuple[int, ...] = (1000, 1000)
    num_outputs: int = 10
    outputs_per_task: int | None = None
    chunk_size: int | None = 78_000
    hidden: tuple[int, ...] = (25, 25)
    task_dim: int = 24
    chunk_dim: int = 8
    activation: str = "elu"
    layout: str = "flat"
    steps: int = 5000
    batch_size: int = 128
    lr: float = 1e-4
    beta: float = 0.1
    lookahead: bool = True
    reg_tasks: int | None = None
    plastic: bool = False
    optimizer: str = "adam"
    seed: int = 42


STREAMS: dict[str, Callable[[Recipe], streams.Stream]] = {
    "permuted-mnist": lambda r: streams.permuted_mnist(r.num_tasks, r.seed, data_dir=r.data_dir),
    "split-mnist": lambda r: streams.split_mnist(r.num_tasks, data_dir=r.data_dir),
    "permuted-digits": lambda r: streams.permuted_digits(r.num_tasks, r.seed),
}


def run(
    recipe: Recipe,
    out: Path,
    progress: bool = True,
    log: Callable[[str], None] = print,
    loggers: Callable[[], Sequence[Logger]] = list,
) -> Trainer:
    """Trains ``recipe`` into ``out``, or goes on with it; evaluates all tasks so far after each one.

    ``loggers`` makes the trainer's loggers, once ``out`` is known to be ours; they are closed at the end.

    Raises:
        ValueError: a setting that cannot be.  DataError: the data cannot be had.
        CheckpointError: ``out`` holds something else, or the same recipe with other settings.
    """
    if recipe.stream not in STREAMS:
        raise ValueError(f"unknown stream {recipe.stream!r}; choose from {', '.join(STREAMS)}")
    claim(out, recipe.name)
    if recipe.stream.endswith("-mnist"):
        fetch("mnist", recipe.data_dir, log)  # a first download takes a while, and says what it does
    trainer = _trainer(recipe, out, progress)
    stream = STREAMS[recipe.stream](recipe)
    done = len(trainer.results.tasks)
    if done == len(stream):
        log(f"{out} holds all {done} tasks already; nothing to train")
    elif done or trainer.current_step:
        log(f"going on in {out}: {done} of {len(stream)} tasks are done, {trainer.current_step} steps into the next")
    trainer.loggers = list(loggers()) if done < len(stream) else []
    try:
        if done and (done - 1) not in trainer.results.accuracy:
            trainer.evaluate(stream[:done])
        for task in stream[done:]:
            trainer.fit(task, steps=recipe.steps, batch_size=recipe.batch_size)
            accuracies = trainer.evaluate(stream[: task.index + 1])
            mean = sum(accuracies) / len(accuracies)
            log(f"    accuracy {100 * accuracies[-1]:.2f} %, mean over {len(accuracies)} tasks {100 * mean:.2f} %")
    finally:
        for logger in trainer.loggers:
            logger.close()
    return trainer


def _trainer(recipe: Recipe, out: Path, progress: bool) -> Trainer:
    """The trainer saved in ``out`` if there is one, of the same settings; else a new one."""
    settings = json.loads(json.dumps(asdict(recipe)))
    if (out / CHECKPOINT).exists():
        trainer = Trainer.load(out, out=out, progress=progress)
        found = trainer.config["settings"] or {}
        other = [f"{key} is {found.get(key)} there, {new} here" for key, new in settings.items() if found.get(key) != new]
        if other:
            raise CheckpointError(f"{out} holds a run with other settings ({'; '.join(other)}); name another directory")
        return trainer
    hnet = ChunkedHypernet(
        nets.MLP(recipe.num_inputs, recipe.target_hidden, recipe.num_outputs),
        recipe.num_tasks,
        chunk_size=recipe.chunk_size,
        hidden=recipe.hidden,
        task_dim=recipe.task_dim,
        chunk_dim=recipe.chunk_dim,
        activation=recipe.activation,
        outputs_per_task=recipe.outputs_per_task,
        layout=recipe.layout,
        seed=recipe.seed,
    )
    return Trainer(
        hnet,
        lr=recipe.lr,
        beta=recipe.beta,
        lookahead=recipe.lookahead,
        reg_tasks=recipe.reg_tasks,
        plastic=recipe.plastic,
        optimizer=recipe.optimizer,
        seed=recipe.seed,
        out=out,
        name=recipe.name,
        settings=settings,
        progress=progress,
    )
