"""Avalanche's SplitMNIST and PermutedMNIST under HypernetStrategy and under Naive with HypernetRegularizerPlugin: accuracy,
forgetting, iterations per second. Prints a table; needs Avalanche and MNIST.

    python bench/avalanche_streams.py [--experiences 3] [--iterations 200]
"""

import argparse
import io
import time

import torch

import fasthyper as fh
from fasthyper.compat.avalanche import HypernetModule, HypernetRegularizerPlugin, HypernetStrategy, mnist_root

from avalanche.benchmarks import PermutedMNIST, SplitMNIST  # isort: skip
from avalanche.core import SupervisedPlugin  # isort: skip
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics  # isort: skip
from avalanche.logging import TextLogger  # isort: skip
from avalanche.training.plugins import EvaluationPlugin  # isort: skip
from avalanche.training.supervised import Naive  # isort: skip

BATCH = 128


class Stop(SupervisedPlugin):
    """Ends an experience after so many iterations, and keeps the time they took."""

    def __init__(self, iterations):
        super().__init__()
        self.iterations, self.seconds, self.done = iterations, 0.0, 0

    def before_training_epoch(self, strategy, **kwargs):
        self.began = time.perf_counter()

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_exp_iterations + 1 >= self.iterations:
            strategy.stop_training()

    def after_training_epoch(self, strategy, **kwargs):
        self.seconds += time.perf_counter() - self.began
        self.done += strategy.clock.train_epoch_iterations


def hypernet(stream, tasks):
    if stream == "SplitMNIST":
        target, outputs = fh.nets.MLP(784, (400, 400), 2 * tasks), 2
        return fh.ChunkedHypernet(
            target, tasks, chunk_size=42_000, hidden=(10, 10), task_dim=96, chunk_dim=96, outputs_per_task=outputs
        )
    target = fh.nets.MLP(784, (1000, 1000), 10)
    return fh.ChunkedHypernet(target, tasks, chunk_size=78_000, hidden=(25, 25), task_dim=24, chunk_dim=8, activation="elu")


def benchmark(stream, tasks):
    root = str(mnist_root(log=print))
    if stream == "PermutedMNIST":
        return PermutedMNIST(tasks, return_task_id=True, seed=0, dataset_root=root)
    options = {"return_task_id": True, "class_ids_from_zero_in_each_exp": True, "shuffle": False}
    return SplitMNIST(5, dataset_root=root, **options)


def run(stream, kind, tasks, iterations):
    streams = benchmark(stream, tasks)
    hnet, stop = hypernet(stream, tasks), Stop(iterations)
    metrics = accuracy_metrics(experience=True, stream=True), forgetting_metrics(stream=True)
    common = {
        "train_mb_size": BATCH,
        "train_epochs": -(-iterations * BATCH // 10_000),
        "eval_mb_size": 2000,
        "evaluator": EvaluationPlugin(*metrics, loggers=[TextLogger(io.StringIO())]),
    }
    if kind == "HypernetStrategy":
        trainer = fh.Trainer(hnet, lr=1e-3, beta=0.01, progress=False)
        strategy = HypernetStrategy(trainer=trainer, plugins=[stop], **common)
    else:
        plugins = [HypernetRegularizerPlugin(0.01, lookahead=True), stop]
        model = HypernetModule(hnet)
        strategy = Naive(model=model, optimizer=torch.optim.Adam(hnet.parameters(), lr=1e-3), plugins=plugins, **common)
    began = time.perf_counter()
    for experience in streams.train_stream[:tasks]:
        strategy.train(experience)
    train = time.perf_counter() - began
    found = strategy.eval(streams.test_stream[:tasks])
    accuracy = next(v for k, v in found.items() if k.startswith("Top1_Acc_Stream/eval_phase/test_stream"))
    return accuracy, stop.done, stop.done / stop.seconds, train


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiences", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=200, help="per experience")
    args = parser.parse_args()
    for stream in ("SplitMNIST", "PermutedMNIST"):
        for kind in ("HypernetStrategy", "Naive"):
            torch.manual_seed(0)
            accuracy, done, rate, seconds = run(stream, kind, args.experiences, args.iterations)
            print(
                f"{stream:<14} {kind:<17} accuracy {100 * accuracy:6.2f} %  {done} iterations, {rate:6.1f}/s in epochs, "
                f"{seconds:5.1f} s with reading and evaluation",
                flush=True,
            )


if __name__ == "__main__":
    main()
