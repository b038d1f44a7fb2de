"""Runs recipes: makes stream and trainer, or finds the trainer in its directory; trains, and evaluates as it goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasthyper import nets, streams
from fasthyper.checkpoint import SAMPLES, claim, holds_run, read_results, write
from fasthyper.distributed import Ranks
from fasthyper.errors import CheckpointError, RecipeError
from fasthyper.hypernet import ChunkedHypernet
from fasthyper.loggers import Logger
from fasthyper.metrics import MEASURES, accuracy_interval
from fasthyper.recipes.file import of
from fasthyper.recipes.recipe import Recipe
from fasthyper.replay import HnetR, HnetTIR
from fasthyper.replay_model import ReplayModel
from fasthyper.streams.fetch import fetch
from fasthyper.streams.stream import SCENARIOS
from fasthyper.trainer import Trainer

STREAMS: dict[str, Callable[[Recipe], streams.Stream]] = {
    "permuted-mnist": lambda r: streams.permuted_mnist(
        r.num_tasks, r.seed, base=r.base, pool=r.pool, padding=r.padding, data_dir=r.data_dir
    ),
    "split-mnist": lambda r: streams.split_mnist(r.num_tasks, r.seed, base=r.base, pool=r.pool, data_dir=r.data_dir),
    "permuted-digits": lambda r: streams.permuted_digits(r.num_tasks, r.seed),
    "split-cifar-10": lambda r: streams.split_cifar10(r.num_tasks, augment=r.augment, data_dir=r.data_dir),
    "split-cifar-10-100": lambda r: streams.split_cifar10_100(r.num_tasks, augment=r.augment, data_dir=r.data_dir),
    "toy-regression": lambda r: streams.toy_regression(r.num_tasks, r.seed),
    "f-celeba": lambda r: streams.f_celeba(r.num_tasks, r.seed, data_dir=r.data_dir),
}
TARGETS: dict[str, Callable[[Recipe, int, int], nn.Module]] = {
    "mlp": lambda r, num_inputs, num_outputs: nets.MLP(
        num_inputs, r.target_hidden, num_outputs, activation=r.target_activation
    ),
    "resnet32": lambda r, num_inputs, num_outputs: nets.resnet32(num_outputs),
    "zenkenet": lambda r, num_inputs, num_outputs: nets.ZenkeNet(num_outputs),
}


Runner = Trainer | HnetTIR | HnetR  # what trains a recipe: all fit, evaluate, save and have results

HNET = ("chunk_size", "hidden", "task_dim", "chunk_dim", "activation", "layout", "init", "embedding_std", "seed")
TRAINER = (
    *("lr", "lr_embedding", "schedule", "beta", "lookahead", "reg_tasks", "reg_per_chunk", "plastic", "embedding_init"),
    *("optimizer", "loss", "seed", "temperature"),
)
CHOICES: dict[str, Collection[str]] = {
    "stream": STREAMS,
    "target": TARGETS,
    "scenario": SCENARIOS,
    "method": ("entropy", "gradient", "tir", "replay"),
}
SAMPLES_PER_TASK = 12  # images that a replay model's run shows of each task


def run(
    recipe: Recipe,
    out: Path,
    progress: bool = True,
    log: Callable[[str], None] = print,
    loggers: Callable[[], Sequence[Logger]] = list,
    device: str | None = None,
    ranks: Ranks | None = None,
    **options: Any,
) -> Runner:
    """Trains ``recipe`` into ``out``, or goes on with it; evaluates the tasks so far after each one.

    ``loggers`` makes the trainer's loggers, once ``out`` is known to be ours; they are closed at the end. ``device``: where
    to train; ``None``: on a GPU, if there is one. ``ranks``: as ``Trainer`` has them. ``options``: ``save_every``,
    ``on_nonfinite`` and ``memory_budget`` of ``Trainer``, which a run may be gone on with otherwise.

    Raises:
        ValueError: a setting that cannot be, or several ranks for HNET+TIR or HNET+R.  DataError: the data cannot be had.
        CheckpointError: ``out`` holds something else, or the same recipe with other settings.
    """
    for what, known in CHOICES.items():
        if getattr(recipe, what) not in known:
            raise ValueError(f"unknown {what} {getattr(recipe, what)!r}; choose from {', '.join(known)}")
    ranks = ranks or Ranks()
    if ranks.count > 1 and class_of(recipe) is not Trainer:
        raise ValueError(f"method {recipe.method!r} trains in one process, not in {ranks.count}: run it without torchrun")
    if ranks.is_first:
        claim(out, recipe.name)

    def make_stream() -> streams.Stream:
        if recipe.stream.endswith("-mnist"):
            fetch(recipe.base, recipe.data_dir, log)  # a first download takes a while, and says what it does
        return STREAMS[recipe.stream](recipe)

    stream = ranks.first_then_others(make_stream)
    options |= {"out": out, "progress": progress, "device": device or ("cuda" if torch.cuda.is_available() else "cpu")}
    options |= {"ranks": ranks} if ranks.count > 1 else {}
    is_there = ranks.any(ranks.is_first and holds_run(out))
    runner = _resumed(recipe, out, options) if is_there else _new(recipe, stream, options)
    done = len(runner.results.tasks)
    if done == len(stream):
        log(f"{out} holds all {done} tasks already; nothing to train")
    elif is_there:
        into = f", {runner.current_step} steps into the next" if isinstance(runner, Trainer) else ""
        log(f"going on in {out}: {done} of {len(stream)} tasks are done{into}")
    runner.loggers = list(loggers()) if done < len(stream) and ranks.is_first else []
    try:
        if done and (done - 1) not in runner.results.accuracy:
            runner.evaluate(_due(recipe, stream, done))
        for task in stream[done:]:
            steps = recipe.steps if recipe.epochs is None else recipe.epochs * max(1, len(task.train) // recipe.batch_size)
            runner.fit(task, steps=steps, batch_size=recipe.batch_size)
            found = runner.evaluate(_due(recipe, stream, task.index + 1))
            measure = MEASURES[runner.results.measure]
            mean = f", mean over {len(found)} tasks {measure.text(sum(found) / len(found))}" if len(found) > 1 else ""
            log(f"    {runner.results.measure} {measure.text(found[-1])}{mean}")
        runner.flush()
    finally:
        for logger in runner.loggers:
            logger.close()
    if not isinstance(runner, Trainer) and not (out / SAMPLES).exists():
        write(out / SAMPLES, {"samples": runner.sample(SAMPLES_PER_TASK)}, "fasthyper-samples-1")
    if recipe.stream == "f-celeba":
        log(_beside_the_baseline(runner, stream))
    return runner


def evaluate(directory: Path, infer: bool | str | None = None, temperature: float | None = None) -> dict[str, float]:
    """What a run reaches now on its tasks so far, by their names; the run stays as it is.

    ``infer``, ``temperature``: as ``Trainer.evaluate`` has them; ``None``: as the recipe has them.

    Raises:
        CheckpointError: there is no run, or one that no recipe made.  ValueError: either of HNET+TIR or HNET+R.
    """
    try:
        recipe = of(str(directory), read_results(directory)["config"])
        if recipe.stream not in STREAMS:
            raise RecipeError(f"unknown stream {recipe.stream!r}")
    except (TypeError, KeyError, AttributeError, RecipeError) as error:
        raise CheckpointError(f"{directory} holds a run that no recipe of this version made: use fh.Trainer.load") from error
    runner: Runner = class_of(recipe).load(directory, progress=False)
    tasks = STREAMS[recipe.stream](recipe)[: len(runner.results.tasks)]
    if isinstance(runner, Trainer):
        found = runner.evaluate(tasks, infer=infer, temperature=temperature)
    elif infer is None and temperature is None:
        found = runner.evaluate(tasks)
    else:
        own = f"{directory} holds a run of {recipe.method!r}, which finds tasks its own way"
        raise ValueError(f"{own}: leave out --infer and --temperature")
    return dict(zip([task.name for task in tasks], found, strict=True))


def _beside_the_baseline(runner: Runner, stream: streams.Stream) -> str:
    """The mean accuracy with its interval, and what the same answer for all would reach."""
    percent = MEASURES["accuracy"].text
    sizes, last = [len(task.test) for task in stream], runner.results.matrix[-1]
    right = round(sum(size * accuracy for size, accuracy in zip(sizes, last, strict=True)))
    low, high = (percent(bound, False) for bound in accuracy_interval(right, sum(sizes)))
    same, total = streams.constant_baseline(stream)
    return (
        f"{percent(right / sum(sizes))} of {sum(sizes)} test images, 95 % interval {low} to {high} (Wilson); "
        f"the same answer for all: {percent(same / total)}"
    )


def _due(recipe: Recipe, stream: streams.Stream, done: int) -> streams.Stream:
    """The tasks to evaluate when so many are done."""
    return stream[:done] if done % recipe.evaluate_every == 0 or done == len(stream) else stream[done - 1 : done]


def _resumed(recipe: Recipe, out: Path, options: dict[str, Any]) -> Runner:
    """What ``out`` holds: a run of the same settings."""
    runner: Runner = class_of(recipe).load(out, **options)
    if other := differences(runner.config["settings"] or {}, settings(recipe)):
        raise CheckpointError(f"{out} holds a run with other settings ({other}); name another directory")
    return runner


def class_of(recipe: Recipe) -> type[Trainer] | type[HnetTIR] | type[HnetR]:
    """What trains it. Where tasks are told, nothing has to tell them: HNET+TIR is the trainer alone."""
    if recipe.method == "replay":
        return HnetR
    return HnetTIR if recipe.method == "tir" and recipe.scenario != "task" else Trainer


def settings(recipe: Recipe) -> dict[str, Any]:
    """What a run keeps of its recipe, JSON-ready."""
    return json.loads(json.dumps({key: value for key, value in asdict(recipe).items() if key != "published"}))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Which settings are others in a directory than asked for, in words; a field it was written without had its default."""
    then = settings(Recipe("", "", "")) | dict(there) if there else {}
    return "; ".join(f"{key} is {then.get(key)} there, {new} here" for key, new in here.items() if then.get(key) != new)


def _new(recipe: Recipe, stream: streams.Stream, options: dict[str, Any]) -> Runner:
    num_inputs, num_classes = stream[0].train.shape[1:].numel(), stream[0].num_classes
    common, device = {"name": recipe.name, "settings": settings(recipe), **options}, options["device"]
    del common["device"]
    of_part: dict[str, Any] = {key: options[key] for key in ("progress", "on_nonfinite", "memory_budget") if key in options}
    alone = class_of(recipe) is Trainer
    if class_of(recipe) is not HnetR:
        trainer = Trainer(
            build(recipe, num_inputs, num_classes),
            device=device,
            infer=recipe.method if alone and recipe.scenario != "task" else None,
            optimizer_options={"betas": (recipe.adam_beta1, 0.999)} if recipe.adam_beta1 != 0.9 else None,
            **{key: getattr(recipe, key) for key in TRAINER},
            **(common if alone else of_part),
        )
    if alone:
        return trainer
    common.pop("memory_budget", None)
    learning: dict[str, Any] = {"lr": recipe.lr, "schedule": recipe.schedule, "seed": recipe.seed}
    held: dict[str, Any] = {"beta": recipe.replay_beta, "lr_embedding": recipe.lr_embedding, "lookahead": recipe.lookahead}
    replay = ReplayModel(build_replay(recipe, num_inputs), device=device, **held, **learning, **of_part)
    if class_of(recipe) is HnetTIR:
        net = nets.xavier_(nets.MLP(num_inputs, recipe.target_hidden, recipe.num_tasks), recipe.seed)
        return HnetTIR(replay, net, trainer, **learning, **common)
    num_outputs = num_classes * (1 if recipe.scenario == "domain" else recipe.num_tasks)
    net = nets.xavier_(nets.MLP(num_inputs, recipe.target_hidden, num_outputs), recipe.seed)
    return HnetR(replay, net, scenario=recipe.scenario, classes=num_classes, **learning, **common)


def build_replay(recipe: Recipe, num_inputs: int) -> ChunkedHypernet:
    """The hypernetwork of a recipe's decoders; the last task is never replayed."""
    vae = nets.VAE(num_inputs, recipe.target_hidden, recipe.replay_hidden)
    return ChunkedHypernet(
        nets.xavier_(vae, recipe.seed),
        recipe.num_tasks - 1,
        chunk_size=recipe.replay_chunk_size,
        hidden=recipe.hidden,
        task_dim=recipe.task_dim,
        chunk_dim=recipe.chunk_dim,
        activation="elu",
        init=recipe.init,
        embedding_std=recipe.embedding_std,
        generate="decoder.*",
        rest="trained",
        seed=recipe.seed,
    )


def build(recipe: Recipe, num_inputs: int, num_classes: int) -> ChunkedHypernet:
    """The hypernetwork of a recipe, for examples of so many numbers, each task of so many classes (or values to predict)."""
    num_outputs = max(1, num_classes) * (recipe.num_tasks if recipe.heads else 1)  # a regression has no classes
    return ChunkedHypernet(
        TARGETS[recipe.target](recipe, num_inputs, num_outputs),
        recipe.num_tasks,
        outputs_per_task=num_classes if recipe.heads else None,
        **{key: getattr(recipe, key) for key in HNET},
    )
