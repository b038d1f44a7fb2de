"""Checkpoints and exported networks: safetensors files whose header carries JSON state. Reading one cannot run code."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasthyper.errors import CheckpointError

FORMAT = "fasthyper-checkpoint-1"
HYPERNET_FORMAT = "fasthyper-hypernet-1"
RESULTS_FORMAT = "fasthyper-results-1"
CHECKPOINT, RESULTS, SAMPLES = "checkpoint.safetensors", "results.json", "samples.safetensors"
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RuntimeError)  # RecursionError among them
LOGS = ("log.csv", "tensorboard", "wandb")  # may lie in a run's directory before its first checkpoint does


def claim(directory: Path, name: str | None = None) -> None:
    """Makes ``directory`` ready to be written: new, empty, or a run of the same name.

    Raises:
        CheckpointError: it cannot be written, holds files that are not ours, or holds a run of another name.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; name a directory")
    if directory.is_dir() and any(path.name not in LOGS for path in directory.iterdir()):
        if not (directory / RESULTS).exists() and not (directory / CHECKPOINT).exists():
            raise CheckpointError(f"{directory} is not empty and holds no fasthyper run; name another directory")
        if name is not None and (directory / RESULTS).exists():
            found = read_results(directory).get("name")
            if found != name:
                raise CheckpointError(f"{directory} holds a run of {found!r:.100}, not of {name!r}; name another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error.strerror}") from error


def save(directory: Path, tensors: dict[str, Tensor], state: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes checkpoint and results, each whole or not at all: what was there before stays until it is replaced.

    Raises:
        CheckpointError: it cannot be written, or the directory is not ours.
    """
    claim(directory)
    write(directory / CHECKPOINT, tensors, FORMAT, state)
    results = {"format": RESULTS_FORMAT, **results}
    _replace(directory / RESULTS, lambda path: path.write_text(json.dumps(results)))


def load(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint.

    Raises:
        CheckpointError: missing, truncated, corrupted, or not a checkpoint of this format.
    """
    return read(directory / CHECKPOINT, FORMAT)


def write(path: Path, tensors: dict[str, Tensor], format: str, state: dict[str, Any] | None = None) -> None:
    """Writes one safetensors file, whole or not at all. Without ``state`` it is a plain one, as other programs write.

    Raises:
        CheckpointError: it cannot be written.
    """
    from safetensors.torch import save_file

    if path.name == CHECKPOINT and format != FORMAT:
        raise CheckpointError(f"{path} is what a run goes on from; name another file")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": format}
    if state is not None:
        header["state"] = json.dumps(state)
        header["sha256"] = _digest(tensors, header["state"])
    _replace(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def read(path: Path, format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state that ``write`` wrote.

    Raises:
        CheckpointError: missing, truncated, changed since, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"no {'checkpoint' if format == FORMAT else 'file'} at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != format:
                raise CheckpointError(f"{path} is not a {format} file ({_other(header.get('format'), format)})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["sha256"] != _digest(tensors, header["state"]):
            raise CheckpointError(f"{path} is damaged: it was changed since it was written")
        state = json.loads(header["state"])
        if not isinstance(state, dict):
            raise ValueError("its state is no JSON object")
        return tensors, state
    except (SafetensorError, OSError, *UNREADABLE) as error:
        raise CheckpointError(f"{path} is damaged or not a {format} file: {_line(error)}") from error


def read_some(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of any safetensors file whose names begin with ``prefix``, which is cut off. Other bytes are not read.

    Raises:
        CheckpointError: missing, truncated, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name[len(prefix) :]: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    except (SafetensorError, OSError, *UNREADABLE) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {_line(error)}") from error


def _digest(tensors: dict[str, Tensor], state: str) -> str:
    """SHA-256 over the state and every tensor with its name, type and shape."""
    digest = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _other(found: str | None, expected: str) -> str:
    """What a file of another format is, so that one knows what to do."""
    kind, _, number = (found or "").rpartition("-")
    if kind == expected.rpartition("-")[0] and number.isdecimal():
        return f"{found}, of another version of fasthyper: upgrade"
    return f"format: {_line(found)}"


def _line(text: object) -> str:
    """What a message quotes of a file: one line, not too long."""
    return " ".join(str(text).split())[:300]


def read_results(directory: Path) -> dict[str, Any]:
    """What ``results.json`` of a run directory holds.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    path = directory / RESULTS
    try:
        content = json.loads(path.read_bytes().decode())
        if content.get("format") != RESULTS_FORMAT:
            raise CheckpointError(f"{path} is not a {RESULTS_FORMAT} file")
        return content
    except FileNotFoundError as error:
        raise CheckpointError(f"no {RESULTS} in {directory}: run `fasthyper run RECIPE --out {directory}` first") from error
    except (OSError, *UNREADABLE) as error:
        raise CheckpointError(f"{path} is damaged: {_line(error)}") from error


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` to a temporary neighbour, then onto ``path`` in one move."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, Exception):  # of many kinds: safetensors wraps a full disk in an error of its own
            raise CheckpointError(f"cannot write {path}: {error}; what was there before is unchanged") from error
        raise
