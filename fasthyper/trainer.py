"""The training loop: a batch goes stream, generate, target, loss; old embeddings go trunk, drift; both meet in one step."""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fasthyper import checkpoint
from fasthyper.distributed import Part, Ranks
from fasthyper.environment import environment
from fasthyper.errors import FasthyperError, LostProcessError, NonFiniteLossError
from fasthyper.export import UNFIT, rebuild, unfit, with_prefix
from fasthyper.graph import RUNTIMES, Runtime, StepGraph
from fasthyper.hypernet import ChunkedHypernet
from fasthyper.inference import METHODS, accuracies_on, errors_on
from fasthyper.interrupt import deferred_interrupt, stopped_by
from fasthyper.loggers import Logger
from fasthyper.lookahead import look_ahead, make_capturable, take_step
from fasthyper.losses import LOSSES
from fasthyper.metrics import Results, TaskRecord, is_sampled, peak_memory
from fasthyper.progress import training_bar
from fasthyper.regularizer import OutputRegularizer
from fasthyper.streams import Task, TaskData, as_task_data
from fasthyper.streams.batches import Batches, derived_seed, to_device
from fasthyper.training import SCHEDULES, TaskInTraining, restore_rng, rng_tensors, total

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "sgd": (torch.optim.SGD, {"fused": True}),
    "rmsprop": (torch.optim.RMSprop, {}),
}
ON_NONFINITE = {"stop": 1, "skip": 10}  # what is not finite in so many steps in a row ends the training
_Self = TypeVar("_Self", bound="Trainer")


class Trainer:
    """Trains a hypernetwork on one task after the other, holding what it generates for the past ones (DESIGN E1, 2.6).

    Each step: g1 = gradient of the task loss; delta = the step the optimizer would take on g1 alone; g2 = beta times the
    gradient of the drift at theta + delta; theta steps on g1 + g2; the task's own embedding steps on the task loss, with an
    optimizer of its own. So do, at ``lr``, those of the target's parameters that are trained rather than generated; nothing
    holds them for past tasks. Optimizers are new for each task.

    Args:
        hnet: the hypernetwork; trained in place.
        lr: learning rate of theta.  lr_embedding: of the task embedding; ``None``: the same.
        beta: weight of the drift; 0 switches it off.
        lookahead: whether the drift is taken at theta + delta.
        reg_tasks: past tasks sampled for the drift in each step; ``None``: all.
        reg_per_chunk: whether each chunk has as many sampled for itself, at the same cost; see ``OutputRegularizer.draw``.
        plastic: whether past tasks' embeddings move, with theta's optimizer, to keep their weights in place.
        optimizer: a key of ``OPTIMIZERS``.  optimizer_options: more keyword arguments for it (``weight_decay``, ``betas``,
            ``momentum``, ...).
        schedule: of all learning rates within a task: ``"constant"``, or ``"cosine"``: in step s of n, counted from 0, they
            are ``(1 + cos(pi s / n)) / 2`` of what was given, also in the look-ahead; ``"warmup-cosine"``: that times
            ``min(1, 10 s / n)``, for the first steps of a new Adam move theta by all of ``lr``, whatever the gradient, and
            with it what past tasks generate. n are the steps planned.
        loss: of a task: ``"cross_entropy"``, for class numbers, or ``"mse"``, for floating-point targets.
        embedding_init: how the embedding of a new task begins: ``"normal"``, as drawn; ``"previous"``, as that of the last
            task that is not forgotten; ``"mean"``, as the mean over all of these.
        infer: how ``evaluate`` finds the tasks of examples, as its ``infer``; ``None``: they are told.
        temperature: of the outputs that ``infer`` looks at, as ``fh.infer_tasks`` has it.
        seed: of batches and of sampled tasks, which depend on it, the task and the step only.
        device: where to train; ``None``: where ``hnet`` is.
        graph: whether a step is one launch of a CUDA graph, captured anew for each task, with the same numbers; ``None``: on
            CUDA. Nothing then waits for the device: loss and drift are read, and loggers told, as they arrive, a tenth of a
            second late. So late is a loss that is not finite found, but nothing has changed since. The first steps of a task
            are run as they are, and so are all where they cannot be captured: with hooks in the hypernetwork or the target;
            with ``reg_tasks`` and output heads of the tasks' own; with a schedule and an optimizer other than Adam or AdamW;
            where the target puts another tensor in the place of a buffer; and, which is warned of, where it waits for the
            device or does something else that no graph can hold, as an LSTM of cuDNN does. Other Python code in its
            ``forward`` is not run again.
        out: directory for a checkpoint after every task and evaluation, every ``save_every`` seconds in a task, and on
            Ctrl-C and SIGTERM; ``None``: none is written. A thread of its own writes them, which ``flush`` and signals wait
            for. The one before stays beside the newest, as ``previous.safetensors``.
        save_every: seconds.
        on_nonfinite: what a loss, drift or gradient that is NaN or infinite does: ``"stop"``, or ``"skip"``: that update is
            left out and counted in the task's record, and the tenth in a row stops. Either way nothing has changed.
        memory_budget: bytes that the snapshot of past tasks may take, as ``OutputRegularizer`` has it.
        name: of the run, in reports.
        settings: JSON-ready facts to keep in checkpoints and reports, such as the recipe that made this trainer.
        progress: whether to show a bar.
        loggers: told of steps, finished tasks and evaluations; see ``fh.loggers``.
        ranks: of a job of several processes, ``fh.distributed.join()`` in each: all call the same methods on the same data,
            the first alone writes and shows anything, and each takes its share of the batch, of the past tasks and of the
            tasks to evaluate; what comes of it are the numbers of one process, to rounding. A target whose batch norm
            looks across the batch is run on all of it by each. Steps are run as they are, not as CUDA graphs.

    Raises:
        ValueError: unknown optimizer, schedule, ``on_nonfinite`` or ``embedding_init``, a negative number where none can be,
            or ``graph=True`` elsewhere than on CUDA or with several ranks.
    """

    def __init__(
        self,
        hnet: ChunkedHypernet,
        *,
        lr: float = 1e-3,
        beta: float = 0.01,
        lr_embedding: float | None = None,
        lookahead: bool = True,
        reg_tasks: int | None = None,
        reg_per_chunk: bool = False,
        plastic: bool = False,
        optimizer: str = "adam",
        optimizer_options: dict[str, Any] | None = None,
        schedule: str = "constant",
        loss: str = "cross_entropy",
        embedding_init: str = "normal",
        infer: str | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        device: torch.device | str | None = None,
        graph: bool | None = None,
        out: str | Path | None = None,
        save_every: float = checkpoint.SAVE_EVERY,
        on_nonfinite: str = "stop",
        memory_budget: int | None = None,
        name: str = "run",
        settings: dict[str, Any] | None = None,
        progress: bool = True,
        loggers: Sequence[Logger] = (),
        ranks: Ranks | None = None,
    ):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {optimizer!r}; choose from {', '.join(OPTIMIZERS)}")
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}")
        if embedding_init not in ("normal", "previous", "mean"):
            raise ValueError(f"embedding_init must be 'normal', 'previous' or 'mean', got {embedding_init!r}")
        self.ranks = ranks or Ranks()
        if graph and self.ranks.count > 1:
            raise ValueError(f"a CUDA graph holds no exchange of {self.ranks.count} processes: graph must be False or None")
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}; choose from {', '.join(LOSSES)}")
        if on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {', '.join(ON_NONFINITE)}, got {on_nonfinite!r}")
        if infer not in (None, *METHODS):
            raise ValueError(f"infer must be None or one of {', '.join(METHODS)}, got {infer!r}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if lr <= 0 or (lr_embedding or lr) <= 0 or beta < 0 or seed < 0 or (reg_tasks is not None and reg_tasks < 1):
            raise ValueError("lr and lr_embedding must be positive, beta and seed not negative, reg_tasks at least 1")
        self.config: dict[str, Any] = {
            "lr": lr,
            "beta": beta,
            "lr_embedding": lr_embedding,
            "lookahead": lookahead,
            "reg_tasks": reg_tasks,
            "reg_per_chunk": reg_per_chunk,
            "plastic": plastic,
            "optimizer": optimizer,
            "optimizer_options": dict(optimizer_options or {}),
            "schedule": schedule,
            "loss": loss,
            "embedding_init": embedding_init,
            "infer": infer,
            "temperature": temperature,
            "seed": seed,
            "name": name,
            "settings": settings,
        }
        self.hnet = hnet if device is None else hnet.to(device)
        if graph and self.device.type not in RUNTIMES:
            raise ValueError(f"graph=True needs a CUDA device, the hypernetwork is on {self.device}")
        self.beta, self.lookahead, self.plastic, self.seed = beta, lookahead, plastic, seed
        self.reg_tasks, self.reg_per_chunk = reg_tasks, reg_per_chunk
        self.out = Path(out) if out is not None and self.ranks.is_first else None
        self.progress, self.loggers = progress and self.ranks.is_first, list(loggers) if self.ranks.is_first else []
        self.loss, self.infer, self.temperature = loss, infer, temperature
        self.results = Results(measure=LOSSES[loss].measure)
        self.regularizer = OutputRegularizer(hnet, memory_budget=memory_budget)
        self.on_nonfinite = on_nonfinite
        self.graph = graph if self.ranks.count == 1 else False
        self._current: TaskInTraining | None = None
        self._runtime: Runtime | None = None
        self._rng: dict[str, Tensor] = {}  # of a checkpoint, until a task goes on from it
        self._saver = checkpoint.Saver(self.out, save_every, self._contents)

    @property
    def device(self) -> torch.device:
        """Where the hypernetwork is, and where batches are made."""
        return self.hnet.basis.device

    @property
    def current_step(self) -> int:
        """Steps taken on the task under way; 0 between tasks."""
        return 0 if self._current is None else self._current.steps

    def fit(self, task: Any, *, steps: int, batch_size: int = 128) -> TaskRecord:
        """Trains the next task; goes on where it stopped if this task was interrupted.

        Args:
            task: a ``Task`` of a stream, or data: a ``TaskData``, a pair of tensors (inputs, labels), a ``TensorDataset``
                or any map-style dataset.
            steps: optimizer steps.
            batch_size: examples per step.

        Raises:
            ValueError: the task is not the next one, its labels are not for the loss, or sizes are below 1.  IndexError: the
                hypernetwork has no embedding for it.  NonFiniteLossError: loss, drift or a gradient became NaN or infinite;
                parameters are those before that step and, with ``out``, saved.
            CheckpointError: an earlier state could not be written.  FasthyperError: a GPU is out of memory.
            KeyboardInterrupt: after Ctrl-C, once the step is finished and, with ``out``, the state saved.
            SystemExit: the same after SIGTERM, with status 143.
        """
        index, name, data = self._next(task)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        batches = Batches(len(data), batch_size, seed=self.seed, task=index, device=self.device, choices=data.choices)
        title = f"task {index + 1}/{max(self.hnet.num_tasks, index + 1)}"
        with deferred_interrupt() as interrupted, _memory_named():
            start = self.begin_task(steps=steps, name=name)
            current = self._under_way()
            try:
                with training_bar(title, start, steps, self.progress) as show:
                    for step in range(start, steps):
                        batch, inputs = self._inputs(current, data, batches.indices(step))
                        self._advance(current, batch, *inputs)
                        show(step + 1, *current.latest)
                        if self.ranks.stops(bool(interrupted())):
                            break
                        self._saver.save_if_due()
                    self._collect(wait=True)
                    show(current.steps, *current.latest)
            except (NonFiniteLossError, LostProcessError) as error:  # nothing has changed in this step
                self._saver.save()
                self._saver.flush()
                if isinstance(error, LostProcessError):
                    raise
                raise spoiled(error, self._saver.directory, batches.indices(current.record.steps)) from error
            signum = interrupted()
            if self.ranks.any(bool(signum)):
                self._saver.save()
                self._saver.flush()
                raise stopped_by(signum or signal.SIGINT)
        return self.end_task()

    def begin_task(self, *, steps: int, name: str = "") -> int:
        """Begins the next task, for a loop of one's own around ``step``: new optimizers, and a snapshot of the past tasks.

        Args:
            steps: how many are planned; the schedule is drawn over them, and the curves in the record are sampled so often.
            name: of the task.

        Returns:
            Steps taken so far: 0, or more where a task that was interrupted goes on.

        Raises:
            IndexError: the hypernetwork has no embedding for the next task.  ValueError: it has grown since the task began.
        """
        self._collect(wait=True)
        self.hnet.train()
        if self._current is None:
            self.ranks.copy_first_(self.hnet.state_dict().values())
            self._start_embedding(len(self.results.tasks))
            self._current = self._begin(len(self.results.tasks), name)
        current = self._current
        if [p.shape for p in self.hnet.theta] != [p.shape for p in self.regularizer.theta0]:
            index = current.record.index
            raise ValueError(f"the hypernetwork has grown in the middle of task {index}; add tasks between tasks")
        restore_rng(self._rng, self.device)
        self._rng = {}
        current.planned, current.clock = steps, time.perf_counter()
        return current.record.steps

    def step(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """One update on a batch of the task begun, inputs and labels: task loss and drift (NaN without one) before it.

        Raises:
            RuntimeError: no task was begun.  NonFiniteLossError: as in ``fit``.
        """
        current = self._under_way()
        with _memory_named():
            self._advance(current, _as_given, x, y)
            self._collect(wait=True)
        self._saver.save_if_due()
        return current.latest

    def end_task(self) -> TaskRecord:
        """Ends the task begun: its record joins ``results``, and with ``out`` the state is saved.

        Raises:
            RuntimeError: no task was begun.
        """
        record = self._under_way().record
        self._collect(wait=True)
        for parameter in self._under_way().free:
            parameter.grad = None  # each task has an embedding of its own, which is not trained again
        self.results.tasks.append(record)
        self.results.peak_memory = max(self.results.peak_memory, peak_memory())
        self._current = None
        for logger in self.loggers:
            logger.on_task_end(record, self._total_steps())
        self._saver.save()
        return record

    def forget(
        self, task: int, *, steps: int = 200, gamma: float = 0.01, num_noises: int = 10, lr: float | None = None
    ) -> list[tuple[float, float]]:
        """Makes the network forget a task without data: its weights become noise, those of the others are held (UnCLe).

        Each step goes down on ``R(theta) + gamma/n sum_i ||h(e_f; theta) - z_i||^2``, ``z_i ~ N(0, 1)`` drawn anew, where R
        is the mean squared drift, since this began, of the other trained tasks, or ``reg_tasks`` of them (arXiv 2509.17530).
        Only theta moves, with the trainer's optimizer and, if it looks ahead, at ``theta + delta`` in R; a step costs what
        one of ``fit`` does without the target. The task's batch-norm statistics are reset; its embedding stays, and so do
        parameters that are trained rather than generated. ``results.forgotten`` then names the task, which no later drift,
        inference or score takes in; with ``out`` the state is saved. Where it is interrupted or fails nothing has changed.

        Args:
            task: trained, and not forgotten.
            steps: of the optimizer.
            gamma: weight of the noise.
            num_noises: n.
            lr: of theta; ``None``: the trainer's.

        Returns:
            Of each step the mean squared weight of the task and the drift of the others, before it.

        Raises:
            ValueError: no such task, or numbers below 1 or not above 0.  RuntimeError: a task is under way.
            NonFiniteLossError: as in ``fit``.
        """
        if self._current is not None:
            raise RuntimeError(f"task {self._current.record.index} is under way: end it before another is forgotten")
        if task not in self.results.held:
            raise ValueError(f"task {task} cannot be forgotten, only trained tasks that were not: {self.results.held}")
        lr = self.config["lr"] if lr is None else lr
        if steps < 1 or num_noises < 1 or gamma <= 0 or lr <= 0:
            raise ValueError("steps and num_noises must be at least 1, gamma and lr positive")
        self.regularizer.snapshot([other for other in self.results.held if other != task], sampled=self.reg_tasks)
        theta = self.hnet.theta
        optimizer = self._optimizer(theta, lr)
        curve: list[tuple[float, float]] = []
        with deferred_interrupt() as interrupted:
            try:
                with training_bar(f"forgetting task {task}", 0, steps, self.progress) as show:
                    for step in range(steps):
                        noise = derived_seed(self.seed, len(self.results.tasks), task, step)
                        curve.append(self._forgetting_step(task, optimizer, gamma, num_noises, noise))
                        show(step + 1, *curve[-1])
                        if signum := interrupted():
                            raise stopped_by(signum)
            except BaseException:
                with torch.no_grad():
                    for p, before in zip(theta, self.regularizer.theta0, strict=True):
                        p.copy_(before)
                raise
            if self.hnet.statistics is not None:
                self.hnet.statistics.reset(task)
            self.results.forgotten[task] = len(self.results.tasks) - 1
            self._saver.save()
        return curve

    def evaluate(self, tasks: Any, *, infer: bool | str | None = None, temperature: float | None = None) -> list[float]:
        """Accuracy, a fraction, on each task's test data, or mean squared error where that is the loss.

        Evaluated the way the trainer was made for, it becomes the row of the last trained task in ``results``.

        Args:
            tasks: a ``Task`` or a sequence of them (a slice of a stream), or a sequence of data as ``fit`` takes it, which
                stands for tasks 0, 1, ...
            infer: do not tell the task of an example, infer it among those trained, and not forgotten, so far, as
                ``fh.infer_tasks`` does by ``"entropy"``, which ``True`` stands for, or by ``"gradient"``. An example is
                right if its label is and, with output heads of the tasks' own, the task. ``results`` stay as they are.
            temperature: of the outputs, as there; ``None``: the trainer's.

        Labels of task t may be numbered within its own head, ``0 .. C-1``, or over all, ``t*C .. t*C + C-1``, as those of
        class-incremental streams are; so may those of ``fit``. With one head for all tasks they are numbers of its outputs.

        Raises:
            ValueError: labels are not for the loss, tasks are to be inferred where there are no classes, or a temperature is
                given where tasks are told.
        """
        method = self.infer if infer is None else "entropy" if infer is True else infer or None
        if method is not None and self.loss != "cross_entropy":
            raise ValueError(f"to infer tasks needs classes, loss={self.loss!r} has none")
        if method is None and temperature is not None:
            raise ValueError("a temperature is of inferred tasks, here they are told: give infer, too")
        named = {task: self._checked(data) for task, data in tests_of(tasks).items()}
        temperature = self.temperature if temperature is None else temperature
        options = () if method is None else (self.results.held, method, temperature)

        def measure(pairs: Sequence[tuple[int, TaskData]]) -> list[float]:
            return errors_on(self.hnet, pairs) if self.loss != "cross_entropy" else accuracies_on(self.hnet, pairs, *options)

        found = self.ranks.spread(list(named.items()), measure)
        accuracies = dict(zip(named, found, strict=True))
        if self.results.tasks and method == self.infer and (method is None or temperature == self.temperature):
            trained = len(self.results.tasks) - 1
            self.results.accuracy.setdefault(trained, {}).update(accuracies)
            for logger in self.loggers:
                logger.measure = self.results.measure
                logger.on_evaluate(trained, accuracies, self._total_steps())
            self._saver.save()
        return list(accuracies.values())

    def save(self, directory: str | Path) -> None:
        """Writes the whole state to ``directory``: ``checkpoint.safetensors`` and ``results.json``; of ranks the first does.

        Raises:
            CheckpointError: it cannot be written or holds other files; what was there before is unchanged.
            NonFiniteLossError: found in steps whose numbers were not yet read.
        """
        contents = self._contents()
        if self.ranks.is_first:
            checkpoint.save(Path(directory), *contents)

    def flush(self) -> None:
        """Waits until what was to be saved in ``out`` lies there.

        Raises:
            CheckpointError: it could not be written; what was there before is unchanged.
        """
        self._saver.flush()

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """What is saved: tensors, state and, for reports, results."""
        tensors, state = self.state()
        summary = {
            "name": self.config["name"],
            "config": self.config["settings"] or {**self.hnet.config, **self.config},
            "environment": environment(),
            "results": state["results"],
        }
        return {**tensors, **(self._rng or rng_tensors(self.device))}, state, summary

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What ``from_state`` needs to go on: tensors, and what is JSON-ready. Raises as ``save`` does for unread steps."""
        self._collect(wait=True)
        tensors = {f"hnet.{name}": tensor for name, tensor in self.hnet.state_dict().items()}
        state = {
            "trainer": self.config,
            **self.hnet.describe(),
            "results": self.results.to_json(),
            "current": None,
        }
        if self._current is not None:
            state["current"] = self._current.record.to_json()
            tensors |= self._current.tensors()
            tensors |= {f"snapshot.{i}": t for i, t in enumerate([*self.regularizer.theta0, self._current.embeddings0])}
        return tensors, state

    @classmethod
    def load(
        cls: type[_Self],
        directory: str | Path,
        *,
        target: nn.Module | None = None,
        device: torch.device | str | None = None,
        graph: bool | None = None,
        out: str | Path | None = None,
        progress: bool = True,
        loggers: Sequence[Logger] = (),
        ranks: Ranks | None = None,
        **more: Any,
    ) -> _Self:
        """The trainer that ``save`` wrote; it goes on bit for bit as the saved one would have.

        Args:
            directory: where ``save`` wrote.
            target: the target network, if it is not one of ``fh.nets``, which are rebuilt from the checkpoint.
            device, graph, out, progress, loggers, ranks: as in the constructor. The first rank alone reads; there may be
                more or fewer than when it was saved, to rounding.
            more: ``save_every`` and the like, as there.

        Raises:
            CheckpointError: missing, damaged or foreign files, or a target that does not fit.
        """
        tensors, state = (ranks or Ranks()).of_first(lambda: checkpoint.load(Path(directory)))
        options = {"device": device, "graph": graph, "out": out, "progress": progress, "loggers": loggers, **more}
        options |= {} if ranks is None else {"ranks": ranks}
        try:
            trainer = cls.from_state(tensors, state, target=target, **options)
        except UNFIT as error:
            raise unfit(Path(directory) / checkpoint.CHECKPOINT, error) from error
        trainer._rng = {name: tensor for name, tensor in tensors.items() if name.startswith("rng.")}
        return trainer

    @classmethod
    def from_state(
        cls: type[_Self],
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        *,
        target: nn.Module | None = None,
        **options: Any,
    ) -> _Self:
        """The trainer whose ``state`` it was; ``options`` as in ``load``. What does not fit raises one of ``UNFIT``."""
        options = {"device": None, "graph": None, "out": None, "loggers": (), **options}  # no file may set them
        trainer = cls(rebuild(with_prefix(tensors, "hnet."), state, target), **state["trainer"], **options)
        trainer.results = Results.from_json(state["results"])
        if state["current"] is not None:
            record = TaskRecord.from_json(state["current"])
            snapshot = with_prefix(tensors, "snapshot.")
            trainer._current = trainer._begin(record.index, record.name)
            trainer._current.restore(record, tensors)
            *theta0, embeddings0 = (snapshot[str(i)] for i in range(len(snapshot)))
            own = trainer._own_past()
            state_of_it = [*theta0, embeddings0[own]]
            trainer.regularizer.restore(trainer.results.held[own], state_of_it, sampled=trainer.reg_tasks)
            trainer._current.embeddings0 = embeddings0.to(trainer.device)
        return trainer

    def _total_steps(self) -> int:
        """Steps of all tasks so far, the one under way included."""
        return sum(record.steps for record in self.results.tasks) + self.current_step

    def _next(self, task: Any) -> tuple[int, str, TaskData]:
        index = len(self.results.tasks)
        if isinstance(task, Task):
            if task.index != index:
                raise ValueError(f"task {task.index} is not next: {index} tasks were trained so far, so task {index} is")
            return index, task.name, self._checked(task.train).to(self.device)
        return index, "", self._checked(as_task_data(task)).to(self.device)

    def _checked(self, data: TaskData) -> TaskData:
        if data.is_regression != (self.loss == "mse"):
            have = "floating-point targets" if data.is_regression else "class numbers"
            other = "mse" if data.is_regression else "cross_entropy"
            raise ValueError(f"the labels are {have}, which loss={self.loss!r} is not for: Trainer(loss={other!r}) is")
        return data

    def _under_way(self) -> TaskInTraining:
        if self._current is None:
            raise RuntimeError("no task is under way: call begin_task first")
        return self._current

    def _optimizer(self, parameters: Any, lr: float) -> torch.optim.Optimizer:
        optimizer, options = OPTIMIZERS[self.config["optimizer"]]
        return optimizer(parameters, lr=lr, **{**options, **self.config["optimizer_options"]})  # type: ignore[call-arg]

    def _forgetting_step(
        self, task: int, optimizer: torch.optim.Optimizer, gamma: float, num_noises: int, seed: int
    ) -> tuple[float, float]:
        """Mean squared weight of the task and drift of the others before a step of ``forget``."""
        theta, generator = self.hnet.theta, torch.Generator(self.device).manual_seed(seed)
        weights = torch.cat([weight.flatten() for weight in self.hnet.generate(task).values()])
        noise = torch.randn(weights.shape, generator=generator, dtype=weights.dtype, device=self.device)
        # the mean of n squared distances is, but for a constant, the one from the mean, which is N(0, 1/n)
        loss = gamma * (weights - noise / math.sqrt(num_noises)).square().sum()
        grads = torch.autograd.grad(loss, theta, allow_unused=True, materialize_grads=True)
        for p, grad in zip(theta, grads, strict=True):
            p.grad = grad
        ahead = look_ahead(optimizer) if self.lookahead else [p.detach() for p in theta]
        drift, drift_grads, _ = self.regularizer.value_and_grad(ahead, tasks=self._sample(seed))
        numbers = torch.stack([weights.detach().square().mean(), drift, total(grads)]).tolist()
        if not all(map(math.isfinite, numbers)):
            raise NonFiniteLossError(f"weights or drift became infinite while task {task} was forgotten: lower lr or gamma")
        take_step(optimizer, drift_grads)
        return numbers[0], numbers[1]

    @torch.no_grad()
    def _start_embedding(self, index: int) -> None:
        """Gives the embedding of a task that begins its first value."""
        init, held = self.config["embedding_init"], self.results.held
        if init != "normal" and held:
            start = torch.stack([self.hnet.embedding(task) for task in (held if init == "mean" else held[-1:])]).mean(0)
            self.hnet.embedding(index).copy_(start)

    def _begin(self, index: int, name: str) -> TaskInTraining:
        """New optimizers, and a snapshot of what the past tasks generate now."""
        embedding, rest = self.hnet.embedding(index), [p for p in self.hnet.rest if p.requires_grad]
        held = [*self.hnet.theta, *([self.hnet.embedding(t) for t in self.results.held] if self.plastic else [])]
        self.regularizer.snapshot(self.results.held[self._own_past()], sampled=self.reg_tasks)
        lr = self.config["lr"]
        groups = [{"params": [embedding], "lr": self.config["lr_embedding"] or lr}, *([{"params": rest}] if rest else [])]
        current = TaskInTraining(
            record=TaskRecord(index, name),
            held=held,
            free=[embedding, *rest],
            held_optimizer=self._optimizer(held, lr),
            free_optimizer=self._optimizer(groups, lr),
            before=self._total_steps(),
            embeddings0=self._past_embeddings(),
        )
        if self.graph is not False and self.device.type in RUNTIMES:
            optimizers, scheduled = (current.held_optimizer, current.free_optimizer), self.config["schedule"] != "constant"
            if all([make_capturable(optimizer, schedule=scheduled) for optimizer in optimizers]):
                self._runtime = self._runtime or RUNTIMES[self.device.type](self.device)
                current.graph = StepGraph(self._runtime, self.device, self.hnet.basis.dtype)
        return current

    def _advance(self, now: TaskInTraining, batch: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> None:
        """One step on ``batch(*inputs)``, inputs and labels: taken and noted, or launched, and noted once it is read."""
        size, graph = len(inputs[-1]), now.graph
        now.set_rates(self.config["schedule"])
        if graph is None or not now.steady:
            shared = self.hnet.target.shared()
            try:
                found = self._step(now, *batch(*inputs))
            except NonFiniteLossError as error:
                return self._skip(now, error, size)
            self._note(now, *found, size)
            if graph is not None and not self._can_launch(now, shared):
                now.graph = None
            now.steady = True
            return

        def run(failed: Tensor, *given: Tensor) -> Tensor:
            def check(values: Tensor) -> Tensor:
                healthy = (values.abs().max() < math.inf).logical_and_(failed < ON_NONFINITE[self.on_nonfinite])
                failed.add_(1).mul_(healthy.logical_not())
                return healthy

            return self._update(now, *batch(*given[: len(inputs)]), *given[len(inputs) :], check=check)

        tasks = self._sampled_tasks(now)
        depends_on = batch, self.hnet.training, self.beta, self.lookahead, self.on_nonfinite
        obstacle = graph.launch(depends_on, run, inputs if tasks is None else (*inputs, tasks))
        now.unread.append((size, self._has_drift(now)))
        self._collect(wait=obstacle is not None)
        if obstacle is not None:
            now.graph, self.graph = None, False  # it would be met again in the next task
            warnings.warn(f"no CUDA graph of a step: {obstacle}; steps are run as they are", stacklevel=3)

    def _can_launch(self, now: TaskInTraining, shared: dict[str, Tensor]) -> bool:
        """Whether a step is all in tensors that stay where they are; ``shared`` were the target's before one."""
        modules = [*self.hnet.modules(), *self.hnet.target.module.modules()]
        has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        replaced = any(tensor is not shared[name] for name, tensor in self.hnet.target.shared().items())
        plans_differ = self._sampled_tasks(now) is not None and bool(self.hnet.layout.heads)
        return not (has_hooks or replaced or plans_differ)

    def _collect(self, *, wait: bool) -> None:
        """Notes launched steps whose numbers have arrived; with ``wait``, all of them."""
        now = self._current
        if now is None or now.graph is None:
            return
        for numbers in now.graph.read(wait):
            size, has_drift = now.unread[0]
            try:
                try:
                    loss, drift = self._finite(numbers if has_drift else numbers[:2], now.record)
                except NonFiniteLossError as error:
                    self._skip(now, error, size)
                    now.unread.popleft()
                    continue
            except NonFiniteLossError:
                now.unread.clear()
                now.graph.restart()
                raise
            now.unread.popleft()
            self._note(now, loss, drift, size)

    def _note(self, now: TaskInTraining, loss: float, drift: float, size: int) -> None:
        """A step on ``size`` examples was taken: keeps what is to be kept of it, and tells the loggers."""
        record, step, clock = now.record, now.record.steps, time.perf_counter()
        now.latest, now.failed = (loss, drift), 0
        record.steps, record.samples = step + 1, record.samples + size
        record.seconds, now.clock = record.seconds + clock - now.clock, clock
        if is_sampled(step, now.planned, self.hnet.num_tasks):
            record.loss.append((step, loss))
            if not math.isnan(drift):
                record.drift.append((step, drift))
        for logger in self.loggers:
            if step % logger.every == 0:
                logger.on_step(record.index, step, now.before + record.steps, loss, drift)

    def _skip(self, now: TaskInTraining, error: NonFiniteLossError, size: int) -> None:
        """Counts a step that changed nothing; raises its error where that is one too many."""
        now.failed += 1
        if now.failed >= ON_NONFINITE[self.on_nonfinite]:
            now.failed = 0
            raise error
        now.record.steps, now.record.samples = now.record.steps + 1, now.record.samples + size
        now.record.skipped += 1

    def _step(self, now: TaskInTraining, x: Tensor, y: Tensor) -> tuple[float, float]:
        """One update; returns the task loss and the drift (NaN without one) before it, the step's one read."""
        read: list[tuple[float, float]] = []

        def check(values: Tensor) -> None:
            read.append(self._finite(values.tolist(), now.record))

        self._update(now, x, y, self._sampled_tasks(now), check=check)
        return read[0]

    def _update(
        self,
        now: TaskInTraining,
        x: Tensor,
        y: Tensor,
        tasks: Tensor | None = None,
        *,
        check: Callable[[Tensor], Tensor | None],
    ) -> Tensor:
        """One update; returns task loss, a number that is finite where its gradient is, and the drift, if there is one.

        ``check`` sees them, ``[2 or 3]``, before anything has changed but batch-norm statistics. It raises, or returns a
        flag on the device: where that is false nothing changes. ``tasks``: past ones for the drift; ``None``: all.
        """
        parameters, statistics = [*now.held, *now.free], self.hnet.statistics
        rows = () if statistics is None else statistics.rows(now.record.index)  # the forward pass writes to them
        rows_before = [row.clone() for row in rows]
        try:
            numbers, drift_grads = self._gradients(now, x, y, tasks, rows[:1])
            healthy = check(numbers)
        except FasthyperError:
            for row, before in zip(rows, rows_before, strict=True):
                row.copy_(before)
            raise
        take_step(now.held_optimizer, drift_grads, self.beta, healthy)
        take_step(now.free_optimizer, healthy=healthy)
        if healthy is not None:
            for row, before in zip(rows, rows_before, strict=True):
                row.copy_(torch.where(healthy, row, before))
            for parameter in parameters:
                parameter.grad = None  # it lies where a graph's next launch writes
        return numbers

    def _gradients(
        self, now: TaskInTraining, x: Tensor, y: Tensor, tasks: Tensor | None, rows: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """What ``_update`` returns, and the drift's gradients; those of the loss are left with what moves.

        Of several ranks each takes its share: of the examples, or, where a target looks across the batch, the mean of all
        ranks' numbers, statistics ``rows`` included; of the past tasks. The look-ahead needs the whole gradient of the loss,
        and the drift the look-ahead: these are two messages, without a look-ahead one.
        """
        own, share = self.ranks.share(len(y))
        if self.ranks.count > 1 and self.hnet.target.mixes_examples:
            own, share = slice(None), 1 / self.ranks.count
        loss = self._task_loss(x[own].to(self.hnet.basis.dtype), y[own], now.record.index)
        parameters = [*now.held, *now.free]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        loss, values = loss.detach(), []
        drift_grads: list[Tensor] = []
        to_sum: list[Part] = [([loss, *rows, *grads], share)]
        if self._has_drift(now):
            if self.lookahead:
                self.ranks.sum_(to_sum.pop())
            ahead = look_ahead(now.held_optimizer) if self.lookahead else [p.detach() for p in now.held]
            own, share = self.ranks.share(len(self.results.held) if tasks is None else len(tasks))
            value, drift_grads = self._drift(ahead, tasks, own)
            values.append(value)
            to_sum.append(([value, *drift_grads], share))
        self.ranks.sum_(*to_sum)
        return torch.stack([loss, total(grads), *values]), drift_grads  # gradients of a finite drift are finite

    def _inputs(
        self, now: TaskInTraining, data: TaskData, indices: Tensor
    ) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
        """What makes the batch of the next step: a function, equal in all of them, and what it is given."""
        return data.batch, (indices,)

    def _task_loss(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """Loss of the task being learned on a batch of it; what else a trainer learns overrides this."""
        return LOSSES[self.loss].value(self.hnet(x, task), self.hnet.target.own_labels(y, task))

    def _has_drift(self, now: TaskInTraining) -> bool:
        return self.regularizer.num_past > 0 and self.beta > 0

    def _sampled_tasks(self, now: TaskInTraining) -> Tensor | None:
        """Held tasks for the drift of the next step, by their place in the snapshot, as ``draw`` has them; ``None``: all."""
        return self._sample(derived_seed(self.seed, now.record.index, now.steps)) if self._has_drift(now) else None

    def _sample(self, seed: int) -> Tensor | None:
        if self.reg_tasks is None:
            return None
        generator = torch.Generator().manual_seed(seed)
        drawn = self.regularizer.draw(self.reg_tasks, per_chunk=self.reg_per_chunk, generator=generator)
        return None if drawn is None else to_device(drawn, self.device)

    def _past_embeddings(self) -> Tensor:
        """Of all past tasks, as the task begins: the snapshot's, which of several ranks each has only its own of."""
        alone = self.ranks.count == 1
        return self.regularizer.embeddings0 if alone else self.hnet.embeddings(self.results.held).detach().clone()

    def _own_past(self) -> slice:
        """Of which past tasks, by place, this rank has a snapshot: of all where a step samples some."""
        past = len(self.results.held)
        return self.ranks.share(past)[0] if self.reg_tasks is None or self.reg_tasks >= past else slice(None)

    def _drift(self, held: Sequence[Tensor], tasks: Tensor | None, own: slice) -> tuple[Tensor, list[Tensor]]:
        """Drift of past tasks' weights, ``own`` of ``tasks``, at these values of what moves, and its gradients for them."""
        num_theta = len(self.hnet.theta)
        embeddings = torch.stack(list(held[num_theta:])) if self.plastic else None
        some = embeddings if embeddings is None or tasks is not None else embeddings[own]
        tasks = None if tasks is None else tasks[own]
        value, grads, grad_embeddings = self.regularizer.value_and_grad(held[:num_theta], some, tasks=tasks)
        if embeddings is not None and grad_embeddings is not None:
            if len(grad_embeddings) < len(embeddings):
                places = torch.arange(len(embeddings), device=embeddings.device)[own] if tasks is None else tasks
                grad_embeddings = torch.zeros_like(embeddings).index_copy_(0, places, grad_embeddings)
            grads = [*grads, *grad_embeddings]
        return value, grads

    def _finite(self, numbers: Sequence[float], record: TaskRecord) -> tuple[float, float]:
        """Loss and drift, NaN where there is none, of what ``_update`` returns; raises where a number is not finite."""
        for what, number in zip(("loss", "gradient", "drift"), numbers, strict=False):
            if not math.isfinite(number):
                raise NonFiniteLossError(
                    f"{what} is {number} at task {record.index}, step {record.steps}: lower lr or beta, or look at the data"
                )
        return numbers[0], numbers[2] if len(numbers) > 2 else math.nan


def tests_of(tasks: Any) -> dict[int, TaskData]:
    """Test data by task, of what ``Trainer.evaluate`` takes."""
    named: dict[int, TaskData] = {}
    for position, task in enumerate([tasks] if isinstance(tasks, Task) else tasks):
        index, data = (task.index, task.test) if isinstance(task, Task) else (position, as_task_data(task))
        named[index] = data
    return named


def spoiled(error: NonFiniteLossError, directory: Path | None, indices: Tensor) -> NonFiniteLossError:
    """The error with the batch of its step, and where the state before it is saved."""
    kept = f"; the state before it is saved in {directory}" if directory else ""
    found = NonFiniteLossError(f"{error}{kept}; its batch: {indices.tolist()}")
    found.indices = indices.tolist()
    return found


@contextmanager
def _memory_named() -> Iterator[None]:
    """Says in one line what to do where a GPU is out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = " ".join(str(error).split()).split(". ")[0]
        raise FasthyperError(
            f"{what}: let the snapshot of past tasks take less (memory_budget, --memory-budget 0), "
            "or hold a few of them in each step (reg_tasks, --reg-tasks 10)"
        ) from error


def _as_given(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y
