"""The training loop: a batch goes stream, generate, target, loss; old embeddings go trunk, drift; both meet in one step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper import checkpoint, nets
from fasthyper.environment import environment
from fasthyper.errors import NonFiniteLossError
from fasthyper.export import UNFIT, rebuild, unfit, with_prefix
from fasthyper.hypernet import ChunkedHypernet
from fasthyper.interrupt import deferred_interrupt
from fasthyper.loggers import Logger
from fasthyper.lookahead import look_ahead, take_step
from fasthyper.metrics import Results, TaskRecord, peak_memory
from fasthyper.progress import training_bar
from fasthyper.regularizer import OutputRegularizer
from fasthyper.streams import Task, TaskData, as_task_data
from fasthyper.streams.batches import Batches, derived_seed

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "sgd": (torch.optim.SGD, {"fused": True}),
    "rmsprop": (torch.optim.RMSprop, {}),
}
SAMPLES_PER_TASK = 200  # points of the loss and drift curves that are kept
EVALUATION_BATCH = 2048


class Trainer:
    """Trains a hypernetwork on one task after the other, holding what it generates for the past ones (DESIGN E1, 2.6).

    Each step: g1 = gradient of the task loss; delta = the step the optimizer would take on g1 alone; g2 = beta times the
    gradient of the drift at theta + delta; theta steps on g1 + g2; the task's own embedding steps on the task loss, with an
    optimizer of its own. So do, at ``lr``, those of the target's parameters that are trained rather than generated; nothing
    holds them for past tasks. Optimizers are new for each task. The loss is cross-entropy.

    Args:
        hnet: the hypernetwork; trained in place.
        lr: learning rate of theta.  lr_embedding: of the task embedding; ``None``: the same.
        beta: weight of the drift; 0 switches it off.
        lookahead: whether the drift is taken at theta + delta.
        reg_tasks: past tasks sampled for the drift in each step; ``None``: all.
        plastic: whether past tasks' embeddings move, with theta's optimizer, to keep their weights in place.
        optimizer: a key of ``OPTIMIZERS``.  optimizer_options: more keyword arguments for it (``weight_decay``, ``betas``,
            ``momentum``, ...).
        seed: of batches and of sampled tasks, which depend on it, the task and the step only.
        device: where to train; ``None``: where ``hnet`` is.
        out: directory for a checkpoint after every task and on Ctrl-C; ``None``: none is written.
        name: of the run, in reports.
        settings: JSON-ready facts to keep in checkpoints and reports, such as the recipe that made this trainer.
        progress: whether to show a bar.
        loggers: told of steps, finished tasks and evaluations; see ``fh.loggers``.

    Raises:
        ValueError: unknown optimizer, or a negative number where none can be.
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
        plastic: bool = False,
        optimizer: str = "adam",
        optimizer_options: dict[str, Any] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        out: str | Path | None = None,
        name: str = "run",
        settings: dict[str, Any] | None = None,
        progress: bool = True,
        loggers: Sequence[Logger] = (),
    ):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {optimizer!r}; choose from {', '.join(OPTIMIZERS)}")
        if lr <= 0 or (lr_embedding or lr) <= 0 or beta < 0 or seed < 0 or (reg_tasks is not None and reg_tasks < 1):
            raise ValueError("lr and lr_embedding must be positive, beta and seed not negative, reg_tasks at least 1")
        self.config: dict[str, Any] = {
            "lr": lr,
            "beta": beta,
            "lr_embedding": lr_embedding,
            "lookahead": lookahead,
            "reg_tasks": reg_tasks,
            "plastic": plastic,
            "optimizer": optimizer,
            "optimizer_options": dict(optimizer_options or {}),
            "seed": seed,
            "name": name,
            "settings": settings,
        }
        self.hnet = hnet if device is None else hnet.to(device)
        self.beta, self.lookahead, self.reg_tasks, self.plastic, self.seed = beta, lookahead, reg_tasks, plastic, seed
        self.out = None if out is None else Path(out)
        self.progress, self.loggers = progress, list(loggers)
        self.results = Results()
        self.regularizer = OutputRegularizer(hnet)
        self._current: _TaskInTraining | None = None
        if self.out is not None:
            checkpoint.claim(self.out)

    @property
    def device(self) -> torch.device:
        """Where the hypernetwork is, and where batches are made."""
        return self.hnet.basis.device

    @property
    def current_step(self) -> int:
        """Steps taken on the task under way; 0 between tasks."""
        return 0 if self._current is None else self._current.record.steps

    def fit(self, task: Any, *, steps: int, batch_size: int = 128) -> TaskRecord:
        """Trains the next task; goes on where it stopped if this task was interrupted.

        Args:
            task: a ``Task`` of a stream, or data: a ``TaskData``, a pair of tensors (inputs, labels), a ``TensorDataset``
                or any map-style dataset.
            steps: optimizer steps.
            batch_size: examples per step.

        Raises:
            ValueError: the task is not the next one, or sizes are below 1.  IndexError: the hypernetwork has no embedding
                for it.  NonFiniteLossError: loss or drift became NaN or infinite; parameters are those before that step.
            KeyboardInterrupt: after Ctrl-C, once the step is finished and, with ``out``, the state saved.
        """
        index, name, data = self._next(task)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        batches = Batches(len(data), batch_size, seed=self.seed, task=index, device=self.device)
        title = f"task {index + 1}/{max(self.hnet.num_tasks, index + 1)}"
        with deferred_interrupt() as interrupted:
            start = self.begin_task(steps=steps, name=name)
            with training_bar(title, start, steps, self.progress) as show:
                for step in range(start, steps):
                    show(step + 1, *self.step(*data.batch(batches.indices(step))))
                    if interrupted():
                        break
            if interrupted():
                if self.out is not None:
                    self.save(self.out)
                raise KeyboardInterrupt
        return self.end_task()

    def begin_task(self, *, steps: int, name: str = "") -> int:
        """Begins the next task, for a loop of one's own around ``step``: new optimizers, and a snapshot of the past tasks.

        Args:
            steps: how many are planned; it sets how often the curves in the record are sampled.
            name: of the task.

        Returns:
            Steps taken so far: 0, or more where a task that was interrupted goes on.

        Raises:
            IndexError: the hypernetwork has no embedding for the next task.  ValueError: it has grown since the task began.
        """
        self.hnet.train()
        current = self._current = self._current or self._begin(len(self.results.tasks), name)
        if [p.shape for p in self.hnet.theta] != [p.shape for p in self.regularizer.theta0]:
            index = current.record.index
            raise ValueError(f"the hypernetwork has grown in the middle of task {index}; add tasks between tasks")
        current.planned, current.clock = steps, time.perf_counter()
        return current.record.steps

    def step(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """One update on a batch of the task begun, inputs and labels: task loss and drift (NaN without one) before it.

        Raises:
            RuntimeError: no task was begun.  NonFiniteLossError: as in ``fit``.
        """
        if self._current is None:
            raise RuntimeError("no task is under way: call begin_task first")
        current, record = self._current, self._current.record
        loss, drift = self._step(current, x, y)
        step, now = record.steps, time.perf_counter()
        record.steps, record.samples = step + 1, record.samples + len(y)
        record.seconds, current.clock = record.seconds + now - current.clock, now
        if step % max(1, current.planned // SAMPLES_PER_TASK) == 0 or step + 1 == current.planned:
            record.loss.append((step, loss))
            if not math.isnan(drift):
                record.drift.append((step, drift))
        for logger in self.loggers:
            if step % logger.every == 0:
                logger.on_step(record.index, step, self._total_steps(), loss, drift)
        return loss, drift

    def end_task(self) -> TaskRecord:
        """Ends the task begun: its record joins ``results``, and with ``out`` the state is saved.

        Raises:
            RuntimeError: no task was begun.
        """
        if self._current is None:
            raise RuntimeError("no task is under way: call begin_task first")
        record = self._current.record
        self.results.tasks.append(record)
        self.results.peak_memory = max(self.results.peak_memory, peak_memory())
        self._current = None
        for logger in self.loggers:
            logger.on_task_end(record, self._total_steps())
        if self.out is not None:
            self.save(self.out)
        return record

    @torch.no_grad()
    def evaluate(self, tasks: Any) -> list[float]:
        """Accuracy, a fraction, on each task's test data; becomes the row of the last trained task in ``results``.

        Args:
            tasks: a ``Task`` or a sequence of them (a slice of a stream), or a sequence of data as ``fit`` takes it, which
                stands for tasks 0, 1, ...
        """
        self.hnet.eval()
        accuracies = {}
        for position, task in enumerate([tasks] if isinstance(tasks, Task) else tasks):
            index, data = (task.index, task.test) if isinstance(task, Task) else (position, as_task_data(task))
            data = data.to(self.device)
            weights = self.hnet.generate(index)
            hits = torch.zeros((), dtype=torch.int64, device=self.device)
            for indices in torch.arange(len(data), device=self.device).split(EVALUATION_BATCH):
                x, y = data.batch(indices)
                hits += (self.hnet.target(weights, x.to(self.hnet.basis.dtype), index).argmax(1) == y).sum()
            accuracies[index] = hits.item() / len(data)
        if self.results.tasks:
            trained = len(self.results.tasks) - 1
            self.results.accuracy.setdefault(trained, {}).update(accuracies)
            for logger in self.loggers:
                logger.on_evaluate(trained, accuracies, self._total_steps())
            if self.out is not None:
                self.save(self.out)
        return list(accuracies.values())

    def save(self, directory: str | Path) -> None:
        """Writes the whole state to ``directory``: ``checkpoint.safetensors`` and ``results.json``.

        Raises:
            CheckpointError: it cannot be written or holds other files; what was there before is unchanged.
        """
        tensors = {f"hnet.{name}": tensor for name, tensor in self.hnet.state_dict().items()}
        state = {
            "trainer": self.config,
            "hnet": self.hnet.config,
            "target": nets.describe(self.hnet.target.module),
            "target_shapes": self.hnet.target.named_shapes(),
            "results": self.results.to_json(),
            "current": None,
        }
        if self._current is not None:
            state["current"] = self._current.record.to_json()
            tensors |= self._current.tensors()
            tensors |= {f"snapshot.{i}": tensor for i, tensor in enumerate(self.regularizer.state())}
        summary = {
            "name": self.config["name"],
            "config": self.config["settings"] or {**self.hnet.config, **self.config},
            "environment": environment(),
            "results": self.results.to_json(),
        }
        checkpoint.save(Path(directory), tensors, state, summary)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        target: nn.Module | None = None,
        device: torch.device | str | None = None,
        out: str | Path | None = None,
        progress: bool = True,
        loggers: Sequence[Logger] = (),
    ) -> Trainer:
        """The trainer that ``save`` wrote; it goes on bit for bit as the saved one would have.

        Args:
            directory: where ``save`` wrote.
            target: the target network, if it is not one of ``fh.nets``, which are rebuilt from the checkpoint.
            device, out, progress, loggers: as in the constructor.

        Raises:
            CheckpointError: missing, damaged or foreign files, or a target that does not fit.
        """
        tensors, state = checkpoint.load(Path(directory))
        try:
            hnet = rebuild(with_prefix(tensors, "hnet."), state, target)
            trainer = cls(hnet, **state["trainer"], device=device, out=out, progress=progress, loggers=loggers)
            trainer.results = Results.from_json(state["results"])
            if state["current"] is not None:
                record = TaskRecord.from_json(state["current"])
                snapshot = with_prefix(tensors, "snapshot.")
                trainer._current = trainer._begin(record.index, record.name)
                trainer._current.restore(record, tensors)
                trainer.regularizer.restore(record.index, [snapshot[str(i)] for i in range(len(snapshot))])
        except UNFIT as error:
            raise unfit(Path(directory) / checkpoint.CHECKPOINT, error) from error
        return trainer

    def _total_steps(self) -> int:
        """Steps of all tasks so far, the one under way included."""
        return sum(record.steps for record in self.results.tasks) + self.current_step

    def _next(self, task: Any) -> tuple[int, str, TaskData]:
        index = len(self.results.tasks)
        if isinstance(task, Task):
            if task.index != index:
                raise ValueError(f"task {task.index} is not next: {index} tasks were trained so far, so task {index} is")
            return index, task.name, task.train.to(self.device)
        return index, "", as_task_data(task).to(self.device)

    def _begin(self, index: int, name: str) -> _TaskInTraining:
        """New optimizers, and a snapshot of what the past tasks generate now."""
        embedding, rest = self.hnet.embedding(index), [p for p in self.hnet.rest if p.requires_grad]
        held = [*self.hnet.theta, *([self.hnet.embedding(t) for t in range(index)] if self.plastic else [])]
        optimizer, options = OPTIMIZERS[self.config["optimizer"]]
        options = {**options, **self.config["optimizer_options"]}
        self.regularizer.snapshot(index)
        lr = self.config["lr"]
        groups = [{"params": [embedding], "lr": self.config["lr_embedding"] or lr}, *([{"params": rest}] if rest else [])]
        return _TaskInTraining(
            record=TaskRecord(index, name),
            held=held,
            free=[embedding, *rest],
            held_optimizer=optimizer(held, lr=lr, **options),  # type: ignore[call-arg]
            free_optimizer=optimizer(groups, lr=lr, **options),  # type: ignore[call-arg]
        )

    def _step(self, now: _TaskInTraining, x: Tensor, y: Tensor) -> tuple[float, float]:
        """One update; returns the task loss and the drift (NaN without one) before it."""
        parameters, statistics = [*now.held, *now.free], self.hnet.statistics
        rows = () if statistics is None else statistics.rows(now.record.index)  # the forward pass writes to them
        rows_before = [row.clone() for row in rows]
        loss = F.cross_entropy(self.hnet(x.to(self.hnet.basis.dtype), now.record.index), y)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        values: list[Tensor] = [loss.detach()]
        drift_grads: list[Tensor] = []
        if now.record.index > 0 and self.beta > 0:
            ahead = look_ahead(now.held_optimizer) if self.lookahead else [p.detach() for p in now.held]
            value, drift_grads = self._drift(ahead, now.record)
            values.append(value)
        try:
            loss_value, drift = self._finite(values, now.record)
        except NonFiniteLossError:
            for row, before in zip(rows, rows_before, strict=True):
                row.copy_(before)
            raise
        take_step(now.held_optimizer, drift_grads, self.beta)
        take_step(now.free_optimizer)
        return loss_value, drift

    def _drift(self, held: Sequence[Tensor], record: TaskRecord) -> tuple[Tensor, list[Tensor]]:
        """Drift of the past tasks' weights at these values of what moves, and its gradients for them."""
        num_theta, tasks = len(self.hnet.theta), None
        if self.reg_tasks is not None and self.reg_tasks < record.index:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, record.index, record.steps))
            tasks = torch.randperm(record.index, generator=generator)[: self.reg_tasks].tolist()
        embeddings = torch.stack(list(held[num_theta:])) if self.plastic else None
        value, grads, grad_embeddings = self.regularizer.value_and_grad(held[:num_theta], embeddings, tasks=tasks)
        if self.plastic:
            table = torch.zeros_like(self.regularizer.embeddings0)
            table[slice(None) if tasks is None else tasks] = grad_embeddings
            grads = [*grads, *table]
        return value, grads

    def _finite(self, values: list[Tensor], record: TaskRecord) -> tuple[float, float]:
        """Loss and drift, if there is one, as numbers: the step's one read from the device."""
        numbers = torch.stack(values).tolist()
        for what, number in zip(("loss", "drift"), numbers, strict=False):
            if not math.isfinite(number):
                kept = f"; the last checkpoint in {self.out} is untouched" if self.out else ""
                raise NonFiniteLossError(
                    f"{what} is {number} at task {record.index}, step {record.steps}: "
                    f"lower lr or beta, or look at the data{kept}"
                )
        return numbers[0], numbers[1] if len(numbers) > 1 else math.nan


class _TaskInTraining:
    """The task under way: what moves, held by the drift or on the task loss alone, and the optimizers that move it."""

    def __init__(
        self,
        record: TaskRecord,
        held: list[nn.Parameter],
        free: list[nn.Parameter],
        held_optimizer: torch.optim.Optimizer,
        free_optimizer: torch.optim.Optimizer,
    ):
        self.record, self.held, self.free = record, held, free
        self.held_optimizer, self.free_optimizer = held_optimizer, free_optimizer
        self.planned, self.clock = 0, 0.0  # steps to come in all; when the last one ended

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"held": self.held_optimizer, "free": self.free_optimizer}

    def tensors(self) -> dict[str, Tensor]:
        """The optimizers' state, named ``optimizer.WHICH.PARAMETER.KEY``."""
        return {
            f"optimizer.{which}.{i}.{key}": value
            for which, optimizer in self._optimizers().items()
            for i, entries in optimizer.state_dict()["state"].items()
            for key, value in entries.items()
            if value is not None
        }

    def restore(self, record: TaskRecord, tensors: dict[str, Tensor]) -> None:
        """Takes over what ``tensors`` wrote."""
        self.record = record
        for which, optimizer in self._optimizers().items():
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in with_prefix(tensors, f"optimizer.{which}.").items():
                i, key = name.split(".", 1)
                state.setdefault(int(i), {})[key] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
