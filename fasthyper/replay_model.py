"""The replay model of HNET+TIR and HNET+R: a variational autoencoder whose decoders a hypernetwork makes and holds.

von Oswald, Henning, Grewe and Sacramento, Continual learning with hypernetworks, ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fasthyper import nets
from fasthyper.hypernet import ChunkedHypernet
from fasthyper.mixed import run_together
from fasthyper.streams import TaskData
from fasthyper.streams.batches import derived_seed, to_device
from fasthyper.trainer import Trainer
from fasthyper.training import TaskInTraining

MEMORY = 1 << 30  # bytes that the weights of past tasks' decoders may take; beyond, they are made again in each step
_OF_VAE, _OF_REPLAY, _OF_SAMPLES = 1, 2, 3  # what noise is for, so that no two draws of a step are the same


def vae_loss(logits: Tensor, x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Mean over examples of the pixels' mean cross-entropy and 1/F of the divergence from the standard normal prior.

    ``1/F sum_f BCE(sigmoid(logits_f), x_f) - 1/(2F) sum_l (1 + log_variance_l - mean_l^2 - exp(log_variance_l))``

    Args:
        logits, x: ``[B, F]``; ``x`` in 0..1.
        mean, log_variance: ``[B, L]``, of the latents.
    """
    divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum() / (2 * x.numel())
    return F.binary_cross_entropy_with_logits(logits, x) + divergence


class ReplayModel(Trainer):
    """Trains a variational autoencoder on one task after the other, holding the decoders of the past ones.

    The hypernetwork makes a decoder for each task, which is told the task, one-hot, as well. All tasks share the
    encoder; nothing holds it, for only decoders are needed to replay. The loss is ``vae_loss``. Arguments, checkpoints,
    look-ahead and graphs are those of ``Trainer``.

    Args:
        hnet: whose target is an ``fh.nets.VAE``, made with ``generate="decoder.*"`` and ``rest="trained"``.

    Raises:
        ValueError: another target, or other parameters of it generated or trained.

    Example::

        vae = fh.nets.xavier_(fh.nets.VAE(784, (400, 400), (50, 150)), seed=1)
        hnet = fh.ChunkedHypernet(vae, num_tasks=4, chunk_size=50_000, hidden=(10, 10), task_dim=96, chunk_dim=96,
                                  activation="elu", generate="decoder.*", rest="trained")
        replay = fh.ReplayModel(hnet, lr=1e-3, beta=0.01)
    """

    def __init__(self, hnet: ChunkedHypernet, **options: Any):
        vae = hnet.target.module
        if not isinstance(vae, nets.VAE):
            raise ValueError(f"a replay model needs a hypernetwork for an fh.nets.VAE, got one for a {type(vae).__name__}")
        decoder = {name for name, _ in vae.named_parameters() if name.startswith("decoder.")}
        if set(hnet.target.names) != decoder or not all(p.requires_grad for p in hnet.rest):
            raise ValueError('a replay model needs a hypernetwork made with generate="decoder.*" and rest="trained"')
        super().__init__(hnet, **options)
        self.vae = vae

    def evaluate(self, tasks: Any, *, infer: bool | str | None = None, temperature: float | None = None) -> list[float]:
        """A replay model has no accuracy.

        Raises:
            TypeError: always.
        """
        raise TypeError("a replay model has no accuracy: look at what it makes, sample(tasks, count)")

    def sample(self, tasks: Sequence[int], count: int, seed: int = 0) -> Tensor:
        """Images of the past: uint8 ``[K, count, F]``, 0..255, those of each task by its own decoder.

        Raises:
            IndexError: no such task.
        """
        noise = torch.stack([self._noise(count, seed, task, 0, _OF_SAMPLES) for task in tasks])
        return Decoders(self, tasks)(noise).mul(255).round().to(torch.uint8)

    def condition(self, task: int) -> Tensor:
        """What the decoder is told of a task: ``[C]``, one-hot."""
        condition = self.hnet.basis.new_zeros(self.vae.conditions)
        condition[task] = 1
        return condition

    def noise(self, count: int, seed: int, task: int, step: int) -> Tensor:
        """Standard normal ``[count, L]`` to replay from, a function of the arguments."""
        return self._noise(count, seed, task, step, _OF_REPLAY)

    def _noise(self, count: int, *parts: int) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(*parts))
        noise = torch.randn(count, self.vae.latent, generator=generator, dtype=self.hnet.basis.dtype)
        return to_device(noise, self.device)

    def _next(self, task: Any) -> tuple[int, str, TaskData]:
        index, name, data = super()._next(task)
        if index >= self.vae.conditions:
            raise ValueError(f"the autoencoder has {self.vae.conditions} conditions, none for task {index}")
        if data.inputs.is_floating_point() and not 0 <= data.inputs.min() <= data.inputs.max() <= 1:
            raise ValueError(f"a replay model learns images of values 0..1, those of task {index} go beyond")
        return index, name, data

    def _inputs(
        self, now: TaskInTraining, data: TaskData, indices: Tensor
    ) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
        noise = self._noise(len(indices), self.seed, now.record.index, now.steps, _OF_VAE)
        return _ImagesAndNoise(data), (indices, noise)

    def _task_loss(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        x = x.flatten(1)
        logits, mean, log_variance = self.hnet((y, self.condition(task), x), task)
        return vae_loss(logits, x, mean, log_variance)


@dataclass(frozen=True)
class _ImagesAndNoise:
    """Makes a batch without labels; equal for equal data, so that a graph of it is kept."""

    data: TaskData

    def __call__(self, indices: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.data.batch(indices)[0], noise


class Decoders:
    """The decoders of several tasks as they are now, run together.

    Their weights are made once where they fit in ``MEMORY``; else in each call, of as many tasks at once as fit.
    """

    @torch.no_grad()
    def __init__(self, replay: ReplayModel, tasks: Sequence[int]):
        self.hnet = replay.hnet.eval()
        self.conditions = torch.stack([replay.condition(task) for task in tasks])
        size = max(1, MEMORY // (self.hnet.target.num_weights * self.hnet.basis.element_size()))
        self._groups = [list(tasks[lo : lo + size]) for lo in range(0, len(tasks), size)]
        self._weights = self.hnet.generate(self._groups[0]) if len(self._groups) == 1 else None

    @torch.no_grad()
    def __call__(self, noise: Tensor) -> Tensor:
        """Images ``[K, n, F]``, values 0..1, from ``noise`` ``[K, n, L]``."""
        images, size = [], len(self._groups[0])
        for tasks, *given in zip(self._groups, noise.split(size), self.conditions.split(size), strict=True):
            weights = self.hnet.generate(tasks) if self._weights is None else self._weights
            logits = run_together(self.hnet.target, weights, tasks, tuple(given), (0, 0))
            assert logits is not None, "vmap runs every VAE"
            images.append(logits.sigmoid_())
        return images[0] if len(images) == 1 else torch.cat(images)
