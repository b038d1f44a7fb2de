"""Streams: sequences of tasks, each made when it is first asked for, with its data as tensors on a device."""

from fasthyper.streams.adapters import from_avalanche, from_continuum, from_datasets
from fasthyper.streams.digits import permuted_digits
from fasthyper.streams.mnist import permuted_mnist, split_mnist
from fasthyper.streams.stream import Stream, Task, TaskData, as_task_data
from fasthyper.streams.toys import gaussian_mixture, toy_regression

__all__ = [
    "Stream",
    "Task",
    "TaskData",
    "as_task_data",
    "from_avalanche",
    "from_continuum",
    "from_datasets",
    "gaussian_mixture",
    "permuted_digits",
    "permuted_mnist",
    "split_mnist",
    "toy_regression",
]
