"""Reads a hypernetwork back, from the file that ``ChunkedHypernet.export`` wrote or from a run's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper import checkpoint, nets
from fasthyper.errors import CheckpointError
from fasthyper.hypernet import ChunkedHypernet

DTYPES = {"float32": torch.float32, "float64": torch.float64}
UNFIT = (KeyError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError)


def load(path: str | Path, target: nn.Module | None = None) -> ChunkedHypernet:
    """The hypernetwork that ``ChunkedHypernet.export`` wrote, or that of a run. Reading it cannot run code.

    Args:
        path: a file, or the directory of a run.
        target: the target network, if it is not one of ``fh.nets``, which are rebuilt from the file.

    Raises:
        CheckpointError: a missing, damaged or foreign file, or a target that does not fit.
    """
    path = Path(path)
    if path.is_dir():
        path = path / checkpoint.CHECKPOINT
        tensors, state = checkpoint.load(path.parent)
        tensors = with_prefix(tensors, "hnet.")
    else:
        tensors, state = checkpoint.read(path, checkpoint.HYPERNET_FORMAT)
    try:
        return rebuild(tensors, state, target)
    except UNFIT as error:
        raise unfit(path, error) from error


def rebuild(tensors: dict[str, Tensor], state: dict[str, Any], target: nn.Module | None) -> ChunkedHypernet:
    """A hypernetwork with these parameters.

    Raises:
        One of ``UNFIT``: something is lacking, or does not fit.
    """
    target = target if target is not None else nets.build(state["target"])
    num_tasks = sum(name.startswith("task_embeddings.") for name in tensors)
    hnet = ChunkedHypernet(target, num_tasks, **{**state["hnet"], "dtype": DTYPES[state["hnet"]["dtype"]]})
    if hnet.target.named_shapes() != state["target_shapes"]:
        raise ValueError(f"the target's parameters differ from those of the saved {state['target']['class']}")
    for name, own in hnet.state_dict().items():
        if (tensors[name].dtype, tensors[name].shape) != (own.dtype, own.shape):
            raise ValueError(f"{name} is {tensors[name].dtype} {list(tensors[name].shape)} in it")
    hnet.load_state_dict(tensors)
    return hnet


def unfit(path: Path, error: Exception) -> CheckpointError:
    """One line for what kept ``rebuild`` from its work."""
    what = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
    return CheckpointError(f"{path} does not fit: {what}")


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, under what follows."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
