"""Streams: sequences of tasks, each made when it is first asked for, with its data as tensors on a device."""

from fasthyper.streams.adapters import from_avalanche, from_continuum, from_datasets
from fasthyper.streams.celeba import constant_baseline, f_celeba
from fasthyper.streams.cifar import split_cifar10, split_cifar10_100, split_cifar100
from fasthyper.streams.digits import permuted_digits
from fasthyper.streams.images import ImageData
from fasthyper.streams.mnist import permuted_mnist, split_mnist
from fasthyper.streams.stream import Stream, Task, TaskData, as_task_data
from fasthyper.streams.toys import gaussian_mixture, toy_regression

__all__ = [
    "ImageData",
    "Stream",
    "Task",
    "TaskData",
    "as_task_data",
    "constant_baseline",
    "f_celeba",
    "from_avalanche",
    "from_continuum",
    "from_datasets",
    "gaussian_mixture",
    "permuted_digits",
    "permuted_mnist",
    "split_cifar10",
    "split_cifar10_100",
    "split_cifar100",
    "split_mnist",
    "toy_regression",
]
