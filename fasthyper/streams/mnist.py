"""Permuted and split MNIST, Fashion-MNIST and KMNIST, from their four original files."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fasthyper.errors import DataError
from fasthyper.streams.fetch import PIECE, fetch
from fasthyper.streams.stream import Device, Stream, Task, TaskData, check_scenario, permuted_stream, task_classes

Pair = tuple[Tensor, Tensor]
Folder = str | os.PathLike[str] | None
LARGEST = 1 << 26  # bytes of images or labels; the 60,000 images have 47 million
BASES = {"mnist": "MNIST", "fashion": "Fashion-MNIST", "kmnist": "KMNIST"}


def permuted_mnist(
    num_tasks: int = 10,
    seed: int = 42,
    *,
    base: str = "mnist",
    pool: int = 1,
    padding: int | None = None,
    permutations: Sequence[Any] | None = None,
    permute_labels: bool = False,
    scenario: str = "task",
    data_dir: Folder = None,
    device: Device = "cpu",
) -> Stream:
    """Ten classes per task, the pixels in an order of the task's own; the first task has the original order.

    Args:
        num_tasks: at least 1. Task t is the same whatever their number.
        seed: of the pixel orders, and of the permutations of labels.
        base: ``"mnist"``, ``"fashion"`` or ``"kmnist"``.
        pool: images are reduced to means over squares of that many pixels a side, rounded to a byte; it divides 28.
        padding: zeros around each image after that, in pixels: inputs are ``[n, (28 / pool + 2 * padding)**2]``. ``None``:
            2, so 1024 inputs, or 0 for pooled images.
        permutations: the pixel order of each task, also the first, int64 ``[C]`` of all C inputs; looked up when the task is
            made. ``None``: drawn with ``seed``.
        permute_labels: whether labels are permuted in each task but the first.
        scenario: ``"task"`` (a head per task) and ``"domain"`` (one head for all) number each task's classes 0..9,
            ``"class"`` from 10 t.
        data_dir: folder with the four ``*-ubyte.gz`` files; ``None``: the cache, filled on first use.
        device: where the data lie. All tasks share one uint8 tensor; a task of its own has a permutation only.

    Raises:
        ValueError: an option out of its range.  DataError: the files are damaged or cannot be had.
    """
    padding = (2 if pool == 1 else 0) if padding is None else padding
    if padding < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    train, test = (
        TaskData(pad(images, [padding] * 4).flatten(1).to(device), labels.to(device))
        for images, labels in _load(base, pool, data_dir)
    )
    options: dict[str, Any] = {"permutations": permutations, "permute_labels": permute_labels, "scenario": scenario}
    return permuted_stream(f"permuted-{base}", num_tasks, seed, train, test, num_classes=10, **options)


def split_mnist(
    num_tasks: int = 5,
    seed: int = 42,
    *,
    base: str = "mnist",
    pool: int = 1,
    permute_labels: bool = False,
    scenario: str = "task",
    data_dir: Folder = None,
    device: Device = "cpu",
) -> Stream:
    """Two classes per task: task t tells class 2t (label 0) from 2t+1 (label 1). Inputs are ``[n, (28 / pool)**2]``, 784.

    Args:
        num_tasks: 1..5.
        seed: of the permutations of labels.
        scenario: as for ``permuted_mnist``; labels of ``"class"`` are 2t and 2t+1.
        base, pool, permute_labels, data_dir, device: as for ``permuted_mnist``.

    Raises:
        ValueError: an option out of its range.  DataError: the files are damaged or cannot be had.
    """
    if not 1 <= num_tasks <= 5:
        raise ValueError(f"split MNIST has 1 to 5 tasks, got num_tasks={num_tasks}")
    check_scenario(scenario)
    train, test = _load(base, pool, data_dir)

    def make_task(index: int) -> Task:
        first, classes = 2 * index, task_classes(2, index, seed, permute_labels, scenario)

        def part(pair: Pair) -> TaskData:
            images, labels = pair
            chosen = (labels == first) | (labels == first + 1)
            return TaskData(images[chosen].flatten(1).to(device), labels[chosen] - first, classes=classes)

        bound = first + 2 if scenario == "class" else 2
        return Task(index, part(train), part(test), bound, f"split-{base}/{first}-{first + 1}")

    return Stream(f"split-{base}", num_tasks, make_task)


def _load(base: str, pool: int, data_dir: Folder) -> tuple[Pair, Pair]:
    """Training and test pair: images, uint8 ``[n, 28 / pool, 28 / pool]``, and labels, int64 ``[n]``."""
    if base not in BASES:
        raise ValueError(f"unknown base {base!r}; choose from {', '.join(BASES)}")
    if pool < 1 or 28 % pool:
        raise ValueError(f"pool must be 1, 2, 4, 7, 14 or 28, got {pool}")
    folder = fetch(base, data_dir)

    def pair(prefix: str) -> Pair:
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max() > 9:
            shapes = f"{prefix} images {list(images.shape)} and labels {list(labels.shape)}"
            raise DataError(f"{folder}: {shapes} are not {BASES[base]}")
        return _pooled(images, pool), labels.long()

    return pair("train"), pair("t10k")


def _pooled(images: Tensor, side: int) -> Tensor:
    """Means over squares, rounded half up: exact, in integers."""
    if side == 1:
        return images
    sums = images.unflatten(2, (-1, side)).unflatten(1, (-1, side)).sum((2, 4), dtype=torch.int32)
    return ((sums + side**2 // 2) // side**2).byte()


def read_idx(path: Path) -> Tensor:
    """The bytes of a gzipped idx file, uint8, in the shape that its header gives.

    Raises:
        DataError: unreadable, truncated, or not such a file.
    """
    try:
        with gzip.open(path) as file:
            zeros, dtype, num_dims = struct.unpack(">HBB", file.read(4))
            if (zeros, dtype) != (0, 8) or not 1 <= num_dims <= 3:
                raise ValueError(f"no header of an idx file of bytes: {(zeros, dtype, num_dims)}")
            shape = struct.unpack(f">{num_dims}I", file.read(4 * num_dims))
            if math.prod(shape) > LARGEST:
                raise ValueError(f"{' x '.join(map(str, shape))} values are too many")
            pieces = iter(partial(file.read, PIECE), b"")  # compressed may be much more than there should be
            values = b"".join(islice(pieces, math.prod(shape) // PIECE + 2))
        if len(values) != math.prod(shape):
            raise ValueError(f"its values are not as many as its header says, {' x '.join(map(str, shape))}")
        return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise DataError(f"cannot read {path} ({error}): delete it and fetch it again") from error
