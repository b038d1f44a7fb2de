"""Avalanche: fasthyper's training as a strategy, and its regularizer as a plugin for any strategy.

Import this module before ``avalanche``: it mends torchvision, which Avalanche imports, where that does not load by itself.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper.hypernet import ChunkedHypernet
from fasthyper.interrupt import deferred_interrupt, stopped_by
from fasthyper.lookahead import look_ahead
from fasthyper.regularizer import OutputRegularizer
from fasthyper.streams.adapters import read
from fasthyper.streams.batches import Batches
from fasthyper.streams.fetch import data_home, fetch
from fasthyper.streams.stream import TaskData
from fasthyper.trainer import Trainer
from fasthyper.vision import torchvision

try:
    torchvision()
    from avalanche.core import SupervisedPlugin
    from avalanche.models import MultiTaskModule
    from avalanche.training.plugins.evaluation import default_evaluator
    from avalanche.training.templates import SupervisedTemplate
except ImportError as error:
    if (error.name or "avalanche").partition(".")[0] != "avalanche":  # something that Avalanche itself misses
        raise
    message = "avalanche-lib 0.6.0 is not installed: pip install -c constraints.txt 'fasthyper[avalanche]'"
    raise ModuleNotFoundError(message, name="avalanche") from error

NOT_CALLED = ("before_forward", "after_forward", "before_backward", "after_backward", "before_update", "after_update")


class HypernetModule(MultiTaskModule):
    """A hypernetwork as a multi-task module of Avalanche: task label t is the hypernetwork's task t.

    Embeddings that an experience needs beyond those there are made as it comes up.
    """

    def __init__(self, hnet: ChunkedHypernet):
        super().__init__()
        self.hnet = hnet
        self.known_train_tasks_labels: set[int] = set()

    def adaptation(self, experience: Any) -> None:
        labels = {int(label) for label in experience.task_labels}
        self.make_room(max(labels))
        if self.training:
            self.known_train_tasks_labels = self.known_train_tasks_labels | labels

    def make_room(self, task: int) -> None:
        """Adds tasks until ``task`` has an embedding."""
        while self.hnet.num_tasks <= task:
            self.hnet.add_task()

    def forward(self, x: Tensor, task_labels: Tensor | int | None) -> Tensor | dict[int, Tensor]:
        """Outputs ``[B, num_classes]`` with the weights of each example's task; of each task trained so far for ``None``."""
        if task_labels is None:
            return self.forward_all_tasks(x)
        if isinstance(task_labels, int):
            return self.forward_single_task(x, task_labels)
        tasks = task_labels.unique()
        return self.hnet(x.to(self.hnet.basis.dtype), task_labels if len(tasks) > 1 else int(tasks[0]))

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        """Outputs ``[B, num_classes]`` with the weights of one task."""
        return self.hnet(x.to(self.hnet.basis.dtype), task_label)


class HypernetStrategy(SupervisedTemplate):
    """Trains each experience as ``trainer.fit`` trains a task: gradient, look-ahead, drift of all past tasks, step.

    Experience t of a stream is task t, with or without task labels. Evaluation, metrics, loggers and the callbacks of
    experiences, epochs, iterations and evaluation are Avalanche's; an iteration itself is one piece, and ``NOT_CALLED`` are
    not called. ``strategy.loss`` is the task loss. Optimizers are the trainer's, new for each experience.

    Args:
        trainer: with the hypernetwork and all settings of the step; ``trainer.save`` keeps the state.
        train_mb_size, train_epochs, eval_mb_size, plugins, evaluator, eval_every, peval_mode: as in Avalanche.
        in_memory: read an experience's data once, as tensors on the trainer's device, and cut shuffled batches from them,
            leaving out what fills none at the end of an epoch: no cost per example, but a random transform is drawn once.
            ``False``, or ``shuffle`` or ``drop_last`` given to ``train``, or a plugin that brings a data loader of its own:
            batches are those of Avalanche's data loader.

    After Ctrl-C, which waits for the end of an iteration, training the same experience goes on where it stopped.

    Raises:
        TypeError: a plugin needs a callback that is not called.
    """

    def __init__(
        self,
        *,
        trainer: Trainer,
        train_mb_size: int = 128,
        train_epochs: int = 1,
        eval_mb_size: int = 2048,
        plugins: Sequence[Any] | None = None,
        evaluator: Any = default_evaluator,
        eval_every: int = -1,
        peval_mode: str = "epoch",
        in_memory: bool = True,
    ):
        for plugin in plugins or ():
            own = [n for n in NOT_CALLED if getattr(type(plugin), n, None) not in (None, getattr(SupervisedPlugin, n))]
            if own:
                raise TypeError(
                    f"{type(plugin).__name__} acts in {own[0]}, which HypernetStrategy does not call; "
                    "use it with HypernetRegularizerPlugin and a strategy of Avalanche"
                )
        super().__init__(
            model=HypernetModule(trainer.hnet),
            optimizer=None,
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=trainer.device,
            plugins=plugins,
            evaluator=evaluator,
            eval_every=eval_every,
            peval_mode=peval_mode,
        )
        self.trainer, self.in_memory = trainer, in_memory
        self._task = 0  # of the experience at hand
        self._data: TaskData | None = None
        self._batches: Batches | None = None
        self._own_loader: Any = None

    def make_optimizer(self, **kwargs: Any) -> None:
        """Nothing to do: the trainer makes its own."""

    def model_adaptation(self, model: nn.Module | None = None) -> nn.Module:
        """Gives the experience an embedding."""
        self._task = self.experience.logging().current_experience
        self.model.make_room(self._task)
        return self.model if model is None else model

    def make_train_dataloader(self, **kwargs: Any) -> None:
        super().make_train_dataloader(**kwargs)
        reads = self.in_memory and not {"shuffle", "drop_last"} & set(kwargs)
        self._own_loader = self.dataloader if reads else None

    def forward(self) -> Tensor:
        """Outputs for the current mini-batch, of the experience's task."""
        return self.model.forward_single_task(self.mb_x, self._task)

    def _before_training_exp(self, **kwargs: Any) -> None:
        task, done = self.experience.logging().current_experience, len(self.trainer.results.tasks)
        if task != done:
            raise ValueError(f"experience {task} is not next: {done} were trained so far, so experience {done} is")
        super()._before_training_exp(**kwargs)
        self._data, steps_per_epoch = None, 0
        if self._own_loader is not None and self.dataloader is self._own_loader:  # no plugin has brought another
            self._data = read(self.adapted_dataset).to(self.device)
            self._batches = Batches(
                len(self._data), self.train_mb_size, seed=self.trainer.seed, task=task, device=self.device
            )
            steps_per_epoch = self._batches.per_epoch
            self._check_labels(self._data.labels)
        else:
            steps_per_epoch = len(self.dataloader)
        self.trainer.begin_task(steps=self.train_epochs * steps_per_epoch, name=f"experience {task}")

    def training_epoch(self, **kwargs: Any) -> None:
        """One pass over the experience's data."""
        keep_outputs = self.trainer.hnet.register_forward_hook(self._keep_outputs)
        try:
            with deferred_interrupt() as interrupted:
                for batch in self._minibatches():
                    if self._stop_training or interrupted():
                        break
                    self.mbatch = batch
                    self._before_training_iteration(**kwargs)
                    loss, _ = self.trainer.step(self.mb_x, self.mb_y)
                    self.loss = torch.tensor(loss, device=self.device)
                    self._after_training_iteration(**kwargs)
                if signum := interrupted():
                    if self.trainer.out is not None:
                        self.trainer.save(self.trainer.out)
                    raise stopped_by(signum)
        finally:
            keep_outputs.remove()

    def _after_training_exp(self, **kwargs: Any) -> None:
        self.trainer.end_task()
        self._data = self._batches = self._own_loader = None
        super()._after_training_exp(**kwargs)

    def _minibatches(self) -> Iterator[list[Tensor]]:
        """Inputs, labels, and the task label of each example."""
        label = getattr(self.experience, "task_label", self._task)
        if self._data is not None and self._batches is not None:
            stop = (self.clock.train_exp_epochs + 1) * self._batches.per_epoch
            for step in range(max(self.trainer.current_step, stop - self._batches.per_epoch), stop):
                x, y = self._data.batch(self._batches.indices(step))
                yield [x, y, torch.full_like(y, label)]
            return
        for batch in self.dataloader:
            self.mbatch = batch
            self._unpack_minibatch()
            if len(self.mbatch) > 2 and (self.mbatch[-1] != label).any():
                raise ValueError(f"a batch of experience {self._task} holds examples of other tasks than its own")
            self._check_labels(self.mbatch[1])
            yield self.mbatch

    def _keep_outputs(self, module: nn.Module, inputs: Any, outputs: Tensor) -> None:
        self.mb_output = outputs.detach()

    def _check_labels(self, labels: Tensor) -> None:
        outputs = self.trainer.hnet.target.outputs_per_task
        if outputs is not None and labels.max() >= outputs:
            raise ValueError(
                f"labels of experience {self._task} go to {int(labels.max())}, but each task has {outputs} outputs: "
                "make the benchmark with class_ids_from_zero_in_each_exp=True"
            )


class HypernetRegularizerPlugin(SupervisedPlugin):
    """Adds ``beta`` times the drift of past tasks' weights to the loss of a strategy whose model is a ``HypernetModule``.

    The experiences' task labels must be 0, 1, ... in the order of training.

    Args:
        beta: weight of the drift.
        lookahead: take the drift where the strategy's optimizer would step on its loss alone (DESIGN E4); its gradient is
            then added after backward, without a graph. Otherwise the penalty joins the loss before backward.

    Raises:
        ValueError: ``beta`` is negative.
    """

    def __init__(self, beta: float = 0.01, *, lookahead: bool = False):
        super().__init__()
        if beta < 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        self.beta, self.lookahead = beta, lookahead
        self.regularizer: OutputRegularizer | None = None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Holds what the tasks trained so far generate now."""
        if not isinstance(strategy.model, HypernetModule):
            raise TypeError(f"the strategy's model must be a HypernetModule, got {type(strategy.model).__name__}")
        done, labels = strategy.clock.train_exp_counter, sorted(set(strategy.experience.task_labels))
        if labels != [done]:
            raise ValueError(
                f"experience {done} has task labels {labels}, but must have {done}: make the benchmark with task labels "
                "(return_task_id=True, or task_labels=True)"
            )
        hnet = strategy.model.hnet
        if self.regularizer is None or self.regularizer.hnet is not hnet:
            self.regularizer = OutputRegularizer(hnet)
        self.regularizer.snapshot(done)

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if self._acts() and not self.lookahead:
            strategy.loss += self.beta * self.regularizer.penalty()  # type: ignore[union-attr]

    def after_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if self._acts() and self.lookahead:
            assert self.regularizer is not None
            parameters = [p for group in strategy.optimizer.param_groups for p in group["params"]]
            ahead = dict(zip(parameters, look_ahead(strategy.optimizer), strict=True))
            theta = self.regularizer.hnet.theta
            value, grads, _ = self.regularizer.value_and_grad([ahead.get(p, p.detach()) for p in theta])
            for p, grad in zip(theta, grads, strict=True):
                p.grad = self.beta * grad if p.grad is None else p.grad.add_(grad, alpha=self.beta)
            strategy.loss = strategy.loss.detach() + self.beta * value

    def _acts(self) -> bool:
        return self.regularizer is not None and self.regularizer.num_past > 0 and self.beta > 0


def mnist_root(data_dir: str | os.PathLike[str] | None = None, log: Callable[[str], None] | None = None) -> Path:
    """A folder to give Avalanche's MNIST benchmarks as ``dataset_root``: fasthyper's own copy of the data, unpacked.

    Args:
        data_dir: folder with the four ``*-ubyte.gz`` files; ``None``: fasthyper's cache, filled on first use.
        log: told what is fetched.

    Raises:
        DataError: the files are damaged or cannot be had.
    """
    packed, root = fetch("mnist", data_dir, log), data_home() / "torchvision"
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for path in packed.glob("*-ubyte.gz"):
        if not (raw / path.stem).exists():
            part = raw / f"{path.stem}.part{os.getpid()}"
            part.write_bytes(gzip.decompress(path.read_bytes()))
            part.replace(raw / path.stem)
    return root
