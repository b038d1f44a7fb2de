"""Reads a hypernetwork back, from the file that ``ChunkedHypernet.export`` wrote or from a run's checkpoint."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasthyper import checkpoint, nets
from fasthyper.errors import CheckpointError, one_line
from fasthyper.hypernet import ChunkedHypernet
from fasthyper.init import INITS

DTYPES = {"float32": torch.float32, "float64": torch.float64}
UNFIT = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError, AssertionError)
MOST_HEADS = 1 << 14  # of a target; each is a few Python objects, which a file of a few bytes could ask for without end


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
    given, config = target is not None, {**state["hnet"], "dtype": DTYPES[state["hnet"]["dtype"]]}
    target = target if target is not None else without_memory(state["target"], len(state["target_shapes"] or ()))
    num_tasks = sum(name.startswith("task_embeddings.") for name in tensors)
    per_task, init = config.get("outputs_per_task"), config.pop("init", "xavier")  # how it began matters no more
    widest = max(max(parameter.shape, default=0) for parameter in target.parameters())
    if init not in INITS or (per_task is not None and widest // per_task > MOST_HEADS):
        raise ValueError(f"it has an unknown init {init!r}, or more than {MOST_HEADS} output heads")
    with torch.device("meta"):  # what does not fit is told before it takes memory
        unfilled = ChunkedHypernet(target, num_tasks, **config)
    if unfilled.target.named_shapes() != state["target_shapes"]:
        raise ValueError(f"the target's parameters differ from those of the saved {state['target']['class']}")
    laid = unfilled.layout.to_json()
    if state.get("layout", laid) != laid:  # parameters of equal shapes would be other weights
        raise ValueError("its weights lie otherwise in the chunks than this version of fasthyper lays them")
    for name, own in unfilled.state_dict().items():
        if (tensors[name].dtype, tensors[name].shape) != (own.dtype, own.shape):
            raise ValueError(f"{name} is {tensors[name].dtype} {list(tensors[name].shape)} in it")
    if not given:
        fill(target, unfilled.target.names)
    hnet = ChunkedHypernet(target, num_tasks, **config)
    hnet.load_state_dict(tensors)
    hnet.config["init"] = init
    return hnet


def without_memory(description: dict[str, Any], most: int) -> nn.Module:
    """What ``nets.build`` builds, on no device, with at most ``most`` layers.

    Raises:
        One of ``UNFIT``: it is not a network of this package, or has more layers.
    """
    if (description["config"] or {}).get("n", 0) > most:
        raise ValueError(f"a {description['class']} of that many layers has more than the {most} parameters saved")
    with torch.device("meta"):
        return nets.build(description)


def fill(module: nn.Module, leave: Container[str]) -> None:
    """Gives memory, on the CPU, to a module's buffers and to its parameters but those of these names."""
    for prefix, layer in module.named_modules():
        for held in (layer._parameters, layer._buffers):
            for name, tensor in held.items():
                if tensor is not None and f"{prefix}.{name}".removeprefix(".") not in leave:
                    empty = torch.zeros_like(tensor, device="cpu")
                    held[name] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def unfit(path: Path, error: Exception) -> CheckpointError:
    """One line for what kept ``rebuild`` from its work."""
    what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    return CheckpointError(f"{path} does not fit: {one_line(what)}")


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, under what follows."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
