"""Checkpoints and exported networks: safetensors files whose header carries JSON state. Reading one cannot run code."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasthyper.errors import CheckpointError, one_line

FORMAT = "fasthyper-checkpoint-1"
HYPERNET_FORMAT = "fasthyper-hypernet-1"
RESULTS_FORMAT = "fasthyper-results-1"
CHECKPOINT, RESULTS, SAMPLES = "checkpoint.safetensors", "results.json", "samples.safetensors"
PREVIOUS = "previous.safetensors"  # the checkpoint before
SAVE_EVERY = 300.0  # seconds
SHARE = 0.01  # of a run's time that copying its state by time may take
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RuntimeError)  # RecursionError among them
LOGS = ("log.csv", "tensorboard", "wandb")  # may lie in a run's directory before its first checkpoint does


def claim(directory: Path, name: str | None = None) -> None:
    """Makes ``directory`` ready to be written: new, empty, or a run of the same name. What killed writers left is removed.

    Raises:
        CheckpointError: it cannot be written, holds files that are not ours, or holds a run of another name.
    """
    try:
        if directory.exists() and not directory.is_dir():
            raise CheckpointError(f"{directory} is a file; name a directory")
        if directory.is_dir() and any(path.name not in LOGS and _writer_of(path) is None for path in directory.iterdir()):
            if not holds_run(directory) and not (directory / RESULTS).exists():
                raise CheckpointError(f"{directory} is not empty and holds no fasthyper run; name another directory")
            found = read_results(directory).get("name") if name is not None and (directory / RESULTS).exists() else name
            if found != name:
                raise CheckpointError(f"{directory} holds a run of {found!r:.100}, not of {name!r}; name another directory")
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        for path in directory.iterdir():
            if (writer := _writer_of(path)) is not None and not _is_alive(writer):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error.strerror}") from error


def holds_run(directory: Path) -> bool:
    """Whether there is a state to go on from, whole or not."""
    return any((directory / name).exists() for name in (CHECKPOINT, PREVIOUS))


def save(directory: Path, tensors: dict[str, Tensor], state: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes checkpoint and results, each whole or not at all; the checkpoint that was there stays as ``PREVIOUS``.

    Raises:
        CheckpointError: it cannot be written, or the directory is not ours.
    """
    settle(directory)
    _save(directory, _copies(tensors), state, results)


def _save(directory: Path, tensors: dict[str, Tensor], state: dict[str, Any], results: dict[str, Any]) -> None:
    claim(directory)
    _write(directory / CHECKPOINT, tensors, FORMAT, state)
    text = json.dumps({"format": RESULTS_FORMAT, **results})
    _replace(directory / RESULTS, lambda path: path.write_text(text))


class Saver:
    """Saves a run while it goes on: its state is copied at once, and written in a thread of its own, one at a time.

    Of states that wait for the one being written only the newest stays.

    Args:
        directory: ``None``: nothing is saved.
        every: seconds between the saves of ``save_if_due``; more where copying would take more than ``SHARE`` of the time.
        contents: tensors, state and results as ``save`` takes them; a method, which is not kept alive.

    Raises:
        ValueError: ``every`` is not above 0.  CheckpointError: the directory cannot be written, or is not ours.
    """

    def __init__(
        self,
        directory: Path | None,
        every: float,
        contents: Callable[[], tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]],
    ):
        if not every > 0:
            raise ValueError(f"seconds between two saves must be above 0, got {every}")
        self.directory, self.every, self._contents = directory, every, weakref.WeakMethod(contents)
        self._due = time.monotonic() + every
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._waiting: tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]] | None = None
        self._error: BaseException | None = None
        if directory is not None:
            claim(directory)
            _SAVERS.add(self)

    def save_if_due(self) -> None:
        """Saves as ``save`` does, where the time has come and nothing is being written."""
        if self.directory is None:
            return
        self._raise()
        if time.monotonic() >= self._due and self._thread is None:
            self.save()

    def save(self) -> None:
        """Copies the state, and leaves it to be written.

        Raises:
            CheckpointError: an earlier state could not be written.
        """
        contents = self._contents()
        if self.directory is None or contents is None:
            return
        self._raise()
        began = time.monotonic()
        tensors, state, results = contents()
        with self._lock:
            self._waiting = _copies(tensors), state, results
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._write_all, args=(self.directory,), name="fasthyper-checkpoint")
                self._thread.start()
        now = time.monotonic()
        self._due = now + max(self.every, (now - began) / SHARE)

    def flush(self) -> None:
        """Waits until all is written.

        Raises:
            CheckpointError: it could not be.
        """
        self._wait()
        self._raise()

    def _wait(self) -> None:
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_all(self, directory: Path) -> None:
        while True:
            with self._lock:
                job, self._waiting = self._waiting, None
                if job is None:
                    self._thread = None
                    return
            try:
                _save(directory, *job)
            except BaseException as error:
                if not threading.main_thread().is_alive():  # nobody is left to be told later
                    raise
                self._error = error


_SAVERS: weakref.WeakSet[Saver] = weakref.WeakSet()


def settle(directory: Path) -> None:
    """Waits for what this process is writing there."""
    for saver in list(_SAVERS):
        if saver.directory is not None and saver.directory.absolute() == directory.absolute():
            saver._wait()


def load(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint.

    Raises:
        CheckpointError: missing, damaged, or of another format; it says how to go on from ``PREVIOUS`` if that is whole.
    """
    settle(directory)
    path, previous = directory / CHECKPOINT, directory / PREVIOUS
    try:
        return read(path, FORMAT)
    except CheckpointError as error:
        try:
            read(previous, FORMAT)
        except CheckpointError:
            raise error from None
        move = f"mv {shlex.quote(str(previous))} {shlex.quote(str(path))}"
        raise CheckpointError(f"{error}; the one before it is whole, and `{move}` goes on from there") from error


def write(path: Path, tensors: dict[str, Tensor], format: str, state: dict[str, Any] | None = None) -> None:
    """Writes one safetensors file, whole or not at all. Without ``state`` it is a plain one, as other programs write.

    Raises:
        CheckpointError: it cannot be written.
    """
    if path.name in (CHECKPOINT, PREVIOUS) and format != FORMAT:
        raise CheckpointError(f"{path} is what a run goes on from; name another file")
    _write(path, _copies(tensors), format, state)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and of nobody else."""
    contiguous = torch.contiguous_format
    return {name: t.detach().to("cpu", copy=True, memory_format=contiguous) for name, t in tensors.items()}


def _write(path: Path, tensors: dict[str, Tensor], format: str, state: dict[str, Any] | None = None) -> None:
    """``write``, of tensors that are ``_copies``."""
    from safetensors.torch import save_file

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
        raise CheckpointError(f"{path} is damaged or not a {format} file: {one_line(error)}") from error


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
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {one_line(error)}") from error


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
    return f"format: {one_line(found)}"


def read_results(directory: Path) -> dict[str, Any]:
    """What ``results.json`` of a run directory holds.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    settle(directory)
    path = directory / RESULTS
    try:
        content = json.loads(path.read_bytes().decode())
        if content.get("format") != RESULTS_FORMAT:
            raise CheckpointError(f"{path} is not a {RESULTS_FORMAT} file")
        return content
    except FileNotFoundError as error:
        raise CheckpointError(f"no {RESULTS} in {directory}: run `fasthyper run RECIPE --out {directory}` first") from error
    except (OSError, *UNREADABLE) as error:
        again = "; without it a run goes on, and writes it anew" if (directory / CHECKPOINT).exists() else ""
        raise CheckpointError(f"{path} is damaged: {one_line(error)}{again}") from error


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` to a neighbour, then onto ``path`` in one move; a checkpoint that was there stays as ``PREVIOUS``."""
    temporary = _beside(path)
    try:
        write(temporary)
        _sync(temporary)
        if path.name == CHECKPOINT and path.exists():
            _keep(path, path.with_name(PREVIOUS))
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, Exception):  # of many kinds: safetensors wraps a full disk in an error of its own
            raise CheckpointError(f"cannot write {path}: {error}; what was there before is unchanged") from error
        raise


def _keep(path: Path, kept: Path) -> None:
    """Makes ``kept`` a second name of the file at ``path``, which stays where it is."""
    beside = _beside(kept)
    try:
        beside.unlink(missing_ok=True)
        try:
            os.link(path, beside)
        except OSError:  # not every file system has links
            shutil.copyfile(path, beside)
            _sync(beside)
        os.replace(beside, kept)
    finally:
        beside.unlink(missing_ok=True)  # it stays where both were names of the same file already


def _sync(path: Path) -> None:
    """Waits until a file's contents, or a directory's names, lie on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    """Where this process writes what then moves to ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def _writer_of(path: Path) -> int | None:
    """The process that writes, or wrote, this file to move it into a run; ``None``: it is another file."""
    name, _, process = path.name.rpartition(".")
    ours = process.isdecimal() and name in (f".{kept}" for kept in (CHECKPOINT, PREVIOUS, RESULTS, SAMPLES))
    return int(process) if ours else None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        pass
    return True
