"""HNET+TIR and HNET+R: plain classifiers that learn from replayed images of past tasks, beside those of the current one.

von Oswald, Henning, Grewe and Sacramento, Continual learning with hypernetworks, ICLR 2020.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthyper import checkpoint, nets
from fasthyper.environment import environment
from fasthyper.errors import NonFiniteLossError
from fasthyper.export import UNFIT, unfit, with_prefix, without_memory
from fasthyper.inference import BATCH
from fasthyper.interrupt import deferred_interrupt, stopped_by
from fasthyper.loggers import Logger
from fasthyper.lookahead import take_step
from fasthyper.metrics import Results, TaskRecord, is_sampled, peak_memory
from fasthyper.progress import training_bar
from fasthyper.replay_model import Decoders, ReplayModel
from fasthyper.streams import Task, TaskData, as_task_data
from fasthyper.streams.batches import Batches
from fasthyper.streams.stream import check_scenario
from fasthyper.trainer import ON_NONFINITE, Trainer, spoiled, tests_of
from fasthyper.training import SCHEDULES, optimizer_tensors, restore_optimizer, restore_rng, rng_tensors, set_rates, total

_Self = TypeVar("_Self", bound="_Method")


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """``-T^2 mean_b sum_c softmax(teacher_b / T)_c log softmax(student_b / T)_c`` (Hinton, Vinyals and Dean, 2015).

    Args:
        student, teacher: logits ``[..., C]`` and ``[..., K]``, K <= C; of classes that the teacher lacks they are 0, as in
            the paper's experiments.
    """
    teacher = F.pad(teacher, (0, student.shape[-1] - teacher.shape[-1]))
    found = (student / temperature).log_softmax(-1)
    return -(temperature**2) * ((teacher / temperature).softmax(-1) * found).sum(-1).mean()


@dataclass
class _Learning:
    """The task that a plain classifier is at."""

    record: TaskRecord
    optimizer: torch.optim.Optimizer
    teacher: nn.Module | None
    failed: int = 0  # last steps, in a row, that were not finite


class _Method(ABC):
    """What HNET+TIR and HNET+R share: a plain classifier that learns each task beside replayed images of the past ones."""

    has_teacher: ClassVar[bool] = False
    trainers: ClassVar[Mapping[str, type[Trainer]]] = MappingProxyType({"replay": ReplayModel})

    def __init__(
        self,
        replay: ReplayModel,
        net: nn.Module,
        *,
        lr: float = 1e-3,
        schedule: str = "constant",
        replay_weight: float = 0.5,
        seed: int = 0,
        out: str | Path | None = None,
        save_every: float = checkpoint.SAVE_EVERY,
        on_nonfinite: str = "stop",
        name: str = "run",
        settings: dict[str, Any] | None = None,
        progress: bool = True,
        loggers: Sequence[Logger] = (),
    ):
        if on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {', '.join(ON_NONFINITE)}, got {on_nonfinite!r}")
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}")
        if lr <= 0 or not 0 <= replay_weight <= 1 or seed < 0:
            raise ValueError("lr must be positive, replay_weight in 0..1, seed not negative")
        self.config: dict[str, Any] = {
            "lr": lr,
            "schedule": schedule,
            "replay_weight": replay_weight,
            "seed": seed,
            "name": name,
            "settings": settings,
        }
        self.replay, self.net = replay, net.to(replay.device)
        self.lr, self.schedule, self.replay_weight, self.seed = lr, schedule, replay_weight, seed
        self.out = None if out is None else Path(out)
        self.progress, self.loggers = progress, list(loggers)
        self.results = Results()
        self.net_records: list[TaskRecord] = []  # of the plain classifier
        self._now: _Learning | None = None
        self._rng: dict[str, Tensor] = {}
        self.on_nonfinite = on_nonfinite
        self._saver = checkpoint.Saver(self.out, save_every, self._contents)
        for trainer in self._trainers().values():
            if trainer.out is None:
                trainer._saver = self._saver  # what is kept while a part trains is all of it

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.replay.device

    @property
    def num_tasks(self) -> int:
        """Tasks learned so far."""
        return len(self.results.tasks)

    def fit(self, task: Any, *, steps: int, batch_size: int = 128) -> TaskRecord:
        """Trains the next task, each part for ``steps`` steps; goes on where it stopped if this task was interrupted.

        The classifiers come first, with images of the past tasks, then the replay model, on this task. It learns as many
        tasks as its hypernetwork has embeddings: the last one of a sequence is never replayed, and may be left out.

        Args:
            task: a ``Task`` of a stream, or data as ``Trainer.fit`` takes it; labels count from 0 in each task.
            steps: optimizer steps of each part.
            batch_size: examples per step, B; beside them go ``ceil(B / t)`` images of each of t past tasks.

        Returns:
            The record of the label classifier, with the seconds of all parts, and the replay model's drift where the label
            classifier has none.

        Raises:
            ValueError: the task is not the next one, labels or sizes out of range.  NonFiniteLossError: as ``Trainer.fit``.
            KeyboardInterrupt, SystemExit: after Ctrl-C and SIGTERM, as ``Trainer.fit``.
        """
        index = self.num_tasks
        if isinstance(task, Task) and task.index != index:
            raise ValueError(f"task {task.index} is not next: {index} tasks were trained so far, so task {index} is")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        restore_rng(self._rng, self.device)
        self._rng = {}
        records = self._fit_parts(index, task, steps, batch_size)
        drift = next((record.drift for record in records if record.drift), [])
        record = replace(records[0], seconds=sum(record.seconds for record in records), drift=drift)
        self.results.tasks.append(record)
        self.results.peak_memory = max(self.results.peak_memory, peak_memory())
        for logger in self.loggers:
            logger.on_task_end(record, self._total_steps())
        self._saver.save()
        return record

    def evaluate(self, tasks: Any) -> list[float]:
        """Accuracy, a fraction, on each task's test data; becomes the row of the last trained task in ``results``.

        Args:
            tasks: as ``Trainer.evaluate`` takes them.

        Raises:
            ValueError: no task was trained yet.
        """
        if not self.num_tasks:
            raise ValueError("no task was trained yet: call fit first")
        named = {index: data.to(self.device) for index, data in tests_of(tasks).items()}
        with torch.no_grad():
            hits = torch.stack(self._hits(named)).tolist()
        accuracies = {index: hit / len(named[index]) for index, hit in zip(named, hits, strict=True)}
        self.results.accuracy.setdefault(self.num_tasks - 1, {}).update(accuracies)
        for logger in self.loggers:
            logger.on_evaluate(self.num_tasks - 1, accuracies, self._total_steps())
        self._saver.save()
        return list(accuracies.values())

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Images of all tasks that the replay model has learned, uint8 ``[K, count, F]``."""
        return self.replay.sample(range(len(self.replay.results.tasks)), count, seed)

    def save(self, directory: str | Path) -> None:
        """Writes the whole state to ``directory``: ``checkpoint.safetensors`` and ``results.json``.

        Raises:
            CheckpointError: it cannot be written or holds other files; what was there before is unchanged.
        """
        checkpoint.save(Path(directory), *self._contents())

    def flush(self) -> None:
        """Waits until what was to be saved in ``out`` lies there; raises as ``Trainer.flush`` does."""
        self._saver.flush()

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """What is saved: tensors, state and, for reports, results."""
        tensors = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        state = {
            "method": self.config,
            "net": nets.describe(self.net),
            "net_records": [record.to_json() for record in self.net_records],
            "results": self.results.to_json(),
            "current": None,
        }
        if self._now is not None:
            state["current"] = self._now.record.to_json()
            tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(self._now.optimizer).items()}
            if self._now.teacher is not None:
                tensors |= {f"teacher.{name}": value for name, value in self._now.teacher.state_dict().items()}
        for name, trainer in self._trainers().items():
            own, state[name] = trainer.state()
            tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        summary = {
            "name": self.config["name"],
            "config": self.config["settings"] or self.config,
            "environment": environment(),
            "results": state["results"],
        }
        return {**tensors, **(self._rng or rng_tensors(self.device))}, state, summary

    @classmethod
    def load(
        cls: type[_Self],
        directory: str | Path,
        *,
        net: nn.Module | None = None,
        target: nn.Module | None = None,
        device: torch.device | str | None = None,
        out: str | Path | None = None,
        save_every: float = checkpoint.SAVE_EVERY,
        on_nonfinite: str = "stop",
        progress: bool = True,
        loggers: Sequence[Logger] = (),
        **more: Any,
    ) -> _Self:
        """What ``save`` wrote; it goes on bit for bit as the saved one would have.

        Args:
            directory: where ``save`` wrote.
            net, target: the plain classifier and the target of the label classifier, where they are not of ``fh.nets``.
            device: where to train.  out, save_every, on_nonfinite, progress, loggers: as in the constructor.  more:
                ``memory_budget`` and the like, of the trainers.

        Raises:
            CheckpointError: missing, damaged or foreign files, or a network that does not fit.
        """
        tensors, state = checkpoint.load(Path(directory))
        try:
            trainers = {
                name: trainer.from_state(
                    with_prefix(tensors, f"{name}."),
                    state[name],
                    target=None if name == "replay" else target,
                    device=device,
                    progress=progress,
                    on_nonfinite=on_nonfinite,
                    **more,
                )
                for name, trainer in cls.trainers.items()
            }
            own = with_prefix(tensors, "net.")
            net = net if net is not None else without_memory(state["net"], len(own))
            for name, tensor in net.state_dict().items():
                if own[name].is_floating_point() != tensor.is_floating_point():
                    raise ValueError(f"net.{name} is {own[name].dtype} in it")
            net.load_state_dict(own, assign=True)
            options: dict[str, Any] = {**trainers, "progress": progress, "loggers": loggers}
            options |= {"out": out, "save_every": save_every, "on_nonfinite": on_nonfinite}
            method = cls(net=net, **state["method"], **options)
            method.results = Results.from_json(state["results"])
            method.net_records = [TaskRecord.from_json(record) for record in state["net_records"]]
            if state["current"] is not None:
                now = method._now = method._begin(TaskRecord.from_json(state["current"]))
                restore_optimizer(now.optimizer, with_prefix(tensors, "optimizer."))
                if now.teacher is not None:
                    now.teacher.load_state_dict(with_prefix(tensors, "teacher."))
        except UNFIT as error:
            raise unfit(Path(directory) / checkpoint.CHECKPOINT, error) from error
        method._rng = {name: tensor for name, tensor in tensors.items() if name.startswith("rng.")}
        return method

    def _trainers(self) -> dict[str, Trainer]:
        return {name: getattr(self, name) for name in self.trainers}

    def _total_steps(self) -> int:
        return sum(record.steps for record in self.results.tasks)

    @abstractmethod
    def _loss(self, logits: Tensor, y: Tensor, replayed: Tensor | None, taught: Tensor | None) -> Tensor:
        """Loss of a batch of the next task.

        Args:
            logits: ``[B, C]``, of its images.  y: ``[B]``, their labels.
            replayed: ``[t, n, C]``, of n images of each past task; ``None`` without any.
            taught: the teacher's for them, if there is one.
        """

    @abstractmethod
    def _fit_parts(self, index: int, task: Any, steps: int, batch_size: int) -> list[TaskRecord]:
        """Trains what has not yet learned the task; the label classifier's record comes first."""

    @abstractmethod
    def _hits(self, named: dict[int, TaskData]) -> list[Tensor]:
        """How many examples of each task are right, int64 ``[]``."""

    def _fit_replay(self, index: int, task: Any, steps: int, batch_size: int) -> list[TaskRecord]:
        if len(self.replay.results.tasks) == index < self.replay.hnet.num_tasks:
            self.replay.fit(task, steps=steps, batch_size=batch_size)
        return self.replay.results.tasks[index : index + 1]

    def _fit_net(self, index: int, task: Any, steps: int, batch_size: int) -> TaskRecord:
        """Trains the plain classifier on the task, if it has not learned it yet."""
        if len(self.net_records) > index:
            return self.net_records[index]
        data = (task.train if isinstance(task, Task) else as_task_data(task)).to(self.device)
        batches = Batches(len(data), batch_size, seed=self.seed, task=index, device=self.device)
        self._check(index, data)
        now = self._now = self._now or self._begin(TaskRecord(index, task.name if isinstance(task, Task) else ""))
        record, decoders, each = now.record, None, 0
        if len(self.replay.results.tasks) < index:
            raise ValueError(
                f"no decoder was trained for task {len(self.replay.results.tasks)}: give the replay model's hypernetwork "
                "an embedding for every task but the last"
            )
        if index:
            decoders, each = Decoders(self.replay, range(index)), -(-batches.batch_size // index)
        self.net.train()
        clock, loss = time.perf_counter(), math.nan
        title = f"task {index + 1} classifier"
        with (
            deferred_interrupt() as interrupted,
            training_bar(title, record.steps, steps, self.progress) as show,
        ):
            for step in range(record.steps, steps):
                images = None
                if decoders is not None:
                    noise = self.replay.noise(index * each, self.seed, index, step)
                    images = decoders(noise.view(index, each, -1))
                set_rates(now.optimizer, self.schedule, step / steps)
                try:
                    loss, now.failed = self._step(now, *data.batch(batches.indices(step)), images), 0
                except NonFiniteLossError as error:
                    now.failed += 1
                    if now.failed >= ON_NONFINITE[self.on_nonfinite]:
                        self._saver.save()
                        self._saver.flush()
                        raise spoiled(error, self.out, batches.indices(step)) from error
                    record.skipped += 1
                before, clock = clock, time.perf_counter()
                record.seconds += clock - before
                record.steps, record.samples = step + 1, record.samples + batches.batch_size
                if not now.failed and is_sampled(step, steps, self.replay.hnet.num_tasks):
                    record.loss.append((step, loss))
                show(step + 1, loss, math.nan)
                if signum := interrupted():
                    self._saver.save()
                    self._saver.flush()
                    raise stopped_by(signum)
                self._saver.save_if_due()
        self.net_records.append(record)
        self._now = None
        return record

    def _begin(self, record: TaskRecord) -> _Learning:
        """A new optimizer, and a copy of what was learned before, to teach."""
        optimizer = torch.optim.Adam(self.net.parameters(), lr=self.lr, fused=True)
        teacher = None
        if self.has_teacher and record.index:
            teacher = copy.deepcopy(self.net).eval().requires_grad_(False)
        return _Learning(record, optimizer, teacher)

    def _step(self, now: _Learning, x: Tensor, y: Tensor, images: Tensor | None) -> float:
        """One update of the plain classifier on a batch and replayed ``images`` ``[t, n, F]``; the loss before it."""
        parameters = list(self.net.parameters())
        x, replayed, taught, size = x.to(parameters[0].dtype), None, None, len(x)
        if images is not None:
            past = images.flatten(0, 1).to(x.dtype).view(-1, *x.shape[1:])
            x = torch.cat([x, past])
            if now.teacher is not None:
                with torch.no_grad():
                    taught = now.teacher(past).unflatten(0, images.shape[:2])
        logits = self.net(x)
        if images is not None:
            replayed = logits[size:].unflatten(0, images.shape[:2])
        loss = self._loss(logits[:size], y, replayed, taught)
        grads = torch.autograd.grad(loss, parameters)
        number, gradient = torch.stack([loss.detach(), total(grads)]).tolist()
        if not math.isfinite(number + gradient):
            what = f"gradient is {gradient}" if math.isfinite(number) else f"loss is {number}"
            raise NonFiniteLossError(
                f"the classifier's {what} at task {now.record.index}, step {now.record.steps}: lower lr, or look at the data"
            )
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        take_step(now.optimizer)
        return number

    @abstractmethod
    def _check(self, index: int, data: TaskData) -> None:
        """Raises ``ValueError`` where the classifier has no outputs for the task."""

    def _outputs(self, x: Tensor) -> Tensor:
        """Of the plain classifier, as in evaluation."""
        return self.net.eval()(x.to(next(self.net.parameters()).dtype))

    def _mixed(self, own: Tensor, past: Tensor | None) -> Tensor:
        """Of the losses of a batch and of replayed images, their weighted mean."""
        return own if past is None else torch.lerp(own, past, self.replay_weight)


class HnetR(_Method):
    """HNET+R: a plain classifier is held by distillation on replayed images; only their decoders are held by a hypernetwork.

    On each batch of task t, ``(1 - w) CE(images of the task) + w D(replayed images)``, ``w`` being ``replay_weight`` and D
    ``distillation_loss`` from a copy of the classifier made before the task (no loss D in the first one).

    Args:
        replay: the replay model, which is trained here.
        net: the classifier, any module ``[B, ...]`` to ``[B, outputs]``; trained in place. See ``fh.nets.xavier_``.
        scenario: ``"task"``: outputs are heads of ``classes`` each, and the task is told; of a replayed image its task's
            head is distilled. ``"domain"``: all tasks share ``classes`` outputs. ``"class"``: outputs as for ``"task"``, of
            which those of all tasks so far compete, in training too, and the task is not told.
        classes: of a task.
        temperature: of the distillation.
        lr, schedule, replay_weight, seed: of the classifier; a new Adam for each task. Schedules are those of ``Trainer``.
        out, save_every, on_nonfinite, name, settings, progress: as for ``Trainer``.
        loggers: told of finished tasks and of evaluations.

    Raises:
        ValueError: an unknown scenario, or numbers out of range.

    Example::

        net = fh.nets.xavier_(fh.nets.MLP(784, (400, 400), 10), seed=2)
        method = fh.HnetR(replay, net, scenario="class", classes=2)         # replay: see fh.ReplayModel
        for task in stream:
            method.fit(task, steps=2000)
            method.evaluate(stream[: task.index + 1])
    """

    has_teacher = True

    def __init__(
        self,
        replay: ReplayModel,
        net: nn.Module,
        *,
        scenario: str,
        classes: int,
        temperature: float = 2.0,
        **options: Any,
    ):
        check_scenario(scenario)
        if classes < 1 or temperature <= 0:
            raise ValueError("classes must be at least 1 and temperature positive")
        super().__init__(replay, net, **options)
        self.config |= {"scenario": scenario, "classes": classes, "temperature": temperature}
        self.scenario, self.classes, self.temperature = scenario, classes, temperature

    def _fit_parts(self, index: int, task: Any, steps: int, batch_size: int) -> list[TaskRecord]:
        own = self._fit_net(index, task, steps, batch_size)
        return [own, *self._fit_replay(index, task, steps, batch_size)]

    def _loss(self, logits: Tensor, y: Tensor, replayed: Tensor | None, taught: Tensor | None) -> Tensor:
        task, classes = self.num_tasks, self.classes
        if self.scenario != "domain":
            logits = logits[:, : (task + 1) * classes]
            if self.scenario == "task":
                logits = logits[:, task * classes :]
            else:
                y = y + task * classes
        own = F.cross_entropy(logits, y)
        if replayed is None or taught is None:
            return own
        if self.scenario == "task":
            replayed, taught = _own_heads(replayed, classes), _own_heads(taught, classes)
        elif self.scenario == "class":
            replayed, taught = replayed[..., : (task + 1) * classes], taught[..., : task * classes]
        return self._mixed(own, distillation_loss(replayed, taught, self.temperature))

    def _hits(self, named: dict[int, TaskData]) -> list[Tensor]:
        hits = []
        for task, data in named.items():
            first, last = {
                "task": (task * self.classes, (task + 1) * self.classes),
                "domain": (0, self.classes),
                "class": (0, self.num_tasks * self.classes),
            }[self.scenario]
            offset = task * self.classes if self.scenario == "class" else 0
            found = [self._outputs(x)[:, first:last].argmax(1) for x in _inputs_of(data)]
            hits.append((torch.cat(found) == data.labels + offset).sum())
        return hits

    def _check(self, index: int, data: TaskData) -> None:
        largest = int(data.labels.max())
        if largest >= self.classes:
            raise ValueError(
                f"task {index} has label {largest}, but tasks have {self.classes} classes, counted from 0 in each"
            )


class HnetTIR(_Method):
    """HNET+TIR: a plain classifier, held by replayed images, tells the task; under its weights a hypernetwork's target tells
    the label.

    The task classifier has an output for each task, of which those so far compete; of a replayed image the task is known:
    ``(1 - w) CE(images of the task) + w CE(replayed images)``, ``w`` being ``replay_weight``. In the first task it has
    nothing to learn.

    Args:
        replay: the replay model, which is trained here.
        net: the task classifier, any module ``[B, ...]`` to ``[B, tasks]``; trained in place. See ``fh.nets.xavier_``.
        labels: trains the label classifier. Where tasks have output heads of their own, an example is right if both task
            and label are (CL3); where they share the outputs, if the label is (CL2).
        lr, schedule, replay_weight, seed, out, save_every, on_nonfinite, name, settings, progress, loggers: as of ``HnetR``.

    Raises:
        ValueError: numbers out of range, or parts on different devices.
    """

    trainers = MappingProxyType({"replay": ReplayModel, "labels": Trainer})

    def __init__(self, replay: ReplayModel, net: nn.Module, labels: Trainer, **options: Any):
        if labels.device != replay.device:
            raise ValueError(f"the label classifier is on {labels.device}, the replay model on {replay.device}")
        self.labels = labels
        super().__init__(replay, net, **options)

    @torch.no_grad()
    def infer_tasks(self, x: Tensor) -> Tensor:
        """The task of each example ``[B, ...]``, among those learned so far: int64 ``[B]``."""
        return self._outputs(x)[:, : self.num_tasks].argmax(1)

    def _fit_parts(self, index: int, task: Any, steps: int, batch_size: int) -> list[TaskRecord]:
        told = self._fit_net(index, task, steps if index else 0, batch_size)
        if len(self.labels.results.tasks) == index:
            self.labels.fit(task, steps=steps, batch_size=batch_size)
        return [self.labels.results.tasks[index], told, *self._fit_replay(index, task, steps, batch_size)]

    def _loss(self, logits: Tensor, y: Tensor, replayed: Tensor | None, taught: Tensor | None) -> Tensor:
        task = self.num_tasks
        own = F.cross_entropy(logits[:, : task + 1], torch.full_like(y, task))
        if replayed is None:
            return own
        tasks = torch.arange(task, device=y.device).repeat_interleave(replayed.shape[1])
        return self._mixed(own, F.cross_entropy(replayed.flatten(0, 1)[:, : task + 1], tasks))

    def _hits(self, named: dict[int, TaskData]) -> list[Tensor]:
        """Every task's weights are made once, for all examples that were found to be of it."""
        hnet = self.labels.hnet.eval()
        found = [torch.cat([self.infer_tasks(x) for x in _inputs_of(data)]) for data in named.values()]
        hits = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in named]
        for guess in range(self.num_tasks):
            weights = hnet.generate(guess)
            for hit, told, (task, data) in zip(hits, found, named.items(), strict=True):
                if hnet.target.outputs_per_task is not None and guess != task:
                    continue
                for indices in (told == guess).nonzero().flatten().split(BATCH):
                    x, y = data.batch(indices)
                    hit += (hnet.target(weights, x.to(hnet.basis.dtype), guess).argmax(1) == y).sum()
        return hits

    def _check(self, index: int, data: TaskData) -> None:
        with torch.no_grad():
            num_outputs = self._outputs(data.batch(torch.zeros(1, dtype=torch.int64))[0]).shape[1]
        if index >= num_outputs:
            raise ValueError(f"the task classifier has {num_outputs} outputs, none for task {index}")


def _own_heads(logits: Tensor, classes: int) -> Tensor:
    """Of logits ``[t, n, C]`` those of the head of the row's task, ``[t, n, classes]``."""
    tasks = torch.arange(len(logits), device=logits.device)
    return logits.unflatten(2, (-1, classes))[tasks, :, tasks]


def _inputs_of(data: TaskData) -> Iterator[Tensor]:
    """All inputs, a batch after the other."""
    return (data.batch(indices)[0] for indices in torch.arange(len(data), device=data.device).split(BATCH))
