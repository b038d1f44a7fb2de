"""Images of which each task has its own: normalised in batches, and augmented where they are trained on."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.functional import pad

from fasthyper.streams.stream import Device, TaskData


class ImageData(TaskData):
    """Images that stay on one device as bytes, of which ``view`` gives each task its own without a copy.

    Args:
        inputs: uint8 ``[n, C, height, width]``.
        labels: int64 ``[n]``.
        mean, std: ``[C]``, of values 0..1: batches hold ``(inputs / 255 - mean) / std``.
        padding: black pixels around an image before a window of its own size is cut from it at random and, for every
            second image, mirrored; only where batches are trained on. ``None``: images are trained on as they are.

    A training step draws from ``choices`` for each example, so that ``batch`` takes int64 ``[B, 4]`` there: which example,
    first row and first column of the window, whether it is mirrored.

    Raises:
        ValueError: shapes or dtypes other than these.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, *, mean: Tensor, std: Tensor, padding: int | None = None):
        if (
            inputs.dtype != torch.uint8
            or inputs.ndim != 4
            or labels.dtype != torch.int64
            or labels.shape != inputs.shape[:1]
        ):
            got = f"{inputs.dtype} {list(inputs.shape)} and {labels.dtype} {list(labels.shape)}"
            raise ValueError(f"inputs must be uint8 [n, C, height, width] and labels int64 [n], got {got}")
        self.inputs, self._numbers = inputs, labels.to(inputs.device)
        self._rows = torch.arange(len(inputs), device=inputs.device)
        self._mean, self._std = (part.to(inputs.device, torch.float32)[:, None, None] for part in (mean, std))
        self._padding = padding
        self.columns = None
        self._images = {inputs.device: inputs}  # shared by all views
        self._moved = {inputs.device: self}
        self.choices = () if padding is None else (2 * padding + 1, 2 * padding + 1, 2)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> Tensor:
        """int64 ``[n]``."""
        return self._numbers

    @property
    def shape(self) -> torch.Size:
        """Of all inputs, as batches hold them."""
        return torch.Size([len(self), *self.inputs.shape[1:]])

    def share(self) -> TaskData:
        """Is no part of what images can do.

        Raises:
            TypeError: always.
        """
        raise TypeError("pixels of ImageData cannot be permuted; make a TaskData of its images")

    def view(self, rows: Tensor, labels: Tensor) -> ImageData:
        """Of the same images those of ``rows`` (int64 ``[k]``), with these ``labels`` (int64 ``[k]``)."""
        other = copy.copy(self)
        other._rows, other._numbers = self._rows[rows], labels.to(self.device)
        other._moved = {self.device: other}
        return other

    def to(self, device: Device) -> TaskData:
        """The same examples on ``device``; the images are moved there once for all views."""
        device = torch.empty(0, device=device).device
        if device not in self._moved:
            if device not in self._images:
                self._images[device] = self.inputs.to(device)
            moved = copy.copy(self)
            moved.inputs = self._images[device]
            for name in ("_rows", "_numbers", "_mean", "_std"):
                setattr(moved, name, getattr(self, name).to(device))
            self._moved[device] = moved
        return self._moved[device]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs, float32 ``[B, C, height, width]``, and labels, int64 ``[B]``, of the examples ``indices``: int64 ``[B]``,
        or ``[B, 4]`` with what was drawn for each."""
        indices = indices.to(self.device)
        examples = indices if indices.ndim == 1 else indices[:, 0]
        images = self.inputs.index_select(0, self._rows.index_select(0, examples))
        if indices.ndim == 2 and self._padding is not None:
            images = crop_and_flip(images, *indices[:, 1:].unbind(1), padding=self._padding)
        return images.float().div_(255).sub_(self._mean).div_(self._std), self._numbers.index_select(0, examples)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, *, padding: int) -> Tensor:
    """A window of each image, with ``padding`` zeros around it, of the image's size; mirrored left to right where ``flip``.

    Args:
        images: ``[B, C, height, width]``, any dtype.
        top, left: int64 ``[B]``, the window's first row and column, 0..2*padding.
        flip: int64 ``[B]``, 0 or 1.

    Returns:
        ``[B, C, height, width]``, all cut at once: nothing is read from the device, no shape depends on what is drawn.
    """
    _, channels, height, width = images.shape
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    rows_BR = top[:, None] + rows
    columns_BC = left[:, None] + torch.where(flip[:, None] == 1, columns.flip(0), columns)
    images = pad(images, [padding] * 4)
    images = images.gather(2, rows_BR[:, None, :, None].expand(-1, channels, -1, images.shape[3]))
    return images.gather(3, columns_BC[:, None, None, :].expand(-1, channels, height, -1))


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images ``[n, C, ...]``, of values 0..1; float64 ``[C]`` each."""
    shares = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    shares /= shares.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ values
    return mean, (shares @ values.square() - mean.square()).sqrt()
