"""F-CelebA: whether people in photographs smile, a task for each user of a published LEAF split."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasthyper.errors import DataError, MissingPackageError
from fasthyper.streams.fetch import CELEBA_IMAGES, CELEBA_TEST, CELEBA_TRAIN, fetch
from fasthyper.streams.images import ImageData
from fasthyper.streams.stream import Device, Stream, Task

USERS, TRAIN, TEST = 93, 8991, 1023  # of the whole split
TRAIN_EACH, TEST_EACH, VALIDATION = 96, 11, 0.1  # of a task, and the share of its training images that is set apart
MEAN = torch.tensor([125.3, 123.0, 113.9]) / 255
STD = torch.tensor([63.0, 62.1, 66.7]) / 255
# in which order the ten tasks come in the first five sequences of twenty that results were published for (CAT)
ORDERS = (
    (1, 4, 6, 5, 7, 0, 2, 8, 3, 9),
    (3, 1, 5, 2, 4, 0, 6, 8, 7, 9),
    (1, 6, 2, 0, 8, 3, 4, 9, 7, 5),
    (9, 0, 3, 2, 6, 4, 1, 5, 8, 7),
    (0, 9, 4, 8, 2, 7, 6, 3, 1, 5),
)

Examples = tuple[list[str], Tensor]  # names of image files, and int64 labels


def f_celeba(
    num_tasks: int = 10,
    seed: int = 0,
    *,
    order: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    device: Device = "cpu",
) -> Stream:
    """Smiling (label 1) or not, 87 images per task to train on, 9 for validation (``Task.validation``), 11 to test on.

    The published split dealt pooled images to users at random: tasks are parts of one task, and always saying "not smiling"
    is right for 67 of the 110 test images of ten tasks. Show ``constant_baseline`` beside a result, and
    ``fh.metrics.accuracy_interval``.

    Args:
        num_tasks: 1..93; published are ten, and twenty. Users come sorted as strings: 0, 1, 10, 11, ...
        seed: of the choice of validation images, as scikit-learn's ``shuffle(random_state=seed)`` makes it.
        order: 0..4, the ten tasks as published results had them; ``None``: sorted.
        data_dir: folder with ``small/iid/{train,test}/all_data_iid_01_05_keep_5_{train,test}_9.json`` and CelebA's aligned
            images, ``data/raw/img_align_celeba/NNNNNN.jpg``; ``None``: the folder ``f-celeba`` of the cache.
        device: where the data lie. Batches are float32 ``[B, 3, 32, 32]``, images resized from 178x218 and normalised.

    Raises:
        ValueError: ``num_tasks`` or ``order`` out of range.  DataError: files are missing, damaged or of another split.
        MissingPackageError: Pillow is not installed.
    """
    if not 1 <= num_tasks <= USERS:
        raise ValueError(f"F-CelebA has 1 to {USERS} tasks, got num_tasks={num_tasks}")
    if order is not None and (num_tasks != 10 or not 0 <= order < len(ORDERS)):
        raise ValueError(f"order must be None, or for ten tasks 0..{len(ORDERS) - 1}, got {order} for {num_tasks} tasks")
    folder = fetch("f-celeba", data_dir)
    images = folder / CELEBA_IMAGES
    train = read_split(folder / CELEBA_TRAIN, TRAIN)
    test = read_split(folder / CELEBA_TEST, TEST)
    users = sorted(train)[:num_tasks]
    names = [name for user in users for split in (train, test) for name in split.get(user, ([], None))[0]]
    sizes = {(len(train[user][0]) if user in train else 0, len(test[user][0]) if user in test else 0) for user in users}
    if any(few < TRAIN_EACH or more != TEST_EACH for few, more in sizes) or len(set(names)) != len(names):
        raise DataError(f"{folder} holds another split: tasks of {sorted(sizes)} images, or images more than once")
    absent = [name for name in names if not (images / name).is_file()]
    if absent:
        raise DataError(f"{len(absent)} of {len(names)} images are not in {images}, such as {absent[0]}: put them there")

    def make_task(index: int) -> Task:
        user = users[index if order is None else ORDERS[order][index]]
        pixels, labels = _decoded(images, train[user][0]).to(device), train[user][1]
        data, shuffled = ImageData(pixels, labels, mean=MEAN, std=STD), shuffle(len(labels), seed)
        num_validation = int(VALIDATION * len(labels))
        validation, rest = (
            data.view(rows, labels[rows]) for rows in shuffled.split([num_validation, len(labels) - num_validation])
        )
        held_out = ImageData(_decoded(images, test[user][0]).to(device), test[user][1], mean=MEAN, std=STD)
        return Task(index, rest, held_out, 2, f"f-celeba/{user}", validation)

    return Stream("f-celeba", num_tasks, make_task)


def constant_baseline(stream: Sequence[Task]) -> tuple[int, int]:
    """Test examples of all tasks that are right, and all test examples, if the answer is always the label that most training
    examples of all tasks have."""
    most = torch.cat([task.train.labels for task in stream]).bincount().argmax()
    hits = [(task.test.labels == most).sum() for task in stream]
    return int(sum(hits)), sum(len(task.test) for task in stream)


def shuffle(size: int, seed: int) -> Tensor:
    """0..size-1 in the order of scikit-learn's ``shuffle(range(size), random_state=seed)``, int64 ``[size]``."""
    import numpy as np

    return torch.from_numpy(np.random.RandomState(seed).permutation(size)).long()


def read_split(path: Path, num_examples: int) -> dict[str, Examples]:
    """Users of a LEAF file with the names and labels of their images.

    Raises:
        DataError: unreadable, damaged, or not the split with ``num_examples`` images of 93 users.
    """
    try:
        data: Any = json.loads(path.read_bytes().decode())
        users = {str(user): _examples(data["user_data"][user]) for user in data["users"]}
        counts = [len(labels) for _, labels in users.values()]
        if len(users) != USERS or counts != data["num_samples"] or sum(counts) != num_examples:
            raise ValueError(f"{len(users)} users with {sum(counts)} images, expected {USERS} with {num_examples}")
        return users
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        why = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise DataError(f"cannot read {path} ({why}): it is not the published split") from error


def _examples(user: Any) -> Examples:
    names, labels = list(user["x"]), list(user["y"])
    if len(names) != len(labels) or any(label not in (0, 1) for label in labels):
        raise ValueError(f"{len(names)} images and {len(labels)} labels, each of which should be 0 or 1")
    for name in names:
        if not re.fullmatch(r"[0-9]{6}\.jpg", name):
            raise ValueError(f"{name!r} is no file name such as 000001.jpg")
    return names, torch.tensor([int(label) for label in labels], dtype=torch.int64)


def _decoded(folder: Path, names: Sequence[str]) -> Tensor:
    """uint8 ``[n, 3, 32, 32]``, as torchvision's ``Resize((32, 32))`` makes them of what Pillow has read."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackageError("Pillow is not installed: pip install 'fasthyper[vision]'") from error
    images = []
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # images said to have very many pixels
    for name in names:
        try:
            with Image.open(io.BytesIO((folder / name).read_bytes()), formats=["JPEG"]) as image:
                if image.size != (178, 218):
                    raise ValueError(f"{image.size[0]}x{image.size[1]} pixels, CelebA's aligned images have 178x218")
                small = image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError, *bombs) as error:
            raise DataError(f"cannot read {folder / name} ({error}): replace it") from error
        images.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).reshape(32, 32, 3).permute(2, 0, 1))
    return torch.stack(images)
