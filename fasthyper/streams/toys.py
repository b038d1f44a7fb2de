"""Two regression toys of hypercl (von Oswald et al. 2020), with its functions, sample counts and random draws."""

from __future__ import annotations

import math
from typing import Any

import torch

from fasthyper.errors import DataError
from fasthyper.streams.stream import Device, Stream, Task, TaskData


def toy_regression(num_tasks: int = 3, seed: int = 42, *, device: Device = "cpu") -> Stream:
    """One function of one number per task: x + 3 on [-4, -2], 2 x^2 - 1 on [-1, 1], (x - 3)^3 on [2, 4].

    Of each 100 points at random to train on, with Gaussian noise of standard deviation 0.05, and 50 at equal distances,
    without noise, to test on. Inputs and targets are ``[n, 1]``.

    Args:
        num_tasks: 1..3.
        seed: of the points and the noise, for each task the same.
        device: where the data lie.

    Raises:
        ValueError: ``num_tasks`` out of range.  DataError: numpy, whose generator made the published data, is missing.
    """
    if not 1 <= num_tasks <= 3:
        raise ValueError(f"the toy regression has 1 to 3 tasks, got num_tasks={num_tasks}")

    def make_task(index: int) -> Task:
        function, low, high = (
            (lambda x: x + 3, -4, -2),
            (lambda x: 2 * x**2 - 1, -1, 1),
            (lambda x: (x - 3) ** 3, 2, 4),
        )[index]
        draws = _draws(seed)
        x = draws.uniform(low, high, (100, 1))
        y = function(x) + draws.normal(0, 0.05, (100, 1))
        x_test = torch.linspace(low, high, 50, dtype=torch.float64)[:, None]
        test = _data(x_test, function(x_test), device)
        return Task(index, _data(x, y, device), test, 0, f"toy-regression/{index}")

    return Stream("toy-regression", num_tasks, make_task)


def gaussian_mixture(num_tasks: int = 9, seed: int = 42, *, device: Device = "cpu") -> Stream:
    """One Gaussian of the plane per task: from a point drawn from it ``[n, 2]`` to its density there ``[n, 1]``.

    The means are the grid {-4, 0, 4} x {-4, 0, 4}, row by row, the standard deviation is 0.5 in every direction; 1000 points
    to train on, 50 to test on.

    Args:
        num_tasks: 1..9.
        seed: of the points, which are the same around each mean.
        device: where the data lie.

    Raises:
        ValueError: ``num_tasks`` out of range.  DataError: as for ``toy_regression``.
    """
    if not 1 <= num_tasks <= 9:
        raise ValueError(f"the Gaussian mixture has 1 to 9 tasks, got num_tasks={num_tasks}")
    std = 0.5

    def make_task(index: int) -> Task:
        mean, draws = (4.0 * (index // 3 - 1), 4.0 * (index % 3 - 1)), _draws(seed)

        def data(n: int) -> TaskData:
            offset = std * draws.standard_normal((n, 2))
            density = torch.tensor(-(offset**2).sum(1, keepdims=True) / (2 * std**2)).exp() / (2 * math.pi * std**2)
            return _data(mean + offset, density, device)

        return Task(index, data(1000), data(50), 0, f"gaussian-mixture/{index}")

    return Stream("gaussian-mixture", num_tasks, make_task)


def _draws(seed: int) -> Any:
    """numpy's legacy generator, whose numbers stay the same in all its versions."""
    try:
        from numpy.random import RandomState
    except ImportError as error:
        raise DataError("numpy is not installed: pip install numpy") from error
    return RandomState(seed)


def _data(inputs: Any, targets: Any, device: Device) -> TaskData:
    return TaskData(
        torch.as_tensor(inputs, dtype=torch.float32, device=device), torch.as_tensor(targets, dtype=torch.float32)
    )
