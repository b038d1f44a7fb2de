"""A hypernetwork in Lightning: manual optimisation, one Trainer per task, fasthyper's regularizer with the look-ahead.

Needs lightning and scikit-learn (pip install 'fasthyper[examples,digits]'); nothing is downloaded. Seconds on a CPU.
"""

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import fasthyper as fh
from fasthyper.vision import torchvision

with suppress(ImportError):
    torchvision()  # Lightning imports it where it is installed: also where it is a build for CUDA and torch is not
import lightning


class HypernetTask(lightning.LightningModule):
    """One task of a sequence: its embedding learns the task, theta also holds what the past tasks' embeddings generate."""

    def __init__(self, hnet, task, lr=3e-3, beta=1.0):
        super().__init__()
        self.automatic_optimization = False
        self.hnet, self.task, self.lr, self.beta = hnet, task, lr, beta
        self.regularizer = fh.OutputRegularizer(hnet)

    def on_fit_start(self):
        self.regularizer.snapshot(self.task)  # tasks 0 .. task-1 are held

    def configure_optimizers(self):
        return [torch.optim.Adam(p, lr=self.lr) for p in (self.hnet.theta, [self.hnet.embedding(self.task)])]

    def training_step(self, batch, _):
        x, y = batch
        theta, embedding = self.optimizers()
        theta.zero_grad()
        embedding.zero_grad()
        loss = F.cross_entropy(self.hnet(x, self.task), y)
        self.manual_backward(loss)
        if self.task > 0:
            steps = fh.candidate_step(theta.optimizer)  # where the task loss alone would lead
            ahead = [p.detach() + step for p, step in zip(self.hnet.theta, steps, strict=True)]
            drift, grads, _ = self.regularizer.value_and_grad(ahead)
            for p, grad in zip(self.hnet.theta, grads, strict=True):
                p.grad.add_(grad, alpha=self.beta)
            self.log("drift", drift)
        theta.step()
        embedding.step()
        self.log("loss", loss)

    def test_step(self, batch, _):
        x, y = batch
        self.log("accuracy", (self.hnet(x, self.task).argmax(1) == y).float().mean(), batch_size=len(x))


def loader(data, **options):
    return DataLoader(TensorDataset(data.inputs[:, columns(data)], data.labels), **options)


def columns(data):
    """The order in which a task of a permuted stream sees its features."""
    return slice(None) if data.columns is None else data.columns


def main(num_tasks=3, epochs=15):
    """Trains, and returns the accuracy on each task after the last one."""
    lightning.seed_everything(0, verbose=False)
    stream = fh.streams.permuted_digits(num_tasks, seed=0)
    hnet = fh.ChunkedHypernet(
        fh.nets.MLP(64, (50,), 10), num_tasks, chunk_size=500, hidden=(25, 25), task_dim=16, chunk_dim=8
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

    def trainer(**options):
        return lightning.Trainer(accelerator="cpu", devices=1, **quiet, **options)

    for task in stream:
        module = HypernetTask(hnet, task.index)
        trainer(max_epochs=epochs).fit(module, loader(task.train, batch_size=64, shuffle=True, drop_last=True))
    accuracies = []
    for task in stream:
        (metrics,) = trainer().test(HypernetTask(hnet, task.index), loader(task.test, batch_size=360), verbose=False)
        accuracies.append(metrics["accuracy"])
        print(f"task {task.index}: accuracy {100 * metrics['accuracy']:.1f} %")
    return accuracies


if __name__ == "__main__":
    main()
