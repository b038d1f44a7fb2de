"""Split CIFAR-10 and CIFAR-100, from the binary version of their files."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fasthyper.errors import DataError
from fasthyper.streams.fetch import contents
from fasthyper.streams.images import ImageData, moments
from fasthyper.streams.stream import Device, Stream, Task, check_scenario

PIXELS = 3 * 32 * 32
EXAMPLES = {"cifar-10": (50_000, 10_000), "cifar-100": (50_000, 10_000)}  # to train on, to test on

Pair = tuple[ImageData, ImageData]  # to train on, to test on


def split_cifar10(
    num_tasks: int = 5,
    *,
    scenario: str = "task",
    augment: bool = True,
    data_dir: str | os.PathLike[str] | None = None,
    device: Device = "cpu",
) -> Stream:
    """CIFAR-10, two classes per task, in the order of their numbers.

    Args:
        num_tasks: 1..5.
        scenario: ``"task"`` or ``"domain"``: each task's C classes have the labels 0..C-1; ``"class"``: those of task t have
            ``t*C .. t*C + C-1``, and ``num_classes`` is ``(t + 1) * C``.
        augment: whether a training step sees random 32x32 windows, of images with 4 black pixels around them, every second
            one mirrored; drawn for each step from the trainer's seed, the task and the step.
        data_dir: folder with the files, or with the folder or the archive that they come in, or that archive; ``None``: the
            cache, filled on first use.
        device: where the data lie. All tasks share one uint8 tensor ``[n, 3, 32, 32]``; batches are float32, each channel
            with mean 0 and standard deviation 1 over the training images of the data set.

    Raises:
        ValueError: ``num_tasks`` or ``scenario`` out of range.  DataError: the files are damaged or cannot be had.
    """
    parts = [("cifar-10", first) for first in range(0, 10, 2)]
    return _split("split-cifar-10", num_tasks, parts, 2, scenario, augment, data_dir, device)


def split_cifar10_100(
    num_tasks: int = 6,
    *,
    scenario: str = "task",
    augment: bool = True,
    data_dir: str | os.PathLike[str] | None = None,
    device: Device = "cpu",
) -> Stream:
    """All of CIFAR-10, then CIFAR-100 ten classes at a time; the sequence of the paper has six tasks.

    Args:
        num_tasks: 1..11.
        scenario, augment, device: as for ``split_cifar10``. Each data set is normalised by its own numbers.
        data_dir: folder with the files of both, or with the folders or archives that they come in; ``None``: the cache.

    Raises:
        As ``split_cifar10``. CIFAR-100 cannot be fetched: the error says where its files belong.
    """
    parts = [("cifar-10", 0), *(("cifar-100", first) for first in range(0, 100, 10))]
    return _split("split-cifar-10-100", num_tasks, parts, 10, scenario, augment, data_dir, device)


def split_cifar100(
    num_tasks: int = 10,
    *,
    scenario: str = "task",
    augment: bool = True,
    data_dir: str | os.PathLike[str] | None = None,
    device: Device = "cpu",
) -> Stream:
    """CIFAR-100, ten classes (of the 100 fine ones) per task, in the order of their numbers.

    Args:
        num_tasks: 1..10.
        scenario, augment, data_dir, device: as for ``split_cifar10``.

    Raises:
        As ``split_cifar10_100``.
    """
    parts = [("cifar-100", first) for first in range(0, 100, 10)]
    return _split("split-cifar-100", num_tasks, parts, 10, scenario, augment, data_dir, device)


def _split(
    name: str,
    num_tasks: int,
    parts: Sequence[tuple[str, int]],
    num_classes: int,
    scenario: str,
    augment: bool,
    data_dir: str | os.PathLike[str] | None,
    device: Device,
) -> Stream:
    """``parts``: for each task its data set and the first of its ``num_classes`` classes."""
    if not 1 <= num_tasks <= len(parts):
        raise ValueError(f"{name} has 1 to {len(parts)} tasks, got num_tasks={num_tasks}")
    check_scenario(scenario)
    parts = parts[:num_tasks]
    pairs = {dataset: _load(dataset, augment, data_dir, device) for dataset in dict(parts)}

    def make_task(index: int) -> Task:
        dataset, first = parts[index]
        before = index * num_classes if scenario == "class" else 0

        def own(data: ImageData) -> ImageData:
            rows = ((data.labels >= first) & (data.labels < first + num_classes)).nonzero().flatten()
            return data.view(rows, data.labels[rows] - first + before)

        train, test = map(own, pairs[dataset])
        return Task(index, train, test, before + num_classes, f"{name}/{dataset}/{first}-{first + num_classes - 1}")

    return Stream(name, num_tasks, make_task)


def _load(dataset: str, augment: bool, data_dir: str | os.PathLike[str] | None, device: Device) -> Pair:
    """All training and all test images of CIFAR-10 or CIFAR-100."""
    num_classes = int(dataset.removeprefix("cifar-"))
    files = contents(dataset, data_dir)
    images, labels = {}, {}
    for part, expected in zip(("train", "test"), EXAMPLES[dataset], strict=True):
        pairs = [
            read_records(raw, num_classes, f"{file} of {dataset}")
            for file, raw in files.items()
            if file.startswith("test") == (part == "test")
        ]
        images[part], labels[part] = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        if len(labels[part]) != expected:
            raise DataError(f"{dataset} has {expected} images to {part}, the files hold {len(labels[part])}: replace them")
    mean, std = moments(images["train"])
    return (
        ImageData(images["train"].to(device), labels["train"], mean=mean, std=std, padding=4 if augment else None),
        ImageData(images["test"].to(device), labels["test"], mean=mean, std=std),
    )


def read_records(raw: bytes, num_classes: int, what: str) -> tuple[Tensor, Tensor]:
    """Images, uint8 ``[n, 3, 32, 32]``, and labels, int64 ``[n]``, of a file of CIFAR's binary version.

    A record is its label, after that of its superclass where there are 100 classes, and 3072 bytes of pixels.

    Raises:
        DataError: no whole records, or labels out of range; ``what`` names the file.
    """
    num_labels = 2 if num_classes == 100 else 1
    size = num_labels + PIXELS
    if not raw or len(raw) % size:
        raise DataError(f"{what} has {len(raw)} bytes, no whole number of records of {size}: replace it")
    records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, size)
    labels = records[:, num_labels - 1].long()
    if labels.max() >= num_classes:
        raise DataError(f"{what} has a label {int(labels.max())}, the largest should be {num_classes - 1}: replace it")
    return records[:, num_labels:].reshape(-1, 3, 32, 32), labels
