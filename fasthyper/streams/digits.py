"""Permuted digits: 8x8 images that come with scikit-learn, for trying things out without a download."""

from __future__ import annotations

import torch

from fasthyper.errors import DataError
from fasthyper.streams.stream import Device, Stream, TaskData, permuted_stream


def permuted_digits(num_tasks: int = 10, seed: int = 42, *, device: Device = "cpu") -> Stream:
    """Ten digits per task, inputs ``[n, 64]`` in 0..1, the pixels in an order of the task's own; the first task has the
    original order. Every fifth image is for testing: 1437 to train on, 360 to test on.

    Args:
        num_tasks: at least 1. Task t is the same whatever their number.
        seed: of the pixel orders.
        device: where the data lie.

    Raises:
        ValueError: ``num_tasks`` below 1.  DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("scikit-learn is not installed: pip install 'fasthyper[digits]'") from error
    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32, device=device) / 16  # values 0..16: exact, unlike as uint8
    labels = torch.tensor(digits.target, device=device)
    is_test = torch.arange(len(labels), device=device) % 5 == 0
    train, test = TaskData(inputs[~is_test], labels[~is_test]), TaskData(inputs[is_test], labels[is_test])
    return permuted_stream("permuted-digits", num_tasks, seed, train, test, num_classes=10)
