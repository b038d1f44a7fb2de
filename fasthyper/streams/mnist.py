"""Permuted and split MNIST, from the four original files."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from fasthyper.errors import DataError
from fasthyper.streams.fetch import fetch
from fasthyper.streams.stream import Device, Stream, Task, TaskData, permuted_stream

Pair = tuple[Tensor, Tensor]


def permuted_mnist(
    num_tasks: int = 10,
    seed: int = 42,
    *,
    padding: int = 2,
    data_dir: str | os.PathLike[str] | None = None,
    device: Device = "cpu",
) -> Stream:
    """Ten digits per task, the pixels in an order of the task's own; the first task has the original order.

    Args:
        num_tasks: at least 1. Task t is the same whatever their number.
        seed: of the pixel orders.
        padding: zeros around each 28x28 image, in pixels: inputs are ``[n, (28 + 2 * padding)**2]``, here 1024.
        data_dir: folder with the four ``*-ubyte.gz`` files; ``None``: the cache, filled on first use.
        device: where the data lie. All tasks share one uint8 tensor.

    Raises:
        ValueError: ``num_tasks`` or ``padding`` out of range.  DataError: the files are damaged or cannot be had.
    """
    if padding < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    train, test = (
        TaskData(pad(images, [padding] * 4).flatten(1).to(device), labels.to(device)) for images, labels in _load(data_dir)
    )
    return permuted_stream("permuted-mnist", num_tasks, seed, train, test, num_classes=10)


def split_mnist(num_tasks: int = 5, *, data_dir: str | os.PathLike[str] | None = None, device: Device = "cpu") -> Stream:
    """Two digits per task: task t tells 2t (label 0) from 2t+1 (label 1). Inputs are ``[n, 784]``.

    Args:
        num_tasks: 1..5.
        data_dir, device: as for ``permuted_mnist``.

    Raises:
        ValueError: ``num_tasks`` out of range.  DataError: the files are damaged or cannot be had.
    """
    if not 1 <= num_tasks <= 5:
        raise ValueError(f"split MNIST has 1 to 5 tasks, got num_tasks={num_tasks}")
    train, test = _load(data_dir)

    def digits(pair: Pair, first: int) -> TaskData:
        images, labels = pair
        chosen = (labels == first) | (labels == first + 1)
        return TaskData(images[chosen].flatten(1).to(device), labels[chosen].to(device) - first)

    def make_task(index: int) -> Task:
        first = 2 * index
        return Task(index, digits(train, first), digits(test, first), 2, f"split-mnist/{first}-{first + 1}")

    return Stream("split-mnist", num_tasks, make_task)


def _load(data_dir: str | os.PathLike[str] | None) -> tuple[Pair, Pair]:
    """Training and test pair: images, uint8 ``[n, 28, 28]``, and labels, int64 ``[n]``."""
    folder = fetch("mnist", data_dir)

    def pair(prefix: str) -> Pair:
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max() > 9:
            raise DataError(f"{folder}: {prefix} images {list(images.shape)} and labels {list(labels.shape)} are not MNIST")
        return images, labels.long()

    return pair("train"), pair("t10k")


def read_idx(path: Path) -> Tensor:
    """The bytes of a gzipped idx file, uint8, in the shape that its header gives.

    Raises:
        DataError: unreadable, truncated, or not such a file.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
        zeros, dtype, num_dims = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{num_dims}I", raw, 4)
        values = raw[4 + 4 * num_dims :]
        if (zeros, dtype) != (0, 8) or len(values) != math.prod(shape):
            raise ValueError(f"{len(values)} values do not fit the header {(zeros, dtype, *shape)}")
        return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise DataError(f"cannot read {path} ({error}): delete it and fetch it again") from error
